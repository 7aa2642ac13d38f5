"""A series' arrays and what is estimated from them: no model is needed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .. import stats
from ..policy import TokenBatch
from ..report.numbers import estimate
from ..rl.rollouts import Rollouts
from ..stats.ratio import METHOD
from .config import MeasureConfig
from .samples import describe
from .series_config import SeriesConfig, optimizer_step
from .steps import definitions

KINDS = ("measured", "integrated", "linear", "quadratic", "missed")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One draw of E, and where it was drawn."""

    rollouts: Rollouts
    tokens: TokenBatch
    mask: np.ndarray  # [N, T]
    prompt: np.ndarray  # [N]
    names: tuple[str, ...]  # [B] prompt ids in the order of `prompt`
    checkpoint: int  # its number in the series
    drawn: stats.TokenValues | None = None  # H and S where it was drawn; None until they are known

    @classmethod
    def of(cls, rollouts: Rollouts, tokens: TokenBatch, *, checkpoint: int) -> Batch:
        """The batch of some rollouts."""
        prompt = tokens.prompt_index.numpy()
        first = np.unique(prompt, return_index=True)[1]
        return cls(
            rollouts=rollouts,
            tokens=tokens,
            mask=tokens.response_mask.numpy(),
            prompt=prompt,
            names=tuple(rollouts.prompt_id[i] for i in first),
            checkpoint=checkpoint,
        )

    def ess_share(self, values: stats.TokenValues) -> float:
        """Effective sample size over sequences at another policy, as a share of their number."""
        assert self.drawn is not None
        return stats.ess(self.drawn, values, self.mask).sequences / len(self.mask)


class Interval(NamedTuple):
    """What was evaluated between two checkpoints, [N, T] each, derivatives along the whole step; the chord's with a point in front."""

    batch: int
    length: float  # ‖θ_{j+1} − θ_j‖
    before: stats.TokenValues
    after: stats.TokenValues
    tangents: stats.TokenTangents
    curvature: stats.TokenCurvature | None
    chord: dict[str, np.ndarray] | None

    @classmethod
    def from_arrays(cls, found: Mapping[str, np.ndarray]) -> Interval:
        """From the arrays of a finished stage, in float64."""
        x = {name: np.asarray(a, dtype=np.float64) for name, a in found.items()}
        chord = {n.removeprefix("chord."): a for n, a in x.items() if n.startswith("chord.")}
        return cls(
            batch=int(x["batch"]),
            length=float(x["length"]),
            before=stats.TokenValues(x["before.entropy"], x["before.logprob"]),
            after=stats.TokenValues(x["after.entropy"], x["after.logprob"]),
            tangents=stats.TokenTangents(x["d_entropy"], x["d_logprob"]),
            curvature=stats.TokenCurvature(x["d2_entropy"], x["d2_logprob"]) if "d2_entropy" in x else None,
            chord=chord or None,
        )

    def base_sums(self, batch: Batch, settings: MeasureConfig) -> stats.PromptSums:
        """N, D and their derivatives at θ_j."""
        return _sums(batch, settings, self.before, self.tangents, self.curvature)

    def node_sums(self, batch: Batch, settings: MeasureConfig, at: Sequence[np.ndarray]) -> stats.PromptSums:
        """The same at a point of the chord; `at` is H, S, H', S' there."""
        entropy, logprob, d_entropy, d_logprob = (np.asarray(x, dtype=np.float64) for x in at)
        values = stats.TokenValues(entropy, logprob)
        return _sums(batch, settings, values, stats.TokenTangents(d_entropy, d_logprob))

    def moves(self, batch: Batch, settings: MeasureConfig) -> dict[str, stats.Move]:
        """The interval's changes by KINDS; `missed` is measured − linear, paired."""
        change = stats.change_sums(
            self.before,
            self.after,
            batch.mask,
            batch.prompt,
            per=settings.per,
            estimator=settings.estimator,
            drawn=batch.drawn,
        )
        base = self.base_sums(batch, settings)
        found = {"measured": stats.measured_move(change, batch.names)}
        if self.chord is not None:
            chord = self.chord
            columns = zip(
                *(chord[name] for name in ("entropy", "logprob", "d_entropy", "d_logprob")), strict=True
            )
            nodes = [base, *(self.node_sums(batch, settings, at) for at in columns)]
            found["integrated"] = stats.integrated_move(nodes, chord["weights"], batch.names)
        found["linear"] = stats.linear_move(base, batch.names)
        if self.curvature is not None:
            found["quadratic"] = stats.quadratic_move(base, batch.names)
        found["missed"] = stats.move_difference(found["measured"], found["linear"])
        return found


def series_report(
    config: SeriesConfig, batches: Sequence[Batch], intervals: Sequence[Interval]
) -> dict[str, Any]:
    """The report's sections that are about entropy: checkpoints, batches, intervals."""
    settings = config.settings
    moves = [interval.moves(batches[interval.batch], settings) for interval in intervals]
    curves = {kind: _curve(kind, [m[kind] for m in moves], settings) for kind in KINDS if kind in moves[0]}
    names = [Path(name).name for name in config.checkpoints]
    steps = [optimizer_step(name) for name in config.checkpoints]
    rows = []
    for j, (interval, own) in enumerate(zip(intervals, moves, strict=True)):
        batch = batches[interval.batch]
        assert batch.drawn is not None
        first, last = steps[j], steps[j + 1]
        row: dict[str, Any] = {
            "from": names[j],
            "to": names[j + 1],
            "optimizer_steps": None if first is None or last is None else last - first,
            "batch": interval.batch,
            "length": interval.length,
            **{kind: _curve(kind, [move], settings)[0] for kind, move in own.items()},
            "cumulative": {kind: curve[j] for kind, curve in curves.items()},
            "ess_before": batch.ess_share(interval.before),
            "ess_after": batch.ess_share(interval.after),
            "z_mean_weight": stats.mean_weight(
                batch.drawn, interval.after, batch.mask, batch.prompt
            ).z_score(),
        }
        if interval.chord is not None:
            row["integration_error"] = float(interval.chord["error"])
        rows.append(row)
    return {
        "definitions": {
            **definitions(settings),
            "change": (
                "Entropy at a checkpoint minus entropy at the one before, on the same samples, re-weighted where they were drawn at an "
                "earlier checkpoint; predictions are first (and second) order at the earlier checkpoint along the step taken."
            ),
            "path": "Where several optimizer steps lie between two checkpoints the path between them is taken to be straight.",
        },
        "checkpoints": [
            {"name": name, "optimizer_step": step, "entropy": level}
            for name, step, level in zip(names, steps, _levels(settings, batches, intervals), strict=True)
        ],
        "batches": [
            {
                "drawn_at": names[b.checkpoint],
                **describe(b.rollouts),
                **_handover(settings, batches, intervals, m),
            }
            for m, b in enumerate(batches)
        ],
        "intervals": rows,
    }


def series_tables(
    config: SeriesConfig, batches: Sequence[Batch], intervals: Sequence[Interval]
) -> dict[str, pa.Table]:
    """rollouts_e: every batch's samples; influence: each prompt's pull on each interval's change, which sums to 0."""
    drawn = [
        b.rollouts.to_table().append_column("batch", pa.array([m] * len(b.rollouts), pa.int32()))
        for m, b in enumerate(batches)
    ]
    columns: dict[str, list[Any]] = {"interval": [], "batch": [], "prompt_id": []}
    for j, interval in enumerate(intervals):
        batch = batches[interval.batch]
        for kind, move in interval.moves(batch, config.settings).items():
            columns.setdefault(kind, []).extend(move.influence.tolist())
        columns["interval"] += [j] * len(batch.names)
        columns["batch"] += [interval.batch] * len(batch.names)
        columns["prompt_id"] += batch.names
    return {
        "rollouts_e": pa.concat_tables([table.replace_schema_metadata(None) for table in drawn]),
        "influence": pa.table(columns),
    }


def interval_line(config: SeriesConfig, batches: Sequence[Batch], intervals: Sequence[Interval]) -> str:
    """The interval that was finished last in one line, for stderr."""
    interval, j = intervals[-1], len(intervals) - 1
    batch = batches[interval.batch]
    own = interval.moves(batch, config.settings)
    measured, linear = (
        estimate(_curve(kind, [own[kind]], config.settings)[0]) for kind in ("measured", "linear")
    )
    names = [Path(name).name for name in config.checkpoints[j : j + 2]]
    fresh = ", new samples" if batch.checkpoint == j else ""
    return (
        f"{j + 1} of {len(config.checkpoints) - 1}, {names[0]} → {names[1]}: measured {measured}, first order {linear}, "
        f"ESS {batch.ess_share(interval.after):.2f}{fresh}"
    )


def _sums(
    batch: Batch,
    settings: MeasureConfig,
    values: stats.TokenValues,
    tangents: stats.TokenTangents,
    curvature: stats.TokenCurvature | None = None,
) -> stats.PromptSums:
    return stats.prompt_sums(
        values if batch.drawn is None else batch.drawn,
        values,
        batch.mask,
        batch.prompt,
        per=settings.per,
        estimator=settings.estimator,
        tangents=tangents,
        curvature=curvature,
    )


def _level(settings: MeasureConfig, batch: Batch, values: stats.TokenValues) -> stats.PromptSums:
    assert batch.drawn is not None
    kinds: dict[str, Any] = {"per": settings.per, "estimator": settings.estimator}
    return stats.prompt_sums(batch.drawn, values, batch.mask, batch.prompt, **kinds)


def _levels(
    settings: MeasureConfig, batches: Sequence[Batch], intervals: Sequence[Interval]
) -> list[stats.Estimate]:
    """The entropy at every checkpoint, on the batch that serves the interval after it (the last: before it)."""
    ends = [(interval.batch, interval.before) for interval in intervals]
    ends.append((intervals[-1].batch, intervals[-1].after))
    return [stats.entropy(_level(settings, batches[m], values)) for m, values in ends]


def _handover(
    settings: MeasureConfig, batches: Sequence[Batch], intervals: Sequence[Interval], m: int
) -> dict[str, stats.Estimate]:
    """Entropy at the checkpoint where batch m was drawn: on it, minus on the batch before, re-weighted; zero in expectation."""
    before = [interval for interval in intervals if interval.batch == m - 1]
    if not before:
        return {}
    new = next(interval for interval in intervals if interval.batch == m)
    moves = []
    for sign, batch, values in ((1, batches[m], new.before), (-1, batches[m - 1], before[-1].after)):
        sums = _level(settings, batch, values)
        pull = sign * stats.influence_entropy(sums)
        moves.append(stats.Move(sign * stats.entropy(sums).value, pull, batch.names))
    method = "entropy on the new samples minus on the old ones, re-weighted"
    return {"new_minus_old": stats.cumulative_change(moves, unit=f"nats/{settings.per}", method=method)[-1]}


_METHODS = {
    "measured": "direct difference",
    "integrated": "derivative integrated along the chord",
    "linear": "linear prediction",
    "quadratic": "quadratic prediction",
    "missed": "direct difference minus linear prediction",
}


def _curve(kind: str, moves: Sequence[stats.Move], settings: MeasureConfig) -> list[stats.Estimate]:
    method = f"{METHOD[settings.estimator]}, {_METHODS[kind]}"
    return stats.cumulative_change(moves, unit=f"nats/{settings.per}", method=method)
