"""Is the tree what its notebooks give? Export, clean and README are done again, and what changed is named.

python scripts/_check.py            # what was out of date is rewritten
python scripts/_check.py --check    # it is only named, and put back
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import _export

import _docs
import _pages

ROOT = _pages.ROOT


def snapshot() -> dict[Path, bytes]:
    "Every file that is derived from a notebook, and the notebooks."
    settings = [ROOT / "nbs" / "nbdev.yml", ROOT / "nbs" / "navbar.yml"]
    files = [*_pages.find(), *(ROOT / "steering_vectors").rglob("*.py"), ROOT / "README.md", *settings]
    return {p.relative_to(ROOT): p.read_bytes() for p in files if p.exists()}


def derive() -> None:
    "Do again what derives files from notebooks."
    from nbdev.quarto import refresh_quarto_yml

    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], check=True)
    _export.export(_pages.find())
    refresh_quarto_yml()
    (ROOT / "nbs" / "navbar.yml").write_text(_docs.navbar_links(), encoding="utf-8")
    (ROOT / "README.md").write_text(_docs.readme(), encoding="utf-8")


def put_back(before: dict[Path, bytes], changed: list[Path]) -> None:
    "Make files what they were."
    for path in changed:
        if path in before:
            (ROOT / path).write_bytes(before[path])
        else:
            (ROOT / path).unlink(missing_ok=True)


def orphans() -> list[str]:
    "Modules that no notebook exports."
    taught = {_export.module(page) for page in _pages.find()}
    package = [p for p in (ROOT / "steering_vectors").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    return [f"{path.relative_to(ROOT)} is exported by no notebook" for path in sorted({*package} - taught)]


def unlisted() -> list[str]:
    "Pages that the site's sidebar does not list, and pages it lists that are not there; those the top bar names."
    listed = re.findall(r"[\w/]+\.ipynb", (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    linked = re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    there = {str(p.relative_to(_pages.NBS)) for p in _pages.find()}
    said = [f"nbs/{name} is not in nbs/sidebar.yml" for name in sorted(there - set(listed))]
    return said + [f"{name} is listed for the site and is not there" for name in sorted({*listed, *linked} - there)]


def shows(cell: dict) -> bool:
    "Does `cell` surely show something: does it print, or end on a value that is not the result of a call?"
    try:
        body = ast.parse(re.sub(r"^\s*[%!].*$", "pass", _pages.source(cell), flags=re.M)).body
    except SyntaxError:
        return False
    last = body[-1] if body else None
    if not isinstance(last, ast.Expr):
        return False
    value = last.value
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "print"
    return isinstance(value, ast.Name | ast.Subscript | ast.BinOp | ast.Compare | ast.JoinedStr | ast.List | ast.Dict)


def mixed() -> list[str]:
    "Cells that import and do something else too: making the site runs a page's imports, and nothing else of it."
    said = []
    for path in _pages.find():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            heads = {d.replace(" ", "") for d in _pages.directives(cell)}
            if cell["cell_type"] != "code" or heads & {"export", "exporti", "eval:false"}:
                continue
            try:
                body = ast.parse(_pages.source(cell)).body
            except SyntaxError:
                continue
            imports = [n for b in body for n in ast.walk(b) if isinstance(n, ast.Import | ast.ImportFrom)]
            if imports and len(imports) < len(body):
                said.append(f"{path.relative_to(ROOT)}: {ast.unparse(imports[0])!r} shares its cell with other code")
    return said


def unstored() -> list[str]:
    "Pages and cells that lack the outputs they would show, and stored outputs that are errors or progress bars."
    said = []
    for path in _pages.find():
        name, nb = path.relative_to(ROOT), json.loads(path.read_text(encoding="utf-8"))
        skips = _pages.left_out(path) or [True] * len(nb["cells"])
        code = [c for c, skip in zip(nb["cells"], skips, strict=True) if not skip]
        open_ = [c for c in code if not {d.split()[0].rstrip(":") for d in _pages.directives(c) if d} & EXPORTED]
        if open_ and not any(c["outputs"] for c in open_):
            said.append(f"{name} has no stored outputs: scripts/refresh {name}")
            continue
        for cell in open_:
            first = next((x for x in _pages.source(cell).splitlines() if x and not x.startswith("#|")), "")
            if shows(cell) and not cell["outputs"]:
                said.append(f"{name}: no stored output for the cell that begins {first!r}: scripts/refresh {name}")
            if any(o["output_type"] == "error" or o.get("name") == "stderr" for o in cell["outputs"]):
                said.append(f"{name}: an error or stderr is stored for the cell that begins {first!r}")
    return said


EXPORTED = {"export", "exporti", "exports", "hide", "default_exp"}

if __name__ == "__main__":
    os.chdir(ROOT)
    only_report = "--check" in sys.argv[1:]
    before = snapshot()
    derive()
    after = snapshot()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if only_report:
        put_back(before, changed)
    advice = "run scripts/check, which rewrites it" if only_report else "it is rewritten: commit it"
    problems = [f"{p} was out of date; {advice}" for p in changed] + orphans() + unlisted() + mixed() + unstored()
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(1 if problems else 0)
