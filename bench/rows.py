"""Entropy and logprob of vocabulary rows on the CPU: forward, forward mode, backward.

Each is held against the time to read (and write) the same data once, measured in the same rounds: `read` sums the logits,
`read both` sums logits and tangents, `read + write` clones the logits, new memory included, as a gradient needs it too.
Nothing is timed before it agrees with float64.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import jvp

from entropy_kernels.functional import entropy_logprob
from entropy_kernels.ops import cpu

SHAPES = [(2048, 49152, torch.float32), (256, 151936, torch.bfloat16)]
RESULTS = Path(__file__).parent / "results"
COMPILE_LIMIT_S = 60


def eager(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z.float(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def ours(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    result = entropy_logprob(z, y)
    return result.entropy, result.logprob


def trl_functions() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError:
        return None
    return lambda z, y: (entropy_from_logits(z), selective_log_softmax(z, y))


def error(f: Callable[..., tuple[Tensor, Tensor]], z: Tensor, y: Tensor) -> float:
    """The largest error on eight rows, relative to the largest value, against float64 of the same logits."""
    got, want = f(z[:8], y[:8]), eager64(z[:8], y[:8])
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def eager64(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z.double(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def derivative_error(z: Tensor, dz: Tensor, y: Tensor) -> float:
    """The same for our forward mode and gradient."""
    z, dz, y = z[:8], dz[:8], y[:8]
    got = jvp(lambda z: ours(z, y), (z,), (dz,))[1]
    want = jvp(lambda z: eager64(z, y), (z.double(),), (dz.double(),))[1]
    worst = max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))
    narrow, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    (g,) = torch.autograd.grad(sum(x.sum() for x in ours(narrow, y)), narrow)
    (w,) = torch.autograd.grad(sum(x.sum() for x in eager64(wide, y)), wide)
    return max(worst, ((g.double() - w).abs().max() / w.abs().max()).item())


def compiled(z: Tensor, y: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    start = time.perf_counter()
    try:
        f = torch.compile(eager)
        f(z[:8], y[:8])
        f(z, y)
    except Exception as failure:
        print(f"torch.compile does not work here: {type(failure).__name__}")
        return None
    return f if time.perf_counter() - start < COMPILE_LIMIT_S else None


def backward_of(f: Callable[..., tuple[Tensor, Tensor]], z: Tensor, y: Tensor) -> Callable[[], object]:
    """Only the backward pass, over a graph that is kept."""
    z = z.detach().requires_grad_()
    entropy, logprob = f(z, y)
    weights = [torch.ones_like(entropy), torch.ones_like(logprob)]
    return lambda: torch.autograd.grad((entropy, logprob), z, weights, retain_graph=True)


def measure(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Contenders take turns, so that a busy moment of the machine hits all of them. Median and quartiles, ms."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, f in contenders.items():
            start = time.perf_counter()
            f()
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    summary = {}
    for name, ms in times.items():
        low, median, high = statistics.quantiles(ms, n=4)
        summary[name] = {"median_ms": median, "quartile_low_ms": low, "quartile_high_ms": high}
    return summary


def one_shape(R: int, V: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(R, V, generator=g) * 2).to(dtype)
    dz = torch.randn(R, V, generator=g).to(dtype)
    y = torch.randint(0, V, (R,), generator=g)
    peers = {"eager": eager, "torch.compile": compiled(z, y), "TRL": trl_functions()}
    bound = (
        1e-5 if dtype == torch.float32 else 1e-2
    )  # the latter for peers and gradients that are rounded to bfloat16
    errors = {"ours": error(ours, z, y), "ours, derivatives": derivative_error(z, dz, y)}
    forward: dict[str, Callable[[], object]] = {"read": lambda: z.sum(), "ours": lambda: ours(z, y)}
    backward: dict[str, Callable[[], object]] = {
        "read + write": lambda: z.clone(),
        "ours": backward_of(ours, z, y),
    }
    for name, f in peers.items():
        if f is None:
            continue
        errors[name] = error(f, z, y)
        if errors[name] > bound:
            print(f"{name}: relative error {errors[name]:.1e}, not timed")
            continue
        forward[name] = lambda f=f: f(z, y)
    assert max(errors["ours"], errors["ours, derivatives"]) <= bound, errors
    if dtype == torch.bfloat16:
        exp = torch.empty_like(z)
        forward["exp only"] = lambda: torch.exp(z, out=exp)
    tangent: dict[str, Callable[[], object]] = {
        "read both": lambda: (z.sum(), dz.sum()),
        "ours": lambda: jvp(lambda z: ours(z, y), (z,), (dz,)),
        "ours, tangents alone": lambda: cpu.row_tangents(z, dz, y, torch.ones(R)),
    }
    timings = {"forward": measure(forward, repeats), "jvp": measure(tangent, repeats)}
    timings["backward"] = measure(backward, repeats)
    del backward
    few = max(2, repeats // 3)  # seconds each
    timings["jvp"] |= measure({"eager": lambda: jvp(lambda z: eager(z, y), (z,), (dz,))}, few)
    timings["backward"] |= measure({"eager": backward_of(eager, z, y)}, few)
    return {
        "rows": R,
        "vocabulary": V,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": errors,
        "timings": timings,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def markdown(result: dict) -> str:
    e = result["environment"]
    lines = [
        f"# Rows on {e['device']}, {e['threads']} threads, {e['backend']}",
        "",
        f"torch {e['torch']}, commit {e['commit']}, load average {e['load_average']:.1f} at the start. "
        "Median of the rounds, quartiles in brackets.",
    ]
    for shape in result["shapes"]:
        lines += ["", f"## [{shape['rows']}, {shape['vocabulary']}] {shape['dtype']}", ""]
        lines += [
            "Largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in shape["errors"].items())
        ]
        for name, timings in shape["timings"].items():
            base_name, base = next(iter(timings.items()))
            lines += ["", f"| {name} | ms | × {base_name} | ours is faster by |", "|---|---|---|---|"]
            ours_ms = timings["ours"]["median_ms"]
            for contender, t in timings.items():
                lines += [
                    f"| {contender} | {t['median_ms']:.1f} ({t['quartile_low_ms']:.1f}–{t['quartile_high_ms']:.1f}) "
                    f"| {t['median_ms'] / base['median_ms']:.2f} | {t['median_ms'] / ours_ms:.1f} |"
                ]
    return "\n".join(lines) + "\n"


def run(repeats: int) -> None:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    environment = {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "backend": cpu.backend(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
        "load_average": float(Path("/proc/loadavg").read_text().split()[0]),
    }
    result = {"environment": environment, "shapes": [one_shape(*shape, repeats) for shape in SHAPES]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rows_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "rows_cpu.md").write_text(markdown(result))
    print(markdown(result))
