"""The C++ rows against the float64 specification: every function, dtype, instruction set and awkward shape."""

from __future__ import annotations

import subprocess
import warnings

import pytest
import torch
from row_cases import (
    FUNCTIONS,
    assert_close,
    case,
    columns,
    each_dtype,
    each_function,
    special_rows,
    tolerance,
    widened,
)

from entropy_kernels.ops import cpu, reference

if cpu.backend() == "plain torch":
    pytest.skip("no compiler, no library", allow_module_level=True)
BEST = torch.ops.entropy_kernels.best_level()


@each_function
@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 252, 507, 2048, 4103, 49152])
def test_equals_the_specification(name, dtype, V):
    arguments = case(3 if V > 5000 else 123, V, dtype)
    got = FUNCTIONS[name](cpu, *arguments)
    want = FUNCTIONS[name](reference, *widened(arguments))
    assert V == 1 or columns(want).abs().max() > 0
    assert_close(name, got, want, dtype)


@each_function
@each_dtype
def test_no_row(name, dtype):
    arguments = case(0, 507, dtype)
    assert_close(
        name, FUNCTIONS[name](cpu, *arguments), FUNCTIONS[name](reference, *widened(arguments)), dtype
    )


@each_function
@each_dtype
@pytest.mark.parametrize("V", [507, 2600])
def test_instruction_sets_agree(name, dtype, V, monkeypatch):
    arguments = case(40, V, dtype)
    want = FUNCTIONS[name](reference, *widened(arguments))
    for level in range(BEST + 1):
        monkeypatch.setattr(cpu, "_level", lambda level=level: level)
        assert_close(name, FUNCTIONS[name](cpu, *arguments), want, dtype)


@each_function
@each_dtype
def test_any_stride(name, dtype):
    z, u, v, y, tau, w = case(9, 300, dtype)
    padded = torch.full((3, 9, 340), torch.nan, dtype=dtype)
    padded[:, :, 20:320] = torch.stack([z, u, v])
    want = columns(FUNCTIONS[name](cpu, z, u, v, y, tau, w))
    for rows in (padded[:, :, 20:320], padded.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 20:320]):
        got = FUNCTIONS[name](
            cpu, *rows, torch.stack([y, y], 1)[:, 0], tau, list(torch.stack(w, 1).unbind(1))
        )
        assert torch.equal(columns(got), want)


@each_function
@each_dtype
def test_every_output_is_written(name, dtype, monkeypatch):
    empty = torch.empty
    poisoned = []

    def poison(*size, **options):
        poisoned.append(empty(*size, **options).fill_(torch.nan))
        return poisoned[-1]

    arguments = case(5, 2059, dtype)
    monkeypatch.setattr(torch, "empty", poison)
    got = columns(FUNCTIONS[name](cpu, *arguments))
    assert poisoned and torch.isfinite(got).all()


@each_function
def test_the_number_of_threads_changes_nothing(name):
    arguments = case(123, 5000, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(columns(FUNCTIONS[name](cpu, *arguments)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_function
def test_a_row_does_not_depend_on_its_neighbours(name):
    z, u, v, y, tau, w = case(20, 3000, torch.float32)
    all_rows = columns(FUNCTIONS[name](cpu, z, u, v, y, tau, w))
    one = columns(FUNCTIONS[name](cpu, z[7:8], u[7:8], v[7:8], y[7:8], tau[7:8], [x[7:8] for x in w]))
    assert torch.equal(one.squeeze(), all_rows[7] if name.startswith("row_cotangent") else all_rows[:, 7])


@each_dtype
@pytest.mark.parametrize("ops", [cpu, reference])
@pytest.mark.parametrize("V", [7, 507, 4103])
def test_a_gradient_may_be_written_over_its_inputs(ops, dtype, V):
    z, _u, v, y, tau, w = case(9, V, dtype)
    y[0] = z[0].argmax()
    weights, moved = tuple(w[:3]), tuple(w[3:])
    first = ops.row_cotangents(z, y, tau, *weights)
    second = ops.row_cotangent_tangents(z, v, y, tau, weights, moved)
    for over in (0, 1):
        inputs = (z.clone(), v.clone())
        assert torch.equal(
            ops.row_cotangent_tangents(*inputs, y, tau, weights, moved, out=inputs[over]), second
        )
        assert torch.equal(inputs[over], second)
    over_z = z.clone()
    ops.row_cotangents(over_z, y, tau, *weights, out=over_z)
    assert torch.equal(over_z, first)


@each_function
@each_dtype
@pytest.mark.parametrize("level", range(BEST + 1))
def test_hard_rows(name, dtype, level, monkeypatch):
    monkeypatch.setattr(cpu, "_level", lambda: level)
    arguments = special_rows(dtype)
    got = columns(FUNCTIONS[name](cpu, *arguments))
    want = columns(FUNCTIONS[name](reference, *widened(arguments)))
    assert torch.isfinite(got).all()
    for row in range(12):
        g, x = (t[row : row + 1] if name.startswith("row_cotangent") else t[:, row] for t in (got, want))
        scale = x.abs().amax(-1, keepdim=True)
        bound = 3 * tolerance(name, dtype) * scale + (6e-8 if dtype == torch.float16 else 1e-30)
        assert ((g.double() - x).abs() <= bound).all(), (row, g, x)


@each_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", [0, 1500, 2299])
def test_peaked_rows_lose_nothing(name, dtype, where):
    z, u, v, y, tau, w = case(4, 2300, dtype)
    z[:, where] = 40.0  # an entropy of 1e-7 and below
    y[:] = torch.tensor([where, where, 5, -1])
    u, v = u + 3, v - 2
    tau = torch.ones_like(tau)
    arguments = (z, u, v, y, tau, w)
    got, want = FUNCTIONS[name](cpu, *arguments), FUNCTIONS[name](reference, *widened(arguments))
    if name == "row_values":
        assert (want.entropy < 1e-6).all()
    if name.startswith("row_cotangent"):
        assert_close(name, got, want, dtype)
    else:  # each number to its own size
        got, want = columns(got).double(), columns(want)
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        assert ((got - want).abs() <= bound * want.abs()).all()


@each_function
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(name, dtype, bad):
    z, u, v, y, tau, w = case(5, 2300, dtype)
    clean = columns(FUNCTIONS[name](cpu, z, u, v, y, tau, w))
    for column in (0, 1500, 2299):
        broken = z.clone()
        broken[2, column] = bad
        got = columns(FUNCTIONS[name](cpu, broken, u, v, y, tau, w))
        rows = got if name.startswith("row_cotangent") else got.T
        expected = clean if name.startswith("row_cotangent") else clean.T
        others = torch.arange(5) != 2
        assert torch.equal(rows[others], expected[others])
        if name.startswith("row_cotangent"):
            assert rows[2].isnan().any()
        else:
            assert rows[2, [0, 2]].isnan().all()


@each_function
def test_nan_in_a_tangent_is_seen_even_where_the_weight_is_zero(name):
    if name in ("row_values", "row_cotangents"):
        pytest.skip("takes no tangent")
    z, u, v, y, tau, w = case(3, 2300, torch.float32)
    z[1] = -torch.inf
    z[1, 0] = 0.0
    v[1, 2100] = torch.nan
    assert columns(FUNCTIONS[name](cpu, z, u, v, y, tau, w)).isnan().any()


def test_an_all_masked_row_is_undefined_and_a_masked_target_impossible():
    z = torch.full((2, 9), -torch.inf)
    z[1, 3] = 1.0
    result = cpu.row_values(z, torch.tensor([0, 0]), torch.ones(2))
    assert result.entropy[0].isnan() and result.entropy[1] == 0 and result.logprob[1] == -torch.inf


def test_exponentials_are_right_to_the_last_place():
    """The entropy of two tokens x apart is (1 + x) e^{−x} for large x; a temperature that is no power of two."""
    x = torch.linspace(0.01, 78, 5000)
    z = torch.stack([torch.zeros_like(x), -x], 1)
    for level in range(BEST + 1):
        out = [torch.empty(5000) for _ in range(3)]
        torch.ops.entropy_kernels.row_values(
            z, torch.full((5000,), -1), torch.full((5000,), 0.9), *out, level
        )
        want = reference.row_values(z.double(), torch.full((5000,), -1), torch.full((5000,), 0.9).double())
        bound = 4e-7 if level else 4e-6  # without fused multiply-add the exponent is rounded once more
        assert (out[0] / want.entropy - 1).abs().max() < bound


def test_a_tangent_of_another_dtype_is_not_cut_down():
    z, u, v, y, tau, w = case(4, 300, torch.bfloat16)
    exact = v.float() + 1e-4
    got = cpu.row_tangents(z, exact, y, tau)
    want = reference.row_tangents(z.double(), exact.double(), y, tau.double())
    assert_close("row_tangents", got, want, torch.bfloat16)
    assert cpu.row_cotangent_tangents(z, exact, y, tau, tuple(w[:3]), tuple(w[3:])).dtype == torch.bfloat16


def test_a_target_outside_the_row_is_refused():
    with pytest.raises(RuntimeError, match="outside"):
        cpu.row_values(torch.zeros(2, 3), torch.tensor([0, 3]), torch.ones(2))


def test_without_library_and_compiler_plain_torch_says_so_once(monkeypatch, tmp_path):
    def no_compiler(*_, **__):
        raise subprocess.CalledProcessError(1, "c++", stderr="c++: not today")

    monkeypatch.setattr(cpu, "_BUILT", tmp_path / "absent.so")
    monkeypatch.setattr(cpu.subprocess, "run", no_compiler)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    cpu._level.cache_clear()
    try:
        z, _, _, y, tau, _ = case(3, 10, torch.float32)
        with pytest.warns(UserWarning, match="plain torch.*not today"):
            got = cpu.row_values(z, y, tau)
        assert torch.equal(columns(got), columns(reference.row_values(z, y, tau)))
        assert cpu.backend() == "plain torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cpu.row_values(z, y, tau)
    finally:
        cpu._level.cache_clear()
