"""Entropy and logprob from hidden states on the CPU: forward, backward, forward mode, beside their bare matrix products.

`GEMM` writes the logits chunk by chunk into one buffer that was there before and does nothing with them, `GEMMs` does so for the three
products of a backward pass (the logits again, dh, dW; dW in memory that was there before, too), or for those of values and tangents. Both
take the rows that fill the workspace; ours cuts otherwise, and may be the faster for it. `layer` makes all logits in new memory, as a
call of the layer does. `frozen` is the backward pass with hidden states alone, beside its two products. Peak memory is that of
a fresh process, above what it held before the call, less what the call returns. Nothing is timed before it agrees with float64.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from bench import timing
from entropy_kernels import linear_entropy_logprob
from entropy_kernels.functional.linear import WORKSPACE_BYTES

# SmolLM2-135M's head; that of a 1.5B model with a large vocabulary. Rounds at most: all of it is to take four minutes
SHAPES = {(2048, 576, 49152): 4, (512, 2048, 151936): 2}


def ours(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    result = linear_entropy_logprob(h, W, y)
    return result.entropy, result.logprob


def eager(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(h @ W.t(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def trl(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(h, W, None, y, 1.0, 8192, None, 1.0, ("entropy",))
    return entropy, logprob


def chunks(N: int, V: int) -> int:
    return max(1, WORKSPACE_BYTES * 7 // 8 // (4 * V))


def gemm(h: Tensor, W: Tensor) -> Callable[[], object]:
    size = chunks(len(h), len(W))
    buffer = torch.empty(size, len(W))

    def call() -> None:
        for part in h.split(size):
            torch.mm(part, W.t(), out=buffer[: len(part)])

    return call


def backward_gemms(h: Tensor, W: Tensor, *, frozen: bool = False) -> Callable[[], object]:
    size = chunks(len(h), len(W))
    buffer, dW, dh = torch.empty(size, len(W)), torch.zeros_like(W), torch.empty_like(h)

    def call() -> None:
        for i in range(0, len(h), size):
            part = h[i : i + size]
            z = buffer[: len(part)]
            torch.mm(part, W.t(), out=z)
            torch.mm(z, W, out=dh[i : i + size])
            if not frozen:
                dW.addmm_(z.t(), part)

    return call


def backward_of(
    f: Callable[..., tuple[Tensor, Tensor]], h: Tensor, W: Tensor, y: Tensor, *, frozen: bool = False
) -> Callable[[], object]:
    """Only the backward pass, over a graph that is kept; `frozen`, with respect to the hidden states alone."""
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_(not frozen)
    out, x = f(h, W, y), (h,) if frozen else (h, W)
    return lambda: torch.autograd.grad(out, x, [torch.ones_like(o) for o in out], retain_graph=True)


_PEAK = """
import torch
from torch.func import grad, jvp
from bench.linear import ours
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def bytes_of(x):
    return x.numel() * x.itemsize if isinstance(x, torch.Tensor) else sum(map(bytes_of, x))
torch.set_num_threads({threads})
h, W, dh, dW = (torch.randn(n, {D}) for n in ({N}, {V}, {N}, {V}))
y = torch.randint(0, {V}, ({N},))
def loss(h, W):
    return sum(ours(h, W, y[: len(h)])).sum()
def step(n):
    x, v = (h[:n], W), (dh[:n], dW)
    if "{mode}" == "forward":
        return ours(*x, y[:n])
    if "{mode}" == "backward":
        return torch.autograd.grad(loss(*(t.requires_grad_() for t in x)), x)
    if "{mode}" == "jvp":
        return jvp(lambda *x: ours(*x, y[:n]), x, v)
    return jvp(grad(loss, (0, 1)), x, v)
step(2)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
out = step({N})
print(peak() * 1024 - before * 1024 - bytes_of(out))
"""
MODES = ["forward", "backward", "jvp", "tangent of the gradient"]


def peak_mb(N: int, D: int, V: int, mode: str) -> float:
    """Peak memory of one call in a fresh process, above what it held before, less what the call returns, MB.

    What is returned counts as an output once: values, and of a gradient one new dh and dW, as torch's own gradient of a layer has.
    """
    code = _PEAK.format(N=N, D=D, V=V, threads=torch.get_num_threads(), mode=mode)
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(found.stdout) / 2**20


def one_shape(N: int, D: int, V: int, repeats: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * (2 / D**0.5)
    dh, dW = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    y = torch.randint(0, V, (N,), generator=g)
    few = 16
    small = (h[:few], W, y[:few])
    want = eager(h[:few].double(), W.double(), y[:few])
    contenders = {"ours": ours, "TRL": trl, "eager": eager}
    errors = {name: timing.relative_error(f(*small), want) for name, f in contenders.items()}
    tangent = jvp(lambda h, W: ours(h, W, y[:few]), (h[:few], W), (dh[:few], dW))[1]
    wide = jvp(
        lambda h, W: eager(h, W, y[:few]), (h[:few].double(), W.double()), (dh[:few].double(), dW.double())
    )[1]
    errors["ours, tangents"] = timing.relative_error(tangent, wide)
    assert all(e <= 1e-5 for e in errors.values()), errors
    forward = {name: (lambda f=f: f(h, W, y)) for name, f in contenders.items()}
    timings = {
        "forward": timing.measure(
            {"GEMM": gemm(h, W), "layer": lambda: torch.nn.functional.linear(h, W), **forward}, repeats
        )
    }
    backward = {"GEMMs": backward_gemms(h, W), "ours": backward_of(ours, h, W, y)}
    if N * V * D < 1 << 36:  # as slow as forward tells, and long
        backward["TRL"] = backward_of(trl, h, W, y)
        timings["frozen"] = timing.measure(
            {"GEMMs": backward_gemms(h, W, frozen=True), "ours": backward_of(ours, h, W, y, frozen=True)},
            repeats,
        )
    timings["backward"] = timing.measure(backward, repeats)
    del backward
    one = gemm(h, W)
    timings["jvp"] = timing.measure(
        {
            "GEMMs": lambda: (one(), one(), one()),
            "ours": lambda: jvp(lambda h, W: ours(h, W, y), (h, W), (dh, dW)),
        },
        repeats,
    )
    return {
        "rows": N, "hidden": D, "vocabulary": V, "dtype": "float32", "errors": errors, "timings": timings,
        "workspace_mb": WORKSPACE_BYTES / 2**20,
        "peak_mb": {mode: peak_mb(N, D, V, mode) for mode in MODES},
    }  # fmt: skip


def markdown(result: dict) -> list[str]:
    lines = timing.conditions("From hidden states", result["environment"])
    for shape in result["shapes"]:
        lines += [
            "",
            f"## [{shape['rows']}, {shape['hidden']}] × [{shape['vocabulary']}, {shape['hidden']}] {shape['dtype']}",
            "",
        ]
        lines += [
            "Largest error against float64: "
            + ", ".join(f"{k} {v:.1e}" for k, v in shape["errors"].items())
            + ".",
            "Peak memory above inputs and what is returned: "
            + ", ".join(f"{mode} {mb:.0f} MB" for mode, mb in shape["peak_mb"].items())
            + f" (workspace {shape['workspace_mb']:.0f} MB, all logits {shape['rows'] * shape['vocabulary'] * 4 / 2**20:.0f} MB).",
        ]
        for name, timings in shape["timings"].items():
            lines += timing.table(name, timings)
    return lines


def run(repeats: int) -> None:
    result = {
        "environment": timing.environment("cpu"),
        "shapes": [one_shape(*shape, min(repeats, most)) for shape, most in SHAPES.items()],
    }
    timing.save("linear_cpu", result, markdown(result))
