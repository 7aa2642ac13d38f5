"""Kept sets and truncated values in CUDA C++, for tensors on an NVIDIA GPU: `cpu.kept_set` and `cpu.truncated_values_of_rows` there.

The kernels are csrc/truncated.cuh. They are compiled with nvcc for the GPUs at hand, once, at first use (half a minute), into torch's
extension cache. Where torch has no CUDA or there is no nvcc, `available` says no and the Triton kernels serve (functional/truncated.py
chooses, `backend` of the one that runs says which); where nvcc is there and fails, a warning says why.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .cpu import _sources
from .reference import compute_dtype
from .truncated import TruncatedValues

FLAGS = "-std=c++17 -O3 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000".split()
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def nvcc() -> str | None:
    """The compiler: of CUDA_HOME or CUDA_PATH where they are set, else the one on the PATH; None without."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return shutil.which("nvcc")


def command(compiler: str, architectures: list[str]) -> list[str]:
    """The call of nvcc for architectures such as "90", less what it is to make and where to: in the directory of the sources."""
    include = Path(torch.__file__).parent / "include"
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [compiler, *FLAGS, *code, f"-I{include}", "truncated.cu"]


def _compile(compiler: str) -> Path:
    """The library in torch's extension cache, for all GPUs of this machine; compiled unless it was before."""
    sources = _sources()
    every = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    call = command(compiler, sorted({f"{major}{minor}" for major, minor in every}))
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256("".join([torch.__version__, version, *call]).encode())
    for file in sorted(sources.glob("*.cu*")):
        digest.update(file.read_bytes())
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = cache / f"entropy_kernels_cuda_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # moved into place whole: others may be compiling too
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "truncated.so"
            link = [
                f"-L{Path(torch.__file__).parent / 'lib'}",
                "-ltorch_cpu",
                "-ltorch_cuda",
                "-o",
                str(made),
            ]
            call = [*call, "-shared", "-Xcompiler", "-fPIC", *link]
            subprocess.run(call, cwd=sources, check=True, capture_output=True, text=True)
            os.replace(made, library)
    return library


@functools.cache
def available() -> bool:
    """Loads the library, once; whether it runs here."""
    compiler = nvcc()
    if torch.version.cuda is None or not torch.cuda.is_available() or compiler is None:
        return False
    try:
        torch.ops.load_library(str(_compile(compiler)))
        for i in range(torch.cuda.device_count()):  # a driver older than nvcc shows here
            z, one = torch.zeros(1, 8, device=f"cuda:{i}"), torch.ones(1, device=f"cuda:{i}")
            assert kept_set(z, one, one.long(), one.double()).all(), "a first row came out wrong"
    except (OSError, RuntimeError, AssertionError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            "entropy_kernels: the CUDA kernels of kept sets are not available, Triton's are used: same sets but for crossings within "
            f"float32's rounding, slower. Cause: {output[0] if output else repr(error)}",
            stacklevel=2,
        )
        return False
    return True


def backend() -> str:
    """What computes kept sets here: "cuda c++"."""
    return "cuda c++"


def _prepared(z: Tensor) -> Tensor:
    """The logits in a dtype of the kernels, each row contiguous; autograd's stand-ins for zeros given memory."""
    z = torch.zeros(z.shape, dtype=z.dtype, device=z.device) if z._is_zerotensor() else z
    z = z if z.dtype in _DTYPES else z.to(compute_dtype(z.dtype))
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _arguments(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> list[Tensor]:
    """τ, k, p as the kernels take them; room for thresholds, and for what is left to the second kernel."""
    wide = compute_dtype(z.dtype)
    given = [tau.to(wide).contiguous(), top_k.contiguous(), top_p.contiguous()]
    return [*given, *(torch.empty(len(z), dtype=dtype, device=z.device) for dtype in (wide, torch.int32))]


def thresholds(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest kept logit of each row [R] in the compute dtype, NaN for a row without a law: top_k, then top_p of what it left.

    k [R] int64 and p [R] float64 have to be positive: a row where they are not has no law.
    """
    z = _prepared(z)
    arguments = _arguments(z, tau, top_k, top_p)
    torch.ops.entropy_kernels.cuda_thresholds(z, *arguments)
    return arguments[3]


def kept_set(z: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The kept tokens, bool [R, V]: those that reach the threshold, which is a token's own logit."""
    return z >= thresholds(z, tau, top_k, top_p).to(z.dtype).unsqueeze(-1)


def truncated_values_of_rows(
    z: Tensor, y: Tensor, tau: Tensor, top_k: Tensor, top_p: Tensor
) -> TruncatedValues:
    """`truncated.truncated_values` of `kept_set`, without a mask: one read of 16-bit logits, a few of wider ones."""
    z = _prepared(z)
    wide = compute_dtype(z.dtype)
    out = TruncatedValues(
        *(
            torch.empty(len(z), dtype=torch.int64 if name == "kept_count" else wide, device=z.device)
            for name in TruncatedValues._fields
        )
    )
    tau, top_k, top_p, threshold, pending = _arguments(z, tau, top_k, top_p)
    torch.ops.entropy_kernels.cuda_truncated_values(
        z, y.contiguous(), tau, top_k, top_p, threshold, pending, *out
    )
    return out
