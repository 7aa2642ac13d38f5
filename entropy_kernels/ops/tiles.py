r"""A row of logits a tile of columns at a time, on the CPU: what `csrc/tile_kernels.h` computes, and how a row is finished.

A carry [R, K] in float64 holds what the tiles so far have found of each row, with c and x (the tangent) measured from the peak
in units of the temperature, and w = e^c:

    peak z_*,  s1 = Σ' w,  Σ' w c / s1                                           K = 3; Σ' leaves the peak out
    … and ż_*,  Σ' w x / s1,  Σ' w (c − c̄')(x − x̄'), c̄' and x̄' the two means     K = 6

The peak joins last: with f = s1/(1 + s1), E_p[c] = f c̄', μ = f x̄' and Cov_p(c, x) = [Σ' w (c − c̄')(x − x̄') + f c̄' x̄']/(1 + s1), which is
Chan's rule for the union of an entry of weight 1 at the origin with the others. Formulas and letters are otherwise those of `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from .reference import RowValues, compute_dtype


def available() -> bool:
    """The compiled library is there."""
    return cpu._level() is not None


def carry(rows: int, tangents: int) -> Tensor:
    """What is known of a row before its first column, for no tangent or one: [R, 3] or [R, 6]."""
    empty = torch.zeros(rows, 3 * (1 + tangents), dtype=torch.float64)
    empty[:, 0] = -torch.inf
    return empty


def add_values(z: Tensor, tau: Tensor, carry: Tensor) -> None:
    """Takes the columns z [R, v] into the carry [R, 3]."""
    torch.ops.entropy_kernels.tile_values(z, *_vectors(z, tau), carry, cpu._level())


def add_tangents(z: Tensor, dz: Tensor, tau: Tensor, carry: Tensor) -> None:
    """Takes the columns z and ż, [R, v] each, into the carry [R, 6]."""
    torch.ops.entropy_kernels.tile_tangents(z, dz, *_vectors(z, tau), carry, cpu._level())


def values(carry: Tensor, z_y: Tensor, y: Tensor, tau: Tensor, dtype: torch.dtype) -> RowValues:
    """H = log1p(s1) − c̄,  logprob = c_y − log1p(s1),  logsumexp = z_*/τ + log1p(s1); z_y [R], the logit of the target, in float64."""
    peak, s1, f, tau = *_weights(carry), tau.double()
    log_norm = torch.log1p(s1)
    logprob = torch.where(y < 0, 0.0, (z_y - peak) / tau - log_norm)
    return _narrow(dtype, log_norm - f * carry[:, 2], logprob, peak / tau + log_norm)


def tangents(carry: Tensor, dz_y: Tensor, y: Tensor, tau: Tensor, dtype: torch.dtype) -> RowValues:
    """H' = −Cov_p(c, x),  logprob' = x_y − μ,  logsumexp' = μ + ż_*/τ; dz_y [R], the tangent at the target, in float64."""
    (_, s1, f), tau = _weights(carry), tau.double()
    _, _, c_mean, dz_peak, x_mean, product = carry.unbind(1)
    mu = f * x_mean
    covariance = (product + f * c_mean * x_mean) / (1 + s1)
    logprob = torch.where(y < 0, 0.0, (dz_y - dz_peak) / tau - mu)
    return _narrow(dtype, -covariance, logprob, mu + dz_peak / tau)


def state(carry: Tensor, tau: Tensor) -> Tensor:
    """What `cotangents` needs of a whole row, as in `rows`: peak, s1, E_p[z − z_*]; [R, 3] in float64."""
    peak, s1, f = _weights(carry)
    return torch.stack([peak, s1, f * carry[:, 2] * tau.double()], 1)


def cotangents(
    z: Tensor,
    y: Tensor,
    tau: Tensor,
    q: Tensor,
    g: Tensor,
    l: Tensor,  # noqa: E741
    *,
    state: Tensor,
    out: Tensor,  # noqa: E741
) -> Tensor:
    """The columns z of the gradient of q·H + g·logprob + l·logsumexp, [R, v], into `out`, which may be z.

    y counts from the first column; where it is negative, l is to be less by the g of a target in another tile.
    """
    vectors = _vectors(z, tau, q, g, l)
    torch.ops.entropy_kernels.tile_cotangents(z, y, vectors[0], state, *vectors[1:], out, cpu._level())
    return out


def _vectors(z: Tensor, *vectors: Tensor) -> list[Tensor]:
    return [t.to(compute_dtype(z.dtype)).contiguous() for t in vectors]


def _weights(carry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z_*, s1 and the others' share f of the row; a row whose largest logit is infinite or NaN is undefined throughout."""
    peak = carry[:, 0]
    s1 = carry[:, 1] + 0.0 * peak
    return peak, s1, s1 / (1 + s1)


def _narrow(dtype: torch.dtype, *numbers: Tensor) -> RowValues:
    return RowValues(*(t.to(compute_dtype(dtype)) for t in numbers))
