r"""What a Fisher kernel will cost by each method, in operations and bytes, and which method is chosen.

    layers      passes·4·F·(t + t') + Σ_parameters min(materialised, ghost)      one term of the sum: ops.contract
    jvp         M·6·F·t + 6·F·t'                                                 a forward-mode pass per column
    reference   6·F·(t + t') + 2·N·M·p                                           every gradient held: (N + M)·p numbers

F is the number of weights that a token is multiplied with (2F operations forward, twice that for a backward pass with weight gradients,
as much for one without; attention's own products are left out). `layers` keeps the inputs and output gradients of as many parameters as the
budget holds and repeats forward and backward for the next ones: `passes`.

Legend: N, M rows and columns; t, t' their tokens; p measured numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from entropy_kernels.errors import UserError
from entropy_kernels.ops.contract import ghost_flops, materialised_flops
from entropy_kernels.policy import Parameters, Policy, TokenBatch

from .capture import Layout, Span, Survey

WORKSPACE_BYTES = 256 << 20


class Piece(NamedTuple):
    """Rows `span` of one parameter, and how they are contracted."""

    name: str
    span: Span
    ghost: bool
    held: bool


class Side(NamedTuple):
    """Sizes of a batch: sequences, tokens, tokens of responses, longest sequence."""

    sequences: int
    tokens: int
    response_tokens: int
    longest: int


class FisherCost(NamedTuple):
    """What was chosen and why; operations and peak bytes beyond the model of every method that can do it.

    groups: parameters of each pass of the method "layers". micro_batch_tokens: tokens of a forward pass in it.
    """

    method: str
    reason: str
    flops: dict[str, float]
    peak_bytes: dict[str, float]
    groups: tuple[tuple[Piece, ...], ...]
    micro_batch_tokens: int
    workspace_bytes: int

    @property
    def passes(self) -> int:
        """Forward and backward passes over the batch by the method "layers"."""
        return len(self.groups)


def side(batch: TokenBatch) -> Side:
    """Sizes of a batch."""
    lengths = batch.attention_mask.bool().sum(1)
    return Side(len(lengths), int(lengths.sum()), int(batch.response_mask.bool().sum()), int(lengths.max()))


def estimate(
    policy: Policy,
    found: Survey,
    rows: Side,
    cols: Side | None,
    *,
    preconditioned: bool,
    method: str,
    budget: float,
) -> FisherCost:
    """Count every method and choose; see the module's docstring.

    Raises:
        UserError: no way to do it within the budget.
    """
    item = next(iter(policy.params.values())).element_size()
    other = cols or rows
    both = [rows] if cols is None else [rows, cols]
    N, M, p = rows.sequences, other.sequences, sum(x.numel() for x in policy.params.values())
    forward = sum(_flops_forward(policy, s) for s in both)
    workspace = int(min(WORKSPACE_BYTES, budget / 8))
    longest = max(s.longest for s in both)
    graph = found.graph_bytes_per_token
    micro = int(max(longest, min(policy.micro_batch_tokens, budget / 4 // graph)))
    room = budget - workspace - micro * graph
    if room <= 0:
        raise UserError(
            f"memory_budget: got {budget / 1e9:.3g} GB, but the forward pass of one sequence of {longest} tokens keeps "
            f"{longest * graph / 1e9:.3g} GB for the way back. Pass at least {(longest * graph * 4 / 3 + workspace) / 1e9:.2g} GB, or "
            "shorter sequences."
        )
    forced = {"materialised": False, "ghost": True}.get(method)
    pieces: list[Piece] = []
    contraction = 0.0
    for name, layout in found.layouts.items():
        chosen, operations = _pieces(name, layout, rows, cols, item, room, preconditioned, forced)
        pieces += chosen
        contraction += operations
    groups, largest = _grouped(pieces, found.layouts, both, item, room)
    flops = {
        "layers": 2 * len(groups) * forward + contraction,
        "jvp": 3 * M * _flops_forward(policy, rows) + 3 * _flops_forward(policy, other),
        "reference": 3 * forward + 2.0 * N * M * p,
    }
    peak = {
        "layers": largest + workspace + micro * graph,
        "jvp": 3.0 * p * item + micro * graph,
        "reference": 8.0 * p * sum(s.sequences for s in both),
    }
    best = min(("layers", "jvp"), key=lambda name: flops[name])
    actual = best if method == "auto" else method
    reason = (
        f"layers {flops['layers']:.2g} operations in {len(groups)} pass(es), jvp {flops['jvp']:.2g}"
        if method == "auto"
        else "asked for"
    )
    return FisherCost(actual, reason, flops, peak, groups, micro, workspace)


def with_micro_batches(policy: Policy, cost: FisherCost) -> Policy:
    """The policy with the micro-batches of the estimate."""
    return replace(policy, micro_batch_tokens=cost.micro_batch_tokens)


def _flops_forward(policy: Policy, s: Side) -> float:
    """2·F·t: every matrix once per token, the output layer for response tokens, embeddings not at all."""
    model: Any = policy.model
    tables = {id(x) for x in model.get_input_embeddings().parameters()}
    head = {id(x): x for x in model.get_output_embeddings().parameters()}
    body = sum(x.numel() for x in model.parameters() if x.dim() > 1 and id(x) not in tables | head.keys())
    last = sum(x.numel() for x in head.values() if x.dim() > 1)
    return 2.0 * (body * s.tokens + last * s.response_tokens)


def _tokens(in_head: bool, s: Side) -> int:
    return s.response_tokens if in_head else s.tokens


def _pieces(
    name: str,
    layout: Layout,
    rows: Side,
    cols: Side | None,
    item: int,
    room: float,
    preconditioned: bool,
    forced: bool | None,
) -> tuple[list[Piece], float]:
    """How one parameter is done: whole, in parts that fit, by ghost products; and its operations."""
    C, D = layout.C, layout.D
    both = [rows] if cols is None else [rows, cols]
    other = cols or rows
    factored = "held" not in layout.terms
    one = sum(materialised_flops(sum(_tokens(h, s) for s in both), 0, 0, C, D) for h in layout.in_head)
    materialised = float(one + 2 * C * D * rows.sequences * other.sequences)
    ghost = float(
        sum(
            ghost_flops(_tokens(h, rows), _tokens(h_, other), C if "dense" in (k, k_) else 1, D)
            for k, h in zip(layout.terms, layout.in_head, strict=True)
            for k_, h_ in zip(layout.terms, layout.in_head, strict=True)
        )
    )
    whole = Piece(name, (0, C), True, False)
    use_ghost = factored and not preconditioned and (ghost < materialised if forced is None else forced)
    if use_ghost and _bytes(whole, layout, both, item) > room:
        if forced:
            raise UserError(
                f"memory_budget: the method 'ghost' needs {_bytes(whole, layout, both, item) / 1e9:.3g} GB for {name}, there is room for "
                f"{room / 1e9:.3g} GB. Raise it, or use method='auto'."
            )
        use_ghost = False
    if use_ghost:
        return [whole], ghost
    held = factored and _bytes(Piece(name, (0, C), False, True), layout, both, item) < _bytes(
        Piece(name, (0, C), False, False), layout, both, item
    )
    parts = 1
    while True:
        height = -(-C // parts)
        spans = [(a, min(a + height, C)) for a in range(0, C, height)]
        pieces = [Piece(name, span, False, held) for span in spans]
        if max(_bytes(piece, layout, both, item) for piece in pieces) <= room:
            return pieces, materialised
        if height == 1:
            raise UserError(
                f"memory_budget: one row of {name} for {sum(s.sequences for s in both)} sequences takes "
                f"{_bytes(pieces[0], layout, both, item) / 1e9:.3g} GB, and {room / 1e9:.3g} GB are left for it. Raise the budget, or use "
                "fewer sequences."
            )
        parts = min(2 * parts, C)


def _bytes(
    piece: Piece, layout: Layout, both: list[Side], item: int, there: frozenset[int] = frozenset()
) -> float:
    """What is kept of one piece for all sequences, but for right sides that are there already."""
    height, D = piece.span[1] - piece.span[0], layout.D
    total = 0.0
    for s in both:
        if piece.held or "held" in layout.terms:
            total += s.sequences * height * (D * item + 8)
            continue
        for kind, in_head, right in zip(layout.terms, layout.in_head, layout.right, strict=True):
            width = (0 if right in there else D * item) + (height * item if kind == "dense" else 8)
            total += _tokens(in_head, s) * width
    return total


def _grouped(
    pieces: list[Piece], layouts: dict[str, Layout], both: list[Side], item: int, room: float
) -> tuple[tuple[tuple[Piece, ...], ...], float]:
    """Neighbours together, as many as fit; and the bytes of the largest group."""
    groups: list[list[Piece]] = []
    sizes: list[float] = []
    there: frozenset[int] = frozenset()
    for piece in pieces:
        layout = layouts[piece.name]
        more = _bytes(piece, layout, both, item, there)
        again = bool(groups) and any(piece.name == other.name for other in groups[-1])
        if not groups or again or sizes[-1] + more > room:
            groups.append([])
            more = _bytes(piece, layout, both, item)
            sizes.append(0.0)
            there = frozenset()
        groups[-1].append(piece)
        sizes[-1] += more
        if not piece.held:
            there |= frozenset(layout.right)
    return tuple(map(tuple, groups)), max(sizes)


def check_preconditioner(policy: Policy, preconditioner: Parameters | None) -> Parameters | None:
    """P on the policy's device and in its dtype.

    Raises:
        UserError: other names or shapes than the policy's parameters, entries that are not positive and finite.
    """
    if preconditioner is None:
        return None
    missing, extra = (
        policy.params.keys() - preconditioner.keys(),
        preconditioner.keys() - policy.params.keys(),
    )
    if missing or extra:
        raise UserError(
            f"preconditioner: expected exactly the {len(policy.params)} names in policy.params; missing {sorted(missing)[:3]}, unknown "
            f"{sorted(extra)[:3]}. UpdateDirection.preconditioner of the same parameters has them."
        )
    for name, p in policy.params.items():
        _check_positive(name, preconditioner[name], p)
    return {name: preconditioner[name].to(p.device, p.dtype) for name, p in policy.params.items()}


def _check_positive(name: str, x: Tensor, p: Tensor) -> None:
    if x.shape != p.shape:
        raise UserError(
            f"preconditioner[{name!r}]: got shape {tuple(x.shape)}, expected {tuple(p.shape)}, one number for every parameter: P itself, "
            "such as UpdateDirection.preconditioner."
        )
    if not bool(((x > 0) & x.isfinite()).all()):
        raise UserError(
            f"preconditioner[{name!r}]: expected positive finite numbers (P itself, applied once); they go from {float(x.min()):.3g} "
            f"to {float(x.max()):.3g}. Pass 1/(√v̂ + ε) with ε > 0."
        )
