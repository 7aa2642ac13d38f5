"""What other implementations of entropy and log-prob have been seen to get wrong, one test for each, on every device that is here.

Each case is first shown to be hard: the formula that fails on it is written out and does fail. Then ours is held against float64,
from logits, from hidden states and as a truncated row. The issues named are the trackers' of the projects in question.
"""

from __future__ import annotations

import pytest
import torch

from entropy_kernels import entropy_logprob, linear_entropy_logprob, truncated_entropy

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
each_device = pytest.mark.parametrize("device", DEVICES)


def from_hidden(z, y, **options):
    """One row at a time, hidden state 1 and the logits as the layer's weights: its logits are z, −∞ included."""
    one = torch.ones(1, 1, dtype=z.dtype, device=z.device)
    temperature = options.pop("temperature", 1.0)
    taus = torch.as_tensor(temperature, device=z.device).expand(len(z))
    found = [
        linear_entropy_logprob(one, row[:, None], target[None], temperature=tau[None], **options)
        for row, target, tau in zip(z, y, taus, strict=True)
    ]
    return torch.cat([x.entropy for x in found]), torch.cat([x.logprob for x in found])


FUNCTIONS = {
    "logits": lambda z, y, **options: entropy_logprob(z, y, **options)[:2],
    "hidden": from_hidden,
    "truncated": lambda z, y, **options: truncated_entropy(z, y, **options)[:2],
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def exact(z, y, temperature=1.0):
    """Entropy and log-prob in float64, with 0 · log 0 = 0."""
    tau = torch.as_tensor(temperature, device=z.device, dtype=torch.float64).expand(len(z))[:, None]
    log_p = torch.log_softmax(z.double() / tau, -1)
    p_log_p = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p)
    return -p_log_p.sum(-1), log_p.gather(-1, y[:, None])[:, 0]


def entropy_gradient(z, temperature=1.0):
    """−p (log p + H) / τ in float64."""
    tau = torch.as_tensor(temperature, device=z.device, dtype=torch.float64).expand(len(z))[:, None]
    log_p = torch.log_softmax(z.double() / tau, -1)
    H = exact(z, torch.zeros(len(z), dtype=torch.long, device=z.device), temperature)[0]
    return torch.where(log_p == -torch.inf, 0.0, -log_p.exp() * (log_p + H[:, None])) / tau


def rows(device, R=4, V=700, scale=3.0):
    g = torch.Generator().manual_seed(R + V)
    z = torch.randn(R, V, generator=g) * scale
    y = torch.randint(0, V, (R,), generator=g)
    return z.to(device), y.to(device)


def assert_near(got, want, relative=1e-5):
    """A number a row to its own size, a gradient to the size of its row."""
    scale = want.abs() if want.dim() == 1 else want.abs().amax(-1, keepdim=True)
    assert torch.isfinite(got).all() and got.shape == want.shape
    assert ((got.double() - want).abs() <= relative * scale).all()


@each_device
@each_function
def test_logits_of_minus_infinity_give_no_nan(name, device):
    """TRL#7221, SkyRL#2259: a masked vocabulary, where p log p is 0 · (−∞)."""
    z, y = rows(device)
    z[:, 1::2] = -torch.inf
    y = y // 2 * 2
    log_p = z.log_softmax(-1)
    assert (-(log_p.exp() * log_p).sum(-1)).isnan().all()
    leaf = z.clone().requires_grad_()
    entropy, logprob = FUNCTIONS[name](leaf, y)
    for got, want in zip((entropy, logprob), exact(z, y), strict=True):
        assert_near(got, want)
    (g,) = torch.autograd.grad(entropy.sum(), leaf)
    assert_near(g, entropy_gradient(z))
    assert (g[:, 1::2] == 0).all()


@each_device
@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_padded_vocabulary_columns_are_not_counted(name, device):
    """A head padded to a round number of rows of zeros: 300 logits of 0 beside 700 real ones."""
    z, y = rows(device, scale=1.0)
    padded = torch.cat([z, torch.zeros(len(z), 300, device=device)], -1)
    want = exact(z, y)
    assert (exact(padded, y)[0] - want[0] > 0.3).all()
    leaf = padded.clone().requires_grad_()
    entropy, logprob = FUNCTIONS[name](leaf, y, vocab_size=700)
    assert_near(entropy, want[0])
    assert_near(logprob, want[1])
    (g,) = torch.autograd.grad(entropy.sum(), leaf)
    assert_near(g[:, :700], entropy_gradient(z))
    assert (g[:, 700:] == 0).all()


@each_device
@each_function
@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_logits_far_from_zero_neither_vanish_nor_overflow(name, device, shift):
    """A running maximum begun at 0 leaves log 0 where all logits are near −120; one that is never subtracted overflows."""
    z, y = rows(device)
    z = z.clamp(-9, 9) + shift
    assert not torch.isfinite(z.exp().sum(-1).log()).any()
    leaf = z.clone().requires_grad_()
    entropy, logprob = FUNCTIONS[name](leaf, y)
    for got, want in zip((entropy, logprob), exact(z, y), strict=True):
        assert_near(got, want)
    assert_near(torch.autograd.grad(entropy.sum(), leaf)[0], entropy_gradient(z))


@each_device
@pytest.mark.parametrize("name", ["logits", "truncated"])
def test_offsets_of_rows_beyond_two_to_the_31(name, device):
    """Rows 2³⁰ apart, so that the offsets of the third and fourth do not fit 32 bits; no memory between the rows is touched."""
    z, y = rows(device, V=300)
    z = z.half()
    apart = torch.empty(3 * 2**30 + 300, dtype=torch.float16, device=device).as_strided((4, 300), (2**30, 1))
    apart.copy_(z)
    assert 2 * apart.stride(0) == 2**31
    options = {"top_k": 40, "top_p": 0.9} if name == "truncated" else {}

    def results(x):
        leaf = x.detach().requires_grad_()
        out = FUNCTIONS[name](leaf, y, **options)
        return (*FUNCTIONS[name](x, y, **options), *out, torch.autograd.grad(out[0].sum(), leaf)[0])

    for far, near in zip(results(apart), results(z), strict=True):
        assert torch.equal(far, near)


@pytest.mark.skipif("cuda" not in DEVICES, reason="5 GB of logits and as much gradient: needs a GPU")
def test_more_logits_than_two_to_the_31():
    R, V = 14_300, 151_936
    assert R * V > 2**31
    z = torch.randn(R, V, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(0, V, (R,), device="cuda")
    leaf = z.requires_grad_()
    entropy, logprob = FUNCTIONS["logits"](leaf, y)
    (g,) = torch.autograd.grad((entropy + logprob).sum(), leaf)
    last = z.detach()[-3:].clone().requires_grad_()
    alone = FUNCTIONS["logits"](last, y[-3:])
    assert torch.equal(entropy[-3:], alone[0]) and torch.equal(logprob[-3:], alone[1])
    assert torch.equal(g[-3:], torch.autograd.grad(sum(x.sum() for x in alone), last)[0])


@each_device
@each_function
def test_entropy_is_taken_after_the_temperature(name, device):
    """OpenRLHF#1319: the entropy of softmax(z) reported for a policy that samples from softmax(z/τ)."""
    z, y = rows(device)
    tau = torch.tensor([0.5, 0.7, 1.3, 2.0], device=device)
    want = exact(z, y, tau)
    assert ((exact(z, y)[0] - want[0]).abs() > 0.1).all()
    leaf = z.clone().requires_grad_()
    entropy, logprob = FUNCTIONS[name](leaf, y, temperature=tau)
    assert_near(entropy, want[0])
    assert_near(logprob, want[1])
    assert_near(torch.autograd.grad(entropy.sum(), leaf)[0], entropy_gradient(z, tau))


@each_device
@each_function
def test_backward_twice_is_the_same_and_logits_stay_as_they_are(name, device):
    """Kernels that leave the gradient where the saved logits were give another one the second time."""
    z, y = rows(device)
    overwritten = z.clone().requires_grad_()
    saved = overwritten.detach()
    first = torch.autograd.grad(exact(overwritten, y)[0].sum(), overwritten)[0]
    saved.copy_(first)
    assert not torch.equal(torch.autograd.grad(exact(overwritten, y)[0].sum(), overwritten)[0], first)
    leaf = z.clone().requires_grad_()
    total = sum(x.sum() for x in FUNCTIONS[name](leaf, y))
    once, again = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again) and torch.equal(leaf, z) and once.abs().max() > 0.1


@each_device
@each_function
def test_the_gradient_of_the_entropy_is_not_ignored(name, device):
    """An entropy bonus without effect: the entropy detached, or its cotangent unused beside that of the log-prob."""
    z, y = rows(device)
    want = entropy_gradient(z)
    assert want.abs().max() > 0.01
    leaf = z.clone().requires_grad_()
    entropy, logprob = FUNCTIONS[name](leaf, y)
    assert entropy.requires_grad
    (alone,) = torch.autograd.grad(entropy.sum(), leaf, retain_graph=True)
    (of_logprob,) = torch.autograd.grad(logprob.sum(), leaf, retain_graph=True)
    (both,) = torch.autograd.grad((2 * entropy + logprob).sum(), leaf)
    assert_near(alone, want)
    one_hot = torch.nn.functional.one_hot(y, z.shape[-1])
    assert_near(of_logprob, one_hot - z.double().softmax(-1))
    assert_near(both, 2 * want + one_hot - z.double().softmax(-1))


@each_device
@each_function
@pytest.mark.parametrize("gap, entropy_nats", [(16.0, 1.3e-3), (19.0, 8e-5), (23.0, 1.7e-6), (28.0, 1.4e-8)])
def test_rows_of_small_entropy_keep_their_digits(name, device, gap, entropy_nats):
    """H < 1e-3: logsumexp − E[z] loses every digit where both are of the size of the largest logit."""
    z = rows(device)[0].clamp(-1, 1)
    z[:, 300] = gap
    y = torch.full((4,), 300, device=device)
    want = exact(z, y)
    assert (want[0] / entropy_nats - 1).abs().max() < 0.5
    uncentred = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    assert (uncentred / want[0] - 1).abs().max() > 1e-4
    leaf = z.clone().requires_grad_()
    entropy, logprob = FUNCTIONS[name](leaf, y)
    assert ((entropy / want[0] - 1).abs() < 1e-5).all() and ((logprob / want[1] - 1).abs() < 1e-5).all()
    assert_near(torch.autograd.grad(entropy.sum(), leaf)[0], entropy_gradient(z))


@each_device
def test_entropy_and_logprob_under_top_p_are_of_the_law_that_was_sampled(device):
    """TRL#7269: beside a sampler with top-p, the full softmax makes every importance ratio the kept mass instead of 1."""
    z, _ = rows(device)
    y = z.argmax(-1)
    p = z.double().softmax(-1)
    best, order = p.sort(-1, descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, best.cumsum(-1) - best < 0.9)
    inside = z.masked_fill(~kept, -torch.inf)
    want, full = exact(inside, y), exact(z, y)
    leaf = z.clone().requires_grad_()
    found = truncated_entropy(leaf, y, top_p=0.9)
    assert_near(found.entropy, want[0])
    assert_near(found.logprob, want[1])
    assert ((full[0] - want[0]) > 0.3).all()
    ratio = (full[1] - found.logprob.double()).exp()
    assert ((ratio / found.kept_mass - 1).abs() < 1e-5).all() and (ratio < 0.92).all()
    (g,) = torch.autograd.grad(found.entropy.sum(), leaf)
    assert_near(g, entropy_gradient(inside))
