"""Which parameters are measured: all that training moves, an adapter's, or those whose names match a pattern.

    "all"     every parameter of a full model; with an adapter what the adapter trains: A and B, modules_to_save, its biases
    "lora"    the matrices A and B of an adapter alone
    REGEX     every parameter, frozen or not, with a match of it somewhere in its name (re.search)

The others are constants: they have no tangent, no gradient, and no part in an update.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from entropy_kernels.checkpoints import adapter_parameters, is_lora
from entropy_kernels.errors import UserError


def select_parameters(model: Any, parameters: str) -> dict[str, Tensor]:
    """The measured parameters by the model's own names, tied weights once, without gradient.

    Args:
        model: a causal LM, with or without an adapter inside.
        parameters: "all", "lora" or a regular expression; see the module's docstring.

    Raises:
        UserError: "lora" without an adapter; not a regular expression; one that matches nothing, or a tied weight by only some of its
            names.
    """
    named = {name: p.detach() for name, p in model.named_parameters()}
    if parameters in ("all", "lora"):
        trained = adapter_parameters(model)
        if parameters == "lora":
            trained = [name for name in trained if is_lora(name)]
            if not trained:
                raise UserError(
                    "parameters: got 'lora', but the model has no LoRA adapter. Pass the adapter's directory (--ckpt, adapter=), or "
                    "parameters='all'."
                )
        return {name: named[name] for name in trained} if trained else named
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise UserError(
            f"parameters: got {parameters!r}, expected 'all', 'lora' or a regular expression of parameter names: {error}."
        ) from error
    chosen = {name: named[name] for name, aliases in _aliases(model).items() if _matches(pattern, aliases)}
    if not chosen:
        some = ", ".join(list(named)[:: max(1, len(named) // 4)][:4])
        raise UserError(
            f"parameters: no parameter name matches {parameters!r}. The model's {len(named)} names are like {some}."
        )
    return chosen


def count_parameters(model: Any, measured: dict[str, Tensor]) -> dict[str, int]:
    """Sizes for the report: tensors and numbers measured, and numbers in the model."""
    return {
        "tensors": len(measured),
        "numbers": sum(p.numel() for p in measured.values()),
        "numbers_in_model": sum(p.numel() for p in model.parameters()),
    }


def _aliases(model: Any) -> dict[str, list[str]]:
    """Every parameter's first name, and all of its names: a tied weight has several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(p), name), []).append(name)
    return names


def _matches(pattern: re.Pattern[str], aliases: list[str]) -> bool:
    found = [name for name in aliases if pattern.search(name)]
    if found and len(found) < len(aliases):
        others = sorted(set(aliases) - set(found))
        raise UserError(
            f"parameters: {pattern.pattern!r} matches {found[0]} but not {others[0]}, which is the same weight by another name (tied). "
            f"Match both or neither, for example with '{re.escape(found[0])}|{re.escape(others[0])}'."
        )
    return bool(found)
