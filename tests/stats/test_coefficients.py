"""Cotangents against autograd of the estimator written in torch; their tangents against jvp of that gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from enumerable import COMBOS, draw
from test_prompt_sums import batch_sums
from torch.func import grad, jvp

from entropy_kernels.stats import (
    TokenTangents,
    TokenValues,
    first_derivative,
    token_contributions,
    token_cotangent_tangents,
    token_cotangents,
)

combos = pytest.mark.parametrize(("per", "estimator"), COMBOS)


def tensors(pair, mask):
    return tuple(torch.tensor(np.where(mask, x, 0.0)) for x in pair)


def estimator_of(mask, base, per, estimator):
    """h as a function of (H, S), row by row as it is defined."""

    def h(H, S):
        N = D = 0.0
        for i in range(len(mask)):
            T = int(mask[i].sum())
            change = (S - base)[i, :T]
            if estimator == "per_decision":
                w = torch.stack([change[:k].sum() for k in range(T)]).exp()
                count = w.sum() if per == "token" else 1.0
            elif estimator == "whole_sequence":
                w = change.sum().exp()
                count = w * T if per == "token" else w
            else:
                w, count = 1.0, float(T) if per == "token" else 1.0
            N, D = N + (w * H[i, :T]).sum(), D + count
        return N / D

    return h


@combos
def test_cotangents_and_their_tangents(per, estimator):
    batch = draw(10, 2, seed=71)
    values, tangents, _ = batch.at(0.0)
    H, S = tensors(values, batch.mask)
    h = estimator_of(batch.mask, S, per, estimator)
    gradient = grad(h, argnums=(0, 1))
    expected, moved = jvp(gradient, (H, S), tensors(tangents, batch.mask))

    got = token_cotangents(values, batch.mask, per=per, estimator=estimator)
    np.testing.assert_allclose(got.entropy, expected[0], rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(got.logprob, expected[1], rtol=1e-12, atol=1e-16)

    got = token_cotangent_tangents(values, tangents, batch.mask, per=per, estimator=estimator)
    np.testing.assert_allclose(got.entropy, moved[0], rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(got.logprob, moved[1], rtol=1e-11, atol=1e-15)


@combos
def test_contributions_sum_to_the_derivative(per, estimator):
    batch = draw(15, 2, seed=72)
    values, tangents, _ = batch.at(0.0)
    shares = token_contributions(values, tangents, batch.mask, per=per, estimator=estimator)
    assert shares.shape == batch.mask.shape and not shares[~batch.mask].any()
    h1 = first_derivative(batch_sums(batch, 0.0, per, estimator)).value
    assert shares.sum() == pytest.approx(h1, rel=1e-12)
    # A share belongs to the token whose log-prob moves: without that token's derivatives exactly it is gone.
    i, t = np.argwhere(batch.mask)[5]
    silenced = TokenTangents(
        *(np.where(np.arange(x.size).reshape(x.shape) == i * 4 + t, 0, x) for x in tangents)
    )
    again = token_contributions(values, silenced, batch.mask, per=per, estimator=estimator)
    assert again[i, t] == 0 and (np.delete(again, i * 4 + t) == np.delete(shares, i * 4 + t)).all()


def test_written_out_per_token_and_decision():
    """(1/ΣT)[H'_k + Σ_{k'>k}(H_k' − h) S'_k], by hand on two responses."""
    H = np.array([[1.0, 2.0, 4.0], [3.0, 9.0, 9.0]])
    mask = np.array([[True, True, True], [True, False, False]])
    d = TokenTangents(np.full((2, 3), 0.5), np.array([[1.0, -2.0, 7.0], [5.0, 9.0, 9.0]]))
    h = 10 / 4
    got = token_contributions(TokenValues(H, 0 * H), d, mask, per="token", estimator="per_decision")
    expected = np.array([[0.5 + (6 - 2 * h), 0.5 - 2 * (4 - h), 0.5], [0.5, 0, 0]]) / 4
    np.testing.assert_allclose(got, expected, rtol=1e-15)
