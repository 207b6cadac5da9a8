"""Fine-tuning as one command: the recipe it picks, and that it is worth doing."""

import shutil
from pathlib import Path

import pytest
from test_train import last_error, train
from tools import ROOT, configuration, read_log, save_tiny_model

from train_gpt2 import RECIPES

FLAGS = """
    --seq-len 64 --total-batch-tokens 2048 --micro-batch 32 --eval-every 10 --eval-tokens 2500
    --sample-every 0 --device cpu --dtype float32 --dropout 0 --warmup-steps 5 --optimizer adamw
"""
TINY = FLAGS.split()
SIZE = ["--n-layer", 2, "--n-head", 2, "--n-embd", 64]
TEXT = ROOT / "input.txt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`tuned` is fine-tuned on the sample text, `scratch` is trained on it alone.

    `first`, which `tuned` starts from, is trained on Python's library.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain = ("--max-steps", 200, "--learning-rate", 4e-3, "--eval-every", 0)
        assert train(*SIZE, *TINY, *pretrain, "--save-every", 200, "--out", "first") == 0
        same = ("--data", TEXT, *TINY, "--max-steps", 40, "--learning-rate", 2e-3)
        assert train("--init-from", "first", *same, "--out", "tuned") == 0
        assert train(*SIZE, *same, "--out", "scratch") == 0
    return folder


def val_losses(folder: Path) -> list[float]:
    return [entry["val_loss"] for entry in read_log(folder, "eval")]


def test_fine_tuning_beats_training_from_scratch_at_equal_steps(runs):
    assert min(val_losses(runs / "tuned")) < min(val_losses(runs / "scratch")) - 0.1


def test_fine_tuning_starts_from_the_weights_of_the_model(runs):
    assert val_losses(runs / "tuned")[0] < 4.0 < val_losses(runs / "scratch")[0]


def test_init_from_picks_the_finetune_recipe(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert configuration("--init-from", "first", "--data", "novel.txt").recipe == "finetune"


def test_the_finetune_recipe_has_the_models_shape_and_encoding(runs, monkeypatch):
    monkeypatch.chdir(runs)
    config = configuration("--init-from", "first", "--data", "novel.txt")
    assert (config.n_layer, config.n_head, config.n_embd) == (2, 2, 64)
    assert config.seq_len == 64
    assert config.tokenizer == "bytes"


def test_a_124m_model_is_fine_tuned_with_the_recipes_learning_rate(tmp_path):
    """Only the shape is read, so no weights of that size are needed."""
    save_tiny_model(tmp_path / "model", n_layer=1, vocab_size=50_257)
    file = tmp_path / "model/config.json"
    text = file.read_text()
    changes = {'"n_layer": 1': '"n_layer": 12', '"n_head": 2': '"n_head": 12'}
    changes |= {'"n_embd": 32': '"n_embd": 768', '"n_positions": 32': '"n_positions": 1024'}
    for old, new in (changes | {'"n_ctx": 32': '"n_ctx": 1024'}).items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    config = configuration("--init-from", tmp_path / "model", "--data", "novel.txt")
    assert config.learning_rate == RECIPES["finetune"].learning_rate == 3e-5


def test_a_model_of_the_first_runs_size_is_fine_tuned_at_1e_3(tmp_path):
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128}
    save_tiny_model(tmp_path / "model", **shape)
    config = configuration("--init-from", tmp_path / "model", "--data", "novel.txt")
    assert config.learning_rate == 1e-3
    assert config.min_lr == 5e-4


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--n-layer", 3], "--n-layer 3"),
        (["--seq-len", 128, "--total-batch-tokens", 4096], "--seq-len 128"),
    ],
)
def test_flags_that_contradict_the_weights_are_refused(runs, monkeypatch, capfd, flags, culprit):
    monkeypatch.chdir(runs)
    assert train("--init-from", "first", "--data", TEXT, *TINY, *flags, "--out", "other") == 2
    assert culprit in last_error(capfd)


def test_text_of_another_encoding_is_refused(runs, monkeypatch, capfd):
    monkeypatch.chdir(runs)
    flags = ("--tokenizer", "gpt2", "--out", "other")
    assert train("--init-from", "first", "--data", TEXT, *TINY, *flags) == 2
    assert "tokens of the encoding gpt2" in last_error(capfd)


def test_a_shorter_context_is_cropped(runs, monkeypatch):
    monkeypatch.chdir(runs)
    flags = ("--seq-len", 32, "--max-steps", 1, "--out", "short")
    assert train("--init-from", "first", "--data", TEXT, *TINY, *flags) == 0
    assert '"n_positions": 32' in (runs / "short/step_000001/config.json").read_text()


def test_the_printed_way_to_go_on_resumes_a_fine_tuned_run(runs, monkeypatch):
    """Recipe, shape and data come from the run itself."""
    monkeypatch.chdir(runs)
    same = ("--data", TEXT, *TINY, "--max-steps", 2, "--save-every", 1, "--keep", 2)
    assert train("--init-from", "first", *same, "--out", "again") == 0
    weights = (runs / "again/step_000002/model.safetensors").read_bytes()

    shutil.rmtree(runs / "again/step_000002")
    assert train("--out", "again", "--resume") == 0
    assert (runs / "again/step_000002/model.safetensors").read_bytes() == weights
