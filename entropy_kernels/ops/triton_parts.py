"""Rows in a kept set and its tail on the GPU: thresholds from Triton; the numbers of `parts` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kept_kernels, rows, truncated
from .parts import part_cotangent_tangents as part_cotangent_tangents
from .parts import part_cotangents as part_cotangents
from .parts import part_second_tangents as part_second_tangents
from .parts import part_tangents as part_tangents
from .parts import part_values as part_values


def thresholds(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest kept logit of each row, or what lies between it and the next below, [R]; float64 logits are sorted in plain torch."""
    if z.dtype == torch.float64:
        return truncated.thresholds(z, tau, top_k, top_p)
    z = rows._in_memory(z)
    R, V = z.shape
    threshold = torch.empty(R, dtype=torch.float32, device=z.device)
    width = rows.kept_width(V)
    if R:
        (tau,) = rows._vectors(torch.float32, tau)
        with rows._device(z):
            kept_kernels.kept_thresholds[(R,)](
                z, tau, top_k.contiguous(), top_p.contiguous(), threshold, V, *z.stride(),
                SHIFT=rows.KEY_SHIFT[z.dtype], BLOCK=width, num_warps=rows.warps(width),
            )  # fmt: skip
    return threshold
