"""The kernels from hidden states compile for every architecture without spilling, with their products on tensor cores."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import gate, gate_head  # noqa: E402
from entropy_kernels.ops import fused_linear  # noqa: E402

slow = pytest.mark.slow


def passes(x, target):
    c = gate_head.compiled(x, target)
    return not gate_head.faults(c) and c.registers > 0 and c.matrix_instructions > 0


def in_use(target, what):
    """Plain, and with bias, soft cap and ragged sizes."""
    return [
        x for x in gate_head.variants(target) if (x.what, x.dtype, x.name) == (what, torch.bfloat16, "in use")
    ]


@pytest.mark.parametrize("what", gate_head.FUNCTIONS, ids=gate_head.FUNCTIONS.values())
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=slow) for t in gate.TARGETS if t != "sm_90")]
)
def test_every_kernel_in_use_passes(target, what):
    assert passes(in_use(target, what)[0], target)


@slow
@pytest.mark.parametrize("target", gate.TARGETS)
def test_with_everything_too(target):
    assert all(passes(in_use(target, what)[1], target) for what in gate_head.FUNCTIONS)


@slow
def test_candidates_pass():
    found = [x for x in gate_head.variants("sm_90") if x.name != "in use"]
    assert {x.name for x in found} == set(gate_head.CANDIDATES)
    assert not [fault for x in found for fault in gate_head.faults(gate_head.compiled(x, "sm_90"))]


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=slow)])
def test_the_merge_of_a_wide_vocabulary_does_not_spill(target):
    registers, spilled = gate_head.merging(target)
    assert registers > 0 and spilled == 0


def test_what_does_not_pass_is_seen():
    c = gate_head.compiled(in_use("sm_90", fused_linear.VALUES)[0], "sm_90")
    c = dataclasses.replace(
        c, spilled_bytes=8, shared_bytes=300 << 10, matrix_instructions=0, narrow_fetches=3
    )
    said = " ".join(gate_head.faults(c))
    assert all(
        text in said
        for text in ("8 bytes spilled", "shared memory", "not on the tensor cores", "3 fetches of less")
    )


def test_the_roofline_counts_products_and_epilogues():
    c = gate_head.Compiled(
        function="gradient", dtype="bf16", target="sm_90", name="in use", flags="plain", tile="", warps=8, stages=4,
        registers=1, spilled_bytes=0, shared_bytes=0, matrix_instructions=1, narrow_fetches=0,
        special_per_logit=1.0, instructions_per_logit=16.0,
    )  # fmt: skip
    found = gate_head.roofline(c, "H200")
    product_ms = 2 * 8192 * 4096 * 131072 / 989e12 * 1e3
    assert found["kernel_products_ms"] == pytest.approx(product_ms)
    assert found["library_products_ms"] == pytest.approx(2 * product_ms)
    assert found["epilogue_ms"] == pytest.approx(8192 * 131072 * 16 / (128 * 132 * 1.98e9) * 1e3)
