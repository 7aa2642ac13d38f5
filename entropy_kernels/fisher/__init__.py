"""The Fisher kernel of sequences: exact, and sketched."""

from __future__ import annotations

from .cost import FisherCost
from .kernel import fisher_cost, fisher_kernel
from .sketches import Sketch, SketchedKernel, fisher_sketch

__all__ = ["FisherCost", "Sketch", "SketchedKernel", "fisher_cost", "fisher_kernel", "fisher_sketch"]
