"""Every direction against one real step of torch.optim on a copy."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from entropy_kernels.errors import UserError
from entropy_kernels.updates import OptimizerState, update_direction

SHAPES = {"layer.weight": (5, 3), "layer.bias": (5,), "norm.weight": (3,)}


def make_params(dtype, scale=1.0):
    gen = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(shape, generator=gen).to(dtype) for name, shape in SHAPES.items()}


def make_gradient(seed, dtype, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    return {
        # from 1e-6 to 10 so that eps and the square root both matter
        name: scale
        * (torch.randn(shape, generator=gen) * 10 ** (-6 + 7 * torch.rand(shape, generator=gen))).to(dtype)
        for name, shape in SHAPES.items()
    }


def groups_of(params, **settings):
    """Two groups with their own weight decay, as trainers make them."""
    decayed = [p for n, p in params.items() if n == "layer.weight"]
    rest = [p for n, p in params.items() if n != "layer.weight"]
    decay = settings.pop("weight_decay", 0.0)
    return [
        {"params": decayed, "weight_decay": decay, **settings},
        {"params": rest, "weight_decay": 0.0, **settings},
    ]


def state_of(optimizer, params):
    """The optimizer's own state by name, cloned."""
    slots, hyper = {}, {}
    for name, p in params.items():
        slots[name] = {key: x.clone() for key, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
        group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
        hyper[name] = {key: value for key, value in group.items() if key != "params"}
    return OptimizerState(params={n: p.detach().clone() for n, p in params.items()}, slots=slots, hyper=hyper)


def real_step(optimizer, params, gradient, max_grad_norm=None):
    before = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        p.grad = gradient[name].clone()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm)
    optimizer.step()
    return {name: params[name].detach() - before[name] for name in params}


def warmed_up(make, dtype, steps, scale=1.0):
    params = {name: p.requires_grad_() for name, p in make_params(dtype, scale).items()}
    optimizer = make(params)
    for seed in range(steps):
        real_step(optimizer, params, make_gradient(seed, dtype))
    return params, optimizer


def relative_error(a, b):
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)


ADAMW = {"betas": (0.85, 0.97), "eps": 1e-5, "weight_decay": 0.3}


def adamw(params, lr=0.01):
    return torch.optim.AdamW(groups_of(params, **ADAMW), lr=lr)


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
def test_adamw_is_the_real_step(steps, max_grad_norm):
    lr = 0.01
    params, optimizer = warmed_up(partial(adamw, lr=lr), torch.float64, max(steps, 1))
    if steps == 0:
        params = {name: p.requires_grad_() for name, p in make_params(torch.float64).items()}
        optimizer = torch.optim.AdamW(groups_of(params, **ADAMW), lr=lr)
        state = OptimizerState.fresh(params, lr=lr, betas=ADAMW["betas"], eps=ADAMW["eps"])
        state.hyper["layer.weight"]["weight_decay"] = ADAMW["weight_decay"]
    else:
        state = state_of(optimizer, params)
    gradient = make_gradient(99, torch.float64)
    result = update_direction(gradient, state, rule="adamw", max_grad_norm=max_grad_norm)
    moved = real_step(optimizer, params, gradient, max_grad_norm)
    assert relative_error({n: lr * v for n, v in result.direction.items()}, moved) < 1e-12


def test_adamw_in_float32():
    # Tiny parameters and a large rate: the subtraction θ_after − θ then loses little of what is tested.
    lr = 1.0
    params, optimizer = warmed_up(partial(adamw, lr=lr), torch.float32, 5, scale=1e-3)
    state, gradient = state_of(optimizer, params), make_gradient(99, torch.float32)
    result = update_direction(gradient, state, rule="adamw", max_grad_norm=0.5)
    assert all(v.dtype == torch.float32 for v in result.direction.values())
    moved = real_step(optimizer, params, gradient, 0.5)
    assert relative_error({n: lr * v for n, v in result.direction.items()}, moved) < 2e-6


def test_half_precision_gradient_gives_float32():
    params = make_params(torch.bfloat16)
    state = OptimizerState.fresh(params, lr=1e-3)
    result = update_direction(make_gradient(3, torch.bfloat16), state, rule="adamw")
    assert {v.dtype for v in result.direction.values()} == {torch.float32}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_rmsprop_from_an_adam_state_is_adam_without_momentum(max_grad_norm):
    lr = 0.01
    settings = {"betas": (0.0, 0.97), "eps": 1e-5}
    params, optimizer = warmed_up(
        lambda p: torch.optim.Adam(groups_of(p, **settings), lr=lr), torch.float64, 4
    )
    state = state_of(optimizer, params)
    for hyper in state.hyper.values():  # neither momentum nor decay of an AdamW state belong to this rule
        hyper.update(betas=(0.9, 0.97), weight_decay=0.7)
    gradient = make_gradient(99, torch.float64)
    result = update_direction(gradient, state, rule="rmsprop", max_grad_norm=max_grad_norm)
    moved = real_step(optimizer, params, gradient, max_grad_norm)
    assert relative_error({n: lr * v for n, v in result.direction.items()}, moved) < 1e-12


def test_rmsprop_from_its_own_state_is_torch_rmsprop():
    lr = 0.01
    params, optimizer = warmed_up(
        lambda p: torch.optim.RMSprop(groups_of(p, alpha=0.9, eps=1e-5), lr=lr), torch.float64, 4
    )
    state, gradient = state_of(optimizer, params), make_gradient(99, torch.float64)
    result = update_direction(gradient, state, rule="rmsprop", max_grad_norm=0.5)
    moved = real_step(optimizer, params, gradient, 0.5)
    assert relative_error({n: lr * v for n, v in result.direction.items()}, moved) < 1e-12


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_sgd_is_the_real_step(max_grad_norm):
    lr = 1.0  # SGD's small steps would drown in the rounding of θ_after − θ
    params, optimizer = warmed_up(lambda p: torch.optim.SGD(groups_of(p), lr=lr), torch.float64, 2)
    state, gradient = state_of(optimizer, params), make_gradient(99, torch.float64)
    result = update_direction(gradient, state, rule="sgd", max_grad_norm=max_grad_norm)
    moved = real_step(optimizer, params, gradient, max_grad_norm)
    assert relative_error({n: lr * v for n, v in result.direction.items()}, moved) < 1e-12


def test_clip_factor_has_the_floor_of_torch():
    """At a norm of 1e-6 the 1e-6 in the denominator halves the gradient."""
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    gradient = {"w": torch.tensor([6e-7, 8e-7], dtype=torch.float64)}
    result = update_direction(gradient, OptimizerState.fresh(params, lr=1.0), rule="sgd", max_grad_norm=1e-6)
    assert result.gradient_norm == pytest.approx(1e-6, rel=1e-12)
    assert result.clip == pytest.approx(0.5, rel=1e-12)


def test_clipping_uses_the_norm_over_all_parameters():
    gradient = make_gradient(5, torch.float64)
    result = update_direction(
        gradient, OptimizerState.fresh(make_params(torch.float64), lr=1.0), rule="sgd", max_grad_norm=0.1
    )
    norm = math.sqrt(sum(float(v.square().sum()) for v in result.direction.values()))
    assert norm == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("rule", ["adamw", "rmsprop", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_sum_to_the_direction_exactly(rule, dtype):
    params, optimizer = warmed_up(adamw, dtype, 3)
    result = update_direction(
        make_gradient(9, dtype), state_of(optimizer, params), rule=rule, max_grad_norm=0.5
    )
    parts = result.parts
    for name, v in result.direction.items():
        assert torch.equal(parts["momentum"][name] + parts["gradient"][name] + parts["decay"][name], v)


def test_parts_mean_what_they_say():
    """Without old moments there is no momentum part, without weight decay no decay part."""
    params, optimizer = warmed_up(adamw, torch.float64, 3)
    state, gradient = state_of(optimizer, params), make_gradient(9, torch.float64)
    full = update_direction(gradient, state, rule="adamw")
    for name in SHAPES:
        decay = -state.hyper[name]["weight_decay"] * state.params[name]
        torch.testing.assert_close(full.parts["decay"][name], decay, rtol=1e-14, atol=0)
        state.slots[name]["exp_avg"].zero_()
    without = update_direction(gradient, state, rule="adamw")
    for name in SHAPES:
        assert float(without.parts["momentum"][name].abs().max()) == 0
        torch.testing.assert_close(
            full.direction[name] - without.direction[name],
            full.parts["momentum"][name],
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("rule", ["adamw", "rmsprop", "sgd"])
def test_gradient_part_is_gain_times_preconditioned_gradient(rule):
    params, optimizer = warmed_up(adamw, torch.float64, 3)
    gradient = make_gradient(9, torch.float64)
    result = update_direction(gradient, state_of(optimizer, params), rule=rule, max_grad_norm=0.5)
    assert result.clip < 1
    for name, g in gradient.items():
        rebuilt = -result.gain[name] * result.preconditioner[name] * g
        torch.testing.assert_close(rebuilt, result.parts["gradient"][name], rtol=1e-13, atol=0)


def test_groups_with_their_own_rates():
    params = {name: p.requires_grad_() for name, p in make_params(torch.float64).items()}
    groups = groups_of(params, **ADAMW)
    groups[0]["lr"], groups[1]["lr"] = 0.02, 0.005
    optimizer = torch.optim.AdamW(groups)
    real_step(optimizer, params, make_gradient(0, torch.float64))
    state, gradient = state_of(optimizer, params), make_gradient(99, torch.float64)
    with pytest.raises(UserError, match="different learning rates"):
        update_direction(gradient, state, rule="adamw")
    result = update_direction(gradient, state, rule="adamw", lr=0.02)
    moved = real_step(optimizer, params, gradient)
    assert relative_error({n: 0.02 * v for n, v in result.direction.items()}, moved) < 1e-12
    for name, g in gradient.items():
        rebuilt = -result.gain[name] * result.preconditioner[name] * g
        torch.testing.assert_close(rebuilt, result.parts["gradient"][name], rtol=1e-13, atol=0)


def test_one_common_rate_does_not_matter_even_if_it_is_zero():
    params = make_params(torch.float64)
    gradient = make_gradient(4, torch.float64)
    at_zero = update_direction(gradient, OptimizerState.fresh(params, lr=0.0), rule="adamw", lr=1e-5)
    usual = update_direction(gradient, OptimizerState.fresh(params, lr=1e-3), rule="adamw")
    assert all(torch.equal(at_zero.direction[n], usual.direction[n]) for n in SHAPES)


def test_inputs_are_left_alone():
    params, optimizer = warmed_up(adamw, torch.float64, 3)
    state, gradient = state_of(optimizer, params), make_gradient(9, torch.float64)
    first = update_direction(gradient, state, rule="adamw", max_grad_norm=0.5)
    second = update_direction(gradient, state, rule="adamw", max_grad_norm=0.5)
    assert all(torch.equal(first.direction[n], second.direction[n]) for n in SHAPES)
    assert float(state.slots["layer.bias"]["step"]) == 3


def spoil(state, gradient, what):
    if what == "missing":
        del gradient["layer.bias"]
    elif what == "extra":
        gradient["other"] = torch.zeros(2)
    elif what == "shape":
        gradient["layer.bias"] = torch.zeros(1, 5)
    elif what == "nan":
        gradient["layer.bias"][2] = float("nan")
    elif what == "no moments":
        state.slots["layer.bias"] = {}
    elif what == "no second moment":
        del state.slots["layer.bias"]["exp_avg_sq"]
    elif what == "negative square":
        state.slots["layer.bias"]["exp_avg_sq"][0] = -1.0
    elif what == "moment shape":
        state.slots["layer.bias"]["exp_avg"] = torch.zeros(1)
    elif what in ("amsgrad", "maximize"):
        state.hyper["layer.bias"][what] = True
    elif what == "no betas":
        del state.hyper["layer.bias"]["betas"]
    elif what == "0/0":
        state.hyper["layer.bias"]["eps"] = 0.0
        gradient["layer.bias"].zero_()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no gradient for \\[layer.bias\\]"),
        ("extra", "no state for \\[other\\]"),
        ("shape", "layer.bias.*shape"),
        ("nan", "layer.bias.*NaN"),
        ("no moments", "layer.bias"),
        ("no second moment", "exp_avg_sq"),
        ("negative square", "damaged"),
        ("moment shape", "exp_avg"),
        ("amsgrad", "amsgrad"),
        ("maximize", "maximize"),
        ("no betas", "betas"),
        ("0/0", "not finite"),
    ],
)
def test_refusals(what, message):
    state = OptimizerState.fresh(make_params(torch.float64), lr=1e-3)
    gradient = make_gradient(1, torch.float64)
    spoil(state, gradient, what)
    with pytest.raises(UserError, match=message):
        update_direction(gradient, state, rule="adamw")


def test_refused_arguments():
    state, gradient = (
        OptimizerState.fresh(make_params(torch.float64), lr=1e-3),
        make_gradient(1, torch.float64),
    )
    with pytest.raises(UserError, match="adamw, rmsprop, sgd"):
        update_direction(gradient, state, rule="adam")
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="max_grad_norm"):
            update_direction(gradient, state, rule="sgd", max_grad_norm=threshold)
    with pytest.raises(UserError, match="lr="):
        update_direction(gradient, state, rule="sgd", lr=-1.0)
    state.hyper["layer.bias"]["momentum"] = 0.9
    with pytest.raises(UserError, match="momentum"):
        update_direction(gradient, state, rule="sgd")
