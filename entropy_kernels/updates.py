r"""One optimizer step as a direction in parameter space.

θ_after = θ + η v, with η the learning rate and v signed (descent is already in it): v is what one
step does *per unit learning rate*. The three rules, g being the clipped gradient of the loss −J:

* ``sgd``      v = −g
* ``rmsprop``  v = −g / (√v̂ + ε)
* ``adamw``    v = −m̂ / (√v̂ + ε) − λ θ

Everything here is arithmetic on dictionaries ``parameter name -> tensor``; nothing knows where the
gradient or the state came from. Source: docs/theory.md, section 8.

Symbols: g gradient, m and u first and second moment (``exp_avg``, ``exp_avg_sq``), m̂ and v̂ the same
bias-corrected, t the number of this step (counted from 1), P = 1/(√v̂ + ε), λ weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels.errors import UserError

RULES = ("adamw", "rmsprop", "sgd")
PARTS = ("momentum", "gradient", "decay")

# Settings under which torch's optimizers do something else than the formulas above.
_UNSUPPORTED = ("amsgrad", "maximize", "nesterov", "centered")


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """An optimizer's memory, by parameter name, and the parameters θ it belongs to.

    Attributes:
        params: name -> θ, any shape. Read by the weight-decay term and to check shapes.
        slots: name -> {slot -> tensor}: ``exp_avg``, ``exp_avg_sq`` of θ's shape, ``step`` with one element
            (the number of steps already taken). A state written by ``torch.optim.RMSprop`` has
            ``square_avg`` and ``step``.
        hyper: name -> the settings of the parameter's group: ``lr``, ``betas``, ``eps``, ``weight_decay``
            (``alpha`` for RMSprop).
    """

    params: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    hyper: dict[str, dict[str, Any]]

    @classmethod
    def fresh(
        cls,
        params: Mapping[str, Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> OptimizerState:
        """Zero moments, no step taken: the state before a first step. Made only when asked for."""
        slots = {
            name: {
                "exp_avg": torch.zeros_like(theta, dtype=_working_dtype(theta)),
                "exp_avg_sq": torch.zeros_like(theta, dtype=_working_dtype(theta)),
                "step": torch.zeros(()),
            }
            for name, theta in params.items()
        }
        hyper = {
            name: {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} for name in params
        }
        return cls(params={name: theta.detach() for name, theta in params.items()}, slots=slots, hyper=hyper)


class UpdateDirection(NamedTuple):
    """v and what it is made of; every dictionary is ``parameter name -> tensor`` of θ's shape.

    Attributes:
        direction: v, float32 (float64 where gradient or θ is float64).
        parts: "momentum" (the moments from before the step), "gradient" (this step's own g) and "decay",
            given v̂ after the step; in each element momentum + gradient + decay, added in this order, is v.
        preconditioner: P = 1/(√v̂ + ε) after the step; ones for ``sgd``.
        gain: κ per parameter: gradient part = −κ · P · (unclipped g). clip·(1−β₁)/(1−β₁ᵗ) for ``adamw``,
            the clip factor alone otherwise.
        clip: min(1, max_grad_norm / (‖g‖ + 1e-6)); 1 without ``max_grad_norm``.
        gradient_norm: ‖g‖ over all parameters, before clipping.
        marginal: clip · Q₀, the diagonal of −∂v/∂(unclipped g) before the clip's projection; empty where not asked for.
        clip_axis: a = √(n/(n + 1e-6)) ĝ with n = ‖g‖ and ĝ = g/n, where the clip is active: −∂v/∂(unclipped g) =
            (clip · Q₀)(1 − a aᵀ). Empty for an inactive clip or where not asked for.
    """

    direction: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]]
    preconditioner: dict[str, Tensor]
    gain: dict[str, float]
    clip: float
    gradient_norm: float
    marginal: Mapping[str, Tensor] = MappingProxyType({})
    clip_axis: Mapping[str, Tensor] = MappingProxyType({})


def update_direction(
    loss_gradient: Mapping[str, Tensor],
    state: OptimizerState,
    *,
    rule: str,
    lr: float | None = None,
    max_grad_norm: float | None = None,
    marginal: bool = False,
) -> UpdateDirection:
    r"""−(m̂/(√v̂+ε) + λθ) for ``adamw``; −g/(√v̂+ε) for ``rmsprop``; −g for ``sgd``.

    AdamW moves θ ← (1 − ηλ)θ − η m̂/(√v̂+ε), which is θ + ηv exactly, v free of η. Its moments are those
    *after* taking in this step's own clipped gradient g:

        m̂ = (β₁ m + (1−β₁) g) / (1−β₁ᵗ),    v̂ = (β₂ u + (1−β₂) g²) / (1−β₂ᵗ),    t = stored step + 1.

    With v̂ held at that value, v is a sum of −P β₁ m/(1−β₁ᵗ) (momentum), −P (1−β₁) g/(1−β₁ᵗ) (gradient)
    and −λθ (decay), P = 1/(√v̂+ε).

    ``rmsprop`` has no first moment and no decay. From an Adam(W) state (slots ``exp_avg_sq``, ``step``) it is
    the step of ``torch.optim.Adam`` with β₁ = 0: v̂ takes in g and is bias-corrected. From a state of
    ``torch.optim.RMSprop`` (slot ``square_avg``) it is that optimizer's own step: v̂ = α u + (1−α) g², no
    bias correction. ``sgd`` reads no slot at all.

    Clipping is that of ``torch.nn.utils.clip_grad_norm_``: g is scaled by min(1, max_grad_norm/(‖g‖+1e-6)).

    How v answers to a change of the unclipped gradient, v̂ and clip moving too, is −(clip · Q₀)(1 − a aᵀ) with

        Q₀ = (1−β₁)/(1−β₁ᵗ) P − (1−β₂)/(1−β₂ᵗ) m̂ g P²/√v̂        (the second term 0 where v̂ = 0),

    g the clipped gradient (docs/theory.md, section 10). ``sgd`` has Q₀ = 1, ``rmsprop`` m̂ = g and a factor 1 or, with
    ``square_avg``, 1 − α.

    Args:
        loss_gradient: name -> gradient of the loss −J, θ's shape, for every parameter of ``state`` and no
            other.
        state: θ, moments and settings before the step.
        rule: "adamw", "rmsprop" or "sgd".
        lr: the learning rate that η stands for. Needed only when parameter groups have different rates: each
            group's part is then scaled by its own rate over ``lr``. With one common rate v does not depend on
            it.
        max_grad_norm: clip threshold > 0, or None for no clipping.
        marginal: whether to fill ``marginal`` and ``clip_axis`` too, up to two more tensors per parameter.

    Returns:
        UpdateDirection, on the device of each gradient.

    Raises:
        UserError: unknown rule; missing or extra names; shapes that differ; a gradient or moment that is not
            finite; a negative second moment; missing slots; AMSGrad, maximize, Nesterov, centred RMSprop,
            momentum of ``sgd``/RMSprop; rates that differ between groups without ``lr``; a result that is not
            finite.
    """
    if rule not in RULES:
        raise UserError(f"rule={rule!r} is not known; choose one of {', '.join(RULES)}.")
    _check_names(loss_gradient, state)
    _check_settings(state, rule)
    scale = _group_scale(state, lr)
    norm = _gradient_norm(loss_gradient)
    clip = _clip_factor(norm, max_grad_norm)

    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    direction: dict[str, Tensor] = {}
    preconditioner: dict[str, Tensor] = {}
    gain: dict[str, float] = {}
    answer: dict[str, Tensor] = {}
    for name, raw in loss_gradient.items():
        theta = state.params[name].detach()
        dtype = torch.promote_types(_working_dtype(raw), _working_dtype(theta))
        g = raw.detach().to(dtype) * clip
        theta = theta.to(device=g.device, dtype=dtype)
        momentum, gradient, decay, P, share, slope = _one_parameter(name, g, theta, state, rule)
        parts["momentum"][name] = scale[name] * momentum
        parts["gradient"][name] = scale[name] * gradient
        parts["decay"][name] = scale[name] * decay
        v = parts["momentum"][name] + parts["gradient"][name] + parts["decay"][name]
        if not bool(torch.isfinite(v).all()):
            raise UserError(
                f"update_direction: the step of parameter {name!r} is not finite. The second moment and eps "
                f"are probably both 0 there (eps={state.hyper[name].get('eps')!r}), or a moment overflowed; "
                "use eps > 0."
            )
        direction[name], preconditioner[name], gain[name] = v, P, scale[name] * clip * share
        if marginal:  # −m̂P is momentum + gradient
            answer[name] = scale[name] * clip * (share * P + slope * g * P * (momentum + gradient))
    axis: dict[str, Tensor] = {}
    if marginal and clip < 1.0:
        length = 1.0 / math.sqrt(norm * (norm + 1e-6))
        axis = {name: raw.detach().to(direction[name].dtype) * length for name, raw in loss_gradient.items()}
    return UpdateDirection(direction, parts, preconditioner, gain, clip, norm, answer, axis)


def _one_parameter(
    name: str, g: Tensor, theta: Tensor, state: OptimizerState, rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | float]:
    """(momentum, gradient, decay, P, share of g in m̂, (∂√v̂/∂g)/g) of one parameter, per unit of its own learning rate."""
    zero = torch.zeros_like(g)
    if rule == "sgd":
        return zero, -g, zero, torch.ones_like(g), 1.0, 0.0

    hyper = state.hyper[name]
    eps = float(_setting(name, hyper, "eps"))
    if rule == "rmsprop" and "square_avg" in state.slots.get(name, {}):
        alpha = float(_setting(name, hyper, "alpha"))
        u = _slot(name, "square_avg", g, state)
        root = (alpha * u + (1.0 - alpha) * g * g).sqrt()
        P = 1.0 / (root + eps)
        return zero, -P * g, zero, P, 1.0, _slope(1.0 - alpha, root)

    beta1, beta2 = (float(beta) for beta in _setting(name, hyper, "betas"))
    t = _steps_taken(name, state) + 1
    u = _slot(name, "exp_avg_sq", g, state)
    # √(û)/√(1−β₂ᵗ), not √(û/(1−β₂ᵗ)): the order of torch.optim, so that float32 rounds alike.
    root = (beta2 * u + (1.0 - beta2) * g * g).sqrt() / math.sqrt(1.0 - beta2**t)
    P = 1.0 / (root + eps)
    slope = _slope((1.0 - beta2) / (1.0 - beta2**t), root)
    if rule == "rmsprop":
        return zero, -P * g, zero, P, 1.0, slope

    m = _slot(name, "exp_avg", g, state)
    correction = 1.0 - beta1**t
    share = (1.0 - beta1) / correction
    decay = -float(_setting(name, hyper, "weight_decay")) * theta
    return -(beta1 / correction) * P * m, -share * P * g, decay, P, share, slope


def _slope(weight: float, root: Tensor) -> Tensor:
    """weight/√v̂, which times g is ∂√v̂/∂g; 0 where v̂ = 0, the middle of the two slopes ±√weight of its kink."""
    return torch.where(root > 0, weight / root, 0.0)


def _working_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything narrower is worked on in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def _check_names(loss_gradient: Mapping[str, Tensor], state: OptimizerState) -> None:
    if not loss_gradient:
        raise UserError("loss_gradient is empty; pass the gradient of every parameter of the state.")
    missing = state.params.keys() - loss_gradient.keys()
    extra = loss_gradient.keys() - state.params.keys()
    if missing or extra:
        raise UserError(
            "loss_gradient and the optimizer state are about different parameters: "
            f"no gradient for [{_listed(missing)}], no state for [{_listed(extra)}]. Both must come from the "
            "same model with the same parameters selected."
        )
    for name, g in loss_gradient.items():
        if g.shape != state.params[name].shape:
            raise UserError(
                f"loss_gradient[{name!r}] has shape {tuple(g.shape)}, its parameter "
                f"{tuple(state.params[name].shape)}; pass the gradient of this very model."
            )
        if not bool(torch.isfinite(g).all()):
            raise UserError(
                f"loss_gradient[{name!r}] holds NaN or infinite entries; look for the batch that made them "
                "(empty responses, overflow in half precision) before asking for a direction."
            )


def _check_settings(state: OptimizerState, rule: str) -> None:
    for name in state.params:
        if name not in state.hyper:
            raise UserError(
                f"state.hyper has no settings for parameter {name!r}; every parameter needs its group's."
            )
        hyper = state.hyper[name]
        on = [key for key in _UNSUPPORTED if hyper.get(key)]
        if hyper.get("momentum") and rule != "adamw":
            on.append("momentum")
        if on:
            raise UserError(
                f"the optimizer settings of {name!r} switch on {', '.join(on)}, which changes the step; "
                f"rule={rule!r} does not cover that. Compute the direction elsewhere and pass it as a file."
            )
        if rule == "rmsprop" and "square_avg" in state.slots.get(name, {}) and hyper.get("weight_decay"):
            raise UserError(
                f"the RMSprop settings of {name!r} have weight_decay={hyper['weight_decay']}, which RMSprop "
                "adds to the gradient; this is not covered. Compute the direction elsewhere and pass it as a "
                "file."
            )


def _group_scale(state: OptimizerState, lr: float | None) -> dict[str, float]:
    """lr_group / lr where groups differ, else 1: v is per unit of *the* learning rate."""
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise UserError(f"lr={lr!r}: expected a positive learning rate, or None.")
    rates = {name: float(hyper["lr"]) for name, hyper in state.hyper.items() if hyper.get("lr") is not None}
    if len(set(rates.values())) <= 1:
        return dict.fromkeys(state.params, 1.0)
    if lr is None:
        raise UserError(
            f"the parameter groups have different learning rates ({sorted(set(rates.values()))}); pass lr=, "
            "the rate that one unit of the direction stands for. Each group is then scaled by its rate over "
            "lr."
        )
    missing = state.params.keys() - rates.keys()
    if missing:
        raise UserError(
            f"the groups have different learning rates but [{_listed(missing)}] has none; give every one."
        )
    return {name: rates[name] / lr for name in state.params}


def _gradient_norm(loss_gradient: Mapping[str, Tensor]) -> float:
    norms = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in loss_gradient.values()]
    return math.hypot(*norms)


def _clip_factor(norm: float, max_grad_norm: float | None) -> float:
    if max_grad_norm is None:
        return 1.0
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise UserError(
            f"max_grad_norm={max_grad_norm!r}: expected a positive number, or None for no clipping."
        )
    return min(1.0, max_grad_norm / (norm + 1e-6))


def _setting(name: str, hyper: Mapping[str, Any], key: str) -> Any:
    if hyper.get(key) is None:
        raise UserError(f"the optimizer settings of {name!r} have no {key!r}; found {sorted(hyper)}.")
    return hyper[key]


def _slot(name: str, slot: str, like: Tensor, state: OptimizerState) -> Tensor:
    """The stored moment, checked, in the working dtype and on the gradient's device."""
    x = state.slots.get(name, {}).get(slot)
    if x is None:
        raise UserError(
            f"the optimizer state of {name!r} has no {slot!r} (found {sorted(state.slots.get(name, {}))}). "
            "Load the "
            'checkpoint\'s own state, or choose rule="sgd", which needs none; OptimizerState.fresh(...) is '
            "the state "
            "before a first step."
        )
    if x.shape != like.shape:
        raise UserError(
            f"{slot!r} of {name!r} has shape {tuple(x.shape)}, its parameter {tuple(like.shape)}."
        )
    if not bool(torch.isfinite(x).all()) or (slot != "exp_avg" and bool((x < 0).any())):
        raise UserError(
            f"{slot!r} of {name!r} holds entries that are not finite (or negative squares): the optimizer "
            "state is damaged, use another checkpoint."
        )
    return x.detach().to(device=like.device, dtype=like.dtype)


def _steps_taken(name: str, state: OptimizerState) -> int:
    step = state.slots.get(name, {}).get("step")
    if step is None:
        raise UserError(
            f"the optimizer state of {name!r} has no 'step', so its moments cannot be bias-corrected. Load "
            "the "
            'checkpoint\'s own state, or choose rule="sgd".'
        )
    count = float(step)
    if not (count >= 0 and count == int(count)):
        raise UserError(f"'step' of {name!r} is {count}; expected a whole number ≥ 0.")
    return int(count)
