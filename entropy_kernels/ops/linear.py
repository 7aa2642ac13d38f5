r"""Rows whose logits are made here, a chunk at a time, from the hidden states h and the output layer (W, b).

    a = hWᵀ + b      z = a, or κ tanh(a/κ) under a soft cap κ      F(z) = (entropy, logprob, logsumexp) of softmax(z/τ)

With s = dz/da = 1 − (z/κ)² (1 without a soft cap) and a dot for the tangent along (ḣ, Ẇ, ḃ):
    ȧ = ḣWᵀ + hẆᵀ + ḃ      ż = s ȧ      ṡ = −(2z/κ²) ż
    second order along u and v:   a_uv = h_u W_vᵀ + h_v W_uᵀ      z_uv = s a_uv − (2z/κ²) s a_u a_v
    cotangents, from dz of the row functions:   da = s dz      dh = da W      dW = daᵀ h      db = Σ da
    their tangents:   ḋa = s ḋz + ṡ dz      ḋh = ḋa W + da Ẇ      ḋW = ḋaᵀ h + daᵀ ḣ      ḋb = Σ ḋa

Never more than `workspace` bytes of logits, tangents and cotangents exist at once: the rows of a chunk are chosen so. Products are the
library's; what happens to a row of logits is asked of `rows`, the file of `ops` for the device. Logits have the dtype of h, as
the layer itself would give them; sums over rows (dW, db) are kept in float32 or wider (docs/theory.md, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import RowValues, compute_dtype


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
    out = _empty(x)
    for b, z in _chunks(x, 1):
        _put(out, b, x.rows.row_values(z, x.targets[b], x.temperature[b]))
    return out


def linear_tangents(x: Point, v: Head) -> RowValues:
    """F'(z)·ż, each [N], nats per unit of the tangent v."""
    out = _empty(x)
    for b, z, dz in _chunks(x, 2):
        _put(out, b, x.rows.row_tangents(z, _tangent(x, v, b, z, dz), x.targets[b], x.temperature[b]))
    return out


def linear_values_and_tangents(x: Point, v: Head) -> tuple[RowValues, RowValues]:
    """F and F'(z)·ż of the same logits, made once."""
    out, d_out = _empty(x), _empty(x)
    for b, z, dz in _chunks(x, 2):
        y, tau = x.targets[b], x.temperature[b]
        _put(out, b, x.rows.row_values(z, y, tau))
        _put(d_out, b, x.rows.row_tangents(z, _tangent(x, v, b, z, dz), y, tau))
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


def linear_cotangents(x: Point, weights: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]) -> Head:
    """The gradient of Σ (q·H + g·logprob + l·logsumexp) with respect to (h, W, b), where wanted."""
    out = _zeros(x, wanted)
    for b, z, *spare in _chunks(x, 1 + (x.softcap is not None), sums=True):
        da = spare[0] if spare else z  # without a soft cap the logits are not needed again
        x.rows.row_cotangents(z, x.targets[b], x.temperature[b], *(w[b] for w in weights), out=da)
        if x.softcap is not None:
            da *= _slope(z, x.softcap)
        _pull(out, x.head, b, da)
    return _in_dtype(out, x.head)


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
            d_da = x.rows.row_cotangent_tangents(z, dz, y, tau, q, dq) * slope
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
    temporaries = 0 if x.softcap is None else 2  # the slope, and a product with it
    row = max(1, (buffers + temporaries) * W.shape[0] * h.element_size())
    size = max(1, min(len(h), x.workspace * 7 // 8 // row))
    if h.device.type == "cpu" and not sums:
        size = min(size, 256)
    memory = h.new_empty((buffers, size, W.shape[0]))
    for start in range(0, len(h), size):
        b = slice(start, min(start + size, len(h)))
        z, *spare = (m[: b.stop - b.start] for m in memory)
        if bias is None:
            torch.mm(h[b], W.t(), out=z)
        else:
            torch.addmm(bias, h[b], W.t(), out=z)
        if x.softcap is not None:
            z.div_(x.softcap).tanh_().mul_(x.softcap)
        yield b, z, *spare


def _slope(z: Tensor, softcap: float) -> Tensor:
    """dz/da = 1 − (z/κ)², as a product that keeps its digits near the cap."""
    return (1 - z / softcap) * (1 + z / softcap)


def _tangent(x: Point, v: Head, b: slice, z: Tensor, dz: Tensor) -> Tensor:
    """ż = s(ḣWᵀ + hẆᵀ + ḃ), into dz."""
    h, W, _ = x.head
    assert h is not None and W is not None
    started = v.bias is not None
    if v.bias is not None:
        dz.copy_(v.bias)
    for left, right in ((v.hidden, W), (h, v.weight)):
        if left is not None and right is not None:
            torch.addmm(dz, left[b], right.t(), beta=int(started), out=dz)
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
        factor = head.hidden[b]
        if out.weight.dtype == da.dtype:
            out.weight.addmm_(da.t(), factor)
        else:
            out.weight.add_(da.t() @ factor)
    if out.bias is not None and head.bias is not None:
        out.bias.add_(da.sum(0, dtype=out.bias.dtype))


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
