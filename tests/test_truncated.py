"""truncated_entropy in every mode of differentiation, its grouping identity, and bounds that hold the truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_functional import MODES
from torch.func import grad, jvp, vmap

from entropy_kernels import entropy_logprob, truncated_entropy, truncated_entropy_bounds
from entropy_kernels.functional import bounds, kept_set
from entropy_kernels.functional import truncated as functional
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import parts, reference

TAU = 0.7


def plain(z, y, kept, tau=TAU):
    """The definition on a fixed set, by torch's own differentiable operations."""

    def entropy(log_p):
        finite = torch.where(log_p == -torch.inf, 0.0, log_p)
        return -(log_p.exp() * finite).sum(-1)

    z = z / tau
    inside, tail = (
        z.masked_fill(~kept, -torch.inf).log_softmax(-1),
        z.masked_fill(kept, -torch.inf).log_softmax(-1),
    )
    return torch.stack(
        [
            entropy(inside),
            inside.gather(-1, y[:, None])[:, 0],
            (z.softmax(-1) * kept).sum(-1),
            entropy(tail),
            entropy(z.log_softmax(-1)),
        ]
    )


def ours(z, y, tau=TAU, **options):
    t = truncated_entropy(z, y, temperature=tau, **options)
    return torch.stack([t.entropy, t.logprob, t.kept_mass, t.tail_entropy, t.full_entropy])


def rows(count=6, width=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=g, dtype=torch.float64) * torch.logspace(-2, 0.7, count)[:, None]
    u, v = (torch.randn(count, width, generator=g, dtype=torch.float64) for _ in range(2))
    c = torch.randn(5, count, generator=g, dtype=torch.float64)
    y = z.argsort(-1, descending=True)[
        torch.arange(count), torch.arange(count) % 3
    ]  # among the three likeliest
    return z.double(), y, u, v, c


@pytest.mark.parametrize("truncation", [dict(top_k=4), dict(top_k=8, top_p=0.9)], ids=["top-k", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_plain_autograd_on_the_fixed_set(mode, truncation):
    z, y, u, v, c = rows()
    kept = kept_set(z, temperature=TAU, **truncation)
    y = torch.where(kept.gather(-1, y[:, None])[:, 0], y, z.argmax(-1))

    def run(f):
        return MODES[mode](f, lambda z: (f(z).sin() * c).sum(), z, u, v)

    expected = run(lambda z: plain(z, y, kept))
    assert expected.abs().max() > 1e-3
    for options in (truncation, dict(kept=kept)):
        got = run(lambda z, o=options: ours(z, y, **o))
        assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


def kept_law(z, y, **options):
    t = truncated_entropy(z, y, temperature=TAU, tail=False, **options)
    assert t.kept_mass is None and t.tail_entropy is None and t.full_entropy is None
    return torch.stack([t.entropy, t.logprob])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_kept_law_alone(mode):
    """Without the tail: the set is searched, or given; a kept token likely, and least likely, and all of the row kept."""
    z, y, u, v, c = rows()
    k = torch.tensor([1, 3, 4, 5, 8, 11])
    kept = kept_set(z, top_k=k, temperature=TAU)
    y = torch.where(torch.arange(6) % 2 == 0, torch.where(kept, z, torch.inf).argmin(-1), z.argmax(-1))

    def run(f):
        return MODES[mode](f, lambda z: (f(z).sin() * c[:2]).sum(), z, u, v)

    expected = run(lambda z: plain(z, y, kept)[:2])
    assert expected.abs().max() > 1e-3
    for options in (dict(top_k=k), dict(kept=kept)):
        got = run(lambda z, o=options: kept_law(z, y, **o))
        assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("mode", ["reverse", "forward", "forward over reverse", "reverse over reverse"])
def test_the_specification_equals_plain_autograd_too(mode):
    z, y, u, v, c = rows()
    kept = kept_set(z, top_k=5, temperature=TAU)
    y = torch.where(kept.gather(-1, y[:, None])[:, 0], y, z.argmax(-1))

    def run(f):
        return MODES[mode](f, lambda z: (f(z).sin() * c).sum(), z, u, v)

    with rows_from(reference):
        assert functional.parts.part_functions(z.device) is parts
        for options in (dict(top_k=5), dict(kept=kept)):
            got, expected = run(lambda z, o=options: ours(z, y, **o)), run(lambda z: plain(z, y, kept))
            assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_values_and_gradients_of_narrow_dtypes(dtype, shift):
    z, _, _, _, c = rows(width=400)
    z = (z + shift).to(dtype)
    kept = z.argsort(-1) % 3 == 0  # replayed, with and without the peak
    y = torch.where(kept, z, -torch.inf).argmax(-1)
    got, want = ours(z, y, kept=kept), plain(z.double(), y, kept)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 1e-12 if dtype == torch.float64 else 3e-6
    assert ((got - want).abs() <= bound * want.abs().clamp_min(1e-3)).all(), (got - want).abs() / want.abs()
    gradient = grad(lambda z: (ours(z, y, kept=kept) * c.to(got.dtype)).sum())(z)
    expected = grad(lambda z: (plain(z, y, kept) * c).sum())(z.double())
    written = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 10 * bound)
    assert gradient.dtype == dtype
    assert (gradient.double() - expected).abs().max() <= written * expected.abs().max()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([-torch.inf, -60.0, -3.0, 0.0, 0.5, 1.0, 7.0, 40.0]), min_size=1, max_size=9
    ).filter(lambda row: max(row) > -torch.inf),
    st.integers(1, 9),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_the_parts_make_up_the_full_entropy(row, k, p, dtype):
    """H = s H_S + ε H_tail − s log s − ε log ε, tails of no token and of next to no mass included."""
    t = truncated_entropy(torch.tensor(row, dtype=dtype), top_k=k, top_p=p)
    s = t.kept_mass.double()
    eps = 1 - s
    total = s * t.entropy + eps * t.tail_entropy - torch.xlogy(s, s) - torch.xlogy(eps, eps)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    assert abs(total - t.full_entropy) <= bound * max(1, t.full_entropy)
    assert (
        t.logprob is None and t.kept_count == kept_set(torch.tensor(row, dtype=dtype), top_k=k, top_p=p).sum()
    )
    assert (total >= 0) and 0 < s <= 1


def test_values_alone_are_those_of_the_differentiable_path():
    """Without a derivative nothing the size of the logits is made on the CPU; every way of asking for one leaves that path."""
    z, y, _, v, _ = rows(width=3000)
    for dtype in (torch.float64, torch.float32):
        options = dict(top_k=700, top_p=0.95, temperature=TAU)
        alone = truncated_entropy(z.to(dtype), y, **options)
        recorded = truncated_entropy(z.to(dtype).clone().requires_grad_(), y, **options)
        assert recorded.entropy.requires_grad and not alone.entropy.requires_grad
        for a, b in zip(alone, recorded, strict=True):
            assert torch.allclose(a, b, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)
        alone = truncated_entropy(z.to(dtype), y, **options, tail=False)
        assert torch.allclose(alone.entropy, recorded.entropy, rtol=2e-6) and alone.full_entropy is None
        assert torch.allclose(alone.logprob, recorded.logprob, rtol=2e-6)
        assert torch.equal(alone.kept_count, recorded.kept_count)
    with torch.no_grad():
        assert torch.equal(
            truncated_entropy(z.clone().requires_grad_(), y, **options).entropy,
            truncated_entropy(z, y, **options).entropy,
        )
    with torch.inference_mode():
        assert torch.equal(
            truncated_entropy(z, y, **options).entropy, truncated_entropy(z.clone(), y, **options).entropy
        )
    assert jvp(lambda z: truncated_entropy(z, top_k=7).entropy, (z,), (v,))[1].abs().min() > 0


def test_no_truncation_is_the_full_row():
    z, y, _, _, _ = rows()
    full = entropy_logprob(z, y, temperature=TAU)
    for options in (
        dict(),
        dict(top_k=0),
        dict(top_k=99),
        dict(top_p=1.0),
        dict(kept=torch.ones_like(z).bool()),
    ):
        t = truncated_entropy(z, y, temperature=TAU, **options)
        assert torch.allclose(t.entropy, full.entropy, rtol=1e-14) and torch.allclose(
            t.logprob, full.logprob, rtol=1e-13
        )
        assert torch.equal(t.full_entropy, full.entropy)
        assert (t.kept_mass == 1).all() and (t.tail_entropy == 0).all() and (t.kept_count == 11).all()
    gradient = grad(lambda z: ours(z, y).sum())(z)
    expected = grad(
        lambda z: (
            2 * entropy_logprob(z, temperature=TAU).entropy + entropy_logprob(z, y, temperature=TAU).logprob
        ).sum()
    )(z)
    assert (gradient - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_small_masses_keep_their_digits():
    z = torch.tensor([[0.0, -1.0, -30.0, -31.0]])
    for kept, want in [([0, 0, 1, 1], None), ([1, 1, 0, 0], 1.0)]:
        t = truncated_entropy(z, kept=torch.tensor([kept]).bool())
        s = (z.double().softmax(-1) * torch.tensor([kept])).sum().item()
        assert t.kept_mass.item() == pytest.approx(s if want is None else want, rel=3e-6)
        assert t.entropy.item() == pytest.approx(t.tail_entropy.item(), rel=1e-6)  # both pairs are e^0 : e^-1


def test_the_tail_is_seen_far_below_the_peak():
    z = torch.cat(
        [torch.tensor([[200.0]]), torch.randn(1, 50, generator=torch.Generator().manual_seed(0))], 1
    )
    t = truncated_entropy(z, top_k=1)
    want = entropy_logprob(z[:, 1:].double()).entropy
    assert t.tail_entropy.item() == pytest.approx(want.item(), rel=1e-6)
    assert t.entropy == 0 and t.kept_mass == 1 and t.full_entropy == pytest.approx(0, abs=1e-30)


def test_a_target_outside_the_set_has_logprob_minus_infinity_and_no_gradient():
    z, _, _, v, _ = rows()
    y = z.argmin(-1)
    y[1] = z[1].argmax()
    y[2] = -100
    t = truncated_entropy(z, y, top_k=3)
    recorded = truncated_entropy(z.clone().requires_grad_(), y, top_k=3)
    for logprob in (t.logprob, recorded.logprob):
        assert logprob.isneginf().tolist() == [True, False, False, True, True, True] and logprob[2] == 0

    def finite(z):
        logprob = truncated_entropy(z, y, top_k=3).logprob
        return torch.where(logprob.isfinite(), logprob, 0.0)

    gradient, tangent = grad(lambda z: finite(z).sum())(z), jvp(finite, (z,), (v,))[1]
    assert (
        torch.isfinite(gradient).all() and (gradient[[0, 2, 3, 4, 5]] == 0).all() and (gradient[1] != 0).any()
    )
    assert (tangent[[0, 2, 3, 4, 5]] == 0).all() and tangent[1] != 0
    for tail in (True, False):  # nor where −inf itself is differentiated
        bare = grad(lambda z, t=tail: truncated_entropy(z, y, top_k=3, tail=t).logprob.sum())(z)
        assert torch.equal(bare, gradient)


def test_nothing_flows_into_masked_columns_or_across_the_set():
    z, y, _, _, _ = rows()
    z[:, 3] = -torch.inf
    y = z.argmax(-1)
    for options in (dict(top_k=4), dict(top_k=10), dict(top_p=0.5)):
        t = truncated_entropy(z, y, **options)
        assert all(torch.isfinite(x).all() for x in t)
        gradient = grad(lambda z, o=options: ours(z, y, **o).sum())(z)
        assert torch.isfinite(gradient).all() and (gradient[:, 3] == 0).all()
        kept = kept_set(z, **options)
        inner = grad(lambda z, o=options: truncated_entropy(z, **o).entropy.sum())(z)
        assert (inner[~kept] == 0).all()
        outer = grad(lambda z, o=options: truncated_entropy(z, **o).tail_entropy.sum())(z)
        assert (outer[kept] == 0).all()


@pytest.mark.parametrize("tail", [True, False])
def test_a_gradient_of_what_is_undefined_is_not_zero(tail):
    z, y, _, _, _ = rows()
    z[2, 5] = torch.nan
    gradient = grad(lambda z: truncated_entropy(z, y, top_k=4, tail=tail).entropy.sum())(z)
    assert gradient[2].isnan().all() and gradient[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(bad):
    z, y, _, _, _ = rows()
    broken = z.clone()
    broken[2, 5] = bad
    clean = torch.arange(6) != 2
    got, want = ours(broken, y, top_k=4), ours(z, y, top_k=4)
    assert got[:, 2].isnan().all() and torch.equal(got[:, clean], want[:, clean])
    assert ours(torch.full((1, 4), -torch.inf), torch.tensor([0]), top_k=2).isnan().all()


def test_vmap_any_shape_and_per_row_settings():
    z, y, _, _, _ = rows()
    k, p = torch.tensor([1, 2, 3, 4, 11, 0]), torch.tensor([0.9, 0.8, 0.7, 1.0, 0.5, 0.95])
    together = truncated_entropy(z.view(2, 3, 11), y.view(2, 3), top_k=k.view(2, 3), top_p=p.view(2, 3))
    for r in range(6):
        one = truncated_entropy(z[r], y[r], top_k=int(k[r]), top_p=p[r])
        for a, b in zip(together, one, strict=True):
            assert torch.allclose(a.reshape(-1)[r], b, rtol=1e-14)
    mapped = vmap(lambda z, y: truncated_entropy(z, y, top_k=3, top_p=0.9).entropy)(
        z.view(2, 3, 11), y.view(2, 3)
    )
    assert torch.allclose(mapped.reshape(-1), truncated_entropy(z, y, top_k=3, top_p=0.9).entropy, rtol=1e-14)
    assert truncated_entropy(z[:0], y[:0], top_k=3).entropy.shape == (0,)


def test_a_number_for_top_p_is_not_rounded_to_float32():
    tenths = torch.full((10,), 0.1, dtype=torch.float64).log() - torch.arange(10) * 1e-12
    mass = tenths.softmax(-1).sort(descending=True).values[:3].sum().item()
    assert (
        kept_set(tenths, top_p=mass * (1 + 1e-9)).sum() == 4
        and kept_set(tenths, top_p=mass * (1 - 1e-9)).sum() == 3
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(top_k=-1), "top_k must be positive"),
        (dict(top_k=2.5), "whole numbers"),
        (dict(top_k=torch.ones(5, dtype=torch.int64)), "broadcast"),
        (dict(top_p=0.0), r"\(0, 1\]"),
        (dict(top_p=1.1), r"\(0, 1\]"),
        (dict(top_p=float("nan")), r"\(0, 1\]"),
        (dict(top_k=1, kept=torch.ones(2, 3).bool()), "beside it"),
        (dict(kept=torch.ones(2, 3)), "bool"),
        (dict(kept=torch.ones(3).bool()), "shape"),
        (dict(targets=torch.tensor([0, 3])), "outside the vocabulary"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        truncated_entropy(torch.zeros(2, 3), **arguments)


LAWS = {
    "uniform": lambda V, g: torch.zeros(V),
    "wide": lambda V, g: torch.randn(V, generator=g) * 4,
    "narrow": lambda V, g: torch.randn(V, generator=g) * 1e-3,
    "peaked": lambda V, g: torch.randn(V, generator=g) + 25 * (torch.arange(V) == 1),
    "one token": lambda V, g: torch.randn(V, generator=g) + 300 * (torch.arange(V) == V // 2),
    "two levels": lambda V, g: (torch.arange(V) < 3) * 12.0,  # each small term is rounded the same way
    "masked": lambda V, g: torch.randn(V, generator=g).masked_fill(torch.arange(V) % 3 == 1, -torch.inf),
}


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(LAWS)),
    st.sampled_from([2, 3, 17, 1000, 20000]),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 9),
)
def test_bounds_hold_the_truth(law, V, k, whole, dtype, seed):
    """For log-probs in float64, and as engines give them: computed in float32, stored in float32 or bfloat16."""
    z = LAWS[law](V, torch.Generator().manual_seed(seed)).double()
    truth = entropy_logprob(z).entropy
    logprob = z.log_softmax(-1) if dtype == torch.float64 else z.float().log_softmax(-1).to(dtype)
    top = logprob.topk(V if whole else min(k, V)).values
    lower, upper = truncated_entropy_bounds(top, V)
    exact = truth.item()  # itself rounded, by 1e-15 of its terms
    assert lower.item() <= exact + 1e-14 * (1 + exact) and exact - 1e-14 * (1 + exact) <= upper.item()
    assert 0 <= lower.item() <= upper.item() <= math.log(V) + 1e-6


def test_bounds_are_as_narrow_as_they_can_be():
    z = torch.randn(20, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logprob = z.log_softmax(-1).sort(descending=True).values
    truth = entropy_logprob(z).entropy
    for k in (1, 5, 50, 499):
        lower, upper = truncated_entropy_bounds(logprob[:, :k], 500, logprob_error=0.0)
        p = logprob[:, :k].exp()
        eps = 1 - p.sum(-1)
        head = -(p * logprob[:, :k]).sum(-1) - torch.xlogy(eps, eps)
        assert torch.allclose(lower, head + eps * (eps.log() - logprob[:, k - 1]).clamp_min(0), rtol=1e-9)
        assert torch.allclose(
            upper, torch.minimum(head + eps * math.log(500 - k), torch.tensor(math.log(500))), rtol=1e-9
        )
    lower, upper = truncated_entropy_bounds(logprob, 500)
    assert ((upper - lower) < 1e-9).all() and ((lower <= truth) & (truth <= upper)).all()


def test_the_upper_bound_is_reached_by_a_flat_tail_and_the_lower_by_a_steep_one():
    flat = torch.tensor([0.5, *[0.1] * 5], dtype=torch.float64).log()
    steep = torch.tensor([0.4, 0.3, 0.3, 0.0], dtype=torch.float64).log()
    assert truncated_entropy_bounds(flat[:1], 6)[1].item() == pytest.approx(
        entropy_logprob(flat).entropy.item(), rel=1e-12
    )
    assert truncated_entropy_bounds(steep[:2], 4)[0].item() == pytest.approx(
        entropy_logprob(steep).entropy.item(), rel=1e-12
    )


def test_a_term_may_be_larger_inside_its_interval_than_at_either_end():
    for low, high, least, greatest in [
        (0.1, 0.2, 0.1, 0.2),
        (0.3, 0.45, 0.45, 1 / math.e),
        (0.5, 0.9, 0.9, 0.5),
        (0, 1, 1, 1 / math.e),
    ]:
        ends = torch.tensor([low, high], dtype=torch.float64)
        lower, upper = (x.item() for x in bounds._surprise(*ends))
        for bound, x in ((lower, least), (upper, greatest)):
            assert bound == pytest.approx(-x * math.log(x), rel=1e-14, abs=1e-300)
        assert lower <= -least * math.log(least) and upper >= -greatest * math.log(greatest)


def test_bounds_refuse_what_no_law_has():
    with pytest.raises(ValueError, match="positive"):
        truncated_entropy_bounds(torch.tensor([0.1, -3.0]), 10)
    with pytest.raises(ValueError, match="add up"):
        truncated_entropy_bounds(torch.tensor([-0.5, -0.5, -3.0]), 10)
    with pytest.raises(ValueError, match="vocab_size"):
        truncated_entropy_bounds(torch.tensor([-0.7, -0.7]), 1)
    with pytest.raises(ValueError, match="floating"):
        truncated_entropy_bounds(torch.tensor([1]), 3)
    with pytest.raises(ValueError, match="logprob_error"):
        truncated_entropy_bounds(torch.tensor([-1.0]), 10, logprob_error=-1.0)
    lower, upper = truncated_entropy_bounds(torch.tensor([[-0.5, torch.nan], [-0.5, -2.0]]), 10)
    assert lower.isnan().tolist() == upper.isnan().tolist() == [True, False]


def test_autocast_changes_nothing():
    """Rows are float32 sums whatever autocast says, forward and backward."""
    z, y, _, _, c = rows()
    z = z.float()

    def gradient():
        x = z.clone().requires_grad_()
        return torch.autograd.grad((ours(x, y, top_k=4) * c.float()).sum(), x)[0]

    y = z.argmax(-1)
    outside = ours(z, y, top_k=4), gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(z, y, top_k=4), gradient()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_a_sharded_tensor_is_refused_by_name():
    from torch import distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for placement in (Replicate(), Shard(0), Shard(1)):
            z = distribute_tensor(torch.zeros(2, 4), init_device_mesh("cpu", (1,)), [placement])
            for function in (
                entropy_logprob,
                lambda z: truncated_entropy(z, top_k=2),
                lambda z: kept_set(z, top_k=2),
            ):
                with pytest.raises(ValueError, match="DTensor"):
                    function(z)
    finally:
        dist.destroy_process_group()


def test_use_inside_a_compiled_region_is_refused():
    compiled = torch.compile(lambda z: truncated_entropy(z, top_k=2).entropy, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"torch\.compile|compil"):
        compiled(torch.zeros(2, 4))


def test_entropy_and_logprob_are_of_one_truncated_law():
    """The full law's logprob beside a sampler's truncation is off by log s: a probability ratio of s where it should be 1."""
    z, _, _, _, _ = rows(width=50)
    y = z.argmax(-1)
    t = truncated_entropy(z, y, top_p=0.9)
    full = entropy_logprob(z, y).logprob
    assert torch.allclose((full - t.logprob).exp(), t.kept_mass, rtol=1e-12) and (t.kept_mass < 0.999).any()
