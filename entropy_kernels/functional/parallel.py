r"""Rows whose vocabulary is spread over ranks: each knows the columns of its shard, all need entropy and logprob of the whole.

With p_j the law within shard j, H_j its entropy, ℓ_j its logsumexp, and w = softmax(ℓ_1 … ℓ_P) the masses of the shards, grouping
gives exactly

    logsumexp = lse(ℓ)      logprob_y = logprob_y|shard + log w_owner      H = H(w) + Σ_j w_j H_j

so four numbers a row travel and nothing else, and every rule of differentiation is one that the rows have already: w is a row of P
logits ℓ. Shards are merged in the order of their ranks on every rank alike, so that all hold the same bits (docs/theory.md, section 2).

What every rank holds (hidden states, results, the loss made of them) is *replicated*: a gradient is that of the one loss, not of the
sum of its copies. Then the transpose of gathering is to keep one's own slice, and that of copying an input to the shards is to add up
what they return.

ℓ_j travels in the dtype of the results, so in float32 a mass w_j has a relative error of about 6e-8·|ℓ_j|, where a row in one piece,
centred on its peak before anything is rounded, has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .arguments import check_values, refuse_compiling
from .linear import WORKSPACE_BYTES, linear_entropy_logprob
from .rows import EntropyLogprob, entropy_logprob

Group = Any  # torch.distributed.ProcessGroup, or None for the default one


class _Gather(Function):
    """x of each rank → [P, …] in rank order, replicated."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:
        return _Gather.apply(dx, ctx.group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Own.apply(g, ctx.group), None


class _Own(Function):
    """[P, …], replicated → the slice of this rank."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return x[dist.get_rank(group)].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:
        return _Own.apply(dx, ctx.group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Gather.apply(g, ctx.group), None


class _Copy(Function):
    """x, replicated → the copy that this rank's shard works on."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:
        return _Copy.apply(dx, ctx.group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Sum.apply(g, ctx.group), None


class _Sum(Function):
    """x of each rank → Σ over ranks, replicated."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:
        return _Sum.apply(dx, ctx.group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Copy.apply(g, ctx.group), None


def vocab_parallel_entropy_logprob(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    group: Group = None,
    start: int | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> EntropyLogprob:
    r"""`entropy_logprob` of rows whose columns are spread over the ranks of a process group: H = H(w) + Σ_j w_j H_j.

    Called on every rank of the group with the same rows. Differentiable as `entropy_logprob` is (without vmap): the gradient is that of
    the loss which every rank computes alike, counted once, with respect to this rank's columns.

    Args:
        logits: [..., V_local], this rank's columns; the same rows in the same order on every rank.
        targets: [...], integer, in the numbering of the whole vocabulary, the same on every rank; None for no logprob.
        group: the process group; None for the default one.
        start: number of this rank's first column in the whole vocabulary; None where all shards are of one width, in rank order.
        temperature: τ > 0, a number or a tensor that broadcasts to [...]; not differentiable.
        ignore_index: the target that means "none".
        vocab_size: columns of the whole vocabulary from here on are padding and take no part.

    Returns:
        EntropyLogprob(entropy, logprob, logsumexp), each [...], in nats, the same bits on every rank; float64 for float64 logits, float32
        otherwise.

    Raises:
        ValueError: what `entropy_logprob` refuses, or a target that no rank holds.
        NotImplementedError: a third derivative, or use inside a compiled region.
    """
    name = "vocab_parallel_entropy_logprob"
    refuse_compiling(name)
    width = logits.shape[-1]
    start = dist.get_rank(group) * width if start is None else start
    held = width if vocab_size is None else min(width, max(0, vocab_size - start))
    if not held:  # padding alone: this shard has no mass, but must take part in the exchange
        logits, held = torch.full_like(logits[..., :1], -torch.inf), 1
    columns = logits[..., :held]
    y, own = _own_targets(targets, start, held, ignore_index)
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": -1}
    local = entropy_logprob(columns, y, **options)
    # A row of −inf alone is undefined by itself, but as a shard it has mass zero. Told by its NaN, so that other rows cost nothing.
    empty = local.logsumexp.isnan()
    if bool(empty.any()):
        empty &= (columns == -torch.inf).all(-1)
        local = entropy_logprob(columns.masked_fill(empty.unsqueeze(-1), 0.0), y, **options)
    return _merged(name, local, empty, targets, own, ignore_index, group)


def vocab_parallel_linear_entropy_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    group: Group = None,
    start: int | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    workspace: int = WORKSPACE_BYTES,
) -> EntropyLogprob:
    r"""`linear_entropy_logprob` with the rows of the output layer's weight spread over the ranks of a process group.

    Hidden states are the same on every rank, and so is their gradient, which is added up over the shards; the gradient of weight and
    bias is that of this rank's rows.

    Args:
        hidden: [..., D], replicated.
        weight: [V_local, D], this rank's rows, and bias: [V_local] or None.
        targets: [...], integer, in the numbering of the whole vocabulary; None for no logprob.
        group: the process group; None for the default one.
        start: number of this rank's first row in the whole vocabulary; None where all shards are of one size, in rank order.
        bias: see weight.
        temperature: τ > 0, a number or a tensor that broadcasts to [...]; not differentiable.
        softcap: κ > 0, applied before the temperature; None for none.
        ignore_index: the target that means "none".
        vocab_size: rows of the whole weight from here on are padding and take no part.
        workspace: bytes of logits that exist at once on this rank.

    Returns:
        EntropyLogprob(entropy, logprob, logsumexp), each [...], in nats, the same bits on every rank.

    Raises:
        ValueError: what `linear_entropy_logprob` refuses, a target that no rank holds, or a shard that is padding alone.
        NotImplementedError: a third derivative, or use inside a compiled region.
    """
    name = "vocab_parallel_linear_entropy_logprob"
    refuse_compiling(name)
    start = dist.get_rank(group) * len(weight) if start is None else start
    held = len(weight) if vocab_size is None else min(len(weight), vocab_size - start)
    if held < 1:
        raise ValueError(
            f"{name}: rank {dist.get_rank(group)} holds rows {start} to {start + len(weight)} of the weight, all of them padding "
            f"(vocab_size={vocab_size}). Spread the {vocab_size} rows that count over all ranks."
        )
    y, own = _own_targets(targets, start, held, ignore_index)
    local = linear_entropy_logprob(
        _Copy.apply(hidden, group),
        weight,
        y,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=-1,
        vocab_size=held,
        workspace=workspace,
    )
    return _merged(
        name, local, torch.zeros_like(local.entropy, dtype=torch.bool), targets, own, ignore_index, group
    )


def _own_targets(
    targets: Tensor | None, start: int, held: int, ignore_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """Targets in this shard's numbering, −1 where another rank has them; and where this rank has them."""
    if targets is None:
        return None, None
    own = (targets != ignore_index) & (targets >= start) & (targets < start + held)
    return torch.where(own, targets - start, -1), own


def _merged(
    name: str,
    local: EntropyLogprob,
    empty: Tensor,
    targets: Tensor | None,
    own: Tensor | None,
    ignore_index: int,
    group: Group,
) -> EntropyLogprob:
    """The whole row from its shards: logits ℓ_j of the shards make the row w."""
    lse = torch.where(empty, -torch.inf, local.logsumexp)
    logprob = torch.zeros_like(lse) if local.logprob is None else local.logprob
    H_P, S_P, lse_P = (
        x.movedim(0, -1) for x in _Gather.apply(torch.stack([local.entropy, logprob, lse]), group).unbind(1)
    )
    owner = None
    if targets is not None and own is not None:
        held = _Gather.apply(own.to(torch.int64), group).movedim(0, -1)
        present = targets != ignore_index
        check_values(
            name,
            present & (held.sum(-1) != 1),
            targets,
            "target {} is held by no rank, or by several; check start and vocab_size.",
        )
        owner = torch.where(present, held.argmax(-1), ignore_index)
    shards = entropy_logprob(lse_P, owner, ignore_index=ignore_index)
    w_P = (lse_P - shards.logsumexp.unsqueeze(-1)).exp()
    return EntropyLogprob(
        shards.entropy + (w_P * H_P).sum(-1),
        None if shards.logprob is None else shards.logprob + S_P.sum(-1),
        shards.logsumexp,
    )
