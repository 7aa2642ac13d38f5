"""Every test runs on one thread, offline, without a window; said before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = (
    "PASSIVE"  # spinning OpenMP threads slow torch down several times on a shared machine
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

NATIVE = ("ops", "test_peer_failures.py", "test_bench.py")  # run on a GPU where there is one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests of models, whose numbers are the CPU's, run on the CPU everywhere, and so do the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.path.relative_to(Path(__file__).parent).parts[0].startswith(NATIVE):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)
