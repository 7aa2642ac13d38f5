"""Entropy and logprob of vocabulary rows on a GPU: every row function beside a copy, and the forward beside what it replaces.

Bytes are the fewest a function can move, each input read once and each output written once; a figure's share is its bytes per second
over those of `copy`, measured in the same rounds. Every call finds other buffers than the one before, together larger than any cache.
Nothing is timed before it agrees with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.rows import compiled, eager, eager64, trl_functions
from bench.timing import measure, relative_error, rotating
from entropy_kernels.ops import reference, rows

SHAPES = [(8192, 151936, torch.bfloat16), (4096, 151936, torch.float32), (8192, 49152, torch.bfloat16)]
BUFFERS = 3
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


class Inputs:
    """Logits, a tangent, targets, and cotangents of ones, made on the device."""

    def __init__(self, R: int, V: int, dtype: torch.dtype, device: str):
        g = torch.Generator(device).manual_seed(0)
        self.z = torch.randn(R, V, generator=g, device=device, dtype=torch.float32).mul_(2).to(dtype)
        self.v = torch.randn(R, V, generator=g, device=device, dtype=torch.float32).to(dtype)
        self.y = torch.randint(0, V, (R,), generator=g, device=device)
        self.tau = torch.ones(R, device=device, dtype=reference.compute_dtype(dtype))
        self.w = (self.tau,) * 3


def functions(y: Tensor, tau: Tensor, w: tuple[Tensor, ...]) -> dict[str, tuple[Callable[..., Any], int]]:
    """Name -> (function of z, v, a buffer and the state, how many tensors of rows it must read or write)."""
    return {
        "copy": (lambda z, v, out, state: out.copy_(z), 2),
        "values": (lambda z, v, out, state: rows.row_values(z, y, tau), 1),
        "tangents": (lambda z, v, out, state: rows.row_tangents(z, v, y, tau), 2),
        "second tangents": (lambda z, v, out, state: rows.row_second_tangents(z, v, out, y, tau), 3),
        "gradient, state handed in": (
            lambda z, v, out, state: rows.row_cotangents(z, y, tau, *w, out=out, state=state),
            2,
        ),
        "gradient alone": (lambda z, v, out, state: rows.row_cotangents(z, y, tau, *w, out=out), 2),
        "tangent of the gradient": (
            lambda z, v, out, state: rows.row_cotangent_tangents(z, v, y, tau, w, w, out=out),
            3,
        ),
    }


def errors(x: Inputs) -> dict[str, float]:
    """Every function on eight rows against the float64 specification."""
    z, v, y, tau = x.z[:8], x.v[:8], x.y[:8], x.tau[:8]
    w = tuple(t[:8] for t in x.w)
    wide = [t.double() for t in (z, v, tau)]
    W = tuple(t.double() for t in w)
    pairs: dict[str, tuple[Any, Any]] = {
        "values": (rows.row_values(z, y, tau), reference.row_values(wide[0], y, wide[2])),
        "tangents": (rows.row_tangents(z, v, y, tau), reference.row_tangents(*wide[:2], y, wide[2])),
        "second tangents": (
            rows.row_second_tangents(z, v, z, y, tau),
            reference.row_second_tangents(wide[0], wide[1], wide[0], y, wide[2]),
        ),
        "gradient": (
            [rows.row_cotangents(z, y, tau, *w)],
            [reference.row_cotangents(wide[0], y, wide[2], *W)],
        ),
        "tangent of the gradient": (
            [rows.row_cotangent_tangents(z, v, y, tau, w, w)],
            [reference.row_cotangent_tangents(*wide[:2], y, wide[2], W, W)],
        ),
    }
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def one_shape(
    R: int, V: int, dtype: torch.dtype, repeats: int, device: str, peers: bool = True
) -> dict[str, Any]:
    x = Inputs(R, V, dtype, device)
    found = errors(x)
    bad = {name: e for name, e in found.items() if not e <= BOUND[dtype]}
    if bad:
        raise SystemExit(f"not timed, wrong against float64: {bad}")
    state = rows.row_values_and_state(x.z, x.y, x.tau)[1]
    # a buffer to write to is taken in turn as well; its content is the tangent of another turn, never zeros
    buffers = rotating(BUFFERS, x.z, x.v, x.v.clone())
    calls = functions(x.y, x.tau, x.w)
    timed = {name: (lambda f=f: f(*buffers(), state)) for name, (f, _) in calls.items()}
    timings: dict[str, Any] = measure(timed, repeats, device)
    if peers:
        others = {"eager": eager, "torch.compile": compiled(x.z, x.y), "TRL": trl_functions()}
        kept = {}
        for name, f in others.items():
            if f is None:
                continue
            found[name] = relative_error(f(x.z[:8], x.y[:8]), eager64(x.z[:8], x.y[:8]))
            if found[name] <= 1e-2:
                kept[f"{name}, forward"] = lambda f=f: f(buffers()[0], x.y)
        timings |= measure(kept, repeats, device)
    for name, t in timings.items():
        tensors = calls[name][1] if name in calls else 1
        t["gb_per_s"] = tensors * R * V * dtype.itemsize / t["median_ms"] / 1e6
        t["share_of_copy"] = t["gb_per_s"] / timings["copy"]["gb_per_s"]
    return {
        "rows": R,
        "vocabulary": V,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": found,
        "timings": timings,
    }


def markdown(result: dict[str, Any]) -> list[str]:
    lines = timing.conditions("Rows", result["environment"])
    for shape in result["shapes"]:
        lines += ["", f"## [{shape['rows']}, {shape['vocabulary']}] {shape['dtype']}", ""]
        lines += [
            "Largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in shape["errors"].items())
        ]
        lines += ["", "| function | ms | GB/s | of the copy |", "|---|---|---|---|"]
        for name, t in shape["timings"].items():
            spread = f"{t['median_ms']:.3f} ({t['quartile_low_ms']:.3f}–{t['quartile_high_ms']:.3f})"
            lines += [f"| {name} | {spread} | {t['gb_per_s']:.0f} | {t['share_of_copy']:.0%} |"]
    return lines


def run(repeats: int) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here. Leave the flag out to time rows on the CPU.")
    environment = timing.environment("cuda") | {"backend": rows.backend()}
    result = {
        "environment": environment,
        "shapes": [one_shape(*shape, repeats, "cuda") for shape in SHAPES],
    }
    timing.save("rows_gpu", result, markdown(result))
