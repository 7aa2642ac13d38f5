r"""An attention that can be differentiated twice in every mode: softmax(q kᵀ·scale + mask) v, in plain torch.

The fused kernels that transformers would pick have no forward-mode rule and no double backward, and its eager path rounds the
softmax to float32 even in a float64 model. This one is registered with transformers under `NAME` and chosen by `policy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels.errors import UserError

NAME = "entropy_kernels_plain"


def plain_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend with query [n, heads, q, d] over key, value [n, kv_heads, k, d]; mask [n, 1, q, k], True = may attend.

    Returns:
        ([n, q, heads, d], None).

    Raises:
        UserError: the layer asks for something that would be left out here (sliding window, sinks, soft-capping, dropout).
    """
    unknown = {
        name: option
        for name, option in options.items()
        if name in ("sliding_window", "s_aux", "softcap", "position_bias") and option is not None
    }
    if options.get("sliding_window") is not None and key.shape[2] <= options["sliding_window"]:
        unknown.pop("sliding_window")  # a window wider than the sequence excludes nothing
    if unknown or dropout:
        raise UserError(
            f"model: the attention of {type(module).__name__} needs {sorted(unknown) or 'dropout'}, which is not supported yet; "
            "expected plain causal attention without dropout. Use a model of the Llama type, or shorter sequences than the window."
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:  # transformers leaves the mask out where it would be purely causal
        q_length, k_length = scores.shape[-2:]
        attention_mask = torch.ones(q_length, k_length, dtype=torch.bool, device=scores.device).tril(
            k_length - q_length
        )
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def register() -> None:
    """Make `NAME` known to transformers, with boolean masks; doing it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
