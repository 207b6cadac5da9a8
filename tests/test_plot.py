"""Pictures of runs: what is drawn is what the logs say."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import plot
from cli import UserError


def write_run(folder: Path, loss: float, hellaswag: bool, data: str = "edu_fineweb10B") -> Path:
    folder.mkdir()
    events = [
        {"event": "train", "step": s, "tokens": s * 1000, "loss": loss + 1 / s}
        for s in range(1, 101)
    ]
    events += [
        {"event": "eval", "step": s, "tokens": s * 1000, "val_loss": loss} for s in (50, 100)
    ]
    events += [
        {"event": "hellaswag", "step": 100, "tokens": 100_000, "acc": 0.3, "acc_norm": 0.31}
    ] * hellaswag
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "train.json").write_text(json.dumps({"n_layer": 12, "data": data}))
    return folder


@pytest.fixture
def figure(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    saved, real = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **kwargs: (saved.append(self), real(self, *args, **kwargs)),
    )
    return saved


def test_two_runs_share_the_axes_and_hellaswag_stands_beside(tmp_path, figure):
    plot.draw_curves(
        [write_run(tmp_path / "a", 3.1, True), write_run(tmp_path / "b", 3.2, False)],
        tmp_path / "c.png",
    )
    loss, hellaswag = figure[0].axes
    labels = [line.get_label() for line in loss.get_lines() if not line.get_label().startswith("_")]
    assert labels[:4] == [
        "a: training",
        "a: validation (3.100)",
        "b: training",
        "b: validation (3.200)",
    ]
    assert "acc_norm (31.00)" in hellaswag.get_lines()[0].get_label()
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_openais_loss_is_drawn_only_where_it_was_measured_on_the_same_data(tmp_path, figure):
    plot.draw_curves([write_run(tmp_path / "a", 3.1, False)], tmp_path / "c.png")
    plot.draw_curves([write_run(tmp_path / "b", 3.1, False, data="novel.txt")], tmp_path / "c.png")
    with_reference, without = (
        " ".join(line.get_label() for line in f.axes[0].get_lines()) for f in figure
    )
    assert "3.2924" in with_reference and "OpenAI" not in without


def test_a_directory_without_a_log_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        plot.read_log(tmp_path)
