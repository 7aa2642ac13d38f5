"""Small random models and batches shared by the tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_kernels.policy import Policy, TokenBatch


def llama(
    *, tied: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0, vocab: int = 23, layers: int = 2
) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention whose rows are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.35,
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # norms start at 1: move them, so that a forgotten one is seen
        for name, p in model.named_parameters():
            if "norm" in name:
                p.mul_(1 + 0.2 * torch.randn(p.shape).to(dtype))
    return model


def policy(**options: object) -> Policy:
    """`llama` as a policy at temperature 0.8."""
    return Policy.from_model(llama(**options), temperature=0.8, micro_batch_tokens=24)


def direction(policy: Policy, seed: int = 1) -> dict[str, torch.Tensor]:
    """A random direction over all parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for n, p in policy.params.items()
    }


def batch(*, left: bool = False, vocab: int = 23, seed: int = 2) -> TokenBatch:
    """Six sequences of three prompts, ragged prompts and responses, padded left or right with a token that also occurs inside."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [3, 3, 1, 1, 5, 5], [4, 1, 6, 2, 3, 5]
    width = max(p + r for p, r in zip(prompts, responses, strict=True)) + 1
    ids = torch.full((6, width), 2)
    attention, response = torch.zeros(6, width, dtype=torch.bool), torch.zeros(6, width, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        tokens = torch.randint(0, vocab, (p + r,), generator=generator)
        start = width - p - r if left else 0
        ids[i, start : start + p + r] = tokens
        attention[i, start : start + p + r] = True
        response[i, start + p : start + p + r] = True
    return TokenBatch(ids, attention, response, torch.tensor([0, 0, 1, 1, 2, 2]))
