"""From disk to memory: a causal language model, and its optimizer state by parameter *name*.

Three layouts are read: a Hugging Face model directory; a checkpoint directory of the Hugging Face Trainer
(TRL's trainers are such); and a directory with ``model/``, ``optimizer.pt`` and
``optimizer_param_names.json``.

Nothing is unpickled: weights come from safetensors (or GGUF), optimizer files through ``weights_only=True``,
and ``training_args.bin`` is never opened. Source: docs/theory.md, section 8.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from entropy_kernels.errors import UserError
from entropy_kernels.updates import OptimizerState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZER_FILE = "optimizer.pt"
NAMES_FILE = "optimizer_param_names.json"
TRAINER_FILE = "trainer_state.json"

# Parameter names that Hugging Face's Trainer exempts from weight decay, matched in lower case.
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    base: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with its tokenizer, every weight read from the files.

    The model is in eval mode (so without dropout) and frozen (``requires_grad`` False throughout).

    Args:
        path_or_id: model or checkpoint directory, .gguf file, or hub id. A path that exists is never looked
            up on the network.
        dtype: of all weights: "float32", "float64", "bfloat16", "float16" or the torch dtype.
        device: None: the CPU.
        base: where the tokenizer is taken from if the directory has none; if both have one they must agree.

    Returns:
        (model, tokenizer).

    Raises:
        UserError: nothing there; missing, damaged, pickled or NaN weights; weights the model's class does not
            use; an adapter without its base weights merged in; no tokenizer, or one with more tokens than the
            model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_dtype = _dtype(dtype)
    where, options = _locate(path_or_id)
    load: Any = AutoModelForCausalLM.from_pretrained
    # Mismatched shapes are let through here only to be named, and refused, below.
    try:
        model, info = load(
            where, dtype=torch_dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError, RuntimeError) as error:
        raise UserError(f"model {str(path_or_id)!r} cannot be loaded: {error}") from error
    for problem, meaning in (
        ("missing_keys", "the model needs weights the files do not have (it would start from random ones)"),
        ("mismatched_keys", "weights have another shape than config.json says"),
        ("unexpected_keys", "the files hold weights that this model class does not use"),
    ):
        names = [str(key[0] if isinstance(key, tuple) else key) for key in info.get(problem) or ()]
        if names:
            raise UserError(
                f"model {str(path_or_id)!r}: {meaning}: {_listed(names)}. The directory is incomplete or belongs to "
                "another architecture; export the model again with save_pretrained."
            )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"model {str(path_or_id)!r} is an encoder-decoder; only decoder-only causal LMs are supported."
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"model {str(path_or_id)!r}: weight {name!r} holds NaN or infinite entries as {torch_dtype}. "
                "Training diverged before this checkpoint, or the numbers do not fit this dtype."
            )
    model = model.to(device=torch.device(device or "cpu"), dtype=torch_dtype).eval().requires_grad_(False)

    tokenizer_options = {
        key: value for key, value in options.items() if key in ("gguf_file", "local_files_only")
    }
    own = _has_tokenizer(where, options)
    if not own and base is None:
        raise UserError(
            f"model {str(path_or_id)!r} comes without a tokenizer ({', '.join(_TOKENIZER_FILES[:2])}); pass "
            "base=, the model or directory that has it."
        )
    try:
        tokenizer = (
            AutoTokenizer.from_pretrained(where, **tokenizer_options) if own else _base_tokenizer(base)
        )
        if own and base is not None and tokenizer.get_vocab() != _base_tokenizer(base).get_vocab():
            raise UserError(
                f"the tokenizers of {str(path_or_id)!r} and base={str(base)!r} differ; the checkpoint was "
                "not trained from that base, or its tokenizer was changed. Leave base out to use the "
                "checkpoint's own."
            )
    except (OSError, KeyError, ImportError) as error:
        raise UserError(f"the tokenizer of {str(path_or_id)!r} cannot be loaded: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"the tokenizer has token ids up to {largest} but the model's vocabulary is {rows}: they do not "
            "belong together."
        )
    return model, tokenizer


def load_optimizer_state(
    ckpt_dir: str | Path, model: nn.Module, *, trainable: Sequence[str] | None = None
) -> OptimizerState:
    """The state in ``optimizer.pt``, its numbered entries given back their parameters' names.

    The Trainer numbers parameters like this: those with weight decay first, then those without, in each group
    in the order of ``model.named_parameters()`` (tied weights once). ``optimizer_param_names.json``, a list
    of names in that numbering, replaces the rule where it exists. Group sizes, shapes and the decay of the
    second group are all checked; a file that cannot be this model's is refused.

    Args:
        ckpt_dir: checkpoint directory.
        model: the model of that checkpoint, as from :func:`load_model`.
        trainable: names of the parameters that were trained; None: all of them.

    Returns:
        OptimizerState. ``params`` are the model's own tensors, detached (shared memory); moments are float32,
        or float64 for a float64 model, on each parameter's device.

    Raises:
        UserError: no or unreadable optimizer.pt, or one that does not fit the model; says which parameter.
    """
    saved = _read_optimizer(ckpt_dir)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if trainable is not None:
        unknown = set(trainable) - params.keys()
        if unknown:
            raise UserError(f"trainable names parameters the model does not have: {_listed(unknown)}.")
        params = {name: theta for name, theta in params.items() if name in set(trainable)}
    groups = saved["param_groups"]
    names = _names_by_group(Path(ckpt_dir), model, params, groups)

    stateless = not any(value is not None for entry in saved["state"].values() for value in entry.values())
    slots: dict[str, dict[str, torch.Tensor]] = {}
    hyper: dict[str, dict[str, Any]] = {}
    for group, group_names in zip(groups, names, strict=True):
        settings = {key: _plain(value) for key, value in group.items() if key != "params"}
        for index, name in zip(group["params"], group_names, strict=True):
            entry = saved["state"].get(index)
            if entry is None and not stateless:
                raise UserError(
                    f"{OPTIMIZER_FILE} has no state for parameter {name!r} (number {index}): it was frozen "
                    "or never got a gradient. If it was frozen, list the parameters that were trained."
                )
            slots[name] = {
                key: _moment(key, x, name, params[name]) for key, x in (entry or {}).items() if x is not None
            }
            hyper[name] = dict(settings)
    return OptimizerState(params={name: params[name] for name in slots}, slots=slots, hyper=hyper)


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a checkpoint says about its learning rate; nothing here is used unless the caller does.

    Attributes:
        optimizer_steps: steps taken before the checkpoint was written.
        stored_lr: the rate in optimizer.pt: that of the *next* step, since the scheduler moves before saving.
        logged_lr: the last rate in trainer_state.json's log, which belongs to step ``logged_step``; None if
            none.
        logged_step: see ``logged_lr``.
        logged_grad_norm: the gradient norm, before clipping, logged with it; None if none.
        max_grad_norm: always None for now: the Trainer writes its clip threshold only into a pickle, which is
            not opened. The Trainer's default is 1.0.
    """

    optimizer_steps: int
    stored_lr: float
    logged_lr: float | None
    logged_step: int | None
    logged_grad_norm: float | None
    max_grad_norm: float | None = None

    def explanation(self) -> str:
        """One sentence on the stored rate, and what to do where it is 0."""
        text = f"After {self.optimizer_steps} steps the checkpoint stores the next rate, {self.stored_lr:g}"
        if self.stored_lr == 0:
            text += " (a schedule that decays to 0 has ended there): say which rate to measure at"
        if self.logged_lr is not None:
            text += f"; the last rate in its log is {self.logged_lr:g}, of step {self.logged_step}"
        return text + "."


def learning_rate(ckpt_dir: str | Path) -> StepInfo:
    """The checkpoint's step count and learning rates, stored and logged.

    Raises:
        UserError: no or unreadable files, parameter groups with different rates.
    """
    saved = _read_optimizer(ckpt_dir)
    rates = {float(group["lr"]) for group in saved["param_groups"] if group["params"]}
    if len(rates) != 1:
        raise UserError(
            f"{OPTIMIZER_FILE} in {str(ckpt_dir)!r} has parameter groups with the rates {sorted(rates)}, so "
            "there is no one learning rate; say which one to measure at."
        )
    steps = {int(entry["step"]) for entry in saved["state"].values() if entry.get("step") is not None}
    path = Path(ckpt_dir) / TRAINER_FILE
    trainer: dict[str, Any] = {}
    if path.is_file():
        try:
            trainer = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
    logged: dict[str, Any] = next(
        (entry for entry in reversed(trainer.get("log_history", [])) if "learning_rate" in entry), {}
    )
    return StepInfo(
        optimizer_steps=max(steps) if steps else int(trainer.get("global_step", 0)),
        stored_lr=rates.pop(),
        logged_lr=None if not logged else float(logged["learning_rate"]),
        logged_step=logged.get("step"),
        logged_grad_norm=logged.get("grad_norm"),
    )


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Parameters that Hugging Face's Trainer gives weight decay, in ``named_parameters()`` order.

    All but those inside an ``nn.LayerNorm`` and those whose name says bias or norm.
    """
    inside = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    return [
        name
        for name, _ in model.named_parameters()
        if name not in inside and not _NO_DECAY_NAME.search(name.lower())
    ]


def _names_by_group(
    ckpt_dir: Path, model: nn.Module, params: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> list[list[str]]:
    """Parameter names of every group, in the order of the group's numbers."""
    sizes = [len(group["params"]) for group in groups]
    numbers = [index for group in groups for index in group["params"]]
    if len(set(numbers)) != len(numbers):
        raise UserError(f"{OPTIMIZER_FILE} numbers some parameter twice; the file is damaged.")
    path = ckpt_dir / NAMES_FILE
    if path.is_file():
        names = json.loads(path.read_text(encoding="utf-8"))
        if (
            not isinstance(names, list)
            or sorted(names) != sorted(params)
            or sorted(numbers) != list(range(len(names)))
        ):
            listed = set(names) if isinstance(names, list) else set()
            raise UserError(
                f"{NAMES_FILE} must list every trained parameter once, {len(params)} in all, in the order of "
                f"{OPTIMIZER_FILE} ({sum(sizes)} entries). Not listed: [{_listed(params.keys() - listed)}]; "
                f"not in the model: [{_listed(listed - params.keys())}]."
            )
        return [[names[index] for index in group["params"]] for group in groups]

    decayed = set(decay_parameter_names(model))
    names_by_group = [[name for name in params if (name in decayed) == wanted] for wanted in (True, False)]
    expected = [len(group) for group in names_by_group]
    if sizes != expected:
        raise UserError(
            f"{OPTIMIZER_FILE} has {len(sizes)} parameter groups of sizes {sizes}; this model trained by the "
            f"Hugging Face Trainer has two, of sizes {expected} (with and without weight decay; the latter "
            f"begins with {_listed(names_by_group[1], most=2)}). If only some parameters were trained, list "
            f"them; if another trainer wrote the file, put {NAMES_FILE} beside it, the parameter names in "
            "its order."
        )
    if groups[1].get("weight_decay", 0.0) != 0.0 and sizes[1]:
        raise UserError(
            f"the second parameter group of {OPTIMIZER_FILE} has weight_decay={groups[1]['weight_decay']}; "
            f"the Hugging Face Trainer writes 0 there, so another program wrote this. Put {NAMES_FILE} "
            "beside it, the names in its order."
        )
    return names_by_group


def _moment(slot: str, x: Any, name: str, theta: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        x = torch.tensor(x, dtype=torch.float32)
    if slot == "step":
        return x.clone()
    if x.shape != theta.shape or not x.is_floating_point():
        raise UserError(
            f"{OPTIMIZER_FILE}: {slot!r} of parameter {name!r} has shape {tuple(x.shape)} and dtype "
            f"{x.dtype}, the parameter has shape {tuple(theta.shape)}. The state belongs to another model, "
            "to other trained parameters, or to an optimizer that stores its moments compressed; none of "
            "these can be used."
        )
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    return x.to(device=theta.device, dtype=dtype, copy=True)


def _read_optimizer(ckpt_dir: str | Path) -> dict[str, Any]:
    path = Path(ckpt_dir) / OPTIMIZER_FILE
    if not path.is_file():
        raise UserError(
            f"checkpoint {str(ckpt_dir)!r} has no {OPTIMIZER_FILE}, so the step its optimizer would take is "
            "unknown (save_only_model, or a sharded DeepSpeed/FSDP state). Point to a checkpoint that has "
            "it, or measure the plain gradient direction with --update sgd. A fresh optimizer state is never "
            "assumed."
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as plain tensors (torch.load with weights_only=True): "
            f"{str(error)[:300]}. It is damaged, or holds pickled objects, which are not opened."
        ) from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        raise UserError(
            f"{str(path)!r} is not the state_dict of a torch optimizer (no 'state' and 'param_groups')."
        )
    return saved


def _locate(path_or_id: str | Path) -> tuple[str, dict[str, Any]]:
    """(what from_pretrained takes, its options), after looking at the files."""
    path = Path(path_or_id)
    text = str(path_or_id)
    if path.is_file() and path.suffix == ".gguf":
        from transformers import GgufConfig

        options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        return str(path.parent), options | {"local_files_only": True}
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) or path.suffix == ".gguf":
            raise UserError(
                f"model {text!r}: there is no such file or directory, and it is not a hub id (owner/name)."
            )
        return text, {"use_safetensors": True}
    if not path.is_dir():
        raise UserError(f"model {text!r} is a file; expected a directory, a .gguf file or a hub id.")
    if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        path = path / "model"
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model {text!r} is a PEFT adapter; only full models are read. Merge it into its base "
            "(merge_and_unload, then save_pretrained) and pass that directory."
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"model {text!r}: {path} has no config.json; pass a directory written by save_pretrained."
        )
    _check_weight_files(path, text)
    return str(path), {"use_safetensors": True, "local_files_only": True}


def _check_weight_files(path: Path, text: str) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise UserError(
                f"model {text!r}: weight files are missing: {_listed(missing)}; copy the directory again."
            )
    elif not (path / "model.safetensors").is_file():
        pickled = sorted(
            file.name
            for file in (*path.glob("*.bin"), *path.glob("*.pth"))
            if file.name != "training_args.bin"
        )
        raise UserError(
            f"model {text!r}: {path} has no model.safetensors"
            + (
                f", only pickled weights ({_listed(pickled)}), which can run code when opened"
                if pickled
                else ""
            )
            + ". Save it again with save_pretrained, which writes safetensors."
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


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names) if isinstance(names, list) else sorted(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
