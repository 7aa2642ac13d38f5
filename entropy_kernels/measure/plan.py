"""`python -m entropy_kernels.measure plan REPORT --stderr X`: how many prompts, from a report that serves as a pilot.

The report's own tokens say how much a prompt and a response vary (docs/theory.md, section 11), its timings what a response costs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import stats
from ..errors import UserError
from ..report import Result
from ..report.numbers import in_words, number

GROUP_SIZES = (1, 2, 4, 8)


class Pilot(NamedTuple):
    """What a plan needs of a report: influence of every sequence on ĥ', its prompt, and costs in seconds."""

    influence: np.ndarray  # [N]
    prompt: np.ndarray  # [N]
    eta: float
    per: str
    fixed: float
    per_sequence: float


def run(arguments: Sequence[str]) -> int:
    """Print the plan; returns the exit status 0.

    Raises:
        UserError: a report that cannot serve as a pilot, or a standard error that is not positive.
    """
    p = argparse.ArgumentParser(
        prog="python -m entropy_kernels.measure plan",
        description="From a finished report: the number of held-out prompts for which the change of entropy has a wanted standard error.",
        allow_abbrev=False,
    )
    p.add_argument("report", help="output directory of a measurement")
    p.add_argument(
        "--stderr", type=float, required=True, metavar="X", help="wanted standard error of ΔH, in nats"
    )
    p.add_argument("--eta", type=float, metavar="η", help="at this learning rate (default: the checkpoint's)")
    p.add_argument(
        "--group-sizes",
        type=int,
        nargs="+",
        default=GROUP_SIZES,
        metavar="G",
        help="responses per prompt to consider",
    )
    given = p.parse_args(arguments)
    print(plan(Result.load(given.report), given.stderr, eta=given.eta, group_sizes=tuple(given.group_sizes)))
    return 0


def plan(
    result: Result, stderr: float, *, eta: float | None = None, group_sizes: Sequence[int] = GROUP_SIZES
) -> str:
    """The plan in words, for a standard error of ΔH at one learning rate.

    Args:
        result: a finished measurement, the pilot.
        stderr: wanted, in nats per token or sequence, as the report counts.
        eta: learning rate; None for the checkpoint's.
        group_sizes: responses per prompt to consider; with one per prompt in the pilot, only 1 can be planned.

    Raises:
        UserError: a report without the tokens or rollouts of E, or made with a baseline; a standard error that is not positive.
    """
    if not stderr > 0:
        raise UserError(f"stderr: got {stderr}, expected a positive standard error in nats.")
    pilot = read_pilot(result, eta)
    parts = stats.components(pilot.influence, pilot.prompt)
    sizes = np.bincount(np.unique(pilot.prompt, return_inverse=True)[1])
    chosen = tuple(group_sizes) if sizes.max() > 1 else (1,)
    first: stats.Estimate = result.report["derivatives"]["first"]
    unit = in_words(f"nats/{pilot.per}")
    lines = [
        f"Pilot: {len(sizes)} prompts, {len(pilot.prompt)} responses; ΔH at η = {number(pilot.eta)} has a standard error of "
        f"{number(pilot.eta * first.stderr)} {unit}.",
        f"Wanted: {number(stderr)} {unit}.",
        "",
        f"{'group size':>10}  {'prompts':>9}  {'95 % interval':>19}  {'responses':>9}  {'time':>9}",
    ]
    for size in chosen:
        needed = stats.prompts_needed(parts, size, stderr / pilot.eta)
        if math.isnan(needed.prompts):
            lines.append(f"{size:>10}  {'not resolved by this pilot':>31}")
            continue
        B = max(math.ceil(needed.prompts), 2)
        seconds = pilot.fixed + pilot.per_sequence * B * size
        interval = f"{math.ceil(needed.low)} to {math.ceil(needed.high)}"
        lines.append(f"{size:>10}  {B:>9}  {interval:>19}  {B * size:>9}  {in_time(seconds):>9}")
    lines += ["", *_advice(parts, chosen)]
    return "\n".join(lines)


def read_pilot(result: Result, eta: float | None) -> Pilot:
    """Influences from the token table, costs from the timings.

    Raises:
        UserError: tables or timings missing, a baseline, no learning rate.
    """
    report, tables = result.report, result.tables
    missing = [name for name in ("tokens_e", "rollouts_e") if name not in tables]
    if missing or "derivatives" not in report:
        raise UserError(
            f"report: it has no {', '.join(missing) or 'derivatives'}, expected the complete output directory of one measured step."
        )
    config: Mapping[str, Any] = report["config"]
    if config.get("baseline", "none") != "none":
        raise UserError(
            f"report: it was made with --baseline {config['baseline']}, whose values are not stored. Use a pilot without a baseline; "
            "the variance ratios in its report say what a baseline would save."
        )
    tokens = tables["tokens_e"]
    sequence, position = (tokens[name].to_numpy() for name in ("sequence", "position"))
    shape = (int(sequence.max()) + 1, int(position.max()) + 1)

    def grid(name: str) -> np.ndarray:
        x = np.zeros(shape)
        x[sequence, position] = tokens[name].to_numpy()
        return x

    mask = np.zeros(shape, dtype=bool)
    mask[sequence, position] = True
    values = stats.TokenValues(grid("entropy"), grid("logprob"))
    sums = stats.prompt_sums(
        values,
        values,
        mask,
        np.arange(shape[0]),
        per=config["per"],
        estimator=config["estimator"],
        tangents=stats.TokenTangents(grid("d_entropy"), grid("d_logprob")),
    )
    prompt = tables["rollouts_e"]["group_index"].to_numpy()
    rate = config.get("learning_rate") if eta is None else eta
    if rate is None or not rate > 0:
        raise UserError(f"eta: got {rate}, expected a positive learning rate; pass --eta.")
    fixed, per_sequence = costs(report, shape[0])
    return Pilot(stats.influence_first(sums), prompt, float(rate), config["per"], fixed, per_sequence)


def costs(report: Mapping[str, Any], sequences: int) -> tuple[float, float]:
    """(seconds whatever E's size, seconds per sequence of E) of the pilot; its sampling is shared out by tokens."""
    timings: Mapping[str, float] = report.get("timings", {})
    rollouts = report.get("rollouts", {})
    tokens = {name: rollouts.get(name, {}).get("tokens", 0) for name in ("u", "e")}
    share = tokens["e"] / max(sum(tokens.values()), 1)
    of_e = timings.get("entropy", math.nan) + share * timings.get("rollouts", 0.0)
    return sum(timings.values()) - of_e, of_e / sequences


def in_time(seconds: float) -> str:
    """Seconds as a person would say them: "40 s", "12 min", "3.5 h"; "unknown" for NaN."""
    if math.isnan(seconds):
        return "unknown"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _advice(parts: Any, chosen: tuple[int, ...]) -> list[str]:
    """What more responses per prompt are good for."""
    times = "Times are those of the pilot, scaled: the same machine, learning rates and length of responses."
    if chosen == (1,):
        return ["The pilot has one response per prompt, so nothing can be said of more.", times]
    within, one = stats.within_variance(parts), stats.prompt_variance(parts, 1)
    share = within.value / one.value if one.value else math.nan
    return [
        f"{number(100 * share, 2)} % of the variance lies between responses to one prompt and falls with each of them; the rest falls",
        "with prompts alone. One response per prompt takes the fewest responses; more per prompt need fewer prompts.",
        times,
    ]
