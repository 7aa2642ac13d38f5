"""Entropy and logprob of vocabulary rows on the CPU: forward, forward mode, backward.

Each is held against the time to read (and write) the same data once, measured in the same rounds: `read` sums the logits,
`read both` sums logits and tangents, `read + write` clones the logits, new memory included, as a gradient needs it too.
Nothing is timed before it agrees with float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from bench import gpu, timing
from bench.peers import row_peers
from bench.timing import measure, relative_error
from entropy_kernels.functional import entropy_logprob
from entropy_kernels.ops import cpu

SHAPES = [(2048, 49152, torch.float32), (256, 151936, torch.bfloat16)]
COMPILE_LIMIT_S = 60
LIMIT_S = 9.0  # for rounds with contenders that take seconds
Outputs = tuple[Tensor, Tensor]


def eager(z: Tensor, y: Tensor) -> Outputs:
    log_p = torch.log_softmax(z.float(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def ours(z: Tensor, y: Tensor) -> Outputs:
    result = entropy_logprob(z, y)
    return result.entropy, result.logprob


def error(f: Callable[..., Outputs], z: Tensor, y: Tensor) -> float:
    """The largest error on the first eight rows, relative to the largest value, against float64 of the same logits."""
    return relative_error([x[:8] for x in f(z, y)], eager64(z[:8], y[:8]))


def eager64(z: Tensor, y: Tensor) -> Outputs:
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


def compiled(z: Tensor, y: Tensor) -> Callable[..., Outputs]:
    """`eager` in torch.compile for this shape alone."""
    torch.compiler.reset()
    f = torch.compile(eager, dynamic=False)
    start = time.perf_counter()
    f(z, y)
    if time.perf_counter() - start > COMPILE_LIMIT_S:
        raise TimeoutError(f"compiling took more than {COMPILE_LIMIT_S} s")
    return f


def right_peers(
    z: Tensor, y: Tensor, bound: float
) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """The peers that agree with float64, the errors of all, and why the others are not timed."""
    found, left_out = row_peers(gpu=False)
    made = {"eager": lambda: eager, "torch.compile": lambda: compiled(z, y)}
    made |= {name: lambda peer=peer: peer.function for name, peer in found.items()}
    right, errors = {}, {}
    for name, make in made.items():
        try:
            f = make()
            errors[name] = error(f, z, y)
        except Exception as failure:  # a compiler that is not there, a peer that raises
            left_out[name] = f"{type(failure).__name__}: {(str(failure) or '-').splitlines()[0][:200]}"
            continue
        if errors[name] <= bound:
            right[name] = f
        else:
            left_out[name] = f"wrong: relative error {errors[name]:.1e} against float64"
    return right, errors, left_out


def backward_of(f: Callable[..., Outputs], z: Tensor, y: Tensor) -> Callable[[], object]:
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
    # the latter for peers and gradients that are rounded to bfloat16
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    peers, errors, left_out = right_peers(z, y, bound)
    errors = {"ours": error(ours, z, y), "ours, derivatives": derivative_error(z, dz, y)} | errors
    assert max(errors["ours"], errors["ours, derivatives"]) <= bound, errors
    forward: dict[str, Callable[[], object]] = {"read": lambda: z.sum(), "ours": lambda: ours(z, y)}
    if dtype == torch.bfloat16:
        exp = torch.empty_like(z)
        forward["exp only"] = lambda: torch.exp(z, out=exp)
    forward |= {name: (lambda f=f: f(z, y)) for name, f in peers.items()}
    tangent: dict[str, Callable[[], object]] = {
        "read both": lambda: (z.sum(), dz.sum()),
        "ours": lambda: jvp(lambda z: ours(z, y), (z,), (dz,)),
        "ours, tangents alone": lambda: cpu.row_tangents(z, dz, y, torch.ones(R)),
    }
    backward: dict[str, Callable[[], object]] = {
        "read + write": lambda: z.clone(),
        "ours": backward_of(ours, z, y),
    }
    timings = {"forward": measure(forward, repeats, limit_s=LIMIT_S), "jvp": measure(tangent, repeats)}
    timings["backward"] = measure(backward, repeats)
    del backward
    slow = {"eager": lambda: jvp(lambda z: eager(z, y), (z,), (dz,))}
    timings["jvp"] |= measure(slow, repeats, limit_s=LIMIT_S / 2)
    for name, f in peers.items():  # one graph at a time: each holds several times the logits
        timings["backward"] |= measure({name: backward_of(f, z, y)}, repeats, limit_s=LIMIT_S / 2)
    return {
        "rows": R,
        "vocabulary": V,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": errors,
        "timings": timings,
        "left_out": left_out,
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
        lines += gpu.left_out(shape["left_out"])
    return lines


def run(repeats: int) -> None:
    environment = timing.environment("cpu")
    result = {"environment": environment, "shapes": [one_shape(*shape, repeats) for shape in SHAPES]}
    timing.save("rows_cpu", result, markdown(result))
