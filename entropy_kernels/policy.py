r"""A Hugging Face causal LM as a pure function of its parameters: θ, token ids → (entropy, logprob) of every response token.

    π_θ(t_k | t_<k, p) = softmax(z_k/τ)[t_k],   S_k = log π(t_k | t_<k, p),   H_k = entropy of π(· | t_<k, p)

The output layer sees response positions only, a chunk at a time. Batches may be padded on either side: each sequence is packed
to the left before the model runs, so padding can never change a result (docs/theory.md, section 1).

Legend: N sequences, T padded width of the caller's batch; n sequences, L width of a micro-batch; R response tokens in it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_kernels import attention
from entropy_kernels.checkpoints import adapter_directory, base_with_adapter, load_model
from entropy_kernels.errors import UserError
from entropy_kernels.functional import entropy_logprob
from entropy_kernels.rewrites import Rewrites
from entropy_kernels.selection import select_parameters

Parameters = dict[str, Tensor]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_HEAD_ELEMENTS = 1 << 24  # logits held at once by one chunk of the output layer: 64 MB in float32


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


class _Rows(nn.Module):
    """The model up to (entropy, logprob) of the response tokens, as one module, so that one call swaps all its parameters."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model: Any = policy.model
        self.logits_of = policy.logits_of
        self.temperature = policy.temperature

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        base = self.model.base_model
        options: dict[str, Any] = {"attention_mask": micro.mask, "position_ids": micro.position_ids}
        if "position_ids" not in inspect.signature(base.forward).parameters:
            del options["position_ids"]  # such a model counts from 0 by itself, and so do packed sequences
        hidden = base(input_ids=micro.input_ids, use_cache=False, **options).last_hidden_state
        hidden = hidden[micro.source]
        head = self.model.get_output_embeddings()
        rows = max(1, _HEAD_ELEMENTS // self.model.config.vocab_size)
        entropies: list[Tensor] = []
        logprobs: list[Any] = []
        for chunk, targets in zip(hidden.split(rows), micro.targets.split(rows), strict=True):
            result = entropy_logprob(self.logits_of(head(chunk)), targets, temperature=self.temperature)
            entropies.append(result.entropy)
            logprobs.append(result.logprob)
        return torch.cat(entropies), torch.cat(logprobs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A causal LM, its measured parameters θ as a plain dictionary, and the temperature that is part of the policy.

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

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        adapter: str | None = None,
        temperature: float = 1.0,
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
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
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
        parameters: str = "all",
        micro_batch_tokens: int = 2048,
    ) -> Policy:
        """Wrap a loaded model. It is put into evaluation mode and given `attention.plain_attention`; weights are not copied.

        A mixture of experts is differentiated with the experts of every token held fixed. A `peft.PeftModel` with one LoRA adapter
        is unwrapped: parameters then have the names they have in its base model, `….lora_A.default.weight`.

        Raises:
            UserError: a temperature that is not positive, weights in 16 bits, a selection of parameters that selects nothing (`parameters`
                is as in `from_pretrained`), or logits that are more than the output layer of the last hidden state, a constant factor
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
        scale, softcap = _declared_head(model)
        policy = cls(
            model=model,
            tokenizer=tokenizer,
            params=params,
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            padding_idx=padding_idx,
            logit_scale=scale,
            softcap=softcap,
        )
        windows = _check_head(policy)
        return replace(policy, longest=_longest(model, windows))

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within: reverse mode leaves out the input embedding of the padding token, as training does.

        An embedding made with a padding index drops that row's gradient even where the token is a real one, such as an
        end-of-turn token in a prompt. The true derivative has it, so it is switched off but for the trainer's own gradient.
        """
        _set_padding_idx(self.model, self.padding_idx)
        try:
            yield
        finally:
            _set_padding_idx(self.model, None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of every result."""
        return next(iter(self.params.values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device

    def shifted(self, direction: Parameters, eta: float) -> Policy:
        """The policy at θ + ηv, rounded to the parameters' dtype; θ itself is left alone."""
        check_direction(self, direction)
        return replace(
            self, params={name: p.add(direction[name], alpha=eta) for name, p in self.params.items()}
        )

    def logits_of(self, output: Tensor) -> Tensor:
        """Logits [..., V] from what the output layer gives: z = scale·output, then c·tanh(z/c) where there is a soft cap c."""
        z = output if self.logit_scale == 1.0 else output * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def rows(self, params: Parameters, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(entropy, logprob) [R] of a micro-batch's response tokens as a function of `params`; every derivative exists."""
        module = _Rows(self)
        named = {f"model.{name}": value for name, value in params.items()}
        with Rewrites(float64=self.dtype == torch.float64):
            return torch.func.functional_call(module, named, (micro,), tie_weights=True)


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


def _declared_head(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits as the config says; `_check_head` compares them with what the model does."""
    config = model.config.get_text_config()
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    scale = (factor if isinstance(factor, int | float) else 1.0) / (divisor or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _check_head(policy: Policy) -> list[int | None]:
    """The model's logits must be `logits_of` its output layer, and that must read the last hidden state.

    The output layer's result is replaced by a ramp wide enough to bend under any soft cap, so that what the model does to it shows
    whatever the weights are. Returns the sliding window of every attention layer.
    """
    model, ids = policy.model, torch.arange(1, 5, device=policy.device)
    ids = ids.remainder(model.get_input_embeddings().weight.shape[0]).unsqueeze(0)
    hidden: list[Tensor] = []
    read: list[Tensor] = []
    ramps: list[Tensor] = []

    def ramp(_m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        end = 3 * max(30.0, policy.softcap or 0.0) / min(1.0, policy.logit_scale)
        wide = torch.linspace(-end, end, output.numel(), device=output.device, dtype=output.dtype)
        read.append(inputs[0])
        ramps.append(wide.reshape(output.shape))
        return ramps[-1]

    bodies = [model.base_model, getattr(model.base_model, "decoder", None)]  # OPT calls the inner one
    handles = [
        m.register_forward_hook(lambda _m, _i, output: hidden.append(output[0]))
        for m in bodies
        if m is not None
    ]
    handles.append(model.get_output_embeddings().register_forward_hook(ramp))
    try:
        with torch.no_grad(), attention.windows() as windows:
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not windows:
        raise UserError(
            f"model: {type(model).__name__} has no attention that transformers lets one choose (AttentionInterface), so ours, whose "
            "derivatives all exist, cannot be put in. Use a model of another family; README.md lists those that are tested."
        )
    sound = len(ramps) == 1 and len(hidden) == 1 and torch.equal(read[0], hidden[0])
    if sound:
        expected = policy.logits_of(ramps[0])
        sound = logits.shape == expected.shape and bool(
            ((logits - expected).abs() <= 1e-5 * expected.abs().max()).all()
        )
    if not sound:
        raise UserError(
            f"model: {type(model).__name__} changes its last hidden state before, or its logits after the output layer, in a way that "
            f"this version does not measure. Expected {_formula(policy)} of the output layer, as the config says. Use a model whose "
            "logits are the output layer, but for a constant scale (logits_scaling, logit_scale) or final_logit_softcapping."
        )
    return windows


def _formula(policy: Policy) -> str:
    scaled = "the plain result" if policy.logit_scale == 1.0 else f"{policy.logit_scale:g} times the result"
    return scaled if policy.softcap is None else f"{scaled}, soft-capped at {policy.softcap:g},"


def _longest(model: Any, windows: list[int | None]) -> int | None:
    """Tokens that fit: learned positions end somewhere, and a window that no layer passes on is not applied beyond its width."""
    config = model.config.get_text_config()
    limits = []
    end = getattr(config, "max_position_embeddings", None)
    tables = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()
    ]
    if end is not None and any(end <= len(m.weight) <= end + 8 for m in tables):  # OPT keeps two rows spare
        limits.append(int(end))
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None:
        expected = [types is None or kind == "sliding_attention" for kind in types or windows]
        if [w is not None for w in windows] != expected:
            limits.append(int(window))
    if "chunked_attention" in (types or ()):
        limits.append(int(config.attention_chunk_size))
    return min(limits, default=None)
