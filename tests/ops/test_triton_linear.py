"""`triton_linear.py` in a process of its own, natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from test_triton_rows import run  # noqa: E402


def test_the_triton_gradient_by_tiles():
    done = run(
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "triton_linear.py",
        interpret=not torch.cuda.is_available(),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
