"""An optimizer's state by parameter *name*: the numbers in ``optimizer.pt`` given back what they stand for.

Opened with ``weights_only=True``, so that nothing in it can run. Source: docs/theory.md, section 8.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_kernels.errors import UserError
from entropy_kernels.updates import OptimizerState

from .files import listed, read_json

OPTIMIZER_FILE = "optimizer.pt"
NAMES_FILE = "optimizer_param_names.json"

# Parameter names that Hugging Face's Trainer exempts from weight decay, matched in lower case.
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


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
    saved = read_optimizer(ckpt_dir)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if trainable is not None:
        unknown = set(trainable) - params.keys()
        if unknown:
            raise UserError(f"trainable names parameters the model does not have: {listed(unknown)}.")
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


def optimizer_entries(ckpt_dir: str | Path) -> int | None:
    """How many parameters ``optimizer.pt`` has numbered; None where there is no such file.

    Raises:
        UserError: it is there and cannot be read.
    """
    if not (Path(ckpt_dir) / OPTIMIZER_FILE).is_file():
        return None
    return sum(len(group["params"]) for group in read_optimizer(ckpt_dir)["param_groups"])


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
        names = read_json(path, list)
        if sorted(map(str, names)) != sorted(params) or sorted(numbers) != list(range(len(names))):
            given = set(map(str, names))
            raise UserError(
                f"{NAMES_FILE} must list every trained parameter once, {len(params)} in all, in the order of "
                f"{OPTIMIZER_FILE} ({sum(sizes)} entries). Not listed: [{listed(params.keys() - given)}]; "
                f"not in the model: [{listed(given - params.keys())}]."
            )
        return [[names[index] for index in group["params"]] for group in groups]

    decayed = set(decay_parameter_names(model))
    names_by_group = [[name for name in params if (name in decayed) == wanted] for wanted in (True, False)]
    expected = [len(group) for group in names_by_group]
    if sizes != expected:
        raise UserError(
            f"{OPTIMIZER_FILE} has {len(sizes)} parameter groups of sizes {sizes}; this model trained by the "
            f"Hugging Face Trainer has two, of sizes {expected} (with and without weight decay; the latter "
            f"begins with {listed(names_by_group[1], most=2)}). If only some parameters were trained, list "
            "them (--parameters PATTERN on the command line); if another trainer wrote the file, put "
            f"{NAMES_FILE} beside it, the parameter names in its order."
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
    if not bool(torch.isfinite(x).all()):
        raise UserError(
            f"{OPTIMIZER_FILE}: {slot!r} of parameter {name!r} holds NaN or infinite entries: training diverged before this checkpoint. "
            "Pass an earlier one."
        )
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    return x.to(device=theta.device, dtype=dtype, copy=True)


def read_optimizer(ckpt_dir: str | Path) -> dict[str, Any]:
    """What ``optimizer.pt`` holds: a dictionary with "state" and "param_groups".

    Raises:
        UserError: no such file, not readable without unpickling, or something else.
    """
    path = Path(ckpt_dir) / OPTIMIZER_FILE
    if not path.is_file():
        raise UserError(
            f"checkpoint {str(ckpt_dir)!r} has no {OPTIMIZER_FILE}, so the step its optimizer would take is "
            "unknown (save_only_model, or a sharded DeepSpeed/FSDP state). Point to a checkpoint that has "
            "it, or pass --update sgd --learning-rate X for the plain gradient's direction. A fresh optimizer state "
            "is never assumed."
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


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value
