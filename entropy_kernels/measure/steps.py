r"""The order of events: checkpoint → rollouts → update direction v → entropy along θ + ηv → estimates → report.

    U ──gradient──► g ──optimizer state──► v          E ──tangents──► δH₁, nodes of the integrated truth
                                                        ──curvature──► δH₂      ──values at θ+ηv──► direct truth

No arithmetic happens here; formulas live in `stats`, `updates` and `derivatives`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..certify import certify
from ..checkpoints import StepInfo
from ..derivatives import token_stats, token_tangents
from ..errors import UserError
from ..policy import Policy, TokenBatch
from ..report import Result
from ..rl.advantages import degenerate_groups
from ..rl.rollouts import Rollouts
from ..rl.sampling import sample_rollouts
from ..rl.tasks import load_prompts, resolve_reward, split_prompts
from ..selection import count_parameters
from .along import Along, bar, logprob_mismatch
from .config import MeasureConfig
from .direction import describe_update, get_update, load_state, read_direction, replayed
from .writing import environment, token_table, write_update

_MISMATCH_ALLOWED = 0.05  # mean |difference| of log-probs, nats, between a sampler and the policy


def measure_step(config: MeasureConfig, *, directory: str | None = None, progress: bool = True) -> Result:
    """Measure and predict the change of entropy in one optimizer step.

    Args:
        config: what to measure.
        directory: where to write rollouts and the update as soon as they exist; None writes nothing.
        progress: whether to say on stderr how far it is: bars on a terminal, and a line per finished stage.

    Returns:
        The result; `result.save(directory)` writes the report.

    Raises:
        UserError: input that cannot be measured, saying what to do.
        CertificationError: the model's derivatives are wrong, naming the layer.
    """
    resolve_reward(config.reward)  # a wrong name is said before anything is loaded
    clock = _Clock(progress)
    progress = progress and sys.stderr.isatty()  # bars need a terminal; lines per stage do not
    with exact_arithmetic():
        with clock("load"):
            policy = load_policy(config)
            state, info = load_state(config, policy)
            eta_checkpoint, etas = choose_etas(config, info)
            surroundings = environment(policy)
        with clock("certify"):
            certificate = certify(policy)
        with clock("rollouts"):
            U, E = get_rollouts(config, policy, directory, progress)
            batch_e = batch_of(E)
            check_samples(policy, E, batch_e, "rollouts_e", config.rollouts_e)
        with clock("update"):
            if U is None:
                update = read_direction(config, policy, eta_checkpoint)
            else:
                batch_u = batch_of(U)
                check_samples(policy, U, batch_u, "rollouts_u", config.rollouts_u)
                update = get_update(config, policy, state, U, batch_u, eta_checkpoint, progress)
            direction, about_update = update.direction, describe_update(config, update, eta_checkpoint, info)
            del state, update  # moments and parts are several times the model
            if directory is not None:
                write_update(directory, direction)
        with clock("entropy"):
            along = Along(config, policy, direction, batch_e, etas, progress)
        tables = {
            "rollouts_e": E.to_table(),
            "tokens_e": token_table(batch_e, policy.tokenizer, along.token_columns()),
        }
        if U is not None:
            with clock("tokens of U"), bar(progress, "update tokens", len(U)) as tick:
                tokens_u = token_tangents(policy, batch_u, direction, progress=tick)
            tables["rollouts_u"] = U.to_table()
            tables["tokens_u"] = token_table(batch_u, policy.tokenizer, tokens_u._asdict())
    report = {
        "config": {**config.to_json(), "learning_rate": eta_checkpoint, "etas": list(etas)},
        "environment": surroundings,
        "certify": certificate.to_json(),
        "parameters": {
            "selected": config.parameters,
            **count_parameters(policy.model, policy.params),
        },
        "definitions": definitions(config),
        "rollouts": {**({} if U is None else {"u": describe(U)}), "e": describe(E)},
        "update": about_update,
        **along.report(E, eta_checkpoint),
        "timings": clock.seconds,
    }
    return Result(report=report, tables=tables)


def load_policy(config: MeasureConfig) -> Policy:
    """The policy at the checkpoint's parameters."""
    return Policy.from_pretrained(
        config.source,
        temperature=config.temperature,
        parameters=config.parameters,
        dtype=config.precision,
        device=config.device,
        micro_batch_tokens=config.micro_batch_tokens,
        base=config.model if config.ckpt is not None else None,
    )


def choose_etas(config: MeasureConfig, info: StepInfo | None) -> tuple[float, tuple[float, ...]]:
    """The checkpoint's learning rate, and the ascending learning rates to measure at, that one among them."""
    if config.learning_rate is not None:
        eta = config.learning_rate
    elif info is not None and info.stored_lr > 0:
        eta = info.stored_lr
    elif info is not None and not config.etas:
        raise UserError(
            f"learning_rate: {info.explanation()} Pass --learning-rate, for example the one in the log."
        )
    elif config.etas:
        eta = config.etas[-1]
    else:
        raise UserError(
            "learning_rate: there is none without an optimizer state; pass --learning-rate or --etas."
        )
    if config.etas:
        return eta, tuple(sorted(set(config.etas)))
    low, high = min(1e-8, eta / 10), 10 * eta
    grid = np.geomspace(low, high, 8)
    nearest = int(np.abs(np.log(grid / eta))[1:-1].argmin()) + 1
    grid[nearest] = eta
    return eta, tuple(float(x) for x in grid)


def get_rollouts(
    config: MeasureConfig, policy: Policy, directory: str | None, progress: bool
) -> tuple[Rollouts | None, Rollouts]:
    """U with rewards and advantages, and E: read from Parquet or sampled from exactly π; saved as soon as they exist.

    U is None where the direction is read and needs no batch.
    """
    wanted = replayed(config)
    u = None if config.rollouts_u is None else Rollouts.load(config.rollouts_u)
    e = None if config.rollouts_e is None else Rollouts.load(config.rollouts_e)
    need_u = wanted and u is None
    if need_u or e is None:
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
        prompts = [p for p in prompts if tuple(p.token_ids) not in used]  # U and E share no prompt
        reward = resolve_reward(config.reward)
        answers = {prompt.prompt_id: prompt.answer for prompt in prompts}
        chosen_u, chosen_e = split_prompts(
            prompts,
            config.prompts_u if need_u else 0,
            config.prompts_e if e is None else 0,
            config.seed,
        )

        def sample(chosen: Any, group_size: int, seed: int) -> Rollouts:
            drawn = sample_rollouts(
                policy.model,
                policy.tokenizer,
                chosen,
                group_size=group_size,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=seed,
                batch_size=config.sample_batch,
                progress=progress,
            )
            return drawn.with_rewards(reward, answers)

        if need_u:
            u = sample(chosen_u, config.group_size, config.seed)
        if e is None:
            e = sample(chosen_e, config.group_size_e, config.seed + 1)
    if u is not None and u.advantage is None:
        u = u.with_advantages(config.advantage)
    if directory is not None:
        if u is not None:
            u.save(f"{directory}/rollouts_u.parquet")
        e.save(f"{directory}/rollouts_e.parquet")
    return u, e


def batch_of(rollouts: Rollouts) -> TokenBatch:
    """The rollouts as a padded batch."""
    return TokenBatch(**rollouts.token_batch(0))


def check_samples(
    policy: Policy, rollouts: Rollouts, batch: TokenBatch, argument: str, path: str | None
) -> None:
    """Refuse completions from a file whose recorded log-probs are not this policy's; without log-probs nothing can be said.

    Raises:
        UserError: the mean difference is more than a sampler's arithmetic explains.
    """
    if path is None or rollouts.logprobs is None:
        return
    found = logprob_mismatch(
        rollouts, token_stats(policy, batch).logprob.numpy(), batch.response_mask.numpy()
    )
    if not found <= _MISMATCH_ALLOWED:
        raise UserError(
            f"{argument}: the log-probs in {path} differ from the policy's by {found:.3g} nats per token on average (at most "
            f"{_MISMATCH_ALLOWED} is allowed): they were not sampled from this checkpoint at temperature {policy.temperature:g}. "
            "Sample again, or pass the checkpoint and --temperature they were sampled with."
        )


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


def definitions(config: MeasureConfig) -> dict[str, str]:
    """The one definition of entropy of this report, in words."""
    unit = "per response token" if config.per == "token" else "per response"
    return {
        "policy": f"softmax(logits / {config.temperature:g}), no truncation of the vocabulary.",
        "entropy": (
            f"Entropy of the next-token law summed over the response, {unit}, in nats. The first end-of-sequence token belongs to "
            f"the response; nothing after it does, and responses are cut at {config.max_new_tokens} tokens."
        ),
        "estimator": (
            f"Self-normalised importance sampling, weights {config.estimator.replace('_', ' ')}; samples drawn at the checkpoint; "
            "errors over prompts."
        ),
        "change": "Entropy at θ + ηv minus entropy at the checkpoint θ, on the same samples; v is the optimizer's step per unit η.",
    }


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Within: float32 products keep float32 precision (TF32 off, whatever was set before)."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


class _Clock:
    """Seconds per stage."""

    def __init__(self, show: bool) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        if self.show:
            print(f"{stage}: {self.seconds[stage]:.1f} s", file=sys.stderr, flush=True)


def with_output(config: MeasureConfig, output: str) -> MeasureConfig:
    """The same measurement, with the directory that was chosen for it."""
    return replace(config, output=output)
