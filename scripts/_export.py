"""nbdev's export, and then what it leaves out: the first paragraphs of a room's page become its module's docstring.

A page of nbs/reference opens with its question and the reasons for the room. Whoever meets the module by `help()`, in an
editor or in a traceback reads the same words, and finds the address of the page. `nbdev_export` alone writes the question.
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


def docstring(page: Path) -> str:
    "What `help()` shows of the module that `page` exports."
    from nbdev.config import get_config

    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
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
    "Write the docstring of the module that `page` has just been exported to."
    path = module(page)
    if path is None:
        return
    code = path.read_text(encoding="utf-8")
    rest = re.sub(r'\Ar?""".*?"""\n', "", code, flags=re.DOTALL)
    path.write_text(f"{docstring(page)}\n{rest}", encoding="utf-8")


def export(pages: list[Path]) -> None:
    "Export some pages."
    from nbdev.doclinks import nbdev_export
    from nbdev.export import nb_export

    everything = _pages.find()
    if pages == everything:
        nbdev_export.__wrapped__()
    else:
        for page in pages:
            nb_export(page)
    for page in pages:
        describe(page)


if __name__ == "__main__":
    export(_pages.find(sys.argv[1:]))
