r"""A Hugging Face causal LM as a pure function of its parameters: θ, token ids → (entropy, logprob) of every response token.

    π_θ(t_k | t_<k, p) = softmax(z_k/τ)[t_k],   S_k = log π(t_k | t_<k, p),   H_k = entropy of π(· | t_<k, p)

The output layer sees response positions only, a chunk at a time. Batches may be padded on either side: each sequence is packed
to the left before the model runs, so padding can never change a result (docs/theory.md, section 1).

Legend: N sequences, T padded width of the caller's batch; n sequences, L width of a micro-batch; R response tokens in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entropy_kernels import attention
from entropy_kernels.checkpoints import load_model
from entropy_kernels.errors import UserError
from entropy_kernels.functional import entropy_logprob

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


class KeepFloat64(TorchFunctionMode):
    """Ignore casts of float64 tensors to float32.

    Model code casts norms, softmax and rotary factors to float32 whatever the model's dtype; in a float64 model this rounds every
    activation and a finite difference sees the rounding instead of the derivative.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with the cast left out."""
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(a for a in args if a is not torch.float32)
                if (
                    len(args) == 1
                    and set(kwargs) <= {"dtype"}
                    and kwargs.get("dtype", torch.float32) is torch.float32
                ):
                    return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class _Rows(nn.Module):
    """The model up to (entropy, logprob) of the response tokens, as one module, so that one call swaps all its parameters."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden = self.model.base_model(
            input_ids=micro.input_ids,
            attention_mask=micro.mask,
            position_ids=micro.position_ids,
            use_cache=False,
        ).last_hidden_state
        hidden = hidden[micro.source]
        head = self.model.get_output_embeddings()
        rows = max(1, _HEAD_ELEMENTS // self.model.config.vocab_size)
        entropies: list[Tensor] = []
        logprobs: list[Any] = []
        for chunk, targets in zip(hidden.split(rows), micro.targets.split(rows), strict=True):
            result = entropy_logprob(head(chunk), targets, temperature=self.temperature)
            entropies.append(result.entropy)
            logprobs.append(result.logprob)
        return torch.cat(entropies), torch.cat(logprobs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A causal LM, its parameters θ as a plain dictionary, and the temperature that is part of the policy.

    `params` are by the model's own names, without gradient, tied weights once; `shifted` gives the same model elsewhere.
    `micro_batch_tokens` bounds n·L of a micro-batch.
    """

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    params: Parameters
    temperature: float = 1.0
    micro_batch_tokens: int = 2048
    padding_idx: int | None = None  # see `as_trained`

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
        """Load a model for measuring: evaluation mode, differentiable attention, all parameters, float32 or float64.

        Raises:
            UserError: something that this version does not measure (adapters, parameter subsets, 16-bit weights), or a model that
                cannot be loaded.
        """
        if adapter is not None or parameters != "all":
            raise UserError(
                f"parameters: got adapter={adapter!r}, parameters={parameters!r}; this version measures full parameters only. "
                "Merge the adapter into the model, and pass parameters='all'."
            )
        if dtype not in _DTYPES:
            raise UserError(
                f"dtype: got {dtype!r}, expected 'float32' or 'float64'. Casting the weights to 16 bits makes another model, whose "
                "entropy derivative differs by several per cent."
            )
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load_model(path_or_id, dtype=_DTYPES[dtype], device=chosen, base=base)
        return cls.from_model(
            model, tokenizer, temperature=temperature, micro_batch_tokens=micro_batch_tokens
        )

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        temperature: float = 1.0,
        micro_batch_tokens: int = 2048,
    ) -> Policy:
        """Wrap a loaded model. It is put into evaluation mode and given `attention.plain_attention`; weights are not copied.

        Raises:
            UserError: a temperature that is not positive, or logits that are more than the output layer of the last hidden state.
        """
        if not temperature > 0:
            raise UserError(
                f"temperature: got {temperature}, expected a positive number. Greedy decoding (temperature 0) has no entropy to measure."
            )
        model.eval().requires_grad_(False)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        embedding = model.get_input_embeddings()
        padding_idx, embedding.padding_idx = getattr(embedding, "padding_idx", None), None
        params = {name: p.detach() for name, p in model.named_parameters()}
        policy = cls(
            model=model,
            tokenizer=tokenizer,
            params=params,
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            padding_idx=padding_idx,
        )
        _check_head(policy)
        return policy

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within: reverse mode leaves out the input embedding of the padding token, as training does.

        An embedding made with a padding index drops that row's gradient even where the token is a real one, such as an
        end-of-turn token in a prompt. The true derivative has it, so it is switched off but for the trainer's own gradient.
        """
        embedding = self.model.get_input_embeddings()
        embedding.padding_idx = self.padding_idx
        try:
            yield
        finally:
            embedding.padding_idx = None

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

    def rows(self, params: Parameters, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(entropy, logprob) [R] of a micro-batch's response tokens as a function of `params`; every derivative exists."""
        module = _Rows(self.model, self.temperature)
        named = {f"model.{name}": value for name, value in params.items()}
        with KeepFloat64() if self.dtype == torch.float64 else contextlib.nullcontext():
            return torch.func.functional_call(module, named, (micro,), tie_weights=True)


def check_direction(policy: Policy, direction: Parameters) -> None:
    """Refuse a direction whose names, shapes or dtypes are not those of the policy's parameters."""
    missing, extra = policy.params.keys() - direction.keys(), direction.keys() - policy.params.keys()
    if missing or extra:
        raise UserError(
            f"direction: expected exactly the {len(policy.params)} parameter names of the model; missing {sorted(missing)[:3]}, "
            f"unknown {sorted(extra)[:3]}. Use the names of model.named_parameters(), tied weights once."
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


def _check_head(policy: Policy) -> None:
    """The model's own logits must be what its output layer gives, with nothing done to them afterwards."""
    ids = torch.arange(1, 5, device=policy.device).remainder(policy.model.config.vocab_size).unsqueeze(0)
    seen: list[Tensor] = []
    handle = policy.model.get_output_embeddings().register_forward_hook(
        lambda _m, _i, output: seen.append(output)
    )
    try:
        with torch.no_grad():
            logits = policy.model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1 or not torch.equal(seen[0], logits):
        raise UserError(
            f"model: {type(policy.model).__name__} changes its logits after the output layer (soft-capping, scaling or similar), which "
            "this version does not measure. Use a model whose logits are the plain output layer."
        )
