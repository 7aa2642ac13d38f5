"""Models from disk, and optimizer states given their names back, against a real Hugging Face Trainer."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from characters import character_llama, character_tokenizer
from safetensors.torch import load_file, save_file

from entropy_kernels.checkpoints import (
    decay_parameter_names,
    learning_rate,
    load_model,
    load_optimizer_state,
)
from entropy_kernels.errors import UserError
from entropy_kernels.updates import update_direction

RATE, CLIP = 1e-2, 0.3
IDS = torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps of transformers.Trainer: biases, norms, weight decay, active clipping, a falling rate, tied weights.

    The batch is the whole data set, so that every step's gradient can be computed again from its checkpoint.
    """
    from transformers import Trainer, TrainingArguments

    where = tmp_path_factory.mktemp("trainer")
    torch.manual_seed(0)
    Trainer(
        model=character_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        processing_class=character_tokenizer(),
        args=TrainingArguments(
            output_dir=str(where),
            max_steps=3,
            save_steps=1,
            logging_steps=1,
            per_device_train_batch_size=len(IDS),
            learning_rate=RATE,
            weight_decay=0.5,
            adam_beta1=0.8,
            adam_beta2=0.9,
            max_grad_norm=CLIP,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
    ).train()
    return where


@pytest.fixture
def ckpt(run, tmp_path):
    """A copy of the second checkpoint that a test may damage."""
    return shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")


def loss_gradient(model):
    model.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    return gradient


@pytest.mark.parametrize("step", [1, 2])
def test_the_next_checkpoint_is_rebuilt_from_this_one(run, step):
    model, _ = load_model(run / f"checkpoint-{step}")
    state = load_optimizer_state(run / f"checkpoint-{step}", model)
    result = update_direction(loss_gradient(model), state, rule="adamw", max_grad_norm=CLIP)
    assert result.clip < 0.9
    eta = learning_rate(run / f"checkpoint-{step}").stored_lr
    after, _ = load_model(run / f"checkpoint-{step + 1}")
    moved, predicted = [], []
    for name, p in after.named_parameters():
        moved.append((p - state.params[name]).flatten())
        predicted.append(eta * result.direction[name].flatten())
        torch.testing.assert_close(predicted[-1], moved[-1], rtol=0, atol=3e-4 * eta, msg=name)
    moved, predicted = torch.cat(moved).double(), torch.cat(predicted).double()
    assert float((moved - predicted).norm() / moved.norm()) < 1e-5
    assert all(float(result.parts["decay"][n].abs().sum()) > 0 for n in decay_parameter_names(model))


def test_state_by_name(ckpt):
    model, _ = load_model(ckpt)
    state = load_optimizer_state(ckpt, model)
    assert (
        list(state.hyper) == list(state.slots)
        and state.params.keys() == dict(model.named_parameters()).keys()
    )
    for name, p in model.named_parameters():
        assert state.slots[name]["exp_avg"].shape == p.shape
        assert state.slots[name]["exp_avg"].dtype == torch.float32
        assert float(state.slots[name]["step"]) == 2
        assert state.hyper[name]["betas"] == (0.8, 0.9)
        assert state.hyper[name]["weight_decay"] == (0.0 if "bias" in name or "norm" in name else 0.5)
    wide, _ = load_model(ckpt, dtype="float64")
    assert load_optimizer_state(ckpt, wide).slots["model.norm.weight"]["exp_avg"].dtype == torch.float64
    assert set(state.params) == set(wide.state_dict()) - {"lm_head.weight"}


def test_learning_rate_is_explained_not_used(run):
    middle, last = learning_rate(run / "checkpoint-2"), learning_rate(run / "checkpoint-3")
    assert (middle.optimizer_steps, last.optimizer_steps) == (2, 3)
    assert middle.stored_lr == pytest.approx(RATE / 3)  # the third step's
    assert (middle.logged_lr, middle.logged_step) == (pytest.approx(RATE * 2 / 3), 2)  # the second step's
    assert last.stored_lr == 0
    assert last.logged_lr == pytest.approx(RATE / 3)
    assert last.logged_grad_norm > CLIP
    assert "decays to 0" in last.explanation() and "of step 3" in last.explanation()
    assert "decays to 0" not in middle.explanation()
    model, _ = load_model(run / "checkpoint-3")
    assert load_optimizer_state(run / "checkpoint-3", model).hyper["model.norm.weight"]["lr"] == 0


def tiny_models():
    from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, Qwen3Config

    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)
    opt = OPTConfig(**sizes, ffn_dim=8, word_embed_proj_dim=8)
    qwen3 = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=4, intermediate_size=8)
    for config in (gpt2, opt, qwen3):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 1
        yield AutoModelForCausalLM.from_config(config)
    yield character_llama(attention_bias=True)
    yield torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Sequential(torch.nn.RMSNorm(2))
    )


def test_decay_rule_is_the_trainers():
    from transformers import Trainer

    for model in tiny_models():
        wanted = set(Trainer.get_decay_parameter_names(None, model))
        named = dict(model.named_parameters())
        assert set(decay_parameter_names(model)) == wanted & named.keys()
        assert 0 < len(decay_parameter_names(model)) < len(named)


def rewrite(path, change):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def regroup(saved):
    first, second = saved["param_groups"]
    second["params"].insert(0, first["params"].pop())


def reshape(saved):
    saved["state"][3]["exp_avg_sq"] = torch.zeros(2, 2)


def quantise(saved):
    saved["state"][3]["exp_avg"] = saved["state"][3]["exp_avg"].to(torch.uint8)


def forget(saved):
    del saved["state"][3]


def decay_all(saved):
    saved["param_groups"][1]["weight_decay"] = 0.5


def one_group(saved):
    first, second = saved["param_groups"]
    first["params"] += second["params"]
    del saved["param_groups"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (regroup, r"sizes \[14, 20\]; .* of sizes \[15, 19\]"),
        (one_group, r"1 parameter groups of sizes \[34\]"),
        (reshape, "'exp_avg_sq' of parameter 'model.layers.0.self_attn.v_proj.weight'"),
        (quantise, "torch.uint8"),
        (forget, "no state for parameter 'model.layers.0.self_attn.v_proj.weight'"),
        (decay_all, "weight_decay=0.5"),
        (lambda saved: saved.pop("param_groups"), "not the state_dict"),
    ],
)
def test_states_that_do_not_fit_are_refused(ckpt, change, message):
    model, _ = load_model(ckpt)
    rewrite(ckpt / "optimizer.pt", change)
    with pytest.raises(UserError, match=message):
        load_optimizer_state(ckpt, model)


def test_state_of_another_model_is_refused(ckpt):
    with pytest.raises(UserError, match="parameter groups"):
        load_optimizer_state(ckpt, character_llama(attention_bias=True, mlp_bias=True, num_hidden_layers=3))
    with pytest.raises(UserError, match="shape"):
        load_optimizer_state(
            ckpt, character_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, vocab_size=65)
        )


def test_missing_or_pickled_optimizer_file(ckpt):
    model, _ = load_model(ckpt)
    (ckpt / "optimizer.pt").write_bytes(pickle.dumps({"state": {}, "param_groups": [print]}))
    with pytest.raises(UserError, match="weights_only=True"):
        load_optimizer_state(ckpt, model)
    (ckpt / "optimizer.pt").unlink()
    for read in (lambda: load_optimizer_state(ckpt, model), lambda: learning_rate(ckpt)):
        with pytest.raises(UserError, match="--update sgd"):
            read()


def test_only_some_parameters_trained(ckpt):
    model, _ = load_model(ckpt)
    full = load_optimizer_state(ckpt, model)
    trained = [name for name, _ in model.named_parameters() if "layers.1" in name]
    decayed = [name for name in trained if name in decay_parameter_names(model)]
    order = decayed + [name for name in trained if name not in decayed]
    optimizer = {
        "state": {i: full.slots[name] for i, name in enumerate(order)},
        "param_groups": [
            {**full.hyper[decayed[0]], "params": list(range(len(decayed)))},
            {**full.hyper[order[-1]], "params": list(range(len(decayed), len(order)))},
        ],
    }
    torch.save(optimizer, ckpt / "optimizer.pt")
    with pytest.raises(UserError, match="--parameters PATTERN"):
        load_optimizer_state(ckpt, model)
    part = load_optimizer_state(ckpt, model, trainable=trained)
    assert set(part.params) == set(trained)
    assert all(torch.equal(part.slots[n]["exp_avg"], full.slots[n]["exp_avg"]) for n in trained)
    with pytest.raises(UserError, match="does not have: nothing"):
        load_optimizer_state(ckpt, model, trainable=["nothing"])


def test_directory_with_a_list_of_names(ckpt, tmp_path):
    """The third layout: model/, optimizer.pt in any order with any groups, and the names in that order."""
    model, tokenizer = load_model(ckpt)
    full = load_optimizer_state(ckpt, model)
    other = tmp_path / "other"
    model.save_pretrained(other / "model")
    tokenizer.save_pretrained(other / "model")
    names = sorted(full.params)
    optimizer = {
        "state": {i: full.slots[name] for i, name in enumerate(names)},
        "param_groups": [{"lr": 1e-3, "params": list(range(len(names)))}],
    }
    torch.save(optimizer, other / "optimizer.pt")
    (other / "optimizer_param_names.json").write_text(json.dumps(names))
    again, _ = load_model(other)
    state = load_optimizer_state(other, again)
    assert all(torch.equal(state.slots[n]["exp_avg"], full.slots[n]["exp_avg"]) for n in names)
    assert learning_rate(other).stored_lr == 1e-3
    (other / "optimizer_param_names.json").write_text(json.dumps(names[:-1]))
    with pytest.raises(UserError, match=f"Not listed: \\[{names[-1]}\\]"):
        load_optimizer_state(other, again)


def test_loaded_model(ckpt):
    model, tokenizer = load_model(ckpt, dtype="bfloat16")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tokenizer("1+1=")["input_ids"] == character_tokenizer()("1+1=")["input_ids"]
    stored = load_file(ckpt / "model.safetensors")
    exact, _ = load_model(ckpt, dtype=torch.float64)
    assert all(torch.equal(exact.state_dict()[name], x.double()) for name, x in stored.items())


def damage(ckpt, what):
    weights = ckpt / "model.safetensors"
    tensors = load_file(weights)
    if what == "nan":
        tensors["model.norm.weight"][1] = float("nan")
    elif what == "missing":
        del tensors["model.norm.weight"]
    elif what == "unused":
        tensors["model.value_head.weight"] = torch.zeros(2)
    elif what == "shape":
        tensors["model.norm.weight"] = torch.ones(33)
    if what in ("nan", "missing", "unused", "shape"):
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "pickled":
        weights.unlink()
        torch.save(tensors, ckpt / "pytorch_model.bin")
    elif what == "no weights":
        weights.unlink()
    elif what == "shard":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
        (ckpt / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "config":
        (ckpt / "config.json").unlink()
    elif what == "adapter":
        (ckpt / "adapter_config.json").write_text("{}")
    elif what == "tokenizer":
        for file in ckpt.glob("tokenizer*"):
            file.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "'model.norm.weight' holds NaN"),
        ("missing", "random ones.: model.norm.weight"),
        ("unused", "does not use: model.value_head.weight"),
        ("shape", "another shape than config.json says: model.norm.weight"),
        ("cut", "cannot be loaded"),
        ("pickled", "only pickled weights .pytorch_model.bin"),
        ("no weights", "no model.safetensors"),
        ("shard", "missing: model-00001-of-00002.safetensors"),
        ("config", "no config.json"),
        ("adapter", "trained on None, which is not a directory"),
        ("tokenizer", "without a tokenizer.*base="),
    ],
)
def test_models_that_cannot_be_trusted_are_refused(ckpt, what, message):
    damage(ckpt, what)
    with pytest.raises(UserError, match=message):
        load_model(ckpt)


def test_paths_that_are_not_there(tmp_path):
    for path in (tmp_path / "none", "./none", "a/b/c", tmp_path / "none.gguf"):
        with pytest.raises(UserError, match="no such file or directory"):
            load_model(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_model(tmp_path / "file")
    with pytest.raises(UserError, match="dtype='int8'"):
        load_model(tmp_path, dtype="int8")


def test_tokenizer_of_the_base(ckpt, run, tmp_path):
    assert load_model(ckpt, base=run / "checkpoint-1")[1].get_vocab() == character_tokenizer().get_vocab()
    other = character_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="differ"):
        load_model(ckpt, base=tmp_path / "base")
    damage(ckpt, "tokenizer")
    assert load_model(ckpt, base=run / "checkpoint-1")[1].eos_token_id == 1
    large = character_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(10)])
    large.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="do not belong together"):
        load_model(ckpt, base=tmp_path / "base")
