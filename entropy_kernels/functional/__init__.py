"""Every rule of differentiation, and the public functions of a vocabulary row: from logits (`rows`), from hidden states (`linear`)."""

from __future__ import annotations

from .linear import linear_entropy_logprob
from .rows import EntropyLogprob, entropy_logprob

__all__ = ["EntropyLogprob", "entropy_logprob", "linear_entropy_logprob"]
