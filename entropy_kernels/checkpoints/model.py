"""A causal language model and its tokenizer from disk, every weight accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from entropy_kernels.errors import UserError

from .adapter import adapter_directory, adapter_values, adapters, attach_adapter, base_of
from .files import listed, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    base: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with its tokenizer, every weight read from the files; with an adapter's directory, the adapter in its base model.

    The model is in eval mode (so without dropout) and frozen (``requires_grad`` False throughout). Where an adapter's directory has
    a ``generation_config.json``, it replaces the base model's: it says where a response ends.

    Args:
        path_or_id: model, checkpoint or PEFT adapter directory, .gguf file, or hub id. A path that exists is never looked
            up on the network.
        dtype: of all weights: "float32", "float64", "bfloat16", "float16" or the torch dtype.
        device: None: the CPU.
        base: for an adapter its base model, else the one that ``adapter_config.json`` names if it is on this machine. For a full
            model where the tokenizer is taken from if the directory has none; if both have one they must agree.

    Returns:
        (model, tokenizer).

    Raises:
        UserError: nothing there; missing, damaged, pickled or NaN weights; weights the model's class does not
            use; an adapter that does not fit; no tokenizer, or one with more tokens than the model.
    """
    model: Any = load_weights(path_or_id, dtype=dtype, device=device, base=base)
    return model, _load_tokenizer(path_or_id, base, len(model.get_input_embeddings().weight))


def load_weights(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    base: str | Path | None = None,
) -> PreTrainedModel:
    """The model of `load_model`, for a directory that need not have a tokenizer; same arguments and errors."""
    torch_dtype = _dtype(dtype)
    directory = adapter_directory(path_or_id)
    model = _load_full(path_or_id if directory is None else base or base_of(directory), torch_dtype)
    if directory is not None:
        attach_adapter(model, directory)
        if (directory / "generation_config.json").is_file():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(directory)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"model {str(path_or_id)!r}: weight {name!r} holds NaN or infinite entries as {torch_dtype}. "
                "Training diverged before this checkpoint, or the numbers do not fit this dtype."
            )
    return model.to(device=torch.device(device or "cpu"), dtype=torch_dtype).eval().requires_grad_(False)


def load_parameters(
    path: str | Path, model: nn.Module, *, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """θ by parameter name at another checkpoint of a model that is loaded already, on the CPU.

    Any layout that `load_model` reads. For an adapter only its own weights are read; those of the base model are the same.

    Raises:
        UserError: as `load_model`; an adapter where the model is a full one, or the other way round.
    """
    directory = adapter_directory(path)
    if not Path(path).is_dir():
        raise UserError(
            f"update: there is no directory {str(path)!r}; expected the next checkpoint of the same run."
        )
    if (directory is not None) != bool(adapters(model)):
        kinds = "a full model, the checkpoint", "a PEFT adapter, the checkpoint"
        raise UserError(
            f"update: {str(path)!r} is {kinds[directory is not None]} is not. Pass the next checkpoint of the same run."
        )
    if directory is None:
        return {name: p.detach() for name, p in load_weights(path, dtype=dtype).named_parameters()}
    here = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return here | {name: x.to(dtype) for name, x in adapter_values(model, directory).items()}


def _load_full(path_or_id: str | Path, dtype: torch.dtype) -> Any:
    """A full model in the given dtype, every weight of the class read, every weight of the files used."""
    from transformers import AutoModelForCausalLM

    where, options = locate(path_or_id)
    load: Any = AutoModelForCausalLM.from_pretrained
    # Mismatched shapes are let through here only to be named, and refused, below.
    try:
        model, info = load(
            where, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError, RuntimeError) as error:
        raise UserError(_not_loaded(path_or_id, error)) from error
    for problem, meaning in (
        ("missing_keys", "the model needs weights the files do not have (it would start from random ones)"),
        ("mismatched_keys", "weights have another shape than config.json says"),
        ("unexpected_keys", "the files hold weights that this model class does not use"),
    ):
        names = [str(key[0] if isinstance(key, tuple) else key) for key in info.get(problem) or ()]
        if names:
            raise UserError(
                f"model {str(path_or_id)!r}: {meaning}: {listed(names)}. The directory is incomplete or belongs to "
                "another architecture; export the model again with save_pretrained."
            )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"model {str(path_or_id)!r} is an encoder-decoder; only decoder-only causal LMs are supported."
        )
    return model


def _not_loaded(path_or_id: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400].rstrip(". ")
    if Path(path_or_id).exists():
        return (
            f"model {str(path_or_id)!r} cannot be loaded: {reason}. Expected config.json and safetensors as save_pretrained writes them; "
            "copy the directory again, or save the model again."
        )
    return (
        f"model {str(path_or_id)!r} is no directory on this machine, and as a hub id it cannot be loaded: {reason}. Check the name, or "
        "download the model and pass its directory."
    )


def _load_tokenizer(path_or_id: str | Path, base: str | Path | None, rows: int) -> PreTrainedTokenizerBase:
    """The directory's own tokenizer, else the base model's; `rows` is the size of the model's vocabulary."""
    from transformers import AutoTokenizer

    adapter = adapter_directory(path_or_id)
    if adapter is None:
        where, options = locate(path_or_id)
        options = {key: options[key] for key in ("gguf_file", "local_files_only") if key in options}
    else:
        where, options, base = str(adapter), {"local_files_only": True}, base or base_of(adapter)
    own = _has_tokenizer(where, options)
    if not own and base is None:
        raise UserError(
            f"model {str(path_or_id)!r} comes without a tokenizer ({', '.join(_TOKENIZER_FILES[:2])}); pass "
            "the model or directory that has it: --model on the command line, base= in Python."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options) if own else _base_tokenizer(base)
        if own and base is not None and (adapter is None or _has_tokenizer(str(base), {})):
            _check_same_tokens(tokenizer, _base_tokenizer(base), adapter is not None, path_or_id, base)
    except (OSError, KeyError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the tokenizer of {str(path_or_id)!r} cannot be loaded: {error}. Copy the directory again, or pass one that has it as the "
            "base model (--model)."
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise UserError(
            f"the tokenizer has token ids up to {largest} but the model's vocabulary is {rows}: they do not "
            "belong together. Pass the checkpoint with the tokenizer it was trained with."
        )
    return tokenizer


def _check_same_tokens(
    own: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    adapter: bool,
    path_or_id: str | Path,
    base: str | Path,
) -> None:
    """A full model's tokenizer must be its base's; an adapter's may have further tokens, such as one for padding."""
    ids, others = own.get_vocab(), other.get_vocab()
    same = all(ids.get(token) == i for token, i in others.items()) if adapter else ids == others
    if not same:
        raise UserError(
            f"the tokenizers of {str(path_or_id)!r} and base={str(base)!r} differ; the checkpoint was "
            "not trained from that base, or its tokenizer was changed. "
            + (
                "Pass the base model it was trained on."
                if adapter
                else "Leave base out to use the checkpoint's own."
            )
        )


def _has_tokenizer(where: str, options: dict[str, Any]) -> bool:
    """GGUF files carry one and hub ids are asked; a directory shows what it has."""
    asked = "gguf_file" in options or not Path(where).is_dir()
    return asked or any((Path(where) / file).is_file() for file in _TOKENIZER_FILES)


def _base_tokenizer(base: str | Path | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    assert base is not None  # checked by load_model
    path = Path(base)
    if path.is_file() and path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    return AutoTokenizer.from_pretrained(str(base), local_files_only=path.is_dir())


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype={dtype!r}: expected float32, float64, bfloat16 or float16.")
    return found
