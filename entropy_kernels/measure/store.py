r"""What the stages of a run have computed, on disk, so that a run that was stopped goes on where it was.

    OUTPUT/stages/run.json                      everything that determines the numbers; a run of another is refused
    OUTPUT/stages/NAME.safetensors, NAME.json   a finished stage
    OUTPUT/stages/NAME.parts/17.safetensors     part 17 (a micro-batch, a batch of samples) of a stage that is not finished

A file is complete or absent: it is written under another name, then moved. What cannot be read, or whose checksum is wrong (a machine
that lost power), is as good as absent and is computed again. Tensors come back bit for bit, so a run that went on ends in the numbers of
one that was never stopped. `Store(None)` keeps nothing and computes everything. Where a run is split over ranks, the store is that of
rank 0, the others have `Store(None)`: what rank 0 has read all have, and what it has not all compute together.

    first = store.in_parts("node_1e-06", lambda parts: token_tangents(policy, batch, v, parts=parts)._asdict())
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import distributed
from ..errors import UserError

Parts = MutableMapping[int, tuple[Tensor, ...]]
STAGES, RUN_FILE = "stages", "run.json"
_WRITING_SHARE = 0.1  # of the time spent computing a running sum; see `_LastPart`


@dataclass(frozen=True)
class Store:
    """Stages by name in a directory, or nowhere.

    Attributes:
        directory: where stages are kept; None keeps nothing.
        fingerprint: of everything that determines the numbers; files with another are not read.
    """

    directory: Path | None
    fingerprint: str = ""

    def tensors(
        self, name: str, compute: Callable[[], Mapping[str, Tensor | np.ndarray]]
    ) -> dict[str, Tensor]:
        """What a stage computed: read if it is finished, else computed and kept.

        Args:
            name: of the stage, unique in the run; letters, digits and `._+-`.
            compute: gives the stage's tensors or arrays by name.

        Returns:
            The tensors on the CPU, whether they were read or computed, in their own dtypes.
        """
        return self.in_parts(name, lambda _: compute())

    def in_parts(
        self,
        name: str,
        compute: Callable[[Parts | None], Mapping[str, Tensor | np.ndarray]],
        *,
        running: bool = False,
    ) -> dict[str, Tensor]:
        """As `tensors`, for a stage that can go on from the middle.

        Args:
            name: of the stage.
            compute: takes the parts that are finished already and adds to them; None where nothing is kept.
            running: a part is the sum so far, so that only the last is needed.
        """
        path = self._path(name, ".safetensors")
        found = distributed.tensors_of_first(
            lambda: None if path is None else read_tensors(path, self.fingerprint)
        )
        if found is not None:
            return found
        if path is None:
            return _on_cpu(compute(None))
        computed = _on_cpu(compute(self.parts(name, running=running)))
        write_tensors(path, computed, fingerprint=self.fingerprint)
        shutil.rmtree(path.with_name(f"{name}.parts"), ignore_errors=True)
        return computed

    def parts(self, name: str, *, running: bool = False) -> Parts | None:
        """The parts alone, for a stage whose result is kept in another way; see `in_parts`."""
        folder = self._path(name, ".parts")
        return None if folder is None else (_LastPart if running else _Parts)(folder, self.fingerprint)

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """As `tensors`, for what JSON can hold; NaN and infinity included."""
        path = self._path(name, ".json")
        text = distributed.of_first(lambda: None if path is None else _read_json(path))
        if text is None:
            here = json.dumps(compute())
            text = distributed.of_first(lambda: here)  # one answer, where ranks might decide otherwise
            if path is not None:
                write_text(path, text)
        return json.loads(text)  # the same types, whether it was there or not

    def within(self, name: str) -> Store:
        """A store for stages of their own, such as those of one checkpoint of a series."""
        path = self._path(name, "")
        return self if path is None else Store(path, self.fingerprint)

    def file(self, name: str) -> Path | None:
        """Where a stage may keep a file of another format, complete or absent; None where nothing is kept."""
        return self._path(name, "")

    def _path(self, name: str, suffix: str) -> Path | None:
        assert re.fullmatch(r"[\w.+-]+", name), name
        if self.directory is None:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / f"{name}{suffix}"


NOWHERE = Store(None)


def open_store(directory: str | Path | None, identity: Mapping[str, Any], *, resume: bool) -> Store:
    """The store of a run in an output directory.

    Args:
        directory: of the output; None keeps nothing.
        identity: everything that determines the numbers: names to what JSON can hold.
        resume: whether a run that was stopped there may go on.

    Raises:
        UserError: a run was stopped there and `resume` is not set, or it was a run of something else.
    """
    if directory is None:
        return NOWHERE
    stages = Path(directory) / STAGES
    wanted = json.loads(json.dumps(identity))
    there = stopped_run(directory)
    if there is not None and not resume:
        raise UserError(
            f"output: {directory} holds a run that was stopped. Pass --resume to go on with it, choose another directory, or remove "
            f"{stages}."
        )
    if there is None:
        shutil.rmtree(stages, ignore_errors=True)  # nothing in it says what it belongs to
        stages.mkdir(parents=True)
        write_text(stages / RUN_FILE, json.dumps(wanted, indent=2))
    else:
        refuse_another(directory, there, wanted)
    return Store(stages, hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16])


def stopped_run(directory: str | Path) -> dict[str, Any] | None:
    """What determines the run that was stopped in an output directory; None where there is none."""
    try:
        found = json.loads((Path(directory) / STAGES / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def refuse_another(directory: str | Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of something else.

    Raises:
        UserError: naming what differs.
    """
    names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if names:
        listed = "; ".join(f"{n} was {there.get(n)!r} and is now {wanted.get(n)!r}" for n in names[:4])
        more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
        raise UserError(
            f"resume: the run in {directory} measured something else: {listed}{more}. Pass what it was started with, or another --output."
        )


def close_store(directory: str | Path) -> None:
    """Remove what was kept for going on: the report is complete."""
    shutil.rmtree(Path(directory) / STAGES, ignore_errors=True)


def file_identity(path: str | Path | None) -> Any:
    """Names, sizes and modification times of a file, or of the files in a directory (its sub-directory `model` included).

    None for what is not on this machine, such as a hub id.
    """
    if path is None or not Path(path).exists():
        return None
    given = Path(path)
    folders = [given, given / "model"]
    files = [given] if given.is_file() else [f for d in folders for f in d.glob("*") if f.is_file()]
    return sorted([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, fingerprint: str | None = None, durable: bool = True
) -> None:
    """A safetensors file, complete or absent.

    Args:
        path: of the file.
        tensors: by name, on any device.
        fingerprint: of the run, kept in the file's metadata with a checksum and the order of the names; None for the tensors alone.
        durable: whether it must also survive a loss of power.

    Raises:
        OSError: no room, or no permission; nothing is left behind.
    """
    here = _on_cpu(tensors)
    metadata = None
    if fingerprint is not None:  # safetensors sorts by name, and the order of parameters decides that of sums
        metadata = {"run": fingerprint, "crc32": str(_checksum(here)), "names": json.dumps(list(here))}

    def write(part: Path) -> None:
        try:
            save_file(here, part, metadata=metadata)
        except SafetensorError as error:  # has no errno
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error

    replace_file(path, write, durable=durable)


def read_tensors(path: Path, fingerprint: str = "") -> dict[str, Tensor] | None:
    """What `write_tensors` wrote, on the CPU; None if it is not there, not whole, or of another run."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in json.loads(metadata["names"])}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    same = metadata.get("run") == fingerprint and metadata.get("crc32") == str(_checksum(found))
    return found if same else None


def write_text(path: Path, text: str) -> None:
    """A text file, complete or absent."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Write under another name, then move into place; nothing is left behind where that fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        if durable:
            _sync(part)
        os.replace(part, path)
        if durable:
            _sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class _Parts(Parts):
    """Parts of a stage by number, each in a file of its own."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.numbers = {int(file.stem) for file in folder.glob("*.safetensors") if file.stem.isdecimal()}

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and number in self.numbers and self._read(number) is not None

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        found = self._read(number)
        if found is None:
            raise KeyError(number)
        return tuple(found[str(i)] for i in range(len(found)))

    def __setitem__(self, number: int, tensors: tuple[Tensor, ...]) -> None:
        named = {str(i): x for i, x in enumerate(tensors)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(number), named, fingerprint=self.fingerprint, durable=False)
        self.numbers.add(number)

    def __delitem__(self, number: int) -> None:
        self.numbers.remove(number)
        self._file(number).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter([number for number in sorted(self.numbers) if number in self])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _read(self, number: int) -> dict[str, Tensor] | None:
        return read_tensors(self._file(number), self.fingerprint)


class _LastPart(_Parts):
    """A sum so far, as large as the parameters: only the last is kept, and writing takes a small share of the time."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        super().__init__(folder, fingerprint)
        self.next_write = 0.0

    def __setitem__(self, number: int, tensors: tuple[Tensor, ...]) -> None:
        start = time.monotonic()
        if start < self.next_write:
            return
        super().__setitem__(number, tensors)
        for old in self.numbers - {number}:
            del self[old]
        end = time.monotonic()
        self.next_write = end + (end - start) / _WRITING_SHARE


def _read_json(path: Path) -> str | None:
    """The text of a file that is there and whole."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (FileNotFoundError, ValueError):
        return None
    return text


def _on_cpu(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(x).detach().to("cpu").contiguous() for name, x in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _sync(path: Path) -> None:
    """Have the file, or the directory's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
