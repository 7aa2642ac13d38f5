"""A vocabulary spread over three processes: values and every composition of derivatives, against one process that holds it all."""

from __future__ import annotations

import parallel_ranks
import torch.multiprocessing


def test_three_ranks_agree_with_the_whole_vocabulary(tmp_path):
    torch.multiprocessing.spawn(
        parallel_ranks.main, args=(str(tmp_path / "meeting"),), nprocs=parallel_ranks.RANKS, join=True
    )
