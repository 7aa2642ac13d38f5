r"""What a causal LM does between its last hidden state and its logits, and how long its sequences may be.

A policy calls the output layer itself, on response positions only. So logits must be z = scale·output of that layer, then
c·tanh(z/c) where the config declares a soft cap c, and nothing more; a model that does more is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entropy_kernels import attention
from entropy_kernels.errors import UserError


def logits_of(output: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits [..., V] from what the output layer gives: z = scale·output, then c·tanh(z/c) where there is a soft cap c."""
    z = output if scale == 1.0 else output * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def declared_head(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits as the config says; `check_head` compares them with what the model does."""
    config = model.config.get_text_config()
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    scale = (factor if isinstance(factor, int | float) else 1.0) / (divisor or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def check_head(model: Any, scale: float, softcap: float | None) -> list[int | None]:
    """The model's logits must be `logits_of` its output layer, and that must read the last hidden state.

    The output layer's result is replaced by a ramp wide enough to bend under any soft cap, so that what the model does to it shows
    whatever the weights are. Returns the sliding window of every attention layer.
    """
    table = model.get_input_embeddings().weight
    ids = torch.arange(1, 5, device=table.device).remainder(table.shape[0]).unsqueeze(0)
    hidden: list[Tensor] = []
    read: list[Tensor] = []
    ramps: list[Tensor] = []

    def ramp(_m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        end = 3 * max(30.0, softcap or 0.0) / min(1.0, scale)
        wide = torch.linspace(-end, end, output.numel(), device=output.device, dtype=output.dtype)
        read.append(inputs[0])
        ramps.append(wide.reshape(output.shape))
        return ramps[-1]

    bodies = [model.base_model, getattr(model.base_model, "decoder", None)]  # OPT calls the inner one
    handles = [
        m.register_forward_hook(lambda _m, _i, output: hidden.append(output[0]))
        for m in bodies
        if m is not None
    ]
    handles.append(model.get_output_embeddings().register_forward_hook(ramp))
    try:
        with torch.no_grad(), attention.windows() as windows:
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not windows:
        raise UserError(
            f"model: {type(model).__name__} has no attention that transformers lets one choose (AttentionInterface), so ours, whose "
            "derivatives all exist, cannot be put in. Use a model of another family; README.md lists those that are tested."
        )
    sound = len(ramps) == 1 and len(hidden) == 1 and torch.equal(read[0], hidden[0])
    if sound:
        expected = logits_of(ramps[0], scale, softcap)
        sound = logits.shape == expected.shape and bool(
            ((logits - expected).abs() <= 1e-5 * expected.abs().max()).all()
        )
    if not sound:
        expectation = _formula(scale, softcap)
        raise UserError(
            f"model: {type(model).__name__} changes its last hidden state before, or its logits after the output layer, in a way that "
            f"this version does not measure. Expected {expectation} of the output layer, as the config says. Use a model whose "
            "logits are the output layer, but for a constant scale (logits_scaling, logit_scale) or final_logit_softcapping."
        )
    return windows


def _formula(scale: float, softcap: float | None) -> str:
    scaled = "the plain result" if scale == 1.0 else f"{scale:g} times the result"
    return scaled if softcap is None else f"{scaled}, soft-capped at {softcap:g},"


def longest_sequence(model: Any, windows: list[int | None]) -> int | None:
    """Tokens that fit: learned positions end somewhere, and a window that no layer passes on is not applied beyond its width."""
    config = model.config.get_text_config()
    limits = []
    end = getattr(config, "max_position_embeddings", None)
    tables = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()
    ]
    if end is not None and any(end <= len(m.weight) <= end + 8 for m in tables):  # OPT keeps two rows spare
        limits.append(int(end))
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None:
        expected = [types is None or kind == "sliding_attention" for kind in types or windows]
        if [w is not None for w in windows] != expected:
            limits.append(int(window))
    if "chunked_attention" in (types or ()):
        limits.append(int(config.attention_chunk_size))
    return min(limits, default=None)
