"""Checkpoints that TRL wrote, of every kind we claim: the step it took next is rebuilt from its optimizer state and its batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trained

from entropy_kernels.checkpoints import load_model, load_optimizer_state, load_parameters
from entropy_kernels.derivatives import token_tangents
from entropy_kernels.errors import UserError
from entropy_kernels.measure import steps
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.direction import get_update, load_state, read_direction
from entropy_kernels.measure.steps import batch_of, load_policy, measure_step
from entropy_kernels.policy import TokenBatch
from entropy_kernels.rl.rollouts import Rollouts
from entropy_kernels.stats import Estimate

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


@pytest.fixture
def sharded(runs, tmp_path):
    """The qwen2 run once more: model/ in shards, optimizer.pt numbered in another order and its names; and the next model in shards."""
    run = runs("qwen2")
    for step in (2, 3):
        model, tokenizer = load_model(run / f"checkpoint-{step}")
        model.save_pretrained(tmp_path / str(step) / "model", max_shard_size="10KB")
        tokenizer.save_pretrained(tmp_path / str(step) / "model")
        assert (tmp_path / str(step) / "model" / "model.safetensors.index.json").is_file()
    state = load_optimizer_state(run / "checkpoint-2", load_model(run / "checkpoint-2")[0])
    names = sorted(state.params)
    groups = [
        [i for i, n in enumerate(names) if (state.hyper[n]["weight_decay"] > 0) == decayed]
        for decayed in (False, True)
    ]
    saved = {
        "state": {i: state.slots[name] for i, name in enumerate(names)},
        "param_groups": [{**state.hyper[names[group[0]]], "params": group} for group in groups],
    }
    torch.save(saved, tmp_path / "2" / "optimizer.pt")
    (tmp_path / "2" / "optimizer_param_names.json").write_text(json.dumps(names))
    return tmp_path


def test_shards_and_a_list_of_names_lead_to_the_same_direction(runs, sharded):
    run = runs("qwen2")
    config, other = config_of(run), config_of(run, ckpt=str(sharded / "2"))
    (policy, want, rate), (_, got, other_rate) = replayed(config), replayed(other)
    assert rate == other_rate and all(torch.equal(got[name], want[name]) for name in want)
    assert missed(other, sharded / "3")[0] < 1e-6
    taken = [
        read_direction(replace(c, update=f"next:{after}", rollouts_u=None), policy, rate).direction
        for c, after in ((config, run / "checkpoint-3"), (other, sharded / "3"))
    ]
    assert all(torch.equal(taken[0][name], taken[1][name]) for name in want)


def test_a_part_of_what_the_optimizer_trained(runs):
    """Clipping depends on all parameters, so the part of a clipped step cannot be had from a part of the gradient."""
    run = runs("qwen2")
    part = config_of(run, parameters=r"layers\.1\.", max_grad_norm=0.0)
    with pytest.raises(UserError, match="selects 12 of the 26 .*--max-grad-norm 0"):
        replayed(replace(part, max_grad_norm=1.0))
    _, whole, _ = replayed(replace(part, parameters="all"))
    _, found, _ = replayed(part)
    assert 0 < len(found) < len(whole)
    for name, v in found.items():
        torch.testing.assert_close(v, whole[name], rtol=1e-4, atol=1e-4 * float(whole[name].abs().max()))
    policy = load_policy(part)
    taken = read_direction(
        replace(part, update=f"next:{run / 'checkpoint-3'}", rollouts_u=None), policy, 1e-3
    )
    assert taken.direction.keys() == found.keys()


def test_no_optimizer_state_means_sgd_and_must_be_said(runs, tmp_path):
    run = runs("qwen2")
    ckpt = shutil.copytree(run / "checkpoint-2", tmp_path / "ckpt")
    (ckpt / "optimizer.pt").unlink()
    config = config_of(run, ckpt=str(ckpt), second_order=False, truth="direct")
    with pytest.raises(UserError, match="pass --update sgd --learning-rate"):
        measure_step(config, progress=False)
    plain = replace(config, update="sgd")
    with pytest.raises(UserError, match="pass --learning-rate or --etas"):
        measure_step(plain, progress=False)
    result = measure_step(replace(plain, learning_rate=1e-3, max_grad_norm=0.0), progress=False)
    assert result.report["update"]["norm"] == pytest.approx(
        result.report["update"]["gradient_norm"], rel=1e-5
    )
    of_model = replace(plain, ckpt=None, model=str(ckpt), etas=(1e-3,))
    assert measure_step(of_model, progress=False).report["update"]["rule"] == "sgd"


@pytest.mark.parametrize(
    ("ckpt", "after", "message"),
    [
        ("qwen2", "qwen2 lora", "is a PEFT adapter, the checkpoint is not"),
        ("qwen2 lora", "qwen2", "is a full model, the checkpoint is not"),
        ("qwen2 lora", "gpt2 lora", "does not fit"),
        ("qwen2", "qwen3", "missing|has no tensor"),
    ],
)
def test_the_next_checkpoint_of_another_run_is_refused(runs, ckpt, after, message):
    config = config_of(runs(ckpt), update=f"next:{runs(after) / 'checkpoint-3'}", rollouts_u=None)
    with pytest.raises(UserError, match=message):
        read_direction(config, load_policy(config), 1e-3)


def test_an_optimizer_state_of_another_kind_is_refused(runs, tmp_path):
    """An adapter's state beside a full model, and a full model's where only a part is measured by another pattern."""
    ckpt = shutil.copytree(runs("qwen2") / "checkpoint-2", tmp_path / "ckpt")
    shutil.copyfile(runs("qwen2 lora") / "checkpoint-2" / "optimizer.pt", ckpt / "optimizer.pt")
    with pytest.raises(UserError, match="parameter groups of sizes"):
        replayed(config_of(runs("qwen2"), ckpt=str(ckpt)))
    with pytest.raises(UserError, match="parameter groups of sizes"):
        replayed(config_of(runs("llama, one layer's mlp"), parameters=r"layers\.0\.mlp|norm"))


def shuffled(rollouts, seed):
    """The same completions in another order of prompts, and of completions within a prompt."""
    generator = np.random.default_rng(seed)
    groups = generator.permutation(np.unique(rollouts.group_index))
    rows = np.concatenate(
        [generator.permutation(np.flatnonzero(np.asarray(rollouts.group_index) == g)) for g in groups]
    )
    return rollouts.to_table().take(rows)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2 lora"])
def test_numbers_do_not_depend_on_padding_micro_batches_or_order(runs, kind, tmp_path, monkeypatch):
    config = config_of(runs(kind), precision="float64", etas=(1e-5, 1e-3))
    want = numbers(measure_step(config, progress=False).report)

    path = tmp_path / "shuffled.parquet"
    pq.write_table(shuffled(Rollouts.load(config.rollouts_u), 1), path)
    narrow = replace(config, micro_batch_tokens=20)
    order = replace(config, rollouts_u=str(path), rollouts_e=str(path))
    for other in (narrow, order):
        compare(numbers(measure_step(other, progress=False).report), want)
    monkeypatch.setattr(steps, "batch_of", padded_left)
    compare(numbers(measure_step(config, progress=False).report), want)


def padded_left(rollouts):
    """Every sequence at the end of its row, behind two columns of padding that no sequence reaches."""
    right = batch_of(rollouts)
    n, width = right.input_ids.shape
    rolled = {name: torch.zeros(n, width + 2, dtype=getattr(right, name).dtype) for name in right._fields[:3]}
    for i in range(n):
        columns = right.attention_mask[i].bool().nonzero().flatten()
        for name, grid in rolled.items():
            grid[i, width + 2 - len(columns) :] = getattr(right, name)[i, columns]
    return TokenBatch(**rolled, prompt_index=right.prompt_index)


def numbers(report):
    """Every number of the report that is found on the samples, by its path."""
    found = {}

    def walk(item, path):
        if isinstance(item, Estimate):
            walk({"value": item.value, "stderr": item.stderr}, path)
        elif isinstance(item, dict):
            for key, value in item.items():
                walk(value, f"{path}.{key}")
        elif isinstance(item, list | tuple):
            for i, value in enumerate(item):
                walk(value, f"{path}[{i}]")
        elif isinstance(item, float):
            found[path] = item

    for section in ("entropy", "update", "changes", "derivatives", "sanity", "nodes"):
        walk(report.get(section, {}), section)
    return found


def compare(got, want):
    assert got.keys() == want.keys() and len(want) > 40
    for path, x in want.items():
        assert got[path] == pytest.approx(x, rel=1e-6, abs=1e-12, nan_ok=True), path


def parameters_of(kind):
    """The flag that an optimizer over a part of the parameters needs."""
    return {"parameters": r"layers\.1\.mlp"} if "trained" in KINDS[kind] else {}
