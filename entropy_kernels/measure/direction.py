r"""The direction v that is measured: the step an optimizer would take, the step that was taken, or one from a file.

adamw, rmsprop, sgd   g = −Σ ω A ∇S on the update batch U, then the optimizer's rule
next:CHECKPOINT       v = (θ_next − θ)/η, the step that really happened, at the learning rate η it was taken with
FILE.safetensors      v by parameter name, per unit of learning rate, such as another report's update.safetensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attribution import TokenWeights, total_weights
from ..checkpoints import (
    StepInfo,
    adapter_parameters,
    load_optimizer_state,
    load_parameters,
    optimizer_entries,
)
from ..checkpoints import learning_rate as stored_learning_rate
from ..derivatives import token_gradient
from ..errors import UserError
from ..policy import Parameters, Policy, TokenBatch, check_direction
from ..rl.rollouts import Rollouts
from ..updates import OptimizerState, UpdateDirection, update_direction
from .along import bar
from .config import RULES, MeasureConfig
from .losses import loss_policy, loss_terms, token_weights
from .store import NOWHERE, Store


def load_state(config: MeasureConfig, policy: Policy) -> tuple[OptimizerState, StepInfo | None]:
    """The checkpoint's optimizer state for the measured parameters; an empty one for a rule that reads none.

    Raises:
        UserError: no or unfitting state where the rule needs it; an optimizer that trained more than is measured and clipped its
            gradient, since that depends on the gradient of all it trained.
    """
    empty = OptimizerState(params=policy.params, slots={}, hyper={name: {} for name in policy.params})
    if config.ckpt is None:
        return empty, None
    entries = optimizer_entries(config.ckpt)
    if config.update == "sgd" or not replayed(config):
        known = config.learning_rate is None and entries is not None
        return empty, stored_learning_rate(config.ckpt) if known else None
    trained = adapter_parameters(policy.model) or [name for name, _ in policy.model.named_parameters()]
    part = policy.params.keys() < set(trained) and entries == len(trained)
    if part and config.max_grad_norm > 0:
        raise UserError(
            f"parameters: {config.parameters!r} selects {len(policy.params)} of the {len(trained)} parameters that the checkpoint's "
            "optimizer trained, and how far it clips the gradient depends on all of them. Pass --max-grad-norm 0 if the trainer does not "
            "clip, --update next:CHECKPOINT for these parameters' share of the step that was taken, or measure all parameters."
        )
    state = load_optimizer_state(
        config.ckpt, policy.model, trainable=trained if part else list(policy.params)
    )
    state = OptimizerState(
        params=policy.params,
        slots={name: state.slots[name] for name in policy.params},
        hyper={name: state.hyper[name] for name in policy.params},
    )
    return state, stored_learning_rate(config.ckpt)


def replayed(config: MeasureConfig) -> bool:
    """Whether the direction is made from an update batch, rather than read."""
    return config.update in RULES


def read_direction(config: MeasureConfig, policy: Policy, eta: float) -> UpdateDirection:
    """The direction of `next:CHECKPOINT` or of a file, as one part that is called "step".

    Raises:
        UserError: nothing there, or other parameters than the policy's.
    """
    name = config.update.removeprefix("next:")
    taken = name != config.update
    found = load_parameters(name, policy.model, dtype=policy.dtype) if taken else _read_file(name)
    direction: Parameters = {}
    for key, p in policy.params.items():
        if key not in found:
            raise UserError(
                f"update: {name} has no tensor {key!r}; expected one for each of the {len(policy.params)} measured parameters. "
                "Pass a file or checkpoint of this very model, and the same --parameters."
            )
        x = found[key].to(p.device, torch.float64)
        direction[key] = ((x - p.double()) / eta if taken and x.shape == p.shape else x).to(p.dtype)
    check_direction(policy, direction)
    if not all(bool(torch.isfinite(v).all()) for v in direction.values()):
        raise UserError(
            f"update: {name} holds NaN or infinite entries, which are no direction. Pass one that is finite throughout."
        )
    if not any(bool(v.any()) for v in direction.values()):
        raise UserError(
            f"update: {name} is no step at all: the parameters are the same. Pass the checkpoint after this one."
        )
    return UpdateDirection(
        direction=direction,
        parts={"step": direction},
        preconditioner={},  # a step that is read does not say what made it
        gain={},
        clip=math.nan,
        gradient_norm=math.nan,
    )


def _read_file(name: str) -> Parameters:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(name).is_file():
        raise UserError(
            f"update: there is no file {name}; expected a .safetensors file with one tensor per parameter."
        )
    try:
        return load_file(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"update: {name} cannot be read as safetensors: {error}. Copy it again.") from error


def get_update(
    config: MeasureConfig,
    policy: Policy,
    state: OptimizerState,
    U: Rollouts,
    batch: TokenBatch,
    eta: float,
    progress: bool,
    store: Store = NOWHERE,
    *,
    weights: Mapping[str, TokenWeights] | None = None,
    factor: Tensor | None = None,
    marginal: bool = False,
) -> UpdateDirection:
    """The gradient of the loss on U and the direction the optimizer makes of it.

    `weights` are those of `token_weights`, which are made here if they are not given; `factor` [N, T] multiplies those of the policy
    gradient; `marginal` is that of `update_direction`.
    """
    if weights is None:
        weights = token_weights(config, U, batch, loss_terms(config, policy, U, batch, store))
    parts = dict(weights)
    if factor is not None:
        g, q = parts["policy_gradient"]
        assert g is not None and q is None
        parts["policy_gradient"] = TokenWeights(factor * g)
    weight = total_weights(parts)
    loss = loss_policy(config, policy)
    with policy.as_trained(), bar(progress, "update gradient", len(U)) as tick:
        gradient = store.in_parts(
            "gradient",
            lambda parts: token_gradient(
                loss,
                batch,
                logprob_weight=weight.logprob,
                entropy_weight=weight.entropy,
                progress=tick,
                parts=parts,
            ),
            running=True,
        )
    gradient = {name: gradient[name].to(policy.device) for name in policy.params}
    return update_direction(
        gradient,
        state,
        rule=config.update,
        lr=eta,
        max_grad_norm=config.max_grad_norm or None,
        marginal=marginal,
    )


def describe_update(
    config: MeasureConfig, update: UpdateDirection, eta: float, info: StepInfo | None
) -> dict[str, Any]:
    """The direction's norm, its parts and how it came about."""

    def norm(x: Parameters) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for t in x.values()))

    return {
        "rule": config.update,
        "loss": config.loss,
        "advantage": config.advantage,
        "learning_rate": eta,
        "norm": norm(update.direction),
        "parts": {name: norm(part) for name, part in update.parts.items()},
        "gradient_norm": update.gradient_norm,
        "clip": update.clip,
        "optimizer_steps": None if info is None else info.optimizer_steps,
    }
