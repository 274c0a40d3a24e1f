"""Packaging shim: every value lives in settings.ini; edit there, not here."""

import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
pkg = cfg["lib_path"]
pins = (here / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()

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
        "nbdev": [f"{pkg}={pkg}._modidx:d"],
    },
    zip_safe=False,
)
