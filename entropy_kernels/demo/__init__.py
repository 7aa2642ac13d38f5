"""The demo: a tiny language model that adds, in the middle of its reinforcement learning.

``checkpoint/`` is a checkpoint directory as the Hugging Face trainer writes it (weights, AdamW state, tokenizer),
``next/`` the weights one optimizer step later with the batch that led there, ``prompts.jsonl`` prompts the model was
never trained on.  ``python -m entropy_kernels.demo.make_demo`` made all three.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["checkpoint_dir", "next_dir", "prompts_file"]

_HERE = Path(__file__).resolve().parent


def checkpoint_dir() -> Path:
    """Directory of the checkpoint: ``config.json``, ``model.safetensors``, ``optimizer.pt``, tokenizer and state."""
    return _HERE / "checkpoint"


def next_dir() -> Path:
    """Directory of the next optimizer step: its ``model.safetensors``, and ``recorded/``, the batch that led there."""
    return _HERE / "next"


def prompts_file() -> Path:
    """JSON-lines file of prompts, columns ``prompt_id``, ``question`` and ``answer``, none of them trained on."""
    return _HERE / "prompts.jsonl"
