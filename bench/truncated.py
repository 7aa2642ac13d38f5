"""Entropy and logprob under top-k and top-p on the CPU, beside sorting, a read of the logits and the entropy of the full row.

Rows of two kinds: `zipf`, where the token of rank r has probability ∝ r^(−1.3), as of a language model in the middle of a sentence;
and `flat`, normal logits of deviation 2, where top-p keeps a third of the vocabulary, which is the hardest there is. `ours` gives the
six results of truncated_entropy, `ours, kept law` three of them (tail=False). `torch` gives two, entropy and logprob, by torch.topk
for top-k and by torch.sort for top-p; `torch, all six` sorts and gives what ours gives; `torch.topk, all six` gives the same from
torch.topk, one copy of the logits without the kept ones, and sums over either. Gradients are of entropy + logprob, with the set known
or (`ours`, `ours, kept law`, and `torch.topk`, through whose own gradient it goes) searched each time. Nothing is timed before kept
sets are those of float64 to the last token and values agree with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import timing
from bench.timing import measure, relative_error
from entropy_kernels import truncated_entropy
from entropy_kernels.functional import entropy_logprob, kept_set
from entropy_kernels.ops import truncated
from entropy_kernels.ops.reference import compute_dtype

V = 151936
ROWS = 16
Case = tuple[str, torch.dtype, dict[str, float]]
CASES: list[Case] = [
    ("zipf", torch.float32, {"top_k": 50}),
    ("zipf", torch.float32, {"top_p": 0.95}),
    ("zipf", torch.float32, {"top_k": 50, "top_p": 0.95}),
    ("flat", torch.float32, {"top_p": 0.95}),
    ("zipf", torch.bfloat16, {"top_k": 50}),
    ("zipf", torch.bfloat16, {"top_p": 0.95}),
]
Outputs = tuple[Tensor, ...]


def logits(law: str, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(0)
    if law == "flat":
        return (torch.randn(ROWS, V, generator=g) * 2).to(dtype)
    by_rank = -1.3 * torch.arange(1, V + 1).log()
    return torch.stack([by_rank[torch.randperm(V, generator=g)] for _ in range(ROWS)]).to(dtype)


def ours(z: Tensor, y: Tensor, options: dict[str, float]) -> Outputs:
    return tuple(x for x in truncated_entropy(z, y, **options) if x is not None)  # type: ignore[arg-type]


def kept_law(z: Tensor, y: Tensor, options: dict[str, float]) -> Outputs:
    return truncated_entropy(z, y, **options, tail=False)[:2]  # type: ignore[arg-type,return-value]


def law_of(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def by_torch(z: Tensor, y: Tensor, options: dict[str, float]) -> Outputs:
    """Entropy and logprob from the kept logits alone, as far as torch.topk or torch.sort gives them."""
    z = z.float()
    if "top_k" in options:
        best = z.topk(int(options["top_k"])).values
    else:
        best = z.sort(-1, descending=True).values
    if "top_p" in options:
        p = best.softmax(-1)
        best = best.masked_fill(p.cumsum(-1) - p >= options["top_p"], -torch.inf)
    z_y = z.gather(-1, y[:, None])[:, 0]
    last = best.masked_fill(best == -torch.inf, torch.inf).amin(-1)
    return law_of(best.log_softmax(-1)), torch.where(z_y >= last, z_y - best.logsumexp(-1), -torch.inf)


def all_six(z: Tensor, y: Tensor, options: dict[str, float]) -> Outputs:
    z = z.float()
    best, order = z.sort(-1, descending=True)
    kept = torch.ones_like(best, dtype=torch.bool)
    if "top_k" in options:
        kept[:, int(options["top_k"]) :] = False
    if "top_p" in options:
        p = best.masked_fill(~kept, -torch.inf).softmax(-1)
        kept &= p.cumsum(-1) - p < options["top_p"]
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    inside = z.masked_fill(~kept, -torch.inf).log_softmax(-1)
    full = z.log_softmax(-1)
    return (
        law_of(inside),
        inside.gather(-1, y[:, None])[:, 0],
        (full.exp() * kept).sum(-1),
        kept.sum(-1),
        law_of(z.masked_fill(kept, -torch.inf).log_softmax(-1)),
        law_of(full),
    )


def all_six_by_topk(z: Tensor, y: Tensor, options: dict[str, float]) -> Outputs:
    """Only the k largest are looked at twice: sums of e^(z − peak) and of its product with z − peak over them and over the others."""
    z = z.float()
    best, order = z.topk(int(options["top_k"]))
    peak = best[:, :1]
    inside = best
    if "top_p" in options:
        p = best.softmax(-1)
        inside = best.masked_fill(p.cumsum(-1) - p >= options["top_p"], -torch.inf)
    tail = z.scatter(-1, order, best.masked_fill(inside > -torch.inf, -torch.inf)).sub_(peak).clamp_(min=-1e4)
    inside = (inside - peak).clamp(min=-1e4)
    e_S, e_T = inside.exp(), tail.exp()
    Z_S, Z_T, A_S, A_T = e_S.sum(-1), e_T.sum(-1), (e_S * inside).sum(-1), e_T.mul_(tail).sum(-1)
    Z, A = Z_S + Z_T, A_S + A_T
    c_y = (z.gather(-1, y[:, None]) - peak)[:, 0]
    last = inside.masked_fill(inside == -1e4, torch.inf).amin(-1)
    logprob = torch.where(c_y >= last, c_y - Z_S.log(), -torch.inf)
    count = (inside > -1e4).sum(-1)
    return Z_S.log() - A_S / Z_S, logprob, Z_S / Z, count, Z_T.log() - A_T / Z_T, Z.log() - A / Z


def in_float64(z: Tensor, y: Tensor, options: dict[str, float]) -> tuple[Tensor, Outputs]:
    one = torch.ones(len(z), dtype=torch.float64, device=z.device)
    k = torch.full((len(z),), int(options.get("top_k", z.shape[-1])), device=z.device)
    kept = truncated.kept_set(z.double(), one, k, one * options.get("top_p", 1.0))
    return kept, truncated.truncated_values(z.double(), kept, y, one)


def gradient_of(f: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor) -> Callable[[], Tensor]:
    """Value and gradient of entropy + logprob, anew each time."""

    def call() -> Tensor:
        x = z.detach().requires_grad_()
        entropy, logprob = f(x)
        return torch.autograd.grad((entropy + logprob).sum(), x)[0]

    return call


def on_set(x: Tensor, y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    log_p = x.to(compute_dtype(x.dtype)).masked_fill(~kept, -torch.inf).log_softmax(-1)
    return law_of(log_p), log_p.gather(-1, y[:, None])[:, 0]


def one_case(case: Case, repeats: int) -> dict[str, object]:
    law, dtype, options = case
    z = logits(law, dtype)
    y = z.argmax(-1)
    kept, want = in_float64(z[:4], y[:4], options)
    assert torch.equal(kept_set(z[:4], **options), kept)  # type: ignore[arg-type]
    errors = {"ours": relative_error(ours(z[:4], y[:4], options), want)}
    errors["ours, kept law"] = relative_error(kept_law(z[:4], y[:4], options), want[:2])
    assert max(errors.values()) <= 1e-5, errors
    values: dict[str, Callable[[], object]] = {
        "read": lambda: z.sum(),
        "ours": lambda: ours(z, y, options),
        "ours, kept law": lambda: kept_law(z, y, options),
        "full entropy, ours": lambda: entropy_logprob(z, y),
        "kept set alone, ours": lambda: kept_set(z, **options),  # type: ignore[arg-type]
    }
    timings = {"values": measure(values, repeats)}
    few = max(2, repeats // 3)
    peers = {"torch": by_torch, "torch, all six": all_six}
    if "top_k" in options:
        peers["torch.topk, all six"] = all_six_by_topk
    for name, f in peers.items():
        got = f(z[:4], y[:4], options)
        errors[name] = relative_error(got, want[: len(got)])
        if errors[name] > 1e-2:
            print(f"{name}: relative error {errors[name]:.1e}, not timed")
            continue
        rounds = repeats if name.startswith("torch.topk") or (name == "torch" and "top_k" in options) else few
        timings["values"] |= measure({name: lambda f=f: f(z, y, options)}, rounds)  # type: ignore[misc]
    whole = kept_set(z, **options)  # type: ignore[arg-type]
    gradients: dict[str, Callable[[], Tensor]] = {
        "read + write": lambda: z.clone(),
        "ours": gradient_of(lambda x: ours(x, y, options)[:2], z),  # type: ignore[arg-type,return-value]
        "ours, kept law": gradient_of(lambda x: kept_law(x, y, options), z),  # type: ignore[arg-type,return-value]
        "ours, set known": gradient_of(lambda x: truncated_entropy(x, y, kept=whole)[:2], z),  # type: ignore[arg-type,return-value]
        "torch, set known": gradient_of(lambda x: on_set(x, y, whole), z),
    }
    if "top_k" in options:
        gradients["torch.topk"] = gradient_of(lambda x: by_torch(x, y, options)[:2], z)  # type: ignore[arg-type,return-value]
    exact = gradient_of(lambda x: on_set(x, y[:4], whole[:4]), z[:4].double())()
    errors["ours, gradient"] = relative_error([gradients["ours"]()[:4]], [exact])
    for name in ("ours, kept law", "ours, set known"):
        errors[f"{name}, gradient"] = relative_error([gradients[name]()[:4]], [exact])
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert max(x for name, x in errors.items() if name.startswith("ours")) <= bound, errors
    timings["value and gradient"] = measure(gradients, few)
    return {
        "law": law,
        "dtype": str(dtype).removeprefix("torch."),
        "truncation": options,
        "kept": float(kept.sum(-1).double().mean()),
        "errors": errors,
        "timings": timings,
    }


def markdown(result: dict) -> list[str]:
    lines = timing.conditions(f"Top-k and top-p, [{ROWS}, {V}]", result["environment"])
    for case in result["cases"]:
        options = ", ".join(f"{name} = {x:g}" for name, x in case["truncation"].items())
        lines += ["", f"## {case['law']}, {case['dtype']}, {options}: {case['kept']:.0f} tokens kept", ""]
        lines += [
            "Largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in case["errors"].items())
        ]
        for name, timings in case["timings"].items():
            lines += timing.table(name, timings)
    return lines


def run(repeats: int) -> None:
    environment = timing.environment("cpu")
    result = {"environment": environment, "cases": [one_case(case, repeats) for case in CASES]}
    timing.save("truncated_cpu", result, markdown(result))
