"""Pages: which there are, running one in a kernel, and the bytes it would be stored as."""

import difflib
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
VIEW = "application/vnd.jupyter.widget-view+json"

SOURCE = re.compile(r"\[source\]\(\S+#L\w+\)(\{[^}]*\})?\n\n")  # has line numbers, and is made anew for the site
PROGRESS = re.compile(r"\[\d\d:\d\d[<,].*/(s|it)\]")


class CellFailed(Exception):
    "A cell of a page raised; the message is its traceback."


def find(names: list[str] | None = None) -> list[Path]:
    "The pages called `names` (a path, or a file's name without its suffix); all of them by default."
    pages = [p for p in sorted(NBS.rglob("*.ipynb")) if not any(x[0] in "._" for x in p.relative_to(NBS).parts)]
    if not names:
        return pages
    found = []
    for name in names:
        path = Path(name).resolve()
        hits = [p for p in pages if p == path or p.stem == name or path in p.parents]
        if not hits:
            sys.exit(f"No page {name!r} under nbs/. There are: {', '.join(p.stem for p in pages)}")
        found += hits
    return list(dict.fromkeys(found))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def directives(cell: dict[str, Any]) -> list[str]:
    return [line[2:].strip() for line in source(cell).splitlines() if line.startswith("#|")]


def left_out(path: Path) -> list[bool] | None:
    "By nbdev's rules, which cells of the page are not run; None where its front matter says `skip_exec: true`."
    from fastcore.basics import str2bool
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    flags = set(get_config().tst_flags.split())

    def skip(cell: Any) -> bool:
        if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source:
            return True
        directives = getattr(cell, "directives_", None) or {}
        return directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys())

    return None if str2bool(nb.frontmatter_.get("skip_exec", False)) else [skip(cell) for cell in nb.cells]


def is_progress(data: dict[str, Any]) -> bool:
    "Is this the display of a progress bar that was drawn as a widget?"
    return VIEW in data and "text/html" not in data and bool(PROGRESS.search("".join(data.get("text/plain", ""))))


def merged(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "Without stderr, progress bars, live widget views and links to lines of source; neighbouring prints as one, however the kernel flushed them."
    kept: list[dict[str, Any]] = []
    for out in outputs:
        if out.get("name") == "stderr" or is_progress(out.get("data", {})):
            continue
        for key in ("data", "metadata"):
            out.get(key, {}).pop(VIEW, None)
        for kind, shown in out.get("data", {}).items():
            if kind.startswith("text/") and isinstance(shown, str):
                out["data"][kind] = SOURCE.sub("", shown)
        if "execution_count" in out:
            out["execution_count"] = None
        if out.get("output_type") == "stream" and kept and kept[-1].get("output_type") == "stream":
            kept[-1]["text"] += out["text"]
        elif out.get("output_type") in ("stream", "error") or out.get("data"):
            kept.append(out)
    return kept


def text(nb: dict[str, Any]) -> str:
    "The bytes that `nbdev_clean` would leave."
    from execnb.nbio import dict2nb, nb2str
    from nbdev.clean import clean_nb

    for n, cell in enumerate(nb["cells"]):  # a new cell is named after its text: the same page has the same names
        same = sum(source(cell) == source(other) for other in nb["cells"][:n])
        cell.setdefault("id", hashlib.sha256(f"{same} {source(cell)}".encode()).hexdigest()[:8])
    clean = dict2nb(nb)
    clean_nb(clean, allowed_cell_metadata_keys=["tags", "jupyter"])
    return str(nb2str(clean))


def is_exact(path: Path) -> bool:
    "Are this page's outputs the same on every machine? Those of the reference are: they need no real model."
    return path.relative_to(NBS).parts[0] == "reference"


def environment() -> dict[str, str]:
    "What a page's kernel sees. One thread each, so that pages can run side by side and print the same digits."
    fixed = {"IN_TEST": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return os.environ | fixed


def run(path: Path) -> str:
    "Run the page at `path` in a kernel and return it as it should be stored."
    import _kernels
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    _kernels.fork()
    raw, skips = json.loads(path.read_text(encoding="utf-8")), left_out(path)
    if skips is None:
        return text(raw)
    nb = nbformat.read(path, 4)
    for cell, skip in zip(nb.cells, skips, strict=True):
        if skip and cell.cell_type == "code":
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(nb, timeout=900, kernel_name="python3", resources=place, extra_arguments=["--log-level=40"])
    try:
        client.execute(env=environment())
    except AssertionError:  # nbclient's own, about the client it lost
        raise CellFailed("The kernel died while the page ran.") from None
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(e)).rstrip().splitlines()
        raise CellFailed("\n".join([*plain[:12], "...", *plain[-25:]] if len(plain) > 40 else plain)) from None
    for cell, ran, skip in zip(raw["cells"], nb.cells, skips, strict=True):
        if cell["cell_type"] == "code" and not skip:
            cell["outputs"] = merged(json.loads(json.dumps(ran.outputs)))
    return text(raw)


def difference(stored: str, shown: str, name: Path) -> str:
    "What changed, as a diff of at most 60 lines."
    lines = list(
        difflib.unified_diff(
            stored.splitlines(), shown.splitlines(), f"{name} (stored)", f"{name} (run)", lineterm="", n=2
        )
    )
    return "\n".join(line[:300] for line in lines[:60])
