r"""The Fisher kernel between sequences, or between tokens and sequences.

    K(t, t') = ∇S(t)ᵀ P ∇S(t'),    S(t) = Σ_k log π(t_k | t_<k, p)         level "sequence"
    K(t_k, t') = ∇S_k(t)ᵀ P ∇S(t')                                           level "token"

P is a positive diagonal, applied once: 1, or the optimizer's 1/(√v̂ + ε). Then η K is how much one gradient step on t' moves log π(t).
With the columns at other parameters of the same model, K is between two policies (docs/theory.md, section 9).

Methods: "layers" contracts layer by layer, by materialised blocks of gradients or by ghost products, whichever is cheaper
("materialised", "ghost" insist on one); "jvp" takes one forward-mode pass along P∇S(t') per column; "reference" holds every gradient, one
sequence at a time, and multiplies: the specification. "auto" counts operations (`fisher_cost`).

Where a run is split over ranks (`distributed.joined`), "layers" deals out parameters and "jvp" columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from entropy_kernels import distributed
from entropy_kernels.derivatives import token_gradient, token_tangents
from entropy_kernels.errors import UserError
from entropy_kernels.ops.contract import Term, ghost_gram, materialised_gram
from entropy_kernels.policy import Parameters, Policy, TokenBatch, check_batch

from . import cost
from .capture import gradients, matrix_shape, only, survey
from .cost import FisherCost, Piece

METHODS = ("auto", "layers", "materialised", "ghost", "jvp", "reference")
LEVELS = ("sequence", "token")
Progress = Callable[[int], Any]


def fisher_kernel(
    policy: Policy,
    rows: TokenBatch,
    cols: TokenBatch | None = None,
    *,
    cols_policy: Policy | None = None,
    preconditioner: Parameters | None = None,
    level: str = "sequence",
    method: str = "auto",
    memory_budget: float | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """K(t, t') = ∇S(t)ᵀ P ∇S(t'), nats² per squared unit of the parameters (with P = 1).

    Products of gradients are in the policy's dtype, their sum over parameters and blocks in float64.

    Args:
        policy: the model and the parameters of the rows.
        rows: N sequences t, [N, T].
        cols: M sequences t'; None for the rows again.
        cols_policy: the same model at the parameters of the columns; None for those of the rows.
        preconditioner: name -> P, positive, the parameters' shapes; None for P = 1.
        level: "sequence" for [N, M]; "token" for [N, T, M], ∇S_k of every response token of the rows, 0 outside the response.
        method: see the module's docstring; at token level "jvp" or "reference".
        memory_budget: bytes beyond the model that "layers" may use; None for half of what the device has free. The check on two sequences
            that comes first needs one gradient of the model, whatever the budget.
        progress: called with a number of sequences; in all `fisher_cost(...).passes`·(N + M) for "layers", M·(N + 1) for "jvp", N + M
            for "reference" (N where the columns are the rows).

    Returns:
        K in the policy's dtype, on the CPU.

    Raises:
        UserError: an unknown level or method; batches, P or `cols_policy` that do not fit; a parameter whose gradient by sequence cannot be
            taken apart correctly; a budget that is too small.
    """
    P = _checked(policy, rows, cols, cols_policy, preconditioner, level, method)
    plan = fisher_cost(
        policy, rows, cols, cols_policy=cols_policy, preconditioner=P, level=level, method=method,
        memory_budget=memory_budget,
    )  # fmt: skip
    plan = distributed.of_first(lambda: plan)  # memory that is free may differ
    other = cols_policy or policy
    if plan.method == "reference":
        K = _reference(policy, other, rows, cols, P, level, progress)
    elif plan.method == "jvp":
        K = _forward_mode(policy, other, rows, rows if cols is None else cols, P, progress)
        K = K if level == "token" else K.sum(dim=1)
    else:
        square = cols is None and cols_policy is None
        K = _layers(
            policy, other, rows, None if square else rows if cols is None else cols, P, plan, progress
        )
    return K.to(policy.dtype)


def fisher_cost(
    policy: Policy,
    rows: TokenBatch,
    cols: TokenBatch | None = None,
    *,
    cols_policy: Policy | None = None,
    preconditioner: Parameters | None = None,
    level: str = "sequence",
    method: str = "auto",
    memory_budget: float | None = None,
) -> FisherCost:
    """Operations, bytes and choice of `fisher_kernel` with the same arguments; costs a forward and backward pass over two sequences.

    Raises:
        UserError: as `fisher_kernel`.
    """
    P = _checked(policy, rows, cols, cols_policy, preconditioner, level, method)
    if level == "token" or method in ("jvp", "reference"):
        chosen = "reference" if method == "reference" else "jvp"
        reason = "asked for" if method == chosen else "tokens need a forward-mode pass per column"
        return FisherCost(chosen, reason, {}, {}, (), policy.micro_batch_tokens, cost.WORKSPACE_BYTES)
    square = cols is None and cols_policy is None
    return cost.estimate(
        policy,
        survey(policy, rows),
        cost.side(rows),
        None if square else cost.side(rows if cols is None else cols),
        preconditioned=P is not None,
        method=method,
        budget=_free_bytes(policy) / 2 if memory_budget is None else memory_budget,
    )


def _layers(
    policy: Policy,
    other: Policy,
    rows: TokenBatch,
    cols: TokenBatch | None,
    P: Parameters | None,
    plan: FisherCost,
    progress: Progress | None,
) -> Tensor:
    policy, other = cost.with_micro_batches(policy, plan), cost.with_micro_batches(other, plan)
    K = torch.zeros(len(rows.input_ids), len((rows if cols is None else cols).input_ids), dtype=torch.float64)
    alone = distributed.count() == 1

    def terms(pieces: tuple[Piece, ...]) -> Iterator[Tensor]:
        spans = {piece.name: piece.span for piece in pieces}
        held = frozenset(piece.name for piece in pieces if piece.held)
        left = gradients(policy, rows, spans, held=held, progress=progress if alone else None)
        right = None
        if cols is not None:
            right = gradients(other, cols, spans, held=held, progress=progress if alone else None)
        for piece in pieces:
            yield _contracted(
                piece,
                left.pop(piece.name),
                None if right is None else right.pop(piece.name),
                matrix_shape(policy.params[piece.name]),
                None if P is None else P[piece.name],
                plan.workspace_bytes,
            ).cpu()

    for pieces, found in distributed.dealt(_shares(plan.groups, distributed.count()), terms):
        for term in found:
            K += term
        if progress is not None and not alone and any(pieces[-1] is group[-1] for group in plan.groups):
            progress(len(rows.input_ids) + (0 if cols is None else len(cols.input_ids)))
    return (K + K.t()) / 2 if cols is None else K


def _shares(groups: tuple[tuple[Piece, ...], ...], ranks: int) -> list[tuple[Piece, ...]]:
    """The groups, in at least as many runs of neighbours as there are ranks, if there are as many pieces."""
    parts = -(-ranks // len(groups))
    found = []
    for group in groups:
        edges = [i * len(group) // parts for i in range(parts + 1)]
        found += [group[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b]
    return found


def _contracted(
    piece: Piece,
    left: list[list[Term]],
    right: list[list[Term]] | None,
    shape: tuple[int, int],
    P: Tensor | None,
    workspace: int,
) -> Tensor:
    if piece.ghost:
        return ghost_gram(left, right, workspace_bytes=workspace)
    return materialised_gram(
        left,
        right,
        span=piece.span,
        width=shape[1],
        preconditioner=None if P is None else P.reshape(shape),
        workspace_bytes=workspace,
    )


def _forward_mode(
    policy: Policy,
    other: Policy,
    rows: TokenBatch,
    cols: TokenBatch,
    P: Parameters | None,
    progress: Progress | None,
) -> Tensor:
    """S' of every token of the rows along P∇S(t'), column by column, [N, T, M]."""
    alone = distributed.count() == 1
    tick = progress if alone else None

    def column(j: int) -> tuple[Tensor, ...]:
        direction = _score(other, cols, j, tick)
        if P is not None:
            direction = {name: P[name] * g for name, g in direction.items()}
        return (token_tangents(policy, rows, direction, progress=tick).d_logprob,)

    columns: list[Tensor] = []
    for _, found in distributed.dealt(range(len(cols.input_ids)), column):
        columns += found
        if progress is not None and not alone:
            progress(1 + len(rows.input_ids))
    return torch.stack(columns, dim=2)


def _reference(
    policy: Policy,
    other: Policy,
    rows: TokenBatch,
    cols: TokenBatch | None,
    P: Parameters | None,
    level: str,
    progress: Progress | None,
) -> Tensor:
    """Every gradient in float64, then G P Gᵀ."""
    square = cols is None and other is policy and level == "sequence"
    cols = rows if cols is None else cols
    mask = rows.response_mask.bool().cpu()
    if level == "token":
        G = torch.zeros(*mask.shape, sum(p.numel() for p in policy.params.values()), dtype=torch.float64)
        for n, t in mask.nonzero().tolist():
            weight = torch.zeros(1, mask.shape[1], dtype=policy.dtype)
            weight[0, t] = 1.0
            G[n, t] = _flat(token_gradient(policy, only(rows, torch.tensor([n])), logprob_weight=weight))
    else:
        G = torch.stack([_flat(_score(policy, rows, n, progress)) for n in range(len(mask))])
    Q = (
        G
        if square
        else torch.stack([_flat(_score(other, cols, m, progress)) for m in range(len(cols.input_ids))])
    )
    weighted = Q if P is None else Q * _flat({name: P[name] for name in policy.params})
    return G @ weighted.t()


def _score(policy: Policy, batch: TokenBatch, n: int, progress: Progress | None) -> Parameters:
    """∇S of one sequence."""
    alone = only(batch, torch.tensor([n]))
    return token_gradient(
        policy, alone, logprob_weight=alone.response_mask.to(policy.dtype), progress=progress
    )


def _flat(x: Parameters) -> Tensor:
    return torch.cat([g.flatten() for g in x.values()]).double().cpu()


def _checked(
    policy: Policy,
    rows: TokenBatch,
    cols: TokenBatch | None,
    cols_policy: Policy | None,
    preconditioner: Parameters | None,
    level: str,
    method: str,
) -> Parameters | None:
    """The preconditioner on the policy's device and in its dtype, after everything was looked at."""
    for argument, got, allowed in (("level", level, LEVELS), ("method", method, METHODS)):
        if got not in allowed:
            raise UserError(f"{argument}: got {got!r}, expected one of {', '.join(allowed)}.")
    if level == "token" and method not in ("auto", "jvp", "reference"):
        raise UserError(f"method: got {method!r} at token level, expected 'auto', 'jvp' or 'reference'.")
    if method == "ghost" and preconditioner is not None:
        raise UserError(
            "method: 'ghost' works on products of whole layers and cannot weigh single parameters; use 'auto' with a preconditioner."
        )
    check_batch(rows)
    if cols is not None:
        check_batch(cols)
    if cols_policy is not None:
        ours = {name: (p.shape, p.dtype) for name, p in policy.params.items()}
        theirs = {name: (p.shape, p.dtype) for name, p in cols_policy.params.items()}
        if ours != theirs:
            differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
            raise UserError(
                f"cols_policy: expected the same model with the same parameters measured; {len(differing)} differ, such as {differing[0]}. "
                "Load both checkpoints with the same parameters= and dtype=."
            )
    return cost.check_preconditioner(policy, preconditioner)


def _free_bytes(policy: Policy) -> float:
    """Memory that the policy's device has free."""
    if policy.device.type == "cuda":
        return float(torch.cuda.mem_get_info(policy.device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return float(found["MemAvailable"])
    except OSError:  # not Linux: what is installed, of which half is taken
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
