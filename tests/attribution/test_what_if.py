"""Each rule touches the tokens it says and no other; proxies are their formulas; misuse is refused."""

from __future__ import annotations

import numpy as np
import pytest

from entropy_kernels.attribution import RULES, TokenFacts, factors, parse_rule, token_proxies
from entropy_kernels.attribution.proxies import sequence_covariance
from entropy_kernels.errors import UserError

MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
A = np.array([1.5, -0.5, -2.0, 0.5])
S = np.where(
    MASK, np.log([[0.9, 0.05, 0.5, 1], [1, 0.04, 0.7, 0.2], [0.03, 0.8, 1, 1], [0.6, 0.02, 0.9, 0.3]]), 0.0
)
H = np.where(MASK, 0.3 - 0.4 * S, 0.0)
PROMPT = np.array([0, 0, 1, 1])


def facts(**changes) -> TokenFacts:
    marginal = np.where(MASK, np.arange(16).reshape(4, 4) * (-1.0) ** np.arange(4), 0.0)
    known = dict(
        mask=MASK,
        prompt_index=PROMPT,
        advantage=A,
        logprob=S,
        entropy=H,
        marginal=marginal,
        log_ratio=np.zeros_like(S),
    )
    return TokenFacts(**{**known, **changes})


def touched(text, **changes):
    f = factors(parse_rule(text), facts(**changes))
    assert (f[~MASK] == 1).all()
    return f, {tuple(x) for x in np.argwhere(f != 1).tolist()}


def test_rules_touch_what_they_say():
    assert touched("drop-top:0.1") == (
        pytest.approx(np.where(np.arange(16).reshape(4, 4) < 14, 1, 0)),
        {(3, 2), (3, 3)},
    )
    assert touched("drop-negative-unlikely:0.1")[1] == {(1, 1), (2, 0)}
    f, which = touched("scale-negative:0.25")
    assert which == {(1, 1), (1, 2), (1, 3), (2, 0), (2, 1)} and set(f[MASK]) == {0.25, 1.0}
    assert touched("scale-positive:0")[1] == {(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2), (3, 3)}


def test_covariance_rules_take_the_tokens_of_large_covariance():
    on = MASK
    tokens = [(A[i], S[i, k]) for i, k in np.argwhere(on)]
    mean_A, mean_S = np.mean(tokens, axis=0)
    covariance = np.where(on, (A[:, None] - mean_A) * (S - mean_S), -np.inf)
    eligible = {tuple(x) for x in np.argwhere((covariance >= 1) & (covariance <= 5) & on).tolist()}
    assert len(eligible) >= 2
    assert touched("clip-cov:1,1,5")[1] == eligible
    f, one = touched("clip-cov:0.05,1,5")
    assert len(one) == 1 and one < eligible and f.min() == 0
    top = np.unravel_index(covariance.argmax(), covariance.shape)
    f, which = touched("kl-cov:0.05,0.4", log_ratio=np.where(on, 0.3, 0.0))
    assert which == {tuple(int(x) for x in top)} and f[top] == pytest.approx(1 - 0.4 * 0.3 / A[top[0]])


def test_on_policy_the_ratio_rules_do_nothing_and_off_policy_they_clip():
    assert touched("kl-cov")[1] == touched("clip-higher")[1] == set()
    ratio = np.where(MASK, np.log(1.25), 0.0)
    assert touched("clip-higher:0.2,0.2", log_ratio=ratio)[1] == {
        (i, k) for i, k in np.argwhere(MASK) if A[i] > 0
    }
    assert touched("clip-higher:0.2,0.28", log_ratio=ratio)[1] == set()
    assert touched("clip-higher", log_ratio=-2 * ratio)[1] == {
        (i, k) for i, k in np.argwhere(MASK) if A[i] < 0
    }
    with pytest.raises(UserError, match="column logprobs"):
        factors(parse_rule("kl-cov"), facts(log_ratio=None))


def test_proxies_are_their_formulas_token_by_token():
    found = token_proxies(S, H, A, MASK, PROMPT)
    tokens = [tuple(x) for x in np.argwhere(MASK)]
    for name, groups in (("cov_batch", np.zeros(4, int)), ("cov_prompt", PROMPT)):
        for i, k in tokens:
            own = [(A[j], S[j, m]) for j, m in tokens if groups[j] == groups[i]]
            mean = np.mean(own, axis=0)
            assert found[name][i, k] == pytest.approx(-(A[i] - mean[0]) * (S[i, k] - mean[1]))
    for i, k in tokens:
        p = np.exp(S[i, k])
        assert found["s_star"][i, k] == pytest.approx(-A[i] * p * (H[i, k] + np.log(p)))
        assert found["steer"][i, k] == pytest.approx(-A[i] * p * (1 - p) ** 2 * (H[i, k] + np.log(p)))
    assert all((x[~MASK] == 0).all() for x in found.values())
    total = S.sum(axis=1)
    want = -np.mean((A[:2] - A[:2].mean()) * (total[:2] - total[:2].mean()))
    assert sequence_covariance(S, A, MASK, PROMPT)[:2].mean() == pytest.approx(want)


@pytest.mark.parametrize(
    "text", ["drop", "drop-top:much", "drop-top:0.1,2", "drop-top:0", "clip-cov:2", "scale-negative:nan"]
)
def test_rules_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match="what_if"):
        parse_rule(text)


def test_every_rule_has_defaults():
    assert [parse_rule(name).name for name in RULES] == list(RULES)
