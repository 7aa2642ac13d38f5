"""Every estimator of h'(0) on the same samples of SmolLM2: which one has the smaller error, and at what bias?

    python bench/smollm2/run.py --output smollm2                  # or convert.py and make_checkpoint.py alone
    python bench/smollm2/estimators.py --ckpt smollm2/ckpt --dataset test.jsonl --output estimators

1. `evaluate`: E is sampled from the checkpoint before the last (256 prompts of the file, 2 responses each of up to 33 tokens), the
   AdamW step is rebuilt from the recorded batch, and one forward-mode pass over E along it gives H, S, H' and S' of every token;
   one forward pass more gives the hidden states for the critic. Done once, a sample of every prompt at a time, and kept.
2. `table`: all estimators of docs/theory.md, sections 5 and 6, are arithmetic on these arrays. JSON and Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from entropy_kernels.derivatives import token_tangents
from entropy_kernels.measure import MeasureConfig
from entropy_kernels.measure.direction import get_update, load_state
from entropy_kernels.measure.features import hidden_features
from entropy_kernels.measure.steps import batch_of, exact_arithmetic, load_policy
from entropy_kernels.rl.rollouts import Rollouts
from entropy_kernels.rl.sampling import sample_rollouts
from entropy_kernels.rl.tasks import load_prompts, split_prompts

TOKENS = 33


def evaluate(ckpt: Path, dataset: Path, output: Path, prompts: int, group: int) -> list[Path]:
    """One file of arrays per sample index, [prompts, tokens] each; those that are there are left alone."""
    files = [output / f"evaluated_{sample}.npz" for sample in range(group)]
    if all(file.is_file() for file in files):
        return files
    output.mkdir(parents=True, exist_ok=True)
    before = sorted(ckpt.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-2]
    config = MeasureConfig(
        ckpt=str(before),
        dataset=str(dataset),
        rollouts_u=str(ckpt / "recorded" / "rollouts_u.parquet"),
        prompts_e=prompts,
        max_new_tokens=TOKENS,
    )
    seconds: dict[str, float] = {}
    with exact_arithmetic():
        policy = load_policy(config)
        chosen, _ = split_prompts(load_prompts(dataset, tokenizer=policy.tokenizer), prompts, 0, config.seed)
        state, info = load_state(config, policy)
        assert info is not None
        U = Rollouts.load(config.rollouts_u)  # type: ignore[arg-type]
        update = get_update(config, policy, state, U, batch_of(U), info.stored_lr, progress=False)
        direction = update.direction
        del update, state
        start = time.perf_counter()
        rollouts = output / f"rollouts_{group}.parquet"  # the first responses are the same in each
        if not rollouts.is_file():
            sample_rollouts(
                policy.model,
                policy.tokenizer,
                chosen,
                group_size=group,
                max_new_tokens=TOKENS,
                seed=config.seed + 1,
                batch_size=64,
                progress=False,
            ).save(rollouts)
        E = Rollouts.load(rollouts)
        seconds["sampling"] = (time.perf_counter() - start) / group
        print("sampled", seconds, flush=True)
        whole = batch_of(E)
        for sample, file in enumerate(files):
            if file.is_file():
                continue
            rows = torch.as_tensor(np.flatnonzero(np.asarray(E.sample_index) == sample))
            batch = type(whole)(*(x[rows] for x in whole))
            start = time.perf_counter()
            found = token_tangents(policy, batch, direction)
            seconds["tangents"] = time.perf_counter() - start
            start = time.perf_counter()
            hidden = hidden_features(policy, batch, width=None)
            seconds["values"] = time.perf_counter() - start
            mask = batch.response_mask.bool()
            first = int(mask.any(dim=0).int().argmax())
            np.savez_compressed(
                file.with_suffix(".part.npz"),
                **{name: x[:, first:].numpy() for name, x in found._asdict().items()},
                mask=mask[:, first:].numpy(),
                prompt=batch.prompt_index.numpy(),
                hidden=hidden[:, first:].numpy().astype(np.float16),
                seconds=np.array([seconds[name] for name in ("sampling", "tangents", "values")]),
            )
            file.with_suffix(".part.npz").rename(file)
            print(file, seconds, flush=True)
    return files


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="directory written by make_checkpoint.py")
    parser.add_argument("--dataset", type=Path, required=True, help="a .jsonl file with a column question")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--group", type=int, default=2, help="responses per prompt")
    args = parser.parse_args(argv)
    evaluate(args.ckpt, args.dataset, args.output, args.prompts, args.group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
