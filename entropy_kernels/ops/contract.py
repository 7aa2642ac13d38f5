r"""Inner products of per-sample gradients that are held as factors.

The gradient of one sequence with respect to one parameter, seen as a matrix [C, D], is a sum of terms

    G_n = Σ_terms Σ_k l_k ⊗ r_k            k over the tokens of sequence n

A linear layer [out, in] has l = ∂S/∂output, r = input; GPT-2's [in, out] has them swapped; an embedding has l = one-hot(token id), held as
the id alone, and r = ∂S/∂output. A weight used twice (tied) has two terms, and what they have in common is in the product. A gradient
that is held itself is a term with ids 0..C−1. Two ways to ⟨G_n, P G'_m⟩, P a positive diagonal [C, D]:

    materialised   √P G_n row block by row block, then one product of matrices          t·C·D + N·M·C·D multiplications
    ghost          Σ_kk' ⟨l_k, l'_k'⟩⟨r_k, r'_k'⟩, without P                              t·t'·(C + D)

Legend: N, M sequences; t tokens of all of them; C, D the two sides of a parameter; [a, b) the rows of C in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = (
    1 << 16
)  # numbers summed in the factors' dtype: float32 loses three digits over the 10⁷ of a large layer


class Term(NamedTuple):
    """Σ_k left_k ⊗ right_k: left [t, b − a], or [t] token ids (one-hot rows of [0, C)); right [t, D]."""

    left: Tensor
    right: Tensor


Terms = Sequence[Term]


def materialise(samples: Sequence[Terms], start: int, stop: int, offset: int, out: Tensor) -> Tensor:
    """Rows [start, stop) of every G_n, written to out [N, stop − start, D]; dense lefts hold columns from `offset` on."""
    out.zero_()
    for n, terms in enumerate(samples):
        for left, right in terms:
            if left.is_floating_point():
                out[n].addmm_(left[:, start - offset : stop - offset].t(), right)
            else:
                inside = (left >= start) & (left < stop)
                out[n].index_add_(0, left[inside] - start, right[inside])
    return out


def materialised_gram(
    rows: Sequence[Terms],
    cols: Sequence[Terms] | None,
    *,
    span: tuple[int, int],
    width: int,
    preconditioner: Tensor | None,
    workspace_bytes: int,
) -> Tensor:
    """⟨G_n, P G'_m⟩ over rows `span` = [a, b) of the parameter, [N, M] float64.

    Products are in the factors' dtype, at most `workspace_bytes` of G at a time; their sum over blocks is in float64.

    Args:
        rows: terms of every sequence; dense lefts hold the columns [a, b).
        cols: the same for the columns, None for the rows again.
        span: [a, b).
        width: D.
        preconditioner: P [C, D] positive, or None for 1.
        workspace_bytes: bound on what is materialised at once; one row of C is always done.
    """
    a, b = span
    example = rows[0][0].right
    count = len(rows) + (0 if cols is None else len(cols))
    height = max(1, min(b - a, workspace_bytes // (count * width * example.element_size())))
    total = example.new_zeros(len(rows), len(rows if cols is None else cols), dtype=torch.float64)
    buffer = example.new_empty(count, height, width)
    for start in range(a, b, height):
        stop = min(start + height, b)
        # the last block may be lower: a view of the buffer's memory, so that its rows stay contiguous
        block = buffer.view(-1)[: count * (stop - start) * width].view(count, stop - start, width)
        G = materialise(rows, start, stop, a, block[: len(rows)])
        if preconditioner is not None:
            G.mul_(preconditioner[start:stop].sqrt())
        Q = G
        if cols is not None:
            Q = materialise(cols, start, stop, a, block[len(rows) :])
            if preconditioner is not None:
                Q.mul_(preconditioner[start:stop].sqrt())
        for g, q in zip(G.flatten(1).split(LONGEST, 1), Q.flatten(1).split(LONGEST, 1), strict=True):
            total += (g @ q.t()).double()
    return total


def ghost_gram(rows: Sequence[Terms], cols: Sequence[Terms] | None, *, workspace_bytes: int) -> Tensor:
    """Σ over pairs of terms of Σ_kk' ⟨l_k, l'_k'⟩⟨r_k, r'_k'⟩, [N, M] float64; for P = 1 and whole parameters."""
    right = _stacked(cols if cols is not None else rows)
    total = rows[0][0].right.new_zeros(len(rows), len(cols or rows), dtype=torch.float64)
    tokens = sum(len(r) for _, r, _ in right)
    most = max(1, workspace_bytes // (3 * max(1, tokens) * rows[0][0].right.element_size()))
    for left, r, owner in _stacked(rows):
        for start in range(0, len(r), most):
            part = slice(start, start + most)
            for left_, r_, owner_ in right:
                pairs = (r[part] @ r_.t()).mul_(_left_products(left[part], left_))
                by_col = pairs.new_zeros(len(pairs), total.shape[1]).index_add_(1, owner_, pairs)
                total.index_add_(0, owner[part], by_col.double())
    return total


def ghost_flops(tokens: int, tokens_: int, C: int, D: int) -> int:
    """Multiplications and additions of `ghost_gram` for one pair of terms."""
    return 2 * tokens * tokens_ * (C + D + 2)


def materialised_flops(tokens: int, N: int, M: int, C: int, D: int) -> int:
    """Multiplications and additions of `materialised_gram` for one term: the gradients of `tokens` tokens, then the products."""
    return 2 * C * D * (tokens + N * M)


def _stacked(samples: Sequence[Terms]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(left, right, owner) of all samples at once, one entry for each of the terms a parameter has."""
    found = []
    for kind in range(len(samples[0])):
        lefts, rights = (torch.cat([terms[kind][side] for terms in samples]) for side in (0, 1))
        counts = torch.tensor([len(terms[kind].right) for terms in samples], device=rights.device)
        owner = torch.arange(len(samples), device=rights.device).repeat_interleave(counts)
        found.append((lefts, rights, owner))
    return found


def _left_products(left: Tensor, other: Tensor) -> Tensor:
    """⟨l_k, l'_k'⟩ [t, t'], where either may be one-hot."""
    if left.is_floating_point():
        return left @ other.t() if other.is_floating_point() else left[:, other]
    return other[:, left].t() if other.is_floating_point() else (left[:, None] == other[None, :])
