"""Numbers as text. The digits of an estimate are `Estimate`'s own affair; here are bare numbers and print."""

from __future__ import annotations

import dataclasses
import math
import re

from ..stats import Estimate

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits; a power of ten below 1e-3 and from 1e5 on: "0.0121", "5e-05"."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else f"{value}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    if value == 0 or -3 <= int(power) <= 4:
        return _without_zeros(f"{value:.{max(digits - 1 - int(power), 0)}f}")
    return f"{_without_zeros(mantissa)}e{power}"


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def estimate(item: Estimate, *, unsigned: bool = False, unit: bool = False) -> str:
    """`value ± stderr`, or "undefined".

    Args:
        item: the estimate.
        unsigned: print |value|, for a sentence whose verb carries the sign.
        unit: append the unit, in words.
    """
    if math.isnan(item.value):
        return "undefined"
    if math.isnan(item.stderr):
        text = f"{number(abs(item.value) if unsigned else item.value, 4)} ± undefined"
    else:
        shown = dataclasses.replace(item, value=abs(item.value)) if unsigned else item
        text = str(shown).removesuffix(item.unit).rstrip()
    return f"{text} {in_words(item.unit)}".rstrip() if unit else text


def in_words(unit: str) -> str:
    """A unit as one would say it: "nats/token per unit eta^2" to "nats per token per unit η²", "1" to nothing."""
    unit = "" if unit == "1" else unit.replace("/", " per ")
    return re.sub(r"\beta\b", "η", unit).replace("^2", "²")


def percent(share: float, digits: int = 2) -> str:
    """A share of one as a percentage: 0.123 to "12%"."""
    return f"{number(100 * share, digits)}%" if math.isfinite(share) else "undefined"


def typeset(text: str) -> str:
    """For print: a true minus sign and powers of ten, "-5e-05" to "−5×10⁻⁵"."""

    def power(match: re.Match[str]) -> str:
        return "×10" + str(int(match[1])).translate(_SUPERSCRIPTS)

    text = re.sub(r"(?<=[\d)])e([+-]\d+)", power, text)
    text = re.sub(r"(?<![\w.])1×10", "10", text)
    text = re.sub(r"\binf\b", "∞", text)
    return re.sub(r"(?<!\w)-(?=[\d∞])", "−", text)
