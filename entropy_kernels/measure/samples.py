"""The update batch U and the held-out batch E: sampled from exactly π, or read from files and checked against it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..derivatives import token_stats
from ..errors import UserError
from ..policy import Policy, TokenBatch
from ..rl.advantages import degenerate_groups
from ..rl.rollouts import Rollouts
from ..rl.sampling import sample_rollouts
from ..rl.tasks import Prompt, load_prompts, resolve_reward, split_prompts
from ..truncation import Truncation
from .along import logprob_mismatch
from .config import MeasureConfig
from .direction import replayed
from .store import NOWHERE, Store

_MISMATCH_ALLOWED = 0.05  # mean |difference| of log-probs, nats, between a sampler and the policy


def get_rollouts(
    config: MeasureConfig, policy: Policy, directory: str | None, progress: bool, store: Store = NOWHERE
) -> tuple[Rollouts | None, Rollouts]:
    """U with rewards and advantages, and E: read from Parquet or sampled from exactly π; saved as soon as they exist.

    U is None where the direction is read and needs no batch.
    """
    wanted = replayed(config)
    u = None if config.rollouts_u is None else read_rollouts("rollouts_u", config.rollouts_u, policy)
    e = None if config.rollouts_e is None else read_rollouts("rollouts_e", config.rollouts_e, policy)
    need_u = wanted and u is None
    if need_u or e is None:
        chosen_u, chosen_e = choose_prompts(config, policy, u, e)
        reward = resolve_reward(config.reward)
        answers = {prompt.prompt_id: prompt.answer for prompt in (*chosen_u, *chosen_e)}

        def sample(name: str, chosen: list[Prompt], group_size: int, seed: int) -> Rollouts:
            file = store.file(f"{name}.parquet")
            kept = distributed.of_first(
                lambda: Rollouts.load(file) if file is not None and file.exists() else None
            )
            if kept is not None:
                return kept
            parts = store.parts(name)
            drawn = sample_rollouts(
                policy.model,
                policy.tokenizer,
                chosen,
                group_size=group_size,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                truncation=policy.truncation,
                seed=seed,
                batch_size=config.sample_batch,
                progress=progress,
                parts=parts,
            )
            rewarded = distributed.of_first(lambda: drawn.with_rewards(reward, answers))
            if file is not None:
                rewarded.save(file)
            return rewarded

        if need_u:
            u = sample("rollouts_u", chosen_u, config.group_size, config.seed)
        if e is None:
            e = sample("rollouts_e", chosen_e, config.group_size_e, config.seed + 1)
    if u is not None and u.advantage is None:
        try:
            u = u.with_advantages(config.advantage)
        except UserError as error:
            raise UserError(f"rollouts_u: {config.rollouts_u or 'the samples'}: {error}") from error
    _check_apart(config, u, e)
    if directory is not None:
        if u is not None:
            u.save(f"{directory}/rollouts_u.parquet")
        e.save(f"{directory}/rollouts_e.parquet")
    return u, e


def choose_prompts(
    config: MeasureConfig, policy: Policy, u: Rollouts | None, e: Rollouts | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to sample U and E from, none for a batch that is there already or not needed; U and E share none."""
    assert config.dataset is not None  # the configuration saw to it
    prompts = load_prompts(
        config.dataset,
        tokenizer=policy.tokenizer,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        chat_template=config.chat_template,
        config=config.dataset_config,
        split=config.dataset_split,
    )
    used = {ids for rollouts in (u, e) if rollouts is not None for ids in rollouts.prompt_ids}
    prompts = [p for p in prompts if tuple(p.token_ids) not in used]
    need_u = replayed(config) and u is None
    return split_prompts(
        prompts, config.prompts_u if need_u else 0, config.prompts_e if e is None else 0, config.seed
    )


class Lengths(NamedTuple):
    """Tokens of every sequence of U and of E, the longest response allowed where none is sampled yet; how many have to be sampled."""

    u: list[int]
    e: list[int]
    sampled: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.u + self.e)


def lengths(config: MeasureConfig, policy: Policy) -> Lengths:
    """The lengths of the sequences to come, without sampling any.

    Raises:
        UserError: prompts or rollouts that cannot be read.
    """
    u = None if config.rollouts_u is None else read_rollouts("rollouts_u", config.rollouts_u, policy)
    e = None if config.rollouts_e is None else read_rollouts("rollouts_e", config.rollouts_e, policy)
    there = [
        [] if r is None else [len(p) + len(c) for p, c in zip(r.prompt_ids, r.completion_ids, strict=True)]
        for r in (u, e)
    ]
    chosen: tuple[list[Prompt], list[Prompt]] = ([], [])
    if e is None or (replayed(config) and u is None):
        chosen = choose_prompts(config, policy, u, e)
    to_come = [
        [len(prompt.token_ids) + config.max_new_tokens for prompt in prompts for _ in range(size)]
        for prompts, size in zip(chosen, (config.group_size, config.group_size_e), strict=True)
    ]
    return Lengths(there[0] + to_come[0], there[1] + to_come[1], sum(map(len, to_come)))


def read_rollouts(argument: str, path: str, policy: Policy) -> Rollouts:
    """Completions from a file, in tokens that the model has.

    Raises:
        UserError: unreadable, or token ids beyond the model's vocabulary.
    """
    found = Rollouts.load(path)
    size = len(policy.model.get_input_embeddings().weight)
    largest = max(max(ids) for ids in (*found.prompt_ids, *found.completion_ids))
    if largest >= size:
        raise UserError(
            f"{argument}: {path} holds the token id {largest}, but the model's vocabulary is 0 to {size - 1}: it was written with another "
            "tokenizer. Sample with the tokenizer of this checkpoint."
        )
    return found


def _check_apart(config: MeasureConfig, u: Rollouts | None, e: Rollouts) -> None:
    """Prompts are the independent units: there must be two or more held out, and none of them in the update batch.

    Naming one file for both is a choice, and the definitions of the report say that it was made.
    """
    held_out = set(e.prompt_ids)
    if len(held_out) < 2:
        raise UserError(
            f"rollouts_e: {config.rollouts_e} holds completions of {len(held_out)} prompt, expected at least 2: prompts are the "
            "independent units that errors are taken over. Sample more prompts."
        )
    shared = held_out & set(() if u is None else u.prompt_ids)
    if shared and config.rollouts_e != config.rollouts_u:
        raise UserError(
            f"rollouts_e: {len(shared)} of the {len(held_out)} prompts in {config.rollouts_e} are in the update batch "
            f"({config.rollouts_u or 'sampled'}) too. A step has to be judged on prompts that did not make it: take other prompts, or the "
            "same file for both if that is wanted."
        )


def batch_of(rollouts: Rollouts) -> TokenBatch:
    """The rollouts as a padded batch."""
    return TokenBatch(**rollouts.token_batch(0))


def check_samples(
    policy: Policy,
    rollouts: Rollouts,
    batch: TokenBatch,
    argument: str,
    path: str | None,
    store: Store = NOWHERE,
    *,
    stale: bool = False,
) -> None:
    """Refuse completions that this policy cannot have drawn, or from a file whose recorded log-probs are not this policy's.

    Without recorded log-probs, and without truncation, nothing can be said. Log-probs of a stale batch are an earlier policy's.

    Raises:
        UserError: another temperature or truncation than the file names, a token outside what a truncated policy keeps, or a mean
            difference of log-probs that is more than a sampler's arithmetic explains.
    """
    if path is not None:
        _check_law(policy, rollouts, argument, path)
    recorded = path is not None and rollouts.logprobs is not None and not stale
    if not recorded and policy.truncation is None:
        return
    values = store.in_parts(
        f"check_{argument}", lambda parts: token_stats(policy, batch, parts=parts)._asdict()
    )
    _check_support(policy, values["logprob"][batch.response_mask], argument, path)
    found = logprob_mismatch(rollouts, values["logprob"].numpy(), batch.response_mask.numpy())
    if recorded and not found <= _MISMATCH_ALLOWED:
        raise UserError(
            f"{argument}: the log-probs in {path} differ from the policy's by {found:.3g} nats per token on average (at most "
            f"{_MISMATCH_ALLOWED} is allowed): they were not sampled from this checkpoint at temperature {policy.temperature:g}, "
            f"{_limits(policy)}. Sample again, or pass the checkpoint, --temperature, --top-k and --top-p they were sampled with"
            + ("; for the batch of an earlier policy, --ratio token." if argument == "rollouts_u" else ".")
        )


def _limits(policy: Policy) -> str:
    return "without truncation" if policy.truncation is None else f"with {policy.truncation}"


def _check_law(policy: Policy, rollouts: Rollouts, argument: str, path: str) -> None:
    """What the file says of its sampler must be what is measured; other engines' files may say nothing."""
    limits = policy.truncation or Truncation()
    ours = {"temperature": policy.temperature, "top_k": limits.top_k, "top_p": limits.top_p}
    if "temperature" not in rollouts.sampling:
        return
    theirs = {name: rollouts.sampling.get(name) for name in ours}
    if theirs["top_k"] is not None and theirs["top_k"] <= 0:
        theirs["top_k"] = None  # as samplers write "no limit"
    if theirs["top_p"] == 1:
        theirs["top_p"] = None
    wrong = [name for name in ours if ours[name] != theirs[name]]
    if wrong:
        flags = " ".join(
            f"--{name.replace('_', '-')} {theirs[name]}" for name in wrong if theirs[name] is not None
        )
        leave = ", ".join(f"--{name.replace('_', '-')}" for name in wrong if theirs[name] is None)
        remedy = " and ".join(
            filter(None, [f"pass {flags}" if flags else "", f"leave out {leave}" if leave else ""])
        )
        raise UserError(
            f"{argument}: the completions in {path} were not sampled from this checkpoint as it is measured. They have "
            + ", ".join(f"{name} {'none' if theirs[name] is None else theirs[name]}" for name in wrong)
            + "; the policy measured has "
            + ", ".join(f"{name} {'none' if ours[name] is None else ours[name]}" for name in wrong)
            + f". To measure the policy that drew these samples {remedy}, or sample again."
        )


def _check_support(policy: Policy, logprob: Tensor, argument: str, path: str | None) -> None:
    outside = int((logprob == -torch.inf).sum())
    if outside:
        raise UserError(
            f"{argument}: {outside} of the {len(logprob)} response tokens{'' if path is None else f' in {path}'} lie outside what "
            f"{policy.truncation} keeps, so the policy that is measured cannot have drawn them: they come from the full policy, or from "
            "other limits. Leave --top-k and --top-p out to measure the full policy, pass the limits that the samples were drawn with, "
            "or sample again."
        )


def compared(rollouts: Rollouts, logprob: Tensor, batch: TokenBatch) -> dict[str, float | str]:
    """How far the sampler's log-probs are from the policy's, nats per token, and where that is refused; in words where unknown."""
    if rollouts.logprobs is None:
        return {"sampler": "its log-probs are not recorded, so nothing shows that it was this policy"}
    theirs = torch.from_numpy(np.concatenate([np.asarray(x, dtype=np.float64) for x in rollouts.logprobs]))
    apart = (theirs - logprob[batch.response_mask].double()).abs()
    return {
        "sampler_mean_difference": float(apart.mean()),
        "sampler_largest_difference": float(apart.max()),
        "sampler_refused_above": _MISMATCH_ALLOWED,
    }


def describe(rollouts: Rollouts) -> dict[str, Any]:
    """Sizes and rewards of a batch of rollouts."""
    groups = np.asarray(rollouts.group_index)
    found: dict[str, Any] = {
        "prompts": len(set(groups.tolist())),
        "sequences": len(rollouts),
        "tokens": sum(len(ids) for ids in rollouts.completion_ids),
        "truncated_share": rollouts.truncated_share,
    }
    if rollouts.reward is not None:
        found["mean_reward"] = float(np.mean(rollouts.reward))
        alike, count = degenerate_groups(
            torch.as_tensor(np.asarray(rollouts.reward)), torch.as_tensor(groups).long()
        )
        found["degenerate_groups_share"] = alike / count
    return found
