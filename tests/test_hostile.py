"""What a stranger's file may do: nothing. Runs, models, corpora, texts and names; see SECURITY.md.

Each test works beside a private file. Nothing may be written, deleted or made there. A file that is
refused ends a command with exit code 2 and one line that names it.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from mutate import campaign, limits
from safetensors.torch import save_file
from tools import run_main, save_tiny_model, write_bytes_data

import fineweb
import hellaswag
import sample
import train_gpt2
from support import plot

TINY_FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 128 --micro-batch 4
    --max-steps 2 --warmup-steps 1 --eval-every 1 --eval-tokens 200 --sample-every 2
    --save-every 1 --dtype float32 --device cpu --no-compile
"""
TINY = TINY_FLAGS.split()


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A private file, with the working directory beside its folder; checked after every test."""
    folder = tmp_path / "canary"
    folder.mkdir()
    file = folder / "id_rsa"
    file.write_bytes(b"private key")
    os.utime(file, (1e9, 1e9))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield folder
    assert os.listdir(folder) == ["id_rsa"]
    assert file.read_bytes() == b"private key"
    assert file.stat().st_mtime == 1e9


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of two steps, both of them saved."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    assert run_main(train_gpt2.main, "--data", data, *TINY, "--keep-best", "--out", folder) == 0
    return folder


@pytest.fixture
def run(finished) -> Path:
    """A copy of the run, in the working directory."""
    return Path(shutil.copytree(finished, "r"))


class Ended:
    """A command that has ended: within a minute, and without more than a gigabyte."""

    def __init__(self, capfd, main, *args):
        capfd.readouterr()
        with limits():
            self.code = run_main(main, *args)
        self.out, self.err = capfd.readouterr()
        assert "Traceback" not in self.err

    def refused(self, *words: str) -> None:
        """It has ended with one line that has these words, and that a terminal does not obey."""
        assert self.code == 2, self.err
        line = self.err.rstrip("\n").splitlines()[-1]
        assert line.startswith("error: ")
        for word in words:
            assert word in line


@pytest.fixture
def train(capfd):
    return lambda *args: Ended(capfd, train_gpt2.main, *args)


@pytest.fixture
def resume(train):
    return lambda *args: train("--out", "r", "--resume", *args)


@pytest.fixture
def write(capfd):
    """Text from a model, whose name is given."""
    flags = ("--prompt", "a", "--max-new-tokens", 2, "--num-samples", 1, "--device", "cpu")
    return lambda model, *args: Ended(capfd, sample.main, "--model", model, *flags, *args)


@pytest.fixture
def prepare(capfd):
    """A corpus of bytes from a file."""
    flags = ("--out", "o", "--workers", 1, "--tokenizer", "bytes")
    return lambda file, *args: Ended(capfd, fineweb.main, "--input", file, *flags, *args)


@pytest.fixture
def score(capfd):
    """HellaSwag's items from a file."""
    flags = ("--model", "r", "--device", "cpu", "--json", "out.json")
    return lambda file: Ended(capfd, hellaswag.main, "--data", file, *flags)


def edit_json(file: Path, **changes) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


def sign(step: Path) -> None:
    """Make a checkpoint's manifest agree with its files, as whoever changed them can."""
    files = {}
    for file in step.iterdir():
        if file.name != "manifest.json":
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            files[file.name] = {"size": file.stat().st_size, "sha256": digest}
    (step / "manifest.json").write_text(json.dumps({"files": files}))


def change_train_json(run: Path, **changes) -> None:
    """Change a run's configuration, and let its checkpoints agree."""
    edit_json(run / "train.json", **changes)
    digest = hashlib.sha256((run / "train.json").read_bytes()).hexdigest()
    for step in run.glob("step_*"):
        edit_json(step / "state.json", train_json=digest)
        sign(step)


def link(file: str | Path, target: Path) -> None:
    """Let a link stand in the place of a file."""
    file = Path(file)
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.symlink_to(target)


# -------------------------------------------------------------------- no code comes out of data


class Attack:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.command = f"touch {canary}/not-there"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_is_not_unpickled(canary, name, write):
    folder = save_tiny_model(Path("m"))
    (folder / "model.safetensors").unlink()
    torch.save({"a": Attack(canary)}, folder / name)
    write("m").refused("model.safetensors")


def test_an_array_of_tokens_is_not_unpickled(canary, train):
    Path("d").mkdir()
    for name in ("a_val_000000.npy", "a_train_000001.npy"):
        np.save(Path("d", name), np.array([Attack(canary)], dtype=object), allow_pickle=True)
    train("--data", "d", *TINY).refused("a_")


def test_a_type_in_a_table_is_not_unpickled(canary, prepare):
    """Old versions of pyarrow did that."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Attack(canary)),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    table = pyarrow.table([["hello"] * 20], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, "a.parquet")
    assert prepare("a.parquet").code == 0


def test_a_name_is_no_tex(run, capfd):
    """matplotlib would start a TeX for this kind of picture, with the run's name in it."""
    run.rename("$\\write18{touch x}$")
    Ended(capfd, plot.main, "$\\write18{touch x}$", "--out", "c.pgf").refused("c.pgf")


# -------------------------------------------------------- writing and reading stay in the folder

LINKS = pytest.mark.parametrize("name", ["id_rsa", "not-there"])


@LINKS
def test_a_new_run_writes_through_no_link(data, canary, name, train):
    """A folder that is there already may have links to a private file, or to a place for one."""
    Path("r").mkdir()
    for file in ["log.jsonl", ".lock", ".lock-holder", ".x.tmp", ".step_000001.tmp"]:
        link(f"r/{file}", canary / name)
    assert train("--data", data, *TINY, "--keep-best", "--out", "r").code == 0
    assert not Path("r/log.jsonl").is_symlink()


@LINKS
def test_a_continued_run_writes_through_no_link(run, canary, name, resume):
    shutil.rmtree("r/step_000002")  # so that there is a step to make
    for file in ("curves.png", ".lock", ".lock-holder", ".step_000002.tmp", "damaged_step_000002"):
        link(f"r/{file}", canary / name)
    assert resume().code == 0
    assert Path("r/step_000002/manifest.json").exists()


@LINKS
def test_a_saved_model_writes_through_no_link(canary, name, write):
    Path("m").mkdir()
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        link(f"m/{file}", canary / name)
    save_tiny_model(Path("m"))
    assert write("m").code == 0


@LINKS
def test_a_prepared_corpus_writes_through_no_link(canary, name, prepare):
    Path("a.txt").write_text("some text " * 100)
    Path("o").mkdir()
    for file in ("a_val_000000.bin", "a_train_000001.bin", ".lock-holder", ".x.tmp"):
        link(f"o/{file}", canary / name)
    ended = prepare("a.txt")
    assert ended.code == 2 or not Path("o/a_val_000000.bin").is_symlink()


def test_a_linked_checkpoint_is_not_followed(run, canary, resume):
    link("r/step_000001", canary)
    assert resume("--keep", 1).code == 0


@pytest.mark.parametrize("name", ["../../canary/id_rsa", "/etc/passwd", "..", "a\\b", "a\nb"])
def test_a_checkpoints_manifest_names_files_beside_it(run, name, resume):
    file = run / "step_000002/manifest.json"
    files = json.loads(file.read_text())["files"] | {name: {"size": 11, "sha256": "0" * 64}}
    file.write_text(json.dumps({"files": files}))
    assert "which is no plain file name" in resume().out


@pytest.mark.parametrize("name", ["../canary/id_rsa", "/etc/passwd", "a/b.bin"])
def test_a_corpus_manifest_names_files_beside_it(data, name, train):
    shutil.copytree(data, "d")
    values = json.loads(Path("d/manifest.json").read_text())
    values["shards"][0]["name"] = name
    Path("d/manifest.json").write_text(json.dumps(values))
    train("--data", "d", *TINY).refused("d/manifest.json")


def test_an_index_of_weights_names_files_beside_it(write):
    folder = save_tiny_model(Path("m"))
    (folder / "model.safetensors").rename("other.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write("m").refused("model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "..", "file:///etc"])
def test_a_name_on_the_hub_leads_nowhere_else(name, write):
    write(name).refused("name")


def test_a_strangers_configuration_does_not_choose_where_a_run_is_made(run, data, canary, train):
    change_train_json(run, out=str(canary), resume=True, eval_only=True, dry_run=True)
    assert train("--config", "r/train.json", "--data", data).code == 0
    assert Path("runs/first-run/train.json").exists()


def test_what_a_strangers_run_reaches_for_is_said(run, data, resume):
    """Its data, weights and services, before they are used."""
    Path("private.txt").write_text("to be or not to be, " * 100)
    change_train_json(run, data=["private.txt"], wandb=True)
    ended = resume()
    assert ended.code == 2  # the checkpoints are of other data
    assert "private.txt" in ended.out and "Weights & Biases" in ended.out


@pytest.mark.parametrize("recipe", ["../../canary", "/tmp", "..", "", "a\0b"])
def test_a_recipe_is_a_name_and_no_path(run, data, recipe, train):
    change_train_json(run, recipe=recipe)
    train("--config", "r/train.json", "--data", data).refused("--recipe")


def test_sampling_writes_nothing(run, write):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert write("r").code == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


# ----------------------------------------------- something else than the file that is expected


def replace_by(kind: str, file: Path) -> None:
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "huge":  # it takes no room on the disk
        with open(file, "wb") as f:
            f.truncate(2**40)


KINDS = pytest.mark.parametrize("kind", ["fifo", "device", "folder", "huge"])


@KINDS
@pytest.mark.parametrize("name", ["train.json", "best.json"])
def test_a_run_with_something_else_for_a_file(run, name, kind, resume):
    replace_by(kind, run / name)
    resume().refused(f"r/{name}")


@KINDS
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_something_else_for_a_file(run, name, kind, resume):
    """It is passed over for the older one, and by name."""
    replace_by(kind, run / "step_000002" / name)
    ended = resume()
    assert ended.code == 0, ended.err
    assert f"{name}" in ended.out + ended.err


@KINDS
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_with_something_else_for_a_file(name, kind, write):
    replace_by(kind, save_tiny_model(Path("m")) / name)
    write("m").refused(f"m/{name}")


@KINDS
@pytest.mark.parametrize("name", ["manifest.json", "text_train_000001.bin"])
def test_a_corpus_with_something_else_for_a_file(data, name, kind, train):
    shutil.copytree(data, "d")
    replace_by(kind, Path("d", name))
    train("--data", "d", *TINY).refused(f"d/{name}")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_an_input_that_is_something_else(name, kind, prepare):
    Path(name).write_text("")
    replace_by(kind, Path(name))
    prepare(name).refused(name)


@KINDS
def test_items_and_a_log_that_are_something_else(run, kind, score, capfd):
    for file in (Path("items.jsonl"), run / "log.jsonl"):
        file.write_text("{}")
        replace_by(kind, file)
    score("items.jsonl").refused("items.jsonl")
    if kind != "huge":  # a log may be long, and a line of nothing is read piece by piece
        Ended(capfd, plot.main, "r").refused("log.jsonl")


@pytest.mark.parametrize("content", ["{}", "[]", "3", "null", "[" * 200_000, "\ud800"])
@pytest.mark.parametrize("name", ["best.json", "train.json"])
def test_other_json_is_one_line_before_anything_is_changed(run, name, content, resume):
    (run / name).write_bytes(content.encode(errors="surrogatepass"))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("step_*/*")}
    resume().refused(f"r/{name}")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("step_*/*")} == before


# --------------------------------------------------- declared sizes, before memory is taken


def write_header(file: Path, entries: dict, size: int = 0) -> None:
    """A safetensors file with this header, and `size` bytes of zeros that take no room."""
    header = json.dumps(entries).encode()
    with open(file, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)


@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("transformer.wte.weight", "F32", [2**14, 2**13]),
        ("transformer.wte.weight", "I32", [257, 32]),
        ("transformer.unknown", "F32", [2**14, 2**13]),
    ],
)
def test_weights_of_another_shape_are_refused_unread(name, dtype, shape, write):
    folder = save_tiny_model(Path("m"))
    size = 4 * shape[0] * shape[1]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    write_header(folder / "model.safetensors", {name: entry}, size)
    write("m").refused("error: m")


@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("transformer.wte.weight.exp_avg", "F32", [2**20, 2**13]),
        ("transformer.wte.weight.exp_avg", "I32", [257, 32]),
        ("another.exp_avg", "F32", [2**20, 2**13]),
    ],
)
def test_an_optimizers_state_of_another_shape_is_passed_over_unread(
    run, name, dtype, shape, monkeypatch, resume
):
    """The newest checkpoint has it, with a manifest that agrees; the one before is sound."""
    size = 4 * shape[0] * shape[1]
    file = run / "step_000002/optimizer.safetensors"
    write_header(file, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
    sign(run / "step_000002")
    ended = resume()
    assert ended.code == 0, ended.err
    assert "optimizer.safetensors" in ended.out + ended.err


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 10**9},
        {"n_embd": 10**9},
        {"total_batch_tokens": 2**62},
        {"max_steps": 2**62},
        {"micro_batch": 2**62},
        {"optimizer": "sgd"},
        {"tokenizer": "gpt5"},
        {"dtype": "float4"},
        {"learning_rate": "x"},
    ],
)
def test_a_configuration_beyond_sense_is_refused(run, changes, resume):
    """The run has no checkpoint, so that the model would be made as the configuration says."""
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    change_train_json(run, **changes)
    ended = resume()
    assert ended.code == 2
    (name,) = changes
    assert name in ended.err.splitlines()[-1].replace("-", "_")


def test_a_model_larger_than_the_memory_is_one_line(run, resume):
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    change_train_json(run, n_layer=400, n_embd=2**16)
    resume().refused("expected the work to fit in memory")


@pytest.mark.parametrize("encoding", [[], 5, True, "gpt5", "../x", ["gpt2"]])
def test_an_encoding_that_is_no_name_is_refused(encoding, write):
    edit_json(save_tiny_model(Path("m")) / "config.json", encoding=encoding)
    write("m").refused("config.json", "encoding")


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", 2**64),
        ("--device", "cpu:99999999999"),
        ("--temperature", "nan"),
    ],
)
def test_numbers_beyond_sense_are_refused(run, flags, capfd):
    ended = Ended(capfd, sample.main, "--model", "r", *flags)
    assert ended.code == 2
    assert flags[0].strip("-") in ended.err.replace("_", "-")


# ----------------------------------------------------------------------- names and the terminal

EVIL = "$\\write18{touch x}$ \x1b]0;title\x07 '; touch y; '\u202eevil"


def test_a_run_directory_with_a_hostile_name(data, train):
    """It is trained and drawn, and quoted where a command with it is offered."""
    ended = train("--data", data, *TINY, "--out", EVIL)
    assert ended.code == 0
    assert not Path("x").exists() and not Path("y").exists()
    assert Path(EVIL, "curves.png").stat().st_size > 1000
    assert "'\"'\"'; touch y; '\"'\"'" in ended.out


def test_a_name_of_two_lines_makes_no_second_line(data, train):
    name = "r\nerror: all is well"
    Path(name).mkdir()
    Path(name, "train.json").write_text("{}")
    ended = train("--data", data, *TINY, "--out", name)
    ended.refused()
    assert ended.err.count("\n") == 1


def test_a_name_in_a_file_is_shown_in_one_line(write):
    """Here a tensor's. What a terminal would obey in it is escaped when it is written to one."""
    save_tiny_model(Path("m"))
    save_file({"a\nerror: all is well": torch.zeros(1)}, "m/model.safetensors")
    ended = write("m")
    ended.refused("error: m", "all is well")
    assert "\nerror: all" not in ended.err


@pytest.mark.parametrize("path", ["\ud800", "a\0b", EVIL])
def test_a_path_that_is_none_does_not_stop_a_picture(run, path, capfd):
    edit_json(run / "train.json", data=path)
    assert Ended(capfd, plot.main, "r").code == 0


# ------------------------------------------------------------------------------------ at random


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_one_flipped_bit_in_a_checkpoint_is_found_by_name(run, name, resume):
    """Its size is right, and a tensor of another value is a tensor."""
    file = run / "step_000002" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    ended = resume()
    assert ended.code == 0
    assert f"{name}: damaged" in ended.out + ended.err


@pytest.mark.parametrize("flips", [False, True])
def test_randomly_damaged_files_are_read_as_they_were_or_refused_by_name(flips):
    """A few of the cases of `python tests/mutate.py`; a finding names the seed that repeats it."""
    reads, findings = campaign(files=15, seed=1234, flips=flips)
    assert reads >= 15
    assert findings == []
