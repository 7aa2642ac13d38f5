"""The diagonal K(t, t) against the number of parameters and against the rank of an adapter, P = 1.

Sizes: random Llamas of four layers, three widths, one vocabulary and one initial spread of weights; responses of 16 tokens that such a
model, being nearly uniform, would draw. Ranks: new LoRA adapters (B = 0) on the demo's trained model, on its recorded update batch;
the factor on BA is held fixed (alpha = 2r), or falls as 1/r (alpha = 8). Medians with errors from drawing prompts again.

At B = 0 only B has a gradient, Σ_k factor·∂S/∂y_k ⊗ A x_k, and E‖A x‖² is proportional to r: K ∝ r with the factor fixed, ∝ 1/r without.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from bench import timing
from entropy_kernels import demo, stats
from entropy_kernels.fisher import fisher_kernel
from entropy_kernels.policy import Policy, TokenBatch
from entropy_kernels.rl.rollouts import Rollouts

WIDTHS, RANKS, VOCABULARY = (64, 128, 256), (4, 16), 256
PROMPTS, GROUP = 16, 4


def diagonal(policy: Policy, batch: TokenBatch) -> dict[str, Any]:
    K = fisher_kernel(policy, batch).double().numpy()
    found = stats.block_distributions(K, batch.prompt_index.numpy(), unit="nats² per squared unit of θ")
    median = found["diagonal"]["raw"].quantiles["0.5"]
    cross = found["cross_prompt"]["cosine"].quantiles
    return {
        "parameters": sum(p.numel() for p in policy.params.values()),
        "median": median.value, "stderr": median.stderr,
        "cosine_between_prompts_5_95": [cross["0.05"].value, cross["0.95"].value],
    }  # fmt: skip


def of_width(width: int) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, tie_word_embeddings=True, initializer_range=0.02,
    )  # fmt: skip
    return Policy.from_model(LlamaForCausalLM(config))


def of_rank(rank: int, alpha: int) -> Policy:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo.checkpoint_dir(), dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return Policy.from_model(get_peft_model(model, LoraConfig(**options)))


def uniform_batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, VOCABULARY, (PROMPTS, 8), generator=generator).repeat_interleave(GROUP, 0)
    responses = torch.randint(0, VOCABULARY, (PROMPTS * GROUP, 16), generator=generator)
    ids = torch.cat([prompts, responses], 1)
    whole = torch.ones_like(ids, dtype=torch.bool)
    response = whole.clone()
    response[:, :8] = False
    return TokenBatch(ids, whole, response, torch.arange(PROMPTS).repeat_interleave(GROUP))


def demo_batch() -> TokenBatch:
    recorded = Rollouts.load(str(demo.next_dir() / "recorded" / "rollouts_u.parquet"))
    batch = TokenBatch(**recorded.token_batch(0))
    return TokenBatch(*(x[: PROMPTS * GROUP * 2] for x in batch))


def exponent(rows: list[dict[str, Any]], x: str) -> float:
    """Slope between the first and the last in logarithms."""
    a, b = rows[0], rows[-1]
    return math.log(b["median"] / a["median"]) / math.log(b[x] / a[x])


def run(_repeats: int) -> None:
    batch = uniform_batch()
    sizes = [{"width": width, **diagonal(of_width(width), batch)} for width in WIDTHS]
    batch = demo_batch()
    ranks = {
        "alpha = 2r": [{"rank": r, **diagonal(of_rank(r, 2 * r), batch)} for r in RANKS],
        "alpha = 8": [{"rank": r, **diagonal(of_rank(r, 8), batch)} for r in RANKS],
    }
    full = diagonal(Policy.from_pretrained(str(demo.checkpoint_dir())), batch)
    result = {
        "environment": timing.environment("cpu"), "sizes": sizes, "ranks": ranks, "demo, all parameters": full,
        "exponents": {"parameters": exponent(sizes, "parameters"), **{name: exponent(rows, "rank") for name, rows in ranks.items()}},
    }  # fmt: skip
    timing.save("fisher_size", result, markdown(result))


def markdown(result: dict[str, Any]) -> list[str]:
    e = result["environment"]
    lines = [
        "# The diagonal of the Fisher kernel against size",
        "",
        f"torch {e['torch']}, commit {e['commit']}, float32, P = 1.",
    ]
    lines += [
        "",
        "| | parameters | median K(t, t) | cosines between prompts, 5 % to 95 % |",
        "|---|---|---|---|",
    ]
    rows = [(f"width {x['width']}", x) for x in result["sizes"]] + [
        ("demo, all parameters", result["demo, all parameters"])
    ]
    rows += [
        (f"demo, LoRA rank {x['rank']}, {name}", x) for name, many in result["ranks"].items() for x in many
    ]
    for name, x in rows:
        low, high = x["cosine_between_prompts_5_95"]
        lines.append(
            f"| {name} | {x['parameters']:,} | {x['median']:.4g} ± {x['stderr']:.2g} | {low:.3f} to {high:.3f} |"
        )
    found = ", ".join(f"{name}: {value:.2f}" for name, value in result["exponents"].items())
    return [*lines, "", f"Exponents between the first and the last: {found}."]
