"""Real TRL checkpoints of tiny random models: three GRPO steps in float32, the last two kept with the batch between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from characters import EOS, PAD, character_tokenizer

STEPS, RATE = 3, 5e-3
TARGETS = {"gpt2": ["c_attn", "c_fc"]}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# no dropout: what the optimizer saw can then be computed again
SIZES: dict[str, Any] = {
    "vocab_size": 64, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None,
    "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of digits: differs within every group, and is learnt at once."""
    return [sum(c.isdigit() for c in text) / (len(text) + 1) for text in completions]


def train(
    family: str,
    where: Path,
    *,
    lora: bool = False,
    trained: str | None = None,
    steps: int = STEPS,
    loss: dict[str, Any] | None = None,
    loss_type: str = "dapo",
) -> Path:
    """Train, and return the directory that holds the last two checkpoints and recorded/.

    With `lora` an adapter on a base model saved in where/base; `loss` is that of `grpo.train`, a reference being the model before
    training, in where/base; with `trained` only the parameters that have it in their names.
    """
    for needed in ("trl", "datasets", "peft"):
        pytest.importorskip(needed)
    from peft import LoraConfig

    from entropy_kernels.demo import grpo

    tokenizer = character_tokenizer()
    model = families.model(family, dtype=torch.float32, **SIZES)
    # every fourth character ends a response, so that lengths differ
    model.generation_config.update(eos_token_id=[EOS, *range(3, 63, 4)], pad_token_id=PAD)
    config = None
    if lora or loss:
        model.save_pretrained(where / "base")
        tokenizer.save_pretrained(where / "base")
        model.name_or_path = model.config._name_or_path = str(where / "base")
    if lora:
        names = TARGETS.get(family, LINEAR)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", lora_dropout=0.0)
    if trained is not None:
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
    # TRL pads prompts on the left and GPT-2 then counts its learned positions from the padding: prompts of one length for it
    prompts = [f"{i:02}+{7 * i:02}=" if family == "gpt2" else f"{i}+{7 * i}=" for i in range(steps * 4)]
    rows = [{"prompt_id": f"p{i}", "prompt": prompt, "answer": ""} for i, prompt in enumerate(prompts)]
    grpo.train(
        model, tokenizer, rows, where / "run", steps=steps, prompts=4, group=4, max_completion_length=8,
        learning_rate=RATE, reward=digits, peft_config=config,
        loss=loss or {}, loss_type=loss_type,
    )  # fmt: skip
    return where / "run"
