r"""Along a run of checkpoints: E drawn at one, re-weighted at the following ones, drawn again when the weights no longer allow it.

    θ_0 ─v_0─► θ_1 ─v_1─► θ_2 ─v_2─► …        v_j = θ_{j+1} − θ_j, the step taken, η = 1
    │   E drawn at θ_0, weights π_j/π_0 …  │   ESS too low: E drawn again at θ_j
    per interval: values at both ends → measured; tangents at θ_j along v_j → predicted

Every interval is a stage of its own, so a series that was stopped goes on at its last checkpoint. No arithmetic happens here: formulas
are in `stats` (docs/theory.md, section 12), and what the arrays become is in `series_report`.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import distributed, stats
from ..certify import certify
from ..checkpoints import load_parameters
from ..derivatives import token_curvature, token_stats, token_tangents
from ..errors import UserError
from ..policy import Parameters, Policy, TokenBatch
from ..report import SeriesResult
from ..rl.rollouts import Rollouts
from ..rl.sampling import sample_rollouts
from ..rl.tasks import Prompt, load_prompts
from ..selection import count_parameters
from .along import FIRST_NODES, MOST_NODES, bar
from .identity import identity
from .samples import batch_of
from .series_config import SeriesConfig
from .series_report import Batch, Interval, interval_line, series_report, series_tables
from .steps import exact_arithmetic, load_policy
from .store import Store, file_identity, open_store
from .writing import environment


def measure_series(
    config: SeriesConfig, *, directory: str | None = None, progress: bool = True
) -> SeriesResult:
    """Measure and predict the change of entropy between the checkpoints of a run; within `distributed.joined` all ranks together.

    Args:
        config: which checkpoints, and how.
        directory: where to keep what is finished, so that a series that was stopped can go on (settings.resume); None keeps nothing.
        progress: whether to say on stderr how far it is: bars on a terminal, and a line per interval.

    Returns:
        The result; `result.save(directory)` writes it.

    Raises:
        UserError: input that cannot be measured, saying what to do.
        CertificationError: the model's derivatives are wrong, naming the layer.
    """
    if not distributed.is_first():
        directory, progress = None, False
    store = open_store(directory, series_identity(config), resume=config.settings.resume)
    start = time.perf_counter()
    with exact_arithmetic():
        policy = load_policy(config.settings)
        certificate = store.json("certify", lambda: certify(policy).to_json())
        walk = _Walk(config, policy, store, progress)
        intervals = []
        for j in range(len(config.checkpoints) - 1):
            intervals.append(walk.interval(j))
            if progress:
                print(interval_line(config, walk.batches, intervals), file=sys.stderr, flush=True)
        surroundings = environment(policy)
    report = {
        "config": config.to_json(),
        "environment": surroundings,
        "certify": certificate,
        "parameters": {
            "selected": config.settings.parameters,
            **count_parameters(policy.model, policy.params),
        },
        **series_report(config, walk.batches, intervals),
        "timings": {"total": round(time.perf_counter() - start, 3)},
    }
    return SeriesResult(report=report, tables=series_tables(config, walk.batches, intervals))


def series_identity(config: SeriesConfig) -> dict[str, Any]:
    """What determines the numbers of a series, for `open_store`."""
    found = {**identity(config.settings), "min_ess": config.min_ess}
    del found["ckpt"], found["update"]
    return found | {"checkpoints": [[name, file_identity(name)] for name in config.checkpoints]}


class _End(NamedTuple):
    """Where the last interval ended: the next begins there."""

    batch: int
    values: stats.TokenValues  # H and S at θ_j on that batch
    theta: Parameters | None  # None where the interval was read, not computed


class _Walk:
    """The batches drawn so far, and the policy at the checkpoint that is reached."""

    def __init__(self, config: SeriesConfig, policy: Policy, store: Store, progress: bool) -> None:
        self.config, self.policy, self.store = config, policy, store
        self.progress = progress and sys.stderr.isatty()
        self.batches: list[Batch] = []
        self.prompts = _shuffled_prompts(config, policy)
        self.end: _End | None = None

    def interval(self, j: int) -> Interval:
        """Interval j, from θ_j to θ_{j+1}: read where it is finished, else computed and kept."""
        theta: list[Parameters] = []
        found = self.store.tensors(f"interval-{j}", lambda: self._compute(j, theta))
        m = int(found["batch"])
        if m == len(self.batches):
            self._draw(j)  # the interval was finished before the run was stopped, so its samples are read
        interval = Interval.from_arrays({name: x.numpy() for name, x in found.items()})
        if self.batches[m].drawn is None:
            self.batches[m] = replace(self.batches[m], drawn=interval.before)
        self.end = _End(m, interval.after, theta[0] if theta else None)
        return interval

    def _compute(self, j: int, reached: list[Parameters]) -> dict[str, Tensor]:
        policy, settings = self.policy, self.config.settings
        if j:
            here = self.end.theta if self.end is not None else None
            _place(policy, self._load(j) if here is None else here)
        theta = self._load(j + 1)
        reached.append(theta)
        v = {name: (theta[name].double() - p.double()).to(p.dtype) for name, p in policy.params.items()}
        after_policy = replace(policy, params=theta)
        label = f"interval {j + 1} of {len(self.config.checkpoints) - 1}"

        work = self.store.within(f"work-{j}")  # so that an interval, too, goes on from its middle

        def values(name: str, where: Policy, batch: TokenBatch) -> stats.TokenValues:
            with bar(self.progress, f"{label}: entropies", len(batch.input_ids)) as tick:
                found = work.in_parts(
                    name, lambda parts: token_stats(where, batch, progress=tick, parts=parts)._asdict()
                )
            return stats.TokenValues(found["entropy"].numpy(), found["logprob"].numpy())

        m = len(self.batches) - 1
        if self.end is not None:  # the present batch, if its weights allow it at both ends
            before, batch = self.end.values, self.batches[m]
            after = values(f"after-{m}", after_policy, batch.tokens)
            assert batch.drawn is not None
            if not min(batch.ess_share(before), batch.ess_share(after)) >= self.config.min_ess:
                self.end = None
        if self.end is None:
            m += 1
            batch = self._draw(j)
            before = values(f"before-{m}", policy, batch.tokens)
            after = values(f"after-{m}", after_policy, batch.tokens)
            self.batches[m] = batch = replace(batch, drawn=before)
        with bar(self.progress, f"{label}: derivatives", len(batch.tokens.input_ids)) as tick:
            derivatives: Any = token_curvature if settings.second_order else token_tangents
            found = work.in_parts(
                "derivatives",
                lambda parts: derivatives(policy, batch.tokens, v, progress=tick, parts=parts)._asdict(),
            )
        arrays = {
            "batch": torch.tensor(m),
            "length": torch.tensor(sum(float(x.double().square().sum()) for x in v.values()) ** 0.5),
            **{f"before.{name}": torch.as_tensor(x) for name, x in before._asdict().items()},
            **{f"after.{name}": torch.as_tensor(x) for name, x in after._asdict().items()},
            **{name: x for name, x in found.items() if name not in ("entropy", "logprob")},
        }
        if settings.truth != "direct":
            arrays |= self._integrate(label, work, batch, v, Interval.from_arrays(_numpy(arrays)))
        return arrays

    def _integrate(
        self, label: str, work: Store, batch: Batch, v: Parameters, interval: Interval
    ) -> dict[str, Tensor]:
        """H, S and their derivatives at points s of the chord θ_j + s v, added until the integral is accurate enough."""
        sums = [interval.base_sums(batch, self.config.settings)]
        points, breaks = [0.0], [0.0, 1.0]
        names = ("entropy", "logprob", "d_entropy", "d_logprob")
        found: list[list[Tensor]] = []
        waiting = [float(s) for s in stats.radau_nodes(FIRST_NODES, 1.0) if s != 0]
        while True:
            for s in waiting:
                with bar(self.progress, f"{label}: chord at {s:.2f}", len(batch.tokens.input_ids)) as tick:
                    there = self.policy.shifted(v, s)
                    node = work.in_parts(
                        f"chord-{s:.9f}",
                        lambda parts, there=there, tick=tick: token_tangents(  # type: ignore[misc]
                            there, batch.tokens, v, progress=tick, parts=parts
                        )._asdict(),
                    )
                found.append([node[name] for name in names])
                points.append(s)
                sums.append(interval.node_sums(batch, self.config.settings, [x.numpy() for x in found[-1]]))
            weights, error_weights = stats.panel_weights(breaks, points, [1.0])
            errors = [stats.integration_error(sums, panel[0]) for panel in error_weights]
            size = max(
                abs(stats.integrated_change(sums, weights[0]).value),
                abs(stats.linear_change(sums[0], 1.0).value),
            )
            if not sum(errors) > self.config.settings.integration_rtol * size:
                break
            breaks, waiting = stats.refine(breaks, points, int(np.argmax(errors)))
            if len(points) + len(waiting) > MOST_NODES:
                break
        return {
            "chord.weights": torch.as_tensor(weights[0]),
            "chord.points": torch.tensor(points, dtype=torch.float64),
            "chord.error": torch.tensor(sum(errors), dtype=torch.float64),
            **{f"chord.{name}": torch.stack([x[i] for x in found]) for i, name in enumerate(names)},
        }

    def _draw(self, j: int) -> Batch:
        """Batch number len(batches), drawn at θ_j (where the policy is), or read if it was drawn before; put on the list."""
        settings, m = self.config.settings, len(self.batches)
        file = self.store.file(f"rollouts-{m}.parquet")
        kept = distributed.of_first(
            lambda: Rollouts.load(file) if file is not None and file.exists() else None
        )
        if kept is not None:
            rollouts = kept
        else:
            size = settings.prompts_e
            # The pool is gone through from the start again when it is used up: prompts then return, and are known by their tokens.
            chosen = [self.prompts[(m * size + i) % len(self.prompts)] for i in range(size)]
            rollouts = sample_rollouts(
                self.policy.model,
                self.policy.tokenizer,
                chosen,
                group_size=settings.group_size_e,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed + 1 + m,
                batch_size=settings.sample_batch,
                progress=self.progress,
                parts=self.store.parts(f"rollouts-{m}"),
            )
            if file is not None:
                rollouts.save(file)
        self.batches.append(Batch.of(rollouts, batch_of(rollouts), checkpoint=j))
        return self.batches[m]

    def _load(self, j: int) -> Parameters:
        """θ_j of the measured parameters, where the policy's are.

        Raises:
            UserError: another kind of model or other shapes than the first checkpoint's, numbers that are not finite, or parameters that
                are held constant but differ.
        """
        name, first = self.config.checkpoints[j], self.config.checkpoints[0]
        try:
            found = load_parameters(name, self.policy.model, dtype=self.policy.dtype)
        except UserError as error:
            raise UserError(f"checkpoints: {str(error).removeprefix('update: ')}") from error
        for key, p in self.policy.model.named_parameters():
            if key not in found or found[key].shape != p.shape:
                there = "is missing" if key not in found else f"has shape {tuple(found[key].shape)}"
                raise UserError(
                    f"checkpoints: {key} {there} in {name}, expected shape {tuple(p.shape)} as in {first}: checkpoints of one run."
                )
            if not bool(torch.isfinite(found[key]).all()):
                raise UserError(
                    f"checkpoints: {key} in {name} holds NaN or infinite entries; leave out what came after training diverged."
                )
            if key not in self.policy.params and not torch.equal(found[key].to(p.device), p):
                raise UserError(
                    f"parameters: {self.config.settings.parameters!r} holds {key} constant, but it moves between {first} and {name}, and "
                    "the entropies at the checkpoints with it. Measure all parameters."
                )
        return {key: found[key].to(p.device) for key, p in self.policy.params.items()}


def _place(policy: Policy, theta: Parameters) -> None:
    """Put θ into the policy's parameters, which are the model's own: sampling uses the model."""
    with torch.no_grad():
        for name, p in policy.params.items():
            p.copy_(theta[name])


def _shuffled_prompts(config: SeriesConfig, policy: Policy) -> list[Prompt]:
    """Every distinct prompt of the data set in the order of the seed.

    Raises:
        UserError: fewer than one batch needs.
    """
    settings = config.settings
    assert settings.dataset is not None  # the configuration saw to it
    prompts = load_prompts(
        settings.dataset,
        tokenizer=policy.tokenizer,
        prompt_column=settings.prompt_column,
        chat_template=settings.chat_template,
        config=settings.dataset_config,
        split=settings.dataset_split,
    )
    distinct = list({prompt.token_ids: prompt for prompt in reversed(prompts)}.values())[::-1]
    if len(distinct) < settings.prompts_e:
        raise UserError(
            f"prompts_e: got {settings.prompts_e}, but {settings.dataset} has only {len(distinct)} distinct prompts ({len(prompts)} rows). "
            "Ask for fewer or give more data; with several times as many, batches share no prompt and the errors are smaller."
        )
    random.Random(settings.seed).shuffle(distinct)
    return distinct


def _numpy(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in arrays.items()}
