"""Wrong inputs, each through the real command line: status 1, one paragraph that says what to do, nothing left behind.

The list is the table of docs/running.md as a test. One tiny checkpoint is made for all; a case gets a directory of its own, spoils what
it needs in it, and names words that the paragraph must have.
"""

# ruff: noqa: E501 - a table, one case in a line
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from characters import character_llama, character_tokenizer
from safetensors.torch import load_file, save_file

from entropy_kernels import certify as certify_module
from entropy_kernels.checkpoints import decay_parameter_names
from entropy_kernels.measure import steps
from entropy_kernels.measure.cli import main

SMALL = (
    "--prompts-u 2 --group-size 2 --prompts-e 2 --max-new-tokens 3 --etas 1e-5 --truth integrated --no-second-order"
).split()


def save_checkpoint(directory, **options):
    """A model, its tokenizer, and an AdamW state written as the Hugging Face Trainer does."""
    model = character_llama(hidden_size=16, intermediate_size=24, **options)
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    named, decayed = dict(model.named_parameters()), set(decay_parameter_names(model))
    groups = [[p for n, p in named.items() if (n in decayed) == wanted] for wanted in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-5
    )
    for p in named.values():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))


def save_prompts(path, rows=8, **columns):
    lines = [{"question": f"{i}+{i}=", "answer": str(2 * i), **columns} for i in range(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))


def rollouts(directory, name, first, changes=None, size=2):
    """A rollouts file of two prompts, numbered from `first`, two completions each; `changes` maps columns to new values."""
    ids = [5, 6, 7]
    rows = [(prompt, sample) for prompt in (first, first + 1) for sample in range(size)]
    table = {
        "prompt_id": [f"p{prompt}" for prompt, _ in rows],
        "prompt": ["x" for _ in rows],
        "completion": ["4" for _ in rows],
        "finish_reason": ["length" for _ in rows],
        "group_index": pa.array([prompt for prompt, _ in rows], pa.int32()),
        "sample_index": pa.array([sample for _, sample in rows], pa.int32()),
        "prompt_ids": [[10 + prompt, 11] for prompt, _ in rows],
        "completion_ids": [[*ids[: 1 + sample], 8] for _, sample in rows],
        "reward": pa.array([float(sample) for _, sample in rows], pa.float32()),
    }
    table |= changes or {}
    path = directory / f"{name}.parquet"
    pq.write_table(pa.table({key: value for key, value in table.items() if value is not None}), path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    save_checkpoint(directory / "ckpt")
    save_prompts(directory / "prompts.jsonl")
    return directory


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A directory with a checkpoint and prompts of its own, as the current one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def certified(monkeypatch):
    """What is wrong here is not the model's derivatives; `test_a_good_input_is_measured` certifies."""
    passed = certify_module.Certificate(first=0, second=0, first_difference=0, second_difference=0)
    monkeypatch.setattr(steps, "certify", lambda policy: passed)


def edit_weights(here, change):
    path = here / "ckpt" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_optimizer(here, change):
    path = here / "ckpt" / "optimizer.pt"
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def adapter(here, *, weights=True, **settings):
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(here / "ckpt"),
    }
    write(here / "adapter" / "adapter_config.json", json.dumps({**config, **settings}))
    if weights:
        key = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
        save_file({key: torch.ones(2, 16)}, here / "adapter" / "adapter_model.safetensors")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def nan_in(tensors):
    tensors["model.norm.weight"][0] = torch.nan


def second(here):
    """Another checkpoint beside the first, one step later."""
    shutil.copytree(here / "ckpt", here / "next")


def reward(here, body):
    write(here / "mine.py", body)


CKPT, DATA = ["--ckpt", "ckpt"], ["--dataset", "prompts.jsonl"]
BASE = [*CKPT, *DATA]


def both(here, u=None, e=None, **options):
    rollouts(here, "u", 0, u, **options)
    rollouts(here, "e", 5, e)


FILES = [*CKPT, "--rollouts-u", "u.parquet", "--rollouts-e", "e.parquet"]
NOTHING = None

# name → (what to spoil, arguments, words of the paragraph)
CASES = {
    # what to measure
    "no such checkpoint": (NOTHING, ["--ckpt", "nowhere", *DATA], ["nowhere", "no directory on this machine"]),
    "a file as the checkpoint": (NOTHING, ["--ckpt", "prompts.jsonl", *DATA], ["prompts.jsonl", "expected a directory"]),
    "a directory of something else": (lambda d: (d / "empty").mkdir(), ["--ckpt", "empty", *DATA], ["config.json", "save_pretrained"]),
    "a hub id that cannot be reached": (NOTHING, ["--model", "nobody/nothing", *DATA, "--update", "sgd"], ["nobody/nothing", "cannot be loaded"]),
    "config.json cut short": (lambda d: write(d / "ckpt/config.json", "{"), BASE, ["ckpt", "config.json"]),
    "config.json of no known model": (lambda d: write(d / "ckpt/config.json", "{}"), BASE, ["ckpt", "cannot be loaded"]),
    "pickled weights": (lambda d: (d / "ckpt/model.safetensors").rename(d / "ckpt/pytorch_model.bin"), BASE, ["pytorch_model.bin", "save_pretrained"]),
    "weights cut short": (lambda d: truncate(d / "ckpt/model.safetensors"), BASE, ["ckpt", "cannot be loaded"]),
    "weights missing": (lambda d: edit_weights(d, lambda t: t.pop("model.norm.weight")), BASE, ["model.norm.weight", "incomplete"]),
    "weights of another shape": (lambda d: edit_weights(d, lambda t: t.update({"model.norm.weight": torch.ones(3)})), BASE, ["model.norm.weight", "shape"]),
    "NaN in the weights": (lambda d: edit_weights(d, nan_in), BASE, ["model.norm.weight", "NaN"]),
    "a shard missing": (lambda d: write(d / "ckpt/model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'), BASE, ["model-2.safetensors", "copy"]),
    "a shard list cut short": (lambda d: write(d / "ckpt/model.safetensors.index.json", "{"), BASE, ["model.safetensors.index.json", "JSON"]),
    "no tokenizer": (lambda d: [f.unlink() for f in (d / "ckpt").glob("tokenizer*")], BASE, ["tokenizer", "--model"]),
    "a tokenizer of a larger model": (lambda d: save_checkpoint(d / "ckpt", vocab_size=40), BASE, ["tokenizer", "vocabulary is 40"]),
    "lora without an adapter": (NOTHING, [*BASE, "--parameters", "lora"], ["parameters", "no LoRA adapter"]),
    "no regular expression": (NOTHING, [*BASE, "--parameters", "(a"], ["parameters", "regular expression"]),
    "an expression that matches nothing": (NOTHING, [*BASE, "--parameters", "zzz"], ["parameters", "no parameter name matches"]),
    "an adapter of another model": (adapter, ["--ckpt", "adapter", *DATA], ["adapter", "another base model"]),
    "an adapter without weights": (lambda d: adapter(d, weights=False), ["--ckpt", "adapter", *DATA], ["adapter_model.safetensors", "save_pretrained"]),
    "an adapter without its base": (lambda d: adapter(d, base_model_name_or_path="somewhere/else"), ["--ckpt", "adapter", *DATA], ["somewhere/else", "--model"]),
    "an adapter that is not LoRA": (lambda d: adapter(d, peft_type="IA3"), ["--ckpt", "adapter", *DATA], ["IA3", "LORA"]),
    "adapter_config.json cut short": (lambda d: write(d / "adapter/adapter_config.json", "{"), ["--ckpt", "adapter", *DATA], ["adapter_config.json", "JSON"]),
    "a device that is not there": (NOTHING, [*BASE, "--device", "cuda:99"], ["device", "cuda:99", "cpu"]),
    "no device at all": (NOTHING, [*BASE, "--device", "potato"], ["device", "potato", "cpu"]),
    # the optimizer's state
    "no optimizer state": (lambda d: (d / "ckpt/optimizer.pt").unlink(), BASE, ["optimizer.pt", "--update sgd"]),
    "a foreign optimizer file": (lambda d: torch.save({"model": torch.ones(2)}, d / "ckpt/optimizer.pt"), BASE, ["optimizer.pt", "param_groups"]),
    "objects in the optimizer file": (lambda d: torch.save({"state": Path("x"), "param_groups": []}, d / "ckpt/optimizer.pt"), BASE, ["optimizer.pt", "pickled objects"]),
    "an optimizer file cut short": (lambda d: truncate(d / "ckpt/optimizer.pt"), BASE, ["optimizer.pt", "damaged"]),
    "optimizer state of other shapes": (lambda d: edit_optimizer(d, lambda s: s["state"][1].update(exp_avg=torch.ones(2))), BASE, ["exp_avg", "another model"]),
    "optimizer state of another model": (lambda d: edit_optimizer(d, lambda s: s["param_groups"][0]["params"].pop()), BASE, ["parameter groups of sizes", "optimizer_param_names.json"]),
    "NaN in the optimizer state": (lambda d: edit_optimizer(d, lambda s: s["state"][1]["exp_avg"].fill_(torch.nan)), BASE, ["exp_avg", "NaN"]),
    "optimizer_param_names.json cut short": (lambda d: write(d / "ckpt/optimizer_param_names.json", "["), BASE, ["optimizer_param_names.json", "JSON"]),
    "a learning rate of zero stored": (lambda d: edit_optimizer(d, lambda s: [g.update(lr=0.0) for g in s["param_groups"]]), [*BASE, "--no-etas"], ["learning_rate", "--learning-rate"]),
    "trainer_state.json cut short": (lambda d: write(d / "ckpt/trainer_state.json", "{"), BASE, ["trainer_state.json", "JSON"]),
    # prompts and rewards
    "no prompts": (NOTHING, CKPT, ["dataset", "--rollouts-u"]),
    "no such data set file": (NOTHING, [*CKPT, "--dataset", "no.jsonl"], ["no.jsonl", "no such file"]),
    "a data set that cannot be reached": (NOTHING, [*CKPT, "--dataset", "nobody/nothing"], ["nobody/nothing", "could be loaded"]),
    "a line that is no JSON": (lambda d: write(d / "prompts.jsonl", '{"question": "1"\n'), BASE, ["prompts.jsonl", "jsonl"]),
    "a data set without rows": (lambda d: write(d / "prompts.jsonl", ""), BASE, ["prompts.jsonl", "no rows"]),
    "a column that is not there": (NOTHING, [*BASE, "--prompt-column", "text"], ["prompt_column", "text", "question"]),
    "two columns that fit": (lambda d: save_prompts(d / "prompts.jsonl", prompt="x"), BASE, ["prompt_column", "prompt, question"]),
    "too few prompts": (lambda d: save_prompts(d / "prompts.jsonl", 3), BASE, ["2 prompts for the update", "only 3 distinct"]),
    "a prompt that is too long": (lambda d: save_prompts(d / "prompts.jsonl", question="7" * 200), BASE, ["200 tokens long", "limit is 100"]),
    "a prompt that leaves no room": (NOTHING, [*BASE, "--max-new-tokens", "100"], ["max_new_tokens", "64 positions"]),
    "an empty prompt": (lambda d: save_prompts(d / "prompts.jsonl", question=""), BASE, ["prompt", "empty"]),
    "no chat template": (NOTHING, [*BASE, "--chat-template"], ["chat_template", "has none"]),
    "an answer that is no number": (lambda d: save_prompts(d / "prompts.jsonl", answer="blue"), BASE, ["answer", "plain number"]),
    "no such reward": (NOTHING, [*BASE, "--reward", "best"], ["reward", "best", "exact_match_number"]),
    "no reward file": (NOTHING, [*BASE, "--reward", "mine.py:f"], ["reward", "mine.py"]),
    "no reward function in the file": (lambda d: reward(d, "x = 1"), [*BASE, "--reward", "mine.py:f"], ["mine.py", "no function 'f'"]),
    "a reward file that is no Python": (lambda d: reward(d, "def f(:"), [*BASE, "--reward", "mine.py:f"], ["mine.py", "SyntaxError"]),
    "a reward that raises": (lambda d: reward(d, "def f(c, a): return 1 / 0"), [*BASE, "--reward", "mine.py:f"], ["mine.py:f", "ZeroDivisionError"]),
    "a reward that is NaN": (lambda d: reward(d, "def f(c, a): return float('nan')"), [*BASE, "--reward", "mine.py:f"], ["reward", "nan"]),
    "a reward that is no number": (lambda d: reward(d, "def f(c, a): return None"), [*BASE, "--reward", "mine.py:f"], ["mine.py:f", "None", "number"]),
    "all rewards alike": (lambda d: reward(d, "def f(c, a): return 1.0"), [*BASE, "--reward", "mine.py:f"], ["every advantage is zero", "--prompts-u"]),
    # completions from files
    "no such rollouts": (NOTHING, [*FILES[:-1], "no.parquet"], ["u.parquet", "does not exist"]),
    "rollouts that are no Parquet": (lambda d: write(d / "u.parquet", "hello"), FILES, ["u.parquet", "Parquet"]),
    "a column missing": (lambda d: both(d, {"completion_ids": None}), FILES, ["u.parquet", "completion_ids", "missing"]),
    "a column of another type": (lambda d: both(d, {"prompt_ids": ["a"] * 4}), FILES, ["u.parquet", "prompt_ids", "list<"]),
    "an empty response": (lambda d: both(d, {"completion_ids": pa.array([[], [5], [5], [6]], pa.list_(pa.int32()))}), FILES, ["u.parquet", "completion_ids is empty"]),
    "no rewards": (lambda d: both(d, {"reward": None}), FILES, ["u.parquet", "reward"]),
    "rewards that are NaN": (lambda d: both(d, {"reward": [0.0, np.nan, 1.0, 1.0]}), FILES, ["u.parquet", "reward", "NaN"]),
    "a group of one": (lambda d: both(d, size=1), FILES, ["u.parquet", "single response", "at least two"]),
    "tokens of another tokenizer": (lambda d: both(d, {"completion_ids": [[5], [6], [7], [64]]}), FILES, ["u.parquet", "64", "vocabulary"]),
    "tokens of another tokenizer held out": (lambda d: both(d, None, {"prompt_ids": [[99], [99], [3], [3]]}), FILES, ["e.parquet", "99", "vocabulary"]),
    "samples of another policy": (lambda d: both(d, {"logprobs": [[-9.0] * n for n in (2, 3, 2, 3)]}), FILES, ["u.parquet", "not sampled from this checkpoint"]),
    "one prompt held out": (lambda d: both(d, None, {"prompt_id": ["a"] * 4, "group_index": pa.array([0] * 4, pa.int32()), "sample_index": pa.array(range(4), pa.int32()), "prompt_ids": [[5]] * 4}), FILES, ["e.parquet", "at least 2"]),
    "a held-out prompt in the update": (lambda d: (rollouts(d, "u", 0), rollouts(d, "e", 1)), FILES, ["rollouts_e", "u.parquet", "prompt"]),
    # the step
    "next: nowhere": (NOTHING, [*BASE, "--update", "next:nowhere"], ["update", "nowhere"]),
    "next: the same": (second, [*BASE, "--update", "next:next"], ["next", "no step at all"]),
    "next: another model": (lambda d: save_checkpoint(d / "next", num_hidden_layers=1), [*BASE, "--update", "next:next"], ["update", "next", "this very model"]),
    "next: an adapter": (lambda d: adapter(d), [*BASE, "--update", "next:adapter"], ["update", "adapter"]),
    "no such update": (NOTHING, [*BASE, "--update", "v.safetensors"], ["update", "v.safetensors"]),
    "an update that is no safetensors": (lambda d: write(d / "v.safetensors", "v"), [*BASE, "--update", "v.safetensors"], ["v.safetensors", "cannot be read"]),
    "an update that lacks tensors": (lambda d: save_file({"a": torch.ones(1)}, d / "v.safetensors"), [*BASE, "--update", "v.safetensors"], ["v.safetensors", "has no tensor"]),
    "an update that is NaN": (lambda d: save_file({n: x * torch.nan for n, x in load_file(d / "ckpt/model.safetensors").items()}, d / "v.safetensors"), [*BASE, "--update", "v.safetensors"], ["v.safetensors", "NaN"]),
    "an unknown rule": (NOTHING, [*BASE, "--update", "adam"], ["update", "adam", "adamw"]),
    "an update and its batch": (NOTHING, [*BASE, "--update", "next:next", "--rollouts-u", "u.parquet"], ["rollouts_u", "leave one of them out"]),
    "a model without a rule": (NOTHING, ["--model", "ckpt", *DATA], ["update", "--update sgd"]),
    "clipping below zero": (NOTHING, [*BASE, "--max-grad-norm", "-1"], ["max_grad_norm", "-1"]),
    # numbers
    "a negative temperature": (NOTHING, [*BASE, "--temperature", "-1"], ["temperature", "positive"]),
    "a temperature that is NaN": (NOTHING, [*BASE, "--temperature", "nan"], ["temperature", "positive"]),
    "one held-out prompt": (NOTHING, [*BASE, "--prompts-e", "1"], ["prompts_e", "at least 2"]),
    "groups of one": (NOTHING, [*BASE, "--group-size", "1"], ["group_size", "at least 2"]),
    "learning rates below zero": (NOTHING, [*BASE, "--etas=-1e-6"], ["etas", "positive"]),
    "an infinite learning rate": (NOTHING, [*BASE, "--etas", "inf"], ["etas", "positive"]),
    "no tolerance": (NOTHING, [*BASE, "--integration-rtol", "0"], ["integration_rtol", "positive"]),
    "a learning rate of zero": (NOTHING, [*BASE, "--learning-rate", "0"], ["learning_rate", "positive"]),
    "words for numbers": (NOTHING, [*BASE, "--prompts-u", "many"], ["prompts-u", "many"]),
    "an unknown choice": (NOTHING, [*BASE, "--per", "word"], ["per", "word", "token"]),
    "an unknown flag": (NOTHING, [*BASE, "--frobnicate"], ["--frobnicate", "--help"]),
    # where the report goes
    "a file as the output": (lambda d: write(d / "out", ""), BASE, ["output", "is a file"]),
    "an output below a file": (NOTHING, [*BASE, "--output", "prompts.jsonl/out"], ["output", "prompts.jsonl/out"]),
    "an output that holds a report": (lambda d: write(d / "out/report.json", "{}"), BASE, ["output", "holds a report already"]),
    "an output that holds a stopped run": (lambda d: write(d / "out/stages/run.json", '{"seed": 1}'), BASE, ["output", "--resume"]),
    "resume with something else": (lambda d: write(d / "out/stages/run.json", '{"seed": 1}'), [*BASE, "--resume"], ["seed was 1 and is now 0"]),
    "resume of a broken report": (lambda d: (write(d / "out/report.html", ""), write(d / "out/report.json", "{")), [*BASE, "--resume"], ["report.json", "not JSON"]),
}  # fmt: skip


# An error before anything was computed leaves nothing; a later one leaves whole files: samples are worth keeping.
SAMPLED = {"out", "out/rollouts_u.parquet", "out/rollouts_e.parquet"}


def everything(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_one_paragraph_and_nothing_is_left(name, here, capsys):
    spoil, arguments, words = CASES[name]
    if spoil is not None:
        spoil(here)
    before = everything(here)
    settings = SMALL if "--no-etas" not in arguments else [x for x in SMALL if x not in ("--etas", "1e-5")]
    given = [*settings, *([] if "--output" in arguments else ["--output", "out"])]
    status = main([*given, *(x for x in arguments if x != "--no-etas")])
    printed = capsys.readouterr()
    assert status == 1 and printed.out == ""
    _, _, message = printed.err.partition("error: ")
    assert message and "Traceback" not in printed.err and "\n\n" not in message.strip()
    text = " ".join(message.split())
    for word in words:
        assert word in text
    assert len(text) > 40 and text.endswith(".")
    after = everything(here)
    assert all(after[path] == data for path, data in before.items())
    left = {path.relative_to(here).as_posix() for path in after.keys() - before.keys()}
    outside = {name for name in left if "__pycache__" not in name and not name.startswith("out/stages")}
    kept = {Path(name).name for name in left if name.startswith("out/stages")}
    assert outside <= SAMPLED, left
    assert not any(name.startswith(".") for name in kept)  # the names of files that are being written
    assert not kept or outside > {"out"} or "0.safetensors" in kept, left


def test_a_good_input_is_measured(here, monkeypatch, capsys):
    monkeypatch.setattr(steps, "certify", certify_module.certify)
    reward(here, "def f(c, a): return float(len(c) + ('1' in c))")
    assert main([*SMALL, *BASE, "--reward", "mine.py:f", "--output", "out"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert not (here / "out" / "stages").exists()
    before = everything(here / "out")
    again = [*SMALL, *BASE, "--reward", "mine.py:f", "--output", "out", "--resume"]
    assert main(again) == 0  # a finished run is shown again
    assert "nats per token" in capsys.readouterr().out
    assert main([*again, "--seed", "1"]) == 1
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert everything(here / "out") == before


def test_a_directory_that_cannot_be_written(here, capsys):
    (here / "closed").mkdir(mode=0o500)
    if os.access(here / "closed", os.W_OK):
        pytest.skip("this user may write anywhere")
    assert main([*SMALL, *BASE, "--output", "closed/out"]) == 1
    assert "closed/out" in capsys.readouterr().err
