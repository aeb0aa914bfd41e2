"""`grouped` attention gives what torch's own does, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compressor.model.kernels import grouped_attention, lighten_norms


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("mask", ["bool", "additive", "causal"])
def test_grouped_attention_equals_torchs(kv_heads: int, mask: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 5, 8, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, 9, 8, requires_grad=True) for _ in range(2))
    allowed = torch.rand(2, 1, 5, 9) > 0.4
    allowed[..., 0] = True
    if mask == "causal":
        allowed = torch.ones(5, 9, dtype=torch.bool).tril(4)[None, None]
    given = {"bool": allowed, "additive": torch.zeros(allowed.shape).masked_fill(~allowed, -1e30), "causal": None}[mask]
    ours, weights = grouped_attention(nn.Module(), query, key, value, given, scaling=0.3)
    assert weights is None
    repeated = [x.repeat_interleave(6 // kv_heads, dim=1) for x in (key, value)]
    theirs = nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=allowed, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    found, wanted = (torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (ours, theirs))
    torch.testing.assert_close(found, wanted)
    # Without a gradient, where torch's kernel does it, and in float64, where it does not.
    for dtype in (torch.float32, torch.float64):
        plain = [one.detach().to(dtype) for one in (query, key, value)]
        mask_of = given.to(dtype) if mask == "additive" else given
        again, _ = grouped_attention(nn.Module(), *plain, mask_of, scaling=0.3)
        torch.testing.assert_close(again, theirs.detach().to(dtype), atol=1e-6, rtol=1e-5)


def test_a_softcap_bounds_the_scores() -> None:
    query, key, value = (100 * torch.randn(1, 1, 4, 8) for _ in range(3))
    ours, _ = grouped_attention(nn.Module(), query, key, value, None, scaling=1.0, softcap=2.0)
    scores = 2.0 * (query @ key.mT / 2.0).tanh()
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    torch.testing.assert_close(ours, (weights @ value).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_light_norms_equal_transformers_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, other = LlamaRMSNorm(48, eps=1e-5), GemmaRMSNorm(48)
    for norm in (plain, other):
        nn.init.normal_(norm.weight)
        norm.to(dtype).requires_grad_(False)
    x = (3 * torch.randn(2, 7, 48)).to(dtype).requires_grad_()
    upstream = torch.randn(2, 7, 48).to(dtype)

    def run(norm: nn.Module) -> tuple[torch.Tensor, ...]:
        out = norm(x)
        return out.detach(), *torch.autograd.grad(out, x, upstream)

    before = [run(norm) for norm in (plain, other)]
    assert lighten_norms(nn.ModuleList([plain, other])) == 1  # Gemma's, which adds 1 to its weights, stays what it is
    after = [run(norm) for norm in (plain, other)]
    for place in (0, 1):
        assert torch.equal(after[place][0], before[place][0])
        torch.testing.assert_close(
            after[place][1], before[place][1], atol=2e-5 if dtype == torch.float32 else 0.03, rtol=0.02
        )
