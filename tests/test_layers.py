"""docs/architecture.md says which room may import what; the package's imports are held to it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "entropy_kernels"
DATA_ROOMS = {"demo"}


def table() -> dict[str, tuple[set[str], set[str]]]:
    """Room -> (rooms it may import, third-party packages it may import), in the order of the layers."""
    rooms: dict[str, tuple[set[str], set[str]]] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and re.fullmatch(r"`\w+`", cells[0]):
            rooms[cells[0].strip("`")] = (
                {*re.findall(r"`(\w+)`", cells[2])} | {"errors"},
                set(cells[3].split()),
            )
    rooms["measure"] = ((set(rooms) | DATA_ROOMS) - {"measure"}, {"all"})
    return rooms


def imports(path: Path) -> set[str]:
    """Every imported name, absolute: `from .html import x` in report/ is entropy_kernels.report.html.x."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def offences(path: Path, room: str, rooms: dict[str, tuple[set[str], set[str]]]) -> list[str]:
    inner, outer = rooms[room]
    bad = []
    for name in sorted(imports(path)):
        top, _, rest = name.partition(".")
        if top == PACKAGE.name:
            target = rest.split(".")[0]
            if target != room and target not in inner:
                bad.append(f"{path.relative_to(ROOT)}: {name} (room `{room}` may use {sorted(inner)})")
        elif top not in sys.stdlib_module_names and top not in outer and "all" not in outer:
            bad.append(
                f"{path.relative_to(ROOT)}: {name} (room `{room}` may use {sorted(outer)} from outside)"
            )
    return bad


def test_rooms_use_only_rooms_above_them():
    rooms = table()
    order = list(rooms)
    for room, (inner, _) in rooms.items():
        assert all(order.index(other) < order.index(room) for other in inner - {room} - DATA_ROOMS), room


def test_imports_follow_the_table():
    rooms = table()
    bad: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in DATA_ROOMS or room.startswith("__"):
            continue
        assert room in rooms, (
            f"{path.relative_to(ROOT)}: the table in docs/architecture.md has no room `{room}`"
        )
        bad += offences(path, room, rooms)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("room", "code", "caught"),
    [
        ("stats", "import torch", True),
        ("stats", "def f():\n    from ..policy import Policy", True),
        ("stats", "from .. import policy", True),
        ("report", "import entropy_kernels", True),
        ("report", "from entropy_kernels.stats import Estimate\nimport json", False),
    ],
)
def test_an_offence_is_seen(room, code, caught, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "entropy_kernels" / room / "planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    rooms = {"stats": ({"errors"}, {"numpy"}), "report": ({"errors", "stats"}, {"numpy"})}
    assert bool(offences(path, room, rooms)) is caught


def test_importing_the_package_loads_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = set(sys.modules)\n"
        "import entropy_kernels\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names) - {'entropy_kernels', 'torch', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
