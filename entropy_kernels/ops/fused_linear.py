"""What `linear` does for values, tangents and gradients, with logits in registers only: a candidate, chosen by nothing yet.

`linear` makes a chunk of logits with the library's product and hands it to the row kernels, so logits are written and read once.
Here (`head_kernels`) a tile of logits is worked up by the program that made it; what is written is three numbers a tile, six with a
tangent. A gradient makes the logits a second time, writes da some columns at a time, and leaves dh and dW to the library; it needs what
`fused_values` saved. Whether this is faster has to be measured on the GPU at hand, against the same library (`python -m bench linear
--device cuda`): a product that reaches less than about 90 % of the library's loses what it saves. Only bench and tests come here;
where it wins, `functional/linear.py` calls these functions for those of `linear`, and keeps `Saved` as it keeps the state of rows.

Logits are float32 throughout, where `linear` rounds them to the dtype of h. Products of float32 are IEEE, which no tensor core is,
unless `precision="tf32"` asks for 10 bits of the factors. float64 is refused. A row's numbers depend on the device's architecture and on
V, D and the dtype, for these decide how the product is cut; not on N, on the other rows, or on the order of programs.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from entropy_kernels.errors import UserError

from . import head_kernels, linear, row_kernels
from .linear import Head, Point
from .reference import RowValues
from .rows import _device, _in_memory, _interpreted, _vectors


class Tiles(NamedTuple):
    """How the products are cut: `rows` of h by `columns` of logits a tile, by `depth` of D at a time; and how programs are run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # of the loop over D
    tma: bool = False  # tensor descriptors, from sm_90 on
    flatten: bool = False  # the loops over tiles and over D as one, so that loads go on between tiles
    per_multiprocessor: int = 1  # programs that stay and take one tile after another; 0: one program a tile


class Saved(NamedTuple):
    """What the gradient takes over from the values: peak, s1 and E_p[z − peak], [N, 3], and the target's logit, [N]."""

    state: Tensor
    z_target: Tensor


# Architecture → the values', the tangents' and the gradient's tiles: the largest that spill nothing, for 16-bit inputs.
TILES = {
    "sm_80": (Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 8, 3), Tiles(128, 64, 64, 8, 3)),
    "sm_90": (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 32, 8, 4), Tiles(128, 128, 64, 8, 4)),
    "sm_100": (Tiles(128, 128, 64, 8, 4), Tiles(128, 64, 64, 8, 2), Tiles(128, 128, 64, 8, 3)),
    "gfx942": (Tiles(128, 128, 32, 8, 2), Tiles(64, 64, 64, 4, 1), Tiles(128, 128, 32, 8, 2)),
}
# The same for float32, whose IEEE products are made of ordinary arithmetic.
IEEE = (Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 16, 8, 2), Tiles(64, 64, 32, 4, 2))
FLOAT32 = dict.fromkeys(TILES, IEEE) | {"gfx942": (IEEE[0], Tiles(64, 64, 16, 4, 1), IEEE[2])}
VALUES, TANGENTS, GRADIENT = range(3)
GROUP = 16  # blocks of rows that share columns of W while these are in the cache


def architecture(device: torch.device) -> str:
    """The key of TILES for a device; for the interpreter that of the H100."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tiles(dtype: torch.dtype, device: torch.device, what: int) -> Tiles:
    """The tiles in use for VALUES, TANGENTS or GRADIENT."""
    return (FLOAT32 if dtype == torch.float32 else TILES)[architecture(device)][what]


def fused_values(x: Point, *, cut: Tiles | None = None, precision: str = "ieee") -> tuple[RowValues, Saved]:
    """`linear.linear_values`, each [N], in nats, and what `fused_cotangents` of the same rows takes over."""
    return _moments(x, None, cut, precision)


def fused_tangents(x: Point, v: Head, *, cut: Tiles | None = None, precision: str = "ieee") -> RowValues:
    """`linear.linear_tangents`: F'(z)·ż along v, each [N]."""
    return _moments(x, v, cut, precision)[0]


def fused_cotangents(
    x: Point,
    weights: tuple[Tensor, ...],
    wanted: tuple[bool, bool, bool],
    saved: Saved,
    *,
    cut: Tiles | None = None,
    precision: str = "ieee",
) -> Head:
    """`linear.linear_cotangents`: the gradient of Σ (q·H + g·logprob + l·logsumexp) with respect to (h, W, b), where wanted.

    da is made some columns at a time, for all rows if 7/8 of `x.workspace` bytes hold them, so that dW is written once; the products of da
    are the library's. dh is summed up in float32 over columns, dW and db over rows.
    """
    h, W, bias = _head(x)
    cut = cut or tiles(h.dtype, h.device, GRADIENT)
    (N, D), V, size = h.shape, len(W), h.element_size()
    q, g, l = weights  # noqa: E741
    tau, *w = _vectors(torch.float32, x.temperature, q, torch.where(x.targets < 0, 0.0, g), l)
    budget = x.workspace * 7 // 8 // size
    width = min(V, max(1, budget // max(N, 1) // cut.columns) * cut.columns)
    height = max(1, min(N, max(1, budget // width // cut.rows) * cut.rows))
    memory = torch.empty(height * width, dtype=h.dtype, device=h.device)
    dh = torch.zeros(N, D, dtype=torch.float32, device=h.device) if wanted[0] else None
    dW = torch.zeros_like(W) if wanted[1] else None
    db = torch.zeros_like(bias) if wanted[2] and bias is not None else None
    for c in (slice(left, min(left + width, V)) for left in range(0, V, width)):
        W_c, b_c = W[c], W if bias is None else bias[c]
        sums: list[Tensor | None] = [None, None]
        for b in (slice(top, min(top + height, N)) for top in range(0, N, height)):
            n, columns = b.stop - b.start, c.stop - c.start
            da = memory[: n * columns].view(n, columns)
            S, row_tiles = triton.cdiv(columns, cut.columns), triton.cdiv(n, cut.rows)
            _launch(
                head_kernels.head_cotangents, cut, row_tiles * S, h.device,
                h[b], W_c, b_c, x.targets[b] - c.start, tau[b], saved.state[b], saved.z_target[b], *(t[b] for t in w), da,
                n, columns, D, S, row_tiles, h.stride(0), W.stride(0), columns,
                BIAS=bias is not None, **_constants(x, cut, precision, (h, W), columns),
            )  # fmt: skip
            if dh is not None:
                linear._add_product(dh[b], da, W_c)
            if dW is not None and height == N:
                torch.mm(da.t(), h, out=dW[c])
            elif dW is not None:
                sums[0] = _sum(sums[0], da.t() @ h[b])
            if db is not None:
                sums[1] = _sum(sums[1], da.sum(0, dtype=torch.float32))
        for out, total in ((dW, sums[0]), (db, sums[1])):
            if out is not None and total is not None:
                out[c] = total
    return linear._in_dtype(Head(dh, dW, db), x.head)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """Total + part in float32."""
    return part.float() if total is None else total.add_(part)


def _moments(x: Point, v: Head | None, cut: Tiles | None, precision: str) -> tuple[RowValues, Saved]:
    h, W, bias = _head(x)
    dh, dW, db = (None, None, None) if v is None else (None if t is None else _in_memory(t) for t in v)
    cut = cut or tiles(h.dtype, h.device, VALUES if v is None else TANGENTS)
    out = linear._empty(x)
    N, V, K = len(h), len(W), 3 if v is None else 6
    S = triton.cdiv(V, cut.columns)
    state, z_target, v_target = (
        torch.empty(N, *k, dtype=torch.float32, device=h.device) for k in ((K,), (), ())
    )
    for b in _row_slices(x, 4 * S * K, cut.rows):
        n = b.stop - b.start
        moments = torch.empty(n, S, K, dtype=torch.float32, device=h.device)
        y = x.targets[b].contiguous()
        (tau,) = _vectors(torch.float32, x.temperature[b])
        row_tiles = triton.cdiv(n, cut.rows)
        dh_b = h[b] if dh is None else dh[b]
        dW_b = W if dW is None else dW
        _launch(
            head_kernels.head_moments, cut, row_tiles * S, h.device,
            h[b], W, W if bias is None else bias, dh_b, dW_b, W if db is None else db,
            y, tau, moments, z_target[b], v_target[b], n, V, h.shape[1], S, row_tiles,
            h.stride(0), W.stride(0), dh_b.stride(0), dW_b.stride(0),
            TANGENT=v is not None, BIAS=bias is not None, DH=dh is not None, DW=dW is not None, DBIAS=db is not None,
            **_constants(x, cut, precision, (h, W, dh_b, dW_b), V),
        )  # fmt: skip
        one = (1, 0)  # z[r, y_r] is z_target[r]
        with _device(h):
            row_kernels.merge_tiles[(n,)](
                z_target[b], v_target[b], v_target[b], y, tau, moments, state[b], *(t[b] for t in out), S, *one, *one, *one,
                N=0 if v is None else 1, TILES=triton.next_power_of_2(S), num_warps=merge_warps(S),
            )  # fmt: skip
    return out, Saved(state, z_target)


def merge_warps(S: int) -> int:
    """Warps that merge S tiles of a row: four tiles a thread."""
    return max(1, min(8, triton.next_power_of_2(S) // 128))


def _constants(x: Point, cut: Tiles, precision: str, factors: tuple[Tensor, ...], V: int) -> dict[str, Any]:
    h = factors[0]
    for t in factors:
        aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
        if cut.tma and not aligned:
            raise UserError(
                f"tiles: got tma=True with a factor whose rows are {t.stride(0) * t.element_size()} bytes apart; expected rows and "
                "a first element at multiples of 16 bytes. Choose tiles without tma, or pad the rows of hidden and weight."
            )
    return {
        "SOFTCAP": x.softcap,
        "EXACT": h.dtype == torch.float32,
        "BLOCK_N": cut.rows,
        "BLOCK_V": cut.columns,
        "BLOCK_D": cut.depth,
        "GROUP": GROUP,
        "EVEN_V": V % cut.columns == 0,
        "EVEN_D": h.shape[1] % cut.depth == 0,
        "TMA": cut.tma,
        "FLATTEN": cut.flatten,
        "UPCAST": _interpreted() and h.dtype == torch.bfloat16,
        "PRECISION": precision,
    }


def _launch(
    kernel: Any, cut: Tiles, count: int, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """The kernel over `count` tiles. Descriptors made in it need memory, from an allocator that is set for this call alone."""
    programs = count
    if cut.per_multiprocessor and device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = min(count, cut.per_multiprocessor * multiprocessors)

    def run() -> None:
        if cut.tma:
            triton.set_allocator(
                lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
            )
        kernel[(programs,)](*arguments, **constants, num_warps=cut.warps, num_stages=cut.stages)

    with _device(arguments[0]):
        contextvars.copy_context().run(run)


def _row_slices(x: Point, row_bytes: int, block: int) -> Iterator[slice]:
    """Slices of rows that need at most 7/8 of the workspace (a block's at least): whole blocks, so that none is cut in two."""
    h, _, _ = _head(x)
    size = max(1, x.workspace * 7 // 8 // row_bytes // block) * block
    for start in range(0, len(h), size):
        yield slice(start, min(start + size, len(h)))


def _head(x: Point) -> tuple[Tensor, Tensor, Tensor | None]:
    h, W, bias = x.head
    assert h is not None and W is not None
    if h.dtype == torch.float64:
        raise UserError(
            "hidden: got float64, expected bfloat16, float16 or float32 for the fused kernels, which keep logits in float32. "
            "linear_entropy_logprob takes float64."
        )
    for name, t in (("hidden", h), ("weight", W)):
        if t.stride(1) != 1:
            raise UserError(
                f"{name}: got strides {t.stride()}, expected rows without gaps (the second stride 1) for the fused kernels. Pass "
                f"{name}.contiguous()."
            )
    return h, W, bias
