r"""A Triton kernel for the thresholds of top-k and top-p: a search over order-preserving keys of the logits, nothing sorted.

A float read as an integer, with the lower bits of negative numbers turned round, keeps its order. With above(q) the number, or the mass,
of the tokens whose key is larger than q, a token is kept while above(its key) is short of the target; above falls as q rises, so the
threshold is the smallest integer q with above(q) < target. It need not be a token's key. Each read of the row tries three q and leaves a
quarter of the interval: 8 reads for 16-bit logits, up to 16 for float32, of a row that stays in the cache.

Numbers are exact. Masses are e^{(z − peak)/τ} summed in float32 down each of BLOCK columns, and in float64 across them, in one order:
a row's threshold depends on no other row. Where tokens lie within that rounding of the crossing, float64 may decide otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_kernels import _distance, _weight

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _key(z, SHIFT: tl.constexpr):
    """An integer of z's order; −0 and 0 are one number. SHIFT leaves out the bits that a narrower dtype does not have."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    """The number with that key."""
    bits = key << SHIFT
    return (bits ^ ((bits >> 31) & ((-1 << SHIFT) & 0x7FFFFFFF))).to(tl.float32, bitcast=True)


@triton.jit
def _row(z, start, V, z_column, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    at = z + column.to(tl.int64) * z_column
    return tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _mass(z_a, peak, tau_r):
    return _weight(_distance(z_a, peak, tau_r), tau_r, True)


@triton.jit
def _smallest(
    z, peak, tau_r, target, low, V, z_column, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The smallest q ≥ low with less than `target` above it, in number or in mass; none is above the peak."""
    high = _key(peak, SHIFT).to(tl.int64)
    low = low.to(tl.int64)
    while low < high:
        quarter = (high - low) >> 2
        q1 = (low + quarter).to(tl.int32)
        q2 = (low + ((high - low) >> 1)).to(tl.int32)
        q3 = tl.maximum((high - 1 - quarter).to(tl.int32), q2)
        above1 = tl.zeros([BLOCK], tl.float32 if MASS else tl.int32)
        above2 = above1
        above3 = above1
        for start in range(0, V, BLOCK):
            z_a = _row(z, start, V, z_column, BLOCK)
            key = _key(z_a, SHIFT)
            if MASS:
                e = _mass(z_a, peak, tau_r)
                above1 += tl.where(key > q1, e, 0.0)
                above2 += tl.where(key > q2, e, 0.0)
                above3 += tl.where(key > q3, e, 0.0)
            else:
                above1 += (key > q1).to(tl.int32)
                above2 += (key > q2).to(tl.int32)
                above3 += (key > q3).to(tl.int32)
        enough1 = tl.sum(above1.to(tl.float64), 0) < target
        enough2 = tl.sum(above2.to(tl.float64), 0) < target
        enough3 = tl.sum(above3.to(tl.float64), 0) < target
        w1, w2, w3 = q1.to(tl.int64), q2.to(tl.int64), q3.to(tl.int64)
        high, low = (
            tl.where(enough1, w1, tl.where(enough2, w2, tl.where(enough3, w3, high))),
            tl.where(enough1, low, tl.where(enough2, w1 + 1, tl.where(enough3, w2 + 1, w3 + 1))),
        )
    return low


@triton.jit
def kept_thresholds(z, tau, k, p, threshold, V, z_row, z_column, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest kept logit of row r, or what lies between it and the next below; NaN for a row without a law."""
    r = tl.program_id(0).to(tl.int64)
    z += r * z_row
    tau_r = tl.load(tau + r)
    k_r = tl.load(k + r)
    p_r = tl.load(p + r)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        z_a = _row(z, start, V, z_column, BLOCK)
        broken += (z_a != z_a).to(tl.int32)
        best = tl.maximum(best, z_a)
    peak = tl.max(best, 0)
    t = peak + float("nan")
    lawful = (tl.sum(broken, 0) == 0) & (peak > float("-inf")) & (peak < float("inf"))
    if lawful & (tau_r > 0.0) & (tau_r < float("inf")):
        # narrower dtypes: the key of −∞, and one more
        low = tl.maximum(
            _key(tl.full([], LOWEST, tl.float32), SHIFT),
            _key(tl.full([], float("-inf"), tl.float32), SHIFT) + 1,
        )
        low = low.to(tl.int64)
        if k_r < V:
            low = _smallest(z, peak, tau_r, k_r.to(tl.float64), low, V, z_column, False, SHIFT, BLOCK)
        if p_r < 1.0:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                z_a = _row(z, start, V, z_column, BLOCK)
                total += tl.where(_key(z_a, SHIFT) >= low, _mass(z_a, peak, tau_r), 0.0)
            target = p_r * tl.sum(total.to(tl.float64), 0)
            low = _smallest(z, peak, tau_r, target, low, V, z_column, True, SHIFT, BLOCK)
        t = _logit(low.to(tl.int32), SHIFT)
    tl.store(threshold + r, t)
