"""What the public row functions accept, checked once for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_kernels.ops import reference


def check_logits(name: str, logits: Tensor) -> None:
    """Floating-point [..., V], and all of it on this rank."""
    if hasattr(logits, "placements"):
        raise ValueError(
            f"{name}: logits is a DTensor, whose parts are not exchanged here. Pass its to_local() where whole rows lie on each rank; "
            "vocab_parallel_entropy_logprob takes the to_local() of rows spread over the ranks; full_tensor() gathers it."
        )
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(
            f"{name}: logits must be a floating-point tensor [..., V], got {logits.dtype} of shape {tuple(logits.shape)}."
        )


def flat_temperature(name: str, temperature: float | Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """τ [R] in the compute dtype of `like`, from a number or a tensor that broadcasts to the rows' `shape`."""
    dtype = reference.compute_dtype(like.dtype)
    # a number is looked at here: reading it on a GPU would wait for all work there
    if isinstance(temperature, (int, float)):
        if temperature < torch.finfo(dtype).tiny:
            raise ValueError(f"{name}: temperature must be positive, got {float(temperature)}.")
        return torch.full((shape.numel(),), temperature, dtype=dtype, device=like.device)
    tau = torch.as_tensor(temperature, device=like.device, dtype=dtype)
    if tau.requires_grad:
        raise ValueError(
            f"{name}: temperature requires grad, but derivatives with respect to the temperature are not provided; "
            "pass temperature.detach(), or divide the logits by it yourself and leave temperature at 1."
        )
    try:
        tau = tau.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: temperature of shape {tuple(tau.shape)} does not broadcast to the rows {tuple(shape)}; "
            "pass a number or a tensor with one temperature per row."
        ) from None
    check_values(name, tau <= 0, tau, "temperature must be positive, got {}.")
    return tau.reshape(-1)


def flat_targets(
    name: str, targets: Tensor | None, shape: torch.Size, size: int, ignore_index: int, device: torch.device
) -> Tensor:
    """y [R], −1 where there is none: where `targets` is None or equals `ignore_index`."""
    if targets is None:
        return torch.full((shape.numel(),), -1, dtype=torch.int64, device=device)
    if targets.shape != shape or targets.is_floating_point():
        raise ValueError(
            f"{name}: targets must be integers of shape {tuple(shape)}, got {targets.dtype} of shape {tuple(targets.shape)}."
        )
    y = targets.reshape(-1).to(torch.int64)
    present = y != ignore_index
    check_values(
        name,
        present & ((y < 0) | (y >= size)),
        y,
        f"target {{}} is outside the vocabulary of {size} columns; use ignore_index={ignore_index} for rows without one.",
    )
    return torch.where(present, y, -1)


def vocabulary_size(name: str, width: int, vocab_size: int | None) -> int:
    """`vocab_size`, or all of the `width` columns."""
    size = width if vocab_size is None else vocab_size
    if not 0 < size <= width:
        raise ValueError(
            f"{name}: vocab_size must lie in 1..{width} (the width of the vocabulary), got {size}; "
            "columns from vocab_size on are treated as padding."
        )
    return size


def refuse_compiling(name: str) -> None:
    """Raise inside a compiled region.

    Raises:
        NotImplementedError: always there, never elsewhere.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} inside torch.compile: the compiler drops forward-mode rules without a word, so this is refused. "
            "Call it outside the compiled region, or wrap the call in torch.compiler.disable."
        )


def check_values(name: str, bad: Tensor, values: Tensor, message: str) -> None:
    """Checks that read the data; skipped under vmap, where it cannot be read, and left to the graph where one is compiled."""
    if torch.compiler.is_compiling():
        torch._assert_async(~bad.any(), f"{name}: " + message.format("a value that does not fit"))
        return
    if not torch._C._functorch.is_batchedtensor(bad) and bool(bad.any()):
        raise ValueError(f"{name}: " + message.format(values[bad][0].item()))
