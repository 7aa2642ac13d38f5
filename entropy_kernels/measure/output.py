"""The output directory: what a run that ends early leaves in it, and a finished report shown again."""

from __future__ import annotations

import contextlib
import errno
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..errors import CertificationError, UserError
from ..report import Result
from .config import MeasureConfig
from .store import STAGES, close_store, refuse_another, stopped_run


@contextlib.contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """Within: the directory exists, and a run that ends early says how to go on.

    After an error in the input, what this run has begun is removed unless it has computed something; a run that it found there stays.

    Raises:
        UserError: the directory cannot be written to, or is full.
    """
    new, found = not directory.exists(), stopped_run(directory) is not None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except (UserError, CertificationError):
        if not found:
            _discard_if_empty(directory, new)
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not str(error.filename).startswith(str(directory)):
            raise
        advice = "Make room there." if full else "Make it writable, or choose another directory."
        raise UserError(
            f"output: {directory} cannot be written to: {error.strerror}. {advice} Nothing in it is half-written. "
            f"{_how_to_go_on(directory)}"
        ) from error
    except KeyboardInterrupt:
        print(textwrap.fill(_how_to_go_on(directory), width=110, break_long_words=False), file=sys.stderr)
        raise


def finished_report(config: MeasureConfig, directory: Path) -> Result | None:
    """The report of a run that is finished, to be shown again by `resume`; None where there is work left.

    Raises:
        UserError: it is the report of another configuration.
    """
    if not config.resume or not (directory / "report.html").exists():  # `Result.save` writes it last
        return None
    result = Result.load(directory)
    wanted = config.to_json()
    for name in ("etas", "learning_rate"):  # the report has those that were chosen, in ascending order
        if not wanted[name]:
            del wanted[name]
    if "etas" in wanted:
        wanted["etas"] = sorted(set(config.etas))
    del wanted["output"]
    if config.memory_budget is not None:  # the report has what was lowered to it
        del wanted["micro_batch_tokens"], wanted["sample_batch"]
    there = result.report["config"]
    refuse_another(directory, {name: there.get(name) for name in wanted}, wanted)
    close_store(directory)
    return result


def _how_to_go_on(directory: Path) -> str:
    if stopped_run(directory) is None:
        return "Nothing was computed yet; the same command starts again."
    return f"To go on, repeat the command with --output {directory} --resume."


def _discard_if_empty(directory: Path, new: bool) -> None:
    """Remove a run that has computed nothing yet, and a directory that was made for it and is empty."""
    stages = directory / STAGES
    if not any(stages.glob("*.safetensors")) and not any(stages.glob("*.parts")):
        close_store(directory)
    if new:
        with contextlib.suppress(OSError):  # not empty: rollouts are worth keeping
            directory.rmdir()
