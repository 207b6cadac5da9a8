"""The direction of imports: the top stands on support/, and support/ on nothing above itself."""

import ast
from pathlib import Path

from tools import ROOT

TOP = {file.stem for file in ROOT.glob("*.py")}
SUPPORT = {file.stem: file for file in (ROOT / "support").glob("*.py")}


def modules_imported(file: Path) -> set[str]:
    """What a file imports anywhere, also inside of functions: "torch", "support.files", …"""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_support_imports_nothing_of_the_top():
    for name, file in SUPPORT.items():
        assert not modules_imported(file) & TOP, name


def test_support_has_no_circle():
    left = {}
    for name, file in SUPPORT.items():
        left[name] = {other for other in SUPPORT if f"support.{other}" in modules_imported(file)}
    while left:
        settled = {name for name, others in left.items() if not others & left.keys()}
        assert settled, f"{sorted(left)} import each other in a circle"
        left = {name: others for name, others in left.items() if name not in settled}
