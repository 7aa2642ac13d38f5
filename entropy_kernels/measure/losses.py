r"""The loss that the trainer minimised on U: its terms as weights of every token's ∇S and ∇H, and what they were made from.

    −Σ ω A S     or, for stale samples, the clipped ratio of it     + β Σ ω KL estimate     − c mean H

The formulas are those of `rl.advantages` and `rl.losses`; here it is decided which of them a run has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..attribution import TokenWeights
from ..checkpoints import adapter_directory, logged_loss
from ..derivatives import token_stats
from ..errors import UserError
from ..policy import Policy, TokenBatch
from ..rl.advantages import loss_weights
from ..rl.losses import RatioWeights, entropy_bonus_weights, kl_estimate, kl_weights, ratio_weights
from ..rl.rollouts import Rollouts
from .config import MeasureConfig
from .store import NOWHERE, Store

CLIP = 0.2  # of TRL and of the PPO paper


class LossTerms(NamedTuple):
    """Log-probs [N, T] of U's tokens that the loss is made from; None where it has no such term."""

    logprob: Tensor | None = None  # of the policy that is stepped from
    reference: Tensor | None = None  # of the reference model


NO_TERMS = LossTerms()


def check_logged(config: MeasureConfig) -> None:
    """Refuse a loss without a term that the checkpoint's log shows, unless it is said to be left out.

    Raises:
        UserError: naming the term and the flag.
    """
    if config.ckpt is None:
        return
    logged = logged_loss(config.ckpt)
    otherwise = "or measure the step that was taken with --update next:CHECKPOINT, which needs no loss."
    if logged.others:
        raise UserError(
            f"ckpt: the log in {config.ckpt} shows that it was trained with {logged.others[0]}, whose gradient this version does not "
            f"rebuild. Pass --update next:CHECKPOINT to measure the step that was taken; expected one of the losses of --loss, {otherwise}"
        )
    if logged.kl is not None and config.kl_coef is None:
        raise UserError(
            f"kl_coef: the log in {config.ckpt} has a KL divergence from a reference model (last {logged.kl:.3g} nats per token), so the "
            f"trainer's loss had a KL term. Pass its --kl-coef and --ref-model, --kl-coef 0 to leave it out all the same, {otherwise}"
        )
    if logged.entropy_coef is not None and config.entropy_coef is None:
        raise UserError(
            f"entropy_coef: the log in {config.ckpt} has an entropy bonus (last coefficient {logged.entropy_coef:g}). Pass its "
            f"--entropy-coef, 0 to leave it out all the same, {otherwise}"
        )


def loss_policy(config: MeasureConfig, policy: Policy) -> Policy:
    """The policy whose log-probs stand in the loss."""
    return policy.full() if config.loss_law == "full" else policy


def loss_terms(
    config: MeasureConfig, policy: Policy, U: Rollouts, batch: TokenBatch, store: Store = NOWHERE
) -> LossTerms:
    """Evaluate what the ratio and the KL term need; nothing for a plain policy gradient.

    Raises:
        UserError: stale samples without their sampler's log-probs, or a reference model of another kind.
    """
    if config.ratio == "none" and not config.kl_coef:
        return LossTerms()
    if config.ratio != "none" and U.logprobs is None:
        raise UserError(
            f"rollouts_u: {config.rollouts_u} has no logprobs, and the importance ratio needs those of the policy that drew the samples. "
            "Add the column, or leave --ratio out if they come from the checkpoint itself."
        )

    def logprobs(name: str, of: Policy) -> Tensor:
        found = store.in_parts(name, lambda parts: token_stats(of, batch, parts=parts)._asdict())
        return found["logprob"]

    own = logprobs("loss_logprob", loss_policy(config, policy))
    if not config.kl_coef:
        return LossTerms(own)
    assert config.ref_model is not None  # the configuration saw to it
    where = Path(config.ref_model)
    if adapter_directory(config.ref_model) is not None:
        base = config.model
    elif where.is_dir() and not any((where / f"tokenizer{end}.json").exists() for end in ("", "_config")):
        base = config.model or config.ckpt  # a reference needs no tokenizer of its own
    else:
        base = None
    reference = Policy.from_pretrained(
        config.ref_model,
        temperature=config.temperature,
        dtype=config.precision,
        device=config.device,
        micro_batch_tokens=config.micro_batch_tokens,
        base=base,
    )
    sizes = [p.model.config.get_text_config().vocab_size for p in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"ref_model: {config.ref_model} has a vocabulary of {sizes[1]} tokens, the policy of {sizes[0]}; expected the model that the "
            "training started from."
        )
    return LossTerms(own, logprobs("loss_reference", reference))


def token_weights(
    config: MeasureConfig, U: Rollouts, batch: TokenBatch, terms: LossTerms = NO_TERMS
) -> dict[str, TokenWeights]:
    """The parts of the loss by name, each as weights of ∇S and ∇H of every token: "policy_gradient", "kl", "entropy_bonus".

    Raises:
        UserError: there is nothing to learn from U.
    """
    omega, advantage = _omega(config, U, batch), _advantage(U)
    if not bool((advantage != 0).any()):
        raise UserError(
            "rollouts_u: every advantage is zero (all responses to a prompt were rewarded alike), so there is no update to measure. "
            "Use more prompts (--prompts-u), larger groups (--group-size), or prompts of medium difficulty."
        )
    if config.ratio == "none":
        parts = {"policy_gradient": TokenWeights(-omega * advantage.unsqueeze(1))}
    else:
        parts = {"policy_gradient": TokenWeights(_ratio(config, U, batch, terms).logprob)}
    if config.kl_coef:
        assert terms.logprob is not None and terms.reference is not None  # of loss_terms
        level = "token" if config.ratio == "none" else config.ratio
        parts["kl"] = TokenWeights(
            kl_weights(
                omega,
                terms.logprob,
                terms.reference,
                batch.response_mask,
                coefficient=config.kl_coef,
                ratio=_ratio(config, U, batch, terms).ratio if config.kl_correction else None,
                level=level,
            )
        )
    if config.entropy_coef:
        parts["entropy_bonus"] = TokenWeights(
            None, entropy_bonus_weights(batch.response_mask, config.entropy_coef)
        )
    return parts


def describe_loss(config: MeasureConfig, U: Rollouts, batch: TokenBatch, terms: LossTerms) -> dict[str, Any]:
    """The loss's terms with what they amount to on U, for the report, and in words."""
    mask = batch.response_mask
    found: dict[str, Any] = {}
    words = [f"Loss {config.loss} with advantages {config.advantage}"]
    if config.ratio == "none":
        words.append("importance ratio 1 (samples of the checkpoint itself)")
    else:
        low, high = _clip(config)
        made = _ratio(config, U, batch, terms)
        found["ratio"] = {
            "level": config.ratio,
            "clip_low": low,
            "clip_high": high,
            "mean": float(made.ratio[mask].mean()),
            "clipped_share": float(made.clipped[mask].mean()),
        }
        words.append(f"importance ratio per {config.ratio}, clipped below {1 - low:g} and above {1 + high:g}")
    if config.kl_coef:
        assert terms.logprob is not None and terms.reference is not None  # of loss_terms
        estimate = kl_estimate(terms.logprob, terms.reference)
        if config.kl_correction:
            estimate = estimate * _ratio(config, U, batch, terms).ratio
        divergence = estimate[mask].mean()
        found["kl"] = {
            "coefficient": config.kl_coef,
            "reference": config.ref_model,
            "nats_per_token": float(divergence),
            "times_ratio": config.kl_correction,
        }
        words.append(
            f"KL term {config.kl_coef:g} to {config.ref_model}"
            + (", times the ratio" if config.kl_correction else "")
        )
    else:
        words.append("no KL term")
    words.append(f"entropy bonus {config.entropy_coef:g}" if config.entropy_coef else "no entropy bonus")
    if config.loss_law == "full":
        words.append("log-probs of the full law")
    return {**found, "words": "; ".join(words) + "." + _of_the_log(config)}


def _of_the_log(config: MeasureConfig) -> str:
    """What the log shows and the loss above need not have."""
    if config.ckpt is None:
        return ""
    logged = logged_loss(config.ckpt)
    text = ""
    if logged.clipped and config.ratio == "none":
        share = f"{logged.clipped:.2%}"
        text += f" The trainer's log has clipped tokens (up to {share}), as the later steps on a batch have; this is taken as a first one."
    if logged.sampler_corrected:
        text += " The trainer's log has weights that make up for its sampler's mismatch; they are taken as 1 here."
    return text


def _clip(config: MeasureConfig) -> tuple[float, float]:
    low = CLIP if config.clip_low is None else config.clip_low
    return low, low if config.clip_high is None else config.clip_high


def _ratio(config: MeasureConfig, U: Rollouts, batch: TokenBatch, terms: LossTerms) -> RatioWeights:
    """Of every token; 1 where the samples count as the checkpoint's own."""
    assert terms.logprob is not None  # of loss_terms
    mask = batch.response_mask
    now = terms.logprob.double()
    old = now.clone()
    if config.ratio != "none":
        assert U.logprobs is not None  # of loss_terms
        old[mask] = torch.from_numpy(np.concatenate([np.asarray(x, dtype=np.float64) for x in U.logprobs]))
    low, high = _clip(config)
    return ratio_weights(
        _omega(config, U, batch),
        _advantage(U),
        now - old,
        mask,
        level="token" if config.ratio == "none" else config.ratio,
        clip_low=low,
        clip_high=high,
    )


def _omega(config: MeasureConfig, U: Rollouts, batch: TokenBatch) -> Tensor:
    return loss_weights(
        batch.response_mask,
        torch.as_tensor(np.asarray(U.group_index)).long(),
        kind=config.loss,
        max_new_tokens=config.max_new_tokens,
    ).double()


def _advantage(U: Rollouts) -> Tensor:
    assert U.advantage is not None  # get_rollouts saw to it
    return torch.as_tensor(np.asarray(U.advantage), dtype=torch.float64)
