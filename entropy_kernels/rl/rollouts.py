"""Samples of the policy: a table with one row per completion, in memory and as Parquet.

Source: docs/theory.md, section 1 (what belongs to a response). N completions, T padded width.
How they are drawn is in ``entropy_kernels.rl.sampling``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entropy_kernels.errors import UserError
from entropy_kernels.rl.advantages import advantages

if TYPE_CHECKING:
    import pyarrow as pa

FINISH_REASONS = ("stop", "length")
OPTIONAL_COLUMNS = ("logprobs", "reward", "advantage")
_METADATA_KEY = b"entropy_kernels.sampling"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """Completions and all that is known of them; entry i of every field is about the same completion.

    Attributes:
        prompt_id, prompt, completion: text [N]; the completion without special tokens.
        finish_reason: "stop" (its last token is an end-of-sequence token, which counts as response) or
            "length" (cut at the limit, no such token).
        group_index: int32 [N], the same for all completions of a prompt. sample_index: int32 [N], number
            within it.
        prompt_ids, completion_ids: token ids, each a non-empty tuple.
        logprobs: of the sampling policy, in nats, one per completion token; None where not known.
        reward, advantage: float32 [N], or None where not known.
        sampling: how they were drawn (temperature, seed, ...), kept in the file's metadata; may be empty.

    Raises:
        UserError: on construction, if the fields do not fit together; the message names the row.
    """

    prompt_id: tuple[str, ...]
    prompt: tuple[str, ...]
    completion: tuple[str, ...]
    finish_reason: tuple[str, ...]
    group_index: np.ndarray
    sample_index: np.ndarray
    prompt_ids: tuple[tuple[int, ...], ...]
    completion_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[np.ndarray, ...] | None = None
    reward: np.ndarray | None = None
    advantage: np.ndarray | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        _check(self)

    def __len__(self) -> int:
        """N, the number of completions."""
        return len(self.prompt_id)

    @property
    def truncated_share(self) -> float:
        """Share of completions cut by the length limit."""
        return sum(reason == "length" for reason in self.finish_reason) / len(self)

    def with_rewards(self, fn: Callable[[str, str], float], answers: Mapping[str, str]) -> Rollouts:
        """The same completions with reward = fn(completion, answers[prompt_id]); an old advantage is dropped.

        Raises:
            UserError: a prompt without an answer, or a reward that is not a finite number.
        """
        missing = sorted(set(self.prompt_id) - answers.keys())
        if missing:
            raise UserError(
                f"answers: none for prompt {missing[0]!r} ({len(missing)} missing); give every prompt's."
            )
        values = []
        for prompt_id, completion in zip(self.prompt_id, self.completion, strict=True):
            value = float(fn(completion, answers[prompt_id]))
            if not np.isfinite(value):
                raise UserError(
                    f"the reward of a completion of {prompt_id!r} is {value}; rewards must be finite."
                )
            values.append(value)
        return replace(self, reward=np.asarray(values, dtype=np.float32), advantage=None)

    def with_advantages(self, kind: str) -> Rollouts:
        """The same completions with advantages of a kind ("grpo", "grpo_nostd", "rloo").

        Raises:
            UserError: no rewards yet, or whatever :func:`entropy_kernels.rl.advantages.advantages` refuses.
        """
        if self.reward is None:
            raise UserError(
                "these rollouts have no rewards; call with_rewards first (or give the file a reward column)."
            )
        values = advantages(
            torch.tensor(self.reward, dtype=torch.float64), torch.tensor(self.group_index), kind=kind
        )
        return replace(self, advantage=values.numpy().astype(np.float32))

    def token_batch(self, pad_token_id: int, *, padding: str = "right") -> dict[str, Tensor]:
        """Prompt and completion side by side, padded to the longest.

        Args:
            pad_token_id: fills the rest; any id the model has, it is masked.
            padding: "right" or "left".

        Returns:
            input_ids int64 [N, T]; attention_mask and response_mask bool [N, T], by position, so that an
            end-of-sequence token equal to the pad token still counts; prompt_index int64 [N], 0..B−1 in the
            order of group_index.
        """
        if padding not in ("right", "left"):
            raise UserError(f"padding={padding!r}: expected 'right' or 'left'.")
        lengths = [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]
        N, T = len(self), max(lengths)
        ids = torch.full((N, T), int(pad_token_id), dtype=torch.int64)
        attention = torch.zeros(N, T, dtype=torch.bool)
        response = torch.zeros(N, T, dtype=torch.bool)
        for i, length in enumerate(lengths):
            end = length if padding == "right" else T
            ids[i, end - length : end] = torch.tensor(self.prompt_ids[i] + self.completion_ids[i])
            attention[i, end - length : end] = True
            response[i, end - len(self.completion_ids[i]) : end] = True
        prompt_index = torch.unique(torch.tensor(self.group_index, dtype=torch.int64), return_inverse=True)[1]
        return {
            "input_ids": ids,
            "attention_mask": attention,
            "response_mask": response,
            "prompt_index": prompt_index,
        }

    def to_table(self) -> pa.Table:
        """An Arrow table with every column of :func:`schema`; what is not known is null."""
        import pyarrow as pa

        nothing = [None] * len(self)
        columns: dict[str, Any] = {
            name: list(getattr(self, name)) for name in ("prompt_id", "prompt", "completion", "finish_reason")
        }
        columns |= {name: getattr(self, name) for name in ("group_index", "sample_index")}
        columns |= {
            name: [list(ids) for ids in getattr(self, name)] for name in ("prompt_ids", "completion_ids")
        }
        columns["logprobs"] = nothing if self.logprobs is None else list(self.logprobs)
        columns["reward"] = nothing if self.reward is None else self.reward
        columns["advantage"] = nothing if self.advantage is None else self.advantage
        kinds = schema()
        arrays = [pa.array(columns[name], type=kinds.field(name).type) for name in kinds.names]
        metadata = {_METADATA_KEY: json.dumps(dict(self.sampling)).encode()}
        return pa.Table.from_arrays(arrays, schema=kinds.with_metadata(metadata))

    @classmethod
    def from_table(cls, table: pa.Table) -> Rollouts:
        """Rollouts from an Arrow table.

        Columns not in :func:`schema` are ignored; wider integer types are narrowed if that is exact, wider
        floating types are rounded to float32.

        Raises:
            UserError: a missing column, a type that does not fit, nulls, or rows that do not fit together.
        """
        column: dict[str, Any] = {name: _read_column(table, name) for name in schema().names}
        logprobs = column["logprobs"]
        metadata = (table.schema.metadata or {}).get(_METADATA_KEY, b"{}")
        return cls(
            prompt_id=tuple(column["prompt_id"]),
            prompt=tuple(column["prompt"]),
            completion=tuple(column["completion"]),
            finish_reason=tuple(column["finish_reason"]),
            group_index=np.asarray(column["group_index"], dtype=np.int32),
            sample_index=np.asarray(column["sample_index"], dtype=np.int32),
            prompt_ids=tuple(tuple(ids) for ids in column["prompt_ids"]),
            completion_ids=tuple(tuple(ids) for ids in column["completion_ids"]),
            logprobs=None if logprobs is None else tuple(np.asarray(x, dtype=np.float32) for x in logprobs),
            reward=None if column["reward"] is None else np.asarray(column["reward"], dtype=np.float32),
            advantage=None
            if column["advantage"] is None
            else np.asarray(column["advantage"], dtype=np.float32),
            sampling=json.loads(metadata),
        )

    def save(self, path: str | Path) -> None:
        """Write Parquet; the file appears only once it is complete."""
        import pyarrow.parquet as pq

        part = f"{path}.part"
        pq.write_table(self.to_table(), part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Rollouts:
        """Read Parquet written by :meth:`save` or by any engine that keeps to :func:`schema`.

        Raises:
            UserError: no such file, not Parquet, or what :meth:`from_table` refuses.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise UserError(
                f"rollouts file {str(path)!r} does not exist; pass a Parquet file of completions."
            )
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"rollouts file {str(path)!r} cannot be read as Parquet: {error}. Write it again, as Rollouts.save does."
            ) from error
        try:
            return cls.from_table(table)
        except UserError as error:
            raise UserError(f"rollouts file {str(path)!r}: {error}") from error


def schema() -> pa.Schema:
    """Columns of a rollouts file, one row per completion; the OPTIONAL_COLUMNS may be absent or null."""
    import pyarrow as pa

    text, index, number = pa.string(), pa.int32(), pa.float32()
    return pa.schema(
        [
            ("prompt_id", text),
            ("prompt", text),
            ("completion", text),
            ("finish_reason", text),
            ("group_index", index),
            ("sample_index", index),
            ("prompt_ids", pa.list_(index)),
            ("completion_ids", pa.list_(index)),
            ("logprobs", pa.list_(number)),
            ("reward", number),
            ("advantage", number),
        ]
    )


def _read_column(table: pa.Table, name: str) -> list[Any] | None:
    """The column as Python values, or None for an optional one that is absent or all null."""
    import pyarrow as pa

    kind = schema().field(name).type
    if name not in table.column_names:
        if name in OPTIONAL_COLUMNS:
            return None
        raise UserError(
            f"column {name!r} is missing (found: {', '.join(table.column_names)}). A rollouts table needs "
            f"{', '.join(n for n in schema().names if n not in OPTIONAL_COLUMNS)}."
        )
    column = table.column(name)
    if name in OPTIONAL_COLUMNS and column.null_count == len(column):
        return None
    narrows_floats = pa.types.is_floating(getattr(kind, "value_type", kind))
    try:
        values = column.cast(kind, safe=not narrows_floats).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"column {name!r} has type {column.type}, expected {kind}: {error}. Write it in that type."
        ) from error
    for row, value in enumerate(values):
        if value is None or (isinstance(value, list) and None in value):
            raise UserError(
                f"column {name!r} is null in row {row}; fill it in for every row"
                + (", or leave the whole column out." if name in OPTIONAL_COLUMNS else ".")
            )
    return values


def _check(r: Rollouts) -> None:
    N = len(r.prompt_id)
    if N == 0:
        raise UserError("there are no completions; rollouts need at least one.")
    for name in schema().names:
        value = getattr(r, name)
        if value is not None and len(value) != N:
            raise UserError(
                f"{name} has {len(value)} entries, prompt_id has {N}; every field needs one per completion."
            )
    owner: dict[int, tuple[str, tuple[int, ...]]] = {}
    for i in range(N):
        where = f"row {i} (prompt {r.prompt_id[i]!r})"
        for name, ids in (("prompt_ids", r.prompt_ids[i]), ("completion_ids", r.completion_ids[i])):
            if len(ids) == 0:
                raise UserError(
                    f"{where}: {name} is empty; a prompt and a response need at least one token each."
                )
            if min(ids) < 0:
                raise UserError(f"{where}: {name} holds the negative id {min(ids)}; token ids are ≥ 0.")
        if r.finish_reason[i] not in FINISH_REASONS:
            raise UserError(
                f"{where}: finish_reason is {r.finish_reason[i]!r}, expected one of "
                f"{', '.join(FINISH_REASONS)}. Drop completions the engine aborted."
            )
        if r.logprobs is not None:
            _check_logprobs(r.logprobs[i], len(r.completion_ids[i]), where)
        known = owner.setdefault(int(r.group_index[i]), (r.prompt_id[i], r.prompt_ids[i]))
        if known != (r.prompt_id[i], r.prompt_ids[i]):
            raise UserError(
                f"{where}: group_index {int(r.group_index[i])} also belongs to prompt {known[0]!r} or to "
                "other prompt_ids; a group is the completions of one prompt."
            )
    if len(owner) != len(set(r.prompt_id)):
        raise UserError("a prompt_id appears under several group_index values; give each prompt one group.")
    if len(set(zip(r.group_index.tolist(), r.sample_index.tolist(), strict=True))) != N:
        raise UserError(
            "two rows have the same group_index and sample_index; number the completions of each prompt."
        )
    for name, numbers in (("reward", r.reward), ("advantage", r.advantage)):
        if numbers is not None and not bool(np.isfinite(numbers).all()):
            raise UserError(f"{name} holds NaN or infinite entries; give a finite one for every completion.")


def _check_logprobs(logprobs: Sequence[float] | np.ndarray, length: int, where: str) -> None:
    if len(logprobs) != length:
        raise UserError(
            f"{where}: {len(logprobs)} logprobs for {length} completion tokens; expected one per token."
        )
    if not bool(np.isfinite(logprobs).all()) or float(np.max(logprobs)) > 1e-3:  # engines round 0 up a little
        raise UserError(
            f"{where}: logprobs must be finite and ≤ 0 (nats); got {np.min(logprobs)} to {np.max(logprobs)}."
        )
