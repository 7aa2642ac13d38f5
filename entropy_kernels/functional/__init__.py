"""Every rule of differentiation, and the public functions of a vocabulary row: from logits (`rows`)."""

from __future__ import annotations

from .rows import EntropyLogprob, entropy_logprob

__all__ = ["EntropyLogprob", "entropy_logprob"]
