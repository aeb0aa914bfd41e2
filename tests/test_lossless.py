"""Packed files: the same bytes back on any machine, or an error that names the block."""

from __future__ import annotations

import io
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.commands.cli import main
from compressor.errors import CompressorError
from compressor.model.memory import Memory
from compressor.packing import frequencies as fr
from compressor.packing.blocks import RAW, TEXT, ZSTD, Block, parse, serialise
from compressor.packing.float64 import ExactBase, Lockstep
from compressor.packing.lossless import pack_bytes, pack_passage, split_text, unpack_bytes, unpack_passage
from compressor.packing.ranges import RangeDecoder, RangeEncoder
from compressor.packing.token_coder import Unencodable, decode_lanes, encode_lane
from compressor.storage.inspection import byte_ledger

pytest.importorskip("zstandard")

BUNDLED = "models/arxiv-mini/base"


@pytest.fixture(scope="module")
def abstracts(texts: list[str]) -> list[str]:
    """Short real texts."""
    return [text[:160] for text in texts[:6]]


@pytest.fixture(scope="module")
def exact(tiny_base_folder: Path, abstracts: list[str]) -> ExactBase:
    """A tiny base that has learned these texts: it packs them smaller than zstd does, and quickly."""
    from compressor.model.config import BaseConfig
    from compressor.model.load import load_base

    base = load_base(BaseConfig(path=str(tiny_base_folder)))
    rows = [[base.bos, *base.tokenizer(text)["input_ids"], base.eos][:100] for text in abstracts]
    ids = torch.tensor([row + [base.eos] * (100 - len(row)) for row in rows])
    base.model.requires_grad_(True)
    optimiser = torch.optim.Adam(base.model.parameters(), lr=1e-2)
    for _ in range(60):
        base.model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    base.model.requires_grad_(False)
    return ExactBase(base)


@pytest.fixture(scope="module")
def packed(exact: ExactBase, abstracts: list[str]) -> tuple[bytes, bytes]:
    """Four abstracts as lines of a file, and that file packed: a text block of several lanes."""
    data = ("\n".join(abstracts[:4]) + "\n").encode()
    return data, pack_bytes(data, exact, lane_tokens=64)


@pytest.fixture
def noise(exact: ExactBase) -> Iterator[Callable[[float], None]]:
    """Sets how far all logits are moved, each by a random amount up to it."""
    generator = torch.Generator().manual_seed(3)

    def disturb(most: float) -> None:
        def move(logits: torch.Tensor) -> torch.Tensor:
            return logits + (torch.rand(logits.shape, generator=generator, dtype=torch.float64) * 2 - 1) * most

        exact.noise = move

    yield disturb
    exact.noise = None


# --- integers -------------------------------------------------------------------------------------------------


def test_the_weights_are_the_floors_of_powers_of_two() -> None:
    # w = floor(2**32 * 2**(-d/8)) exactly: w**8 <= 2**(256-d) < (w+1)**8.
    for depth, weight in enumerate(fr._WEIGHTS[:-1].tolist()):
        assert weight**8 <= 1 << (256 - depth) < (weight + 1) ** 8


@pytest.mark.parametrize("vocabulary", [3, 512, 50_000, fr.LARGEST_VOCABULARY])
def test_frequencies_sum_to_two_to_the_24_and_follow_the_probabilities(vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(3, vocabulary))
    steps, _ = fr.to_steps(logits, fr.SCALES.index(1.0))
    found = fr.frequencies(fr.to_depths(steps, 5))
    assert (found.sum(axis=1) == fr.TOTAL).all()
    assert found.min() >= 1
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    cost = (exact * (np.log2(exact) - np.log2(found / fr.TOTAL))).sum(axis=1)
    assert (cost < 0.001 + 2 * vocabulary / fr.TOTAL).all()


def test_extreme_distributions_keep_every_symbol() -> None:
    for logits in (
        np.zeros((1, 4096)),
        np.array([[0.0, -1e6, 5.0]]),
        np.full((1, 7), -2e6),
        np.array([[1.0, -np.inf]]),
    ):
        steps, _ = fr.to_steps(logits, 0)
        found = fr.frequencies(fr.to_depths(steps, 0))
        assert found.min() >= 1
        assert found.sum() == fr.TOTAL
    for wrong in (np.array([[0.0, np.nan]]), np.full((1, 3), -np.inf), np.array([[1e9, 0.0]])):
        with pytest.raises(CompressorError, match="not finite or beyond"):
            fr.to_steps(wrong, 0)


def test_a_usable_offset_gives_the_same_frequencies_within_the_guard() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=4, size=(400, 512))
    # Some logits on boundaries of chosen offsets, where noise must matter.
    for row, offset in ((3, 0), (7, 9), (11, 30)):
        logits[row, 100] = (40 * fr.OFFSETS - offset) / fr._STEPS_A_NAT - 15
        logits[row] -= logits[row].max() + rng.random()
        logits[row, 100] = -(17 * fr.OFFSETS + offset) / fr._STEPS_A_NAT
    scale = fr.SCALES.index(1.0)
    steps, unusable = fr.to_steps(logits, scale)
    bad = unusable.any(axis=0)
    assert {0, 9, 30} <= set(np.flatnonzero(bad).tolist())
    assert not bad.all()
    changed = set()
    for _ in range(6):
        moved = logits + rng.uniform(-1, 1, logits.shape) * fr.GUARD
        other, _ = fr.to_steps(moved, scale)
        for offset in range(fr.OFFSETS):
            same = np.array_equal(fr.to_depths(steps, offset), fr.to_depths(other, offset))
            assert same or bad[offset]
            if not same:
                changed.add(offset)
    assert changed & {0, 9, 30}  # the test would see a guard that does nothing


def test_the_range_coder_gives_back_any_symbols() -> None:
    rng = random.Random(0)
    for case in range(200):
        symbols = []
        for _ in range(rng.randrange(60)):
            bits = rng.choice([1, 3, 4, 5, 24])
            width = rng.choice([1, 1 << bits - 1, rng.randrange(1, (1 << bits) + 1)])
            start = rng.choice([0, (1 << bits) - width, rng.randrange((1 << bits) - width + 1)])
            symbols.append((start, width, bits))
        encoder = RangeEncoder()
        for symbol in symbols:
            encoder.encode(*symbol)
        data = encoder.finish()
        ideal = sum(bits - np.log2(width) for _, width, bits in symbols)
        assert len(data) <= ideal / 8 + 1.01, case
        decoder = RangeDecoder(data)
        for start, width, bits in symbols:
            assert start <= decoder.target(bits) < start + width
            decoder.consume(start, width)


def test_carries_run_through_bytes_that_are_full() -> None:
    # Intervals at the top of the range make 0xFF bytes; a last symbol then carries, or not, through all of them.
    for last in (0, 1):
        encoder = RangeEncoder()
        symbols = [((1 << 24) - 1, 1, 24)] * 8 + [(last, 1, 1)]
        for symbol in symbols:
            encoder.encode(*symbol)
        decoder = RangeDecoder(encoder.finish())
        for start, width, bits in symbols:
            assert decoder.target(bits) == start
            decoder.consume(start, width)


# --- tokens ---------------------------------------------------------------------------------------------------


def test_parallel_and_lockstep_logits_agree_far_within_the_guard(exact: ExactBase, abstracts: list[str]) -> None:
    rows = [[exact.base.bos, *exact.base.tokenizer(text)["input_ids"]][:70] for text in abstracts[:3]]
    parallel = exact.logits(rows)
    cache = Lockstep(exact, 3)
    worst = 0.0
    for place in range(min(map(len, rows))):
        logits = cache.step([[row[place]] for row in rows], [0] * 3)
        assert logits[0].dtype == torch.float64
        worst = max(
            worst, *(float((one - all_[place]).abs().max()) for one, all_ in zip(logits, parallel, strict=True))
        )
    assert 0 < worst < fr.GUARD / 1000


def test_no_part_of_the_model_rounds_to_float32(tiny_base: Any) -> None:
    # A change of one weight by 1e-12 of itself moves logits by about as much; through float32 it would vanish or jump.
    exact = ExactBase(tiny_base)
    before = exact.logits([[1, 5, 9, 11]])[0]
    exact.base.model.get_decoder().layers[0].mlp.down_proj.weight.data *= 1 + 1e-12
    moved = (exact.logits([[1, 5, 9, 11]])[0] - before).abs().max()
    assert 0 < moved < 1e-10
    assert tiny_base.dtype == torch.float32  # the original is left as it was


@pytest.mark.parametrize("kind", ["llama3-rope", "qwen3", "gemma", "gpt-neox"])
def test_token_sequences_come_back_in_every_family(make_family_base: Any, kind: str) -> None:
    exact = ExactBase(make_family_base(kind))
    generator = random.Random(1)
    rows = [[generator.randrange(3, exact.vocabulary) for _ in range(length)] for length in (0, 1, 30)]
    rows = [[token for token in row if token != exact.base.eos] for row in rows]
    coded = [encode_lane(exact, [ids], False) for ids in rows]
    assert decode_lanes(exact, coded, False) == [[ids] for ids in rows]


def test_a_window_slides_over_a_long_document(exact: ExactBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "window", 70)
    ids = exact.base.tokenizer("words and numbers 12 " * 40)["input_ids"]
    for length in (69, 70, 75, 76):
        lane = [ids[:length], [], ids[: length // 2]]
        assert decode_lanes(exact, [encode_lane(exact, lane, True)], True) == [lane]


def test_lanes_of_unequal_length_come_back_in_any_batch(exact: ExactBase, abstracts: list[str]) -> None:
    ids = [exact.base.tokenizer(text)["input_ids"] for text in abstracts[:4]]
    lanes = [[ids[0][:20]], [ids[1][:50], [], ids[2][:5]], [[]], [ids[3][:35], ids[0][:3]]]
    coded = [encode_lane(exact, lane, True) for lane in lanes]
    assert decode_lanes(exact, coded, True) == lanes
    assert [decode_lanes(exact, [one], True)[0] for one in coded] == lanes


def test_what_is_told_is_checked_against_the_bytes(
    exact: ExactBase, abstracts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """True or false, for none or too many lanes, documents and tokens, and over the edge of a window."""
    monkeypatch.setattr(exact, "window", 80)
    ids = [exact.base.tokenizer(text)["input_ids"] for text in abstracts[:4]]
    lanes = [[ids[0][:90]], [ids[1][:50], [], ids[2][:85]], [[]], [ids[3][:35], ids[0][:3]]]
    coded, steps = [encode_lane(exact, lane, True) for lane in lanes], []
    fed = Lockstep.step
    monkeypatch.setattr(Lockstep, "step", lambda *given: steps.append(1) or fed(*given))
    wrong = [[[*document[:10], 7, *document[11:]] for document in lane] for lane in lanes]
    taken = {}
    told = {"nothing": None, "true": lanes, "wrong": wrong, "others": lanes[::-1], "less": [[], [[]], [], []]}
    for name, one in told.items():
        steps.clear()
        assert decode_lanes(exact, coded, True, told=one) == lanes, name
        taken[name] = len(steps)
    assert taken["true"] < taken["nothing"] / 5, taken
    assert taken["true"] < taken["wrong"] <= taken["nothing"], taken


def test_what_cannot_be_coded_is_refused(exact: ExactBase, noise: Callable[[float], None]) -> None:
    with pytest.raises(Unencodable, match="end-of-text"):
        encode_lane(exact, [[5, exact.base.eos, 6]], False)
    with pytest.raises(Unencodable, match="in one lane"):
        encode_lane(exact, [[5] * 20_000], False)
    exact.noise = lambda logits: logits * float("nan")
    with pytest.raises(CompressorError, match="not finite"):
        encode_lane(exact, [[5, 6]], False)


def test_no_offset_left_is_noticed(exact: ExactBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fr, "GUARD", 1e-3)
    with pytest.raises(Unencodable, match="every offset"):
        encode_lane(exact, [[5, 6, 7, 8]], False)


# --- bytes ----------------------------------------------------------------------------------------------------

AWKWARD = {
    "empty": b"",
    "a byte": b"x",
    "random": random.Random(0).randbytes(3000),
    "invalid UTF-8": "naïve café, déjà vu. ".encode("latin-1") * 20,
    "half a character at the end": ("long text " * 20 + "é").encode()[:-1],
    "NUL": b"a\0b\0\0c" * 30,
    "CR LF": b"one line\r\nand another\r\n\r\n" * 5,
    "special tokens": b"<bos>text<eos> more <pad></s><|endoftext|>\n" * 3,
    "spaces": b" \t  \n\n   \n x  y \n" * 10,
    "one huge line": b"aGVsbG8gd29ybGQ" * 4000,
    "scripts": "Ελληνικά עברית 漢字 🙂 e\u0301 \ufeff \u2028".encode() * 3,
    "not characters": "\ufffe\uffff\U0010ffff".encode() * 9,
}


@pytest.mark.parametrize("name", AWKWARD)
def test_any_bytes_come_back(exact: ExactBase, name: str) -> None:
    data = AWKWARD[name]
    blob = pack_bytes(data, exact)
    assert unpack_bytes(blob, exact) == data
    assert len(blob) <= len(data) + 7


def test_text_is_packed_as_text_several_times_smaller(exact: ExactBase, abstracts: list[str]) -> None:
    data = abstracts[5].encode()
    blob = pack_bytes(data, exact)
    assert [block.kind for block, _ in parse(blob)[1]] == [TEXT]
    assert len(blob) * 3 < len(data)


def test_lines_are_documents_and_several_lanes_hold_them(exact: ExactBase, packed: tuple[bytes, bytes]) -> None:
    data, blob = packed
    (block, _), *others = parse(blob)[1]
    assert not others
    assert (block.kind, block.separator, block.closed, block.one_lane) == (TEXT, 1, True, False)
    assert unpack_bytes(blob, exact) == data


@pytest.mark.parametrize("separator", ["\n\n", "\r\n"])
def test_paragraphs_and_dos_lines_are_documents_too(exact: ExactBase, abstracts: list[str], separator: str) -> None:
    data = separator.join(abstracts[:3]).encode()
    blob = pack_bytes(data, exact)
    assert parse(blob)[1][0][0].separator > 1
    assert unpack_bytes(blob, exact) == data


def test_mixed_bytes_are_cut_into_blocks(
    exact: ExactBase, abstracts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.packing import lossless

    monkeypatch.setattr(lossless, "_PAGE", 64)
    data = abstracts[0].encode() + random.Random(0).randbytes(500) + b"\x80" + abstracts[1].encode()
    blob = pack_bytes(data, exact)
    assert [block.kind for block, _ in parse(blob)[1]] == [TEXT, RAW, TEXT]
    assert unpack_bytes(blob, exact) == data


def test_splitting_keeps_all_bytes_and_finds_the_text() -> None:
    rng = random.Random(1)
    pool = [b"plain text\n" * 300, "漢字かな🙂".encode() * 500, rng.randbytes(4096), b"\0" * 5000, b"\x80", b"\n"]
    for _ in range(40):
        data = b"".join(rng.choice(pool)[rng.randrange(4) :] for _ in range(rng.randrange(30)))
        pieces = list(split_text(data))
        assert b"".join(piece for _, piece in pieces) == data
        for is_text, piece in pieces:
            if is_text:
                piece.decode()
    large = "é".encode() * 300_000
    assert [is_text for is_text, _ in split_text(large)] == [True] * 3


def test_text_that_does_not_tokenise_back_falls_back(
    exact: ExactBase, abstracts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful:
        def __init__(self, tokenizer: Any):
            self.tokenizer = tokenizer

        def __call__(self, given: list[str], **settings: Any) -> Any:
            return self.tokenizer([text.lower() for text in given], **settings)

        def decode(self, *given: Any, **settings: Any) -> str:
            return self.tokenizer.decode(*given, **settings)

    monkeypatch.setattr(exact.base, "tokenizer", Forgetful(exact.base.tokenizer))
    data = abstracts[0].encode()
    blob = pack_bytes(data, exact)
    assert parse(blob)[1][0][0].kind in (RAW, ZSTD)
    assert unpack_bytes(blob, exact) == data


# --- other machines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "batch"), [(1, 3), (2, 1), (2, 64)])
def test_threads_and_batches_do_not_matter(
    exact: ExactBase, packed: tuple[bytes, bytes], threads: int, batch: int
) -> None:
    torch.set_num_threads(threads)
    try:
        assert unpack_bytes(packed[1], exact, batch=batch) == packed[0]
    finally:
        torch.set_num_threads(1)


def test_kernels_do_not_matter(exact: ExactBase, packed: tuple[bytes, bytes]) -> None:
    data, blob = packed
    with torch.backends.mkldnn.flags(enabled=False):
        assert unpack_bytes(blob, exact) == data
    torch.use_deterministic_algorithms(True)
    try:
        assert unpack_bytes(blob, exact) == data
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert unpack_bytes(blob, exact) == data


def test_eager_attention_unpacks_too(exact: ExactBase, packed: tuple[bytes, bytes]) -> None:
    exact.base.model.set_attn_implementation("eager")
    try:
        assert unpack_bytes(packed[1], exact) == packed[0]
    finally:
        exact.base.model.set_attn_implementation("sdpa")


def test_the_bundled_base_packs_an_abstract_held_in_any_type(texts: list[str]) -> None:
    from compressor.model.config import BaseConfig
    from compressor.model.load import load_base

    data = min((text for text in texts if len(text) > 400), key=len).encode()
    blob = pack_bytes(data, load_base(BaseConfig(path=BUNDLED)))
    assert 3 * len(blob) < len(data)
    assert unpack_bytes(blob, load_base(BaseConfig(path=BUNDLED, dtype="bfloat16", attention="eager"))) == data


def test_noise_up_to_the_guard_does_not_matter_and_more_is_noticed(
    exact: ExactBase, packed: tuple[bytes, bytes], noise: Callable[[float], None]
) -> None:
    data, blob = packed
    for _ in range(2):
        noise(fr.GUARD * 0.999)
        assert unpack_bytes(blob, exact) == data
    noise(1e-2)
    with pytest.raises(CompressorError, match="block 1 "):
        unpack_bytes(blob, exact)
    with pytest.raises(CompressorError, match=r"block 1 |does not unpack to the same bytes"):
        pack_bytes(data, exact)  # what cannot be unpacked here is not handed out


# --- damaged files --------------------------------------------------------------------------------------------


def test_another_base_is_refused(tiny_base: Any, packed: tuple[bytes, bytes]) -> None:
    with pytest.raises(CompressorError, match="packed with another base"):
        unpack_bytes(packed[1], tiny_base)


def test_foreign_and_newer_files_are_refused(exact: ExactBase, packed: tuple[bytes, bytes]) -> None:
    for foreign in (b"", b"\xce", b"PK\x03\x04 zip", b"\x1f\x8b\x08gzip", b"plain text", bytes(1000)):
        with pytest.raises(CompressorError, match="not a packed file"):
            unpack_bytes(foreign, exact)
    newer = bytes([packed[1][0], packed[1][1] + 1]) + packed[1][2:]
    with pytest.raises(CompressorError, match="has version 2"):
        unpack_bytes(newer, exact)


def mutations(blob: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flipped bits, cuts, insertions, deletions, repeated and zeroed stretches."""
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(blob)
        place = rng.randrange(len(data))
        kind = number % 6
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            del data[place : place + rng.randrange(1, 9)]
        elif kind == 4:
            data += data[place:]
        else:
            data[place : place + 8] = bytes(8)
        if bytes(data) != blob:
            yield bytes(data)


def test_thousands_of_damaged_plain_files_are_refused() -> None:
    # The base is never needed: a damaged file that claims to hold text is refused before, or asks for it.
    def unneeded() -> Any:
        raise CompressorError("another base")

    pieces = [b"a line of a log, with numbers 1234\n" * 40, random.Random(0).randbytes(300), bytes(500)]
    import bz2

    from compressor.packing.blocks import BZIP2, zstd_frame

    blocks = [
        (Block(ZSTD, zstd_frame(pieces[0])), pieces[0]),
        (Block(RAW, pieces[1]), pieces[1]),
        (Block(BZIP2, bz2.compress(pieces[2])[4:]), pieces[2]),
    ]
    blob = serialise(blocks, b"abc")
    assert unpack_bytes(blob, unneeded) == b"".join(pieces)
    refused = 0
    for damaged in mutations(blob, 6000, seed=1):
        with pytest.raises(CompressorError, match=r"block \d|not a packed file|version|another base"):
            unpack_bytes(damaged, unneeded)
        refused += 1
    assert refused > 5000


def test_damaged_text_is_refused(exact: ExactBase, packed: tuple[bytes, bytes], abstracts: list[str]) -> None:
    text = abstracts[0][:60].encode()
    body = encode_lane(exact, [exact.base.tokenizer(text.decode())["input_ids"]], False)
    blob = serialise([(Block(TEXT, body, one_lane=True), text)], exact.identity)
    assert unpack_bytes(blob, exact) == text
    for damaged in (*mutations(blob, 12, seed=2), *mutations(packed[1][:40], 12, seed=3)):
        with pytest.raises(CompressorError, match=r"block \d|not a packed file|version|another base"):
            unpack_bytes(damaged, exact, limit=1000)


def test_bombs_and_absurd_lengths_are_refused(exact: ExactBase) -> None:
    from compressor.packing.blocks import zstd_frame

    huge = bytes((1 << 22) + 1)
    blob = serialise([(Block(ZSTD, zstd_frame(huge)), huge)], b"abc")
    with pytest.raises(CompressorError, match=r"block 1 .* holds more than"):
        unpack_bytes(blob, exact)
    for body in (b"\xff\xff\xff\xff\xff\xff", b"\x80", b"\x01", b"\x03\xff\xff\x7f\x05", b""):
        blob = serialise([(Block(TEXT, body), b"")], exact.identity)
        with pytest.raises(CompressorError, match="block 1 "):
            unpack_bytes(blob, exact)
    with pytest.raises(CompressorError, match="beyond 5 bytes"):
        unpack_bytes(pack_bytes(b"123456", exact), exact, limit=5)


def test_the_first_wrong_block_is_named(exact: ExactBase) -> None:
    pieces = [b"one", b"two", b"three"]
    blob = bytearray(serialise([(Block(RAW, piece), piece) for piece in pieces], b"abc"))
    blob[blob.index(b"two")] ^= 1
    with pytest.raises(CompressorError, match=r"block 2 \(bytes 11 to 20"):
        unpack_bytes(bytes(blob), exact)


def test_bytes_that_end_too_early_are_noticed_at_once(exact: ExactBase, abstracts: list[str]) -> None:
    coded = encode_lane(exact, [exact.base.tokenizer(abstracts[0])["input_ids"]], False)
    seen: list[int] = []
    with pytest.raises(CompressorError, match="end too early"):
        decode_lanes(exact, [coded[: len(coded) // 2]], False, seen.append)
    assert len(seen) < 8


def test_a_lane_that_never_ends_is_stopped(exact: ExactBase, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.packing import token_coder

    monkeypatch.setattr(token_coder, "LANE_SYMBOLS", 12)
    with pytest.raises(CompressorError, match="do not end"):
        decode_lanes(exact, [random.Random(5).randbytes(300)], False)


# --- the command ----------------------------------------------------------------------------------------------


class Terminal(io.BytesIO):
    """A standard stream with bytes below it."""

    def __init__(self, data: bytes = b"", tty: bool = False):
        super().__init__(data)
        self.tty, self.buffer = tty, self

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def run(exact: ExactBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, bytes]]:
    """Runs `compressor ARGUMENTS` in an empty folder; returns its status and what it wrote to standard output."""
    from compressor.commands import packer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packer, "exact_base", lambda *_: exact)

    def call(*arguments: str, stdin: bytes = b"", tty: bool = False) -> tuple[int, bytes]:
        out = Terminal(tty=tty)
        monkeypatch.setattr(sys, "stdin", Terminal(stdin, tty))
        monkeypatch.setattr(sys, "stdout", out)
        return main(arguments), out.getvalue()

    return call


def test_pack_and_unpack_are_used_as_gzip_is(run: Any, tmp_path: Path, abstracts: list[str]) -> None:
    file, small = tmp_path / "a.txt", tmp_path / "a.txt.cz"
    data = abstracts[0].encode()
    file.write_bytes(data)
    os.chmod(file, 0o640)
    os.utime(file, (10**9, 10**9))
    assert run("pack", "a.txt") == (0, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt.cz"]
    assert (small.stat().st_mtime, small.stat().st_mode & 0o777) == (10**9, 0o640)
    assert run("unpack", "-k", "a.txt.cz") == (0, b"")
    assert (file.read_bytes(), file.stat().st_mtime, small.exists()) == (data, 10**9, True)
    assert run("pack", "-d", "-c", "a.txt.cz") == (0, data)
    status, packed = run("pack", stdin=data)
    assert (status, packed) == (0, small.read_bytes())
    assert run("unpack", "-", stdin=packed) == (0, data)
    assert run("pack", "-t", "a.txt.cz") == (0, b"")
    assert run("unpack", "a.txt.cz", "-o", "b") == (0, b"")
    assert (tmp_path / "b").read_bytes() == data
    assert small.exists()


def test_what_gzip_leaves_alone_is_left_alone(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a", "a.cz", "b"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "link").symlink_to("b")
    for arguments, reason in (
        (["pack", "a"], "already exists; not overwritten"),
        (["pack", "a", "-o", "b"], "already exists"),
        (["pack", "a.cz"], "already has .cz suffix"),
        (["unpack", "b"], "unknown suffix"),
        (["pack", "folder"], "is a directory"),
        (["pack", "link"], "not a regular file"),
    ):
        assert run(*arguments) == (2, b"")
        assert reason in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.cz", "b", "link", "folder"}
    assert [(tmp_path / name).read_bytes() for name in ("a", "a.cz", "b")] == [b"a", b"a.cz", b"b"]
    assert run("pack", "-f", "a") == (0, b"")
    assert run("unpack", "a.cz") == (0, b"")
    assert (tmp_path / "a").read_bytes() == b"a"


def test_errors_have_status_1_and_lose_nothing(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.cz").write_bytes(b"not packed")
    (tmp_path / "b").write_bytes(b"b")
    for arguments, reason in (
        (["unpack", "a.cz"], "a.cz: this is not a packed file"),
        (["pack", "missing"], "missing: No such file"),
        (["pack", "b", "-o", "nowhere/b.cz"], "no folder nowhere"),
        (["pack", "b", "-o", "c", "-c"], "-o takes one input"),
        (["pack", "--no-such-option"], "unrecognized arguments"),
        (["pack", "--batch", "0", "b"], "must be at least 1"),
        (["pack", "--codec", "keywords", "--tokens", "0", "b"], "--tokens is 0: it must be at least 1"),
        (["pack", "b", "--lane-tokens", "1"], "lane_tokens must be 16 to 8,192"),
    ):
        assert run(*arguments) == (1, b"")
        assert reason in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.cz", "b"}
    # One bad file does not stop the others, and an error outweighs a warning.
    assert run("pack", "missing", "a.cz", "b") == (1, b"")
    assert (tmp_path / "b.cz").exists()
    assert run("pack", tty=True) == (1, b"")


def test_a_missing_library_is_named(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert run("pack", stdin=b"text") == (1, b"")
    assert "pip install 'kv-compressor[codecs]'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["  white space \r\n\n", "naïve 𝛼≤β </s> \t", "x"])
def test_a_passage_is_kept_with_and_without_a_base(exact: ExactBase, text: str) -> None:
    assert unpack_passage(pack_passage(text, exact), exact) == text
    plain = pack_passage(text)
    assert unpack_passage(plain, exact) == text
    for kept in (plain, pack_passage(text, exact)):
        with pytest.raises(CompressorError):
            unpack_passage(kept[:-1] + bytes([kept[-1] ^ 1]), exact)
    with pytest.raises(CompressorError, match="surrogates"):
        pack_passage("\ud800 x", exact)


def test_a_text_is_kept_with_its_memory(
    tiny_compressor: Any, tiny_base_folder: Path, abstracts: list[str], tmp_path: Path, capsysbinary: Any
) -> None:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    base = ["--base", str(tiny_base_folder)]
    options = ["--keep-text", "--tokens", "2", "--checkpoint", str(tmp_path / "checkpoint"), *base]
    source, target = tmp_path / "text.txt", tmp_path / "m"
    source.write_bytes(f"  {abstracts[0][:90]} \r\n\n".encode())
    assert main(["compress", str(source), "-o", str(target), *options]) == 0
    assert b"are the text" in capsysbinary.readouterr().out
    memory = Memory.load(target)
    assert memory.text is not None
    assert memory.truncate(1).text == memory.text
    assert Memory.concatenate([memory, memory]).text is None
    assert byte_ledger(target)["text"] == len(memory.text)
    assert sum(byte_ledger(target).values()) == target.stat().st_size
    for tokens in ([], ["--tokens", "1"]):
        assert main(["regenerate", "--memory", str(target), "--exact", *tokens, *base]) == 0
        assert capsysbinary.readouterr().out == source.read_bytes()
    assert main(["regenerate", "--memory", str(target), *base]) == 0
    assert capsysbinary.readouterr().out != source.read_bytes()

    replace(memory, text=None).save(target)
    assert main(["regenerate", "--memory", str(target), "--exact", *base]) == 2
    assert b"compress the passage again with --keep-text" in capsysbinary.readouterr().err

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": " exactly this  "}\n{"id": "b", "text": "and that"}\n')
    assert main(["index", str(corpus), "-o", str(tmp_path / "many"), "--encoder=bm25", *options]) == 0
    capsysbinary.readouterr()
    assert main(["regenerate", "--memory", str(tmp_path / "many"), "--id=a", "--exact", *base]) == 0
    assert capsysbinary.readouterr().out == b" exactly this  "
