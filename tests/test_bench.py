"""The benchmarks' own logic: who is timed, in what order, and that a GPU's benchmark runs from end to end without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu, plots, timing  # noqa: E402


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    found = timing.measure(calls, 3, before={"b": lambda: seen.append("prepare")})
    assert seen == ["a", "prepare", "b"] * 4 and found["a"]["rounds"] == 3


def test_a_limit_ends_the_rounds_after_three():
    calls = []
    found = timing.measure({"slow": lambda: calls.append(1)}, 50, limit_s=0.0)
    assert found["slow"]["rounds"] == 3 and len(calls) == 4


def test_quartiles_lie_among_the_times():
    found = timing.spread([1.0, 5.0])
    assert 1 <= found["quartile_low_ms"] <= found["median_ms"] == 3 <= found["quartile_high_ms"] <= 5


def contest(calls, truth=1.0):
    return gpu.contest(
        calls, lambda name, got: abs(got - truth), lambda name: 0.1, 2, "cpu", limit_s=1.0
    )  # fmt: skip


def test_what_is_wrong_or_fails_is_named_and_not_timed():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    found = contest(
        {"copy": lambda: 1.0, "ours": lambda: 1.0, "off": lambda: 1.2, "undefined": lambda: float("nan"), "big": out_of_memory}
    )  # fmt: skip
    assert list(found["timings"]) == ["copy", "ours"] and found["errors"]["off"] == pytest.approx(0.2)
    assert found["left_out"] == {
        "off": "wrong: relative error 2.0e-01 against float64",
        "undefined": "wrong: relative error nan against float64",
        "big": "OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB",
    }
    gpu.add_bandwidth(found["timings"], lambda name: 10**6)
    text = "\n".join(gpu.table("values", found))
    assert "| ours |" in text and "| off |" not in text and "Not timed: big, OutOfMemoryError" in text
    gpu.stop_if_wrong([{"beside_peers": {"values": found}}])


def test_a_wrong_number_of_ours_ends_in_an_error_after_the_others_were_timed():
    found = contest({"copy": lambda: 1.0, "ours": lambda: 2.0, "torch": lambda: 1.0})
    assert list(found["timings"]) == ["copy", "torch"]
    gpu.add_bandwidth(found["timings"], lambda name: 10**6)
    assert "| torch |" in "\n".join(gpu.table("values", found))
    with pytest.raises(SystemExit, match="ours, values: wrong"):
        gpu.stop_if_wrong([{"beside_peers": {"values": found}}])


def test_a_case_that_raises_is_named_and_what_came_before_it_is_written(monkeypatch):
    written = []
    monkeypatch.setattr(timing, "save", lambda name, result, lines: written.append((name, list(lines))))
    monkeypatch.setattr(timing, "clocks", lambda: "1980 MHz")

    def one(case):
        if case == "bad":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return {"case": case, "beside_peers": {}}

    environment = {"device": "NVIDIA H200", "clocks": ["345 MHz"]}
    with pytest.raises(SystemExit, match="bad"):
        gpu.run_all(
            "rows", environment, ["first", "bad", "last"], one, lambda r: [s["case"] for s in r["shapes"]], "cuda"
        )  # fmt: skip
    bad = "Not timed: bad, RuntimeError: CUDA error: an illegal memory access was encountered."
    assert written == [
        ("rows_h200", ["first"]),
        ("rows_h200", ["first", "", bad]),
        ("rows_h200", ["first", "last", "", bad]),
    ]
    assert environment["clocks"] == ["345 MHz"] + ["1980 MHz"] * 3


RESULT = {
    "environment": {"device": "a CPU", "backend": "c++", "torch": "2", "commit": "abc"},
    "shapes": [
        {
            "rows": 2, "vocabulary": 9, "dtype": "float32",
            "timings": {
                "forward": {name: timing.spread([ms, 1.1 * ms, 1.3 * ms]) for name, ms in
                            {"read": 1.0, "ours": 1.5, "eager": 4321.0, "TRL": 90.0}.items()},
                "jvp": {"read both": timing.spread([2.0, 2.0]), "ours": timing.spread([5.0, 6.0])},
            },
        },
    ],
}  # fmt: skip


def test_pictures_and_readme_show_what_was_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for name in ("rows_cpu", "rows_cpu_other", "fisher_cpu"):  # the last two have no picture
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(RESULT))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plots.BEGIN}\nold\n{plots.END}\nafter\n")
    for name, path in {
        "RESULTS": tmp_path / "results",
        "README": readme,
        "IMAGES": tmp_path / "docs" / "images",
    }.items():
        monkeypatch.setattr(plots, name, path)
    plots.run()
    first = readme.read_text()
    assert "| forward, [2, 9] float32 | 1.1 | **1.65** | – | 4753 | 99 | – |" in first
    assert "| jvp, [2, 9] float32 | 2 | **5.5** | – | – | – | – |" in first
    assert "old" not in first and first.startswith("before\n") and first.endswith("after\n")
    assert "GPU: no figure yet" in first and "rows_cpu_other" not in first
    (picture,) = plots.IMAGES.iterdir()
    drawn = picture.read_text()
    assert picture.name == "bench_rows_cpu.svg" and ">4753<" in drawn and ">torch.compile<" not in drawn
    plots.run()
    assert readme.read_text() == first and picture.read_text() == drawn
    on_gpu = {
        "environment": RESULT["environment"] | {"device": "NVIDIA H200", "cuda": "13.0"},
        "shapes": [
            {
                "rows": 2, "vocabulary": 9, "dtype": "bfloat16",
                "timings": {"values": timing.spread([0.5, 0.5])},
                "beside_peers": {"forward": {"timings": {"copy": timing.spread([1.0, 1.0])}}},
            },
        ],
    }  # fmt: skip
    (tmp_path / "results" / "rows_h200.json").write_text(json.dumps(on_gpu))
    plots.run()
    text = readme.read_text()
    assert "GPU: no figure yet" not in text and "| forward, [2, 9] bfloat16 | 1 | – | – | – | – | – |" in text
    assert len(list(plots.IMAGES.iterdir())) == 2
    readme.write_text("no place")
    with pytest.raises(SystemExit, match="no place for the figures"):
        plots.run()


def test_readme_has_a_place_for_the_figures():
    text = (ROOT / "README.md").read_text()
    assert text.index(plots.BEGIN) < text.index(plots.END)
    assert "docs/images/bench_rows_cpu.svg" in text


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_gpu_is_asked_for_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("-m", "bench", "rows", "--device", "cuda")
    assert done.returncode == 1 and "torch sees no GPU here" in done.stderr
    done = run("-m", "bench", "fisher", "--device", "cuda")
    assert done.returncode == 2 and "fisher has no GPU version" in done.stderr


HIDDEN = "trl datasets scipy pyarrow matplotlib pandas transformers peft safetensors accelerate liger_kernel verl flash_attn"
_HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def test_the_kernels_and_their_benchmarks_need_torch_and_triton_alone():
    pytest.importorskip("triton")
    code = _HIDE + (
        "import bench.rows, bench.rows_gpu, bench.truncated_gpu, bench.gate, bench.peers, entropy_kernels.functional\n"
        "print(*bench.peers.row_peers(True)[1])\n"
        "sys.argv = ['bench', '--help']\n"
        "import runpy; runpy.run_module('bench', run_name='__main__')"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TRL verl flash-attn Liger\n") and "--device" in done.stdout


_DRY = """
import torch
from bench import rows_gpu, truncated_gpu
from bench.peers import Peer
from bench.rows import eager
from entropy_kernels.functional.rows import rows_from
from entropy_kernels.ops import rows
def half(z, y):
    entropy, logprob = eager(z, y)
    return entropy / 2, logprob
rows_gpu.row_peers = lambda gpu: ({"half": Peer(function=half)}, {"absent": "does not import"})
device = "cuda" if torch.cuda.is_available() else "cpu"
shape = rows_gpu.one_shape(2, 130, torch.float32, 2, device)
with rows_from(rows):
    case = truncated_gpu.one_case((2, 130, "flat", torch.float32, {"top_k": 5}), 2, device)
environment = {"device": "none", "threads": 1, "backend": "", "torch": "", "commit": None, "load_average": 0.0}
print("\\n".join(rows_gpu.markdown({"environment": environment, "shapes": [shape]})))
print("\\n".join(truncated_gpu.markdown({"environment": environment, "shapes": [case]})))
for line, found in {**shape["beside_peers"], **case["beside_peers"]}.items():
    print("TIMED", line, *found["timings"], sep="; ")
"""


def test_the_gpu_benchmarks_run_from_end_to_end():
    """Natively on a GPU, in the interpreter otherwise."""
    pytest.importorskip("triton")
    done = run("-c", _DRY, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}))
    assert done.returncode == 0, done.stderr
    timed = [line for line in done.stdout.splitlines() if line.startswith("TIMED")]
    six = "copy; ours; ours, kept set alone; ours, entropy of the full row; torch; torch, all six; torch.compile"
    assert timed == [
        "TIMED; forward; copy; ours; eager; torch.compile",
        "TIMED; gradient; copy; ours; eager; torch.compile",
        "TIMED; tangents; copy; ours; eager",
        "TIMED; tangent of the gradient; copy; ours; eager",
        f"TIMED; values; {six}",
        "TIMED; value and gradient; copy; ours; ours, set known; torch, set known",
    ]
    assert (
        "Not timed: half, wrong: relative error" in done.stdout
        and "Not timed: absent, does not import." in done.stdout
    )


_PEERS = """
import contextlib, sys
import torch
from bench import peers
from bench.rows import eager64
if not torch.cuda.is_available():
    torch.cuda.device = lambda index: contextlib.nullcontext()  # which flash-attn enters around its launches
device = "cuda" if torch.cuda.is_available() and sys.argv[1] == "gpu" else "cpu"
g = torch.Generator().manual_seed(0)
z, y = (torch.randn(5, 700, generator=g) * 3).to(device), torch.randint(0, 700, (5,), generator=g).to(device)
for name, peer in peers.row_peers(gpu=sys.argv[1] == "gpu")[0].items():
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    got, want = peer.function(leaf * 1 if peer.overwrites else leaf, y), eager64(wide, y)
    kept = [(a, b) for a, b in zip(got, want) if a is not None]
    assert len(kept) == 1 + peer.entropy
    errors = [(a / b - 1).abs().max() for a, b in kept]
    (g1,) = torch.autograd.grad(sum(a.sum() for a, _ in kept), leaf)
    (g2,) = torch.autograd.grad(sum(b.sum() for _, b in kept), wide)
    print(name, max(*errors, (g1 - g2).abs().max()).item(), sep="\\t")
"""


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_the_adapters_of_peers_give_entropy_logprob_and_their_gradients(where):
    """Of the peers that are installed: TRL with the extra `test`."""
    pytest.importorskip("trl")
    interpret = where == "gpu" and not torch.cuda.is_available()
    done = run("-c", _PEERS, where, **({"TRITON_INTERPRET": "1"} if interpret else {}))
    assert done.returncode == 0, done.stderr
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    assert "TRL" in found and all(float(error) < 1e-5 for error in found.values()), found
