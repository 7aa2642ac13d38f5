r"""An attention that can be differentiated twice in every mode: softmax(cap(q kᵀ·scale) + mask) v, in plain torch.

cap(s) = c·tanh(s/c) where the layer has a soft cap c. A sliding window w lets a query see itself and the w − 1 keys before it.

The fused kernels that transformers would pick have no forward-mode rule and no double backward, and its eager path rounds the
softmax to float32 even in a float64 model. This one is registered with transformers under `NAME` and chosen by `policy`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from entropy_kernels.errors import UserError

NAME = "entropy_kernels_plain"
_REFUSED = ("s_aux", "position_bias")
_windows: ContextVar[list[int | None] | None] = ContextVar("windows", default=None)


def plain_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend with query [n, heads, q, d] over key, value [n, kv_heads, k, d]; mask [n, 1, q, k], True = may attend.

    Returns:
        ([n, q, heads, d], None).

    Raises:
        UserError: the layer asks for something that would be left out here (sinks, a position bias, dropout).
    """
    unknown = [name for name in _REFUSED if options.get(name) is not None]
    if unknown or dropout:
        raise UserError(
            f"model: the attention of {type(module).__name__} needs {unknown or 'dropout'}, which is not supported; expected causal "
            "attention, at most with a sliding window and soft-capping. Use a model without it."
        )
    if (seen := _windows.get()) is not None:
        seen.append(sliding_window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q_length, k_length = scores.shape[-2:]
    # Fewer queries than keys: the keys come from a cache, which may have dropped some, and the mask has the window in it.
    whole = q_length == k_length or attention_mask is None
    if attention_mask is None:  # transformers leaves the mask out where it would be purely causal
        attention_mask = torch.ones(q_length, k_length, dtype=torch.bool, device=scores.device).tril(
            k_length - q_length
        )
    if sliding_window is not None and whole and k_length > sliding_window:
        near = torch.ones(q_length, k_length, dtype=torch.bool, device=scores.device).triu(
            k_length - q_length - sliding_window + 1
        )
        hidden = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
        attention_mask = attention_mask.masked_fill(~near, hidden)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


@contextlib.contextmanager
def windows() -> Iterator[list[int | None]]:
    """Within: the sliding window that each attention layer was called with, in order of the calls; None for a layer without."""
    seen: list[int | None] = []
    token = _windows.set(seen)
    try:
        yield seen
    finally:
        _windows.reset(token)


def register() -> None:
    """Make `NAME` known to transformers, with boolean masks; doing it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
