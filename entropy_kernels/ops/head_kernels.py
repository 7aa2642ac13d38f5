r"""Triton kernels that go from hidden states and an output layer to rows, logits in registers only.

    a = hWᵀ + b      z = a, or κ tanh(a/κ) under a soft cap κ      ȧ = ḣWᵀ + hẆᵀ + ḃ      ż = (dz/da) ȧ

A program makes a tile of logits, BLOCK_N rows by BLOCK_V columns, by products of BLOCK_D columns of h and W each, summed up in float32
(never rounded to the dtype of h, which a layer would do). Of the tile it then leaves the moments that `row_kernels.tile_moments` would: the
same numbers in the same places, [R, S, K] with S tiles a row, for `row_kernels.merge_tiles` to merge in float64 and in one order. Tiles
depend on no other tile, so a row's numbers depend on how V and D are cut and on nothing else. A gradient makes each tile of logits again
and writes da in place of it; the products of da are the library's.

Programs take tiles in an order that meets the same rows of W and h again while they are in the cache: GROUP blocks of rows, every
column of tiles for them, then the next GROUP. Rows of h beyond N and of W beyond V are the last one again, and are left out afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_kernels import LOG2_E, _distance, _weight


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Which block of rows and which of columns a tile is."""
    group = tile // (GROUP * column_tiles)
    within = tile - group * (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def _operand(
    x, descriptor, rows, first, k, D, stride,
    EVEN_D: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D] of a matrix with contiguous rows of D numbers, 0 beyond D. UPCAST: the interpreter has no bfloat16 products."""
    if TMA:
        part = descriptor.load([first, k])
    else:
        column = k + tl.arange(0, BLOCK_D)
        at = x + rows[:, None] * stride + column[None, :]
        if EVEN_D:
            part = tl.load(at)
        else:
            part = tl.load(at, mask=(column < D)[None, :], other=0.0)
    if UPCAST:
        part = part.to(tl.float32)
    return part


@triton.jit
def _products(
    h, W, dh, dW, h_tma, W_tma, dh_tma, dW_tma, n, v, N, V, D, h_row, W_row, dh_row, dW_row,
    DH: tl.constexpr, DW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hWᵀ and ḣWᵀ + hẆᵀ of tile (n, v), float32; without DH and DW the second is nothing."""
    rows = tl.minimum(n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    columns = tl.minimum(v * BLOCK_V + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    dz = z
    for k in range(0, D, BLOCK_D):
        h_k = _operand(h, h_tma, rows, n * BLOCK_N, k, D, h_row, EVEN_D, TMA, UPCAST, BLOCK_D)
        W_k = _operand(W, W_tma, columns, v * BLOCK_V, k, D, W_row, EVEN_D, TMA, UPCAST, BLOCK_D).T
        z = tl.dot(h_k, W_k, z, input_precision=PRECISION)
        if DH:
            dh_k = _operand(dh, dh_tma, rows, n * BLOCK_N, k, D, dh_row, EVEN_D, TMA, UPCAST, BLOCK_D)
            dz = tl.dot(dh_k, W_k, dz, input_precision=PRECISION)
        if DW:
            dW_k = _operand(dW, dW_tma, columns, v * BLOCK_V, k, D, dW_row, EVEN_D, TMA, UPCAST, BLOCK_D).T
            dz = tl.dot(h_k, dW_k, dz, input_precision=PRECISION)
    return z, dz


@triton.jit
def _tanh(x):
    """Tanh x and 1 − tanh² x, from t = e^{−2|x|}: (1 − t)/(1 + t) and 4t/(1 + t)², which keeps its digits where tanh is ±1."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    share = 1.0 / (1.0 + t)
    y = (1.0 - t) * share
    return tl.where(x < 0.0, -y, y), 4.0 * t * share * share


@triton.jit
def _bias(z, b, columns, V, EVEN_V: tl.constexpr):
    if EVEN_V:
        part = tl.load(b + columns)
    else:
        part = tl.load(b + columns, mask=columns < V, other=0.0)
    return z + part.to(tl.float32)[None, :]


@triton.jit
def head_moments(
    h, W, b, dh, dW, db, y, tau, moments, z_target, v_target, N, V, D, S, row_tiles,
    h_row, W_row, dh_row, dW_row,
    TANGENT: tl.constexpr, BIAS: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, DBIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, EVEN_V: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The moments of the tiles that fall to this program, and z_y (and ż_y) of the rows whose target lies in them.

    A tile's peak may be reached more than once; the tangent's value there is the largest of those, which is as good a centre as any.
    """
    h_tma = None
    W_tma = None
    dh_tma = None
    dW_tma = None
    if TMA:
        h_tma = tl.make_tensor_descriptor(h, [N, D], [h_row, 1], [BLOCK_N, BLOCK_D])
        W_tma = tl.make_tensor_descriptor(W, [V, D], [W_row, 1], [BLOCK_V, BLOCK_D])
        if DH:
            dh_tma = tl.make_tensor_descriptor(dh, [N, D], [dh_row, 1], [BLOCK_N, BLOCK_D])
        if DW:
            dW_tma = tl.make_tensor_descriptor(dW, [V, D], [dW_row, 1], [BLOCK_V, BLOCK_D])
    for tile in tl.range(tl.program_id(0), row_tiles * S, tl.num_programs(0), flatten=FLATTEN):
        n, v = _place(tile, row_tiles, S, GROUP)
        z, dz = _products(
            h, W, dh, dW, h_tma, W_tma, dh_tma, dW_tma, n, v, N, V, D, h_row, W_row, dh_row, dW_row,
            DH, DW, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, TMA, UPCAST, PRECISION,
        )  # fmt: skip
        rows = n * BLOCK_N + tl.arange(0, BLOCK_N)
        there = rows < N
        columns = v * BLOCK_V + tl.arange(0, BLOCK_V)
        if BIAS:
            z = _bias(z, b, columns, V, EVEN_V)
        if DBIAS:
            dz = _bias(dz, db, columns, V, EVEN_V)
        if SOFTCAP is not None:
            z, slope = _tanh(z * (1.0 / SOFTCAP))
            z *= SOFTCAP
            if TANGENT:
                dz *= slope
        if not EVEN_V:
            z = tl.where((columns < V)[None, :], z, float("-inf"))

        target = tl.load(y + rows, mask=there, other=-1) - v * BLOCK_V
        here = (target >= 0) & (target < BLOCK_V)
        if tl.max(here.to(tl.int32), 0) > 0:
            at_target = (columns - v * BLOCK_V)[None, :] == target.to(tl.int32)[:, None]
            tl.store(z_target + rows, tl.sum(tl.where(at_target, z, 0.0), 1), mask=here)
            if TANGENT:
                tl.store(v_target + rows, tl.sum(tl.where(at_target, dz, 0.0), 1), mask=here)

        tau_n = tl.load(tau + rows, mask=there, other=1.0)[:, None]
        peak = tl.max(z, 1)
        if TANGENT:
            v_peak = tl.max(tl.where(z == peak[:, None], dz, float("-inf")), 1)
        empty = peak == float("-inf")
        d = _distance(z, tl.where(empty, 0.0, peak)[:, None], tau_n)
        e = _weight(d, tau_n, EXACT)
        below = (d != 0.0).to(tl.float32)  # 1 off the peak, also where d is undefined
        s1 = tl.sum(e * below, 1) + (BLOCK_V - 1.0 - tl.sum(below, 1))
        sum_d = tl.sum(e * d, 1)
        K: tl.constexpr = 6 if TANGENT else 3
        to = moments + (rows.to(tl.int64) * S + v) * K
        tl.store(to, peak, mask=there)
        tl.store(to + 1, s1, mask=there)
        tl.store(to + 2, sum_d, mask=there)
        if TANGENT:
            share = tl.where(empty, 0.0, 1.0 / (1.0 + s1))
            x = dz - v_peak[:, None]
            sum_v = tl.sum(e * x, 1)
            covariance = tl.sum(e * (d - (sum_d * share)[:, None]) * (x - (sum_v * share)[:, None]), 1)
            tl.store(to + 3, v_peak, mask=there)
            tl.store(to + 4, sum_v, mask=there)
            tl.store(to + 5, covariance, mask=there)


@triton.jit
def head_cotangents(
    h, W, b, y, tau, state, z_target, q, g, l, out,  # noqa: E741
    N, V, D, S, row_tiles, h_row, W_row, out_row,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, EVEN_V: tl.constexpr, EVEN_D: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da = (dz/da) [p (l − g − q (c − c̄)) + g 1_y]/τ of the tiles that fall to this program, as `row_kernels.write_cotangents` has it.

    `state` and `z_target` are those of the values, whatever tiles they were found with. W may be some of the columns, and y counts from the
    first of them; where there is no target, g must be 0.
    """
    h_tma = None
    W_tma = None
    if TMA:
        h_tma = tl.make_tensor_descriptor(h, [N, D], [h_row, 1], [BLOCK_N, BLOCK_D])
        W_tma = tl.make_tensor_descriptor(W, [V, D], [W_row, 1], [BLOCK_V, BLOCK_D])
    for tile in tl.range(tl.program_id(0), row_tiles * S, tl.num_programs(0), flatten=FLATTEN):
        n, v = _place(tile, row_tiles, S, GROUP)
        z, _ = _products(
            h, W, h, W, h_tma, W_tma, h_tma, W_tma, n, v, N, V, D, h_row, W_row, h_row, W_row,
            False, False, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, TMA, UPCAST, PRECISION,
        )  # fmt: skip
        rows = n * BLOCK_N + tl.arange(0, BLOCK_N)
        there = rows < N
        columns = v * BLOCK_V + tl.arange(0, BLOCK_V)
        if BIAS:
            z = _bias(z, b, columns, V, EVEN_V)
        if SOFTCAP is not None:
            z, slope = _tanh(z * (1.0 / SOFTCAP))
            z *= SOFTCAP

        tau_n = tl.load(tau + rows, mask=there, other=1.0)[:, None]
        target = tl.load(y + rows, mask=there, other=-1)
        peak = tl.load(state + rows * 3, mask=there, other=0.0)[:, None]
        s1 = tl.load(state + rows * 3 + 1, mask=there, other=0.0)[:, None]
        d_mean = tl.load(state + rows * 3 + 2, mask=there, other=0.0)[:, None]
        q_n = tl.load(q + rows, mask=there, other=0.0)[:, None]
        l_n = tl.load(l + rows, mask=there, other=0.0)[:, None]
        g_n = tl.load(g + rows, mask=there, other=0.0)[:, None]
        scale = 1.0 / ((1.0 + s1) * tau_n)
        k0 = (l_n + q_n * (d_mean / tau_n)) * scale
        k1 = -q_n * scale / tau_n

        d = _distance(z, peak, tau_n)
        da = _weight(d, tau_n, EXACT) * ((k0 - g_n * scale) + k1 * d)
        target -= v * BLOCK_V
        here = (target >= 0) & (target < BLOCK_V)
        if tl.max(here.to(tl.int32), 0) > 0:
            # of the z_y and the peak found together before, which are equal where they should be, however tiles are cut
            # now; 1 − p without taking e from 1 + s1 at the peak
            z_y = tl.where(here[:, None], tl.load(z_target + rows, mask=here, other=0.0)[:, None], peak)
            d_y = _distance(z_y, peak, tau_n)
            e_y = _weight(d_y, tau_n, EXACT)
            da_y = e_y * (k0 + k1 * d_y) + g_n * scale * tl.where(d_y == 0.0, s1, (1.0 + s1) - e_y)
            at_target = (columns - v * BLOCK_V)[None, :] == target.to(tl.int32)[:, None]
            da = tl.where(at_target, da_y, da)
        if SOFTCAP is not None:
            da *= slope
        mask = there[:, None]
        if not EVEN_V:
            mask = mask & (columns < V)[None, :]
        tl.store(
            out + (rows.to(tl.int64) * out_row)[:, None] + columns[None, :],
            da.to(out.dtype.element_ty),
            mask=mask,
        )
