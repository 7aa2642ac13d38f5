"""certify passes a sound model and names the layer of each planted fault."""

from __future__ import annotations

import families
import pytest
import tiny
import torch
from torch import nn

from entropy_kernels.certify import certify
from entropy_kernels.errors import CertificationError
from entropy_kernels.policy import Policy


@torch.library.custom_op("entropy_kernels_test::silu", mutates_args=())
def _op(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


def _op_backward(ctx, grad):
    (x,) = ctx.saved_tensors
    s = x.sigmoid()
    return grad * s * (1 + x * (1 - s))


_op.register_autograd(_op_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class CustomOpSilu(nn.Module):
    """Right in reverse mode; forward mode gives a tangent of zero without a word."""

    def forward(self, x):
        return _op(x)


class _NestedZero(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return dx * s * (1 + x * (1 - s))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


class NestedZeroSilu(nn.Module):
    """First derivatives are right; the nested forward derivative is zero."""

    def forward(self, x):
        return _NestedZero.apply(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_sound_model_passes_with_small_errors(dtype, tied):
    policy = tiny.policy(dtype=dtype, tied=tied)
    before = [name for name, _ in policy.model.named_parameters()]
    certificate = certify(policy, tiny.batch())
    assert certificate.first < (1e-12 if dtype == torch.float64 else 1e-4)
    assert certificate.second_difference < 1e-7
    assert certify(policy).first >= 0  # without a batch
    assert [name for name, _ in policy.model.named_parameters()] == before  # the model is put back together


def _plant(fault: nn.Module, where: str, layers: int = 2, dtype: torch.dtype = torch.float32) -> Policy:
    model = tiny.llama(dtype=dtype, layers=layers)
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, fault.to(dtype))
    return Policy.from_model(model)


@pytest.mark.parametrize("fault", [CustomOpSilu, NestedZeroSilu])
@pytest.mark.parametrize(
    "layers, where", [(2, "model.layers.0.mlp.act_fn"), (5, "model.layers.4.mlp.act_fn")]
)
def test_planted_activation_is_named(fault, layers, where):
    with pytest.raises(CertificationError, match=where.replace(".", r"\.")):
        certify(_plant(fault(), where, layers))


class _NativeLayerNorm(nn.LayerNorm):
    """A layer norm that goes past torch.nn.functional, to the operator whose nested forward rule is wrong."""

    def forward(self, x):
        return torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)[0]


def test_layer_norm_with_wrong_second_derivative_is_named():
    where = "model.layers.1.post_attention_layernorm"
    with pytest.raises(CertificationError, match=where.replace(".", r"\.")):
        certify(_plant(_NativeLayerNorm(16), where))
    certify(_plant(nn.LayerNorm(16), where))  # the ordinary one is replaced on the way


def test_layer_norm_that_is_not_replaced_is_named(monkeypatch):
    monkeypatch.setattr("entropy_kernels.rewrites._layer_norm", nn.functional.layer_norm)
    with pytest.raises(CertificationError, match=r"LayerNorm"):
        certify(Policy.from_model(families.model("gpt2", dtype=torch.float32)))


def test_a_model_that_reads_something_else_by_itself_is_refused():
    policy = Policy.from_model(families.model("gpt2", dtype=torch.float32))
    forward = policy.model.transformer.forward

    def shifted(input_ids, *, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(1, input_ids.shape[1] + 1).unsqueeze(0)
        return forward(input_ids, position_ids=position_ids, **kwargs)

    policy.model.transformer.forward = shifted
    with pytest.raises(CertificationError, match="by itself"):
        certify(policy)


class _WrongTangent(nn.Module):
    """A rule that is 1 % off in both modes: only finite differences can see it."""

    def forward(self, x):
        return x.detach() * 0.01 + x * 0.99


def test_scaled_derivative_is_seen_by_finite_differences():
    with pytest.raises(CertificationError, match="finite differences"):
        certify(_plant(_WrongTangent(), "model.layers.1.mlp.act_fn", dtype=torch.float64))


def test_active_dropout_is_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.1, training=True)

    with pytest.raises(CertificationError, match="dropout"):
        certify(_plant(Noisy(), "model.layers.0.mlp.act_fn"))


def test_a_padding_token_that_was_never_trained_is_left_out():
    """Its embedding is zero, where the norm that follows has a curvature of the order of 1/epsilon."""
    model = tiny.llama(dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    certify(Policy.from_model(model))
