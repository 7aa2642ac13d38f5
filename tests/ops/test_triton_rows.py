"""The Triton rows: `triton_rows.py` and `triton_kept.py` in a process of its own, natively on a GPU, else in Triton's interpreter.

The interpreter has to be asked for before Triton is first imported, and then holds for the whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=HERE, capture_output=True, text=True
    )


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_triton_rows(which):
    interpret = not torch.cuda.is_available()
    if which == "slow" and not interpret:
        pytest.skip("on a GPU nothing is slow")
    done = run(
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        "triton_rows.py",
        "triton_kept.py",
        "triton_parts.py",
        interpret=interpret,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_without_gpu_and_interpreter_triton_rows_refuse():
    code = (
        "import torch\nfrom entropy_kernels.functional import rows as functional\nfrom entropy_kernels.ops import rows\n"
        "with functional.rows_from(rows):\n    functional.entropy_logprob(torch.zeros(2, 5))"
    )
    done = run("-c", code, interpret=False)
    assert (
        done.returncode == 1
        and "UserError: logits: got a tensor on cpu, expected one on a GPU" in done.stderr
    )
