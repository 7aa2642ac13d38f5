"""The demo's files: they load, they are small, and the recorded batch really leads to the next checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from entropy_kernels import demo

# Names the Hugging Face trainer exempts from weight decay.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(demo.checkpoint_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return load_file(demo.next_dir() / "recorded" / "batch.safetensors")


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return json.loads((demo.next_dir() / "recorded" / "batch.json").read_text())


def optimizer_state() -> dict[str, Any]:
    return torch.load(demo.checkpoint_dir() / "optimizer.pt", weights_only=True)


def parameters_in_optimizer_order(model: LlamaForCausalLM) -> list[list[torch.nn.Parameter]]:
    """Decayed parameters, then the others, each in the model's own order; the tied head is one parameter."""
    named = list(model.named_parameters())
    return [[p for n, p in named if not NO_DECAY.search(n)], [p for n, p in named if NO_DECAY.search(n)]]


def response_logprobs(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, T] log-probability of every completion token given what precedes it, in plain torch."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    width = batch["completion_ids"].shape[1]
    return torch.log_softmax(logits[:, -width - 1 : -1], -1).gather(-1, ids[:, -width:, None])[..., 0]


def test_assets_are_small() -> None:
    root = Path(demo.__file__).parent
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) <= 12 * 2**20


def test_no_pickles_but_the_optimizer_state() -> None:
    names = {f.name for d in (demo.checkpoint_dir(), demo.next_dir()) for f in d.rglob("*")}
    assert not names & {"training_args.bin", "rng_state.pth", "scheduler.pt"}


def test_prompts_are_distinct_readable_and_right() -> None:
    rows = [json.loads(line) for line in demo.prompts_file().read_text().splitlines()]
    assert len(rows) >= 320 and len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert sum(int(n) for n in row["question"].rstrip("=").split("+")) == int(row["answer"])
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_dir())
    ids = tokenizer(rows[0]["question"])["input_ids"]
    assert len(ids) == len(rows[0]["question"]), "one token per character and nothing around it"
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == rows[0]["question"]


def test_generation_config_samples_from_the_policy_itself(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_dir())
    config = model.generation_config
    assert (config.temperature, config.top_k, config.top_p) == (1.0, 0, 1.0)
    eos = config.eos_token_id
    assert (eos if isinstance(eos, list) else [eos]) == [tokenizer.eos_token_id]
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_optimizer_state_is_genuine_and_complete(model: LlamaForCausalLM) -> None:
    saved = optimizer_state()
    groups = parameters_in_optimizer_order(model)
    assert [len(g["params"]) for g in saved["param_groups"]] == [len(g) for g in groups]
    assert [g["weight_decay"] for g in saved["param_groups"]] == [0.01, 0.0]
    assert all(g["lr"] >= 1e-5 for g in saved["param_groups"])
    for i, p in enumerate(groups[0] + groups[1]):
        state = saved["state"][i]
        assert float(state["step"]) >= 50
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        assert state["exp_avg"].abs().max() > 0 and state["exp_avg_sq"].max() > 0


def test_record_is_consistent(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor], meta: dict[str, Any]
) -> None:
    mask = batch["completion_mask"]
    # One block of ones per row, up to and including the first end token.
    assert (mask[:, 1:] <= mask[:, :-1]).all() and (mask[:, 0] == 1).all()
    ended = (batch["completion_ids"] == meta["sampling"]["eos_token_id"][0]) & (mask == 1)
    last = mask.sum(1, keepdim=True) - 1
    assert (ended.sum(1) == ended.gather(1, last)[:, 0].long()).all()
    # Advantages from rewards.
    mixed = 0
    for g in batch["group_index"].unique():
        rows = batch["group_index"] == g
        r = batch["rewards"][rows].double()
        assert len(r) == meta["advantage"]["group_size"]
        expected = (r - r.mean()) / (r.std() + 1e-4)
        torch.testing.assert_close(batch["advantages"][rows].double(), expected, rtol=1e-5, atol=1e-6)
        mixed += int(r.unique().numel() > 1)
    assert mixed >= 3, "groups with right and wrong answers"
    # Weights of the stated loss, and the value TRL reported for it.
    assert meta["loss"]["loss_type"] == "dapo" and meta["loss"]["normaliser"]["tokens"] == int(mask.sum())
    torch.testing.assert_close(batch["token_weights"], mask / mask.sum())
    value = -(batch["token_weights"].double() * batch["advantages"].double()[:, None]).sum()
    assert value.item() == pytest.approx(meta["loss"]["value"], abs=1e-6)
    # Log-probabilities are those of the checkpoint.
    with torch.no_grad():
        logprobs = response_logprobs(model, batch)
    torch.testing.assert_close(logprobs * mask, batch["logprobs"], rtol=0, atol=2e-5)


def test_rollouts_are_the_recorded_batch(batch: dict[str, torch.Tensor]) -> None:
    rows = pq.read_table(demo.next_dir() / "recorded" / "rollouts_u.parquet").to_pylist()
    assert len(rows) == len(batch["rewards"])
    pairs = zip(batch["group_index"].tolist(), batch["sample_index"].tolist(), strict=True)
    where = {pair: i for i, pair in enumerate(pairs)}
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_dir())
    for row in rows:
        i = where[row["group_index"], row["sample_index"]]
        mask = batch["completion_mask"][i].bool()
        assert row["completion_ids"] == batch["completion_ids"][i][mask].tolist()
        assert row["prompt_ids"] == batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        ended = row["completion_ids"][-1] == tokenizer.eos_token_id
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert row["reward"] == batch["rewards"][i] and row["advantage"] == batch["advantages"][i]
        assert tokenizer(row["prompt"])["input_ids"] == row["prompt_ids"]
        answer = str(sum(int(n) for n in row["prompt"].rstrip("=").split("+")))
        assert row["reward"] == float(re.findall(r"\d+", row["completion"] + " ")[-1:] == [answer])


def test_recorded_step_leads_to_the_next_checkpoint(
    batch: dict[str, torch.Tensor], meta: dict[str, Any]
) -> None:
    """Gradient of the stated loss, clipped, then torch's AdamW from the stored state: TRL's own next weights."""
    model = LlamaForCausalLM.from_pretrained(demo.checkpoint_dir(), dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    saved = optimizer_state()
    optimizer = torch.optim.AdamW([{"params": g} for g in parameters_in_optimizer_order(model)])
    optimizer.load_state_dict(saved)

    weights = batch["token_weights"] * batch["advantages"][:, None]
    loss = -(weights * response_logprobs(model, batch)).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), meta["optimizer"]["max_grad_norm"])
    assert float(norm) == pytest.approx(meta["optimizer"]["grad_norm_before_clipping"], rel=1e-4)
    optimizer.step()

    after = load_file(demo.next_dir() / "model.safetensors")
    stepped = dict(model.named_parameters())
    ours = torch.cat([(stepped[n].detach().double() - before[n].double()).flatten() for n in before])
    theirs = torch.cat([(after[n].double() - before[n].double()).flatten() for n in before])
    assert theirs.norm() > 0
    cosine = torch.dot(ours, theirs) / (ours.norm() * theirs.norm())
    assert 1.0 - cosine.item() < 1e-6
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-4)
