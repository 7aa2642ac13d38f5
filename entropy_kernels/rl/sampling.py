"""Completions drawn from exactly π, with Hugging Face's generation loop.

Source: docs/theory.md, section 1. N completions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from entropy_kernels import distributed
from entropy_kernels.errors import UserError
from entropy_kernels.rl.rollouts import Rollouts
from entropy_kernels.rl.tasks import Prompt
from entropy_kernels.truncation import Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    seed: int,
    batch_size: int,
    eos_token_ids: Sequence[int] | None = None,
    progress: bool = True,
    parts: MutableMapping[int, tuple[Tensor, ...]] | None = None,
) -> Rollouts:
    r"""t_k ~ π(· | t_<k, p), ``group_size`` completions of every prompt; π is softmax(z/τ), or p_a/s on its kept set.

    Token k is min{a : F(a) > u}, F the cumulated probabilities of π in float64 and u uniform. The u's of a
    completion are fixed by (seed, prompt_id, its number in the group) alone, so the same completions come out
    (up to the rounding of the logits) whatever the batch size, the order of the prompts, or the ranks that
    batches are dealt out to (`distributed`); the global random state is neither read nor written. Nothing else shapes the law: the
    model's own generation settings (top-k, penalties, forbidden or forced tokens, ...) are set aside and put
    back afterwards, as is train mode.

    A completion ends with its first end-of-sequence token, which belongs to it ("stop"), or at
    ``max_new_tokens`` ("length").

    Args:
        model: causal LM.
        tokenizer: for the text of the completions (special tokens left out) and the padding id.
        prompts: with distinct ``prompt_id``; a prompt's position here is its ``group_index``.
        group_size: completions per prompt, ≥ 1.
        max_new_tokens: limit per completion, ≥ 1.
        temperature: τ > 0.
        truncation: which tokens may be drawn; None: all.
        seed: any integer.
        batch_size: completions drawn together; prompts of similar length share a batch.
        eos_token_ids: tokens that end a completion; None: those of ``model.generation_config``, else of the
            tokenizer; an empty sequence: none, every completion has full length.
        progress: show a bar counting tokens, with the time left if nothing stops early.
        parts: batches that were drawn already, by their number; new ones are added.

    Returns:
        Rollouts ordered by (group, sample), with the log-probs under π.

    Raises:
        UserError: sizes out of range, repeated prompt ids, prompts that leave no room for ``max_new_tokens``,
            token ids the model does not have, no end-of-sequence token known, logits that are not finite.
    """
    _check_sizes(prompts, group_size, max_new_tokens, temperature, batch_size)
    eos = _eos_ids(model, tokenizer, eos_token_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else 0)
    _check_fit(model, prompts, max_new_tokens, (*eos, pad))
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos) or None,
        pad_token_id=pad,
        use_cache=True,
    )

    generate: Any = model.generate
    rows = [(group, sample) for group in range(len(prompts)) for sample in range(group_size)]
    todo = sorted(range(len(rows)), key=lambda i: len(prompts[rows[i][0]].token_ids))
    completions: list[tuple[int, ...]] = [()] * len(rows)
    logprobs: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
    with (
        _bare(model),
        tqdm(total=len(rows) * max_new_tokens, unit="token", desc="sampling", disable=not progress) as bar,
    ):
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        known = distributed.of_first(lambda: {} if parts is None else dict(parts.items()))

        def draw(number: int) -> tuple[Tensor, ...]:
            batch = batches[number]
            names = [(prompts[rows[i][0]].prompt_id, rows[i][1]) for i in batch]
            drawer = _Draw(_uniforms(seed, names, max_new_tokens), temperature, bar, truncation)
            ids, mask = _left_padded([prompts[rows[i][0]].token_ids for i in batch], pad, model.device)
            out = generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([drawer]),
            )
            return out[:, ids.shape[1] :].cpu(), torch.stack(drawer.logprobs, dim=1).cpu().float()

        def put(number: int, drawn: tuple[Tensor, ...]) -> None:
            for i, tokens, recorded in zip(batches[number], drawn[0].tolist(), drawn[1].numpy(), strict=True):
                length = next((k + 1 for k, token in enumerate(tokens) if token in eos), len(tokens))
                completions[i] = tuple(tokens[:length])
                logprobs[i] = recorded[:length]
            waiting.remove(number)
            left = sum(len(batches[later]) for later in waiting)
            bar.total = (
                bar.n + left * max_new_tokens // distributed.count()
            )  # the bar is of this rank's share
            bar.refresh()

        waiting = set(range(len(batches)))
        for number in known:
            put(number, known[number])
        for number, received in distributed.dealt(sorted(waiting), draw):
            drawn = tuple(received)
            if parts is not None:
                parts[number] = drawn
            put(number, drawn)

    return Rollouts(
        prompt_id=tuple(prompts[group].prompt_id for group, _ in rows),
        prompt=tuple(prompts[group].text for group, _ in rows),
        completion=tuple(str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in completions),
        finish_reason=tuple("stop" if ids[-1] in eos else "length" for ids in completions),
        group_index=np.asarray([group for group, _ in rows], dtype=np.int32),
        sample_index=np.asarray([sample for _, sample in rows], dtype=np.int32),
        prompt_ids=tuple(prompts[group].token_ids for group, _ in rows),
        completion_ids=tuple(completions),
        logprobs=tuple(logprobs),
        sampling={
            "temperature": float(temperature),
            **({} if truncation is None else asdict(truncation)),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "eos_token_ids": list(eos),
        },
    )


class _Draw(LogitsProcessor):
    """Leaves one token per row standing, drawn from π; greedy decoding then takes it.

    The loop's own sampling would do, but draws from one global stream in float32; this way each completion
    has its own stream and its log-probs are those of the very law drawn from.
    """

    def __init__(
        self, uniforms: Tensor, temperature: float, bar: tqdm, truncation: Truncation | None = None
    ) -> None:
        self.uniforms, self.temperature, self.truncation, self.bar = uniforms, temperature, truncation, bar
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A loop that checks for the end one step late may ask once more than needed: the last column serves.
        column = min(len(self.logprobs), self.uniforms.shape[1] - 1)
        z = scores.double()
        if self.truncation is not None:
            z = z.masked_fill(~self.truncation.kept(scores, self.temperature), -torch.inf)
        logp = torch.log_softmax(z / self.temperature, dim=-1)
        F = logp.exp().cumsum(dim=-1)
        total = F[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise UserError(
                "sampling: the model's logits are not finite (NaN or overflow); check its weights and dtype."
            )
        u = self.uniforms[:, column, None].to(F.device) * total
        u = torch.minimum(
            u, torch.nextafter(total, torch.zeros_like(total))
        )  # rounding must not reach the total
        token = torch.searchsorted(F, u, right=True)
        self.logprobs.append(logp.gather(1, token)[:, 0])
        self.bar.update(scores.shape[0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _uniforms(seed: int, names: Sequence[tuple[str, int]], count: int) -> Tensor:
    """[len(names), count] float64 in [0, 1): one independent stream per (seed, prompt_id, sample)."""
    streams = []
    for prompt_id, sample in names:
        key = blake2b(repr((seed, prompt_id, sample)).encode(), digest_size=16).digest()
        streams.append(np.random.Generator(np.random.PCG64(int.from_bytes(key, "big"))).random(count))
    return torch.from_numpy(np.stack(streams))


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode, its own generation settings (which fill what a call leaves open) set aside."""
    modes = [(module, module.training) for module in model.modules()]
    own = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


def _left_padded(prompts: Sequence[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64 [B, longest]."""
    width = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _eos_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Sequence[int] | None
) -> tuple[int, ...]:
    if given is not None:
        return tuple(int(token) for token in given)
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise UserError(
            "neither the model's generation settings nor its tokenizer name an end-of-sequence token; pass "
            "eos_token_ids (an empty list lets every completion run to max_new_tokens)."
        )
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def _check_sizes(
    prompts: Sequence[Prompt], group_size: int, max_new_tokens: int, temperature: float, batch_size: int
) -> None:
    for name, value in (
        ("group_size", group_size),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise UserError(f"{name}={value}: expected at least 1.")
    if not (np.isfinite(temperature) and temperature > 0):
        raise UserError(
            f"temperature={temperature}: expected a positive number. At 0 the policy is deterministic and "
            "its entropy is 0."
        )
    if not prompts:
        raise UserError("prompts is empty; sample at least one prompt.")
    if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
        raise UserError(
            "prompts: some prompt_id occurs twice; ids must be distinct (use group_size for more samples)."
        )


def _check_fit(
    model: PreTrainedModel, prompts: Sequence[Prompt], max_new_tokens: int, special: Sequence[int]
) -> None:
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and len(longest.token_ids) + max_new_tokens > room:
        raise UserError(
            f"prompt {longest.prompt_id!r} has {len(longest.token_ids)} tokens; with "
            f"max_new_tokens={max_new_tokens} that exceeds the model's {room} positions. Drop long prompts "
            "(max_prompt_tokens) or lower max_new_tokens."
        )
    embeddings: Any = model.get_input_embeddings()
    vocabulary = int(embeddings.num_embeddings)
    ids = {token for prompt in prompts for token in prompt.token_ids} | set(special)
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise UserError(
            f"token ids from {min(ids)} to {max(ids)}, but the model's vocabulary is 0..{vocabulary - 1}: "
            "the tokenizer does not belong to this model."
        )
