"""What `test_triton_rows.py` runs beside `triton_rows.py`: rows in a kept set and its tail, against the float64 specification."""

from __future__ import annotations

import pytest
import torch
from part_cases import FUNCTIONS, assert_close, each_function, part_case, widened
from row_cases import DTYPES

from entropy_kernels.functional import truncated_entropy
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import parts, rows, triton_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
slow = pytest.mark.slow if DEVICE == "cpu" else ()
SLOW = [n for n in FUNCTIONS if n not in ("part_values", "part_cotangents")]
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=slow) for d in DTYPES if d != torch.float32)], ids=str
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_parts, "part_width", lambda V, dtype, tangents=0: 512)


def written(dtype):
    """The interpreter cuts float32 to bfloat16 where a GPU rounds: a whole last place instead of half of one."""
    return 2.0 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1.0


def found(name, z, kept, u, v, y, tau, w):
    there = [x.to(DEVICE) for x in (z, kept, u, v, y, tau)]
    got = FUNCTIONS[name](triton_parts, *there, [x.to(DEVICE) for x in w])
    return tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()


@each_function
@each_dtype
@pytest.mark.parametrize(
    "kind",
    ["few", "given", *(pytest.param(k, marks=slow) for k in ("one token", "most", "all", "given, none"))],
)
def test_equals_the_specification(name, dtype, kind):
    arguments = part_case(4, 1100, dtype, kind)
    want = FUNCTIONS[name](parts, *widened(arguments))
    assert_close(name, found(name, *arguments), want, dtype, written=written(dtype))


@pytest.mark.parametrize(
    "name", ["part_values", "part_cotangents", *(pytest.param(n, marks=slow) for n in SLOW)]
)
@each_dtype
@pytest.mark.parametrize("kind", ["few", pytest.param("given", marks=slow), pytest.param("all", marks=slow)])
def test_hard_rows(name, dtype, kind):
    """Rising, tied, uniform, masked, peaked, shifted; gradients within three times the bound, as for whole rows of this kind."""
    arguments = part_case(12, 1200, dtype, kind, hard=True)
    want = FUNCTIONS[name](parts, *widened(arguments))
    assert_close(name, found(name, *arguments), want, dtype, floor=1e-37, written=3.0)


@each_function
def test_rows_without_a_law_any_stride_no_row_and_no_neighbour(name):
    z, kept, u, v, y, tau, w = part_case(5, 700, torch.float32, "given")
    y[:] = 3
    kept[:, :4] = True
    z[0, 3], z[1, 600], z[2], z[3, :4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    kept[1, 600] = kept[3, 4:] = False
    got = found(name, z, kept, u, v, y, tau, w)
    want = FUNCTIONS[name](parts, *widened((z, kept, u, v, y, tau, w)))
    turned = [x.t().contiguous().t() for x in (z, kept, u, v)]
    again = found(name, *turned, y, tau, w)
    one = found(name, *(x[4:5] for x in (*turned, y, tau)), [x[4:5] for x in w])
    none = found(name, *(x[:0] for x in (z, kept, u, v, y, tau)), [x[:0] for x in w])
    as_tuple = (lambda x: x) if isinstance(got, tuple) else (lambda x: (x,))
    for g, x, a, b, c in zip(*map(as_tuple, (got, want, again, one, none)), strict=True):
        assert torch.equal(g.isnan(), x.isnan()) and torch.equal(g.nan_to_num(), a.nan_to_num())
        assert torch.equal(b[0], g[4]) and len(c) == 0


def test_the_public_function_uses_it():
    """Values and a Hessian product under both ways of giving a set, through the rules of differentiation."""
    z, _, u, v, _, _, _ = part_case(2, 90, torch.float64, "some")
    y = z.argmax(-1)
    kept = z >= z.topk(9).values[:, -1:]

    def scalar(z, **options):
        t = truncated_entropy(z, y.to(z.device), temperature=0.7, **options)
        parts_ = (t.entropy, t.logprob, t.kept_mass, t.tail_entropy, t.full_entropy)
        return sum((i + 1) * x.sin().sum() for i, x in enumerate(parts_))

    want = torch.func.jvp(torch.func.grad(lambda z: scalar(z, kept=kept)), (z,), (v,))
    with rows_from(rows):
        for options in (dict(top_k=9), dict(kept=kept.to(DEVICE))):
            got = torch.func.jvp(
                torch.func.grad(lambda z, o=options: scalar(z, **o)), (z.to(DEVICE),), (v.to(DEVICE),)
            )
            for g, x in zip(got, want, strict=True):
                assert (g.cpu() - x).abs().max() <= 1e-11 * x.abs().max()
