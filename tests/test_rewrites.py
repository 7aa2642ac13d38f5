"""The calls that are replaced in a forward pass: same values, every derivative, float64 kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entropy_kernels.rewrites import Rewrites


def test_float64_stays_and_nothing_else_changes():
    with Rewrites(float64=True):
        assert torch.zeros(2, dtype=torch.float64).to(torch.float32).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float64).float().dtype == torch.float64
        assert torch.zeros(2).softmax(-1, dtype=torch.float32).dtype == torch.float32
        assert torch.zeros(2, dtype=torch.float64).softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.int64).float().dtype == torch.float32
        assert torch.zeros(2, dtype=torch.float64).to("cpu", torch.float32).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float64).to(torch.int64).dtype == torch.int64
    with Rewrites(float64=False):
        assert torch.zeros(2, dtype=torch.float64).float().dtype == torch.float32


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.0)]
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_layer_norm_keeps_its_value_and_dtype(dtype, bound, affine, shape):
    torch.manual_seed(0)
    norm = nn.LayerNorm(shape, elementwise_affine=affine).to(dtype)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn(p.shape).to(dtype))
    x = (3 + torch.randn(5, 4, 6)).to(dtype)
    with Rewrites(float64=False):
        got = norm(x)
    want = norm(x) if dtype != torch.bfloat16 else norm.float()(x.float()).bfloat16()
    assert got.dtype == dtype and (got - want).abs().max() <= bound * want.abs().max()


def test_layer_norm_has_every_second_derivative():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double().requires_grad_(False)
    x, v = torch.randn(2, 3, 6, dtype=torch.float64)
    weight = torch.linspace(-1, 1.5, 18, dtype=torch.float64).reshape(3, 6)
    jvp, grad = torch.func.jvp, torch.func.grad

    def f(x):
        with Rewrites(float64=True):
            return (norm(x) * weight).sum()

    def at(eta):
        return f(x + eta * v)

    h = 1e-2
    want = (16 * (at(h) + at(-h)) - (at(2 * h) + at(-2 * h)) - 30 * at(0)) / (12 * h * h)
    modes = {
        "forward over forward": jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (v,))[1],
        "forward over reverse": (jvp(grad(f), (x,), (v,))[1] * v).sum(),
        "reverse over forward": (grad(lambda x: jvp(f, (x,), (v,))[1])(x) * v).sum(),
        "reverse over reverse": (grad(lambda x: (grad(f)(x) * v).sum())(x) * v).sum(),
    }
    for name, got in modes.items():
        assert got.item() == pytest.approx(want.item(), rel=1e-6), name
