"""The command line: flags become the configuration, errors become one paragraph."""

from __future__ import annotations

from dataclasses import fields

import pytest

from entropy_kernels.measure.cli import config_from, main, parser
from entropy_kernels.measure.config import MeasureConfig


def test_no_argument_is_the_demo():
    assert config_from([]) == MeasureConfig.demo()
    assert config_from(["--per", "sequence"]) == MeasureConfig.demo(per="sequence")


def test_every_setting_has_a_flag_and_every_flag_a_setting():
    flags = {a.dest for a in parser()._actions if a.dest != "help"}
    assert flags == {f.name for f in fields(MeasureConfig)}


def test_flags_arrive():
    config = config_from(
        "--ckpt c --dataset d.jsonl --prompts-u 4 --etas 1e-6 1e-5 --no-second-order --temperature 0.7 --update sgd "
        "--chat-template --max-grad-norm 0".split()
    )
    assert (config.ckpt, config.dataset, config.prompts_u, config.etas) == ("c", "d.jsonl", 4, (1e-6, 1e-5))
    assert (config.second_order, config.temperature, config.update) == (False, 0.7, "sgd")
    assert (config.chat_template, config.max_grad_norm) == (True, 0.0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ckpt", "nowhere", "--dataset", "x.jsonl"], ["nowhere"]),
        (["--ckpt", "nowhere"], ["--dataset"]),
        (["--group-size", "1"], ["group_size", "at least 2"]),
        (["--dataset", "missing.jsonl"], ["missing.jsonl"]),
        (["--reward", "nonsense"], ["nonsense", "exact_match_number"]),
    ],
)
def test_errors_are_one_paragraph_without_traceback(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    stages, _, message = printed.err.partition("error: ")
    text = " ".join(message.split())
    assert text and "Traceback" not in printed.err and "\n\n" not in message.strip()
    assert all(line.endswith(" s") for line in stages.splitlines())  # only "stage: seconds" came before
    for word in words:
        assert word in text


def test_demo_end_to_end(tmp_path, capsys):
    output = tmp_path / "report"
    small = "--prompts-u 8 --prompts-e 6 --group-size-e 1 --etas 1e-6 5e-5 --no-second-order --truth integrated".split()
    assert main([*small, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "nats per token" in printed and "report.html" in printed
    assert (output / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
