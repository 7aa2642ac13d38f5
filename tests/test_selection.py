"""Measured parameters move, the others are constants; tied weights are one parameter by whatever name."""

from __future__ import annotations

import pytest
import tiny
import torch

from entropy_kernels.certify import certify
from entropy_kernels.derivatives import entropy_gradient, hvp, token_curvature, token_gradient, token_stats
from entropy_kernels.errors import UserError
from entropy_kernels.policy import Policy
from entropy_kernels.selection import count_parameters, select_parameters


def policy(parameters, **options):
    return Policy.from_model(
        tiny.llama(**options), temperature=0.8, parameters=parameters, micro_batch_tokens=24
    )


def widened(v, whole):
    """The direction over all parameters that is zero where nothing is measured."""
    return {name: v.get(name, torch.zeros_like(p)) for name, p in whole.params.items()}


@pytest.mark.parametrize(
    "parameters", ["mlp", r"layers\.1\..*(q_proj|norm)", "embed_tokens|lm_head", r"^model\.norm\.weight$"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_part_is_the_whole_with_the_rest_held_still(parameters, tied):
    part, whole, batch = policy(parameters, tied=tied), policy("all", tied=tied), tiny.batch()
    assert 0 < len(part.params) < len(whole.params)
    certify(part, batch)
    v = tiny.direction(part)
    wide = widened(v, whole)
    for ours, full in zip(token_curvature(part, batch, v), token_curvature(whole, batch, wide), strict=True):
        assert (ours - full).abs().max() <= 1e-12 * full.abs().max()
    for ours, full in (
        (entropy_gradient(part, batch), entropy_gradient(whole, batch)),
        (hvp(part, batch, v), hvp(whole, batch, wide)),
    ):
        assert list(ours) == list(part.params)
        assert all((ours[name] - full[name]).abs().max() <= 1e-10 * full[name].abs().max() for name in ours)
    moved, moved_whole = part.shifted(v, 0.01), whole.shifted(wide, 0.01)
    assert torch.equal(token_stats(moved, batch).entropy, token_stats(moved_whole, batch).entropy)


def test_frozen_parameters_are_no_leaves_of_the_gradient():
    """Nothing is kept or computed for them: a backward pass through them only is an error of autograd, not a zero."""
    part, batch = policy(r"layers\.1\.mlp"), tiny.batch()
    before = {name: p.grad for name, p in part.model.named_parameters()}
    token_gradient(part, batch, logprob_weight=torch.ones(batch.input_ids.shape, dtype=torch.float64))
    assert all(g is None for g in before.values())
    assert not any(p.requires_grad or p.grad is not None for p in part.model.parameters())


def test_tied_weights_are_selected_by_all_their_names_or_none():
    tied, untied = tiny.llama(tied=True), tiny.llama(tied=False)
    assert list(select_parameters(tied, "embed_tokens|lm_head")) == ["model.embed_tokens.weight"]
    assert list(select_parameters(untied, "lm_head")) == ["lm_head.weight"]
    for pattern in ("embed_tokens", "lm_head"):
        with pytest.raises(UserError, match="same weight by another name"):
            select_parameters(tied, pattern)


def test_selections_that_select_nothing_are_named():
    with pytest.raises(UserError, match=r"no parameter name matches 'encoder'.*model\.embed_tokens"):
        select_parameters(tiny.llama(), "encoder")
    with pytest.raises(UserError, match="regular expression"):
        select_parameters(tiny.llama(), "(")
    with pytest.raises(UserError, match="no LoRA adapter"):
        select_parameters(tiny.llama(), "lora")


def test_sizes_for_the_report():
    model = tiny.llama(tied=True)
    everything = count_parameters(model, select_parameters(model, "all"))
    assert (
        everything["numbers"] == everything["numbers_in_model"] == sum(p.numel() for p in model.parameters())
    )
    assert count_parameters(model, select_parameters(model, r"^model\.norm")) == {
        "tensors": 1,
        "numbers": 16,
        "numbers_in_model": everything["numbers_in_model"],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_held_in_16_bits_are_refused(dtype):
    with pytest.raises(UserError, match=f"held in {str(dtype)[6:]}, expected float32 or float64"):
        Policy.from_model(tiny.llama(dtype=torch.float32).to(dtype))
    mixed = tiny.llama(dtype=torch.float32)
    mixed.lm_head.weight.data = mixed.lm_head.weight.data.double()
    with pytest.raises(UserError, match="float32, float64"):
        Policy.from_model(mixed)
