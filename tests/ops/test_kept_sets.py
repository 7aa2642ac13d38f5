"""Kept sets against a count in exact arithmetic, and the truncated law against its definition."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_kernels.ops import cpu, truncated

BINARY = [-torch.inf, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]  # logits whose weights at τ = 1/ln 2 are the exact 2^z


def counted(row, k, p):
    """Top-k, then top-p on what it left, for weights 2^z: one token after another, ties together, in whole numbers."""
    weight = [Fraction(0) if z == -torch.inf else Fraction(2) ** int(z) for z in row]
    order = sorted(range(len(row)), key=lambda a: -weight[a])
    kept = []
    for a in order:  # whoever comes while fewer than k are strictly larger
        if weight[a] > 0 and sum(weight[b] > weight[a] for b in order) < k:
            kept.append(a)
    total, p = sum(weight[a] for a in kept), Fraction(p)
    if p < 1:
        kept = [a for a in kept if sum(weight[b] for b in kept if weight[b] > weight[a]) < p * total]
    return set(kept)


def kept_of(rows, k=None, p=None, tau=1.0, dtype=torch.float64, ops=truncated):
    z = torch.as_tensor(rows, dtype=dtype)
    R = len(z)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ops.kept_set(
        z,
        torch.full((R,), tau, dtype=wide),
        None if k is None else torch.as_tensor(k).expand(R),
        None if p is None else torch.as_tensor(p, dtype=torch.float64).expand(R),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(BINARY), min_size=1, max_size=12).filter(lambda row: max(row) > -torch.inf),
    st.integers(1, 13),
    st.sampled_from([0.01, 0.1, 1 / 3, 0.6, 0.9, 0.999, 1.0]),
)
def test_the_kept_set_is_counted_exactly(row, k, p):
    got = kept_of([row], k, p, tau=1 / torch.tensor(2.0, dtype=torch.float64).log().item())[0]
    assert set(got.nonzero().flatten().tolist()) == counted(row, k, p)


@pytest.mark.parametrize("ops", [truncated, cpu], ids=["plain", "c++"])
def test_the_token_that_crosses_and_the_ties_are_kept(ops):
    halves = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    for p, count in [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.7501, 4), (0.99, 4)]:
        assert kept_of(halves[None], p=p, ops=ops).sum() == count, p
    for k, count in [(1, 1), (2, 2), (3, 4), (4, 4), (9, 4)]:
        assert kept_of(halves[None], k, ops=ops).sum() == count, k
    assert kept_of(torch.zeros(1, 6), 2, ops=ops).sum() == 6


def test_top_p_is_taken_of_what_top_k_left():
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert kept_of(z, p=0.5).sum() == 2
    assert kept_of(z, 2, 0.5).sum() == 1  # 0.4 of 0.7 is more than half
    assert kept_of(z, 3, 0.9).sum() == 3


def test_agrees_with_the_samplers_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    g = torch.Generator().manual_seed(1)
    z = torch.randn(200, 300, generator=g, dtype=torch.float64) * 3
    for k, p, tau in [(20, 0.9, 1.0), (50, 0.5, 0.7), (300, 0.95, 1.3)]:
        scores = TemperatureLogitsWarper(tau)(None, z)
        scores = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, scores))
        assert torch.equal(kept_of(z, k, p, tau), scores > -torch.inf)


def test_rows_without_a_law_keep_nothing():
    z = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, 0.0, 1.0], [-torch.inf] * 3, [0.0, -torch.inf, 1.0]])
    for k, p in [(2, None), (None, 0.9), (None, None), (3, 1.0)]:
        assert kept_of(z, k, p).sum(-1).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("ops", [truncated, cpu], ids=["plain", "c++"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_undefined_temperature_keeps_nothing_and_ends(ops, dtype):
    z = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0))
    for tau in (torch.nan, -1.0, 0.0, torch.inf):
        for k, p in [(3, None), (None, 0.9), (3, 0.9)]:
            assert not kept_of(z, k, p, tau, dtype=dtype, ops=ops).any()
    if ops is cpu:
        nan, y = torch.full((3,), torch.nan, dtype=dtype), torch.zeros(3, dtype=torch.int64)
        t = cpu.truncated_values_of_rows(
            z.to(dtype), y, nan, torch.full((3,), 9), torch.full((3,), 0.9, dtype=torch.float64)
        )
        assert t.entropy.isnan().all() and t.kept_mass.isnan().all() and (t.kept_count == 0).all()


def test_every_row_has_its_own_k_and_p():
    g = torch.Generator().manual_seed(2)
    z = torch.randn(4, 50, generator=g, dtype=torch.float64) * 2
    k, p = torch.tensor([3, 50, 20, 50]), torch.tensor([1.0, 0.3, 0.8, 1.0])
    together = kept_of(z, k, p)
    for r in range(4):
        assert torch.equal(together[r : r + 1], kept_of(z[r : r + 1], k[r], p[r]))
    assert together.sum(-1)[0] == 3 and together.sum(-1)[3] == 50


def test_truncated_law_by_its_definition():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(6, 40, generator=g, dtype=torch.float64) * 2
    y = torch.randint(0, 40, (6,), generator=g)
    kept = kept_of(z, 12)
    got = truncated.truncated_values(z, kept, y, torch.full((6,), 0.8, dtype=torch.float64))
    p = (z / 0.8).softmax(-1)
    s = (p * kept).sum(-1)
    q, tail = p * kept / s[:, None], p * ~kept / (1 - s)[:, None]

    def entropy(x):
        return -torch.xlogy(x, x).sum(-1)

    want = [entropy(q), q.gather(-1, y[:, None])[:, 0].log(), s, kept.sum(-1), entropy(tail), entropy(p)]
    assert got.logprob.isneginf().any() and got.logprob.isfinite().any()
    for g_, w in zip(got, want, strict=True):
        assert torch.allclose(g_.double(), w.double(), rtol=1e-12, atol=0), (g_, w)


@pytest.mark.parametrize("kept, s, tail", [([1, 1, 1, 0], 1.0, 0.0), ([0, 0, 0, 1], 0.0, None)])
def test_a_tail_or_a_set_of_no_mass(kept, s, tail):
    z = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    got = truncated.truncated_values(z, torch.tensor([kept]).bool(), torch.tensor([0]), torch.ones(1))
    assert got.kept_mass.item() == s
    assert got.tail_entropy.item() == (got.full_entropy.item() if tail is None else tail)
    assert got.entropy.isnan().item() is (tail is None)
