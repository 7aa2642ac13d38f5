"""A real GRPO checkpoint of SmolLM2-135M-Instruct: TRL, float32, three-shot sums.

    python bench/smollm2/convert.py --output smollm2/model
    python bench/smollm2/make_checkpoint.py --model smollm2/model --output smollm2/ckpt

``--output`` receives ``checkpoint-<N-1>``, ``checkpoint-<N>`` (each with its AdamW state) and ``recorded/``, the
batch that leads from the first to the second (its layout: ``entropy_kernels/demo/grpo.py``).  With ``--lora`` an adapter of
rank 8 on every attention and MLP projection is trained instead, 12 steps, and every checkpoint is kept (about 30 MB each):

    python bench/smollm2/make_checkpoint.py --model smollm2/model --output smollm2/lora --lora

A response ends with the first token whose text contains a line break; that token is part of the response.  All
such tokens (129 of them) are listed, beside the model's own end token, as ``eos_token_id`` in the checkpoint's
``generation_config.json``: it is the one place TRL's sampler, TRL's mask and later readers take it from.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from prompts import three_shot_sums
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from entropy_kernels.demo.grpo import TOKEN_WEIGHTS, train


def line_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, then every token whose text contains a line break."""
    breaks = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return [tokenizer.eos_token_id, *breaks]


def adapter() -> LoraConfig:
    """LoRA of rank 8 on every projection of attention and MLP."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory written by convert.py")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for the checkpoints and the record"
    )
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter, and keep every checkpoint")
    parser.add_argument("--steps", type=int, help="optimizer steps, at least 2 (default: 4, with --lora 12)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--loss-type", choices=sorted(TOKEN_WEIGHTS), default="dapo")
    parser.add_argument("--lr", type=float, help="constant learning rate (default: 2e-5, with --lora 1e-4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="2 steps of 4 prompts x 4 completions")
    args = parser.parse_args(argv)
    args.steps = args.steps or (12 if args.lora else 4)
    args.lr = args.lr or (1e-4 if args.lora else 2e-5)
    if args.small:
        args.steps, args.prompts, args.group = 2, 4, 4
    if (args.output / "recorded" / "batch.json").is_file():
        print(f"{args.output} is complete already")
        return 0
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(
            f"--output {args.output} is not empty and not complete: remove it or name another directory"
        )

    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.generation_config.eos_token_id = line_end_tokens(tokenizer)
    rows = [
        {"prompt_id": row["prompt_id"], "prompt": row["question"], "answer": row["answer"]}
        for row in three_shot_sums(args.steps * args.prompts, args.seed)
    ]
    train(
        model,
        tokenizer,
        rows,
        args.output,
        steps=args.steps,
        prompts=args.prompts,
        group=args.group,
        max_completion_length=8,
        learning_rate=args.lr,
        loss_type=args.loss_type,
        seed=args.seed,
        gradient_checkpointing=args.prompts * args.group > 16,  # 64 rows would take about 9 GB without
        peft_config=adapter() if args.lora else None,
        keep_all=args.lora,
    )
    print(f"{args.steps} steps in {time.perf_counter() - start:.0f} s: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
