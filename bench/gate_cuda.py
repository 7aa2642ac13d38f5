"""csrc's CUDA kernels compiled ahead of time, without a GPU: what they take, and how fast counting 16-bit logits could be.

A kernel passes where nothing spills, shared memory fits, and every read of a row in its source has become loads of 16 bytes. The paper
roofline of `by_counts` is the largest of three times for its one read of the row:

    bytes / memory bandwidth      instructions / 128      counts in shared memory / 32 × conflicts      (per clock and multiprocessor)

with the instructions of the counting loop alone. 32 threads that count into 32 random banks meet 3.5 times in the fullest; equal logits are
counted together by the hardware. Left out is the work on the bins, which does not grow with the row: some thousands of exponentials in
double and half a dozen walks over 9217 bins, at whose time other blocks of the multiprocessor count. Nothing here is measured.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import timing
from entropy_kernels.ops import cuda
from entropy_kernels.ops.cpu import _sources

R, V = 8192, 151936  # the shape of the roofline
TARGETS = {"sm_80": "80", "sm_90a": "90a", "sm_100": "100"}  # as nvcc is told them
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10}  # bytes a block can ask for
SHARED_OF_SM = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10}
RESERVED = 1 << 10  # of shared memory, a block
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
GPUS = {  # architecture, multiprocessors, boost clock GHz, memory bandwidth GB/s: the vendor's data sheets
    "H100 SXM": ("sm_90a", 132, 1.98, 3350),
    "H200": ("sm_90a", 132, 1.98, 4800),
    "B200": ("sm_100", 148, 1.965, 8000),
}
BANKS, CONFLICTS, ISSUED_PER_CLOCK = 32, 3.5, 128
DTYPES = {"8BFloat16": "bf16", "7Float16": "fp16", "f": "fp32", "d": "fp64"}  # as mangled
# Of csrc/truncated.cuh and truncated.cu: sizes of their memory in bytes, and how many packs of 16 bytes a thread loads in the source
KEY_MEMORY, COUNT_MEMORY, WINDOW = 41488, 544, 0x4580 - 0x3380
PACKS = {"by_counts": 6, "by_keys bf16": 7, "by_keys fp16": 7, "by_keys fp32": 17, "by_keys fp64": 17}
COUNTING_DEPTH = 4  # packs under way in the counting loop


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What nvcc made of one kernel for one architecture; instructions per element are those of the counting loop."""

    kernel: str
    dtype: str
    target: str
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int
    needed_wide_loads: int
    blocks_per_multiprocessor: int
    instructions_per_element: float | None


def tools() -> tuple[str, str] | str:
    """nvcc, and a cuobjdump: its own or the one that Triton brings; or what is missing."""
    compiler = cuda.nvcc()
    if compiler is None:
        return "no nvcc on the PATH or in CUDA_HOME"
    beside = Path(compiler).resolve().parent / "cuobjdump"
    found = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return "no cuobjdump: neither CUDA's nor Triton's"
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return compiler, found


def compiled(target: str) -> list[Compiled]:
    """All kernels of csrc/truncated.cu for one architecture."""
    found = tools()
    if isinstance(found, str):
        raise RuntimeError(f"the CUDA part of the gate compiles: {found}")
    compiler, dump = found
    with tempfile.TemporaryDirectory() as scratch:
        cubin = str(Path(scratch) / "truncated.cubin")
        call = [*cuda.command(compiler, [TARGETS[target]]), "-cubin", "-Xptxas", "-v", "-o", cubin]
        log = subprocess.run(call, cwd=_sources(), check=True, capture_output=True, text=True).stderr
        usage, code = (
            subprocess.run([dump, flag, cubin], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    spilled = _spilled(log)
    functions = re.split(r"Function : ", code)[1:]
    out = []
    for text in functions:
        mangled = text.split()[0]
        name = re.search(r"(by_counts|by_keys)I(?:N\S*?(8BFloat16|7Float16)E|([fd]))", mangled)
        assert name is not None, mangled
        kernel, dtype = name.group(1), DTYPES[name.group(2) or name.group(3)]
        registers = re.search(rf"Function {mangled}:\s+REG:(\d+)", usage)
        assert registers is not None and mangled in spilled, usage + log
        operations = _operations(text)
        shared = _shared_bytes(kernel, dtype, target)
        wide_block = kernel == "by_counts" and shared > SHARED_LIMIT[target] / 3
        threads = 512 if wide_block else 256
        per_block = -(-int(registers.group(1)) // 8) * 8 * threads  # registers come in eights
        out.append(
            Compiled(
                kernel=kernel,
                dtype=dtype,
                target=target,
                threads=threads,
                registers=int(registers.group(1)),
                spilled_bytes=spilled[mangled],
                shared_bytes=shared,
                wide_loads=collections.Counter(operations)["LDG.E.128"],
                needed_wide_loads=PACKS.get(kernel) or PACKS[f"{kernel} {dtype}"],
                blocks_per_multiprocessor=min(
                    REGISTERS // per_block, THREADS // threads, SHARED_OF_SM[target] // (shared + RESERVED)
                ),
                instructions_per_element=_counting_loop(operations) if kernel == "by_counts" else None,
            )
        )
    return sorted(out, key=lambda c: (c.kernel, c.dtype))


def _spilled(log: str) -> dict[str, int]:
    """Bytes that each function stores and loads again for want of registers, from what ptxas -v says."""
    found = re.findall(
        r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    return {name: int(stores) + int(loads) for name, stores, loads in found}


def _operations(text: str) -> list[str]:
    """The instructions of a function in their order, with the width of a load and without a cache hint."""
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text, re.MULTILINE)
    return [re.sub(r"^LDG\.E.*\.128.*", "LDG.E.128", name) for name in names if name != "NOP"]


def _shared_bytes(kernel: str, dtype: str, target: str) -> int:
    """What truncated.cu asks for: float16 has a bin for as many of its numbers as there is room for."""
    if kernel == "by_keys":
        return KEY_MEMORY
    width = WINDOW if dtype == "bf16" else min(0x7C00, (SHARED_LIMIT[target] - COUNT_MEMORY) // 8) - 1
    return COUNT_MEMORY + 8 * width


def _counting_loop(operations: list[str]) -> float:
    """Instructions an element from the loop's first wide load to the last count of what it has loaded."""
    first = operations.index("LDG.E.128")
    counts = [i for i, name in enumerate(operations) if i > first and name.startswith("ATOMS.POPC.INC")]
    elements = 8 * COUNTING_DEPTH
    return (counts[elements - 1] - first + 1) / elements


def faults(c: Compiled) -> list[str]:
    """Why it does not pass; empty where it does."""
    found = []
    if c.spilled_bytes:
        found.append(f"{c.spilled_bytes} bytes spilled")
    if c.shared_bytes > SHARED_LIMIT[c.target]:
        found.append(f"{c.shared_bytes} bytes of shared memory, {SHARED_LIMIT[c.target]} are there")
    if c.wide_loads < c.needed_wide_loads:
        found.append(f"{c.wide_loads} loads of 16 bytes, {c.needed_wide_loads} in the source")
    if c.blocks_per_multiprocessor < 1:
        found.append("not one block fits a multiprocessor")
    return [f"{c.kernel} {c.dtype} {c.target}: {fault}" for fault in found]


def roofline(table: Sequence[Compiled], gpu: str) -> dict[str, float]:
    """Milliseconds of `by_counts` for [R, V] bfloat16 by bytes, instructions and counts, and the largest of the three."""
    target, multiprocessors, ghz, gb_per_s = GPUS[gpu]
    (c,) = (c for c in table if (c.kernel, c.dtype, c.target) == ("by_counts", "bf16", target))
    assert c.instructions_per_element is not None
    clocks_per_ms = multiprocessors * ghz * 1e6
    times = {
        "bytes_ms": R * V * 2 / (gb_per_s * 1e6),
        "instructions_ms": R * V * c.instructions_per_element / (ISSUED_PER_CLOCK * clocks_per_ms),
        "counts_ms": R * V * CONFLICTS / (BANKS * clocks_per_ms),
    }
    return {**times, "predicted_ms": max(times.values())}


def markdown(result: dict[str, Any]) -> list[str]:
    lines = [
        f"# CUDA kernels ahead of time, {result['nvcc']}",
        "",
        f"Commit {result['commit']}. {len(result['kernels'])} kernels for {', '.join(TARGETS)}, {len(result['faults'])} faults. "
        "Nothing here is measured.",
        *(f"- {fault}" for fault in result["faults"]),
        "",
        "| kernel | dtype | target | threads | registers | spilled | shared | blocks per SM | loads of 16 bytes | instructions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in result["kernels"]:
        instructions = c["instructions_per_element"]
        lines += [
            f"| {c['kernel']} | {c['dtype']} | {c['target']} | {c['threads']} | {c['registers']} | {c['spilled_bytes']} B "
            f"| {c['shared_bytes']} B | {c['blocks_per_multiprocessor']} | {c['wide_loads']} "
            f"| {'–' if instructions is None else f'{instructions:.3g}'} |"
        ]
    lines += [
        "",
        f"## Paper roofline of `by_counts`, bf16 [{R}, {V}], ms",
        "",
        f"Counts: {CONFLICTS} threads of 32 in the fullest of {BANKS} banks. From data sheets: "
        + "; ".join(f"{g}: {m} × {f} GHz, {b} GB/s" for g, (_, m, f, b) in GPUS.items())
        + ".",
        "",
        "| GPU | bytes | instructions | counts | predicted | × the bytes of a plain forward |",
        "|---|---|---|---|---|---|",
    ]
    for gpu, row in result["rooflines"].items():
        times = " | ".join(
            f"{row[k]:.2f}" for k in ("bytes_ms", "instructions_ms", "counts_ms", "predicted_ms")
        )
        lines += [f"| {gpu} | {times} | {row['predicted_ms'] / row['bytes_ms']:.2f} |"]
    return lines


def run() -> list[str]:
    """Compile all and write the table; the faults found. Without nvcc, say so."""
    found = tools()
    if isinstance(found, str):
        print(f"CUDA kernels: not compiled, {found}.")
        return []
    version = subprocess.run([found[0], "--version"], check=True, capture_output=True, text=True).stdout
    table = [c for target in TARGETS for c in compiled(target)]
    broken = [fault for c in table for fault in faults(c)]
    result = {
        "nvcc": "nvcc " + version.split("release ")[1].split(",")[0],
        "commit": timing.environment("cpu")["commit"],
        "faults": broken,
        "kernels": [asdict(c) for c in table],
        "rooflines": {gpu: roofline(table, gpu) for gpu in GPUS},
    }
    timing.save("gate_cuda", result, markdown(result))
    return broken
