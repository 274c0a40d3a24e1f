"""The one step between a notebook and its page on the site: load the widgets' script where it is needed, and keep links inside the site."""

import os
from pathlib import Path
from typing import Any


def local_links(
    text: str,  # Markdown
    site: str,  # the site's full address, with a slash at its end
    up: str,  # the way from this page to the top of the site
) -> str:  # Markdown
    "Turn links to `site` into relative ones."
    return text.replace(f"]({site}", f"]({up}").replace(f'href="{site}', f'href="{up}')


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
    "Turn the mark `<!-- colab -->` into a link that opens the notebook in Colab."
    place = f"{git_url.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/{branch}/{page}"
    return text.replace("<!-- colab -->", f"[Open this page in Colab]({place}).")


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
        "Rewrite links, and add the widgets' script after the last cell."
        from nbdev.config import get_config

        cfg = get_config()
        page = Path(self.nb.path_).resolve().relative_to(Path(cfg.nbs_path).resolve())
        for cell in self.nb.cells:
            if cell.cell_type == "markdown":
                cell.source = colab_link(cell.source, cfg.git_url, cfg.branch, f"nbs/{page.as_posix()}")
        finish(self.nb, cfg.doc_host + cfg.doc_baseurl.rstrip("/") + "/", "../" * (len(page.parts) - 1))


def finish(
    nb: Any,  # the notebook; changed in place
    site: str,  # the site's full address
    up: str,  # the way from this page to the top of the site
) -> None:
    "Rewrite the links of a notebook and add the widgets' script if it has a control."
    from execnb.nbio import mk_cell

    nb.metadata.pop("widgets", None)  # ids in there change at every run
    if not os.environ.get("STEER_README"):
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = local_links(cell.source, site, up)
            for out in cell.get("outputs") or []:
                data = out.get("data") or {}
                for kind in {"text/markdown", "text/html"} & set(data):
                    data[kind] = local_links("".join(data[kind]), site, up)
    if has_control(nb.cells):
        tag = f'<script src="{up}widgets/embed.js"></script>'
        nb.cells.append(mk_cell("```{=html}\n" + tag + "\n```", "markdown"))
