from __future__ import annotations

import math

import numpy as np
import pytest
from enumerable import PROMPTS, at, draw, draw_rows, probabilities, world

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    TokenValues,
    effective_sample_size,
    ess,
    mean_score,
    mean_weight,
    rb_variance_ratio,
)


def test_effective_sample_size():
    assert effective_sample_size(np.full(7, 300.0)) == pytest.approx(7)
    assert effective_sample_size([0.0, -np.inf, -np.inf]) == 1.0
    assert effective_sample_size(np.log([1.0, 2.0, 3.0])) == pytest.approx(36 / 14)
    assert effective_sample_size([1000.0, 1000.0]) == 2.0  # exp would overflow
    assert math.isnan(effective_sample_size([-np.inf, -np.inf]))


def test_ess_of_tokens_and_sequences():
    batch = draw(20, 2, seed=61)
    base, moved = batch.at(0.0)[0], batch.at(0.5)[0]
    same = ess(base, base, batch.mask)
    assert same == pytest.approx((batch.mask.sum(), 40), rel=1e-14)
    w_tokens, w_sequences = [], []
    for i in range(40):
        w = 1.0
        for t in np.flatnonzero(batch.mask[i]):
            w_tokens.append(w)
            w *= math.exp(moved.logprob[i, t] - base.logprob[i, t])
        w_sequences.append(w)
    expected = [np.sum(w) ** 2 / np.sum(np.square(w)) for w in (w_tokens, w_sequences)]
    assert ess(base, moved, batch.mask) == pytest.approx(expected, rel=1e-12)


def test_mean_weight_and_score_are_zero_in_expectation():
    p, w = probabilities(), world()
    values, tangents, _ = at(0.0)
    weight = mean_weight(values, at(0.4)[0], w.mask, np.arange(len(p)))
    assert weight.n == len(p) and weight.unit == "1"
    ratio = np.exp(np.nansum(at(0.4)[0].logprob - values.logprob, axis=1))
    assert p @ ratio == pytest.approx(1, abs=1e-12)
    assert p @ np.nansum(tangents.d_logprob, axis=1) == pytest.approx(0, abs=1e-12)
    assert weight.value == pytest.approx(np.mean(ratio) - 1, rel=1e-12)


def test_z_scores_are_standard_normal_for_the_right_policy_and_large_for_another():
    """400 batches of 100 prompts × 2: mean and spread of z within 4 of their own standard errors."""
    rng = np.random.default_rng(62)
    index = np.repeat(np.arange(100), 2)
    z = []
    for rows in draw_rows(rng, 400, 100, 2).reshape(400, -1):
        mask = world().mask[rows]
        base, tangents, _ = (type(x)(*(a[rows] for a in x)) for x in at(0.0))
        moved = TokenValues(*(a[rows] for a in at(0.2)[0]))
        z.append(
            (mean_weight(base, moved, mask, index).z_score(), mean_score(tangents, mask, index).z_score())
        )
    z = np.array(z)
    assert (np.abs(z.mean(0)) < 4 / 20).all()
    assert (np.abs(z.std(0) - 1) < 4 / np.sqrt(800)).all()

    batch = draw(1000, 1, seed=63)  # drawn at 0, but believed to be drawn at 1.5
    other = mean_score(batch.at(1.5)[1], batch.mask, batch.prompt_index)
    assert abs(other.z_score()) > 6
    wrong = mean_weight(batch.at(1.5)[0], batch.at(1.3)[0], batch.mask, batch.prompt_index)
    assert abs(wrong.z_score()) > 6


def test_prompts_are_what_is_averaged():
    """Unequal groups: each prompt counts once, and the error is that of the prompts' means."""
    batch = draw(6, 1, seed=64)
    labels = np.array([0, 0, 0, 1, 2, 2])
    tangents = batch.at(0.0)[1]
    score = np.nansum(tangents.d_logprob, axis=1)
    means = np.array([score[:3].mean(), score[3], score[4:].mean()])
    got = mean_score(tangents, batch.mask, labels)
    assert got.value == pytest.approx(means.mean(), rel=1e-13)
    assert got.stderr == pytest.approx(means.std(ddof=1) / 3**0.5, rel=1e-13)
    with pytest.raises(UserError, match="prompts are the independent units"):
        mean_score(tangents, batch.mask, np.zeros(6, dtype=int))


def test_variance_ratio_is_that_of_the_samples():
    batch = draw(50, 3, seed=65)
    values = batch.at(0.0)[0]
    got = rb_variance_ratio(values, batch.mask, batch.prompt_index)
    by_prompt = [np.nansum(x, axis=1).reshape(50, 3).mean(axis=1) for x in values]
    assert got.per_sequence.value == pytest.approx(by_prompt[0].var() / by_prompt[1].var(), rel=1e-12)
    columns = [[x[batch.mask[:, k], k] for k in range(4)] for x in values]
    squares = [sum(((x - x.mean()) ** 2).sum() for x in column) for column in columns]
    assert got.per_position.value == pytest.approx(squares[0] / squares[1], rel=1e-12)
    every = [
        rb_variance_ratio(
            TokenValues(*(x[batch.prompt_index != n] for x in values)),
            batch.mask[batch.prompt_index != n],
            batch.prompt_index[batch.prompt_index != n],
        )
        for n in range(50)
    ]
    for name in ("per_sequence", "per_position"):
        replicates = np.array([getattr(r, name).value for r in every])
        assert getattr(got, name).stderr == pytest.approx(np.sqrt(49) * replicates.std(), rel=1e-9)


def test_variance_ratio_of_unequal_groups_is_that_of_their_means():
    batch = draw(9, 1, seed=68)
    labels = np.array([0, 0, 0, 0, 1, 2, 2, 3, 3])
    values = batch.at(0.0)[0]
    means = [[np.nansum(x, axis=1)[labels == n].mean() for n in range(4)] for x in values]
    got = rb_variance_ratio(values, batch.mask, labels).per_sequence
    assert got.value == pytest.approx(np.var(means[0]) / np.var(means[1]), rel=1e-12)


def test_positions_count_from_the_first_response_token():
    batch = draw(30, 2, seed=66)
    values = batch.at(0.0)[0]

    def moved(x, fill):
        out = np.full((60, 8), fill)
        for i in range(60):
            out[i, i % 4 : i % 4 + 4] = x[i]
        return out

    got = rb_variance_ratio(
        TokenValues(*(moved(x, np.nan) for x in values)), moved(batch.mask, False), batch.prompt_index
    )
    plain = rb_variance_ratio(values, batch.mask, batch.prompt_index)
    assert got.per_position.value == pytest.approx(plain.per_position.value, rel=1e-12)
    assert got.per_position.stderr == pytest.approx(plain.per_position.stderr, rel=1e-9)


def test_entropy_terms_can_vary_more_than_log_probs_over_a_sequence():
    """First a (0.1, then stop) or b (0.9, then one of nine at random): −S is log 10 always, ΣH is not.

    At each position the entropy terms vary less all the same.
    """
    rng = np.random.default_rng(67)
    b = rng.random(5000) < 0.9
    first = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    H = np.stack([np.full(5000, first), np.where(b, math.log(9), 0.0)], axis=1)
    S = np.stack([np.where(b, math.log(0.9), math.log(0.1)), np.where(b, -math.log(9), 0.0)], axis=1)
    mask = np.stack([np.ones(5000, dtype=bool), b], axis=1)
    assert H.sum(1).var() == pytest.approx(0.43, abs=0.02)
    got = rb_variance_ratio(TokenValues(H, S), mask, np.arange(5000))
    assert got.per_sequence.value > 1e20  # Var(−S) is 0 but for rounding
    assert got.per_position.value < 1e-20


def test_world_has_what_these_tests_need():
    w = world()
    assert len(w.prompt) == 31 * PROMPTS and len(set(w.mask.sum(1))) == 4
    assert probabilities().sum() == pytest.approx(1, abs=1e-14)
