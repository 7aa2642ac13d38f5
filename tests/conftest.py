"""Every test runs on one thread, offline, without a window; said before torch is imported."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = (
    "PASSIVE"  # spinning OpenMP threads slow torch down several times on a shared machine
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import torch  # noqa: E402

torch.set_num_threads(1)
