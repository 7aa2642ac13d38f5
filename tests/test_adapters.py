"""LoRA adapters from PEFT directories: every number from the file, measured as the parameters they are, or refused by name."""

from __future__ import annotations

import copy
import json
import sys

import families
import pytest
import tiny
import torch
from characters import character_llama, character_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from entropy_kernels.certify import certify
from entropy_kernels.checkpoints import adapter_parameters, load_model
from entropy_kernels.derivatives import (
    entropy_gradient,
    token_curvature,
    token_gradient,
    token_stats,
    token_tangents,
)
from entropy_kernels.errors import UserError
from entropy_kernels.policy import Policy

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "out_proj", "fc1", "fc2"],
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, noise=0.3, **options):
    """A PeftModel whose adapter is far from where it starts: B starts at zero."""
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    made = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn(p.shape).to(p.dtype))
    return made


@pytest.fixture
def disk(tmp_path):
    """(base directory, adapter directory, the PeftModel that was saved), the base in bfloat16."""
    base = character_llama(attention_bias=True)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(p.bfloat16())
    copy.deepcopy(base).bfloat16().save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    made = adapted(base, noise=0.05)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", made


IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["v_proj", "lm_head"]},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": True, "layers_to_transform": [1], "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_adapter_read_is_the_one_that_was_saved(tmp_path, options):
    base = character_llama(attention_bias=True)
    copy.deepcopy(base).save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    made = adapted(base, noise=0.05, **options).eval()
    made.save_pretrained(tmp_path / "adapter")
    policy = Policy.from_pretrained(
        str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), temperature=0.9
    )
    assert certify(policy).first < 1e-4
    trained = [n.removeprefix("base_model.model.") for n, p in made.named_parameters() if p.requires_grad]
    named = dict(made.named_parameters())
    assert list(policy.params) == trained == adapter_parameters(policy.model)
    assert all(torch.equal(p, named["base_model.model." + name]) for name, p in policy.params.items())
    for model in (policy.model, made.get_base_model()):
        model.set_attn_implementation("eager")
    assert torch.equal(logits(policy.model), logits(made))
    lora = Policy.from_model(made, parameters="lora").params
    assert set(lora) == {name for name in trained if "lora_" in name}


def test_base_in_bfloat16_found_by_the_adapter_or_given(disk):
    base, adapter, made = disk
    for options in ({}, {"base": str(base)}):
        policy = Policy.from_pretrained(str(adapter), dtype="float64", **options)
        assert {p.dtype for p in policy.model.parameters()} == {torch.float64}
        for name, p in made.get_base_model().named_parameters():
            assert torch.equal(dict(policy.model.named_parameters())[name], p.double())
    named = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(named | {"base_model_name_or_path": "owner/name"})
    )
    with pytest.raises(UserError, match="'owner/name', which is not a directory.*--model"):
        Policy.from_pretrained(str(adapter))
    assert Policy.from_pretrained(str(base), adapter=str(adapter)).params
    with pytest.raises(UserError, match="no adapter_config.json"):
        Policy.from_pretrained(str(base), adapter=str(base))


def test_tokenizer_and_end_of_response_of_an_adapter(disk, tmp_path):
    base, adapter, _ = disk
    own = character_tokenizer()
    own.add_tokens(["<new>"])
    own.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    model, tokenizer = load_model(adapter)
    assert len(tokenizer) == 63 and model.generation_config.eos_token_id == [1, 5]
    other = character_tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(base)
    with pytest.raises(UserError, match="Pass the base model it was trained on"):
        load_model(adapter, base=base)


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(adapter, what):
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    if what == "missing key":
        del tensors[first]
    elif what == "unused key":
        tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = tensors[first].clone()
    elif what == "shape":
        tensors[first] = torch.zeros(3, 5)
    elif what == "nan":
        tensors[first][0] = float("nan")
    save_file(tensors, weights)
    if what == "pickled":
        weights.unlink()
        torch.save(tensors, adapter / "adapter_model.bin")
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "rank":
        edit(adapter, r=4)
    elif what == "targets":
        edit(adapter, target_modules=["query"])
    elif what == "json":
        (adapter / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing key", "no values for base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
        ("unused key", "no place for base_model.model.model.layers.7"),
        ("shape", r"shape \(3, 5\) .* needs \(3, 48\)"),
        ("nan", "lora_A.default.weight' holds NaN"),
        ("pickled", "only adapter_model.bin, a pickle"),
        ("cut", "cannot be read"),
        ("rank", r"needs \(4, "),
        ("targets", "cannot be put into this base model"),
        ("json", "cannot be read as JSON"),
    ],
)
def test_adapters_that_cannot_be_trusted_are_refused(disk, what, message):
    _, adapter, _ = disk
    damage(adapter, what)
    with pytest.raises(UserError, match=message):
        Policy.from_pretrained(str(adapter))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True.*norm"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changes the base"),
        ({"peft_type": "PROMPT_TUNING"}, "type PROMPT_TUNING, expected LORA"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS, expected CAUSAL_LM"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": True}, "something_new=True"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(disk, changes, message):
    _, adapter, _ = disk
    edit(adapter, **changes)
    with pytest.raises(UserError, match=message):
        Policy.from_pretrained(str(adapter))


def test_an_adapter_of_another_model_is_refused(disk, tmp_path):
    _, adapter, _ = disk
    for i, (options, message) in enumerate(
        [
            ({"intermediate_size": 40}, "needs"),
            ({"num_hidden_layers": 3}, "no values for"),
            ({"num_hidden_layers": 1}, "no place for"),
        ]
    ):
        character_llama(**options).save_pretrained(tmp_path / str(i))
        character_tokenizer().save_pretrained(tmp_path / str(i))
        with pytest.raises(UserError, match=message):
            Policy.from_pretrained(str(tmp_path / str(i)), adapter=str(adapter))


def test_without_peft_the_extra_is_named(disk, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'entropy_kernels\[lora\]'"):
        Policy.from_pretrained(str(disk[1]))


def test_adapters_in_memory_that_move_nothing_are_refused():
    made = adapted(character_llama())
    made.merge_adapter()
    with pytest.raises(UserError, match="switched off or merged"):
        Policy.from_model(made)
    made.unmerge_adapter()
    made.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="'default', 'second'"):
        Policy.from_model(made)
    with pytest.raises(UserError, match="use_dora"):
        Policy.from_model(adapted(character_llama(), use_dora=True))


def lora_policy(family):
    made = adapted(families.model(family), target_modules=TARGETS.get(family, LINEAR))
    return Policy.from_model(made, temperature=0.8, micro_batch_tokens=24)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt"])
def test_derivatives_of_an_adapter_equal_finite_differences(family):
    policy, batch = lora_policy(family), tiny.batch()
    certify(policy, batch)
    v = tiny.direction(policy)
    c = token_curvature(policy, batch, v)
    step = 5e-6
    moved = {k: token_tangents(policy.shifted(v, k * step), batch, v) for k in (-2, -1, 1, 2)}
    for name in ("entropy", "logprob"):
        for field, want in ((name, f"d_{name}"), (f"d_{name}", f"d2_{name}")):
            at = {k: getattr(x, field) for k, x in moved.items()}
            difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
            exact = getattr(c, want)
            assert exact.abs().max() > 0.1
            assert (difference - exact).abs().max() < 1e-8 * exact.abs().max()
    gradient = entropy_gradient(policy, batch, per="sequence", estimator="path")
    along = sum(float((gradient[name] * v[name]).sum()) for name in v)
    assert along == pytest.approx(float(c.d_entropy.sum()) / 6, rel=1e-10)


def test_an_adapter_is_a_part_of_the_weights():
    """∇_B = s·∇_W Aᵀ and ∇_A = s·Bᵀ∇_W: the adapter's gradient follows from that of the merged weights, which has no adapter."""
    made = adapted(families.model("llama"))
    batch, weight = tiny.batch(), torch.ones(tiny.batch().input_ids.shape, dtype=torch.float64)
    merged = copy.deepcopy(made).merge_and_unload()
    whole = Policy.from_model(merged, temperature=0.8)
    policy = Policy.from_model(made, temperature=0.8)
    assert (token_stats(policy, batch).entropy - token_stats(whole, batch).entropy).abs().max() < 1e-12
    of_weights = token_gradient(whole, batch, logprob_weight=weight)
    found = token_gradient(policy, batch, logprob_weight=weight)
    s = 6 / 3
    for name, g in found.items():
        if "lora_A" in name:
            b, w = name.replace("lora_A", "lora_B"), of_weights[name.replace("lora_A.default.", "")]
            torch.testing.assert_close(g, s * policy.params[b].T @ w, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(found[b], s * w @ policy.params[name].T, rtol=1e-9, atol=1e-10)
