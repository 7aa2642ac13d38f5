"""What a stopped run keeps: whole files, read back bit for bit, of this run only."""

from __future__ import annotations

import errno
import math

import numpy as np
import pytest
import tiny
import torch

from entropy_kernels.derivatives import token_curvature, token_gradient, token_stats, token_tangents
from entropy_kernels.errors import UserError
from entropy_kernels.measure import store as store_module
from entropy_kernels.measure.store import NOWHERE, Store, open_store, read_tensors, write_tensors
from entropy_kernels.policy import Policy


class Stop(Exception):
    pass


def never():
    raise AssertionError("computed again")


def test_a_finished_stage_comes_back_bit_for_bit(tmp_path):
    store = Store(tmp_path, "a")
    kinds = {
        "double": torch.randn(3, 2, dtype=torch.float64).t(),
        "half": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(math.nan),
        "empty": torch.zeros(0, 3),
        "mask": np.array([True, False]),
        "ids": np.arange(3, dtype=np.int32),
    }
    computed = store.tensors("stage_1e-06", lambda: kinds)
    again = store.tensors("stage_1e-06", never)
    assert list(computed) == list(again) == list(kinds)  # the order of parameters is that of sums
    for name, x in kinds.items():
        want = torch.as_tensor(x)
        for found in (computed[name], again[name]):
            assert found.dtype == want.dtype and torch.equal(found.nan_to_num(7), want.nan_to_num(7))
    assert store.json("j", lambda: {"a": (1, math.nan)})["a"][0] == store.json("j", never)["a"][0] == 1


def test_nowhere_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert NOWHERE.in_parts("x", lambda parts: {"a": torch.ones(1), "none": torch.tensor(parts is None)})[
            "none"
        ]
    assert NOWHERE.within("y").file("z") is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "another run", "empty"])
def test_a_file_that_is_not_whole_counts_as_absent(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(100.0)}, fingerprint="a")
    assert read_tensors(path, "a") is not None
    data = bytearray(path.read_bytes())
    if damage == "another run":
        assert read_tensors(path, "b") is None
        return
    data = {"cut": data[:-7], "empty": b"", "flipped": data[:-1] + bytes([data[-1] ^ 1])}[damage]
    path.write_bytes(data)
    assert read_tensors(path, "a") is None


class Failing(dict):
    """Parts that stop the run when the given one has been put."""

    def __init__(self, inner, last):
        super().__init__()
        self.inner, self.last = inner, last

    def __contains__(self, number):
        return number in self.inner

    def __getitem__(self, number):
        return self.inner[number]

    def __iter__(self):
        return iter(self.inner)

    def __setitem__(self, number, tensors):
        self.inner[number] = tensors
        if number == self.last:
            raise Stop


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("function", [token_stats, token_tangents, token_curvature, token_gradient])
def test_evaluation_goes_on_after_the_last_finished_micro_batch(tmp_path, monkeypatch, function, last):
    monkeypatch.setattr(store_module, "_WRITING_SHARE", math.inf)  # write every sum
    policy, batch = tiny.policy(dtype=torch.float32), tiny.batch()
    counted = []

    def evaluate(parts):
        def progress(n):
            counted.append(n)

        if function is token_gradient:
            weight = torch.ones(batch.input_ids.shape)
            return token_gradient(policy, batch, logprob_weight=weight, progress=progress, parts=parts)
        rest = () if function is token_stats else (tiny.direction(policy),)
        return function(policy, batch, *rest, progress=progress, parts=parts)._asdict()

    want = evaluate(None)
    whole = list(counted)
    assert len(whole) > last + 1  # else nothing would be left to do
    store, running = Store(tmp_path, "a"), function is token_gradient
    with pytest.raises(Stop):
        store.in_parts("s", lambda parts: evaluate(Failing(parts, last)), running=running)
    rows, calls = Policy.rows, []
    monkeypatch.setattr(Policy, "rows", lambda *a: calls.append(1) or rows(*a))
    counted.clear()
    found = store.in_parts("s", evaluate, running=running)
    assert (
        len(calls) == len(whole) - last - 1
    )  # one call of the model for each micro-batch that was not finished
    assert counted == whole  # the bar still ends full
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert not (tmp_path / "s.parts").exists()


def test_a_running_sum_keeps_its_last_part_and_writes_seldom(tmp_path):
    parts = Store(tmp_path).parts("sum", running=True)
    for number in range(50):
        parts[number] = (torch.full((1000,), float(number)),)
    kept = list(parts)
    assert len(kept) == 1 and parts[kept[0]][0][0] == kept[0]
    assert len(list((tmp_path / "sum.parts").iterdir())) == 1
    parts.next_write = math.inf
    parts[99] = (torch.zeros(1),)
    assert list(parts) == kept


def test_no_room_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise store_module.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(OSError) as error:
        Store(tmp_path).tensors("x", lambda: {"a": torch.ones(1)})
    assert error.value.errno == errno.ENOSPC
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_stopped_run_goes_on_only_when_asked_and_only_with_the_same(tmp_path):
    run = {"prompts_e": 64, "etas": (1e-6,), "nan": None}
    open_store(tmp_path, run, resume=False).tensors("x", lambda: {"a": torch.ones(1)})
    with pytest.raises(UserError, match="--resume"):
        open_store(tmp_path, run, resume=False)
    with pytest.raises(UserError, match="prompts_e was 64 and is now 65"):
        open_store(tmp_path, {**run, "prompts_e": 65}, resume=True)
    with pytest.raises(UserError, match="files of ckpt was None and is now"):
        open_store(tmp_path, {**run, "files of ckpt": ["a"]}, resume=True)
    open_store(tmp_path, run, resume=True).tensors("x", never)
    (tmp_path / "stages" / "run.json").write_text("{")  # as good as nothing
    assert open_store(tmp_path, run, resume=False).tensors("x", lambda: {"a": torch.zeros(1)})["a"] == 0
    open_store(tmp_path / "new", run, resume=True)  # so that a queue may always pass it
