"""Store the outputs of notebooks: run each page in a kernel of its own and write back what it shows. A page that teaches
a module is exported as well.

    scripts/refresh [--check] [PAGE ...]     # pages by path or by name; left out, all of nbs/

Each page uses one thread, so as many of them run at a time as there are cores.
Two runs on one machine write the same bytes: progress bars (stderr), live widget ids and execution times are left out.
`--check` writes nothing and fails where a page shows something else than what is stored.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _export

import _pages

ROOT = _pages.ROOT


def timed(path: Path) -> tuple[str, str, float]:
    "The page as it should be stored, what went wrong, and how long it took."
    start = time.time()
    try:
        shown, error = _pages.run(path), ""
    except _pages.CellFailed as e:
        shown, error = "", str(e)
    return shown, error, time.time() - start


def finish(path: Path, shown: str, error: str, seconds: float, check: bool) -> int:
    "Store or compare what a page shows, and export it; 1 where it failed."
    name, stored = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    if error:
        print(f"{name} failed\n{error}", file=sys.stderr)
        return 1
    changed = shown != stored
    if changed and check:
        print(_pages.difference(stored, shown, name), file=sys.stderr)
    elif changed:
        path.write_text(shown, encoding="utf-8")
    if not check and "#| default_exp " in shown:
        _export.export([path])
    print(f"{'changed' if changed else 'same   '} {name} ({seconds:.0f} s)", flush=True)
    return int(changed and check)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="paths or names, as in `demo` or `nbs/reference/demo.ipynb`")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    failed, begun, pages = 0, time.time(), _pages.find(args.pages)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for path, (shown, error, seconds) in zip(pages, pool.map(timed, pages), strict=True):
            failed += finish(path, shown, error, seconds, args.check)
    print(f"{len(pages)} pages in {(time.time() - begun) / 60:.1f} minutes")
    return min(failed, 1)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
