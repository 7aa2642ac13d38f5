"""The kernels from hidden states to rows, ahead of time: what `gate` asks of row kernels, and that the products are on tensor cores.

A kernel passes where nothing spills, shared memory fits, 16-bit products are matrix instructions of the architecture, and all factors
are fetched 16 bytes a thread at a time or by descriptor. `plain` is what a launch with V and D multiples of the tile makes; `all` has
bias, soft cap and ragged V and D at once. The paper roofline is floating-point operations at the vendor's dense bf16 rate; what happens
to a tile of logits afterwards (`epilogue`) comes on top, unless another program on the multiprocessor has products to do meanwhile.
Nothing here is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from bench import gate, timing
from entropy_kernels.ops import fused_linear, head_kernels, row_kernels
from entropy_kernels.ops.fused_linear import GRADIENT, TANGENTS, VALUES, Tiles

N, D, V = 8192, 4096, 131072  # the shape of the roofline
FUNCTIONS = {VALUES: "values", TANGENTS: "tangents", GRADIENT: "gradient"}
PRODUCTS = {VALUES: 1, TANGENTS: 3, GRADIENT: 1}  # of N·D·V, in the kernel
LIBRARY_PRODUCTS = {VALUES: 0, TANGENTS: 0, GRADIENT: 2}  # dh = da W and dW = daᵀ h
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}  # and v_mfma
DENSE_TFLOPS = {"H100 SXM": 989, "H200": 989, "B200": 2250}  # bf16 without sparsity: the vendor's data sheets

# Further ways to cut, to be timed beside those in use (bench/linear_gpu.py): name -> the values', the tangents', the gradient's tiles.
CANDIDATES = {
    "tma": (
        Tiles(128, 256, 64, 8, 4, tma=True),
        Tiles(128, 128, 64, 8, 2, tma=True),
        Tiles(128, 128, 64, 8, 4, tma=True),
    ),
    "tma, loops as one": (Tiles(128, 256, 64, 8, 4, tma=True, flatten=True), None, None),
    "two programs": (
        Tiles(128, 128, 64, 4, 3, per_multiprocessor=2), None, Tiles(128, 128, 64, 4, 3, per_multiprocessor=2)
    ),
    "two programs, tma": (
        Tiles(128, 128, 64, 4, 3, tma=True, per_multiprocessor=2),
        None,
        Tiles(128, 128, 64, 4, 3, tma=True, per_multiprocessor=2),
    ),
    "a program a tile, tma": (Tiles(128, 256, 64, 8, 4, tma=True, per_multiprocessor=0), None, None),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel as a launch would specialise it."""

    what: int  # VALUES, TANGENTS or GRADIENT
    dtype: torch.dtype
    cut: Tiles
    everything: bool = False  # bias, soft cap, V and D that are no multiple of the tile
    name: str = "in use"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of it."""

    function: str
    dtype: str
    target: str
    name: str
    flags: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    narrow_fetches: int
    special_per_logit: float | None
    instructions_per_logit: float | None


def variants(target: str) -> Iterator[Variant]:
    """All that a call of `ops.fused_linear` or its benchmark may launch on `target`."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        wide = dtype == torch.float32
        cuts = (fused_linear.FLOAT32 if wide else fused_linear.TILES)[target]
        for what in FUNCTIONS:
            for everything in (False, True):
                yield Variant(what=what, dtype=dtype, cut=cuts[what], everything=everything)
    if target == "sm_90":
        for name, cuts in CANDIDATES.items():
            for what, cut in zip(FUNCTIONS, cuts, strict=True):
                if cut is not None:
                    yield Variant(what=what, dtype=torch.bfloat16, cut=cut, name=name)


def compiled(x: Variant, target: str) -> Compiled:
    """The variant through the compiler."""
    function = head_kernels.head_cotangents if x.what == GRADIENT else head_kernels.head_moments
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("the gate compiles: run it without TRITON_INTERPRET")
    tangent = x.what == TANGENTS
    constants = {
        "TANGENT": tangent, "DH": tangent, "DW": tangent, "BIAS": x.everything, "DBIAS": tangent and x.everything,
        "SOFTCAP": 30.0 if x.everything else None, "EXACT": x.dtype == torch.float32, "BLOCK_N": x.cut.rows,
        "BLOCK_V": x.cut.columns, "BLOCK_D": x.cut.depth, "GROUP": fused_linear.GROUP, "EVEN_V": not x.everything,
        "EVEN_D": not x.everything, "TMA": x.cut.tma, "FLATTEN": x.cut.flatten, "UPCAST": False, "PRECISION": "ieee",
    }  # fmt: skip
    types = dict.fromkeys(("h", "W", "b", "dh", "dW", "db", "out"), "*" + gate.NAMES[x.dtype]) | {"y": "*i64"}
    integers = ("N", "V", "D", "S", "row_tiles", "h_row", "W_row", "dh_row", "dW_row", "out_row")
    types |= dict.fromkeys(integers, "i32")
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in function.arg_names}
    divisible = {
        (i,): [["tt.divisibility", gate.ALIGNMENT]]
        for i, (n, kind) in enumerate(signature.items())
        if kind != "constexpr" and n not in ("N", "S", "row_tiles")
    }
    values = {(i,): constants[n] for i, n in enumerate(signature) if n in constants}
    kernel = triton.compile(
        ASTSource(function, signature, values, divisible),
        target=gate.TARGETS[target],
        options={"num_warps": x.cut.warps, "num_stages": x.cut.stages},
    )
    nvidia = not target.startswith("gfx")
    if nvidia:
        registers, spilled, shared, operations, _ = gate._read_nvidia(kernel.asm["cubin"])
        matrix = sum(n for name, n in operations.items() if name.startswith(MATRIX[target]))
        narrow = sum(n for name, n in operations.items() if name.startswith("LDGSTS") and ".128" not in name)
        logits_per_thread = x.cut.rows * x.cut.columns / (32 * x.cut.warps)
        special = sum(n for name, n in operations.items() if name.startswith("MUFU")) / logits_per_thread
        issued = sum(operations.values()) / logits_per_thread
    else:
        registers, spilled, shared, _, _ = gate._read_amd(kernel.asm["amdgcn"])
        matrix, narrow = len(re.findall(r"\bv_mfma", kernel.asm["amdgcn"])), 0
        special = issued = None
    return Compiled(
        function=FUNCTIONS[x.what],
        dtype=gate.NAMES[x.dtype],
        target=target,
        name=x.name,
        flags="all" if x.everything else "plain",
        tile=f"{x.cut.rows} × {x.cut.columns} × {x.cut.depth}",
        warps=x.cut.warps,
        stages=x.cut.stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=max(shared, kernel.metadata.shared),
        matrix_instructions=matrix,
        narrow_fetches=narrow,
        special_per_logit=special,
        instructions_per_logit=issued,
    )


def faults(c: Compiled) -> list[str]:
    """Why it does not pass; empty where it does."""
    found = []
    if c.spilled_bytes:
        found.append(f"{c.spilled_bytes} bytes spilled")
    if c.shared_bytes > gate.SHARED_LIMIT[c.target]:
        found.append(f"{c.shared_bytes} bytes of shared memory, {gate.SHARED_LIMIT[c.target]} are there")
    if c.dtype != "fp32" and not c.matrix_instructions:
        found.append("products not on the tensor cores")
    if c.flags == "plain" and c.narrow_fetches:
        found.append(f"{c.narrow_fetches} fetches of less than 16 bytes")
    return [f"{c.function} {c.dtype} {c.target} {c.name} {c.flags}: {fault}" for fault in found]


def roofline(c: Compiled, gpu: str) -> dict[str, float]:
    """Milliseconds for [N, D] × [V, D]: products of the kernel and of the library at the dense rate; the tiles' epilogues."""
    _, multiprocessors, ghz, _ = gate.GPUS[gpu]
    what = next(k for k, name in FUNCTIONS.items() if name == c.function)
    assert c.special_per_logit is not None and c.instructions_per_logit is not None
    clocks_per_ms = multiprocessors * ghz * 1e6
    product_ms = 2.0 * N * D * V / (DENSE_TFLOPS[gpu] * 1e9)
    return {
        "kernel_products_ms": PRODUCTS[what] * product_ms,
        "library_products_ms": LIBRARY_PRODUCTS[what] * product_ms,
        "epilogue_ms": N * V / clocks_per_ms
        * max(c.special_per_logit / gate.SPECIAL_PER_CLOCK, c.instructions_per_logit / gate.ISSUED_PER_CLOCK),
    }  # fmt: skip


def merging(target: str) -> tuple[int, int]:
    """Registers and spilled bytes of the merge of a row's tiles, for the widest vocabulary in use (262,144)."""
    S = triton.cdiv(262144, min(c.columns for c in fused_linear.TILES[target]))
    function = row_kernels.merge_tiles
    constants = {"N": 1, "TILES": triton.next_power_of_2(S), "z_row": 1, "u_row": 1, "v_row": 1}
    constants |= {"z_column": 0, "u_column": 0, "v_column": 0}
    types = {"y": "*i64", "S": "i32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in function.arg_names}
    values = {(i,): constants[n] for i, n in enumerate(signature) if n in constants}
    kernel = triton.compile(
        ASTSource(function, signature, values),
        target=gate.TARGETS[target],
        options={"num_warps": fused_linear.merge_warps(S)},
    )
    if target.startswith("gfx"):
        return gate._read_amd(kernel.asm["amdgcn"])[:2]
    return gate._read_nvidia(kernel.asm["cubin"])[:2]


def markdown(result: dict[str, Any]) -> list[str]:
    lines = [
        f"# From hidden states to rows ahead of time, Triton {result['triton']}",
        "",
        f"Commit {result['commit']}. {len(result['kernels'])} compilations, {len(result['faults'])} faults. Instructions are all there "
        "are in the machine code, those of the loop over D and of rare branches among them. Nothing here is measured.",
        *(f"- {fault}" for fault in result["faults"]),
        "",
        "| target | function | dtype | which | flags | tile, warps, stages "
        "| registers | spilled | shared | matrix instr. | special | instructions |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in result["kernels"]:
        figures = (c["special_per_logit"], c["instructions_per_logit"])
        shown = " | ".join("–" if x is None else f"{x:.3g}" for x in figures)
        lines += [
            f"| {c['target']} | {c['function']} | {c['dtype']} | {c['name']} | {c['flags']} | {c['tile']}, {c['warps']}, {c['stages']} "
            f"| {c['registers']} | {c['spilled_bytes']} B | {c['shared_bytes']} B | {c['matrix_instructions']} | {shown} |"
        ]
    lines += [
        "",
        f"## Paper roofline, [{N}, {D}] × [{V}, {D}] bf16, ms",
        "",
        f"Dense bf16 TFLOP/s from data sheets: {', '.join(f'{g} {t}' for g, t in DENSE_TFLOPS.items())}; a library reaches about "
        "80 % of it. Epilogues at the boost clock, as though nothing overlapped.",
        "",
        "| function | GPU | products in the kernel | by the library | epilogues | of the products |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rooflines"]:
        products = r["kernel_products_ms"] + r["library_products_ms"]
        lines += [
            f"| {r['function']} | {r['gpu']} | {r['kernel_products_ms']:.2f} | {r['library_products_ms']:.2f} "
            f"| {r['epilogue_ms']:.2f} | {r['epilogue_ms'] / products:.1%} |"
        ]
    return lines


def run(_repeats: int = 0) -> None:
    """Compile all, write the table, and end with an error where a kernel does not pass."""
    table = [compiled(x, target) for target in gate.TARGETS for x in variants(target)]
    found = [fault for c in table for fault in faults(c)]
    found += [f"merge {t}: {spilled} bytes spilled" for t in gate.TARGETS if (spilled := merging(t)[1])]
    result = {
        "triton": triton.__version__,
        "commit": timing.environment("cpu")["commit"],
        "faults": found,
        "kernels": [asdict(c) for c in table],
        "rooflines": [
            {"function": c.function, "gpu": gpu, **roofline(c, gpu)}
            for gpu, (target, *_) in gate.GPUS.items()
            for c in table
            if (c.target, c.dtype, c.name, c.flags) == (target, "bf16", "in use", "plain")
        ],
    }
    timing.save(f"gate_head_triton_{triton.__version__}", result, markdown(result))
    if found:
        raise SystemExit("\n".join(found))
