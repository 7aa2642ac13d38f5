"""Entropy and logprob from hidden states on the CPU: forward, backward, forward mode, beside their bare matrix products.

`GEMM` writes the logits chunk by chunk into one buffer that was there before, as large as ours, and does nothing with them; `layer` makes
all logits in new memory, as a call of the layer does; `GEMMs` are the
three products of a backward pass (the logits again, dh, dW), or those of values and tangents. Peak memory is that of a fresh
process, above what it held before the call. Nothing is timed before it agrees with float64.
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

SHAPES = [
    (2048, 576, 49152),
    (512, 2048, 151936),
]  # SmolLM2-135M's head; that of a 1.5B model with a large vocabulary


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


def backward_gemms(h: Tensor, W: Tensor) -> Callable[[], object]:
    size = chunks(len(h), len(W))
    buffer, dW, dh = torch.empty(size, len(W)), torch.zeros_like(W), torch.empty_like(h)

    def call() -> None:
        for i in range(0, len(h), size):
            part = h[i : i + size]
            z = buffer[: len(part)]
            torch.mm(part, W.t(), out=z)
            torch.mm(z, W, out=dh[i : i + size])
            dW.addmm_(z.t(), part)

    return call


def backward_of(
    f: Callable[..., tuple[Tensor, Tensor]], h: Tensor, W: Tensor, y: Tensor
) -> Callable[[], object]:
    """Only the backward pass, over a graph that is kept."""
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_()
    out = f(h, W, y)
    return lambda: torch.autograd.grad(out, (h, W), [torch.ones_like(o) for o in out], retain_graph=True)


_PEAK = """
import torch
from bench.linear import ours
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.set_num_threads({threads})
h, W = torch.randn({N}, {D}, requires_grad=True), torch.randn({V}, {D}, requires_grad=True)
y = torch.randint(0, {V}, ({N},))
def step(n):
    out = ours(h[:n], W, y[:n])
    {backward}
step(2)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
step({N})
print(peak() - before)
"""


def peak_mb(N: int, D: int, V: int, *, backward: bool) -> float:
    """Peak memory of one call above inputs (and gradients, which a first small call has made), MB."""
    code = _PEAK.format(
        N=N,
        D=D,
        V=V,
        threads=torch.get_num_threads(),
        backward="sum(out).sum().backward()" if backward else "pass",
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(found.stdout) / 1024


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
    backward = {name: backward_of(f, h, W, y) for name, f in contenders.items() if name != "eager"}
    timings["backward"] = timing.measure({"GEMMs": backward_gemms(h, W), **backward}, repeats)
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
        "peak_mb": {"forward": peak_mb(N, D, V, backward=False), "backward": peak_mb(N, D, V, backward=True)},
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
            f"Peak memory above inputs and gradients: forward {shape['peak_mb']['forward']:.0f} MB, with backward "
            f"{shape['peak_mb']['backward']:.0f} MB (workspace {shape['workspace_mb']:.0f} MB, all logits "
            f"{shape['rows'] * shape['vocabulary'] * 4 / 2**20:.0f} MB).",
        ]
        for name, timings in shape["timings"].items():
            lines += timing.table(name, timings)
    return lines


def run(repeats: int) -> None:
    result = {
        "environment": timing.environment("cpu"),
        "shapes": [one_shape(*shape, repeats) for shape in SHAPES],
    }
    timing.save("linear_cpu", result, markdown(result))
