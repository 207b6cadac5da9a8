"""Fine-tuning as one command: the recipe it picks, and that it is worth doing."""

from pathlib import Path

import pytest
from conftest import ROOT
from test_train import log, run

from train_gpt2 import read_config

TINY = [
    "--seq-len",
    64,
    "--total-batch-tokens",
    2048,
    "--micro-batch",
    32,
    "--eval-every",
    10,
    "--eval-tokens",
    2500,
    "--sample-every",
    0,
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--warmup-steps",
    5,
    "--min-lr",
    1e-4,
]
SIZE = ["--n-layer", 2, "--n-head", 2, "--n-embd", 64]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A model pretrained on Python's library, fine-tuned on the sample text, and one trained on that text from scratch."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            run(
                *SIZE,
                *TINY,
                "--max-steps",
                200,
                "--learning-rate",
                4e-3,
                "--eval-every",
                0,
                "--save-every",
                200,
                "--out",
                "first",
            )
            == 0
        )
        same = ["--data", ROOT / "input.txt", *TINY, "--max-steps", 40, "--learning-rate", 2e-3]
        assert run("--init-from", "first", *same, "--out", "tuned") == 0
        assert run(*SIZE, *same, "--out", "scratch") == 0
    return folder


def val_losses(folder: Path) -> list[float]:
    return [entry["val_loss"] for entry in log(folder, "eval")]


def test_fine_tuning_beats_training_from_scratch_at_equal_steps(runs):
    assert min(val_losses(runs / "tuned")) < min(val_losses(runs / "scratch")) - 0.1


def test_fine_tuning_starts_from_the_weights_it_was_given(runs):
    assert val_losses(runs / "tuned")[0] < 4.0 < val_losses(runs / "scratch")[0]


def test_init_from_alone_picks_the_finetune_recipe_with_the_models_size(runs, monkeypatch):
    monkeypatch.chdir(runs)
    config, why = read_config(["--init-from", "first", "--data", "novel.txt"])
    assert (config.recipe, config.n_layer, config.n_embd, config.seq_len, config.tokenizer) == (
        "finetune",
        2,
        64,
        64,
        "bytes",
    )
    assert config.keep_best and config.learning_rate < 1e-4 and "--init-from" in why


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--n-layer", 3], "--n-layer 3"),
        (["--seq-len", 128, "--total-batch-tokens", 2048], "128"),
    ],
)
def test_flags_that_contradict_the_weights_are_refused(runs, monkeypatch, capfd, flags, culprit):
    monkeypatch.chdir(runs)
    assert (
        run("--init-from", "first", "--data", ROOT / "input.txt", *TINY, *flags, "--out", "other")
        == 2
    )
    assert culprit in capfd.readouterr().err.splitlines()[-1]


def test_a_shorter_context_is_cropped(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert (
        run(
            "--init-from",
            "first",
            "--data",
            ROOT / "input.txt",
            *TINY,
            "--seq-len",
            32,
            "--max-steps",
            1,
            "--out",
            "short",
        )
        == 0
    )
    assert '"n_positions": 32' in (runs / "short/step_000001/config.json").read_text()
