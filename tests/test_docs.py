"""The documentation names what there is: files, functions, links, figures."""

import ast
import re
import sys
from pathlib import Path

import pytest
from tools import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402

PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

OF_OTHER_PROJECTS = {"convert_hf_to_gguf.py"}


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods and constants of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def anchors_in(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pages
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for link in ("".join(link) for link in links):
        if re.match(r"[a-z]+:", link):
            continue  # on the network
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_in(target), link


@pages
def test_a_name_in_a_link_to_code_is_in_that_file(page):
    for name, link in re.findall(r"\[`(\w+)`\]\(([^)\s]+\.py)\)", page.read_text()):
        assert name in names_in(page.parent / link), f"{name} in {link}"


@pages
def test_python_files_that_are_named_exist(page):
    """By their path from the repository's folder; those in tests/ also by their name alone."""
    for name in re.findall(r"(?<![\w./-])((?:\w+/)*\w+\.py)\b", page.read_text()):
        exists = any((folder / name).exists() for folder in (ROOT, ROOT / "tests", page.parent))
        assert exists or name in OF_OTHER_PROJECTS, name


@pages
def test_tests_that_are_named_exist(page):
    """A name may be cut short by …"""
    tests = set().union(*(names_in(file) for file in (ROOT / "tests").glob("*.py")))
    for name, cut in re.findall(r"`(test_\w+)(…?)`", page.read_text()):
        assert name in tests or (cut and any(test.startswith(name) for test in tests)), name


@pages
def test_modules_that_are_run_exist(page):
    for name in re.findall(r"python3? -m ((?:support|benchmarks)[\w.]+)", page.read_text()):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


def test_figures_are_what_their_code_draws():
    files = {file.stem: file.read_text() for file in figures.FOLDER.glob("*.svg")}
    assert files == {name: draw().svg() for name, draw in figures.FIGURES.items()}
