"""TRL's ``GRPOTrainer`` with a memory: the batch of one chosen optimizer step, kept exactly as the loss saw it.

Checking a predicted update against the next checkpoint needs the batch that led there.  TRL throws it away, so a
subclass keeps the tensors handed to the loss and :func:`write_record` puts them on disk:

``batch.safetensors``
    Rows in the order of the loss (TRL shuffles after sampling).  N completions, P and T padded widths:
    ``prompt_ids``, ``prompt_mask`` [N, P] (padded on the left); ``completion_ids``, ``completion_mask`` [N, T]
    (padded on the right, the end-of-sequence token counted, nothing after it); ``rewards``, ``advantages`` [N];
    ``token_weights`` [N, T], the weight omega_ik of every token in the loss; ``logprobs``, ``entropies`` [N, T]
    of the loss's own forward pass, in nats, 0 outside the mask (not differentiable records);
    ``group_index``, ``sample_index`` [N]; ``old_logprobs`` [N, T] only where TRL used them.
``batch.json``
    The loss and its normaliser in words and numbers, the optimizer's settings, the sampler's, the versions.
``rollouts_u.parquet``
    The same completions, one row each, without padding, ordered by group and sample.

Needs the extra ``trl``.  Used by ``entropy_kernels.demo.make_demo`` and ``bench/smollm2/make_checkpoint.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

# What one optimizer step minimises in TRL 1.16 (GRPOTrainer._compute_loss) with one process and one batch per step:
# loss = -sum_ik omega_ik min(A_i r_ik, A_i clip(r_ik)) + beta sum_ik omega_ik kl_ik - c mean entropy. On the first pass
# over a batch r_ik is 1, and its gradient that of log pi.
# N rows in the batch, T_i tokens in row i (end-of-sequence token included).
TOKEN_WEIGHTS = {
    "grpo": "omega_ik = 1 / (N * T_i): mean over a row's tokens, then mean over rows",
    "bnpo": "omega_ik = 1 / sum_j T_j over the micro-batch (here the batch)",
    "dapo": "omega_ik = 1 / sum_j T_j over every row of the optimizer step (num_items_in_batch / processes)",
    "dr_grpo": "omega_ik = 1 / (N * L), L = max_completion_length, a constant",
}
ADVANTAGES = {
    "group": "A_i = (r_i - mean of its group) / (std of its group + 1e-4), std with n - 1 in the denominator",
    "none": "A_i = r_i - mean of its group",
}
STEP_TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")

ROLLOUT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("finish_reason", pa.string()),
        ("group_index", pa.int32()),
        ("sample_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("reward", pa.float32()),
        ("advantage", pa.float32()),
    ]
)


def token_weights(loss_type: str, mask: torch.Tensor, max_completion_length: int) -> torch.Tensor:
    """omega_ik of TRL's loss -sum_ik omega_ik A_i r_ik, zero outside the mask.

    Args:
        loss_type: a key of ``TOKEN_WEIGHTS``.
        mask: [N, T], 1 on response tokens.
        max_completion_length: the constant L of ``dr_grpo``.

    Returns:
        [N, T] float32.
    """
    mask = mask.to(torch.float32)
    if loss_type == "grpo":
        return mask / (mask.shape[0] * mask.sum(1, keepdim=True).clamp(min=1.0))
    if loss_type in ("dapo", "bnpo"):
        return mask / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return mask / (mask.shape[0] * max_completion_length)
    raise ValueError(f"loss_type is {loss_type!r}; the weights are known for {sorted(TOKEN_WEIGHTS)}.")


class _SaveSteps(TrainerCallback):
    """Write a checkpoint after each of the named optimizer steps and after no other."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_save = state.global_step in self.steps
        return control


class _OneLine(TrainerCallback):
    """One printed line per optimizer step."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "reward" in logs:
            print(
                f"GRPO step {state.global_step}/{state.max_steps}: reward {float(logs['reward']):.3f}, "
                f"entropy {float(logs['entropy']):.3f} nats per token, gradient norm {float(logs['grad_norm']):.2f}, "
                f"{float(logs['step_time']):.1f} s",
                flush=True,
            )


class RecordingGRPOTrainer(GRPOTrainer):
    """GRPO that changes nothing and keeps the batches of the optimizer steps ``record_steps`` (counted from 1)."""

    def __init__(self, *args: Any, record_steps: set[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL leaves these optional; here each of them is set.
        assert self.num_generations is not None and self.max_completion_length is not None
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        self.group_size: int = self.num_generations
        self.longest: int = self.max_completion_length
        self.text: PreTrainedTokenizerBase = self.processing_class
        self.record_steps = record_steps
        self.records: dict[int, dict[str, torch.Tensor]] = {}
        self.recorded_prompts: dict[int, list[dict[str, Any]]] = {}
        self._last_scored: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._last_rewards: torch.Tensor | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card: it would name a hub these checkpoints never see."""

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._last_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._last_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        assert self._last_rewards is not None and self._last_rewards.shape == (len(inputs), 1)
        # Travels through TRL's shuffle with the rows, and so says where each row came from.
        output["generation_row"] = torch.arange(len(inputs))
        output["rewards"] = self._last_rewards[:, 0].clone()
        self.recorded_prompts[self.state.global_step + 1] = [dict(row) for row in inputs]
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_scored = (
            result[0].detach().clone(),
            None if result[1] is None else result[1].detach().clone(),
        )
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        step = self.state.global_step + 1
        recording = model.training and step in self.record_steps
        if recording:
            assert step not in self.records, "one batch per optimizer step"
            kept = {name: inputs[name].detach().clone() for name in STEP_TENSORS}
            rows, group = inputs["generation_row"], self.group_size
            kept["rewards"] = inputs["rewards"].to(torch.float32).clone()
            kept["group_index"] = (rows // group).to(torch.int32)
            kept["sample_index"] = (rows % group).to(torch.int32)
            if "old_per_token_logps" in inputs:
                kept["old_logprobs"] = inputs["old_per_token_logps"].detach().clone()
        loss = super()._compute_loss(model, inputs)
        if recording:
            mask = kept["completion_mask"]
            assert int(inputs["num_items_in_batch"]) == int(mask.sum())
            assert self._last_scored is not None and self._last_scored[1] is not None
            kept["logprobs"] = self._last_scored[0].masked_fill(mask == 0, 0.0)
            kept["entropies"] = self._last_scored[1].masked_fill(mask == 0, 0.0)
            kept["token_weights"] = token_weights(self.loss_type, mask, self.longest)
            kept["loss"] = loss.detach().clone()
            self.records[step] = kept
        return loss


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the completion's first line, without surrounding blanks, is the answer; 0 elsewhere."""
    return [float(c.split("\n")[0].strip() == a) for c, a in zip(completions, answer, strict=True)]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    output: Path,
    *,
    steps: int,
    prompts: int,
    group: int,
    max_completion_length: int,
    learning_rate: float,
    loss_type: str = "dapo",
    scale_rewards: str = "group",
    seed: int = 0,
    gradient_checkpointing: bool = False,
    reward: Callable[..., list[float]] = exact_match,
    peft_config: Any = None,
    keep_all: bool = False,
    loss: Mapping[str, Any] = MappingProxyType({}),
) -> RecordingGRPOTrainer:
    """GRPO in float32 on the CPU; keeps checkpoints ``steps - 1`` and ``steps`` and the batch between them.

    Samples come from the policy itself: temperature 1, no top-k, no top-p.  AdamW with weight decay 0.01, gradient
    norm clipped at 1, constant learning rate, no KL term, one batch per optimizer step, one pass over it.

    Args:
        model: float32, without dropout.  ``generation_config.eos_token_id`` decides where a response ends.
        tokenizer: with a pad token.
        rows: the training prompts: ``prompt_id``, ``prompt``, ``answer``.
        output: directory to receive ``checkpoint-*`` and ``recorded/``, the batch of the last step.
        steps: optimizer steps, at least 2.
        prompts: prompts per step.
        group: completions per prompt, at least 2.
        max_completion_length: longest response in tokens.
        learning_rate: constant.
        loss_type: a key of ``TOKEN_WEIGHTS``.
        scale_rewards: a key of ``ADVANTAGES``.
        seed: of sampling and of the prompts' order.
        gradient_checkpointing: recompute activations: a third more time, a fraction of the memory, the same numbers.
        reward: TRL reward function; sees the column ``answer``.
        peft_config: train an adapter of this kind (a ``peft.LoraConfig``) instead of all parameters. An adapter does not say
            where a response ends, so each checkpoint gets the model's ``generation_config.json`` beside it.
        loss: settings of ``GRPOConfig`` instead of the ones above: ``num_iterations``, ``epsilon``, ``epsilon_high``,
            ``importance_sampling_level``, ``top_p``, ``beta`` (the reference is then loaded from ``model.name_or_path``),
            ``entropy_coef``.
        keep_all: keep every checkpoint, and the batch of every step k before the last as ``recorded-k/``.

    Returns:
        The trainer after its last step.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; two consecutive checkpoints need at least 2.")
    # So that whoever samples from the saved checkpoint with its own settings samples from the same policy.
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    settings: dict[str, Any] = {"num_iterations": 1, "beta": 0.0, "top_k": 0, "top_p": 1.0, **loss}
    config = GRPOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=prompts * group,
        gradient_accumulation_steps=1,
        num_generations=group,
        max_completion_length=max_completion_length,
        temperature=1.0,
        loss_type=loss_type,
        scale_rewards=scale_rewards,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
        bf16=False,
        fp16=False,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = RecordingGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_SaveSteps(set(range(1, steps + 1)) if keep_all else {steps - 1, steps}), _OneLine()],
        record_steps=set(range(1, steps + 1)) if keep_all else {steps},
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if peft_config is not None:
        for checkpoint in output.glob("checkpoint-*"):
            model.generation_config.save_pretrained(checkpoint)
    for step in sorted(trainer.record_steps):
        write_record(trainer, step, output / ("recorded" if step == steps else f"recorded-{step}"))
    return trainer


def write_record(trainer: RecordingGRPOTrainer, step: int, directory: Path) -> None:
    """Write the recorded batch as ``batch.safetensors``, ``batch.json`` and ``rollouts_u.parquet`` (see the module).

    Args:
        trainer: after the steps it was to record.
        step: which of them.
        directory: created if missing.
    """
    assert trainer.optimizer is not None
    assert step in trainer.records, f"step {step} was never reached"
    directory.mkdir(parents=True, exist_ok=True)
    record = {name: tensor.contiguous() for name, tensor in trainer.records[step].items() if name != "loss"}
    save_file(record, str(directory / "batch.safetensors"))
    _write_rollouts(trainer, step, directory / "rollouts_u.parquet")

    args, lengths = trainer.args, record["completion_mask"].sum(1)
    log = next(entry for entry in trainer.state.log_history if entry.get("step") == step)
    groups = trainer.optimizer.param_groups
    n, total = len(lengths), int(lengths.sum())
    normaliser = {
        "grpo": {"rows": n, "row_tokens": "the row's own T_i"},
        "bnpo": {"tokens": total},
        "dapo": {"tokens": total},
        "dr_grpo": {"rows": n, "max_completion_length": trainer.longest},
    }[trainer.loss_type]
    meta = {
        "format": 1,
        "step": step,
        "from_checkpoint": f"checkpoint-{step - 1}",
        "to_checkpoint": f"checkpoint-{step}",
        "loss": {
            "loss_type": trainer.loss_type,
            "formula": "loss = -sum_ik omega_ik A_i r_ik, r_ik = pi(t_ik) / stop_gradient(pi(t_ik)) (ratio 1)"
            if "old_logprobs" not in record
            else "loss = -sum_ik omega_ik min(A_i r_ik, A_i clip(r_ik)), r_ik = pi(t_ik) / pi_old(t_ik)",
            "token_weight": TOKEN_WEIGHTS[trainer.loss_type],
            "normaliser": normaliser,
            "value": float(trainer.records[step]["loss"]),
            "kl_beta": trainer.beta,
            "entropy_coef": trainer.entropy_coef,
            "epsilon_low": trainer.epsilon_low,
            "epsilon_high": trainer.epsilon_high,
            "importance_sampling_level": trainer.importance_sampling_level,
            "num_iterations": trainer.num_iterations,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        },
        "advantage": {
            "scale_rewards": str(trainer.scale_rewards),
            "formula": ADVANTAGES[str(trainer.scale_rewards)],
            "group_size": trainer.group_size,
        },
        "optimizer": {
            "name": "torch.optim.AdamW",
            "groups": [
                {key: g[key] for key in ("lr", "betas", "eps", "weight_decay")}
                | {"parameters": len(g["params"])}
                for g in groups
            ],
            "max_grad_norm": args.max_grad_norm,
            "grad_norm_before_clipping": log["grad_norm"],
            "clipping": "gradient *= min(1, max_grad_norm / (grad_norm + 1e-6))",
        },
        "sampling": {
            "temperature": trainer.temperature,
            "top_k": trainer.top_k,
            "top_p": trainer.top_p,
            "max_completion_length": trainer.longest,
            "eos_token_id": trainer.eos_token_ids,
            "pad_token_id": trainer.text.pad_token_id,
            "seed": args.seed,
        },
        "batch": {
            "prompts": n // trainer.group_size,
            "completions": n,
            "tokens": total,
            "mean_reward": float(record["rewards"].mean()),
            "mixed_groups": _mixed_groups(record["rewards"], record["group_index"]),
            "entropy_nats_per_token": float(record["entropies"].double().sum() / total),
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
    (directory / "batch.json").write_text(json.dumps(meta, indent=1) + "\n")


def _mixed_groups(rewards: torch.Tensor, group_index: torch.Tensor) -> int:
    """Number of groups whose rewards differ: the only ones with an advantage."""
    return sum(int(rewards[group_index == g].unique().numel() > 1) for g in group_index.unique())


def _write_rollouts(trainer: RecordingGRPOTrainer, step: int, path: Path) -> None:
    record, group, eos = trainer.records[step], trainer.group_size, set(trainer.eos_token_ids)
    generated = max(at for at in trainer.recorded_prompts if at <= step)  # a batch may serve several steps
    sampler = record.get("old_logprobs", record["logprobs"])  # the policy that drew it
    rows = []
    for i in range(len(record["rewards"])):
        prompt_mask, mask = record["prompt_mask"][i].bool(), record["completion_mask"][i].bool()
        g, s = int(record["group_index"][i]), int(record["sample_index"][i])
        source = trainer.recorded_prompts[generated][g * group + s]
        ids = record["completion_ids"][i][mask].tolist()
        rows.append(
            {
                "prompt_id": source["prompt_id"],
                "prompt": source["prompt"],
                "completion": trainer.text.decode(ids, skip_special_tokens=True),
                "finish_reason": "stop" if ids[-1] in eos else "length",
                "group_index": g,
                "sample_index": s,
                "prompt_ids": record["prompt_ids"][i][prompt_mask].tolist(),
                "completion_ids": ids,
                "logprobs": sampler[i][mask].tolist(),
                "reward": float(record["rewards"][i]),
                "advantage": float(record["advantages"][i]),
            }
        )
    rows.sort(key=lambda row: (row["group_index"], row["sample_index"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA), path)
