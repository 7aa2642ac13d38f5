r"""Triton kernels for rows in a kept set S and its tail T: the moments of both parts of a tile, gradients written.

As in `row_kernels`, whose notation, order of sums and merge they share: a tile is held in registers whole, sums are centred on its own peak
and means, tiles are merged in float64 in one order. Each column counts its distance from the peak of its own part, so e^{d/τ} is formed
once for both. Moments are [2, R, S, K], those of S before those of T: `merge_tiles` takes either half for rows of their own.

S is one threshold a row, z ≥ t, or one byte a token (LISTED). Beside the moments goes how many tokens of each part are not −∞, [2, R, S].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_kernels import _distance, _total, _weight


@triton.jit
def _columns(tile, V, BLOCK: tl.constexpr):
    column = tile * BLOCK + tl.arange(0, BLOCK)
    return column, column < V


@triton.jit
def _load(x, r, column, mask, row_stride, column_stride, other, T: tl.constexpr):
    at = x + r * row_stride + column.to(tl.int64) * column_stride
    return tl.load(at, mask=mask, other=other).to(T)


@triton.jit
def _kept(kept, z_a, r, column, mask, kept_row, kept_column, LISTED: tl.constexpr):
    """Which columns are in S."""
    if LISTED:
        at = kept + r * kept_row + column.to(tl.int64) * kept_column
        k = tl.load(at, mask=mask, other=0) != 0
    else:
        k = z_a >= tl.load(kept + r)
    return k


@triton.jit
def _of_peak(x, z_a, inside, peak, r, column, V, row_stride, column_stride, T: tl.constexpr):
    """A tangent where its part of the tile is largest."""
    at = tl.min(tl.where(inside & (z_a == peak), column, V - 1), 0)
    return tl.load(x + r * row_stride + at.to(tl.int64) * column_stride).to(T)


@triton.jit
def tile_part_moments(
    z,
    kept,
    u,
    v,
    tau,
    moments,
    some,
    R,
    V,
    S,
    z_row,
    z_column,
    kept_row,
    kept_column,
    u_row,
    u_column,
    v_row,
    v_column,
    N: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moments of both parts of one tile of one row: program r·S + t."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    VECTOR: tl.constexpr = 128 // z.dtype.element_ty.primitive_bitwidth
    K: tl.constexpr = 3 + 3 * N + 2 * (N // 2)
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    column, mask = _columns(tile, V, BLOCK)
    z_a = _load(z, r, column, mask, z_row, z_column, float("-inf"), T)
    k = _kept(kept, z_a, r, column, mask, kept_row, kept_column, LISTED)
    peak_S = tl.max(tl.where(k, z_a, float("-inf")), 0)
    peak_T = tl.max(tl.where(k, float("-inf"), z_a), 0)
    # a part of −inf only has weight 0, not NaN
    centre_S = tl.where(peak_S == float("-inf"), 0.0, peak_S)
    centre_T = tl.where(peak_T == float("-inf"), 0.0, peak_T)
    d = _distance(z_a, tl.where(k, centre_S, centre_T), tau_r)
    e = _weight(d, tau_r, EXACT)
    if N > 0:
        v_S = _of_peak(v, z_a, k, peak_S, r, column, V, v_row, v_column, T)
        v_T = _of_peak(v, z_a, k == 0, peak_T, r, column, V, v_row, v_column, T)
        x_v = _load(v, r, column, mask, v_row, v_column, 0.0, T) - tl.where(k, v_S, v_T)
    if N > 1:
        u_S = _of_peak(u, z_a, k, peak_S, r, column, V, u_row, u_column, T)
        u_T = _of_peak(u, z_a, k == 0, peak_T, r, column, V, u_row, u_column, T)
        x_u = _load(u, r, column, mask, u_row, u_column, 0.0, T) - tl.where(k, u_S, u_T)
    for part in tl.static_range(2):
        if part == 0:
            inside = k
            peak = peak_S
        else:
            inside = k == 0
            peak = peak_T
        e_part = tl.where(inside, e, 0.0)
        d_part = tl.where(inside, d, 0.0)  # an infinite logit is the other part's affair
        ties = tl.sum((inside & (d == 0.0)).to(tl.int32), 0)
        # without the peak: Σe − 1 would lose a small s1
        s1 = _total(tl.where(d == 0.0, 0.0, e_part), VECTOR) + (ties - 1).to(tl.float64)
        sum_d = _total(e_part * d_part, VECTOR)
        tl.store(some + (part * R + r) * S + tile, tl.sum((inside & (z_a != float("-inf"))).to(tl.int32), 0))
        to = moments + ((part * R + r) * S + tile) * K
        tl.store(to, peak)
        tl.store(to + 1, s1)
        tl.store(to + 2, sum_d)
        if N > 0:
            share = tl.where(peak == float("-inf"), 0.0, 1.0 / (1.0 + s1))
            sum_v = _total(e_part * x_v, VECTOR)
            e_d_hat = e_part * (d_part - (sum_d * share).to(T))
            v_hat = x_v - (sum_v * share).to(T)
            if part == 0:
                tl.store(to + 3, v_S)
            else:
                tl.store(to + 3, v_T)
            tl.store(to + 4, sum_v)
            tl.store(to + 5, _total(e_d_hat * v_hat, VECTOR))
            if N > 1:
                sum_u = _total(e_part * x_u, VECTOR)
                u_hat = x_u - (sum_u * share).to(T)
                if part == 0:
                    tl.store(to + 6, u_S)
                else:
                    tl.store(to + 6, u_T)
                tl.store(to + 7, sum_u)
                tl.store(to + 8, _total(e_d_hat * u_hat, VECTOR))
                tl.store(to + 9, _total(e_part * u_hat * v_hat, VECTOR))
                tl.store(to + 10, _total(e_d_hat * u_hat * v_hat, VECTOR))


@triton.jit
def _slopes(state, tau, q, l, at):  # noqa: E741
    """Of e^{d/τ} (k0 + k1 d) on one part, without g; and its peak, s1 and scale."""
    tau_r = tau
    peak, s1, d_mean = tl.load(state + at * 3), tl.load(state + at * 3 + 1), tl.load(state + at * 3 + 2)
    q_r, l_r = tl.load(q + at), tl.load(l + at)
    scale = 1.0 / ((1.0 + s1) * tau_r)
    return peak, s1, scale, (l_r + q_r * (d_mean / tau_r)) * scale, -q_r * scale / tau_r


@triton.jit
def write_part_cotangents(
    z,
    kept,
    y,
    tau,
    state,
    q,
    g,
    l,  # noqa: E741
    out,
    R,
    V,
    S,
    z_row,
    z_column,
    kept_row,
    kept_column,
    out_row,
    out_column,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p_S [l − g − q (c − c̄)]/τ + g 1_y/τ on S and p_T [l − q (c − c̄)]/τ on T for one tile; state, q and l are [2, R, ...], y is in S."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    target = tl.load(y + r)
    g_r = tl.where(target < 0, 0.0, tl.load(g + r))
    peak_S, s1, scale, k0_S, k1_S = _slopes(state, tau_r, q, l, r)
    peak_T, _, _, k0_T, k1_T = _slopes(state, tau_r, q, l, R + r)
    column, mask = _columns(tile, V, BLOCK)
    z_a = _load(z, r, column, mask, z_row, z_column, float("-inf"), T)
    k = _kept(kept, z_a, r, column, mask, kept_row, kept_column, LISTED)
    d = _distance(z_a, tl.where(k, peak_S, peak_T), tau_r)
    e = _weight(d, tau_r, EXACT)
    dz = e * (tl.where(k, k0_S - g_r * scale, k0_T) + tl.where(k, k1_S, k1_T) * d)
    target = (target - tile * BLOCK).to(tl.int32)
    if (target >= 0) & (target < BLOCK):  # 1 − p at the target, without taking e from 1 + s1 at the peak
        one_minus_p = tl.where(d == 0.0, s1, (1.0 + s1) - e)
        dz = tl.where(tl.arange(0, BLOCK) == target, e * (k0_S + k1_S * d) + g_r * scale * one_minus_p, dz)
    to = out + r * out_row + column.to(tl.int64) * out_column
    tl.store(to, dz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _second_slopes(state, tau, q, l, dq, dl, at):  # noqa: E741
    """Of e^{d/τ} [v̂ (k0 + k1 d̂) + k2 + k3 d̂] on one part, without g and ġ; and its peak, s1, means and scale."""
    at6 = state + at * 6
    peak, s1, d_mean = tl.load(at6), tl.load(at6 + 1), tl.load(at6 + 2)
    v_peak, v_mean, d_entropy = tl.load(at6 + 3), tl.load(at6 + 4), tl.load(at6 + 5)
    q_r, l_r, dq_r, dl_r = tl.load(q + at), tl.load(l + at), tl.load(dq + at), tl.load(dl + at)
    scale = 1.0 / ((1.0 + s1) * tau)
    k0 = (l_r - q_r) * scale / tau
    k1 = -q_r * scale / (tau * tau)
    k2 = (dl_r - q_r * d_entropy) * scale
    k3 = -dq_r * scale / tau
    return peak, s1, d_mean, v_peak, v_mean, scale, k0, k1, k2, k3


@triton.jit
def write_part_cotangent_tangents(
    z,
    kept,
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
    R,
    V,
    S,
    z_row,
    z_column,
    kept_row,
    kept_column,
    v_row,
    v_column,
    out_row,
    out_column,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tangent of `write_part_cotangents` for one tile."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    target = tl.load(y + r)
    g_r = tl.where(target < 0, 0.0, tl.load(g + r))
    dg_r = tl.where(target < 0, 0.0, tl.load(dg + r))
    peak_S, s1, d_S, vp_S, vm_S, scale, k0_S, k1_S, k2_S, k3_S = _second_slopes(state, tau_r, q, l, dq, dl, r)
    peak_T, _, d_T, vp_T, vm_T, _, k0_T, k1_T, k2_T, k3_T = _second_slopes(state, tau_r, q, l, dq, dl, R + r)
    k0_S -= g_r * scale / tau_r
    column, mask = _columns(tile, V, BLOCK)
    z_a = _load(z, r, column, mask, z_row, z_column, float("-inf"), T)
    k = _kept(kept, z_a, r, column, mask, kept_row, kept_column, LISTED)
    d = _distance(z_a, tl.where(k, peak_S, peak_T), tau_r)
    e = _weight(d, tau_r, EXACT)
    d_hat = d - tl.where(k, d_S, d_T)
    v_hat = _load(v, r, column, mask, v_row, v_column, 0.0, T) - tl.where(k, vp_S, vp_T)
    v_hat -= tl.where(k, vm_S, vm_T)
    slope = (
        v_hat * (tl.where(k, k0_S, k0_T) + tl.where(k, k1_S, k1_T) * d_hat) + tl.where(k, k3_S, k3_T) * d_hat
    )
    dz = e * (slope + tl.where(k, k2_S - dg_r * scale, k2_T))
    target = (target - tile * BLOCK).to(tl.int32)
    if (target >= 0) & (target < BLOCK):
        one_minus_p = tl.where(d == 0.0, s1, (1.0 + s1) - e)
        dz = tl.where(tl.arange(0, BLOCK) == target, e * (slope + k2_S) + dg_r * scale * one_minus_p, dz)
    to = out + r * out_row + column.to(tl.int64) * out_column
    tl.store(to, dz.to(out.dtype.element_ty), mask=mask)
