"""The functions of `reference` in Triton, for tensors on the GPU.

Same signatures, same results within rounding. Values, tangents and second tangents read their inputs once. A gradient and its tangent
read and write once where the state of the values (and of the tangents) is handed in, and read once more to find it where it is not.
How a row is cut depends on its width and dtype alone and tiles are merged in a fixed order: a row gives the same bits alone, in any
batch, and every time.

Sums are kept in float32 (float64 for float64 logits, or with `precise`), tiles merged and rows finished in float64. Rows may have any
stride; offsets are 64-bit. On the CPU these functions run only in Triton's interpreter, which checks them without a GPU.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from entropy_kernels.errors import UserError

from . import kept_kernels, many_kernels, row_kernels, truncated
from .reference import RowValues, compute_dtype


def tile_width(V: int, dtype: torch.dtype, tangents: int = 0) -> int:
    """How many columns of a row make a tile, for arithmetic in `dtype`: a function of the row's width and of what is summed.

    With four warps: 64 columns a thread, 32 where tangents are held beside them, 16 in float64.
    """
    largest = 2048 if dtype == torch.float64 else (8192, 4096, 4096)[tangents]
    return min(largest, max(256, triton.next_power_of_2(V)))


def written_width(V: int, dtype: torch.dtype) -> int:
    """The same where every column stands for itself: 32 a thread, 8 in float64."""
    return min(1024 if dtype == torch.float64 else 4096, max(256, triton.next_power_of_2(V)))


def tile_warps(width: int) -> int:
    """Of a program that works on one tile: 4, fewer for narrow rows."""
    return max(1, min(4, width // 512))


def chunk(width: int, itemsize: int, threads: int) -> int:
    """Columns that the threads of a program load at once, 16 bytes each, as many of them as the tile has."""
    return min(width, 16 // itemsize * threads)


def warps(width: int) -> int:
    """8 for 4096 columns and more, fewer for narrow rows."""
    return max(1, min(8, width // 512))


DIRECTIONS = (4, 2, 1)  # how many share a read of the logits

KEY_SHIFT = {
    torch.bfloat16: 16,
    torch.float16: 13,
    torch.float32: 0,
}  # bits of float32 that the dtype leaves 0


def kept_width(V: int) -> int:
    """Columns that a search for thresholds takes at a time."""
    return min(2048, max(256, triton.next_power_of_2(V)))


def backend() -> str:
    """What computes rows here: "triton VERSION", or "triton VERSION interpreter"."""
    return f"triton {triton.__version__}" + (" interpreter" if _interpreted() else "")


def _interpreted() -> bool:
    return not isinstance(row_kernels.tile_moments, triton.JITFunction)


def _device(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of z made current, which is where Triton launches."""
    if z.device.type != "cuda" and not _interpreted():
        raise UserError(
            f"logits: got a tensor on {z.device}, expected one on a GPU for the Triton rows. Move it there, leave the choice to the "
            "device (entropy_kernels.ops.cpu serves the CPU), or, to check the kernels without a GPU, set TRITON_INTERPRET=1 before "
            "Triton is imported."
        )
    return torch.cuda.device_of(z) if z.device.type == "cuda" else contextlib.nullcontext()


def _launch(z: Tensor, width: int) -> dict[str, Any]:
    """How a kernel is launched on tiles of `width` columns of z."""
    amd = torch.version.hip is not None
    threads = tile_warps(width) * (64 if amd else 32)
    return {
        "BLOCK": width,
        "CHUNK": chunk(width, z.element_size(), threads),
        "PTX": not amd and not _interpreted(),
        "num_warps": tile_warps(width),
    }


def _dtype(z: Tensor, precise: bool) -> torch.dtype:
    return torch.float64 if precise else compute_dtype(z.dtype)


def _in_memory(t: Tensor) -> Tensor:
    """Autograd stands in for zeros with tensors that have no memory, which a kernel would read all the same."""
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t._is_zerotensor() else t


def _vectors(dtype: torch.dtype, *vectors: Tensor) -> list[Tensor]:
    return [_in_memory(t).to(dtype).contiguous() for t in vectors]


def _moments(
    z: Tensor, tangents: list[Tensor], y: Tensor, tau: Tensor, precise: bool
) -> tuple[RowValues, Tensor]:
    """One read of the logits and tangents: (u, v), (v,) or none, to three numbers a row and the row's state."""
    z, *tangents = (_in_memory(t) for t in (z, *tangents))
    R, V = z.shape
    N, T = len(tangents), _dtype(z, precise)
    out = RowValues(*(torch.empty(R, dtype=compute_dtype(z.dtype), device=z.device) for _ in range(3)))
    state = torch.empty(R, 6 if N == 1 else 3, dtype=T, device=z.device)
    if R == 0:
        return out, state
    width = tile_width(V, T, N)
    S = triton.cdiv(V, width)
    v = tangents[-1] if N else z
    u = tangents[0] if N == 2 else v
    (tau,) = _vectors(T, tau)
    moments = torch.empty(R, S, (3, 6, 11)[N], dtype=torch.float64, device=z.device)
    strides = (*z.stride(), *u.stride(), *v.stride())
    with _device(z):
        row_kernels.tile_moments[(R * S,)](z, u, v, tau, moments, V, S, *strides, N=N, **_launch(z, width))
        row_kernels.merge_tiles[(R,)](
            z, u, v, y.contiguous(), tau, moments, state, *out, S, *strides,
            N=N, TILES=triton.next_power_of_2(S), num_warps=1,
        )  # fmt: skip
    return out, state


def row_values_and_state(
    z: Tensor, y: Tensor, tau: Tensor, *, precise: bool = False
) -> tuple[RowValues, Tensor]:
    """`row_values`, and what `row_cotangents` of the same rows can take over from it: peak, s1, E_p[z − peak], [R, 3]."""
    return _moments(z, [], y, tau, precise)


def row_tangents_and_state(
    z: Tensor, dz: Tensor, y: Tensor, tau: Tensor, *, precise: bool = False
) -> tuple[RowValues, Tensor]:
    """`row_tangents`, and [R, 6]: the state of the values, and beside it its tangent: ż at the peak, E_p[ż − ż_peak], H'."""
    return _moments(z, [dz], y, tau, precise)


def row_many_tangents(
    z: Tensor, dz: Tensor, y: Tensor, tau: Tensor, *, precise: bool = False
) -> tuple[RowValues, Tensor]:
    """`row_tangents_and_state` along K directions, dz [K, R, V], to [K, R] and [K, R, 6]; z is read once for every four."""
    z, dz = _in_memory(z), _in_memory(dz)
    K, R, V = dz.shape
    T = _dtype(z, precise)
    out = RowValues(*(torch.empty(K, R, dtype=compute_dtype(z.dtype), device=z.device) for _ in range(3)))
    known = torch.empty(K, R, 6, dtype=T, device=z.device)
    if K == 0 or R == 0:
        return out, known
    width = tile_width(V, T, 1)
    S = triton.cdiv(V, width)
    (tau,) = _vectors(T, tau)
    y = y.contiguous()
    first = 0
    while first < K:
        n = next(n for n in DIRECTIONS if n <= K - first)
        moments = torch.empty(n, R, S, 6, dtype=torch.float64, device=z.device)
        with _device(z):
            many_kernels.tile_many_tangents[(R * S,)](
                z, dz[first : first + n], tau, moments, V, S, *z.stride(), *dz.stride(), moments.stride(0),
                DIRECTIONS=n, **_launch(z, width),
            )  # fmt: skip
            for k in range(first, first + n):
                v = dz[k]
                row_kernels.merge_tiles[(R,)](
                    z, v, v, y, tau, moments[k - first], known[k], *(t[k] for t in out), S,
                    *z.stride(), *v.stride(), *v.stride(), N=1, TILES=triton.next_power_of_2(S), num_warps=1,
                )  # fmt: skip
        first += n
    return out, known


def row_values(z: Tensor, y: Tensor, tau: Tensor, *, precise: bool = False) -> RowValues:
    """H = log1p(s1) − c̄,  logprob_y = c_y − log1p(s1),  logsumexp = z_{a*}/τ + log1p(s1)."""
    return _moments(z, [], y, tau, precise)[0]


def row_tangents(z: Tensor, dz: Tensor, y: Tensor, tau: Tensor, *, precise: bool = False) -> RowValues:
    """H' = −Cov_p(c, δ),  logprob' = δ_y − μ,  logsumexp' = μ + ż_{a*}/τ."""
    return _moments(z, [dz], y, tau, precise)[0]


def row_second_tangents(
    z: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor, *, precise: bool = False
) -> RowValues:
    """H'' = −Cov(u, v) − κ₃(c, u, v),  logprob'' = −Cov(u, v),  logsumexp'' = Cov(u, v)."""
    return _moments(z, [du, dz], y, tau, precise)[0]


def row_cotangents(
    z: Tensor,
    y: Tensor,
    tau: Tensor,
    q: Tensor,
    g: Tensor,
    l: Tensor,  # noqa: E741
    *,
    out: Tensor | None = None,
    state: Tensor | None = None,
    precise: bool = False,
) -> Tensor:
    """The gradient of q·H + g·logprob + l·logsumexp, [R, V] in z's dtype; into `out`, which may be z, where it is given."""
    z = _in_memory(z)
    if state is None:
        state = _moments(z, [], y, tau, precise)[1]
    if out is None:
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    R, V = z.shape
    if R == 0:
        return out
    T = state.dtype
    state = state if state.stride(1) == 1 else state.contiguous()
    width = written_width(V, T)
    S = triton.cdiv(V, width)
    tau, *weights = _vectors(T, tau, q, g, l)
    with _device(z):
        row_kernels.write_cotangents[(R * S,)](
            z, y.contiguous(), tau, state, *weights, out, V, S, state.stride(0), *z.stride(), *out.stride(), **_launch(z, width)
        )  # fmt: skip
    return out


def row_cotangent_tangents(
    z: Tensor,
    dz: Tensor,
    y: Tensor,
    tau: Tensor,
    cotangents: tuple[Tensor, Tensor, Tensor],
    cotangent_tangents: tuple[Tensor, Tensor, Tensor],
    *,
    out: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    precise: bool = False,
) -> Tensor:
    """The tangent of `row_cotangents` along (ż, q̇, ġ, l̇), [R, V] in z's dtype; into `out`, which may be z or dz.

    `state` is that of the values and its tangent, [R, 3] each, where they are known.
    """
    z, dz = _in_memory(z), _in_memory(dz)
    if state is None:
        known = _moments(z, [dz], y, tau, precise)[1]
        state = known[:, :3], known[:, 3:]
    of_values, of_tangents = (t if t.stride(1) == 1 else t.contiguous() for t in state)
    if out is None:
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    R, V = z.shape
    if R == 0:
        return out
    T = of_values.dtype
    width = written_width(V, T)
    S = triton.cdiv(V, width)
    tau, *weights = _vectors(T, tau, *cotangents, *cotangent_tangents)
    with _device(z):
        row_kernels.write_cotangent_tangents[(R * S,)](
            z, dz, y.contiguous(), tau, of_values, of_tangents, *weights, out, V, S,
            of_values.stride(0), of_tangents.stride(0), *z.stride(), *dz.stride(), *out.stride(), **_launch(z, width),
        )  # fmt: skip
    return out


def kept_set(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The kept tokens, bool [R, V], by a search over the keys of the logits; float64 logits are sorted in plain torch.

    Top-k is exact. Masses are those of float32: a token within 1e-6 of the crossing may be decided otherwise than in float64.
    """
    if z.dtype == torch.float64:
        return truncated.kept_set(z, tau, top_k, top_p)
    z = _in_memory(z)
    R, V = z.shape
    threshold = torch.empty(R, dtype=torch.float32, device=z.device)
    width = kept_width(V)
    if R:
        (tau,) = _vectors(torch.float32, tau)
        with _device(z):
            kept_kernels.kept_thresholds[(R,)](
                z, tau, top_k.contiguous(), top_p.contiguous(), threshold, V, *z.stride(),
                SHIFT=KEY_SHIFT[z.dtype], BLOCK=width, num_warps=warps(width),
            )  # fmt: skip
    # −∞ is never kept; a NaN keeps nothing. In float32: a threshold between two tokens is no number of a narrower dtype
    return z >= threshold.clamp(min=torch.finfo(z.dtype).min).unsqueeze(-1)
