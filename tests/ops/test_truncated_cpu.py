"""Thresholds and truncated values in C++ against sorting in float64: sets equal to the last token, values within rounding."""

from __future__ import annotations

import pytest
import torch
from row_cases import case, each_dtype, special_rows

from entropy_kernels.ops import cpu, truncated
from entropy_kernels.ops.reference import compute_dtype

if cpu.backend() == "plain torch":
    pytest.skip("no compiler, no library", allow_module_level=True)
BEST = torch.ops.entropy_kernels.best_level()


def settings(R, V, seed=0):
    """k and p of each row, of every kind: few, many, all; one, some and nearly all of the mass."""
    g = torch.Generator().manual_seed(seed)
    k = torch.tensor([1, 2, 7, 50, 300, V // 2 + 1, V, V + 5])[
        torch.randint(0, 8, (R,), generator=g)
    ].clamp_min(1)
    p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9, 1.0, 1.0], dtype=torch.float64)
    return k, p[torch.randint(0, 8, (R,), generator=g)]


def assert_truncated(z, y, tau, k, p, dtype, rtol=3e-6):
    kept = truncated.kept_set(z.double(), tau.double(), k, p)
    assert torch.equal(cpu.kept_set(z, tau, k, p), kept)
    got = cpu.truncated_values_of_rows(z, y, tau, k, p)
    want = truncated.truncated_values(z.double(), kept, y, tau.double())
    bound = 1e-12 if dtype == torch.float64 else rtol
    for name, g, w in zip(got._fields, got, want, strict=True):
        if name == "kept_count":
            assert torch.equal(g, w)
            continue
        assert g.dtype == compute_dtype(dtype)
        same = (g.double() == w) | (g.isnan() & w.isnan())
        error = (g.double() - w).abs() / w.abs().clamp_min(1e-30)
        assert (same | (error <= bound)).all(), (name, error[~same].max(), k, p)
    return got


@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 252, 2048, 4103, 20011, 151936])
def test_equals_sorting_in_float64(dtype, V):
    R = 4 if V > 100_000 else 16 if V > 5000 else 64
    z, _, _, y, tau, _ = case(R, V, dtype)
    assert_truncated(z, y, tau, *settings(R, V), dtype)


@each_dtype
@pytest.mark.parametrize("level", range(BEST + 1))
@pytest.mark.parametrize(
    "k, p", [(1, 1.0), (3, 0.5), (40, 1.0), (2300, 0.3), (2300, 0.999), (2300, 1.0), (1000, 0.9)]
)
def test_hard_rows(dtype, level, k, p, monkeypatch):
    monkeypatch.setattr(cpu, "_level", lambda: level)
    z, _, _, y, tau, _ = special_rows(dtype)
    # for the tail a rising row of τ < 1 spans more than the range of float32: its far end is 0 there
    got = assert_truncated(
        z, y, tau, torch.full((12,), k), torch.full((12,), p, dtype=torch.float64), dtype, rtol=1e-5
    )
    assert all(x.isfinite().all() for x in got[2:])


@each_dtype
def test_ties_at_the_threshold_and_zeros_of_either_sign(dtype):
    z = torch.zeros(4, 6000, dtype=dtype)
    z[0, ::2] = -0.0
    z[1, :10], z[2, 5:8], z[3, 7] = 3.0, -1.0, 9.0
    y = torch.zeros(4, dtype=torch.int64)
    for k, p in [(1, 1.0), (11, 1.0), (6000, 0.5), (6000, 0.99), (20, 0.3)]:
        got = assert_truncated(
            z,
            y,
            torch.ones(4, dtype=compute_dtype(dtype)),
            torch.full((4,), k),
            torch.full((4,), p, dtype=torch.float64),
            dtype,
        )
    assert got.kept_count.tolist() == [6000, 6000, 5997, 1]


@pytest.mark.parametrize("gap", [2.0, 5.0, 30.0, 100.0, 1000.0])
def test_peaked_tails_and_tails_far_below(gap):
    """One token, a gap, another, a gap, the rest: every way in which sums counted from the split would lose the tail."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(6, 9000, generator=g)
    z[:, 17] = 2 * gap + 8
    z[1:, 4000] = gap + 4
    z[3:, 4128] = gap + 4.5  # the same lane of the same block as a smaller one
    z[5, 8999] = -1e4
    y = torch.tensor([17, 4000, 3, -1, 17, 17])
    one = torch.ones(6)
    for k in (1, 2, 3, 5):
        assert_truncated(z, y, one, torch.full((6,), k), one.double(), torch.float32)
    for p in (0.3, 0.999, 1 - 1e-12):
        assert_truncated(z, y, one, torch.full((6,), 9000), one.double() * p, torch.float32)


def test_a_crossing_too_close_for_float32_is_decided_as_in_float64():
    z = torch.randn(30, 20000, generator=torch.Generator().manual_seed(5)) * 0.01
    one = torch.ones(30)
    mass = z.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    for offset in (-1e-9, 1e-9):
        p = mass[:, 12345] * (1 + offset)
        kept = cpu.kept_set(z, one, torch.full((30,), 20000), p)
        assert torch.equal(kept, truncated.kept_set(z.double(), one.double(), torch.full((30,), 20000), p))
        assert (kept.sum(-1) == 12346 + (offset > 0)).all()


@each_dtype
def test_rows_without_a_law(dtype):
    z = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[0, 2999], z[1, 5], z[2], z[3, 1500:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    one = torch.ones(5, dtype=compute_dtype(dtype))
    got = assert_truncated(
        z, torch.zeros(5, dtype=torch.int64), one, torch.full((5,), 10), one.double() * 0.9, dtype
    )
    assert got.entropy.isnan().tolist() == [True, True, True, False, False]
    assert (got.kept_count[:3] == 0).all() and got.kept_mass[:3].isnan().all()


@each_dtype
def test_any_stride_every_output_and_no_neighbour(dtype, monkeypatch):
    z, _, _, y, tau, _ = case(9, 5000, dtype)
    k, p = settings(9, 5000, seed=3)
    want = torch.stack([x.double() for x in cpu.truncated_values_of_rows(z, y, tau, k, p)])
    padded = torch.full((9, 5040), torch.nan, dtype=dtype)
    padded[:, 20:5020] = z
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **o: empty(*a, **o).fill_(-7 if o.get("dtype") == torch.int64 else torch.nan),
    )
    got = cpu.truncated_values_of_rows(padded[:, 20:5020], y, tau, k, p)
    assert torch.equal(torch.stack([x.double() for x in got]), want)
    for r in range(9):
        one = cpu.truncated_values_of_rows(*(x[r : r + 1] for x in (z, y, tau, k, p)))
        assert torch.equal(torch.stack([x.double() for x in one])[:, 0], want[:, r])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(
            torch.stack([x.double() for x in cpu.truncated_values_of_rows(z, y, tau, k, p)]), want
        )
    finally:
        torch.set_num_threads(before)
    assert len(cpu.truncated_values_of_rows(*(x[:0] for x in (z, y, tau, k, p))).entropy) == 0


def test_offsets_beyond_two_to_the_31():
    V = 5000
    storage = torch.empty(
        (1 << 31) + V, dtype=torch.bfloat16
    )  # 4 GB of addresses, of which only the ends are touched
    rows = storage.as_strided((2, V), (1 << 31, 1))
    rows.copy_(torch.randn(2, V, generator=torch.Generator().manual_seed(0)) * 3)
    one = torch.ones(2)
    assert_truncated(
        rows, torch.tensor([3, 4]), one, torch.full((2,), 40), one.double() * 0.9, torch.bfloat16
    )
