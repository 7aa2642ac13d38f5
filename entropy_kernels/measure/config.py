"""What to measure, and with what: every choice of a measurement in one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import UserError
from ..stats import EstimatorKind, Per
from ..truncation import truncation

RULES = ("adamw", "rmsprop", "sgd")
CHOICES = {
    "advantage": ("grpo", "grpo_nostd", "rloo"),
    "loss": ("grpo", "dapo", "dr_grpo_longest", "dr_grpo_constant"),
    "loss_law": ("policy", "full"),
    "ratio": ("none", "token", "sequence"),
    "per": ("token", "sequence"),
    "estimator": ("per_decision", "whole_sequence"),
    "baseline": ("none", "position", "group", "ema", "regression", "critic", "least_error"),
    "truth": ("direct", "integrated", "both"),
    "precision": ("float32", "float64"),
}
ATTEMPT = ("resume", "dry_run")  # choices of how to run, which no number depends on


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """The choices of one measurement; the command line has a flag of the same name for each.

    Attributes:
        model: model directory, .gguf file or hub id: the base model where the checkpoint is an adapter (None: the one that its
            adapter_config.json names), the tokenizer's where the checkpoint has none, or what to measure without a checkpoint.
        ckpt: checkpoint directory, full or a PEFT LoRA adapter: the parameters measured at, and the optimizer state. None with a
            model: `update` must be "sgd".
        parameters: which parameters are measured: "all" that were trained, "lora", or a regular expression; the others are constants.
        dataset: data set of prompts, hub id or .json/.jsonl/.parquet file; dataset_config, dataset_split: which part of a hub data set.
        prompt_column, answer_column, chat_template, reward: how prompts are read and completions are judged.
        rollouts_u, rollouts_e: Parquet files to use instead of sampling the update batch U or the evaluation batch E.
        prompts_u, group_size: size of U; prompts_e, group_size_e: size of E.
        max_new_tokens: longest completion.
        temperature, top_k, top_p: how completions are sampled, and with it the policy that is measured; None for no limit.
        seed: of the prompts' order and of every completion.
        etas: learning rates to measure at; empty for eight from 1e-8 to ten times the checkpoint's.
        learning_rate: instead of the one stored in the checkpoint.
        update, advantage, loss, max_grad_norm: the step as the trainer takes it; 0 for no clipping. `update` may also be
            next:CHECKPOINT, the step that was taken, or a .safetensors file with the direction.
        loss_law: for a truncated policy, whose log-probs the loss has: its own ("policy") or those of the full law ("full", as TRL's).
        ratio: importance ratio of a stale update batch, by the log-probs in `rollouts_u`: "none" for samples of the checkpoint itself,
            per "token", or per "sequence" (GSPO). clip_low, clip_high: how far below and above 1 it may go (None: 0.2, and clip_low).
        kl_coef, ref_model: β and the model of a KL term. kl_correction: whether it is multiplied by the ratio, as in TRL.
        entropy_coef: of an entropy bonus. None, for this and kl_coef: no such term, refused where the checkpoint's log shows one; 0
            leaves it out all the same.
        per, estimator: which entropy, by which estimator (docs/theory.md, section 5).
        baseline: what is subtracted from the returns of E's tokens, by truth and predictions alike (docs/theory.md, section 5).
        truth: which form of the true change; second_order: whether to compute the quadratic prediction.
        integration_rtol: nodes are added until the quadrature error of the integrated truth is below this share of it.
        attribute: which tokens of the update move the entropy and the expected reward, and what published proxies see of it.
        what_if: rules that drop, clip or re-weight tokens of the update (attribution.RULES), or Parquet files of factors; they need and
            bring the attribution. verify: also measure what they change.
        fisher: whether to compute the Fisher kernel between responses of U, and its structure; fisher_sequences: of the first prompts, as
            many as have no more responses than that.
        precision: dtype of weights and arithmetic. device: None for a GPU where there is one.
        micro_batch_tokens: tokens in one micro-batch; less needs less memory. sample_batch: completions sampled at once.
        memory_budget: a size such as "8GB" that the process (on a GPU: what torch allocates) stays within; micro_batch_tokens and
            sample_batch are lowered to it (memory.py).
        output: directory for the report. resume: go on with the run that was stopped there.
        dry_run: only predict time and memory.
    """

    model: str | None = None
    ckpt: str | None = None
    parameters: str = "all"
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    prompt_column: str | None = None
    answer_column: str | None = None
    chat_template: bool = False
    reward: str = "exact_match_number"
    rollouts_u: str | None = None
    rollouts_e: str | None = None
    prompts_u: int = 64
    group_size: int = 8
    prompts_e: int = 256
    group_size_e: int = 1
    max_new_tokens: int = 150
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    etas: tuple[float, ...] = ()
    learning_rate: float | None = None
    update: str = "adamw"
    advantage: str = "grpo"
    loss: str = "dapo"
    max_grad_norm: float = 1.0
    loss_law: str = "policy"
    ratio: str = "none"
    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float | None = None
    ref_model: str | None = None
    kl_correction: bool = True
    entropy_coef: float | None = None
    per: Per = "token"
    estimator: EstimatorKind = "per_decision"
    baseline: str = "none"
    truth: str = "both"
    second_order: bool = True
    integration_rtol: float = 1e-3
    fisher: bool = False
    fisher_sequences: int = 64
    attribute: bool = False
    what_if: tuple[str, ...] = ()
    verify: bool = False
    precision: str = "float32"
    device: str | None = None
    micro_batch_tokens: int = 2048
    sample_batch: int = 64
    memory_budget: str | None = None
    output: str | None = None
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be measured before anything is loaded."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        for name in ("prompts_u", "group_size_e", "max_new_tokens", "micro_batch_tokens", "sample_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected at least 1.")
        if self.group_size < 2:
            raise UserError(
                f"group_size: got {self.group_size}, expected at least 2: the advantage of a response is relative to the others of its "
                "group. Pass --group-size 8."
            )
        if self.prompts_e < 2:
            raise UserError(
                f"prompts_e: got {self.prompts_e}, expected at least 2: prompts are the independent units that errors are taken over."
            )
        if self.baseline == "group" and self.rollouts_e is None and self.group_size_e < 2:
            raise UserError(
                "baseline: 'group' compares the responses to one prompt, and group_size_e is 1. Pass --group-size-e 2 or more, or choose "
                "another baseline."
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature: got {self.temperature}, expected a positive number, the one that the completions are sampled with."
            )
        truncation(self.top_k, self.top_p)
        if any(not 0 < eta < math.inf for eta in self.etas):
            raise UserError(
                f"etas: got {list(self.etas)}, expected positive learning rates; pass for example 1e-6 1e-5."
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"learning_rate: got {self.learning_rate}, expected a positive number, the one that the step was taken with."
            )
        if not 0 < self.integration_rtol < math.inf:
            raise UserError(
                f"integration_rtol: got {self.integration_rtol}, expected a positive number such as 1e-3, the share of the change that "
                "its quadrature may be wrong by."
            )
        if self.max_grad_norm < 0:
            raise UserError(f"max_grad_norm: got {self.max_grad_norm}, expected 0 (no clipping) or more.")
        check_loss(self)
        if self.model is None and self.ckpt is None:
            raise UserError(
                "ckpt: nothing to measure; pass --ckpt DIRECTORY, or no argument at all for the demo."
            )
        read = self.update.startswith("next:") or self.update.endswith(".safetensors")
        if not read and self.update not in RULES:
            raise UserError(
                f"update: got {self.update!r}, expected one of {', '.join(RULES)}, next:CHECKPOINT for the step that was taken, "
                "or a .safetensors file that holds the direction."
            )
        if read and self.rollouts_u is not None:
            raise UserError(
                f"rollouts_u: got {self.rollouts_u!r} with update={self.update!r}, which needs no update batch; leave one of them out."
            )
        if self.ckpt is None and not read and self.update != "sgd":
            raise UserError(
                f"update: got {self.update!r} without a checkpoint, which needs its optimizer state; pass --ckpt, or --update sgd for the "
                "plain gradient."
            )
        if self.dataset is None and (self.rollouts_e is None or (self.rollouts_u is None and not read)):
            raise UserError(
                "dataset: there is nothing to sample from; pass --dataset, or both --rollouts-u and --rollouts-e."
            )

        if self.fisher_sequences < 8:
            raise UserError(
                f"fisher_sequences: got {self.fisher_sequences}, expected at least 8: fewer say nothing about a spectrum."
            )
        if self.attributed and read:
            raise UserError(
                f"attribute: got update={self.update!r}, which does not say which tokens made it; pass --update adamw (or rmsprop, sgd) "
                "with the update batch, for example --rollouts-u."
            )
        if self.verify and not self.what_if:
            raise UserError("verify: there is nothing to verify; pass --what-if with at least one rule.")
        if self.what_if:
            from ..attribution import parse_rule

            for rule in self.what_if:
                if not rule.endswith(".parquet"):
                    parse_rule(rule)

    @property
    def attributed(self) -> bool:
        """Whether the tokens of the update are asked for their influence."""
        return self.attribute or bool(self.what_if)

    @property
    def source(self) -> str:
        """Where the parameters are: the checkpoint, else the model."""
        chosen = self.ckpt or self.model
        assert chosen is not None  # __post_init__ saw to it
        return chosen

    @classmethod
    def demo(cls, **changes: object) -> MeasureConfig:
        """The embedded demo: a tiny model that adds, in the middle of its training."""
        from .. import demo

        settings: dict[str, object] = {
            "ckpt": str(demo.checkpoint_dir()),
            "dataset": str(demo.prompts_file()),
            "prompts_u": 64,
            "prompts_e": 256,
            "group_size_e": 4,
            "max_new_tokens": 12,
            "sample_batch": 512,
            "micro_batch_tokens": 16384,
        }
        return cls(**{**settings, **changes})  # type: ignore[arg-type]

    def to_json(self) -> dict[str, object]:
        """The choices by name, for the report; not those of one attempt to run it."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ATTEMPT}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def check_loss(config: MeasureConfig) -> None:
    """Refuse settings of the loss that contradict each other, or that nothing would come of.

    Raises:
        UserError: naming the flags.
    """
    truncated = config.top_k is not None or config.top_p is not None
    terms = {
        "ratio": config.ratio != "none",
        "clip_low": config.clip_low is not None,
        "clip_high": config.clip_high is not None,
        "kl_coef": bool(config.kl_coef),
        "ref_model": config.ref_model is not None,
        "kl_correction": not config.kl_correction,
        "entropy_coef": bool(config.entropy_coef),
        "loss_law": config.loss_law != "policy",
    }
    given = [name for name, is_given in terms.items() if is_given]
    if given and config.update not in RULES:
        raise UserError(
            f"{given[0]}: got {getattr(config, given[0])!r} with update={config.update!r}, which is a step already made and needs no loss; "
            "leave one of them out."
        )
    for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name}: got {value}, expected 0 or more.")
    if config.ratio == "none" and (terms["clip_low"] or terms["clip_high"]):
        raise UserError(
            "clip_low, clip_high: they bound the importance ratio, and ratio is 'none': the update batch counts as drawn from the "
            "checkpoint itself, where the ratio is 1. Pass --ratio token or --ratio sequence, or leave them out."
        )
    if config.ratio != "none" and config.rollouts_u is None:
        raise UserError(
            f"ratio: got {config.ratio!r} without rollouts_u: completions that are sampled here come from the checkpoint itself, where the "
            "ratio is 1. Pass --rollouts-u with the stale batch and its sampler's log-probs, or leave --ratio out."
        )
    if terms["kl_coef"] != terms["ref_model"]:
        raise UserError(
            f"kl_coef, ref_model: got {config.kl_coef} and {config.ref_model!r}; a KL term needs both its coefficient and the model "
            "that it pulls to. Pass --kl-coef and --ref-model, or neither."
        )
    if terms["kl_correction"] and not terms["kl_coef"]:
        raise UserError(
            "kl_correction: got False without kl_coef, where there is nothing to correct; leave it out."
        )
    if config.loss_law == "full" and not truncated:
        raise UserError(
            "loss_law: got 'full' without top_k or top_p, where there is no other law; leave it out."
        )
    if config.loss_law == "full" and config.fisher:
        raise UserError(
            "fisher: got loss_law='full', where the gradient of the loss is that of another law than the kernel's; leave one of them out."
        )
    if truncated and terms["ratio"]:
        raise UserError(
            f"ratio: got {config.ratio!r} with top_k or top_p: the stale batch was drawn from sets that an earlier policy kept, which its "
            "log-probs do not tell. Measure the step itself with --update next:CHECKPOINT, or leave --top-k and --top-p out."
        )
    if truncated and terms["kl_coef"] and config.loss_law != "full":
        raise UserError(
            "kl_coef: the reference model keeps other tokens than the policy, so the divergence of the truncated laws may be infinite. "
            "Pass --loss-law full, as TRL has it, or leave --top-k and --top-p out."
        )


def output_directory(config: MeasureConfig) -> Path:
    """The directory for the report: the one asked for if it holds no report yet, else the first free `entropy_report-N`.

    With `resume` it is the one asked for, whatever a run has left in it.

    Raises:
        UserError: the directory asked for holds a report already, or is a file; `resume` without a directory.
    """
    if config.output is not None:
        path = Path(config.output)
        if path.exists() and not path.is_dir():
            raise UserError(f"output: {path} is a file, expected a directory; choose another name.")
        if (path / "report.json").exists() and not config.resume:
            raise UserError(
                f"output: {path} holds a report already, which is kept; choose another directory or remove it."
            )
        return path
    if config.resume:
        raise UserError("resume: of which run? Pass --output with the directory of the run that was stopped.")
    number = 1
    while (path := Path("entropy_report" if number == 1 else f"entropy_report-{number}")).exists():
        number += 1
    return path
