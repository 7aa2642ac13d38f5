"""`series`: the change of entropy along the checkpoints of a run, measured and predicted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from .. import distributed
from ..errors import UserError
from ..report import SeriesResult
from .cli import Parser, add_flags
from .output import working_in
from .series_config import SHARED, SeriesConfig
from .store import close_store, refuse_another

_EPILOG = """
  python -m entropy_kernels.measure series 'run/checkpoint-*' --dataset held_out.jsonl --output series

Held-out responses are sampled at the first checkpoint, re-weighted at the following ones, and sampled again when the weights no longer
allow it. series.html, series.json, series.parquet (a row per interval), influence.parquet (a row per interval and prompt) and
rollouts_e.parquet are written to --output.
"""


def parser() -> argparse.ArgumentParser:
    """The checkpoints, --min-ess, and the flags of one measurement that are not about the update."""
    p = Parser(
        prog="python -m entropy_kernels.measure series",
        description="Measure and predict how entropy changes from checkpoint to checkpoint of a run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument(
        "checkpoints",
        nargs="+",
        help="a pattern such as 'run/checkpoint-*', ordered by the number at the end, or the directories",
    )
    p.add_argument(
        "--min-ess",
        type=float,
        metavar="SHARE",
        help="share of the responses that the effective sample size must reach at both ends of an interval; otherwise "
        "responses are sampled again (default: 0.5)",
    )
    p.add_argument(
        "--truth",
        choices=("direct", "integrated"),
        help="direct: difference of end points; integrated: also the integral of the derivative along the chord (default: direct)",
    )
    p.add_argument(
        "--second-order",
        action="store_true",
        help="the quadratic prediction as well, for three times the work",
    )
    add_flags(p, only=SHARED - {"truth", "second_order"})
    return p


def config_from(arguments: Sequence[str]) -> SeriesConfig:
    """The series that a command line asks for."""
    given = vars(parser().parse_args(arguments))
    return SeriesConfig.along(*given.pop("checkpoints"), **given)


def run(arguments: Sequence[str]) -> int:
    """The command; returns the exit status. Of several ranks, the first has the directory."""
    config = config_from(arguments)
    directory = distributed.of_first(lambda: output_directory(config))
    result = finished_series(config, directory) if distributed.is_first() else None
    finished = distributed.of_first(lambda: result is not None)
    if not finished:
        with working_in(directory) if distributed.is_first() else nullcontext():
            from transformers.utils import logging

            from .series import measure_series

            logging.disable_progress_bar()  # one bar at a time: ours
            config = replace(config, settings=replace(config.settings, output=str(directory)))
            result = measure_series(config, directory=str(directory))
            if distributed.is_first():
                result.save(directory)
                close_store(directory)
    if result is not None:
        print(result.summary())
    print(f"\nreport: {directory / 'series.html'}")
    return 0


def output_directory(config: SeriesConfig) -> Path:
    """The directory asked for if it holds no series yet, else the first free `entropy_series-N`.

    Raises:
        UserError: the directory asked for holds a series already, or is a file; `resume` without a directory.
    """
    output, resume = config.settings.output, config.settings.resume
    if output is None:
        if resume:
            raise UserError(
                "resume: of which series? Pass --output with the directory of the one that was stopped."
            )
        number = 1
        while (path := Path("entropy_series" if number == 1 else f"entropy_series-{number}")).exists():
            number += 1
        return path
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise UserError(f"output: {path} is a file, expected a directory; choose another name.")
    for name in ("series.json", "report.json"):
        if (path / name).exists() and not (resume and name == "series.json"):
            raise UserError(
                f"output: {path} holds {name} already, which is kept; choose another directory or remove it."
            )
    return path


def finished_series(config: SeriesConfig, directory: Path) -> SeriesResult | None:
    """A series that is finished, to be shown again by `resume`; None where there is work left.

    Raises:
        UserError: it is of another configuration.
    """
    if not config.settings.resume or not (directory / "series.html").exists():  # `save` writes it last
        return None
    result = SeriesResult.load(directory)
    wanted = {name: value for name, value in config.to_json().items() if name != "output"}
    there = result.report["config"]
    refuse_another(directory, {name: there.get(name) for name in wanted}, wanted)
    close_store(directory)
    return result
