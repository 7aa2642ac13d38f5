from __future__ import annotations

import pytest
import torch

from entropy_kernels.errors import UserError
from entropy_kernels.rl.advantages import advantages, degenerate_groups, loss_weights

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 5.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, 7, 7, 2, 2])


def test_grpo_by_hand():
    a = advantages(REWARDS, GROUPS, kind="grpo")
    std = (1 / 3) ** 0.5  # of 1, 0, 0, 1 with 3 in the denominator
    big, small = 0.5 / (std + 1e-4), 1.0 / (2**0.5 + 1e-4)
    torch.testing.assert_close(a, torch.tensor([big, -big, -big, big, -small, small], dtype=torch.float64))


def test_grpo_is_what_trl_computes():
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    r = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))  # float32, as TRL works
    wanted = (r - r.nanmean(dim=1, keepdim=True)) / (nanstd(r, dim=1, keepdim=True) + 1e-4)
    got = advantages(r.flatten(), torch.arange(5).repeat_interleave(8), kind="grpo")
    torch.testing.assert_close(got, wanted.flatten(), rtol=1e-6, atol=1e-7)


def test_nostd_and_rloo_by_hand():
    half = torch.tensor([0.5, -0.5, -0.5, 0.5, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(advantages(REWARDS, GROUPS, kind="grpo_nostd"), half)
    # 1 against the mean of 0, 0, 1; 3 against 5
    left_out = torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, -2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(advantages(REWARDS, GROUPS, kind="rloo"), left_out)


@pytest.mark.parametrize("kind", ["grpo", "grpo_nostd", "rloo"])
def test_order_of_rows_does_not_matter(kind):
    order = torch.tensor([4, 1, 0, 5, 3, 2])
    shuffled = advantages(REWARDS[order], GROUPS[order], kind=kind)
    assert torch.equal(shuffled, advantages(REWARDS, GROUPS, kind=kind)[order])


@pytest.mark.parametrize("kind", ["grpo", "grpo_nostd", "rloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(kind, dtype):
    r = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0], dtype=dtype)  # the float mean of three 0.1 is not 0.1
    g = torch.tensor([0, 0, 0, 1, 1])
    a = advantages(r, g, kind=kind)
    assert a.dtype == dtype
    assert torch.equal(a[:3], torch.zeros(3, dtype=dtype))
    assert degenerate_groups(r, g) == (1, 2)


def test_group_of_one_and_other_refusals():
    with pytest.raises(UserError, match="1 of 2 groups hold a single response"):
        advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), kind="rloo")
    with pytest.raises(UserError, match="grpo, grpo_nostd, rloo"):
        advantages(REWARDS, GROUPS, kind="ppo")
    with pytest.raises(UserError, match="NaN"):
        advantages(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), kind="grpo")
    with pytest.raises(UserError, match="shape"):
        advantages(REWARDS, GROUPS[:3], kind="grpo")


MASK = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
PAIRS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("grpo", [1 / 8, 1 / 12, 1 / 4, 1 / 16]),
        ("dapo", [1 / 10] * 4),
        ("dr_grpo_longest", [1 / 12, 1 / 12, 1 / 16, 1 / 16]),
        ("dr_grpo_constant", [1 / 24] * 4),
    ],
)
def test_loss_weights_by_hand(kind, row):
    omega = loss_weights(MASK, PAIRS, kind=kind, max_new_tokens=6)
    torch.testing.assert_close(
        omega, torch.tensor(row, dtype=torch.float64)[:, None] * MASK, rtol=1e-14, atol=0
    )


def test_loss_weights_make_trl_losses():
    """ω against the loss of TRL's trainer, written out: per_token_loss * mask, reduced as it does."""
    loss = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = MASK.double()
    written_out = {
        "grpo": ((loss * mask).sum(-1) / mask.sum(-1)).mean(),
        "dapo": (loss * mask).sum() / mask.sum(),
        "dr_grpo_constant": (loss * mask).sum() / (loss.size(0) * 6),
    }
    for kind, wanted in written_out.items():
        torch.testing.assert_close(
            (loss_weights(MASK, PAIRS, kind=kind, max_new_tokens=6) * loss).sum(), wanted
        )


def test_loss_weights_refusals():
    with pytest.raises(UserError, match="1 of 4 are empty"):
        loss_weights(MASK & torch.tensor([[1], [1], [0], [1]], dtype=torch.bool), PAIRS, kind="grpo")
    for limit in (None, 3):
        with pytest.raises(UserError, match="max_new_tokens"):
            loss_weights(MASK, PAIRS, kind="dr_grpo_constant", max_new_tokens=limit)
    with pytest.raises(UserError, match="dapo"):
        loss_weights(MASK, PAIRS, kind="bnpo")
    with pytest.raises(UserError, match="shape"):
        loss_weights(MASK[0], PAIRS, kind="grpo")
