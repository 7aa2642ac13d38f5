r"""Everything evaluated on the held-out samples E along θ + ηv, and the estimates made of it.

at θ            tangents, curvature      → δH₁, δH₂, η*
at the nodes s  tangents                 → ∫ h'(s) ds, the integrated truth of every η
at θ + ηv       values                   → the direct truth of that η, and of −η for the smallest: the noise floor
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import stats
from ..derivatives import Parts, token_curvature, token_stats, token_support, token_tangents
from ..policy import Parameters, Policy, TokenBatch
from ..rl.rollouts import Rollouts
from .config import MeasureConfig
from .statistics import about_e, check_baseline, fit_baseline
from .store import NOWHERE, Store
from .truncated import kept_sets

FIRST_NODES, MOST_NODES = 5, 16
_COST = {"values": 1, "tangents": 3, "curvature": 9}


class Moved(NamedTuple):
    """What was evaluated on E at one learning rate."""

    eta: float
    values: stats.TokenValues
    tangents: stats.TokenTangents | None = None


class Along:
    """Everything evaluated on E along θ + ηv, and the estimates made of it."""

    def __init__(
        self,
        config: MeasureConfig,
        policy: Policy,
        direction: Parameters,
        batch: TokenBatch,
        etas: tuple[float, ...],
        progress: bool,
        store: Store = NOWHERE,
    ) -> None:
        self.config, self.policy, self.direction = config, policy, direction
        self.batch, self.etas, self.store = batch, etas, store
        self.mask = batch.response_mask.numpy()
        self.prompt = batch.prompt_index.numpy()
        check_baseline(config, self.prompt)
        self.cost = costs(config)
        passes = self.cost["curvature" if config.second_order else "tangents"]
        if config.truth != "direct":
            passes += self.cost["tangents"] * (FIRST_NODES - 1)
        if config.truth != "integrated" or policy.truncation is not None:
            passes += self.cost["values"] * (len(etas) + 2)
        if config.baseline == "critic":
            passes += self.cost["values"]
        with bar(progress, "entropy along the step", passes * len(self.mask)) as tick:
            self._evaluate(tick)

    def _evaluate(self, tick: Callable[[int], Any]) -> None:
        self.curvature: stats.TokenCurvature | None = None
        weighted = {name: (lambda n, cost=cost: tick(cost * n)) for name, cost in self.cost.items()}
        if self.config.second_order:
            found = self._kept(
                "curvature",
                lambda parts: token_curvature(
                    self.policy, self.batch, self.direction, progress=weighted["curvature"], parts=parts
                ),
            )
            self.curvature = stats.TokenCurvature(found["d2_entropy"], found["d2_logprob"])
        else:
            found = self._tangents("tangents", self.policy, weighted["tangents"])
        self.base = _moved(0.0, found)
        self.baseline = fit_baseline(
            self.config,
            self.policy,
            self.batch,
            self.direction,
            self.base.values,
            self.base.tangents,
            self.store,
            weighted["values"],
        )
        self.base_sums = self.sums(self.base, curvature=self.curvature)
        self.direct: dict[float, stats.TokenValues] = {}
        self.rounding: dict[float, float] = {}
        self.support: dict[float, dict[str, np.ndarray]] = {}  # of a truncated policy
        if self.config.truth != "integrated" or self.policy.truncation is not None:
            for eta in (0.0, -self.etas[0], *self.etas):  # 0 again: by the very same operations as the others
                moved = self.policy.shifted(self.direction, eta)
                if eta:
                    self.rounding[eta] = rounding(self.policy, moved, self.direction, eta)
                values = self._values(eta, moved, weighted["values"])
                if self.config.truth != "integrated":
                    self.direct[eta] = stats.TokenValues(values["entropy"], values["logprob"])
                if self.policy.truncation is not None:
                    self.support[eta] = values
        self.nodes: list[Moved] = []
        if self.config.truth != "direct":
            self._integrate(weighted["tangents"])

    def _integrate(self, tick: Callable[[int], Any]) -> None:
        """Evaluate the first nodes, then refine where the error is until every η is accurate enough, or no more nodes are allowed."""
        self.nodes, self.node_sums = [self.base], [self.base_sums]
        breaks = [0.0, self.etas[-1]]
        waiting = [float(s) for s in stats.radau_nodes(FIRST_NODES, self.etas[-1]) if s != 0]
        while True:
            for eta in waiting:
                self._add_node(eta, tick)
            at = [node.eta for node in self.nodes]
            self.weights, error_weights = stats.panel_weights(breaks, at, self.etas)
            errors = np.array(
                [[stats.integration_error(self.node_sums, w) for w in panel] for panel in error_weights]
            )
            self.errors = errors.sum(axis=0)
            share = self.errors / [self._size(w, eta) for w, eta in zip(self.weights, self.etas, strict=True)]
            if share.max() <= self.config.integration_rtol:
                return
            breaks, waiting = stats.refine(breaks, at, int(errors[:, share.argmax()].argmax()))
            if len(self.nodes) + len(waiting) > MOST_NODES:
                return

    def _add_node(self, eta: float, tick: Callable[[int], Any]) -> None:
        found = self._tangents(f"node_{eta!r}", self.policy.shifted(self.direction, eta), tick)
        node = _moved(eta, found)
        self.nodes.append(node)
        self.node_sums.append(self.sums(node))

    def _tangents(self, name: str, policy: Policy, tick: Callable[[int], Any]) -> dict[str, np.ndarray]:
        return self._kept(
            name,
            lambda parts: token_tangents(policy, self.batch, self.direction, progress=tick, parts=parts),
        )

    def _values(self, eta: float, moved: Policy, tick: Callable[[int], Any]) -> dict[str, np.ndarray]:
        evaluate: Callable[..., Any] = token_stats if moved.truncation is None else token_support
        return self._kept(
            f"values_{eta!r}", lambda parts: evaluate(moved, self.batch, progress=tick, parts=parts)
        )

    def _kept(self, name: str, evaluate: Callable[[Parts | None], Any]) -> dict[str, np.ndarray]:
        """What is evaluated at one point, by name in float64; a run that goes on reads what it has."""
        found = self.store.in_parts(name, lambda parts: evaluate(parts)._asdict())
        return {key: x.numpy().astype(np.float64) for key, x in found.items()}

    def _size(self, weights: np.ndarray, eta: float) -> float:
        """What the integrated truth's error is relative to: the change, or its linear part where the change is nearly zero."""
        change = stats.integrated_change(self.node_sums, weights)
        return max(abs(change.value), abs(stats.linear_change(self.base_sums, eta).value))

    def sums(self, moved: Moved, curvature: stats.TokenCurvature | None = None) -> stats.PromptSums:
        """Per-prompt numerators and denominators at one learning rate."""
        return stats.prompt_sums(
            self.base.values if moved.eta else moved.values,
            moved.values,
            self.mask,
            self.prompt,
            per=self.config.per,
            estimator=self.config.estimator,
            tangents=moved.tangents,
            curvature=curvature,
            baseline=self.baseline,
        )

    def report(self, E: Rollouts, eta_checkpoint: float) -> dict[str, Any]:
        """The report's sections that are about entropy."""
        kind: dict[str, Any] = {"per": self.config.per, "estimator": self.config.estimator}
        values = self.base.values
        plain = {
            per: stats.entropy(
                stats.prompt_sums(values, values, self.mask, self.prompt, per=per, estimator="path")
            )
            for per in ("token", "sequence")
        }
        ratio = stats.rb_variance_ratio(values, self.mask, self.prompt)
        second = self.curvature is not None
        nearest = min(self.etas, key=lambda eta: abs(math.log(eta / eta_checkpoint)))
        assert self.base.tangents is not None
        sanity: dict[str, Any] = {
            "z_mean_score": stats.mean_score(self.base.tangents, self.mask, self.prompt).z_score(),
            "logprob_mismatch": logprob_mismatch(E, np.asarray(values.logprob), self.mask),
        }
        if self.direct:
            smallest = self.etas[0]
            floor = stats.noise_floor(
                self.direct[0.0],
                self.direct[smallest],
                self.direct[-smallest],
                self.mask,
                self.prompt,
                **kind,
                baseline=self.baseline,
            )
            sanity["noise_floor"] = {
                "difference": floor,
                "eta": smallest,
                "rounding": self.rounding[smallest],
            }
            sanity["z_mean_weight"] = stats.mean_weight(
                self.direct[0.0], self.direct[nearest], self.mask, self.prompt
            ).z_score()
        kept = {}
        if self.policy.truncation is not None:
            kept["truncation"] = kept_sets(
                self.policy.truncation, self.support, self.mask, self.prompt, **kind
            )
        return {
            **kept,
            "entropy": {
                "per_token": plain["token"],
                "per_sequence": plain["sequence"],
                "rb_variance_ratio": ratio._asdict(),
                "truncated_share": E.truncated_share,
            },
            "changes": [self._change(i, eta) for i, eta in enumerate(self.etas)],
            "derivatives": {
                "first": stats.first_derivative(self.base_sums),
                **({"second": stats.second_derivative(self.base_sums)} if second else {}),
                **({"eta_star": stats.eta_star(self.base_sums).to_json()} if second else {}),
            },
            "sanity": sanity,
            "nodes": [
                {"eta": node.eta, "first_derivative": stats.first_derivative(sums)}
                for node, sums in sorted(
                    zip(self.nodes, self.node_sums, strict=True), key=lambda pair: pair[0].eta
                )
            ]
            if self.nodes
            else [],
            **about_e(self.config, values, self.base.tangents, self.mask, self.prompt, self.baseline),
        }

    def _change(self, index: int, eta: float) -> dict[str, Any]:
        """One row of the sweep; z_linear is that of the integrated truth where there is one."""
        row: dict[str, Any] = {"eta": eta, "linear": stats.linear_change(self.base_sums, eta)}
        if self.curvature is not None:
            row["quadratic"] = stats.quadratic_change(self.base_sums, eta)
        if eta in self.direct:
            moved = self.direct[eta]
            sums = stats.change_sums(
                self.direct[0.0],
                moved,
                self.mask,
                self.prompt,
                per=self.config.per,
                estimator=self.config.estimator,
                baseline=self.baseline,
            )
            row["true_direct"] = stats.direct_change(sums)
            row["z_linear"] = stats.compare_direct(sums, self.base_sums, eta).z_linear
            size = stats.ess(self.direct[0.0], moved, self.mask)
            row.update(ess_tokens=size.tokens, ess_sequences=size.sequences, rounding=self.rounding[eta])
        if self.nodes:
            row["true_integrated"] = stats.integrated_change(self.node_sums, self.weights[index])
            row["integration_error"] = float(self.errors[index])
            row["z_linear"] = stats.compare_integrated(
                self.node_sums, self.weights[index], self.base_sums, eta
            ).z_linear
        return row

    def token_columns(self) -> dict[str, Tensor]:
        """Columns of the table of E's tokens."""
        assert self.base.tangents is not None
        columns = {
            "entropy": self.base.values.entropy,
            "logprob": self.base.values.logprob,
            "d_entropy": self.base.tangents.d_entropy,
            "d_logprob": self.base.tangents.d_logprob,
        }
        if self.curvature is not None:
            columns |= {"d2_entropy": self.curvature.d2_entropy, "d2_logprob": self.curvature.d2_logprob}
        columns["contribution"] = stats.token_contributions(
            self.base.values,
            self.base.tangents,
            self.mask,
            per=self.config.per,
            estimator=self.config.estimator,
            baseline=self.baseline,
        )
        return {name: torch.as_tensor(np.asarray(x)) for name, x in columns.items()}


def costs(config: MeasureConfig) -> dict[str, int]:
    """What an evaluation takes, in forward passes: one more where the sets that a truncated policy keeps are made again."""
    truncated = config.top_k is not None or config.top_p is not None
    return {name: cost + truncated for name, cost in _COST.items()}


def rounding(policy: Policy, moved: Policy, direction: Parameters, eta: float) -> float:
    """‖fl(θ + ηv) − θ − ηv‖/‖ηv‖: how much of the step the dtype swallows."""
    lost = total = 0.0
    for name, p in policy.params.items():
        step = eta * direction[name].double()
        lost += float((moved.params[name].double() - p.double() - step).square().sum())
        total += float(step.square().sum())
    return math.sqrt(lost / total) if total else math.nan


def logprob_mismatch(rollouts: Rollouts, logprob: np.ndarray, mask: np.ndarray) -> float:
    """Mean |log-prob of the sampler − of the policy| over response tokens, nats; NaN where the sampler's are unknown."""
    if rollouts.logprobs is None:
        return math.nan
    theirs = np.concatenate([np.asarray(x, dtype=np.float64) for x in rollouts.logprobs])
    return float(np.abs(theirs - np.asarray(logprob)[mask]).mean())


@contextlib.contextmanager
def bar(show: bool, what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar in sequences; yields its update."""
    with tqdm(
        total=total, desc=what, unit="seq", disable=not show, dynamic_ncols=True, smoothing=0.05
    ) as shown:
        yield shown.update


def _moved(eta: float, found: dict[str, np.ndarray]) -> Moved:
    """The values and tangents among what was evaluated."""
    return Moved(
        eta,
        stats.TokenValues(found["entropy"], found["logprob"]),
        stats.TokenTangents(found["d_entropy"], found["d_logprob"]),
    )
