"""Which files a model or checkpoint directory holds, found before any of them is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entropy_kernels.errors import UserError


def locate(path_or_id: str | Path) -> tuple[str, dict[str, Any]]:
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
            f"model {text!r} is a PEFT adapter, where a full model is expected. Pass it as the checkpoint (--ckpt, adapter=), and its "
            "base model as the model."
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
        shards = sorted(set(read_json(index, dict).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise UserError(
                f"model {text!r}: weight files are missing: {listed(missing)}; copy the directory again."
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
                f", only pickled weights ({listed(pickled)}), which can run code when opened"
                if pickled
                else ""
            )
            + ". Save it again with save_pretrained, which writes safetensors."
        )


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, of the given type.

    Raises:
        UserError: it is not JSON, or of another type.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON: {error}. Copy the file again.") from error
    if not isinstance(found, kind):
        raise UserError(
            f"{str(path)!r} holds {type(found).__name__}, expected {kind.__name__}. Copy the file again."
        )
    return found


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many there are."""
    names = list(names) if isinstance(names, list) else sorted(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
