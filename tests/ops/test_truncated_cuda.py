"""Top-k and top-p in CUDA against sorting in float64: natively on a GPU, and everywhere the same source on the CPU, fiber by fiber."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import case, each_dtype, special_rows
from test_kept_sets import BINARY, counted

from entropy_kernels.functional import truncated as functional
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import cpu, cuda, truncated
from entropy_kernels.ops.reference import compute_dtype
from entropy_kernels.ops.truncated import TruncatedValues

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for bench
NUMBER = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
WINDOW = {
    torch.bfloat16: (0x3380, 0x4580),
    torch.float16: (1, 0x5000),
}  # truncated.cu's; float16's as on small GPUs


def natively(z, y, tau, k, p, *, keys_alone=False, **_):
    """ops/cuda.py's two functions on the GPU; what belongs to the fibers is passed over."""
    if keys_alone:
        pytest.skip("the operator decides which rows go by keys")
    on_gpu = torch.empty(z.untyped_storage().nbytes() // z.element_size(), dtype=z.dtype, device="cuda")
    z = on_gpu.as_strided(z.shape, z.stride(), z.storage_offset()).copy_(z)  # as it starts and strides here
    y, tau, k, p = (x.cuda() for x in (y, tau, k, p))
    values = TruncatedValues(*(x.cpu() for x in cuda.truncated_values_of_rows(z, y, tau, k, p)))
    kept = cuda.kept_set(z, tau, k, p)
    smallest = torch.where(kept, z, torch.inf).amin(-1).to(tau.dtype)
    smallest = torch.where(kept.any(-1), smallest, torch.nan)
    return values, smallest.cpu(), None


@pytest.fixture(scope="module", params=["fibers", "GPU"] if torch.cuda.is_available() else ["fibers"])
def run_rows(request, tmp_path_factory):
    """csrc/truncated.cuh through g++, or on the GPU: like `cpu.truncated_values_of_rows`, with thresholds and pending rows."""
    if request.param == "GPU":
        if not cuda.available():
            pytest.skip("no nvcc beside the GPU, or no torch with CUDA")
        return natively
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "truncated.so"
    flags = "-std=c++17 -O2 -fPIC -shared -Wno-unknown-pragmas -U_FORTIFY_SOURCE".split()
    source = ROOT / "tests/ops/cuda_on_cpu/truncated.cpp"
    try:
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
    except OSError as error:
        pytest.skip(f"no C++ compiler ({error})")
    loaded = ctypes.CDLL(str(library))
    function = loaded.truncated_rows

    def run(z, y, tau, k, p, *, threads=64, seed=0, keys_alone=False, window=None):
        wide = compute_dtype(z.dtype)
        R, V = z.shape
        assert z.stride(1) == 1 and tau.dtype == wide and k.dtype == torch.int64 and p.dtype == torch.float64
        # whatever is not written is seen
        out = [
            torch.full((R,), torch.nan if i != 3 else -7, dtype=torch.int64 if i == 3 else wide)
            for i in range(6)
        ]
        threshold = torch.full((R,), 12345.0, dtype=wide)
        pending = torch.full((R,), -7, dtype=torch.int32)
        pointer = ctypes.c_void_p
        floats = (pointer * 5)(*(x.data_ptr() for i, x in enumerate(out) if i != 3))
        by_counts = z.dtype in WINDOW and not keys_alone
        function(
            NUMBER[z.dtype], ctypes.c_int64(R), ctypes.c_int64(V), ctypes.c_int64(z.stride(0)),
            *(pointer(x.data_ptr()) for x in (z, y, tau, k, p, threshold)),
            pointer(pending.data_ptr() if by_counts else None), floats, pointer(out[3].data_ptr()),
            *(window or WINDOW.get(z.dtype, (0, 0))), threads, seed,
        )  # fmt: skip
        return TruncatedValues(*out), threshold, pending if by_counts else None

    run.memory = loaded.key_memory(), loaded.count_memory()
    return run


def truncations(R, V, seed=0):
    """k and p of each row, of every kind: few, many, all; one, some and nearly all of the mass."""
    g = torch.Generator().manual_seed(seed)
    k = torch.tensor([1, 2, 7, 50, 300, V // 2 + 1, V, V + 5])[
        torch.randint(0, 8, (R,), generator=g)
    ].clamp_min(1)
    p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9, 1.0, 1.0], dtype=torch.float64)
    return k, p[torch.randint(0, 8, (R,), generator=g)]


def assert_truncated(found, z, y, tau, k, p, dtype, rtol=2e-7):
    got, threshold = found[:2]
    kept = truncated.kept_set(z.double(), tau.double(), k, p)
    assert torch.equal((z.double() >= threshold.double()[:, None]) & (z > -torch.inf), kept)
    want = truncated.truncated_values(z.double(), kept, y, tau.double())
    bound = 1e-12 if dtype == torch.float64 else rtol
    for name, g, w in zip(got._fields, got, want, strict=True):
        if name == "kept_count":
            assert torch.equal(g, w)
            continue
        same = (g.double() == w) | (g.isnan() & w.isnan())
        error = (g.double() - w).abs() / w.abs().clamp_min(1e-30)
        assert (same | (error <= bound)).all(), (name, error[~same].max(), k, p)


@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 252, 2048, 4103])
def test_equals_sorting_in_float64(run_rows, dtype, V):
    R = 12
    z, _, _, y, tau, _ = case(R, V, dtype)
    k, p = truncations(R, V)
    assert_truncated(run_rows(z, y, tau, k, p), z, y, tau, k, p, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_rows_with_the_threads_of_a_launch(run_rows, dtype):
    z, _, _, y, tau, _ = case(3, 151936, dtype)
    k, p = torch.tensor([50, 151936, 5000]), torch.tensor([1.0, 0.9, 0.99], dtype=torch.float64)
    found = run_rows(z, y, tau, k, p, threads=512)
    assert_truncated(found, z, y, tau, k, p, dtype)
    if found[2] is not None:
        assert not found[2].any()  # all by counts


@each_dtype
@pytest.mark.parametrize("keys_alone", [False, True], ids=["by counts", "by keys"])
@pytest.mark.parametrize(
    "k, p", [(1, 1.0), (3, 0.5), (40, 1.0), (2300, 0.3), (2300, 0.999), (2300, 1.0), (1000, 0.9), (2299, 0.9)]
)
def test_hard_rows(run_rows, dtype, keys_alone, k, p):
    """Rising, tied, uniform, masked, peaked at both ends, shifted by 1e4, most weights vanishing."""
    z, _, _, y, tau, _ = special_rows(dtype)
    k, p = torch.full((12,), k), torch.full((12,), p, dtype=torch.float64)
    assert_truncated(run_rows(z, y, tau, k, p, keys_alone=keys_alone), z, y, tau, k, p, dtype)


def test_which_rows_are_left_pending(run_rows):
    """A number the window has no bin for, a threshold or a tail below it: by keys; masks of −∞ and far below: by counts."""
    z = (torch.randn(9, 900, generator=torch.Generator().manual_seed(1)) * 3).to(torch.bfloat16)
    z[1, 5], z[2, 5] = 1e-12, 5000.0
    z[3, 800:] = -1e38
    z[4, 800:], z[5, 800:], z[6, 800:] = -torch.inf, -1e38, -1e38
    z[7, 1:], z[8, 1:] = -5000.0, -torch.inf
    k = torch.tensor([9, 9, 9, 9, 9, 850, 900, 1, 1])
    p = torch.full((9,), 0.9, dtype=torch.float64)
    y, tau = torch.tensor([5, 5, 5, 899, 5, 5, 5, 3, 0]), torch.full((9,), 0.8)
    found = run_rows(z, y, tau, k, p)
    if found[2] is not None:
        assert found[2].bool().tolist() == [False, True, True, False, False, True, True, True, False]
    assert_truncated(found, z, y, tau, k, p, torch.bfloat16)


@each_dtype
def test_ties_at_the_threshold_and_zeros_of_either_sign(run_rows, dtype):
    z = torch.zeros(4, 6000, dtype=dtype)
    z[0, ::2] = -0.0
    z[1, :10], z[2, 5:8], z[3, 7] = 3.0, -1.0, 9.0
    y, tau = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=compute_dtype(dtype))
    for k, p in [(1, 1.0), (11, 1.0), (6000, 0.5), (6000, 0.99), (20, 0.3)]:
        k, p = torch.full((4,), k), torch.full((4,), p, dtype=torch.float64)
        for keys_alone in (False, True):
            found = run_rows(z, y, tau, k, p, keys_alone=keys_alone)
            assert_truncated(found, z, y, tau, k, p, dtype)
    assert found[0].kept_count.tolist() == [6000, 6000, 5997, 1]


@pytest.mark.parametrize("gap", [2.0, 5.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaked_tails_and_tails_far_below(run_rows, gap, dtype):
    """One token, a gap, another, a gap, the rest: every way in which a sum counted from the wrong place loses the tail."""
    z = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    z[:, 17] = 2 * gap + 8
    z[1:, 400] = gap + 4
    z[3:, 1128] = gap + 4.5
    z[5, 2999] = -1e4
    z = z.to(dtype)
    y, tau = torch.tensor([17, 400, 3, -1, 17, 17]), torch.ones(6)
    for k, p in [(1, 1.0), (2, 1.0), (3, 1.0), (5, 1.0), (3000, 0.3), (3000, 0.999), (3000, 1 - 1e-12)]:
        k, p = torch.full((6,), k), torch.full((6,), p, dtype=torch.float64)
        assert_truncated(run_rows(z, y, tau, k, p), z, y, tau, k, p, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_close_crossing_is_decided_as_in_float64(run_rows, dtype):
    y, tau = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=compute_dtype(dtype))
    k = torch.full((5,), 6000)
    for scale, rank in [(0.01, 3456), (8.0, 3), (8.0, 60), (20.0, 9)]:
        g = torch.Generator().manual_seed(5)
        z = (torch.randn(5, 6000, generator=g) * scale).to(dtype)
        ordered = z.double().sort(descending=True).values
        tied = (ordered == ordered[:, rank : rank + 1]).long()
        last = (tied * torch.arange(6000)).amax(-1, keepdim=True)
        mass = ordered.softmax(-1).cumsum(-1).gather(-1, last)[:, 0]
        for offset in (-1e-12, 1e-12):
            found = run_rows(z, y, tau, k, mass * (1 + offset))
            assert_truncated(found, z, y, tau, k, mass * (1 + offset), dtype)
            assert ((found[0].kept_count > last[:, 0] + 1) == (offset > 0)).all()


def test_agrees_with_the_c_plus_plus_of_the_cpu(run_rows):
    if cpu.backend() == "plain torch":
        pytest.skip("no library of the CPU rows")
    for dtype in NUMBER:
        z, _, _, y, tau, _ = case(16, 5003, dtype)
        k, p = truncations(16, 5003, seed=9)
        got, threshold, _ = run_rows(z, y, tau, k, p)
        want = cpu.truncated_values_of_rows(z, y, tau, k, p)
        assert torch.equal((z.to(threshold.dtype) >= threshold[:, None]), cpu.kept_set(z, tau, k, p))
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(
                g.double(), w.double(), rtol=1e-12 if dtype == torch.float64 else 3e-6, atol=0
            )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(BINARY), min_size=1, max_size=12).filter(lambda row: max(row) > -torch.inf),
    st.integers(1, 13),
    st.sampled_from([0.01, 0.1, 1 / 3, 0.6, 0.75, 0.9, 0.999, 1.0]),
    st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_the_kept_set_is_counted_exactly(run_rows, row, k, p, dtype):
    z = torch.tensor([row], dtype=dtype)
    tau = 1 / torch.full((1,), 2.0, dtype=compute_dtype(dtype)).log()
    truncation = torch.tensor([k]), torch.tensor([p], dtype=torch.float64)
    if dtype == torch.float64 or p != 0.75:  # in float32 τ is not 1/ln 2: 3/4 is not met exactly
        threshold = run_rows(z, torch.tensor([-1]), tau, *truncation)[1]
        kept = (z[0].double() >= threshold.double()).nonzero().flatten()
        assert set(kept.tolist()) == counted(row, k, p)


@each_dtype
def test_rows_without_a_law(run_rows, dtype):
    z = torch.randn(9, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[0, 699], z[1, 5], z[2], z[3, 300:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    y = torch.zeros(9, dtype=torch.int64)
    y[1] = -1
    tau = torch.ones(9, dtype=compute_dtype(dtype))
    tau[5:] = torch.tensor([torch.nan, -1.0, 0.0, torch.inf])
    k, p = torch.full((9,), 10), torch.full((9,), 0.9, dtype=torch.float64)
    k[4] = 0  # functional/truncated.py refuses it; the kernels do not guess
    for keys_alone in (False, True):
        got, threshold, _ = run_rows(z, y, tau, k, p, keys_alone=keys_alone)
        undefined = [True, True, True, False, True, True, True, True, True]
        for x in (got.entropy, got.kept_mass, got.tail_entropy, got.full_entropy, threshold):
            assert x.isnan().tolist() == undefined
        assert got.logprob.isnan().tolist() == [True, False, *undefined[2:]] and got.logprob[1] == 0
        assert (got.kept_count > 0).tolist() == [not x for x in undefined]


@each_dtype
def test_any_start_no_neighbour_no_order_of_threads(run_rows, dtype):
    """Rows that start off a 16-byte border, alone or among others, threads and atomics in any order: the same bits."""
    z, _, _, y, tau, _ = case(6, 3001, dtype)
    k, p = truncations(6, 3001, seed=3)
    want = torch.stack([x.double() for x in run_rows(z, y, tau, k, p)[0]])
    assert want.isfinite().sum() > 24
    padded = torch.full((6, 3040), torch.nan, dtype=dtype)
    padded[:, 19:3020] = z
    for seed in (1, 2):
        got = run_rows(padded[:, 19:3020], y, tau, k, p, seed=seed)[0]
        assert torch.equal(torch.stack([x.double() for x in got]), want)
    for r in range(6):
        one = run_rows(*(x[r : r + 1].clone() for x in (z, y, tau, k, p)))[0]
        assert torch.equal(torch.stack([x.double() for x in one])[:, 0], want[:, r])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_two_to_the_31(run_rows, dtype):
    V = 1001
    storage = torch.empty(
        (1 << 31) + V, dtype=dtype
    )  # gigabytes of addresses, of which only the ends are touched
    z = storage.as_strided((2, V), (1 << 31, 1))
    z.copy_(torch.randn(2, V, generator=torch.Generator().manual_seed(0)) * 3)
    k, p = torch.tensor([40, 1001]), torch.full((2,), 0.9, dtype=torch.float64)
    y, tau = torch.tensor([3, 4]), torch.ones(2)
    assert_truncated(run_rows(z, y, tau, k, p), z, y, tau, k, p, dtype)


def test_the_gate_knows_the_memory_of_a_block(run_rows):
    if run_rows is not natively:
        from bench import gate_cuda

        assert run_rows.memory == (gate_cuda.KEY_MEMORY, gate_cuda.COUNT_MEMORY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
def test_the_same_cases_natively():
    pytest.skip("no GPU: the cases above ran on fibers alone")


def test_where_kept_sets_come_from(monkeypatch):
    device = torch.device("cuda")
    triton_rows = pytest.importorskip("entropy_kernels.ops.rows")
    for there, chosen in [(True, cuda), (False, triton_rows)]:
        monkeypatch.setattr(cuda, "available", lambda there=there: there)
        assert functional.set_functions(device) is chosen
        assert functional.backend(device).startswith("cuda c++" if there else "triton")
    monkeypatch.setattr(cuda, "available", lambda: True)
    with rows_from(triton_rows):
        assert functional.set_functions(device) is triton_rows
    assert functional.set_functions(torch.device("cpu")) is cpu


def test_a_compiler_that_fails_is_said_and_none_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert cuda.nvcc() is None and not cuda.available.__wrapped__()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo unsupported >&2; exit 1; }\n')
    compiler.chmod(0o755)
    with pytest.warns(UserWarning, match="Triton's are used.*Cause: unsupported"):
        assert not cuda.available.__wrapped__()
    assert list(tmp_path.glob("*.so")) == []
