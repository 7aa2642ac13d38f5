"""The row functions inside `torch.compile`: values and gradient in one graph; every other derivative is right or raises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp

from entropy_kernels import entropy_logprob, linear_entropy_logprob

Y = torch.tensor([[0, -100, 8], [3, 9, 1]])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, b = draw(11, 4, seed=3), draw(11, seed=4)


def mixed(result) -> Tensor:
    return (2 * result.entropy - result.logprob).sin().sum() + result.logsumexp.square().sum()


def from_logits(z: Tensor) -> Tensor:
    return mixed(entropy_logprob(1.5 * z, Y, temperature=0.7, vocab_size=10))


def from_hidden(h: Tensor) -> Tensor:
    return mixed(linear_entropy_logprob(h.sin(), W, Y, bias=b, softcap=2.0, temperature=0.9, workspace=200))


CASES = [(from_logits, draw(2, 3, 11, seed=1)), (from_hidden, draw(2, 3, 4, seed=2))]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.parametrize(("f", "x"), CASES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_values_and_gradient_without_a_graph_break(f, x, backend):
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    x = x.clone().requires_grad_()
    compiled(x).backward()
    torch.testing.assert_close(compiled(x), f(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, grad(f)(x), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_head_and_of_bfloat16_logits():
    h, W = draw(6, 4, seed=5).bfloat16(), draw(11, 4, seed=6).bfloat16()

    def f(h: Tensor, W: Tensor) -> Tensor:
        return mixed(linear_entropy_logprob(h, W, Y.reshape(-1))) + mixed(
            entropy_logprob(h @ W.t(), Y.reshape(-1))
        )

    args = [x.clone().requires_grad_() for x in (h, W)]
    torch.compile(f, fullgraph=True, backend="aot_eager")(*args).backward()
    for x, want in zip(args, grad(f, argnums=(0, 1))(h, W), strict=True):
        torch.testing.assert_close(
            x.grad, want, rtol=2e-2, atol=2e-2
        )  # a step of bfloat16 at the size of the largest entries


@pytest.mark.parametrize(("f", "x"), CASES)
def test_a_second_gradient_raises(f, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="eager")(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize(("f", "x"), CASES)
def test_dual_numbers_never_lose_their_tangent(f, x):
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled(x)  # what was compiled without tangents must not be taken again
    with (
        forward_ad.dual_level(),
        pytest.raises(Exception, match=r"no forward-mode derivative|Observed exception"),
    ):
        compiled(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(("f", "x"), CASES)
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_forward_mode_is_right_or_raises(f, x, fullgraph, where):
    v = torch.ones_like(x)
    want = jvp(f, (x,), (v,))[1]
    options = {"fullgraph": fullgraph, "backend": "aot_eager"}
    try:
        if where == "inside":
            got = torch.compile(lambda x: jvp(f, (x,), (v,))[1], **options)(x)
        else:
            got = jvp(torch.compile(f, **options), (x,), (v,))[1]
    except Exception:
        return
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_target_outside_the_vocabulary_still_raises():
    compiled = torch.compile(lambda z, y: entropy_logprob(z, y).logprob, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="outside the vocabulary of 11"):
        compiled(draw(2, 3, 11, seed=1), torch.full((2, 3), 11))
