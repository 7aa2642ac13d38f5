"""One RL step, measured: the configuration, the order of events, and the command line."""

from __future__ import annotations

from .config import MeasureConfig
from .steps import measure_step

__all__ = ["MeasureConfig", "measure_step"]
