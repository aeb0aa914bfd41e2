"""Every supported family of bases through the whole path, and a refusal by name, with the reason, of every other."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from compressor.data.batches import pad, regeneration_pair, stack_pairs
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.decoder import Prefix, decode, token_prefix
from compressor.model.generation import Sampling, generate
from compressor.model.load import load_base
from compressor.model.memory import Memory, memory_prefix
from compressor.model.support import refuse_unsupported, window_of
from compressor.training.objectives import Trainee

PASSAGES = [list(range(10, 34)), list(range(40, 51)), list(range(60, 79))]


def training_batch(base: Base, tokens: int) -> dict[str, Any]:
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


def stir(model: Trainee) -> None:
    """LoRA starts as no change at all: give its B matrices values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def small(**settings: Any) -> CompressorConfig:
    return CompressorConfig(**({"memory_tokens": 4, "lora_rank": 2, "max_passage_tokens": 32} | settings))


def test_whole_path_works(family: str, make_family_base: Callable[..., Base]) -> None:
    base = make_family_base(family)
    frozen = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    model = Trainee(base, small())
    stir(model)
    model.train()
    batch = training_batch(base, tokens=4)
    loss = model(batch)
    assert torch.isfinite(loss)
    loss.backward()

    # Every trainable parameter learns; adapters sit where a memory depends on them, keys and values of the last
    # layer among them.
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    last = [name for name in trainable if f".{base.layers - 1}." in name]
    assert last
    assert not any(part in name for name in last for part in ("mlp", "o_proj", "q_proj", "dense"))
    assert any(f".{base.layers - 2}.mlp" in name for name in trainable) or "experts" in str(list(frozen))

    # The base's own dropout is off, so that the loss is the same each time.
    assert model(batch).item() == loss.item()

    # The base did not change.
    before = torch.cat([p.detach().flatten() for p in trainable.values()])
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in trainable.values()]))
    now = {name.replace(".base_layer", ""): tensor for name, tensor in base.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())

    # Compress alone and in a batch, write back alone and in a batch.
    memories = model.compress_ids(PASSAGES)
    for memory, passage in zip(memories, PASSAGES, strict=True):
        alone = model.compress_ids([passage])[0]
        torch.testing.assert_close(alone.keys, memory.keys, atol=5e-4, rtol=1e-3)
        torch.testing.assert_close(alone.values, memory.values, atol=5e-4, rtol=1e-3)
        assert memory.keys.shape == (base.layers, base.kv_heads, 4, base.head_size)
    together = generate(base, memory_prefix(base, memories), [[base.bos], [5, 6], [base.bos, 7, 8]], [6, 6, 6])
    for memory, prompt, expected in zip(memories, [[base.bos], [5, 6], [base.bos, 7, 8]], together, strict=True):
        assert generate(base, memory_prefix(base, [memory]), [prompt], [6])[0].ids == expected.ids
    sampled = generate(base, memory_prefix(base, memories), [[base.bos]] * 3, [6] * 3, Sampling(1.0, seed=4))
    assert all(len(one.ids) == 6 or one.finished for one in sampled)
    assert len(model.regenerate(memories, sampling=Sampling(1.0))) == 3


def test_decoding_step_by_step_equals_one_forward(family: str, make_family_base: Callable[..., Base]) -> None:
    base = make_family_base(family)
    model = Trainee(base, small(layout="after"))
    stir(model)
    memory = model.compress_ids(PASSAGES[:1])[0]
    with torch.no_grad():
        written = generate(base, memory_prefix(base, [memory]), [[base.bos]], [8])[0]
        ids = torch.tensor([[base.bos, *written.ids]])
        logprobs = decode(base, memory_prefix(base, [memory]), ids).log_softmax(-1)[0]
    scored = [float(logprobs[step, token]) for step, token in enumerate(written.ids)]
    assert scored == pytest.approx(written.logprobs[: len(scored)], abs=2e-3)


def moved(prefix: Prefix, base: Base, positions: torch.Tensor, shift: int) -> Prefix:
    """The same memory `shift` positions later."""
    keys = base.rotate(torch.stack(prefix.keys), positions, inverse=True)
    return Prefix(list(base.rotate(keys, positions + shift)), prefix.values, prefix.mask, prefix.start + shift)


def test_a_memory_moved_with_its_decoder_gives_the_same_logits(
    family: str, make_family_base: Callable[..., Base]
) -> None:
    base = make_family_base(family)
    model = Trainee(base, small(layout="after"))
    stir(model)
    memory = model.compress_ids(PASSAGES[:1])[0]
    prefix, positions = memory_prefix(base, [memory]), memory.positions()[0][None]
    ids = torch.tensor([[base.bos, 7, 8, 9]])
    with torch.no_grad():
        here = decode(base, prefix, ids)
        there = decode(base, moved(prefix, base, positions, 131), ids)
        nearer = decode(
            base, Prefix(moved(prefix, base, positions, 5).keys, prefix.values, prefix.mask, prefix.start), ids
        )
    scale = float(here.std())
    assert float((here - there).abs().max()) < 2e-3 * scale
    if all(base.rotated):
        assert float((here - nearer).abs().max()) > 1e-2 * scale  # it does matter where a memory lies


def test_rotate_agrees_with_the_models_own_keys(family: str, make_family_base: Callable[..., Base]) -> None:
    base = make_family_base(family)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    columns = torch.arange(6)
    keys = []
    for start in (0, 17, 200):
        cache = DynamicCache()
        base.model.get_decoder()(
            input_ids=ids,
            position_ids=columns[None] + start,
            attention_mask=base.attention_mask(torch.ones(1, 6, 6, dtype=torch.bool).tril()),
            past_key_values=cache,
            use_cache=True,
        )
        keys.append(torch.stack([layer.keys for layer in cache.layers]))
    turned_back = base.rotate(keys[1], columns[None] + 17, inverse=True)
    torch.testing.assert_close(base.rotate(turned_back, columns[None]), keys[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(base.rotate(turned_back, columns[None] + 200), keys[2], atol=2e-4, rtol=2e-3)
    torch.testing.assert_close(base.rotate(turned_back, columns[None] + 17), keys[1], atol=1e-5, rtol=1e-4)


def test_what_fits_into_a_sliding_window_is_read_as_the_model_reads_it_and_no_more(
    windowed: str, make_family_base: Callable[..., Base]
) -> None:
    """The base's own forward, with its own masks, is the reference: up to the window no mask hides anything."""
    base = make_family_base(windowed, sliding_window=24)
    assert base.window == base.positions == 24
    ids = torch.randint(3, 500, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    context, rest = ids[:11], ids[11:]
    with torch.no_grad():
        prefix = token_prefix(base, [context])  # BOS and the context take 12 positions
        ours = decode(base, prefix, torch.tensor([rest[:12]]))[0]
        theirs = base.model(torch.tensor([[base.bos, *ids]])).logits[0]
    torch.testing.assert_close(ours, theirs[12:24], atol=2e-4, rtol=2e-3)
    with pytest.raises(
        CompressorError, match=f"take 25 positions, and {windowed} has layers that attend over 24 alone"
    ):
        decode(base, prefix, torch.tensor([rest[:13]]))
    assert generate(base, prefix, [rest[:2]], [11])[0].ids  # 13 read, the last one not
    with pytest.raises(CompressorError, match="take 25 positions"):
        generate(base, prefix, [rest[:2]], [12])
    with pytest.raises(CompressorError, match="take 25 positions"):
        token_prefix(base, [ids[:24]])


def test_a_compressor_on_a_windowed_base_refuses_what_does_not_fit(make_family_base: Callable[..., Base]) -> None:
    model = Trainee(make_family_base("gemma3", sliding_window=64), small(layout="after"))
    short = model.compress_ids([list(range(10, 30))])[0]
    assert isinstance(model.regenerate(short), str)
    together = Memory.concatenate([short, short, short])
    with pytest.raises(CompressorError, match="compress fewer tokens at a time"):
        model.answer(together, "What is it about?")


def test_layers_without_rope_are_left_alone(make_family_base: Callable[..., Base]) -> None:
    base = make_family_base("smollm3")
    assert base.rotated == [True, False, True]
    keys = torch.randn(3, 1, base.kv_heads, 2, base.head_size)
    turned = base.rotate(keys, torch.tensor([[30, 31]]))
    assert torch.equal(turned[1], keys[1])
    assert not torch.allclose(turned[0], keys[0])


def test_slow_rope_in_bfloat16_is_not_mistaken_for_none(make_family_base: Callable[..., Base]) -> None:
    # Keys dominated by dimensions that hardly turn, as biases of key projections make them in real models.
    base = make_family_base("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    for layer in base.model.get_decoder().layers:
        layer.self_attn.k_proj.bias.data.view(base.kv_heads, 2, -1)[..., 4:] += 200
    again = Base(base.model.to(torch.bfloat16), base.tokenizer, "slow")
    assert all(again.rotated)


def test_a_bfloat16_base_of_many_layers_passes_the_probe(make_family_base: Callable[..., Base]) -> None:
    base = make_family_base("llama", num_hidden_layers=24)
    assert Base(base.model.to(torch.bfloat16), base.tokenizer, "deep").layers == 24


REFUSED = {
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "rotary"),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}, "rotary"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "rotary"),
    "gpt-j": ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 64}, "rotary"),
    "mamba": ("mamba", {"state_size": 4}, "attention"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, "layers of type conv"),
    "llama-4": ("llama4_text", {"intermediate_size_mlp": 64, "num_local_experts": 2}, "chunked_attention"),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False,
         "mamba_d_state": 4, "mamba_dt_rank": 4},
        "linear_attention",
    ),
    "gemma-4": (
        "gemma4_text",
        {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32, "num_kv_shared_layers": 0,
         "hidden_size_per_layer_input": 0},
        "one key tensor of one shape",
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
         "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "head_dim": 8},
        "latent",
    ),
    "qwen3-next": (
        "qwen3_next",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
        "linear_attention",
    ),
    "dynamic RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "dynamic",
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
        "longrope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_other_bases_are_refused_by_name_with_the_reason(case: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    kind, special, reason = REFUSED[case]
    common = {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind in ("gpt2", "gptj"):
        common = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    if kind in ("opt", "bloom", "mamba"):
        common.pop("head_dim"), common.pop("num_key_value_heads")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(common | special)))
    folder = tmp_path / "other-base"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_base_folder).save_pretrained(folder)
    with pytest.raises(CompressorError) as raised:
        load_base(BaseConfig(path=str(folder)))
    message = str(raised.value)
    assert "other-base" in message
    assert kind in message
    assert reason in message


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(kind: str) -> None:
    with pytest.raises(CompressorError, match=rf"some/model \({kind}\).*encoder-decoder"):
        refuse_unsupported(AutoConfig.for_model(kind), "some/model")


def test_a_multimodal_wrapper_is_judged_by_its_text_part() -> None:
    with pytest.raises(CompressorError, match="15 layers have no keys and values of their own"):
        refuse_unsupported(AutoConfig.for_model("gemma3n"), "some/gemma-3n")
    assert window_of(AutoConfig.for_model("gemma3")) == 4096


def test_a_tokenizer_without_eos_is_refused(make_family_base: Callable[..., Base]) -> None:
    base = make_family_base("llama")
    base.tokenizer.eos_token = None
    with pytest.raises(CompressorError, match="end-of-text"):
        Base(base.model, base.tokenizer, "no-eos")


BEYOND: dict[str, tuple[list[str], bool, bool, str]] = {
    "special tokens that no text becomes": (["<mask>"], True, False, ""),
    "ordinary tokens": (["graphene", "<mask>"], False, False, r"2 added tokens \(graphene, <mask>, ...\).*left out"),
    "those of the chat template": (["<|user|>"], True, True, "chat template of llama uses tokens"),
}


@pytest.mark.parametrize("case", list(BEYOND))
def test_tokens_without_an_embedding_are_left_out(make_family_base: Callable[..., Base], case: str) -> None:
    tokens, special, in_template, warned = BEYOND[case]
    plain = make_family_base("llama")
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=special)
    assert len(tokenizer) > plain.embeddings.weight.shape[0]
    if in_template:
        tokenizer.chat_template = "<|user|>{{ messages[0].content }}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = Base(plain.model, tokenizer, "llama")
    assert [bool(re.search(warned, str(one.message))) for one in caught] == [True] * bool(warned)
    model, text = Trainee(base, small()), "graphene <mask> and <|user|> graphene"
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == plain.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(model.answer(model.compress(text), "graphene?"), str)
    with pytest.raises(CompressorError, match="no chat template"):
        model.answer(model.compress(text), "graphene?", template="chat")


@pytest.mark.parametrize(("name", "value"), [("dtype", "float8"), ("attention", "flash"), ("quantization", "int2")])
def test_settings_of_a_base_that_do_not_exist_are_refused(tiny_base_folder: Path, name: str, value: Any) -> None:
    with pytest.raises(CompressorError, match=f"base.{name} = '{value}' is out of range: it must be one of "):
        load_base(BaseConfig(path=str(tiny_base_folder), **{name: value}))


def test_a_tokenizer_of_another_base_is_refused(make_family_base: Callable[..., Base]) -> None:
    with pytest.raises(CompressorError, match=r"112 tokens .* no embedding \(it has 400\): give the tokenizer"):
        make_family_base("llama", vocab_size=400)
    base = make_family_base("llama")
    base.tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(CompressorError, match=r"1 tokens \(<end>\) for which"):
        Base(base.model, base.tokenizer, "llama")


def test_lora_targets_can_be_named_and_unknown_names_list_those_there_are(
    make_family_base: Callable[..., Base],
) -> None:
    model = Trainee(make_family_base("llama"), small(lora_targets=["q_proj", "v_proj"]))
    adapted = {name.split(".lora_A")[0] for name, p in model.named_parameters() if "lora_A" in name}
    tails = {name.split("layers.")[-1] for name in adapted}
    # Not the last layer's queries: no memory depends on them.
    assert tails == {
        f"{i}.self_attn.{n}" for i, n in [(0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj"), (2, "v_proj")]
    }
    with pytest.raises(CompressorError, match=r"names 'q_proj', which gpt-neox does not have.*query_key_value"):
        Trainee(make_family_base("gpt-neox"), small(lora_targets=["q_proj"]))
    with pytest.raises(CompressorError, match="key and value projections"):
        Trainee(make_family_base("llama", num_hidden_layers=1), small(lora_targets=["o_proj"]))


def test_eager_attention_equals_sdpa(make_family_base: Callable[..., Base]) -> None:
    results = []
    for attention in ("sdpa", "eager"):
        base = make_family_base("qwen3", attn_implementation=attention)
        assert base.model.config._attn_implementation == attention
        model = Trainee(base, small())
        stir(model)
        results.append((model.compress_ids(PASSAGES)[1].values, model(training_batch(base, 4)).detach()))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
