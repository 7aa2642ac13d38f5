"""The command line: flags → MeasureConfig → report; sub-commands; errors in one paragraph."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from .. import distributed
from ..errors import CertificationError, UserError
from .config import CHOICES, MeasureConfig, output_directory
from .output import finished_report, working_in
from .stopping import Stopped, stoppable

if TYPE_CHECKING:
    from .forecast import Forecast

_EPILOG = """
Without any argument the embedded demo is measured. A typical run:

  python -m entropy_kernels.measure --ckpt run/checkpoint-200 --dataset train.jsonl --output report

The report (report.html, report.json, Parquet tables, update.safetensors) is written to --output. docs/theory.md says what every
figure means.
"""

# Sub-command → the module of this package whose run(arguments) does it and returns the exit status; loaded on use.
COMMANDS: dict[str, str] = {"compare": "compare_cli", "plan": "plan", "series": "series_cli"}
_SPLIT = ("series",)  # those of them that several ranks may do together


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are paragraphs like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}. {self.prog} --help lists what there is.")


def parser() -> argparse.ArgumentParser:
    """Every flag, grouped by what it is about; defaults are those of MeasureConfig."""
    p = Parser(
        prog="python -m entropy_kernels.measure",
        description="Measure how one RL step changes a language model's entropy, and what was predicted.",
        epilog=_EPILOG + "".join(f"Sub-command with its own --help: {name}\n" for name in COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(p)
    return p


def add_flags(p: argparse.ArgumentParser, only: Container[str] | None = None) -> None:
    """Give a parser the flags of MeasureConfig, all of them or those of the settings named in `only`."""
    default = {f.name: f.default for f in fields(MeasureConfig)}

    def add(group: argparse._ArgumentGroup, flag: str, text: str, **options: object) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if only is not None and name not in only:
            return
        value = default[name]
        shown = "" if value in (None, (), False) else f" (default: {value})"
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        group.add_argument(flag, help=text + shown, **options)  # type: ignore[arg-type]

    what = p.add_argument_group("what to measure")
    add(
        what,
        "--ckpt",
        "checkpoint directory of the Hugging Face Trainer or TRL, full or a LoRA adapter: parameters and optimizer state",
    )
    add(
        what,
        "--model",
        "model directory, .gguf or hub id: an adapter's base (default: the one it names), or instead of a checkpoint",
    )
    add(
        what,
        "--parameters",
        "what is measured: all that were trained, lora, or a regular expression of names; the rest is held constant",
        metavar="WHICH",
    )
    add(what, "--output", "directory for the report (default: entropy_report)")
    add(what, "--dry-run", "only predict time and memory; nothing is sampled or written", action="store_true")
    add(what, "--resume", "go on with the run that was stopped in --output", action="store_true")

    data = p.add_argument_group("prompts and samples")
    add(data, "--dataset", "hub id, or a .json, .jsonl or .parquet file of prompts")
    add(data, "--dataset-config", "configuration of a hub data set, such as main for GSM8K")
    add(data, "--dataset-split", "its split")
    add(data, "--prompt-column", "its column of prompts (default: guessed)")
    add(data, "--answer-column", "its column of answers (default: guessed)")
    add(data, "--chat-template", "apply the tokenizer's chat template", action="store_true")
    add(data, "--reward", "name of a built-in reward, or file.py:function")
    add(data, "--rollouts-u", "Parquet file: use these completions for the update instead of sampling")
    add(data, "--rollouts-e", "Parquet file: measure on these completions instead of sampling")
    for flag, text in (
        ("--prompts-u", "prompts of the update batch"),
        ("--group-size", "responses per prompt of the update batch"),
        ("--prompts-e", "held-out prompts to measure on"),
        ("--group-size-e", "responses per held-out prompt"),
        ("--max-new-tokens", "longest response"),
        ("--seed", "of prompts and samples"),
        ("--sample-batch", "responses sampled at once"),
    ):
        add(data, flag, text, type=int, metavar="N")
    add(data, "--temperature", "of the policy: sampling and entropy", type=float, metavar="τ")
    add(
        data,
        "--top-k",
        "truncate the policy to its K most probable tokens: sampling and entropy",
        type=int,
        metavar="K",
    )
    add(
        data,
        "--top-p",
        "then to the fewest of them that hold this share of the probability",
        type=float,
        metavar="P",
    )

    step = p.add_argument_group("the step")
    add(step, "--update", "adamw, rmsprop, sgd, next:CHECKPOINT or FILE.safetensors", metavar="RULE")
    add(step, "--advantage", "how rewards become advantages")
    add(step, "--loss", "how tokens are weighted in the loss")
    add(step, "--max-grad-norm", "gradient clipping of the trainer, 0 for none", type=float, metavar="X")
    add(step, "--ratio", "importance ratio of a stale --rollouts-u, by the log-probs recorded in it")
    add(
        step,
        "--clip-low",
        "the ratio is clipped below 1 − this (default with --ratio: 0.2)",
        type=float,
        metavar="X",
    )
    add(step, "--clip-high", "and above 1 + this (default: as --clip-low)", type=float, metavar="X")
    add(
        step, "--kl-coef", "β of a KL term; 0: leave it out though the log shows one", type=float, metavar="β"
    )
    add(step, "--ref-model", "directory or hub id of the model that the KL term pulls to")
    add(
        step,
        "--kl-correction",
        "multiply the KL estimate by the importance ratio, as TRL does unless told otherwise (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    add(
        step,
        "--entropy-coef",
        "of an entropy bonus; 0: leave it out though the log shows one",
        type=float,
        metavar="X",
    )
    add(
        step,
        "--loss-law",
        "with --top-k or --top-p: log-probs in the loss are the policy's, or the full law's as in TRL",
    )
    add(step, "--learning-rate", "instead of the checkpoint's", type=float, metavar="η")
    add(
        step,
        "--etas",
        "learning rates to measure at (default: eight around it)",
        type=float,
        nargs="+",
        metavar="η",
    )

    who = p.add_argument_group("who moves the entropy")
    add(
        who,
        "--attribute",
        "influence of every token of the update, and the trial of published proxies",
        action="store_true",
    )
    add(
        who,
        "--fisher",
        "how responses of the update move each other: their Fisher kernel, its structure and what it predicts",
        action="store_true",
    )
    add(who, "--fisher-sequences", "responses in the kernel, in whole prompts", type=int, metavar="N")
    add(
        who,
        "--what-if",
        "drop, clip or re-weight tokens: RULE[:NUMBER,...] or FILE.parquet, several at once; an unknown RULE lists all",
        nargs="+",
        metavar="RULE",
    )
    add(who, "--verify", "measure what --what-if predicts", action="store_true")

    how = p.add_argument_group("how to measure")
    add(how, "--per", "entropy per token or per sequence")
    add(how, "--estimator", "importance weights")
    add(
        how,
        "--baseline",
        "control variate of E's scores, fitted across prompts, shared by truth and predictions",
    )
    add(how, "--truth", "form of the true change")
    add(
        how, "--second-order", "the quadratic prediction (default: on)", action=argparse.BooleanOptionalAction
    )
    add(how, "--integration-rtol", "accuracy of the integrated truth", type=float, metavar="X")
    add(how, "--precision", "of weights and arithmetic")
    add(how, "--device", "cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add(
        how,
        "--micro-batch-tokens",
        "tokens in one micro-batch; fewer need less memory",
        type=int,
        metavar="N",
    )
    add(
        how,
        "--memory-budget",
        "such as 8GB: lowers --micro-batch-tokens and --sample-batch until the predicted peak fits",
        metavar="SIZE",
    )


def config_from(arguments: Sequence[str]) -> MeasureConfig:
    """The configuration that a command line asks for; without checkpoint or model, the demo with the other flags applied."""
    given = vars(parser().parse_args(arguments))
    for several in ("etas", "what_if"):
        if several in given:
            given[several] = tuple(given[several])
    if "ckpt" not in given and "model" not in given:
        return MeasureConfig.demo(**given)
    return MeasureConfig(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for what a user can mend, 130 or 143 when it was stopped."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        run = import_module(f".{COMMANDS[given[0]]}", __package__).run
        return guarded(run if given[0] in _SPLIT else partial(by_one_rank, given[0], run), given[1:])
    return guarded(measure, given)


def guarded(run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of a command; what a user can mend is said in one paragraph, of several ranks by the first."""
    try:
        with stoppable(), distributed.joined():
            return run(arguments)
    except (UserError, CertificationError) as error:
        print(textwrap.fill(f"error: {error}", width=110, break_long_words=False), file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        return stop.code if isinstance(stop, Stopped) else 130


def by_one_rank(name: str, run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """A command whose work is not split.

    Raises:
        UserError: it was started on several ranks.
    """
    if distributed.count() > 1:
        raise UserError(
            f"ranks: {name} was started on {distributed.count()} ranks, but only measurements are split over ranks. Start it "
            "without torchrun."
        )
    return run(arguments)


def measure(arguments: Sequence[str]) -> int:
    """The command without a name: one step; of several ranks, the first has the directory."""
    config = config_from(arguments)
    if config.dry_run:
        return by_one_rank("--dry-run", partial(forecasted, config), arguments)
    directory = distributed.of_first(lambda: output_directory(config))
    result = finished_report(config, directory) if distributed.is_first() else None
    finished = distributed.of_first(lambda: result is not None)
    if not finished:
        with working_in(directory) if distributed.is_first() else nullcontext():
            from transformers.utils import logging

            from .steps import measure_step, with_output

            logging.disable_progress_bar()  # one bar at a time: ours
            result = measure_step(with_output(config, str(directory)), directory=str(directory))
    if result is not None:
        print(result.summary())
    print(f"\nreport: {directory / 'report.html'}")
    return 0


def forecasted(config: MeasureConfig, _: Sequence[str]) -> int:
    """`--dry-run`."""
    print(predicted(config).text())
    return 0


def predicted(config: MeasureConfig) -> Forecast:
    """The forecast for a configuration: loads the model, times a forward pass."""
    from transformers.utils import logging

    from .forecast import forecast
    from .steps import load_policy, load_state

    logging.disable_progress_bar()
    policy = load_policy(config)
    state, _ = load_state(config, policy)  # held while memory is measured
    found = forecast(config, policy)
    del state
    return found
