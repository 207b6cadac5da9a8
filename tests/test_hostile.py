"""What strangers send and other users plant: runs, models, corpora, names. SECURITY.md says it all.

Each test has a directory outside of what it works on. Nobody may write, delete or create there.
"""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from mutate import campaign, limits
from safetensors.torch import load_file, save_file
from tools import Hub, run_main, run_python, save_tiny_model, write_bytes_data

import fineweb
import hellaswag
import sample
import train_gpt2
from support import documents, plot, run_directory, script
from support.files import locked, read_lines
from support.hub import without_secrets
from support.huggingface import save_tokenizer
from support.run_directory import RunDirectory, load_model
from support.script import UserError, exit_code_and_message
from support.shards import verify
from tokens import get_encoding, open_data
from train_gpt2 import main

TINY_FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 128 --micro-batch 4
    --max-steps 2 --warmup-steps 1 --eval-every 1 --eval-tokens 200 --sample-every 2
    --save-every 1 --dtype float32 --device cpu --no-compile
"""
TINY = TINY_FLAGS.split()


class Canary:
    """A private file in a folder that is none of the program's business."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.file = folder / "id_rsa"
        self.file.write_bytes(b"private key")
        self.file.chmod(0o600)
        self.new = folder / "not-there"
        os.utime(self.file, (1e9, 1e9))
        os.utime(folder, (1e9, 1e9))

    def check(self) -> None:
        assert [path.name for path in self.folder.iterdir()] == ["id_rsa"]
        assert self.file.read_bytes() == b"private key"
        for path, mode in ((self.file, 0o600), (self.folder, None)):
            status = path.stat()
            assert status.st_mtime == 1e9, path
            assert mode is None or stat.S_IMODE(status.st_mode) == mode, path


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """Checked after every test, which has a working directory of its own."""
    canary = Canary(tmp_path / "canary")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield canary
    canary.check()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of two steps, both of them saved, that this user has begun."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    assert run_main(main, "--data", data, *TINY, "--keep-best", "--out", folder) == 0
    return folder


@pytest.fixture
def run(finished) -> Path:
    """A copy of the run, in the working directory."""
    return Path(shutil.copytree(finished, "r"))


@pytest.fixture
def somebody_else(tmp_path, monkeypatch):
    """The user that a downloaded run has been begun by was another one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other-home"))


def train(*args) -> int:
    """The exit code of train_gpt2.py, which may neither hang nor take a lot of memory."""
    with limits():
        return run_main(main, *args)


def refused(action, *args) -> str:
    """The one line with which an action ends, which must be an error of the user's kind."""
    with limits(), pytest.raises((UserError, OSError)) as caught:
        action(*args)
    code, message = exit_code_and_message(caught.value, "")
    assert code == 2
    assert "\n" not in message
    return message


def last_error(capfd) -> str:
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.rstrip("\n").splitlines()[-1]


def resume(folder: Path) -> Path | None:
    with RunDirectory(folder, 128, writes=True, say=lambda *lines: None) as directory:
        directory.claim(may_hold_run=True)
        return directory.newest_checkpoint()


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


# --------------------------------------------------------------------------- writes through links

PLANTED = [
    "log.jsonl",
    "log-1.jsonl",
    "curves.png",
    "best.json",
    "wandb_id",
    ".lock-holder",
    ".step_000001.tmp",
    ".step_000002.tmp",
    ".anything.tmp",
    "damaged_step_000002",
]


def plant(folder: Path, name: str, target: Path) -> None:
    run_directory.remove(folder / name)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_a_new_run_writes_through_no_link(data, canary, kind):
    """What is there already may point to a private file, to one that is not there, or a folder."""
    Path("r").mkdir()
    for name in PLANTED:
        plant(Path("r"), name, getattr(canary, kind))
    code = train("--data", data, *TINY, "--keep-best", "--out", "r")
    if kind == "folder":  # as a log, a folder is refused
        assert code == 2
        return
    assert code == 0
    canary.check()
    for name in ("log.jsonl", "curves.png", "best.json"):
        assert not Path("r", name).is_symlink()


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_a_continued_run_writes_through_no_link(data, run, canary, kind, capfd):
    (run / "step_000002/model.safetensors").write_bytes(b"")  # so that there is a step to make
    for name in PLANTED:
        if name not in ("best.json", "log.jsonl"):
            plant(run, name, getattr(canary, kind))
    assert train("--out", "r", "--resume") == 0
    assert (run / "step_000002/manifest.json").exists()


def test_a_dangling_link_as_train_json_is_replaced(data, canary):
    Path("r").mkdir()
    Path("r/train.json").symlink_to(canary.new)
    assert train("--data", data, *TINY, "--out", "r") == 0
    assert not Path("r/train.json").is_symlink()


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_a_link_as_lock_is_refused(canary, kind, data, capfd):
    Path("r").mkdir()
    plant(Path("r"), ".lock", getattr(canary, kind))
    assert train("--data", data, *TINY, "--out", "r") == 2
    assert "r/.lock" in last_error(capfd)


def test_a_second_name_of_a_private_file_as_lock_is_refused(canary):
    Path("r").mkdir()
    os.link(canary.file, "r/.lock")
    message = refused(locked(Path("r")).__enter__)
    assert "r/.lock: a hard link" in message


def test_a_link_planted_as_log_while_training_is_not_written_through(run, canary):
    plant(run, "log.jsonl", canary.file)
    with RunDirectory(run, 128, writes=True, say=print) as directory:
        directory.log("train", 1)
        assert "r/log.jsonl" in refused(directory.wait_for_commit)


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_a_link_planted_where_the_next_checkpoint_is_written_is_replaced(run, canary, kind):
    plant(run, ".step_000003.tmp", getattr(canary, kind))
    plant(run, "step_000003", getattr(canary, kind))
    model, encoding, _ = load_model("r/step_000002")
    state = json.loads((run / "step_000002/state.json").read_text()) | {"step": 3}
    run_directory.commit_checkpoint(run, model, encoding, {}, state, keep=9)
    assert run_directory.fault_of(run / "step_000003") is None


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_a_saved_model_writes_through_no_link(canary, kind):
    Path("m").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "vocab.json"):
        plant(Path("m"), name, getattr(canary, kind))
    save_tiny_model(Path("m"))
    save_tokenizer(get_encoding("bytes"), "m")
    assert load_model("m")[1].name == "bytes"


def test_a_linked_checkpoint_is_neither_read_nor_removed(run, canary):
    (run / "step_000003").symlink_to(canary.folder)
    assert resume(run) == run / "step_000002"
    run_directory.prune(run, keep=1)
    assert (run / "step_000003").is_symlink()


def test_a_linked_best_checkpoint_is_not_read(run, canary):
    shutil.copytree(run / "step_000002", "elsewhere")
    (run / "step_000003").symlink_to(Path("elsewhere").resolve())
    (run / "best.json").write_text('{"step": 3, "val_loss": 0.5}')
    assert load_model("r", lambda line: None)[2] == "r/step_000002"


def test_a_manifest_leads_to_no_file_outside(run, canary):
    manifest = run / "step_000002/manifest.json"
    files = json.loads(manifest.read_text())["files"]
    for name in ("../../canary/id_rsa", str(canary.file), ".."):
        manifest.write_text(json.dumps({"files": files | {name: {"size": 11, "sha256": "0"}}}))
        assert "not a plain file name" in run_directory.fault_of(run / "step_000002")


@pytest.fixture
def wandb(monkeypatch) -> list[dict]:
    """A stand-in for wandb that keeps what its runs are started with."""
    started = []
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.init = lambda **settings: started.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def track(config: train_gpt2.TrainConfig, folder: Path) -> None:
    runtime = types.SimpleNamespace(say=print)
    with RunDirectory(folder, 128, writes=True, say=print) as directory:
        train_gpt2.open_wandb(config, directory, train_gpt2.Extras(runtime))


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_a_linked_wandb_id_is_neither_written_nor_sent(run, canary, wandb, kind):
    plant(run, "wandb_id", getattr(canary, kind))
    config = train_gpt2.RECIPES["first-run"]
    if kind == "new":
        track(config, run)
        assert not (run / "wandb_id").is_symlink()
        assert wandb[0]["id"] == (run / "wandb_id").read_text()
    else:
        assert "r/wandb_id" in refused(track, config, run)
        assert not wandb


def test_a_linked_wandb_folder_is_refused(run, canary, wandb):
    plant(run, "wandb", canary.folder)
    assert "r/wandb" in refused(track, train_gpt2.RECIPES["first-run"], run)
    assert not wandb


LOOP = ("--data", "loop"), ("--out", "loop"), ("--out", "loop/r"), ("--out", "loop", "--resume")


@pytest.mark.parametrize("flags", LOOP, ids=" ".join)
def test_a_link_to_itself_is_one_line(data, flags, capfd):
    Path("loop").symlink_to("loop")
    assert train("--data", data, *TINY, "--out", "r", *flags) == 2
    assert "loop" in last_error(capfd)


def test_settings_of_wandb_in_a_run_are_refused(run, wandb):
    """They may name another server, and it would get the user's key."""
    (run / "wandb").mkdir()
    (run / "wandb/settings").write_text("[default]\nbase_url = http://evil\n")
    assert "r/wandb/settings" in refused(track, train_gpt2.RECIPES["first-run"], run)
    assert not wandb


def test_a_run_inside_a_checkpoint_is_refused(run, data, capfd):
    before = sorted(run.rglob("*"))
    for out in ("r/step_000002", "r/step_000002/deep/er"):
        assert train("--data", data, *TINY, "--out", out) == 2
        assert "inside the checkpoint" in last_error(capfd)
    assert sorted(run.rglob("*")) == before


# ------------------------------------------------------- what a stranger's configuration may decide


def test_the_same_user_continues_without_more_flags_also_from_another_place(run):
    assert train("--out", "r", "--resume") == 0
    run.rename("moved")
    assert train("--out", "moved", "--resume") == 0


def test_a_strangers_run_does_not_choose_the_data(run, canary, somebody_else, capfd):
    change_train_json(run, data=str(canary.file))
    assert train("--out", "r", "--resume") == 2
    message = last_error(capfd)
    assert "r/train.json: names --data" in message
    assert not Path("data").exists()  # nothing was tokenised


@pytest.fixture
def text_run(data, somebody_else) -> Path:
    """A run on a text, begun by somebody else."""
    Path("text.txt").write_text("to be or not to be, " * 100)
    assert train("--data", "text.txt", *TINY, "--out", "r") == 0
    return Path("r")


def test_a_strangers_run_goes_on_with_data_from_the_command_line(text_run, monkeypatch, capfd):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    assert train("--out", "r", "--resume") == 2
    assert "r/train.json: names --data 'text.txt'" in last_error(capfd)
    assert train("--out", "r", "--resume", "--data", "text.txt") == 0


def test_a_changed_value_breaks_the_users_seal(run, canary, capfd):
    change_train_json(run, data=str(canary.file))
    assert train("--out", "r", "--resume") == 2
    assert "r/train.json: names --data" in last_error(capfd)


@pytest.mark.parametrize("changes", [{"init_from": "some/model"}, {"wandb": True}])
def test_a_strangers_run_starts_no_download_and_no_login(
    run, data, somebody_else, wandb, changes, monkeypatch, capfd
):
    monkeypatch.setattr("model._download", lambda *args, **more: pytest.fail("contacted the hub"))
    change_train_json(run, **changes)
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    assert train("--out", "r", "--resume", "--data", data) == 2
    (name,) = changes
    assert f"names --{name.replace('_', '-')}" in last_error(capfd)
    assert not wandb


def test_a_strangers_config_does_not_choose_the_data(run, canary, somebody_else, capfd):
    change_train_json(run, data=str(canary.file))
    assert train("--config", "r/train.json") == 2
    assert "r/train.json: names --data" in last_error(capfd)
    assert not Path("runs").exists()


def test_a_strangers_config_does_not_choose_where_and_whether_a_run_is_made(
    run, data, canary, somebody_else
):
    change_train_json(run, out=str(canary.folder), resume=True, eval_only=True, dry_run=True)
    assert train("--config", "r/train.json", "--data", data) == 0
    assert Path("runs/first-run/train.json").exists()


@pytest.mark.parametrize("recipe", ["../../canary", "/tmp", "..", "", "a\0b"])
def test_a_recipe_is_a_name_and_no_path(run, data, recipe, capfd):
    change_train_json(run, recipe=recipe)
    assert train("--config", "r/train.json", "--data", data) == 2
    assert "--recipe" in last_error(capfd)


def test_the_key_of_the_seals_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    key = run_directory.seal_key()
    file = tmp_path / "state/pygpt2/key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert run_directory.seal_key() == key


def test_without_a_place_for_the_key_training_works_and_a_resume_needs_the_flag(monkeypatch, capfd):
    Path("file").write_text("")
    Path("text.txt").write_text("to be or not to be, " * 100)
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").resolve()))
    assert train("--data", "text.txt", *TINY, "--out", "r") == 0
    assert train("--out", "r", "--resume") == 2
    assert "--data" in last_error(capfd)
    assert train("--out", "r", "--resume", "--data", "text.txt") == 0


def test_a_restart_by_torchrun_needs_no_key(monkeypatch):
    Path("file").write_text("")
    Path("text.txt").write_text("to be or not to be, " * 100)
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").resolve()))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    flags = ("--data=text.txt", *TINY, "--out", "r")
    assert train(*flags) == 0
    for count, code in (("0", 2), ("1", 0)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert train("--out", "r", "--resume") == code


# --------------------------------------------------------------------- files that are none, or huge


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


KINDS = ["fifo", "device", "folder", "huge"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.json", "log.jsonl", "best.json"])
def test_a_run_with_something_else_for_a_file(run, name, kind, capfd):
    replace_by(kind, run / name)
    assert train("--out", "r", "--resume") == 2
    assert f"r/{name}" in last_error(capfd)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_something_else_for_a_file(run, kind):
    """It is passed over for the older one, both to sample from and to continue."""
    names = [file.name for file in (run / "step_000002").iterdir()]
    (run / "best.json").unlink()
    for name in names:
        shutil.rmtree(run / "step_000002")
        shutil.copytree(run / "step_000001", run / "step_000002")
        edit_json(run / "step_000002/state.json", step=2)
        sign(run / "step_000002")
        replace_by(kind, run / "step_000002" / name)
        said = []
        with limits():
            if name in (*run_directory.MODEL_FILES, "manifest.json"):
                assert load_model("r", said.append)[2] == "r/step_000001"
            assert resume(run) == run / "step_000001"
        assert name in run_directory.fault_of(run / "damaged_step_000002")
        shutil.copytree(run / "step_000001", run / "step_000002")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_a_model_with_something_else_for_a_file(run, name, kind):
    model = run / "step_000002"
    (model / "manifest.json").unlink()
    replace_by(kind, model / name)
    assert name in refused(load_model, str(model))


@pytest.mark.parametrize("encoding", [[], {}, 5, True, "gpt5", "../x", ["gpt2"]])
def test_an_encoding_that_is_no_name_is_refused(run, encoding):
    (run / "step_000002/manifest.json").unlink()
    edit_json(run / "step_000002/config.json", encoding=encoding)
    message = refused(load_model, "r/step_000002")
    assert "config.json" in message and "encoding" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["manifest.json", "text_train_000001.bin", "00000_unshuffled.ds.metadata"]
)
def test_a_corpus_with_something_else_for_a_file(data, name, kind):
    if name.endswith(".metadata"):
        Path("d").mkdir()
        Path("d/00000_unshuffled.ds").write_bytes(b"\0" * 4000)
        Path("d", name).write_text("gpt2|2\n2000")
    else:
        shutil.copytree(data, "d")
    replace_by(kind, Path("d", name))
    for read in (open_data, verify):
        assert name in refused(read, Path("d"))


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_items_and_logs_that_are_none(run, kind, capfd):
    Path("items.jsonl").write_text("{}")
    replace_by(kind, Path("items.jsonl"))
    assert "items.jsonl" in refused(hellaswag.load_items, Path("items.jsonl"))
    replace_by(kind, run / "log.jsonl")
    assert "log.jsonl" in refused(plot.read_run, run, lambda line: None)
    if kind in ("fifo", "device"):
        assert train("--data", "items.jsonl", *TINY, "--out", "q") == 2
        assert "items.jsonl" in last_error(capfd)


@pytest.mark.parametrize("content", ["{}", "[]", '"x"', "3", "null", "[" * 200_000])
@pytest.mark.parametrize("name", ["best.json", "train.json"])
def test_other_json_is_one_line_before_anything_is_changed(run, name, content, capfd):
    (run / name).write_text(content)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("step_*/*")}
    assert train("--out", "r", "--resume") == 2
    assert f"r/{name}" in last_error(capfd)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("step_*/*")} == before


# ------------------------------------------------------------------------------------- exhaustion


@contextlib.contextmanager
def deep(folder: str):
    """Inside, the folder holds folders nested 1,200 deep, which Python itself cannot remove."""
    top = os.getcwd()
    os.makedirs(folder)
    os.chdir(folder)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(top)
    try:
        yield
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)


@pytest.mark.parametrize("name", [".x.tmp", "damaged_step_000002"])
def test_leftovers_without_end_are_one_line(run, name, capfd):
    (run / "step_000002/model.safetensors").write_bytes(b"")  # it is going to be set aside
    with deep(f"r/{name}"):
        assert train("--out", "r", "--resume") == 2
    assert f"r/{name}: folders are nested too deeply" in last_error(capfd)


def test_folders_without_end_are_one_line(data, capfd):
    with deep("d"):
        assert prepared("d") == 2
        assert "d: folders are nested too deeply" in last_error(capfd)
        assert train("--data", "d", *TINY, "--out", "r") == 2
        assert "d: folders are nested too deeply" in last_error(capfd)
        assert run_main(plot.main, "d") == 2
        assert "d: folders are nested too deeply" in last_error(capfd)


def test_a_log_of_millions_of_lines_is_refused(run, capfd):
    (run / "log.jsonl").write_bytes(b"{}\n" * 3_000_000)
    assert "r/log.jsonl: more than" in refused(list, read_lines(run / "log.jsonl"))


def test_weights_that_are_not_on_the_disk_are_refused(run):
    """A few kilobytes in an archive would take gigabytes of memory."""
    model = save_tiny_model("m", n_embd=1024)
    with open(model / "model.safetensors", "r+b") as f:
        header = 8 + int.from_bytes(f.read(8), "little")
        size = f.seek(0, os.SEEK_END)
        f.truncate(header)
        f.truncate(size)
    assert "m/model.safetensors: a sparse file" in refused(load_model, "m")


def test_an_index_of_a_thousand_links_is_refused(run):
    """Each name is a link to one file, whose header is as large as may be."""
    model = save_tiny_model("m")
    (model / "model.safetensors").unlink()
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(model / "x.safetensors", {f"{i}.attn.bias": entry for i in range(10_000)})
    names = [f"{i}.safetensors" for i in range(1000)]
    for name in names:
        (model / name).symlink_to("x.safetensors")
    index = {"weight_map": dict(zip(names, names, strict=True))}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "more names of tensors" in refused(load_model, "m")


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-samples", 2**62),
        ("--num-samples", 10**30),
        ("--max-new-tokens", 10**30),
        ("--seed", 2**64),
        ("--seed", -(10**30)),
        ("--device", "cpu:99999999999"),
        ("--device", "cpu:\u0663"),
        ("--temperature", "nan"),
    ],
)
def test_numbers_beyond_sense_are_refused(run, flags, capfd):
    assert run_main(sample.main, "--model", "r", *flags) == 2
    assert str(flags[0]).strip("-") in last_error(capfd).replace("_", "-")


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-9])
def test_a_temperature_that_overflows_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample.next_token(logits, temperature).item() == 1


def write_header(file: Path, entries: dict, size: int = 0) -> None:
    """A safetensors file with this header, and `size` bytes of zeros that take no room."""
    header = json.dumps(entries).encode()
    with open(file, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)


def test_a_header_of_a_million_tensors_is_refused_by_its_length(run):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    entries = {f"a{i}": entry for i in range(200_000)}
    for name in ("optimizer.safetensors", "model.safetensors"):
        write_header(run / "step_000002" / name, entries)
    assert "a header of" in refused(run_directory.read_optimizer_tensors, run / "step_000002")
    (run / "step_000002/manifest.json").unlink()
    assert "a header of" in refused(load_model, "r/step_000002")


@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("transformer.wte.weight.exp_avg", "F32", [2**12, 2**13]),
        ("transformer.wte.weight.exp_avg", "F8_E4M3", [257, 32]),
        ("transformer.wte.weight.exp_avg", "I32", [257, 32]),
        ("transformer.wte.weight.unknown", "F32", [257, 32]),
        ("another.exp_avg", "F32", [257, 32]),
    ],
)
def test_optimizer_state_of_another_shape_or_type_is_refused_unread(run, name, dtype, shape):
    bytes_of = {"F32": 4, "I32": 4, "F8_E4M3": 1}[dtype]
    size = bytes_of * shape[0] * shape[1]
    file = run / "step_000002/optimizer.safetensors"
    write_header(file, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, size)
    message = refused(run_directory.read_optimizer_tensors, run / "step_000002")
    assert "optimizer.safetensors" in message and name in message


def test_integers_in_the_optimizers_state_are_passed_over_on_resume(run):
    """Their bits would be read as numbers of another size, or give NaN much later."""
    file = run / "step_000002/optimizer.safetensors"
    tensors = load_file(file)
    relabelled = {name: tensor.view(torch.int32).clone() for name, tensor in tensors.items()}
    save_file(relabelled, file)
    sign(run / "step_000002")
    assert resume(run) == run / "step_000001"


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 10**9},
        {"n_embd": 10**9},
        {"total_batch_tokens": 2**62},
        {"max_steps": 2**62},
        {"micro_batch": 2**62},
        {"optimizer": "sgd"},
        {"schedule": "constant"},
        {"tokenizer": "gpt5"},
        {"dtype": "float4"},
    ],
)
def test_a_configuration_beyond_sense_is_refused(run, changes, capfd):
    """The run has no checkpoint, so that the model would be made as the configuration says."""
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    change_train_json(run, **changes)
    assert train("--out", "r", "--resume") == 2
    (name, *_) = changes
    assert name.replace("_", "-") in last_error(capfd).replace("_", "-")


def test_a_model_larger_than_the_memory_is_one_line(run, capfd):
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    change_train_json(run, n_layer=400, n_embd=2**16)
    assert train("--out", "r", "--resume") == 2
    assert "expected the work to fit in memory" in last_error(capfd)


# ------------------------------------------------------------------------- corpora: fineweb.py


def prepared(file: str, *more) -> int:
    """The exit code of fineweb.py, and what it may take: a gigabyte more than it has, and a minute.

    The bytes of a text are its tokens here, so that no vocabulary is loaded.
    """
    flags = ("--input", file, "--out", "o", "--workers", 1, "--tokenizer", "bytes", *more)
    with limits():
        return run_main(fineweb.main, *flags)


def repeated(text: str, rows: int) -> pyarrow.Table:
    """A table whose rows have one text, which it holds once."""
    indices = pyarrow.array(np.zeros(rows, dtype=np.int8))
    return pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, [text])})


def write_table(file: str, table: pyarrow.Table) -> None:
    """A table as packed as it can be."""
    if file.endswith(".parquet"):
        pyarrow.parquet.write_table(table, file, compression="zstd")
        return
    new = pyarrow.ipc.new_file if file.startswith("file") else pyarrow.ipc.new_stream
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with new(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1_000_000)


TABLES = {
    "a text of 300 MB": lambda: pyarrow.table({"text": ["x" * 300_000_000]}),
    "a text of 25 MB, a thousand times": lambda: repeated("word " * 5_000_000, 1000),
    "a text of 1 MB, a thousand times": lambda: repeated("word " * 200_000, 1000),
    "a million empty texts": lambda: repeated("", 1_000_000),
}


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_unpacks_beyond_reason_is_refused(name, kind, capfd):
    write_table(name, TABLES[kind]())
    assert os.path.getsize(name) < 500_000
    assert prepared(name) == 2
    error = last_error(capfd)
    assert f"{name}: " in error and "unpack to" in error


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_page_or_batch_that_unpacks_beyond_reason_is_refused(name, monkeypatch, capfd):
    """Also of a file that is large enough to hold as much in all."""
    monkeypatch.setattr(documents, "AT_ONCE", (2**20, 16))
    write_table(name, pyarrow.table({"text": ["x" * 3_000_000]}))
    assert prepared(name) == 2
    assert f"{name}: " in last_error(capfd)


@pytest.mark.parametrize("text", ["word " * 7_000_000, "x" * 5_000_000], ids=["long", "run"])
@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_row_that_cannot_be_encoded_is_skipped_with_its_place(name, text, capfd):
    write_table(name, pyarrow.table({"text": ["good", text, "fine"]}))
    assert prepared(name) == 0
    assert f"{name}, row 2)" in capfd.readouterr().out
    assert verify(Path("o")) == len("good") + len("fine") + 2


@pytest.mark.parametrize(
    "kind, compression",
    [
        ("endless line", "zst"),
        ("endless line", "gz"),
        ("endless array", "zst"),
        ("many lines", "bz2"),
    ],
)
def test_a_compressed_file_that_unpacks_beyond_reason_is_refused(kind, compression, capfd):
    name = f"a.json.{compression}"
    begin, repeat, count = {
        "endless line": (b'{"text": "', b"a" * 2**20, 300),
        "many lines": (b"", b'{"text": "a"}\n' * 2**16, 3),
        "endless array": (b'["', b" " * 2**20, 300),
    }[kind]
    names = {"zst": "zstd", "gz": "gzip", "bz2": "bz2"}
    with pyarrow.output_stream(name, compression=names[compression]) as out:
        out.write(begin)
        for _ in range(count):
            out.write(repeat)
    assert prepared(name) == 2
    found = "not JSON" if kind == "endless array" else "bytes unpack to"
    error = last_error(capfd)
    assert f"{name}: " in error and found in error


LINES = {
    "brackets.json": b"[" + b"[],[],[],[]," * 2_000_000 + b"[]]",
    "brackets.jsonl": b"[" + b"[],[],[],[]," * 3_000_000 + b"[]]",
    "deep.jsonl": b"[" * 1_000_000,
    "fields.csv": b"text\n" + b"aa," * 25_000_000,
    "quote.csv": b'text\n"' + b"aaa\n" * 20_000_000,
    "letters.txt": b"ACGT" * 2_000_000,
    "spaces.txt": b"a" + b" " * 8_000_000 + b"b",
}


@pytest.mark.parametrize("name", LINES)
def test_text_that_would_take_many_times_its_memory_is_refused(name, capfd):
    Path(name).write_bytes(LINES[name])
    assert prepared(name) == 2
    assert name in last_error(capfd)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_no_file_or_a_huge_one(name, kind, capfd):
    Path(name).write_text("")
    replace_by(kind, Path(name))
    assert prepared(name) == 2
    assert name in last_error(capfd)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("kind", ["text", "dictionary"])
def test_a_damaged_table_is_read_or_refused_by_name(name, kind):
    """Some damage made pyarrow end the process, and some was an error that names no file."""
    text = pyarrow.array([f"hello world {i}" for i in range(50)] + [None])
    write_table(name, pyarrow.table({"text": text if kind == "text" else text.dictionary_encode()}))
    good = Path(name).read_bytes()
    rng = random.Random(4)
    config = fineweb.PrepareConfig(input=(name,), tokenizer="bytes")
    found = set()
    for _ in range(250):
        content = bytearray(good)
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 4, 127, 128, 255])
        Path(name).write_bytes(content)
        try:
            with limits():
                found.add(len(list(documents.file_source(config, [name])(None))))
        except UserError as error:
            found.add("refused")
            assert name in str(error)
    assert {"refused", 51} <= found


def test_a_footer_that_pyarrow_would_end_the_process_for_is_refused(capfd):
    """Here a column is said to lack no value, and yet has counts of those that it lacks."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), "a.parquet")
    content = Path("a.parquet").read_bytes()
    optional, required = b"\x25\x02\x18\x04text", b"\x25\x00\x18\x04text"
    assert content.count(optional) == 1
    Path("a.parquet").write_bytes(content.replace(optional, required))
    assert prepared("a.parquet") == 2
    assert "a.parquet: " in last_error(capfd)


@pytest.mark.parametrize("offset", [2**31 - 1, -100, 5000])
def test_an_arrow_file_shows_no_memory_beside_its_texts(offset, capfd):
    """Offsets of texts are taken as they are by pyarrow, which then reads anywhere, or crashes."""
    table = pyarrow.table({"text": ["hello"] * 100})
    with pyarrow.ipc.new_stream("a.arrow", table.schema) as writer:
        writer.write_table(table)
    content = Path("a.arrow").read_bytes()
    old = np.array([490, 495, 500], "<i4").tobytes()
    new = np.array([490, 495, offset], "<i4").tobytes()
    assert content.count(old) == 1
    Path("a.arrow").write_bytes(content.replace(old, new))
    assert prepared("a.arrow") == 2
    assert "a.arrow: " in last_error(capfd)


def test_a_parquet_footer_of_many_columns_is_refused_unread(capfd):
    content = b"PAR1" + bytes(2**23) + (2**23).to_bytes(4, "little") + b"PAR1"
    Path("a.parquet").write_bytes(content)
    assert prepared("a.parquet") == 2
    assert "a.parquet: a footer of" in last_error(capfd)


@pytest.mark.parametrize("column", [[["a"] * 1000] * 1000, [b"bytes"], [{"a": "b"}], [1.5]])
@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_column_of_something_else_is_refused_unread(name, column, capfd):
    write_table(name, pyarrow.table({"text": column}))
    assert prepared(name) == 2
    assert f"{name}, --text-column text: holds" in last_error(capfd)


def test_names_of_columns_are_not_repeated_without_end(capfd):
    Path("a.csv").write_text("a" * 10_000_000 + ",b\nx,y\n")
    assert prepared("a.csv") == 2
    assert len(last_error(capfd)) < 1000


def test_a_separator_of_any_bytes(capfd):
    Path("a.txt").write_bytes(b"one\xfftwo\xffthree")
    assert prepared("a.txt", "--split-on", os.fsdecode(b"\xff")) == 0
    assert verify(Path("o")) == len("onetwothree") + 3


@pytest.mark.parametrize("kind", ["file", "new", "folder"])
def test_preparing_writes_through_no_link(canary, kind):
    Path("a.txt").write_text("some text " * 100)
    Path("o").mkdir()
    names = ("manifest.json", "a_val_000000.bin", "a_train_000001.bin", ".lock-holder", ".x.tmp")
    for name in names:
        plant(Path("o"), name, getattr(canary, kind))
    code = prepared("a.txt")
    canary.check()
    assert code == 2 or not Path("o/manifest.json").is_symlink()


@pytest.mark.parametrize("kind", ["link", "link inside", "second name"])
def test_a_download_is_not_written_through_a_link(canary, kind):
    Path(".download").mkdir()
    if kind == "link":
        plant(Path(), ".download", canary.folder)
    elif kind == "link inside":
        plant(Path(".download"), ".cache", canary.folder)
    else:
        os.link(canary.file, ".download/a_val_000000.bin")
    assert ".download" in refused(fineweb.refuse_links, Path(".download"))


def test_names_on_the_hub_lead_nowhere_else():
    names = ["../a_val_000000.bin", "/x/a_train_000001.bin", "a/../../a_train_000002.bin"]
    files = [types.SimpleNamespace(rfilename=name, size=2000) for name in names]
    info = types.SimpleNamespace(siblings=files)
    assert "no *_val_*.bin" in refused(fineweb.wanted_shards, fineweb.PrepareConfig(), "x/y", info)


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "http://x.io/a", "hf://datasets/x/z@main/a.json"]
)
def test_a_dataset_has_no_files_elsewhere(url):
    """Newer versions of `datasets` refuse some of them, too."""
    config = fineweb.PrepareConfig(dataset="x/y")
    own = "hf://datasets/x/y@main/a.json"
    documents.refuse_files_elsewhere(config, [own])
    assert "files of its own" in refused(documents.refuse_files_elsewhere, config, [own, url])


# ------------------------------------------------------------------------- names and the terminal

EVIL = "$\\write18{touch x}$ \x1b]0;title\x07 '; touch y; '\u202eevil"


class Terminal:
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_run_directory_with_a_hostile_name(data, monkeypatch):
    """It is trained, drawn, shown without control characters, and quoted where it is offered."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with contextlib.suppress(AttributeError):  # a stand-in cannot be reconfigured
        terminal.reconfigure = lambda **settings: None
    assert train("--data", data, *TINY, "--out", EVIL) == 0
    assert not Path("x").exists() and not Path("y").exists()
    assert Path(EVIL, "curves.png").stat().st_size > 1000
    assert "\x1b" not in terminal.text and "\x07" not in terminal.text
    assert "\u202e" not in terminal.text
    assert "'\"'\"'; touch y; '\"'\"'" in terminal.text


def test_a_name_of_two_lines_makes_no_second_line(data, capfd):
    name = "r\nerror: all is well"
    Path(name).mkdir()
    Path(name, "train.json").write_text("{}")
    assert train("--data", data, *TINY, "--out", name) == 2
    err = capfd.readouterr().err
    assert "\nerror: all is well" not in err
    assert err.count("\n") == 1


def test_names_in_files_reach_a_terminal_escaped(run, monkeypatch):
    """Here a tensor's; it is part of an error."""
    terminal = Terminal()
    tensors = {"\x1b]52;c;ZXZpbA==\x07": torch.zeros(1)}
    save_file(tensors, run / "step_000002/model.safetensors")
    (run / "step_000002/manifest.json").unlink()
    message = refused(load_model, "r/step_000002")
    assert "\x1b" not in script.printable(message, terminal)
    assert "\x07" not in script.printable(message, terminal)


@pytest.mark.parametrize("script", [train_gpt2, sample, plot, hellaswag, fineweb])
def test_a_usage_error_repeats_nothing_that_a_terminal_obeys(script, monkeypatch):
    terminal = Terminal()
    terminal.reconfigure = lambda **settings: None
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run_main(script.main, f"--{EVIL}", "x") == 2
    assert "title" in terminal.text
    assert not set("\a\u202e") & set(terminal.text) and "\x1b]" not in terminal.text


def test_help_shows_nothing_of_a_strangers_run_that_a_terminal_obeys(run, monkeypatch):
    """Its values are the defaults there."""
    terminal = Terminal()
    terminal.reconfigure = lambda **settings: None
    monkeypatch.setattr(sys, "stdout", terminal)
    edit_json(run / "train.json", gpu=EVIL)
    assert train("--out", "r", "--resume", "--help") == 0
    assert "title" in terminal.text
    assert not set("\a\u202e") & set(terminal.text) and "\x1b]" not in terminal.text


def test_bars_and_colors_reach_a_terminal():
    terminal = Terminal()
    for text in ("\r 50%|█", "\x1b[1mbold\x1b[0m", "\n\x1b[A"):
        script._Escaping(terminal).write(text)
    assert terminal.text == "\r 50%|█\x1b[1mbold\x1b[0m\n\x1b[A"
    script._Escaping(terminal).write("over\rwritten")
    assert "over\\rwritten" in terminal.text


@pytest.mark.parametrize("text", ["\U000e0041", "\u200b", "\ufeff", "\u2028", "\x85", "\u2066"])
def test_what_nobody_sees_is_shown(text):
    assert (
        script.printable(f"a{text}b", Terminal()) == f"a{text.encode('unicode_escape').decode()}b"
    )


def test_torchrun_is_told_nothing_that_a_terminal_obeys(data, monkeypatch, tmp_path):
    report = tmp_path / "job/attempt_0/0/error.json"
    report.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    assert train("--data", EVIL, *TINY, "--out", "r") == 2
    message = json.loads(report.read_text())["message"]["message"]
    assert "title" in message and not set("\x1b\a\u202e") & set(message)


def test_a_name_is_no_tex(run, capfd):
    """matplotlib would start a TeX for this kind of picture, with the run's name in it."""
    run.rename("$\\write18{touch x}$")
    assert run_main(plot.main, "$\\write18{touch x}$", "--out", "c.pgf") == 2
    assert "c.pgf" in last_error(capfd)


@pytest.mark.parametrize("path", ["\ud800", "a\0b", EVIL])
def test_a_path_that_is_none_does_not_stop_a_picture(run, path):
    edit_json(run / "train.json", data=path)
    assert run_main(plot.main, "r") == 0


# -------------------------------------------------------------------------------- code in data


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_type_that_is_a_pickle_is_read_as_what_it_is_stored_as(name, canary, capfd):
    """Old versions of pyarrow unpickled it."""

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {canary.new}",)

    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Attack()),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    write_table(name, pyarrow.table([["hello"] * 20], schema=pyarrow.schema([field])))
    assert prepared(name) == 0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "train.npy"])
def test_a_pickle_is_never_loaded(canary, name):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {canary.new}",)

    folder = save_tiny_model(Path("m"))
    (folder / "model.safetensors").unlink()
    if name == "train.npy":
        np.save(folder / name, np.array([Attack()], dtype=object), allow_pickle=True)
        assert name in refused(open_data, folder)
    else:
        torch.save({"a": Attack()}, folder / name)
        assert "model.safetensors" in refused(load_model, str(folder))


def test_a_hub_name_leads_nowhere_else():
    for name in ("../canary", "a/../../canary", "a/b/../c", "..", "a\\..\\b", "file:///etc"):
        assert "name" in refused(load_model, name)


def test_sampling_writes_nothing(run, capfd):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    flags = ("--model", "r", "--max-new-tokens", 2, "--num-samples", 1, "--device", "cpu")
    assert run_main(sample.main, *flags) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


# --------------------------------------------------------------------------------- the hub's server

# What a server answers when config.json is asked for; {canary} is the path of a private folder.
ANSWERS = {
    "etag": {"ETag": '"{canary}/not-there"'},
    "weak": {"ETag": 'W/"../../../../../../../../../../../..{canary}/not-there"'},
    "linked": {"X-Linked-ETag": '"{canary}/not-there"'},
    "commit": {"X-Repo-Commit": "{canary}/not-there"},
    "absolute": {"X-Repo-Commit": "/proc"},
    "missing": {"X-Repo-Commit": "{canary}/not-there", "X-Error-Code": "EntryNotFound"},
    "file": {"Location": "file://{canary}/id_rsa"},
    "circle": {"Location": "/x/circle/resolve/main/config.json"},
    "nowhere": {"Location": "http://[::1"},
    "packed": {"Content-Encoding": "gzip"},
    "endless": {"Transfer-Encoding": "chunked"},
    "sizeless": {"Content-Length": "-5"},
    "large": {"X-Linked-Size": "10000000000"},
    "warning": {"X-HF-Warning": "a; \x9d0;title"},
    "token": {"X-Error-Message": "no access with hf_abcdefghijklmnop"},
    "busy": {"Retry-After": "1000000000"},
    "limited": {"RateLimit": '"api";r=0;t=1000000000'},
}
STATUS = {"missing": 404, "file": 302, "circle": 302, "nowhere": 302, "token": 400, "busy": 503}
STATUS["limited"] = 429

ASK = """
import json, re, resource, sys, time
waits = []
time.sleep = waits.append  # the client waits between attempts
from model import GPT
from support.script import UserError
allocated = int(re.search(r"VmData:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (allocated + 2**30, -1))
for name in sys.argv[1:]:
    try:
        GPT.from_pretrained(f"x/{name}")
        found = "loaded"
    except UserError as error:
        found = str(error)
    print(json.dumps([name, found, max(waits, default=0)]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What came of each answer, by its name; and what was said meanwhile, as "stderr"."""
    folder = tmp_path_factory.mktemp("hub")
    canary = Canary(folder / "canary")
    content = (save_tiny_model(folder / "root/x/good") / "config.json").read_bytes()
    for name in ANSWERS:
        shutil.copytree(folder / "root/x/good", folder / "root/x" / name)

    def answer(handler, path: str) -> bool:
        name = path.split("/")[2]
        if name not in ANSWERS or not path.endswith("config.json"):
            return False
        headers = {"ETag": '"a"', "X-Repo-Commit": "a" * 40} | ANSWERS[name]
        headers = {key: value.format(canary=canary.folder) for key, value in headers.items()}
        body = content
        if name == "endless" and handler.command == "GET":
            body = (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 8
        else:
            headers = {"Content-Length": str(len(body))} | headers
            headers.pop("Transfer-Encoding", None)
        handler.send_response(STATUS.get(name, 200))
        for item in headers.items():
            handler.send_header(*item)
        handler.end_headers()
        if handler.command == "GET":
            with contextlib.suppress(OSError):  # the client has gone away
                handler.wfile.write(body)
        return True

    with Hub(folder / "root") as hub:
        hub.fault = answer
        environment = {
            "HF_ENDPOINT": hub.url.replace("//", "//user:s3cret@"),
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "home"),
        }
        done = run_python("-c", ASK, "good", *ANSWERS, env=environment)
    assert done.returncode == 0, done.stderr
    canary.check()
    found = {"stderr": done.stderr}
    for line in done.stdout.splitlines():
        name, message, waited = json.loads(line)
        found[name] = message
        assert waited <= 310, name
    return found


FOUND = {
    "etag": "answers with ETag",
    "weak": "answers with ETag",
    "linked": "answers with X-Linked-ETag",
    "commit": "answers with X-Repo-Commit",
    "absolute": "answers with X-Repo-Commit",
    "missing": "answers with X-Repo-Commit",
    "file": "x/file: ",  # what it says depends on the client's version
    "circle": "answers with 20 redirections",
    "packed": "answers with Content-Encoding",
    "endless": "more bytes came than were asked for",
    "large": "more bytes came than were asked for",
    "warning": "loaded",
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_hostile_server_reaches_nothing(answers, name):
    """Neither a file outside of the cache, nor more memory than it should, nor our patience."""
    assert answers["good"] == "loaded"
    assert "\n" not in answers[name]
    assert name == "warning" or answers[name] != "loaded"
    assert FOUND.get(name, "the hub cannot be reached") in answers[name]


@pytest.mark.parametrize("secret", ["s3cret", "hf_abcdefghijklmnop", "\x9d"])
def test_nothing_of_a_servers_is_said_that_should_not_be(answers, secret):
    assert not any(secret in text for text in answers.values())


@pytest.mark.parametrize(
    "text, shown",
    [
        ("http://user:p@ss@host/x", "http://host/x"),
        ("'https://cdn.io/a?X-Amz-Signature=1&b=2'", "'https://cdn.io/a?…'"),
        ("with hf_abcdefghijklmnopqrst", "with hf_…"),
        ("with another-token", "with hf_…"),
        ("hf_hub_download: what is this?", "hf_hub_download: what is this?"),
    ],
)
def test_secrets_are_taken_out_of_a_message(monkeypatch, text, shown):
    monkeypatch.setenv("HF_TOKEN", "another-token")
    assert without_secrets(text) == shown


# ------------------------------------------------------------------------------------ at random


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_one_flipped_bit_in_a_checkpoint_is_found_by_name(run, name):
    """Its size is right, and a tensor of another value is a tensor."""
    file = run / "step_000002" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert f"{name} is damaged" in run_directory.fault_of(run / "step_000002")
    if name != "optimizer.safetensors":
        assert name in refused(load_model, "r/step_000002")
    assert resume(run) == run / "step_000001"


@pytest.mark.parametrize("flips", [False, True])
def test_randomly_damaged_files_are_read_as_they_were_or_refused_by_name(flips):
    """A few of the cases of `python tests/mutate.py`; a finding names the seed that repeats it."""
    reads, findings = campaign(files=25, seed=1234, flips=flips)
    assert reads >= 25
    assert findings == []
