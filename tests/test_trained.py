"""Checkpoints that TRL wrote, of every kind we claim: the step it took next is rebuilt from its optimizer state and its batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trained

from entropy_kernels.checkpoints import load_parameters
from entropy_kernels.derivatives import token_tangents
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.direction import get_update, load_state
from entropy_kernels.measure.steps import batch_of, load_policy, measure_step
from entropy_kernels.rl.rollouts import Rollouts

KINDS = {
    "qwen2": dict(family="qwen2"),
    "qwen3": dict(family="qwen3"),
    "gemma2": dict(family="gemma2"),
    "gemma3": dict(family="gemma3"),
    "gpt2": dict(family="gpt2"),
    "qwen2 lora": dict(family="qwen2", lora=True),
    "gpt2 lora": dict(family="gpt2", lora=True),
    "llama, one layer's mlp": dict(family="llama", trained="layers.1.mlp"),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Directory of a run by kind, made once and when first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = trained.train(where=tmp_path_factory.mktemp("trl"), **KINDS[kind])
        return made[kind]

    return of


def config_of(run, **changes):
    recorded = str(run / "recorded" / "rollouts_u.parquet")
    settings = dict(
        ckpt=str(run / "checkpoint-2"), rollouts_u=recorded, rollouts_e=recorded, max_new_tokens=8
    )
    return MeasureConfig(**(settings | changes))


def replayed(config):
    """(policy, direction as one vector, learning rate) of the step on the recorded batch."""
    policy = load_policy(config)
    state, info = load_state(config, policy)
    U = Rollouts.load(config.rollouts_u)
    update = get_update(config, policy, state, U, batch_of(U), info.stored_lr, False)
    return policy, update.direction, info.stored_lr


def flat(direction, policy):
    return torch.cat([direction[name].double().flatten() for name in policy.params])


def without_key_biases(direction):
    """GPT-2's key biases move no probability, since they add one number to every score of a query: their gradient is rounding.

    AdamW divides it by its own size, so the trainer's step in them is noise, which nothing can rebuild and nothing depends on.
    """
    kept = dict(direction)
    for name, v in direction.items():
        if name.endswith("c_attn.bias"):
            kept[name] = v.clone()
            kept[name][len(v) // 3 : 2 * len(v) // 3] = 0
    return kept


def missed(config, after):
    """(1 − cosine, length ratio) of our direction against the step that was taken."""
    policy, direction, rate = replayed(config)
    moved = load_parameters(after, policy.model)
    step = {name: moved[name].double() - p.double() for name, p in policy.params.items()}
    a, b = (flat(without_key_biases(x), policy) for x in (step, direction))
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    return 1 - cosine.item(), (a.norm() / b.norm()).item() / rate


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_that_trl_took_is_rebuilt(runs, kind):
    run, config = runs(kind), config_of(runs(kind), **parameters_of(kind))
    off, length = missed(config, run / "checkpoint-3")
    assert off < 1e-6
    assert length == pytest.approx(1, abs=1e-4)
    for wrong in (replace(config, loss="grpo"), replace(config, update="rmsprop")):
        assert missed(wrong, run / "checkpoint-3")[0] > 1e-5


def test_key_biases_of_gpt2_move_nothing(runs):
    config = config_of(runs("gpt2"))
    policy, direction, _ = replayed(config)
    kept = without_key_biases(direction)
    only = {name: v - kept[name] for name, v in direction.items()}
    batch = batch_of(Rollouts.load(config.rollouts_u))
    assert max(v.abs().max() for v in only.values()) > 0.05
    for along, whole in ((token_tangents(policy, batch, v) for v in (only, direction)),):
        assert along.d_entropy.abs().max() < 1e-5 * whole.d_entropy.abs().max()
        assert along.d_logprob.abs().max() < 1e-5 * whole.d_logprob.abs().max()


@pytest.mark.parametrize("kind", ["qwen2", "qwen2 lora", "gpt2 lora"])
def test_the_step_taken_and_its_replay_change_entropy_alike(runs, kind, tmp_path):
    run = runs(kind)
    common = dict(etas=(trained.RATE / 10,), second_order=False, truth="integrated")
    replay = measure_step(config_of(run, **common), directory=str(tmp_path), progress=False)
    for update in (f"next:{run / 'checkpoint-3'}", str(tmp_path / "update.safetensors")):
        config = config_of(run, update=update, rollouts_u=None, **common)
        result = measure_step(config, progress=False)
        change, want = (r.report["changes"][0]["true_integrated"].value for r in (result, replay))
        assert abs(want) > 1e-4
        assert change == pytest.approx(want, rel=1e-3)
        assert result.report["parameters"] == replay.report["parameters"]
    found = replay.report["parameters"]
    assert (found["numbers"] < found["numbers_in_model"]) == ("lora" in kind)
    assert replay.report["config"]["parameters"] == "all"


def parameters_of(kind):
    """The flag that an optimizer over a part of the parameters needs."""
    return {"parameters": r"layers\.1\.mlp"} if "trained" in KINDS[kind] else {}
