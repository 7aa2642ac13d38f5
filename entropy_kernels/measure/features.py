"""What a critic may look at: the hidden state from which each response token is predicted.

The state at position k − 1 is a function of the prompt and t_<k alone, so anything made of it is a fair baseline of token k
(docs/theory.md, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..policy import MicroBatch, Policy, TokenBatch, micro_batches

WIDTH = 256  # numbers kept per token


def hidden_features(
    policy: Policy,
    batch: TokenBatch,
    *,
    width: int | None = WIDTH,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """x_k = R h_{k−1} / √width, R a fixed matrix of standard normal numbers: one forward pass.

    Args:
        policy: the model and its parameters.
        batch: sequences, [N, T].
        width: numbers per token; None, or not below the hidden size D: the hidden state itself.
        seed: of R.
        progress: called after each micro-batch with its number of sequences.

    Returns:
        float32 [N, T, width or D], 0 outside the response.
    """
    read: list[Tensor] = []

    def keep(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0].detach())

    def states(micro: MicroBatch) -> Iterator[Tensor]:
        read.clear()
        with torch.no_grad():
            policy.rows(policy.params, micro)
        x = torch.cat(read).to("cpu", torch.float32)
        D = x.shape[1]
        if width is not None and width < D:
            generator = torch.Generator().manual_seed(seed)
            x = x @ (torch.randn(D, width, generator=generator) / math.sqrt(width))
        yield x

    N, T = batch.input_ids.shape
    features: Tensor | None = None
    handle = policy.model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        for micro, found in distributed.dealt(micro_batches(policy, batch), states):
            (x,) = found
            if features is None:
                features = torch.zeros(N, T, x.shape[1])
            features[micro.destination] = x
            if progress is not None:
                progress(len(micro.input_ids))
    finally:
        handle.remove()
    assert features is not None  # a batch is never empty
    return features
