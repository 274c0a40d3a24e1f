"""The house holds: a room imports only its own folder and those above, is short enough to read, and shares no name.

The folders are listed from the top. What stands in none of them is the ground, which every room may use.
"""

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

import steering_vectors

HOUSE = Path(steering_vectors.__file__).parent
FOLDERS = ["model", "steer", "vectors", "train", "evaluate", "display", "serve", "demo"]
ROOMS = {p.relative_to(HOUSE).with_suffix("").as_posix(): p for p in sorted(HOUSE.rglob("*.py"))}
ROOMS = {room: path for room, path in ROOMS.items() if path.name not in ("__init__.py", "_modidx.py")}
TREES = {room: ast.parse(path.read_text(encoding="utf-8")) for room, path in ROOMS.items()}


def height(room: str) -> int:
    "How far down a room stands: 0 is the ground, which imports nothing but itself."
    return FOLDERS.index(room.split("/")[0]) + 1 if "/" in room else 0


def imports(room: str) -> set[str]:
    "The rooms that a room imports, at its top or inside of its functions."
    found = [n for n in ast.walk(TREES[room]) if isinstance(n, ast.ImportFrom) and n.level]
    folders = {n: room.split("/")[:-1][: len(room.split("/")) - n.level] for n in found}
    return {"/".join([*folders[n], *(n.module or "").split(".")]).strip("/") for n in found}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_its_folder_and_those_above(room: str) -> None:
    asked = imports(room)
    assert asked <= ROOMS.keys(), "imports name rooms, one by one"
    assert [other for other in asked if height(other) > height(room)] == []
    assert not any("steering_vectors" in ast.unparse(n) for n in ast.walk(TREES[room]) if isinstance(n, ast.ImportFrom))


def test_no_room_is_reached_from_itself() -> None:
    def reach(room: str, seen: set[str]) -> set[str]:
        for other in imports(room) - seen:
            seen |= {other} | reach(other, seen | {other})
        return seen

    assert [room for room in ROOMS if room in reach(room, set())] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_short_enough_to_read(room: str) -> None:
    assert len(ROOMS[room].read_text(encoding="utf-8").splitlines()) <= 350


def defined(room: str) -> set[str]:
    "The names that a room gives to something at its top."
    body = TREES[room].body
    named = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    targets = [t for n in body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in body if isinstance(n, ast.AnnAssign)]
    named |= {x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    return named - {"__all__", "__doc__"}


def test_a_name_is_given_once() -> None:
    counts = Counter(name for room in ROOMS for name in defined(room))
    assert [name for name, times in counts.items() if times > 1] == []


def test_the_reference_has_the_same_folders() -> None:
    pages = (Path(__file__).parents[1] / "nbs" / "reference").rglob("*.ipynb")
    exported = {
        line.split()[-1] for page in pages for line in page.read_text("utf-8").split('"') if "default_exp " in line
    }
    assert {name.replace(".", "/") for name in exported} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_help_teaches(room: str) -> None:
    "The first paragraphs of a room's page are what `help` shows of its module, with the address of the page."
    words = importlib.import_module(f"steering_vectors.{room.replace('/', '.')}").__doc__ or ""
    assert len(words.split()) >= 40 and "Docs: https://" in words
    assert words.startswith(ast.get_docstring(TREES[room]) or "-"), "the question of the page"
