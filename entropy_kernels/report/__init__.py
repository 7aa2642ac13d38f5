"""A finished measurement as JSON, Parquet tables, one HTML page and a terminal summary."""

from __future__ import annotations

from .comparison import Comparison
from .result import SCHEMA_VERSION, Result
from .series import SeriesResult

__all__ = ["SCHEMA_VERSION", "Comparison", "Result", "SeriesResult"]
