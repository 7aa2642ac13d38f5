r"""Truncated support of vocabulary rows in plain torch: which tokens top-k and top-p keep, and what the truncated law is.

A token is kept while what stands strictly above it does not suffice yet:

    top-k     S_k = {a : #{b : z_b > z_a} < k}
    top-p     S   = {a ∈ S_k : Σ_{b : z_b > z_a} e^{c_b} < p Σ_{b ∈ S_k} e^{c_b}},      c = (z − max z)/τ

so the token that crosses p is kept, and tokens of equal logit share one fate: a tie with the threshold is kept whole. S is always
{a : z_a ≥ t} for one threshold t, and tokens of probability 0 are never in it. With mass s = Σ_S p and ε = 1 − s,

    entropy H(p_S/s)      logprob log p_y − log s (−∞ outside S)      tail entropy H(p_tail/ε)
    H(p) = s H(p_S/s) + ε H(p_tail/ε) − s log s − ε log ε             (docs/theory.md, section 3)

Masses are summed in float64 whatever the dtype of the logits. This file is the specification that faster versions are tested against.

Legend: z logits [R, V]; y targets [R], −1 where there is none; τ temperature [R]; k [R] integer and p [R] in (0, 1], or None for none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class TruncatedValues(NamedTuple):
    """What is known of each row and its kept set, each [R]: nats; a mass in [0, 1]; a number of tokens (int64)."""

    entropy: Tensor
    logprob: Tensor
    kept_mass: Tensor
    kept_count: Tensor
    tail_entropy: Tensor
    full_entropy: Tensor


def kept_set(z: Tensor, tau: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The kept tokens, bool [R, V]: top_k first, then top_p of what it left; p = 1 leaves it as it is.

    A row without a law (a NaN; a temperature or a largest logit that is infinite) keeps nothing.
    """
    t = thresholds(z, tau, top_k, top_p).unsqueeze(-1)
    return (z >= t) & (z > -torch.inf)


def thresholds(z: Tensor, tau: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The smallest kept logit [R] in the compute dtype, −∞ where every token is kept, NaN for a row without a law."""
    parts = []
    for b in reference._blocks(z):
        k, p = (None if x is None else x[b] for x in (top_k, top_p))
        parts.append(_threshold(z[b], tau[b], k, p).squeeze(-1).to(reference.compute_dtype(z.dtype)))
    return torch.cat(parts)


def _threshold(z: Tensor, tau: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The smallest kept logit [r, 1], NaN for a row without a law."""
    ordered = z.sort(dim=-1, descending=True).values  # a NaN is first
    peak = ordered[:, :1]
    t = torch.full_like(peak, -torch.inf)
    if top_k is not None:
        t = ordered.gather(-1, top_k.clamp(max=z.shape[-1]).unsqueeze(-1) - 1)
    if top_p is not None:
        p = top_p.double().unsqueeze(-1)
        e = ((ordered.double() - peak.double()) / tau.double().unsqueeze(-1)).exp()
        e = torch.where(ordered >= t, e, 0.0)
        up_to = e.cumsum(-1)
        above = torch.nn.functional.pad(up_to[:, :-1], (1, 0))
        count = (above < p * up_to[:, -1:]).sum(-1, keepdim=True)
        t = torch.where(p < 1, ordered.gather(-1, count.clamp(min=1) - 1), t)
    lawful = peak.isfinite() & ((tau > 0) & tau.isfinite()).unsqueeze(-1)
    return torch.where(lawful, t, torch.nan)


def truncated_values(z: Tensor, kept: Tensor, y: Tensor, tau: Tensor) -> TruncatedValues:
    """H(p_S/s), log p_y − log s, s, |S|, H(p_tail/ε), H(p) for a kept set S, bool [R, V].

    Without a tail H(p_tail/ε) is 0, the one value that leaves the grouping identity true. Without a kept token of positive
    probability entropy and logprob are NaN, and s is 0.
    """
    none = torch.full_like(y, -1)
    inside, outside = torch.where(kept, z, -torch.inf), torch.where(kept, -torch.inf, z)
    row = reference.row_values(inside, y, tau)
    wide = z.to(reference.compute_dtype(z.dtype))
    e = ((wide - wide.amax(-1, keepdim=True)) / tau.to(wide.dtype).unsqueeze(-1)).exp()
    kept_weight, tail_weight = torch.where(kept, e, 0.0).sum(-1), torch.where(kept, 0.0, e).sum(-1)
    return TruncatedValues(
        entropy=row.entropy,
        logprob=row.logprob,
        kept_mass=kept_weight / (kept_weight + tail_weight),
        kept_count=kept.sum(-1),
        tail_entropy=torch.where(
            without_tail(z, kept), 0.0, reference.row_values(outside, none, tau).entropy
        ),
        full_entropy=reference.row_values(z, none, tau).entropy,
    )


def without_tail(z: Tensor, kept: Tensor) -> Tensor:
    """Rows [R] in which every token of positive probability is kept, and there is one."""
    return (kept | (z == -torch.inf)).all(-1) & (kept & (z > -torch.inf)).any(-1)
