"""Entropy and logprob of vocabulary rows on a GPU: every row function beside a copy, then the public functions beside their peers.

Bytes are the fewest a function can move, each input read once and each output written once; a figure's share is its bytes per second
over those of `copy`, measured in the same rounds. Every call finds other buffers than the one before, together larger than any cache.
Peers that give logprob alone are marked so. The public function looks at its targets to refuse wrong ones, which waits for the device:
`ours` beside peers has that wait in it, the row functions have not. Nothing is timed before it agrees with float64, on the first rows
and on the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from bench import gpu, timing
from bench.peers import Outputs, Peer, RowFunction, row_peers
from bench.rows import eager, eager64, ours
from bench.timing import measure, relative_error, rotating
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import reference, rows

SHAPES = [(8192, 151936, torch.bfloat16), (4096, 151936, torch.float32), (8192, 49152, torch.bfloat16)]
DRY_SHAPES = [(6, 700, torch.bfloat16), (6, 300, torch.float32)]
BUFFERS = 3
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}
PEER_BOUND = 1e-2
LIMIT_S = 12.0  # for the rounds of one table; five tables a shape


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
    """Name -> (function of z, v, a buffer and the states, how many tensors of rows it must read or write)."""
    return {
        "copy": (lambda z, v, out, state: out.copy_(z), 2),
        "values": (lambda z, v, out, state: rows.row_values(z, y, tau), 1),
        "tangents": (lambda z, v, out, state: rows.row_tangents(z, v, y, tau), 2),
        "second tangents": (lambda z, v, out, state: rows.row_second_tangents(z, v, out, y, tau), 3),
        "gradient, state handed in": (
            lambda z, v, out, state: rows.row_cotangents(z, y, tau, *w, out=out, state=state[:, :3]),
            2,
        ),
        "gradient alone": (lambda z, v, out, state: rows.row_cotangents(z, y, tau, *w, out=out), 2),
        "tangent of the gradient, state handed in": (
            lambda z, v, out, state: rows.row_cotangent_tangents(
                z, v, y, tau, w, w, out=out, state=(state[:, :3], state[:, 3:])
            ),
            3,
        ),
        "tangent of the gradient": (
            lambda z, v, out, state: rows.row_cotangent_tangents(z, v, y, tau, w, w, out=out),
            3,
        ),
    }


def errors(x: Inputs) -> dict[str, float]:
    """Every function, as it is timed, on the first and last rows against the float64 specification."""
    z, v, y, tau = (ends(t) for t in (x.z, x.v, x.y, x.tau))
    w = tuple(ends(t) for t in x.w)
    Z, dZ, T = (t.double() for t in (z, v, tau))
    W = tuple(t.double() for t in w)
    specified: dict[str, Callable[[], Any]] = {
        "values": lambda: reference.row_values(Z, y, T),
        "tangents": lambda: reference.row_tangents(Z, dZ, y, T),
        "second tangents": lambda: reference.row_second_tangents(Z, dZ, Z, y, T),
        "gradient": lambda: [reference.row_cotangents(Z, y, T, *W)],
        "tangent of the gradient": lambda: [reference.row_cotangent_tangents(Z, dZ, y, T, W, W)],
    }

    def pair(name: str, f: Callable[..., Any]) -> tuple[Any, Any]:
        got = f(z, v, z.clone(), rows.row_tangents_and_state(z, v, y, tau)[1])
        base = name.partition(",")[0].removesuffix(" alone")
        return ([got] if isinstance(got, Tensor) else got), specified[base]()

    return {
        name: gpu.error_of(lambda name=name, f=f: pair(name, f))  # type: ignore[misc]
        for name, (f, _) in functions(y, tau, w).items()
        if name != "copy"
    }


def ends(t: Tensor) -> Tensor:
    """The first and the last rows."""
    return torch.cat([t[:4], t[-4:]])


# ---- beside peers: one function of (z, v, y) per line of the comparison


def total(f: RowFunction, z: Tensor, y: Tensor) -> Tensor:
    return sum(x.sum() for x in f(z, y) if x is not None)  # type: ignore[return-value]


def gradient(f: RowFunction, z: Tensor, y: Tensor) -> Tensor:
    """Of entropy + logprob, or of logprob alone, from the logits on: a forward and a backward pass."""
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(total(f, leaf, y), leaf)[0]


def tangents(f: RowFunction, z: Tensor, v: Tensor, y: Tensor) -> Outputs:
    return jvp(lambda z: f(z, y), (z,), (v,))[1]


def tangent_of_gradient(f: RowFunction, z: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """Forward over reverse."""
    return jvp(torch.func.grad(lambda z: total(f, z, y)), (z,), (v,))[1]


LINES: dict[str, Callable[[RowFunction, Tensor, Tensor, Tensor], Any]] = {
    "forward": lambda f, z, v, y: f(z, y),
    "gradient": lambda f, z, v, y: gradient(f, z, y),
    "tangents": tangents,
    "tangent of the gradient": tangent_of_gradient,
}
TENSORS = {"copy": 2, "forward": 1, "gradient": 2, "tangents": 2, "tangent of the gradient": 3}  # the fewest


def contenders(line: str, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """Who has that function, ours first, and who is absent."""
    found = {"ours": Peer(function=ours), "eager": Peer(function=eager)}
    if line in ("tangents", "tangent of the gradient"):
        return found, {}  # no other project has a forward mode
    peers, absent = row_peers(gpu=True)
    return found | {"torch.compile": Peer(function=gpu.compiled(eager, device))} | peers, absent


def beside_peers(line: str, x: Inputs, repeats: int, device: str) -> dict[str, Any]:
    """One table: ours, eager torch and every peer that has the function, beside a copy."""
    peers, absent = contenders(line, device)
    run = LINES[line]
    buffers = rotating(BUFFERS, x.z, x.v)
    spare = torch.empty_like(x.z)

    def call(peer: Peer) -> Callable[[], Any]:
        if peer.overwrites and line == "gradient":
            return lambda: run(peer.function, spare, x.v, x.y)
        return lambda: run(peer.function, *buffers(), x.y)

    def error(name: str, got: Any) -> float:
        if name == "copy":
            return float(not torch.equal(got, x.z))
        law = eager64 if peers[name].entropy else lambda z, y: (None, eager64(z, y)[1])
        want = run(law, ends(x.z).double(), ends(x.v).double(), ends(x.y))
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        kept = [(ends(g), w) for g, w in pairs if g is not None]
        return relative_error([g for g, _ in kept], [w for _, w in kept])

    calls: dict[str, Callable[[], object]] = {"copy": lambda: spare.copy_(buffers()[0])}
    calls |= {name: call(peer) for name, peer in peers.items()}
    found = gpu.contest(
        calls,
        error,
        lambda name: BOUND[x.z.dtype] if name == "ours" else PEER_BOUND,
        repeats,
        device,
        before={name: lambda: spare.copy_(x.z) for name, peer in peers.items() if peer.overwrites},
        limit_s=LIMIT_S,
    )
    gpu.add_bandwidth(
        found["timings"],
        lambda name: TENSORS["copy" if name == "copy" else line] * x.z.numel() * x.z.itemsize,
    )
    found["left_out"] |= absent
    found["logprob_alone"] = [name for name in found["timings"] if name in peers and not peers[name].entropy]
    return found


def each_function(x: Inputs, repeats: int, device: str, wrong: Mapping[str, float]) -> dict[str, Any]:
    """The row functions themselves, into buffers that are there before; those that are wrong are left out."""
    state = rows.row_tangents_and_state(x.z, x.v, x.y, x.tau)[1]
    # a buffer to write to is taken in turn as well; its content is the tangent of another turn, never zeros
    buffers = rotating(BUFFERS, x.z, x.v, x.v.clone())
    calls = {name: pair for name, pair in functions(x.y, x.tau, x.w).items() if name not in wrong}
    timed = {name: (lambda f=f: f(*buffers(), state)) for name, (f, _) in calls.items()}
    timings: dict[str, Any] = measure(timed, repeats, device, limit_s=LIMIT_S)
    gpu.add_bandwidth(timings, lambda name: calls[name][1] * x.z.numel() * x.z.itemsize)
    return timings


def one_shape(
    R: int, V: int, dtype: torch.dtype, repeats: int, device: str, peers: bool = True, stop: bool = True
) -> dict[str, Any]:
    """The figures of one shape; what is wrong ends it, or, with `stop` False, is not timed and named."""
    x = Inputs(R, V, dtype, device)
    found = errors(x)
    wrong = {name: e for name, e in found.items() if not e <= BOUND[dtype]}
    if wrong and stop:
        raise SystemExit(f"not timed, wrong against float64: {wrong}")
    timings = each_function(x, repeats, device, wrong)
    with rows_from(rows):  # on a GPU they are from there anyway
        beside = {line: beside_peers(line, x, repeats, device) for line in LINES} if peers else {}
    return {
        "rows": R,
        "vocabulary": V,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": found,
        "wrong": wrong,
        "timings": timings,
        "beside_peers": beside,
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
        if shape["wrong"]:
            lines += ["", f"Not timed, wrong against float64: {', '.join(shape['wrong'])}."]
        for line, found in shape["beside_peers"].items():
            lines += gpu.table(line, found)
            if found["logprob_alone"]:
                lines += ["", f"Logprob alone, no entropy: {', '.join(found['logprob_alone'])}."]
    return lines


def run(repeats: int, choice: str = "cuda") -> None:
    device = gpu.device_of(choice)
    environment = timing.environment(device) | {"backend": rows.backend()}
    shapes = SHAPES if choice == "cuda" else DRY_SHAPES
    gpu.run_all(
        "rows",
        environment,
        shapes,
        lambda shape: one_shape(*shape, repeats, device, stop=False),
        markdown,
        choice,
    )
