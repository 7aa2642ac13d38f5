"""`--dry-run`: how long a run will take and how much memory it needs, before it starts.

Known: sizes of the model, numbers of sequences, prompts' lengths. Measured: the time of one forward pass over a micro-batch, and of one
step of sampling. Guessed: the lengths of responses that are not sampled yet (the longest allowed), the number of integration nodes (five,
as where none are added), and the cost of the other passes in forward passes (docs/running.md).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..derivatives import token_stats
from ..policy import Policy, TokenBatch
from .along import FIRST_NODES, costs
from .config import MeasureConfig
from .memory import fitted, shown, sizes, stages
from .samples import lengths
from .store import NOWHERE

_TIMED_TOKENS = 2048
_GRADIENT = 3  # a backward pass with its forward pass, in forward passes


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds and bytes by stage, and what they were computed from."""

    seconds: dict[str, float]
    memory: dict[str, int]
    facts: dict[str, str]

    def text(self) -> str:
        """For a terminal: known, measured, and predicted."""
        most = max(self.memory, key=lambda name: self.memory[name])
        lines = [f"{name:<28}{value}" for name, value in self.facts.items()]
        lines += ["", f"{'stage':<28}{'time':>14}{'memory':>12}"]
        for name in {**self.seconds, **self.memory}:
            spent = duration(self.seconds[name]) if name in self.seconds else ""
            memory = shown(self.memory[name]) if name in self.memory else ""
            lines.append(f"{name:<28}{spent:>14}{memory:>12}")
        lines.append(f"{'all':<28}{duration(sum(self.seconds.values())):>14}{shown(self.memory[most]):>12}")
        return "\n".join([*lines, "", _GUESSES])


_GUESSES = (
    "Guessed: that every response not sampled yet has its greatest length; five integration nodes (up to 16 where the curve bends); "
    "other\npasses from the time of a forward pass; memory from the sizes of the model. Loading, certifying and drawing are not counted."
)


def forecast(config: MeasureConfig, policy: Policy) -> Forecast:
    """Predict a run with the policy loaded; nothing is sampled or written.

    Raises:
        UserError: prompts or rollouts that cannot be read, a memory budget that is too small.
    """
    expected = lengths(config, policy)
    config, policy = fitted(config, policy, expected, NOWHERE)
    found = sizes(policy, expected)
    per_token, per_step = (
        _forward_seconds(policy.full(), expected.longest),
        _step_seconds(policy, config.sample_batch),
    )
    tokens_u, tokens_e = sum(expected.u), sum(expected.e)
    cost, truncated = costs(config), policy.truncation is not None
    passes = cost["curvature" if config.second_order else "tangents"]
    passes += cost["tangents"] * (FIRST_NODES - 1) if config.truth != "direct" else 0
    count = len(config.etas) or 8
    passes += cost["values"] * (count + 2) if config.truth != "integrated" or truncated else 0
    passes += cost["values"] if config.baseline == "critic" else 0
    seconds: dict[str, float] = {}
    if expected.sampled:
        seconds["sampling"] = per_step * config.max_new_tokens * -(-expected.sampled // config.sample_batch)
    if tokens_u:
        seconds["update gradient"] = _GRADIENT * per_token * tokens_u
    seconds["entropy along the step"] = passes * per_token * tokens_e
    if tokens_u:
        seconds["tokens of the update"] = cost["tangents"] * per_token * tokens_u
    if config.attributed:  # for entropy and reward a gradient on E and four directions on U; U's entropy before and after the step
        of_e, of_u = 1 + 2 * _GRADIENT, 8 * cost["tangents"] + 2
        seconds["attribution"] = per_token * (of_e * tokens_e + of_u * tokens_u)
    if config.verify:  # one path more than there are rules
        rules = len(config.what_if)
        paths = (rules + 1) * cost["tangents"] * FIRST_NODES
        seconds["what if"] = per_token * (paths * tokens_e + rules * _GRADIENT * tokens_u)
    facts = {
        "model": f"{sum(p.numel() for p in policy.model.parameters()):,} parameters, {found.parameters:,} measured (known)",
        "update batch U": f"{len(expected.u)} sequences, at most {tokens_u:,} tokens with prompts (known, responses guessed)",
        "held-out batch E": f"{len(expected.e)} sequences, at most {tokens_e:,} tokens with prompts (known, responses guessed)",
        "longest sequence": f"{expected.longest} tokens",
        "micro-batch": f"{policy.micro_batch_tokens} tokens; {config.sample_batch} completions sampled at once",
        "a forward pass": f"{1e6 * per_token:.3g} µs per token (measured)",
        "a step of sampling": f"{1e3 * per_step:.3g} ms for {config.sample_batch} completions (measured)",
        "held now": f"{shown(found.held)} (measured)",
    }
    memory = stages(config, found, config.micro_batch_tokens, config.sample_batch)
    return Forecast(seconds=seconds, memory=memory, facts=facts)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, two digits."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {name}" if seconds < 100 * size else f"{seconds / size:.0f} {name}"
    return f"{seconds:.2g} s"


def _forward_seconds(policy: Policy, longest: int) -> float:
    """Seconds per token of `token_stats` over one micro-batch of the longest sequences; the second of two."""
    count = max(1, min(_TIMED_TOKENS, policy.micro_batch_tokens) // longest)
    size = len(policy.model.get_input_embeddings().weight)
    ids = torch.arange(count * longest).reshape(count, longest) % size
    everywhere = torch.ones(count, longest, dtype=torch.bool)
    response = everywhere.clone()
    response[:, : max(1, longest // 2)] = False
    batch = TokenBatch(ids, everywhere, response, torch.arange(count))
    return _timed(lambda: token_stats(policy, batch), policy.device) / (count * longest)


def _step_seconds(policy: Policy, count: int) -> float:
    """Seconds of one more token for `count` completions, without what attention adds."""
    ids = torch.zeros(count, 1, dtype=torch.int64, device=policy.device)

    def step() -> None:
        with torch.no_grad():
            logits = policy.model(input_ids=ids, use_cache=False).logits[:, -1]
            torch.log_softmax(logits.double(), dim=-1).exp().cumsum(dim=-1)

    return _timed(step, policy.device)


def _timed(run: Any, device: torch.device) -> float:
    """The faster of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
