"""The row functions inside `torch.compile`: operators that the compiler takes as they are, with their gradient.

The compiler cannot look into C++ or Triton, and drops the forward rule of an autograd Function without a word. So inside a compiled
region the public functions call operators registered here, which have values, a gradient, and nothing else:

    values, gradient             one operator each in the compiled graph, no graph break
    torch.func in or around it   the compiler or the dispatcher raises
    dual numbers                 refused while tracing (`refuse_dual_numbers`); the region then runs uncompiled, or raises with fullgraph
    gradients of gradients       the compiler raises

How an operator gets its gradient: its implementation at the Autograd key is an autograd Function, which the compiler traces as far as the
operators inside (docs/architecture.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from entropy_kernels.ops import linear
from entropy_kernels.ops.linear import Head, Point
from entropy_kernels.ops.reference import compute_dtype

from .rows import row_functions

_NAME = "entropy_kernels_compiled"
_library = torch.library.Library(_NAME, "FRAGMENT")
_ops: Any = getattr(torch.ops, _NAME)


def refuse_dual_numbers(name: str) -> None:
    """Raise where tangents of dual numbers would get lost. The compiler guards on the level, so a change of it is seen.

    Raises:
        NotImplementedError: while a `torch.autograd.forward_ad.dual_level` is entered.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{name} inside torch.compile has no forward-mode derivative, and a dual level is entered. Call it outside the compiled region."
        )


def _three(like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape[0], dtype=compute_dtype(like.dtype)) for _ in range(3))


def _defined(schema: str, real: Any, fake: Any, differentiable: Any = None) -> None:
    """One operator: its schema, what it computes, the shapes of that, and its rule."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, real, key)
    torch.library.register_fake(f"{_NAME}::{name}", fake, lib=_library)
    if differentiable is not None:
        _library.impl(name, differentiable, "Autograd")


class _Gradient(Function):
    """A gradient that refuses to be differentiated: a bare operator would pass for a constant."""

    @staticmethod
    def forward(ctx: Any, op: Any, *inputs: Any) -> Any:
        found = op(*inputs)
        return tuple(found) if isinstance(found, list) else found

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "entropy and logprob have no second derivative inside torch.compile. Call the function outside the compiled region."
        )


# --- from logits --------------------------------------------------------------------------------------------


def _row_values(z: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    ops = row_functions(z.device)
    if hasattr(ops, "row_values_and_state"):
        values, state = ops.row_values_and_state(z, y, tau)
    else:
        values, state = ops.row_values(z, y, tau), z.new_empty(len(z), 0, dtype=compute_dtype(z.dtype))
    return (*values, state)


def _row_values_fake(z: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    kept = 3 if hasattr(row_functions(z.device), "row_values_and_state") else 0
    return (*_three(z), z.new_empty(z.shape[0], kept, dtype=compute_dtype(z.dtype)))


def _row_cotangents(z: Tensor, y: Tensor, tau: Tensor, state: Tensor, *w: Tensor) -> Tensor:
    options = {"state": state} if state.shape[1] else {}
    return row_functions(z.device).row_cotangents(z, y, tau, *w, **options)


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        *values, state = _ops.row_values(z, y, tau)
        ctx.save_for_backward(z, y, tau, state)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, q: Tensor, g: Tensor, l: Tensor) -> Any:  # noqa: E741
        return _Gradient.apply(_ops.row_cotangents, *ctx.saved_tensors, q, g, l), None, None


_defined(
    "row_values(Tensor z, Tensor y, Tensor tau) -> (Tensor, Tensor, Tensor, Tensor)",
    _row_values,
    _row_values_fake,
)
_defined(
    "row_cotangents(Tensor z, Tensor y, Tensor tau, Tensor state, Tensor q, Tensor g, Tensor l) -> Tensor",
    _row_cotangents,
    lambda z, *_: torch.empty(z.shape, dtype=z.dtype, device=z.device),
)
_defined(
    "rows(Tensor z, Tensor y, Tensor tau) -> (Tensor, Tensor, Tensor)",
    lambda z, y, tau: tuple(row_functions(z.device).row_values(z, y, tau)),
    lambda z, y, tau: _three(z),
    lambda z, y, tau: _Rows.apply(z, y, tau),
)


def rows(z: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(entropy, logprob, logsumexp) [R] of logits [R, V] in a compiled region, with a gradient."""
    return _ops.rows(z, y, tau)


# --- from hidden states -------------------------------------------------------------------------------------

_HEAD = "Tensor h, Tensor W, Tensor? b, Tensor y, Tensor tau, float? softcap, int workspace"


def _point(
    h: Tensor, W: Tensor, b: Tensor | None, y: Tensor, tau: Tensor, softcap: float | None, workspace: int
) -> Point:
    return Point(Head(h, W, b), y, tau, softcap, workspace, row_functions(h.device))


def _head_cotangents(*inputs: Any) -> list[Tensor]:
    *head, q, g, l, wanted = inputs  # noqa: E741
    found = linear.linear_cotangents(_point(*head), (q, g, l), tuple(wanted))
    return [x for x in found if x is not None]


def _head_cotangents_fake(*inputs: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, wanted in zip(inputs[:3], inputs[-1], strict=True) if wanted]


class _Head(Function):
    @staticmethod
    def forward(ctx: Any, *head: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*head[:5])
        ctx.constants = head[5:]
        return _ops.head_values(*head)

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:3])
        found = iter(_Gradient.apply(_ops.head_cotangents, *ctx.saved_tensors, *ctx.constants, *w, wanted))
        return *(next(found) if x else None for x in wanted), None, None, None, None


def _head_values(*head: Any) -> tuple[Tensor, ...]:
    return tuple(linear.linear_values(_point(*head)))


_defined(f"head_values({_HEAD}) -> (Tensor, Tensor, Tensor)", _head_values, lambda h, *_: _three(h))
_defined(
    f"head_cotangents({_HEAD}, Tensor q, Tensor g, Tensor l, bool[] wanted) -> Tensor[]",
    _head_cotangents,
    _head_cotangents_fake,
)
_defined(
    f"head({_HEAD}) -> (Tensor, Tensor, Tensor)",
    _head_values,
    lambda h, *_: _three(h),
    lambda *head: _Head.apply(*head),
)


def head(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(entropy, logprob, logsumexp) [R] from (h, W, b, y, tau, softcap, workspace) in a compiled region, with a gradient."""
    return _ops.head(*arguments)
