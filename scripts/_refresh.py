"""Store the outputs of notebooks: run each page in a kernel of its own and write back what it shows. A page that teaches
a module is exported as well.

    scripts/refresh [--check] [PAGE ...]     # pages by path or by name; left out, all of nbs/

Two runs on one machine write the same bytes: progress bars (stderr), live widget ids and execution times are left out.
`--check` writes nothing and fails where a page shows something else than what is stored.
"""

import argparse
import os
import sys
import time

import _export

import _pages

ROOT = _pages.ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="paths or names, as in `demo` or `nbs/reference/demo.ipynb`")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    failed, begun, pages = 0, time.time(), _pages.find(args.pages)
    for path in pages:
        start, stored = time.time(), path.read_text(encoding="utf-8")
        try:
            shown = _pages.run(path)
        except _pages.CellFailed as e:
            print(f"{path.relative_to(ROOT)} failed\n{e}", file=sys.stderr)
            failed += 1
            continue
        changed = shown != stored
        if changed and args.check:
            print(_pages.difference(stored, shown, path.relative_to(ROOT)), file=sys.stderr)
            failed += 1
        elif changed:
            path.write_text(shown, encoding="utf-8")
        if not args.check and "#| default_exp " in shown:
            _export.export([path])
        print(
            f"{'changed' if changed else 'same   '} {path.relative_to(ROOT)} ({time.time() - start:.0f} s)", flush=True
        )
    print(f"{len(pages)} pages in {(time.time() - begun) / 60:.1f} minutes")
    return min(failed, 1)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
