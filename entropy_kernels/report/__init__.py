"""A finished measurement as JSON, Parquet tables, one HTML page and a terminal summary."""

from __future__ import annotations

from .result import SCHEMA_VERSION, Result
from .series import SeriesResult

__all__ = ["SCHEMA_VERSION", "Result", "SeriesResult"]
