"""Open a page with a kernel behind it: controls take any value, and cells can be changed.

    scripts/docs live [PAGE] [--voila] [--port N] [--no-browser]

The page is a copy in a temporary folder, so that trying things out changes nothing in the checkout. JupyterLab opens it
ready to run; `--voila` (`pip install voila`) runs it and shows the result without the code.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def find(name: str) -> Path:
    "The page called `name`, relative to nbs/."
    pages = [p.relative_to(NBS) for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    hits = [p for p in pages if name in (p.stem, str(p), f"nbs/{p}")]
    if not hits:
        sys.exit(f"No page {name!r} under nbs/. There are: {', '.join(p.stem for p in pages)}")
    return hits[0]


def command(page: Path, folder: Path, voila: bool, port: int, show: bool) -> list[str]:
    "What serves `page`, a copy in `folder`."
    quiet = [] if show else ["--no-browser"]
    if voila:
        if importlib.util.find_spec("voila") is None:
            sys.exit("Voila is not installed: run `pip install voila`, or leave out --voila for JupyterLab.")
        return [sys.executable, "-m", "voila", str(folder / page), f"--port={port}", "--Voila.ip=127.0.0.1", *quiet]
    place = [f"--ServerApp.root_dir={folder}", f"--LabApp.default_url=/lab/tree/{page.as_posix()}"]
    open_ = ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.allow_root=True"]
    return [sys.executable, "-m", "jupyterlab", *place, *open_, *quiet]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "page", nargs="?", default="basic_usage", help="a page by name, as in `basic_usage`, or any notebook"
    )
    parser.add_argument("--voila", action="store_true", help="show the page without its code")
    parser.add_argument("--port", type=int, default=8888)
    parser.add_argument("--no-browser", action="store_true", help="only serve")
    args, rest = parser.parse_known_args()
    given = Path(args.page)
    own_page = (
        given.resolve() if given.suffix == ".ipynb" and given.is_file() and NBS not in given.resolve().parents else None
    )
    page = Path(own_page.name) if own_page else find(args.page)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pages"
        shutil.copytree(NBS, folder, ignore=shutil.ignore_patterns("_*", ".*"))
        if own_page:
            shutil.copy(own_page, folder / page)
        own = {
            "JUPYTER_CONFIG_DIR": f"{name}/config",
            "JUPYTER_DATA_DIR": f"{name}/data",
            "JUPYTER_RUNTIME_DIR": f"{name}/run",
        }
        serve = command(page, folder, args.voila, args.port, not args.no_browser)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the server below ends too
        process = subprocess.Popen([*serve, *rest], env={**os.environ, **own})
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
