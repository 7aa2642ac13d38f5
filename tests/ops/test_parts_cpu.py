"""Rows in a kept set and its tail in C++ against the float64 specification: every function, dtype, set, instruction set, hard row."""

from __future__ import annotations

import pytest
import torch
from part_cases import FUNCTIONS, assert_close, each_function, each_kind, part_case, widened
from row_cases import each_dtype

from entropy_kernels.ops import cpu, cpu_parts, parts

if cpu.backend() == "plain torch":
    pytest.skip("no compiler, no library", allow_module_level=True)
BEST = torch.ops.entropy_kernels.best_level()


@each_function
@each_dtype
@each_kind
def test_equals_the_specification(name, dtype, kind):
    for V in (1, 2, 7, 252, 2048, 4103):
        arguments = part_case(5 if V > 2000 else 30, V, dtype, kind)
        got = FUNCTIONS[name](cpu_parts, *arguments)
        want = FUNCTIONS[name](parts, *widened(arguments))
        assert_close(name, got, want, dtype)


@each_function
@each_dtype
@pytest.mark.parametrize("level", range(BEST + 1))
def test_hard_rows_by_every_instruction_set(name, dtype, level, monkeypatch):
    """Rising, tied, uniform, masked, peaked, shifted rows; a kept set of any form."""
    monkeypatch.setattr(cpu, "_level", lambda: level)
    for kind in ("few", "one token", "all", "given"):
        arguments = part_case(12, 2300, dtype, kind, hard=True)
        want = FUNCTIONS[name](parts, *widened(arguments))
        # e^−88 is 0 in float32: so is the far end of a rising tail
        assert_close(name, FUNCTIONS[name](cpu_parts, *arguments), want, dtype, floor=1e-37)


@each_function
@each_dtype
def test_any_stride_every_output_and_no_neighbour(name, dtype, monkeypatch):
    for kind in ("some", "given"):
        z, kept, u, v, y, tau, w = part_case(9, 1100, dtype, kind)
        want = FUNCTIONS[name](cpu_parts, z, kept, u, v, y, tau, w)
        padded = torch.full((3, 9, 1140), torch.nan, dtype=dtype)
        padded[:, :, 20:1120] = torch.stack([z, u, v])
        z_, u_, v_ = padded[:, :, 20:1120]
        if kind == "given":
            kept = kept.t().contiguous().t()
        with monkeypatch.context() as poisoned:
            empty = torch.empty
            poisoned.setattr(
                torch,
                "empty",
                lambda *a, e=empty, **o: e(*a, **o).fill_(-7 if o.get("dtype") == torch.int64 else torch.nan),
            )
            got = FUNCTIONS[name](cpu_parts, z_, kept, u_, v_, y, tau, list(torch.stack(w, 1).unbind(1)))
        one = FUNCTIONS[name](cpu_parts, *(x[4:5] for x in (z, kept, u, v, y, tau)), [x[4:5] for x in w])
        none = FUNCTIONS[name](cpu_parts, *(x[:0] for x in (z, kept, u, v, y, tau)), [x[:0] for x in w])
        for a, b, c, d in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (got, want, one, none)), strict=True
        ):
            assert torch.equal(a, b) and torch.equal(c[0], b[4]) and len(d) == 0


@each_function
def test_rows_without_a_law_and_a_nan_on_either_side(name):
    z, kept, u, v, y, tau, w = part_case(5, 700, torch.float32, "given")
    y[:] = 3
    kept[:, :4] = True
    z[0, 3], z[1, 600], z[2], z[3, :4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    kept[1, 600] = kept[3, 4:] = False
    arguments = (z, kept, u, v, y, tau, w)
    got, want = FUNCTIONS[name](cpu_parts, *arguments), FUNCTIONS[name](parts, *widened(arguments))
    if isinstance(got, torch.Tensor):
        assert torch.equal(got.isnan(), want.isnan())
        assert got[0].isnan().any() and got[1].isnan().any() and got[2:].isfinite().all()
    else:
        for g, x in zip(got, want, strict=True):
            assert torch.equal(g.isnan(), x.isnan())


def test_the_set_keeps_its_last_token_of_a_narrow_dtype():
    """A threshold of float32 stands between two bfloat16 numbers: rounding it to the dtype of the logits would move it."""
    z = torch.tensor([[1.0, 1.0078125, 0.5]], dtype=torch.bfloat16)
    t = torch.tensor([1.001])
    assert parts.mask_of(z, t).tolist() == [[False, True, False]]
    assert cpu_parts.part_values(z, t, torch.tensor([0]), torch.ones(1)).kept_count.tolist() == [1]


def test_nothing_of_the_logits_size_is_made_besides_the_gradient(monkeypatch):
    z, kept, _, _, y, tau, w = part_case(4, 5000, torch.bfloat16, "some")
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: made.append(empty(*a, **o)) or made[-1])
    state = cpu_parts.part_values(z, kept, y, tau).state
    cpu_parts.part_cotangents(z, kept, y, tau, tuple(w[:4]), state=state)
    assert sum(x.numel() >= z.numel() for x in made) == 1
