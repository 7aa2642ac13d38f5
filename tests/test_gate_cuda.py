"""csrc's CUDA compiles for an H100 without spilling, reads rows 16 bytes at a time, and asks for the memory that the gate states."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import gate_cuda as gate  # noqa: E402

missing = gate.tools()
needs_nvcc = pytest.mark.skipif(isinstance(missing, str), reason=str(missing))


@needs_nvcc
def test_every_kernel_passes():
    table = gate.compiled("sm_90a")
    assert [(c.kernel, c.dtype) for c in table] == [
        ("by_counts", "bf16"), ("by_counts", "fp16"),
        *(("by_keys", dtype) for dtype in ("bf16", "fp16", "fp32", "fp64")),
    ]  # fmt: skip
    for c in table:
        assert not gate.faults(c) and c.registers > 0 and c.wide_loads > 0
    assert 5 < table[0].instructions_per_element < 20


def test_spills_are_read_from_what_ptxas_says():
    log = """ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    40 bytes stack frame, 66 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 40 bytes cumulative stack size
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    assert gate._spilled(log) == {"a": 122, "b": 0}


def test_narrow_loads_and_too_much_shared_memory_are_seen():
    good = gate.Compiled(
        kernel="by_counts", dtype="bf16", target="sm_90a", threads=256, registers=64, spilled_bytes=0, shared_bytes=37408,
        wide_loads=6, needed_wide_loads=6, blocks_per_multiprocessor=4, instructions_per_element=12.0,
    )  # fmt: skip
    assert gate.faults(good) == []
    assert "122 bytes spilled" in gate.faults(dataclasses.replace(good, spilled_bytes=122))[0]
    assert "5 loads of 16 bytes" in gate.faults(dataclasses.replace(good, wide_loads=5))[0]
    assert "shared memory" in gate.faults(dataclasses.replace(good, shared_bytes=300 << 10))[0]
    assert gate.roofline([good], "H200")["instructions_ms"] == pytest.approx(
        gate.R * gate.V * 12 / (128 * 132 * 1.98e6)
    )


def test_without_a_compiler_the_gate_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gate.cuda, "nvcc", lambda: None)
    assert gate.run() == []
    assert "CUDA kernels: not compiled, no nvcc" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no nvcc"):
        gate.compiled("sm_90a")
