"""Other people's packages, installed once into the user's cache without their dependencies, and run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import platformdirs
import pytest

CACHE = Path(platformdirs.user_cache_dir("steering_vectors")) / "peers"
ROOT = Path(__file__).parents[2]


def install(*requirements: str) -> Path:
    "The folder that holds `requirements`; the test is skipped where they cannot be had."
    folder = CACHE / "+".join(requirements).replace("==", "-")
    if not folder.exists():
        new = folder.with_name(f"{uuid4().hex}.new")
        options = [
            "--quiet",
            "--no-deps",
            "--ignore-requires-python",
            "--disable-pip-version-check",
            "--target",
            str(new),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *requirements], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"{', '.join(requirements)} cannot be installed here")
        os.replace(new, folder)
    return folder


def run(code: str, *args: object, peers: Path) -> str:
    "What `code` prints, with `peers` importable and `args` in sys.argv."
    paths = os.pathsep.join([str(peers), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # -P: else the folder one stands in comes first, and where that is this repository, its library is everyone's
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
