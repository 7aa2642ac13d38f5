r"""Vocabulary rows in two parts, a kept set S and its tail T, with every derivative at a fixed S, in plain torch.

With z_S and z_T the row restricted to either part (−∞ elsewhere), and H, logprob, lse those of `reference`,

    entropy H(z_S)      logprob log p_y(z_S)      log-odds λ = lse(z_S) − lse(z_T)      tail entropy H(z_T)

are four numbers from which everything else about S follows in [R] alone: its mass s = 1/(1 + e^−λ), and the full entropy
(`functional.truncated`). Cotangents (q, g, l, h) of the four are cotangents (q, g, l) of the row z_S and (h, 0, −l) of the row z_T; the
two rows share no token, so a gradient is that of z_S on S and that of z_T on T, and every derivative is one of `reference`
(docs/theory.md, section 3). λ is counted from each part's own peak, lest a common shift cost digits of the difference.

A part without a token of positive probability has no derivative. The tail's entropy is then 0 and λ = +∞; without a kept token
entropy and logprob are NaN and λ = −∞; without either λ is NaN. This file is the specification that faster versions are tested against.

Legend: z logits [R, V]; `kept` the set: one threshold a row [R], S = {a : z_a ≥ t, z_a > −∞}, or bool [R, V]; y targets [R], −1 where there
is none; τ temperature [R]; `dz`, `du` tangents [R, V]; q, g, l, h cotangents [R] of the four numbers in their order. Numbers of a row are
float64 whatever the dtype of the logits; gradients have the dtype of z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference import compute_dtype
from .truncated import thresholds as thresholds  # a set found, in the form the functions below take

Cotangents = tuple[Tensor, Tensor, Tensor, Tensor]


class PartNumbers(NamedTuple):
    """Of each row, or their derivatives, each [R] float64, in nats; the log-odds of S against its tail."""

    entropy: Tensor
    logprob: Tensor
    log_odds: Tensor
    tail_entropy: Tensor


class PartValues(NamedTuple):
    """The four numbers, |S| [R] int64, and what `part_cotangents` may take over from them, [R, 6] float64 or nothing, [R, 0]."""

    entropy: Tensor
    logprob: Tensor
    log_odds: Tensor
    tail_entropy: Tensor
    kept_count: Tensor
    state: Tensor


def mask_of(z: Tensor, kept: Tensor) -> Tensor:
    """S, bool [R, V], from either form. −∞ is never at or above a threshold, and a NaN keeps nothing.

    In the compute dtype: a threshold that lies between two tokens may be no number of a narrower one.
    """
    if kept.dtype == torch.bool:
        return kept
    return z >= kept.clamp(min=torch.finfo(z.dtype).min).unsqueeze(-1)


class _Part(NamedTuple):
    row: Tensor  # [R, V], −∞ outside the part; an empty part is replaced by one token, of entropy 0 and without a derivative
    peak: Tensor
    empty: Tensor


def _parts(z: Tensor, S: Tensor) -> tuple[_Part, _Part]:
    found = []
    for row in (torch.where(S, z, -torch.inf), torch.where(S, -torch.inf, z)):
        peak = row.argmax(-1, keepdim=True)
        z_peak = row.gather(-1, peak)
        empty = z_peak == -torch.inf
        row = row.scatter(-1, peak, torch.where(empty, torch.zeros_like(z_peak), z_peak))
        found.append(_Part(row, peak.squeeze(-1), empty.squeeze(-1)))
    return found[0], found[1]


def _kept_targets(S: Tensor, y: Tensor) -> Tensor:
    """The targets, −1 for those outside S too."""
    return torch.where(S.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1), y, -1)


def part_values(z: Tensor, kept: Tensor, y: Tensor, tau: Tensor) -> PartValues:
    """H(z_S), log p_y(z_S) (−∞ outside S), λ = (z_S* − z_T*)/τ + log Σ_S e^c − log Σ_T e^c, H(z_T)."""
    S = mask_of(z, kept)
    inside, tail = _parts(z, S)
    peaked, peaked_tail = (reference.row_values(x.row, x.peak, tau) for x in (inside, tail))
    z_peaks = [x.row.gather(-1, x.peak.unsqueeze(-1)).squeeze(-1).double() for x in (inside, tail)]
    log_odds = (z_peaks[0] - z_peaks[1]) / tau.double()
    log_odds = log_odds - (peaked.logprob.double() - peaked_tail.logprob.double())
    # of a NaN in the other part nothing is known either
    log_odds = torch.where(tail.empty, torch.inf + 0.0 * peaked.entropy, log_odds)
    log_odds = torch.where(inside.empty, -torch.inf + 0.0 * peaked_tail.entropy, log_odds)
    log_odds = torch.where(inside.empty & tail.empty, torch.nan, log_odds)
    kept_y = _kept_targets(S, y)
    logprob = reference.row_values(inside.row, kept_y, tau).logprob.double()
    logprob = torch.where((y >= 0) & (kept_y < 0), -torch.inf, logprob)
    return PartValues(
        entropy=torch.where(inside.empty, torch.nan, peaked.entropy.double()),
        logprob=torch.where(inside.empty & (y >= 0), torch.nan, logprob),
        log_odds=log_odds,
        tail_entropy=peaked_tail.entropy.double(),
        kept_count=S.sum(-1),
        state=z.new_empty(len(z), 0, dtype=torch.float64),
    )


def part_tangents(z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> PartNumbers:
    """H(z_S)', logprob', λ' = E_S[ż]/τ − E_T[ż]/τ, H(z_T)'; logprob' is 0 outside S."""
    S = mask_of(z, kept)
    inside, tail = _parts(z, S)
    of_kept = reference.row_tangents(inside.row, dz, torch.where(inside.empty, -1, _kept_targets(S, y)), tau)
    return _numbers(of_kept, reference.row_tangents(tail.row, dz, torch.full_like(y, -1), tau), inside, tail)


def part_second_tangents(
    z: Tensor, kept: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor
) -> PartNumbers:
    """Second derivatives along du and dz: those of either part, λ'' = Cov_S(u, v) − Cov_T(u, v)."""
    S = mask_of(z, kept)
    inside, tail = _parts(z, S)
    of_kept = reference.row_second_tangents(inside.row, du, dz, _kept_targets(S, y), tau)
    of_tail = reference.row_second_tangents(tail.row, du, dz, torch.full_like(y, -1), tau)
    return _numbers(of_kept, of_tail, inside, tail)


def _numbers(
    of_kept: reference.RowValues, of_tail: reference.RowValues, inside: _Part, tail: _Part
) -> PartNumbers:
    log_odds = of_kept.logsumexp.double() - of_tail.logsumexp.double()
    log_odds = torch.where(inside.empty | tail.empty, 0.0, log_odds)
    return PartNumbers(of_kept.entropy.double(), of_kept.logprob.double(), log_odds, of_tail.entropy.double())


def part_cotangents(
    z: Tensor, kept: Tensor, y: Tensor, tau: Tensor, w: Cotangents, *, state: Tensor | None = None
) -> Tensor:
    """The gradient of q·entropy + g·logprob + l·λ + h·tail entropy, [R, V] in z's dtype; `state` may spare a read of z.

    On S p_S[g(1_y/p_S − 1) − q(c − c̄) + l]/τ, on T p_T[−h(c − c̄) − l]/τ; c, c̄ and p those of the part.
    """
    S = mask_of(z, kept)
    inside, tail = _parts(z, S)
    kept_y, none = _kept_targets(S, y), torch.full_like(y, -1)
    on_kept, on_tail = _weights(z, w, inside, tail)
    return torch.where(
        S,
        reference.row_cotangents(inside.row, kept_y, tau, *on_kept),
        reference.row_cotangents(tail.row, none, tau, *on_tail),
    )


def part_cotangent_tangents(
    z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor, w: Cotangents, dw: Cotangents
) -> Tensor:
    """The tangent of `part_cotangents` along (ż, q̇, ġ, l̇, ḣ), [R, V] in z's dtype."""
    S = mask_of(z, kept)
    inside, tail = _parts(z, S)
    kept_y, none = _kept_targets(S, y), torch.full_like(y, -1)
    (on_kept, on_tail), (d_kept, d_tail) = (_weights(z, x, inside, tail) for x in (w, dw))
    return torch.where(
        S,
        reference.row_cotangent_tangents(inside.row, dz, kept_y, tau, on_kept, d_kept),
        reference.row_cotangent_tangents(tail.row, dz, none, tau, on_tail, d_tail),
    )


def _weights(
    z: Tensor, w: Cotangents, inside: _Part, tail: _Part
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(q, g, l) of the row z_S and (h, 0, −l) of z_T; λ has no derivative where a part is empty."""
    q, g, l, h = (x.to(compute_dtype(z.dtype)) for x in w)  # noqa: E741
    l = torch.where(inside.empty | tail.empty, 0.0, l)  # noqa: E741
    return (q, torch.where(inside.empty, 0.0, g), l), (h, torch.zeros_like(g), -l)
