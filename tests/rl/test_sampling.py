"""Samples come from π and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from characters import EOS, PAD
from scipy.stats import chi2
from tqdm import tqdm
from transformers import GenerationConfig

from entropy_kernels.errors import UserError
from entropy_kernels.rl.sampling import _Draw, sample_rollouts
from entropy_kernels.rl.tasks import Prompt

TEXTS = ["1+1=", "12+34=", "a", "what is 2*3?"]


def prompts_of(tokenizer, texts=TEXTS):
    return [
        Prompt(prompt_id=f"t:{i}", text=text, answer="", token_ids=tuple(tokenizer(text)["input_ids"]))
        for i, text in enumerate(texts)
    ]


def sample(model, tokenizer, prompts, **options):
    settings = {"group_size": 3, "max_new_tokens": 8, "seed": 0, "batch_size": 5, "progress": False}
    return sample_rollouts(model, tokenizer, prompts, **{**settings, **options})


@torch.no_grad()
def law(model, ids, temperature=1.0):
    """softmax(z/τ) after each token of ids, from a plain unpadded forward pass, float64 [len, V]."""
    return torch.softmax(model(torch.tensor([ids])).logits[0].double() / temperature, dim=-1)


def chi_square(counts, p):
    """z of Pearson's statistic, cells with fewer than 5 expected pooled."""
    n, small = counts.sum(), p * counts.sum() < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(p[~small], p[small].sum()) * n
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, len(observed) - 1))


@pytest.fixture
def hostile(model):
    """A model whose own generation settings would bend the law in every way they know."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.3,
        min_p=0.2,
        temperature=0.1,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[5, 6],
        begin_suppress_tokens=[7],
        min_new_tokens=3,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return model


def test_first_two_tokens_follow_the_law(hostile, tokenizer):
    """Pearson's test of the first token, and of the second given the commonest first; n and seed fixed."""
    n, temperature = 4000, 0.7
    (prompt,) = prompts_of(tokenizer, ["12+3="])
    r = sample(
        hostile,
        tokenizer,
        [prompt],
        group_size=n,
        max_new_tokens=2,
        temperature=temperature,
        seed=11,
        batch_size=1000,
    )
    first = np.array([ids[0] for ids in r.completion_ids])
    p = law(hostile, prompt.token_ids, temperature)[-1].numpy()
    assert 0.02 < p.max() < 0.9
    assert chi_square(np.bincount(first, minlength=64), p) > 1e-3
    wrong = law(hostile, prompt.token_ids, 1.0)[-1].numpy()
    assert chi_square(np.bincount(first, minlength=64), wrong) < 1e-6  # the test sees a wrong temperature

    common = int(np.bincount(first[first != EOS]).argmax())
    second = np.array([ids[1] for ids in r.completion_ids if ids[0] == common])
    p = law(hostile, (*prompt.token_ids, common), temperature)[-1].numpy()
    assert len(second) > 200
    assert chi_square(np.bincount(second, minlength=64), p) > 1e-3


def test_logprobs_are_those_of_the_policy(hostile, tokenizer):
    """Left padding and the cache change nothing: an unpadded pass gives the same log-probs."""
    r = sample(hostile, tokenizer, prompts_of(tokenizer), temperature=0.7)
    for prompt, ids, logprobs in zip(r.prompt_ids, r.completion_ids, r.logprobs, strict=True):
        p = law(hostile, (*prompt, *ids), 0.7)
        wanted = [float(p[len(prompt) + k - 1, token].log()) for k, token in enumerate(ids)]
        np.testing.assert_allclose(logprobs, wanted, atol=2e-5)


def test_end_of_sequence_counts_and_nothing_after_it(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[EOS] += 0.3 * model.lm_head.weight.std()
    r = sample(model, tokenizer, prompts_of(tokenizer), group_size=40, eos_token_ids=[EOS, 20, 30], seed=5)
    reasons = set(r.finish_reason)
    assert reasons == {"stop", "length"}
    ends = {EOS, 20, 30}
    for ids, reason, logprobs in zip(r.completion_ids, r.finish_reason, r.logprobs, strict=True):
        assert not ends & set(ids[:-1])
        assert (ids[-1] in ends) == (reason == "stop")
        assert reason == "stop" or len(ids) == 8
        assert len(logprobs) == len(ids)
    assert {ids[-1] for ids in r.completion_ids} >= ends
    assert any(len(ids) == 1 for ids in r.completion_ids)


def test_pad_token_equal_to_eos_and_no_eos_at_all(model, tokenizer):
    tokenizer.pad_token = "<eos>"
    r = sample(model, tokenizer, prompts_of(tokenizer), group_size=30)
    assert "stop" in r.finish_reason
    assert all(EOS not in ids[:-1] for ids in r.completion_ids)
    free = sample(model, tokenizer, prompts_of(tokenizer), group_size=30, eos_token_ids=[])
    assert {len(ids) for ids in free.completion_ids} == {8}
    assert set(free.finish_reason) == {"length"}
    assert any(EOS in ids[:-1] for ids in free.completion_ids)


def test_the_same_completions_whatever_the_batching(model, tokenizer):
    prompts = prompts_of(tokenizer)
    torch.manual_seed(1)
    r = sample(model, tokenizer, prompts)
    torch.manual_seed(2)
    assert sample(model, tokenizer, prompts, batch_size=1).completion_ids == r.completion_ids
    turned = sample(model, tokenizer, prompts[::-1], batch_size=12)
    by_id = {(p, s): ids for p, s, ids in zip(r.prompt_id, r.sample_index, r.completion_ids, strict=True)}
    assert by_id == {
        (p, s): ids
        for p, s, ids in zip(turned.prompt_id, turned.sample_index, turned.completion_ids, strict=True)
    }
    assert sample(model, tokenizer, prompts, seed=1).completion_ids != r.completion_ids
    assert len({ids for p, ids in zip(r.prompt_id, r.completion_ids, strict=True) if p == "t:0"}) == 3


def test_order_and_text_of_the_rows(model, tokenizer):
    prompts = prompts_of(tokenizer)
    r = sample(model, tokenizer, prompts)
    assert r.prompt_id == tuple(p.prompt_id for p in prompts for _ in range(3))
    assert r.group_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert r.sample_index.tolist() == [0, 1, 2] * 4
    assert r.prompt_ids[4] == prompts[1].token_ids
    assert r.completion[4] == tokenizer.decode(list(r.completion_ids[4]), skip_special_tokens=True)
    assert r.sampling == {"temperature": 1.0, "max_new_tokens": 8, "seed": 0, "eos_token_ids": [EOS]}


def test_the_model_and_the_random_state_are_put_back(hostile, tokenizer):
    hostile.train()
    hostile.lm_head.eval()
    own = hostile.generation_config
    before, state = own.to_dict(), torch.random.get_rng_state()
    sample(hostile, tokenizer, prompts_of(tokenizer))
    assert hostile.generation_config is own and own.to_dict() == before
    assert hostile.training and hostile.model.training and not hostile.lm_head.training
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UserError, match="not finite"):
        with torch.no_grad():
            hostile.lm_head.weight[3] = float("nan")
        sample(hostile, tokenizer, prompts_of(tokenizer))
    assert hostile.training and hostile.generation_config is own


def test_refusals(model, tokenizer):
    prompts = prompts_of(tokenizer)
    for name in ("group_size", "max_new_tokens", "batch_size"):
        with pytest.raises(UserError, match=f"{name}=0"):
            sample(model, tokenizer, prompts, **{name: 0})
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="temperature"):
            sample(model, tokenizer, prompts, temperature=temperature)
    with pytest.raises(UserError, match="occurs twice"):
        sample(model, tokenizer, prompts + prompts[:1])
    with pytest.raises(UserError, match="64 positions"):
        sample(model, tokenizer, prompts, max_new_tokens=53)
    with pytest.raises(UserError, match="empty"):
        sample(model, tokenizer, [])
    alien = Prompt(prompt_id="x", text="", answer="", token_ids=(3, 64))
    with pytest.raises(UserError, match="does not belong to this model"):
        sample(model, tokenizer, [alien])
    model.generation_config = GenerationConfig()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        sample(model, tokenizer, prompts)


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.4999, 1), (0.5001, 3), (1 - 2**-53, 3)])
def test_tokens_without_probability_are_never_drawn(u, token):
    """Not even at the ends of [0, 1), where rounding could reach past the last token that has any."""
    scores = torch.full((1, 6), -torch.inf)
    scores[0, [1, 3]] = 0.0
    with tqdm(disable=True) as bar:
        draw = _Draw(torch.tensor([[u]], dtype=torch.float64), 1.0, bar)
        assert int(draw(torch.zeros(1, 1), scores).argmax()) == token
    assert float(draw.logprobs[0]) == pytest.approx(np.log(0.5))
