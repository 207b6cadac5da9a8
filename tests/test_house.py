"""Which file may import which: the six at the top import support/, where arrows go one way."""

import ast
from graphlib import TopologicalSorter

import pytest
from tools import ROOT

from support.run_directory import SCRIPTS

TOP = {file.stem: file for file in ROOT.glob("*.py")}
SUPPORT = {f"support.{file.stem}": file for file in ROOT.glob("support/*.py")}
# Private names of other packages that are used. os._exit is documented. Without packed weights
# decoding is slower; without fixed addresses it cannot be recorded as a CUDA graph.
ALLOWED = {
    "support.script: os",
    "support.runtime: torch.ops.mkldnn",
    "sample: torch._dynamo",
    "sample: torch",
}


def imported(file) -> set[str]:
    """The full names of all that a file imports, inside of its functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes that begins with a name; else empty."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return start and f"{start}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("name", SUPPORT)
def test_support_imports_nothing_of_the_top(name):
    assert not imported(SUPPORT[name]) & set(TOP)


def test_the_hash_of_the_code_has_all_files_of_the_top_that_training_imports():
    needed = {"train_gpt2"}
    while found := set().union(*(imported(TOP[name]) & set(TOP) for name in needed)) - needed:
        needed |= found
    assert needed <= {name.removesuffix(".py") for name in SCRIPTS}


def test_the_imports_inside_support_have_no_circle():
    order = TopologicalSorter({name: imported(SUPPORT[name]) & set(SUPPORT) for name in SUPPORT})
    assert len(list(order.static_order())) == len(SUPPORT)  # it raises CycleError


@pytest.mark.parametrize("name", TOP | SUPPORT)
def test_no_private_name_of_another_package_is_used(name):
    tree = ast.parse((TOP | SUPPORT)[name].read_text())
    others = set()  # names that stand for other packages
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    chains = {dotted(node) for node in ast.walk(tree)} | imported((TOP | SUPPORT)[name])
    for chain in chains:
        holder, _, attribute = chain.rpartition(".")
        is_private = attribute.startswith("_") and not attribute.startswith("__")
        if is_private and holder.partition(".")[0] in others - {"support"}:
            assert f"{name}: {holder}" in ALLOWED, chain


def test_no_module_is_looked_up_by_its_name():
    for file in SUPPORT.values():
        assert "sys.modules" not in file.read_text(), file
