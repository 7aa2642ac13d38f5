"""Rows that come a tile of columns at a time, against the float64 specification of whole rows: cut anywhere, the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from row_cases import FUNCTIONS, assert_close, case, each_dtype, special_rows, widened

from entropy_kernels.ops import cpu, reference, tiles

if cpu.backend() == "plain torch":
    pytest.skip("no compiler, no library", allow_module_level=True)
each_function = pytest.mark.parametrize("name", ["row_values", "row_tangents", "row_cotangents"])


def tiled(width):
    """The row functions of `ops`, each in tiles of `width` columns."""

    def carried(z, dz, tau):
        carry = tiles.carry(len(z), int(dz is not None))
        for start in range(0, z.shape[1], width):
            part = z[:, start : start + width]
            if dz is None:
                tiles.add_values(part, tau, carry)
            else:
                tiles.add_tangents(part, dz[:, start : start + width], tau, carry)
        return carry

    def at(z, y):
        return z.gather(1, y.clamp_min(0).unsqueeze(1)).squeeze(1).double()

    def row_cotangents(z, y, tau, q, g, l):  # noqa: E741
        state = tiles.state(carried(z, None, tau), tau)
        columns = []
        for start in range(0, z.shape[1], width):
            part = z[:, start : start + width].contiguous()
            here = (y >= start) & (y < start + part.shape[1])
            rest = torch.where((y >= 0) & ~here, l - g, l)
            out = torch.full_like(part, torch.nan)
            y_here = torch.where(here, y - start, -1)
            columns.append(tiles.cotangents(part, y_here, tau, q, g, rest, state=state, out=out))
        return torch.cat(columns, 1)

    return SimpleNamespace(
        row_values=lambda z, y, tau: tiles.values(carried(z, None, tau), at(z, y), y, tau, z.dtype),
        row_tangents=lambda z, dz, y, tau: tiles.tangents(carried(z, dz, tau), at(dz, y), y, tau, z.dtype),
        row_cotangents=row_cotangents,
    )


@each_function
@each_dtype
@pytest.mark.parametrize("V, width", [(507, 123), (507, 1), (4103, 2048), (7, 7), (1, 1)])
def test_equals_the_specification(name, dtype, V, width):
    arguments = case(25, V, dtype)
    want = FUNCTIONS[name](reference, *widened(arguments))
    assert_close(name, FUNCTIONS[name](tiled(width), *arguments), want, dtype)


@each_function
@each_dtype
@pytest.mark.parametrize("width", [1000, 2048])
def test_hard_rows(name, dtype, width):
    arguments = special_rows(dtype)
    want = FUNCTIONS[name](reference, *widened(arguments))
    assert_close(name, FUNCTIONS[name](tiled(width), *arguments), want, dtype)


@each_function
@pytest.mark.parametrize("width", [3, 9])
def test_instruction_sets_agree(name, width, monkeypatch):
    arguments = case(40, 50, torch.float32)
    want = FUNCTIONS[name](reference, *widened(arguments))
    for level in range(torch.ops.entropy_kernels.best_level() + 1):
        monkeypatch.setattr(cpu, "_level", lambda level=level: level)
        assert_close(name, FUNCTIONS[name](tiled(width), *arguments), want, torch.float32)


@pytest.mark.parametrize("width", [2, 5])
def test_a_peaked_row_keeps_its_digits(width):
    """H = 3e-6 nats in float32, the peak in the last tile: a relative error of 3e-7, values and tangents of values alike."""
    z = torch.zeros(1, 9)
    z[0, -1] = 17.0
    y, tau = torch.tensor([8]), torch.ones(1)
    exact = reference.row_values(z.double(), y, tau.double())
    for got, want in zip(tiled(width).row_values(z, y, tau)[:2], exact[:2], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 4, 8])
def test_an_undefined_row_is_undefined_throughout(poison, at):
    z, _u, v, y, tau, w = case(3, 9, torch.float32)
    z[1, at] = poison
    fine = torch.tensor([True, False, True])
    found = [*tiled(4).row_values(z, y, tau), *tiled(4).row_tangents(z, v, y, tau)]
    for x in (found[0], found[2], found[3], found[5]):
        assert torch.equal(x.isfinite(), fine)
    assert torch.equal(tiled(4).row_cotangents(z, y, tau, *w[:3]).isnan().all(1), ~fine)
