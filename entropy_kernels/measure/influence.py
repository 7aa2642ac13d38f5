"""What every held-out prompt pulls on every estimate of a report: with it, two reports on the same samples can be compared as pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from .. import stats
from ..rl.rollouts import Rollouts
from .along import Along


def influence_table(along: Along, E: Rollouts) -> pa.Table:
    """One row per quantity, learning rate and prompt; the influences of one quantity sum to 0.

    Columns: quantity, the estimate's place in the report (entropy.per_token, derivatives.first, changes.true_direct, ...); eta, null
    but for changes; prompt_id; influence, in the estimate's unit.
    """
    kinds: dict[str, Any] = {"per": along.config.per, "estimator": along.config.estimator}
    values = along.base.values
    pulls: list[tuple[str, float | None, np.ndarray]] = []
    for per in ("token", "sequence"):
        sums = stats.prompt_sums(values, values, along.mask, along.prompt, per=per, estimator="path")
        pulls.append((f"entropy.per_{per}", None, stats.influence_entropy(sums)))
    first = stats.influence_first(along.base_sums)
    second = None if along.curvature is None else stats.influence_second(along.base_sums)
    pulls.append(("derivatives.first", None, first))
    if second is not None:
        pulls.append(("derivatives.second", None, second))
    for index, eta in enumerate(along.etas):
        pulls.append(("changes.linear", eta, eta * first))
        if second is not None:
            pulls.append(("changes.quadratic", eta, eta * first + eta**2 / 2 * second))
        if eta in along.direct:
            change = stats.change_sums(
                along.direct[0.0],
                along.direct[eta],
                along.mask,
                along.prompt,
                **kinds,
                baseline=along.baseline,
            )
            pulls.append(("changes.true_direct", eta, stats.influence_change(change)))
        if along.nodes:
            nodes = np.stack([stats.influence_first(node) for node in along.node_sums], axis=-1)
            pulls.append(("changes.true_integrated", eta, nodes @ along.weights[index]))
    order = np.unique(along.prompt, return_index=True)[1]
    names = [E.prompt_id[i] for i in order]
    return pa.table(
        {
            "quantity": pa.array([q for q, _, _ in pulls for _ in names], pa.string()),
            "eta": pa.array([eta for _, eta, _ in pulls for _ in names], pa.float64()),
            "prompt_id": pa.array(names * len(pulls), pa.string()),
            "influence": pa.array(np.concatenate([x for _, _, x in pulls]), pa.float64()),
        }
    )
