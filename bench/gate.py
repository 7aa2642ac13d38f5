"""Every Triton kernel compiled ahead of time for every architecture, without a GPU: what it takes, and how fast it could be.

A kernel passes where nothing spills, shared memory fits, and all of its rows are loaded 16 bytes or more at a time. The table says
what one element costs; the paper roofline is the largest of three times that no kernel can go below:

    bytes / memory bandwidth      special functions / 16      instructions / 128      (the latter two per clock and multiprocessor)

Instructions are those of the machine code on its straight way, every branch that skips something taken: what a tile costs that is not
peaked and does not hold the target. Beside them stands the number with nothing skipped, loops counted once.
Nothing here is measured: it is what a measurement is to be held against.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import gate_cuda, timing
from entropy_kernels.ops import kept_kernels, many_kernels, part_kernels, row_kernels, rows, triton_parts

R, V = 8192, 151936  # the shape of the roofline
ALIGNMENT = 16  # what Triton is told of pointers and row lengths: it looks for multiples of 16 at each launch
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a program
GPUS = {  # architecture, multiprocessors, boost clock GHz, memory bandwidth GB/s: the vendor's data sheets
    "H100 SXM": ("sm_90", 132, 1.98, 3350),
    "H200": ("sm_90", 132, 1.98, 4800),
    "B200": ("sm_100", 148, 1.965, 8000),
}
SPECIAL_PER_CLOCK, ISSUED_PER_CLOCK, REGISTERS, WARPS = 16, 128, 65536, 64  # of one multiprocessor
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel, specialised as a launch would: contiguous rows, everything a multiple of 16."""

    kernel: str
    dtype: torch.dtype
    tangents: int | None = None
    width: int = 0  # columns a program
    reads: int = 0  # tensors of rows read
    writes: int = 0
    listed: bool | None = None  # the set is a mask, not a threshold
    directions: int = 0  # tangents of the same logits
    again: bool = False  # reads the row as often as its numbers ask for: nothing can be said of one element

    @property
    def name(self) -> str:
        name = self.kernel + ("" if self.tangents is None else f" N={self.tangents}")
        name += f" K={self.directions}" if self.directions else ""
        return name + {None: "", True: ", mask", False: ", threshold"}[self.listed]

    @property
    def warps(self) -> int:
        if self.listed is not None:
            return triton_parts.part_warps(self.width, rows.compute_dtype(self.dtype))
        of = rows.warps if self.again else rows.tile_warps
        return of(self.width) if self.width else 1

    @property
    def bytes_per_element(self) -> int:
        return (self.reads + self.writes) * self.dtype.itemsize + (1 if self.listed else 0)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a variant; the per-element figures are None where a program has no columns of its own."""

    kernel: str
    dtype: str
    target: str
    warps: int
    width: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_load_bytes: int  # a thread, by loads of 16 bytes or more
    needed_load_bytes: int
    programs_per_multiprocessor: int | None
    bytes_per_element: int | None
    special_per_element: float | None
    instructions_per_element: float | None
    with_rare_branches_per_element: float | None = None


def variants(dtypes: Sequence[torch.dtype] = tuple(NAMES)) -> Iterator[Variant]:
    """All that `ops.rows` launches for rows of the roofline's width."""
    for dtype in dtypes:
        T = rows.compute_dtype(dtype)
        for N in range(3):
            width = rows.tile_width(V, T, N)
            yield Variant(kernel="tile_moments", dtype=dtype, tangents=N, width=width, reads=1 + N)
            yield Variant(kernel="merge_tiles", dtype=dtype, tangents=N)
        for K in rows.DIRECTIONS:
            width = rows.tile_width(V, T, 1)
            yield Variant(kernel="tile_many_tangents", dtype=dtype, directions=K, width=width, reads=1 + K)
        width = rows.written_width(V, T)
        yield Variant(kernel="write_cotangents", dtype=dtype, width=width, reads=1, writes=1)
        yield Variant(kernel="write_cotangent_tangents", dtype=dtype, width=width, reads=2, writes=1)
        if dtype in rows.KEY_SHIFT:
            width = rows.kept_width(V)
            yield Variant(kernel="kept_thresholds", dtype=dtype, width=width, reads=1, again=True)
        yield from _part_variants(dtype)


def _part_variants(dtype: torch.dtype) -> Iterator[Variant]:
    """All that `ops.triton_parts` launches beside the merge; a mask is one byte an element more."""
    T = rows.compute_dtype(dtype)
    for listed in (False, True):
        for N in range(3):
            width = triton_parts.part_width(V, T, N)
            yield Variant(
                kernel="tile_part_moments", dtype=dtype, tangents=N, width=width, reads=1 + N, listed=listed
            )
        width = triton_parts.part_width(V, T)
        yield Variant(
            kernel="write_part_cotangents", dtype=dtype, width=width, reads=1, writes=1, listed=listed
        )
        yield Variant(
            kernel="write_part_cotangent_tangents", dtype=dtype, width=width, reads=2, writes=1, listed=listed
        )


def compiled(x: Variant, target: str) -> Compiled:
    """The variant through the compiler."""
    machine_code, metadata = _compile(x, TARGETS[target])
    threads = x.warps * TARGETS[target].warp_size
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, shared, operations, wide = read(machine_code)
    nvidia = read is _read_nvidia
    per = x.width / threads if x.width and nvidia and not x.again else None
    programs = min(REGISTERS // (max(registers, 1) * threads), WARPS // x.warps) if nvidia else None
    straight = _straight_way(machine_code) if nvidia else operations
    special = sum(n for name, n in straight.items() if name.startswith("MUFU"))
    return Compiled(
        kernel=x.name,
        dtype=NAMES[x.dtype],
        target=target,
        warps=x.warps,
        width=x.width,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=max(shared, metadata.shared),
        wide_load_bytes=wide,
        needed_load_bytes=x.reads * x.dtype.itemsize * x.width // threads,
        programs_per_multiprocessor=programs,
        bytes_per_element=None if x.again else x.bytes_per_element or None,
        special_per_element=special / per if per else None,
        instructions_per_element=straight.total() / per if per else None,
        with_rare_branches_per_element=operations.total() / per if per else None,
    )


def faults(c: Compiled) -> list[str]:
    """Why it does not pass; empty where it does."""
    found = []
    if c.spilled_bytes:
        found.append(f"{c.spilled_bytes} bytes spilled")
    if c.shared_bytes > SHARED_LIMIT[c.target]:
        found.append(f"{c.shared_bytes} bytes of shared memory, {SHARED_LIMIT[c.target]} are there")
    if c.wide_load_bytes < c.needed_load_bytes:
        found.append(f"{c.wide_load_bytes} of {c.needed_load_bytes} bytes a thread loaded 16 at a time")
    return [f"{c.kernel} {c.dtype} {c.target}: {fault}" for fault in found]


def _compile(x: Variant, target: GPUTarget) -> tuple[Any, Any]:
    file = kept_kernels if x.again else row_kernels if x.listed is None else part_kernels
    function = getattr(many_kernels if x.directions else file, x.kernel)
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("the gate compiles: run it without TRITON_INTERPRET")
    data, wide = "*" + NAMES[x.dtype], "*" + NAMES[rows.compute_dtype(x.dtype)]
    constants: dict[str, Any] = {f"{t}_column": 1 for t in ("z", "kept", "u", "v", "out")}
    constants |= {"LISTED": x.listed}
    constants |= {"N": x.tangents, "BLOCK": x.width, "TILES": triton.next_power_of_2(triton.cdiv(V, 2048))}
    constants |= {
        "DIRECTIONS": x.directions,
        "SHIFT": rows.KEY_SHIFT.get(x.dtype),
        "PTX": target.backend == "cuda",
    }
    constants |= {"CHUNK": rows.chunk(x.width, x.dtype.itemsize, x.warps * target.warp_size)}
    types = dict.fromkeys(("z", "u", "v", "out"), data) | {"y": "*i64", "S": "i32", "V": "i32"}
    types |= {"k": "*i64", "p": "*fp64", "moments": "*fp64"}
    types |= {"kept": "*u8" if x.listed else wide, "some": "*i32", "R": "i32"}
    types |= dict.fromkeys(("v_direction", "moments_direction"), "i64")
    types |= {f"{t}_row": "i32" for t in ("z", "kept", "u", "v", "out", "state", "dstate")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, wide) for name in function.arg_names
    }
    divisible = {
        (i,): [["tt.divisibility", ALIGNMENT]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in ("S", "state_row", "dstate", "dstate_row")
    }
    values = {(i,): constants[name] for i, name in enumerate(signature) if name in constants}
    source = ASTSource(function, signature, values, divisible)
    kernel = triton.compile(source, target=target, options={"num_warps": x.warps})
    return kernel.asm["cubin" if target.backend == "cuda" else "amdgcn"], kernel.metadata


def _read_nvidia(cubin: bytes) -> tuple[int, int, int, collections.Counter[str], int]:
    """Registers, bytes of stack (nothing else uses it), shared memory, operations and bytes of wide loads, one thread's."""
    usage = _disassembled(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, shared, local = map(int, found.groups())
    operations = collections.Counter(name for _, _, name, _ in _listing(cubin))
    assert operations["EXIT"], operations
    loads = [re.search(r"\.(128|256)\b", name) for name in operations.elements() if name.startswith("LDG")]
    return registers, stack + local, shared, operations, sum(int(m.group(1)) // 8 for m in loads if m)


def _disassembled(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _listing(cubin: bytes) -> list[tuple[int, str, str, str]]:
    """(address, predicate, operation, operands) of every instruction."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*)", re.MULTILINE)
    found = line.findall(_disassembled(cubin, "--dump-sass"))
    return [(int(at, 16), *rest) for at, *rest in found if rest[1] != "NOP"]


def _straight_way(cubin: bytes) -> collections.Counter[str]:
    """The operations left when every branch that leads onward is taken; one that leads back is a loop's, counted once."""
    operations: collections.Counter[str] = collections.Counter()
    onward = 0
    for at, predicate, name, operands in _listing(cubin):
        if at < onward:
            continue
        operations[name] += 1
        to = re.search(r"\b0x([0-9a-f]+)", operands)
        if predicate and name.startswith("BRA") and to is not None:
            onward = int(to.group(1), 16)
    return operations


def _read_amd(code: str) -> tuple[int, int, int, collections.Counter[str], int]:
    """The same from the assembler's text; operations are not counted."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        assert found is not None, name
        return int(found.group(1))

    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")) + field(
        "private_segment_fixed_size"
    )
    wide = 16 * len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code))
    return field("vgpr_count"), spilled, field("group_segment_fixed_size"), collections.Counter(), wide


# What a call of `ops.rows` launches for each element; the merge is 1/8192 to 1/2048 of it.
FUNCTIONS = {
    "values": ["tile_moments N=0"],
    "tangents": ["tile_moments N=1"],
    "4 tangents at once": ["tile_many_tangents K=4"],
    "second tangents": ["tile_moments N=2"],
    "gradient, state handed in": ["write_cotangents"],
    "gradient alone": ["tile_moments N=0", "write_cotangents"],
    "tangent of the gradient, state handed in": ["write_cotangent_tangents"],
    "tangent of the gradient": ["tile_moments N=1", "write_cotangent_tangents"],
    "kept set and tail: values": ["tile_part_moments N=0, threshold"],
    "kept set and tail: gradient, state handed in": ["write_part_cotangents, threshold"],
    "kept set and tail: tangent of the gradient": [
        "tile_part_moments N=1, threshold",
        "write_part_cotangent_tangents, threshold",
    ],
}


def roofline(table: Sequence[Compiled], gpu: str, function: str, dtype: str) -> dict[str, float]:
    """Milliseconds for [R, V] that bytes, special functions and instructions take, and their largest, summed over launches."""
    target, multiprocessors, ghz, gb_per_s = GPUS[gpu]
    out = {"bytes_ms": 0.0, "special_ms": 0.0, "instructions_ms": 0.0, "predicted_ms": 0.0}
    clocks_per_ms = multiprocessors * ghz * 1e6
    for kernel in FUNCTIONS[function]:
        (c,) = (c for c in table if (c.kernel, c.dtype, c.target) == (kernel, dtype, target))
        assert c.bytes_per_element and c.special_per_element is not None and c.instructions_per_element
        times = {
            "bytes_ms": R * V * c.bytes_per_element / (gb_per_s * 1e6),
            "special_ms": R * V * c.special_per_element / (SPECIAL_PER_CLOCK * clocks_per_ms),
            "instructions_ms": R * V * c.instructions_per_element / (ISSUED_PER_CLOCK * clocks_per_ms),
        }
        for name, ms in times.items():
            out[name] += ms
        out["predicted_ms"] += max(times.values())
    return out


def markdown(result: dict[str, Any]) -> list[str]:
    lines = [
        f"# Triton kernels ahead of time, Triton {result['triton']}",
        "",
        f"Commit {result['commit']}. {len(result['kernels'])} compilations for {', '.join(TARGETS)}, {len(result['faults'])} faults. "
        "Per element: bytes moved, special functions (MUFU), instructions of a tile that is neither peaked nor holds the target, and "
        "with those branches. "
        "Nothing here is measured.",
        *(f"- {fault}" for fault in result["faults"]),
    ]
    for target in TARGETS:
        lines += ["", f"## {target}", ""]
        lines += [
            "| kernel | dtype | columns, warps | registers | spilled | shared | programs per SM | bytes | special | instructions "
            "| with branches |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for c in result["kernels"]:
            if c["target"] != target:
                continue
            figures = [c["programs_per_multiprocessor"], c["bytes_per_element"]]
            figures += [c["special_per_element"], c["instructions_per_element"]]
            figures += [c["with_rare_branches_per_element"]]
            shown = " | ".join("–" if x is None else f"{x:.3g}" for x in figures)
            lines += [
                f"| {c['kernel']} | {c['dtype']} | {c['width'] or '–'}, {c['warps']} | {c['registers']} | {c['spilled_bytes']} B "
                f"| {c['shared_bytes']} B | {shown} |"
            ]
    lines += ["", f"## Paper roofline, [{R}, {V}], ms", ""]
    lines += [
        "From data sheets: "
        + "; ".join(f"{g}: {m} × {f} GHz, {b} GB/s" for g, (_, m, f, b) in GPUS.items())
        + "."
    ]
    lines += [
        "",
        "| function | dtype | GPU | bytes | special | instructions | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rooflines"]:
        times = " | ".join(
            f"{row[k]:.2f}" for k in ("bytes_ms", "special_ms", "instructions_ms", "predicted_ms")
        )
        lines += [f"| {row['function']} | {row['dtype']} | {row['gpu']} | {times} |"]
    return lines


def run(_repeats: int = 0) -> None:
    """Compile all, write the table, and end with an error where a kernel does not pass."""
    table = [compiled(x, target) for target in TARGETS for x in variants()]
    found = [fault for c in table for fault in faults(c)]
    result = {
        "triton": triton.__version__,
        "commit": timing.environment("cpu")["commit"],
        "faults": found,
        "kernels": [asdict(c) for c in table],
        "rooflines": [
            {"function": f, "dtype": dtype, "gpu": gpu, **roofline(table, gpu, f, dtype)}
            for dtype in ("bf16", "fp32")
            for gpu in GPUS
            for f in FUNCTIONS
        ],
    }
    timing.save(f"gate_triton_{triton.__version__}", result, markdown(result))
    found += gate_cuda.run()
    if found:
        raise SystemExit("\n".join(found))
