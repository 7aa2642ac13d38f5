r"""The passes that find the influence of every token of the update on the entropy and on the expected reward.

    E ──gradient──► X (in two halves) ──κP, Q──► directions ──one forward-mode pass over U each──► shares, marginals of every token

Formulas live in `attribution` and `stats`; here is the order of passes and what is kept for going on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .. import attribution
from ..attribution import Halves, TokenWeights
from ..derivatives import Parts, TokenStats, token_stats
from ..policy import Parameters, Policy, TokenBatch
from ..rl.rollouts import Rollouts
from ..updates import UpdateDirection
from .along import bar
from .config import MeasureConfig
from .losses import loss_policy
from .statistics import baseline_of_e
from .store import Store


class Influence(NamedTuple):
    """What the tokens of U do to one quantity, entropy or reward, η included.

    Attributes:
        shares, marginals: by part of the loss, halves of [N, T] each.
        parts: the parts of v that are not the gradient: (η X_a·v_part, η X_b·v_part).
    """

    shares: dict[str, Halves]
    marginals: dict[str, Halves]
    parts: dict[str, tuple[float, float]]

    def total(self, which: str) -> Halves:
        """Shares or marginals over all parts of the loss."""
        found = getattr(self, which).values()
        return Halves(sum(x.a for x in found), sum(x.b for x in found))


class Batches(NamedTuple):
    """U with the weights of its tokens in the loss, and E."""

    U: Rollouts
    batch_u: TokenBatch
    weights: dict[str, TokenWeights]
    E: Rollouts
    batch_e: TokenBatch


def influences(
    config: MeasureConfig,
    policy: Policy,
    update: UpdateDirection,
    data: Batches,
    eta: float,
    progress: bool,
    store: Store,
) -> dict[str, Influence]:
    """Shares and marginals for "entropy", and for "reward" where E has rewards that differ.

    Args:
        config: which entropy.
        policy: at the checkpoint.
        update: made with ``marginal=True``.
        data: U and E.
        eta: the learning rate η in the shares.
        progress: whether to show bars.
        store: where finished passes are kept.
    """

    def entropy() -> TokenWeights:
        found = store.in_parts(
            "values_e", lambda parts: token_stats(policy, data.batch_e, parts=parts)._asdict()
        )
        values = TokenStats(found["entropy"], found["logprob"])
        b = baseline_of_e(config, policy, data.batch_e, update.direction, store)
        return attribution.entropy_weights(
            values, data.batch_e, per=config.per, estimator=config.estimator, baseline=b
        )

    wanted: dict[str, Callable[[], TokenWeights]] = {"entropy": entropy}
    reward = data.E.reward
    if reward is not None and np.ptp(reward) > 0:
        wanted["reward"] = lambda: attribution.reward_weights(reward, data.batch_e)
    return {
        name: _influence(
            policy, loss_policy(config, policy), update, data, name, weights, eta, progress, store
        )
        for name, weights in wanted.items()
    }


def _influence(
    policy: Policy,
    loss: Policy,
    update: UpdateDirection,
    data: Batches,
    name: str,
    weights: Callable[[], TokenWeights],
    eta: float,
    progress: bool,
    store: Store,
) -> Influence:
    def compute() -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        of_e = weights()
        sequences = len(data.batch_e.input_ids) + 4 * len(data.batch_u.input_ids)
        with bar(progress, f"influence on {name}", sequences) as tick:

            def gradient(half: int, parts: Parts | None) -> Parameters:
                return attribution.half_gradient(policy, data.batch_e, of_e, half, progress=tick, parts=parts)

            def over_u(y: Parameters, parts: Parts | None) -> dict[str, np.ndarray]:
                with policy.as_trained():  # shares are parts of the gradient that the trainer took
                    return attribution.token_influence(
                        loss, data.batch_u, y, data.weights, progress=tick, parts=parts
                    )

            for half, letter in enumerate("ab"):
                kept = store.in_parts(f"gradient_{name}_{letter}", partial(gradient, half), running=True)
                X = {key: kept[key].to(policy.device) for key in policy.params}
                for part, value in attribution.part_values(update, X).items():
                    found[f"part/{part}/{letter}"] = np.asarray(eta * value)
                for which, turned in (
                    ("share", attribution.share_direction),
                    ("marginal", attribution.marginal_direction),
                ):
                    y = turned(update, X)
                    passed = store.in_parts(f"{which}_{name}_{letter}", partial(over_u, y))
                    found |= {f"{which}/{part}/{letter}": eta * x.numpy() for part, x in passed.items()}
        return found

    kept = store.tensors(f"influence_{name}", compute)

    def halves(which: str) -> dict[str, Halves]:
        return {
            part: Halves(*(kept[f"{which}/{part}/{letter}"].numpy() for letter in "ab"))
            for part in data.weights
        }

    others = [part for part in update.parts if part != "gradient"]
    return Influence(
        shares=halves("share"),
        marginals=halves("marginal"),
        parts={part: tuple(float(kept[f"part/{part}/{letter}"]) for letter in "ab") for part in others},  # type: ignore[misc]
    )


def own_change(
    policy: Policy, direction: Parameters, batch_u: TokenBatch, eta: float, progress: bool, store: Store
) -> np.ndarray:
    """H_ik(θ + ηv) − H_ik(θ) of every token of U, [N, T]: measured at the token's own position."""

    def compute() -> dict[str, Tensor]:
        with bar(progress, "entropy of U after the step", 2 * len(batch_u.input_ids)) as tick:
            before, after = (
                token_stats(policy.shifted(direction, at), batch_u, progress=tick).entropy.double()
                for at in (0.0, eta)
            )
        return {"change": after - before}

    return store.tensors("own_change", compute)["change"].numpy()
