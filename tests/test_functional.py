"""entropy_logprob: every mode of differentiation, peaked rows, and rows that are hard for other implementations."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from entropy_kernels.functional import entropy_logprob
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import cpu, reference

TAU = 0.7


def plain(z, y, tau=TAU):
    """The definition, by torch's own differentiable operations."""
    log_p = torch.log_softmax(z / tau, -1)
    return torch.stack(
        [-(log_p.exp() * log_p).sum(-1), log_p.gather(-1, y[:, None])[:, 0], (z / tau).logsumexp(-1)]
    )


def ours(z, y, tau=TAU):
    return torch.stack(list(entropy_logprob(z, y, temperature=tau)))


def rows(seed=0, count=6, width=11):
    generator = torch.Generator().manual_seed(seed)
    z = (
        torch.randn(count, width, generator=generator, dtype=torch.float64)
        * torch.logspace(-3, 1.3, count)[:, None].double()
    )
    y = torch.randint(0, width, (count,), generator=generator)
    y[0], y[-1] = z[0].argmax(), z[-1].argmax()  # the likeliest token and others
    u, v = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, y, u, v, torch.randn(3, count, generator=generator, dtype=torch.float64)


def dual(f, x, t):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, t))).tangent


def double_backward(scalar, x, v):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    return torch.autograd.grad((first * v).sum(), x)[0]


MODES = {
    "value": lambda f, s, z, u, v: f(z),
    "reverse": lambda f, s, z, u, v: grad(s)(z),
    "forward": lambda f, s, z, u, v: jvp(f, (z,), (v,))[1],
    "forward by dual numbers": lambda f, s, z, u, v: dual(f, z, v),
    "forward over reverse": lambda f, s, z, u, v: jvp(grad(s), (z,), (v,))[1],
    "forward over reverse, moving cotangent": lambda f, s, z, u, v: jvp(
        lambda z: vjp(f, z)[1](f(z).sin())[0], (z,), (v,)
    )[1],
    "reverse over forward": lambda f, s, z, u, v: grad(lambda z: jvp(f, (z,), (v * z,))[1].sin().sum())(z),
    "reverse over reverse": lambda f, s, z, u, v: grad(lambda z: (grad(s)(z) * v).sum())(z),
    "reverse over reverse, autograd": lambda f, s, z, u, v: double_backward(s, z, v),
    "forward over forward": lambda f, s, z, u, v: jvp(lambda z: jvp(f, (z,), (v * z,))[1], (z,), (u,))[1],
    "forward over forward, fixed inner": lambda f, s, z, u, v: jvp(
        lambda z: jvp(f, (z,), (v,))[1], (z,), (u,)
    )[1],
    "vmap of forward": lambda f, s, z, u, v: vmap(lambda t: jvp(f, (z,), (t,))[1])(torch.stack([u, v])),
    "jacrev": lambda f, s, z, u, v: jacrev(f)(z),
    "jacfwd": lambda f, s, z, u, v: jacfwd(f)(z),
    "hessian": lambda f, s, z, u, v: hessian(s)(z),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_plain_autograd(mode):
    z, y, u, v, c = rows()

    def run(f):
        return MODES[mode](lambda z: f(z, y), lambda z: (f(z, y).sin() * c).sum(), z, u, v)

    expected = run(plain)
    assert expected.abs().max() > 1e-3  # a tangent of zero would prove nothing
    assert (run(ours) - expected).abs().max() <= 1e-12 * expected.abs().max()


def peaked(entropy_scale):
    """Rows whose largest logit stands `entropy_scale` above the rest, in float32, and their exact float64 image."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 50, generator=generator)
    z[:, 7] += entropy_scale
    y = torch.tensor([7, 7, 3, 20])
    return z, y, torch.randn(4, 50, generator=generator) + 3.0, torch.randn(4, 50, generator=generator) - 2.0


def exact(z, y):
    """Entropy, logprob, logsumexp in float64 without cancellation: terms of the off-peak tokens only."""
    peak = z.argmax(-1, keepdim=True)
    c = z - z.gather(-1, peak)
    others = torch.ones_like(z).scatter(-1, peak, 0.0)
    s1 = (others * c.exp()).sum(-1)
    mean = (others * c.exp() * c).sum(-1) / (1 + s1)
    return torch.stack(
        [s1.log1p() - mean, c.gather(-1, y[:, None])[:, 0] - s1.log1p(), z.amax(-1) + s1.log1p()]
    )


@pytest.mark.parametrize("gap, entropy", [(10, 8e-2), (22, 3e-6), (28, 1e-8)])
def test_peaked_rows_keep_float32_accuracy_in_values_and_derivatives(gap, entropy):
    z, y, u, v = peaked(gap)
    reference = exact(z.double(), y)
    assert entropy / 30 < reference[0].median() < entropy * 30

    def modes(f, z, u, v):
        forward = jvp(f, (z,), (v,))[1]
        second = jvp(lambda z: jvp(f, (z,), (v,))[1], (z,), (u,))[1]
        backward = [vjp(f, z)[1](torch.eye(3, dtype=z.dtype)[i][:, None].expand(3, 4))[0] for i in range(3)]
        product = [
            jvp(
                lambda z, i=i: vjp(f, z)[1](torch.eye(3, dtype=z.dtype)[i][:, None].expand(3, 4))[0],
                (z,),
                (v,),
            )[1]
            for i in range(3)
        ]
        return {
            "value": f(z),
            "forward": forward,
            "second": second,
            "backward": torch.stack(backward),
            "hvp": torch.stack(product),
        }

    got = modes(lambda z: ours(z, y, 1.0), z, u, v)
    want = modes(lambda z: exact(z, y), z.double(), u.double(), v.double())
    for mode in got:
        g, w = got[mode].double(), want[mode]
        scale = w.abs() if mode in ("value", "forward", "second") else w.abs().amax(-1, keepdim=True)
        assert ((g - w).abs() <= 1e-5 * scale + 1e-37).all(), (mode, ((g - w).abs() / scale).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_shifted_rows_equal_float64_of_the_rounded_input(dtype, shift):
    z, y, _, v, _ = rows(width=300)
    z = (z + shift).to(dtype)
    got = ours(z, y)
    want = plain(z.double(), y)
    assert got.dtype == torch.float32
    assert (got[:2] - want[:2]).abs().max() <= 2e-6 * want[:2].abs().max()
    assert ((got[2] - want[2]).abs() <= 1e-6 * want[2].abs().max()).all()
    tangent = jvp(lambda z: ours(z, y), (z,), (v.to(dtype),))[1]
    expected = jvp(lambda z: plain(z, y), (z.double(),), (v.to(dtype).double(),))[1]
    assert (tangent - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_columns_are_as_if_absent(dtype):
    z, y, u, v, _ = rows()
    z, u, v = z.to(dtype), u.to(dtype), v.to(dtype)
    hole = torch.full((6, 1), -torch.inf, dtype=dtype)
    wide = torch.cat([z[:, :4], hole, z[:, 4:], hole], 1)
    y_wide = y + (y >= 4)

    def widen(t):
        return torch.cat(
            [t[:, :4], torch.zeros(6, 1, dtype=dtype), t[:, 4:], torch.zeros(6, 1, dtype=dtype)], 1
        )

    second = jvp(lambda z: jvp(lambda z: ours(z, y_wide), (z,), (widen(v),))[1], (wide,), (widen(u),))[1]
    expected = jvp(lambda z: jvp(lambda z: ours(z, y), (z,), (v,))[1], (z,), (u,))[1]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert (second - expected).abs().max() <= tolerance * expected.abs().max()
    gradient = grad(lambda z: ours(z, y_wide).sin().sum())(wide)
    assert (gradient[:, [4, -1]] == 0).all() and torch.isfinite(gradient).all()
    inner = grad(lambda z: ours(z, y).sin().sum())(z)
    assert (gradient[:, [0, 1, 2, 3, *range(5, 12)]] - inner).abs().max() <= tolerance * inner.abs().max()


def test_masked_target_has_no_probability():
    z = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert entropy_logprob(z, torch.tensor([1])).logprob.item() == -torch.inf


def test_padded_columns_take_no_part():
    z, y, _, v, _ = rows()
    wide = torch.cat([z, torch.full((6, 5), 50.0, dtype=z.dtype)], 1)
    got = entropy_logprob(wide, y, temperature=TAU, vocab_size=11)
    assert torch.equal(torch.stack(list(got)), ours(z, y))
    gradient = grad(lambda z: entropy_logprob(z, y, vocab_size=11).entropy.sum())(wide)
    assert (gradient[:, 11:] == 0).all() and gradient[:, :11].abs().max() > 0


def test_ignored_targets_have_zero_logprob_and_gradient_but_an_entropy():
    z, y, _, v, _ = rows()
    y = torch.where(torch.arange(6) == 2, -100, y)
    result = entropy_logprob(z, y)
    assert result.logprob[2] == 0 and result.entropy[2] > 0
    gradient = grad(lambda z: entropy_logprob(z, y).logprob.sum())(z)
    assert (gradient[2] == 0).all() and (gradient[3] != 0).any()
    assert jvp(lambda z: entropy_logprob(z, y).logprob, (z,), (v,))[1][2] == 0


def test_one_column_empty_batch_and_no_targets():
    one = entropy_logprob(torch.tensor([[3.0], [-2.0]]), torch.tensor([0, 0]))
    assert (
        one.entropy.tolist() == [0, 0]
        and one.logprob.tolist() == [0, 0]
        and one.logsumexp.tolist() == [3, -2]
    )
    empty = entropy_logprob(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert empty.entropy.shape == (0,)
    assert entropy_logprob(torch.randn(2, 3, 5)).logprob is None
    assert entropy_logprob(torch.randn(2, 3, 5)).entropy.shape == (2, 3)


def test_strided_logits_and_temperature_per_row():
    z, y, _, _, _ = rows()
    tau = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    strided = torch.stack([z, z * 0], 2).transpose(0, 1)[:, :, 0].t()
    assert not strided.is_contiguous()
    got = torch.stack(list(entropy_logprob(strided, y, temperature=tau)))
    assert torch.allclose(got, plain(z / tau[:, None], y, 1.0), rtol=1e-13)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(bad):
    z, y, _, v, _ = rows()
    broken = z.clone()
    broken[2, 5] = bad
    clean = torch.arange(6) != 2
    for f in (lambda z: ours(z, y), lambda z: jvp(lambda z: ours(z, y), (z,), (v,))[1]):
        assert f(broken)[:2, 2].isnan().all()
        assert torch.equal(f(broken)[:, clean], f(z)[:, clean])
    gradient = grad(lambda z: ours(z, y).sum())(broken)
    assert gradient[2].isnan().any() and torch.isfinite(gradient[clean]).all()


def test_all_masked_row_is_undefined():
    z = torch.full((1, 4), -torch.inf)
    assert entropy_logprob(z).entropy.isnan().all()


def test_far_negative_rows_are_not_nan():
    result = entropy_logprob(torch.full((1, 8), -120.0), torch.tensor([3]))
    assert result.entropy.item() == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-6)


def test_backward_twice_gives_the_same_and_inputs_are_untouched():
    z, y, _, _, c = rows()
    before = z.clone()
    z.requires_grad_()
    loss = (ours(z, y) * c).sum()
    first = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, z)[0])
    assert torch.equal(z.detach(), before)


def test_no_grad_and_inference_mode_give_values():
    z, y, _, _, _ = rows()
    with torch.inference_mode():
        assert torch.equal(ours(z, y), ours(z, y))
    with torch.no_grad():
        assert not ours(z.requires_grad_(), y).requires_grad


@pytest.mark.parametrize("ops", [cpu, reference])
def test_tangents_along_several_directions_do_not_copy_the_logits(ops, monkeypatch):
    """vmap over tangents, in every further mode, against one direction after the other."""
    g = torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 3, 40, dtype=torch.float64, generator=g)
    directions = torch.randn(5, 3, 40, dtype=torch.float64, generator=g)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def f(z):
        found = entropy_logprob(z, torch.tensor([1, 2, -100]), temperature=0.7)
        return (weights * (found.entropy + 0.3 * found.logprob)).sum()

    def along(z, directions):
        return vmap(lambda v: jvp(f, (z,), (v,))[1])(directions)

    def one_by_one(z, directions):
        return torch.stack([jvp(f, (z,), (v,))[1] for v in directions])

    pairs = torch.stack([directions[:2], directions[2:4]])
    modes = {
        "value": lambda h: h(z, directions),
        "vjp": lambda h: torch.cat(
            [x.flatten() for x in grad(lambda *x: h(*x).sin().sum(), (0, 1))(z, directions)]
        ),
        "jvp": lambda h: jvp(h, (z, directions), (u, directions.flip(0)))[1],
        "vmap over directions": lambda h: torch.stack([h(z, p) for p in pairs]),
        "vmap over both": lambda h: torch.stack([h(z, pairs[0]), h(u, pairs[1])]),
    }
    at_once = modes | {
        "vmap over directions": lambda h: vmap(lambda p: h(z, p))(pairs),
        "vmap over both": lambda h: vmap(h)(torch.stack([z, u]), pairs),
    }
    with rows_from(ops):
        for mode in modes:
            want = modes[mode](one_by_one)
            got = at_once[mode](along)
            assert want.abs().max() > 0 and (got - want).abs().max() <= 1e-13 * want.abs().max(), mode
        rows, single = [], ops.row_tangents
        monkeypatch.setattr(ops, "row_tangents", lambda z, *x: rows.append(len(z)) or single(z, *x))
        along(z, directions)
    assert rows == [3] * 5  # and not fifteen at once


def test_a_tangent_of_the_temperature_is_refused():
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotImplementedError, match="with respect to the temperature"):
        jvp(lambda tau: entropy_logprob(z, temperature=tau).entropy, (torch.ones(2),), (torch.ones(2),))


def test_third_derivatives_raise():
    z, y, u, v, _ = rows()

    def second(z):
        return jvp(lambda z: jvp(lambda z: ours(z, y), (z,), (v,))[1], (z,), (u,))[1]

    with pytest.raises(NotImplementedError, match="third"):
        jvp(second, (z,), (v,))
    with pytest.raises(NotImplementedError, match="third"):
        grad(lambda z: second(z).sum())(z)


@pytest.mark.parametrize(
    "mode", ["value", "reverse", "forward", "forward by dual numbers", "forward over reverse"]
)
def test_compiled_use_is_right_or_raises(mode):
    """The compiler drops forward-mode rules without a word; a tangent of zero must never come back."""
    z, y, u, v, c = rows()

    def run(f):
        return MODES[mode](f, lambda z: (f(z).sin() * c).sum(), z, u, v)

    want = run(lambda z: ours(z, y))
    try:
        got = run(torch.compile(lambda z: ours(z, y), backend="eager"))
    except Exception:
        return
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(logits=torch.zeros(2, 3, dtype=torch.int64)), "floating-point"),
        (dict(logits=torch.zeros(2, 3), targets=torch.zeros(3, dtype=torch.int64)), "targets"),
        (dict(logits=torch.zeros(2, 3), targets=torch.tensor([0, 3])), "outside the vocabulary"),
        (dict(logits=torch.zeros(2, 3), targets=torch.tensor([0, -1])), "outside the vocabulary"),
        (dict(logits=torch.zeros(2, 3), vocab_size=4), "vocab_size"),
        (dict(logits=torch.zeros(2, 3), temperature=0.0), "positive"),
        (dict(logits=torch.zeros(2, 3), temperature=1e-50), "positive"),  # 0 in float32
        (dict(logits=torch.zeros(2, 3), temperature=torch.tensor([1.0, 0.0])), "positive"),
        (dict(logits=torch.zeros(2, 3), temperature=torch.ones(5)), "broadcast"),
        (
            dict(logits=torch.zeros(2, 3), temperature=torch.tensor(1.0, requires_grad=True)),
            "temperature requires grad",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy_logprob(**arguments)
