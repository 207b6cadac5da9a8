"""The documentation names what there is: files, functions, links, figures."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools import ROOT, edited, read_log, save_tiny_model, sharpen, write_bytes_data

sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402

from model import GPT  # noqa: E402

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


# -------------------------------------------------------------------- code of one's own

OWN_CODE = (ROOT / "docs/your-own-code.md").read_text()
METRICS = re.findall(r"```diff\n(.*?)```", OWN_CODE, re.S)
SCRIPTS = re.findall(r"```python\n(.*?)```", OWN_CODE, re.S)


def run_own(script: Path, *args, launcher=(sys.executable,)) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, script, *args]
    done = subprocess.run(
        list(map(str, command)), cwd=script.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_metrics_of_the_page_are_logged_by_two_ranks_as_by_one(tmp_path):
    code = (ROOT / "train_gpt2.py").read_text()
    for diff in METRICS:
        code = edited(code, diff)
    script = tmp_path / "train_gpt2.py"
    script.write_text(code)
    data = write_bytes_data(tmp_path / "data")
    flags = f"""--recipe first-run --data {data} --n-layer 1 --n-head 1 --n-embd 16 --seq-len 16
        --total-batch-tokens 64 --micro-batch 2 --max-steps 2 --warmup-steps 1 --eval-tokens 500
        --dtype float32 --device cpu"""
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2"]
    run_own(script, *flags.split(), "--out", "one")
    run_own(script, *flags.split(), "--out", "two", launcher=torchrun)
    for event, key in (("train", "weight_norm"), ("eval", "accuracy")):
        one, two = (
            [entry[key] for entry in read_log(tmp_path / name, event)] for name in ("one", "two")
        )
        assert len(one) == 2 and one == pytest.approx(two, abs=1e-3)
        assert one[1] > 0


@pytest.fixture
def own_script(tmp_path):
    def write(code: str) -> Path:
        file = tmp_path / "own_script.py"
        file.write_text(code)
        return file

    return write


def test_the_page_finds_the_tokens_that_a_model_expects_least(own_script, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("a text of some thirty bytes.")
    lines = run_own(own_script(SCRIPTS[0]), model, text).splitlines()
    losses = [float(line.split()[0]) for line in lines]
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)


def test_the_page_averages_weights(own_script, tmp_path):
    torch.manual_seed(1)
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    models = [sharpen(GPT.from_pretrained(save_tiny_model(folder))) for folder in folders]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    run_own(own_script(SCRIPTS[1]), *folders, tmp_path / "mean")
    mean = GPT.from_pretrained(tmp_path / "mean").state_dict()
    for name, weight in mean.items():
        expected = sum(model.state_dict()[name] for model in models) / 3
        assert torch.allclose(weight, expected, atol=1e-6)
