"""Every rule of differentiation, and the public functions of a vocabulary row.

From logits (`rows`), from hidden states (`linear`), with the vocabulary spread over ranks (`parallel`).
"""

from __future__ import annotations

from .linear import linear_entropy_logprob
from .parallel import vocab_parallel_entropy_logprob, vocab_parallel_linear_entropy_logprob
from .rows import EntropyLogprob, entropy_logprob

__all__ = [
    "EntropyLogprob",
    "entropy_logprob",
    "linear_entropy_logprob",
    "vocab_parallel_entropy_logprob",
    "vocab_parallel_linear_entropy_logprob",
]
