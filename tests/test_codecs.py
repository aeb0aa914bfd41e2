"""Quantisers, entropy models and coders, the low-rank transform, and codecs as a whole."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import CompressorError
from compressor.model.decoder import decode
from compressor.model.memory import Memory, Segment, memory_prefix
from compressor.storage import entropy, quantise
from compressor.storage.calibration import Calibration, flatten_tokens, unflatten_tokens
from compressor.storage.codec import Codec
from compressor.storage.fitting import calibrate, fit_calibration
from compressor.storage.lowrank import fit, step_size

LAYERS, HEADS, SIZE, SLOTS, RANK = 3, 2, 8, 4, 10
CODERS = ("ans", "huffman")


def made(seed: int, tokens: int = SLOTS) -> Memory:
    """A memory whose tokens lie near a plane of `RANK` dimensions, about a mean for each token."""
    fixed, free = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    mixing = torch.randn(RANK, 2 * LAYERS * HEADS * SIZE, generator=fixed) * torch.logspace(0.5, -1, RANK)[:, None]
    mean = torch.randn(SLOTS, 2 * LAYERS * HEADS * SIZE, generator=fixed)[:tokens]
    noise = 0.003 * torch.randn(tokens, mixing.shape[1], generator=free)
    pair = unflatten_tokens(
        torch.randn(tokens, RANK, generator=free) @ mixing + mean + noise, (LAYERS, HEADS, tokens, SIZE)
    )
    return Memory(pair[0].clone(), pair[1].clone(), (Segment(tokens, 30),), "nested", SLOTS, "a" * 64)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fit_calibration([made(seed) for seed in range(200)])


def round_trip(codec: Codec, memory: Memory) -> Memory:
    memory = codec.prepare(memory)
    tensors, details = codec.encode(memory)
    slots = [slot for segment in memory.segments for slot in range(segment.tokens)]
    keys, values = codec.decode(tensors, details, memory.keys.shape, slots)
    return replace(memory, keys=keys, values=values)


def size(codec: Codec, memory: Memory) -> int:
    return sum(tensor.nbytes for tensor in codec.encode(memory)[0].values())


def error(codec: Codec, memory: Memory) -> float:
    back = round_trip(codec, memory)
    found, wanted = torch.cat([back.keys, back.values]), torch.cat([memory.keys, memory.values])
    return float((found.float() - wanted).square().mean() / wanted.square().mean())


# -- entropy coding ----------------------------------------------------------------------------------------------------


def test_tables_sum_to_the_precision_and_miss_no_integer() -> None:
    for model in (m for m in entropy.MODELS if m % 64 < 24 or m % 64 == entropy.SCALES - 1):
        table = entropy.table(model)
        assert table.sum() == 1 << entropy.PRECISION
        assert table.min() >= 1
        assert len(table) == 2 * entropy.reach(model) + 1
        assert abs(np.argmax(table) - entropy.reach(model)) <= 1
    for model in entropy.MODELS:
        assert entropy.table(model, (-2, 1)).sum() == 1 << entropy.PRECISION


def test_tables_are_what_they_were() -> None:
    # Files are read under these numbers: a change needs a new format.
    assert entropy.table(8).tolist() == TABLE_8
    assert entropy.table(64 + 10, (-4, 3)).tolist() == TABLE_74


TABLE_8 = [1, 1, 1, 25, 2246, 74355, 905818, 4059591, 6693140, 4059591, 905818, 74355, 2246, 25, 1, 1, 1]
TABLE_74 = [268927, 731020, 1987117, 5401542, 5401546, 1987117, 731020, 268927]


def test_scales_are_standard_deviations_in_steps() -> None:
    for model in (8 + 8, 64 + 8 + 8):  # four steps
        table, reach = entropy.table(model) / 2.0**entropy.PRECISION, entropy.reach(model)
        deviation = float(np.sqrt((table * np.arange(-reach, reach + 1) ** 2).sum()))
        assert deviation == pytest.approx(4, rel=0.02)


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Integers with heavy tails under random models."""
    rng = np.random.default_rng(seed)
    models = rng.choice(np.array([m for m in entropy.MODELS if m % 64 < 28], dtype=np.uint8), 3000)
    models[:50] = entropy.DROPPED
    symbols = np.rint(rng.standard_t(3, 3000) * 2.0 ** ((models % 64 - 8.0) / 4)).astype(np.int64)
    symbols[:50] = 0
    symbols[100], symbols[200] = 10**6, -(10**9)
    return symbols, models


@pytest.mark.parametrize("coder", CODERS)
def test_any_integers_come_back(coder: Any) -> None:
    symbols, models = drawn()
    assert np.array_equal(entropy.decode(entropy.encode(symbols, models, coder), models, coder), symbols)


def reference_ans(words: list[int], models: np.ndarray) -> list[int]:
    """An ANS decoder in whole numbers alone (Duda, arXiv 1311.2540; 64-bit state, 32-bit words)."""
    state, symbols = 0, []
    for _ in range(2):
        state = state << 32 | words.pop()
    for model in sorted(set(models.tolist()) - {entropy.DROPPED}):
        frequencies = entropy.table(model).tolist()
        starts = np.cumsum([0, *frequencies]).tolist()
        for _ in range(int((models == model).sum())):
            place = state & ((1 << entropy.PRECISION) - 1)
            symbol = int(np.searchsorted(starts, place, side="right")) - 1
            state = (state >> entropy.PRECISION) * frequencies[symbol] + place - starts[symbol]
            if state < 1 << 32 and words:
                state = state << 32 | words.pop()
            symbols.append(symbol - entropy.reach(model))
    assert (state, words) == (0, [])
    return symbols


def test_a_decoder_of_whole_numbers_reads_the_same_bytes() -> None:
    # constriction takes floats: this shows that it uses exactly the integer tables, so no rounding can differ.
    symbols, models = drawn(1)
    symbols = np.clip(symbols, -1, 1)
    data = entropy.encode(symbols, models, "ans")
    assert data[0] == 0  # no escapes
    found = reference_ans(np.frombuffer(data[1:], dtype="<u4").tolist(), models)
    groups = [symbols[models == model] for model in sorted(set(models.tolist()) - {entropy.DROPPED})]
    assert found == np.concatenate(groups).tolist()


def test_coding_takes_what_the_model_says() -> None:
    rng = np.random.default_rng(0)
    model = 8 + 6
    table = entropy.table(model) / 2.0**entropy.PRECISION
    symbols = rng.choice(len(table), 20_000, p=table) - entropy.reach(model)
    models = np.full(20_000, model, dtype=np.uint8)
    bits = -(table * np.log2(table)).sum()
    for coder, most in (("ans", 1.01), ("huffman", 1.04)):
        assert 8 * len(entropy.encode(symbols, models, coder)) / 20_000 < bits * most  # type: ignore[arg-type]


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_streams_are_refused_or_read_as_integers(coder: Any) -> None:
    symbols, models = (part[:300] for part in drawn())
    data = entropy.encode(symbols, models, coder)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        cut = bytes(changed[: rng.integers(len(data))]) if rng.random() < 0.5 else bytes(changed)
        try:
            assert entropy.decode(cut, models, coder).shape == symbols.shape
        except CompressorError as error:
            refused += "damaged" in str(error)
    assert refused > 10


def test_without_the_extra_plain_codecs_work_and_coded_ones_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "constriction":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert error(Codec.parse("int8"), made(0)) < 1e-3
    with pytest.raises(CompressorError, match=r"pip install 'kv-compressor\[codecs\]'"):
        round_trip(Codec.parse("int8+ans"), made(0))


# -- quantisers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing(bits: int) -> None:
    half = 1 << (bits - 1)
    integers = np.random.default_rng(0).integers(-half, half, 1001)
    packed = quantise.pack(integers, bits)
    assert len(packed) == -(-1001 * bits // 8)
    assert np.array_equal(quantise.unpack(packed, bits, 1001), integers)


def test_steps_are_exact_quarter_octaves() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    steps = quantise.step_of(codes)
    torch.testing.assert_close(steps.double(), 2.0 ** (codes.double() / 4), rtol=3e-5, atol=0)
    assert torch.equal(steps[4:], steps[:-4] * 2)
    assert [step_size(level) for level in (-8, 0, 5)] == quantise.step_of(torch.tensor([-8, 0, 5])).tolist()


def test_more_bits_less_error(calibration: Calibration) -> None:
    memory = made(1000)
    for fitted in (None, calibration):
        errors = [error(Codec.parse(f"int{bits}", fitted), memory) for bits in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 < errors[0]


def test_error_of_a_calibrated_quantiser_is_near_the_theory() -> None:
    # Max (1960): a Gaussian's mean squared error with the best 4- and 16-level uniform quantisers.
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(400, 2, LAYERS, HEADS, SLOTS, SIZE, generator=generator)
    memories = [replace(made(0), keys=pair[0], values=pair[1]) for pair in normal]
    fitted = fit_calibration(memories[:300], rank=4)
    for bits, wanted in ((2, 0.1188), (4, 0.01154)):
        errors = [error(Codec.parse(f"int{bits}", fitted), memory) for memory in memories[300:]]
        assert np.mean(errors) == pytest.approx(wanted, rel=0.06)


# -- codecs ------------------------------------------------------------------------------------------------------------

SPECS = [
    *("float32", "bf16", "float16", "int8", "int4", "int3", "int2"),
    *(f"int{bits}+{coder}" for bits in (8, 4, 3, 2) for coder in CODERS),
]
LOWRANK = ["lowrank:1", "lowrank:0.5+ans", "lowrank:0.7+huffman"]


def test_float_codecs_are_exact_in_their_type() -> None:
    memory = made(0)
    assert error(Codec.parse("float32"), memory) == 0
    for name, dtype in (("bf16", torch.bfloat16), ("float16", torch.float16)):
        back = round_trip(Codec.parse(name), memory)
        assert back.keys.dtype == dtype
        assert torch.equal(back.values, memory.values.to(dtype))


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("spec", SPECS[3:])
def test_a_coder_changes_the_size_and_nothing_else(spec: str, fitted: bool, calibration: Calibration) -> None:
    memory = Memory.concatenate([made(1000), made(1001, tokens=2)])
    codec = Codec.parse(spec, calibration if fitted else None)
    plain = round_trip(replace(codec, coder="none"), memory)
    assert torch.equal(round_trip(codec, memory).keys, plain.keys)
    assert torch.equal(round_trip(codec, memory).values, plain.values)


def test_channels_that_do_not_vary_cost_nothing(calibration: Calibration) -> None:
    memories = []
    for seed in range(60):
        memory = made(seed)
        memory.keys[0] = made(0).keys[0] * (1 + 1e-7 * seed)
        memory.values[0] = made(0).values[0]
        memories.append(memory)
    fitted = fit_calibration(memories)
    for spec in ("int4+ans", "int4"):
        codec = Codec.parse(spec, fitted)
        torch.testing.assert_close(round_trip(codec, memories[3]).keys[0], memories[0].keys[0], rtol=1e-3, atol=1e-5)
    _, details = Codec.parse("int4+ans", fitted).encode(memories[3])
    assert details["sizes"][0] == 0 < details["sizes"][1]


def test_entropy_coding_saves_bytes(calibration: Calibration) -> None:
    # Many tokens: the coder's last words, some bytes for each layer, do not count.
    memory = Memory.concatenate([made(seed) for seed in range(1000, 1020)])
    for bits in (8, 4, 3):
        assert size(Codec.parse(f"int{bits}+ans", calibration), memory) < 0.97 * size(
            Codec.parse(f"int{bits}", calibration), memory
        )


def test_low_rank_memories_need_few_bits(calibration: Calibration) -> None:
    memory = made(1000)
    few = Codec.parse("lowrank:1.2", calibration)
    assert error(few, memory) < error(Codec.parse("int4", calibration), memory)
    assert size(few, memory) < size(Codec.parse("int2", calibration), memory)
    errors = [error(Codec.parse(f"lowrank:{rate}", calibration), memory) for rate in (1, 0.7, 0.4, 0.2)]
    assert errors == sorted(errors)


def test_the_rate_asked_for_is_kept_on_unseen_memories(calibration: Calibration) -> None:
    many = Memory.concatenate([made(seed) for seed in range(2000, 2050)])
    for rate in (0.9, 0.5, 0.25):
        bits = 8 * size(Codec.parse(f"lowrank:{rate}", calibration), many) / (2 * many.keys.numel())
        assert 0.6 * rate < bits < 1.08 * rate


@pytest.mark.parametrize("coder", CODERS)
def test_low_rank_reconstruction_is_exact_arithmetic(coder: str, calibration: Calibration) -> None:
    codec = Codec.parse(f"lowrank:0.8+{coder}", calibration)
    memory = made(1000)
    transform = calibration.transform
    tokens = flatten_tokens(torch.stack([memory.keys, memory.values]) - calibration.means(memory))
    integers = transform.quantise(transform.project(tokens), codec.level)
    # The same sums in Python's whole numbers, which do not round.
    mantissa = quantise.MANTISSAS[codec.level % 4]
    whole = (integers.astype(object) * mantissa) @ transform.synthesis.numpy().astype(object)
    scale = 2.0 ** (transform.exponents.double() + codec.level // 4 - 14)
    wanted = torch.from_numpy(whole.astype(np.float64)) * scale
    assert torch.equal(transform.reconstruct(integers, codec.level), wanted)
    order = torch.randperm(integers.shape[1], generator=torch.Generator().manual_seed(0)).numpy()
    shuffled = replace(transform, synthesis=transform.synthesis[order.tolist()])
    assert torch.equal(shuffled.reconstruct(integers[:, order], codec.level), wanted)
    back = round_trip(codec, memory)
    full = (calibration.means(memory).double() + unflatten_tokens(wanted, memory.keys.shape)).float()
    assert torch.equal(torch.stack([back.keys, back.values]), full)
    huge = integers * 10**7  # beyond what float64 sums exactly
    assert torch.equal(
        transform.reconstruct(huge, 0),
        torch.from_numpy(
            ((huge.astype(object) * 16384) @ transform.synthesis.numpy().astype(object)).astype(np.float64)
        )
        * 2.0 ** (transform.exponents.double() - 14),
    )


def test_sensitive_channels_get_less_error() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(151, 2, LAYERS, HEADS, SLOTS, SIZE, generator=generator)
    memories = [replace(made(0), keys=pair[0], values=pair[1]) for pair in normal[:150]]
    sensitivity = torch.ones(2, LAYERS, HEADS, SIZE)
    sensitivity[0] = 30  # keys
    flat, weighted = fit_calibration(memories), fit_calibration(memories, sensitivity)
    memory = replace(made(0), keys=normal[150, 0], values=normal[150, 1])

    def key_error(fitted: Calibration) -> float:
        back = round_trip(Codec.parse("lowrank:0.5", fitted), memory)
        return float((back.keys - memory.keys).square().mean())

    assert key_error(weighted) < 0.7 * key_error(flat)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int5", "no codec 'int5': choose one of float32, .*, int2, lowrank:RATE"),
        ("int4+zip", "no coder 'zip'"),
        ("bf16+ans", "bf16 is not entropy-coded"),
        ("lowrank", "lowrank needs a calibration"),
        ("int4:2", "only lowrank takes a rate"),
    ],
)
def test_impossible_codecs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        Codec.parse(spec)


def test_what_does_not_go_with_the_calibration_is_refused(calibration: Calibration) -> None:
    codec = Codec.parse("int4", calibration)
    for other, message in (
        (replace(made(0), base="b" * 64), "another base"),
        (replace(made(0), layout="after"), "another layout"),
        (replace(made(0), most=8), "another most"),
    ):
        with pytest.raises(CompressorError, match=message):
            round_trip(codec, other)
    signed = replace(calibration, compressor="one@1")
    with pytest.raises(CompressorError, match=r"another compressor.*compressor calibrate"):
        round_trip(Codec.parse("int4", signed), replace(made(0), compressor="two@2"))
    spread = replace(calibration, layout="spread")
    with pytest.raises(CompressorError, match=r"--tokens 2"):
        round_trip(Codec.parse("int4", spread), replace(made(0, tokens=2), layout="spread"))
    with pytest.raises(CompressorError, match=r"cannot code in 0.0001 bits"):
        Codec.parse("lowrank:0.0001", calibration)
    with pytest.raises(CompressorError, match="is no number"):
        Codec.parse("lowrank:many", calibration)
    with pytest.raises(CompressorError, match="not finite"):
        round_trip(codec, replace(made(0), keys=made(0).keys * torch.inf))
    with pytest.raises(CompressorError, match="too large for float16"):
        round_trip(Codec.parse("float16"), replace(made(0), keys=made(0).keys * 1e6))


def test_a_calibration_needs_memories_that_vary_and_agree() -> None:
    with pytest.raises(CompressorError, match="at least 8 passages, got 2"):
        fit_calibration([made(0), made(1)])
    with pytest.raises(CompressorError, match="one compressor and one size"):
        fit_calibration([*(made(seed) for seed in range(9)), made(9, tokens=2)])
    with pytest.raises(CompressorError, match="every passage has the same memory"):
        fit_calibration([made(0)] * 9)


def test_randomised_components_equal_the_exact_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (
        torch.randn(300, 6, generator=generator) * 2.0 ** torch.arange(6) @ torch.randn(6, 1030, generator=generator)
    )
    wide = fit(tokens, torch.ones(1030), 6)  # over the size that is decomposed exactly
    back = wide.project(tokens) @ wide._basis()
    assert float((back - tokens).square().mean() / tokens.square().mean()) < 1e-6


def test_calibration_files(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    found = Calibration.load(path)
    assert found.digest == calibration.digest
    assert torch.equal(found.transform.synthesis, calibration.transform.synthesis)
    assert (found.levels, found.base, found.passages) == (calibration.levels, calibration.base, 200)
    data = bytearray(path.read_bytes())
    for place in (9, 300, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CompressorError, match=r"damaged|not a calibration"):
            Calibration.load(path)


def test_calibrating_a_compressor(tiny_compressor: Any, texts: list[str]) -> None:
    model = tiny_compressor
    encoded = model.base.tokenizer(texts[:24], add_special_tokens=False)["input_ids"]
    passages = [ids[:length] for ids, length in zip(encoded, [24, 48] * 12, strict=True)]
    fitted = calibrate(model, passages[:20], sensitivity_passages=6, compressor_name="tiny@1")
    assert (fitted.compressor, fitted.passages, fitted.slots) == ("tiny@1", 20, 8)
    memory = replace(model.compress_ids([passages[22]])[0], compressor="tiny@1")
    back = round_trip(Codec.parse("lowrank:4", fitted), memory)

    def logits(one: Memory) -> torch.Tensor:
        with torch.no_grad():
            return decode(model.base, memory_prefix(model.base, [one]), torch.tensor([[model.base.bos, *passages[22]]]))

    spread = float((logits(memory) - logits(made_like(memory))).square().mean())
    assert float((logits(memory) - logits(back)).square().mean()) < 0.05 * spread
    # The first layer's memory does not depend on the passage: the calibration knows it.
    torch.testing.assert_close(fitted.mean[0, 0], memory.keys[0], atol=1e-4, rtol=1e-3)
    assert float(fitted.deviation[:, 0].max()) < 1e-4 < float(fitted.deviation[:, 2].max())


def made_like(memory: Memory) -> Memory:
    generator = torch.Generator().manual_seed(0)
    return replace(memory, keys=torch.randn(memory.keys.shape, generator=generator), values=memory.values.flip(2))
