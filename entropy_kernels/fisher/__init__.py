"""The Fisher kernel of sequences: exact, and sketched."""

from __future__ import annotations

from .cost import FisherCost
from .kernel import fisher_cost, fisher_kernel

__all__ = ["FisherCost", "fisher_cost", "fisher_kernel"]
