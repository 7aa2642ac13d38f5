"""Every rule of differentiation, and the public functions of a vocabulary row.

From logits (`rows`), from hidden states (`linear`), with the vocabulary spread over ranks (`parallel`), truncated by top-k and
top-p (`truncated`), known in part only (`bounds`).
"""

from __future__ import annotations

from .bounds import truncated_entropy_bounds
from .linear import linear_entropy_logprob
from .parallel import vocab_parallel_entropy_logprob, vocab_parallel_linear_entropy_logprob
from .rows import EntropyLogprob, entropy_logprob
from .truncated import TruncatedEntropy, kept_set, truncated_entropy

__all__ = [
    "EntropyLogprob",
    "TruncatedEntropy",
    "entropy_logprob",
    "kept_set",
    "linear_entropy_logprob",
    "truncated_entropy",
    "truncated_entropy_bounds",
    "vocab_parallel_entropy_logprob",
    "vocab_parallel_linear_entropy_logprob",
]
