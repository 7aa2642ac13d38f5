"""Prompts with known answers, and the rewards that compare a completion with its answer."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_kernels.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "target")
FILE_TYPES = (".json", ".jsonl", ".parquet")

Reward = Callable[[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task: what the model reads, and what a right completion says.

    Attributes:
        prompt_id: unique in its data set: the source's name and the row number there.
        text: exactly the text that was tokenized (after the chat template, if one was used).
        answer: the reference answer as the data set has it; "" where the data set has none.
        token_ids: the prompt's tokens, never empty.
    """

    prompt_id: str
    text: str
    answer: str
    token_ids: tuple[int, ...]


def load_prompts(
    source: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    chat_template: bool = False,
    limit: int | None = None,
    seed: int | None = 0,
    split: str = "train",
    config: str | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """Prompts and answers of a data set, tokenized.

    A prompt is text, or (with ``chat_template``) a list of ``{"role", "content"}`` messages; plain text is
    then made one user message. Without a template the tokenizer adds the special tokens it adds by default.

    Args:
        source: a .json (list of objects, or an object of equally long columns), .jsonl or .parquet file, a
            directory that ``datasets.load_dataset`` understands, or a data set's hub id.
        tokenizer: the model's.
        prompt_column: column with the prompt; None: the one present among prompt, question, problem,
            instruction.
        answer_column: column with the answer; None: the one present among answer, solution, ground_truth,
            target, and if none is there every answer is "".
        chat_template: apply the tokenizer's chat template, with the assistant's turn opened.
        limit: how many prompts to keep, drawn without replacement; None keeps all.
        seed: of the order; None keeps the order of the source.
        split: of a hub data set or directory.
        config: configuration name of a hub data set (GSM8K: "main").
        max_prompt_tokens: longest prompt accepted; None: the tokenizer's ``model_max_length``.

    Returns:
        Prompts in drawn order.

    Raises:
        UserError: unreadable source, unknown or ambiguous columns, empty or too long prompts, fewer rows than
            ``limit``, a chat template asked for and missing, or a tokenizer that ends prompts with its
            end-of-sequence token.
    """
    rows = _read_rows(source, split=split, config=config)
    if not rows:
        raise UserError(f"source={str(source)!r} has no rows; pass a data set with at least one prompt.")
    columns = sorted({key for row in rows for key in row})
    prompt_key = _column("prompt_column", prompt_column, PROMPT_COLUMNS, columns, required=True)
    assert prompt_key is not None  # required
    answer_key = _column("answer_column", answer_column, ANSWER_COLUMNS, columns, required=False)
    if limit is not None and not 0 < limit <= len(rows):
        raise UserError(f"limit={limit}: {source} has {len(rows)} rows; ask for 1 to {len(rows)}.")

    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    longest = max_prompt_tokens if max_prompt_tokens is not None else int(tokenizer.model_max_length)
    name = Path(source).stem if Path(source).suffix in FILE_TYPES else str(source)
    prompts = []
    for row in order[:limit]:
        where = f"row {row} of {source}"
        text, ids = _tokenize(rows[row].get(prompt_key), tokenizer, chat_template, where, prompt_key)
        if len(ids) > longest:
            raise UserError(
                f"the prompt in {where} is {len(ids)} tokens long, the limit is {longest}. Shorten or drop "
                "it, or raise max_prompt_tokens if the model reads that many; prompts are never cut silently."
            )
        answer = rows[row].get(answer_key) if answer_key is not None else ""
        if answer is None or isinstance(answer, (list, dict)):
            raise UserError(f"column {answer_key!r} in {where} holds {answer!r}; expected text or a number.")
        prompts.append(Prompt(prompt_id=f"{name}:{row}", text=text, answer=str(answer), token_ids=tuple(ids)))
    return prompts


def split_prompts(
    prompts: Sequence[Prompt], n_u: int, n_e: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """(U, E): two random sets of ``n_u`` and ``n_e`` prompts with no prompt in common.

    Prompts with the same tokens are the same prompt, whatever their rows: only the first of them is used, or
    U and E would not be independent.

    Raises:
        UserError: a negative size, or fewer distinct prompts than n_u + n_e.
    """
    if n_u < 0 or n_e < 0:
        raise UserError(f"n_u={n_u}, n_e={n_e}: expected numbers of prompts ≥ 0.")
    distinct: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.token_ids, prompt)
    if n_u + n_e > len(distinct):
        raise UserError(
            f"{n_u} prompts for the update and {n_e} held out make {n_u + n_e}, but there are only "
            f"{len(distinct)} distinct prompts ({len(prompts)} rows). The two sets must be disjoint: ask for "
            "fewer or give more data."
        )
    drawn = list(distinct.values())
    random.Random(seed).shuffle(drawn)
    return drawn[:n_u], drawn[n_u : n_u + n_e]


# A number: optional sign and currency, digits (plain or in groups of three), decimals, exponent. A minus sign
# right after a digit, letter or closing bracket is a subtraction.
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]}])[-+−])?  \$?  (?P<sign2>(?<=\$)[-−])?
    (?P<digits>(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?<!\d)\.\d+)
    (?P<exponent>[eE][-+]?\d{1,3}(?!\d))?
    """,
    re.VERBOSE | re.ASCII,
)
_MARKER = re.compile(r"####|\banswer\s*(?::|\bis\b:?)", re.IGNORECASE)


def exact_match_number(completion: str, answer: str) -> float:
    r"""1.0 if the completion's final number equals the answer's, else 0.0.

    The final number of a text is the first one after the last marker, ``####``, ``answer:`` or ``answer is``
    (any case), and without a marker the last number in it. Numbers are compared by exact decimal value:
    ``1,234.50`` equals ``1234.5``, ``$-5`` and ``−5`` equal ``-5``. A minus directly after a digit, letter or
    closing bracket is a subtraction (``16-3`` ends in 3). Not understood: fractions, words, comma as the
    decimal point, units that change the value (``50%`` is 50). A completion without a number, or with none
    after its marker, scores 0.

    >>> exact_match_number("so 2 * 36 = $72.00.", "6 * 12 = 72\n#### 72")
    1.0
    >>> exact_match_number("#### 1,000 or maybe 7", "1000")
    1.0

    Raises:
        UserError: the answer has no number, or a fraction.
    """
    want, end = _final_number(answer)
    if want is None or re.match(r"\s*/\s*\d", answer[end:]):
        raise UserError(
            f"answer={answer[-80:]!r} does not end in a plain number, so exact_match_number cannot judge "
            "against it. Check the answer column, or pass your own reward as file.py:function."
        )
    got, _ = _final_number(completion)
    return 1.0 if got is not None and got == want else 0.0


def math_verify(completion: str, answer: str) -> float:
    r"""1.0 if the completion's final expression equals the answer's, by the package math-verify, else 0.0.

    It reads LaTeX between dollar signs or in \\boxed{}, and plain numbers and fractions, and compares them symbolically: ``0.5`` equals
    ``\\frac{1}{2}``. A completion in which it finds no expression scores 0.

    Raises:
        UserError: the package is not installed, or it finds no expression in the answer.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError(
            f"reward='math_verify' needs the package math-verify, which does not import here ({error}). Install it: "
            "pip install math-verify, or this package with the extra math."
        ) from error
    wanted = parse(answer) or parse(f"${answer}$")
    if not wanted:
        raise UserError(
            f"answer={answer[-80:]!r} holds no expression that math-verify can read, so math_verify cannot judge against it. Check the "
            "answer column, or pass your own reward as file.py:function."
        )
    return float(bool(verify(wanted, parse(completion))))


REWARDS: Mapping[str, Reward] = {"exact_match_number": exact_match_number, "math_verify": math_verify}


def resolve_reward(name: str) -> Reward:
    """The reward function called ``name``: a built-in, or ``path/to/file.py:function``.

    A reward takes (completion, answer), both text, and returns a float.

    Raises:
        UserError: unknown name, missing file, or no such function in it.
    """
    if name == "math_verify":
        math_verify("1", "1")  # a missing package is said now, not after sampling
    if name in REWARDS:
        return REWARDS[name]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(
            f"reward={name!r} is not known. Built in: {', '.join(sorted(REWARDS))}. Your own: "
            "path/to/file.py:function, a function of (completion, answer)."
        )
    if not Path(path).is_file():
        raise UserError(
            f"reward={name!r}: there is no file {path!r}; pass path/to/file.py:function with a path from here."
        )
    spec = importlib.util.spec_from_file_location("entropy_kernels_user_reward", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise UserError(
            f"reward={name!r}: {path} cannot be loaded: {type(error).__name__}: {error}. Mend the file; python {path} must run."
        ) from error
    reward = getattr(module, function, None)
    if not callable(reward):
        raise UserError(
            f"reward={name!r}: {path} defines no function {function!r}. Name one of (completion, answer) that it has."
        )

    def checked(completion: str, answer: str) -> float:
        try:
            return float(reward(completion, answer))
        except Exception as error:
            raise UserError(
                f"reward={name!r} failed on completion {completion[:80]!r} with answer {answer[:80]!r}: {type(error).__name__}: {error}. "
                "It has to return a number for every completion, the empty one included."
            ) from error

    return checked


def _final_number(text: str) -> tuple[Decimal | None, int]:
    """(value, where it ends) of the final number, or (None, 0)."""
    marker = None
    for marker in _MARKER.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if marker is not None:
        match = _NUMBER.search(text, marker.end())
    else:
        match = None
        for match in _NUMBER.finditer(text):  # noqa: B007
            pass
    if match is None:
        return None, 0
    value = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    negative = "-" in (sign := (match["sign"] or "") + (match["sign2"] or "")) or "−" in sign
    return (-value if negative else value), match.end()


def _read_rows(source: str | Path, *, split: str, config: str | None) -> list[Mapping[str, Any]]:
    path = Path(source)
    if path.suffix not in FILE_TYPES:
        return _load_dataset(source, split=split, config=config)
    if not path.is_file():
        raise UserError(
            f"source={str(source)!r}: there is no such file; pass a {', '.join(FILE_TYPES)} file or a data set's hub id."
        )
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
            if isinstance(rows, dict) and rows and all(isinstance(column, list) for column in rows.values()):
                rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    except (ValueError, OSError) as error:  # json and pyarrow errors are ValueErrors
        raise UserError(
            f"source={str(source)!r} cannot be read as {path.suffix[1:]}: {error}. Write it again: one JSON object per "
            "line (.jsonl), a list of objects (.json), or a table (.parquet)."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"source={str(source)!r}: expected a list of objects, one per prompt, or an object of columns."
        )
    return rows


def _load_dataset(source: str | Path, *, split: str, config: str | None) -> list[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(str(source), config, split=split).to_list()
    except (
        Exception
    ) as error:  # datasets raises many kinds; all of them mean the source is not usable as given
        raise UserError(
            f"source={str(source)!r} (config={config!r}, split={split!r}) is neither a "
            f"{', '.join(FILE_TYPES)} file nor a data set that could be loaded: {' '.join(str(error).split())[:400]}. Check the name, or "
            "download the data set and pass the file."
        ) from error


def _column(
    argument: str, given: str | None, known: Iterable[str], columns: Sequence[str], *, required: bool
) -> str | None:
    if given is not None:
        if given not in columns:
            raise UserError(
                f"{argument}={given!r} is not a column of the data set; it has: {', '.join(columns)}."
            )
        return given
    found = [name for name in known if name in columns]
    if len(found) > 1 or (required and not found):
        raise UserError(
            f"{argument} is not given and "
            f"{'several columns fit: ' + ', '.join(found) if found else 'no column has a usual name'}. Name "
            f"one of: {', '.join(columns)}."
        )
    return found[0] if found else None


def _tokenize(
    value: Any, tokenizer: PreTrainedTokenizerBase, chat_template: bool, where: str, column: str | None
) -> tuple[str, list[int]]:
    is_chat = isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    if not is_chat and not isinstance(value, str):
        raise UserError(
            f"column {column!r} in {where} holds {value!r}; expected text or a list of chat messages."
        )
    if is_chat and not chat_template:
        raise UserError(f"column {column!r} in {where} is a list of chat messages; switch chat_template on.")
    if chat_template:
        if not tokenizer.chat_template:
            raise UserError(
                "chat_template is switched on but this model's tokenizer has none; switch it off."
            )
        turns = value if is_chat else [{"role": "user", "content": value}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text, ids = value, tokenizer(value)["input_ids"]
    if not ids or not value:
        raise UserError(
            f"the prompt in {where} is empty; drop the row or name another prompt_column than {column!r}."
        )
    if (
        not chat_template
        and ids[-1] == tokenizer.eos_token_id
        and not text.endswith(str(tokenizer.eos_token))
    ):
        raise UserError(
            f"the tokenizer puts its end-of-sequence token {tokenizer.eos_token!r} at the end of every "
            "prompt, so the model would answer a finished text. Load it with that switched off "
            "(add_eos_token=False)."
        )
    return text, list(ids)
