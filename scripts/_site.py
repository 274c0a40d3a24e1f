"""What stands between a notebook and its page on the site: steps after nbdev's own, named by `procs` in settings.ini.

A page works wherever it is put (under another address, in a folder, opened from a disk without any server), shows the
source of what it documents, and has signatures that can be read. This module is on the path of every nbdev command once
scripts/_setup has made the environment.
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

from _signatures import MARK, documented

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE_LINK = re.compile(r"\[`([^`\]]+)`\]\([^)\s]*\)")  # a name in backticks that nbdev has linked
NESTED_LINK = re.compile(r"\[([^\[\]]*)\[(`[^`]+`)\]\([^)\s]*\)([^\[\]]*)\](?=\()")  # one inside of another link
MODULES = re.compile(
    r"\b(?:torch\.nn\.modules\.module|collections\.abc|torch|typing|__main__|steering_vectors(?:\.\w+)*)\.(?=\w)"
)


def local_links(
    text: str,  # Markdown
    site: str,  # the site's full address, with a slash at its end
    up: str,  # the way from this page to the top of the site
) -> str:  # Markdown
    "Links to `site` become relative ones."
    return text.replace(f"]({site}", f"]({up}").replace(f'href="{site}', f'href="{up}')


def mended_links(text: str) -> str:
    "Markdown without links inside of links or of code."
    text = NESTED_LINK.sub(r"[\1\2\3]", text)
    return FENCE.sub(lambda fence: CODE_LINK.sub(r"\1", fence.group()), text)


def readable_signature(text: str) -> str:
    "What `show_doc` gives, without the modules of types and without marks that are for tools."

    def short(fence: re.Match[str]) -> str:
        code = MARK.sub("", fence.group())
        return MODULES.sub("", code).replace("<factory>", "...")

    text = FENCE.sub(short, text)
    heading = re.search(r"^(#+ )([\w.]*__\w+__)$", text, re.MULTILINE)
    if heading:  # Markdown would take the underscores for emphasis
        written = heading[2].replace("_", r"\_")
        text = text.replace(heading[0], f"{heading[1]}{written} {{#{heading[2].lower()}}}")
    return text


def defined(source: str) -> str:
    "` of NAME` for what a cell defines; nothing where that is nothing, or very much."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return ""
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    names = list(dict.fromkeys(names))
    return f" of {', '.join(names)}" if 0 < len(names) < 4 else ""


def folded(source: str) -> str:
    "An exported cell as the site shows it: folded, under the signature."
    body = re.sub(r"^#\| *(code-fold|code-summary).*\n", "", source, flags=re.MULTILINE)
    names = defined(body)
    return f'#| code-fold: true\n#| code-summary: "Source{names}"\n{body}'


def linked(source: str, documented: set[str]) -> list[str]:
    "The ids by which nbdev links to what a cell defines, where no heading of the page has them: private names and methods."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    names = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names += [node.name] if node.name.startswith("_") else []
        if isinstance(node, ast.ClassDef):
            names += [f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)]
    return [name.lower() for name in dict.fromkeys(names) if name not in documented]


def has_control(
    cells: Any,  # the cells of a notebook
) -> bool:
    "Whether an output of `cells` needs the widgets' script."
    outputs = [out.get("data") or {} for cell in cells for out in cell.get("outputs") or []]
    return any("jupyter.widget-view+json" in "".join(data.get("text/html", "")) for data in outputs)


def colab_link(
    text: str,  # Markdown
    git_url: str,  # where the project's files are read
    branch: str,
    page: str,  # this notebook, from the top of the project
) -> str:  # Markdown
    "The mark `<!-- colab -->` becomes a link that opens the notebook in Colab."
    place = f"{git_url.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/{branch}/{page}"
    return text.replace("<!-- colab -->", f"[Open this page in Colab]({place}).")


def file_links(
    text: str,  # Markdown
    folder: Path,  # where its page is
    blob: str,  # where the project's files are read, with a slash at its end
) -> str:  # Markdown
    "Links to files of the project that are no pages, such as `../benchmarks/costs.py`, lead to the repository."

    def there(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        inside = target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "nbs")
        return f"]({blob}{target.relative_to(ROOT).as_posix()})" if inside and target.is_file() else found[0]

    return re.sub(r"\]\(((?:\.\./)+[\w./-]+)\)", there, text)


class SitePage:
    "nbdev's document processor for this site, named by `procs` in settings.ini."

    def __init__(
        self,
        nb: Any,  # the notebook, as execnb reads it
    ) -> None:
        self.nb = nb

    def begin(self) -> None: ...

    def __call__(self, cell: Any) -> None: ...

    def end(self) -> None:
        "What is left to do when nbdev's own steps are through."
        from nbdev.config import get_config

        cfg = get_config()
        page = Path(self.nb.path_).resolve().relative_to(Path(cfg.nbs_path).resolve())
        for cell in self.nb.cells:
            if cell.cell_type == "markdown" and cell.source:
                cell.source = file_links(cell.source, Path(self.nb.path_).parent, f"{cfg.git_url}/blob/{cfg.branch}/")
                cell.source = colab_link(cell.source, cfg.git_url, cfg.branch, f"nbs/{page.as_posix()}")
        finish(self.nb, cfg.doc_host + cfg.doc_baseurl.rstrip("/") + "/", "../" * (len(page.parts) - 1))


def finish(
    nb: Any,  # the notebook; changed in place
    site: str,  # the site's full address
    up: str,  # the way from this page to the top of the site
) -> None:
    "Mend the links and signatures of a notebook, fold its sources, and add the scripts that it needs."
    from execnb.nbio import mk_cell

    nb.metadata.pop("widgets", None)  # ids in there change at every run
    for_readme = bool(os.environ.get("STEER_README"))
    module = exported_to(Path(nb.path_))
    shown = {name for cell in nb.cells for name in re.findall(r"show_doc\(([\w.]+)\)", cell.source or "")}
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown" and cell.source and not for_readme:
            cell.source = local_links(mended_links(cell.source), site, up)
        if cell.cell_type == "code" and "code-fold: show" in (cell.source or ""):
            cell.source = folded(cell.source)
            anchors = "".join(f'<a id="{name}"></a>' for name in linked(cell.source, shown))
            cells += [mk_cell("```{=html}\n" + anchors + "\n```", "markdown")] if anchors else []
        if cell.cell_type == "code" and cell.source:
            cell.source = MARK.sub("", cell.source)
        if is_overload(cell):
            continue
        for out in cell.get("outputs") or []:
            mend_output(out, site, up, for_readme)
            name = re.search(r"^show_doc\(([\w.]+)", cell.source or "", re.MULTILINE)
            if name and module and "text/markdown" in (out.get("data") or {}):
                out["data"]["text/markdown"] = documented(out["data"]["text/markdown"], module, name[1])
        cells.append(cell)
    nb.cells = cells
    scripts = ["widgets/embed.js"] if has_control(nb.cells) else []
    tags = "".join(f'<script src="{up}{script}"></script>' for script in [*scripts, "access.js"])
    if not for_readme or scripts:
        nb.cells.append(mk_cell("```{=html}\n" + tags + "\n```", "markdown"))


def exported_to(
    page: Path,  # a notebook
) -> str:
    "The module that a page exports to; empty where it exports nothing."
    named = re.search(r'"#\| *default_exp +([\w.]+)"', page.read_text(encoding="utf-8"))
    return f"steering_vectors.{named[1]}" if named else ""


def is_overload(cell: Any) -> bool:
    "Does `show_doc` show one of several types of a function here? The function itself comes after them."
    shown = [(out.get("data") or {}).get("text/markdown", "") for out in cell.get("outputs") or []]
    return any("### _overload_dummy" in "".join(text) for text in shown)


def mend_output(out: Any, site: str, up: str, for_readme: bool) -> None:
    "The same for one output of a cell."
    if "text" in out:  # in lines: a renderer counts the backticks of each
        out["text"] = "".join(out["text"]).splitlines(keepends=True)
    data = out.get("data") or {}
    if "text/markdown" in data:
        data["text/markdown"] = readable_signature(mended_links("".join(data["text/markdown"])))
    if not for_readme:
        for kind in {"text/markdown", "text/html"} & set(data):
            data[kind] = local_links("".join(data[kind]), site, up)


def name_everything_first() -> None:
    """Let `show_doc` resolve annotations: before a page is staged, what it exports is run, and what it imports only for type
    checkers is imported."""
    from nbdev.processors import exec_show_docs

    begin = exec_show_docs.begin

    def begin_with_names(self: exec_show_docs) -> None:
        begin(self)
        for cell in self.nb.cells if hasattr(self, "k") else []:
            directives = getattr(cell, "directives_", None) or {}
            if cell.cell_type != "code" or not directives.keys() & {"export", "exporti", "exports"}:
                continue
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                    self.k.run_cell(ast.unparse(node.body))
            self.k.run_cell(cell.source)

    exec_show_docs.begin = begin_with_names


name_everything_first()
