"""The Triton kernels compile for every architecture without spilling, and load rows 16 bytes at a time."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import gate  # noqa: E402
from entropy_kernels.ops import rows  # noqa: E402


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float32, torch.float64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", gate.TARGETS)
def test_every_kernel_passes(target, dtype):
    variants = [x for x in gate.variants([dtype]) if x.listed is None]
    assert len(variants) == (11 if dtype == torch.float64 else 12)
    for x in variants:
        c = gate.compiled(x, target)
        assert not gate.faults(c) and c.registers > 0
        if x.width and target != "gfx942":
            assert c.wide_load_bytes >= c.needed_load_bytes > 0 and (x.again or c.special_per_element > 0)
            if x.kernel == "tile_moments":
                assert c.with_rare_branches_per_element > c.instructions_per_element


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("sm_90", torch.bfloat16),
        *(
            pytest.param(target, dtype, marks=pytest.mark.slow)
            for target in gate.TARGETS
            for dtype in gate.NAMES
            if (target, dtype) != ("sm_90", torch.bfloat16)
        ),
    ],
)
def test_every_kernel_of_rows_in_two_parts_passes(target, dtype):
    variants = [x for x in gate.variants([dtype]) if x.listed is not None]
    assert len(variants) == 10 and len({x.name for x in variants}) == 10
    for x in variants:
        c = gate.compiled(x, target)
        assert not gate.faults(c) and c.registers > 0, gate.faults(c)


def test_a_kernel_that_spills_is_seen(monkeypatch):
    (x,) = (x for x in gate.variants([torch.float32]) if x.name == "tile_moments N=2")
    monkeypatch.setattr(rows, "tile_warps", lambda width: 1)
    assert any("spilled" in fault for fault in gate.faults(gate.compiled(x, "sm_90")))


def test_narrow_loads_and_too_much_shared_memory_are_seen(monkeypatch):
    (x,) = (x for x in gate.variants([torch.bfloat16]) if x.name == "write_cotangents")
    monkeypatch.setattr(gate, "ALIGNMENT", 4)
    narrow = gate.compiled(x, "sm_90")
    assert [fault for fault in gate.faults(narrow) if "0 of 64 bytes a thread loaded" in fault]
    greedy = dataclasses.replace(narrow, shared_bytes=300 << 10, wide_load_bytes=64)
    assert [fault for fault in gate.faults(greedy) if "shared memory" in fault]


def test_the_roofline_counts_what_a_function_launches():
    made = gate.Compiled(
        kernel="tile_moments N=0", dtype="bf16", target="sm_90", warps=8, width=8192, registers=64, spilled_bytes=0,
        shared_bytes=0, wide_load_bytes=64, needed_load_bytes=64, programs_per_multiprocessor=4,
        bytes_per_element=2, special_per_element=1.0, instructions_per_element=12.0,
    )  # fmt: skip
    writer = dataclasses.replace(
        made, kernel="write_cotangents", bytes_per_element=4, instructions_per_element=100.0
    )
    alone = gate.roofline([made, writer], "H200", "gradient alone", "bf16")
    elements = gate.R * gate.V
    assert alone["bytes_ms"] == pytest.approx(elements * 6 / 4800e9 * 1e3)
    assert alone["special_ms"] == pytest.approx(elements * 2 / (132 * 16 * 1.98e9) * 1e3)
    # the first launch waits for memory, the second for instructions
    assert alone["predicted_ms"] == pytest.approx(
        elements * 2 / 4800e9 * 1e3 + elements * 100 / (132 * 128 * 1.98e9) * 1e3
    )
