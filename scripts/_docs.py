"""The site in _docs/ and README.md, by nbdev's own processors and without its installer.

nbdev stages every page in _proc/; Quarto renders that when it is on PATH, else smalldocs, which reads the same settings.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"""@import\s*(?:url\([^)]*\)|"[^"]*"|'[^']*')[^;]*;""")  # an address may have `;` in it
NOTE = "<!-- Generated from nbs/index.ipynb: edit the notebook, then `scripts/docs readme`. -->"


def keep_inside(site: Path) -> None:
    "Let pages load what they need from the site itself, and nothing that they do not need."
    for sheet in site.rglob("*.css"):  # themes ask for fonts from elsewhere; a system's own will do
        text = sheet.read_text(encoding="utf-8")
        own = IMPORT.sub("", text)
        if own != text:
            sheet.write_text(own, encoding="utf-8")
    for page in site.rglob("*.html"):
        up = "../" * (len(page.relative_to(site).parts) - 1)
        text = page.read_text(encoding="utf-8")
        own = re.sub(r"https://cdn\.jsdelivr\.net/npm/katex@[\w.]+/dist", f"{up}widgets/katex", text)
        own = re.sub(r'<script src="https://[^"]*/(?:require|jquery)\.min\.js"[^>]*></script>\n?', "", own)
        own = re.sub(r"<script[^>]*>define\('jquery'.*?</script>\n?", "", own)
        own = own.replace("/nbs/changelog.md", "/CHANGELOG.md").replace("/nbs/contributing.md", "/CONTRIBUTING.md")
        own = re.sub(r'<meta [^>]*image[^>]*content="[^"]*data:[^"]*"[^>]*>\n?', "", own)
        if own != text:
            page.write_text(own, encoding="utf-8")


def navbar_links() -> str:
    "nbs/navbar.yml: the links to the repository and the package index, as settings.ini has their names."
    from nbdev.config import get_config

    config = get_config()
    links = {
        "Repository": ("github", config.git_url),
        "PyPI": ("box-seam", f"https://pypi.org/project/{config.lib_name}/"),
    }
    lines = ["# Generated from settings.ini by `scripts/docs build`", "website:", "  navbar:", "    right:"]
    for text, (icon, href) in links.items():
        lines += [f"      - text: {text}", f"        icon: {icon}", f"        href: {href}"]
    return "\n".join(lines) + "\n"


def build() -> None:
    "Stage the pages, then render them."
    import nbdev.doclinks
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    config = get_config()
    refresh_quarto_yml()
    (config.nbs_path / "navbar.yml").write_text(navbar_links(), encoding="utf-8")
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    stage = proc_nbs(config.nbs_path, n_workers=0, force=True)  # in this process: torch is imported once
    problems: list[str] = []
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):  # pages of the site too, from the files themselves
        shutil.copy(ROOT / name, stage / name.lower())
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", "--no-cache"], cwd=stage, check=True)
    else:
        problems = smalldocs(stage)
    shutil.rmtree(config.doc_path, ignore_errors=True)
    shutil.move(stage / config.doc_path.name, config.doc_path)
    keep_inside(Path(config.doc_path))
    print("\n".join([*problems, f"The site is in {config.doc_path.relative_to(ROOT)}/"]))
    if problems:
        sys.exit("Some links lead nowhere.")


def smalldocs(stage: Path) -> list[str]:
    "Render the staged pages in pure Python; return the links that lead nowhere."
    command = [sys.executable, "-m", "smalldocs.cli", "render", str(stage)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [line for line in done.stdout.splitlines() if "output-file is not read" not in line]
    if done.returncode:
        sys.exit("\n".join(said))
    return [line for line in said if "broken link" in line]


def shown(output: dict) -> str:
    "One stored output as Markdown."
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    text = "".join(data.get("text/plain") or output.get("text", "")).rstrip()
    return f"``` text\n{text}\n```" if text else ""


def readme() -> str:
    "README.md as nbs/index.ipynb gives it."
    os.environ["STEER_README"] = "1"  # links lead to the site, from wherever the file is read
    from execnb.nbio import read_nb
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults

    config = get_config()
    nb = read_nb(config.nbs_path / config.readme_nb)
    FilterDefaults()(nb)
    about = nb.frontmatter_
    parts = [f"# {about['title']}", NOTE, f"> {about['description']}"]
    for cell in nb.cells:
        source = (cell.get("source") or "").strip()
        if cell.cell_type == "markdown" and source and not source.startswith(("<!--", "```{=html}")):
            parts.append(source)
        if cell.cell_type == "code" and "echo: false" not in source:  # those are controls, for pages only
            if source:
                parts.append(f"``` python\n{source}\n```")
            parts += filter(None, map(shown, cell.get("outputs", [])))
    site = config.doc_host + config.doc_baseurl.rstrip("/") + "/"
    return (
        re.sub(r"\]\(([\w/]+)\.ipynb", rf"]({site}\1.html", "\n\n".join(parts)) + "\n"
    )  # a package index shows it, too


if __name__ == "__main__":
    os.chdir(ROOT)
    if sys.argv[1:] == ["readme"]:
        Path("README.md").write_text(readme(), encoding="utf-8")
    else:
        build()
