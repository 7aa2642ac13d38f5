"""The predicted memory against measured peaks, the budget against the peak of a whole run, and the dry run."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from characters import character_llama, character_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_kernels.derivatives import token_curvature, token_gradient, token_tangents
from entropy_kernels.errors import UserError
from entropy_kernels.measure.cli import main
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.memory import fitted, parse_bytes, sizes, stages
from entropy_kernels.measure.samples import Lengths
from entropy_kernels.measure.store import NOWHERE, Store
from entropy_kernels.policy import Policy, TokenBatch

LENGTH, COUNT = 64, 16
MODELS = {
    "llama": lambda: character_llama(
        vocab_size=8192, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=4096, n_embd=128, n_layer=6, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
        )
    ),
}


def kilobytes(name):
    """A line of what Linux says of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def peak(kind, name):
    """Measured and predicted bytes that a stage adds to what was held before, in this process."""
    torch.set_num_threads(1)
    policy = Policy.from_model(MODELS[kind](), micro_batch_tokens=LENGTH * COUNT)
    v = {name: 0.01 * torch.randn_like(p) for name, p in policy.params.items()}
    ids = torch.arange(LENGTH * COUNT).reshape(COUNT, LENGTH) % 4096
    whole = torch.ones_like(ids).bool()
    response = whole.clone()
    response[:, 0] = False
    batch = TokenBatch(ids, whole, response, torch.arange(COUNT))
    small = TokenBatch(ids[:1, :4], whole[:1, :4], response[:1, :4], torch.arange(1))

    def run(b):
        if name == "update gradient":
            return token_gradient(policy, b, logprob_weight=torch.ones(b.input_ids.shape))
        return (token_curvature if name == SECOND else token_tangents)(policy, b, v)

    run(small)  # loads what is loaded once
    held = kilobytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark starts again
    run(batch)
    measured = 1024 * (kilobytes("VmHWM") - held)
    config = MeasureConfig.demo(second_order=name != FIRST)
    s = sizes(policy, Lengths([LENGTH] * COUNT, [LENGTH] * COUNT, 0))._replace(held=0, libraries=0)
    return measured, stages(config, s, LENGTH * COUNT, 1)[SECOND if name == FIRST else name]


SECOND, FIRST = "entropy along the step", "without second order"
# Each in a process of its own: an allocator keeps what the one before it gave back.
EACH = """
import json, os, test_memory
for kind in test_memory.MODELS:
    for name in ("update gradient", test_memory.SECOND, test_memory.FIRST):
        if os.fork() == 0:
            print(json.dumps([kind, name, *test_memory.peak(kind, name)]), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's account of memory")
def test_every_stage_stays_below_its_prediction_and_not_far_below():
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", EACH], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(found) == 6, done.stderr
    for kind, name, measured, predicted in found:
        assert measured <= predicted <= 2 * measured, (kind, name, measured, predicted)


@pytest.mark.parametrize(
    "text, size", [("8GB", 8 * 10**9), ("7.5 GiB", int(7.5 * 2**30)), ("500mb", 5 * 10**8), ("123", 123)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "1XB", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="memory_budget.*8GB"):
        parse_bytes(text)


def tight(megabytes, **options):
    config = MeasureConfig.demo(memory_budget=f"{megabytes}MB", micro_batch_tokens=4096, **options)
    policy = Policy.from_model(character_llama(vocab_size=2048))
    return config, policy, Lengths([60] * 80, [60] * 80, 160)


def test_the_micro_batch_is_lowered_until_the_prediction_fits(monkeypatch, tmp_path):
    monkeypatch.setattr("entropy_kernels.measure.memory.held", lambda device: 500_000_000)
    chosen = {}
    for budget in (2000, 1200, 960, 920):
        config, policy, expected = tight(budget)
        lowered, moved = fitted(config, policy, expected, NOWHERE)
        needed = stages(lowered, sizes(policy, expected), lowered.micro_batch_tokens, lowered.sample_batch)
        assert max(needed.values()) <= budget * 1e6
        assert moved.micro_batch_tokens == lowered.micro_batch_tokens
        chosen[budget] = lowered.micro_batch_tokens
    assert chosen[2000] == 4096 > chosen[1200] > chosen[960] >= chosen[920] >= 60
    config, policy, expected = tight(1200)
    store = Store(tmp_path)
    assert fitted(config, policy, expected, store)[0].micro_batch_tokens == chosen[1200]
    monkeypatch.setattr("entropy_kernels.measure.memory.held", lambda device: 800_000_000)
    assert fitted(config, policy, expected, store)[0].micro_batch_tokens == chosen[1200]  # a run that goes on


def test_a_budget_that_is_too_small_is_told_the_least_that_works(monkeypatch):
    monkeypatch.setattr("entropy_kernels.measure.memory.held", lambda device: 500_000_000)
    config, policy, expected = tight(600)
    with pytest.raises(UserError, match="Pass at least") as error:
        fitted(config, policy, expected, NOWHERE)
    least = re.search(r"at least (\S+),", str(error.value))[1]
    fitted(MeasureConfig.demo(memory_budget=least), policy, expected, NOWHERE)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose logits are most of what a micro-batch needs."""
    directory = tmp_path_factory.mktemp("wide")
    character_llama(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, vocab_size=32768
    ).save_pretrained(directory / "model")
    character_tokenizer().save_pretrained(directory / "model")
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(100)]
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "mine.py").write_text("def f(completion, answer): return float(len(completion))")
    return directory


def arguments(wide, *more):
    return (
        f"--model {wide}/model --dataset {wide}/prompts.jsonl --update sgd --reward {wide}/mine.py:f --prompts-u 24 --group-size 2 "
        "--prompts-e 48 --max-new-tokens 40 --etas 1e-5 --truth integrated --micro-batch-tokens 65536"
    ).split() + list(more)


@pytest.mark.slow
def test_a_whole_run_stays_within_its_budget(wide, tmp_path):
    def peak(*more):
        command = [sys.executable, "-m", "entropy_kernels.measure", *arguments(wide, *more)]
        code = (
            "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
        )
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return 1024 * int(done.stdout.splitlines()[-1])

    budget = 1.3e9
    assert peak("--output", str(tmp_path / "free")) > budget  # else it would change nothing
    assert peak("--memory-budget", f"{budget:.0f}", "--output", str(tmp_path / "tight")) <= budget


def test_a_dry_run_predicts_and_writes_nothing(wide, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(wide, "--dry-run")) == 0
    printed = capsys.readouterr().out
    for words in (
        "48 sequences",
        "measured",
        "guessed",
        "sampling",
        "update gradient",
        "entropy along the step",
        "GB",
    ):
        assert words in printed
    assert list(tmp_path.iterdir()) == []
    assert main(arguments(wide, "--dry-run", "--memory-budget", "10MB")) == 1
    assert "at least" in capsys.readouterr().err


def test_this_process_is_measured():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    policy = Policy.from_model(character_llama())
    assert 0.3 * used < sizes(policy, Lengths([9], [9], 0)).held <= 1.05 * used
