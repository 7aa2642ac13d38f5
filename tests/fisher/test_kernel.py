"""The Fisher kernel by every method against gradients taken one sequence at a time, in float64."""

from __future__ import annotations

import families
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from entropy_kernels import fisher_cost, fisher_kernel, token_stats
from entropy_kernels.errors import UserError
from entropy_kernels.fisher import cost
from entropy_kernels.fisher.capture import _two, gradients, matrix_shape, survey
from entropy_kernels.policy import Policy, TokenBatch, micro_batches

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
MODELS = {
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "llama_bias": ("llama", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {}),
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}),
}


def make(name: str, *, lora: bool = False, **changes) -> Policy:
    family, options = MODELS.get(name, (name, {}))
    model = families.model(family, **(options | changes))
    if lora:
        torch.manual_seed(3)
        targets = TARGETS.get(family, LINEAR)
        model = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn(p.shape).to(p.dtype))
    return Policy.from_model(model, temperature=0.8, micro_batch_tokens=24)


def positive(policy: Policy, seed: int = 4) -> dict[str, torch.Tensor]:
    """A diagonal over three decades."""
    return {name: (1.15 * x).exp() for name, x in tiny.direction(policy, seed).items()}


def each_gradient(policy: Policy, batch: TokenBatch) -> torch.Tensor:
    """[N, p] from the definition: autograd on the model's rows, one unpadded sequence at a time, nothing of the room used."""
    found = []
    for i in range(len(batch.input_ids)):
        ids = batch.input_ids[i][batch.attention_mask[i]][None]
        response = batch.response_mask[i][batch.attention_mask[i]][None]
        whole = torch.ones_like(ids, dtype=torch.bool)
        (micro,) = micro_batches(policy, TokenBatch(ids, whole, response, torch.zeros(1, dtype=torch.int64)))
        leaves = {name: p.clone().requires_grad_() for name, p in policy.params.items()}
        g = torch.autograd.grad(policy.rows(leaves, micro)[1].sum(), list(leaves.values()))
        found.append(torch.cat([x.flatten() for x in g]))
    return torch.stack(found)


def flat(P) -> torch.Tensor:
    return torch.cat([x.flatten() for x in P.values()])


def brute_force(policy: Policy, batch: TokenBatch, P=None, other: Policy | None = None):
    G = each_gradient(policy, batch)
    Q = G if other is None else each_gradient(other, batch)
    return G @ (Q if P is None else Q * flat(P)).t()


def off(got, want):
    """Largest error of an entry relative to √(K(t,t) K(t',t')), so that small gradients count as much as large ones."""
    size = want.diag().sqrt()
    return ((got - want).abs() / (size[:, None] * size)).max().item()


FORWARD = ("llama_tied", "qwen2_untied", "qwen3_tied", "gpt2")  # forward mode costs two passes per column


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_method_equals_brute_force(name, lora):
    policy, batch = make(name, lora=lora), tiny.batch()
    G, P = each_gradient(policy, batch), positive(policy)
    want, weighted = G @ G.t(), G @ (G * flat(P)).t()
    assert (
        off(want, want.diag().diag()) > 0.01 and off(weighted, want) > 0.01
    )  # there is something to get wrong
    for method in ("layers", "ghost", *(() if lora else ("reference",))):
        got = fisher_kernel(policy, batch, method=method)
        assert got.dtype == torch.float64 and off(got, want) < 1e-10, method
    for method in ("auto", "materialised", *(("jvp",) if name in FORWARD else ())):
        assert off(fisher_kernel(policy, batch, preconditioner=P, method=method), weighted) < 1e-10, method
    left = fisher_kernel(policy, tiny.batch(left=True), preconditioner=P, method="layers")
    assert off(left, weighted) < 1e-10


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_every_family_is_covered(family):
    policy, batch = make(family), tiny.batch()
    assert off(fisher_kernel(policy, batch, method="layers"), brute_force(policy, batch)) < 1e-10


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_symmetric_and_positive_semi_definite(lora):
    policy, batch = make("qwen2_tied", lora=lora), tiny.batch()
    repeated = TokenBatch(*(torch.cat([x, x[:2]]) for x in batch))  # eight sequences, rank six
    K = fisher_kernel(policy, repeated, preconditioner=positive(policy))
    assert torch.equal(K, K.t())
    values = torch.linalg.eigvalsh(K)
    assert values[0] > -1e-10 * values[-1] and values[2] > 1e-8 * values[-1]


@pytest.mark.parametrize("method", ["layers", "materialised", "jvp", "reference"])
def test_rectangles_between_two_policies(method):
    policy, batch = make("qwen3_tied"), tiny.batch()
    other = policy.shifted(tiny.direction(policy), 0.03)
    P = positive(policy)
    want = brute_force(policy, batch, P, other)
    local = brute_force(policy, batch, P)
    assert ((want - local).abs().max() / local.abs().max()) > 0.01
    size = local.diag().sqrt()[:, None] * brute_force(other, batch, P).diag().sqrt()
    chosen = torch.tensor([4, 1])
    cols = TokenBatch(*(x[chosen] for x in batch))
    got = fisher_kernel(policy, batch, cols, cols_policy=other, preconditioner=P, method=method)
    assert got.shape == (6, 2) and ((got - want[:, chosen]).abs() / size[:, chosen]).max() < 1e-10
    same = fisher_kernel(policy, batch, cols_policy=other, preconditioner=P, method=method)
    assert ((same - want).abs() / size).max() < 1e-10


def test_ghost_rectangles():
    policy, batch = make("gpt2"), tiny.batch()
    want = fisher_kernel(policy, batch, method="reference")
    cols = TokenBatch(*(x[3:] for x in batch))
    got = fisher_kernel(policy, batch, cols, method="ghost")
    size = want.diag().sqrt()
    assert ((got - want[:, 3:]).abs() / (size[:, None] * size[3:])).max() < 1e-10


def test_tokens_against_sequences():
    policy, batch = make("gpt2"), tiny.batch(left=True)
    P = positive(policy)
    want = fisher_kernel(policy, batch, preconditioner=P, level="token", method="reference")
    got = fisher_kernel(policy, batch, preconditioner=P, level="token")
    assert got.shape == (*batch.input_ids.shape, 6) and not bool(got[~batch.response_mask].any())
    assert (got - want).abs().max() < 1e-10 * want.abs().max()
    whole = fisher_kernel(policy, batch, preconditioner=P, method="materialised")
    assert off(got.sum(1), whole) < 1e-10


def test_small_budgets_take_more_passes_and_give_the_same():
    policy, batch = make("llama_tied"), tiny.batch()
    P = positive(policy)
    want = fisher_kernel(policy, batch, method="reference", preconditioner=P)
    found, side = survey(policy, batch), cost.side(batch)
    budgets, plans = [1e8], []
    with pytest.raises(UserError, match="memory_budget"):
        while True:  # down to the smallest that is enough
            plans.append(
                cost.estimate(
                    policy, found, side, None, preconditioned=True, method="layers", budget=budgets[-1]
                )
            )
            assert plans[-1].peak_bytes["layers"] <= budgets[-1]
            budgets.append(budgets[-1] / 1.05)
    passes = [plan.passes for plan in plans]
    assert passes == sorted(passes) and passes[0] == 1 and passes[-1] > 10
    split = [p for group in plans[-1].groups for p in group if p.span != (0, found.layouts[p.name].C)]
    assert any("embed" in p.name for p in split)
    for budget in (budgets[-2], budgets[-8]):
        got = fisher_kernel(policy, batch, preconditioner=P, memory_budget=budget, method="layers")
        assert off(got, want) < 1e-10
    with pytest.raises(UserError, match="memory_budget: .*at least"):
        fisher_kernel(policy, batch, memory_budget=1e4)


def test_factors_lie_together_and_shared_inputs_once():
    policy = make("llama_tied")
    batch = tiny.batch()
    found = gradients(policy, batch, {name: (0, matrix_shape(p)[0]) for name, p in policy.params.items()})
    terms = [term for samples in found.values() for sample in samples for term in sample]
    assert len({x.untyped_storage().data_ptr() for term in terms for x in term}) == 1
    q, k, o = (found[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qko")
    for i in range(len(q)):
        assert q[i][0].right.data_ptr() == k[i][0].right.data_ptr()  # q and k read the same
        assert q[i][0].right.data_ptr() != o[i][0].right.data_ptr()


def test_float32_is_close_to_float64_and_stays_float32():
    batch = tiny.batch()
    single, double = make("qwen2_tied", dtype=torch.float32), make("qwen2_tied")
    got, want = fisher_kernel(single, batch), fisher_kernel(double, batch)
    assert got.dtype == torch.float32 and off(got.double(), want) < 1e-4


def test_truncated_policies():
    policy = Policy.from_model(families.model("qwen2"), temperature=0.8, micro_batch_tokens=24, top_k=5)
    batch = tiny.batch()
    ids, generator = batch.input_ids.clone(), torch.Generator().manual_seed(6)
    for i, column in batch.response_mask.nonzero().tolist():  # tokens that the truncated policy can draw
        before = ids[i, :column][batch.attention_mask[i, :column]][None]
        best = policy.model(before).logits[0, -1].topk(5).indices
        ids[i, column] = best[torch.randint(5, (), generator=generator)]
    batch = batch._replace(input_ids=ids)
    want = brute_force(policy, batch)
    assert off(brute_force(policy.full(), batch), want) > 0.01
    got = fisher_kernel(policy, batch, method="layers")
    assert off(got, want) < 1e-10
    assert (
        cost.estimate(
            policy,
            survey(policy, batch),
            cost.side(batch),
            None,
            preconditioned=False,
            method="layers",
            budget=1e9,
        ).passes
        == 1
    )  # followed layer by layer, not looped
    assert "held" not in survey(policy, batch).layouts["model.layers.0.mlp.up_proj.weight"].terms


def test_few_columns_of_long_rows_go_through_forward_mode():
    policy, batch = make("llama_tied"), tiny.batch()
    one = TokenBatch(*(x[:1] for x in batch))
    few, many = fisher_cost(policy, batch, one, preconditioner=positive(policy)), fisher_cost(policy, batch)
    assert few.method == min(("layers", "jvp"), key=few.flops.get) and "operations" in few.reason
    assert many.method == "layers" and many.flops["jvp"] > many.flops["layers"]


def test_a_parameter_used_where_no_layer_shows_it_is_refused_or_followed():
    model = families.model("llama", tie_word_embeddings=False)
    layer, table = model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: (
        forward(x) + 0.3 * torch.nn.functional.linear(x.tanh(), table.weight)
    )  # unseen by table
    policy = Policy.from_model(model)
    with pytest.raises(UserError, match="down_proj.weight by sequence"):
        fisher_kernel(policy, tiny.batch(), method="layers")
    assert fisher_kernel(policy, tiny.batch(), method="reference").shape == (6, 6)


def test_the_kernel_averages_to_zero_under_the_policy():
    """E_t[K(t, t')] = 0, over all responses of two tokens to one prompt: scores have mean zero."""
    policy = make("qwen3_tied", vocab_size=5)
    responses = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    ids = torch.cat([torch.tensor([[3, 1]]).expand(25, 2), responses], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, mask, mask & (torch.arange(4) > 1), torch.zeros(25, dtype=torch.int64))
    K = fisher_kernel(policy, batch, preconditioner=positive(policy))
    probability = token_stats(policy, batch).logprob.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    assert (probability @ K).abs().max() < 1e-10 * (probability @ K.abs()).max()


def test_the_check_is_on_sequences_that_differ():
    batch = tiny.batch()
    order = batch.attention_mask.sum(1).argsort(stable=True, descending=True)
    twice = TokenBatch(*(torch.cat([x[order[:1]], x]) for x in batch))
    assert _two(twice).tolist() == [0, order[1].item() + 1]
    assert _two(TokenBatch(*(x[:1] for x in batch))).tolist() == [0]


def test_input_that_does_not_fit_is_refused():
    policy, batch = make("llama_tied"), tiny.batch()
    P = positive(policy)
    name = next(iter(P))
    for options, message in (
        ({"level": "word"}, "level: got 'word'"),
        ({"method": "magic"}, "method: got 'magic'"),
        ({"level": "token", "method": "ghost"}, "at token level"),
        ({"preconditioner": P, "method": "ghost"}, "'ghost'"),
        ({"preconditioner": {k: v for k, v in P.items() if k != name}}, "preconditioner: expected exactly"),
        ({"preconditioner": P | {"other": P[name]}}, "unknown"),
        ({"preconditioner": P | {name: P[name][:1]}}, "shape"),
        ({"preconditioner": P | {name: 0 * P[name]}}, "positive"),
        ({"cols_policy": make("qwen3")}, "cols_policy: expected the same model"),
        ({"cols": TokenBatch(*(x[:, :3] for x in batch[:3]), batch.prompt_index)}, "batch"),
    ):
        with pytest.raises(UserError, match=message):
            fisher_kernel(policy, batch, **options)
