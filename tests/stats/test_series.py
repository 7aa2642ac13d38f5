"""Changes along a path of policies, added up: exact where nothing is random, covering where samples are (enumerable policy)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from enumerable import PROMPTS, at, population, ratio_derivatives, world

from entropy_kernels import stats
from entropy_kernels.errors import UserError
from entropy_kernels.stats import PromptSums, TokenCurvature, TokenTangents

ETAS = (0.0, 0.15, 0.25, 0.45)  # θ_j = θ + η_j v: three intervals of different length
REDRAWN = 2  # where the second batch is drawn
STEPS = range(len(ETAS) - 1)


def scaled(j: int) -> tuple[TokenTangents, TokenCurvature]:
    """Derivatives at θ_j along θ_{j+1} − θ_j."""
    d = ETAS[j + 1] - ETAS[j]
    _, tangents, curvature = at(ETAS[j])
    return TokenTangents(*(d * x for x in tangents)), TokenCurvature(*(d**2 * x for x in curvature))


@cache
def row_sums(per: str, j: int, drawn: int):
    """(ChangeSums, PromptSums) of interval j with every row of the world a prompt of its own, samples drawn at θ_drawn."""
    rows, mask = np.arange(len(world().prompt)), world().mask
    kinds = {"per": per, "estimator": "per_decision"}
    tangents, curvature = scaled(j)
    source = at(ETAS[drawn])[0]
    change = stats.change_sums(at(ETAS[j])[0], at(ETAS[j + 1])[0], mask, rows, drawn=source, **kinds)
    sums = stats.prompt_sums(
        source, at(ETAS[j])[0], mask, rows, tangents=tangents, curvature=curvature, **kinds
    )
    return change, sums


def gathered(sums, rows):
    """Row sums to the sums of prompts; rows [B, G] are the responses of each."""
    return sums._replace(
        **{k: v[rows].sum(-1) for k, v in sums._asdict().items() if isinstance(v, np.ndarray)}
    )


def weighted(sums, p):
    """Row sums in their exact proportions: every row a prompt, counted with its probability."""
    return sums._replace(**{k: v * p for k, v in sums._asdict().items() if isinstance(v, np.ndarray)})


def probabilities(drawn: int) -> np.ndarray:
    return np.exp(np.nansum(at(ETAS[drawn])[0].logprob, axis=1)) / PROMPTS


def exact(per: str) -> dict[str, np.ndarray]:
    """Cumulative truth and predictions after each interval."""
    h, h1, h2 = np.array([ratio_derivatives(*population(per, "per_decision", eta)) for eta in ETAS]).T
    d = np.diff(ETAS)
    linear = np.cumsum(h1[:-1] * d)
    return {
        "measured": h[1:] - h[0],
        "linear": linear,
        "quadratic": linear + np.cumsum(h2[:-1] * d**2 / 2),
        "missed": h[1:] - h[0] - linear,
    }


def moves(per: str, batches, names) -> dict[str, list[stats.Move]]:
    """The three intervals' moves; batches[j] = (drawn, select) with select from row sums to a batch's."""
    found: dict[str, list[stats.Move]] = {name: [] for name in ("measured", "linear", "quadratic", "missed")}
    for j in STEPS:
        drawn, select = batches[j]
        change, sums = (select(x) for x in row_sums(per, j, drawn))
        found["measured"].append(stats.measured_move(change, names[j]))
        found["linear"].append(stats.linear_move(sums, names[j]))
        found["quadratic"].append(stats.quadratic_move(sums, names[j]))
        found["missed"].append(stats.move_difference(found["measured"][-1], found["linear"][-1]))
    return found


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_with_every_response_in_its_proportion_the_curves_are_exact(per):
    rows = tuple(range(len(world().prompt)))

    def all_rows(drawn):
        return drawn, lambda sums: weighted(sums, probabilities(drawn))

    found = moves(per, [all_rows(0), all_rows(0), all_rows(REDRAWN)], [rows] * 3)
    for name, truth in exact(per).items():
        curve = stats.cumulative_change(found[name], unit="nats", method="m")
        np.testing.assert_allclose([e.value for e in curve], truth, rtol=1e-11, err_msg=name)


def test_one_batch_telescopes_value_and_error():
    """Σ_j Δ_j on one batch is the single change from first to last policy, and has its error."""
    rows = np.random.default_rng(3).choice(len(world().prompt), size=(40, 2), p=probabilities(0))
    found = moves("token", [(0, lambda sums: gathered(sums, rows))] * 3, [range(40)] * 3)["measured"]
    end = stats.cumulative_change(found, unit="nats", method="m")[-1]
    kinds = {"per": "token", "estimator": "per_decision"}
    whole = stats.change_sums(
        at(ETAS[0])[0], at(ETAS[-1])[0], world().mask, np.arange(len(world().prompt)), **kinds
    )
    once = stats.direct_change(gathered(whole, rows))
    assert end.value == pytest.approx(once.value, rel=1e-12)
    assert end.stderr == pytest.approx(once.stderr, rel=1e-10)
    first = stats.cumulative_change(found[:1], unit="nats", method="m")[0]
    assert first.stderr == pytest.approx(
        stats.direct_change(gathered(row_sums("token", 0, 0)[0], rows)).stderr, rel=1e-12
    )


def test_integrated_along_the_chord_is_the_direct_difference():
    rows = np.random.default_rng(4).choice(len(world().prompt), size=(30, 1), p=probabilities(0))
    low, high = ETAS[1], ETAS[2]
    nodes = stats.radau_nodes(7, 1.0)
    sums: list[PromptSums] = []
    for s in nodes:
        values, tangents, _ = at(low + s * (high - low))
        sums.append(
            gathered(
                stats.prompt_sums(
                    at(ETAS[0])[0], values, world().mask, np.arange(len(world().prompt)), per="token",
                    estimator="per_decision", tangents=TokenTangents(*((high - low) * x for x in tangents)),
                ),
                rows,
            )
        )  # fmt: skip
    integral = stats.integrated_move(sums, stats.integral_weights(nodes, 1.0)[0], range(30))
    direct = stats.measured_move(gathered(row_sums("token", 1, 0)[0], rows), range(30))
    assert integral.value == pytest.approx(direct.value, rel=1e-9)
    np.testing.assert_allclose(
        integral.influence, direct.influence, atol=1e-9 * np.abs(direct.influence).max()
    )


def test_independent_batches_add_in_quadrature_and_shared_prompts_do_not():
    a = stats.Move(1.0, np.array([0.3, -0.1, -0.2]), ("p", "q", "r"))
    other = stats.Move(2.0, np.array([0.4, -0.3, -0.1]), ("s", "t", "u"))
    same = stats.Move(2.0, np.array([-0.3, 0.1, 0.2]), ("p", "q", "r"))

    def error(*found):
        return stats.cumulative_change(found, unit="nats", method="m")[-1].stderr

    assert error(a, other) ** 2 == pytest.approx(error(a) ** 2 + error(other) ** 2, rel=1e-14)
    assert error(a, same) == 0.0
    assert error(a, a) == pytest.approx(2 * error(a), rel=1e-14)


def test_names_must_be_those_of_the_prompts():
    rows = np.arange(6).reshape(3, 2)
    change = gathered(row_sums("token", 0, 0)[0], rows)
    with pytest.raises(UserError, match="2 names"):
        stats.measured_move(change, ["a", "b"])
    with pytest.raises(UserError, match="2 of them different"):
        stats.measured_move(change, ["a", "b", "a"])
    move = stats.measured_move(change, "abc")
    with pytest.raises(UserError, match="different prompts"):
        stats.move_difference(move, move._replace(prompts=("a", "b", "d")))


# --- over many draws -----------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, B: int, drawn: int, prompts: np.ndarray) -> np.ndarray:
    """Rows [B, 2]: two responses at θ_drawn to each of the given prompts [B]."""
    p = probabilities(drawn).reshape(PROMPTS, -1) * PROMPTS
    u = rng.random((B, 2, 1))
    cdf = np.cumsum(p, axis=1)[prompts]
    return prompts[:, None] * p.shape[1] + (u > cdf[:, None, :-1]).sum(-1)


def replicate(per: str, regime: str, B: int, replications: int, seed: int) -> dict[str, list]:
    """Cumulative estimates after the last interval, `replications` of each.

    shared: one batch for all intervals; new: the last interval on a batch of other prompts drawn at its start; again: on new
    responses to the same prompts.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list] = {}
    for _ in range(replications):
        prompts = rng.integers(PROMPTS, size=B)
        first = draw(rng, B, 0, prompts)
        batch, name = (0, first), range(B)
        if regime != "shared":
            later = rng.integers(PROMPTS, size=B) if regime == "new" else prompts
            batch, name = (
                (REDRAWN, draw(rng, B, REDRAWN, later)),
                (range(B, 2 * B) if regime == "new" else range(B)),
            )
        batches = [
            (drawn, lambda sums, rows=rows: gathered(sums, rows))
            for drawn, rows in ((0, first), (0, first), batch)
        ]
        for key, values in moves(per, batches, [range(B), range(B), name]).items():
            found.setdefault(key, []).append(stats.cumulative_change(values, unit="nats", method="m")[-1])
    return found


@pytest.mark.parametrize("regime", ["shared", "new", "again"])
def test_cumulative_intervals_cover(regime):
    """Nominal 95 % at 100 prompts: 93 to 97 % over 2,000 paths (the count's own standard error is 0.5 %)."""
    truth = exact("token")
    for name, estimates in replicate("token", regime, 100, 2000, seed=90).items():
        ends = np.array([e.interval() for e in estimates])
        share = np.mean((ends[:, 0] <= truth[name][-1]) & (truth[name][-1] <= ends[:, 1]))
        print(f"{regime} {name}: {share:.3f}")
        assert 0.93 <= share <= 0.97, name


@pytest.mark.parametrize("regime", ["shared", "new", "again"])
def test_cumulative_changes_per_sequence_are_unbiased(regime):
    """Per sequence and decision there is no ratio: the mean over 1,000 paths is within 4 of its own errors of the truth."""
    truth = exact("sequence")
    for name, estimates in replicate("sequence", regime, 20, 1000, seed=91).items():
        values = np.array([e.value for e in estimates])
        z = (values.mean() - truth[name][-1]) / (values.std(ddof=1) / np.sqrt(len(values)))
        print(f"{regime} {name}: z = {z:.2f}")
        assert abs(z) < 4, name
