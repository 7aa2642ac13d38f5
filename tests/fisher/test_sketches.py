"""Sketches: unbiased for every shape of parameter, errors as stated, reusable from disk. Seeds and counts are fixed beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_kernel import make, positive

from entropy_kernels import Sketch, fisher_kernel, fisher_sketch
from entropy_kernels.errors import UserError
from entropy_kernels.fisher.sketches import hashed, sketched
from entropy_kernels.ops.contract import Term
from entropy_kernels.policy import TokenBatch

SHAPES = {"linear": (16, 24), "wide": (2, 300), "bias": (1, 16), "scalar": (1, 1), "table": (23, 8)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inner_products_are_unbiased_with_the_variance_stated(shape):
    C, D = shape
    n, size, s, seeds = 3, 16, 4, 800
    generator = torch.Generator().manual_seed(0)
    P = torch.rand(C, D, generator=generator, dtype=torch.float64) + 0.1
    samples = [
        [Term(*(torch.randn(5, d, generator=generator, dtype=torch.float64) for d in (C, D)))]
        for _ in range(n)
    ]
    x = torch.stack([P.sqrt() * (term.left.t() @ term.right) for (term,) in samples]).flatten(1)
    exact, norms = x @ x.t(), x.square().sum(1)
    variance = (norms[:, None] * norms + exact**2 - 2 * x.square() @ x.square().t()) / size
    found = []
    for seed in range(seeds):
        y, squares = sketched(samples, "w", shape, P, size=size, nonzeros=s, seed=seed)
        found.append(y @ y.t())
        assert torch.allclose(squares, norms)
    products = torch.stack(found)
    error = products.std(0) / seeds**0.5
    if C * D > 1:
        assert ((products.mean(0) - exact).abs() < 4.5 * error + 1e-12).all()
        # relative error of a variance: √((kurtosis − 1)/n), kurtosis below 20 for these
        assert ((products.var(0) / variance - 1).abs() < 4.5 * (19 / seeds) ** 0.5).all()
    else:  # one number is reproduced
        assert torch.allclose(products, exact.expand_as(products))


def test_places_and_signs_are_uniform_and_independent_of_blocks():
    bucket, sign = hashed(0, 40000, 12345, 8, torch.device("cpu"))
    counts = torch.bincount(bucket * 2 + (sign + 1) // 2, minlength=16).double()
    assert ((counts - 2500).square() / 2500).sum() < 44.3  # chi-square, 15 degrees of freedom, P = 1e-4
    later = hashed(1000, 2000, 12345, 8, torch.device("cpu"))
    assert torch.equal(later[0], bucket[1000:2000]) and torch.equal(later[1], sign[1000:2000])
    products = (sign[:-1] * sign[1:]).double().mean()
    assert products.abs() < 4 / 200


def test_a_sketched_kernel_is_unbiased_and_its_errors_hold():
    policy, batch = make("qwen2_tied"), tiny.batch()
    P = positive(policy)
    exact = fisher_kernel(policy, batch, preconditioner=P)
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    seeds, z = 16, []
    for seed in range(seeds):
        found = fisher_sketch(policy, batch, size=64, nonzeros=4, seed=seed, preconditioner=P).kernel()
        assert torch.allclose(found.value.diag(), exact.diag(), rtol=1e-10) and not found.stderr.diag().any()
        z.append(((found.value - exact) / found.stderr)[off_diagonal].reshape(6, 5))
    z = torch.stack(z)
    mean = z.mean(0) / (z.std(0) / seeds**0.5)
    assert mean.abs().max() < 4.5
    assert 0.6 < z.square().mean().sqrt() < 1.1  # rather too large, never too small


def test_sketches_of_two_batches_fit_and_survive_the_disk(tmp_path):
    policy, batch = make("gpt2"), tiny.batch()
    halves = [TokenBatch(*(x[part] for x in batch)) for part in (slice(0, 4), slice(4, 6))]
    whole = fisher_sketch(policy, batch, size=256, nonzeros=8)
    first, second = (fisher_sketch(policy, half, size=256, nonzeros=8) for half in halves)
    first.save(tmp_path / "first.safetensors")
    again = Sketch.load(tmp_path / "first.safetensors")
    got, want = again.kernel(second), whole.kernel()
    assert torch.allclose(got.value, want.value[:4, 4:], rtol=1e-9) and torch.allclose(
        got.stderr, want.stderr[:4, 4:], rtol=1e-9
    )
    assert torch.equal(again.prompt_index, batch.prompt_index[:4])
    for other in (
        fisher_sketch(policy, halves[1], size=256, nonzeros=8, seed=1),
        fisher_sketch(policy, halves[1], size=256, nonzeros=8, preconditioner=positive(policy)),
    ):
        with pytest.raises(UserError, match="other: it was made with"):
            again.kernel(other)
    with pytest.raises(UserError, match="multiple"):
        fisher_sketch(policy, batch, size=10, nonzeros=4)
    (tmp_path / "no.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="cannot be read"):
        Sketch.load(tmp_path / "no.safetensors")


def test_leading_eigenvalues_are_within_their_bound():
    policy, batch = make("llama_bias"), tiny.batch()
    found, bound = fisher_sketch(policy, batch, size=4096, nonzeros=4).leading(3)
    exact = np.linalg.eigvalsh(fisher_kernel(policy, batch).numpy())[::-1][:3]
    assert (
        (np.diff(found) <= 0).all() and (np.abs(found - exact) < 3 * bound).all() and bound < 0.1 * exact[0]
    )
