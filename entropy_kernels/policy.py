r"""A Hugging Face causal LM as a pure function of its parameters: θ, token ids → (entropy, logprob) of every response token.

    π_θ(t_k | t_<k, p) = softmax(z_k/τ)[t_k],   S_k = log π(t_k | t_<k, p),   H_k = entropy of π(· | t_<k, p)

The output layer sees response positions only, a chunk at a time. Batches may be padded on either side: each sequence is packed
to the left before the model runs, so padding can never change a result (docs/theory.md, section 1).

Legend: N sequences, T padded width of the caller's batch; n sequences, L width of a micro-batch; R response tokens in it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_kernels import attention
from entropy_kernels.checkpoints import adapter_directory, base_with_adapter, load_model
from entropy_kernels.errors import UserError
from entropy_kernels.functional import EntropyLogprob, TruncatedEntropy, entropy_logprob, truncated_entropy
from entropy_kernels.head import check_head, declared_head, logits_of, longest_sequence
from entropy_kernels.rewrites import Rewrites
from entropy_kernels.selection import select_parameters
from entropy_kernels.truncation import Kept, Truncation, truncation

Parameters = dict[str, Tensor]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
HEAD_ELEMENTS = 1 << 24  # logits held at once by one chunk of the output layer: 64 MB in float32


class TokenBatch(NamedTuple):
    """Sequences on a grid; padding may be on either side.

    input_ids [N, T] integer; attention_mask [N, T] true on prompt and response tokens; response_mask [N, T] true on response tokens
    (the first end-of-sequence token included); prompt_index [N], equal for responses to the same prompt.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    prompt_index: Tensor


class MicroBatch(NamedTuple):
    """A few sequences packed to the left, and where their response tokens come from and go to."""

    input_ids: Tensor  # [n, L]
    position_ids: Tensor  # [n, L]
    mask: Tensor  # [n, 1, L, L] bool; the diagonal is always true
    source: tuple[
        Tensor, Tensor
    ]  # (sequence, position) [R] of the hidden state that predicts each response token
    targets: Tensor  # [R]
    destination: tuple[Tensor, Tensor]  # (row, column) [R] in the caller's [N, T] grid


class SupportRows(NamedTuple):
    """What a truncated policy keeps, at each response token of a micro-batch, [R]; S is the set kept at θ (`Policy.support`)."""

    entropy: Tensor  # H(p_S/s), nats
    logprob: Tensor  # log p_y − log s, nats
    full_entropy: Tensor  # H(p), nats
    kept_mass: Tensor  # s
    kept_count: Tensor  # |S|
    moved: Tensor  # bool: these parameters, asked by themselves, would keep another set than S
    at_edge: Tensor  # bool: the token belongs to S by a rounding error (`truncation`)


class _Hidden(nn.Module):
    """The model up to the last hidden state of the response tokens [R, D], as one module, so that one call swaps all its parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, micro: MicroBatch) -> Tensor:
        base = self.model.base_model
        options: dict[str, Any] = {"attention_mask": micro.mask, "position_ids": micro.position_ids}
        if "position_ids" not in inspect.signature(base.forward).parameters:
            del options["position_ids"]  # such a model counts from 0 by itself, and so do packed sequences
        hidden: Tensor = base(input_ids=micro.input_ids, use_cache=False, **options).last_hidden_state
        return hidden[micro.source]


class _Rows(nn.Module):
    """The same up to the output layer, and what `each` makes of that layer's result, a few response tokens at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self, micro: MicroBatch, each: Callable[[slice, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        hidden = _Hidden(self.model)(micro)
        head = self.model.get_output_embeddings()
        size = max(1, HEAD_ELEMENTS // self.model.config.vocab_size)
        starts = range(0, len(hidden), size)
        chunks = [each(slice(i, i + size), head(hidden[i : i + size])) for i in starts]
        return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A causal LM, its measured parameters θ as a plain dictionary, and the temperature and truncation that are part of the policy.

    `params` are by the model's own names, without gradient, tied weights once; all others are constants (`selection` says which are
    which). `shifted` gives the same model elsewhere.
    `micro_batch_tokens` bounds n·L of a micro-batch.
    """

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    params: Parameters
    temperature: float = 1.0
    micro_batch_tokens: int = 2048
    padding_idx: int | None = None  # see `as_trained`
    logit_scale: float = 1.0  # see `logits_of`
    softcap: float | None = None
    longest: int | None = None  # tokens of the longest sequence it can be measured on, None for any
    truncation: Truncation | None = None  # None for the full law
    anchor: Parameters | None = (
        None  # θ where `params` are not θ: a truncated policy's sets are those kept there
    )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        adapter: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        parameters: str = "all",
        dtype: str = "float32",
        device: str | None = None,
        micro_batch_tokens: int = 2048,
        base: str | None = None,
    ) -> Policy:
        """Load a model for measuring: evaluation mode, differentiable attention, float32 or float64.

        Args:
            path_or_id: model or checkpoint directory, PEFT adapter directory, .gguf file, or hub id.
            adapter: PEFT LoRA directory, to be put into the model at `path_or_id`. An adapter's directory as `path_or_id` names its
                base model itself, or `base` does.
            temperature: τ; the policy is softmax(z/τ).
            top_k: truncate it to the most probable tokens, so many; None for no limit.
            top_p: then to the fewest of these that hold this share of their probability; None for no limit.
            parameters: what is measured: "all" that training moves (with an adapter that is the adapter, with its modules_to_save and
                biases), "lora" (A and B alone), or a regular expression searched for in every parameter name.
            dtype: "float32" or "float64". Files in 16 bits are read exactly; arithmetic is in this dtype.
            device: None for a GPU where there is one.
            micro_batch_tokens: tokens in one micro-batch.
            base: where the tokenizer comes from if the directory has none; for an adapter's directory its base model.

        Raises:
            UserError: 16-bit arithmetic, a model or adapter that cannot be loaded or is of a kind that is not measured, a selection of
                parameters that selects nothing.
        """
        if dtype not in _DTYPES:
            raise UserError(
                f"dtype: got {dtype!r}, expected 'float32' or 'float64'. Casting the weights to 16 bits makes another model, whose "
                "entropy derivative differs by several per cent."
            )
        chosen = _check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source, base = (path_or_id, base) if adapter is None else (adapter, path_or_id)
        if adapter is not None and adapter_directory(adapter) is None:
            raise UserError(
                f"adapter: {adapter!r} has no adapter_config.json; expected the directory of a PEFT LoRA adapter. A full model is passed "
                "as the first argument alone."
            )
        model, tokenizer = load_model(source, dtype=_DTYPES[dtype], device=chosen, base=base)
        return cls.from_model(
            model,
            tokenizer,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            parameters=parameters,
            micro_batch_tokens=micro_batch_tokens,
        )

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        parameters: str = "all",
        micro_batch_tokens: int = 2048,
    ) -> Policy:
        """Wrap a loaded model. It is put into evaluation mode and given `attention.plain_attention`; weights are not copied.

        A mixture of experts is differentiated with the experts of every token held fixed. A `peft.PeftModel` with one LoRA adapter
        is unwrapped: parameters then have the names they have in its base model, `….lora_A.default.weight`.
        The other arguments are those of `from_pretrained`.

        Raises:
            UserError: a temperature that is not positive, a truncation that leaves no choice, weights in 16 bits, a selection of parameters
                that selects nothing, or logits that are more than the output layer of the last hidden state, a constant factor
                and a soft cap that the config declares.
        """
        if not temperature > 0:
            raise UserError(
                f"temperature: got {temperature}, expected a positive number. Greedy decoding (temperature 0) has no entropy to measure."
            )
        model = base_with_adapter(model)
        _check_dtypes(model)
        params = select_parameters(model, parameters)
        model.eval().requires_grad_(False)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(
                "eager"
            )  # the grouped product of experts has no forward-mode rule
        padding_idx = getattr(model.get_input_embeddings(), "padding_idx", None)
        _set_padding_idx(model, None)
        scale, softcap = declared_head(model)
        policy = cls(
            model=model,
            tokenizer=tokenizer,
            params=params,
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            padding_idx=padding_idx,
            logit_scale=scale,
            softcap=softcap,
            truncation=truncation(top_k, top_p),
        )
        windows = check_head(model, scale, softcap)
        return replace(policy, longest=longest_sequence(model, windows))

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within: derivatives in every mode leave out the input embedding of the padding token, as training does.

        An embedding made with a padding index drops that row's gradient even where the token is a real one, such as an
        end-of-turn token in a prompt. The true derivative has it, so it is switched off but for the trainer's own gradient and for
        what its parts are.
        """
        if self.padding_idx is None:
            yield
            return
        index = self.padding_idx

        def constant(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where((arguments[0] == index).unsqueeze(-1), output.detach(), output)

        # An adapter may have wrapped the table, or added a copy that it trains.
        tables = [x for x in self.model.get_input_embeddings().modules() if isinstance(x, nn.Embedding)]
        hooks = [table.register_forward_hook(constant) for table in tables]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of every result."""
        return next(iter(self.params.values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device

    def shifted(self, direction: Parameters, eta: float) -> Policy:
        """The policy at θ + ηv, rounded to the parameters' dtype; θ itself is left alone, and what is truncated stays what it is at θ."""
        check_direction(self, direction)
        moved = {name: p.add(direction[name], alpha=eta) for name, p in self.params.items()}
        return replace(self, params=moved, anchor=self.anchor or self.params)

    def full(self) -> Policy:
        """The same model without truncation."""
        return replace(self, truncation=None, anchor=None)

    def logits_of(self, output: Tensor) -> Tensor:
        """Logits [..., V] from what the output layer gives (`head.logits_of`)."""
        return logits_of(output, self.logit_scale, self.softcap)

    def rows(self, params: Parameters, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(entropy, logprob) [R] of a micro-batch's response tokens as a function of `params`; every derivative exists.

        A truncated policy's are those of the sets it keeps at θ, which do not depend on `params`.
        """
        kept = None if self.truncation is None else self._kept(self.truncation, micro)

        def each(where: slice, output: Tensor) -> tuple[Tensor, Tensor]:
            z = self.logits_of(output)
            targets, temperature = micro.targets[where], self.temperature
            found: EntropyLogprob | TruncatedEntropy
            if kept is None:
                found = entropy_logprob(z, targets, temperature=temperature)
            else:
                S = kept(where).tokens
                found = truncated_entropy(z, targets, kept=S, temperature=temperature, tail=False)
            assert found.logprob is not None  # there are targets
            return found.entropy, found.logprob

        entropy, logprob = self._each(params, micro, each)
        return entropy, logprob

    def support(self, micro: MicroBatch) -> SupportRows:
        """What the truncated policy keeps at each response token of a micro-batch, and its full law beside it.

        Raises:
            UserError: a policy that is not truncated.
        """
        truncation = self.truncation
        if truncation is None:
            raise UserError("policy: it is not truncated; pass top_k or top_p when it is made.")
        kept = self._kept(truncation, micro)

        def each(where: slice, output: Tensor) -> tuple[Tensor, ...]:
            z, targets = self.logits_of(output), micro.targets[where]
            S, own = kept(where), truncation.kept_with(z, targets, self.temperature)
            t = truncated_entropy(z, targets, kept=S.tokens, temperature=self.temperature)
            assert t.logprob is not None  # there are targets
            assert t.full_entropy is not None and t.kept_mass is not None  # and the tail was asked for
            moved = (own.tokens != S.tokens).any(dim=-1)
            return t.entropy, t.logprob, t.full_entropy, t.kept_mass, t.kept_count, moved, S.at_edge

        with torch.no_grad():
            return SupportRows(*self._each(self.params, micro, each))

    def _each(
        self, params: Parameters, micro: MicroBatch, each: Callable[[slice, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        with Rewrites(float64=self.dtype == torch.float64):
            return _call(_Rows(self.model), params, micro, each)

    def _kept(self, truncation: Truncation, micro: MicroBatch) -> Callable[[slice], Kept]:
        """The sets kept at θ, made again for each few rows rather than stored: a set may hold a good part of the vocabulary.

        One more forward pass for each evaluation, by the same operations every time, and so the same sets to the bit.
        """
        θ = self.params if self.anchor is None else self.anchor
        head = self.model.get_output_embeddings()
        name_of = {id(p): name for name, p in self.model.named_parameters()}
        own = {name: θ.get(name_of[id(p)], p) for name, p in head.named_parameters()}
        with torch.no_grad(), Rewrites(float64=self.dtype == torch.float64):
            hidden = _call(_Hidden(self.model), θ, micro)

        def kept(where: slice) -> Kept:
            with torch.no_grad():
                z = self.logits_of(torch.func.functional_call(head, own, (hidden[where],)))
                return truncation.kept_with(z, micro.targets[where], self.temperature)

        return kept


def _call(module: nn.Module, params: Parameters, *inputs: Any) -> Any:
    named = {f"model.{name}": value for name, value in params.items()}
    return torch.func.functional_call(module, named, inputs, tie_weights=True)


def check_direction(policy: Policy, direction: Parameters) -> None:
    """Refuse a direction whose names, shapes or dtypes are not those of the policy's parameters."""
    missing, extra = policy.params.keys() - direction.keys(), direction.keys() - policy.params.keys()
    if missing or extra:
        raise UserError(
            f"direction: expected exactly the {len(policy.params)} names of the policy's parameters; missing {sorted(missing)[:3]}, "
            f"unknown {sorted(extra)[:3]}. Use the names in policy.params, and the same parameters= as when it was made."
        )
    for name, p in policy.params.items():
        if direction[name].shape != p.shape or direction[name].dtype != p.dtype:
            raise UserError(
                f"direction[{name!r}]: got {tuple(direction[name].shape)} {direction[name].dtype}, expected {tuple(p.shape)} "
                f"{p.dtype}. Make the direction with update_direction from the same checkpoint."
            )


def check_batch(batch: TokenBatch) -> None:
    """Refuse a batch that does not describe prompts followed by responses."""
    shape = batch.input_ids.shape
    if len(shape) != 2 or batch.attention_mask.shape != shape or batch.response_mask.shape != shape:
        raise UserError(
            "batch: input_ids, attention_mask and response_mask must have one shape [N, T]; got "
            f"{tuple(shape)}, {tuple(batch.attention_mask.shape)}, {tuple(batch.response_mask.shape)}."
        )
    if batch.prompt_index.shape != shape[:1]:
        raise UserError(
            f"batch: prompt_index must have shape ({shape[0]},), got {tuple(batch.prompt_index.shape)}."
        )
    attended, response = batch.attention_mask.bool(), batch.response_mask.bool()
    if bool((response & ~attended).any()):
        raise UserError(
            "batch: a response token is masked out by attention_mask; response_mask must lie inside attention_mask."
        )
    empty = (~response.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"batch: sequence {empty[0]} has an empty response ({len(empty)} such); drop it, or count its end-of-sequence token as "
            "part of the response."
        )
    first = attended.int().argmax(dim=1)
    if bool(response.gather(1, first.unsqueeze(1)).any()):
        raise UserError(
            "batch: a response starts at the very first token; expected at least one prompt token before it."
        )


def micro_batches(policy: Policy, batch: TokenBatch) -> Iterator[MicroBatch]:
    """Split a batch into micro-batches of sequences of similar length, longest first; the split depends on the batch alone."""
    check_batch(batch)
    lengths = batch.attention_mask.bool().sum(dim=1).cpu()
    if policy.longest is not None and int(lengths.max()) > policy.longest:
        raise UserError(
            f"batch: a sequence has {int(lengths.max())} tokens, but {type(policy.model).__name__} can be measured on at most "
            f"{policy.longest}: it has no positions beyond, or a sliding window or chunk of attention that its layers do not pass on. "
            "Use shorter prompts or responses."
        )
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    start = 0
    while start < len(order):
        width = max(1, int(lengths[order[start]]))
        chosen = order[start : start + max(1, policy.micro_batch_tokens // width)]
        yield _pack(batch, torch.tensor(chosen), width, policy.device)
        start += len(chosen)


def _pack(batch: TokenBatch, chosen: Tensor, width: int, device: torch.device) -> MicroBatch:
    attended = batch.attention_mask[chosen].bool().cpu()
    response = batch.response_mask[chosen].bool().cpu()
    sequence, column = attended.nonzero(as_tuple=True)
    position = attended.long().cumsum(dim=1)[sequence, column] - 1
    ids = torch.zeros(len(chosen), width, dtype=torch.int64)
    ids[sequence, position] = batch.input_ids[chosen].cpu().long()[sequence, column]
    is_token = torch.zeros(len(chosen), width, dtype=torch.bool)
    is_token[sequence, position] = True
    # causal is enough: padding is on the right, so no token can see it, and a padded row sees real tokens and yields no result
    mask = torch.ones(width, width, dtype=torch.bool).tril().expand(len(chosen), 1, width, width)
    kept = response[sequence, column]
    sequence, column, position = sequence[kept], column[kept], position[kept]
    return MicroBatch(
        input_ids=ids.to(device),
        position_ids=torch.arange(width).expand(len(chosen), width).to(device),
        mask=mask.to(device),
        source=(sequence.to(device), (position - 1).to(device)),
        targets=ids[sequence, position].to(device),
        destination=(chosen[sequence], column),
    )


def _check_device(device: str) -> str:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        gpus = f" or cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else ""
        raise UserError(
            f"device: got {device!r}, which this machine or this build of torch does not have; expected cpu{gpus}. Leave it out for the "
            "best there is."
        ) from error
    return device


def _check_dtypes(model: nn.Module) -> None:
    """One dtype throughout, float32 or float64: rounding θ + ηv to 16 bits would lose the step."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(found) != 1 or not found <= _DTYPES.keys():
        raise UserError(
            f"model: its weights are held in {', '.join(sorted(found))}, expected float32 or float64 throughout: steps of a learning rate "
            "are lost when weights are rounded to 16 bits. Convert it (model.float()), or load it with Policy.from_pretrained."
        )


def _set_padding_idx(model: Any, index: int | None) -> None:
    """An adapter may have wrapped the table, or added a copy that it trains."""
    for table in model.get_input_embeddings().modules():
        if isinstance(table, nn.Embedding):
            table.padding_idx = index
