r"""Gradients of sequences in a few thousand numbers, from which inner products can be read: a sparse Johnson-Lindenstrauss transform.

    y = Φ √P g,   Φ [k, p]: every column has s entries ±1/√s, one in each of s blocks of k/s rows, at hashed places
    E⟨y, y'⟩ = gᵀPg',    Var⟨y, y'⟩ = (‖x‖²‖x'‖² + ⟨x, x'⟩² − 2Σ_i x_i²x'_i²)/k,    x = √P g

The error of an entry is that variance without its last term (so it is rather too large), with the exact ‖x‖², which are kept. Φ is a
function of the seed, the parameter's name and the place in it: sketches made at different times, of different batches, fit together.

Source: Kane and Nelson, Sparser Johnson-Lindenstrauss Transforms, J. ACM 61 (2014), block construction.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entropy_kernels.errors import UserError
from entropy_kernels.ops.contract import Terms, materialise
from entropy_kernels.policy import Parameters, Policy, TokenBatch, check_batch

from .capture import matrix_shape, survey, tiles
from .cost import check_preconditioner

_CHUNK = 1 << 22  # numbers multiplied out at once
_FORMAT = "entropy_kernels sketch 1"
_WORD = 1 << 64


class SketchedKernel(NamedTuple):
    """K̂(t, t') and its standard error over seeds, [N, M] float64; the diagonal of a square one is exact."""

    value: Tensor
    stderr: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketch:
    """Sketched gradients of N sequences.

    Attributes:
        values: y [N, k] float32 (float64 of a float64 policy).
        squared_norms: ‖√P g‖² [N] float64, exact.
        prompt_index: [N], of the batch.
        seed, nonzeros: of Φ; s is `nonzeros`.
        what: names and shapes of the parameters and the preconditioner, hashed: only sketches of the same fit together.
    """

    values: Tensor
    squared_norms: Tensor
    prompt_index: Tensor
    seed: int
    nonzeros: int
    what: str

    @property
    def size(self) -> int:
        """The number k of rows of Φ."""
        return self.values.shape[1]

    def kernel(self, other: Sketch | None = None) -> SketchedKernel:
        """K̂ between these sequences and the other's, with the standard error of every entry.

        Raises:
            UserError: sketches of another transform, other parameters or another preconditioner.
        """
        cols = self if other is None else other
        mine, theirs = ((x.seed, x.nonzeros, x.size, x.what) for x in (self, cols))
        if mine != theirs:
            raise UserError(
                f"other: it was made with (seed, nonzeros, size) = {theirs[:3]}, this one with {mine[:3]}; or with other parameters or "
                "another preconditioner. Make both with the same."
            )
        K = self.values.double() @ cols.values.double().t()
        stderr = ((self.squared_norms[:, None] * cols.squared_norms + K**2) / self.size).sqrt()
        if cols is self:
            K.diagonal().copy_(self.squared_norms)
            stderr.diagonal().zero_()
        return SketchedKernel(K, stderr)

    def leading(self, count: int) -> tuple[np.ndarray, float]:
        """The largest eigenvalues of K̂ = YYᵀ by Lanczos, descending [count], and by how much any may be off from K's.

        The second is the root mean square of ‖K̂ − K‖ in the Frobenius norm, which bounds every eigenvalue's error (Weyl).

        Raises:
            UserError: count not in 1 … N − 1.
        """
        from scipy.sparse.linalg import LinearOperator, eigsh

        Y = self.values.double().numpy()
        if not 1 <= count < len(Y):
            raise UserError(f"count: got {count}, expected 1 to {len(Y) - 1}, fewer than the sequences.")
        operator = LinearOperator((len(Y), len(Y)), matvec=lambda v: Y @ (Y.T @ v), dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(len(Y))  # the same result every time
        found = eigsh(operator, k=count, which="LA", v0=start, return_eigenvectors=False)
        error = (
            self.squared_norms[:, None] * self.squared_norms
            + (self.values.double() @ self.values.double().t()) ** 2
        ) / self.size
        return np.sort(found)[::-1], float(error.sum().sqrt())

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            "values": self.values,
            "squared_norms": self.squared_norms,
            "prompt_index": self.prompt_index,
        }
        about = {"format": _FORMAT, "seed": str(self.seed), "nonzeros": str(self.nonzeros), "what": self.what}
        save_file({name: x.contiguous() for name, x in tensors.items()}, str(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Sketch:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or not a sketch.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise UserError(
                        f"path: {path} is not a sketch of this version ({_FORMAT}); make it again with fisher_sketch."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"path: {path} cannot be read as safetensors: {error}.") from error
        return cls(
            **tensors, seed=int(about["seed"]), nonzeros=int(about["nonzeros"]), what=about["what"]
        )  # fmt: skip


def fisher_sketch(
    policy: Policy,
    batch: TokenBatch,
    *,
    size: int = 4096,
    nonzeros: int = 4,
    seed: int = 0,
    preconditioner: Parameters | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Sketch:
    """Sketch √P ∇S of every sequence: one forward and backward pass, no more than one micro-batch's gradients at a time.

    Args:
        policy: the model and its parameters.
        batch: N sequences, [N, T].
        size: k, a multiple of `nonzeros`; the error of an entry is about √(K(t,t) K(t',t')/k).
        nonzeros: s, 4 to 8; more spread heavy coordinates better and cost proportionally.
        seed: of Φ.
        preconditioner: name -> P, as in `fisher_kernel`.
        progress: called after each micro-batch with its number of sequences.

    Raises:
        UserError: a size that is not a positive multiple of nonzeros; else as `fisher_kernel`.
    """
    if nonzeros < 1 or size < nonzeros or size % nonzeros:
        raise UserError(
            f"size: got {size} with nonzeros={nonzeros}, expected a positive multiple of it, such as 4096 with 4."
        )
    check_batch(batch)
    P = check_preconditioner(policy, preconditioner)
    survey(policy, batch)  # no parameter is forgotten
    Y = torch.zeros(len(batch.input_ids), size, dtype=policy.dtype)
    norms = torch.zeros(len(Y), dtype=torch.float64)
    spans = {name: (0, matrix_shape(p)[0]) for name, p in policy.params.items()}
    for places, tile in tiles(policy, batch, spans):
        for name, samples in tile.items():
            shape = matrix_shape(policy.params[name])
            weight = None if P is None else P[name].reshape(shape)
            y, squares = sketched(samples, name, shape, weight, size=size, nonzeros=nonzeros, seed=seed)
            Y[places] += y.cpu()
            norms[places] += squares.cpu()
        if progress is not None:
            progress(len(places))
    return Sketch(
        values=Y, squared_norms=norms, prompt_index=batch.prompt_index.clone(), seed=seed, nonzeros=nonzeros,
        what=_fingerprint(policy, P),
    )  # fmt: skip


def sketched(
    samples: list[Terms] | list[Any],
    name: str,
    shape: tuple[int, int],
    P: Tensor | None,
    *,
    size: int,
    nonzeros: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(Φ√P g [n, k], ‖√P g‖² [n] float64) of one parameter [C, D]."""
    C, D = shape
    n, like = len(samples), samples[0][0].right
    height = max(1, min(C, _CHUNK // (max(4, n) * D)))
    buffer, width = like.new_empty(n, height, D), size // nonzeros
    y, squares = like.new_zeros(size, n), like.new_zeros(n, dtype=torch.float64)
    for start in range(0, C, height):
        stop = min(start + height, C)
        block = buffer.view(-1)[: n * (stop - start) * D].view(n, stop - start, D)
        G = materialise(samples, start, stop, 0, block)
        if P is not None:
            G.mul_(P[start:stop].sqrt())
        x = G.flatten(1).t().contiguous()
        squares += x.double().square().sum(0)
        for j in range(nonzeros):
            bucket, sign = hashed(start * D, stop * D, _key(seed, name, j), width, like.device)
            y[j * width : (j + 1) * width].index_add_(0, bucket, x * sign[:, None].to(x.dtype))
    return y.t() / nonzeros**0.5, squares


def hashed(start: int, stop: int, key: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Place in [0, width) and sign of the numbers start … stop − 1: splitmix64 of each, with the key."""
    x = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    x = x * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return ((x >> 1) & ((1 << 62) - 1)) % width, (x & 1) * 2 - 1


def _key(seed: int, name: str, j: int) -> int:
    text = f"{seed}/{j}/{zlib.crc32(name.encode())}/{name}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _signed(x: int) -> int:
    return x - _WORD if x >= _WORD // 2 else x


def _fingerprint(policy: Policy, P: Parameters | None) -> str:
    digest = hashlib.sha256()
    for name, p in policy.params.items():
        digest.update(f"{name} {tuple(p.shape)};".encode())
        if P is not None:
            digest.update(P[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
