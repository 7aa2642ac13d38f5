r"""Per-sample gradients of S = Σ_k log π(t_k | t_<k, p), layer by layer, from one forward and one backward pass per micro-batch.

    linear [out, in]    G = Σ_k (∂S/∂output)_k ⊗ input_k          bias: Σ_k (∂S/∂output)_k
    Conv1D [in, out]    G = Σ_k input_k ⊗ (∂S/∂output)_k          bias: the same
    embedding           G = Σ_k onehot(id_k) ⊗ (∂S/∂output)_k
    another module      the module alone, pulled back from its own input and (∂S/∂output), sequence by sequence: norms of every kind
    what is left        ∂S_i/∂w through the whole model, once per sequence: mixtures of experts, embeddings with LoRA

The backward pass stops at the layers' outputs and makes no weight gradients: those are made later, a block at a time, from the factors
(`ops.contract`). `survey` proves the list complete on the model at hand: two sequences' gradients, added with random weights, against
the model's own backward pass, parameter by parameter.

Legend: n sequences, L width of a micro-batch; R response tokens in it; C, D the two sides of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_kernels.errors import UserError
from entropy_kernels.ops.contract import Term, materialise
from entropy_kernels.policy import MicroBatch, Parameters, Policy, TokenBatch, micro_batches
from entropy_kernels.rewrites import Rewrites

_func: Any = torch.func  # its type stubs do not know that has_aux decides how many results there are
Span = tuple[int, int]
Progress = Callable[[int], Any]
_ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-3}  # error of a parameter's gradient, relative to its size
_FLOOR = 1e-4  # or to this share of the whole gradient: keys' biases have none but rounding


class Use(NamedTuple):
    """A module that reads a parameter, and how: "linear", "conv", "embedding", "bias" or "own"."""

    module: nn.Module
    own_name: str
    kind: str


class Layout(NamedTuple):
    """One parameter as a matrix [C, D], and the terms its gradient is made of."""

    C: int
    D: int
    terms: tuple[
        str, ...
    ]  # "dense" (left is [t, C]), "ids" (left is a token id), "held" (the gradient itself)
    in_head: tuple[bool, ...]  # per term: only response tokens pass the output layer
    right: tuple[int, ...]  # per term: where its right side is in memory; layers with one input share it


class Survey(NamedTuple):
    """How every measured parameter enters the model, and what one token of a forward pass leaves in memory for the way back."""

    layouts: dict[str, Layout]
    graph_bytes_per_token: float


class _Call(NamedTuple):
    args: tuple[Any, ...]
    output: Tensor
    plain: bool  # called with its input alone, by position


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """[C, D] of a parameter: its first side and all others, a vector in one row."""
    return (1, p.numel()) if p.dim() < 2 else (p.shape[0], p.numel() // p.shape[0])


def only(batch: TokenBatch, chosen: Tensor) -> TokenBatch:
    """The chosen sequences of a batch."""
    return TokenBatch(*(x[chosen.to(x.device)] for x in batch))


def gradients(
    policy: Policy,
    batch: TokenBatch,
    spans: Mapping[str, Span],
    *,
    held: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> dict[str, list[list[Term]]]:
    """∇S of every sequence with respect to the rows `spans` of some parameters: name -> sequence -> terms.

    Args:
        policy: the model and its parameters.
        batch: N sequences.
        spans: name -> [a, b) of C.
        held: names whose gradient is multiplied out at once, where that takes less memory than its factors.
        progress: called after each micro-batch with its number of sequences.
    """
    found: dict[str, list[list[Term]]] = {name: [[] for _ in range(len(batch.input_ids))] for name in spans}
    memory = _Memory()
    for sequences, tile in tiles(policy, batch, spans, held=held):
        copies: dict[Any, Tensor] = {}  # layers with one input share its copy
        for name in spans:
            for row, terms in zip(sequences, tile.pop(name), strict=True):
                found[name][row] = [Term(*(memory.copied(x, copies) for x in term)) for term in terms]
        if progress is not None:
            progress(len(sequences))
    return found


class _Memory:
    """Large blocks that what is kept is copied into.

    Left where they were made, among tensors that come and go, factors would keep an allocator from using again or giving back what lies
    between them: an eighth more than they take themselves, for 64 sequences of a 30-layer model on a CPU.
    """

    block_bytes = (
        256 << 20
    )  # far above what allocators serve from the middle of their heap; touched as it fills

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def copied(self, x: Tensor, copies: dict[Any, Tensor]) -> Tensor:
        """A contiguous copy of x, made once for all who have the same part of the same memory."""
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if key not in copies:
            if self.used + x.nbytes > len(self.block):
                self.block = x.new_empty(max(self.block_bytes, x.nbytes), dtype=torch.uint8)
                self.used = 0
            place = self.block[self.used : self.used + x.nbytes]
            copies[key] = place.view(x.dtype).view(x.shape).copy_(x.detach())
            self.used += -(-x.nbytes // 64) * 64
        return copies[key]


def tiles(
    policy: Policy, batch: TokenBatch, spans: Mapping[str, Span], *, held: frozenset[str] = frozenset()
) -> Iterator[tuple[list[int], dict[str, list[list[Term]]]]]:
    """The same a micro-batch at a time: (its sequences' places in the batch, name -> sequence -> terms)."""
    uses = _uses(policy, spans.keys())
    for micro in micro_batches(policy, batch):
        places = dict(zip(micro.source[0].tolist(), micro.destination[0].tolist(), strict=True))
        tile = _tile(policy, micro, spans, uses, held)
        yield [places[i] for i in range(len(micro.input_ids))], tile


def survey(policy: Policy, batch: TokenBatch) -> Survey:
    """How every measured parameter enters the model, proven on the two longest sequences of the batch that differ.

    Raises:
        UserError: a gradient found layer by layer is not the model's own.
    """
    small = only(batch, _two(batch))
    lengths = small.attention_mask.sum(dim=1)
    weights = torch.tensor([1.0, -0.7], dtype=policy.dtype, device=policy.device)[: len(small.input_ids)]
    leaves = _leaves(policy, policy.params.keys())
    spans = {name: (0, matrix_shape(p)[0]) for name, p in policy.params.items()}
    total: Any = 0
    weightless = [*policy.model.parameters(), *leaves.values()]
    kept = {x.untyped_storage().data_ptr(): 0 for x in weightless}
    storages: list[Any] = []  # alive until counted, so that no address stands for two

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            storages.append(storage)
        return x

    for micro in micro_batches(policy, small):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            _, logprob = policy.rows(leaves, micro)
        places = micro.destination[0].to(policy.device)
        total = total + (logprob * weights[places]).sum()
    per_token = sum(kept.values()) / float(lengths.sum())
    storages.clear()
    exact = dict(
        zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True)
    )
    norm = sum(float(g.double().square().sum()) for g in exact.values() if g is not None) ** 0.5
    layouts = {}
    head = _head_modules(policy)
    uses = _uses(policy, policy.params.keys())
    for name, samples in gradients(policy, small, spans).items():
        C, D = matrix_shape(policy.params[name])
        G = materialise(samples, 0, C, 0, policy.params[name].new_empty(len(samples), C, D))
        got = (weights @ G.flatten(1)).double()
        reference = exact[name]
        want = torch.zeros_like(got) if reference is None else reference.double().flatten()
        error = float((got - want).norm())
        if not error <= _ALLOWED[policy.dtype] * max(float(want.norm()), _FLOOR * norm):
            raise UserError(
                f"policy: the gradient of {name} by sequence, put together from its layers "
                f"({', '.join(type(u.module).__name__ for u in uses[name]) or 'none known'}), differs from the model's own by "
                f"{error:.2g} of {float(want.norm()):.2g}: it is used in a way that is not seen here. Use method='reference', or "
                "leave the parameter out with parameters=."
            )
        kinds = tuple(_kind_of(term, C) for term in samples[0])
        in_head = tuple(u.module in head for u in uses[name])
        looped = len(in_head) != len(kinds)
        rights = tuple(term.right.data_ptr() for term in samples[0])
        layouts[name] = Layout(C, D, kinds, (False,) * len(kinds) if looped else in_head, rights)
    return Survey(layouts, per_token)


def _two(batch: TokenBatch) -> Tensor:
    """The longest sequence, and the longest whose tokens are not the same: of two that are, one's gradient could pass for the other's."""
    order = batch.attention_mask.sum(dim=1).argsort(stable=True, descending=True).cpu()

    def tokens(i: Tensor) -> tuple[Any, Any]:
        mask = batch.attention_mask[i].bool()
        return batch.input_ids[i][mask].tolist(), batch.response_mask[i][mask].tolist()

    longest = tokens(order[0])
    second = next((i for i in order[1:] if tokens(i) != longest), None)
    return order[:1] if second is None else torch.stack([order[0], second])


def _kind_of(term: Term, C: int) -> str:
    if term.left.is_floating_point():
        return "dense"
    return (
        "held" if len(term.left) == C and bool((term.left == torch.arange(C).to(term.left)).all()) else "ids"
    )


def _uses(policy: Policy, names: Any) -> dict[str, list[Use]]:
    """Every module that owns one of the parameters, tied ones by all their owners."""
    from transformers.pytorch_utils import Conv1D

    first = {id(p): name for name, p in policy.model.named_parameters()}
    found: dict[str, list[Use]] = {name: [] for name in names}
    for module in policy.model.modules():
        for own_name, p in module.named_parameters(recurse=False):
            name = first[id(p)]
            if name not in found:
                continue
            kind = "own"
            if type(module) is nn.Linear:
                kind = "bias" if own_name == "bias" else "linear"
            elif isinstance(module, Conv1D):
                kind = "bias" if own_name == "bias" else "conv"
            elif isinstance(module, nn.Embedding) and (
                type(module) is nn.Embedding or hasattr(module, "embed_scale")
            ):
                kind = "embedding"
            found[name].append(Use(module, own_name, kind))
    return found


def _head_modules(policy: Policy) -> set[nn.Module]:
    return set(policy.model.get_output_embeddings().modules())


def _leaves(policy: Policy, names: Any) -> Parameters:
    return {name: p.detach().requires_grad_(name in names) for name, p in policy.params.items()}


def _tile(
    policy: Policy,
    micro: MicroBatch,
    spans: Mapping[str, Span],
    uses: dict[str, list[Use]],
    held: frozenset[str],
) -> dict[str, list[list[Term]]]:
    calls: dict[nn.Module, list[_Call]] = {u.module: [] for owners in uses.values() for u in owners}

    def remember(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():  # a truncated policy also asks, without gradients, which tokens it keeps
            calls[module].append(_Call(args, output, len(args) == 1 and not named))

    handles = [module.register_forward_hook(remember, with_kwargs=True) for module in calls]
    leaves = _leaves(policy, spans.keys())
    try:
        _, logprob = policy.rows(leaves, micro)
    finally:
        for handle in handles:
            handle.remove()
    where = _Where(policy, micro)
    looped = [name for name in spans if not all(where.follows(u, calls[u.module]) for u in uses[name])]
    looped += [name for name, owners in uses.items() if not owners]
    modules = list(dict.fromkeys(u.module for name in spans if name not in looped for u in uses[name]))
    outputs = [call.output for module in modules for call in calls[module]]
    found: dict[str, list[list[Term]]] = {}
    pulled: Iterator[Any] = iter(())
    if outputs:
        pulled = iter(
            torch.autograd.grad(logprob.sum(), outputs, allow_unused=True, retain_graph=bool(looped))
        )
    deltas = {
        module: [
            d if (d := next(pulled)) is not None else torch.zeros_like(call.output) for call in calls[module]
        ]
        for module in modules
    }
    for name, span in spans.items():
        if name in looped:
            found[name] = _looped(logprob, micro, leaves[name], span, last=name == looped[-1])
            continue
        samples: list[list[Term]] = [[] for _ in range(where.n)]
        for use in uses[name]:
            for terms, own in zip(
                samples, where.terms(use, calls[use.module], deltas[use.module], span, policy), strict=True
            ):
                terms.append(own)
        if name in held:
            samples = [[_multiplied_out(terms, span, leaves[name])] for terms in samples]
        found[name] = samples
    return found


class _Where:
    """Which rows of a module's input and output belong to which sequence of a micro-batch."""

    def __init__(self, policy: Policy, micro: MicroBatch) -> None:
        self.n, self.L = micro.input_ids.shape
        self.head = _head_modules(policy)
        sequence, position = micro.source
        self.rows = torch.bincount(
            sequence, minlength=self.n
        ).tolist()  # of the head, in order of the sequences
        # nothing after the last position that predicts a response token has a gradient
        self.lengths = [int(position[sequence == i].max()) + 1 for i in range(self.n)]

    def follows(self, use: Use, calls: list[_Call]) -> bool:
        """Whether the rows of every call can be told apart by sequence."""
        if not calls or not all(
            c.plain and isinstance(c.args[0], Tensor) and isinstance(c.output, Tensor) for c in calls
        ):
            return False
        if use.module in self.head:
            return use.kind in ("linear", "bias") and sum(len(c.args[0]) for c in calls) == sum(self.rows)
        if len(calls) != 1:
            return False
        (call,) = calls
        if use.kind == "own":
            return call.args[0].dim() >= 3 and len(call.args[0]) == self.n == len(call.output)
        grid = (self.n, self.L)
        return call.args[0].shape[:2] == grid and call.output.shape[:2] == grid and call.output.dim() == 3

    def split(self, module: nn.Module, parts: list[Tensor]) -> list[Tensor]:
        """[t_i, width] for every sequence i."""
        if module in self.head:
            return list((parts[0] if len(parts) == 1 else torch.cat(parts)).split(self.rows))
        return [parts[0][i, : self.lengths[i]] for i in range(self.n)]

    def terms(
        self, use: Use, calls: list[_Call], deltas: list[Tensor], span: Span, policy: Policy
    ) -> list[Term]:
        """One term for every sequence."""
        if use.kind == "own":
            return _own(use, calls[0], deltas[0], span, policy)
        d = self.split(use.module, deltas)
        if use.kind == "bias":
            zero = torch.zeros(1, dtype=torch.int64, device=deltas[0].device)
            return [Term(zero, x.sum(0, keepdim=True)) for x in d]
        x = self.split(use.module, [c.args[0].detach() for c in calls])
        if use.kind == "embedding":
            scale = float(getattr(use.module, "embed_scale", 1.0))
            return [Term(ids, e if scale == 1.0 else e * scale) for ids, e in zip(x, d, strict=True)]
        left, right = (d, x) if use.kind == "linear" else (x, d)
        a, b = span
        if b - a < left[0].shape[1]:
            left = [part[:, a:b].clone() for part in left]  # let the rest go
        return [Term(own, with_) for own, with_ in zip(left, right, strict=True)]


def _own(use: Use, call: _Call, delta: Tensor, span: Span, policy: Policy) -> list[Term]:
    """The module alone as a function of this parameter, pulled back from ∂S/∂output, one sequence at a time."""
    owned = dict(use.module.named_parameters(recurse=False))
    names = {id(p): name for name, p in policy.model.named_parameters()}
    values = {own: policy.params.get(names[id(p)], p.detach()) for own, p in owned.items()}
    found = []
    with Rewrites(float64=policy.dtype == torch.float64):
        for x, d in zip(call.args[0].detach().split(1), delta.split(1), strict=True):

            def alone(w: Tensor, x: Tensor = x) -> Tensor:
                return torch.func.functional_call(use.module, values | {use.own_name: w}, (x,))

            _, pullback = _func.vjp(alone, values[use.own_name])
            found.append(_whole(pullback(d)[0], span))
    return found


def _looped(logprob: Tensor, micro: MicroBatch, leaf: Tensor, span: Span, *, last: bool) -> list[list[Term]]:
    found = []
    count = len(micro.input_ids)
    for i in range(count):
        own = logprob[micro.source[0] == i].sum()
        keep = not (last and i == count - 1)
        (g,) = torch.autograd.grad(own, [leaf], allow_unused=True, retain_graph=keep)
        found.append([_whole(torch.zeros_like(leaf) if g is None else g, span)])
    return found


def _whole(g: Tensor, span: Span) -> Term:
    """A gradient that is held itself."""
    a, b = span
    matrix = g.detach().reshape(matrix_shape(g))
    return Term(torch.arange(a, b, device=g.device), matrix if b - a == len(matrix) else matrix[a:b].clone())


def _multiplied_out(terms: list[Term], span: Span, like: Tensor) -> Term:
    a, b = span
    out = materialise([terms], a, b, a, like.detach().new_empty(1, b - a, matrix_shape(like)[1]))
    return Term(torch.arange(a, b, device=like.device), out[0])
