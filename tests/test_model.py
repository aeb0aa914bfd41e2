"""The compressor: adapters, memory tokens, attention in the encoder, compress() and checkpoints."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from safetensors.torch import load_file

import compressor.model.checkpoint
from compressor.api import Compressor
from compressor.data.batches import pad, regeneration_pair, stack_pairs
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.checkpoint import read_settings
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.encoder import encoder_attention
from compressor.model.load import load_base
from compressor.model.lora import READER, WRITER, AdaptedLinear, adapter
from compressor.model.refinement import refine

PASSAGES = [[(7 * i + j) % 400 + 5 for i in range(n)] for j, n in enumerate((30, 9, 17))]
Make = Callable[..., Compressor]


@pytest.fixture
def make(make_tiny_compressor: Make) -> Make:
    return make_tiny_compressor


def training_batch(base: Base, tokens: int = 8) -> dict[str, Any]:
    ids, lengths = pad(PASSAGES)
    pairs = stack_pairs([regeneration_pair(base.bos, base.eos, one) for one in PASSAGES])
    return {
        "input_ids": ids,
        "lengths": lengths,
        "memory_tokens": torch.full_like(lengths, tokens),
        "regeneration_inputs": pairs["inputs"],
        "regeneration_labels": pairs["labels"],
        "regeneration_weight": 1.0,
    }


def gradients(model: Compressor) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# -- training ------------------------------------------------------------------------------------------------------


def test_training_moves_every_trainable_parameter_and_nothing_else(make: Make, tiny_base_folder: Path) -> None:
    model = make(stirred=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(training_batch(model.base)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    # The frozen weights are still those on disk, bit for bit.
    disk = load_base(BaseConfig(path=str(tiny_base_folder))).model.state_dict()
    ours = {name.replace(".base_layer", ""): value for name, value in model.base.model.state_dict().items()}
    assert all(torch.equal(ours[name], value) for name, value in disk.items())


def test_memory_tokens_and_adapters_are_all_that_trains(make: Make) -> None:
    model = make()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(model.trainable_state())
    assert "encoder.memory_embeddings" in names
    assert all("lora_" in name for name in names - {"encoder.memory_embeddings"})


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_gives_the_same_loss_and_gradients(make: Make, dropout: float) -> None:
    model = make(lora_dropout=dropout)
    model.train()
    batch = training_batch(model.base)
    results = []
    for on in (False, True):
        model.activation_checkpointing = on
        torch.manual_seed(3)
        keys, _ = model.encode(batch["input_ids"], batch["lengths"], 8)
        assert keys.shape[3] == 8
        assert float(keys.detach().abs().min(dim=-1).values.max()) > 0
        torch.manual_seed(3)
        loss = model(batch)
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    torch.manual_seed(4)
    assert (model(batch).item() == results[0][0].item()) == (dropout == 0)


def test_activation_checkpointing_runs_the_base_twice_however_many_targets(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.model.decoder.HEAD_ROWS", 4)
    model = make().train()
    runs: list[int] = []
    model.base.model.get_decoder().layers[0].register_forward_hook(lambda *_: runs.append(1))
    counts = []
    for model.activation_checkpointing in (False, True):
        runs.clear()
        model(training_batch(model.base)).backward()
        counts.append(len(runs))
    assert counts[1] == 2 * counts[0]


def test_bfloat16_base_trains_float32_memory_tokens(make: Make, tiny_base_folder: Path) -> None:
    base = load_base(BaseConfig(path=str(tiny_base_folder), dtype="bfloat16"))
    model = make(base=base)
    assert base.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    loss = model(training_batch(base))
    loss.backward()
    assert torch.isfinite(loss)
    assert set(gradients(model)) == set(model.trainable_state())
    full = make()
    assert loss.item() == pytest.approx(full(training_batch(full.base)).item(), rel=0.02)
    memory = model.compress_ids(PASSAGES)[0]
    assert memory.keys.dtype == torch.bfloat16
    assert memory.base == full.base.fingerprint  # the same weights, held in another type
    assert isinstance(model.regenerate(memory), str)


def test_training_mode_leaves_memories_as_they_are(make: Make) -> None:
    model = make(lora_dropout=0.5)
    expected = model.eval().compress_ids(PASSAGES)[0].keys
    model.train()
    assert torch.equal(model.compress_ids(PASSAGES)[0].keys, expected)
    assert model.training


# -- adapters ------------------------------------------------------------------------------------------------------


def test_adapters_off_equals_an_untouched_base_exactly(make: Make, tiny_base_folder: Path) -> None:
    model, untouched = make(), load_base(BaseConfig(path=str(tiny_base_folder)))
    ids = torch.tensor([PASSAGES[0]])
    with torch.no_grad():
        assert torch.equal(model.base.model(ids).logits, untouched.model(ids).logits)
        with adapter(READER):
            assert not torch.allclose(model.base.model(ids).logits, untouched.model(ids).logits, atol=1e-2)


def test_an_adapter_is_what_peft_makes_of_it(make: Make) -> None:
    """Each of the two gives the logits of PEFT's own layers with that adapter, over the base."""
    model = make()
    ids = torch.tensor([PASSAGES[0]])
    for name in (READER, WRITER):
        with torch.no_grad(), adapter(name):
            ours = model.base.model(ids).logits
        alone = make(base=load_base(BaseConfig(path=model.base.name)))
        alone.load_state_dict(model.state_dict())
        for layer in alone.base.model.modules():
            if isinstance(layer, AdaptedLinear):
                layer.forward = lora.Linear.forward.__get__(layer)  # type: ignore[method-assign]
                layer.set_adapter([name] if name in layer.lora_A else [])
        with torch.no_grad():
            torch.testing.assert_close(alone.base.model(ids).logits, ours)


def test_the_adapter_switch_nests_and_survives_exceptions(make: Make) -> None:
    model = make()
    ids = torch.tensor([PASSAGES[0]])

    def logits() -> torch.Tensor:
        return model.base.model(ids).logits

    with torch.no_grad():
        off = logits()
        with adapter(READER):
            on = logits()
            assert not torch.equal(on, off)
            with adapter(None):
                assert torch.equal(logits(), off)
            with pytest.raises(RuntimeError, match="inside"), adapter(None):
                raise RuntimeError("inside")
            assert torch.equal(logits(), on)
        assert torch.equal(logits(), off)


def test_threads_that_share_a_compressor_do_not_meet(make: Make) -> None:
    """Compressing, refining, regenerating and answering at once give what each gives alone."""
    model = make().eval()
    memories = model.compress_ids(PASSAGES)

    def work(i: int) -> object:
        passage, memory = [PASSAGES[i % 3]], memories[i % 3]
        if i % 4 == 0:
            return model.compress_ids(passage)[0].keys.tolist()
        if i % 4 == 1:
            return refine(model.base, [memory], passage, 2)[0].keys.tolist()
        return model.regenerate(memory) if i % 4 == 2 else model.answer(memory, "What?", limit=8)

    serial = [work(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(work, [*range(12)] * 2)) == serial * 2


def test_reader_and_writer_are_one_pass_where_they_are_one_adapter(make: Make) -> None:
    """Two passes are exact: with the writer's weights the reader's, they give what one pass over both gives."""
    two = make(memory_attention="passage")
    one = make(memory_attention="passage", writer_rank=0)
    ours = dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in two.named_parameters():
            if "lora_" in name or "encoder" in name:
                parameter.copy_(ours[name.replace(WRITER, READER)])
    for here, there in zip(two.compress_ids(PASSAGES), one.compress_ids(PASSAGES), strict=True):
        torch.testing.assert_close((here.keys, here.values), (there.keys, there.values), atol=1e-5, rtol=1e-4)


# -- the encoder ---------------------------------------------------------------------------------------------------


def test_padding_changes_nothing(make: Make) -> None:
    for attention in ("causal", "bidirectional"):
        model = make(passage_attention=attention)
        ids, lengths = pad(PASSAGES, fill=0)
        other, _ = pad(PASSAGES, fill=77)
        with torch.no_grad():
            keys, values = model.encode(ids, lengths, 8)
            for again in model.encode(other, lengths, 8), model.encode(torch.cat([ids, ids[:, :5]], dim=1), lengths, 8):
                torch.testing.assert_close((keys, values), again, atol=1e-5, rtol=1e-4)
            for row, passage in enumerate(PASSAGES):
                alone = model.encode(torch.tensor([passage]), lengths[row : row + 1], 8)
                torch.testing.assert_close(
                    (keys[:, row], values[:, row]), (alone[0][:, 0], alone[1][:, 0]), atol=1e-5, rtol=1e-4
                )


def test_encoder_attention_is_what_it_says() -> None:
    # Two passages of 3 and 1 tokens padded to 3, and 2 memory tokens.
    rows = {
        False: [["10000", "11000", "11100", "11110", "11111"], ["10000", "11000", "10100", "10010", "10011"]],
        True: [["11100", "11100", "11100", "11110", "11111"], ["10000", "11000", "10100", "10010", "10011"]],
    }
    for bidirectional, expected in rows.items():
        allowed = encoder_attention(torch.tensor([3, 1]), 3, 2, bidirectional)
        found = [["".join(str(int(x)) for x in query) for query in one] for one in allowed.tolist()]
        # What padding itself sees (rows 1 and 2 of the second passage) is free, as long as nobody sees padding.
        assert found[0] == expected[0]
        for query in (0, 3, 4):
            assert found[1][query] == expected[1][query]
        assert all(allowed[1, q, q] for q in range(5))


def passage_states(model: Compressor, passage: list[int]) -> torch.Tensor:
    """What the last layer makes of each passage token and memory token in the encoder."""
    seen = []
    layer = model.base.model.get_decoder().layers[-1]
    handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        with torch.no_grad():
            model.encode(torch.tensor([passage]), torch.tensor([len(passage)]), 8)
    finally:
        handle.remove()
    return seen[0][0]


def test_a_causal_encoder_does_not_look_ahead_and_a_bidirectional_one_does(make: Make) -> None:
    changed = [*PASSAGES[0][:20], 3, *PASSAGES[0][21:]]
    for attention in ("causal", "bidirectional"):
        model = make(passage_attention=attention)
        one, two = passage_states(model, PASSAGES[0]), passage_states(model, changed)
        difference = (one - two).abs().amax(dim=1)
        assert bool((difference[:20] == 0).all()) == (attention == "causal")
        assert bool((difference[20:] > 1e-4).all())  # later tokens and all memory tokens see it
        if attention == "bidirectional":
            assert bool((difference[:20] > 1e-6).all())


def test_memory_tokens_see_earlier_ones_only_and_the_passage_sees_none(make: Make) -> None:
    model = make()
    before = passage_states(model, PASSAGES[0])
    with torch.no_grad():
        model.encoder.memory_embeddings[3] += 5
    after = passage_states(model, PASSAGES[0])
    difference = (before - after).abs().amax(dim=1)
    n = len(PASSAGES[0])
    assert bool((difference[: n + 3] == 0).all())
    assert bool((difference[n + 3 :] > 1e-4).all())


# -- compress ------------------------------------------------------------------------------------------------------


def test_compress_takes_one_text_or_many_in_any_batching(tiny_compressor: Compressor, texts: list[str]) -> None:
    chosen = [texts[0][:90], texts[1][:33], texts[2], "a"]
    memories = tiny_compressor.compress(chosen)
    counts = [len(ids) for ids in tiny_compressor.base.tokenizer(chosen)["input_ids"]]
    assert [memory.passage_tokens for memory in memories] == counts
    assert counts[2] > 64
    assert [len(memory.segments) for memory in memories] == [-(-count // 64) for count in counts]
    for size in (1, 3):
        for one, other in zip(tiny_compressor.compress(chosen, batch_size=size), memories, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-4)
    single = tiny_compressor.compress(chosen[1], tokens=2)
    assert single.tokens == 2
    assert tiny_compressor.compress([]) == []
    assert not memories[0].keys.requires_grad


def test_what_cannot_be_compressed_is_refused(tiny_compressor: Compressor) -> None:
    for text in ("", ["fine", ""]):
        with pytest.raises(CompressorError, match="empty passage"):
            tiny_compressor.compress(text)
    for tokens, reason in (
        (0, "to 0 memory tokens: this compressor has 1 to 8"),
        (9, "to 9 memory"),
        (-1, "tokens = -1"),
    ):
        with pytest.raises(CompressorError, match=reason):
            tiny_compressor.compress("text", tokens)


def test_segments_are_the_fewest_and_nearly_equal(tiny_compressor: Compressor) -> None:
    for n in (1, 63, 64, 65, 128, 129, 1000):
        segments = tiny_compressor.segment(range(n))
        assert [token for segment in segments for token in segment] == list(range(n))
        sizes = [len(segment) for segment in segments]
        assert len(sizes) == -(-n // 64)
        assert max(sizes) <= 64
        assert max(sizes) - min(sizes) <= 1


def test_the_seed_decides_the_start(make: Make) -> None:
    states = [make(stirred=False, seed=seed).trainable_state() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["encoder.memory_embeddings"], states[2]["encoder.memory_embeddings"])
    a = next(name for name in states[0] if "lora_A" in name)
    assert not torch.equal(states[0][a], states[2][a])


def test_memory_tokens_start_as_configured(make: Make) -> None:
    table = make().base.model.get_input_embeddings().weight
    near = make(stirred=False, memory_tokens=512, initialisation="vocabulary").encoder.memory_embeddings
    plain = make(stirred=False, memory_tokens=512, initialisation="normal").encoder.memory_embeddings
    torch.testing.assert_close(near.std(0), table.std(0), atol=0.0, rtol=0.25)
    torch.testing.assert_close(near.mean(0), table.mean(0), atol=5 * table.std().item() / 512**0.5, rtol=0)
    assert plain.std().item() == pytest.approx(1, abs=0.05)


def test_untrained_adapters_change_nothing(make: Make, tiny_base_folder: Path) -> None:
    model, untouched = make(stirred=False), load_base(BaseConfig(path=str(tiny_base_folder)))
    ids = torch.tensor([PASSAGES[0]])
    with torch.no_grad():
        torch.testing.assert_close(model.peft(ids).logits, untouched.model(ids).logits)


# -- checkpoints ---------------------------------------------------------------------------------------------------

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "compressor.json",
    "memory_tokens.safetensors",
}


@pytest.fixture
def saved(tiny_compressor: Compressor, tmp_path: Path) -> Path:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_loaded_checkpoint_gives_bit_equal_memories(make: Make, tmp_path: Path, tiny_base: Base) -> None:
    for number, settings in enumerate(
        ({}, {"layout": "after", "passage_attention": "causal", "lora_targets": ["k_proj"]})
    ):
        model = make(**settings)
        model.save_pretrained(tmp_path / str(number))
        again = Compressor.from_pretrained(tmp_path / str(number))
        assert again.config == model.config
        assert not again.training
        for name, value in model.trainable_state().items():
            assert torch.equal(again.trainable_state()[name], value)
        ours, theirs = model.compress_ids(PASSAGES), again.compress_ids(PASSAGES)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
        assert model.regenerate(ours) == again.regenerate(theirs)
    explicit = Compressor.from_pretrained(tmp_path / "0", base=tiny_base)
    assert explicit.base is tiny_base


def test_a_checkpoint_holds_no_base_weights_and_no_pickle(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {*FILES, "writer"}
    for part in (saved, saved / "writer"):
        assert all("lora_" in name for name in load_file(part / "adapter_model.safetensors"))
    assert list(load_file(saved / "memory_tokens.safetensors")) == ["memory_embeddings"]
    settings = json.loads((saved / "compressor.json").read_text())
    assert len(settings["base"]["fingerprint"]) == 64
    assert "8 memory tokens" in (saved / "README.md").read_text()


def test_peft_reads_the_adapter_too(saved: Path, tiny_compressor: Compressor, tiny_base: Base) -> None:
    ids = torch.tensor([PASSAGES[0]])
    with torch.no_grad(), warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        for name, folder in ((READER, saved), (WRITER, saved / "writer")):
            with adapter(name):
                ours = tiny_compressor.base.model(ids).logits
            fresh = load_base(BaseConfig(path=tiny_base.name))
            theirs = PeftModel.from_pretrained(fresh.model, folder)(ids).logits
            torch.testing.assert_close(ours, theirs)


def test_the_base_is_also_found_beside_the_checkpoint(
    saved: Path, tiny_base_folder: Path, tmp_path: Path, tiny_compressor: Compressor
) -> None:
    settings = json.loads((saved / "compressor.json").read_text())
    settings["base"]["path"] = "gone/elsewhere"
    (saved / "compressor.json").write_text(json.dumps(settings))
    with pytest.raises(CompressorError, match="gone/elsewhere"):
        Compressor.from_pretrained(saved)
    shutil.copytree(tiny_base_folder, tmp_path / "base")
    found = Compressor.from_pretrained(saved)
    assert torch.equal(found.compress_ids(PASSAGES)[0].keys, tiny_compressor.compress_ids(PASSAGES)[0].keys)


def test_another_base_is_refused_or_allowed(
    saved: Path, tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        tiny_base.model.get_decoder().layers[1].self_attn.v_proj.weight[0, 0] += 0.5
    tiny_base.model.save_pretrained(tmp_path / "other")
    tiny_base.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(CompressorError, match=r"trained on the base .*--base-mismatch allow"):
        Compressor.from_pretrained(saved, base=str(tmp_path / "other"))
    allowed = Compressor.from_pretrained(saved, base=str(tmp_path / "other"), base_mismatch="allow")
    assert allowed.base.name == str(tmp_path / "other")
    assert "warning: checkpoint" in capsys.readouterr().err
    with pytest.raises(CompressorError, match=r"base_mismatch = 'yes' is out of range: it must be refuse or allow"):
        Compressor.from_pretrained(saved, base=str(tmp_path / "other"), base_mismatch="yes")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "memory_tokens.safetensors", "compressor.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_damaged_files_are_refused_by_name(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-len(content) // 3] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(CompressorError, match=name.replace(".", r"\.")):
        Compressor.from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 999},
        {"format": "one"},
        {"files": ["adapter_model.safetensors"]},
        {"files": {}},
        {"base": "models/somewhere"},
        {"base": {"path": "models/somewhere"}},
        {"config": {"colour": "blue"}},
        {"config": {"layout": "sideways"}},
        {"config": {"memory_tokens": 4096}},
        {"config": {"lora_rank": "four"}},
        {"config": [1]},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_file_name(saved: Path, change: dict[str, Any]) -> None:
    settings = json.loads((saved / "compressor.json").read_text())
    if isinstance(change.get("config"), dict):
        change = {"config": settings["config"] | change["config"]}
    (saved / "compressor.json").write_text(json.dumps(settings | change))
    expected = "does not fit" if change == {"files": {}} else r"compressor\.json"
    with pytest.raises(CompressorError, match=expected) as raised:
        Compressor.from_pretrained(saved)
    if change.get("format") == 999:
        assert "update the package" in str(raised.value)


def test_a_checkpoint_without_memory_tokens_is_refused_by_file_name(saved: Path) -> None:
    settings = json.loads((saved / "compressor.json").read_text())
    del settings["config"]["memory_tokens"]
    (saved / "compressor.json").write_text(json.dumps(settings))
    with pytest.raises(CompressorError, match=r"compressor\.json has no memory_tokens"):
        read_settings(saved)


def test_a_checkpoint_names_no_folder_of_this_machine_to_peft(saved: Path, tiny_base_folder: Path) -> None:
    adapter = json.loads((saved / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == tiny_base_folder.name
    assert str(tiny_base_folder.parent) not in (saved / "README.md").read_text()


def test_the_base_is_loaded_as_it_was_in_training(
    saved: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BaseConfig] = []

    def load(config: BaseConfig, device: str) -> Base:
        asked.append(config)
        return load_base(BaseConfig(path=str(tiny_base_folder)), device)

    monkeypatch.setattr(compressor.model.checkpoint, "load_base", load)
    settings = json.loads((saved / "compressor.json").read_text())
    plain = settings["base"]
    assert (plain["quantisation"], plain["revision"]) == ("none", None)
    older = {"path": plain["path"], "fingerprint": plain["fingerprint"]}
    quantised = older | {"quantisation": "int4", "revision": "v1", "dtype": "bfloat16"}
    for base in (plain, older, quantised):
        (saved / "compressor.json").write_text(json.dumps(settings | {"base": base}))
        Compressor.from_pretrained(saved, attention="eager")
    assert asked[0] == asked[1] == BaseConfig(path=plain["path"], attention="eager")
    assert asked[2] == BaseConfig(plain["path"], "v1", "bfloat16", "eager", "int4")


def test_settings_of_another_size_are_refused(saved: Path) -> None:
    settings = json.loads((saved / "compressor.json").read_text())
    for change in ({"lora_rank": 2}, {"memory_tokens": 4}, {"lora_targets": ["v_proj"]}):
        (saved / "compressor.json").write_text(json.dumps(settings | {"config": settings["config"] | change}))
        with pytest.raises(CompressorError, match="does not fit its own settings"):
            Compressor.from_pretrained(saved)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="no compressor checkpoint at 'nobody/nothing'"):
        Compressor.from_pretrained("nobody/nothing")
    with pytest.raises(CompressorError, match=r"not a compressor checkpoint: it has no compressor\.json"):
        Compressor.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(CompressorError, match=r"notes\.txt is a file, and a checkpoint is a folder"):
        Compressor.from_pretrained(tmp_path / "notes.txt")


def test_a_checkpoint_with_a_file_cut_or_gone_is_refused_by_its_name(saved: Path) -> None:
    whole = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CompressorError, match=r"adapter_model\.safetensors is damaged: its checksum .* from its source"
    ):
        Compressor.from_pretrained(saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(CompressorError, match=r"adapter_model\.safetensors is missing; take the checkpoint from"):
        Compressor.from_pretrained(saved)


def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, tiny_compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    def full_disk(*_args: Any) -> None:
        raise OSError("no space left on device")

    with torch.no_grad():
        tiny_compressor.encoder.memory_embeddings += 1
    with monkeypatch.context() as patch:
        patch.setattr(compressor.model.checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            tiny_compressor.save_pretrained(saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    tiny_compressor.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {*FILES, "writer"}
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    again = Compressor.from_pretrained(saved)
    assert torch.equal(again.encoder.memory_embeddings, tiny_compressor.encoder.memory_embeddings)


def test_saving_asks_the_network_nothing(
    tiny_compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    tiny_compressor.peft.peft_config["default"].base_model_name_or_path = "someone/base"
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "compressor.json").exists()


def test_from_pretrained_does_not_reseed_the_caller(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Compressor.from_pretrained(saved)
    assert torch.equal(torch.rand(3), expected)


def test_default_settings_are_valid() -> None:
    config = CompressorConfig()
    assert config.memory_tokens == 16
    assert config.lora_targets == "all-linear"
