"""Per-token tables, the update on disk, and a record of the environment."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from .. import distributed
from ..functional.rows import backend
from ..functional.truncated import backend as kept_set_backend
from ..policy import Parameters, Policy, TokenBatch
from .store import write_tensors

_PACKAGES = ("entropy_kernels", "torch", "transformers", "numpy", "scipy", "triton")


def token_table(batch: TokenBatch, tokenizer: Any, columns: Mapping[str, Tensor]) -> pa.Table:
    """One row per response token: sequence, position in the response, token_id, token, then the columns, in nats."""
    mask = batch.response_mask.bool()
    sequence, column = mask.nonzero(as_tuple=True)
    position = (mask.long().cumsum(dim=1) - 1)[sequence, column]
    ids = batch.input_ids[sequence, column]
    text = {i: tokenizer.decode([i]) for i in set(ids.tolist())}
    table = {
        "sequence": pa.array(sequence.numpy(), pa.int32()),
        "position": pa.array(position.numpy(), pa.int32()),
        "token_id": pa.array(ids.numpy(), pa.int32()),
        "token": pa.array([text[i] for i in ids.tolist()], pa.string()),
    }
    order = ["logprob", "entropy", "d_logprob", "d_entropy"]
    for name in order + [name for name in columns if name not in order]:
        table[name] = pa.array(columns[name][mask].double().numpy(), pa.float64())
    return pa.table(table)


def write_update(directory: str, direction: Parameters) -> None:
    """The direction v, per unit of learning rate, to update.safetensors; complete or absent."""
    write_tensors(Path(directory) / "update.safetensors", direction)


def environment(policy: Policy) -> dict[str, Any]:
    """Versions, device, dtype and the code's commit: the conditions of every figure in a report."""
    device = policy.device
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({torch.get_num_threads()} threads)",
        "ranks": distributed.count(),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "backends": {
            "rows": backend(device),
            **({"kept_sets": kept_set_backend(device)} if policy.truncation is not None else {}),
            "attention": "plain torch",
            "tf32": False,
        },
        "git_commit": _commit(),
    }


def code() -> dict[str, str | None]:
    """The versions that numbers depend on, and the commit, by name."""
    versions = {f"version of {name}": _version(name) for name in ("entropy_kernels", "torch", "transformers")}
    return {**versions, "git commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
