"""From disk to memory: a causal language model, and its optimizer state by parameter *name*.

Read are: a Hugging Face model directory, in one file or in shards; a checkpoint directory of the Hugging Face Trainer (TRL's
trainers are such), full or a PEFT LoRA adapter; and a directory with ``model/``, ``optimizer.pt`` and
``optimizer_param_names.json``.

Nothing is unpickled: weights come from safetensors (or GGUF), optimizer files through ``weights_only=True``,
and ``training_args.bin`` is never opened. Source: docs/theory.md, section 8.
"""

from __future__ import annotations

from .adapter import adapter_directory, adapter_parameters, base_with_adapter, is_lora
from .log import LoggedLoss, logged_loss
from .model import load_model, load_parameters, load_weights
from .optimizer import decay_parameter_names, load_optimizer_state, optimizer_entries
from .rates import StepInfo, learning_rate

__all__ = [
    "LoggedLoss",
    "StepInfo",
    "adapter_directory",
    "adapter_parameters",
    "base_with_adapter",
    "decay_parameter_names",
    "is_lora",
    "learning_rate",
    "load_model",
    "load_optimizer_state",
    "load_parameters",
    "load_weights",
    "logged_loss",
    "optimizer_entries",
]
