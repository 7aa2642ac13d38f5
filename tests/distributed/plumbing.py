"""What each of three ranks runs for tests/distributed/test_distributed.py."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from entropy_kernels import distributed
from entropy_kernels.errors import CertificationError, UserError

RANKS = 3
MESSAGE = "prompts: got none, expected some."


def of_item(item: int) -> tuple[Tensor, ...]:
    """Tensors of every kind that travels, told apart by the item; the last by the rank that made them."""
    return (
        torch.arange(6, dtype=torch.float64).reshape(2, 3).T + item,  # not contiguous
        torch.full((), item, dtype=torch.bfloat16),
        torch.tensor([item % 2 == 0, True]),
        torch.empty(0, 4),
        torch.tensor(dist.get_rank() if dist.is_initialized() else 0),
    )


def check_order() -> None:
    """Seven items, one, and none: each is computed by its rank, and arrives everywhere in order."""
    for size in (7, 1, 0):
        arrived = [(item, tuple(found)) for item, found in distributed.dealt(range(size), of_item)]
        assert [item for item, _ in arrived] == list(range(size))
        for item, found in arrived:
            for got, want in zip(found[:-1], of_item(item)[:-1], strict=True):
                assert got.dtype == want.dtype and torch.equal(got, want)
            assert int(found[-1]) == item % RANKS


def check_nested() -> None:
    """What an item's work deals out stays on its rank."""

    def outer(item: int) -> tuple[Tensor, ...]:
        assert distributed.count() == 1
        inner = [tuple(found)[-1] for _, found in distributed.dealt(range(3), of_item)]
        return torch.stack(inner), torch.tensor(distributed.of_first(dist.get_rank))

    for item, (inner, first) in distributed.dealt(range(RANKS), outer):
        assert inner.tolist() == [item] * 3 and int(first) == item
    assert distributed.count() == RANKS


def check_first() -> None:
    rank = dist.get_rank()
    assert distributed.is_first() is (rank == 0) and distributed.count() == RANKS
    assert distributed.of_first(lambda: {"from": rank}) == {"from": 0}
    own = {"b": torch.full((2,), float(rank)), "a": torch.tensor(rank)}
    found = distributed.tensors_of_first(lambda: own)
    assert found is not None and list(found) == ["b", "a"]
    assert torch.equal(found["b"], torch.zeros(2)) and int(found["a"]) == 0
    assert distributed.tensors_of_first(lambda: None) is None


def check_error_in_work() -> None:
    """The error of the one rank that fails is everybody's, and the ranks are in step afterwards."""
    for kind in (UserError, CertificationError):

        def fails(item: int, kind: type[Exception] = kind) -> tuple[Tensor, ...]:
            if item == 4:
                raise kind(MESSAGE)
            return of_item(item)

        seen = []
        with pytest.raises(kind, match=MESSAGE):
            seen += [item for item, _ in distributed.dealt(range(6), fails)]
        assert seen == []  # a list is made whole or not at all

    def breaks(item: int) -> tuple[Tensor, ...]:
        raise KeyError("layer") if item == 1 else UserError("of no interest")

    with pytest.raises(KeyError if dist.get_rank() == 1 else UserError, match="layer|of no interest"):
        list(distributed.dealt(range(2), breaks))
    with (
        pytest.raises(UserError, match="rank 1 has failed.*KeyError: 'layer'")
        if dist.get_rank() != 1
        else pytest.raises(KeyError)
    ):
        list(distributed.dealt(range(2), lambda item: breaks(1) if item else of_item(0)))
    check_first()


def agree(rank: int) -> None:
    with distributed.joined():
        check_order()
        check_nested()
        check_first()
        check_error_in_work()
        importlib.import_module("torch.distributed.nn.functional")  # as torch._dynamo does
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
    assert not any("gloo" in name for name in names)  # threads of the group
    assert not dist.is_initialized() and distributed.count() == 1
    assert [int(found) for _, (*_, found) in distributed.dealt(range(2), of_item)] == [0, 0]


def fail_between(rank: int) -> None:
    """Rank 1 fails where nobody asks it anything; the others are told at their next question."""
    try:
        with distributed.joined():
            print(f"rank {rank} speaks")
            if rank == 1:
                raise UserError(MESSAGE)
            list(distributed.dealt(range(4), of_item))
    except UserError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        sys.exit(1)


def die(rank: int) -> None:
    """Rank 1 is killed in the middle of its work."""

    def work(item: int) -> tuple[Tensor, ...]:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return of_item(item)

    try:
        with distributed.joined():
            list(distributed.dealt(range(6), work))
    except UserError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](int(os.environ["RANK"]))
