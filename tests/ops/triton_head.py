"""What `test_triton_head.py` runs: the kernels from hidden states against the float64 specification.

Where W is the identity, logits are the hidden states themselves and the gradient of the hidden states is that of the logits: that is how
hard rows get through a product.
"""

from __future__ import annotations

import pytest
import torch

from entropy_kernels.errors import UserError
from entropy_kernels.ops import fused_linear, linear, reference
from entropy_kernels.ops.fused_linear import GRADIENT, TANGENTS, VALUES, Tiles
from entropy_kernels.ops.linear import Head, Point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(64, 128, 32, 4, 2)
ALL = (True, True, True)
# of the largest value of a kind: float32 sums, and da, dh, dW, db in the dtype of h; the interpreter cuts where a GPU rounds
NEAR = 5e-6
GRADIENT_NEAR = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def each(name, *values, slow=()):
    """Parametrize; the values in `slow` are slow in the interpreter."""
    marks = pytest.mark.slow if DEVICE == "cpu" else ()
    return pytest.mark.parametrize(name, [*values, *(pytest.param(x, marks=marks) for x in slow)], ids=str)


def there(x):
    """Tensors on the device under test."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, (Head, Point)):
        return type(x)(*(there(t) for t in x))
    return type(x)(there(t) for t in x) if isinstance(x, (tuple, list)) else x


def wide(x):
    """Float64 on the CPU, as the specification wants it."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, (Head, Point)):
        return type(x)(*(wide(t) for t in x))
    return tuple(wide(t) for t in x) if isinstance(x, tuple) else x


def case(N, D, V, dtype, *, bias=True, softcap=None, workspace=256 << 20):
    g = torch.Generator().manual_seed(N + D + V)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=g) * scale).to(dtype)

    head = Head(normal(N, D), normal(V, D, scale=3 / D**0.5), normal(V) if bias else None)
    v = Head(normal(N, D), normal(V, D), normal(V) if bias else None)
    y = torch.randint(0, V, (N,), generator=g)
    y[::5] = -1
    tau = torch.rand(N, generator=g) + 0.5
    weights = tuple(torch.randn(3, N, generator=g))
    return Point(head, y, tau, softcap, workspace, reference), v, weights


def through_identity(z, y, tau):
    """The point whose logits are z [N, V]."""
    return Point(Head(z, torch.eye(z.shape[1], dtype=z.dtype), None), y, tau, None, 256 << 20, reference)


def assert_near(got, want, bound=NEAR):
    for name, g, w in zip(getattr(want, "_fields", range(len(want))), got, want, strict=True):
        error = ((g.cpu().double() - w).abs().max() / w.abs().max()).item()
        assert w.abs().max() > 0 and error <= bound, (name, error)


def values(x, cut=SMALL, **options):
    return fused_linear.fused_values(there(x), cut=cut, **options)


@each("dtype", torch.bfloat16, slow=[torch.float32, torch.float16])
@each("softcap", 20.0, slow=[None])
def test_equals_the_specification(dtype, softcap):
    """Ragged in every direction, bias, temperature per row, rows without a target."""
    x, v, weights = case(70, 123, 507, dtype, softcap=softcap)
    found, saved = values(x)
    assert_near(found, linear.linear_values(wide(x)))
    tangents = fused_linear.fused_tangents(there(x), there(v), cut=SMALL)
    assert_near(tangents, linear.linear_tangents(wide(x), wide(v)))
    gradient = fused_linear.fused_cotangents(there(x), there(weights), ALL, saved, cut=SMALL)
    assert [g.dtype for g in gradient] == [dtype] * 3
    assert_near(gradient, linear.linear_cotangents(wide(x), wide(weights), ALL), GRADIENT_NEAR[dtype])


@each("which", (False, True, False), slow=[(True, False, False), (False, False, True), (True, True, False)])
def test_tangents_of_some_factors_only(which):
    x, v, _ = case(66, 64, 300, torch.float32)
    v = Head(*(t if w else None for t, w in zip(v, which, strict=True)))
    got = fused_linear.fused_tangents(there(x), there(v), cut=SMALL)
    assert_near(got, linear.linear_tangents(wide(x), wide(v)))


@each("what", VALUES, slow=[TANGENTS, GRADIENT])
@each("dtype", torch.bfloat16, slow=[torch.float32])
def test_tiles_in_use(what, dtype):
    x, v, weights = case(130, 130, 600, dtype, bias=False)
    cut = fused_linear.tiles(dtype, torch.device(DEVICE), what)
    if what == TANGENTS:
        assert_near(fused_linear.fused_tangents(there(x), there(v)), linear.linear_tangents(wide(x), wide(v)))
        return
    found, saved = fused_linear.fused_values(there(x), cut=cut if what == VALUES else SMALL)
    if what == VALUES:
        assert_near(found, linear.linear_values(wide(x)))
    else:
        wanted = (True, True, False)
        got = fused_linear.fused_cotangents(there(x), there(weights), wanted, saved)
        assert got.bias is None
        assert_near(
            got[:2], linear.linear_cotangents(wide(x), wide(weights), wanted)[:2], GRADIENT_NEAR[dtype]
        )


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="descriptors are of sm_90"
)
def test_descriptors_and_loops_as_one_change_no_bit():
    x, v, weights = case(66, 120, 300, torch.bfloat16, softcap=20.0)
    other = SMALL._replace(tma=True, flatten=True, per_multiprocessor=0)
    found, saved = values(x)
    again, _ = values(x, other)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    tangents = [fused_linear.fused_tangents(there(x), there(v), cut=cut) for cut in (SMALL, other)]
    assert all(torch.equal(a, b) for a, b in zip(*tangents, strict=True))
    gradients = [
        fused_linear.fused_cotangents(there(x), there(weights), ALL, saved, cut=cut) for cut in (SMALL, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def hard_rows(V=300):
    """Peaked, nearly peaked, uniform, tied at the peak within a tile and across tiles, rising, far below 0; and their targets."""
    g = torch.Generator().manual_seed(5)
    z = torch.randn(8, V, generator=g)
    y = torch.tensor([7, 7, 0, 20, 250, V - 1, 1, 9])
    z[0, 7] = 30.0  # H = 8e-10
    z[1, 7] = 14.0
    z[2] = 2.0
    z[3, [20, 40]] = 25.0
    z[4, [20, 250]] = 25.0
    z[5] = torch.linspace(-20, 20, V)
    z[6] -= 120.0  # a running peak that starts at 0 would leave nothing of it
    z[7, 9] = -90.0
    return z, y, torch.tensor([1.0, 0.7, 1.3, 1.0, 1.0, 1.0, 0.9, 1.0])


def test_hard_rows_keep_their_digits():
    z, y, tau = hard_rows()
    x = through_identity(z, y, tau)
    want = reference.row_values(z.double(), y, tau.double())
    found, saved = values(x)
    for g, w in zip(found, want, strict=True):
        # the interpreter has no fused multiply-add, which the last places of e^d need
        assert ((g.cpu().double() - w).abs() <= (4e-6 if DEVICE == "cpu" else 1e-6) * w.abs()).all()
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(6))
    got = fused_linear.fused_tangents(there(x), there(Head(direction, None, None)), cut=SMALL)
    want = reference.row_tangents(z.double(), direction.double(), y, tau.double())
    for g, w in zip(got, want, strict=True):
        assert ((g.cpu().double() - w).abs() <= 1e-5 * w.abs() + 1e-7 * (w.abs() > 1e-3)).all()
    # the gradient of logprob at the peak is 1 − p there, 1e-10, whatever tiles found it
    one, zero = torch.ones(8), torch.zeros(8)
    for cut in (SMALL, Tiles(32, 256, 64, 4, 2)):
        da = fused_linear.fused_cotangents(
            there(x), there((zero, one, zero)), (True, False, False), saved, cut=cut
        )
        want = reference.row_cotangents(
            z.double(), y, tau.double(), zero.double(), one.double(), zero.double()
        )
        at_target = da.hidden.cpu().double().gather(1, y[:, None]), want.gather(1, y[:, None])
        assert ((at_target[0] - at_target[1]).abs() <= 1e-5 * at_target[1].abs()).all()
        assert_near([da.hidden], [want])


def test_masked_columns_have_no_weight_and_a_masked_row_is_undefined():
    x, v, weights = case(40, 64, 400, torch.float32)
    x.head.bias[1::2] = -torch.inf
    x.head.bias[128:256] = -torch.inf  # a tile with nothing in it
    x.targets[1], x.targets[2] = 0, 1
    found, saved = values(x)
    want = linear.linear_values(wide(x))
    assert found.logprob[2] == -torch.inf
    for g, w in zip(found, want, strict=True):
        assert torch.equal(g.isfinite().cpu(), w.isfinite())
        assert ((g.cpu().double() - w).abs() <= NEAR * w.abs().clamp_min(0.1))[w.isfinite()].all()
    tangents = fused_linear.fused_tangents(there(x), there(v), cut=SMALL)
    assert_near(tangents, linear.linear_tangents(wide(x), wide(v)))
    x.targets[x.head.bias[x.targets] == -torch.inf] = 0
    _, saved = values(x)
    gradient = fused_linear.fused_cotangents(there(x), there(weights), ALL, saved, cut=SMALL)
    assert_near(gradient, linear.linear_cotangents(wide(x), wide(weights), ALL))
    assert (gradient.weight[1::2] == 0).all()
    x.head.bias[:] = -torch.inf
    assert values(x)[0].entropy.isnan().all()


def test_nan_stays_in_its_row():
    x, v, _ = case(20, 64, 300, torch.float32)
    clean, clean_tangents = values(x)[0], fused_linear.fused_tangents(there(x), there(v), cut=SMALL)
    x.head.hidden[7, 3] = torch.nan
    rows = [i for i in range(20) if i != 7]
    for g, c in zip(values(x)[0], clean, strict=True):
        assert torch.equal(g[rows], c[rows])
        assert g[7].isnan()
    x.head.hidden[7, 3] = 0.0
    v.hidden[9, 3] = torch.nan
    got = fused_linear.fused_tangents(there(x), there(v), cut=SMALL)
    rows = [i for i in range(20) if i not in (7, 9)]
    assert got.entropy[9].isnan() and torch.equal(got.entropy[rows], clean_tangents.entropy[rows])


def test_a_row_gives_the_same_bits_alone_and_again_and_in_chunks():
    x, _, _ = case(150, 64, 300, torch.float32)
    found, _ = values(x)
    again, _ = values(x)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    one = x._replace(
        head=Head(x.head.hidden[140:141], x.head.weight, x.head.bias),
        targets=x.targets[140:141],
        temperature=x.temperature[140:141],
    )
    alone, _ = values(one)
    assert all(a[0] == b[140] for a, b in zip(alone, found, strict=True))
    chunked, _ = values(x._replace(workspace=1))
    assert all(torch.equal(a, b) for a, b in zip(found, chunked, strict=True))


def test_everything_is_written_and_no_more_than_the_workspace_is_made(monkeypatch):
    x, v, weights = there(case(150, 64, 300, torch.float32, workspace=8 * 64 * 256 * 4 // 7 + 8))
    empty, results, made = torch.empty, linear._empty, []

    def poison(*size, **options):
        made.append(empty(*size, **options).fill_(torch.nan))
        return made[-1]

    monkeypatch.setattr(torch, "empty", poison)
    monkeypatch.setattr(linear, "_empty", lambda x: [t.fill_(torch.nan) for t in results(x)])
    found, saved = values(x)
    assert all(t.isfinite().all() for t in [*found, saved.state, saved.z_target[x.targets >= 0]])
    tangents = fused_linear.fused_tangents(x, v, cut=SMALL)
    assert all(t.isfinite().all() for t in tangents)
    before = len(made)
    gradient = fused_linear.fused_cotangents(x, weights, ALL, saved, cut=SMALL)
    assert all(t.isfinite().all() for t in [*gradient, *made[before:]])
    assert len(made) == before + 1 and made[-1].numel() * 4 == 64 * 256 * 4 <= x.workspace * 7 / 8
    assert_near(gradient, linear.linear_cotangents(wide(there_back(x)), wide(there_back(weights)), ALL))


def there_back(x):
    if isinstance(x, torch.Tensor):
        return x.cpu()
    if isinstance(x, (Head, Point)):
        return type(x)(*(there_back(t) for t in x))
    return tuple(there_back(t) for t in x) if isinstance(x, tuple) else x


def test_no_row():
    x, v, weights = case(0, 64, 300, torch.bfloat16)
    found, saved = values(x)
    gradient = fused_linear.fused_cotangents(there(x), there(weights), ALL, saved, cut=SMALL)
    assert found.entropy.shape == (0,) and gradient.hidden.shape == (0, 64) and (gradient.weight == 0).all()
    assert fused_linear.fused_tangents(there(x), there(v), cut=SMALL).entropy.shape == (0,)


def test_what_it_cannot_do_is_refused():
    x, _, _ = case(4, 60, 300, torch.float32)
    with pytest.raises(UserError, match="got float64"):
        values(wide(x))
    with pytest.raises(UserError, match="weight: got strides"):
        values(x._replace(head=x.head._replace(weight=x.head.weight.t().contiguous().t())))
    y, _, _ = case(4, 61, 300, torch.float32)
    with pytest.raises(UserError, match="rows are 244 bytes apart"):
        values(y, SMALL._replace(tma=True))
