"""The functions of `reference` in C++, for tensors on the CPU.

Same signatures, same results within rounding, one pass over the data where mathematics allows one. The library is looked for
in the package, where installing puts it; a package that was installed without a compiler or before torch compiles `csrc/`
once, at first use, into torch's extension cache; where that is impossible too, plain torch takes over and says so.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference, truncated
from .reference import RowValues, compute_dtype
from .truncated import TruncatedValues

_PACKAGE = Path(__file__).resolve().parents[1]
_BUILT = _PACKAGE / "_rows.so"
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_LEVELS = ("baseline", "avx2", "avx512")
_FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000".split()
)  # as in setup.py


def _sources() -> Path:
    """`csrc/` inside an installed package, or beside the package in a source tree."""
    inside = _PACKAGE / "csrc"
    return inside if inside.exists() else _PACKAGE.parent / "csrc"


def _files(directory: Path) -> list[Path]:
    """What the library of the CPU is compiled from."""
    return sorted([*directory.glob("*.cpp"), *directory.glob("*.h")])


def _is_current() -> bool:
    """There is a built library, and no source of a source tree was edited after it."""
    edited = (file.stat().st_mtime for file in _files(_PACKAGE.parent / "csrc"))
    return _BUILT.exists() and all(_BUILT.stat().st_mtime >= time for time in edited)


def _compile() -> Path:
    """The library in torch's extension cache, compiled (20 s) unless these sources were before, for this torch."""
    sources = _sources()
    torch_root = Path(torch.__file__).parent
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    digest = hashlib.sha256("".join([torch.__version__, platform.machine(), *_FLAGS]).encode())
    for file in _files(sources):
        digest.update(file.read_bytes())
    library = cache / f"entropy_kernels_rows_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=cache
        ) as scratch:  # moved into place whole: others may be compiling too
            command = [os.environ.get("CXX", "c++"), *_FLAGS, f"-I{torch_root / 'include'}", "rows.cpp"]
            command += [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(Path(scratch) / "rows.so")]
            subprocess.run(command, cwd=sources, check=True, capture_output=True, text=True)
            os.replace(Path(scratch) / "rows.so", library)
    return library


@functools.cache
def _level() -> int | None:
    """Loads the library, once. The highest instruction level of this processor, or None without a library."""
    reasons = []
    try:
        if _is_current():
            torch.ops.load_library(str(_BUILT))
            return torch.ops.entropy_kernels.best_level()
    except OSError as error:
        reasons.append(f"the installed library does not load ({error})")
    try:
        torch.ops.load_library(str(_compile()))
        return torch.ops.entropy_kernels.best_level()
    except (OSError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reasons.append(f"compiling it failed ({output[0] if output else error!r})")
    warnings.warn(
        "entropy_kernels: the C++ row functions are not available, plain torch is used on the CPU: same results, many "
        f"times slower. Cause: {'; '.join(reasons)}. Install a C++17 compiler (g++ or clang++).",
        stacklevel=2,
    )
    return None


def backend() -> str:
    """What computes rows on the CPU: "c++ avx512", "c++ avx2", "c++ baseline" or "plain torch"."""
    level = _level()
    return "plain torch" if level is None else f"c++ {_LEVELS[level]}"


def _prepared(z: Tensor, *tangents: Tensor) -> list[Tensor]:
    """The logits and their tangents in one dtype, each row contiguous."""
    same = z.dtype in _DTYPES and all(t.dtype == z.dtype for t in tangents)
    dtype = z.dtype if same else compute_dtype(z.dtype)
    wide = [_in_memory(t).to(dtype) for t in (z, *tangents)]
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in wide]


def _vectors(z: Tensor, *vectors: Tensor) -> list[Tensor]:
    return [_in_memory(t).to(compute_dtype(z.dtype)).contiguous() for t in vectors]


def _in_memory(t: Tensor) -> Tensor:
    """Autograd stands in for zeros with tensors that have no memory."""
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t._is_zerotensor() else t


def _values(
    op: Any, level: int, z: Tensor, tangents: tuple[Tensor, ...], y: Tensor, tau: Tensor
) -> RowValues:
    out = RowValues(
        *(torch.empty(z.shape[0], dtype=compute_dtype(z.dtype), device=z.device) for _ in range(3))
    )
    op(*_prepared(z, *tangents), y.contiguous(), *_vectors(z, tau), *out, level)
    return out


def row_values(z: Tensor, y: Tensor, tau: Tensor) -> RowValues:
    """H = log1p(s1) − c̄,  logprob_y = c_y − log1p(s1),  logsumexp = z_{a*}/τ + log1p(s1)."""
    if (level := _level()) is None:
        return reference.row_values(z, y, tau)
    return _values(torch.ops.entropy_kernels.row_values, level, z, (), y, tau)


def row_tangents(z: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> RowValues:
    """H' = −Cov_p(c, δ),  logprob' = δ_y − μ,  logsumexp' = μ + ż_{a*}/τ."""
    if (level := _level()) is None:
        return reference.row_tangents(z, dz, y, tau)
    return _values(torch.ops.entropy_kernels.row_tangents, level, z, (dz,), y, tau)


def row_second_tangents(z: Tensor, du: Tensor, dz: Tensor, y: Tensor, tau: Tensor) -> RowValues:
    """H'' = −Cov(u, v) − κ₃(c, u, v),  logprob'' = −Cov(u, v),  logsumexp'' = Cov(u, v)."""
    if (level := _level()) is None:
        return reference.row_second_tangents(z, du, dz, y, tau)
    return _values(torch.ops.entropy_kernels.row_second_tangents, level, z, (du, dz), y, tau)


def row_cotangents(
    z: Tensor,
    y: Tensor,
    tau: Tensor,
    q: Tensor,
    g: Tensor,
    l: Tensor,  # noqa: E741
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of q·H + g·logprob + l·logsumexp, [R, V] in z's dtype; into `out`, which may be z, where it is given."""
    if (level := _level()) is None:
        return reference.row_cotangents(z, y, tau, q, g, l, out=out)
    (logits,) = _prepared(z)
    if out is None:
        out = torch.empty(z.shape, dtype=logits.dtype, device=z.device)
    torch.ops.entropy_kernels.row_cotangents(logits, y.contiguous(), *_vectors(z, tau, q, g, l), out, level)
    return out.to(z.dtype)


def row_cotangent_tangents(
    z: Tensor,
    dz: Tensor,
    y: Tensor,
    tau: Tensor,
    cotangents: tuple[Tensor, Tensor, Tensor],
    cotangent_tangents: tuple[Tensor, Tensor, Tensor],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The tangent of `row_cotangents` along (ż, q̇, ġ, l̇), [R, V] in z's dtype; into `out`, which may be z or dz."""
    if (level := _level()) is None:
        return reference.row_cotangent_tangents(z, dz, y, tau, cotangents, cotangent_tangents, out=out)
    logits, tangent = _prepared(z, dz)
    if out is None:
        out = torch.empty(z.shape, dtype=logits.dtype, device=z.device)
    torch.ops.entropy_kernels.row_cotangent_tangents(
        logits, tangent, y.contiguous(), *_vectors(z, tau, *cotangents, *cotangent_tangents), out, level
    )
    return out.to(z.dtype)


def kept_set(z: Tensor, tau: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The kept tokens, bool [R, V], from thresholds that need no sorting: top_k first, then top_p of what it left."""
    if (level := _level()) is None:
        return truncated.kept_set(z, tau, top_k, top_p)
    if top_k is None:
        top_k = torch.full((len(z),), z.shape[-1], dtype=torch.int64)
    if top_p is None:
        top_p = torch.ones(len(z), dtype=torch.float64)
    (logits,) = _prepared(z)
    threshold = torch.empty(len(z), dtype=compute_dtype(z.dtype), device=z.device)
    torch.ops.entropy_kernels.row_thresholds(
        logits, *_vectors(z, tau), top_k.contiguous(), top_p.contiguous(), threshold, level
    )
    # −∞ is never kept; a NaN keeps nothing
    return logits >= threshold.clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype).unsqueeze(-1)


def truncated_values_of_rows(
    z: Tensor, y: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor
) -> TruncatedValues:
    """`truncated.truncated_values` of `kept_set`, in two or three reads of the logits and without a mask."""
    if (level := _level()) is None:
        return truncated.truncated_values(z, truncated.kept_set(z, tau, top_k, top_p), y, tau)
    (logits,) = _prepared(z)
    wide = compute_dtype(z.dtype)
    out = TruncatedValues(
        *(
            torch.empty(len(z), dtype=torch.int64 if name == "kept_count" else wide, device=z.device)
            for name in TruncatedValues._fields
        )
    )
    threshold = torch.empty(len(z), dtype=wide, device=z.device)
    torch.ops.entropy_kernels.truncated_values(
        logits,
        y.contiguous(),
        *_vectors(z, tau),
        top_k.contiguous(),
        top_p.contiguous(),
        threshold,
        *out,
        True,
        level,
    )
    return out
