"""`python -m bench NAME`: timings of the kernels beside what they replace; results go to bench/results/."""

from __future__ import annotations

import argparse

from bench import fisher, fisher_size, gate, linear, rows, rows_gpu, truncated

BENCHMARKS = {
    "rows": rows.run,
    "linear": linear.run,
    "truncated": truncated.run,
    "fisher": fisher.run,
    "fisher_size": fisher_size.run,
    "gate": lambda _: gate.run(),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help="timed rounds; every contender runs once a round (gate times nothing)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where rows are timed")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if arguments.benchmark != "rows":
            parser.error(f"--device cuda: {arguments.benchmark} has no GPU version; only rows has")
        rows_gpu.run(arguments.repeats)
    else:
        BENCHMARKS[arguments.benchmark](arguments.repeats)
