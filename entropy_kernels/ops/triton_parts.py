"""The functions of `parts` in Triton, for tensors on the GPU: one read for numbers of a row, a read and a write more for a gradient.

Nothing of the logits' size is made beside the gradient, whether S is a threshold for each row or a mask. Which tiles a row is cut into, and
the order in which they are merged, depend on its width and dtype alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import kept_kernels, part_kernels, row_kernels, rows, truncated
from .parts import Cotangents, PartNumbers, PartValues
from .reference import compute_dtype


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


def part_width(V: int, dtype: torch.dtype, tangents: int = 0) -> int:
    """How many columns of a row make a tile, for arithmetic in `dtype`."""
    largest = 1024 if dtype == torch.float64 else (4096, 2048, 2048)[tangents]
    return min(largest, max(256, triton.next_power_of_2(V)))


def part_warps(width: int, dtype: torch.dtype) -> int:
    """16 columns a thread, 8 in float64; fewer for narrow rows."""
    return max(1, width // (256 if dtype == torch.float64 else 512))


def _set(z: Tensor, kept: Tensor) -> tuple[Tensor, bool, tuple[int, int]]:
    """What a kernel reads of S: bytes, or a threshold that −∞ does not reach; which of them; strides."""
    if kept.dtype == torch.bool:
        return kept.view(torch.uint8), True, (kept.stride(0), kept.stride(1))
    (t,) = rows._vectors(compute_dtype(z.dtype), kept.clamp(min=torch.finfo(z.dtype).min))
    return t, False, (1, 1)


def kept_targets(z: Tensor, kept: Tensor, y: Tensor) -> Tensor:
    """The targets, −1 for those outside S too."""
    at = y.clamp_min(0).unsqueeze(-1)
    if kept.dtype == torch.bool:
        inside = kept.gather(-1, at).squeeze(-1)
    else:
        inside = z.gather(-1, at).squeeze(-1) >= kept.clamp(min=torch.finfo(z.dtype).min)
    return torch.where(inside, y, -1)


def _moments(
    z: Tensor, kept: Tensor, tangents: list[Tensor], y: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of both parts, S first: three numbers of a row [2, 3, R] float64, states [2, R, 3 or 6], how many tokens are not −∞ [2, R].

    `y` are targets in S. Numbers and states of an empty part are undefined.
    """
    z, *tangents = (rows._in_memory(t) for t in (z, *tangents))
    R, V = z.shape
    N, T = len(tangents), compute_dtype(z.dtype)
    numbers = torch.empty(2, 3, R, dtype=torch.float64, device=z.device)
    states = torch.empty(2, R, 6 if N == 1 else 3, dtype=T, device=z.device)
    width = part_width(V, T, N)
    S = triton.cdiv(V, width)
    some = torch.empty(2, R, S, dtype=torch.int32, device=z.device)
    if R == 0:
        return numbers, states, some.sum(-1)
    v = tangents[-1] if N else z
    u = tangents[0] if N == 2 else v
    (tau,) = rows._vectors(T, tau)
    S_, listed, set_strides = _set(z, kept)
    moments = torch.empty(2, R, S, (3, 6, 11)[N], dtype=torch.float64, device=z.device)
    strides = (*u.stride(), *v.stride())
    targets = (y.contiguous(), torch.full_like(y, -1))
    with rows._device(z):
        part_kernels.tile_part_moments[(R * S,)](
            z, S_, u, v, tau, moments, some, R, V, S, *z.stride(), *set_strides, *strides,
            N=N, LISTED=listed, BLOCK=width, num_warps=part_warps(width, T),
        )  # fmt: skip
        for part in (0, 1):
            row_kernels.merge_tiles[(R,)](
                z, u, v, targets[part], tau, moments[part], states[part], *numbers[part], S, *z.stride(), *strides,
                N=N, TILES=triton.next_power_of_2(S), num_warps=1,
            )  # fmt: skip
    return numbers, states, some.sum(-1)


def part_values(z: Tensor, kept: Tensor, y: Tensor, tau: Tensor) -> PartValues:
    """H(z_S), log p_y(z_S) (−∞ outside S), λ, H(z_T), |S|, and the states of both parts."""
    kept_y = kept_targets(z, kept, y)
    numbers, states, some = _moments(z, kept, [], kept_y, tau)
    inside, tail = some == 0  # either part empty
    peaks, s1 = states.double().unbind(-1)[:2]
    log_odds = (peaks[0] - peaks[1]) / tau.double() + (s1[0].log1p() - s1[1].log1p())
    # of a NaN in the other part nothing is known either
    log_odds = torch.where(tail, torch.inf + 0.0 * numbers[0, 0], log_odds)
    log_odds = torch.where(inside, torch.where(tail, torch.nan, -torch.inf + 0.0 * numbers[1, 0]), log_odds)
    logprob = torch.where((y >= 0) & (kept_y < 0), -torch.inf, numbers[0, 1])
    return PartValues(
        entropy=torch.where(inside, torch.nan, numbers[0, 0]),
        logprob=torch.where(inside, torch.where(y >= 0, torch.nan, 0.0), logprob),
        log_odds=log_odds,
        tail_entropy=torch.where(tail, 0.0, numbers[1, 0]),
        kept_count=kept.sum(-1) if kept.dtype == torch.bool else some[0],
        # an empty part's second number is −1, which no other's is
        state=_without_empty(states, some, -1.0).double().transpose(0, 1).flatten(1),
    )


def _without_empty(states: Tensor, some: Tensor, s1: float) -> Tensor:
    """States in which an empty part has peak 0, the given s1 and means 0."""
    empty_state = states.new_zeros(states.shape[-1])
    empty_state[1] = s1
    return torch.where((some == 0).unsqueeze(-1), empty_state, states)


def part_tangents(z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> PartNumbers:
    """The four numbers' derivatives along dz."""
    numbers, _, some = _moments(z, kept, [dz], kept_targets(z, kept, y), tau)
    return _part_numbers(numbers, some)


def part_second_tangents(
    z: Tensor, kept: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor
) -> PartNumbers:
    """The four numbers' second derivatives along du and dz."""
    numbers, _, some = _moments(z, kept, [du, dz], kept_targets(z, kept, y), tau)
    return _part_numbers(numbers, some)


def _part_numbers(numbers: Tensor, some: Tensor) -> PartNumbers:
    empty = (some == 0).unsqueeze(1)
    (entropy, logprob, lse), (tail_entropy, _, tail_lse) = torch.where(empty, 0.0, numbers)
    return PartNumbers(entropy, logprob, torch.where((some == 0).any(0), 0.0, lse - tail_lse), tail_entropy)


def _weights(w: Cotangents, empty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and l of both parts, [2, R], and g: (q, g, l) on S, (h, 0, −l) on T; λ has no derivative where a part is empty."""
    q, g, l, h = w  # noqa: E741
    l = torch.where(empty.any(0), 0.0, l)  # noqa: E741
    return torch.stack([q, h]), torch.where(empty[0], 0.0, g), torch.stack([l, -l])


def part_cotangents(
    z: Tensor, kept: Tensor, y: Tensor, tau: Tensor, w: Cotangents, *, state: Tensor | None = None
) -> Tensor:
    """The gradient of q·entropy + g·logprob + l·λ + h·tail entropy, [R, V] in z's dtype; with `state` in one read and one write."""
    z = rows._in_memory(z)
    R, V = z.shape
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if R == 0:
        return out
    T = compute_dtype(z.dtype)
    kept_y = kept_targets(z, kept, y)
    if state is None:
        _, states, some = _moments(z, kept, [], kept_y, tau)
        states, empty = _without_empty(states, some, 0.0), some == 0
    else:
        states = state.unflatten(1, (2, 3)).transpose(0, 1)
        empty = states[..., 1] == -1
        states = torch.where(empty.unsqueeze(-1), 0.0, states)
    q, g, l = _weights(w, empty)  # noqa: E741
    width = part_width(V, T)
    S = triton.cdiv(V, width)
    S_, listed, set_strides = _set(z, kept)
    tau, states, q, g, l = rows._vectors(T, tau, states, torch.where(empty, 0.0, q), g, l)  # noqa: E741
    with rows._device(z):
        part_kernels.write_part_cotangents[(R * S,)](
            z, S_, kept_y.contiguous(), tau, states, q, g, l, out, R, V, S, *z.stride(), *set_strides, *out.stride(),
            LISTED=listed, BLOCK=width, num_warps=part_warps(width, T),
        )  # fmt: skip
    return out


def part_cotangent_tangents(
    z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor, w: Cotangents, dw: Cotangents
) -> Tensor:
    """The tangent of `part_cotangents` along (ż, q̇, ġ, l̇, ḣ), [R, V] in z's dtype."""
    z, dz = rows._in_memory(z), rows._in_memory(dz)
    R, V = z.shape
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if R == 0:
        return out
    T = compute_dtype(z.dtype)
    kept_y = kept_targets(z, kept, y)
    _, states, some = _moments(z, kept, [dz], kept_y, tau)
    states, empty = _without_empty(states, some, 0.0), some == 0
    (q, g, l), (dq, dg, dl) = (_weights(x, empty) for x in (w, dw))  # noqa: E741
    q, dq = (torch.where(empty, 0.0, x) for x in (q, dq))
    width = part_width(V, T)
    S = triton.cdiv(V, width)
    S_, listed, set_strides = _set(z, kept)
    tau, states, *weights = rows._vectors(T, tau, states, q, g, l, dq, dg, dl)
    with rows._device(z):
        part_kernels.write_part_cotangent_tangents[(R * S,)](
            z, S_, dz, kept_y.contiguous(), tau, states, *weights, out, R, V, S,
            *z.stride(), *set_strides, *dz.stride(), *out.stride(),
            LISTED=listed, BLOCK=width, num_warps=part_warps(width, T),
        )  # fmt: skip
    return out
