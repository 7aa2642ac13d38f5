"""Triton kernel for tangents of rows along several directions at once: the logits are read, and their weights found, once for all.

Formulas, letters and the order of the moments are those of `row_kernels`: what a tile stores of direction k is what `tile_moments`
with N = 1 stores of it alone, [K, R, S, 6], and `merge_tiles` makes rows of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_kernels import (
    CANCELS,
    _chunks,
    _distance,
    _larger,
    _peak_column,
    _sum_below,
    _total,
    _weight,
    _wide,
)


@triton.jit
def tile_many_tangents(
    z,
    v,
    tau,
    moments,
    V,
    S,
    z_row,
    z_column,
    v_direction,
    v_row,
    v_column,
    moments_direction,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
):
    """The moments of one tile of one row along every direction: program r·S + t. v is [K, R, V]."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    C: tl.constexpr = BLOCK // CHUNK
    VECTOR: tl.constexpr = 128 // z.dtype.element_ty.primitive_bitwidth
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    lanes = tl.arange(0, CHUNK)
    column = tile * BLOCK + lanes
    z_a = _chunks(z, r, column, V, z_row, z_column, float("-inf"), C)
    largest = z_a[0]
    for i in tl.static_range(1, C):
        largest = _larger(largest, z_a[i], PTX)
    peak = tl.max(largest.to(T), 0)
    centre = tl.where(peak == float("-inf"), 0.0, peak)
    lane = tl.min(tl.where(largest.to(T) == peak, lanes, CHUNK), 0)
    peak_column = _peak_column(z, r, tile * BLOCK, V, z_row, z_column, peak, lane, C, CHUNK)
    e, d = (), ()
    sums_e, sums_d = tl.zeros([CHUNK], T), tl.zeros([CHUNK], T)
    for i in tl.static_range(C):
        d_i = _distance(_wide(z_a[i], T, PTX), centre, tau_r)
        e_i = _weight(d_i, tau_r, EXACT, PTX)
        sums_e += e_i
        sums_d = tl.fma(e_i, d_i, sums_d)
        e, d = e + (e_i,), d + (d_i,)  # type: ignore[assignment]
    s1 = _total(sums_e, VECTOR) - 1.0
    if s1 < CANCELS:
        below = _sum_below(z, r, column, V, z_row, z_column, centre, tau_r, C, VECTOR, PTX)
        s1 = below + tl.floor(s1 - below + 0.5)
    sum_d = _total(sums_d, VECTOR)
    share = tl.where(peak == float("-inf"), 0.0, 1.0 / (1.0 + s1))
    mean_d = (sum_d * share).to(T)
    for k in tl.static_range(DIRECTIONS):
        v_k = v + tl.full([], k, tl.int64) * v_direction
        v_a = _chunks(v_k, r, column, V, v_row, v_column, 0.0, C)
        v_peak = tl.load(v_k + r * v_row + peak_column.to(tl.int64) * v_column).to(T)
        x_v = ()
        sums_v = tl.zeros([CHUNK], T)
        for i in tl.static_range(C):
            v_i = _wide(v_a[i], T, PTX) - v_peak
            sums_v = tl.fma(e[i], v_i, sums_v)
            x_v = x_v + (v_i,)  # type: ignore[assignment]
        sum_v = _total(sums_v, VECTOR)
        mean_v = (sum_v * share).to(T)
        sums_dv = tl.zeros([CHUNK], T)
        for i in tl.static_range(C):
            sums_dv = tl.fma(e[i] * (d[i] - mean_d), x_v[i] - mean_v, sums_dv)
        to = moments + k * moments_direction + (r * S + tile) * 6
        tl.store(to, peak)
        tl.store(to + 1, s1)
        tl.store(to + 2, sum_d)
        tl.store(to + 3, v_peak)
        tl.store(to + 4, sum_v)
        tl.store(to + 5, _total(sums_dv, VECTOR))
