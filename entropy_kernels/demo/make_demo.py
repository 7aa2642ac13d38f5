"""Make the demo's model, checkpoint and prompts from nothing.

    python -m entropy_kernels.demo.make_demo --output DIR

writes ``DIR/checkpoint``, ``DIR/next`` and ``DIR/prompts.jsonl``; with ``--output entropy_kernels/demo`` the files
of the package.  Needs the extra ``trl``, no network and no accelerator; three to four minutes on one core.  The
same seed gives the same files on the same machine with the same versions (one thread, so that the number of cores
does not matter); elsewhere rounding differs, and with it the samples drawn.

1. A Llama of 0.44 M parameters with a vocabulary of 15 learns made-up sums of three numbers.  ``17+25+9=`` is followed by
   one of four ways to the answer: ``42+9=51``, ``26+25=51``, ``34+17=51`` or plainly ``51``.  Training stops while
   the model is right about a quarter of the time.
2. GRPO (TRL, float32, 64 prompts x 8 completions per step, constant learning rate, no KL term) takes it 61 optimizer
   steps further; a completion is right if its last number is the sum.  The model turns from plain answers to
   working, and its entropy falls.  ``checkpoint/`` is what TRL wrote after step 60, without the pickled arguments
   and the states of the random generators; ``next/`` holds the weights after step 61, and in ``next/recorded`` the
   batch of that step (layout: ``entropy_kernels.demo.grpo``).
3. ``prompts.jsonl`` holds 512 sums of the same kind that neither stage has seen.

Made with seed 0, 8 samples for each held-out prompt: right 24 % of the time before GRPO, 25 % at the checkpoint and
26 % one step later; groups with both right and wrong answers 88 %, then 83 %; entropy 0.76, then 0.67 nats per token;
plain answers 29 %, then 2 %; 7.1, then 8.5 tokens per completion.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from entropy_kernels.demo.grpo import train

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<eos>", "<unk>")
HELD_OUT = 512
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 400, 128, 3e-3
GRPO_STEPS, GRPO_PROMPTS, GRPO_GROUP, GRPO_LR = 61, 64, 8, 2e-5
MAX_NEW_TOKENS = 12
KEPT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; nothing is added around the text."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A random tiny Llama: grouped-query attention, tied embeddings, no dropout."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).float()


Sum = tuple[int, int, int]


def all_sums(generator: random.Random) -> list[Sum]:
    """Every a + b + c with a, b from 10 to 49 and one digit c, in random order."""
    sums = [(a, b, c) for a in range(10, 50) for b in range(10, 50) for c in range(10)]
    generator.shuffle(sums)
    return sums


def question(numbers: Sum) -> str:
    """``17+25+9=``."""
    return "{}+{}+{}=".format(*numbers)


def working(numbers: Sum, generator: random.Random) -> str:
    """One of the four ways to the answer, at random: ``42+9=51``, ``26+25=51``, ``34+17=51`` or plain ``51``."""
    a, b, c = numbers
    first, rest = generator.choice([(a + b, c), (a + c, b), (b + c, a), (None, None)])
    return str(a + b + c) if first is None else f"{first}+{rest}={a + b + c}"


def last_number(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the completion is the answer, else 0."""
    found = [re.findall(r"\d+", text)[-1:] for text in completions]
    return [float(bool(n) and int(n[0]) == int(a)) for n, a in zip(found, answer, strict=True)]


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, sums: list[Sum], generator: random.Random
) -> None:
    """Next-token training on the working of random sums; only the tokens after the question count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
    model.train()
    for step in range(PRETRAIN_STEPS):
        batch = generator.sample(sums, PRETRAIN_BATCH)
        texts = [question(n) + working(n, generator) + tokenizer.eos_token for n in batch]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        starts = torch.tensor([len(question(n)) for n in batch])
        position = torch.arange(tokens.input_ids.shape[1])
        counted = (tokens.attention_mask == 1) & (position >= starts[:, None])
        loss = model(**tokens, labels=tokens.input_ids.masked_fill(~counted, -100)).loss
        progress = step / PRETRAIN_STEPS
        for group in optimizer.param_groups:
            group["lr"] = PRETRAIN_LR * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"pretraining step {step + 1}: {loss.item():.3f} nats per token", flush=True)


@torch.no_grad()
def describe(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, sums: list[Sum]
) -> dict[str, float]:
    """Solve rate, share of mixed groups, entropy (nats per token) and length of samples from the policy."""
    model.eval()
    prompts = tokenizer([question(n) for n in sums], padding=True, padding_side="left", return_tensors="pt")
    sampler: Any = model  # transformers types generate() too narrowly for its own models
    output = sampler.generate(
        **prompts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        num_return_sequences=GRPO_GROUP,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, prompts.input_ids.shape[1] :]
    ended = (ids == tokenizer.eos_token_id).int()
    mask = (ended.cumsum(1) - ended) == 0
    logprob = torch.log_softmax(torch.stack(output.logits, 1).double(), -1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers = [str(sum(n)) for n in sums for _ in range(GRPO_GROUP)]
    rewards = torch.tensor(last_number(texts, answers)).view(-1, GRPO_GROUP).mean(1)
    return {
        "solve_rate": rewards.mean().item(),
        "mixed_groups": ((rewards > 0) & (rewards < 1)).double().mean().item(),
        "entropy_nats_per_token": (entropy * mask).sum().item() / mask.sum().item(),
        "tokens": mask.sum().item() / len(mask),
        "cut_by_length": 1.0 - ended.any(1).double().mean().item(),
    }


def make(output: Path, seed: int = 0) -> None:
    """Write ``checkpoint/``, ``next/`` and ``prompts.jsonl`` into ``output``; the first two must not exist yet."""
    targets = [output / "checkpoint", output / "next"]
    if any(target.exists() for target in targets):
        raise SystemExit(
            f"--output {output} already has checkpoint/ or next/: remove them or name another directory."
        )
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = random.Random(seed)
    sums = all_sums(generator)
    held_out, training = sums[:HELD_OUT], sums[HELD_OUT:]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    pretrain(model, tokenizer, training, generator)
    print("after pretraining:", describe(model, tokenizer, held_out[:128]), flush=True)

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".make-demo-", dir=output) as temporary:
        run = Path(temporary)
        rows = [
            {"prompt_id": f"train-{i:05d}", "prompt": question(n), "answer": str(sum(n))}
            for i, n in enumerate(generator.sample(training, GRPO_STEPS * GRPO_PROMPTS))
        ]
        train(
            model,
            tokenizer,
            rows,
            run,
            steps=GRPO_STEPS,
            prompts=GRPO_PROMPTS,
            group=GRPO_GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            learning_rate=GRPO_LR,
            seed=seed,
            reward=last_number,
        )
        before, after = run / f"checkpoint-{GRPO_STEPS - 1}", run / f"checkpoint-{GRPO_STEPS}"
        torch.manual_seed(seed)
        print(
            "at the checkpoint:",
            describe(LlamaForCausalLM.from_pretrained(before), tokenizer, held_out[:128]),
        )
        _copy(before, targets[0], KEPT)
        _copy(after, targets[1], ("config.json", "model.safetensors"))
        shutil.copytree(run / "recorded", targets[1] / "recorded")
    lines = [
        json.dumps({"prompt_id": f"sums-{i:03d}", "question": question(n), "answer": str(sum(n))})
        for i, n in enumerate(held_out)
    ]
    (output / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write checkpoint/, next/ and prompts into"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    make(args.output, args.seed)
    print(f"made in {time.perf_counter() - start:.0f} s: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
