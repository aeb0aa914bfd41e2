"""Loading the frozen base: what it measures, and messages when it cannot be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from compressor.errors import CompressorError
from compressor.files import PROJECT, bundled
from compressor.model.base import Base
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.load import load_base
from compressor.training.objectives import Trainee


def test_shape_and_tokens_of_the_tiny_base(tiny_base: Base) -> None:
    shape = (tiny_base.layers, tiny_base.kv_heads, tiny_base.head_size, tiny_base.hidden)
    assert shape == (3, 2, 8, 32)
    assert tiny_base.rotated == [True] * 3
    assert (tiny_base.bos, tiny_base.eos) == (1, 2)
    assert (tiny_base.dtype, tiny_base.device.type) == (torch.float32, "cpu")
    assert not any(p.requires_grad for p in tiny_base.parameters())
    assert not tiny_base.model.training


def test_a_base_without_bos_starts_with_its_end_of_text(tiny_base: Base) -> None:
    tiny_base.tokenizer.bos_token = None
    assert tiny_base.bos == tiny_base.eos == 2


def test_text_that_spells_a_special_token_is_text(tiny_base: Base) -> None:
    text = "It ends with <eos>, begins with <bos> and is filled with <pad>."
    ids = tiny_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not {0, 1, 2} & set(ids)
    assert tiny_base.tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tiny_base.tokenizer([text, "<eos>"], add_special_tokens=False, verbose=False)["input_ids"]
    assert batch[0] == ids
    assert 2 not in batch[1]


def test_the_fingerprint_tells_weights_apart_but_not_types(tiny_base_folder: Path, tiny_base: Base) -> None:
    half = load_base(BaseConfig(path=str(tiny_base_folder), dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    assert half.fingerprint == tiny_base.fingerprint
    # float16 has other values than bfloat16 for what is stored in float32: the stored weights count.
    other = load_base(BaseConfig(path=str(tiny_base_folder), dtype="float16"))
    assert other.dtype == torch.float16
    assert other.fingerprint == tiny_base.fingerprint
    # Rotary frequencies are no weights: rounded to half precision they would put tokens elsewhere.
    assert {x.dtype for name, x in half.model.named_buffers() if "inv_freq" in name} == {torch.float32}
    for name in ("model.norm.weight", "model.layers.2.mlp.down_proj.weight"):
        with torch.no_grad():
            tiny_base.model.get_parameter(name)[-1] += 0.5
        changed = Base(tiny_base.model, tiny_base.tokenizer, "changed")
        assert changed.fingerprint != half.fingerprint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_base_is_refused_by_name(tiny_base_folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "damaged-base"
    shutil.copytree(tiny_base_folder, folder)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompressorError, match=r"cannot load the base .*damaged-base"):
        load_base(BaseConfig(path=str(folder)))


def test_a_base_that_is_not_there_is_refused_with_what_to_do() -> None:
    with pytest.raises(CompressorError, match=r"cannot load the base 'no/such-base'.*--base\.path"):
        load_base(BaseConfig(path="no/such-base"))


def test_bundled_paths_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundled("data/arxiv-train.parquet") == str(PROJECT / "data" / "arxiv-train.parquet")
    assert bundled("owner/model") == "owner/model"


def test_quantisation_without_the_package_says_what_to_install(
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(CompressorError, match=r"pip install .*\[quantised-base\]"):
        load_base(BaseConfig(path=str(tiny_base_folder), quantization="int8"))


def test_four_bits_on_a_cpu_are_refused(tiny_base_folder: Path) -> None:
    with pytest.raises(CompressorError, match="no backward pass there"):
        load_base(BaseConfig(path=str(tiny_base_folder), quantization="int4"))


@pytest.mark.slow
def test_a_base_in_eight_bits_trains_and_regenerates(tiny_base_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = load_base(BaseConfig(path=str(tiny_base_folder), quantization="int8"))
    assert any(type(part).__name__ == "Linear8bitLt" for part in base.model.modules())
    model = Trainee(base, CompressorConfig(memory_tokens=4, lora_rank=4, writer_rank=4, max_passage_tokens=64)).train()
    ids = torch.tensor([[7, 8, 9, 10], [5, 6, 0, 0]])
    labels = torch.tensor([[7, 8, 9, 10, base.eos], [5, 6, base.eos, -100, -100]])
    inputs = torch.cat([torch.full((2, 1), base.bos), ids], dim=1)
    batch = {"input_ids": ids, "lengths": torch.tensor([4, 2]), "memory_tokens": torch.tensor([4, 4])}
    batch |= {"regeneration_inputs": inputs, "regeneration_labels": labels, "regeneration_weight": 1.0}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(batch)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    written = model.eval().regenerate(model.compress_ids([[7, 8, 9, 10], [5, 6]]))
    assert len(written) == 2


def test_a_device_that_is_not_there_is_refused(tiny_base_folder: Path) -> None:
    missing = ["gpu"] if torch.cuda.is_available() else ["gpu", "cuda"]
    for device in missing:
        with pytest.raises(CompressorError, match=rf"device '{device}' cannot be used here .*: give cpu"):
            load_base(BaseConfig(path=str(tiny_base_folder)), device)


def test_an_error_without_a_message_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("")

    monkeypatch.setattr("compressor.model.load.AutoConfig.from_pretrained", fail)
    with pytest.raises(CompressorError, match=r"cannot load the base 'some/base' \(RuntimeError"):
        load_base(BaseConfig(path="some/base"))


def test_memory_that_runs_out_is_not_taken_for_an_unsupported_base(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    inputs = tiny_base.probe_inputs()
    monkeypatch.setattr(torch, "stack", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        tiny_base.keys_and_values(*inputs)
