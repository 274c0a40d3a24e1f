"""Before nbdev's export, the first paragraphs of a module's page become the `__doc__` of its module.

A page of nbs/reference opens with its question and the reasons for the module. `help()` of the module shows the same words
and the address of the page. They are in an exported cell of the page, folded in Jupyter, which is written here from the
prose; so nbdev's own commands export the same file.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import _pages

ADDRESS = re.compile(r"\[([^\]]+)\]\([^)]*\)")  # of a link in Markdown; its words stay
WIDTH = 100
HEAD = "#| export\n__doc__ = "
FOLDED = {"jupyter": {"source_hidden": True}}


def paragraphs(cells: list[dict]) -> list[str]:
    "The paragraphs and lists between a page's title and its first code or heading; pictures and tables are left out."
    found: list[str] = []
    for cell in cells[1:]:
        text = _pages.source(cell).strip()
        if cell["cell_type"] == "code":
            if {d.split()[0] for d in _pages.directives(cell) if d} & {"default_exp", "hide"}:
                continue
            break
        if text.startswith("#"):
            break
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        parts = re.split(r"\n\s*\n", prose)
        found += [part for part in parts if part.strip() and not re.match(r"\s*[|<!]", part)]
    return [ADDRESS.sub(r"\1", part) for part in found]


def wrapped(part: str) -> str:
    "A paragraph, or the items of a list one by one, in lines of `WIDTH`."
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    if not re.match(r"\s*([-*] |\d\.)", part):
        return textwrap.fill(" ".join(part.split()), WIDTH, **how)
    return "\n".join(textwrap.fill(item, WIDTH, subsequent_indent="  ", **how) for item in part.splitlines())


def docstring(page: Path, cells: list[dict]) -> str:
    "What `help()` shows of the module that `page` exports."
    from nbdev.config import get_config

    question = next(line for line in _pages.source(cells[0]).splitlines() if line.startswith("> "))[2:].strip()
    config = get_config()
    site = config.doc_host + config.doc_baseurl.rstrip("/")
    address = f"{site}/{page.relative_to(_pages.NBS).with_suffix('.html').as_posix()}"
    text = "\n\n".join([question, *map(wrapped, paragraphs(cells)), f"Docs: {address}"])
    mark = "r" if "\\" in text else ""
    return f'{mark}"""{text}\n"""'


def module(page: Path) -> Path | None:
    "The file that `page` is exported to."
    names = re.findall(r'"#\| default_exp ([\w.]+)', page.read_text(encoding="utf-8"))
    return _pages.ROOT / "steering_vectors" / (names[0].replace(".", "/") + ".py") if names else None


def describe(page: Path) -> None:
    "Write the cell of `page` that holds its module's docstring, where the page exports a module."
    if module(page) is None:
        return
    stored = page.read_text(encoding="utf-8")
    nb = json.loads(stored)
    cells = [cell for cell in nb["cells"] if not _pages.source(cell).startswith(HEAD)]
    new = {"cell_type": "code", "execution_count": None, "id": "d0c57219", "metadata": FOLDED, "outputs": []}
    new["source"] = f"{HEAD}{docstring(page, cells)}".splitlines(keepends=True)
    heads = ["#| default_exp", "#| export\n"]  # behind the imports: one from the future must come first
    at = max(next((n for n, cell in enumerate(cells) if _pages.source(cell).startswith(head)), 0) for head in heads)
    nb["cells"] = [*cells[: at + 1], new, *cells[at + 1 :]]
    text = _pages.text(nb)
    if text != stored:
        page.write_text(text, encoding="utf-8")


def export(pages: list[Path]) -> None:
    "Describe and export some pages."
    from nbdev.doclinks import nbdev_export
    from nbdev.export import nb_export

    for page in pages:
        describe(page)
    if pages == _pages.find():
        nbdev_export.__wrapped__()
    else:
        for page in pages:
            nb_export(page)


if __name__ == "__main__":
    export(_pages.find(sys.argv[1:]))
