"""Rows that every implementation is tried on, and how near the float64 specification it has to come."""

from __future__ import annotations

import pytest
import torch

from entropy_kernels.ops import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = {
    "row_values": lambda ops, z, u, v, y, tau, w: ops.row_values(z, y, tau),
    "row_tangents": lambda ops, z, u, v, y, tau, w: ops.row_tangents(z, v, y, tau),
    "row_second_tangents": lambda ops, z, u, v, y, tau, w: ops.row_second_tangents(z, u, v, y, tau),
    "row_cotangents": lambda ops, z, u, v, y, tau, w: ops.row_cotangents(z, y, tau, *w[:3]),
    "row_cotangent_tangents": lambda ops, z, u, v, y, tau, w: ops.row_cotangent_tangents(
        z, v, y, tau, tuple(w[:3]), tuple(w[3:])
    ),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def case(R, V, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + R + V)
    z = (torch.randn(R, V, generator=g) * 3).to(dtype)
    u, v = (torch.randn(R, V, generator=g).to(dtype) for _ in range(2))
    y = torch.randint(0, V, (R,), generator=g)
    y[::3] = -1
    tau = torch.rand(R, generator=g) + 0.5
    w = torch.randn(6, R, generator=g)
    if R:
        y[-1] = z[-1].argmax()
    wide = reference.compute_dtype(dtype)
    return z, u, v, y, tau.to(wide), list(w.to(wide))


def widened(arguments):
    z, u, v, y, tau, w = arguments
    return z.double(), u.double(), v.double(), y, tau.double(), [x.double() for x in w]


def columns(result):
    """Three sums per row, or a gradient, as one tensor whose last dimension shares a scale."""
    return torch.stack(list(result)) if isinstance(result, tuple) else result


def tolerance(name, dtype):
    if dtype == torch.float64:
        return 1e-12
    writes_rows = name.startswith("row_cotangent")
    return {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype] if writes_rows else 3e-6


def assert_close(name, got, want, dtype):
    got, want = columns(got), columns(want)
    expected = dtype if name.startswith("row_cotangent") else reference.compute_dtype(dtype)
    assert got.dtype == expected and got.shape == want.shape
    # a value near 0 by accident, such as a covariance, is held to the size of its neighbours
    scale = want.abs().amax(-1, keepdim=True) if want.numel() else want
    floor = 6e-8 if dtype == torch.float16 else 0.0  # half's smallest number
    bound = tolerance(name, dtype) * scale + floor
    error = (got.double() - want).abs()
    assert (error <= bound).all(), (error / scale).max()


def special_rows(dtype, V=2300):
    """Rising (every chunk brings a new peak), tied, uniform, masked, peaked at both ends, shifted."""
    z, u, v, y, tau, w = case(12, V, dtype)
    z[0] = torch.linspace(-20, 20, V)
    z[1], u[1] = 2.0, v[1]  # a covariance that is not 0 by accident
    z[2, [3, 1100, V - 1]] = 40.0
    z[3, ::2] = -torch.inf
    z[4, : V - 3] = -torch.inf
    z[5, 0], z[6, V - 1] = 30.0, 30.0
    z[7] += 1e4
    z[8] -= 1e4
    z[9] = torch.linspace(20, -20, V)
    z[10] *= 30  # most weights vanish
    y[:] = 1
    y[5], y[6], y[2] = 0, V - 1, 1100
    y[3] = 1
    y[4] = V - 1
    return z, u, v, y, tau, w
