"""Entropy of language-model policies: fused row functions with every derivative, and the measurement of an RL step.

Names below load on first use; importing the package needs only torch and numpy and does nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CertificationError": "errors",
    "UserError": "errors",
    "EntropyLogprob": "functional",
    "entropy_logprob": "functional",
    "linear_entropy_logprob": "functional",
    "vocab_parallel_entropy_logprob": "functional",
    "vocab_parallel_linear_entropy_logprob": "functional",
    "TruncatedEntropy": "functional",
    "truncated_entropy": "functional",
    "truncated_entropy_bounds": "functional",
    "Policy": "policy",
    "TokenBatch": "policy",
    "TokenStats": "derivatives",
    "TokenTangents": "derivatives",
    "TokenCurvature": "derivatives",
    "token_stats": "derivatives",
    "TokenSupport": "derivatives",
    "token_support": "derivatives",
    "token_tangents": "derivatives",
    "token_curvature": "derivatives",
    "entropy_gradient": "derivatives",
    "hvp": "derivatives",
    "certify": "certify",
    "FisherCost": "fisher",
    "fisher_cost": "fisher",
    "fisher_kernel": "fisher",
    "fisher_sketch": "fisher",
    "Sketch": "fisher",
    "OptimizerState": "updates",
    "UpdateDirection": "updates",
    "update_direction": "updates",
    "Estimate": "stats",
    "Result": "report",
    "MeasureConfig": "measure",
    "measure_step": "measure",
    "compare_results": "measure",
    "Comparison": "report",
    "SeriesConfig": "measure",
    "SeriesResult": "report",
    "measure_series": "measure",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
