"""`python -m bench plots`: the pictures and README's table of figures, made from bench/results/*.json of rows, linear and truncated.

docs/images/bench_NAME.svg has one panel for each thing that was timed: medians with quartiles, ours in colour, what only moves data or
multiplies matrices in grey. README's table stands between two comments, `<!-- bench: figures -->` and `<!-- bench: end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.timing import RESULTS

README = RESULTS.parents[1] / "README.md"
IMAGES = README.parent / "docs" / "images"
BEGIN, END = "<!-- bench: figures -->", "<!-- bench: end -->"
KINDS = ("rows", "truncated", "linear")
YARDSTICKS = ("read", "copy", "GEMM", "exp only", "layer")
OURS, YARDSTICK, PEER = "#c2410c", "#9ca3af", "#1e3a5f"
Timings = Mapping[str, Mapping[str, float]]


def panels(result: Mapping[str, Any]) -> Iterator[list[tuple[str, Timings]]]:
    """(title, contender -> median and quartiles) of everything a result has, CPU's or GPU's; a list for each shape."""
    for shape in result.get("shapes", result.get("cases", [])):
        lines = shape["timings"]
        if "beside_peers" in shape:
            lines = {line: found["timings"] for line, found in shape["beside_peers"].items()}
        yield [(f"{line}\n{conditions(shape)}", timings) for line, timings in lines.items() if timings]


def conditions(shape: Mapping[str, Any]) -> str:
    """What a panel was measured on, as far as the result says."""
    sizes = [shape[key] for key in ("rows", "hidden", "vocabulary") if key in shape]
    words = [f"[{', '.join(map(str, sizes))}]" if sizes else "", shape.get("law", ""), shape["dtype"]]
    words += [f"{name} {x:g}" for name, x in shape.get("truncation", {}).items()]
    return " ".join(word for word in words if word)


def colour(name: str) -> str:
    if name.startswith("ours") or name.endswith(", ours"):
        return OURS
    return YARDSTICK if name.startswith(YARDSTICKS) else PEER


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One figure, a row of panels for each shape, the times on a logarithmic axis where they differ much."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = list(panels(result))
    across, down = max(map(len, found)), len(found)
    style = {"font.size": 8, "svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "bench"}
    with plt.rc_context(style):
        bars = max(len(timings) for shape in found for _, timings in shape)
        size = (3.3 * across, down * (0.9 + 0.2 * bars))
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
        for row, shape in zip(axes, found, strict=True):
            for axis, (title, timings) in zip(row, shape, strict=False):
                panel(axis, title, timings)
            for axis in row[len(shape) :]:
                axis.set_visible(False)
        e = result["environment"]
        figure.suptitle(
            f"Milliseconds, {e['device']}, {e['backend']}, torch {e['torch']}, commit {e['commit']}",
            fontsize=8,
        )
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def panel(axis: Any, title: str, timings: Timings) -> None:
    names = list(timings)
    medians = [timings[name]["median_ms"] for name in names]
    spread = [
        [max(0.0, t["median_ms"] - t["quartile_low_ms"]) for t in timings.values()],
        [max(0.0, t["quartile_high_ms"] - t["median_ms"]) for t in timings.values()],
    ]
    axis.barh(
        names, medians, xerr=spread, color=[colour(name) for name in names], error_kw={"linewidth": 0.7}
    )
    for row, t in enumerate(timings.values()):
        ms, end = t["median_ms"], max(t["median_ms"], t["quartile_high_ms"])
        label = f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
        axis.annotate(label, (end, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    if max(medians) > 10 * min(medians):
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xlim(min(medians) / 2, max(medians) * 4)
    else:
        axis.set_xlim(0, max(medians) * 1.4)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


# ---- README's table

YARDSTICK_OF = ("read", "read both", "read + write", "copy", "GEMM", "GEMMs")
COLUMNS = {  # of a kind of result: heading: who stands there, the first that was timed
    "rows": {
        "data alone": YARDSTICK_OF,
        "ours": ("ours",),
        "torch.compile": ("torch.compile",),
        "torch": ("eager",),
        "TRL": ("TRL",),
        "verl": ("verl",),
    },
    "linear": {"GEMM alone": YARDSTICK_OF, "ours": ("ours",), "torch": ("eager",), "TRL": ("TRL",)},
    "truncated": {
        "data alone": YARDSTICK_OF,
        "ours": ("ours",),
        "torch, the same": ("torch.topk, all six", "torch, all six"),
        "ours, entropy and log-prob alone": ("ours, kept law",),
        "torch, these alone": ("torch", "torch.topk", "torch, set known"),
    },
}
SHAPES_SHOWN = {"rows": 1, "linear": 1, "truncated": 2}  # the first of a result


def figures(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Medians in ms, a line for everything that was timed, grouped by what ran it; and what is missing, in words."""
    lines = []
    for name, result in results.items():
        kind, e = name.partition("_")[0], result["environment"]
        columns = COLUMNS[kind]
        where = f"[{name}](bench/results/{name}.md): {e['device']}, {e['backend']}, torch {e['torch']}"
        lines += ["", f"| {where} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for shape in list(panels(result))[: SHAPES_SHOWN[kind]]:
            for title, timings in shape:
                cells = [first(timings, who) for who in columns.values()]
                lines += [f"| {title.replace(chr(10), ', ')} | {' | '.join(cells)} |"]
    if not any("cuda" in result["environment"] for result in results.values()):
        lines += [
            "",
            "GPU: no figure yet. `python -m bench rows --device cuda` and its like have not been run on one.",
        ]
    return ["", *lines[1:], ""]


def first(timings: Timings, names: tuple[str, ...]) -> str:
    """The first of these that was timed, three digits; ours in bold."""
    for name in names:
        if name in timings:
            ms = timings[name]["median_ms"]
            number = f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
            return f"**{number}**" if name == "ours" else number
    return "–"


def with_figures(text: str, lines: list[str]) -> str:
    """The text with what stands between the two comments replaced."""
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md: there is no place for the figures, between {BEGIN} and {END}")
    return "\n".join([head + BEGIN, *lines, END + tail])


def is_plotted(file: Path) -> bool:
    """This machine's and every GPU's: a further CPU's result has a word after `_cpu` and stays a table."""
    kind, _, where = file.stem.partition("_")
    return kind in KINDS and not where.startswith("cpu_")


def run(_repeats: int = 0) -> None:
    files = sorted(
        filter(is_plotted, RESULTS.glob("*.json")), key=lambda f: KINDS.index(f.stem.partition("_")[0])
    )
    results = {file.stem: json.loads(file.read_text()) for file in files}
    for name, result in results.items():
        path = IMAGES / f"bench_{name}.svg"
        draw(result, path)
        print(path.relative_to(README.parent))
    README.write_text(with_figures(README.read_text(), figures(results)))
