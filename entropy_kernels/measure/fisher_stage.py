r"""The stage on the Fisher kernel: K between responses of U, its structure, and what it says of log π and of the entropy.

    U ──gradients──► K (P = 1, and the step's P) ──► blocks, spectrum, growth
                                                └──► Σ κ K ω A, the laws ──against──► S'·v_gradient, shares of δH₁
    U, E ──values at θ and θ + ηv──► measured δ log π ──against──► η S'·v

Where the direction was read, and so has no update batch, K with P = 1 is between responses of E. Formulas live in `stats.kernel`, `fisher`
and `attribution`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .. import attribution, stats
from ..attribution import TokenWeights
from ..derivatives import entropy_gradient, token_stats, token_tangents
from ..errors import UserError
from ..fisher import FisherCost, fisher_cost, fisher_kernel
from ..policy import Parameters, Policy, TokenBatch
from ..rl.rollouts import Rollouts
from ..updates import UpdateDirection
from .along import bar
from .config import MeasureConfig
from .memory import held, parse_bytes
from .statistics import baseline_of_e, one_batch
from .store import Store

_UNITS = {"plain": "nats² per squared unit of θ", "preconditioned": "nats per unit of η"}


class Chosen(NamedTuple):
    """Whole prompts of U or E: their places in the batch, and their sequences."""

    name: str  # "u" or "e"
    rows: Tensor
    batch: TokenBatch
    rollouts: Rollouts


def structure(
    config: MeasureConfig,
    policy: Policy,
    update: UpdateDirection,
    weights: Mapping[str, TokenWeights] | None,
    U: Rollouts | None,
    batch_u: TokenBatch | None,
    E: Rollouts,
    batch_e: TokenBatch,
    eta: float,
    progress: bool,
    store: Store,
) -> tuple[dict[str, Any], pa.Table]:
    """The report's section, and the table of the responses that the kernel is between.

    Args:
        config: how many responses (fisher_sequences).
        policy: at the checkpoint.
        update: the step; one that was read has no preconditioner.
        weights: of U's tokens in the loss, by part.
        U: the update batch with its tokens `batch_u`, or None.
        batch_u: U as a batch.
        E: the held-out batch with its tokens `batch_e`.
        batch_e: E as a batch.
        eta: the learning rate.
        progress: whether to show bars.
        store: where finished parts are kept.
    """
    most = config.fisher_sequences
    of_e = choose("e", E, batch_e, most)
    of_u = None if U is None or batch_u is None else choose("u", U, batch_u, most)
    main = of_u or of_e
    prompt = main.batch.prompt_index.numpy()
    P, kappa = _preconditioner(update)
    responses = [main.rollouts.completion_ids[i] for i in main.rows.tolist()]
    shared = stats.shared_prefixes(responses)
    kernels: dict[str, np.ndarray] = {}
    section: dict[str, Any] = {
        "batch": main.name,
        "sequences": len(prompt),
        "prompts": len(np.unique(prompt)),
        "identical_pairs": stats.identical_pairs(shared, [len(x) for x in responses], prompt),
        "kernels": {},
    }
    for name, diagonal in {"plain": None, **({} if P is None else {"preconditioned": P})}.items():
        kernels[name], how = _kernel(config, policy, main, name, diagonal, progress, store)
        section["kernels"][name] = {"how": how, **_described(kernels[name], main, shared, _UNITS[name])}
    moves = {
        chosen.name: _moves(policy, chosen, update, eta, progress, store)
        for chosen in (of_u, of_e)
        if chosen is not None
    }
    section["log_prob"] = {
        "eta": eta,
        **{
            chosen.name: stats.agreement(
                moves[chosen.name]["predicted"],
                moves[chosen.name]["measured"],
                chosen.batch.prompt_index.numpy(),
            )
            for chosen in (of_u, of_e)
            if chosen is not None
        },
    }
    columns = {"K_plain": np.diag(kernels["plain"]), **moves[main.name]}
    if of_u is not None and P is not None and weights is not None:
        pull, spread = _pull(weights, of_u)
        columns["by_kernel"] = eta * kappa * stats.kernel_prediction(kernels["preconditioned"], pull)
        columns["K_preconditioned"] = np.diag(kernels["preconditioned"])
        section["log_prob"]["by_kernel"] = {
            "responses_in_kernel": len(pull),
            "responses_in_update": len(batch_u.input_ids) if batch_u is not None else 0,
            "spread_of_weights": spread,
            **stats.agreement(columns["by_kernel"], columns["gradient_part"], prompt),
        }
        section["laws"], columns["share_per_sequence"] = _laws(
            config, policy, update, weights, of_u, kernels["preconditioned"], pull, moves["u"]["logprob"], batch_e, eta, progress, store,
        )  # fmt: skip
        length = of_u.batch.response_mask.sum(dim=1).numpy()
        in_update = len(np.unique(U.group_index)) if U is not None else 0
        if section["prompts"] >= 4:  # fewer do not tell ζ₁ and ζ₂
            section["one_batch"] = one_batch(
                kernels["preconditioned"],
                pull,
                moves["u"]["logprob"],
                length,
                prompt,
                prompts_in_update=in_update,
                gain=kappa,
                per=config.per,
                entropy=float(-moves["u"]["logprob"].sum() / length.sum()),
                seed=config.seed,
            )
    return section, _table(main, kernels, columns)


def choose(name: str, rollouts: Rollouts, batch: TokenBatch, most: int) -> Chosen:
    """The first prompts, as many as have no more than `most` responses in all.

    Raises:
        UserError: that is fewer than two prompts or eight responses.
    """
    groups = batch.prompt_index.numpy()
    labels, first = np.unique(groups, return_index=True)
    sizes = {label: int((groups == label).sum()) for label in labels}
    kept: list[Any] = []
    for label in labels[np.argsort(first)]:
        if sum(sizes[x] for x in kept) + sizes[label] > most:
            break
        kept.append(label)
    rows = torch.from_numpy(np.flatnonzero(np.isin(groups, kept)))
    if len(kept) < 2 or len(rows) < 8:
        raise UserError(
            f"fisher_sequences: {most} is room for {len(kept)} prompt(s) with {len(rows)} responses of rollouts_{name}; expected two "
            "prompts and eight responses at least. Raise it, or use more prompts."
        )
    return Chosen(name, rows, TokenBatch(*(x[rows] for x in batch)), rollouts)


def _preconditioner(update: UpdateDirection) -> tuple[Parameters | None, float]:
    """P and κ with κP the step's gain; the largest κ where groups of parameters differ, and the rest of it in P."""
    if not update.preconditioner:
        return None, float("nan")
    kappa = max(update.gain.values())
    if len(set(update.gain.values())) == 1:
        return update.preconditioner, kappa
    return {name: P * (update.gain[name] / kappa) for name, P in update.preconditioner.items()}, kappa


def _kernel(
    config: MeasureConfig,
    policy: Policy,
    main: Chosen,
    name: str,
    P: Parameters | None,
    progress: bool,
    store: Store,
) -> tuple[np.ndarray, dict[str, Any]]:
    room = None
    if config.memory_budget is not None:  # of the whole process; what is held already is not there
        room = max(1, parse_bytes(config.memory_budget) - held(policy.device))
    plan: dict[str, Any] = store.json(
        f"fisher_{name}_plan",
        lambda: _said(fisher_cost(policy, main.batch, preconditioner=P, memory_budget=room)),
    )

    def compute() -> dict[str, Tensor]:
        count = len(main.rows)
        total = count * plan["passes"] if plan["method"] == "layers" else count * (count + 1)
        with bar(progress, f"Fisher kernel, {name}", total) as tick:
            return {
                "K": fisher_kernel(
                    policy,
                    main.batch,
                    preconditioner=P,
                    method=plan["method"],
                    memory_budget=room,
                    progress=tick,
                )
            }

    return store.tensors(f"fisher_{name}", compute)["K"].numpy().astype(np.float64), plan


def _said(cost: FisherCost) -> dict[str, Any]:
    return {
        "method": cost.method,
        "reason": cost.reason,
        "passes": cost.passes,
        "operations": cost.flops[cost.method],
        "peak_gb": cost.peak_bytes[cost.method] / 1e9,
    }


def _described(K: np.ndarray, main: Chosen, shared: np.ndarray, unit: str) -> dict[str, Any]:
    prompt = main.batch.prompt_index.numpy()
    length = main.batch.response_mask.sum(dim=1).numpy()
    blocks = stats.block_distributions(K, prompt, unit=unit)
    return {
        "blocks": {
            block: {kind: found._asdict() for kind, found in kinds.items()} for block, kinds in blocks.items()
        },
        "spectrum": {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in stats.spectrum(K, prompt)._asdict().items()
        },
        "growth": stats.growth(K, length, shared, prompt),
    }


def _moves(
    policy: Policy, chosen: Chosen, update: UpdateDirection, eta: float, progress: bool, store: Store
) -> dict[str, np.ndarray]:
    """Changes of log π of every response at θ + ηv: measured, predicted, and the predicted part of this step's own gradient."""

    def compute() -> dict[str, Tensor]:
        batch, v = chosen.batch, update.direction
        own = update.parts.get("gradient")
        with bar(
            progress, f"log-probs of {chosen.name.upper()}", len(chosen.rows) * (8 if own else 5)
        ) as tick:

            def total(x: Tensor) -> Tensor:
                return x.double().sum(dim=1)

            def weighted(n: int) -> Any:
                return tick(3 * n)

            moved = token_stats(policy.shifted(v, eta), batch, progress=tick).logprob.double()
            here = token_stats(policy, batch, progress=tick).logprob.double()
            found = {
                "logprob": total(here),
                "measured": total(moved - here),
                "predicted": eta * total(token_tangents(policy, batch, v, progress=weighted).d_logprob),
            }
            if own is not None:
                gradient = token_tangents(policy, batch, own, progress=weighted).d_logprob
                found["gradient_part"] = eta * total(gradient)
            return found

    return {name: x.numpy() for name, x in store.tensors(f"fisher_moves_{chosen.name}", compute).items()}


def _pull(weights: Mapping[str, TokenWeights], of_u: Chosen) -> tuple[np.ndarray, float]:
    """ω A of every response, the mean over its tokens, and how far a token's is from that, relative to the largest.

    A loss at ratio one weighs all tokens of a response alike; stale samples or a KL term do not, and then sums over responses are not
    all of the step.
    """
    g = attribution.total_weights(weights).logprob
    assert g is not None  # there is a loss
    mask = of_u.batch.response_mask
    own = -g[of_u.rows].double() * mask
    mean = own.sum(dim=1) / mask.sum(dim=1)
    spread = ((own - mean[:, None]).abs() * mask).max() / mean.abs().max()
    return mean.numpy(), float(spread)


def _laws(
    config: MeasureConfig,
    policy: Policy,
    update: UpdateDirection,
    weights: Mapping[str, TokenWeights],
    of_u: Chosen,
    K: np.ndarray,
    pull: np.ndarray,
    logprob: np.ndarray,
    batch_e: TokenBatch,
    eta: float,
    progress: bool,
    store: Store,
) -> tuple[dict[str, Any], np.ndarray]:
    """The laws of `stats.covariance_laws` against the shares of δH₁ per sequence, and the share of every response.

    The laws are about the entropy of a whole response. Per token the length moves too, and the comparison would be of other things.
    """

    def compute() -> dict[str, np.ndarray]:
        with bar(progress, "shares of U", 2 * len(batch_e.input_ids) + len(of_u.rows)) as tick:
            b = baseline_of_e(config, policy, batch_e, update.direction, store)
            X = entropy_gradient(
                policy,
                batch_e,
                per="sequence",
                estimator=config.estimator,
                baseline=None if b is None else torch.as_tensor(b),
                progress=tick,
            )
            y = attribution.share_direction(update, X)
            own = {
                name: TokenWeights(*(None if w is None else w[of_u.rows] for w in part))
                for name, part in weights.items()
            }
            found = attribution.token_influence(policy, of_u.batch, y, own, progress=tick)
            return {"share": eta * sum(x.sum(axis=1) for x in found.values())}

    share = store.tensors("fisher_shares", compute)["share"].numpy()
    prompt = of_u.batch.prompt_index.numpy()
    assert of_u.rollouts.advantage is not None  # get_rollouts saw to it
    advantage = np.asarray(of_u.rollouts.advantage)[of_u.rows.numpy()]
    if np.unique(prompt, return_counts=True)[1].min() < 2:
        return {}, share  # a covariance needs two responses
    laws = stats.covariance_laws(K, logprob, advantage, pull, prompt)
    by_prompt = stats.sums_by_prompt(share, prompt)
    return {"share": float(share.sum()), **stats.compare_laws(laws, by_prompt)}, share


def _table(main: Chosen, kernels: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> pa.Table:
    """One row for every response in the kernel: its place in the rollouts, its figures, its row of each K."""
    found: dict[str, Any] = {
        "sequence": main.rows.numpy().astype(np.int32),
        "prompt": main.batch.prompt_index.numpy().astype(np.int32),
        "tokens": main.batch.response_mask.sum(dim=1).numpy().astype(np.int32),
        **columns,
    }
    for name, K in kernels.items():
        found[f"kernel_{name}"] = pa.array(K.astype(np.float32).tolist(), type=pa.list_(pa.float32()))
    return pa.table(found)
