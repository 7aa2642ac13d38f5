r"""Entropy and logprob from hidden states: the algebra of `rows` with the output layer inside.

With x = (h, W, b) in place of the logits, the same four kinds of function are closed under differentiation, for the same reasons: the
Hessian of wᵀF(z(x)) is symmetric, and each rule calls a Function that has rules of its own. Nothing the size of the logits is
kept for a derivative; they are made again from h and W (`ops/linear.py`), which is the price of one more product each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from entropy_kernels.ops import linear
from entropy_kernels.ops.linear import Head, Point

from .arguments import flat_targets, flat_temperature, vocabulary_size
from .rows import EntropyLogprob, no_third, row_functions

WORKSPACE_BYTES = 256 << 20
_Shared = tuple[Tensor, Tensor, float | None, int]  # targets, temperature, soft cap, workspace


def _point(head: tuple[Tensor, Tensor, Tensor | None], shared: _Shared) -> Point:
    y, tau, softcap, workspace = shared
    return Point(Head(*head), y, tau, softcap, workspace, row_functions(head[0].device))


def _one_by_one(function: type[Function], info: Any, in_dims: Any, inputs: Any) -> Any:
    """The vmap rule of every Function here: one call each, since a mapped weight cannot be more rows of one product."""
    calls = [
        function.apply(
            *(x.select(d, i) if isinstance(d, int) else x for x, d in zip(inputs, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    out = tuple(torch.stack(column) for column in zip(*calls, strict=True))
    return out, (0,) * len(out)


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], constants: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.constants = constants


def _scattered(found: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that were wanted, in their places."""
    rest = iter(found)
    return tuple(next(rest) if w else None for w in wanted)


def _filled(w: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Cotangents of three outputs, zero where there is none."""
    like = next(t for t in w if t is not None)
    return tuple(torch.zeros_like(like) if t is None else t for t in w)


class _Values(Function):
    """(h, W, b) → F, and the state of its rows, which spares the gradient a search and is a constant to everyone."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_Values, info, in_dims, inputs)

    @staticmethod
    def forward(h: Tensor, W: Tensor, b: Tensor | None, *shared: Any) -> tuple[Tensor, ...]:
        values, state = linear.linear_values_and_state(_point((h, W, b), shared))
        return *values, state

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[3])
        _keep(ctx, (*inputs[:5], output[3]), inputs[5:])

    @staticmethod
    def jvp(ctx: Any, dh: Any, dW: Any, db: Any, *_: Any) -> Any:
        h, W, b, y, tau, _state = ctx.saved_tensors
        return *_Tangents.apply(h, W, b, dh, dW, db, y, tau, *ctx.constants), None

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> Any:
        h, W, b, y, tau, state = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:3])
        found = _Cotangents.apply(h, W, b, *w[:3], y, tau, state, *ctx.constants, wanted)
        return *_scattered(found, wanted), None, None, None, None


class _ValuesAndTangents(Function):
    """(x, ẋ) → F, F'·ẋ from logits made once; the rules are those of the two."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_ValuesAndTangents, info, in_dims, inputs)

    @staticmethod
    def forward(h: Tensor, W: Tensor, b: Any, dh: Any, dW: Any, db: Any, *shared: Any) -> tuple[Tensor, ...]:
        values, tangents = linear.linear_values_and_tangents(_point((h, W, b), shared), Head(dh, dW, db))
        return *values, *tangents

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs[:8], inputs[8:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, *u: Any) -> Any:
        x, (y, tau) = ctx.saved_tensors[:3], ctx.saved_tensors[6:]
        moved = any(t is not None for t in u[:3])
        values = _Tangents.apply(*x, *u[:3], y, tau, *ctx.constants) if moved else (None,) * 3
        return *values, *_Tangents.jvp(ctx, *u)

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        x, (y, tau) = ctx.saved_tensors[:3], ctx.saved_tensors[6:]
        grads: list[Any] = [None] * 6
        wanted = tuple(ctx.needs_input_grad[:3])
        if any(t is not None for t in w[3:]):
            grads = list(_Tangents.backward(ctx, *_filled(w[3:]))[:6])
        if any(t is not None for t in w[:3]) and any(wanted):
            found = _Cotangents.apply(*x, *_filled(w[:3]), y, tau, None, *ctx.constants, wanted)
            for i, t in enumerate(_scattered(found, wanted)):
                grads[i] = t if grads[i] is None else t if t is None else grads[i] + t
        return *grads, None, None, None, None


class _Given(Function):
    """(x, F, F'·ẋ) → F, whose tangent at this level of forward mode is known already.

    Tangents of other levels are F's own, and the gradient goes by way of x: F itself is a constant to it.
    """

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_Given, info, in_dims, inputs)

    @staticmethod
    def forward(h: Tensor, W: Tensor, b: Any, y: Tensor, tau: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in rest[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, (*inputs[:5], *inputs[8:11]), inputs[11:])
        ctx.set_materialize_grads(False)  # no tangent is told from a tangent of zero

    @staticmethod
    def jvp(ctx: Any, *u: Any) -> Any:
        return u[5:8] if u[5] is not None else ctx.saved_tensors[5:]

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        h, W, b, y, tau = ctx.saved_tensors[:5]
        wanted = tuple(ctx.needs_input_grad[:3])
        found: tuple[Tensor, ...] = ()
        if any(wanted):
            found = _Cotangents.apply(h, W, b, *_filled(w), y, tau, None, *ctx.constants, wanted)
        return *_scattered(found, wanted), *(None,) * 10


def _values(h: Tensor, W: Tensor, b: Tensor | None, *shared: Any) -> tuple[Tensor, ...]:
    """F, and where forward mode is under way, its tangent from the same logits: a rule alone would make them again."""
    top = torch._C._functorch.peek_interpreter_stack()
    if (
        top is not None and top.key() != torch._C._functorch.TransformType.Jvp
    ):  # grad or vmap: no tangents to be seen
        return _Values.apply(h, W, b, *shared)
    duals = [None if t is None else unpack_dual(t) for t in (h, W, b)]
    tangents = [None if d is None else d.tangent for d in duals]
    if all(t is None for t in tangents):
        return _Values.apply(h, W, b, *shared)
    primals = [None if d is None else d.primal for d in duals]
    both = _ValuesAndTangents.apply(*primals, *tangents, *shared)
    return _Given.apply(h, W, b, *shared[:2], *both, *shared[2:])


class _Tangents(Function):
    """(x, ẋ) → F'·ẋ."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_Tangents, info, in_dims, inputs)

    @staticmethod
    def forward(h: Tensor, W: Tensor, b: Any, dh: Any, dW: Any, db: Any, *shared: Any) -> tuple[Tensor, ...]:
        return tuple(linear.linear_tangents(_point((h, W, b), shared), Head(dh, dW, db)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs[:8], inputs[8:])

    @staticmethod
    def jvp(ctx: Any, *u: Any) -> Any:
        x, v, (y, tau) = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
        terms = []  # d/dη F'(x + ηu)·(v + ηv̇) = F''(x)[u, v] + F'(x)·v̇
        if any(t is not None for t in u[:3]):
            terms.append(_Second.apply(*x, *u[:3], *v, y, tau, *ctx.constants))
        if any(t is not None for t in u[3:6]):
            terms.append(_Tangents.apply(*x, *u[3:6], y, tau, *ctx.constants))
        return terms[0] if len(terms) == 1 else tuple(p + q for p, q in zip(*terms, strict=True))

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> Any:
        x, v, (y, tau) = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
        grads: list[Any] = [None] * 6
        wanted_x, wanted_v = tuple(ctx.needs_input_grad[:3]), tuple(ctx.needs_input_grad[3:6])
        if any(wanted_x):
            zero = tuple(torch.zeros_like(t) for t in w)
            found = _CotangentTangents.apply(*x, *v, *w, *zero, y, tau, *ctx.constants, wanted_x)
            grads[:3] = _scattered(found, wanted_x)
        if any(wanted_v):
            found = _Cotangents.apply(*x, *w, y, tau, None, *ctx.constants, wanted_v)
            grads[3:] = _scattered(found, wanted_v)
        return *grads, None, None, None, None


class _Cotangents(Function):
    """(x, w) → the wanted parts of F'ᵀw."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_Cotangents, info, in_dims, inputs)

    @staticmethod
    def forward(h: Tensor, W: Tensor, b: Any, q: Tensor, g: Tensor, l: Tensor, *rest: Any) -> Any:  # noqa: E741
        y, tau, state, softcap, workspace, wanted = rest
        point = _point((h, W, b), (y, tau, softcap, workspace))
        found = linear.linear_cotangents(point, (q, g, l), wanted, state)
        return tuple(t for t in found if t is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs[:8], inputs[9:])

    @staticmethod
    def jvp(ctx: Any, *u: Any) -> Any:
        x, w, (y, tau) = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
        dw = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(w, u[3:6], strict=True))
        return _CotangentTangents.apply(*x, *u[:3], *w, *dw, y, tau, *ctx.constants)

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> Any:
        x, w, (y, tau) = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
        *constants, wanted = ctx.constants
        direction = _scattered(u, wanted)
        grads: list[Any] = [None] * 6
        wanted_x = tuple(ctx.needs_input_grad[:3])
        if any(wanted_x):
            zero = tuple(torch.zeros_like(t) for t in w)
            found = _CotangentTangents.apply(*x, *direction, *w, *zero, y, tau, *constants, wanted_x)
            grads[:3] = _scattered(found, wanted_x)
        if any(ctx.needs_input_grad[3:6]):
            grads[3:] = _Tangents.apply(*x, *direction, y, tau, *constants)
        return *grads, *(None,) * 6


class _CotangentTangents(Function):
    """(x, ẋ, w, ẇ) → the tangent of F'ᵀw."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_CotangentTangents, info, in_dims, inputs)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, v, w, dw, shared, wanted = (
            inputs[:3], inputs[3:6], inputs[6:9], inputs[9:12], inputs[12:16], inputs[16],
        )  # fmt: skip
        found = linear.linear_cotangent_tangents(_point(x, shared), Head(*v), w, dw, wanted)
        return tuple(t for t in found if t is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    jvp = staticmethod(no_third)
    backward = staticmethod(no_third)


class _Second(Function):
    """(x, u, v) → F''[u, v]."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_Second, info, in_dims, inputs)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, u, v, shared = inputs[:3], inputs[3:6], inputs[6:9], inputs[9:]
        return tuple(linear.linear_second_tangents(_point(x, shared), Head(*u), Head(*v)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    jvp = staticmethod(no_third)
    backward = staticmethod(no_third)


def linear_entropy_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    workspace: int = WORKSPACE_BYTES,
) -> EntropyLogprob:
    r"""`entropy_logprob` of the logits z = hWᵀ + b, soft-capped to κ tanh(z/κ), without ever holding all of them.

    Differentiable twice with respect to hidden, weight and bias in every mix of forward and reverse mode. Logits are made in chunks of
    rows, in the dtype of `hidden`, and made again for each derivative; a frozen weight costs nothing but its product (docs/theory.md,
    section 2).

    Args:
        hidden: [..., D], float64/32/16 or bfloat16.
        weight: [V, D], and bias: [V] or None, of the same dtype. The `weight` of a layer that LoRA wraps (peft) is that of its base: pass
            base.weight + scaling · B A, whose gradient reaches A and B.
        targets: [...], integer, or None for no logprob. Where it equals `ignore_index`, logprob is 0 with zero gradient.
        bias: see weight.
        temperature: τ > 0, a number or a tensor that broadcasts to [...]; not differentiable.
        softcap: κ > 0, applied before the temperature; None for none.
        ignore_index: the target that means "none".
        vocab_size: rows of the weight from here on are padding and take no part.
        workspace: bytes of logits, their tangents and cotangents that exist at once (one row's at least). Results and gradients are
            beside it, and what is summed up in float32 for 16-bit inputs: dh, and in tangents of gradients dW.

    Returns:
        EntropyLogprob(entropy, logprob, logsumexp), each [...], in nats; float64 for float64 input, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes, temperature, soft cap or targets that do not fit, or a sharded (DTensor) argument.
        NotImplementedError: a third derivative; forward mode inside a compiled region, where there are values and a gradient.
    """
    name = "linear_entropy_logprob"
    _check_tensors(name, hidden=hidden, weight=weight, bias=bias)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # as the layer itself would
        low = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    _check(hidden, weight, bias, softcap, workspace)
    shape, size = hidden.shape[:-1], vocabulary_size(name, weight.shape[0], vocab_size)
    y = flat_targets(name, targets, shape, size, ignore_index, hidden.device)
    tau = flat_temperature(name, temperature, hidden, shape)
    with torch.autocast(kind, enabled=False):
        if size < len(weight):  # a slice of all would have its gradient copied into one as large
            weight, bias = weight[:size], None if bias is None else bias[:size]
        head = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, y, tau, softcap, workspace)
        if torch.compiler.is_compiling():
            from . import compiled

            compiled.refuse_dual_numbers(name)
            entropy, logprob, logsumexp = compiled.head(*head)
        else:
            entropy, logprob, logsumexp, *_ = _values(*head)
    return EntropyLogprob(
        entropy.reshape(shape), None if targets is None else logprob.reshape(shape), logsumexp.reshape(shape)
    )


def _check_tensors(name: str, **given: Any) -> None:
    for what, x in given.items():
        if not isinstance(x, Tensor | None):
            raise ValueError(
                f"{name}: {what} is a {type(x).__name__}; expected a tensor. Of a layer pass its weight and bias; where LoRA wraps it, "
                "that weight is the base's alone, and the layer's is base.weight + scaling * lora_B.weight @ lora_A.weight."
            )


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, workspace: int
) -> None:
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for what, x in given.items():
        if hasattr(x, "placements"):
            raise ValueError(
                f"linear_entropy_logprob: {what} is a DTensor, which is not sharded here. Pass to_local() of a weight sharded by rows to "
                " vocab_parallel_linear_entropy_logprob, or gather it with full_tensor()."
            )
        if not x.is_floating_point() or x.dtype != hidden.dtype or x.device != hidden.device:
            raise ValueError(
                f"linear_entropy_logprob: {what} is {x.dtype} on {x.device}; expected one floating-point dtype and one device for hidden, "
                f"weight and bias (hidden: {hidden.dtype} on {hidden.device}). Convert it, or use torch.autocast."
            )
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_entropy_logprob: expected hidden [..., D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_entropy_logprob: expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"linear_entropy_logprob: softcap must be positive, or None for none, got {softcap}."
        )
    if workspace < 1:
        raise ValueError(
            f"linear_entropy_logprob: workspace must be a positive number of bytes, got {workspace}."
        )
