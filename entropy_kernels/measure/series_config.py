"""Which checkpoints a series measures, in which order, and with what settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from ..errors import UserError
from .config import MeasureConfig

# Settings of one measurement that a series has as well; the others are about the update, which a series reads off the checkpoints.
SHARED = frozenset(
    """model parameters output resume dataset dataset_config dataset_split prompt_column chat_template prompts_e group_size_e
    max_new_tokens seed sample_batch temperature per estimator truth second_order integration_rtol precision device
    micro_batch_tokens""".split()
)
_DEFAULTS = {"truth": "direct", "second_order": False}


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """The choices of a series of measurements along the checkpoints of one run.

    Attributes:
        checkpoints: at least two directories, in the order of training, full models or LoRA adapters of one base.
        settings: of every measurement; those that are about the update are not used and must be left at their defaults.
            `truth`: "direct" compares end points; "integrated" gives the integral along the chord as well.
        min_ess: share of E's sequences that the effective sample size must reach at both ends of an interval; otherwise E is drawn again.
    """

    checkpoints: tuple[str, ...]
    settings: MeasureConfig
    min_ess: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot be measured before anything is loaded."""
        if not 0 < self.min_ess <= 1:
            raise UserError(
                f"min_ess: got {self.min_ess}, expected a share of the sequences, above 0 and at most 1."
            )
        if len(self.checkpoints) < 2:
            raise UserError(
                f"checkpoints: got {list(self.checkpoints)}, expected at least two: a series measures the steps between them."
            )
        for name in self.checkpoints:
            if not Path(name).is_dir():
                raise UserError(
                    f"checkpoints: {name} is not a directory; expected checkpoints of one run, such as 'run/checkpoint-*'."
                )
        _check_dataset(self.settings.dataset)
        for name in ("top_k", "top_p"):
            if getattr(self.settings, name, None) is not None:
                raise UserError(
                    f"{name}: got {getattr(self.settings, name)!r}, but a series measures policies without truncation: which tokens are "
                    "kept differs from checkpoint to checkpoint, and samples of one cannot be re-weighted to another. Leave it out."
                )
        changed = [
            f.name
            for f in fields(MeasureConfig)
            if f.name not in SHARED | {"ckpt", "update"} and getattr(self.settings, f.name) != f.default
        ]
        if changed:
            raise UserError(
                f"{changed[0]}: got {getattr(self.settings, changed[0])!r}, which has no effect in a series: the steps are those "
                "between the checkpoints. Leave it out."
            )

    @classmethod
    def along(cls, *paths: str, min_ess: float = 0.5, **settings: Any) -> SeriesConfig:
        """The checkpoints that directories or patterns name, in the order of training.

        Args:
            paths: one pattern such as "run/checkpoint-*", or the directories themselves.
            min_ess: see the class.
            settings: of `MeasureConfig`; here truth is "direct" and second_order off unless given.

        Raises:
            UserError: nothing found, or no order to be read from the names; settings that cannot be measured.
        """
        checkpoints = find_checkpoints(paths)
        _check_dataset(settings.get("dataset"))
        given = {**_DEFAULTS, **settings}
        given["ckpt"], given["update"] = checkpoints[0], f"next:{checkpoints[-1]}"
        return cls(checkpoints=checkpoints, settings=MeasureConfig(**given), min_ess=min_ess)

    def to_json(self) -> dict[str, object]:
        """The choices by name, for the report."""
        settings: Mapping[str, object] = {k: v for k, v in self.settings.to_json().items() if k in SHARED}
        return {"checkpoints": list(self.checkpoints), "min_ess": self.min_ess, **settings}


def _check_dataset(dataset: str | None) -> None:
    if dataset is None:
        raise UserError(
            "dataset: a series samples held-out responses again whenever the checkpoints have moved far from the last ones; pass --dataset."
        )


def find_checkpoints(paths: Sequence[str]) -> tuple[str, ...]:
    """Directories in the order of training: by the number at the end of their names, or as given where the names have none.

    Raises:
        UserError: a pattern that matches fewer than two directories, names without numbers from a pattern, one step twice.
    """
    found: list[str] = []
    for path in paths:
        matches = [name for name in glob(path) if Path(name).is_dir()] if has_magic(path) else [path]
        if not matches:
            raise UserError(
                f"checkpoints: no directory matches {path!r}; expected checkpoints such as 'run/checkpoint-*'."
            )
        found += matches
    if len(found) < 2:
        raise UserError(
            f"checkpoints: found only {', '.join(found) or 'none'}, expected at least two: a series measures the steps between them. "
            "Train with a smaller save_steps (and save_total_limit=None), or pass another pattern."
        )
    numbers = [number_of(name) for name in found]
    if None in numbers:
        if any(map(has_magic, paths)):
            name = found[numbers.index(None)]
            raise UserError(
                f"checkpoints: {name!r} has no number at its end, so its place among the others is not known; expected names such as "
                "checkpoint-100. Narrow the pattern, or list the directories in the order of training."
            )
        return tuple(found)
    ordered = sorted(found, key=lambda name: number_of(name) or 0)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if number_of(one) == number_of(other):
            raise UserError(
                f"checkpoints: {one!r} and {other!r} have the same number; expected checkpoints of one run."
            )
    return tuple(ordered)


def number_of(name: str) -> int | None:
    """The number at the end of a directory's name."""
    match = re.search(r"(\d+)$", Path(name).name)
    return int(match[1]) if match else None


def optimizer_step(checkpoint: str) -> int | None:
    """How many optimizer steps the trainer says it had taken; None where trainer_state.json does not say."""
    for directory in (Path(checkpoint), Path(checkpoint) / "model"):
        try:
            found = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))
            return int(found["global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
