r"""The stage that asks which tokens of the update move the entropy: sections and tables from the passes of `shares` and `what_if`.

Formulas live in `attribution` and `stats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .. import attribution, stats
from ..attribution import Halves
from ..policy import Parameters, Policy
from ..updates import OptimizerState
from .along import Along
from .config import MeasureConfig
from .direction import get_update
from .shares import Batches, Influence, own_change
from .store import Store
from .what_if import all_factors, predicted, verified


class Attributed(NamedTuple):
    """The report's section, columns of U's token table [N, T], and the table of U's completions."""

    section: dict[str, Any]
    columns: dict[str, Tensor]
    sequences: pa.Table


def attribute(
    config: MeasureConfig,
    policy: Policy,
    found: Mapping[str, Influence],
    data: Batches,
    values: Mapping[str, Tensor],
    direction: Parameters,
    along: Along,
    state: OptimizerState,
    eta: float,
    progress: bool,
    store: Store,
) -> Attributed:
    """What the influences say, and what would be if some tokens counted less.

    Args:
        config: which rules, and whether to verify them.
        policy: at the checkpoint.
        found: from `influences`.
        data: U and E.
        values: at least "logprob" and "entropy" of U's tokens, [N, T].
        direction: v.
        along: E along v.
        state: the optimizer's, from which directions are made again.
        eta: the learning rate.
        progress: whether to show bars.
        store: where finished passes are kept.
    """
    own = own_change(policy, direction, data.batch_u, eta, progress, store)
    f = all_factors(config, data, values, found["entropy"])
    section = section_of(found, data, values, own, along, eta)
    rows = {rule: {"rule": rule, **predicted(x, data, found, config.per)} for rule, x in f.items()}
    if config.verify:
        at_eta = replace(config, truth="integrated", second_order=False)

        def evaluate(v: Parameters, name: str) -> Along:
            return Along(at_eta, policy, v, data.batch_e, (eta,), progress, store.within(name))

        def changed(rule: str, factor: Tensor) -> Parameters:
            kept = store.within(f"direction_{list(f).index(rule)}")
            return get_update(
                config,
                policy,
                state,
                data.U,
                data.batch_u,
                eta,
                progress,
                kept,
                weights=data.weights,
                factor=factor,
            ).direction

        for rule, row in verified(f, evaluate, direction, changed, data.E.reward).items():
            for name, measured in row.items():
                rows[rule][name] = (
                    rows[rule].get(name, {}) | measured if isinstance(measured, dict) else measured
                )
    if rows:
        section["what_if"] = list(rows.values())
    return Attributed(
        section, token_columns(found, data, values, own), sequence_table(found, data, values, own)
    )


def known_of_tokens(data: Batches, values: Mapping[str, Tensor]) -> attribution.Tokens:
    """What is known of U's tokens without attribution, in the order of its table."""
    mask = data.batch_u.response_mask.bool()
    sequence, _ = mask.nonzero(as_tuple=True)
    group = data.batch_u.prompt_index.numpy()
    assert data.U.advantage is not None
    if data.U.reward is None:
        solved = np.full(len(group), np.nan)
    else:
        solved = (np.bincount(group, data.U.reward) / np.bincount(group))[group]
    logprob = values["logprob"].double()
    lowest = torch.where(mask, logprob, torch.inf).amin(dim=1).numpy()
    i = sequence.numpy()
    return attribution.Tokens(
        sequence=i,
        prompt=group[i],
        position=(mask.long().cumsum(dim=1) - 1)[mask].numpy(),
        length=mask.sum(dim=1).numpy()[i],
        advantage=np.asarray(data.U.advantage, dtype=np.float64)[i],
        solve_rate=solved[i],
        logprob=logprob[mask].numpy(),
        entropy=values["entropy"].double()[mask].numpy(),
        lowest_logprob=lowest[i],
    )


def proxies_of(data: Batches, values: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The published scores of every token [N, T], and −(A − Ā)(S − S̄) of every response [N]."""
    mask, prompt = data.batch_u.response_mask.numpy(), data.batch_u.prompt_index.numpy()
    assert data.U.advantage is not None
    A = np.asarray(data.U.advantage, dtype=np.float64)
    S, H = (values[name].double().numpy() for name in ("logprob", "entropy"))
    return attribution.token_proxies(S, H, A, mask, prompt), attribution.sequence_covariance(
        S, A, mask, prompt
    )


def section_of(
    found: Mapping[str, Influence],
    data: Batches,
    values: Mapping[str, Tensor],
    own: np.ndarray,
    along: Along,
    eta: float,
) -> dict[str, Any]:
    """The report's section `attribution`, without what-ifs."""
    mask = data.batch_u.response_mask.numpy()
    tokens = known_of_tokens(data, values)
    linear = {"entropy": entropy_change(along, eta)}
    if "reward" in found:
        assert data.E.reward is not None
        linear["reward"] = reward_change(along, data.E.reward, eta)
    report: dict[str, Any] = {"eta": eta}
    if "reward" not in found:
        report["no_reward"] = (
            "The held-out completions have no rewards, so expected reward is not attributed."
            if data.E.reward is None
            else "All held-out completions are rewarded alike, so expected reward cannot be attributed."
        )
    for name, influence in found.items():
        share, marginal = (_on(mask, influence.total(which)) for which in ("shares", "marginals"))
        unit = linear[name].unit
        shares = {part: _on(mask, c) for part, c in influence.shares.items()}
        report[name] = {
            "sum_rule": attribution.sum_rule(shares, influence.parts, linear[name]),
            "marginal": stats.from_halves(float(marginal.a.sum()), float(marginal.b.sum()), unit),
            "shares": attribution.concentration(share, tokens.prompt),
            "marginals": attribution.concentration(marginal, tokens.prompt),
            "correlations": attribution.correlations(tokens, share.total, marginal.total),
            "cells": attribution.cells(tokens, share, marginal, unit),
        }
    entropy = found["entropy"]
    scores, covariance = proxies_of(data, values)
    report["proxies"] = attribution.trial(
        tokens,
        {name: x[mask] for name, x in scores.items()},
        covariance,
        _on(mask, entropy.total("shares")).total,
        _on(mask, entropy.total("marginals")).total,
        own[mask],
    )
    return report


def entropy_change(along: Along, eta: float) -> stats.Estimate:
    """δH₁ = η h'(0) of the estimator whose gradient X is, by forward mode on E."""
    sums = stats.prompt_sums(
        along.base.values,
        along.base.values,
        along.mask,
        along.prompt,
        per=along.config.per,
        estimator=along.config.estimator,
        tangents=along.base.tangents,
        baseline=along.baseline,
    )
    return stats.linear_change(sums, eta)


def reward_change(along: Along, reward: np.ndarray, eta: float) -> stats.Estimate:
    """δJ₁ = η ∇J·v by forward mode on E."""
    assert along.base.tangents is not None
    sums = stats.reward_sums(
        along.base.values, along.base.values, along.base.tangents, reward, along.mask, along.prompt
    )
    return stats.linear_reward(sums, eta)


def token_columns(
    found: Mapping[str, Influence], data: Batches, values: Mapping[str, Tensor], own: np.ndarray
) -> dict[str, Tensor]:
    """Columns of the table of U's tokens: [N, T] each."""
    columns: dict[str, np.ndarray] = {}
    for name, influence in found.items():
        end = "" if name == "entropy" else f"_{name}"
        for which in ("share", "marginal"):
            halves = influence.total(f"{which}s")
            columns[f"{which}{end}"] = halves.total
            columns[f"{which}{end}_a"], columns[f"{which}{end}_b"] = halves
            parts = getattr(influence, f"{which}s")
            if len(parts) > 1:
                columns |= {f"{which}{end}_of_{part}": x.total for part, x in parts.items()}
    columns["own_change"] = own
    columns |= {f"proxy_{name}": x for name, x in proxies_of(data, values)[0].items()}
    return {name: torch.as_tensor(x) for name, x in columns.items()}


def sequence_table(
    found: Mapping[str, Influence], data: Batches, values: Mapping[str, Tensor], own: np.ndarray
) -> pa.Table:
    """One row per completion of U, in the order of rollouts_u: sums over its tokens, and what is known of it."""
    tokens = known_of_tokens(data, values)
    _, first = np.unique(tokens.sequence, return_index=True)
    mask = data.batch_u.response_mask.numpy()
    columns = token_columns(found, data, values, own)
    sums = {name: x.numpy().sum(axis=1, where=mask) for name, x in columns.items()}
    H = values["entropy"].double().numpy()
    _, covariance = proxies_of(data, values)
    return pa.table(
        {
            "sequence": pa.array(np.arange(len(data.U)), pa.int32()),
            "prompt_id": list(data.U.prompt_id),
            "group_index": pa.array(data.U.group_index, pa.int32()),
            "sample_index": pa.array(data.U.sample_index, pa.int32()),
            "length": pa.array(tokens.length[first], pa.int32()),
            "reward": [None] * len(data.U) if data.U.reward is None else data.U.reward.astype(np.float64),
            "advantage": tokens.advantage[first],
            "solve_rate": tokens.solve_rate[first],
            "lowest_logprob": tokens.lowest_logprob[first],
            "mean_entropy": H.sum(axis=1, where=mask) / tokens.length[first],
            **sums,
            "proxy_cov_sequence": covariance,
        }
    )


def _on(mask: np.ndarray, halves: Halves) -> Halves:
    return Halves(halves.a[mask], halves.b[mask])
