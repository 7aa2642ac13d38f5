"""Every estimator of h'(0) on the same samples of SmolLM2: which one has the smaller error, and at what bias?

    python bench/smollm2/run.py --output smollm2                  # or convert.py and make_checkpoint.py alone
    python bench/smollm2/estimators.py --ckpt smollm2/ckpt --dataset test.jsonl --output estimators

1. `evaluate`: E is sampled from the checkpoint before the last (256 prompts of the file, responses of up to 33 tokens), the
   AdamW step is rebuilt from the recorded batch, and one forward-mode pass over E along it gives H, S, H' and S' of every token;
   one forward pass more gives the hidden states for the critic. Done once, a sample of every prompt at a time, and kept.
2. `table`: all estimators of docs/theory.md, sections 5 and 6, are arithmetic on these arrays. JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from entropy_kernels import stats
from entropy_kernels.derivatives import token_tangents
from entropy_kernels.measure import MeasureConfig
from entropy_kernels.measure.direction import get_update, load_state
from entropy_kernels.measure.features import hidden_features
from entropy_kernels.measure.steps import batch_of, exact_arithmetic, load_policy
from entropy_kernels.report.numbers import estimate
from entropy_kernels.rl.rollouts import Rollouts
from entropy_kernels.rl.sampling import sample_rollouts
from entropy_kernels.rl.tasks import load_prompts, split_prompts
from entropy_kernels.stats.lag import weighted_lags

TOKENS = 33
BLOCK = 32  # responses evaluated at once


def evaluate(ckpt: Path, dataset: Path, output: Path, prompts: int, group: int, lines: bool) -> list[Path]:
    """One file of arrays per sample index, [prompts, tokens] each; those that are there are left alone.

    With `lines` a line break ends a response, as the checkpoint's own generation_config.json says (it was trained on sums).
    """
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
        start = time.process_time()
        rollouts = output / f"rollouts_{group}.parquet"  # the first responses are the same in each
        if not rollouts.is_file():
            sample_rollouts(
                policy.model,
                policy.tokenizer,
                chosen,
                group_size=group,
                max_new_tokens=TOKENS,
                seed=config.seed + 1,
                eos_token_ids=None if lines else [policy.tokenizer.eos_token_id],
                batch_size=64,
                progress=False,
            ).save(rollouts)
        E = Rollouts.load(rollouts)
        seconds["sampling"] = (time.process_time() - start) / group
        print("sampled", seconds, flush=True)
        whole = batch_of(E)
        for sample, file in enumerate(files):
            if file.is_file():
                continue
            rows = torch.as_tensor(np.flatnonzero(np.asarray(E.sample_index) == sample))
            seconds |= {"tangents": 0.0, "values": 0.0}
            parts: list[dict[str, torch.Tensor]] = []
            for some in rows.split(BLOCK):  # CPU time, which other work on the machine hardly touches
                batch = type(whole)(*(x[some] for x in whole))
                start = time.process_time()
                tangents = token_tangents(policy, batch, direction)._asdict()
                seconds["tangents"] += time.process_time() - start
                start = time.process_time()
                parts.append({**tangents, "hidden": hidden_features(policy, batch, width=None).half()})
                seconds["values"] += time.process_time() - start
                print(sample, len(parts) * BLOCK, seconds, flush=True)
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            mask = whole.response_mask[rows].bool()
            first = int(mask.any(dim=0).int().argmax())
            np.savez_compressed(
                file.with_suffix(".part.npz"),
                **{name: x[:, first:].numpy() for name, x in found.items()},
                mask=mask[:, first:].numpy(),
                prompt=whole.prompt_index[rows].numpy(),
                seconds=np.array([seconds[name] for name in ("sampling", "tangents", "values")]),
            )
            file.with_suffix(".part.npz").rename(file)
            print(file, seconds, flush=True)
    return files


class Samples(NamedTuple):
    """What `evaluate` kept, all responses together, [N, T]."""

    values: stats.TokenValues
    tangents: stats.TokenTangents
    mask: np.ndarray
    prompt: np.ndarray
    hidden: np.ndarray
    seconds: dict[str, float]  # of CPU, for one response per prompt


def read(files: list[Path]) -> Samples:
    """The arrays of all files; rows are responses."""
    found = [dict(np.load(file)) for file in files]
    width = max(x["mask"].shape[1] for x in found)

    def joined(name: str) -> np.ndarray:
        padded = [
            np.pad(x[name], [(0, 0), (width - x[name].shape[1], 0)] + [(0, 0)] * (x[name].ndim - 2))
            for x in found
        ]
        return np.concatenate(padded)

    return Samples(
        stats.TokenValues(joined("entropy"), joined("logprob")),
        stats.TokenTangents(joined("d_entropy"), joined("d_logprob")),
        joined("mask"),
        np.concatenate([x["prompt"] for x in found]),
        joined("hidden").astype(np.float32),
        dict(zip(("sampling", "tangents", "values"), found[0]["seconds"].tolist(), strict=True)),
    )


class Row(NamedTuple):
    """One estimator of h'(0): its influence over prompts tells its error, its paired distance from the unbiased one its bias."""

    name: str
    value: float
    influence: np.ndarray
    biased: bool
    seconds: float  # of CPU, for all responses


def estimators(samples: Samples) -> list[Row]:
    """Every estimator on the same samples; the first row is what others are compared with."""
    values, tangents, mask, prompt = samples.values, samples.tangents, samples.mask, samples.prompt
    group = len(prompt) // len(np.unique(prompt))
    pass_time = group * (samples.seconds["sampling"] + samples.seconds["tangents"])
    rows: list[Row] = []

    def add(name: str, kind: stats.EstimatorKind, b: np.ndarray | None = None, more: float = 0.0) -> None:
        given: dict[str, Any] = {"per": "token", "estimator": kind, "tangents": tangents, "baseline": b}
        sums = stats.prompt_sums(values, values, mask, prompt, **given)
        value = stats.first_derivative(sums).value
        rows.append(Row(name, value, stats.influence_first(sums), kind == "path", pass_time + more))

    add("per decision", "per_decision")
    add("whole sequence", "whole_sequence")
    add("path part alone", "path")
    lags = stats.lag_sums(values, tangents, mask, prompt, per="token")
    d = np.arange(1, lags.score_entropy.shape[1] + 1)
    for horizon in (1, 2, 4, 8, 16):
        rows.append(Row(f"to-go up to lag {horizon}", *weighted_lags(lags, d <= horizon), True, pass_time))
    for gamma in stats.DISCOUNTS:
        rows.append(Row(f"to-go discounted {gamma:g}", *weighted_lags(lags, gamma**d), True, pass_time))

    def with_baseline(name: str, kind: stats.BaselineKind, *, more: float = 0.0, **options: Any) -> None:
        start = time.process_time()
        b = stats.baseline(kind, values, mask, prompt, per="token", estimator="per_decision", **options)
        add(f"baseline: {name}", "per_decision", b, time.process_time() - start + more)

    score_square = np.where(mask, np.asarray(tangents.d_logprob) ** 2, 0.0)
    with_baseline("position", "position")
    with_baseline("moving average", "ema")
    if group > 1:
        with_baseline("the prompt's other responses", "group")
    with_baseline("regression on row statistics", "regression")
    with_baseline("the same, weighted with S'²", "regression", weight=score_square)
    with_baseline("row statistics, least error", "least_error", tangents=tangents)
    hidden = {"features": samples.hidden, "more": group * samples.seconds["values"]}
    with_baseline("critic on hidden states", "critic", **hidden)
    with_baseline("the same, weighted with S'²", "critic", weight=score_square, **hidden)
    return rows


def tabulate(samples: Samples, draws: int = 2000) -> list[dict[str, Any]]:
    """One line per estimator: value, error, bias, variance relative to the first at equal tokens and at equal CPU time, rms."""
    rows = estimators(samples)
    first = rows[0]
    B = len(first.influence)
    counts = np.random.default_rng(0).multinomial(B, np.full(B, 1 / B), size=draws)

    def error(influence: np.ndarray) -> float:
        return float(np.sqrt(B / (B - 1) * np.sum(influence**2)))

    lines = []
    for row in rows:
        ratio = np.sum(row.influence**2) / np.sum(first.influence**2)
        low, high = np.quantile(counts @ row.influence**2 / (counts @ first.influence**2), [0.025, 0.975])
        bias = row.value - first.value if row.biased else 0.0
        bias_error = error(row.influence - first.influence) if row.biased else 0.0
        lines.append(
            {
                "estimator": row.name,
                "value": row.value,
                "stderr": error(row.influence),
                "variance_ratio": ratio,
                "variance_ratio_low": float(low),
                "variance_ratio_high": float(high),
                "equal_time_ratio": ratio * row.seconds / first.seconds,
                "bias": bias,
                "bias_stderr": bias_error,
                # The square of an estimated bias is too large by its variance; what is left below zero is not resolved.
                "root_mean_square": math.sqrt(error(row.influence) ** 2 + max(bias**2 - bias_error**2, 0.0)),
                "seconds": row.seconds,
            }
        )
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The table for people."""
    where, found = report["conditions"], report["entropy"]
    cost = ", ".join(f"{name} {value:.0f}" for name, value in where["seconds"].items())
    lines = [
        "# Estimators of the entropy's derivative, SmolLM2-135M",
        "",
        f"{where['prompts']} prompts × {where['group']} responses, {where['tokens']} tokens (at most {where['longest']} in one; they end "
        f"{where['responses_end']}), "
        f"{where['dtype']}, {where['device']}, "
        f"torch {where['torch']}, commit {where['commit']}. h' in nats per token and unit η, along the AdamW step rebuilt from a "
        "checkpoint of TRL; all rows are made of the same tangents. Variances are relative to the first row, with bootstrap intervals of "
        f"95 % over prompts. CPU seconds for one response per prompt: {cost}. "
        "A bias is the paired difference from the first row; rms: error and bias together, the latter less its noise.",
        "",
        "| estimator | h' | variance, equal tokens | variance, equal CPU time | bias | rms |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["estimators"]:
        bias = f"{row['bias']:.0f} ± {row['bias_stderr']:.0f}" if row["bias_stderr"] else "0"
        interval = f"{row['variance_ratio_low']:.3f} to {row['variance_ratio_high']:.3f}"
        lines.append(
            f"| {row['estimator']} | {row['value']:.0f} ± {row['stderr']:.0f} | {row['variance_ratio']:.3f} ({interval}) | "
            f"{row['equal_time_ratio']:.3f} | {bias} | {row['root_mean_square']:.0f} |"
        )
    lines += ["", "| entropy | nats per token | variance relative to Σ H |", "|---|---|---|"]
    for name, (value, ratio) in found.items():
        lines.append(f"| {name} | {value} | {ratio} |")
    lines += ["", f"{report['tails']}", ""]
    return "\n".join(lines)


def commit() -> str:
    """Of the source tree."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def summary(samples: Samples, lines: bool) -> dict[str, Any]:
    """Everything that is written down."""
    values, tangents, mask, prompt = samples.values, samples.tangents, samples.mask, samples.prompt
    mix = stats.best_mix(values, mask, prompt, per="token")
    kinds: dict[str, Any] = {"per": "token", "estimator": "per_decision"}
    sums = stats.prompt_sums(values, values, mask, prompt, **kinds, tangents=tangents)
    shares = stats.token_contributions(values, tangents, mask, **kinds)
    tails = stats.heavy_tails(sums, shares, mask, prompt)
    alpha = tails.against_prompts[0].tail_index
    B = len(np.unique(prompt))
    return {
        "conditions": {
            "prompts": B,
            "group": len(prompt) // B,
            "tokens": int(mask.sum()),
            "longest": int(mask.sum(axis=1).max()),
            "responses_end": "at a line break or the end of the text" if lines else "at the end of the text",
            "dtype": "float32",
            "device": f"CPU, {torch.get_num_threads()} thread(s), other work on the machine",
            "torch": torch.__version__,
            "commit": commit(),
            "seconds": samples.seconds,
        },
        "estimators": tabulate(samples),
        "entropy": {
            "Rao-Blackwell, Σ H": (estimate(mix.rao_blackwell), "1"),
            "Monte Carlo, −Σ S": (estimate(mix.monte_carlo), estimate(mix.monte_carlo_variance_ratio)),
            "best mix": (estimate(mix.best_mix), estimate(mix.best_mix_variance_ratio)),
        },
        "tails": (
            f"Heavy tails of h' per decision: kurtosis of token contributions {estimate(tails.kurtosis)}; the top 1 % of tokens hold "
            f"{estimate(tails.top_share)} of Σ|contribution|; tail index of the prompts {alpha.value:.2f} ({alpha.low:.2f} to "
            f"{alpha.high:.2f})."
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="directory written by make_checkpoint.py")
    parser.add_argument("--dataset", type=Path, required=True, help="a .jsonl file with a column question")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--group", type=int, default=1, help="responses per prompt")
    parser.add_argument(
        "--results", type=Path, help="write NAME.json and NAME.md (default: in --output)", metavar="NAME"
    )
    parser.add_argument("--lines", action="store_true", help="responses end at a line break, as in training")
    args = parser.parse_args(argv)
    files = evaluate(args.ckpt, args.dataset, args.output, args.prompts, args.group, args.lines)
    report = summary(read(files), args.lines)
    name = args.results or args.output / "estimators"
    name.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    name.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
