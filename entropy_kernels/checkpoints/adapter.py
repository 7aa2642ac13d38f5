r"""A LoRA adapter from a PEFT directory, put into its base model: W x becomes W x + s·B(A x), s = α/r or α/√r.

PEFT builds the layers; every number comes from ``adapter_model.safetensors``, whose keys and the layers' parameters must match one
to one. Names, with the adapter called "default":

    live      model.layers.0.self_attn.q_proj.lora_A.default.weight      lm_head.modules_to_save.default.weight
    on disk   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      base_model.model.lm_head.weight

Needs the extra ``lora``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from entropy_kernels.errors import UserError

from .files import listed, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = "default"

# Settings of a LoraConfig that change nothing but shapes, names and the constant s, or nothing at all once the weights are read.
# Any other that is not at its default is refused by name.
_MEASURED = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
    lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save layers_to_transform layers_pattern rank_pattern
    alpha_pattern megatron_core qalora_group_size lora_bias runtime_config""".split()
)
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # these leave the base model as it was
_REASONS = {
    "use_dora": "DoRA's layer holds the norm of W + sBA constant in its gradient, so its derivative is not that of its value",
    "init_lora_weights": "this start changes the base model's weights, so the adapter alone does not say what was trained",
    "trainable_token_indices": "single trained rows of an embedding are not measured",
    "target_parameters": "adapters on parameters that are no layer of their own are not measured",
}


def adapter_directory(path: str | Path) -> Path | None:
    """Where ``adapter_config.json`` is: the directory, or ``model/`` in it; None where there is no adapter."""
    for directory in (Path(path), Path(path) / "model"):
        if (directory / CONFIG_FILE).is_file():
            return directory
    return None


def base_of(directory: Path) -> str:
    """The base model that the adapter names, where that is a directory or file on this machine.

    Raises:
        UserError: it is not.
    """
    named = _settings(directory).get("base_model_name_or_path")
    if isinstance(named, str) and named and Path(named).exists():
        return named
    raise UserError(
        f"model: the adapter {str(directory)!r} was trained on {named!r}, which is not a directory on this machine. Pass its base "
        "model: --model DIRECTORY on the command line, the first argument of Policy.from_pretrained in Python."
    )


def attach_adapter(model: nn.Module, directory: Path) -> None:
    """Put the adapter into its base model, in place, every number from the file.

    Args:
        model: the base model; its dtype and device become the adapter's.
        directory: as from `adapter_directory`.

    Raises:
        UserError: not LoRA, or a variant that is not measured, by name; no peft; weights that are missing, pickled, left over, or of
            another shape.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"model: {str(directory)!r} is a PEFT adapter, and peft is not installed. Run: pip install 'entropy_kernels[lora]'."
        ) from error
    settings = _settings(directory)
    _check_settings(settings, str(directory))
    known = {name: value for name, value in settings.items() if name in LoraConfig.__dataclass_fields__}
    known |= {"inference_mode": False, "init_lora_weights": True}
    tensors = _tensors(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a layer stores its weight transposed: PEFT sees to it
            inject_adapter_in_model(LoraConfig(**known), model, adapter_name=_NAME)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"model: the adapter {str(directory)!r} cannot be put into this base model: {error}"
        ) from error
    for name, value in _by_live_name(model, tensors, directory).items():
        p = model.get_parameter(name)
        if value.shape != p.shape:
            raise UserError(
                f"model: the adapter {str(directory)!r} has shape {tuple(value.shape)} for {name}, this base model needs "
                f"{tuple(p.shape)}. It was trained on another base model; pass that one as --model."
            )
        p.data.copy_(value)
    model.requires_grad_(False)


def adapter_values(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """The parameters that another adapter directory holds, by the live names of a model that has such an adapter.

    Raises:
        UserError: the file's keys are not those of the model's adapter, or its scale s is another.
    """
    _check_settings(_settings(directory), str(directory))
    (config,) = adapters(model).values()
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        there, here = _settings(directory).get(name, getattr(config, name)), getattr(config, name)
        if there != here:
            raise UserError(
                f"update: the adapter {str(directory)!r} has {name}={there!r}, that of the checkpoint {here!r}: the same numbers "
                "would mean another model. Pass the next checkpoint of the same run."
            )
    return _by_live_name(model, _tensors(directory), directory)


def adapters(model: nn.Module) -> dict[str, Any]:
    """The configurations of the adapters inside a model, by adapter name; empty for a plain model."""
    found = getattr(model, "peft_config", None)
    return dict(found) if isinstance(found, dict) else {}


def base_with_adapter(model: nn.Module) -> nn.Module:
    """A PeftModel's inner model with its adapter layers, checked; any other model as it is.

    Raises:
        UserError: an adapter that is not LoRA or a variant that is not measured, several, one that is switched off or merged.
    """
    configs = adapters(model)
    if not configs:
        return model
    if len(configs) > 1:
        raise UserError(
            f"model: got the adapters {sorted(configs)}, expected one. Delete the others (delete_adapter)."
        )
    ((name, config),) = configs.items()
    _check_settings({key: _plain(value) for key, value in vars(config).items()}, f"adapter {name!r}")
    for layer_name, layer in model.named_modules():
        if getattr(layer, "disable_adapters", False) is True or getattr(layer, "merged", False) is True:
            raise UserError(
                f"model: the adapter of {layer_name} is switched off or merged, so that its parameters move nothing. Switch it on "
                "(enable_adapter_layers) or unmerge it (unmerge_adapter)."
            )
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def adapter_parameters(model: nn.Module) -> list[str]:
    """Names of what the adapter in a model trains, in the order of ``named_parameters()``: A and B, modules_to_save, biases.

    Empty for a model without an adapter.
    """
    if not (configs := adapters(model)):
        return []
    ((adapter, config),) = configs.items()
    return [name for name, _ in model.named_parameters() if _is_trained(name, adapter, config.bias)]


def is_lora(name: str) -> bool:
    """Whether a live name is that of an A or B (or of B's bias)."""
    return any(piece.startswith("lora_") for piece in name.split("."))


def _is_trained(name: str, adapter: str, bias: str) -> bool:
    pieces = name.split(".")
    if adapter in pieces and (is_lora(name) or "modules_to_save" in pieces):
        return True
    if "original_module" in pieces:
        return False
    return bias == "all" and "bias" in name or bias == "lora_only" and name.endswith(".base_layer.bias")


def _stored_name(name: str) -> str:
    """The key in the file of a live name."""
    pieces, kept, before = name.split("."), list[str](), ""
    for piece in pieces:
        after_lora = before.startswith("lora_") or before == "modules_to_save"
        if not after_lora and piece != "modules_to_save":
            kept.append(piece)
        before = piece
    return "base_model.model." + ".".join(kept)


def _by_live_name(model: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """The file's tensors by live name; every key must name a parameter, and every trained parameter must be there."""
    live = {_stored_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = tensors.keys() - live.keys()
    missing = {_stored_name(name) for name in adapter_parameters(model)} - tensors.keys()
    if unknown or missing:
        raise UserError(
            f"model: {str(directory / WEIGHTS_FILE)!r} does not fit the base model: "
            + (f"no place for {listed(unknown, 3)}; " if unknown else "")
            + (f"no values for {listed(missing, 3)}; " if missing else "")
            + "expected one tensor for each adapted weight. The adapter was trained on another base model, or the file is damaged."
        )
    return {live[key]: value for key, value in tensors.items()}


def _settings(directory: Path) -> dict[str, Any]:
    return read_json(directory / CONFIG_FILE, dict)


def _check_settings(settings: Mapping[str, Any], what: str) -> None:
    """Refuse what is not plain LoRA, by name."""
    kind = str(settings.get("peft_type")).rpartition(".")[2]
    if kind != "LORA":
        raise UserError(
            f"model: {what} is a PEFT adapter of type {kind}, expected LORA. Merge it into its base model (merge_and_unload, where "
            "that type can), save that with save_pretrained, and measure all parameters."
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"model: {what} is for {settings['task_type']}, expected CAUSAL_LM.")
    changed = [name for name, value in settings.items() if name not in _MEASURED and value]
    if settings.get("init_lora_weights", True) in _INITIAL:
        changed = [name for name in changed if name != "init_lora_weights"]
    if changed:
        name = sorted(changed)[0]
        reason = _REASONS.get(name, "this version does not know what it does to the forward pass")
        raise UserError(
            f"model: {what} has {name}={settings[name]!r}, expected plain LoRA: {reason}. Merge the adapter into its base model "
            "(merge_and_unload, then save_pretrained) and measure all parameters, or train without it."
        )


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        raise UserError(
            f"model: the adapter {str(directory)!r} has no {WEIGHTS_FILE}"
            + (", only adapter_model.bin, a pickle, which can run code when opened" if pickled else "")
            + ". Save it again with save_pretrained, which writes safetensors."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"model: {str(path)!r} cannot be read: {error}. Copy the file again.") from error


def _plain(value: Any) -> Any:
    """Enumerations by their name."""
    return getattr(value, "value", value)
