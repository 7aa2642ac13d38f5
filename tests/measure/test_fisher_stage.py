"""--fisher on the demo: the kernel's sums against forward mode and shares, structure, pages, and going on after a stop."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest

from entropy_kernels import demo
from entropy_kernels.errors import UserError
from entropy_kernels.measure import fisher_stage, steps
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.steps import measure_step
from entropy_kernels.policy import Policy
from entropy_kernels.report import html

SMALL = dict(
    prompts_u=6, group_size=4, prompts_e=8, group_size_e=2, truth="direct", second_order=False, fisher=True
)


class Stopped(Exception):
    """Something that ends a run after the stage."""


def stop(*_args, **_options):
    raise Stopped


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A step in float64 whose gradient leaves nothing out, η far inside the linear range; stopped after the kernel and resumed."""
    directory = str(tmp_path_factory.mktemp("fisher"))
    settings = dict(
        SMALL,
        precision="float64",
        etas=(1e-8,),
        learning_rate=1e-8,
        attribute=True,
        loss="grpo",
        per="sequence",
    )
    with pytest.MonkeyPatch.context() as patch:
        # the demo's tokenizer pads with a token that occurs in prompts; a trainer's gradient leaves its input embedding out
        patch.setattr(Policy, "as_trained", lambda self: contextlib.nullcontext())
        with pytest.MonkeyPatch.context() as once:
            once.setattr(steps, "Along", stop)
            with pytest.raises(Stopped):
                measure_step(MeasureConfig.demo(**settings), directory=directory, progress=False)
        for name in ("fisher_kernel", "fisher_cost", "token_tangents", "entropy_gradient"):
            patch.setattr(fisher_stage, name, stop)  # nothing is computed again
        return measure_step(MeasureConfig.demo(**settings, resume=True), directory=directory, progress=False)


def test_the_kernel_adds_up_to_what_the_step_does_to_log_probs(exact):
    section = exact.report["fisher"]
    assert section["batch"] == "u" and section["sequences"] == 24 and section["prompts"] == 6
    whole = section["log_prob"]["by_kernel"]
    assert whole["responses_in_kernel"] == whole["responses_in_update"] == 24
    assert whole["spread_of_weights"] < 1e-12
    assert whole["slope"].value == pytest.approx(1, abs=1e-9) and whole["unexplained"].value < 1e-18
    table = exact.tables["fisher"]
    by_kernel, gradient = (np.array(table[name]) for name in ("by_kernel", "gradient_part"))
    assert np.abs(by_kernel - gradient).max() < 1e-10 * np.abs(gradient).max() and np.abs(gradient).max() > 0


def test_log_probs_move_as_predicted(exact):
    for batch in ("u", "e"):
        found = exact.report["fisher"]["log_prob"][batch]
        assert found["slope"].value == pytest.approx(1, abs=1e-4) and found["unexplained"].value < 1e-6
    table = exact.tables["fisher"]
    momentum = np.array(table["predicted"]) - np.array(table["gradient_part"])
    assert np.abs(momentum).max() > 1e-3 * np.abs(np.array(table["predicted"])).max()


def test_shares_are_those_of_the_attribution(exact):
    shares = np.array(exact.tables["fisher"]["share_per_sequence"])
    want = np.array(exact.tables["sequences_u"]["share"])
    assert shares == pytest.approx(want, rel=1e-9) and np.abs(want).max() > 0
    laws = exact.report["fisher"]["laws"]
    assert laws["share"] == pytest.approx(want.sum(), rel=1e-9)
    assert {"natural", "table", "kernel"} <= laws.keys()


def test_errors_over_either_batch_stand_beside_each_other(exact):
    found, first = exact.report["statistics"], exact.report["derivatives"]["first"]
    one, two = found["one_batch"], found["two_batch"]
    assert "one_batch" not in exact.report["fisher"]
    assert (
        one["first"].n == 6
        and one["first"].unit == first.unit
        and np.isfinite([one["zeta_1"], one["zeta_2"]]).all()
    )
    assert one["bootstrap_stderr"] > 0 and one["first"].stderr > 0
    assert two["given_update"] == first and two["given_evaluation"].n == 6
    assert two["both"].stderr == pytest.approx(math.hypot(first.stderr, two["given_evaluation"].stderr))
    shares, prompt = np.array(exact.tables["sequences_u"]["share"]), np.repeat(np.arange(6), 4)
    sums = np.bincount(prompt, weights=shares) / 1e-8
    assert two["given_evaluation"].stderr == pytest.approx(
        np.sqrt(6 / 5 * np.sum((sums - sums.mean()) ** 2)), rel=1e-9
    )


def test_structure_is_that_of_the_matrix_in_the_table(exact):
    report, table = exact.report["fisher"], exact.tables["fisher"]
    for name in ("plain", "preconditioned"):
        K = np.array(table[f"kernel_{name}"].to_pylist())
        found = report["kernels"][name]
        assert np.array(table[f"K_{name}"]) == pytest.approx(np.diag(K), rel=1e-6)
        assert found["spectrum"]["eigenvalues"] == pytest.approx(
            np.linalg.eigvalsh(K)[::-1], rel=1e-4, abs=1e-5 * K.max()
        )
        assert found["blocks"]["diagonal"]["raw"]["mean"].value == pytest.approx(np.diag(K).mean(), rel=1e-6)
        assert found["how"]["method"] in ("layers", "jvp") and "operations" in found["how"]["reason"]
        assert math.isfinite(found["growth"]["length_exponent"].value)


def test_the_page_shows_it_and_fetches_nothing(exact):
    text = html.render(exact.report, exact.tables)
    assert "How do responses move each other?" in text and "Laws of the entropy, on trial" in text
    assert 'id="kernel-' in text and 'id="spectrum-' in text
    assert (
        "http" not in text
        and "<img" not in text
        and "nan" not in text.split("How do responses")[1].lower()[:4000]
    )


def test_a_direction_that_was_read_has_the_plain_kernel_between_held_out_responses():
    config = MeasureConfig.demo(
        **{**SMALL, "prompts_e": 10}, etas=(2e-5,), update=f"next:{demo.next_dir()}", fisher_sequences=16
    )
    result = measure_step(config, progress=False)
    section = result.report["fisher"]
    assert section["batch"] == "e" and section["sequences"] == 16 and set(section["kernels"]) == {"plain"}
    assert "laws" not in section and "u" not in section["log_prob"]
    assert section["log_prob"]["e"]["slope"].value == pytest.approx(1, abs=0.1)
    assert "How do responses move each other?" in html.render(result.report, result.tables)


def test_too_few_responses_are_refused():
    with pytest.raises(UserError, match="at least 8"):
        MeasureConfig.demo(fisher_sequences=4)
    config = MeasureConfig.demo(**{**SMALL, "group_size": 8}, etas=(2e-5,), fisher_sequences=12)
    with pytest.raises(UserError, match="fisher_sequences: 12 is room for 1"):
        measure_step(config, progress=False)
