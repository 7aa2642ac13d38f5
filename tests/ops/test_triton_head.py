"""The kernels from hidden states: `triton_head.py` in a process of its own, natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from test_triton_rows import run

pytest.importorskip("triton")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_triton_head(which):
    interpret = not torch.cuda.is_available()
    if which == "slow" and not interpret:
        pytest.skip("on a GPU nothing is slow")
    done = run(
        "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", which, "triton_head.py", interpret=interpret
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_without_gpu_and_interpreter_it_refuses():
    code = (
        "import torch\nfrom entropy_kernels.ops import fused_linear, linear, reference\n"
        "h, W = torch.zeros(2, 32), torch.zeros(5, 32)\n"
        "x = linear.Point(linear.Head(h, W, None), torch.tensor([0, 1]), torch.ones(2), None, 1 << 20, reference)\n"
        "fused_linear.fused_values(x)"
    )
    done = run("-c", code, interpret=False)
    assert done.returncode == 1 and "UserError: logits: got a tensor on cpu" in done.stderr
