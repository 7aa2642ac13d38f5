"""Rows and kept sets that every implementation of rows in two parts is tried on."""

from __future__ import annotations

import pytest
import torch
from row_cases import case, special_rows, tolerance

from entropy_kernels.ops import parts, truncated
from entropy_kernels.ops.reference import compute_dtype

FUNCTIONS = {
    "part_values": lambda ops, z, kept, u, v, y, tau, w: ops.part_values(z, kept, y, tau)[:4],
    "part_tangents": lambda ops, z, kept, u, v, y, tau, w: ops.part_tangents(z, kept, v, y, tau),
    "part_second_tangents": lambda ops, z, kept, u, v, y, tau, w: ops.part_second_tangents(
        z, kept, u, v, y, tau
    ),
    "part_cotangents": lambda ops, z, kept, u, v, y, tau, w: ops.part_cotangents(
        z, kept, y, tau, tuple(w[:4])
    ),
    "part_cotangents, state": lambda ops, z, kept, u, v, y, tau, w: ops.part_cotangents(
        z, kept, y, tau, tuple(w[:4]), state=ops.part_values(z, kept, y, tau).state
    ),
    "part_cotangent_tangents": lambda ops, z, kept, u, v, y, tau, w: ops.part_cotangent_tangents(
        z, kept, v, y, tau, tuple(w[:4]), tuple(w[4:])
    ),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
KINDS = ["some", "few", "most", "one token", "all", "given", "given, one token", "given, none"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def set_of(kind, z, tau):
    """A threshold for each row, or the set itself where it is not made of the largest logits."""
    R, V = z.shape
    if kind.startswith("given"):
        share = {"given": 0.4, "given, one token": 0.0, "given, none": 0.0}[kind]
        S = torch.rand(R, V, generator=torch.Generator().manual_seed(R + V)) < share
        if kind == "given, one token":
            S[:, V // 2] = True
        return S
    share = {"some": 0.3, "few": 0.02, "most": 0.95, "one token": 0.0, "all": 1.0}[kind]
    k = torch.full((R,), max(1, round(share * V)))
    return truncated.thresholds(z.double(), tau.double(), k, None).to(compute_dtype(z.dtype))


def part_case(R, V, dtype, kind, hard=False):
    """z, S, u, v, y, τ, w: among the targets kept ones, others and none."""
    z, u, v, y, tau, _ = special_rows(dtype, V) if hard else case(R, V, dtype)
    kept = set_of(kind, z, tau)
    S = parts.mask_of(z, kept)
    y[1::3] = torch.where(S, z, -torch.inf).argmax(-1)[1::3]
    w = torch.randn(8, len(z), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return z, kept, u, v, y, tau, list(w)


def widened(arguments):
    z, kept, u, v, y, tau, w = arguments
    return (
        z.double(),
        kept if kept.dtype == torch.bool else kept.double(),
        u.double(),
        v.double(),
        y,
        tau.double(),
        w,
    )


def assert_close(name, got, want, dtype, floor=0.0, written=1.0):
    """Values to their own size, log-odds as the mass they stand for, derivatives to the largest of their kind, gradients of their row."""
    if not isinstance(got, torch.Tensor):
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert g.dtype == torch.float64 and g.shape == w.shape
            size = w.abs().masked_fill(~w.isfinite(), 0.0)
            scale = size.clamp_min(1.0) if i == 2 else size if name == "part_values" else size.amax()
            same, error = (g == w) | (g.isnan() & w.isnan()), (g - w).abs()
            bound = (1e-12 if dtype == torch.float64 else 3e-6) * scale + floor
            assert (same | (error <= bound)).all(), (name, i, error / scale)
        return
    assert got.dtype == dtype and got.shape == want.shape
    scale = want.abs().amax(-1, keepdim=True) if want.numel() else want
    bound = (
        written * tolerance("row_cotangents", dtype) * scale
        + (6e-8 if dtype == torch.float16 else 0.0)
        + floor
    )
    error = (got.double() - want).abs()
    assert (error <= bound).all(), (name, (error / scale).max())
