"""What other projects offer for the same numbers, each behind one signature: logits, or hidden states and weight, and targets to
(entropy, logprob).

Peers are taken as they are installed; one that does not import here is left out, and the reason goes into the result. Where a project has
one of the two numbers only, the other is None. Apple's Cut Cross-Entropy starts from hidden states and has no function of logits.

The adapters were run against float64 on the versions named beside them: in Triton's interpreter where the peer is a Triton kernel,
on the CPU where it is plain torch. None of them has been run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

Outputs = tuple[Tensor | None, Tensor | None]
RowFunction = Callable[[Tensor, Tensor], Outputs]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A function of rows; `entropy`: it has one; `overwrites`: with gradients on, it leaves its gradient where the logits were."""

    function: RowFunction
    entropy: bool = True
    overwrites: bool = False


def module(name: str) -> ModuleType:
    """Import it; where a parent package does not start here (no compiled extension, no Ray), import it without the parents' start.

    Raises:
        ImportError: it is not installed, or what it needs itself is not.
    """
    try:
        return importlib.import_module(name)
    except Exception as failure:  # a peer's start-up may raise anything
        parents = name.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = ".".join(parents[:depth])
            spec = importlib.util.find_spec(parent) if parent not in sys.modules else None
            if spec is not None:
                sys.modules[parent] = importlib.util.module_from_spec(spec)
        try:
            return importlib.import_module(name)
        except Exception as still:
            alone = "" if str(still) == str(failure) else f"; without its parents: {still}"
            raise ImportError(f"{failure}{alone}") from still


def trl_torch() -> Peer:
    """TRL 1.16 on the CPU: two functions of plain torch."""
    utils = module("trl.trainer.utils")
    return Peer(function=lambda z, y: (utils.entropy_from_logits(z), utils.selective_log_softmax(z, y)))


def trl_triton() -> Peer:
    """TRL 1.16 on a GPU: one Triton kernel, which `trl.trainer.utils` takes there too."""
    kernel = module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy

    def function(z: Tensor, y: Tensor) -> Outputs:
        logprob, entropy = kernel(z, y)
        return entropy, logprob

    return Peer(function=function)


def verl() -> Peer:
    """verl 0.9.1: entropy in float32 by chunks of 2048 rows, logprob by flash-attn's kernel where that imports."""
    functions = module("verl.utils.torch_functional")
    return Peer(
        function=lambda z, y: (
            functions.entropy_from_logits_with_chunking(z),
            functions.logprobs_from_logits(z, y, inplace_backward=False),
        )
    )


def flash_attention() -> Peer:
    """flash-attn 2.8.3: cross-entropy in Triton, no entropy."""
    kernel = module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return Peer(function=lambda z, y: (None, -kernel(z, y)[0]), entropy=False)


def liger_cross_entropy() -> Peer:
    """Liger 0.8.5: cross-entropy in Triton in the dtype of the logits, no entropy; the gradient is made in the forward pass."""
    function = module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    options = (None, -100, 0.0, 0.0, "none", None, False, False, False)
    return Peer(
        function=lambda z, y: (None, -function.apply(z, y, *options)[0]), entropy=False, overwrites=True
    )


ON_CPU: dict[str, Callable[[], Peer]] = {"TRL": trl_torch, "verl": verl}
ON_GPU: dict[str, Callable[[], Peer]] = {
    "TRL": trl_triton,
    "verl": verl,
    "flash-attn": flash_attention,
    "Liger": liger_cross_entropy,
}


def row_peers(gpu: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that import here, and why the others do not."""
    found, absent = {}, {}
    for name, make in (ON_GPU if gpu else ON_CPU).items():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as failure:
            absent[name] = f"does not import: {failure}"
    return found, absent


# ---- from hidden states: (h, W, targets)

HeadFunction = Callable[[Tensor, Tensor, Tensor], Outputs]


@dataclass(frozen=True, kw_only=True)
class HeadPeer:
    """A function of hidden states [N, D], weight [V, D] and targets [N]; `entropy`: it has one."""

    function: HeadFunction
    entropy: bool = True


def trl_head() -> HeadPeer:
    """TRL 1.16: library products of 256 rows by 8192 columns, as its trainer calls it."""
    function = module("trl.kernels").ChunkedLogProbFunction

    def call(h: Tensor, W: Tensor, y: Tensor) -> Outputs:
        logprob, entropy, *_ = function.apply(h, W, None, y, 1.0, 8192, None, 1.0, ("entropy",))
        return entropy, logprob

    return HeadPeer(function=call)


def liger_head() -> HeadPeer:
    """Liger 0.8.5: a kernel of its own for sm_90, which needs nvidia-cutlass-dsl; plain torch in chunks elsewhere."""
    function = module(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    ).LigerFusedLinearScaledCrossEntropyFunction

    def call(h: Tensor, W: Tensor, y: Tensor) -> Outputs:
        nll, entropy = function.apply(h, W, y, 1.0, -100, 1, True)
        return entropy, -nll

    return HeadPeer(function=call)


def verl_head() -> HeadPeer:
    """verl 0.9.1: Triton, D a multiple of 128. Its kernels do not run in the interpreter: the call was followed up to their launch."""
    function = module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def call(h: Tensor, W: Tensor, y: Tensor) -> Outputs:
        logprob, entropy = function(h, W, y, 1.0, "none")
        return entropy, logprob

    return HeadPeer(function=call)


def cut_cross_entropy() -> HeadPeer:
    """Apple's Cut Cross-Entropy 25.1: Triton, no entropy; its default leaves small gradients out, and they are 16-bit only."""
    function = module("cut_cross_entropy").linear_cross_entropy
    return HeadPeer(function=lambda h, W, y: (None, -function(h, W, y, reduction="none")), entropy=False)


HEADS: dict[str, Callable[[], HeadPeer]] = {
    "TRL": trl_head,
    "Liger": liger_head,
    "verl": verl_head,
    "Cut Cross-Entropy": cut_cross_entropy,
}


def head_peers() -> tuple[dict[str, HeadPeer], dict[str, str]]:
    """Those that import here, and why the others do not."""
    found, absent = {}, {}
    for name, make in HEADS.items():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as failure:
            absent[name] = f"does not import: {failure}"
    return found, absent
