"""A tiny random model of every family that is supported, each with the features that set it apart switched on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

_SIZES: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.35,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
_MIXED = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2_window": (
        hf.Qwen2Config,
        hf.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 8}),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "gemma2": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        _GEMMA | {"attn_logit_softcapping": 2.0, "layer_types": _MIXED},
    ),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, _GEMMA | {"layer_types": _MIXED}),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, {"n_inner": 24, "resid_pdrop": 0.1, "attn_pdrop": 0.1}),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, {"ffn_dim": 24, "word_embed_proj_dim": 12, "dropout": 0.1}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 4}),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {"sliding_window": 4}),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM, {}),
    "granite": (
        hf.GraniteConfig,
        hf.GraniteForCausalLM,
        {"logits_scaling": 2.0, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    ),
    "cohere": (hf.CohereConfig, hf.CohereForCausalLM, {"logit_scale": 0.25, "use_qk_norm": True}),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, {"rotary_pct": 0.5}),
}


def model(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random model whose rows are far from uniform, with every norm and bias moved off its starting value."""
    torch.manual_seed(seed)
    config, of, options = FAMILIES[family]
    made = of(config(**(_SIZES | options | changes))).to(dtype)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name or ".ln_" in name or p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape).to(dtype))
    return made
