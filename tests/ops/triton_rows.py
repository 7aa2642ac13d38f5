"""What `test_triton_rows.py` runs: every function, dtype and awkward shape against the float64 specification.

The interpreter takes a second for what a GPU does at once: there, what repeats another test in a further dtype or place is marked slow.
Rows are cut into tiles of 512 columns, so that small rows exercise the merge; `tile_width` itself is used where a test says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import (
    FUNCTIONS,
    case,
    columns,
    each_dtype,
    each_function,
    special_rows,
    tolerance,
    widened,
)
from torch.autograd import forward_ad as fwAD
from torch.func import grad, jvp, vmap

from entropy_kernels.functional import entropy_logprob
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import reference, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATURAL_WIDTHS = (rows.tile_width, rows.written_width)


def each(name, *values, slow=()):
    """Parametrize; the values in `slow` are slow in the interpreter."""
    marks = pytest.mark.slow if DEVICE == "cpu" else ()
    return pytest.mark.parametrize(name, [*values, *(pytest.param(x, marks=marks) for x in slow)], ids=str)


one_dtype = each("dtype", torch.float32, slow=[torch.float64, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(rows, "tile_width", lambda V, dtype, tangents=0: 512)
    monkeypatch.setattr(rows, "written_width", lambda V, dtype: 256)


def there(x):
    """On the device under test."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    return type(x)(there(item) for item in x) if isinstance(x, (list, tuple)) else x


def triton(name, *arguments):
    """The result of one function of `ops.rows`, as columns, on the CPU."""
    return columns(FUNCTIONS[name](rows, *there(arguments))).cpu()


def specified(name, *arguments):
    return columns(FUNCTIONS[name](reference, *widened(arguments)))


def allowed(name, dtype):
    # the interpreter cuts float32 to bfloat16 where a GPU rounds: a whole last place instead of half of one
    cut = DEVICE == "cpu" and dtype == torch.bfloat16 and name.startswith("row_cotangent")
    return tolerance(name, dtype) * (2 if cut else 1)


def assert_near(name, got, want, dtype, factor=1.0):
    assert got.dtype == (dtype if name.startswith("row_cotangent") else reference.compute_dtype(dtype))
    assert got.shape == want.shape
    scale = want.abs().amax(-1, keepdim=True) if want.numel() else want
    bound = factor * allowed(name, dtype) * scale + (6e-8 if dtype == torch.float16 else 1e-30)
    assert ((got.double() - want).abs() <= bound).all(), ((got.double() - want).abs() / scale).max()


@each_function
@each_dtype
@each("V", 1300, slow=[1, 7, 507])
def test_equals_the_specification(name, dtype, V):
    arguments = case(2 if DEVICE == "cpu" else 123, V, dtype)
    want = specified(name, *arguments)
    assert V == 1 or want.abs().max() > 0
    assert_near(name, triton(name, *arguments), want, dtype)


@each_function
@one_dtype
def test_tiles_as_wide_as_in_use(name, dtype, monkeypatch):
    for attribute, f in zip(("tile_width", "written_width"), NATURAL_WIDTHS, strict=True):
        monkeypatch.setattr(rows, attribute, f)
    arguments = case(2, 2 * 8192 + 507, dtype)
    assert_near(name, triton(name, *arguments), specified(name, *arguments), dtype)


@each_function
@each_dtype
def test_no_row(name, dtype):
    arguments = case(0, 507, dtype)
    assert_near(name, triton(name, *arguments), specified(name, *arguments), dtype)


@each_function
@each("dtype", torch.bfloat16, slow=[torch.float32])
def test_any_stride(name, dtype):
    z, u, v, y, tau, w = case(3, 600, dtype)
    padded = torch.full((3, 3, 640), torch.nan, dtype=dtype)
    padded[:, :, 20:620] = torch.stack([z, u, v])
    padded = padded.to(DEVICE)
    want = triton(name, z, u, v, y, tau, w)
    for layout in (padded[:, :, 20:620], padded.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 20:620]):
        got = triton(name, *layout, torch.stack([y, y], 1)[:, 0], tau, list(torch.stack(w, 1).unbind(1)))
        assert torch.equal(got, want)


@each_function
@one_dtype
def test_every_output_is_written(name, dtype, monkeypatch):
    empty, poisoned = torch.empty, []

    def poison(*size, **options):
        poisoned.append(empty(*size, **options).fill_(torch.nan))
        return poisoned[-1]

    arguments = there(case(3, 1301, dtype))
    monkeypatch.setattr(torch, "empty", poison)
    got = columns(FUNCTIONS[name](rows, *arguments))
    assert poisoned and all(torch.isfinite(t).all() for t in [got, *poisoned])


@each_function
def test_a_row_gives_the_same_bits_alone_and_again(name):
    arguments = case(2, 1500, torch.float32)
    all_rows = triton(name, *arguments)
    assert torch.equal(triton(name, *arguments), all_rows)
    z, u, v, y, tau, w = arguments
    one = triton(name, z[1:2], u[1:2], v[1:2], y[1:2], tau[1:2], [x[1:2] for x in w])
    assert torch.equal(one.squeeze(), all_rows[1] if name.startswith("row_cotangent") else all_rows[:, 1])


@each("dtype", torch.bfloat16, slow=[torch.float32])
def test_a_gradient_may_be_written_over_its_inputs(dtype):
    z, _u, v, y, tau, w = there(case(4, 900, dtype))
    y[0] = z[0].argmax()
    weights, moved = tuple(w[:3]), tuple(w[3:])
    first = rows.row_cotangents(z, y, tau, *weights)
    second = rows.row_cotangent_tangents(z, v, y, tau, weights, moved)
    for over in (0, 1):
        inputs = (z.clone(), v.clone())
        assert torch.equal(
            rows.row_cotangent_tangents(*inputs, y, tau, weights, moved, out=inputs[over]), second
        )
        assert torch.equal(inputs[over], second)
    over_z = z.clone()
    rows.row_cotangents(over_z, y, tau, *weights, out=over_z)
    assert torch.equal(over_z, first)


@each_function
@one_dtype
def test_hard_rows(name, dtype):
    arguments = special_rows(dtype, V=1400)
    got, want = triton(name, *arguments), specified(name, *arguments)
    assert torch.isfinite(got).all()
    for row in range(12):
        g, x = (
            t[row : row + 1] if name.startswith("row_cotangent") else t[:, row : row + 1] for t in (got, want)
        )
        assert_near(name, g, x, dtype, factor=3)


@each_function
@each("dtype", torch.float32, slow=[torch.float64, torch.bfloat16])
@each("where", 700, slow=[0, 1299])
def test_peaked_rows_lose_nothing(name, dtype, where):
    z, u, v, y, tau, w = case(4, 1300, dtype)
    u, v = (
        u.abs() + 3.5,
        -v.abs() - 2.5,
    )  # on one side of the peak's, so that no covariance is small by accident
    z[:, where], u[:, where], v[:, where] = 40.0, 3.0, -2.0  # an entropy of 1e-7 and below
    y[:] = torch.tensor([where, where, 5, -1])
    arguments = (z, u, v, y, torch.ones_like(tau), w)
    got, want = triton(name, *arguments), specified(name, *arguments)
    if name == "row_values":
        assert (want[0] < 1e-6).all()
    if name.startswith("row_cotangent"):
        assert_near(name, got, want, dtype)
    else:  # each number to its own size
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        assert ((got.double() - want).abs() <= bound * want.abs()).all()


def test_the_gradient_at_a_likely_target_keeps_its_digits():
    """g (1 − p) with p = 1 − 2e-15, in the gradient and in its tangent."""
    z = torch.full((1, 700), -40.0)
    z[0, 600] = 0.0
    y, one, zero = torch.tensor([600]), torch.ones(1), torch.zeros(1)
    first = rows.row_cotangents(*there((z, y, one, zero, one, zero)))
    still = (zero, one, zero)
    second = rows.row_cotangent_tangents(*there((z, torch.zeros_like(z), y, one, (zero, zero, zero), still)))
    want = 699 * torch.tensor(-40.0, dtype=torch.float64).exp()
    for gradient in (first, second):
        assert abs(gradient[0, 600].item() / want - 1) < 1e-5


@pytest.mark.parametrize("ties", [1, 2, 5, 9])
@pytest.mark.parametrize("rest", [-40.0, -12.0, -3.0, -0.01])
def test_ties_at_the_peak_are_counted_and_the_rest_kept(ties, rest):
    z = torch.full((1, 500), rest)
    z[0, 3 : 3 + 7 * ties : 7] = 0.0
    y, tau = torch.tensor([0]), torch.ones(1)
    got = columns(rows.row_values(*there((z, y, tau)))).cpu().double()
    want = columns(reference.row_values(z.double(), y, tau.double()))
    assert ((got - want).abs() <= 4e-7 * want.abs()).all()


@each_function
@one_dtype
@each("bad", torch.nan, slow=[torch.inf])
def test_nan_and_infinity_stay_in_their_row(name, dtype, bad):
    z, u, v, y, tau, w = case(3, 1300, dtype)
    clean = triton(name, z, u, v, y, tau, w)
    for column in (700,) if DEVICE == "cpu" else (0, 700, 1299):
        broken = z.clone()
        broken[1, column] = bad
        got = triton(name, broken, u, v, y, tau, w)
        got_rows, want_rows = (t if name.startswith("row_cotangent") else t.T for t in (got, clean))
        assert torch.equal(got_rows[[0, 2]], want_rows[[0, 2]])
        if name.startswith("row_cotangent"):
            assert got_rows[1].isnan().any()
        else:
            assert got_rows[1, [0, 2]].isnan().all()


@pytest.mark.parametrize("name", ["row_tangents", "row_second_tangents", "row_cotangent_tangents"])
def test_nan_in_a_tangent_is_seen_even_where_the_weight_is_zero(name):
    z, u, v, y, tau, w = case(3, 1300, torch.float32)
    z[1] = -torch.inf
    z[1, 0] = 0.0
    v[1, 1100] = torch.nan
    assert triton(name, z, u, v, y, tau, w).isnan().any()


@pytest.mark.parametrize("V", [400, 900])
def test_an_all_masked_row_is_undefined_and_a_masked_target_impossible(V):
    z = torch.full((2, V), -torch.inf)
    z[1, 3] = 1.0
    result = rows.row_values(*there((z, torch.tensor([0, 0]), torch.ones(2))))
    assert (
        result.entropy[0].isnan()
        and result.logsumexp[0].isnan()
        and result.entropy[1] == 0
        and result.logprob[1] == -torch.inf
    )


@pytest.mark.skipif(
    DEVICE == "cpu", reason="the interpreter has no fused multiply-add, which the last places need"
)
def test_exponentials_are_right_to_the_last_place():
    """The entropy of two tokens x apart is (1 + x) e^{−x} for large x; a temperature that is no power of two."""
    x = torch.linspace(0.01, 78, 5000)
    z, y, tau = torch.stack([torch.zeros_like(x), -x], 1), torch.full((5000,), -1), torch.full((5000,), 0.9)
    got = rows.row_values(*there((z, y, tau))).entropy.cpu()
    assert (got / reference.row_values(z.double(), y, tau.double()).entropy - 1).abs().max() < 4e-7


def test_a_tangent_of_another_dtype_is_not_cut_down():
    z, _u, v, y, tau, w = case(4, 300, torch.bfloat16)
    exact = v.float() + 1e-4
    got = columns(rows.row_tangents(*there((z, exact, y, tau)))).cpu()
    want = columns(reference.row_tangents(z.double(), exact.double(), y, tau.double()))
    assert_near("row_tangents", got, want, torch.bfloat16)
    moved = rows.row_cotangent_tangents(*there((z, exact, y, tau, tuple(w[:3]), tuple(w[3:]))))
    assert moved.dtype == torch.bfloat16


def test_precise_sums_leave_only_the_rounding_of_the_result():
    z, _u, v, y, tau, w = case(5, 1300, torch.float32)
    calls = {
        "row_values": (z, y, tau),
        "row_tangents": (z, v, y, tau),
        "row_cotangents": (z, y, tau, *w[:3]),
        "row_cotangent_tangents": (z, v, y, tau, tuple(w[:3]), tuple(w[3:])),
    }
    for name, arguments in calls.items():
        wide = [
            [x.double() for x in a] if isinstance(a, tuple) else a.double() if a.is_floating_point() else a
            for a in arguments
        ]
        got = columns(getattr(rows, name)(*there(arguments), precise=True)).cpu()
        want = columns(getattr(reference, name)(*wide))
        assert (
            got.dtype == torch.float32 and ((got.double() - want).abs() <= 6e-8 * want.abs() + 1e-40).all()
        ), name


@one_dtype
def test_a_state_handed_in_gives_the_same_gradient_and_tangent_of_it(dtype):
    z, _u, v, y, tau, w = there(case(4, 1300, dtype))
    values, state = rows.row_values_and_state(z, y, tau)
    assert torch.equal(columns(values), columns(rows.row_values(z, y, tau)))
    assert torch.equal(
        rows.row_cotangents(z, y, tau, *w[:3], state=state), rows.row_cotangents(z, y, tau, *w[:3])
    )

    known = rows.row_tangents_and_state(z, v, y, tau)[1]
    moved = (tuple(w[:3]), tuple(w[3:]))
    found = rows.row_cotangent_tangents(z, v, y, tau, *moved)
    # also where the two states were found apart and lie otherwise in memory
    for states in ((known[:, :3], known[:, 3:]), (state, known[:, 3:].T.contiguous().T)):
        assert torch.equal(rows.row_cotangent_tangents(z, v, y, tau, *moved, state=states), found)


@one_dtype
def test_directions_at_once_give_what_each_gives_alone(dtype):
    """Seven of them: four, two and one share a read. The last row is peaked, one is masked in part."""
    z, u, v, y, tau, _w = there(case(4, 1300, dtype))
    z[3, 700], z[1, ::3] = 40.0, -torch.inf
    directions = torch.stack([u, v, u + v, u - v, v - u, z.clamp(min=-3), v * v])
    got, known = rows.row_many_tangents(z, directions, y, tau)
    for k, direction in enumerate(directions):
        alone, of_one = rows.row_tangents_and_state(z, direction, y, tau)
        assert torch.equal(columns(got)[:, k], columns(alone)) and torch.equal(known[k], of_one)


# ---- properties

examples = settings(max_examples=1 if DEVICE == "cpu" else 20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)


@examples
@given(seed=seeds, widths=st.tuples(st.sampled_from([256, 512]), st.sampled_from([1024, 2048])))
def test_how_a_row_is_cut_changes_rounding_only(seed, widths):
    arguments = case(2, 1300, torch.float64, seed)
    for name in FUNCTIONS:
        found = []
        for width in widths:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rows, "tile_width", lambda V, dtype, tangents=0, width=width: width)
                found.append(triton(name, *arguments))
        assert_near(name, found[0], found[1].double(), torch.float64)


@examples
@given(seed=seeds)
def test_the_order_of_the_vocabulary_does_not_matter(seed):
    z, u, v, y, tau, w = case(2, 700, torch.float64, seed)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(seed))
    moved_y = torch.where(y >= 0, order.argsort()[y], -1)
    for name in FUNCTIONS:
        got = triton(name, z[:, order], u[:, order], v[:, order], moved_y, tau, w)
        want = triton(name, z, u, v, y, tau, w).double()
        assert_near(name, got, want[:, order] if name.startswith("row_cotangent") else want, torch.float64)


@examples
@given(seed=seeds, shift=st.sampled_from([-4096.0, -120.0, 64.0, 4096.0]))
def test_a_shift_of_all_logits_moves_logsumexp_alone(seed, shift):
    z, u, v, y, tau, w = case(2, 700, torch.float32, seed)
    z = (z * 64).round() / 64  # so that z + shift is exact
    for name in FUNCTIONS:
        got, want = triton(name, z + shift, u, v, y, tau, w), triton(name, z, u, v, y, tau, w)
        if name == "row_values":
            assert torch.allclose(got[2] - want[2], shift / tau, rtol=1e-5)
            got, want = got[:2], want[:2]
        assert torch.equal(got, want)


# ---- through the public function


def at_float64(f, *tensors):
    with rows_from(reference):
        return f(*(t.double() for t in tensors))


def weighted(y, tau):
    weights = torch.linspace(0.5, 1.5, len(y))

    def f(z):
        weight = weights.to(z)
        found = entropy_logprob(z, y.to(z.device), temperature=tau.to(z))
        return (weight * (found.entropy - 0.3 * found.logprob + 0.2 * found.logsumexp)).sum()

    return f


MODES = {
    "value": lambda f, z, v: f(z),
    "vjp": lambda f, z, v: grad(f)(z),
    "jvp": lambda f, z, v: jvp(f, (z,), (v,))[1],
    "jvp of vjp": lambda f, z, v: jvp(grad(f), (z,), (v,))[1],
    "vjp of jvp": lambda f, z, v: grad(lambda z: jvp(f, (z,), (v,))[1])(z),
    "vjp of vjp": lambda f, z, v: grad(lambda z: (grad(f)(z) * v).sum())(z),
    "jvp of jvp": lambda f, z, v: jvp(lambda z: jvp(f, (z,), (v,))[1], (z,), (v,))[1],
    "vmap": lambda f, z, v: vmap(grad(f))(torch.stack([z, v])),
}


@pytest.mark.parametrize("mode", MODES)
@each("dtype", torch.float64, slow=[torch.float32])
def test_every_derivative_of_the_public_function(mode, dtype):
    z, _u, v, y, _tau, _w = case(4, 700, dtype)
    f = weighted(torch.where(y < 0, -100, y), torch.tensor([0.7, 1.0, 1.3, 2.0]))
    with rows_from(rows):
        got = MODES[mode](f, z.to(DEVICE), v.to(DEVICE)).cpu().double()
    want = at_float64(lambda z, v: MODES[mode](f, z, v), z, v)
    scale = want.abs().max()
    assert scale > 0 and (got - want).abs().max() <= (1e-12 if dtype == torch.float64 else 5e-6) * scale


def with_dual_numbers(f, z, v):
    """The tangent of the gradient without torch.func."""
    with fwAD.dual_level():
        z = fwAD.make_dual(z.clone().requires_grad_(), v)
        return fwAD.unpack_dual(torch.autograd.grad(f(z), z)[0]).tangent


@pytest.mark.parametrize("mode", ["jvp of vjp", "vjp of jvp", "vjp of vjp", "dual numbers"])
def test_second_derivatives_find_every_moment_once(mode, monkeypatch):
    """Whatever the values or the tangents knew, the gradient and its tangent do not read the logits for again."""
    z, _u, v, y, _tau, _w = case(3, 600, torch.float64)
    f = weighted(torch.where(y < 0, -100, y), torch.tensor([0.7, 1.0, 1.3]))
    find, read = rows._moments, []
    monkeypatch.setattr(rows, "_moments", lambda z, t, *a: read.append(len(t)) or find(z, t, *a))
    run = with_dual_numbers if mode == "dual numbers" else MODES[mode]
    with rows_from(rows):
        got = run(f, z.to(DEVICE), v.to(DEVICE)).cpu()
    assert read == [0, 1]
    want = at_float64(lambda z, v: MODES["jvp of vjp"](f, z, v), z, v)
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@one_dtype
def test_padded_vocabulary_columns_are_not_counted(dtype):
    z, _u, _v, y, _tau, _w = case(4, 700, dtype)
    z[:, 650:] = torch.nan
    y = torch.where(y < 0, -100, y.clamp_max(649))
    leaf = z.to(DEVICE).requires_grad_()
    with rows_from(rows):
        got = entropy_logprob(leaf, y.to(DEVICE), vocab_size=650)
        (g,) = torch.autograd.grad(got.entropy.sum() + got.logprob.sum(), leaf)
    want = at_float64(lambda z: entropy_logprob(z[:, :650], y), z)
    assert torch.allclose(got.entropy.detach().cpu().double(), want.entropy, rtol=1e-5)
    assert torch.allclose(got.logprob.detach().cpu().double(), want.logprob, rtol=1e-5)
    assert (g[:, 650:] == 0).all() and torch.isfinite(g).all()


def test_ignored_targets_have_no_logprob_and_no_gradient_from_it():
    z = case(3, 700, torch.float32)[0].to(DEVICE).requires_grad_()
    with rows_from(rows):
        found = entropy_logprob(z, torch.tensor([5, -7, 6]).to(DEVICE), ignore_index=-7)
        (g,) = torch.autograd.grad(found.logprob.sum(), z)
    assert found.logprob[1] == 0 and (g[1] == 0).all() and (g[0] != 0).any()


# ---- failures seen in other implementations


def test_all_logits_near_minus_120_do_not_give_nan():
    """A running maximum started at 0 leaves every weight at 0."""
    z = case(2, 700, torch.float32)[0] - 120
    y, tau = torch.tensor([1, 2]), torch.ones(2)
    got = columns(rows.row_values(*there((z, y, tau)))).cpu()
    assert_near("row_values", got, columns(reference.row_values(z.double(), y, tau.double())), torch.float32)


def test_masked_vocabulary_gives_numbers_and_gradients():
    """0 · (−inf) in p log p, and in its derivative."""
    z = case(3, 700, torch.float32)[0]
    z[:, 1::2] = -torch.inf
    leaf = z.to(DEVICE).requires_grad_()
    with rows_from(rows):
        found = entropy_logprob(leaf, torch.tensor([0, 2, 4]).to(DEVICE))
        (g,) = torch.autograd.grad(found.entropy.sum(), leaf)
    assert torch.isfinite(found.entropy).all() and torch.isfinite(g).all() and (g[:, 1::2] == 0).all()


def test_offsets_beyond_two_to_the_31():
    """Rows 2³⁰ apart: the offset of the last does not fit 32 bits. Only the rows' own memory is touched."""
    z, _u, v, y, tau, w = case(4, 300, torch.float16)
    apart = torch.empty(3 * 2**30 + 300, dtype=torch.float16, device=DEVICE).as_strided((4, 300), (2**30, 1))
    apart.copy_(z)
    want = columns(rows.row_values(*there((z, y, tau))))
    assert torch.equal(columns(rows.row_values(apart, *there((y, tau)))), want)
    gradient = rows.row_cotangents(*there((z, y, tau, *w[:3])))
    assert torch.equal(rows.row_cotangents(apart, *there((y, tau, *w[:3])), out=apart), gradient)


def test_backward_twice_gives_the_same_and_leaves_its_inputs_alone():
    leaf = case(3, 700, torch.float32)[0].to(DEVICE)
    before = leaf.clone()
    leaf.requires_grad_()
    with rows_from(rows):
        entropy = entropy_logprob(leaf).entropy.sum()
        first, second = (torch.autograd.grad(entropy, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(leaf, before) and (first != 0).any()


def test_the_entropy_is_of_the_tempered_law():
    z, _u, _v, _y, tau, _w = case(4, 700, torch.float32)
    with rows_from(rows):
        got = entropy_logprob(z.to(DEVICE), temperature=tau.to(DEVICE)).entropy.cpu().double()
    p = torch.softmax(z.double() / tau.double()[:, None], -1)
    assert torch.allclose(got, -(p * p.log()).sum(-1), rtol=1e-5)


# ---- the benchmark, so that it runs when there is a GPU


def test_the_benchmark_times_every_function_after_checking_it(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from bench import rows_gpu

    result = rows_gpu.one_shape(2, 300, torch.float32, 2, DEVICE, peers=False)
    assert len(result["timings"]) == 8 and result["timings"]["copy"]["share_of_copy"] == 1
    assert "| values |" in "\n".join(
        rows_gpu.markdown({"environment": timing_conditions(), "shapes": [result]})
    )
    monkeypatch.setattr(rows, "row_tangents", lambda z, dz, y, tau: rows.row_values(z, y, tau))
    with pytest.raises(SystemExit, match="wrong against float64: {'tangents'"):
        rows_gpu.one_shape(2, 300, torch.float32, 2, DEVICE, peers=False)


def timing_conditions():
    return {
        "device": "none",
        "threads": 1,
        "backend": rows.backend(),
        "torch": torch.__version__,
        "commit": None,
        "load_average": 0.0,
    }
