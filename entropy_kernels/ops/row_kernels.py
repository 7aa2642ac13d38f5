r"""Triton kernels for rows of logits: moments of a tile, tiles merged into a row, gradients written.

A row is cut into tiles by V alone. A tile is held in registers whole: first its peak, then its sums about that peak, then products
centred on its own means; nothing is rescaled while data arrives, and nothing read twice. Tiles are merged in float64, in one
fixed order, so a row's numbers depend on no other row and on no launch. Formulas and letters are those of `reference`; inside a tile

    d = z − peak      x = ż − ż_peak      e = e^{d/τ}

are kept undivided by τ, and `s1` leaves the peak out of Σe. Moments are stored as [R, S, K], K numbers a tile in this order:
    0 peak   1 s1   2 Σ e d   | 3 v_peak   4 Σ e v   5 Σ e d̂ v̂   | 6 u_peak   7 Σ e u   8 Σ e d̂ û   9 Σ e û v̂   10 Σ e d̂ û v̂
where a hat is the distance from the tile's mean. N, the number of tangents, says how many there are: K = 3, 6 or 11.
A row's state is [R, 3]: peak, s1, E_p[d]; with a tangent [R, 6]: further its value at the peak, E_p[x] and H'.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VANISHED = tl.constexpr(-1e4)  # e^VANISHED is 0 in every dtype, and 0 · VANISHED is 0, unlike 0 · (−inf)
CANCELS = tl.constexpr(7.0)  # above this Σe − 1 is as exact as Σe


@triton.jit
def _distance(z, peak, tau):
    """D = z − peak, subtracted before anything is scaled: exact for nearby numbers. Cut off where e^{d/τ} is 0; NaN stays."""
    return tl.maximum(z - peak, tau * VANISHED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _weight(d, tau, EXACT: tl.constexpr):
    """e^{d/τ}. EXACT: to the last places in float32 too, where d log₂e/τ alone would lose the digits before its point."""
    if tau.dtype == tl.float64:
        e = tl.exp(d * (1.0 / tau))
    elif EXACT:
        k = LOG2_E / tau.to(tl.float64)
        high = k.to(tl.float32)
        t = d * high
        rest = tl.fma(d, (k - high.to(tl.float64)).to(tl.float32), tl.fma(d, high, -t))
        e = tl.exp2(t)
        e = tl.fma(e, rest * LN_2, e)
    else:
        e = tl.exp2(d * (LOG2_E / tau))
    return e


@triton.jit
def _log1p(x):
    """log(1 + x) in float64 from log alone: the rounding of 1 + x cancels from log(w)·x/(w − 1) (Kahan)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _columns(tile, V, BLOCK: tl.constexpr):
    column = tile * BLOCK + tl.arange(0, BLOCK)
    return column, column < V


@triton.jit
def _load(x, r, column, mask, row_stride, column_stride, other, T: tl.constexpr):
    at = x + r * row_stride + column.to(tl.int64) * column_stride
    return tl.load(at, mask=mask, other=other).to(T)


@triton.jit
def tile_moments(
    z,
    u,
    v,
    tau,
    moments,
    V,
    S,
    z_row,
    z_column,
    u_row,
    u_column,
    v_row,
    v_column,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moments of one tile of one row: program r·S + t."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    column, mask = _columns(tile, V, BLOCK)
    z_a = _load(z, r, column, mask, z_row, z_column, float("-inf"), T)
    peak = tl.max(z_a, 0)
    centre = tl.where(peak == float("-inf"), 0.0, peak)  # a tile of −inf only has weight 0, not NaN
    d = _distance(z_a, centre, tau_r)
    e = _weight(d, tau_r, EXACT)
    if N > 0:
        peak_column = tl.min(tl.where(z_a == peak, column, V - 1), 0)
    s1 = tl.sum(e, 0) - 1.0
    if (
        s1 < CANCELS
    ):  # which would lose a small s1: the sum below the peak, and the whole number of ties it is away by
        below = tl.sum(tl.where(d == 0.0, 0.0, e), 0)
        s1 = below + tl.floor(s1 - below + 0.5)
    sum_d = tl.sum(e * d, 0)
    K: tl.constexpr = 3 + 3 * N + 2 * (N // 2)
    to = moments + (r * S + tile) * K
    tl.store(to, peak)
    tl.store(to + 1, s1)
    tl.store(to + 2, sum_d)
    if N > 0:
        share = tl.where(peak == float("-inf"), 0.0, 1.0 / (1.0 + s1))
        d_hat = d - sum_d * share
        v_peak = _load(v, r, peak_column, None, v_row, v_column, None, T)
        x_v = _load(v, r, column, mask, v_row, v_column, 0.0, T) - v_peak
        sum_v = tl.sum(e * x_v, 0)
        v_hat = x_v - sum_v * share
        tl.store(to + 3, v_peak)
        tl.store(to + 4, sum_v)
        tl.store(to + 5, tl.sum(e * d_hat * v_hat, 0))
        if N > 1:
            u_peak = _load(u, r, peak_column, None, u_row, u_column, None, T)
            x_u = _load(u, r, column, mask, u_row, u_column, 0.0, T) - u_peak
            sum_u = tl.sum(e * x_u, 0)
            e_u_hat = e * (x_u - sum_u * share)
            tl.store(to + 6, u_peak)
            tl.store(to + 7, sum_u)
            tl.store(to + 8, tl.sum(e_u_hat * d_hat, 0))
            e_uv_hat = e_u_hat * v_hat
            tl.store(to + 9, tl.sum(e_uv_hat, 0))
            tl.store(to + 10, tl.sum(e_uv_hat * d_hat, 0))


@triton.jit
def _mean(peaks, sums, first, t, share, weight):
    """Of one coordinate: its value at the row's peak; the mean over the row from there; each tile's distance from that mean."""
    at_peak = tl.sum(tl.where(t == first, peaks, 0.0), 0)
    tile_mean = sums * share + (peaks - at_peak)
    mean = tl.sum(weight * tile_mean, 0)
    return at_peak, mean, tile_mean - mean


@triton.jit
def merge_tiles(
    z,
    u,
    v,
    y,
    tau,
    moments,
    state,
    entropy,
    logprob,
    logsumexp,
    S,
    z_row,
    z_column,
    u_row,
    u_column,
    v_row,
    v_column,
    N: tl.constexpr,
    TILES: tl.constexpr,
):
    """The values (N = 0), tangents (1) or second tangents (2) of row r from its S tiles, in float64, and its state.

    Of tiles with weights ω, means c̄_t, ū_t, v̄_t and centred products, with a, b, g the distances of their means from the row's:
        Cov(u, v) = Σ ω [Cov_t(u, v) + b g]      κ₃ = Σ ω [κ_t + a Cov_t(u, v) + b Cov_t(c, v) + g Cov_t(c, u) + a b g]
    """
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TILES)
    mask = t < S
    K: tl.constexpr = 3 + 3 * N + 2 * (N // 2)
    at = moments + (r * S + t) * K
    to = state + r * (6 if N == 1 else 3)
    tau_r = tl.load(tau + r).to(tl.float64)
    target = tl.load(y + r)
    has_target = target >= 0

    peaks = tl.load(at, mask=mask, other=float("-inf")).to(tl.float64)
    s1_t = tl.load(at + 1, mask=mask, other=-1.0).to(tl.float64)
    sum_d = tl.load(at + 2, mask=mask, other=0.0).to(tl.float64)
    peak = tl.max(peaks, 0)
    first = tl.min(tl.where(peaks == peak, t, TILES), 0)
    shift = peaks - peak
    weight = tl.exp(shift / tau_r) * (1.0 + s1_t)
    s1 = tl.sum(tl.where(t == first, s1_t, weight), 0) + 0.0 * peak  # undefined where the peak is infinite
    share = tl.where(weight == 0.0, 0.0, 1.0 / tl.where(weight == 0.0, 1.0, 1.0 + s1_t))
    weight = weight / (1.0 + s1)
    d_t = sum_d * share + tl.where(shift == float("-inf"), 0.0, shift)
    d_mean = tl.sum(weight * d_t, 0)
    tl.store(to, peak)
    tl.store(to + 1, s1)
    tl.store(to + 2, d_mean)
    if N == 0:
        log_norm = _log1p(s1)
        z_y = tl.load(z + r * z_row + target * z_column, mask=has_target, other=0.0).to(tl.float64)
        tl.store(entropy + r, log_norm - d_mean / tau_r)
        tl.store(logprob + r, tl.where(has_target, (z_y - peak) / tau_r - log_norm, 0.0))
        tl.store(logsumexp + r, peak / tau_r + log_norm)
    else:
        a = d_t - d_mean
        v_peaks = tl.load(at + 3, mask=mask, other=0.0).to(tl.float64)
        sum_v = tl.load(at + 4, mask=mask, other=0.0).to(tl.float64)
        sum_dv = tl.load(at + 5, mask=mask, other=0.0).to(tl.float64)
        v_peak, v_mean, g = _mean(v_peaks, sum_v, first, t, share, weight)
        cov_dv = sum_dv * share
        if N == 1:
            d_entropy = -tl.sum(weight * (cov_dv + a * g), 0) / (tau_r * tau_r)
            v_y = tl.load(v + r * v_row + target * v_column, mask=has_target, other=0.0).to(tl.float64)
            tl.store(to + 3, v_peak)
            tl.store(to + 4, v_mean)
            tl.store(to + 5, d_entropy)
            tl.store(entropy + r, d_entropy)
            tl.store(logprob + r, tl.where(has_target, (v_y - v_peak - v_mean) / tau_r, 0.0))
            tl.store(logsumexp + r, (v_mean + v_peak) / tau_r)
        else:
            u_peaks = tl.load(at + 6, mask=mask, other=0.0).to(tl.float64)
            sum_u = tl.load(at + 7, mask=mask, other=0.0).to(tl.float64)
            cov_du = tl.load(at + 8, mask=mask, other=0.0).to(tl.float64) * share
            cov_uv = tl.load(at + 9, mask=mask, other=0.0).to(tl.float64) * share
            kappa = tl.load(at + 10, mask=mask, other=0.0).to(tl.float64) * share
            _, _, b = _mean(u_peaks, sum_u, first, t, share, weight)
            covariance = tl.sum(weight * (cov_uv + b * g), 0) / (tau_r * tau_r)
            kappa = kappa + a * cov_uv + b * cov_dv + g * cov_du + a * b * g
            kappa3 = tl.sum(weight * kappa, 0) / (tau_r * tau_r * tau_r)
            tl.store(entropy + r, -covariance - kappa3)
            tl.store(logprob + r, tl.where(has_target, -covariance, 0.0))
            tl.store(logsumexp + r, covariance)


@triton.jit
def write_cotangents(
    z,
    y,
    tau,
    state,
    q,
    g,
    l,  # noqa: E741
    out,
    V,
    S,
    z_row,
    z_column,
    out_row,
    out_column,
    BLOCK: tl.constexpr,
):
    """dz = p [l − g − q (c − c̄)]/τ + g 1_y/τ for one tile, as e^{d/τ} (k0 + k1 d); out may be z itself."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    target = tl.load(y + r)
    peak, s1, d_mean = tl.load(state + r * 3), tl.load(state + r * 3 + 1), tl.load(state + r * 3 + 2)
    q_r, l_r = tl.load(q + r), tl.load(l + r)
    g_r = tl.where(target < 0, 0.0, tl.load(g + r))
    scale = 1.0 / ((1.0 + s1) * tau_r)
    k0 = (l_r + q_r * (d_mean / tau_r)) * scale
    k1 = -q_r * scale / tau_r

    column, mask = _columns(tile, V, BLOCK)
    d = _distance(_load(z, r, column, mask, z_row, z_column, float("-inf"), T), peak, tau_r)
    e = _weight(d, tau_r, EXACT)
    dz = e * ((k0 - g_r * scale) + k1 * d)
    target = (target - tile * BLOCK).to(tl.int32)
    if (target >= 0) & (target < BLOCK):  # 1 − p at the target, without taking e from 1 + s1 at the peak
        one_minus_p = tl.where(d == 0.0, s1, (1.0 + s1) - e)
        dz = tl.where(tl.arange(0, BLOCK) == target, e * (k0 + k1 * d) + g_r * scale * one_minus_p, dz)
    to = out + r * out_row + column.to(tl.int64) * out_column
    tl.store(to, dz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def write_cotangent_tangents(
    z,
    v,
    y,
    tau,
    state,
    q,
    g,
    l,  # noqa: E741
    dq,
    dg,
    dl,
    out,
    V,
    S,
    z_row,
    z_column,
    v_row,
    v_column,
    out_row,
    out_column,
    BLOCK: tl.constexpr,
):
    """The tangent of `write_cotangents` for one tile; out may be z or v itself.

    p [(δ − μ)(l − g − q − q (c − c̄)) + l̇ − ġ − q H' − q̇ (c − c̄)]/τ + ġ 1_y/τ, as e^{d/τ} [v̂ (k0 + k1 d̂) + k2 + k3 d̂].
    """
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    target = tl.load(y + r)
    peak, s1, d_mean = tl.load(state + r * 6), tl.load(state + r * 6 + 1), tl.load(state + r * 6 + 2)
    v_peak, v_mean = tl.load(state + r * 6 + 3), tl.load(state + r * 6 + 4)
    d_entropy = tl.load(state + r * 6 + 5)
    q_r, l_r, dq_r, dl_r = tl.load(q + r), tl.load(l + r), tl.load(dq + r), tl.load(dl + r)
    g_r = tl.where(target < 0, 0.0, tl.load(g + r))
    dg_r = tl.where(target < 0, 0.0, tl.load(dg + r))
    scale = 1.0 / ((1.0 + s1) * tau_r)
    k0 = (l_r - g_r - q_r) * scale / tau_r
    k1 = -q_r * scale / (tau_r * tau_r)
    k2 = (dl_r - q_r * d_entropy) * scale
    k3 = -dq_r * scale / tau_r

    column, mask = _columns(tile, V, BLOCK)
    d = _distance(_load(z, r, column, mask, z_row, z_column, float("-inf"), T), peak, tau_r)
    e = _weight(d, tau_r, EXACT)
    d_hat = d - d_mean
    v_hat = (_load(v, r, column, mask, v_row, v_column, 0.0, T) - v_peak) - v_mean
    slope = v_hat * (k0 + k1 * d_hat) + k3 * d_hat
    dz = e * (slope + (k2 - dg_r * scale))
    target = (target - tile * BLOCK).to(tl.int32)
    if (target >= 0) & (target < BLOCK):
        one_minus_p = tl.where(d == 0.0, s1, (1.0 + s1) - e)
        dz = tl.where(tl.arange(0, BLOCK) == target, e * (slope + k2) + dg_r * scale * one_minus_p, dz)
    to = out + r * out_row + column.to(tl.int64) * out_column
    tl.store(to, dz.to(out.dtype.element_ty), mask=mask)
