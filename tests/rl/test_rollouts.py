from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_kernels.errors import UserError
from entropy_kernels.rl.rollouts import Rollouts, schema


def make(**changes):
    fields = {
        "prompt_id": ("a", "a", "b", "b"),
        "prompt": ("1+1=", "1+1=", "2+3=", "2+3="),
        "completion": ("2", "34", "", "5"),
        "finish_reason": ("stop", "length", "stop", "stop"),
        "group_index": np.array([3, 3, 8, 8], dtype=np.int32),
        "sample_index": np.array([0, 1, 0, 1], dtype=np.int32),
        "prompt_ids": ((5, 9, 5), (5, 9, 5), (7,), (7,)),
        "completion_ids": ((6, 1), (7, 8, 9), (1,), (4, 1)),
        "logprobs": tuple(
            np.array(x, dtype=np.float32) for x in ([-0.1, -0.5], [-1, -2, -3], [0], [-4, -0.1])
        ),
    }
    return Rollouts(**{**fields, **changes})


def same(a, b):
    return a.to_table().equals(b.to_table(), check_metadata=True)


def test_schema_is_the_documented_one():
    text = [f"{field.name}:{field.type}" for field in schema()]
    assert text == [
        "prompt_id:string",
        "prompt:string",
        "completion:string",
        "finish_reason:string",
        "group_index:int32",
        "sample_index:int32",
        "prompt_ids:list<item: int32>",
        "completion_ids:list<item: int32>",
        "logprobs:list<item: float>",
        "reward:float",
        "advantage:float",
    ]


@pytest.mark.parametrize("scored", [True, False])
def test_round_trip_through_parquet(tmp_path, scored):
    r = make(sampling={"temperature": 0.7, "seed": 3})
    if scored:
        r = r.with_rewards(lambda c, a: float(c == a), {"a": "2", "b": "5"}).with_advantages("grpo")
    else:
        r = replace(r, logprobs=None)
    r.save(tmp_path / "r.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.parquet"]
    back = Rollouts.load(tmp_path / "r.parquet")
    assert same(r, back)
    assert back.sampling == {"temperature": 0.7, "seed": 3}
    assert back.completion_ids == r.completion_ids
    assert (
        (back.reward is None) == (back.logprobs is not None and not scored) or back.reward is None or scored
    )
    if scored:
        assert back.reward.tolist() == [1, 0, 0, 1]
        assert np.array_equal(back.advantage, r.advantage)
        assert back.group_index.dtype == np.int32 and back.reward.dtype == np.float32
    else:
        assert back.reward is None and back.logprobs is None


def test_wider_types_and_extra_columns_from_another_engine(tmp_path):
    table = make().to_table()
    wide = pa.schema(
        [
            pa.field(
                f.name,
                {"int32": pa.int64(), "list<item: int32>": pa.large_list(pa.int64())}.get(
                    str(f.type), f.type
                ),
            )
            for f in table.schema
        ]
    )
    columns = table.cast(wide).drop_columns(["reward", "advantage"])
    columns = columns.set_column(8, "logprobs", table.column("logprobs").cast(pa.list_(pa.float64())))
    pq.write_table(columns.append_column("engine", pa.array(["x"] * 4)), tmp_path / "r.parquet")
    assert same(Rollouts.load(tmp_path / "r.parquet"), make())


def column(name, values, type=None):
    def change(table):
        return table.set_column(table.column_names.index(name), name, pa.array(values, type=type))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["completion_ids"]), "column 'completion_ids' is missing"),
        (
            column("prompt_ids", ["a", "b", "c", "d"]),
            "'prompt_ids' has type string, expected list<item: int32>",
        ),
        (column("group_index", [0.5, 1.5, 2, 3]), "'group_index' has type double"),
        (column("group_index", [2**40] * 4), "'group_index' has type int64"),
        (column("completion_ids", [[6, 1], [], [1], [4, 1]]), "row 1 .prompt 'a'.: completion_ids is empty"),
        (column("completion_ids", [[6, 1], [7, None, 9], [1], [4, 1]]), "'completion_ids' is null in row 1"),
        (column("prompt_id", ["a", None, "b", "b"]), "'prompt_id' is null in row 1"),
        (column("prompt_ids", [[5], [5], [-7], [-7]]), "negative id -7"),
        (column("prompt_ids", [[5], [6], [7], [7]]), "group_index 3 also belongs"),
        (column("group_index", [3, 4, 8, 8]), "several group_index"),
        (column("group_index", [3, 3, 3, 3]), "group_index 3 also belongs to prompt 'a'"),
        (column("sample_index", [0, 0, 0, 1]), "same group_index and sample_index"),
        (column("finish_reason", ["stop", "abort", "stop", "stop"]), "'abort', expected one of stop, length"),
        (column("logprobs", [[-1.0], [-1, -2, -3], [0], [-4, -1]]), "1 logprobs for 2 completion tokens"),
        (column("logprobs", [[-1.0, 2], [-1, -2, -3], [0], [-4, -1]]), "≤ 0"),
        (column("logprobs", [[-1.0, float("nan")], [-1, -2, -3], [0], [-4, -1]]), "finite"),
        (column("reward", [1.0, None, 0, 0]), "'reward' is null in row 1"),
        (column("reward", [1.0, float("inf"), 0, 0]), "reward holds NaN"),
        (lambda t: t.slice(0, 0), "no completions"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, change, message):
    pq.write_table(change(make().to_table()), tmp_path / "r.parquet")
    with pytest.raises(UserError, match=message) as error:
        Rollouts.load(tmp_path / "r.parquet")
    assert "r.parquet" in str(error.value)


def test_files_that_are_not_parquet(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Rollouts.load(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="cannot be read"):
        Rollouts.load(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("padding", "ids", "response"),
    [
        (
            "right",
            [[5, 9, 5, 6, 1, 1], [5, 9, 5, 7, 8, 9], [7, 1, 1, 1, 1, 1], [7, 4, 1, 1, 1, 1]],
            ["000110", "000111", "010000", "011000"],
        ),
        (
            "left",
            [[1, 5, 9, 5, 6, 1], [5, 9, 5, 7, 8, 9], [1, 1, 1, 1, 7, 1], [1, 1, 1, 7, 4, 1]],
            ["000011", "000111", "000001", "000011"],
        ),
    ],
)
def test_token_batch_where_pad_is_eos(padding, ids, response):
    batch = make().token_batch(pad_token_id=1, padding=padding)
    assert batch["input_ids"].tolist() == ids
    assert ["".join(str(int(x)) for x in row) for row in batch["response_mask"]] == response
    assert batch["attention_mask"].sum(1).tolist() == [5, 6, 2, 3]
    assert bool((batch["attention_mask"] | ~batch["response_mask"]).all())
    assert batch["attention_mask"][:, 0 if padding == "right" else -1].all()
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1]
    assert {k: v.dtype for k, v in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.bool,
        "response_mask": torch.bool,
        "prompt_index": torch.int64,
    }


def test_rewards_and_advantages():
    r = make()
    with pytest.raises(UserError, match="no rewards"):
        r.with_advantages("rloo")
    with pytest.raises(UserError, match="none for prompt 'b'"):
        r.with_rewards(lambda c, a: 1.0, {"a": "2"})
    with pytest.raises(UserError, match="is nan"):
        r.with_rewards(lambda c, a: float("nan"), {"a": "2", "b": "5"})
    scored = r.with_rewards(lambda c, a: float(c == a), {"a": "2", "b": "5"})
    assert scored.with_advantages("rloo").advantage.tolist() == [1, -1, -1, 1]
    assert scored.with_advantages("rloo").with_rewards(lambda c, a: 0.0, {"a": "", "b": ""}).advantage is None
    assert r.reward is None
    assert r.truncated_share == 0.25
