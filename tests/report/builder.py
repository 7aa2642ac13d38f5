"""A made-up result: h(η) = h + aη + bη² + cη³ with invented errors, enough to fill every part of a report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from entropy_kernels.report import Result
from entropy_kernels.stats import Estimate

RATE = 5e-5
FIRST, SECOND, THIRD = -24.2, 8.0e4, -2.0e8
FLOOR = 3e-8
ETAS = tuple(float(eta) for eta in np.geomspace(1e-8, 5e-4, 9)) + (RATE,)
WORDS = [
    "the",
    " sum",
    " of",
    " 3",
    " and",
    " 4",
    " is",
    " 7",
    "\n",
    " so",
    " <script>alert('x')</script>",
    " &amp;",
    "▁answer",
    "Ġ12",
]


def estimate(value: float, stderr: float, unit: str = "nats/token") -> Estimate:
    return Estimate(value=value, stderr=stderr, n=64, unit=unit, method="made up for a test")


def change(eta: float, sign: float = 1.0) -> dict[str, Any]:
    truth = sign * (FIRST * eta + SECOND * eta**2 / 2 + THIRD * eta**3 / 6)
    linear, quadratic = sign * FIRST * eta, sign * (FIRST * eta + SECOND * eta**2 / 2)
    relative = 0.05
    return {
        "eta": eta,
        "true_direct": estimate(truth + 0.7 * FLOOR * math.sin(1e9 * eta), relative * abs(truth) + FLOOR),
        "true_integrated": estimate(truth, relative * abs(truth)),
        "integration_error": 2e-6 * abs(truth),
        "linear": estimate(linear, relative * abs(linear)),
        "quadratic": estimate(quadratic, relative * abs(quadratic)),
        "z_linear": (truth - linear) / (0.2 * abs(truth - linear)),
        "ess_tokens": 4000.0 / (1 + (eta / 4e-4) ** 2),
        "ess_sequences": 128.0 / (1 + (eta / 4e-4) ** 2),
        "rounding": 1e-9 / eta,
    }


def tables(seed: int = 0) -> dict[str, pa.Table]:
    rng = np.random.default_rng(seed)
    prompts, group, length = 64, 2, 32
    count = prompts * group
    group_index = np.repeat(np.arange(prompts), group)
    rollouts = pa.table(
        {
            "prompt_id": [f"sum-{index}" for index in group_index],
            "prompt": [f"What is {index} + {index % 7}? <b>Answer</b> in digits." for index in group_index],
            "completion": ["It is 7."] * count,
            "finish_reason": ["stop"] * count,
            "group_index": pa.array(group_index, pa.int32()),
            "sample_index": pa.array(np.tile(np.arange(group), prompts), pa.int32()),
            "prompt_ids": pa.array([[1, 2, 3]] * count, pa.list_(pa.int32())),
            "completion_ids": pa.array([[4, 5]] * count, pa.list_(pa.int32())),
            "reward": pa.array(rng.integers(0, 2, count), pa.float32()),
            "advantage": pa.array(rng.normal(size=count), pa.float32()),
        }
    ).replace_schema_metadata({"origin": "builder"})
    tokens = count * length
    contribution = rng.standard_t(2.5, tokens) - 0.12
    contribution *= FIRST / contribution.sum()
    token_id = rng.integers(0, len(WORDS), tokens)
    token_id[np.argmax(np.abs(contribution))] = WORDS.index(" <script>alert('x')</script>")
    entropy = rng.gamma(0.7, 0.9, tokens)
    token_table = pa.table(
        {
            "sequence": pa.array(np.repeat(np.arange(count), length), pa.int32()),
            "position": pa.array(np.tile(np.arange(length), count), pa.int32()),
            "token_id": pa.array(token_id, pa.int32()),
            "token": [WORDS[index] for index in token_id],
            "logprob": pa.array(-entropy, pa.float32()),
            "entropy": pa.array(entropy, pa.float32()),
            "d_logprob": pa.array(rng.normal(size=tokens) * 30, pa.float32()),
            "d_entropy": pa.array(rng.normal(size=tokens) * 90, pa.float32()),
            "contribution": contribution,
        }
    )
    return {
        "rollouts_u": rollouts,
        "rollouts_e": rollouts,
        "tokens_u": token_table.drop_columns("contribution"),
        "tokens_e": token_table,
    }


def result(sign: float = 1.0) -> Result:
    per_eta = "nats/token per unit eta"
    report = {
        "schema_version": 1,
        "config": {
            "model": "demo",
            "ckpt": "demo/checkpoint-60",
            "learning_rate": RATE,
            "adapter": None,
            "max_grad_norm": 1.0,
            "seed": 0,
        },
        "environment": {
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "device": "cpu",
            "dtype": "float32",
            "backends": ["reference"],
            "git_commit": "0000000",
        },
        "certify": {"passed": True, "jvp_against_gradient": 3e-7},
        "definitions": {
            "entropy": "Entropy of softmax(logits / 1.0) over the whole vocabulary, at every response token "
            "up to and including the first end of sequence; sum over tokens by number of tokens, in nats."
        },
        "entropy": {
            "per_token": estimate(1.2345, 0.0123),
            "per_sequence": estimate(39.5, 0.8, "nats/sequence"),
            "rb_variance_ratio": {
                "position": estimate(0.61, 0.02, "1"),
                "sequence": estimate(0.93, 0.05, "1"),
            },
            "truncated_share": 0.03,
        },
        "rollouts": {
            "u": {
                "prompts": 64,
                "sequences": 512,
                "tokens": 16000,
                "mean_reward": 0.41,
                "degenerate_groups_share": 0.14,
                "truncated_share": 0.02,
            },
            "e": {
                "prompts": 64,
                "sequences": 128,
                "tokens": 4096,
                "mean_reward": 0.4,
                "degenerate_groups_share": 0.5,
                "truncated_share": 0.03,
            },
        },
        "update": {
            "rule": "adamw",
            "norm": 412.0,
            "learning_rate": RATE,
            "clip": 1.0,
            "gradient_norm": 0.71,
            "parts": {"momentum": 380.0, "decay": 1.2, "gradient": 160.0},
        },
        "changes": [change(eta, sign) for eta in sorted(ETAS)],
        "derivatives": {
            "first": estimate(sign * FIRST, 1.2, per_eta),
            "second": estimate(sign * SECOND, 4e3, "nats/token per unit eta^2"),
            "eta_star": {
                "value": 6.05e-4,
                "low": 5.2e-4,
                "high": 7.1e-4,
                "resolved": True,
                "method": "made up",
            },
        },
        "sanity": {
            "z_mean_weight": -0.8,
            "z_mean_score": 3.6,
            "noise_floor": {"eta": 1e-8, "difference": estimate(1e-9, FLOOR)},
            "logprob_mismatch": 2e-6,
        },
        "nodes": [
            {
                "eta": eta,
                "first_derivative": estimate(
                    sign * (FIRST + SECOND * eta + THIRD * eta**2 / 2), 1.2, per_eta
                ),
            }
            for eta in (0.0, 2.9e-5, 1.4e-4, 2.9e-4, 4.3e-4)
        ],
        "timings": {"load": 1.2, "sample": 10.1, "derivatives": 20.5},
    }
    return Result(report=report, tables=tables())
