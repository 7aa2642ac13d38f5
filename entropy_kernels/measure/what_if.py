r"""What if some tokens of the update counted less? Predicted from marginals; with --verify made again and measured.

predicted   Σ (f − 1) m                                  at once
measured    ΔH(v_f) − ΔH(v), v_f the direction from weights f g, both integrated along their paths on the same samples E
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import attribution, stats
from ..attribution import TokenFacts
from ..errors import UserError
from ..policy import Parameters
from .along import Along
from .config import MeasureConfig
from .shares import Batches, Influence


class Truth(NamedTuple):
    """The integrated change along one direction: of entropy, and of reward where E has rewards."""

    nodes: tuple[list[stats.PromptSums], np.ndarray]
    reward_nodes: tuple[list[stats.PromptSums], np.ndarray] | None
    integration_error: float


def all_factors(
    config: MeasureConfig, data: Batches, values: Mapping[str, Tensor], entropy: Influence
) -> dict[str, np.ndarray]:
    """f [N, T] of every rule asked for, by its text.

    Raises:
        UserError: a rule that the rollouts do not allow, or a file that does not fit.
    """
    assert data.U.advantage is not None
    mask = data.batch_u.response_mask.numpy()
    S, H = (values[name].double().numpy() for name in ("logprob", "entropy"))
    facts = TokenFacts(
        mask=mask,
        prompt_index=data.batch_u.prompt_index.numpy(),
        advantage=np.asarray(data.U.advantage, dtype=np.float64),
        logprob=S,
        entropy=H,
        marginal=entropy.marginals["policy_gradient"].total,
        log_ratio=_log_ratio(data, S, mask),
    )
    found = {}
    for text in config.what_if:
        if text.endswith(".parquet"):
            found[text] = read_factors(text, mask)
        else:
            found[text] = attribution.factors(attribution.parse_rule(text), facts, seed=config.seed)
    return found


def predicted(f: np.ndarray, data: Batches, found: Mapping[str, Influence], per: str) -> dict[str, Any]:
    """How many tokens a rule touches, and Σ (f − 1) m for each quantity.

    The factors act on the policy gradient alone; other parts of the loss keep their weights.
    """
    mask = data.batch_u.response_mask.numpy()
    touched = int(np.count_nonzero(f[mask] != 1))
    row: dict[str, Any] = {"tokens": touched, "fraction": touched / int(mask.sum())}
    for name, influence in found.items():
        m = influence.marginals["policy_gradient"]
        a, b = (float(((f - 1) * x)[mask].sum()) for x in m)
        unit = "reward" if name == "reward" else f"nats/{per}"
        row[name] = {"predicted": stats.from_halves(a, b, unit)}
    return row


def verified(
    f: Mapping[str, np.ndarray],
    along: Callable[[Parameters, str], Along],
    direction: Parameters,
    changed: Callable[[str, Tensor], Parameters],
    reward: np.ndarray | None,
) -> dict[str, dict[str, Any]]:
    """For every rule: the measured changes, and the length of the change of direction.

    Args:
        f: rule -> factors [N, T].
        along: evaluates E along a direction at the learning rate; the name is that of its stages.
        direction: v without any rule.
        changed: rule, factors -> the direction made with them.
        reward: of E, or None.
    """
    base = truth_of(along(direction, "what_if"), reward)
    found: dict[str, dict[str, Any]] = {}
    for number, (rule, factors) in enumerate(f.items()):
        if (factors == 1).all():  # nothing is touched: the same direction
            found[rule] = {"touches_nothing": True}
            continue
        v = changed(rule, torch.as_tensor(factors))
        truth = truth_of(along(v, f"what_if_{number}"), reward)
        row: dict[str, Any] = {
            "direction_changed_by": _distance(v, direction),
            "entropy": {"measured": stats.integrated_difference(truth.nodes, base.nodes)},
            "integration_error": truth.integration_error + base.integration_error,
        }
        if truth.reward_nodes is not None and base.reward_nodes is not None:
            measured = stats.integrated_difference(truth.reward_nodes, base.reward_nodes)
            row["reward"] = {"measured": replace(measured, unit="reward")}
        found[rule] = row
    return found


def truth_of(along: Along, reward: np.ndarray | None) -> Truth:
    """Nodes and quadrature weights of the one learning rate that was evaluated."""
    weights = along.weights[0]
    of_reward = None
    if reward is not None and np.ptp(reward) > 0:
        sums = []
        for node in along.nodes:
            assert node.tangents is not None
            sums.append(
                stats.reward_sums(
                    along.base.values, node.values, node.tangents, reward, along.mask, along.prompt
                )
            )
        of_reward = (sums, weights)
    return Truth((along.node_sums, weights), of_reward, float(along.errors[0]))


def read_factors(path: str, mask: np.ndarray) -> np.ndarray:
    """Factors [N, T] from a Parquet file with columns sequence, position, weight; tokens not in it keep their weight.

    Args:
        path: of the file; `sequence` is the row in rollouts_u, `position` counts the response's tokens from 0, as in tokens_u.
        mask: of the response tokens.

    Raises:
        UserError: no such file or columns, a token that does not exist or comes twice, a weight that is not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise UserError(
            f"what_if: there is no file {path}; expected Parquet with columns sequence, position, weight."
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"what_if: {path} cannot be read as Parquet: {error}.") from error
    missing = [name for name in ("sequence", "position", "weight") if name not in table.column_names]
    if missing:
        raise UserError(
            f"what_if: {path} has columns {', '.join(table.column_names)}, none called {', '.join(missing)}; expected sequence, position "
            "(as in tokens_u.parquet) and weight, a factor on the token's weight."
        )
    sequence, position, weight = (
        table[name].to_numpy(zero_copy_only=False) for name in ("sequence", "position", "weight")
    )
    length = mask.sum(axis=1)
    whole = np.issubdtype(sequence.dtype, np.integer) and np.issubdtype(position.dtype, np.integer)
    known = whole and bool(
        ((sequence >= 0) & (sequence < len(mask)) & (position >= 0)).all()
        and (position < length[np.clip(sequence, 0, len(mask) - 1)]).all()
    )
    if not known:
        raise UserError(
            f"what_if: {path} names tokens that the update does not have: {len(mask)} sequences of {length.min()} to {length.max()} "
            "tokens, both counted from 0 and without nulls. Take sequence and position from this update's tokens_u.parquet."
        )
    weight = weight.astype(np.float64)
    if not np.isfinite(weight).all():
        raise UserError(
            f"what_if: {path} has weights that are null, NaN or infinite; 0 drops a token, 1 keeps it."
        )
    if len(set(zip(sequence.tolist(), position.tolist(), strict=True))) != len(sequence):
        raise UserError(f"what_if: {path} names a token twice; give each at most one weight.")
    f = np.ones(mask.shape)
    start = mask.argmax(axis=1)  # a response is one run of tokens
    f[sequence, start[sequence] + position] = weight
    return f


def _log_ratio(data: Batches, S: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """S − S_old to the policy that sampled U."""
    if data.U.logprobs is None:
        return None
    old = np.zeros(mask.shape)
    old[mask] = np.concatenate([np.asarray(x, dtype=np.float64) for x in data.U.logprobs])
    return np.where(mask, S - old, 0.0)


def _distance(v: Parameters, w: Parameters) -> float:
    """‖v − w‖/‖w‖."""
    parts = [
        ((x.double() - w[name].double()).square().sum(), w[name].double().square().sum())
        for name, x in v.items()
    ]
    difference, size = (float(torch.stack(x).sum()) for x in zip(*parts, strict=True))
    return (difference / size) ** 0.5
