"""A gradient by tiles with Triton's rows, which take over the state their values left: run by `test_triton_linear.py`."""

from __future__ import annotations

import pytest
import torch

from entropy_kernels import linear_entropy_logprob
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import linear, reference, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_by_tiles(dtype, softcap, monkeypatch):
    """Four tiles, the last one ragged, and a row without a target; at most twice as far from float64 as plain torch is in this dtype."""
    monkeypatch.setattr(linear, "TILE_COLUMNS", 100)
    monkeypatch.setattr(linear, "TILE_ROWS", 4)
    tiled = []
    by_tiles = linear._tiled_cotangents
    monkeypatch.setattr(linear, "_tiled_cotangents", lambda *a: (tiled.append(1), by_tiles(*a))[1])
    N, D, V = 7, 20, 307
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in ((N, D), (V, D), (V,))]
    c = torch.randn(3, N, generator=g).to(DEVICE)
    y = torch.randint(0, V, (N,), generator=g).to(DEVICE)
    y[2] = -100

    def run(ops, dtype):
        h, W, b = (t.to(dtype).detach().requires_grad_() for t in x)
        with rows_from(ops):
            out = linear_entropy_logprob(h, W, y, bias=b, temperature=0.7, softcap=softcap, workspace=1 << 14)
            return torch.autograd.grad(sum((a * k).sum() for a, k in zip(out, c, strict=True)), (h, W, b))

    exact = run(reference, torch.float64)
    floor = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps  # float64 is its own measure
    for got, plain, want in zip(run(rows, dtype), run(reference, dtype), exact, strict=True):
        assert want.abs().max() > 0.1
        mine, theirs = (got.double() - want).abs().max(), (plain.double() - want).abs().max()
        assert mine <= 2 * theirs + floor * want.abs().max()
    assert tiled == [1]
