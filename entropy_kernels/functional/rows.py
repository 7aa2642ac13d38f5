r"""Every rule of differentiation, and the public row functions.

Four autograd Functions close the algebra of first and second derivatives of F(z) = (entropy, logprob, logsumexp):

    Values(z)                  = F(z), state                jvp → Tangents            backward → Cotangents
    Tangents(z, ż)             = F'(z)·ż                    jvp → Second + Tangents   backward → CotangentTangents, Cotangents
    Cotangents(z, w)           = wᵀF'(z)                    jvp → CotangentTangents   backward → CotangentTangents, Tangents
    CotangentTangents, Second  = the second derivatives     third derivatives raise

Two facts shape them. The Hessian of wᵀF is symmetric, so the backward of Cotangents along u is its own tangent along u. And a
forward rule made of plain torch operations loses the outer level of a nested jvp without a word, so each rule's body calls another
Function that has a rule of its own. The numbers come from `ops`, from the file for the device of the logits.

State spares reads. Values hand out what a gradient of the same rows would have to find first, and the tangent of that state, in forward
mode, is what the tangent of the gradient would have to find: both then read their inputs once. What depends on the state is a function of
z all the same, and is differentiated as such, so a state has no gradient; [R, 0] stands for a state that is not known, and is found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from entropy_kernels.errors import UserError
from entropy_kernels.ops import cpu, reference

from .arguments import check_logits, flat_targets, flat_temperature, vocabulary_size


class EntropyLogprob(NamedTuple):
    """Entropy H(p), logprob of the target and logsumexp(z/τ), each [...], in nats; logprob is None without targets."""

    entropy: Tensor
    logprob: Tensor | None
    logsumexp: Tensor


_chosen: list[ModuleType] = []


@contextlib.contextmanager
def rows_from(ops: ModuleType) -> Iterator[None]:
    """Inside, rows on every device are computed by `ops` (ops.rows, ops.cpu or ops.reference): for checks and comparisons.

    Nothing else is tried where that file cannot: Triton on CPU tensors, for one, needs its interpreter and raises without.
    """
    _chosen.append(ops)
    try:
        yield
    finally:
        _chosen.pop()


def row_functions(device: torch.device) -> ModuleType:
    """The row functions for a device: C++ on the CPU, Triton on the GPU (CUDA or ROCm), plain torch elsewhere.

    Raises:
        UserError: a GPU, and no Triton.
    """
    if _chosen:
        return _chosen[-1]
    if device.type == "cpu":
        return cpu
    if device.type != "cuda":
        return reference
    try:
        from entropy_kernels.ops import rows
    except ImportError as error:
        raise UserError(
            f"device: rows on {device} are computed in Triton, which does not import here ({error}). Install triton (triton-windows on "
            "Windows), or move the logits to the CPU."
        ) from error
    return rows


def backend(device: torch.device) -> str:
    """What computes rows on that device, in words for a report."""
    ops = row_functions(device)
    return "plain torch" if ops is reference else ops.backend()


def _over_rows(function: type[Function], in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> Any:
    """The vmap rule of every Function here: rows do not interact, so the mapped dimension becomes more rows."""
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    flat = [
        (x.expand(size, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1)
        for x, d in zip(inputs, in_dims, strict=True)
    ]
    out = function.apply(*flat)
    if isinstance(out, tuple):
        return tuple(x.unflatten(0, (size, -1)) for x in out), (0,) * len(out)
    return out.unflatten(0, (size, -1)), 0


def _keep(ctx: Any, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _unknown(z: Tensor) -> Tensor:
    """The state that is not known, [R, 0]."""
    return z.new_empty(z.shape[0], 0)


def _zeros(z: Tensor, *weights: Tensor | None, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """The cotangents or their tangents; where there is none zero, of the rows' shape or that of `like`."""
    shape = z.shape[:1] if like is None else like.shape
    dtype = reference.compute_dtype(z.dtype)
    return tuple(z.new_zeros(shape, dtype=dtype) if w is None else w for w in weights)


def no_third(ctx: Any, *_: Any) -> Any:
    """The rule of a Function that is a second derivative already: refuse a third."""
    raise NotImplementedError(
        "third derivatives of entropy and logprob are not supported; first and second derivatives are, in every combination "
        "of forward and reverse mode. Take one derivative fewer, or difference the second one numerically."
    )


class _Values(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Values, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        ops = row_functions(z.device)
        if hasattr(ops, "row_values_and_state"):
            values, state = ops.row_values_and_state(z, y, tau)
        else:
            values, state = ops.row_values(z, y, tau), _unknown(z)
        return (*values, state)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        _keep(ctx, *inputs, output[3])

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _y: Any, dtau: Any) -> Any:
        if dtau is not None:
            raise NotImplementedError(
                "derivatives with respect to the temperature are not provided; divide the logits by it yourself and leave it at 1."
            )
        z, y, tau, state = ctx.saved_tensors
        *tangents, known = _Tangents.apply(z, dz, y, tau)
        return (*tangents, known[:, state.shape[1] :])

    @staticmethod
    def backward(ctx: Any, q: Any, g: Any, l: Any, _: Any) -> Any:  # noqa: E741
        z, y, tau, state = ctx.saved_tensors
        return _Cotangents.apply(z, y, tau, state, *_zeros(z, q, g, l)), None, None


class _Tangents(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        z, dz, y, tau = inputs
        along = in_dims[1]
        if along is not None and in_dims[0] is None and in_dims[2] is None and in_dims[3] is None:
            return _ManyTangents.apply(z, dz.movedim(along, 0), y, tau), (0,) * 4
        return _over_rows(_Tangents, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        ops = row_functions(z.device)
        if hasattr(ops, "row_tangents_and_state"):
            tangents, known = ops.row_tangents_and_state(z, dz, y, tau)
        else:
            tangents, known = ops.row_tangents(z, dz, y, tau), _unknown(z)
        return (*tangents, known)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        _keep(ctx, *inputs, output[3])

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, ddz: Tensor | None, *_: Any) -> Any:
        z, dz, y, tau, _ = ctx.saved_tensors
        # d/dη F'(z + ηu)·(ż + ηz̈) = F''(z)[u, ż] + F'(z)·z̈; either input may be without a tangent
        terms = []
        if du is not None:
            terms.append(_Second.apply(z, du, dz, y, tau))
        if ddz is not None:
            terms.append(_Tangents.apply(z, ddz, y, tau)[:3])
        return (*(terms[0] if len(terms) == 1 else (a + b for a, b in zip(*terms, strict=True))), None)

    @staticmethod
    def backward(ctx: Any, q: Any, g: Any, l: Any, _: Any) -> Any:  # noqa: E741
        z, dz, y, tau, known = ctx.saved_tensors
        return *_Tangents.gradients(ctx, z, dz, known, q, g, l, y, tau), None, None

    @staticmethod
    def gradients(
        ctx: Any,
        z: Tensor,
        dz: Tensor,
        known: Tensor,
        q: Any,
        g: Any,
        l: Any,  # noqa: E741
        y: Tensor,
        tau: Tensor,
    ) -> tuple[Any, Any]:
        """Those of z and ż, where they are asked for."""
        state, of_tangent = known.tensor_split(2, 1)
        grad_z = grad_dz = None
        q, g, l = _zeros(z, q, g, l)  # noqa: E741
        if ctx.needs_input_grad[0]:
            zero = torch.zeros_like(q)
            grad_z = _CotangentTangents.apply(z, dz, y, tau, state, of_tangent, q, g, l, zero, zero, zero)
        if ctx.needs_input_grad[1]:
            grad_dz = _Cotangents.apply(z, y, tau, state, q, g, l)
        return grad_z, grad_dz


class _ManyTangents(Function):
    """`_Tangents` along K directions at the same logits, ż [K, R, V] → [K, R]: what vmap over tangents makes of it."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        size = info.batch_size
        z, dz, y, tau = inputs
        along = in_dims[1]
        if along is not None and in_dims[0] is None and in_dims[2] is None and in_dims[3] is None:
            out = _ManyTangents.apply(z, dz.movedim(along, 0).flatten(0, 1), y, tau)  # further directions
            return tuple(x.unflatten(0, (size, -1)) for x in out), (0,) * 4
        z, y, tau = (
            (x.expand(size, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1)
            for x, d in zip((z, y, tau), (in_dims[0], *in_dims[2:]), strict=True)
        )
        wide = dz.unsqueeze(1) if along is None else dz.movedim(along, 1)
        dz = wide.expand(wide.shape[0], size, *wide.shape[2:]).flatten(1, 2)
        out = _ManyTangents.apply(z, dz, y, tau)
        return tuple(x.unflatten(1, (size, -1)) for x in out), (1,) * 4

    @staticmethod
    def forward(z: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        ops = row_functions(z.device)
        if hasattr(ops, "row_many_tangents"):
            tangents, known = ops.row_many_tangents(z, dz, y, tau)
            return (*tangents, known)
        each = [_Tangents.forward(z, x, y, tau) for x in dz]  # without a copy of z for each
        return tuple(torch.stack(column) for column in zip(*each, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        _keep(ctx, *inputs, output[3])

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, ddz: Tensor | None, *_: Any) -> Any:
        z, dz, y, tau, _ = ctx.saved_tensors
        terms = []
        if du is not None:
            each = [_Second.apply(z, du, x, y, tau) for x in dz]
            terms.append([torch.stack(column) for column in zip(*each, strict=True)])
        if ddz is not None:
            terms.append(_ManyTangents.apply(z, ddz, y, tau)[:3])
        return (*(terms[0] if len(terms) == 1 else (a + b for a, b in zip(*terms, strict=True))), None)

    @staticmethod
    def backward(ctx: Any, q: Any, g: Any, l: Any, _: Any) -> Any:  # noqa: E741
        z, dz, y, tau, known = ctx.saved_tensors
        q, g, l = _zeros(z, q, g, l, like=dz[..., 0])  # noqa: E741
        each = [
            _Tangents.gradients(ctx, z, dz[k], known[k], q[k], g[k], l[k], y, tau) for k in range(len(dz))
        ]
        of_z, of_dz = zip(*each, strict=True)
        return (
            sum(of_z[1:], of_z[0]) if ctx.needs_input_grad[0] else None,
            torch.stack(of_dz) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _Cotangents(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Cotangents, in_dims, inputs)

    @staticmethod
    def forward(
        z: Tensor,
        y: Tensor,
        tau: Tensor,
        state: Tensor,  # of the values at z
        q: Tensor,
        g: Tensor,
        l: Tensor,  # noqa: E741
    ) -> Tensor:
        options = {"state": state} if state.shape[1] else {}
        return row_functions(z.device).row_cotangents(z, y, tau, q, g, l, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)  # a state without a tangent is not one whose tangent is 0
        _keep(ctx, *inputs)

    @staticmethod
    def jvp(ctx: Any, dz: Any, _y: Any, _tau: Any, dstate: Any, dq: Any, dg: Any, dl: Any) -> Any:
        z, y, tau, state, q, g, l = ctx.saved_tensors  # noqa: E741
        dq, dg, dl = _zeros(z, dq, dg, dl)
        if dz is None:  # linear in the cotangents
            return _Cotangents.apply(z, y, tau, state, dq, dg, dl)
        if dstate is None:
            dstate = _unknown(z)
        return _CotangentTangents.apply(z, dz, y, tau, state, dstate, q, g, l, dq, dg, dl)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        z, y, tau, state, q, g, l = ctx.saved_tensors  # noqa: E741
        *tangents, known = _Tangents.apply(z, u, y, tau)
        grad_z, weights = None, (None, None, None)
        if ctx.needs_input_grad[0]:
            zero = torch.zeros_like(q)
            parts = known.tensor_split(2, 1)
            grad_z = _CotangentTangents.apply(z, u, y, tau, *parts, q, g, l, zero, zero, zero)
        if any(ctx.needs_input_grad[4:]):
            weights = tuple(tangents)
        return grad_z, None, None, None, *weights


class _CotangentTangents(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_CotangentTangents, in_dims, inputs)

    @staticmethod
    def forward(
        z: Tensor,
        dz: Tensor,
        y: Tensor,
        tau: Tensor,
        state: Tensor,  # of the values at z
        dstate: Tensor,  # and its tangent
        q: Tensor,
        g: Tensor,
        l: Tensor,  # noqa: E741
        dq: Tensor,
        dg: Tensor,
        dl: Tensor,
    ) -> Tensor:
        options = {"state": (state, dstate)} if state.shape[1] and dstate.shape[1] else {}
        ops = row_functions(z.device)
        return ops.row_cotangent_tangents(z, dz, y, tau, (q, g, l), (dq, dg, dl), **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    jvp = staticmethod(no_third)
    backward = staticmethod(no_third)


class _Second(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _over_rows(_Second, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        return tuple(row_functions(z.device).row_second_tangents(z, du, dz, y, tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    jvp = staticmethod(no_third)
    backward = staticmethod(no_third)


def entropy_logprob(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> EntropyLogprob:
    r"""H = −Σ_a p_a log p_a,  logprob = log p_y,  logsumexp = log Σ_a e^{z_a/τ},  with p = softmax(z/τ).

    Differentiable twice with respect to the logits in every mix of forward and reverse mode, under `torch.func` and dual numbers.
    Accurate for peaked rows: relative error about 1e-7 in float32 at an entropy of 3e-6 nats (docs/theory.md, section 2).

    Args:
        logits: [..., V], float64/32/16 or bfloat16, any stride. Entries of −inf have probability zero.
        targets: [...], integer, or None for no logprob. Where it equals `ignore_index`, logprob is 0 with zero gradient.
        temperature: τ > 0, a number or a tensor that broadcasts to [...]; not differentiable.
        ignore_index: the target that means "none".
        vocab_size: columns from here on are padding and take no part.

    Returns:
        EntropyLogprob(entropy, logprob, logsumexp), each [...], in nats; float64 for float64 logits, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes, temperature or targets that do not fit, or a sharded (DTensor) argument.
        NotImplementedError: a third derivative; forward mode inside a compiled region, where there are values and a gradient.
    """
    name = "entropy_logprob"
    check_logits(name, logits)
    shape, size = logits.shape[:-1], vocabulary_size(name, logits.shape[-1], vocab_size)
    y = flat_targets(name, targets, shape, size, ignore_index, logits.device)
    tau = flat_temperature(name, temperature, logits, shape)
    z = logits[..., :size].reshape(-1, size)
    if torch.compiler.is_compiling():
        from . import compiled

        compiled.refuse_dual_numbers(name)
        entropy, logprob, logsumexp = compiled.rows(z, y, tau)
    else:
        entropy, logprob, logsumexp, _ = _Values.apply(z, y, tau)
    return EntropyLogprob(
        entropy.reshape(shape), None if targets is None else logprob.reshape(shape), logsumexp.reshape(shape)
    )
