"""What each of three ranks runs for tests/test_parallel.py: a vocabulary in shards against the whole, every derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import grad, jvp, vjp

from entropy_kernels import entropy_logprob, linear_entropy_logprob
from entropy_kernels.functional.parallel import (
    vocab_parallel_entropy_logprob,
    vocab_parallel_linear_entropy_logprob,
)

RANKS = 3
V, R, D = 12, 7, 5
Pair = Callable[[Tensor], tuple[Tensor, ...]]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets() -> Tensor:
    return torch.tensor([0, 4, 11, -100, 7, 8, 3])


def columns(x: Tensor) -> Tensor:
    """This rank's part of the last dimension."""
    width = x.shape[-1] // RANKS
    return x[..., dist.get_rank() * width :][..., :width]


def same(got: Any, want: Any, bound: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def mixed(results: tuple[Tensor, ...]) -> Tensor:
    """One loss of all three results, with no symmetry that could hide an error."""
    weight = 1 + torch.arange(results[0].numel()) % 3
    return sum((i + 1) * (weight * x).sum() * (1 + 0.1 * x.mean()) for i, x in enumerate(results))


def check_every_mode(whole: Pair, shards: Pair, x: Tensor, cut: Callable[[Tensor], Tensor]) -> None:
    """`whole` is a function of x, `shards` one of cut(x); the loss is replicated."""
    dx, du = draw(*x.shape, seed=5), draw(*x.shape, seed=6)
    mine, dmine, umine = cut(x), cut(dx), cut(du)

    def f(z: Tensor) -> Tensor:
        return mixed(whole(z))

    def g(z: Tensor) -> Tensor:
        return mixed(shards(z))

    same(shards(mine), whole(x))
    same(jvp(shards, (mine,), (dmine,)), jvp(whole, (x,), (dx,)))
    same(grad(g)(mine), cut(grad(f)(x)))
    same(jvp(grad(g), (mine,), (dmine,))[1], cut(jvp(grad(f), (x,), (dx,))[1]))  # forward over reverse
    same(vjp(grad(g), mine)[1](umine)[0], cut(vjp(grad(f), x)[1](du)[0]))  # reverse over reverse

    def along(h: Pair, v: Tensor) -> Pair:
        return lambda z: jvp(h, (z,), (v,))[1]

    same(
        jvp(along(shards, dmine), (mine,), (umine,))[1], jvp(along(whole, dx), (x,), (du,))[1]
    )  # forward over forward
    same(  # reverse over forward
        grad(lambda z: mixed(along(shards, dmine)(z)))(mine),
        cut(grad(lambda z: mixed(along(whole, dx)(z)))(x)),
    )


def three(result: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in result if x is not None)


def check_rows() -> None:
    z, y = 3 * draw(R, V, seed=1), targets()
    tau = torch.linspace(0.5, 2.0, R, dtype=torch.float64)
    check_every_mode(
        lambda x: three(entropy_logprob(x, y, temperature=tau)),
        lambda x: three(vocab_parallel_entropy_logprob(x, y, temperature=tau)),
        z,
        columns,
    )
    assert vocab_parallel_entropy_logprob(columns(z)).logprob is None


def check_padding_and_masks() -> None:
    z, y = draw(R, V, seed=2), targets().clamp_max(6)
    z[0, 4:8] = -torch.inf  # a shard without mass
    z[1, :4] = z[1, 8:] = -torch.inf  # a shard with all of it
    y[0], y[1] = 1, 5
    for size in (V, 7, 4):  # the last leaves two ranks with padding alone
        inside = torch.where(y < size, y, -100)
        inside[1] = -100 if size == 4 else inside[1]
        kept = z.clone()
        if size == 4:
            kept[1, 0] = 0.3
        options: dict[str, Any] = {"vocab_size": size}
        same(
            vocab_parallel_entropy_logprob(columns(kept), inside, **options),
            entropy_logprob(kept, inside, **options),
        )
        got = grad(lambda x, t=inside, o=options: mixed(three(vocab_parallel_entropy_logprob(x, t, **o))))(
            columns(kept)
        )
        want = grad(lambda x, t=inside, o=options: mixed(three(entropy_logprob(x, t, **o))))(kept)
        same(got, columns(want))


def check_peaked() -> None:
    """An entropy of 1e-6 nats in float32, its mass in another shard than its peak."""
    z = torch.full((1, V), -40.0)
    z[0, 2], z[0, 9] = 0.0, -16.5
    y = torch.tensor([9])
    want = entropy_logprob(z.double(), y)
    for got, exact in zip(vocab_parallel_entropy_logprob(columns(z), y), want, strict=True):
        same(got.double(), exact, 1e-6)


def check_uneven() -> None:
    z, y = draw(R, V, seed=3), targets()
    edges = [0, 2, 9, V]
    rank = dist.get_rank()
    mine = z[:, edges[rank] : edges[rank + 1]]
    same(vocab_parallel_entropy_logprob(mine, y, start=edges[rank]), entropy_logprob(z, y))


def check_linear() -> None:
    h, W, b, y = draw(R, D, seed=7), 2 * draw(V, D, seed=8), draw(V, seed=9), targets()
    width, first = V // RANKS, dist.get_rank() * (V // RANKS)
    shard = slice(first, first + width)
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 3.0, "workspace": 128}
    check_every_mode(
        lambda x: three(linear_entropy_logprob(x, W, y, bias=b, **options)),
        lambda x: three(vocab_parallel_linear_entropy_logprob(x, W[shard], y, bias=b[shard], **options)),
        h,
        lambda x: x,
    )
    check_every_mode(
        lambda x: three(linear_entropy_logprob(h, x, y, bias=b, **options)),
        lambda x: three(vocab_parallel_linear_entropy_logprob(h, x, y, bias=b[shard], **options)),
        W,
        lambda x: x[shard],
    )


def check_errors() -> None:
    z = draw(R, V, seed=1)
    with pytest.raises(ValueError, match="target 12 is held by no rank"):
        vocab_parallel_entropy_logprob(columns(z), torch.full((R,), V))
    with pytest.raises(ValueError, match="or by several"):
        vocab_parallel_entropy_logprob(columns(z), torch.full((R,), 1), start=0)
    if dist.get_rank() == 2:
        with pytest.raises(ValueError, match="all of them padding"):
            vocab_parallel_linear_entropy_logprob(draw(R, D, seed=7), draw(4, D, seed=8), vocab_size=8)


def check_bits() -> None:
    result = torch.stack(
        three(vocab_parallel_entropy_logprob(columns(draw(R, V, seed=4).float()), targets()))
    )
    everyone = [torch.empty_like(result) for _ in range(RANKS)]
    dist.all_gather(everyone, result)
    assert all(torch.equal(result, other) for other in everyone)


def main(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    try:
        for check in (
            check_rows, check_padding_and_masks, check_peaked, check_uneven, check_linear, check_errors, check_bits,
        ):  # fmt: skip
            check()
    finally:
        dist.destroy_process_group()
