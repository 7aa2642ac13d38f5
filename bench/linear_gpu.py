"""Entropy and logprob from hidden states on a GPU: ours by chunks, the fused candidates, and peers, beside their bare products.

`GEMM` is the library's product alone, by chunks as large as the workspace allows, into memory that was there before; `GEMM at once` the
same into one buffer of all logits. `GEMMs` of a gradient are four: the logits, the logits again, dh and dW; of tangents three.
TFLOP/s count those products for everybody, whatever a contender really computes.

Truth is the float64 specification on all rows, values, gradients and tangents. Nothing is timed before it agrees with it. W and h are
larger than any cache, which is flushed before every call besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from bench import gpu, timing
from bench.gate_head import CANDIDATES
from bench.peers import HeadFunction, HeadPeer, head_peers
from entropy_kernels import linear_entropy_logprob
from entropy_kernels.functional.linear import WORKSPACE_BYTES
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import fused_linear, linear, reference, rows
from entropy_kernels.ops.fused_linear import GRADIENT, TANGENTS, VALUES, Tiles
from entropy_kernels.ops.linear import Head, Point

SHAPES = [(8192, 4096, 131072, torch.bfloat16), (8192, 2048, 151936, torch.bfloat16)]
DRY_SHAPES = [(20, 64, 300, torch.bfloat16)]
BOUND = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-5}
FUSED_BOUND = 2e-4  # values and tangents of logits that were never rounded to 16 bits
LIMIT_S = 20.0  # for the rounds of one table
PRODUCTS = {"forward": 1, "forward and gradient": 4, "tangents": 3}  # of N·D·V


class Inputs:
    """Hidden states, weight, a tangent of each, targets, on the device; logits with a standard deviation of 2."""

    def __init__(self, N: int, D: int, V: int, dtype: torch.dtype, device: str):
        g = torch.Generator(device).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return torch.randn(rows, D, generator=g, device=device).mul_(scale).to(dtype)

        self.h, self.W = normal(N, 1.0), normal(V, 2 / D**0.5)
        self.dh, self.dW = normal(N, 1.0), normal(V, 1 / D**0.5)
        self.y = torch.randint(0, V, (N,), generator=g, device=device)
        self.one = torch.ones(N, device=device)
        self.zero = torch.zeros(N, device=device)

    def point(self, dtype: torch.dtype | None = None) -> Point:
        """Everything in `dtype`, or as it is."""
        h, W, tau = (t if dtype is None else t.to(dtype) for t in (self.h, self.W, self.one))
        return Point(Head(h, W, None), self.y, tau, None, WORKSPACE_BYTES, reference)


def truth(x: Inputs) -> dict[str, list[Tensor]]:
    """Line -> float64's (entropy, logprob), (dh, dW), (dh, dW) of logprob alone, (entropy', logprob'), kept in float32."""
    wide = x.point(torch.float64)._replace(workspace=1 << 30)

    def gradient(q: Tensor) -> list[Tensor]:
        weights = tuple(t.double() for t in (q, x.one, x.zero))
        found = linear.linear_cotangents(wide, weights, (True, True, False))
        return [t.float() for t in (found.hidden, found.weight) if t is not None]

    forward = [t.float() for t in linear.linear_values(wide)[:2]]
    both, alone = gradient(x.one), gradient(x.zero)
    tangent = Head(x.dh.double(), x.dW.double(), None)
    tangents = [t.float() for t in linear.linear_tangents(wide, tangent)[:2]]
    return {
        "forward": forward,
        "forward and gradient": both,
        "logprob's gradient": alone,
        "tangents": tangents,
    }


# ---- the bare products


def chunk(x: Inputs) -> int:
    """Rows of logits, of all columns, that fit the workspace."""
    return max(1, min(len(x.h), WORKSPACE_BYTES * 7 // 8 // (len(x.W) * x.W.itemsize)))


def chunk_of_columns(x: Inputs) -> int:
    """Columns of logits, of all rows, that fit it."""
    return max(256, min(len(x.W), WORKSPACE_BYTES * 7 // 8 // (len(x.h) * x.h.itemsize) // 256 * 256))


def products(x: Inputs, line: str) -> Callable[[], None]:
    """Logits by rows; those that a gradient makes again by columns, so that dW is written once."""
    size, width = chunk(x), chunk_of_columns(x)
    z = torch.zeros(size * len(x.W), dtype=x.h.dtype, device=x.h.device)
    again = torch.zeros(len(x.h) * width, dtype=x.h.dtype, device=x.h.device)
    dh, dW = torch.zeros_like(x.h), torch.empty_like(x.W)

    def by_rows() -> None:
        for part in x.h.split(size):
            torch.mm(part, x.W.t(), out=z[: len(part) * len(x.W)].view(len(part), len(x.W)))

    def by_columns() -> None:
        for start in range(0, len(x.W), width):
            part = x.W[start : start + width]
            out = again[: len(x.h) * len(part)].view(len(x.h), len(part))
            torch.mm(x.h, part.t(), out=out)
            dh.addmm_(out, part)
            torch.mm(out.t(), x.h, out=dW[start : start + width])

    def call() -> None:
        for _ in range(3 if line == "tangents" else 1):
            by_rows()
        if line == "forward and gradient":
            by_columns()

    return call


def product_at_once(x: Inputs) -> Callable[[], Tensor]:
    z = torch.empty(len(x.h), len(x.W), dtype=x.h.dtype, device=x.h.device)
    return lambda: torch.mm(x.h, x.W.t(), out=z)


# ---- contenders


def ours(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    found = linear_entropy_logprob(h, W, y)
    return found.entropy, found.logprob  # type: ignore[return-value]


def eager(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax((h @ W.t()).float(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def gradient(f: HeadFunction, x: Inputs) -> tuple[Tensor, ...]:
    h, W = x.h.detach().requires_grad_(), x.W.detach().requires_grad_()
    total = sum(t.sum() for t in f(h, W, x.y) if t is not None)
    return torch.autograd.grad(total, (h, W))  # type: ignore[arg-type]


def tangents(f: HeadFunction, x: Inputs) -> Any:
    return jvp(lambda h, W: f(h, W, x.y), (x.h, x.W), (x.dh, x.dW))[1]


LINES: dict[str, Callable[[HeadFunction, Inputs], Any]] = {
    "forward": lambda f, x: f(x.h, x.W, x.y),
    "forward and gradient": gradient,
    "tangents": tangents,
}


def fused(x: Inputs, line: str, cuts: tuple[Tiles | None, ...]) -> Callable[[], Any] | None:
    """A candidate's call; None where it has no tiles of its own for what the line is about."""
    values, of_tangents, of_gradient = cuts
    point = x.point()
    if line == "forward" and values is not None:
        return lambda: fused_linear.fused_values(point, cut=values)[0][:2]
    if line == "tangents" and of_tangents is not None:
        return lambda: fused_linear.fused_tangents(point, Head(x.dh, x.dW, None), cut=of_tangents)[:2]
    if line == "forward and gradient" and values is not None and of_gradient is not None:

        def both() -> tuple[Tensor | None, Tensor | None]:
            saved = fused_linear.fused_values(point, cut=values)[1]
            weights = (x.one, x.one, x.zero)
            found = fused_linear.fused_cotangents(point, weights, (True, True, False), saved, cut=of_gradient)
            return found.hidden, found.weight

        return both
    return None


def candidates(x: Inputs) -> dict[str, tuple[Tiles | None, ...]]:
    """Those in use, and the further ones that this architecture has, where the vocabulary is a multiple of their tiles."""
    device = x.h.device
    in_use = tuple(fused_linear.tiles(x.h.dtype, device, what) for what in (VALUES, TANGENTS, GRADIENT))
    found: dict[str, tuple[Tiles | None, ...]] = {"ours, fused": in_use}
    even = len(x.W) % 256 == 0 or x.h.device.type == "cpu"
    if even and fused_linear.architecture(device) == "sm_90" and x.h.dtype != torch.float32:
        found |= {f"ours, fused, {name}": cuts for name, cuts in CANDIDATES.items()}
    return found


def beside_peers(line: str, x: Inputs, want: Mapping[str, list[Tensor]], repeats: int, device: str) -> dict:
    """One table: the bare products first."""
    peers: dict[str, HeadPeer] = {"ours": HeadPeer(function=ours), "eager": HeadPeer(function=eager)}
    absent: dict[str, str] = {}
    if line != "tangents":  # no other project has a forward mode
        others, absent = head_peers()
        peers |= {"torch.compile": HeadPeer(function=gpu.compiled(eager, device))} | others
    base = "GEMM" if line == "forward" else "GEMMs"
    calls: dict[str, Callable[[], Any]] = {base: products(x, line)}
    if line == "forward":
        calls["GEMM at once"] = product_at_once(x)
    calls |= {name: (lambda p=p: LINES[line](p.function, x)) for name, p in peers.items()}
    calls |= {name: call for name, cuts in candidates(x).items() if (call := fused(x, line, cuts))}

    def error(name: str, got: Any) -> float:
        if name.startswith("GEMM"):
            return 0.0
        key = line
        if line != "forward and gradient":
            kept = [(g, w) for g, w in zip(got, want[line], strict=True) if g is not None]
        else:
            if name in peers and not peers[name].entropy:
                key = "logprob's gradient"
            kept = list(zip(got, want[key], strict=True))
        return max(relative_error(g, w) for g, w in kept)

    def bound(name: str) -> float:
        exact = name.startswith("ours, fused") and line != "forward and gradient"
        return min(FUSED_BOUND, BOUND[x.h.dtype]) if exact else BOUND[x.h.dtype]

    found = gpu.contest(calls, error, bound, repeats, device, limit_s=LIMIT_S)
    operations = 2 * x.h.numel() * len(x.W) * PRODUCTS[line]
    for t in found["timings"].values():
        t["tflops"] = operations / t["median_ms"] / 1e9
        t["times_products"] = t["median_ms"] / found["timings"][base]["median_ms"]
    found["left_out"] |= absent
    found["logprob_alone"] = [n for n in found["timings"] if n in peers and not peers[n].entropy]
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error relative to the largest value, without a float64 copy of a whole weight."""
    difference = got.float() - want
    return (difference.abs().max() / want.abs().max()).item()


def one_shape(
    N: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    repeats: int,
    device: str,
    keep: Callable[[dict[str, Any]], None] = lambda shape: None,
) -> dict[str, Any]:
    """The figures of one shape; `keep` is shown them after every table, so that a run cut short has those it finished."""
    x = Inputs(N, D, V, dtype, device)
    want = truth(x)
    shape: dict[str, Any] = {
        "rows": N,
        "hidden": D,
        "vocabulary": V,
        "dtype": str(dtype).removeprefix("torch."),
        "workspace_mb": WORKSPACE_BYTES / 2**20,
        "logits_mb": N * V * dtype.itemsize / 2**20,
        "beside_peers": {},
    }
    with rows_from(rows):  # on a GPU they are from there anyway
        for line in LINES:
            shape["beside_peers"][line] = beside_peers(line, x, want, repeats, device)
            keep(shape)
    return shape


def table(line: str, found: Mapping[str, Any]) -> list[str]:
    base = "GEMM" if line == "forward" else "GEMMs"
    lines = [
        "",
        f"| {line} | ms | × {base} | TFLOP/s | ours is faster by | peak MB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    by_ours = found["timings"].get("ours", {"median_ms": float("nan")})["median_ms"]
    for name, t in found["timings"].items():
        peak, error = found["peak_mb"][name], found["errors"][name]
        lines += [
            f"| {name} | {t['median_ms']:.2f} ({t['quartile_low_ms']:.2f}–{t['quartile_high_ms']:.2f}) | {t['times_products']:.3f} "
            f"| {t['tflops']:.0f} | {t['median_ms'] / by_ours:.2f} | {'–' if peak is None else f'{peak:.0f}'} "
            f"| {'–' if name.startswith('GEMM') else f'{error:.1e}'} |"
        ]
    if found["logprob_alone"]:
        lines += ["", f"Logprob alone, no entropy: {', '.join(found['logprob_alone'])}."]
    return lines + gpu.left_out(found["left_out"])


def markdown(result: Mapping[str, Any]) -> list[str]:
    lines = timing.conditions("From hidden states", result["environment"])
    for s in result["shapes"]:
        lines += [
            "",
            f"## [{s['rows']}, {s['hidden']}] × [{s['vocabulary']}, {s['hidden']}] {s['dtype']}",
            "",
            f"Workspace {s['workspace_mb']:.0f} MB; all logits would be {s['logits_mb']:.0f} MB.",
        ]
        for line, found in s["beside_peers"].items():
            lines += table(line, found)
    return lines


def run(repeats: int, choice: str = "cuda") -> None:
    device = gpu.device_of(choice)
    environment = timing.environment(device) | {"backend": rows.backend()}
    shapes: list[dict[str, Any]] = []

    def keep(shape: dict[str, Any]) -> None:
        result = {"environment": environment, "shapes": [*shapes, shape]}
        gpu.finish("linear", result, markdown(result), choice)

    for size in SHAPES if choice == "cuda" else DRY_SHAPES:
        shapes.append(one_shape(*size, repeats, device, keep))
    gpu.stop_if_wrong(shapes)
