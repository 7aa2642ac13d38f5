"""Losses as TRL trains them: stale batches with clipped ratios, a KL term, an entropy bonus; the step it took is rebuilt.

Runs with a ratio end on the second pass over a batch, where it is not 1, at a rate high enough for it to be clipped.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import trained

from entropy_kernels import demo
from entropy_kernels.checkpoints import LoggedLoss, load_parameters, logged_loss
from entropy_kernels.errors import UserError
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.direction import get_update, load_state
from entropy_kernels.measure.losses import LossTerms, check_logged, describe_loss, loss_terms
from entropy_kernels.measure.samples import batch_of
from entropy_kernels.measure.steps import load_policy, measure_step
from entropy_kernels.rl.rollouts import Rollouts

STEPS = 4
RUNS = {
    "token": (
        dict(num_iterations=2, epsilon=0.01, epsilon_high=0.03, beta=0.1, entropy_coef=0.05),
        dict(ratio="token", clip_low=0.01, clip_high=0.03, kl_coef=0.1, entropy_coef=0.05),
    ),
    "sequence": (
        dict(num_iterations=2, epsilon=0.005, importance_sampling_level="sequence"),
        dict(ratio="sequence", clip_low=0.005, loss="grpo"),
    ),
    "truncated": (dict(top_p=0.8), dict(top_p=0.8, loss_law="full")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            where = tmp_path_factory.mktemp("trl")
            loss = RUNS[kind][1].get("loss", "dapo")
            made[kind] = trained.train("qwen2", where, steps=STEPS, loss=RUNS[kind][0], loss_type=loss)
        return made[kind]

    return of


def config_of(run, kind, **changes):
    recorded = str(run / "recorded" / "rollouts_u.parquet")
    settings = dict(
        ckpt=str(run / f"checkpoint-{STEPS - 1}"), rollouts_u=recorded, rollouts_e=recorded, max_new_tokens=8
    )
    settings |= RUNS[kind][1]
    if settings.get("kl_coef"):
        settings["ref_model"] = str(run.parent / "base")
    return MeasureConfig(**(settings | changes))


def missed(config, after):
    """(1 − cosine, length ratio) of our direction against the step that was taken."""
    policy = load_policy(config)
    state, info = load_state(config, policy)
    U = Rollouts.load(config.rollouts_u)
    v = get_update(config, policy, state, U, batch_of(U), info.stored_lr, False).direction
    moved = load_parameters(after, policy.model)
    a = torch.cat([(moved[name].double() - p.double()).flatten() for name, p in policy.params.items()])
    b = torch.cat([v[name].double().flatten() for name in policy.params])
    return 1 - (torch.dot(a, b) / (a.norm() * b.norm())).item(), (a.norm() / b.norm()).item() / info.stored_lr


@pytest.mark.parametrize("kind", RUNS)
def test_the_step_that_trl_took_is_rebuilt(runs, kind):
    run = runs(kind)
    config, after = config_of(run, kind), run / f"checkpoint-{STEPS}"
    off, length = missed(config, after)
    assert off < 1e-6
    assert length == pytest.approx(1, abs=1e-4)
    if kind == "truncated":  # TRL samples from the truncated law and learns with the full one
        assert missed(replace(config, loss_law="policy"), after)[0] > 1e-5
        return
    other = "sequence" if kind == "token" else "token"
    wrong = [
        dict(ratio="none", clip_low=None, clip_high=None),
        dict(ratio=other),
        dict(clip_low=0.3, clip_high=0.3),
    ]
    if kind == "token":
        wrong += [
            dict(kl_coef=0.11),
            dict(kl_correction=False),
            dict(entropy_coef=0.04),
            dict(clip_high=None),
        ]
    for changes in wrong:
        assert missed(replace(config, **changes), after)[0] > 1e-5, changes


def test_report_says_which_loss_it_was(runs, tmp_path):
    rows = [json.dumps({"prompt": f"9{i}-{i}=", "answer": "9"}) for i in range(8)]
    (tmp_path / "e.jsonl").write_text("\n".join(rows))
    config = config_of(
        runs("token"), "token", rollouts_e=None, dataset=str(tmp_path / "e.jsonl"), prompts_e=4,
        etas=(1e-4,), truth="direct", second_order=False,
    )  # fmt: skip
    result = measure_step(config, progress=False)
    terms = result.report["update"]["terms"]
    log = json.loads((runs("token") / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())[
        "log_history"
    ][-1]
    assert terms["ratio"]["clipped_share"] == pytest.approx(log["clip_ratio/region_mean"], abs=1e-6)
    assert 0 < terms["ratio"]["clipped_share"] < 1
    assert terms["kl"]["nats_per_token"] == pytest.approx(log["kl"], rel=1e-4)
    for words in (
        "importance ratio per token, clipped below 0.99 and above 1.03",
        "KL term 0.1",
        "entropy bonus 0.05",
    ):
        assert words in terms["words"]


def test_what_the_log_shows_is_not_dropped(runs):
    config = config_of(runs("token"), "token", ratio="none", clip_low=None, clip_high=None)
    with pytest.raises(UserError, match=r"log in .* has a KL divergence.*--kl-coef and --ref-model"):
        measure_step(replace(config, kl_coef=None, ref_model=None), progress=False)
    with pytest.raises(UserError, match=r"entropy bonus \(last coefficient 0.05\)"):
        measure_step(replace(config, entropy_coef=None), progress=False)
    said = replace(config, entropy_coef=0.0, kl_coef=0.0, ref_model=None)
    check_logged(said)
    U = Rollouts.load(config.rollouts_u)
    words = describe_loss(said, U, batch_of(U), LossTerms())["words"]
    assert "no KL term; no entropy bonus" in words and "log has clipped tokens" in words


@pytest.mark.parametrize(
    "metrics, setting", [({"cispo_clip_ratio": 0.1}, "cispo"), ({"aux_loss": 1.0}, "router_aux_loss_coef")]
)
def test_a_loss_that_is_not_rebuilt_is_refused_by_name(tmp_path, metrics, setting):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, **metrics}]}))
    assert logged_loss(tmp_path).others
    with pytest.raises(UserError, match=f"{setting}.*--update next:CHECKPOINT"):
        check_logged(MeasureConfig.demo(ckpt=str(tmp_path)))
    assert logged_loss(tmp_path / "nowhere") == LoggedLoss()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ratio="token"), "without rollouts_u"),
        (dict(clip_low=0.1), "--ratio token"),
        (dict(kl_coef=0.1), "needs both"),
        (dict(ref_model="m"), "needs both"),
        (dict(kl_correction=False), "nothing to correct"),
        (dict(entropy_coef=-1.0), "expected 0 or more"),
        (dict(loss_law="full"), "without top_k or top_p"),
        (dict(top_p=0.9, ratio="token", rollouts_u="u"), "kept, which its log-probs do not tell"),
        (dict(top_p=0.9, kl_coef=0.1, ref_model="m"), "--loss-law full"),
        (dict(update="next:x", entropy_coef=0.1), "needs no loss"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        MeasureConfig.demo(**changes)


def test_a_ratio_needs_log_probs_and_a_reference_of_the_same_vocabulary(runs, tmp_path):
    config = config_of(runs("token"), "token")
    policy, U = load_policy(config), Rollouts.load(config.rollouts_u)
    with pytest.raises(UserError, match="has no logprobs"):
        loss_terms(config, policy, replace(U, logprobs=None), batch_of(U))
    with pytest.raises(UserError, match="vocabulary of"):
        loss_terms(replace(config, ref_model=str(demo.checkpoint_dir())), policy, U, batch_of(U))
