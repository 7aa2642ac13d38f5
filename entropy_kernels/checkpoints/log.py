"""What a checkpoint's log gives away about the loss: which terms it had beside the policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_json

TRAINER_FILE = "trainer_state.json"
# metric of TRL's GRPOTrainer that only one loss or setting writes → that loss or setting
_ONLY = {
    "cispo_clip_ratio": "loss_type='cispo'",
    "vespo/phi_seq_mean": "loss_type='vespo'",
    "aux_loss": "router_aux_loss_coef",
}


@dataclass(frozen=True, kw_only=True)
class LoggedLoss:
    """Terms of the loss that the log shows; a term that is not logged may still have been there.

    Attributes:
        kl: the last logged estimate of the divergence from a reference, nats per token; None where none is logged.
        entropy_coef: the last logged coefficient of an entropy bonus.
        clipped: the largest logged share of clipped tokens; None where none is logged.
        sampler_corrected: whether tokens were weighted by how far the trainer is from its sampler, an engine of its own.
        others: settings whose metrics are there and which this version does not rebuild.
    """

    kl: float | None = None
    entropy_coef: float | None = None
    clipped: float | None = None
    sampler_corrected: bool = False
    others: tuple[str, ...] = ()


def logged_loss(ckpt_dir: str | Path) -> LoggedLoss:
    """What trainer_state.json says; nothing where there is no such file.

    Raises:
        UserError: not JSON.
    """
    path = Path(ckpt_dir) / TRAINER_FILE
    if not path.is_file():
        return LoggedLoss()
    history: list[dict[str, Any]] = read_json(path, dict).get("log_history", [])

    def values(name: str) -> list[float]:
        return [float(entry[name]) for entry in history if isinstance(entry.get(name), int | float)]

    clipped = values("clip_ratio/region_mean")
    return LoggedLoss(
        kl=next(reversed(values("kl")), None),
        entropy_coef=next(reversed(values("entropy_coef")), None),
        clipped=max(clipped, default=None),
        sampler_corrected=bool(values("sampling/importance_sampling_ratio/mean")),
        others=tuple(setting for name, setting in _ONLY.items() if values(name)),
    )
