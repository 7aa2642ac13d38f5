r"""Work dealt out to the ranks of one run, and its results brought to all of them in the order of the work.

    rank r of R computes items r, r + R, r + 2R, ...        every rank then reads the results 0, 1, 2, ... in this order

What follows a result is done by every rank alike, sums included, so that a run ends in the same bits whatever R is, as far as the
ranks' devices compute alike. A rank that fails says so in the place of its next answer: all ranks raise together, none waits for it.

Nothing is split but within `joined`, which `torchrun --nproc-per-node R` gives its ranks. Everywhere else there is one rank, even in a
process that has a process group of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CertificationError, UserError

Item = TypeVar("Item")
Value = TypeVar("Value")

_MEETING = timedelta(minutes=10)  # until all ranks have to be there
_PATIENCE = timedelta(days=7)  # a rank that ends closes its connections; one that is slow is waited for
_TELLING = 600.0  # seconds until a rank that failed stops waiting to be asked, and ends the run by ending


class _Ranks(NamedTuple):
    """This process among the ranks of the run."""

    rank: int
    size: int


class _LostError(UserError):
    """Another rank has ended: there is nobody to tell."""


class _Answer(NamedTuple):
    """What a rank says of its work: a result that can be pickled, or why there is none."""

    value: Any
    error: Exception | None


_ALONE = _Ranks(0, 1)
_ranks = _ALONE  # set by `joined` alone
_told = False  # whether all ranks know the error that is on its way up


def count() -> int:
    """R, the ranks that this run is split over; 1 outside `joined`."""
    return _ranks.size


def is_first() -> bool:
    """Whether this is rank 0, which alone writes files."""
    return _ranks.rank == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within: this process is one of the ranks that torchrun started, and `dealt` and `of_first` involve all of them.

    The ranks are those of the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without them, or with one, nothing happens. Nor
    does anything where the process has a process group already. Ranks other than 0 print nothing. An error of one rank ends all: rank 0
    raises it, the others exit with status 1.

    Raises:
        UserError: what another rank has raised, or that it has ended without a word; ranks that do not find each other.
    """
    global _ranks, _told
    there = os.environ.keys() >= {"RANK", "WORLD_SIZE"}
    ranks = _Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if there else _ALONE
    if ranks.size == 1 or _ranks is not _ALONE or dist.is_initialized():
        yield
        return
    _meet(ranks)
    _ranks, _told = ranks, False
    try:
        with _silent() if ranks.rank else contextlib.nullcontext():
            yield
            _agreed(lambda: None)  # nobody leaves before rank 0 has written everything
    except Exception as error:
        lost = isinstance(error, _LostError)
        known = lost or _told or _tell(error)
        if known and not (lost and torch.cuda.is_available()):  # NCCL might wait for the one that is lost
            dist.destroy_process_group()
        if ranks.rank and known and isinstance(error, (UserError, CertificationError)):
            raise SystemExit(1) from error  # rank 0 says it
        raise
    else:
        dist.destroy_process_group()
    finally:
        _ranks = _ALONE


def dealt(
    items: Iterable[Item], compute: Callable[[Item], Iterable[Tensor]]
) -> Iterator[tuple[Item, Iterator[Tensor]]]:
    """Every item with what `compute` gives for it, in order, on every rank; rank r computes items r, r + R, r + 2R, ...

    Args:
        items: the same on every rank.
        compute: an item to tensors, on the CPU or on this rank's GPU. What it calls is this rank's own: `dealt` within it deals nothing.

    Yields:
        (item, its tensors, one at a time). All ranks have to read all of them before the next item; one at a time so that results as
        large as a model need no room for several of them. On a single rank a generator's tensors are computed as they are read.

    Raises:
        Exception: what `compute` raises, on whichever rank.
    """
    if _ranks.size == 1:
        for item in items:
            yield item, iter(compute(item))
        return
    remaining = iter(items)
    while turn := list(islice(remaining, _ranks.size)):
        own: list[Tensor] = []

        def work(turn: list[Item] = turn, own: list[Tensor] = own) -> list[_Kind]:
            if _ranks.rank < len(turn):
                with _by_itself():
                    own += compute(turn[_ranks.rank])
            return [_Kind.of(x) for x in own]

        kinds = _agreed(work)
        for source, item in enumerate(turn):
            yield item, _sent(source, kinds[source], own)


def of_first(compute: Callable[[], Value]) -> Value:
    """What rank 0 computes, on every rank; the others compute nothing. It has to be picklable.

    Raises:
        Exception: what `compute` raises on rank 0.
    """
    if _ranks.size == 1:
        return compute()
    found: list[Any] = [None]

    def work() -> None:
        if _ranks.rank == 0:
            with _by_itself():
                found[0] = compute()

    _agreed(work)
    with _connected():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def tensors_of_first(compute: Callable[[], Mapping[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """As `of_first` for tensors by name, or None; they may be as large as a model."""
    if _ranks.size == 1:
        alone = compute()
        return None if alone is None else dict(alone)
    own: dict[str, Tensor] = {}

    def read() -> dict[str, _Kind] | None:
        found = compute()
        own.update(found or {})
        return None if found is None else {name: _Kind.of(x) for name, x in found.items()}

    kinds = of_first(read)
    if kinds is None:
        return None
    return dict(zip(kinds, _sent(0, list(kinds.values()), list(own.values())), strict=True))


def own_device(asked: str | None) -> str | None:
    """The device of this rank: under torchrun the GPU of its local number; otherwise what was asked for.

    Raises:
        UserError: more ranks than GPUs, one GPU for all ranks, or a device that ranks cannot exchange tensors of.
    """
    if _ranks.size == 1:
        return asked
    kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu" or (kind == "cuda" and not torch.cuda.is_available()):
        return kind
    if kind != "cuda":
        raise UserError(
            f"device: got {asked!r} for {_ranks.size} ranks, expected cpu or cuda: each rank takes the GPU of its own number. Pass one "
            "of these, or choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    local, there = int(os.environ.get("LOCAL_RANK", _ranks.rank)), torch.cuda.device_count()
    if local >= there:
        raise UserError(
            f"device: rank {_ranks.rank} is number {local} on its machine, which has {there} GPU(s); expected a GPU for every rank. Start "
            f"torchrun with --nproc-per-node {there}, or pass --device cpu."
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


class _Kind(NamedTuple):
    """What a rank has to know of a tensor to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, x: Tensor) -> _Kind:
        return cls(tuple(x.shape), x.dtype, x.device.type)


def _sent(source: int, kinds: list[_Kind], own: list[Tensor]) -> Iterator[Tensor]:
    """The tensors of rank `source`, of these kinds, on every rank; `source` takes them off its list."""
    for kind in kinds:
        if _ranks.rank == source:
            x = own.pop(0).detach().contiguous()
        else:
            x = torch.empty(kind.shape, dtype=kind.dtype, device=kind.device)
        if x.numel():
            with _connected():
                dist.broadcast(x.view(-1).view(torch.uint8), src=source)  # as bytes: any dtype, any library
        yield x


def _agreed(work: Callable[[], Value]) -> list[Value]:
    """What every rank's work gives, on every rank.

    Raises:
        Exception: its own, on a rank that has failed; the first other rank's, on one that has not.
    """
    global _told
    own: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as error:
        own = error
    answers = _asked(_Answer(value, own))
    failed = [(rank, answer.error) for rank, answer in enumerate(answers) if answer.error is not None]
    if failed:
        _told = True
        raise own or failed[0][1]
    return [answer.value for answer in answers]


def _asked(answer: _Answer) -> list[_Answer]:
    """The answers of all ranks."""
    if answer.error is not None and not isinstance(answer.error, (UserError, CertificationError)):
        said = f"{type(answer.error).__name__}: {answer.error}"
        other = UserError(f"ranks: rank {_ranks.rank} has failed, its traceback is beside this: {said}.")
        answer = _Answer(None, other)  # not every exception can be pickled
    answers: list[Any] = [None] * _ranks.size
    with _connected():
        dist.all_gather_object(answers, answer)
    return answers


def _tell(error: Exception) -> bool:
    """Answer the ranks' next question with an error; whether they have asked before patience ran out."""
    done: list[bool] = []

    def answer() -> None:
        with contextlib.suppress(UserError):
            _asked(_Answer(None, error))
            done.append(True)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(_TELLING)
    return bool(done)


def _meet(ranks: _Ranks) -> None:
    """The process group of all ranks: results lie on the CPU and go by gloo; parameters on a GPU go by NCCL."""
    # Loaded later, its default arguments would hold the group, whose threads then outlive `joined` and can abort Python's exit.
    import torch.distributed.nn.functional

    try:
        store, rank, size = next(dist.rendezvous("env://", ranks.rank, ranks.size, timeout=_MEETING))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"ranks: rank {ranks.rank} of {ranks.size} does not find the others: {str(error).splitlines()[0]} The environment has RANK and "
            "WORLD_SIZE; start with torchrun, which sets all that is needed, or unset them for a run of one process."
        ) from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Within: this rank asks no other."""
    global _ranks
    before = _ranks
    _ranks = _Ranks(before.rank, 1)
    try:
        yield
    finally:
        _ranks = before


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Within: a failed exchange is the end of another rank."""
    try:
        yield
    except RuntimeError as error:
        raise _LostError(
            f"ranks: another of the {_ranks.size} ranks has ended, so this run cannot go on: {str(error).splitlines()[0]} If it was "
            "killed, memory may have run out; --resume goes on with what is finished."
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within: nothing is printed."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
