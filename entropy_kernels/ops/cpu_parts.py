"""The functions of `parts` in C++, for tensors on the CPU.

Each reads its rows once, a gradient once more where no state is handed in, and nothing else of their size is made. Where there is no
library, plain torch takes over, as `cpu` has said.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, parts, truncated
from .parts import Cotangents, PartNumbers, PartValues
from .reference import compute_dtype


def thresholds(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest kept logit of each row [R] in the compute dtype, NaN for a row without a law: top_k, then top_p of what it left."""
    if (level := cpu._level()) is None:
        return truncated.thresholds(z, tau, top_k, top_p)
    (logits,) = cpu._prepared(z)
    threshold = torch.empty(len(z), dtype=compute_dtype(z.dtype), device=z.device)
    torch.ops.entropy_kernels.row_thresholds(
        logits, *cpu._vectors(z, tau), top_k.contiguous(), top_p.contiguous(), threshold, level
    )
    return threshold


def _set(z: Tensor, kept: Tensor) -> Tensor:
    if kept.dtype != torch.bool:
        return kept.to(compute_dtype(z.dtype)).contiguous()
    return kept if kept.stride(-1) == 1 or kept.shape[-1] == 1 else kept.contiguous()


def _numbers(z: Tensor) -> list[Tensor]:
    return [torch.empty(len(z), dtype=torch.float64, device=z.device) for _ in PartNumbers._fields]


def _count(z: Tensor) -> Tensor:
    return torch.empty(len(z), dtype=torch.int64, device=z.device)


def _state(z: Tensor) -> Tensor:
    return torch.empty(len(z), 6, dtype=torch.float64, device=z.device)


def _double(w: Cotangents) -> list[Tensor]:
    return [x.double().contiguous() for x in w]


def part_values(z: Tensor, kept: Tensor, y: Tensor, tau: Tensor) -> PartValues:
    """H(z_S), log p_y(z_S) (−∞ outside S), λ, H(z_T), |S|, and the state of both parts."""
    if (level := cpu._level()) is None:
        return parts.part_values(z, kept, y, tau)
    (logits,) = cpu._prepared(z)
    numbers, count, state = _numbers(z), _count(z), _state(z)
    torch.ops.entropy_kernels.part_values(
        logits, _set(z, kept), y.contiguous(), *cpu._vectors(z, tau), *numbers, count, state, level
    )
    entropy, logprob, log_odds, tail_entropy = numbers
    return PartValues(entropy, logprob, log_odds, tail_entropy, count, state)


def truncated_parts(
    z: Tensor, y: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor, *, tail: bool
) -> tuple[PartValues, Tensor]:
    """`part_values` of the set that top-k and top-p define, and its `thresholds`; without `tail` as though the tail were empty."""
    if (level := cpu._level()) is None:
        t = truncated.thresholds(z, tau, top_k, top_p)
        return parts.part_values(z, t, y, tau), t
    (logits,) = cpu._prepared(z)
    numbers, count, state = _numbers(z), _count(z), _state(z)
    threshold = torch.empty(len(z), dtype=compute_dtype(z.dtype), device=z.device)
    torch.ops.entropy_kernels.truncated_parts(
        logits, y.contiguous(), *cpu._vectors(z, tau), top_k.contiguous(), top_p.contiguous(), threshold,
        *numbers, count, state, tail, level,
    )  # fmt: skip
    entropy, logprob, log_odds, tail_entropy = numbers
    return PartValues(entropy, logprob, log_odds, tail_entropy, count, state), threshold


def kept_law(
    z: Tensor, y: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, logprob and |S| of the set that top-k and top-p define; of its tail no more is read than the search asks for."""
    if (level := cpu._level()) is None:
        v = truncated.truncated_values(z, truncated.kept_set(z, tau, top_k, top_p), y, tau)
        return v.entropy, v.logprob, v.kept_count
    (logits,) = cpu._prepared(z)
    entropy, logprob, threshold = (
        torch.empty(len(z), dtype=compute_dtype(z.dtype), device=z.device) for _ in range(3)
    )
    count, none = _count(z), logits.new_empty(0)
    torch.ops.entropy_kernels.truncated_values(
        logits, y.contiguous(), *cpu._vectors(z, tau), top_k.contiguous(), top_p.contiguous(), threshold,
        entropy, logprob, none, count, none, none, False, level,
    )  # fmt: skip
    return entropy, logprob, count


def part_tangents(z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> PartNumbers:
    """The four numbers' derivatives along dz."""
    if (level := cpu._level()) is None:
        return parts.part_tangents(z, kept, dz, y, tau)
    logits, tangent = cpu._prepared(z, dz)
    numbers = _numbers(z)
    torch.ops.entropy_kernels.part_tangents(
        logits, _set(z, kept), tangent, y.contiguous(), *cpu._vectors(z, tau), *numbers, level
    )
    return PartNumbers(*numbers)


def part_second_tangents(
    z: Tensor, kept: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor
) -> PartNumbers:
    """The four numbers' second derivatives along du and dz."""
    if (level := cpu._level()) is None:
        return parts.part_second_tangents(z, kept, du, dz, y, tau)
    logits, *tangents = cpu._prepared(z, du, dz)
    numbers = _numbers(z)
    torch.ops.entropy_kernels.part_second_tangents(
        logits, _set(z, kept), *tangents, y.contiguous(), *cpu._vectors(z, tau), *numbers, level
    )
    return PartNumbers(*numbers)


def part_cotangents(
    z: Tensor, kept: Tensor, y: Tensor, tau: Tensor, w: Cotangents, *, state: Tensor | None = None
) -> Tensor:
    """The gradient of q·entropy + g·logprob + l·λ + h·tail entropy, [R, V] in z's dtype; with `state` in one read and one write."""
    if (level := cpu._level()) is None:
        return parts.part_cotangents(z, kept, y, tau, w)
    (logits,) = cpu._prepared(z)
    out = torch.empty(z.shape, dtype=logits.dtype, device=z.device)
    if state is None:
        state = torch.empty(len(z), 0, dtype=torch.float64, device=z.device)
    torch.ops.entropy_kernels.part_cotangents(
        logits,
        _set(z, kept),
        y.contiguous(),
        *cpu._vectors(z, tau),
        state.contiguous(),
        *_double(w),
        out,
        level,
    )
    return out.to(z.dtype)


def part_cotangent_tangents(
    z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor, w: Cotangents, dw: Cotangents
) -> Tensor:
    """The tangent of `part_cotangents` along (ż, q̇, ġ, l̇, ḣ), [R, V] in z's dtype."""
    if (level := cpu._level()) is None:
        return parts.part_cotangent_tangents(z, kept, dz, y, tau, w, dw)
    logits, tangent = cpu._prepared(z, dz)
    out = torch.empty(z.shape, dtype=logits.dtype, device=z.device)
    torch.ops.entropy_kernels.part_cotangent_tangents(
        logits,
        _set(z, kept),
        tangent,
        y.contiguous(),
        *cpu._vectors(z, tau),
        *_double(w),
        *_double(dw),
        out,
        level,
    )
    return out.to(z.dtype)
