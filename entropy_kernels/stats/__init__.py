"""Arrays to estimates: every number with its error; no tokens, models or devices here."""

from __future__ import annotations

from .baselines import BaselineKind, baseline, variance_ratio
from .coefficients import Cotangents, token_contributions, token_cotangent_tangents, token_cotangents
from .compare import Comparison, compare_direct, compare_integrated
from .differences import paired_difference, unpaired_difference
from .estimate import Estimate
from .lag import LagProfile, Lags, Truncated, lag_profile, lag_sums, truncated
from .linear import EtaStar, eta_star, linear_change, quadratic_change
from .mix import Mix, best_mix
from .panels import panel_weights, refine
from .plan import Needed, components, prompt_variance, prompts_needed, within_variance
from .quadrature import integral_weights, nested_error_weights, next_node, radau_nodes
from .ranks import (
    Bootstrapped,
    Held,
    cross_fitted_top,
    doubled_reliability,
    from_halves,
    held_by_top,
    rank_correlations,
)
from .ratio import (
    entropy,
    first_derivative,
    influence_entropy,
    influence_first,
    influence_second,
    second_derivative,
)
from .resampling import Jackknife, jackknife
from .reward import centred_rewards, integrated_reward, linear_reward, reward_cotangents, reward_sums
from .samples import EstimatorKind, Per, PromptSums, TokenCurvature, TokenTangents, TokenValues, prompt_sums
from .sanity import (
    EffectiveSampleSize,
    RaoBlackwellRatio,
    effective_sample_size,
    ess,
    mean_score,
    mean_weight,
    rb_variance_ratio,
    token_mean,
)
from .series import (
    Move,
    cumulative_change,
    integrated_move,
    linear_move,
    measured_move,
    move_difference,
    quadratic_move,
)
from .tails import TAIL_LEVELS, Tails, heavy_tails, tail_index
from .truth import (
    ChangeSums,
    change_sums,
    direct_change,
    influence_change,
    integrated_change,
    integrated_difference,
    integration_error,
    noise_floor,
)
from .two_batch import TwoBatch, two_batch
from .ustatistic import OneBatch, leave_one_out, one_batch, pair_products

__all__ = [
    "BaselineKind",
    "Bootstrapped",
    "ChangeSums",
    "Comparison",
    "Cotangents",
    "EffectiveSampleSize",
    "Estimate",
    "EstimatorKind",
    "EtaStar",
    "Held",
    "Jackknife",
    "LagProfile",
    "Lags",
    "Mix",
    "Move",
    "Needed",
    "OneBatch",
    "Per",
    "PromptSums",
    "RaoBlackwellRatio",
    "TAIL_LEVELS",
    "Tails",
    "TokenCurvature",
    "TokenTangents",
    "TokenValues",
    "Truncated",
    "TwoBatch",
    "baseline",
    "best_mix",
    "centred_rewards",
    "change_sums",
    "compare_direct",
    "compare_integrated",
    "components",
    "cross_fitted_top",
    "cumulative_change",
    "direct_change",
    "doubled_reliability",
    "effective_sample_size",
    "entropy",
    "ess",
    "eta_star",
    "first_derivative",
    "from_halves",
    "heavy_tails",
    "held_by_top",
    "influence_change",
    "influence_entropy",
    "influence_first",
    "influence_second",
    "integral_weights",
    "integrated_change",
    "integrated_difference",
    "integrated_move",
    "integrated_reward",
    "integration_error",
    "jackknife",
    "lag_profile",
    "lag_sums",
    "leave_one_out",
    "linear_change",
    "linear_move",
    "linear_reward",
    "mean_score",
    "mean_weight",
    "measured_move",
    "move_difference",
    "nested_error_weights",
    "next_node",
    "noise_floor",
    "one_batch",
    "pair_products",
    "paired_difference",
    "panel_weights",
    "prompt_sums",
    "prompt_variance",
    "prompts_needed",
    "quadratic_change",
    "quadratic_move",
    "radau_nodes",
    "rank_correlations",
    "rb_variance_ratio",
    "refine",
    "reward_cotangents",
    "reward_sums",
    "second_derivative",
    "tail_index",
    "token_contributions",
    "token_cotangent_tangents",
    "token_cotangents",
    "token_mean",
    "truncated",
    "two_batch",
    "unpaired_difference",
    "variance_ratio",
    "within_variance",
]
