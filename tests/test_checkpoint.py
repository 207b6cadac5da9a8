"""Run directories: commit, verification, pruning, what --model picks, the lock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import run_directory
from cli import UserError
from files import locked
from model import GPT, GPTConfig, NextTokenLoss
from tokens import get_encoding

CONFIG = GPTConfig(2, 2, 32, 32, 257)
BYTES = get_encoding("bytes")


def trained(steps: int = 2) -> tuple[GPT, torch.optim.AdamW]:
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        idx = torch.randint(0, 257, (2, 33))
        NextTokenLoss(model)(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
    return model, optimizer


def save(run: Path, step: int) -> Path:
    model, optimizer = trained()
    return run_directory.save_step(run, step, model, BYTES, optimizer, {})


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "train.json").write_text("{}")
    return tmp_path


def test_weights_and_moments_come_back_to_the_last_bit(run):
    model, optimizer = trained()
    folder = run_directory.save_step(run, 2, model, BYTES, optimizer, {})
    again = GPT.from_pretrained(folder)
    fresh = torch.optim.AdamW(again.parameters(), fused=True)
    run_directory.load_optimizer(folder, 2, again, fresh)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(
            torch.equal(optimizer.state[p][key], fresh.state[q][key])
            for key in ("exp_avg", "exp_avg_sq", "step")
        )


def test_a_step_is_there_whole_or_not_at_all(run, monkeypatch):
    """Whatever call of the commit fails, no directory has the name of a step, and the one before stays valid."""
    save(run, 1)
    for function in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(
                os,
                function,
                lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
            )
            with pytest.raises(OSError):
                save(run, 2)
        assert [p.name for p in run_directory.steps(run)] == ["step_000001"]
    run_directory.clean(run)
    assert {p.name for p in run.iterdir()} == {"train.json", "step_000001"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "model.safetensors").write_bytes(b""),
        lambda step: (step / "optimizer.safetensors").unlink(),
        lambda step: (step / "manifest.json").unlink(),
        lambda step: (step / "manifest.json").write_text("{"),
        lambda step: (step / "state.json").write_text(
            (step / "state.json").read_text().replace("2", "3")
        ),
    ],
)
def test_any_damage_is_seen_and_the_step_before_is_used(run, damage):
    save(run, 1)
    damage(save(run, 2))
    warnings = []
    assert run_directory.newest_valid(run, warnings.append).name == "step_000001"
    assert "step_000002" in warnings[0]


def test_pruning_spares_the_best(run):
    for step in (1, 2, 3, 4):
        save(run, step)
    (run / "best.json").write_text('{"step": 1}')
    run_directory.prune(run, 2)
    assert [p.name for p in run_directory.steps(run)] == [
        "step_000001",
        "step_000003",
        "step_000004",
    ]


def test_files_follow_the_umask(run):
    umask = os.umask(0o022)
    try:
        folder = save(run, 1)
    finally:
        os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_model_is_found_in_a_run_a_step_or_the_newest_run(run, tmp_path, monkeypatch):
    save(run, 1), save(run, 2)
    assert run_directory.load_model(str(run))[2] == str(run / "step_000002")
    assert run_directory.load_model(str(run / "step_000001"))[2] == str(run / "step_000001")
    (run / "best.json").write_text('{"step": 1}')
    assert run_directory.load_model(str(run))[2] == str(run / "step_000001")
    for name, time in (("old", 1), ("new", 2)):
        other = tmp_path / "runs" / name
        other.mkdir(parents=True)
        (other / "train.json").write_text("{}")
        (other / "log.jsonl").write_text("")
        save(other, 7)
        os.utime(other / "log.jsonl", (time, time))
    monkeypatch.chdir(tmp_path)
    assert run_directory.load_model(None)[2] == "runs/new/step_000007"


def test_without_runs_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train_gpt2.py"):
        run_directory.load_model(None)


def test_a_state_from_the_future_is_refused(run):
    folder = save(run, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        run_directory.read_state(folder)


def test_a_second_process_is_refused_by_name(tmp_path):
    code = (
        "import sys; from pathlib import Path; from cli import run_script; from files import locked\n"
        "def main():\n    with locked(Path(sys.argv[1])): pass\nrun_script(main)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked(tmp_path):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and f"process {os.getpid()} on" in done.stderr
    assert subprocess.run(command, cwd=ROOT).returncode == 0
