r"""Entropy and logprob of rows truncated by top-k or top-p, with every derivative at a fixed kept set S.

From the four numbers of a row in two parts (`parts`), all at a fixed S, everything else follows without looking at the row again:

    s = 1/(1 + e^−λ),  ε = 1/(1 + e^λ)      H(p) = s·entropy + ε·tail entropy − s log s − ε log ε      λ the log-odds of S

in float64 and without a cancellation, so s keeps its digits where it is tiny as well as where ε is. Their derivatives are torch's own.

Kept sets are found as thresholds without sorting: in C++ on the CPU, in CUDA C++ on a GPU whose machine has nvcc, else in Triton (where
plain torch sorts float64); elsewhere plain torch sorts. Where no derivative is asked for and top-k or top-p define the set, the C++
functions give all values at once. Neither a mask nor a masked copy of the logits is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import logsigmoid

from entropy_kernels.ops import cpu, cpu_parts, truncated
from entropy_kernels.ops.reference import compute_dtype

from . import parts
from .arguments import (
    check_logits,
    check_values,
    flat_targets,
    flat_temperature,
    refuse_compiling,
    vocabulary_size,
)
from .parts import set_functions
from .rows import _over_rows


class TruncatedEntropy(NamedTuple):
    """Of the law p_S/s on the kept set S, each [...]: entropies and logprob in nats.

    Logprob is None without targets; kept mass, tail and full entropy are None where they were not asked for (tail=False).
    """

    entropy: Tensor
    logprob: Tensor | None
    kept_mass: Tensor | None
    kept_count: Tensor
    tail_entropy: Tensor | None
    full_entropy: Tensor | None


def backend(device: torch.device) -> str:
    """What finds kept sets on that device, in words for a report."""
    ops = set_functions(device)
    return "plain torch" if ops is truncated else ops.backend()


class _KeptSet(Function):
    """(z, τ, k, p) → S, bool: no derivative, and more rows under vmap."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _over_rows(_KeptSet, in_dims, inputs)

    @staticmethod
    def forward(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        return set_functions(z.device).kept_set(z, tau, top_k, top_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None


def kept_set(
    logits: Tensor,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""S = {a : what stands strictly above a is fewer than k tokens, and less than the share p of their mass}.

    Top-k comes first, then top-p on the renormalised law of what it left. The token that crosses p is kept, and so is every token
    whose logit ties with the last one. Tokens of −∞ are never kept. A row without a law (NaN, or no finite logit) keeps nothing.

    Args:
        logits: [..., V], floating point.
        top_k: a positive integer, or integers that broadcast to [...]; 0, as in samplers, and V or more keep every token.
        top_p: in (0, 1], or a tensor that broadcasts to [...]; 1 keeps every token.
        temperature: τ > 0, a number or a tensor that broadcasts to [...].

    Returns:
        bool [..., V]. It does not depend on what else is in the batch.

    Raises:
        ValueError: shapes, dtypes or values that do not fit, or a sharded (DTensor) argument.
        NotImplementedError: use inside a compiled region.
    """
    name = "kept_set"
    refuse_compiling(name)
    check_logits(name, logits)
    tau = flat_temperature(name, temperature, logits, logits.shape[:-1])
    k, p = _truncation(name, logits, top_k, top_p)
    return _KeptSet.apply(logits.reshape(len(k), logits.shape[-1]), tau, k, p).reshape(logits.shape)


def truncated_entropy(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    kept: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    tail: bool = True,
) -> TruncatedEntropy:
    r"""H(p_S/s) and log p_y − log s of the policy that a sampler with top-k and top-p draws from; p = softmax(z/τ), s = Σ_S p.

    With ε = 1 − s the parts obey H(p) = s·entropy + ε·tail_entropy − s log s − ε log ε exactly (docs/theory.md, section 3).
    Differentiable twice with respect to the logits in every mix of forward and reverse mode, with S held fixed.

    Args:
        logits: [..., V], float64/32/16 or bfloat16. Entries of −inf have probability zero.
        targets: [...], integer, or None for no logprob. Where it equals `ignore_index`, logprob is 0 with zero gradient; outside
            S it is −inf with zero gradient.
        top_k: as in `kept_set`.
        top_p: as in `kept_set`.
        kept: S itself, bool [..., V], instead of top_k and top_p: to replay the set that a sample was drawn from.
        temperature: τ > 0, a number or a tensor that broadcasts to [...]; not differentiable.
        ignore_index: the target that means "none".
        tail: False where the kept law is all that is wanted: kept_mass, tail_entropy and full_entropy are then None, and with top_k
            on the CPU neither they nor their gradient cost an exponential of the tokens cut off.

    Returns:
        TruncatedEntropy(entropy, logprob, kept_mass s, kept_count |S|, tail_entropy H(p_tail/ε), full_entropy H(p)), each [...], in
        nats; float64 for float64 logits, float32 otherwise; kept_count int64. Where nothing of positive probability is cut off,
        tail_entropy is 0 (so that the identity holds) and s is 1; where nothing of it is kept, entropy and logprob are NaN and s is 0.

    Raises:
        ValueError: shapes, dtypes, temperature, targets, top_k or top_p that do not fit, a set given twice, or a sharded (DTensor)
            argument.
        NotImplementedError: a third derivative, or use inside a compiled region.
    """
    name = "truncated_entropy"
    refuse_compiling(name)
    check_logits(name, logits)
    shape, V = logits.shape[:-1], vocabulary_size(name, logits.shape[-1], None)
    y = flat_targets(name, targets, shape, V, ignore_index, logits.device)
    tau = flat_temperature(name, temperature, logits, shape)
    z = logits.reshape(shape.numel(), V)
    if kept is not None:
        S = _replayed(name, logits, kept, top_k, top_p)
        found = _fields(parts._Values.apply(z, S, y, tau), z, tail)
    else:
        k, p = _truncation(name, logits, top_k, top_p)
        if hasattr(set_functions(logits.device), "truncated_values_of_rows") and not _is_differentiated(
            logits
        ):
            found = _values_alone(z, y, tau, k, p, tail)
        else:
            found = _fields(parts._Searched.apply(z, y, tau, k, p, tail), z, tail)
    result = TruncatedEntropy(*(None if x is None else x.reshape(shape) for x in found))  # type: ignore[arg-type]
    return result if targets is not None else result._replace(logprob=None)


def _values_alone(z: Tensor, y: Tensor, tau: Tensor, k: Tensor, p: Tensor, tail: bool) -> TruncatedEntropy:
    ops = set_functions(z.device)
    if ops is cpu and not tail:
        entropy, logprob, count = cpu_parts.kept_law(z, y, tau, k, p)
        return TruncatedEntropy(entropy, logprob, None, count, None, None)
    found = TruncatedEntropy(*ops.truncated_values_of_rows(z, y, tau, k, p))
    return found if tail else found._replace(kept_mass=None, tail_entropy=None, full_entropy=None)


def _is_differentiated(x: Tensor) -> bool:
    """A derivative of what is computed from x may be asked for, or x is a functorch wrapper whose data cannot be handed on."""
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None
    )


def _fields(numbers: tuple[Tensor, ...], z: Tensor, tail: bool) -> TruncatedEntropy:
    """[R] each, from the differentiable numbers of rows in two parts."""
    entropy, logprob, log_odds, tail_entropy, count, *_ = numbers
    wide = compute_dtype(z.dtype)
    if not tail:
        return TruncatedEntropy(entropy.to(wide), logprob.to(wide), None, count, None, None)
    undefined, all_kept, none_kept = log_odds.isnan(), log_odds == torch.inf, log_odds == -torch.inf
    odds = torch.where(log_odds.isfinite(), log_odds, 0.0)
    s, eps = odds.sigmoid(), (-odds).sigmoid()
    inside = torch.where(none_kept, 0.0, entropy)
    full = s * (inside - logsigmoid(odds)) + eps * (tail_entropy - logsigmoid(-odds))
    full = torch.where(all_kept, entropy, torch.where(none_kept, tail_entropy, full))
    s = torch.where(all_kept, 1.0, torch.where(none_kept, 0.0, s))
    s, full, tail_entropy = (torch.where(undefined, torch.nan, x) for x in (s, full, tail_entropy))
    entropy, logprob, s, tail_entropy, full = (x.to(wide) for x in (entropy, logprob, s, tail_entropy, full))
    return TruncatedEntropy(entropy, logprob, s, count, tail_entropy, full)


def _replayed(name: str, logits: Tensor, kept: Tensor, top_k: object, top_p: object) -> Tensor:
    if top_k is not None or top_p is not None:
        raise ValueError(
            f"{name}: kept is the set itself, got top_k or top_p beside it; pass the set, or what defines it."
        )
    if kept.dtype != torch.bool or kept.shape != logits.shape:
        raise ValueError(
            f"{name}: kept must be bool of the logits' shape {tuple(logits.shape)}, got {kept.dtype} of shape {tuple(kept.shape)}."
        )
    return kept.reshape(-1, kept.shape[-1])


def _truncation(
    name: str, logits: Tensor, top_k: int | Tensor | None, top_p: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """k and p of each row, [R]; V and 1 where there is no truncation."""
    V = vocabulary_size(name, logits.shape[-1], None)
    k = _per_row(name, "top_k", V if top_k is None else top_k, torch.int64, logits)
    if isinstance(top_k, Tensor) or top_k is not None and top_k <= 0:
        check_values(name, k < 0, k, "top_k must be positive, or 0 to keep every token; got {}.")
        k = torch.where(k == 0, V, k)
    p = _per_row(name, "top_p", 1.0 if top_p is None else top_p, torch.float64, logits)
    if isinstance(top_p, Tensor) or top_p is not None and not 0 < top_p <= 1:
        check_values(name, ~((p > 0) & (p <= 1)), p, "top_p must lie in (0, 1], got {}.")
    return k, p


def _per_row(name: str, argument: str, value: Any, dtype: torch.dtype, logits: Tensor) -> Tensor:
    """One number for each row, [R]."""
    shape = logits.shape[:-1]
    if type(value) is int or (type(value) is float and dtype == torch.float64):
        return torch.full((shape.numel(),), value, dtype=dtype, device=logits.device)
    exact = torch.float64 if isinstance(value, float) else None
    given = torch.as_tensor(value, device=logits.device, dtype=exact)
    if given.dtype == torch.bool or (dtype == torch.int64 and given.is_floating_point()):
        raise ValueError(
            f"{name}: {argument} must be {'whole numbers' if dtype == torch.int64 else 'numbers'}, got {given.dtype}."
        )
    if given.requires_grad:
        raise ValueError(
            f"{name}: {argument} requires grad, but the kept set has no derivative; pass it detached."
        )
    try:
        return given.to(dtype).expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name}: {argument} of shape {tuple(given.shape)} does not broadcast to the rows {tuple(shape)}; "
            "pass a number or a tensor with one per row."
        ) from None
