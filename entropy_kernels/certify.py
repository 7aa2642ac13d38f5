r"""Check a model's derivatives before trusting them, and name the layer that is wrong.

Wrong derivatives are mostly silent: an operator without a forward rule has a tangent of zero, a nested rule loses its outer level.
With f a fixed random mix of the entropies and logprobs of one short sequence, and v a random direction scaled like the parameters:

    the model itself, in its own dtype        f'·v = ⟨∇f, v⟩                         forward mode against reverse mode
                                              (f'·v)'·v = ⟨(∇f)'·v, v⟩               forward over forward against forward over reverse
    two of its layers, in float64             f'·v and (f'·v)'·v against finite differences, float32 casts lifted

Before, the values: entropies and logprobs against those of the model called on its own, with nothing but the token ids.
If a derivative fails, every module is tested alone on the inputs it saw, innermost first, and the first bad one is named.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from entropy_kernels.errors import CertificationError
from entropy_kernels.functional import entropy_logprob
from entropy_kernels.policy import MicroBatch, Parameters, Policy, TokenBatch, micro_batches
from entropy_kernels.rewrites import Rewrites

_func: Any = torch.func  # its type stubs do not know that has_aux decides how many results there are
_LENGTH = 12
# allowed error of first and second derivatives, one mode against another
_EXACT = {torch.float64: (1e-9, 1e-8), torch.float32: (3e-4, 3e-3)}
_DIFFERENCES = (1e-7, 1e-6)  # the same for finite differences in float64
_VALUES = 1e-3  # relative; rounding of deep float32 models stays well below
# Truncation stays below the bounds for most models with the first step and for stiff ones with the second, rounding in float64
# with both; a wrong derivative is wrong with either.
_STEPS = (2e-4, 2.5e-5)
_TINY = 1e-12

Scalar = Callable[[Parameters], Tensor]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Relative errors that were found, each against the size of the quantity checked; all passed."""

    first: float  # forward against reverse, working dtype
    second: float  # forward over forward against forward over reverse, working dtype
    first_difference: float  # forward mode against finite differences, float64, two layers
    second_difference: float

    def to_json(self) -> dict[str, float]:
        """The four errors by name."""
        return asdict(self)


def certify(policy: Policy, batch: TokenBatch | None = None) -> Certificate:
    """Raise unless the policy's first and second derivatives are right; see the module's docstring for what is compared.

    Args:
        policy: the model and its parameters; a truncated one is checked by its full law, as truncation adds nothing to be derived.
        batch: where to take the short sequence from; without it, twelve token ids spread over the vocabulary, padding aside.

    Returns:
        The errors found.

    Raises:
        CertificationError: naming the layer, what was compared and by how much it is off.
    """
    policy = policy.full()  # the sequence below need not lie in the sets that are kept
    ids = _short_sequence(policy, batch)
    micro = _micro(policy, ids)
    _check_repeatable(policy, micro)
    _check_values(policy, micro)
    first, second = _forward_against_reverse(_mix(policy, micro), policy.params)
    small, small_ids = _two_layers(policy, ids)
    differences = _forward_against_differences(_mix(small, _micro(small, small_ids)), small.params)
    errors = {
        "forward against reverse mode": (first, _EXACT[policy.dtype][0]),
        "forward-over-forward against forward-over-reverse mode": (second, _EXACT[policy.dtype][1]),
        "forward mode against finite differences": (differences[0], _DIFFERENCES[0]),
        "forward-over-forward mode against finite differences": (differences[1], _DIFFERENCES[1]),
    }
    for what, (error, bound) in errors.items():
        if not error <= bound:
            layer = _find_culprit(policy, micro)
            raise CertificationError(
                f"certify: {layer} has a wrong or missing derivative: {what} differs by {error:.2g} of its size, at most {bound:.0e} "
                "is allowed. A custom operator without a forward-mode rule, or a rule that loses nested derivatives, is the usual "
                "cause; replace the layer by plain torch operations, or give its autograd.Function a jvp that calls another Function."
            )
    return Certificate(
        first=first, second=second, first_difference=differences[0], second_difference=differences[1]
    )


def _short_sequence(policy: Policy, batch: TokenBatch | None) -> Tensor:
    if batch is None:
        # a row of zeros, as padding has that was never trained, is where a norm has no second derivative to speak of
        rows = policy.model.get_input_embeddings().weight.ne(0).any(dim=1).nonzero().flatten().cpu()
        return rows[torch.linspace(0, len(rows) - 1, _LENGTH).long()]
    lengths = batch.attention_mask.bool().sum(1)
    shortest = int(lengths.argmin())
    return batch.input_ids[shortest][batch.attention_mask[shortest].bool()][-_LENGTH:].cpu()


def _micro(policy: Policy, ids: Tensor) -> MicroBatch:
    response = torch.ones(1, len(ids), dtype=torch.bool)
    response[:, 0] = False
    batch = TokenBatch(
        ids.unsqueeze(0), torch.ones_like(response), response, torch.zeros(1, dtype=torch.int64)
    )
    return next(iter(micro_batches(policy, batch)))


def _check_repeatable(policy: Policy, micro: MicroBatch) -> None:
    with torch.no_grad():
        once, twice = (policy.rows(policy.params, micro)[0] for _ in range(2))
    if not bool(torch.isfinite(once).all()):
        raise CertificationError(
            "certify: the model gives entropies that are not finite on a short sequence. Check the weights for NaN or infinity."
        )
    if not torch.equal(once, twice):
        raise CertificationError(
            "certify: two forward passes over one sequence differ, so the model is not a function of its parameters. Turn off dropout "
            "and any other source of randomness."
        )


def _check_values(policy: Policy, micro: MicroBatch) -> None:
    """Positions, mask and output layer that we give the model must be those it takes by itself."""
    row, column = micro.source
    with torch.no_grad(), Rewrites(float64=policy.dtype == torch.float64):
        logits = _func.functional_call(
            policy.model, policy.params, (), {"input_ids": micro.input_ids, "use_cache": False}
        ).logits[row, column]
        want: Any = entropy_logprob(logits, micro.targets, temperature=policy.temperature)
        got = policy.rows(policy.params, micro)
    for name, ours, own in (("entropy", got[0], want.entropy), ("logprob", got[1], want.logprob)):
        error = ((ours - own).abs() / (1 + own.abs())).max().item()
        if not error <= _VALUES:
            raise CertificationError(
                f"certify: {type(policy.model).__name__} by itself gives another {name} than the policy does, by {error:.2g} relative "
                f"(at most {_VALUES:.0e} is allowed): it uses a mask, positions or an output layer that this version does not know."
            )


def _direction(params: Parameters) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    scaled = {}
    for name, p in params.items():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
        scaled[name] = noise * p.square().mean().sqrt().clamp_min(1e-3)
    return scaled


def _mix(policy: Policy, micro: MicroBatch) -> Scalar:
    """f(θ) = Σ_k (1 + k mod 3)(H_k − S_k/2): one number with no symmetry that could hide an error."""

    def f(params: Parameters) -> Tensor:
        entropy, logprob = policy.rows(params, micro)
        weight = 1 + torch.arange(len(entropy), device=entropy.device) % 3
        return (weight * (entropy - logprob / 2)).sum()

    return f


def _forward_against_reverse(f: Scalar, point: Parameters) -> tuple[float, float]:
    v = _direction(point)

    def along(p: Parameters) -> Tensor:
        return _func.jvp(f, (p,), (v,))[1]

    try:
        forward, forward_forward = _func.jvp(along, (point,), (v,))
        gradient, product = _func.jvp(_func.grad(f), (point,), (v,))
    except (RuntimeError, NotImplementedError):
        return (
            math.inf,
            math.inf,
        )  # an operator says that it lacks a rule: as wrong as one that does not say so
    return _compare(forward, gradient, v), _compare(forward_forward, product, v)


def _compare(forward: Tensor, reverse: Parameters, v: Parameters) -> float:
    """|forward − ⟨reverse, v⟩| over the root of the summed squares of the parts, one part per tensor."""
    parts = torch.stack([(reverse[name].double() * v[name].double()).sum() for name in v])
    size = (
        parts.square().sum().sqrt().clamp_min(_TINY)
    )  # a layer that is constant in v has nothing to be relative to
    return ((forward.double() - parts.sum()).abs() / size).item()


def _forward_against_differences(f: Scalar, point: Parameters) -> tuple[float, float]:
    """Errors of f' and f'' along v against differences of f and of f', five-point rule: relative error of order step⁴."""
    v = _direction(point)
    zero = torch.zeros((), dtype=torch.float64, device=next(iter(point.values())).device)
    one = torch.ones_like(zero)

    def along(eta: Tensor) -> Tensor:
        return f({name: p + eta * v[name] for name, p in point.items()})

    def first(eta: Tensor) -> Tensor:
        return _func.jvp(along, (eta,), (one,))[1]

    def difference(g: Callable[[Tensor], Tensor], step: float) -> Tensor:
        at = {k: g(zero + k * step).detach() for k in (-2, -1, 1, 2)}
        return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)

    try:
        slope, bend = _func.jvp(first, (zero,), (one,))
    except (RuntimeError, NotImplementedError):
        return math.inf, math.inf  # as in `_forward_against_reverse`
    size = along(zero).abs() + slope.abs() + bend.abs() + _TINY
    best = math.inf, math.inf
    for step in _STEPS:
        found = [
            ((exact - difference(g, step)).abs() / size).item()
            for exact, g in ((slope, along), (bend, first))
        ]
        best = min(best[0], found[0]), min(best[1], found[1])
        if best[0] <= _DIFFERENCES[0] and best[1] <= _DIFFERENCES[1]:
            break
    return best


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise CertificationError(
            f"certify: {type(model).__name__} has no list of layers; expected a decoder with one."
        )
    return max(lists, key=lambda item: len(item[1]))


@contextlib.contextmanager
def _cut(model: Any, kept: Tensor | None, measured: Parameters) -> Iterator[None]:
    """Within: the model has two of its layers and the vocabulary `kept`, so that a copy is small; tied weights stay tied.

    They are the first two, but layers with measured parameters come before others.
    """
    name, layers = _layers(model)
    prefixes = {i: f"{name}.{i}." for i in range(len(layers))}
    unmeasured = [i for i, prefix in prefixes.items() if not any(p.startswith(prefix) for p in measured)]
    chosen = sorted(([i for i in prefixes if i not in unmeasured] + unmeasured)[:2])
    parent = model.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole = [
        (module, name, p)
        for module in (embedding, head)
        for name, p in module._parameters.items()
        if p is not None
    ]
    setattr(parent, attribute, nn.ModuleList(layers[i] for i in chosen))
    if kept is not None:
        cut = {p: nn.Parameter(p.detach()[kept]) for _, _, p in whole}
        for module, parameter, p in whole:
            setattr(module, parameter, cut[p])
    try:
        yield
    finally:
        setattr(parent, attribute, layers)
        for module, parameter, p in whole:
            setattr(module, parameter, p)


def _two_layers(policy: Policy, ids: Tensor) -> tuple[Policy, Tensor]:
    """A float64 copy of two layers, all its parameters measured, with only the vocabulary that the sequence and a few more tokens need."""
    model = policy.model
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    kept = None
    if isinstance(tables[0], nn.Embedding) and type(tables[1]) is nn.Linear:
        some = torch.arange(min(64, len(tables[0].weight)))
        kept, renamed = torch.unique(torch.cat([ids, some]), return_inverse=True)
        kept, ids = kept.to(policy.device), renamed[: len(ids)]
    with _cut(model, kept, policy.params):
        small = copy.deepcopy(model)
    config = small.config.get_text_config()
    config.num_hidden_layers = min(2, config.num_hidden_layers)
    if kept is not None:
        config.vocab_size = len(kept)
    small = small.double().requires_grad_(False)
    params = {name: p.detach() for name, p in small.named_parameters()}
    return replace(policy, model=small, tokenizer=None, params=params), ids


def _find_culprit(policy: Policy, micro: MicroBatch) -> str:
    """The innermost module whose own derivatives are wrong, tested in float64 on the inputs it saw."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: seen.setdefault(name, (args, kwargs)) and None,
            with_kwargs=True,
        )
        for name, module in policy.model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            policy.rows(policy.params, micro)
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(policy.model.named_modules())
    for name in sorted(seen, key=lambda name: -name.count(".")):
        module, (args, kwargs) = modules[name], seen[name]
        first, second = _module_errors(module, args, kwargs)
        if not (first <= _DIFFERENCES[0] and second <= _DIFFERENCES[1]):
            return f"layer {name} ({type(module).__name__})"
    return f"{type(policy.model).__name__}, outside any one of its modules,"


def _module_errors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """Errors of a module's own first and second derivatives, forward and reverse, against finite differences in float64."""
    alone = copy.deepcopy(module).double()
    leaves, structure = tree_flatten((args, kwargs))
    real = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    inputs = {f"input {i}": leaves[i].detach().double() for i in real}
    params = {name: p.detach() for name, p in alone.named_parameters()}

    def f(at: Parameters) -> Tensor:
        filled = list(leaves)
        for i in real:
            filled[i] = at[f"input {i}"]
        new_args, new_kwargs = tree_unflatten(filled, structure)
        with Rewrites(float64=True):
            out = _func.functional_call(alone, {name: at[name] for name in params}, new_args, new_kwargs)
        flat = torch.cat(
            [x.reshape(-1) for x in tree_flatten(out)[0] if isinstance(x, Tensor) and x.is_floating_point()]
        )
        return (flat * torch.linspace(-1, 1.5, flat.numel(), dtype=flat.dtype, device=flat.device)).sum()

    modes = _forward_against_reverse(f, inputs | params)
    differences = _forward_against_differences(f, inputs | params)
    return max(modes[0], differences[0]), max(modes[1], differences[1])
