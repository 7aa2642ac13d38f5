r"""An interval for the entropy of a law of which only the k largest log-probs are known.

With ε the mass of the other V − k tokens and p_k the smallest of the known probabilities (docs/theory.md, section 3),

    H(p) = −Σ_{a ≤ k} p_a log p_a − ε log ε + ε H(p_tail/ε),      log(ε/p_k)⁺ ≤ H(p_tail/ε) ≤ log(V − k).

Every log-prob is taken as an interval wide enough for the rounding of the program it came from, every part is rounded outward,
and the parts are bounded one by one, so the result holds for each law that the numbers could have come from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_kernels.ops.reference import compute_dtype

from .arguments import check_values

PLACES = 8.0  # of the terms and logarithms of a log-softmax
LANES = 16.0  # sums of V terms that are added up side by side, V/16 one after another; torch was seen to lose V/34 places


def truncated_entropy_bounds(
    top_logprobs: Tensor, vocab_size: int, *, logprob_error: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Lower and upper bound of H(p), from exactly the k largest log-probs of p.

    With all V of them the interval has the width of rounding alone. A log-softmax loses places of its terms, and many more of its
    sum over the vocabulary: unless `logprob_error` says better, each log-prob ℓ may be off by 8 u (1 + |ℓ|) + u' V/16, with u the
    spacing of its dtype at 1, and u' that of the sums: float64's for float64, else float32's. At V = 151,936 that is 0.001 nats.

    Args:
        top_logprobs: [..., k], in nats and in any order. A sampled token that an engine appends to its list is not one of the k.
        vocab_size: V ≥ k.
        logprob_error: how far each log-prob may be from the truth, in nats; None for the above. Smaller for an engine that is known to
            add up in pairs or in float64.

    Returns:
        (lower, upper), each [...], in nats, float64 for float64 input and float32 otherwise, rounded outward; NaN where a log-prob is
        NaN. No gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, or log-probs that no law has: positive, or with a sum of probabilities above 1.
    """
    name = "truncated_entropy_bounds"
    if not top_logprobs.is_floating_point() or top_logprobs.dim() == 0 or top_logprobs.shape[-1] == 0:
        raise ValueError(
            f"{name}: top_logprobs must be a floating-point tensor [..., k] with k > 0, got {top_logprobs.dtype} "
            f"of shape {tuple(top_logprobs.shape)}."
        )
    k = top_logprobs.shape[-1]
    if logprob_error is not None and not 0 <= logprob_error < math.inf:
        raise ValueError(
            f"{name}: logprob_error must be a finite number of nats, not negative, got {logprob_error}."
        )
    if vocab_size < k:
        raise ValueError(
            f"{name}: vocab_size must be at least the number of log-probs, {k}, got {vocab_size}."
        )
    logprob = top_logprobs.detach().double()
    u, u_sum = (torch.finfo(dtype).eps for dtype in (top_logprobs.dtype, compute_dtype(top_logprobs.dtype)))
    slack = PLACES * u * (1 + logprob.abs()) + u_sum * vocab_size / LANES
    if logprob_error is not None:
        slack = torch.full_like(logprob, logprob_error) + 2.0**-53 * logprob.abs()
    slack = torch.where(logprob == -torch.inf, 0.0, slack)  # a masked token: its probability is 0
    check_values(name, logprob > slack, logprob, "a log-prob cannot be positive, got {}.")
    low, high = logprob - slack, (logprob + slack).clamp(max=0.0)
    p_low, p_high = _down(low.exp()).clamp(min=0.0), _up(high.exp()).clamp(max=1.0)
    known = _down(p_low.sum(-1), k)
    check_values(name, known > 1, known, "the probabilities add up to at least {}, which no law does.")
    eps_low, eps_high = _down(1 - _up(p_high.sum(-1), k)).clamp(min=0.0), _up(1 - known).clamp(max=1.0)
    cut_off = torch.full_like(known, vocab_size == k, dtype=torch.bool) | (logprob == -torch.inf).any(-1)

    head_low, head_high = _surprise(p_low, p_high)
    tail_low, tail_high = _tail(eps_low, eps_high, p_high.amin(-1), max(vocab_size - k, 1))
    tail_low, tail_high = (
        torch.where(cut_off, 0.0, bound) for bound in (tail_low, tail_high)
    )  # nothing is left
    lower = _down(_down(head_low.sum(-1), k) + tail_low)
    upper = _up(_up(head_high.sum(-1), k) + tail_high).clamp(
        max=math.nextafter(math.log(vocab_size), math.inf)
    )
    broken = logprob.isnan().any(-1)
    dtype = compute_dtype(top_logprobs.dtype)
    return (
        _narrow(torch.where(broken, torch.nan, lower.clamp(min=0.0)), dtype, -1),
        _narrow(torch.where(broken, torch.nan, upper), dtype, 1),
    )


def _surprise(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of −x log x for x in [low, high] ⊂ [0, 1]: concave, so least at an end and greatest at 1/e if that lies inside."""
    at_low, at_high = -torch.xlogy(low, low), -torch.xlogy(high, high)
    greatest = torch.maximum(at_low, at_high)
    inside = (low <= 1 / math.e + 1e-15) & (high >= 1 / math.e - 1e-15)
    return _down(torch.minimum(at_low, at_high)), _up(torch.where(inside, 1 / math.e, greatest))


def _tail(low: Tensor, high: Tensor, p_last: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Bounds of −ε log ε + ε H(p_tail/ε) for ε in [low, high] and a tail of `tokens` of at most p_last each."""
    # From below: −ε log ε up to ε = p_last, then −ε log p_last, which rises; so least at an end or where the two meet.
    meet = torch.minimum(torch.maximum(p_last, low), high)

    def least(eps: Tensor) -> Tensor:
        return torch.where(eps > p_last, -eps * p_last.log(), -torch.xlogy(eps, eps))

    lower = torch.minimum(torch.minimum(least(low), least(high)), least(meet))
    # From above: −ε log ε + ε log n, whose greatest value stands at ε = n/e.
    best = torch.minimum(torch.full_like(low, tokens / math.e).maximum(low), high)
    upper = best * math.log(tokens) - torch.xlogy(best, best)
    return _down(lower), _up(upper)


def _up(x: Tensor, steps: int = 1) -> Tensor:
    """Above every x' that rounds to a non-negative x in `steps` operations of two units each."""
    return torch.nextafter(x * (1 + 4 * steps * 2.0**-53), torch.full_like(x, torch.inf))


def _down(x: Tensor, steps: int = 1) -> Tensor:
    return torch.nextafter(x * (1 - 4 * steps * 2.0**-53), torch.full_like(x, -torch.inf))


def _narrow(x: Tensor, dtype: torch.dtype, side: int) -> Tensor:
    """X in `dtype`, moved on to the given side where rounding went to the other."""
    narrow = x.to(dtype)
    moved = torch.nextafter(narrow, torch.full_like(narrow, side * torch.inf))
    return torch.where((narrow.double() - x) * side < 0, moved, narrow)
