r"""Triton kernels for rows of logits: moments of a tile, tiles merged into a row, gradients written.

A row is cut into tiles by V alone. A tile is held in registers whole: first its peak, then its sums about that peak, then products
centred on its own means; nothing is rescaled while data arrives, and nothing read twice. A thread adds its own columns in the dtype of
the arithmetic; threads, and then tiles, are added in float64, all in one fixed order, so a row's numbers depend on no other row and on
no launch. With PTX, what takes Triton several instructions and NVIDIA's assembler one is written in the latter's language; the
interpreter and AMD's GPUs take Triton's. Formulas and letters are those of `reference`; inside a tile

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
def _exp2(t, PTX: tl.constexpr):
    """2^t in float32. In PTX without the three instructions that would save a result below 2⁻¹²⁶ from being 0."""
    if PTX:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp2(t)
    return e


@triton.jit
def _weight(d, tau, EXACT: tl.constexpr, PTX: tl.constexpr = False):
    """e^{d/τ}. EXACT: to the last places in float32 too, where d log₂e/τ alone would lose the digits before its point."""
    if tau.dtype == tl.float64:
        e = tl.exp(d * (1.0 / tau))
    elif EXACT:
        k = LOG2_E / tau.to(tl.float64)
        high = k.to(tl.float32)
        t = d * high
        rest = tl.fma(d, (k - high.to(tl.float64)).to(tl.float32), tl.fma(d, high, -t))
        e = _exp2(t, PTX)
        e = tl.fma(e, rest * LN_2, e)
    else:
        e = _exp2(d * (LOG2_E / tau), PTX)
    return e


@triton.jit
def _larger(a, b, PTX: tl.constexpr):
    """max(a, b), a NaN passed over; in PTX two numbers of 16 bits at a time, which Triton would widen first."""
    if PTX and a.dtype == tl.bfloat16:
        m = tl.inline_asm_elementwise(
            "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif PTX and a.dtype == tl.float16:
        m = tl.inline_asm_elementwise(
            "max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    elif a.dtype == tl.float64:
        m = tl.maximum(a, b)
    else:
        m = tl.maximum(a.to(tl.float32), b.to(tl.float32))
    return m


@triton.jit
def _wide(x, T: tl.constexpr, PTX: tl.constexpr):
    """x in T. A bfloat16 is the upper half of a float32: in PTX one instruction each."""
    if PTX and x.dtype == tl.bfloat16 and T == tl.float32:
        w = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        w = x.to(T)
    return w


@triton.jit
def _log1p(x):
    """log(1 + x) in float64 from log alone: the rounding of 1 + x cancels from log(w)·x/(w − 1) (Kahan)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _chunks(x, r, column, V, row_stride, column_stride, other, N: tl.constexpr):
    """N pieces of row r, as they lie in memory: the columns `column`, then those the width of it further, and so on."""
    W: tl.constexpr = column.shape[0]
    pieces = ()
    for i in tl.static_range(N):
        at = x + r * row_stride + (column + i * W).to(tl.int64) * column_stride
        pieces = pieces + (tl.load(at, mask=column + i * W < V, other=other),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _total(x, VECTOR: tl.constexpr):
    """Σ x in float64: what lies side by side in one thread first, then threads, whose sums differ in size by less."""
    W: tl.constexpr = x.shape[0]
    return tl.sum(tl.sum(tl.reshape(x, (W // VECTOR, VECTOR)), 1).to(tl.float64), 0)


@triton.jit
def _sum_below(
    z, r, column, V, z_row, z_column, peak, tau, N: tl.constexpr, VECTOR: tl.constexpr, PTX: tl.constexpr
):
    """Σ e^{d/τ} without the peak and its ties, from a second look at the tile, which is in the cache."""
    W: tl.constexpr = column.shape[0]
    T: tl.constexpr = tau.dtype
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    total = tl.zeros([W], T)
    for j in range(N):
        at = z + r * z_row + (column + j * W).to(tl.int64) * z_column
        d = _distance(tl.load(at, mask=column + j * W < V, other=float("-inf")).to(T), peak, tau)
        total += tl.where(d == 0.0, 0.0, _weight(d, tau, EXACT, PTX))
    return _total(total, VECTOR)


@triton.jit
def _peak_column(z, r, tile_start, V, z_row, z_column, peak, lane, N: tl.constexpr, W: tl.constexpr):
    """A column that holds the peak, of the N that share a lane."""
    i = tl.arange(0, N)
    column = tile_start + lane + i * W
    found = tl.load(z + r * z_row + column.to(tl.int64) * z_column, mask=column < V, other=float("-inf"))
    return tl.minimum(tl.min(tl.where(found.to(peak.dtype) == peak, column, V - 1), 0), V - 1)


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
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
):
    """The moments of one tile of one row: program r·S + t.

    A thread holds the same columns of every chunk of the tile, and adds what it finds there before threads are added up.
    """
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
    if N > 0:
        v_a = _chunks(v, r, column, V, v_row, v_column, 0.0, C)
    if N > 1:
        u_a = _chunks(u, r, column, V, u_row, u_column, 0.0, C)
    largest = z_a[0]
    for i in tl.static_range(1, C):
        largest = _larger(largest, z_a[i], PTX)
    peak = tl.max(largest.to(T), 0)
    centre = tl.where(peak == float("-inf"), 0.0, peak)  # a tile of −inf only has weight 0, not NaN
    if N > 0:
        lane = tl.min(tl.where(largest.to(T) == peak, lanes, CHUNK), 0)
        peak_column = _peak_column(z, r, tile * BLOCK, V, z_row, z_column, peak, lane, C, CHUNK)
        v_peak = tl.load(v + r * v_row + peak_column.to(tl.int64) * v_column).to(T)
        x_v = ()
    if N > 1:
        u_peak = tl.load(u + r * u_row + peak_column.to(tl.int64) * u_column).to(T)
        x_u = ()
    e, d = (), ()
    sums_e, sums_d = tl.zeros([CHUNK], T), tl.zeros([CHUNK], T)
    sums_v, sums_u = tl.zeros([CHUNK], T), tl.zeros([CHUNK], T)
    for i in tl.static_range(C):
        d_i = _distance(_wide(z_a[i], T, PTX), centre, tau_r)
        e_i = _weight(d_i, tau_r, EXACT, PTX)
        sums_e += e_i
        sums_d = tl.fma(e_i, d_i, sums_d)
        if N > 0:
            v_i = _wide(v_a[i], T, PTX) - v_peak
            sums_v = tl.fma(e_i, v_i, sums_v)
            e, d, x_v = e + (e_i,), d + (d_i,), x_v + (v_i,)  # type: ignore[assignment]
        if N > 1:
            u_i = _wide(u_a[i], T, PTX) - u_peak
            sums_u = tl.fma(e_i, u_i, sums_u)
            x_u = x_u + (u_i,)  # type: ignore[assignment]
    s1 = _total(sums_e, VECTOR) - 1.0
    if (
        s1 < CANCELS
    ):  # which would lose a small s1: the sum below the peak, and the whole number of ties it is away by
        below = _sum_below(z, r, column, V, z_row, z_column, centre, tau_r, C, VECTOR, PTX)
        s1 = below + tl.floor(s1 - below + 0.5)
    sum_d = _total(sums_d, VECTOR)
    K: tl.constexpr = 3 + 3 * N + 2 * (N // 2)
    to = moments + (r * S + tile) * K
    tl.store(to, peak)
    tl.store(to + 1, s1)
    tl.store(to + 2, sum_d)
    if N > 0:
        share = tl.where(peak == float("-inf"), 0.0, 1.0 / (1.0 + s1))
        sum_v = _total(sums_v, VECTOR)
        mean_d, mean_v = (sum_d * share).to(T), (sum_v * share).to(T)
        if N > 1:
            sum_u = _total(sums_u, VECTOR)
            mean_u = (sum_u * share).to(T)
        sums_dv, sums_du = tl.zeros([CHUNK], T), tl.zeros([CHUNK], T)
        sums_uv, sums_duv = tl.zeros([CHUNK], T), tl.zeros([CHUNK], T)
        for i in tl.static_range(C):
            d_hat, v_hat = d[i] - mean_d, x_v[i] - mean_v
            e_d_hat = e[i] * d_hat
            sums_dv = tl.fma(e_d_hat, v_hat, sums_dv)
            if N > 1:
                u_hat = x_u[i] - mean_u
                uv_hat = u_hat * v_hat
                sums_du = tl.fma(e_d_hat, u_hat, sums_du)
                sums_uv = tl.fma(e[i], uv_hat, sums_uv)
                sums_duv = tl.fma(e_d_hat, uv_hat, sums_duv)
        tl.store(to + 3, v_peak)
        tl.store(to + 4, sum_v)
        tl.store(to + 5, _total(sums_dv, VECTOR))
        if N > 1:
            tl.store(to + 6, u_peak)
            tl.store(to + 7, sum_u)
            tl.store(to + 8, _total(sums_du, VECTOR))
            tl.store(to + 9, _total(sums_uv, VECTOR))
            tl.store(to + 10, _total(sums_duv, VECTOR))


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
            inv_tau = 1.0 / tau_r
            covariance = tl.sum(weight * (cov_uv + b * g), 0) * inv_tau * inv_tau
            kappa = kappa + a * cov_uv + b * cov_dv + g * cov_du + a * b * g
            kappa3 = tl.sum(weight * kappa, 0) * inv_tau * inv_tau * inv_tau
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
    state_row,
    z_row,
    z_column,
    out_row,
    out_column,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
):
    """dz = p [l − g − q (c − c̄)]/τ + g 1_y/τ for one tile, as e^{d/τ} (k0 + k1 d); out may be z itself."""
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    C: tl.constexpr = BLOCK // CHUNK
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    target = tl.load(y + r)
    of = state + r * state_row
    peak, s1, d_mean = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    q_r, l_r = tl.load(q + r), tl.load(l + r)
    g_r = tl.where(target < 0, 0.0, tl.load(g + r))
    scale = 1.0 / ((1.0 + s1) * tau_r)
    k0 = (l_r + q_r * (d_mean / tau_r)) * scale
    k1 = -q_r * scale / tau_r

    column = tile * BLOCK + tl.arange(0, CHUNK)
    here = (target >= tile * BLOCK) & (target < tile * BLOCK + BLOCK)
    z_y = tl.load(z + r * z_row + target * z_column, mask=here, other=0.0).to(T)
    z_a = _chunks(z, r, column, V, z_row, z_column, float("-inf"), C)
    if here:
        tl.debug_barrier()  # every thread has read z_y before another one writes over it, where out is z
    away = k0 - g_r * scale
    for i in tl.static_range(C):
        d = _distance(_wide(z_a[i], T, PTX), peak, tau_r)
        dz = _weight(d, tau_r, EXACT, PTX) * tl.fma(d, k1, away)
        to = out + r * out_row + (column + i * CHUNK).to(tl.int64) * out_column
        tl.store(to, dz.to(out.dtype.element_ty), mask=column + i * CHUNK < V)
    if here:  # 1 − p at the target, without taking e from 1 + s1 at the peak
        d_y = _distance(z_y, peak, tau_r)
        e_y = _weight(d_y, tau_r, EXACT, PTX)
        one_minus_p = tl.where(d_y == 0.0, s1, (1.0 + s1) - e_y)
        dz_y = e_y * (k0 + k1 * d_y) + g_r * scale * one_minus_p
        tl.debug_barrier()  # the same place has just been written by another thread
        tl.store(out + r * out_row + target * out_column, dz_y.to(out.dtype.element_ty))


@triton.jit
def write_cotangent_tangents(
    z,
    v,
    y,
    tau,
    state,
    dstate,
    q,
    g,
    l,  # noqa: E741
    dq,
    dg,
    dl,
    out,
    V,
    S,
    state_row,
    dstate_row,
    z_row,
    z_column,
    v_row,
    v_column,
    out_row,
    out_column,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
):
    """The tangent of `write_cotangents` for one tile; out may be z or v itself.

    p [(δ − μ)(l − g − q − q (c − c̄)) + l̇ − ġ − q H' − q̇ (c − c̄)]/τ + ġ 1_y/τ, as e^{d/τ} [v̂ (k0 + k1 d̂) + k2 + k3 d̂].
    """
    T: tl.constexpr = tau.dtype.element_ty
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    C: tl.constexpr = BLOCK // CHUNK
    r = (tl.program_id(0) // S).to(tl.int64)
    tile = tl.program_id(0) % S
    tau_r = tl.load(tau + r)
    target = tl.load(y + r)
    of, dof = state + r * state_row, dstate + r * dstate_row
    peak, s1, d_mean = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    v_peak, v_mean, d_entropy = tl.load(dof), tl.load(dof + 1), tl.load(dof + 2)
    q_r, l_r, dq_r, dl_r = tl.load(q + r), tl.load(l + r), tl.load(dq + r), tl.load(dl + r)
    g_r = tl.where(target < 0, 0.0, tl.load(g + r))
    dg_r = tl.where(target < 0, 0.0, tl.load(dg + r))
    inv_tau = 1.0 / tau_r
    scale = inv_tau / (1.0 + s1)
    k0 = (l_r - g_r - q_r) * scale * inv_tau
    k1 = -q_r * scale * inv_tau * inv_tau
    k2 = (dl_r - q_r * d_entropy) * scale
    k3 = -dq_r * scale * inv_tau

    column = tile * BLOCK + tl.arange(0, CHUNK)
    here = (target >= tile * BLOCK) & (target < tile * BLOCK + BLOCK)
    z_y = tl.load(z + r * z_row + target * z_column, mask=here, other=0.0).to(T)
    v_y = tl.load(v + r * v_row + target * v_column, mask=here, other=0.0).to(T)
    z_a = _chunks(z, r, column, V, z_row, z_column, float("-inf"), C)
    v_a = _chunks(v, r, column, V, v_row, v_column, 0.0, C)
    if here:
        tl.debug_barrier()  # every thread has read z_y and v_y before another one writes over them, where out is z or v
    away = k2 - dg_r * scale
    for i in tl.static_range(C):
        d = _distance(_wide(z_a[i], T, PTX), peak, tau_r)
        e = _weight(d, tau_r, EXACT, PTX)
        d_hat, v_hat = d - d_mean, (_wide(v_a[i], T, PTX) - v_peak) - v_mean
        dz = e * tl.fma(v_hat, tl.fma(d_hat, k1, k0), tl.fma(d_hat, k3, away))
        to = out + r * out_row + (column + i * CHUNK).to(tl.int64) * out_column
        tl.store(to, dz.to(out.dtype.element_ty), mask=column + i * CHUNK < V)
    if here:
        d_y = _distance(z_y, peak, tau_r)
        e_y = _weight(d_y, tau_r, EXACT, PTX)
        c_y, x_y = d_y - d_mean, (v_y - v_peak) - v_mean
        one_minus_p = tl.where(d_y == 0.0, s1, (1.0 + s1) - e_y)
        dz_y = e_y * (x_y * (k0 + k1 * c_y) + k3 * c_y + k2) + dg_r * scale * one_minus_p
        tl.debug_barrier()
        tl.store(out + r * out_row + target * out_column, dz_y.to(out.dtype.element_ty))
