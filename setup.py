"""Packaging shim: every value lives in settings.ini; edit there, not here."""

import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
pkg = cfg["lib_path"]
pins = (here / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()

INDEX = f"{pkg}._modidx"  # by which nbdev links names to pages while the site is built: of no use in a wheel
editable = "editable_wheel" in sys.argv


class Library(build_py):
    "The package as users have it."

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if editable or f"{found[0]}.{found[1]}" != INDEX]


setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    license="MIT",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=setuptools.find_packages(include=[pkg, f"{pkg}.*"]),
    package_data={pkg: shlex.split(cfg["package_data"])},
    include_package_data=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "demo": shlex.split(cfg["demo_requirements"]),
        "dev": [pin for pin in pins if pin and not pin.startswith("#")],
    },
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "vllm.general_plugins": shlex.split(cfg["vllm_plugins"]),
        "nbdev": [f"{pkg}={INDEX}:d"] if editable else [],
    },
    cmdclass={"build_py": Library},
    zip_safe=False,
)
