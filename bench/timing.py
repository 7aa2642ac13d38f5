"""What every benchmark shares: contenders that take turns, the conditions of a run, result files.

Times are medians with quartiles, in milliseconds, from one run; a ratio is only ever taken within a run. On a GPU they lie between two
events on the stream, behind a write of FLUSH_BYTES, which empties the cache and gives the host time to queue what is timed.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_kernels.ops import cpu

RESULTS = Path(__file__).parent / "results"
MIN_ROUNDS = 3  # fewer have no quartiles
FLUSH_BYTES = 1 << 30
Contenders = Mapping[str, Callable[[], object]]


def measure(
    contenders: Contenders,
    repeats: int,
    device: str = "cpu",
    *,
    before: Contenders | None = None,
    limit_s: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Contenders take turns, so that a busy moment of the machine hits all of them. Median and quartiles, ms.

    `before[name]` runs untimed ahead of each call of that contender. After `limit_s` no further round is begun, once there were three.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for round_ in range(repeats + 1):
        if round_ > MIN_ROUNDS and time.perf_counter() - start > limit_s:
            break
        for name, f in contenders.items():
            if before and name in before:
                before[name]()
            ms = one_call_ms(f, device)
            if round_:  # the first round warms up
                times[name].append(ms)
    return {name: spread(ms_of_rounds) for name, ms_of_rounds in times.items()}


def spread(ms_of_rounds: list[float]) -> dict[str, float]:
    """Median and quartiles, and of how many rounds."""
    low, median, high = statistics.quantiles(ms_of_rounds, n=4, method="inclusive")
    return {
        "median_ms": median,
        "quartile_low_ms": low,
        "quartile_high_ms": high,
        "rounds": len(ms_of_rounds),
    }


def one_call_ms(f: Callable[[], object], device: str) -> float:
    """One call: wall time on the CPU, time between two events on the GPU."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        f()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush_buffer(device).zero_()
    before.record()
    f()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


@functools.lru_cache(maxsize=1)
def flush_buffer(device: str) -> Tensor:
    """Larger than any cache."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def peak_bytes(f: Callable[[], object], device: str) -> int | None:
    """The most device memory one call holds above what was there before, its results included; None on the CPU."""
    if not device.startswith("cuda"):
        f()
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def rotating(count: int, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Another copy of the tensors each time, `count` in all, so that no call finds its data in the cache."""
    copies = [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]
    turn = iter(range(1 << 60))
    return lambda: copies[next(turn) % count]


def relative_error(got: Any, want: Any) -> float:
    """The largest error of any part, relative to that part's largest value."""
    return max(
        float((g.double() - w.double()).abs().max() / w.double().abs().max())
        for g, w in zip(got, want, strict=True)
    )


def processor(device: str) -> str:
    """The name of the CPU or GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def environment(device: str) -> dict[str, Any]:
    """Device, versions, commit and load: the conditions of a run."""
    found: dict[str, Any] = {
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "backend": cpu.backend() if device == "cpu" else "gpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "load_average": os.getloadavg()[0],
    }
    if device != "cpu":
        found["cuda"] = torch.version.cuda
        found["clocks"] = [clocks()]
    return found


def clocks() -> str | None:
    """The GPU's clocks, temperature and power at this moment, as the driver's tool reports them."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def output_of(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def conditions(title: str, e: Mapping[str, Any]) -> list[str]:
    """The head of a Markdown result."""
    return [
        f"# {title} on {e['device']}, {e['threads']} threads, {e['backend']}",
        "",
        f"torch {e['torch']}, commit {e['commit']}, load average {e['load_average']:.1f} at the start. "
        "Median of the rounds, quartiles in brackets.",
    ]


def table(name: str, timings: Mapping[str, Mapping[str, float]], ours: str = "ours") -> list[str]:
    """A Markdown table of contenders against the first of them and against ours."""
    base_name, base = next(iter(timings.items()))
    lines = ["", f"| {name} | ms | × {base_name} | ours is faster by |", "|---|---|---|---|"]
    for contender, t in timings.items():
        spread = f"{t['median_ms']:.1f} ({t['quartile_low_ms']:.1f}–{t['quartile_high_ms']:.1f})"
        lines += [
            f"| {contender} | {spread} | {t['median_ms'] / base['median_ms']:.2f} "
            f"| {t['median_ms'] / timings[ours]['median_ms']:.1f} |"
        ]
    return lines


def save(name: str, result: Mapping[str, Any], lines: list[str]) -> None:
    """bench/results/NAME.json and NAME.md; the latter is printed too."""
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
