r"""Truncated policies: π(a) = p_a/s on a kept set S of mass s, 0 outside; top-k first, then top-p of what it leaves.

Whoever samples and whoever measures take S from here. A sampler works the same logits out in another order and so rounds them
otherwise: now and then a token that it drew lies a rounding error beyond the edge of S. Such a token belongs to S, and is counted; one
that lies further out was drawn from another policy (docs/theory.md, section 3).

Legend: R rows, V vocabulary; z logits, not yet divided by τ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .functional import kept_set

# How far beyond the edge a drawn token may lie: logits in units of τ, and cumulated probability. Float32 models differ by some 1e-5
# between a whole sequence at once and token by token.
EDGE_LOGIT, EDGE_MASS = 1e-3, 1e-4


class Kept(NamedTuple):
    """S as bool [R, V], and whether the row's token belongs to it only as one at the edge, bool [R]."""

    tokens: Tensor
    at_edge: Tensor


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Which tokens stay: the `top_k` most probable, then the fewest whose probability reaches `top_p`; None for no such limit."""

    top_k: int | None = None
    top_p: float | None = None

    def __str__(self) -> str:
        """As a phrase."""
        parts = [
            f"{name} {x:g}" for name, x in (("top-k", self.top_k), ("top-p", self.top_p)) if x is not None
        ]
        return ", then ".join(parts)

    def kept(self, z: Tensor, temperature: float) -> Tensor:
        """S of every row, bool [R, V]."""
        return self._kept(z, temperature, 0.0)

    def kept_with(self, z: Tensor, targets: Tensor, temperature: float) -> Kept:
        """S of every row, with the row's token in it where that lies at the edge.

        Args:
            z: logits [R, V].
            targets: the drawn tokens [R].
            temperature: τ.
        """
        kept = self.kept(z, temperature)
        row = (~kept.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).nonzero().squeeze(-1)
        at_edge = torch.zeros_like(targets, dtype=torch.bool)
        if len(row):
            y = targets[row].unsqueeze(-1)
            lifted = z[row].scatter_add(-1, y, torch.full_like(y, EDGE_LOGIT * temperature, dtype=z.dtype))
            near = self._kept(lifted, temperature, EDGE_MASS).gather(-1, y).squeeze(-1)
            at_edge[row] = near
            kept[row[near], targets[row[near]]] = True
        return Kept(kept, at_edge)

    def _kept(self, z: Tensor, temperature: float, slack: float) -> Tensor:
        top_p = None if self.top_p is None else min(1.0, self.top_p + slack)
        return kept_set(z, top_k=self.top_k, top_p=top_p, temperature=temperature)


def truncation(top_k: int | None, top_p: float | None) -> Truncation | None:
    """The truncation asked for; None where all tokens stay.

    Raises:
        UserError: a limit that keeps nothing or a single token.
    """
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 2):
        raise UserError(
            f"top_k: got {top_k}, expected a whole number of at least 2: a single token left has no entropy to measure. Leave it out "
            "for no limit."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"top_p: got {top_p}, expected a number above 0 and at most 1; leave it out for no limit."
        )
    top_p = None if top_p == 1 else top_p
    return None if top_k is None and top_p is None else Truncation(top_k=top_k, top_p=top_p)
