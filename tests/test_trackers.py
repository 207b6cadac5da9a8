"""Weights & Biases and TensorBoard get what is logged, and never end a run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from support.script import UserError
from support.trackers import open_trackers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.json").write_text('{"started": {"date": "2026-11-29"}}')
    return tmp_path


def fail(*args, **values):
    raise OSError("no network")


def fake_wandb(init) -> ModuleType:
    module = ModuleType("wandb")
    module.init = init
    return module


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_also_where_a_run_was_continued(folder, monkeypatch):
    pytest.importorskip("tensorboard")
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    for first_step, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        (send,) = open_trackers(["tensorboard"], folder, {"seed": 1}, first_step)
        for step in steps:
            send("train", step, {"loss": 10.0 * first_step + step, "mfu": None, "text": "a"})
        at_exit.pop()()
    assert scalars(folder, "train/loss") == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_wandb_keeps_a_run_offline_under_one_id(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    import wandb

    for _ in range(2):
        (send,) = open_trackers(["wandb"], folder, {"seed": 1})
        send("train", 1, {"loss": 2.0, "text": "a"})
        ids.append(wandb.run.id)
        wandb.finish()
    assert ids[0] == ids[1]
    files = list((folder / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    assert any(b"train/loss" in file.read_bytes() for file in files)


@pytest.mark.parametrize(
    "wandb", [fake_wandb(fail), fake_wandb(lambda **values: SimpleNamespace(log=fail))]
)
def test_what_a_service_raises_is_one_warning(folder, monkeypatch, capsys, wandb):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (send,) = open_trackers(["wandb"], folder, {})
    for step in range(3):
        send("train", step, {"loss": 1.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "warning: nothing is sent to wandb (OSError: no network); training goes on"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_refused_with_its_remedy(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"pip install {name}"):
        open_trackers([name], folder, {})
