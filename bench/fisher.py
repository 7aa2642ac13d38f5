"""The Fisher kernel of 64 × 64 sequences of 128 tokens, every parameter of a model of SmolLM2-135M's shape, on the CPU.

`forward + backward` is the batched gradient of Σ S over the same sequences, in the same micro-batches. `products` is a product of
matrices as large as the kernel's, 2·N²·p operations in all, timed on a part. `vmap(grad)` makes the gradients of a few sequences at
once, all parameters side by side; its time for all of them is that of one such tile, scaled. Weights are random: times do not depend
on them.

Seconds of the wall and of the processor: on a machine that does other work as well, the latter say more. Peak memory is that of the
process above what the model takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import timing
from entropy_kernels.derivatives import token_gradient
from entropy_kernels.fisher import fisher_cost, fisher_kernel
from entropy_kernels.policy import Policy, TokenBatch

N, L, PROMPT = 64, 128, 16
TILE = 2  # sequences at once by vmap
LAYERS = int(os.environ.get("FISHER_LAYERS", "30"))  # fewer for a quick look; the output layer stays as wide
BUDGET = float(os.environ.get("FISHER_BUDGET_GB", "11")) * 1e9
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "rope_theta": 100000.0, "max_position_embeddings": 8192,
}  # fmt: skip


def make(**changes: Any) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return Policy.from_model(LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))), micro_batch_tokens=512)


def sequences(count: int, length: int, prompt: int, vocabulary: int) -> TokenBatch:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))
    whole = torch.ones(count, length, dtype=torch.bool)
    response = whole.clone()
    response[:, :prompt] = False
    return TokenBatch(ids, whole, response, torch.arange(count) // 8)


def first(batch: TokenBatch, count: int) -> TokenBatch:
    return TokenBatch(*(x[:count] for x in batch))


def by_vmap(policy: Policy, batch: TokenBatch) -> Tensor:
    """The gradients of a few sequences of one length, [n, p]."""
    length = batch.input_ids.shape[1]
    prompt = int((~batch.response_mask[0]).sum())
    positions = torch.arange(prompt - 1, length - 1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]

    def score(params: dict[str, Tensor], ids: Tensor) -> Tensor:
        options = {"attention_mask": causal, "position_ids": torch.arange(length)[None], "use_cache": False}
        logits = torch.func.functional_call(
            policy.model, params, (ids[None],), options, tie_weights=True
        ).logits
        return logits[0, positions].log_softmax(-1).gather(-1, ids[positions + 1, None]).sum()

    gradients = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))(policy.params, batch.input_ids)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def resident(field: str) -> int:
    line = next(x for x in open("/proc/self/status", encoding="ascii") if x.startswith(field))
    return int(line.split()[1]) * 1024


def timed(f: Callable[[], Any]) -> dict[str, float]:
    """One call: seconds of wall and processor, peak bytes above what was there before."""
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_gb": (resident("VmHWM") - before) / 1e9,
    }


def scaled(t: dict[str, float], factor: float) -> dict[str, float]:
    return {"wall_s": t["wall_s"] * factor, "cpu_s": t["cpu_s"] * factor, "peak_gb": t["peak_gb"]}


def run(_repeats: int) -> None:
    policy, batch = make(), sequences(N, L, PROMPT, SHAPE["vocab_size"])
    p = sum(x.numel() for x in policy.params.values())
    weight = batch.response_mask.float()
    few = first(batch, TILE)
    exact = fisher_kernel(policy, few, method="reference")
    size = exact.diag().sqrt()
    errors = {
        "ours": float(((fisher_kernel(policy, few) - exact).abs() / (size[:, None] * size)).max()),
    }
    G = by_vmap(policy, few)
    product: Any = sum(g @ g.t() for g in (x.double() for x in G.split(1 << 20, 1)))
    errors["vmap(grad)"] = float(((product - exact).abs() / (size[:, None] * size)).max())
    del G
    assert all(e < 1e-4 for e in errors.values()), errors
    plan = fisher_cost(policy, batch, memory_budget=BUDGET)
    part = 1 << 20
    block = torch.randn(N, part)
    products = scaled(timed(lambda: [block @ block.t() for _ in range(8)]), p / (8 * part))
    times: dict[str, dict[str, float]] = {}
    step = lambda: token_gradient(policy, batch, logprob_weight=weight)  # noqa: E731
    times["forward + backward"] = timed(step)
    times["ours"] = timed(lambda: fisher_kernel(policy, batch, memory_budget=BUDGET))
    again = timed(step)
    base = times["forward + backward"]
    for key in ("wall_s", "cpu_s"):
        base[key] = (base[key] + again[key]) / 2
    times["products"] = products
    times["vmap(grad), gradients alone"] = scaled(timed(lambda: by_vmap(policy, few)), N / TILE)
    ratio = {key: (times["ours"][key] - times["products"][key]) / base[key] for key in ("wall_s", "cpu_s")}
    result = {
        "environment": timing.environment("cpu"),
        "layers": LAYERS, "sequences": N, "tokens": L, "parameters": p, "budget_gb": BUDGET / 1e9, "passes": plan.passes,
        "flops": plan.flops, "ghost": [x.name for g in plan.groups for x in g if x.ghost],
        "planned_peak_gb": plan.peak_bytes["layers"] / 1e9, "errors": errors, "times": times,
        "without_products_over_forward_backward": ratio,
    }  # fmt: skip
    timing.save("fisher_cpu" if LAYERS == 30 else f"fisher_cpu_{LAYERS}_layers", result, markdown(result))


def markdown(result: dict[str, Any]) -> list[str]:
    lines = timing.conditions("The Fisher kernel", result["environment"])
    lines[-1] = lines[-1].replace("Median of the rounds, quartiles in brackets.", "One run of each.")
    lines += [
        "",
        f"{result['sequences']} × {result['sequences']} sequences of {result['tokens']} tokens, {result['layers']} layers, "
        f"{result['parameters']:,} "
        f"parameters, float32, budget {result['budget_gb']:g} GB: {result['passes']} pass(es), planned peak "
        f"{result['planned_peak_gb']:.1f} GB. Largest error of a cosine against float64: "
        + ", ".join(f"{k} {v:.0e}" for k, v in result["errors"].items())
        + ".",
        "",
        "| | s of wall | s of processor | peak GB above the model |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {t['wall_s']:.0f} | {t['cpu_s']:.0f} | {t['peak_gb']:.1f} |"
        for name, t in result["times"].items()
    ]
    ratio = result["without_products_over_forward_backward"]
    lines += [
        "",
        f"Ours without its products takes {ratio['cpu_s']:.2f} times forward + backward (processor; wall {ratio['wall_s']:.2f}). "
        f"vmap(grad) was timed on {TILE} sequences and scaled; all {result['sequences']} gradients at once would take "
        f"{result['sequences'] * result['parameters'] * 4 / 1e9:.0f} GB.",
    ]
    return lines
