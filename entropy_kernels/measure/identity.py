"""What determines a run's numbers: a run that was stopped goes on only with the same."""

from __future__ import annotations

from typing import Any

import torch

from .config import MeasureConfig
from .store import file_identity
from .writing import code

_ELSEWHERE = ("output",)  # settings that change no number


def identity(config: MeasureConfig) -> dict[str, Any]:
    """The configuration, the files that it names, the kind of device and the code, by name.

    Files are told by names, sizes and times, not by their content: a checkpoint copied with other times counts as another. The number
    of threads is left out, though it may move the last digits of a sum.
    """
    settings = {name: value for name, value in config.to_json().items() if name not in _ELSEWHERE}
    files = {
        "ckpt": config.ckpt,
        "model": config.model,
        "dataset": config.dataset,
        "ref_model": config.ref_model,
        "rollouts_u": config.rollouts_u,
        "rollouts_e": config.rollouts_e,
        "update": config.update.removeprefix("next:"),
        "reward": config.reward.rpartition(":")[0] or None,
        **{rule: rule for rule in config.what_if if rule.endswith(".parquet")},
    }
    found = {f"files of {name}": file_identity(path) for name, path in files.items()}
    return {
        **settings,
        **{name: value for name, value in found.items() if value is not None},
        **code(),
        "kind of device": (config.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[
            0
        ],
    }
