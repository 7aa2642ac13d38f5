"""Entropy and logprob under top-k and top-p on a GPU, beside sorting, a copy of the logits and the entropy of the full row.

The laws, the six results and the torch code are those of `bench/truncated.py`. `ours` gives six results, as does `torch, all six`; it is
CUDA C++ where that can be built, with Triton beside it, and Triton alone elsewhere: the head of the result says which.
`torch` gives entropy and logprob alone, by torch.topk for top-k and torch.sort for top-p, eager and in torch.compile. No other project has
an entropy under top-k or top-p. Nothing is timed before it agrees with float64 on the first rows and on the last: top-k sets to the last
token, top-p sets but for one token a row, since the GPU's masses are float32's, and our values on the set that was kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import gpu, timing
from bench.rows_gpu import ends
from bench.timing import relative_error, rotating
from bench.truncated import Outputs, all_six, by_torch, gradient_of, in_float64, law_of, on_set, ours
from entropy_kernels import truncated_entropy
from entropy_kernels.functional import entropy_logprob, kept_set
from entropy_kernels.functional import truncated as functional
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import rows, truncated

Case = tuple[int, int, str, torch.dtype, dict[str, float]]
CASES: list[Case] = [
    (8192, 151936, "zipf", torch.bfloat16, {"top_k": 50}),
    (8192, 151936, "zipf", torch.bfloat16, {"top_p": 0.95}),
    (8192, 151936, "zipf", torch.bfloat16, {"top_k": 50, "top_p": 0.95}),
    (8192, 151936, "flat", torch.bfloat16, {"top_p": 0.95}),
    (4096, 151936, "zipf", torch.float32, {"top_k": 50}),
    (4096, 151936, "zipf", torch.float32, {"top_p": 0.95}),
]
DRY_CASES: list[Case] = [
    (6, 700, "zipf", torch.bfloat16, {"top_k": 50}),
    (6, 700, "flat", torch.float32, {"top_k": 50, "top_p": 0.95}),
]
BUFFERS = 3
LIMIT_S = 12.0  # for the rounds of one table; two tables a case
PEER_BOUND = 1e-2
IN_TRITON = "ours, in Triton"
TENSORS = {"values": 1, "value and gradient": 2}  # of rows, read or written at the fewest


def logits(R: int, V: int, law: str, dtype: torch.dtype, device: str) -> Tensor:
    g = torch.Generator(device).manual_seed(0)
    if law == "flat":
        return torch.randn(R, V, generator=g, device=device).mul_(2).to(dtype)
    by_rank = (-1.3 * torch.arange(1, V + 1, device=device).log()).to(dtype)
    by_rank = by_rank[torch.randperm(V, generator=g, device=device)]
    shifts = torch.randint(0, V, (R,), generator=g, device=device)
    columns = torch.arange(V, device=device)
    # every row the same law, begun at another token
    return torch.cat([by_rank[(some[:, None] + columns) % V] for some in shifts.split(256)])


def wrong_tokens(z: Tensor, kept: Tensor, options: dict[str, float]) -> int:
    """How many tokens of the rows at the ends are not in both our set and float64's; most in one row."""
    exact, _ = in_float64(ends(z), ends(z).argmax(-1), options)
    return int((ends(kept) ^ exact).sum(-1).max())


def values_wanted(z: Tensor, y: Tensor, kept: Tensor) -> Outputs:
    one = torch.ones(len(z), dtype=torch.float64, device=z.device)
    return truncated.truncated_values(z.double(), kept, y, one)


def one_case(case: Case, repeats: int, device: str) -> dict[str, Any]:
    R, V, law, dtype, options = case
    z = logits(R, V, law, dtype, device)
    y = z.argmax(-1)
    kept = kept_set(z, **options)  # type: ignore[arg-type]
    off = wrong_tokens(z, kept, options)
    wrong = {"kept set": off} if off > ("top_p" in options) else {}
    spare = torch.empty_like(z)
    buffers = rotating(BUFFERS, z)
    copy = {"copy": lambda: spare.copy_(buffers()[0])}
    want = values_wanted(ends(z), ends(y), ends(kept))
    full = entropy64(ends(z))

    def value_error(name: str, got: Any) -> float:
        if name == "copy":
            return float(not torch.equal(got, z))
        if name == "ours, kept set alone":
            return float((got ^ kept).any())
        if name == "ours, entropy of the full row":
            return relative_error([ends(got)], [full])
        if name == IN_TRITON:  # the set it finds may differ by a token
            kept_there = in_triton(lambda: kept_set(ends(z), **options))  # type: ignore[arg-type]
            return relative_error([ends(x) for x in got], values_wanted(ends(z), ends(y), kept_there))
        return relative_error([ends(x) for x in got], want[: len(got)])

    values: dict[str, Callable[[], Any]] = copy | {
        "ours": lambda: ours(buffers()[0], y, options),
        "ours, kept set alone": lambda: kept_set(buffers()[0], **options),  # type: ignore[arg-type]
        "ours, entropy of the full row": lambda: entropy_logprob(buffers()[0], y).entropy,
        "torch": lambda: by_torch(buffers()[0], y, options),
        "torch, all six": lambda: all_six(buffers()[0], y, options),
    }
    in_compiler = gpu.compiled(by_torch, device)
    values["torch.compile"] = lambda: in_compiler(buffers()[0], y, options)
    if not functional.backend(z.device).startswith("triton"):  # the other way there is on a GPU
        values[IN_TRITON] = lambda: in_triton(lambda: ours(buffers()[0], y, options))
    found = {"values": gpu.contest(values, value_error, value_bound, repeats, device, limit_s=LIMIT_S)}

    exact = gradient_of(lambda x: on_set(x, ends(y), ends(kept)), ends(z).double())()

    def gradient_error(name: str, got: Any) -> float:
        return float(not torch.equal(got, z)) if name == "copy" else relative_error([ends(got)], [exact])

    def of(f: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
        return lambda: gradient_of(f, buffers()[0])()

    gradients: dict[str, Callable[[], Any]] = copy | {
        "ours": of(lambda x: ours(x, y, options)[:2]),
        "ours, set known": of(lambda x: truncated_entropy(x, y, kept=kept)[:2]),
        "torch, set known": of(lambda x: on_set(x, y, kept)),
    }
    found["value and gradient"] = gpu.contest(
        gradients, gradient_error, lambda name: PEER_BOUND, repeats, device, limit_s=LIMIT_S
    )
    for line, contest in found.items():
        gpu.add_bandwidth(
            contest["timings"],
            lambda name, line=line: (2 if name == "copy" else TENSORS[line]) * z.numel() * z.itemsize,  # type: ignore[misc]
        )
    return {
        "rows": R,
        "vocabulary": V,
        "law": law,
        "dtype": str(dtype).removeprefix("torch."),
        "truncation": options,
        "kept": float(kept.sum(-1).double().mean()),
        "tokens_kept_otherwise": off,
        "wrong": wrong,
        "beside_peers": found,
    }


def in_triton(f: Callable[[], Any]) -> Any:
    with rows_from(rows):
        return f()


def value_bound(name: str) -> float:
    return 1e-5 if name.startswith("ours") else PEER_BOUND


def entropy64(z: Tensor) -> Tensor:
    return law_of(z.double().log_softmax(-1))


def markdown(result: dict[str, Any]) -> list[str]:
    lines = timing.conditions("Top-k and top-p", result["environment"])
    for case in result["shapes"]:
        options = ", ".join(f"{name} = {x:g}" for name, x in case["truncation"].items())
        lines += [
            "",
            f"## [{case['rows']}, {case['vocabulary']}] {case['dtype']}, {case['law']}, {options}: {case['kept']:.0f} tokens kept",
            "",
            f"Most tokens of a row that float64 decides otherwise: {case['tokens_kept_otherwise']}.",
        ]
        for line, found in case["beside_peers"].items():
            lines += gpu.table(line, found)
    return lines


def run(repeats: int, choice: str = "cuda") -> None:
    device = gpu.device_of(choice)
    environment = timing.environment(device)
    with rows_from(rows) if choice == "interpreter" else contextlib.nullcontext():
        environment["backend"] = functional.backend(torch.device(device))
        cases = CASES if choice == "cuda" else DRY_CASES
        gpu.run_all(
            "truncated", environment, cases, lambda case: one_case(case, repeats, device), markdown, choice
        )
