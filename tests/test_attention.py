"""The differentiable attention against its formula, written out one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from entropy_kernels.attention import plain_attention
from entropy_kernels.errors import UserError


def written_out(q, k, v, *, scale, window, softcap):
    """Query i of q, the last of them at the last key, sees `window` keys up to its own."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                last = k.shape[2] - q.shape[2] + i
                seen = slice(max(0, last - window + 1), last + 1)
                kv_head = h // (q.shape[1] // k.shape[1])
                scores = k[n, kv_head, seen] @ q[n, h, i] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[n, i, h] = scores.softmax(0) @ v[n, kv_head, seen]
    return out


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("window", [1, 3, 7, None])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_is_its_formula(mask, window, softcap):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 7, 5, dtype=torch.float64)
    causal = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    given = {
        "none": None,
        "bool": causal,
        "float": torch.zeros(2, 1, 7, 7).double().masked_fill(~causal, torch.finfo(torch.float64).min),
    }[mask]
    got, _ = plain_attention(
        nn.Identity(), q, k, v, given, scaling=0.3, sliding_window=window, softcap=softcap
    )
    want = written_out(q, k, v, scale=0.3, window=window or 7, softcap=softcap)
    assert (got - want).abs().max() < 1e-14
    few, _ = plain_attention(
        nn.Identity(), q[:, :, 5:], k, v, None, scaling=0.3, sliding_window=window, softcap=softcap
    )
    assert (few - want[:, 5:]).abs().max() < 1e-14


def test_the_mask_given_with_cached_keys_is_taken_as_it_is():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    mask = torch.tensor([True, True, True, False, False, False])[None, None, None]  # room for keys to come
    got, _ = plain_attention(nn.Identity(), q, k, v, mask, sliding_window=3)
    scores = (k[0, 0, :3] @ q[0, 0, 0]) / math.sqrt(4)
    assert (got[0, 0, 0] - scores.softmax(0) @ v[0, 0, :3]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "options", [{"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(2)}, {"dropout": 0.1}]
)
def test_what_is_not_supported_is_refused_by_name(options):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(UserError, match=next(iter(options))):
        plain_attention(nn.Identity(), q, q, q, None, **options)
