"""Arrays to estimates: every number with its error; no tokens, models or devices here."""

from __future__ import annotations

from .coefficients import Cotangents, token_contributions, token_cotangent_tangents, token_cotangents
from .compare import Comparison, compare_direct, compare_integrated
from .estimate import Estimate
from .linear import EtaStar, eta_star, linear_change, quadratic_change
from .panels import panel_weights, refine
from .quadrature import integral_weights, nested_error_weights, next_node, radau_nodes
from .ranks import (
    Bootstrapped,
    Held,
    cross_fitted_top,
    doubled_reliability,
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
from .reward import centred_rewards, reward_cotangents, reward_sums
from .samples import EstimatorKind, Per, PromptSums, TokenCurvature, TokenTangents, TokenValues, prompt_sums
from .sanity import (
    EffectiveSampleSize,
    RaoBlackwellRatio,
    effective_sample_size,
    ess,
    mean_score,
    mean_weight,
    rb_variance_ratio,
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
from .truth import (
    ChangeSums,
    change_sums,
    direct_change,
    influence_change,
    integrated_change,
    integration_error,
    noise_floor,
)

__all__ = [
    "reward_sums",
    "reward_cotangents",
    "centred_rewards",
    "rank_correlations",
    "held_by_top",
    "doubled_reliability",
    "cross_fitted_top",
    "Held",
    "Bootstrapped",
    "ChangeSums",
    "Comparison",
    "Cotangents",
    "EffectiveSampleSize",
    "Estimate",
    "EstimatorKind",
    "EtaStar",
    "Jackknife",
    "Move",
    "Per",
    "PromptSums",
    "RaoBlackwellRatio",
    "TokenCurvature",
    "TokenTangents",
    "TokenValues",
    "change_sums",
    "compare_direct",
    "compare_integrated",
    "cumulative_change",
    "direct_change",
    "effective_sample_size",
    "entropy",
    "ess",
    "eta_star",
    "first_derivative",
    "influence_change",
    "influence_entropy",
    "influence_first",
    "influence_second",
    "integral_weights",
    "integrated_change",
    "integrated_move",
    "integration_error",
    "jackknife",
    "linear_change",
    "linear_move",
    "mean_score",
    "mean_weight",
    "measured_move",
    "move_difference",
    "nested_error_weights",
    "next_node",
    "noise_floor",
    "panel_weights",
    "prompt_sums",
    "quadratic_change",
    "quadratic_move",
    "radau_nodes",
    "rb_variance_ratio",
    "refine",
    "second_derivative",
    "token_contributions",
    "token_cotangent_tangents",
    "token_cotangents",
]
