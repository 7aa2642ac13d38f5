"""What `test_triton_rows.py` runs beside `triton_rows.py`: kept sets in Triton against sorting in float64, to the last token."""

from __future__ import annotations

import pytest
import torch
from row_cases import special_rows

from entropy_kernels.functional import kept_set, truncated_entropy
from entropy_kernels.functional import truncated as functional
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import rows, truncated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
slow = pytest.mark.slow if DEVICE == "cpu" else ()
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=slow) for d in (torch.float32, torch.float16))],
    ids=str,
)


@pytest.fixture(autouse=True)
def narrow_steps(monkeypatch):
    monkeypatch.setattr(rows, "kept_width", lambda V: 512)


def found(z, tau, k, p):
    return rows.kept_set(*(x.to(DEVICE) for x in (z, tau, k, p))).cpu()


def wanted(z, tau, k, p):
    return truncated.kept_set(z.double(), tau.double(), k, p)


def half(R, x):
    return torch.full((R,), x, dtype=torch.float64)


@each_dtype
def test_every_row_its_own_truncation(dtype):
    z = (torch.randn(8, 700, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    z[1, ::3] = -torch.inf
    z[2], z[2, :300] = 0.0, -0.0
    z[3, 5], z[4, 9], z[5] = torch.nan, torch.inf, -torch.inf
    tau = torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.5
    k = torch.tensor([5, 30, 3, 4, 4, 4, 800, 700])
    p = torch.tensor([1.0, 0.5, 0.2, 0.9, 0.9, 0.9, 0.97, 1.0], dtype=torch.float64)
    got = found(z, tau, k, p)
    assert torch.equal(got, wanted(z, tau, k, p))
    assert got.sum(-1)[[0, 2, 3, 4, 5, 7]].tolist()[1:] == [700, 0, 0, 0, 700]


@each_dtype
@pytest.mark.parametrize(
    "k, p", [(3, 0.5), pytest.param(1200, 0.999, marks=slow), pytest.param(40, 1.0, marks=slow)]
)
def test_hard_rows(dtype, k, p):
    """Peaks of 1e4, uniform and tied rows, mostly masked ones."""
    z, _, _, _, tau, _ = special_rows(dtype, 1200)
    arguments = (z, tau, torch.full((12,), k), half(12, p))
    assert torch.equal(found(*arguments), wanted(*arguments))


def test_a_threshold_between_two_tokens_of_a_narrow_dtype():
    """The search ends just above the next token below, a number that float16 would round down to that token."""
    z = torch.tensor(
        [[6e-8, 0.0, -6e-8, -1.0], [1.0, 0.99951171875, 0.9990234375, 65504.0]], dtype=torch.float16
    )
    for k in (1, 2, 3):
        arguments = (z, torch.ones(2), torch.full((2,), k), half(2, 1.0))
        assert torch.equal(found(*arguments), wanted(*arguments)) and (found(*arguments).sum(-1) == k).all()


def test_no_neighbour_no_order_and_any_stride():
    z = torch.randn(3, 400, generator=torch.Generator().manual_seed(3)) * 2
    tau, k, p = torch.ones(3), torch.tensor([400, 20, 7]), half(3, 0.8)
    together = found(z, tau, k, p)
    assert torch.equal(together[1:2], found(z[1:2], tau[1:2], k[1:2], p[1:2]))
    wide = torch.full((400, 6), torch.nan)
    wide[:, ::2] = z.t()
    assert torch.equal(found(wide.t()[::2], tau, k, p), together)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found(z[:, order], tau, k, p), together[:, order])


def test_the_public_functions_use_it():
    z = torch.randn(2, 3, 90, generator=torch.Generator().manual_seed(5)) * 2
    with rows_from(rows):
        assert functional.backend(z.device).startswith("triton")
        kept = kept_set(z.to(DEVICE), top_k=9, top_p=0.9, temperature=0.7).cpu()
        t = truncated_entropy(z.to(DEVICE), z.argmax(-1).to(DEVICE), top_k=9, top_p=0.9, temperature=0.7)
    tau = torch.full((6,), 0.7)
    assert torch.equal(kept.view(6, 90), wanted(z.view(6, 90), tau, torch.full((6,), 9), half(6, 0.9)))
    want = truncated.truncated_values(
        z.view(6, 90).double(), kept.view(6, 90), z.argmax(-1).view(6), tau.double()
    )
    for g, w in zip(t, want, strict=True):
        assert torch.allclose(g.cpu().double().view(6), w.double(), rtol=3e-6)
