"""Truncated policies: the law of every token written out by hand, fixed sets under every derivative, and all responses enumerated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from characters import character_llama, character_tokenizer
from scipy.stats import chi2

from entropy_kernels.derivatives import (
    entropy_gradient,
    hvp,
    token_curvature,
    token_gradient,
    token_stats,
    token_support,
    token_tangents,
)
from entropy_kernels.errors import UserError
from entropy_kernels.measure.along import Along
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.writing import environment
from entropy_kernels.policy import Policy, TokenBatch
from entropy_kernels.rewrites import Rewrites
from entropy_kernels.rl.sampling import sample_rollouts
from entropy_kernels.rl.tasks import Prompt
from entropy_kernels.truncation import EDGE_LOGIT, truncation

LIMITS = [dict(top_k=6), dict(top_p=0.8), dict(top_k=9, top_p=0.85)]


def kept_by_hand(p, top_k=None, top_p=None):
    """Tokens one after the other, the most probable first, until there are top_k, then until top_p of their mass is reached."""
    order = np.argsort(-p, kind="stable")[:top_k]
    share, kept = 0.0, []
    for token in order:
        if top_p is not None and share >= top_p * p[order].sum():
            break
        kept.append(int(token))
        share += p[token]
    return kept


@torch.no_grad()
def laws(model, ids, temperature):
    """softmax(z/τ) after every token of one unpadded sequence, float64 [len, V]."""
    with Rewrites(float64=True):
        return torch.softmax(model(torch.tensor([ids])).logits[0].double() / temperature, -1).numpy()


def truncated(limits, **options):
    """A truncated policy, and the batch of `tiny` with responses that it can draw."""
    policy = Policy.from_model(tiny.llama(**options), temperature=0.8, micro_batch_tokens=24, **limits)
    batch, generator = tiny.batch(), np.random.default_rng(3)
    ids = batch.input_ids.clone()
    for i, column in batch.response_mask.nonzero().tolist():
        before = ids[i, :column][batch.attention_mask[i, :column]].tolist()
        kept = kept_by_hand(laws(policy.model, before, 0.8)[-1], **limits)
        ids[i, column] = int(generator.choice(kept))
    return policy, batch._replace(input_ids=ids)


@pytest.mark.parametrize("limits", LIMITS)
def test_values_are_those_of_the_law_written_out(limits):
    policy, batch = truncated(limits)
    got, values = token_support(policy, batch), token_stats(policy, batch)
    for i, column in batch.response_mask.nonzero().tolist():
        before = batch.input_ids[i, :column][batch.attention_mask[i, :column]].tolist()
        p = laws(policy.model, before, 0.8)[-1]
        kept = kept_by_hand(p, **limits)
        s, token = p[kept].sum(), int(batch.input_ids[i, column])
        inside = p[kept] / s
        want = dict(
            entropy=-(inside * np.log(inside)).sum(), logprob=np.log(p[token] / s), kept_mass=s, kept_count=len(kept),
            full_entropy=-(p * np.log(p)).sum(), moved=0, at_edge=0,
        )  # fmt: skip
        for name, x in want.items():
            assert getattr(got, name)[i, column].item() == pytest.approx(x, rel=1e-9, abs=1e-12), name
        for name in ("entropy", "logprob"):
            assert getattr(values, name)[i, column] == getattr(got, name)[i, column]
    assert not got.kept_mass[~batch.response_mask].any()


@pytest.mark.parametrize("limits", LIMITS)
def test_sets_stay_those_of_theta_along_a_step(limits):
    """At a step so long that other tokens would be kept, values are those of the new logits on the old sets."""
    policy, batch = truncated(limits)
    v, eta = tiny.direction(policy), 0.02
    moved = policy.shifted(v, eta / 2).shifted(v, eta / 2)
    found = token_support(moved, batch)
    changed = 0
    for i, column in batch.response_mask.nonzero().tolist():
        before = batch.input_ids[i, :column][batch.attention_mask[i, :column]].tolist()
        kept = kept_by_hand(laws(policy.model, before, 0.8)[-1], **limits)
        with torch.no_grad(), Rewrites(float64=True):
            z = torch.func.functional_call(policy.model, moved.params, (torch.tensor([before]),)).logits[
                0, -1
            ]
        p = torch.softmax(z / 0.8, -1).numpy()
        inside = p[kept] / p[kept].sum()
        other = set(kept_by_hand(p, **limits)) != set(kept)
        changed += other
        assert bool(found.moved[i, column]) == other
        assert found.entropy[i, column].item() == pytest.approx(-(inside * np.log(inside)).sum(), rel=1e-9)
        y = kept.index(int(batch.input_ids[i, column]))
        assert found.logprob[i, column].item() == pytest.approx(np.log(inside[y]), rel=1e-9)
    assert 0 < changed < batch.response_mask.sum()
    assert not token_support(policy.shifted(v, 0.0), batch).moved.any()


def five_point(f, step):
    return (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)


def dot(a, b):
    return sum((a[name] * b[name]).sum().item() for name in b)


@pytest.mark.parametrize("limits, tied", [(LIMITS[2], True), (LIMITS[1], False)])
def test_every_derivative_holds_the_set_fixed(limits, tied):
    policy, batch = truncated(limits, tied=tied)
    v = tiny.direction(policy)
    c = token_curvature(policy, batch, v)
    for name in ("entropy", "logprob"):
        first = five_point(lambda x, name=name: getattr(token_stats(policy.shifted(v, x), batch), name), 5e-6)
        second = five_point(
            lambda x, name=name: getattr(token_tangents(policy.shifted(v, x), batch, v), f"d_{name}"), 5e-6
        )
        for got, want in ((first, getattr(c, f"d_{name}")), (second, getattr(c, f"d2_{name}"))):
            assert want.abs().max() > 0.1
            assert (got - want).abs().max() < 1e-8 * want.abs().max()
    generator = torch.Generator().manual_seed(5)
    q, g = (torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gradient = token_gradient(policy, batch, entropy_weight=q, logprob_weight=g)
    assert dot(gradient, v) == pytest.approx((q * c.d_entropy + g * c.d_logprob).sum().item(), rel=1e-10)


def test_hessian_vector_product_of_a_truncated_policy():
    policy, batch = truncated(LIMITS[2])
    v = {name: 0.01 * x for name, x in tiny.direction(policy).items()}

    def slope(x):
        return dot(entropy_gradient(policy.shifted(v, x), batch, estimator="path"), v)

    product = hvp(policy, batch, v, estimator="path")
    assert dot(product, v) == pytest.approx(five_point(slope, 1e-4), rel=1e-7)


@pytest.mark.parametrize("estimator", ["per_decision", "whole_sequence"])
def test_integrated_and_direct_truth_agree_where_sets_would_move(estimator):
    policy, batch = truncated(LIMITS[2])
    config = MeasureConfig.demo(estimator=estimator, precision="float64", integration_rtol=1e-9)
    etas = (1e-5, 1e-3, 4e-3)
    along = Along(config, policy, tiny.direction(policy), batch, etas, False)
    assert token_support(policy.shifted(along.direction, etas[-1]), batch).moved.any()
    for i, eta in enumerate(etas):
        row = along._change(i, eta)
        assert abs(row["true_direct"].value) > 1e-6
        assert row["true_integrated"].value == pytest.approx(row["true_direct"].value, rel=1e-7)


# --- all responses of a small model ------------------------------------------------------------------------

LENGTH, PROMPT = 3, "1+1="


@pytest.fixture(scope="module")
def world():
    """(policy, tokenizer, all responses of three tokens that it can draw as a batch)."""
    tokenizer = character_tokenizer()
    model = character_llama(initializer_range=0.5).double()
    policy = Policy.from_model(model, tokenizer, temperature=0.7, top_k=8, top_p=0.9)
    prompt = tokenizer(PROMPT)["input_ids"]
    found = [[]]
    for _ in range(LENGTH):
        found = [[*r, t] for r in found for t in kept_by_hand(laws(model, prompt + r, 0.7)[-1], 8, 0.9)]
    ids = torch.tensor([prompt + r for r in found])
    attention, response = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    response[:, len(prompt) :] = True
    return policy, tokenizer, TokenBatch(ids, attention, response, torch.zeros(len(ids), dtype=torch.int64))


def test_probabilities_add_up_and_their_entropy_has_the_estimators_derivative(world):
    policy, _, batch = world
    v = {name: x.double() for name, x in tiny.direction(policy).items()}
    assert 30 < len(batch.input_ids) < 500

    def exact(eta):
        at = token_stats(policy.shifted(v, eta), batch)
        p = at.logprob.sum(1).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-12)
        return (p * at.entropy.sum(1)).sum().item()

    t = token_tangents(policy, batch, v)
    before = t.d_logprob.cumsum(1) - t.d_logprob
    per_response = (t.d_entropy + before * t.entropy).sum(1)
    want = (t.logprob.sum(1).exp() * per_response).sum().item()
    assert abs(want) > 0.1
    assert five_point(exact, 1e-5) == pytest.approx(want, rel=1e-8)


def test_sampler_draws_from_exactly_this_law(world):
    """Pearson's test over whole responses, n and seed fixed; the law of another temperature fails it."""
    policy, tokenizer, batch = world
    n = 6000
    prompt = Prompt(prompt_id="p", text=PROMPT, answer="", token_ids=tuple(tokenizer(PROMPT)["input_ids"]))
    drawn = sample_rollouts(
        policy.model, tokenizer, [prompt], group_size=n, max_new_tokens=LENGTH, temperature=0.7, seed=4,
        truncation=policy.truncation, batch_size=2000, eos_token_ids=[], progress=False,
    )  # fmt: skip
    assert drawn.sampling["top_k"] == 8 and drawn.sampling["top_p"] == 0.9
    responses = [tuple(row) for row in batch.input_ids[:, -LENGTH:].tolist()]
    index = {r: m for m, r in enumerate(responses)}
    rows = np.array(
        [index[ids] for ids in drawn.completion_ids]
    )  # a KeyError is a response that cannot be drawn
    stats = token_stats(policy, batch)
    recorded = np.stack(drawn.logprobs)
    np.testing.assert_allclose(recorded, stats.logprob[rows, -LENGTH:].numpy(), atol=2e-5)

    def pearson(p):
        observed, expected = np.bincount(rows, minlength=len(p)), p * n
        small = expected < 5
        o, e = (np.append(x[~small], x[small].sum()) for x in (observed, expected))
        return chi2.sf(((o - e) ** 2 / e).sum(), len(o) - 1)

    p = stats.logprob.sum(1).exp().numpy()
    assert pearson(p) > 1e-3
    wrong = token_stats(replace(policy, temperature=0.8), batch).logprob.sum(1).exp().numpy()
    assert pearson(wrong / wrong.sum()) < 1e-6


# --- the edge, and what is refused -------------------------------------------------------------------------


def test_a_token_at_the_edge_is_kept_and_one_beyond_it_is_not():
    limit = truncation(3, None)
    z = torch.tensor([[4.0, 3.0, 2.0, 2.0 - 0.5 * EDGE_LOGIT, 0.0]]).expand(3, -1).clone()
    kept = limit.kept_with(z, torch.tensor([2, 3, 4]), 1.0)
    assert kept.tokens.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert kept.at_edge.tolist() == [False, True, False]
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2, -1)
    mass = truncation(None, 0.8 - 1e-6)
    assert mass.kept_with(p, torch.tensor([2, 3]), 1.0).tokens.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_a_token_outside_has_no_probability():
    policy, batch = truncated(dict(top_k=2))
    other = batch._replace(input_ids=torch.where(batch.response_mask, 1, batch.input_ids))
    assert (token_stats(policy, other).logprob == -torch.inf).any()


@pytest.mark.parametrize(
    "limits", [dict(top_k=1), dict(top_k=0), dict(top_k=2.5), dict(top_p=0.0), dict(top_p=1.2)]
)
def test_a_truncation_that_leaves_no_choice_is_refused(limits):
    with pytest.raises(UserError, match="expected"):
        Policy.from_model(tiny.llama(), **limits)


def test_no_limit_is_no_truncation():
    assert Policy.from_model(tiny.llama(), top_p=1.0).truncation is None
    with pytest.raises(UserError, match="not truncated"):
        token_support(tiny.policy(), tiny.batch())
    assert {str(truncation(5, 0.9)), str(truncation(None, 0.95))} == {"top-k 5, then top-p 0.9", "top-p 0.95"}


def test_the_report_says_what_found_the_sets():
    whole = tiny.policy()
    found = environment(replace(whole, truncation=truncation(3, None)))["backends"]
    assert found["kept_sets"] == found["rows"]
    assert "kept_sets" not in environment(whole)["backends"]
