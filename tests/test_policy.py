"""A policy is a pure function of parameters and sequences: padding, micro-batches and order change nothing but rounding."""

from __future__ import annotations

import pytest
import tiny
import torch

from entropy_kernels.certify import certify
from entropy_kernels.derivatives import token_curvature, token_gradient, token_stats, token_tangents
from entropy_kernels.errors import UserError
from entropy_kernels.policy import Policy, TokenBatch


@pytest.mark.parametrize("tied", [True, False])
def test_values_equal_the_models_own_logits(tied):
    policy, batch = tiny.policy(tied=tied, dtype=torch.float32), tiny.batch()
    got = token_stats(policy, batch)
    positions = (batch.attention_mask.long().cumsum(1) - 1).clamp_min(0)
    model = policy.model
    model.set_attn_implementation("eager")
    logits = (
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), position_ids=positions
        ).logits
        / 0.8
    )
    log_p = logits.log_softmax(-1)[:, :-1]
    mask = batch.response_mask[:, 1:]
    entropy = -(log_p.exp() * log_p).sum(-1)
    logprob = log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    assert (got.entropy[:, 1:] - entropy)[mask].abs().max() < 1e-5
    assert (got.logprob[:, 1:] - logprob)[mask].abs().max() < 1e-5
    assert (got.entropy[~batch.response_mask] == 0).all() and (got.logprob[~batch.response_mask] == 0).all()


def test_left_and_right_padding_agree_in_every_derivative():
    policy = tiny.policy()
    v = tiny.direction(policy)
    right, left = tiny.batch(), tiny.batch(left=True)
    for a, b in zip(token_curvature(policy, right, v), token_curvature(policy, left, v), strict=True):
        assert torch.equal(a[right.response_mask], b[left.response_mask])


def test_what_stands_in_the_padding_is_never_read():
    policy, batch = tiny.policy(), tiny.batch()
    other = batch._replace(input_ids=torch.where(batch.attention_mask, batch.input_ids, 17))
    assert torch.equal(token_stats(policy, batch).entropy, token_stats(policy, other).entropy)


@pytest.mark.parametrize("tokens", [1, 11, 1000])
def test_micro_batch_size_changes_only_rounding(tokens):
    batch = tiny.batch()
    v = tiny.direction(tiny.policy())
    want = token_curvature(Policy.from_model(tiny.llama(), micro_batch_tokens=30), batch, v)
    got = token_curvature(Policy.from_model(tiny.llama(), micro_batch_tokens=tokens), batch, v)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_order_of_sequences_changes_only_rounding():
    policy, batch = tiny.policy(), tiny.batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    want = token_stats(policy, batch).entropy[order]
    got = token_stats(policy, TokenBatch(*(x[order] for x in batch))).entropy
    assert (got - want).abs().max() < 1e-13


def test_output_layer_in_chunks_equals_in_one(monkeypatch):
    batch, v = tiny.batch(), tiny.direction(tiny.policy())
    want = token_curvature(tiny.policy(), batch, v)
    monkeypatch.setattr("entropy_kernels.policy.HEAD_ELEMENTS", 23 * 2)
    for a, b in zip(token_curvature(tiny.policy(), batch, v), want, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_temperature_is_part_of_the_policy():
    batch = tiny.batch()
    cold, hot = (Policy.from_model(tiny.llama(), temperature=t) for t in (0.3, 3.0))
    mask = batch.response_mask
    assert token_stats(cold, batch).entropy[mask].mean() < token_stats(hot, batch).entropy[mask].mean()


def test_shifted_leaves_the_original_alone():
    policy, batch = tiny.policy(), tiny.batch()
    v = tiny.direction(policy)
    before = token_stats(policy, batch).entropy
    moved = token_stats(policy.shifted(v, 0.01), batch).entropy
    assert (moved - before).abs().max() > 1e-4
    assert torch.equal(token_stats(policy, batch).entropy, before)
    assert torch.equal(token_stats(policy.shifted(v, 0.0), batch).entropy, before)


def test_float64_really_is():
    """A second difference at a step of 1e-5 has no digit left if anything is rounded to float32 on the way."""
    policy, batch = tiny.policy(), tiny.batch()
    v = tiny.direction(policy)
    step = 1e-5
    plus, zero, minus = (token_stats(policy.shifted(v, x), batch).entropy for x in (step, 0.0, -step))
    second = (plus - 2 * zero + minus) / step**2
    want = token_curvature(policy, batch, v).d2_entropy
    assert (second - want).abs().max() < 1e-3 * want.abs().max()


def _changed(**changes):
    return tiny.batch()._replace(**changes)


def test_bad_batches_are_named():
    policy, batch = tiny.policy(), tiny.batch()
    cases = {
        "one shape": _changed(attention_mask=batch.attention_mask[:, :-1]),
        "prompt_index": _changed(prompt_index=batch.prompt_index[:-1]),
        "inside attention_mask": _changed(attention_mask=batch.attention_mask & ~batch.response_mask),
        "empty response": _changed(response_mask=batch.response_mask & (torch.arange(6) != 4)[:, None]),
        "first token": _changed(response_mask=batch.attention_mask),
    }
    for message, bad in cases.items():
        with pytest.raises(UserError, match=message):
            token_stats(policy, bad)


def test_bad_directions_and_options_are_named():
    policy, batch = tiny.policy(), tiny.batch()
    v = tiny.direction(policy)
    missing = {name: x for name, x in v.items() if "norm" not in name}
    with pytest.raises(UserError, match="missing"):
        token_curvature(policy, batch, missing)
    with pytest.raises(UserError, match="expected"):
        token_curvature(policy, batch, {name: x.float() for name, x in v.items()})
    with pytest.raises(UserError, match="temperature"):
        Policy.from_model(tiny.llama(), temperature=0.0)
    with pytest.raises(UserError, match="16 bits"):
        Policy.from_pretrained("anywhere", dtype="bfloat16")
    with pytest.raises(UserError, match="no LoRA adapter"):
        Policy.from_model(tiny.llama(), parameters="lora")


def test_logits_changed_after_the_output_layer_are_refused():
    model = tiny.llama()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(UserError, match="after the output layer"):
        Policy.from_model(model)


def test_a_padding_token_in_the_prompt_has_a_true_derivative_but_not_in_training():
    model = tiny.llama(tied=False)
    batch = tiny.batch()
    pad = int(batch.input_ids[0, 1])  # a real token of the first prompt
    model.get_input_embeddings().padding_idx = pad
    policy = Policy.from_model(model, temperature=0.8)
    certify(policy, batch)
    weight = torch.ones(batch.input_ids.shape, dtype=torch.float64)
    row = "model.embed_tokens.weight"
    assert token_gradient(policy, batch, logprob_weight=weight)[row][pad].abs().max() > 1e-3
    v = tiny.direction(policy)
    with policy.as_trained():
        trained = token_gradient(policy, batch, logprob_weight=weight)
        forward = token_tangents(policy, batch, v).d_logprob.sum()  # forward mode leaves out the same
    assert float(forward) == pytest.approx(
        sum(float((x * v[name]).sum()) for name, x in trained.items()), rel=1e-10
    )
    assert float(token_tangents(policy, batch, v).d_logprob.sum()) != pytest.approx(float(forward), rel=1e-3)
    assert (trained[row][pad] == 0).all() and trained[row].abs().max() > 1e-3
    assert token_gradient(policy, batch, logprob_weight=weight)[row][pad].abs().max() > 1e-3
