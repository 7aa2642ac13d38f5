"""Every supported family: values against the model's own logits, derivatives against finite differences and each other."""

from __future__ import annotations

import copy
import functools

import families
import pytest
import tiny
import torch
from torch import nn

from entropy_kernels.certify import certify
from entropy_kernels.derivatives import (
    hvp,
    token_curvature,
    token_gradient,
    token_stats,
    token_tangents,
)
from entropy_kernels.errors import UserError
from entropy_kernels.policy import Policy

every_family = pytest.mark.parametrize("family", list(families.FAMILIES))
TAU = 0.8


def make(family: str, **changes) -> Policy:
    return Policy.from_model(families.model(family, **changes), temperature=TAU, micro_batch_tokens=24)


def dot(a, b):
    return sum((a[name] * b[name]).sum().item() for name in b)


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def own_rows(model, batch):
    """Entropy and logprob from the logits of the model itself, padded as the batch is, in its own attention."""
    model.set_attn_implementation("eager")
    options = {"position_ids": (batch.attention_mask.long().cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False, **options
        ).logits
    log_p = (logits / TAU).log_softmax(-1)[:, :-1]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return entropy, log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]


@every_family
def test_values_equal_the_models_own_logits(family):
    batch = tiny.batch(left=True)
    model = families.model(family, dtype=torch.float32).eval()
    want = own_rows(copy.deepcopy(model), batch)
    got = token_stats(Policy.from_model(model, temperature=TAU, micro_batch_tokens=24), batch)
    mask = batch.response_mask[:, 1:]
    for ours, own in zip((got.entropy, got.logprob), want, strict=True):
        assert (ours[:, 1:] - own)[mask].abs().max() < 1e-5


@functools.lru_cache
def curvature(family: str):
    """(policy, batch, direction, its TokenCurvature), once per family."""
    policy, batch = make(family), tiny.batch()
    v = tiny.direction(policy)
    return policy, batch, v, token_curvature(policy, batch, v)


@every_family
def test_derivatives_equal_finite_differences(family):
    policy, batch, v, c = curvature(family)
    step = 5e-6
    moved = {k: token_tangents(policy.shifted(v, k * step), batch, v) for k in (-2, -1, 1, 2)}
    for name in ("entropy", "logprob"):
        for field, want in ((name, f"d_{name}"), (f"d_{name}", f"d2_{name}")):
            at = {k: getattr(x, field) for k, x in moved.items()}
            difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
            assert getattr(c, want).abs().max() > 0.1
            assert relative(difference, getattr(c, want)) < 1e-9
        at = {k: getattr(x, name) for k, x in moved.items()}
        second = (at[1] - 2 * getattr(c, name) + at[-1]) / step**2
        # no digit is left of it if anything is rounded to float32 on the way
        assert relative(second, getattr(c, f"d2_{name}")) < 1e-5


@every_family
def test_reverse_mode_agrees_with_forward_mode(family):
    policy, batch, v, c = curvature(family)
    generator = torch.Generator().manual_seed(5)
    q, g = (torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gradient = token_gradient(policy, batch, entropy_weight=q, logprob_weight=g)
    assert dot(gradient, v) == pytest.approx((q * c.d_entropy + g * c.d_logprob).sum().item(), rel=1e-10)
    product = hvp(policy, batch, v, per="sequence", estimator="path")
    mean = c.d2_entropy.sum().item() / len(batch.input_ids)
    assert dot(product, v) == pytest.approx(mean, rel=1e-9)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certify_passes_and_leaves_the_model_as_it_was(family, dtype):
    policy = make(family, dtype=dtype, vocab_size=90)  # more than the copy of two layers keeps
    before = dict(policy.model.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    certificate = certify(policy, tiny.batch())
    assert certificate.first < (1e-11 if dtype == torch.float64 else 1e-4)
    after = dict(policy.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_the_output_layer_is_read_from_config_and_model():
    heads = {f: make(f) for f in ("gemma2", "granite", "cohere", "gpt2")}
    assert {f: (p.logit_scale, p.softcap) for f, p in heads.items()} == {
        "gemma2": (1.0, 3.0),
        "granite": (0.5, None),
        "cohere": (0.25, None),
        "gpt2": (1.0, None),
    }


def test_logits_that_are_not_what_the_config_says_are_refused():
    capped, scaled = families.model("gemma2"), families.model("llama")
    forward = capped.forward

    def other_cap(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3.1 * torch.tanh(output.logits / 3.1)
        return output

    capped.forward = other_cap
    scaled.config.logit_scale = 0.5  # declared, and not done
    for model in (capped, scaled):
        with pytest.raises(UserError, match="after the output layer"):
            Policy.from_model(model)


def test_a_hidden_state_that_is_changed_on_its_way_is_refused():
    model = families.model("llama")

    class Halved(nn.Module):
        def forward(self, x):
            return head(x / 2)

    head, model.lm_head = model.lm_head, Halved()
    model.get_output_embeddings = lambda: head
    with pytest.raises(UserError, match="last hidden state"):
        Policy.from_model(model)


def test_a_model_that_keeps_its_own_attention_is_refused():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=23, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    with pytest.raises(UserError, match="GPTNeoForCausalLM has no attention"):
        Policy.from_model(GPTNeoForCausalLM(config))


def test_sequences_longer_than_the_learned_positions_are_refused():
    policy = make("gpt2", max_position_embeddings=7)
    assert policy.longest == 7
    with pytest.raises(UserError, match="at most 7"):
        token_stats(policy, tiny.batch())
    assert make("gpt2").longest == 64 and make("llama").longest is None


def test_a_window_that_layers_do_not_pass_on_bounds_the_length():
    model = families.model("qwen2_window")
    assert Policy.from_model(model).longest is None
    model.model.layers[1].self_attn.sliding_window = None  # as in models that only put it into their own mask
    policy = Policy.from_model(model)
    assert policy.longest == 4
    with pytest.raises(UserError, match="sliding window"):
        token_stats(policy, tiny.batch())


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral"])
def test_sampling_with_our_attention_draws_what_the_model_would(family):
    model = families.model(family, dtype=torch.float32).eval()
    batch = tiny.batch(left=True)
    options = {
        "attention_mask": batch.attention_mask.long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    model.set_attn_implementation("eager")
    want = model.generate(batch.input_ids, **options)
    got = Policy.from_model(model).model.generate(batch.input_ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    for ours, own in zip(got.logits, want.logits, strict=True):
        assert (ours - own).abs().max() < 1e-4


def test_bfloat16_on_disk_is_measured_in_float32(tmp_path):
    from safetensors.torch import load_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = families.model("gemma2")
    with torch.no_grad():  # the weights alone: a cast of the model would round its rotary frequencies as well
        for p in model.parameters():
            p.copy_(p.bfloat16())
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(23)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path)
    policy = Policy.from_pretrained(str(tmp_path), temperature=TAU)
    saved = dict(model.named_parameters())
    assert policy.params.keys() == saved.keys() and policy.dtype == torch.float32
    assert all(torch.equal(p, saved[name].float()) for name, p in policy.params.items())
    batch = tiny.batch()
    double = Policy.from_model(model, temperature=TAU)
    assert (token_stats(policy, batch).entropy - token_stats(double, batch).entropy).abs().max() < 1e-5
