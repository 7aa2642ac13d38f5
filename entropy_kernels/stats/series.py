r"""Changes along a path of policies θ_0, θ_1, …, added up with their errors (docs/theory.md, section 12).

    C_k = Σ_{j≤k} Δ_j,      Var(C_k) = Σ_p ( Σ_{j≤k} Σ_{n∈j, n is p} sqrt(B_j/(B_j − 1)) IF_jn )²

Δ_j is the change over interval j, measured or predicted, on a batch of B_j prompts; IF_jn is the pull of its n-th prompt. A prompt's
pulls are added over the intervals before they are squared: intervals that share a batch are correlated, and so are batches that share
prompts. Where no prompt is shared this is addition in quadrature.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .ratio import ERROR, first_derivative, influence_first, influence_second, second_derivative
from .samples import FloatArray, PromptSums
from .truth import ChangeSums, change_arrays, change_of, influence_change, integrated_change


class Move(NamedTuple):
    """Δ of one interval, nats per token or sequence, and every prompt's pull on it."""

    value: float
    influence: FloatArray  # IF_n [B], sums to 0
    prompts: tuple[
        Hashable, ...
    ]  # [B] who they are: equal entries are the same prompt, in this interval's batch or another's


def measured_move(change: ChangeSums, prompts: Sequence[Hashable]) -> Move:
    """The direct difference h(θ_{j+1}) − h(θ_j).

    Args:
        change: change_sums from θ_j to θ_{j+1}, with `drawn` where the samples are from neither.
        prompts: [B] in the order of the sums, that is of prompt_index.
    """
    return _move(
        float(change_of(*(x.sum() for x in change_arrays(change)))), influence_change(change), prompts
    )


def integrated_move(node_sums: Sequence[PromptSums], weights: ArrayLike, prompts: Sequence[Hashable]) -> Move:
    """Σ_i W_i h'(s_i), the derivative integrated along the chord from θ_j to θ_{j+1}.

    Args:
        node_sums: prompt_sums with tangents along θ_{j+1} − θ_j at points s_i ∈ [0, 1] of the chord.
        weights: [J], the row of integral_weights for 1.
        prompts: [B] in the order of the sums.
    """
    value = integrated_change(node_sums, weights).value
    pull = np.stack([influence_first(node) for node in node_sums], axis=-1) @ np.asarray(weights)
    return _move(value, pull, prompts)


def linear_move(sums: PromptSums, prompts: Sequence[Hashable]) -> Move:
    """h'(θ_j) along the step θ_{j+1} − θ_j, which is the first-order prediction of the change.

    Args:
        sums: prompt_sums at θ_j with tangents along θ_{j+1} − θ_j.
        prompts: [B] in the order of the sums.
    """
    return _move(first_derivative(sums).value, influence_first(sums), prompts)


def quadratic_move(sums: PromptSums, prompts: Sequence[Hashable]) -> Move:
    """h'(θ_j) + ½ h''(θ_j) along the step, the second-order prediction of the change.

    Args:
        sums: prompt_sums at θ_j with tangents and curvature along θ_{j+1} − θ_j.
        prompts: [B] in the order of the sums.
    """
    value = first_derivative(sums).value + second_derivative(sums).value / 2
    return _move(value, influence_first(sums) + influence_second(sums) / 2, prompts)


def move_difference(a: Move, b: Move) -> Move:
    """a − b, paired prompt by prompt.

    Raises:
        UserError: moves of different prompts.
    """
    if a.prompts != b.prompts:
        raise UserError(
            "move_difference: the two changes were found on different prompts, expected one batch: only then is their difference paired."
        )
    return Move(a.value - b.value, a.influence - b.influence, a.prompts)


def cumulative_change(moves: Sequence[Move], *, unit: str, method: str) -> list[Estimate]:
    """C_k = Σ_{j≤k} Δ_j for every k, with the error of the module's head.

    Args:
        moves: one per interval, in order; at least one.
        unit: of the moves.
        method: how they were found, in words; how the errors were is added.

    Returns:
        One estimate per interval. n is the number of prompts in the smallest batch so far, so that Student's quantile is on the wide side.
    """
    place = {p: i for i, p in enumerate(dict.fromkeys(p for move in moves for p in move.prompts))}
    pull = np.zeros(len(place))
    value, n, found = 0.0, len(moves[0].prompts), []
    for move in moves:
        B = len(move.prompts)
        value, n = value + move.value, min(n, B)
        np.add.at(pull, [place[p] for p in move.prompts], np.sqrt(B / (B - 1)) * move.influence)
        found.append(
            Estimate(
                value=value,
                stderr=float(np.sqrt(np.sum(pull**2))),
                n=n,
                unit=unit,
                method=f"{method}; {ERROR['influence']}",
            )
        )
    return found


def _move(value: float, influence: FloatArray, prompts: Sequence[Hashable]) -> Move:
    names = tuple(prompts)
    if len(names) != len(influence) or len(set(names)) != len(names) or len(names) < 2:
        raise UserError(
            f"prompts has {len(names)} names, {len(set(names))} of them different, for the sums of {len(influence)} prompts; expected one "
            "name for each, and at least two: prompts are the independent units that errors are taken over."
        )
    return Move(value, influence, names)
