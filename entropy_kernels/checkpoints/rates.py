"""The learning rates that a checkpoint knows: the next step's, and the last one in its log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_kernels.errors import UserError

from .files import read_json
from .optimizer import OPTIMIZER_FILE, read_optimizer

TRAINER_FILE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a checkpoint says about its learning rate; nothing here is used unless the caller does.

    Attributes:
        optimizer_steps: steps taken before the checkpoint was written.
        stored_lr: the rate in optimizer.pt: that of the *next* step, since the scheduler moves before saving.
        logged_lr: the last rate in trainer_state.json's log, which belongs to step ``logged_step``; None if
            none.
        logged_step: see ``logged_lr``.
        logged_grad_norm: the gradient norm, before clipping, logged with it; None if none.
        max_grad_norm: always None for now: the Trainer writes its clip threshold only into a pickle, which is
            not opened. The Trainer's default is 1.0.
    """

    optimizer_steps: int
    stored_lr: float
    logged_lr: float | None
    logged_step: int | None
    logged_grad_norm: float | None
    max_grad_norm: float | None = None

    def explanation(self) -> str:
        """One sentence on the stored rate, and what to do where it is 0."""
        text = f"After {self.optimizer_steps} steps the checkpoint stores the next rate, {self.stored_lr:g}"
        if self.stored_lr == 0:
            text += " (a schedule that decays to 0 has ended there): say which rate to measure at"
        if self.logged_lr is not None:
            text += f"; the last rate in its log is {self.logged_lr:g}, of step {self.logged_step}"
        return text + "."


def learning_rate(ckpt_dir: str | Path) -> StepInfo:
    """The checkpoint's step count and learning rates, stored and logged.

    Raises:
        UserError: no or unreadable files, parameter groups with different rates.
    """
    saved = read_optimizer(ckpt_dir)
    rates = {float(group["lr"]) for group in saved["param_groups"] if group["params"]}
    if len(rates) != 1:
        raise UserError(
            f"{OPTIMIZER_FILE} in {str(ckpt_dir)!r} has parameter groups with the rates {sorted(rates)}, so "
            "there is no one learning rate; say which one to measure at."
        )
    steps = {int(entry["step"]) for entry in saved["state"].values() if entry.get("step") is not None}
    path = Path(ckpt_dir) / TRAINER_FILE
    trainer: dict[str, Any] = {}
    if path.is_file():
        trainer = read_json(path, dict)
    logged: dict[str, Any] = next(
        (entry for entry in reversed(trainer.get("log_history", [])) if "learning_rate" in entry), {}
    )
    return StepInfo(
        optimizer_steps=max(steps) if steps else int(trainer.get("global_step", 0)),
        stored_lr=rates.pop(),
        logged_lr=None if not logged else float(logged["learning_rate"]),
        logged_step=logged.get("step"),
        logged_grad_norm=logged.get("grad_norm"),
    )
