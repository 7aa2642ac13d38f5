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

from .. import distributed
from ..attribution import TokenWeights
from ..certify import certify
from ..checkpoints import StepInfo
from ..derivatives import token_tangents
from ..errors import UserError
from ..policy import Policy
from ..report import Result
from ..rl.tasks import resolve_reward
from ..selection import count_parameters
from ..truncation import truncation
from ..updates import OptimizerState
from .along import Along, bar
from .attribute import attribute
from .config import MeasureConfig
from .direction import describe_update, get_update, load_state, read_direction, replayed
from .fisher_stage import structure
from .identity import identity
from .influence import influence_table
from .losses import check_logged, describe_loss, loss_terms, token_weights
from .memory import fitted
from .samples import batch_of, check_samples, compared, describe, get_rollouts, lengths
from .shares import Batches, influences
from .statistics import two_batch
from .store import close_store, open_store
from .writing import environment, token_table, write_update


def measure_step(config: MeasureConfig, *, directory: str | None = None, progress: bool = True) -> Result:
    """Measure and predict the change of entropy in one optimizer step; within `distributed.joined` all ranks together.

    Args:
        config: what to measure.
        directory: where the report is saved, rollouts and the update as soon as they exist, and until it is complete what a run that is
            stopped can go on from (config.resume); None writes nothing. Of several ranks, rank 0 alone writes and says.
        progress: whether to say on stderr how far it is: bars on a terminal, and a line per finished stage.

    Returns:
        The result.

    Raises:
        UserError: input that cannot be measured, saying what to do.
        CertificationError: the model's derivatives are wrong, naming the layer.
    """
    if not distributed.is_first():
        directory, progress = None, False
    resolve_reward(config.reward)  # a wrong name is said before anything is loaded
    if replayed(config):
        check_logged(config)
    store = open_store(directory, identity(config), resume=config.resume)
    clock = _Clock(progress)
    progress = progress and sys.stderr.isatty()  # bars need a terminal; lines per stage do not
    with exact_arithmetic():
        with clock("load"):
            policy = load_policy(config)
            state, info = load_state(config, policy)
            eta_checkpoint, etas = choose_etas(config, info)
            surroundings = environment(policy)
            if config.memory_budget is not None:
                config, policy = fitted(config, policy, lengths(config, policy), store)
        with clock("certify"):
            certificate = store.json("certify", lambda: certify(policy).to_json())
        with clock("rollouts"):
            U, E = get_rollouts(config, policy, directory, progress, store)
            batch_e = batch_of(E)
            check_samples(policy, E, batch_e, "rollouts_e", config.rollouts_e, store)
        with clock("update"):
            weights: dict[str, TokenWeights] = {}
            if U is None:
                update = read_direction(config, policy, eta_checkpoint)
            else:
                batch_u = batch_of(U)
                stale = config.ratio != "none"
                check_samples(policy, U, batch_u, "rollouts_u", config.rollouts_u, store, stale=stale)
                terms = loss_terms(config, policy, U, batch_u, store)
                weights = token_weights(config, U, batch_u, terms)
                update = get_update(
                    config,
                    policy,
                    state,
                    U,
                    batch_u,
                    eta_checkpoint,
                    progress,
                    store,
                    weights=weights,
                    marginal=config.attributed,
                )
            direction, about_update = update.direction, describe_update(config, update, eta_checkpoint, info)
            if U is not None:
                about_update["terms"] = describe_loss(config, U, batch_u, terms)
            if directory is not None:
                write_update(directory, direction)
        if config.attributed and U is not None:
            with clock("attribution"):
                data = Batches(U, batch_u, weights, E, batch_e)
                found = influences(config, policy, update, data, eta_checkpoint, progress, store)
        sections: dict[str, Any] = {}
        tables: dict[str, Any] = {}
        if config.fisher:
            with clock("fisher"):
                sections["fisher"], tables["fisher"] = structure(
                    config, policy, update, weights or None, U, None if U is None else batch_u, E, batch_e, eta_checkpoint, progress, store
                )  # fmt: skip
        if not config.verify:
            state = OptimizerState(params={}, slots={}, hyper={})
        del update  # moments and parts are several times the model
        with clock("entropy"):
            along = Along(config, policy, direction, batch_e, etas, progress, store)
        tables |= {
            "rollouts_e": E.to_table(),
            "tokens_e": token_table(batch_e, policy.tokenizer, along.token_columns()),
            "influence": influence_table(along, E),
        }
        if U is not None:
            with clock("tokens of U"), bar(progress, "update tokens", len(U)) as tick:
                tokens_u = store.in_parts(
                    "tokens_u",
                    lambda parts: token_tangents(
                        policy, batch_u, direction, progress=tick, parts=parts
                    )._asdict(),
                )
            tables["rollouts_u"] = U.to_table()
            if config.attributed:
                with clock("what if" if config.what_if else "proxies"):
                    done = attribute(
                        config,
                        policy,
                        found,
                        data,
                        tokens_u,
                        direction,
                        along,
                        state,
                        eta_checkpoint,
                        progress,
                        store,
                    )
                tokens_u |= done.columns
                tables["sequences_u"] = done.sequences
                sections["attribution"] = done.section
            tables["tokens_u"] = token_table(batch_u, policy.tokenizer, tokens_u)
    rollouts = {
        "e": {**describe(E), **compared(E, torch.as_tensor(np.asarray(along.base.values.logprob)), batch_e)}
    }
    if U is not None:
        law = {"sampler": "an earlier policy (ratio)"} if stale else compared(U, tokens_u["logprob"], batch_u)
        rollouts = {"u": {**describe(U), **law}, **rollouts}
    report = {
        "config": {**config.to_json(), "learning_rate": eta_checkpoint, "etas": list(etas)},
        "environment": surroundings,
        "certify": certificate,
        "parameters": {
            "selected": config.parameters,
            **count_parameters(policy.model, policy.params),
        },
        "definitions": definitions(config),
        "rollouts": rollouts,
        "update": about_update,
        **along.report(E, eta_checkpoint),
        **sections,
        "timings": clock.seconds,
    }
    if "one_batch" in sections.get("fisher", {}):
        report["statistics"]["one_batch"] = sections["fisher"].pop("one_batch")
    if "attribution" in sections:
        first, shares = report["derivatives"]["first"], found["entropy"].total("shares").total
        groups = batch_u.prompt_index.numpy()
        report["statistics"]["two_batch"] = two_batch(first, shares, groups, eta_checkpoint)
    result = Result(report=report, tables=tables)
    if directory is not None:
        result.save(directory)
        close_store(directory)
    return result


def load_policy(config: MeasureConfig) -> Policy:
    """The policy at the checkpoint's parameters."""
    return Policy.from_pretrained(
        config.source,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        parameters=config.parameters,
        dtype=config.precision,
        device=distributed.own_device(config.device),
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


_BASELINES = {
    "none": "",
    "position": " Scores less a baseline: the mean return at the same position over other prompts.",
    "group": " Scores less a baseline: the mean return at the same position over the prompt's other responses.",
    "ema": " Scores less a baseline: a moving average of returns over the prompts before.",
    "regression": " Scores less a baseline: a regression on row statistics, fitted on other prompts.",
    "least_error": " Scores less a baseline: of row statistics, with the coefficients of least error on other prompts.",
    "critic": " Scores less a baseline: a linear critic on hidden states, fitted on other prompts.",
}


def definitions(config: MeasureConfig) -> dict[str, str]:
    """The one definition of entropy of this report, in words."""
    limits = truncation(config.top_k, config.top_p)
    truncated = (
        "no truncation of the vocabulary"
        if limits is None
        else f"truncated to {limits} and renormalised. The tokens kept at each position are those that the checkpoint keeps, under every "
        "derivative and at every η. Full entropies, of the law before truncation, are named so and mixed with nothing else"
    )
    unit = "per response token" if config.per == "token" else "per response"
    same = config.rollouts_e is not None and config.rollouts_e == config.rollouts_u
    return {
        "policy": f"softmax(logits / {config.temperature:g}), {truncated}.",
        "entropy": (
            f"Entropy of the next-token law summed over the response, {unit}, in nats. The first end-of-sequence token belongs to "
            f"the response; nothing after it does, and responses are cut at {config.max_new_tokens} tokens."
        ),
        "estimator": (
            f"Self-normalised importance sampling, weights {config.estimator.replace('_', ' ')}; samples drawn at the checkpoint; "
            f"errors over prompts.{_BASELINES[config.baseline]}"
        ),
        "change": "Entropy at θ + ηv minus entropy at the checkpoint θ, on the same samples; v is the optimizer's step per unit η."
        + (" The samples are the update batch itself, not held-out ones." if same else ""),
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
