"""Entropy and logprob of vocabulary rows on the CPU: forward, forward mode, backward.

Each is held against the time to read (and write) the same data once, measured in the same rounds: `read` sums the logits,
`read both` sums logits and tangents, `read + write` clones the logits, new memory included, as a gradient needs it too.
Nothing is timed before it agrees with float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from bench import timing
from bench.timing import measure, relative_error
from entropy_kernels.functional import entropy_logprob
from entropy_kernels.ops import cpu

SHAPES = [(2048, 49152, torch.float32), (256, 151936, torch.bfloat16)]
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
    return relative_error(f(z[:8], y[:8]), eager64(z[:8], y[:8]))


def eager64(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z.double(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def derivative_error(z: Tensor, dz: Tensor, y: Tensor) -> float:
    """The same for our forward mode and gradient."""
    z, dz, y = z[:8], dz[:8], y[:8]
    got = jvp(lambda z: ours(z, y), (z,), (dz,))[1]
    want = jvp(lambda z: eager64(z, y), (z.double(),), (dz.double(),))[1]
    worst = relative_error(got, want)
    narrow, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    (g,) = torch.autograd.grad(sum(x.sum() for x in ours(narrow, y)), narrow)
    (w,) = torch.autograd.grad(sum(x.sum() for x in eager64(wide, y)), wide)
    return max(worst, relative_error([g], [w]))


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


def markdown(result: dict) -> list[str]:
    lines = timing.conditions("Rows", result["environment"])
    for shape in result["shapes"]:
        lines += ["", f"## [{shape['rows']}, {shape['vocabulary']}] {shape['dtype']}", ""]
        lines += [
            "Largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in shape["errors"].items())
        ]
        for name, timings in shape["timings"].items():
            lines += timing.table(name, timings)
    return lines


def run(repeats: int) -> None:
    environment = timing.environment("cpu")
    result = {"environment": environment, "shapes": [one_shape(*shape, repeats) for shape in SHAPES]}
    timing.save("rows_cpu", result, markdown(result))
