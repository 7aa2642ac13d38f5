r"""How much memory a run needs at its peak, and the micro-batch that keeps it within a budget.

With b bytes per number, P measured parameters, n layers of width d and feed-forward width f with h heads, vocabulary V, a micro-batch of
T tokens in sequences of L, and R = min(T, rows of one chunk of the output layer):

    u = T(24d + 5f + 3hL)                         numbers that one layer makes
    reverse mode           n·u + V(T + 2R) + 2P   every layer's are kept; the gradient and the sum so far
    forward over forward   4.5u + 8V·R + P        layers pass; values, two tangents and a second tangent; θ + ηv
    forward mode           2.25u + 4V·R + P
    the update             8P                     moments, the direction and its parts; 10P with their answer to the gradient
    sampling               S(2nd·L + 12V)         keys and values of S completions, the law in float64

    peak = held once the model is loaded + libraries still to load + b · 1.2 · the largest of these

The counts 24, 5, 3, 4.5, 8 were fitted to measured peaks of Llama and GPT-2 models and lie 5 to 30 % above them; 1.2 is for what an
allocator keeps. What is held is measured, all else is predicted. On a CPU memory is that of the process, on a GPU what torch has
allocated there.
"""

from __future__ import annotations

import math
import os
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..policy import HEAD_ELEMENTS, Policy
from .config import MeasureConfig
from .samples import Lengths
from .store import Store

_LIBRARIES = 400_000_000  # bytes: reading and writing tables, drawing; loaded late
_SLACK = 1.2
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Sizes(NamedTuple):
    """What the memory of a run depends on."""

    held: int  # bytes once the model and its optimizer state are loaded
    libraries: int  # bytes of what is loaded later
    number: int  # bytes of a number, b
    parameters: int  # P
    layers: int
    width: int
    feed_forward: int
    heads: int
    vocabulary: int
    longest: int  # tokens of the longest sequence, L
    tokens: int  # in the larger of the two batches


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GB (8·10⁹), 8GiB (8·2³⁰) or 500MB.

    Raises:
        UserError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise UserError(f"memory_budget: got {text!r}, expected a size such as 8GB, 500MB or 7.5GiB.")
    return size


def shown(size: float) -> str:
    """A number of bytes for a reader, rounded up."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{math.ceil(10 * size / unit) / 10:g} {name}"


def sizes(policy: Policy, expected: Lengths) -> Sizes:
    """The sizes of a loaded policy and of its batches, and what the process holds now."""
    text: Any = policy.model.config.get_text_config()

    def first(*names: str) -> int:
        return max((int(v) for name in names if isinstance(v := getattr(text, name, None), int)), default=0)

    width = first("hidden_size", "n_embd")
    return Sizes(
        held=held(policy.device),
        libraries=0 if policy.device.type == "cuda" else _LIBRARIES,
        number=policy.dtype.itemsize,
        parameters=sum(p.numel() for p in policy.params.values()),
        layers=first("num_hidden_layers", "n_layer"),
        width=width,
        feed_forward=first("intermediate_size", "n_inner", "ffn_dim") or 4 * width,
        heads=first("num_attention_heads", "n_head"),
        vocabulary=len(policy.model.get_input_embeddings().weight),
        longest=expected.longest,
        tokens=max(sum(expected.u), sum(expected.e)),
    )


def held(device: torch.device) -> int:
    """Bytes that the process has on the device now; where Linux does not say, the most it has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stages(config: MeasureConfig, s: Sizes, micro_batch_tokens: int, sample_batch: int) -> dict[str, int]:
    """Bytes at the peak of every stage, what is held included; the formulas are in the module's docstring."""
    T = max(min(micro_batch_tokens, s.tokens), s.longest)
    R = min(T, max(1, HEAD_ELEMENTS // s.vocabulary))
    u = T * (24 * s.width + 5 * s.feed_forward + 3 * s.heads * s.longest)
    V, P = s.vocabulary, s.parameters
    if config.top_k is not None or config.top_p is not None:
        V = 2 * V  # the law and the kept part of it
    numbers = {
        "update gradient": s.layers * u + V * (T + 2 * R) + 2 * P,
        "update": 8 * P,
        "entropy along the step": 4.5 * u + 8 * V * R + P
        if config.second_order
        else 2.25 * u + 4 * V * R + P,
    }
    if (
        config.attributed
    ):  # beside moments, parts and how they answer: a gradient, and its sum or where it is pushed to
        numbers["update"] = 10 * P
        numbers["attribution"] = s.layers * u + V * (T + 2 * R) + 12 * P
    if config.verify:  # moments and the first direction are kept while others are made
        numbers["what if"] = s.layers * u + V * (T + 2 * R) + 9 * P
    if config.rollouts_e is None or config.rollouts_u is None:
        numbers["sampling"] = sample_batch * (2 * s.layers * s.width * s.longest + 12 * V)
    return {name: int(s.held + s.libraries + s.number * _SLACK * x) for name, x in numbers.items()}


def fitted(
    config: MeasureConfig, policy: Policy, expected: Lengths, store: Store
) -> tuple[MeasureConfig, Policy]:
    """The configuration and policy with the largest micro-batch, and batch of samples, that the budget allows; at most those asked for.

    Halved until the prediction fits; a run that goes on takes what it took before.

    Raises:
        UserError: not even one sequence at a time fits; says what would.
    """
    if config.memory_budget is None:
        return config, policy

    def choose() -> dict[str, int]:
        found = sizes(policy, expected)
        tokens, samples = (
            min(config.micro_batch_tokens, max(found.tokens, found.longest)),
            config.sample_batch,
        )
        budget = parse_bytes(config.memory_budget or "")
        while (peak := max((needed := stages(config, found, tokens, samples)).values())) > budget:
            if needed.get("sampling", 0) == peak and samples > 1:
                samples = samples // 2
            elif tokens > found.longest:
                tokens = max(found.longest, tokens // 2)
            else:
                stage = max(needed, key=lambda name: needed[name])
                raise UserError(
                    f"memory_budget: got {config.memory_budget}, but {stage} needs {shown(peak)} with one sequence of {found.longest} "
                    f"tokens at a time, of which {shown(found.held)} are held already. Pass at least {shown(peak).replace(' ', '')}, "
                    "or shorten the sequences (--max-new-tokens), or measure fewer parameters (--parameters)."
                )
        return {"micro_batch_tokens": tokens, "sample_batch": samples}

    chosen = store.json("memory", choose)
    return replace(config, **chosen), replace(policy, micro_batch_tokens=chosen["micro_batch_tokens"])
