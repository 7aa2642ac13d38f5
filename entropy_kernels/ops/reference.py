r"""Entropy and log-prob of vocabulary rows, with every derivative, in plain torch.

For one row of logits $z$ at temperature $\tau$, with $a^* = \arg\max z$ and $c_a = (z_a - z_{a^*})/\tau$:

    s1 = Σ_{a≠a*} e^{c_a}      A = Σ_a e^{c_a} c_a      p_a = e^{c_a}/(1+s1)      c̄ = E_p[c] = A/(1+s1)
    logprob_y = c_y − log1p(s1)       entropy = log1p(s1) − c̄       logsumexp = z_{a*}/τ + log1p(s1)

Everything is centred on the largest logit, values and tangents alike, and the largest term is never added and subtracted
again. That is what keeps rows with an entropy of 1e-6 nats accurate in float32, where `logsumexp − Σ p z` has no digit left.
Note log p_a + entropy = c_a − c̄, so no logarithm is needed anywhere below (docs/theory.md, section 2).

Legend: z logits [R, V]; y targets [R], −1 where there is none; τ temperature [R]; `dz`, `du` tangents of the logits [R, V];
q, g, l cotangents [R] of entropy, logprob and logsumexp, always in this order. Results are in float64 for float64 logits and in
float32 for every narrower dtype. With float64 logits this file is the specification that faster kernels are tested against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18  # rows are worked through in blocks whose temporaries stay in cache


class RowValues(NamedTuple):
    """Entropy, logprob and logsumexp of each row, or their derivatives, each [R], in nats."""

    entropy: Tensor
    logprob: Tensor
    logsumexp: Tensor


class _Row(NamedTuple):
    """What every derivative needs of a block of rows: c and p [r, V], the rest [r, 1]."""

    c: Tensor  # centred logits, 0 where p = 0 so that 0·(−inf) never arises
    p: Tensor
    s1: Tensor
    c_mean: Tensor
    peak: Tensor  # index of the largest logit
    z_peak: Tensor
    tau: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rows of `dtype` are worked out and returned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row(z: Tensor, tau: Tensor) -> tuple[_Row, Tensor]:
    z = z.to(compute_dtype(z.dtype))
    tau = tau.to(z.dtype).unsqueeze(-1)
    z_peak, peak = z.max(dim=-1, keepdim=True)
    c = (z - z_peak) / tau  # subtract first: exact for nearby numbers, however large the shift
    e = c.exp()
    c_kept = torch.where(c == -torch.inf, 0.0, c)
    s1 = e.scatter(-1, peak, 0.0).sum(-1, keepdim=True)  # not Σe − 1: that loses a small s1
    s1 = s1 + 0.0 * z_peak  # a row whose largest logit is infinite or NaN is undefined throughout
    p = e / (1 + s1)
    c_mean = (p * c_kept).sum(-1, keepdim=True)
    return _Row(c=c_kept, p=p, s1=s1, c_mean=c_mean, peak=peak, z_peak=z_peak, tau=tau), c


def _pick(x: Tensor, y: Tensor) -> Tensor:
    """x[r, y_r], and 0 where there is no target."""
    return torch.where(y >= 0, x.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1), 0.0)


def _centred(row: _Row, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """δ = (ż − ż_{a*})/τ, its mean μ = E_p[δ], and ż_{a*}/τ. At the peak δ is exactly 0, so μ sums small terms only."""
    dz = dz.to(row.c.dtype)
    at_peak = dz.gather(-1, row.peak)
    delta = (dz - at_peak) / row.tau
    return delta, (row.p * delta).sum(-1, keepdim=True), at_peak / row.tau


def _blocks(z: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(1, z.shape[-1]))
    return [slice(i, i + rows) for i in range(0, z.shape[0], rows)] or [slice(0, 0)]


def _stack(parts: list[RowValues]) -> RowValues:
    return (
        parts[0]
        if len(parts) == 1
        else RowValues(*(torch.cat(column) for column in zip(*parts, strict=True)))
    )


def _cat(parts: list[Tensor], out: Tensor | None) -> Tensor:
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found if out is None else out.copy_(found)


def row_values(z: Tensor, y: Tensor, tau: Tensor) -> RowValues:
    """H = log1p(s1) − c̄,  logprob_y = c_y − log1p(s1),  logsumexp = z_{a*}/τ + log1p(s1)."""
    parts = []
    for b in _blocks(z):
        row, c = _row(z[b], tau[b])
        log_norm = row.s1.log1p().squeeze(-1)
        parts.append(
            RowValues(
                entropy=log_norm - row.c_mean.squeeze(-1),
                logprob=torch.where(y[b] >= 0, _pick(c, y[b]) - log_norm, 0.0),
                logsumexp=(row.z_peak / row.tau).squeeze(-1) + log_norm,
            )
        )
    return _stack(parts)


def row_tangents(z: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> RowValues:
    """H' = −Cov_p(c, δ),  logprob' = δ_y − μ,  logsumexp' = μ + ż_{a*}/τ."""
    parts = []
    for b in _blocks(z):
        row, _ = _row(z[b], tau[b])
        delta, mu, at_peak = _centred(row, dz[b])
        covariance = (row.p * (row.c - row.c_mean) * (delta - mu)).sum(-1)
        parts.append(
            RowValues(
                entropy=-covariance,
                logprob=torch.where(y[b] >= 0, _pick(delta, y[b]) - mu.squeeze(-1), 0.0),
                logsumexp=(mu + at_peak).squeeze(-1),
            )
        )
    return _stack(parts)


def row_second_tangents(z: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> RowValues:
    """Second derivative along du and dz: H'' = −Cov(u, v) − κ₃(c, u, v),  logprob'' = −Cov(u, v),  logsumexp'' = Cov(u, v).

    κ₃ is the third joint central moment under p; u and v are the tangents divided by τ.
    """
    parts = []
    for b in _blocks(z):
        row, _ = _row(z[b], tau[b])
        u, mu_u, _ = _centred(row, du[b])
        v, mu_v, _ = _centred(row, dz[b])
        product = row.p * (u - mu_u) * (v - mu_v)
        covariance = product.sum(-1)
        kappa3 = (product * (row.c - row.c_mean)).sum(-1)
        parts.append(
            RowValues(
                entropy=-covariance - kappa3,
                logprob=torch.where(y[b] >= 0, -covariance, 0.0),
                logsumexp=covariance,
            )
        )
    return _stack(parts)


def _add_at_target(out: Tensor, row: _Row, y: Tensor, g: Tensor) -> Tensor:
    """out + g (1_y − p), with 1 − p at the peak written as s1/(1+s1)."""
    g = torch.where(y >= 0, g, 0.0).unsqueeze(-1)
    y_column = y.clamp_min(0).unsqueeze(-1)
    one_minus_p = torch.where(y_column == row.peak, row.s1 / (1 + row.s1), 1 - row.p.gather(-1, y_column))
    at_target = out.gather(-1, y_column) + g * one_minus_p
    return (out - g * row.p).scatter(
        -1, y_column, torch.where(y.unsqueeze(-1) >= 0, at_target, out.gather(-1, y_column))
    )


def row_cotangents(
    z: Tensor,
    y: Tensor,
    tau: Tensor,
    q: Tensor,
    g: Tensor,
    l: Tensor,  # noqa: E741
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of q·H + g·logprob + l·logsumexp: dz = [g(1_y − p) − q p (c − c̄) + l p]/τ, [R, V] in z's dtype.

    Written into `out`, which may be z itself, where it is given.
    """
    parts = []
    for b in _blocks(z):
        row, _ = _row(z[b], tau[b])
        part = row.p * (l[b].unsqueeze(-1) - q[b].unsqueeze(-1) * (row.c - row.c_mean))
        parts.append((_add_at_target(part, row, y[b], g[b]) / row.tau).to(z.dtype))
    return _cat(parts, out)


def row_cotangent_tangents(
    z: Tensor,
    dz: Tensor,
    y: Tensor,
    tau: Tensor,
    cotangents: tuple[Tensor, Tensor, Tensor],
    cotangent_tangents: tuple[Tensor, Tensor, Tensor],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The tangent of `row_cotangents` along (ż, q̇, ġ, l̇), [R, V] in z's dtype; into `out`, which may be z or ż.

    With ṗ = p(δ − μ) and the tangent of c − c̄ equal to δ − μ + H':
        ġ(1_y − p) − g ṗ − q̇ p(c − c̄) − q[ṗ(c − c̄) + p(δ − μ + H')] + l̇ p + l ṗ,   all over τ.
    """
    q, g, l = cotangents  # noqa: E741
    dq, dg, dl = cotangent_tangents
    parts = []
    for b in _blocks(z):
        row, _ = _row(z[b], tau[b])
        delta, mu, _ = _centred(row, dz[b])
        centred, spread = row.c - row.c_mean, delta - mu
        d_entropy = -(row.p * centred * spread).sum(-1, keepdim=True)
        q_b, dq_b, l_b, dl_b = (x[b].unsqueeze(-1) for x in (q, dq, l, dl))
        g_b = torch.where(y[b] >= 0, g[b], 0.0).unsqueeze(-1)
        part = row.p * (
            spread * (l_b - g_b - q_b * centred) - q_b * (spread + d_entropy) - dq_b * centred + dl_b  #
        )
        parts.append((_add_at_target(part, row, y[b], dg[b]) / row.tau).to(z.dtype))
    return _cat(parts, out)
