"""The benchmark from hidden states runs from end to end without a GPU, and leaves out who is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
INTERPRET = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


_FORWARD = """
import torch
from bench import linear_gpu
from bench.peers import HeadPeer
from entropy_kernels.ops.fused_linear import Tiles
def late(h, W, y):
    entropy, logprob = linear_gpu.eager(h, W, y)
    return entropy * 1.1, logprob
linear_gpu.head_peers = lambda: ({"late": HeadPeer(function=late)}, {"absent": "does not import"})
linear_gpu.candidates = lambda x: {"ours, fused": (Tiles(16, 128, 64, 4, 2),) * 3}
linear_gpu.LINES = {"forward": linear_gpu.LINES["forward"]}
device = "cuda" if torch.cuda.is_available() else "cpu"
shape = linear_gpu.one_shape(4, 64, 130, torch.bfloat16, 2, device)
environment = {"device": "none", "threads": 1, "backend": "", "torch": "", "commit": None, "load_average": 0.0}
print("\\n".join(linear_gpu.markdown({"environment": environment, "shapes": [shape]})))
print("TIMED", *shape["beside_peers"]["forward"]["timings"], sep="; ")
"""


def test_forward_beside_peers():
    done = run("-c", _FORWARD, **INTERPRET)
    assert done.returncode == 0, done.stderr
    assert "TIMED; GEMM; GEMM at once; ours; eager; torch.compile; ours, fused\n" in done.stdout
    assert "Not timed: late, wrong: relative error" in done.stdout
    assert "Not timed: absent, does not import." in done.stdout


_TRUTH = """
import torch
from bench import linear_gpu
from torch.func import jvp
x = linear_gpu.Inputs(5, 32, 90, torch.bfloat16, "cpu")
want = linear_gpu.truth(x)
h, W, dh, dW = (t.double() for t in (x.h, x.W, x.dh, x.dW))
def f(h, W):
    log_p = torch.log_softmax(h @ W.t(), -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, x.y[:, None])[:, 0]
def near(got, wide):
    assert all(torch.allclose(g.double(), w, rtol=1e-5, atol=1e-6) for g, w in zip(got, wide, strict=True))
near(want["forward"], f(h, W))
near(want["forward and gradient"], torch.func.grad(lambda h, W: sum(f(h, W)).sum(), (0, 1))(h, W))
near(want["logprob's gradient"], torch.func.grad(lambda h, W: f(h, W)[1].sum(), (0, 1))(h, W))
near(want["tangents"], jvp(f, (h, W), (dh, dW))[1])
"""


def test_the_truth_is_that_of_plain_float64():
    done = run("-c", _TRUTH)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_line_and_candidate():
    done = run("-m", "bench", "linear", "--device", "interpreter", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    for line in ("forward", "forward and gradient", "tangents"):
        assert f"\n| {line} | ms" in done.stdout
    assert "wrong" not in done.stdout and "| ours, fused, a program a tile, tma |" in done.stdout
