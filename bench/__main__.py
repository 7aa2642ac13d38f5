"""`python -m bench NAME`: timings of the kernels beside what they replace; results go to bench/results/."""

from __future__ import annotations

import argparse
import importlib
import os

BENCHMARKS = ["rows", "linear", "truncated", "fisher", "fisher_size", "gate", "gate_head", "plots"]
ON_GPU = {
    "rows": "rows_gpu",
    "linear": "linear_gpu",
    "truncated": "truncated_gpu",
}  # benchmark: the module of its GPU version

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed rounds, 7 on the CPU and 25 on a GPU if not said; every contender runs once a round (the gates and plots time nothing)",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda", "interpreter"],
        default="cpu",
        help="where it is timed; interpreter runs the GPU's benchmark on a few rows in Triton's interpreter, "
        "which finds its mistakes without a GPU, and keeps no result",
    )
    arguments = parser.parse_args()
    if arguments.device != "cpu" and arguments.benchmark not in ON_GPU:
        parser.error(
            f"--device {arguments.device}: {arguments.benchmark} has no GPU version; {', '.join(ON_GPU)} have"
        )
    # imported only now: the interpreter must be asked for before Triton is, and a benchmark's requirements are its own
    if arguments.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    if arguments.device == "cpu":
        module = importlib.import_module(f"bench.{arguments.benchmark}")
        module.run(arguments.repeats or 7)
    else:
        module = importlib.import_module(f"bench.{ON_GPU[arguments.benchmark]}")
        module.run(arguments.repeats or (25 if arguments.device == "cuda" else 2), arguments.device)
