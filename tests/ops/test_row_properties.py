"""What holds for every row whatever computes it: order, shift and scale of the vocabulary, merging of parts, fixed and truncated.

Rows come from hypothesis: ordinary, peaked, tied and masked entries side by side.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import FUNCTIONS, columns

from entropy_kernels import entropy_logprob, truncated_entropy
from entropy_kernels.functional import kept_set
from entropy_kernels.ops import cpu, reference

ENTRIES = st.one_of(st.floats(-8, 8, width=32), st.sampled_from([-torch.inf, 0.0, 1.0, 30.0, -60.0]))
ROWS = st.lists(ENTRIES, min_size=2, max_size=40).filter(lambda row: max(row) > -torch.inf)
properties = settings(max_examples=40, deadline=None, derandomize=True)
each_implementation = pytest.mark.parametrize("ops", [cpu, reference], ids=["c++", "plain"])
each_width = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def arguments(row, dtype, seed):
    """z, u, v, y, τ, w of one row; the target is a token of positive probability."""
    g = torch.Generator().manual_seed(seed)
    z = torch.tensor([row], dtype=dtype)
    u, v = (torch.randn(1, len(row), generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    possible = (z[0] > -torch.inf).nonzero().flatten()
    y = possible[torch.randint(0, len(possible), (1,), generator=g)]
    w = list(torch.randn(6, 1, generator=g, dtype=torch.float64).to(dtype))
    return z, u, v, y, torch.full((1,), 0.8, dtype=dtype), w


def close(got, want, dtype, scale=1.0):
    bound = (1e-12 if dtype == torch.float64 else 2e-5) * scale
    return ((got - want).abs() <= bound * (1 + want.abs().max())).all()


@each_implementation
@each_width
@properties
@given(row=ROWS, seed=st.integers(0, 99))
def test_the_order_of_the_vocabulary_does_not_matter(ops, dtype, row, seed):
    z, u, v, y, tau, w = arguments(row, dtype, seed)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    moved = (order == y).nonzero().flatten()
    for name, function in FUNCTIONS.items():
        want = columns(function(ops, z, u, v, y, tau, w))
        got = columns(function(ops, z[:, order], u[:, order], v[:, order], moved, tau, w))
        want = want[:, order] if name.startswith("row_cotangent") else want
        assert close(got, want, dtype), name


@each_implementation
@each_width
@properties
@given(row=ROWS, shift=st.integers(-2000, 2000), seed=st.integers(0, 99))
def test_a_shift_of_all_logits_moves_logsumexp_alone(ops, dtype, row, shift, seed):
    z, u, v, y, tau, w = arguments(row, dtype, seed)
    z = (z * 64).round() / 64  # so that the shifted logits are exact in float32
    for name, function in FUNCTIONS.items():
        want = columns(function(ops, z, u, v, y, tau, w))
        got = columns(function(ops, z + shift, u, v, y, tau, w))
        if name == "row_values":
            assert (got[2] - want[2] - shift / 0.8).abs() <= (1e-12 if dtype == torch.float64 else 1e-6) * (
                1 + abs(shift)
            )
            got, want = got[:2], want[:2]
        assert close(got, want, dtype), name


@each_implementation
@properties
@given(row=ROWS, factor=st.sampled_from([0.5, 2.0, 4.0]), seed=st.integers(0, 99))
def test_temperature_divides_logits_and_each_derivative(ops, row, factor, seed):
    z, u, v, y, tau, w = arguments(row, torch.float64, seed)
    order = {
        "row_values": 0,
        "row_tangents": 1,
        "row_second_tangents": 2,
        "row_cotangents": 1,
        "row_cotangent_tangents": 1,
    }
    w[3:] = [torch.zeros(1, dtype=torch.float64)] * 3  # of a gradient's tangent, the part that is linear in ż
    for name, function in FUNCTIONS.items():
        power = order[name] + (name == "row_cotangent_tangents")
        got = columns(function(ops, z, u, v, y, tau * factor, w))
        want = columns(function(ops, z / factor, u, v, y, tau, w)) / factor**power
        assert close(got, want, torch.float64), name


def state(z):
    """(lse, E_p[z]) of a part: what has to be known of it."""
    r = entropy_logprob(z)
    return r.logsumexp, r.logsumexp - r.entropy


def merge(a, b):
    lse = torch.logaddexp(a[0], b[0])
    share = (a[0] - lse).exp()
    return lse, share * a[1] + (1 - share) * b[1]


@properties
@given(
    row=ROWS.filter(lambda row: sum(x > -torch.inf for x in row) >= 3),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_parts_merge_to_the_row_in_any_grouping(row, cuts):
    z = torch.tensor([x for x in row if x > -torch.inf], dtype=torch.float64)
    i = 1 + int(cuts[0] * (len(z) - 3))
    j = i + 1 + int(cuts[1] * (len(z) - i - 2))
    a, b, c = (state(part) for part in (z[:i], z[i:j], z[j:]))
    whole = state(z)
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), functools.reduce(merge, (c, a, b))):
        for x, y in zip(merged, whole, strict=True):
            assert abs(x - y) <= 1e-12 * (1 + abs(y))


@each_width
@properties
@given(
    row=ROWS,
    k=st.integers(1, 40),
    p=st.sampled_from([0.2, 0.9, 1.0]),
    shift=st.integers(-2000, 2000),
    seed=st.integers(0, 99),
)
def test_truncated_rows_keep_their_set_under_order_and_shift(dtype, row, k, p, shift, seed):
    z, _, _, y, _, _ = arguments(row, dtype, seed)
    z = (z * 64).round() / 64
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    kept, options = kept_set(z, top_k=k, top_p=p), dict(top_k=k, top_p=p)
    assert torch.equal(kept_set(z[:, order], **options), kept[:, order])
    assert torch.equal(kept_set(z + shift, **options), kept)
    want = truncated_entropy(z, y, **options)
    for moved, target in ((z[:, order], (order == y).nonzero().flatten()), (z + shift, y)):
        for g, w in zip(truncated_entropy(moved, target, **options), want, strict=True):
            assert torch.equal(g, w) or close(g.double(), w.double(), dtype)
    smaller = kept_set(z, top_k=max(1, k // 2), top_p=p)
    assert (smaller <= kept).all() and (kept <= kept_set(z)).all()
