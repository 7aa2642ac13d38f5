r"""Rows whose logits are made here, a chunk at a time, from the hidden states h and the output layer (W, b).

    a = hWᵀ + b      z = a, or κ tanh(a/κ) under a soft cap κ      F(z) = (entropy, logprob, logsumexp) of softmax(z/τ)

With s = dz/da = 1 − (z/κ)² (1 without a soft cap) and a dot for the tangent along (ḣ, Ẇ, ḃ):
    ȧ = ḣWᵀ + hẆᵀ + ḃ      ż = s ȧ      ṡ = −(2z/κ²) ż
    second order along u and v:   a_uv = h_u W_vᵀ + h_v W_uᵀ      z_uv = s a_uv − (2z/κ²) s a_u a_v
    cotangents, from dz of the row functions:   da = s dz      dh = da W      dW = daᵀ h      db = Σ da
    their tangents:   ḋa = s ḋz + ṡ dz      ḋh = ḋa W + da Ẇ      ḋW = ḋaᵀ h + daᵀ ḣ      ḋb = Σ ḋa

Never more than `workspace` bytes of logits, tangents and cotangents exist at once. There are two ways to cut them. *Chunks* are rows of
all columns, which any file of `ops` can work on (`rows`, the one for the device). *Tiles* are columns of many rows, in the order of the
columns: W is read once, dW is written once, and a tile is still in the cache when its rows are summed. That is how values, tangents and the
gradient of values go on the CPU, where `tiles` carries what is known of a row from tile to tile.
Products are the library's. Logits have the dtype of h, as the layer itself would give them; sums over rows (dW, db) or over tiles (dh)
are kept in float32 or wider (docs/theory.md, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, tiles
from .reference import RowValues, compute_dtype

TILE_COLUMNS = 4096
TILE_ROWS = 1024


class Head(NamedTuple):
    """Hidden states [N, D], weight [V, D] and bias [V] of an output layer; or a tangent or gradient of each, None for zero."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Point(NamedTuple):
    """Where the functions of this file are evaluated, and with what."""

    head: Head
    targets: Tensor  # [N], −1 where there is none
    temperature: Tensor  # [N]
    softcap: float | None
    workspace: int  # bytes
    rows: ModuleType  # ops.cpu, ops.reference, ...


def linear_values(x: Point) -> RowValues:
    """F at z(h, W, b), each [N], in nats."""
    return linear_values_and_state(x)[0]


def linear_values_and_state(x: Point) -> tuple[RowValues, Tensor]:
    """F, and the state of the rows that `linear_cotangents` can take over, [N, 3]; [N, 0] where they are not carried."""
    if _carried(x):
        carry, z_y = (
            tiles.carry(len(x.targets), 0),
            x.temperature.new_zeros(len(x.targets), dtype=torch.float64),
        )
        for b, c, z in _tiles(x, 1):
            tiles.add_values(z, x.temperature[b], carry[b])
            _pick(z_y, x.targets, b, c, z)
        return tiles.values(carry, z_y, x.targets, x.temperature, _dtype(x)), tiles.state(
            carry, x.temperature
        )
    out = _empty(x)
    for b, z in _chunks(x, 1):
        _put(out, b, x.rows.row_values(z, x.targets[b], x.temperature[b]))
    return out, out.entropy.new_empty(len(x.targets), 0)


def linear_tangents(x: Point, v: Head) -> RowValues:
    """F'(z)·ż, each [N], nats per unit of the tangent v."""
    if _carried(x):
        return linear_values_and_tangents(x, v)[1]
    out = _empty(x)
    for b, z, dz in _chunks(x, 2):
        _put(out, b, x.rows.row_tangents(z, _tangent(x, v, b, z, dz), x.targets[b], x.temperature[b]))
    return out


def linear_values_and_tangents(x: Point, v: Head) -> tuple[RowValues, RowValues]:
    """F and F'(z)·ż of the same logits, made once."""
    y, tau = x.targets, x.temperature
    if _carried(x):
        carry = tiles.carry(len(y), 1)
        z_y, dz_y = tau.new_zeros(2, len(y), dtype=torch.float64)
        for b, c, z, dz in _tiles(x, 2):
            tiles.add_tangents(z, _tangent(x, v, b, z, dz, c), tau[b], carry[b])
            _pick(z_y, y, b, c, z)
            _pick(dz_y, y, b, c, dz)
        return tiles.values(carry, z_y, y, tau, _dtype(x)), tiles.tangents(
            carry, dz_y, y, tau, x.temperature.dtype
        )
    out, d_out = _empty(x), _empty(x)
    for b, z, dz in _chunks(x, 2):
        _put(out, b, x.rows.row_values(z, y[b], tau[b]))
        _put(d_out, b, x.rows.row_tangents(z, _tangent(x, v, b, z, dz), y[b], tau[b]))
    return out, d_out


def linear_second_tangents(x: Point, u: Head, v: Head) -> RowValues:
    """F''(z)[z_u, z_v] + F'(z)·z_uv, each [N]: the second derivative of F along u and v."""
    out = _empty(x)
    for b, z, du, dv, spare in _chunks(x, 4):
        _tangent(x, u, b, z, du)
        _tangent(x, v, b, z, dv)
        second = x.rows.row_second_tangents(z, du, dv, x.targets[b], x.temperature[b])
        if _mixed(x, u, v, b, z, du, dv, spare):
            first = x.rows.row_tangents(z, spare, x.targets[b], x.temperature[b])
            second = RowValues(*(p + q for p, q in zip(second, first, strict=True)))
        _put(out, b, second)
    return out


def linear_cotangents(
    x: Point, weights: tuple[Tensor, ...], wanted: tuple[bool, bool, bool], state: Tensor | None = None
) -> Head:
    """The gradient of Σ (q·H + g·logprob + l·logsumexp) with respect to (h, W, b), where wanted; `state` as the values gave it."""
    if state is not None and state.shape[1]:
        return _tiled_cotangents(x, weights, wanted, state)
    out = _zeros(x, wanted)
    for b, z, *spare in _chunks(x, 1 + (x.softcap is not None), sums=True):
        da = spare[0] if spare else z  # without a soft cap the logits are not needed again
        x.rows.row_cotangents(z, x.targets[b], x.temperature[b], *(w[b] for w in weights), out=da)
        if x.softcap is not None:
            da *= _slope(z, x.softcap)
        _pull(out, x.head, b, da)
    return _in_dtype(out, x.head)


def _tiled_cotangents(
    x: Point, weights: tuple[Tensor, ...], wanted: tuple[bool, bool, bool], state: Tensor
) -> Head:
    """`linear_cotangents` by tiles: dW is written once, tile by tile; a target counts in its own tile, and as −g p in all others."""
    h, W, bias = x.head
    assert h is not None and W is not None
    N, wide = len(h), compute_dtype(h.dtype)
    q, g, l = weights  # noqa: E741
    g = torch.where(x.targets < 0, 0.0, g)
    new = torch.empty_like if N else torch.zeros_like
    dh = torch.zeros_like(h, dtype=wide) if wanted[0] else None
    dW = new(W) if wanted[1] else None
    db = new(bias) if wanted[2] and bias is not None else None
    d_tile, d_bias = torch.empty(0), torch.empty(0)
    for b, c, z, *spare in _tiles(x, 1 + (x.softcap is not None)):
        da = spare[0] if spare else z
        y = x.targets[b] - c.start
        elsewhere = (y < 0) | (y >= z.shape[1])
        y, rest = torch.where(elsewhere, -1, y), torch.where(elsewhere, l[b] - g[b], l[b])
        tiles.cotangents(z, y, x.temperature[b], q[b], g[b], rest, state=state[b], out=da)
        if x.softcap is not None:
            da *= _slope(z, x.softcap)
        if dh is not None:
            _add_product(dh[b], da, W[c])
        if dW is not None:
            if da.dtype == wide or len(da) == N:
                torch.addmm(dW[c], da.t(), h[b], beta=int(b.start > 0), out=dW[c])
            else:  # 16 bits and more rows to come
                part = da.t() @ h[b]
                d_tile = d_tile.add_(part) if b.start else part.to(wide)
                dW[c] = d_tile
        if db is not None:
            part = da.sum(0, dtype=wide)
            d_bias = d_bias.add_(part) if b.start else part
            db[c] = d_bias
    return _in_dtype(Head(dh, dW, db), x.head)


def linear_cotangent_tangents(
    x: Point,
    v: Head,
    weights: tuple[Tensor, ...],
    d_weights: tuple[Tensor, ...],
    wanted: tuple[bool, bool, bool],
) -> Head:
    """The tangent of `linear_cotangents` along v and the weights' tangents (q̇, ġ, l̇)."""
    out = _zeros(x, wanted)
    for b, z, dz, da in _chunks(x, 3, sums=True):
        y, tau = x.targets[b], x.temperature[b]
        q, dq = tuple(w[b] for w in weights), tuple(w[b] for w in d_weights)
        _tangent(x, v, b, z, dz)
        x.rows.row_cotangents(z, y, tau, *q, out=da)
        if x.softcap is None:
            d_da = x.rows.row_cotangent_tangents(z, dz, y, tau, q, dq, out=dz)
        else:
            slope = _slope(z, x.softcap)
            d_da = x.rows.row_cotangent_tangents(z, dz, y, tau, q, dq).mul_(slope)
            d_da += dz.mul_(z).mul_(-2 / x.softcap**2).mul_(da)
            da *= slope
        _pull(out, Head(v.hidden, v.weight, None), b, da)  # da Ẇ and daᵀ ḣ
        _pull(out, x.head, b, d_da)
    return _in_dtype(out, x.head)


def _chunks(x: Point, buffers: int, *, sums: bool = False) -> Iterator[Any]:
    """(rows, their logits, further buffers of that size), allocated once for all chunks: at most 7/8 of `workspace` bytes.

    The rest is for what the library's products allocate on their own. On the CPU products run at full speed from 256 rows on and fresh
    memory costs time, so a chunk is no larger; but a gradient of the weight is read and written once a chunk (`sums`).
    """
    h, W, bias = x.head
    assert h is not None and W is not None
    row = max(1, _held(x, buffers) * W.shape[0] * h.element_size())
    size = max(1, min(len(h), x.workspace * 7 // 8 // row))
    if h.device.type == "cpu" and not sums:
        size = min(size, 256)
    memory = h.new_empty((buffers, size, W.shape[0]))
    for start in range(0, len(h), size):
        b = slice(start, min(start + size, len(h)))
        z, *spare = (m[: b.stop - b.start] for m in memory)
        _logits(x, b, slice(0, W.shape[0]), z)
        yield b, z, *spare


def _tiles(x: Point, buffers: int) -> Iterator[Any]:
    """(rows, columns, their logits, further buffers of that size), columns in order and all rows of them before the next.

    A tile has 4096 columns, at which the products are at full speed and a row is worked through in whole parts (`CHUNK` in csrc), and
    as many rows as fit 7/8 of `workspace` with two buffers, products in 16 bits that wait to be added included. Its shape depends on
    nothing else: the state of a row belongs to logits of certain bits, and products of the same shapes make the same again.
    """
    h, W, _ = x.head
    assert h is not None and W is not None and buffers <= 2
    N, (V, D) = len(h), W.shape
    size, budget = h.element_size(), x.workspace * 7 // 8
    per_row, per_column = (D * size, D * (size + 4)) if size == 2 else (0, 0)
    width = min(V, TILE_COLUMNS)
    fit = (budget - width * per_column) // (width * _held(x, 2) * size + per_row)
    height = max(1, min(N, TILE_ROWS, fit))
    memory = h.new_empty((buffers, height * width))
    for left in range(0, V, width):
        c = slice(left, min(left + width, V))
        for top in range(0, N, height):
            b = slice(top, min(top + height, N))
            shape = (b.stop - top, c.stop - left)
            z, *spare = (m[: shape[0] * shape[1]].view(shape) for m in memory)
            _logits(x, b, c, z)
            yield b, c, z, *spare


def _dtype(x: Point) -> torch.dtype:
    assert x.head.hidden is not None
    return x.head.hidden.dtype


def _held(x: Point, buffers: int) -> int:
    """How many arrays as large as a chunk or tile exist at once.

    `buffers`; on the CPU, in 16 bits, each once more, which oneDNN may lay out anew; under a soft cap the slope and one more.
    """
    relaid = x.rows is cpu and _dtype(x).itemsize == 2
    return buffers * (1 + relaid) + 2 * (x.softcap is not None)


def _carried(x: Point) -> bool:
    return x.rows is cpu and tiles.available()


def _logits(x: Point, b: slice, c: slice, z: Tensor) -> None:
    """The rows b and columns c of κ tanh((hWᵀ + b)/κ), into z."""
    h, W, bias = x.head
    assert h is not None and W is not None
    if bias is None:
        torch.mm(h[b], W[c].t(), out=z)
    else:
        torch.addmm(bias[c], h[b], W[c].t(), out=z)
    if x.softcap is not None:
        z.div_(x.softcap).tanh_().mul_(x.softcap)


def _pick(out: Tensor, targets: Tensor, b: slice, c: slice, z: Tensor) -> None:
    """out[r] = z[r, y_r] for the rows whose target is among the columns of this tile."""
    y = targets[b] - c.start
    here = (y >= 0) & (y < z.shape[1])
    found = z.gather(1, y.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
    out[b] = torch.where(here, found.to(out.dtype), out[b])


def _slope(z: Tensor, softcap: float) -> Tensor:
    """dz/da = 1 − (z/κ)², as a product that keeps its digits near the cap."""
    ratio = z / softcap
    slope = 1 - ratio
    return slope.mul_(ratio.add_(1))


def _tangent(x: Point, v: Head, b: slice, z: Tensor, dz: Tensor, c: slice = slice(None)) -> Tensor:
    """ż = s(ḣWᵀ + hẆᵀ + ḃ) of the rows b and columns c, into dz."""
    h, W, _ = x.head
    assert h is not None and W is not None
    started = v.bias is not None
    if v.bias is not None:
        dz.copy_(v.bias[c])
    for left, right in ((v.hidden, W), (h, v.weight)):
        if left is not None and right is not None:
            torch.addmm(dz, left[b], right[c].t(), beta=int(started), out=dz)
            started = True
    if not started:
        dz.zero_()
    return dz if x.softcap is None else dz.mul_(_slope(z, x.softcap))


def _mixed(x: Point, u: Head, v: Head, b: slice, z: Tensor, du: Tensor, dv: Tensor, out: Tensor) -> bool:
    """z_uv = s(h_u W_vᵀ + h_v W_uᵀ) − (2z/κ²) s a_u a_v, into `out`; false where it is zero. du and dv are s a_u and s a_v."""
    pairs = [(first.hidden, second.weight) for first, second in ((u, v), (v, u))]
    products = [(h, W) for h, W in pairs if h is not None and W is not None]
    for i, (h, W) in enumerate(products):
        torch.addmm(out, h[b], W.t(), beta=int(i > 0), out=out)
    if x.softcap is None:
        return bool(products)
    slope = _slope(z, x.softcap)
    if products:
        out *= slope
    else:
        out.zero_()
    # at the cap itself s is 0, and so are s a_u and s a_v: z no longer moves
    slope = torch.where(slope > 0, dv / slope, 0.0)
    out.addcmul_(slope.mul_(z), du, value=-2 / x.softcap**2)
    return True


def _pull(out: Head, head: Head, b: slice, da: Tensor) -> None:
    """Add da W to dh, daᵀ h to dW and Σ da to db, where wanted and where `head` has the factor."""
    if out.hidden is not None and head.weight is not None:
        out.hidden[b].addmm_(da, head.weight)
    if out.weight is not None and head.hidden is not None:
        _add_product(out.weight, da.t(), head.hidden[b])
    if out.bias is not None and head.bias is not None:
        out.bias.add_(da.sum(0, dtype=out.bias.dtype))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, where out may be wider."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


def _zeros(x: Point, wanted: tuple[bool, bool, bool]) -> Head:
    h, W, bias = x.head
    assert h is not None and W is not None
    wide = compute_dtype(h.dtype)
    return Head(
        torch.zeros_like(h) if wanted[0] else None,
        torch.zeros_like(W, dtype=wide) if wanted[1] else None,
        torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None,
    )


def _in_dtype(out: Head, like: Head) -> Head:
    return Head(*(None if o is None or t is None else o.to(t.dtype) for o, t in zip(out, like, strict=True)))


def _empty(x: Point) -> RowValues:
    h = x.head.hidden
    assert h is not None
    return RowValues(*(h.new_empty(len(h), dtype=compute_dtype(h.dtype)) for _ in range(3)))


def _put(out: RowValues, b: slice, part: RowValues) -> None:
    for whole, piece in zip(out, part, strict=True):
        whole[b] = piece
