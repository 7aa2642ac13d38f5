"""One RL step, measured: the configuration, the order of events, and the command line."""

from __future__ import annotations

from .comparing import compare_results
from .config import MeasureConfig
from .series import measure_series
from .series_config import SeriesConfig
from .steps import measure_step

__all__ = ["MeasureConfig", "SeriesConfig", "compare_results", "measure_series", "measure_step"]
