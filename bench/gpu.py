"""What the GPU's benchmarks share: contenders are checked against float64 one by one, and those that are right timed in turns.

The dry run (`--device interpreter`) takes the same way on the CPU: few rows, Triton's interpreter, the host's clock, no result kept.
"""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench import timing
from bench.timing import Contenders


def device_of(choice: str) -> str:
    """The device behind --device: a GPU, or the CPU for the interpreter."""
    if choice == "interpreter":
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: torch sees no GPU here. --device interpreter runs the same benchmark on a few rows without one."
        )
    return choice


def compiled(f: Callable[..., Any], device: str) -> Callable[..., Any]:
    """f in torch.compile for one shape; what other shapes left behind, which would make it general and slower, is forgotten."""
    if device == "cpu":
        return f  # the dry run: the compiler is not what it checks
    torch.compiler.reset()
    return torch.compile(f, dynamic=False)


def contest(
    calls: Contenders,
    error: Callable[[str, Any], float],
    bounds: Callable[[str], float],
    repeats: int,
    device: str,
    *,
    before: Contenders | None = None,
    limit_s: float,
) -> dict[str, Any]:
    """Errors against float64, peak memory and times of those that are right, and why the others are left out.

    `error(name, result)` is of one call. A contender may fail in any way, and the others are measured all the same.
    """
    before = before or {}
    found: dict[str, Any] = {"errors": {}, "peak_mb": {}, "timings": {}, "left_out": {}}
    right: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            e = one_error(name, call, error, before)
            if not e <= bounds(name):
                found["left_out"][name] = f"wrong: relative error {e:.1e} against float64"
            else:
                before.get(name, lambda: None)()
                peak = timing.peak_bytes(call, device)
                right[name] = call
                found["peak_mb"][name] = None if peak is None else peak / 2**20
            found["errors"][name] = e
        except Exception as failure:  # a peer may raise anything, OutOfMemoryError first of all
            found["left_out"][name] = (
                f"{type(failure).__name__}: {(str(failure) or '-').splitlines()[0][:200]}"
            )
            if name.startswith("ours"):
                traceback.print_exc()
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    found["timings"] = timing.measure(right, repeats, device, before=before, limit_s=limit_s)
    return found


def error_of(pair: Callable[[], tuple[Any, Any]]) -> float:
    """The relative error of (result, float64's); infinite, with the reason printed, where either raises."""
    try:
        return timing.relative_error(*pair())
    except Exception:
        traceback.print_exc()
        return math.inf


def one_error(
    name: str, call: Callable[[], Any], error: Callable[[str, Any], float], before: Contenders
) -> float:
    """In a function of its own, so that the result is gone from memory afterwards."""
    before.get(name, lambda: None)()
    return error(name, call())


def add_bandwidth(timings: Mapping[str, Any], bytes_moved: Callable[[str], int]) -> None:
    """GB/s by the fewest bytes, and the share of `copy`'s."""
    for name, t in timings.items():
        t["gb_per_s"] = bytes_moved(name) / t["median_ms"] / 1e6
    for t in timings.values():
        t["share_of_copy"] = t["gb_per_s"] / timings["copy"]["gb_per_s"]


def table(title: str, found: Mapping[str, Any], ours: str = "ours") -> list[str]:
    """Markdown of one contest."""
    lines = [
        "",
        f"| {title} | ms | GB/s | of the copy | ours is faster by | peak MB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    base = found["timings"].get(ours, {"median_ms": math.nan})["median_ms"]
    for name, t in found["timings"].items():
        peak = found["peak_mb"][name]
        lines += [
            f"| {name} | {t['median_ms']:.3f} ({t['quartile_low_ms']:.3f}–{t['quartile_high_ms']:.3f}) | {t['gb_per_s']:.0f} "
            f"| {t['share_of_copy']:.0%} | {t['median_ms'] / base:.2f} "
            f"| {'–' if peak is None else f'{peak:.0f}'} | {found['errors'][name]:.1e} |"
        ]
    return lines + left_out(found["left_out"])


def left_out(reasons: Mapping[str, str]) -> list[str]:
    return (
        ["", *(f"Not timed: {name}, {reason.rstrip('.')}." for name, reason in reasons.items())]
        if reasons
        else []
    )


def run_all(
    name: str,
    environment: dict[str, Any],
    cases: Sequence[Any],
    one: Callable[[Any], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], list[str]],
    choice: str,
) -> None:
    """Case after case, written down after each, so that what ends a run early leaves what came before it.

    A case that raises is named in the result, and the exit status says so; nothing is written in a dry run.
    """
    result: dict[str, Any] = {"environment": environment, "shapes": [], "failed": {}}
    for case in cases:
        try:
            result["shapes"].append(one(case))
        except Exception as failure:
            traceback.print_exc()
            result["failed"][str(case)] = f"{type(failure).__name__}: {(str(failure) or '-').splitlines()[0]}"
        finish(name, result, markdown(result) + left_out(result["failed"]), choice)
    stop_if_wrong([*result["shapes"], {"wrong": result["failed"], "beside_peers": {}}])


def finish(name: str, result: dict[str, Any], lines: Sequence[str], choice: str) -> None:
    """Written to bench/results under the device's name; only printed in a dry run."""
    if choice == "interpreter":
        print("\n".join(["A dry run: times below mean nothing.", "", *lines]))
        return
    result["environment"]["clocks"].append(timing.clocks())  # the first was cold
    device = result["environment"]["device"].lower().replace("nvidia", "").split()
    timing.save("_".join([name, *device]), result, list(lines))


def stop_if_wrong(shapes: Sequence[Mapping[str, Any]]) -> None:
    """The exit status says so if anything of ours was wrong or failed; the result is written before."""
    faults = [name for shape in shapes for name in shape.get("wrong", {})]
    for shape in shapes:
        for line, found in shape["beside_peers"].items():
            faults += [
                f"{name}, {line}: {why}" for name, why in found["left_out"].items() if name.startswith("ours")
            ]
    if faults:
        raise SystemExit(f"of ours, not timed: {'; '.join(faults)}")
