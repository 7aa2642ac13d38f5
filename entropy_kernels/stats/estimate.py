"""A number with its error: what every function of this room hands out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """value ± stderr: stderr estimates the standard deviation of value over new draws of the n prompts.

    Attributes:
        value: the estimate; NaN where it is undefined.
        stderr: its standard error; NaN where it is undefined.
        n: the number of independent units (prompts) behind it.
        unit: e.g. "nats/token".
        method: how value and stderr were obtained, in words.
    """

    value: float
    stderr: float
    n: int
    unit: str
    method: str

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval value ± t stderr, t the Student quantile with n − 1 degrees of freedom; NaN for n = 1.

        Args:
            level: coverage wanted, strictly between 0 and 1.

        Raises:
            UserError: level outside (0, 1).
        """
        reach = student_quantile(level, self.n - 1) * self.stderr
        return self.value - reach, self.value + reach

    def z_score(self, expected: float = 0.0) -> float:
        """(value − expected)/stderr; NaN when both are exactly 0, ±inf when only the error is."""
        difference = self.value - expected
        if self.stderr == 0.0:
            return difference * math.inf  # 0·inf and NaN·inf are NaN
        return difference / self.stderr

    def to_json(self) -> dict[str, Any]:
        """A dict of plain Python scalars; NaN and infinities stay floats."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Estimate:
        """The inverse of to_json.

        Raises:
            UserError: a field is missing or unknown.
        """
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            raise UserError(
                f"an estimate read from JSON has the fields {sorted(fields)}, expected {sorted(expected)}: "
                "the file was written by another version or edited; write it again."
            )
        return cls(
            value=float(fields["value"]),
            stderr=float(fields["stderr"]),
            n=int(fields["n"]),
            unit=str(fields["unit"]),
            method=str(fields["method"]),
        )

    def __str__(self) -> str:
        """Value ± error, both rounded to the error's second significant digit, then the unit."""
        return f"{_rounded(self.value, self.stderr)} {self.unit}"


def student_quantile(level: float, degrees: int) -> float:
    """Quantile t with P(|T| ≤ t) = level for Student's T with that many degrees of freedom (NaN for none).

    Raises:
        UserError: level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise UserError(f"level is {level!r}, expected a coverage strictly between 0 and 1, such as 0.95.")
    return float(stdtrit(degrees, 0.5 + level / 2)) if degrees > 0 else math.nan


def _rounded(value: float, stderr: float) -> str:
    if not (math.isfinite(value) and math.isfinite(stderr)):
        return f"{value:.6g} ± {stderr:.2g}"
    if stderr == 0.0:
        return f"{value:.6g} ± 0"
    largest = max(abs(value), stderr)
    exponent = 0 if 1e-4 <= largest < 1e6 else math.floor(math.log10(largest))
    # The error is rounded first: 0.0996 becomes 0.10, whose second digit is one place further left.
    last_place = math.floor(math.log10(float(f"{stderr:.1e}"))) - 1 - exponent
    value, stderr = (round(x / 10.0**exponent, -last_place) for x in (value, stderr))
    decimals = max(-last_place, 0)
    text = f"{value:.{decimals}f} ± {stderr:.{decimals}f}"
    return f"({text})e{exponent:+03d}" if exponent else text
