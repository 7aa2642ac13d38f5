r"""Rows in a kept set S and its tail T: the rules of differentiation of F(z) = (entropy, logprob, log-odds λ, tail entropy) at a fixed S.

The algebra is that of `rows`, with four numbers a row instead of three, and the numbers come from `ops.parts` (C++ on the CPU, Triton on
a GPU): five autograd Functions close first and second derivatives, the Hessian of wᵀF is symmetric, and each rule's body calls another
Function that has a rule of its own. S goes in as one threshold a row or as a bool of the logits' shape, and has no derivative.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from entropy_kernels.ops import cpu, cpu_parts, cuda, parts, reference, truncated

from .rows import _chosen, _keep, _over_rows, no_third, row_functions


def part_functions(device: torch.device) -> ModuleType:
    """The file for rows in two parts beside that for whole rows on a device."""
    ops = row_functions(device)
    if ops is cpu:
        return cpu_parts
    if ops is reference:
        return parts
    from entropy_kernels.ops import triton_parts

    return triton_parts


def set_functions(device: torch.device) -> ModuleType:
    """What finds kept sets on a device: CUDA C++ where it can be had, the file of its row functions, or plain torch."""
    if device.type == "cuda" and not _chosen and cuda.available():
        return cuda
    ops = row_functions(device)
    return ops if hasattr(ops, "kept_set") else truncated


class _Values(Function):
    """(z, S, y, τ) → F [R] each, |S|, and what the gradient may take over from them."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Values, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, kept: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        return tuple(part_functions(z.device).part_values(z, kept, y, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[4:])
        _keep(ctx, *inputs, output[5])

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, *_: Any) -> Any:
        z, kept, y, tau, _state = ctx.saved_tensors
        return (*_Tangents.apply(z, kept, dz, y, tau), None, None)

    @staticmethod
    def backward(ctx: Any, *w: Any) -> Any:
        z, kept, y, tau, state = ctx.saved_tensors
        return _Cotangents.apply(z, kept, y, tau, state, *w[:4]), None, None, None


class _Searched(Function):
    """(z, y, τ, k, p, tail) → the same of the set that top-k and top-p define, which is found on the way; then its threshold.

    Without `tail` λ and the tail entropy are those of a tail that is empty: not to be used.
    """

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        rows = list(zip(inputs[:5], in_dims[:5], strict=True))
        size = next(x.shape[d] for x, d in rows if d is not None)
        flat = [(x.expand(size, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1) for x, d in rows]
        out = _Searched.apply(*flat, inputs[5])
        return tuple(x.unflatten(0, (size, -1)) for x in out), (0,) * len(out)

    @staticmethod
    def forward(z: Tensor, y: Tensor, tau: Tensor, k: Tensor, p: Tensor, tail: bool) -> tuple[Tensor, ...]:
        ops, sets = part_functions(z.device), set_functions(z.device)
        if ops is cpu_parts:
            values, threshold = cpu_parts.truncated_parts(z, y, tau, k, p, tail=tail)
            return (*values, threshold)
        threshold = (sets if sets is cuda else ops).thresholds(z, tau, k, p)
        return (*ops.part_values(z, threshold, y, tau), threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[4:])
        z, y, tau = inputs[:3]
        _keep(ctx, z, output[6], y, tau, output[5])

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, *_: Any) -> Any:
        z, kept, y, tau, _state = ctx.saved_tensors
        return (*_Tangents.apply(z, kept, dz, y, tau), None, None, None)

    @staticmethod
    def backward(ctx: Any, *w: Any) -> Any:
        z, kept, y, tau, state = ctx.saved_tensors
        return _Cotangents.apply(z, kept, y, tau, state, *w[:4]), None, None, None, None, None


class _Tangents(Function):
    """F'(z)·ż."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Tangents, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        return tuple(part_functions(z.device).part_tangents(z, kept, dz, y, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, _kept: Any, ddz: Tensor | None, *_: Any) -> Any:
        z, kept, dz, y, tau = ctx.saved_tensors
        # F''(z)[u, ż] + F'(z)·z̈; either input may be without a tangent
        terms = []
        if du is not None:
            terms.append(_Second.apply(z, kept, du, dz, y, tau))
        if ddz is not None:
            terms.append(_Tangents.apply(z, kept, ddz, y, tau))
        return terms[0] if len(terms) == 1 else tuple(a + b for a, b in zip(*terms, strict=True))

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> Any:
        z, kept, dz, y, tau = ctx.saved_tensors
        grad_z = grad_dz = None
        if ctx.needs_input_grad[0]:
            grad_z = _CotangentTangents.apply(z, kept, dz, y, tau, *w, *_zeros(w))
        if ctx.needs_input_grad[2]:
            grad_dz = _Cotangents.apply(z, kept, y, tau, _no_state(z), *w)
        return grad_z, None, grad_dz, None, None


class _Cotangents(Function):
    """wᵀF'(z), [R, V]."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Cotangents, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, kept: Tensor, y: Tensor, tau: Tensor, state: Tensor, *w: Tensor) -> Tensor:
        q, g, l, h = w  # noqa: E741
        options = {"state": state} if state.shape[1] else {}
        return part_functions(z.device).part_cotangents(z, kept, y, tau, (q, g, l, h), **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    def jvp(ctx: Any, dz: Any, _kept: Any, _y: Any, _tau: Any, _state: Any, *dw: Any) -> Any:
        z, kept, y, tau, _, *w = ctx.saved_tensors
        dz = torch.zeros_like(z) if dz is None else dz
        moved = (torch.zeros_like(x) if t is None else t for x, t in zip(w, dw, strict=True))
        return _CotangentTangents.apply(z, kept, dz, y, tau, *w, *moved)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        z, kept, y, tau, _, *w = ctx.saved_tensors
        grad_z, weights = None, (None, None, None, None)
        if ctx.needs_input_grad[0]:
            grad_z = _CotangentTangents.apply(z, kept, u, y, tau, *w, *_zeros(w))
        if any(ctx.needs_input_grad[5:]):
            weights = _Tangents.apply(z, kept, u, y, tau)
        return grad_z, None, None, None, None, *weights


class _CotangentTangents(Function):
    """The tangent of `_Cotangents` along (ż, ẇ), [R, V]: a second derivative already."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_CotangentTangents, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, kept: Tensor, dz: Tensor, y: Tensor, tau: Tensor, *w_dw: Tensor) -> Tensor:
        return part_functions(z.device).part_cotangent_tangents(z, kept, dz, y, tau, w_dw[:4], w_dw[4:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    jvp = staticmethod(no_third)
    backward = staticmethod(no_third)


class _Second(Function):
    """F''(z)[u, ż]."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Second, in_dims, inputs)

    @staticmethod
    def forward(
        z: Tensor, kept: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(part_functions(z.device).part_second_tangents(z, kept, du, dz, y, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    jvp = staticmethod(no_third)
    backward = staticmethod(no_third)


def _zeros(w: Any) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x) for x in w)


def _no_state(z: Tensor) -> Tensor:
    return z.new_empty(len(z), 0, dtype=torch.float64)
