"""What users bring: their paths, their files, their machines, and what the scripts tell them.

Each section is a kind of stumble that people met. What other test files check, is not repeated.
"""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tools import ROOT, run_main, run_python, tiny_model

import fineweb
import hellaswag
import sample
import train_gpt2
from model import GPT
from support import plot, report, run_directory

TINY = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--seq-len", 32, "--max-steps", 2)
TINY += ("--total-batch-tokens", 256, "--micro-batch", 4, "--eval-tokens", 500)
TINY += ("--sample-every", 0, "--warmup-steps", 0)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def text(in_tmp) -> Path:
    """The sample text as novel.txt in the working directory."""
    file = in_tmp / "novel.txt"
    file.write_bytes((ROOT / "input.txt").read_bytes())
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two steps on the sample text. No test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train("--data", ROOT / "input.txt", "--out", folder / "run") == 0
    return folder / "run"


def train(*args) -> int:
    return run_main(train_gpt2.main, *TINY, *args)


# --------------------------------------------------------------------------- a path is not a string


@pytest.mark.parametrize(
    "spelling", ["data/first-run/", "./data/first-run", "data/../data/first-run"]
)
def test_the_first_runs_corpus_is_made_however_it_is_spelled(spelling, in_tmp, monkeypatch):
    monkeypatch.setattr(fineweb, "prepare_first_run", lambda say: Path("made"))
    assert fineweb.tokens_for((spelling,), "bytes") == Path("made")


def test_a_run_is_found_with_a_slash_at_its_end_and_by_a_link(finished, in_tmp):
    (in_tmp / "linked").symlink_to(finished)
    expected = str(finished / "step_000002")
    for name in (f"{finished}/", str(in_tmp / "linked")):
        assert os.path.samefile(run_directory.resolve_model(name), expected)


class Rank0:
    """As much of a Runtime as preparing data asks for."""

    @staticmethod
    def say(*lines):
        pass


# ------------------------------------------------------ what is not the format must not become text


def test_text_in_another_encoding_is_refused_by_training_with_its_name(text, capsys):
    text.write_text("It was a dark and stormy night. " * 100, encoding="utf-16")
    assert train("--data", text) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "novel.txt" in error and "not UTF-8" in error


# --------------------------------------------------------------- the model's tokenizer, other tools


def test_lm_eval_scores_a_step_directory_of_bytes_as_we_do(finished, tmp_path):
    """Bits per byte of a local task, as `lm-eval --model hf --model_args pretrained=…` runs it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    document = "The tide comes about fifty minutes later each day — as it did in 1887."
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": document}) + "\n")
    (tmp_path / "tides.yaml").write_text(
        f"""
task: tides
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/documents.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    step = finished / "step_000002"
    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={step},dtype=float32",
        tasks=["tides"],
        device="cpu",
        batch_size=1,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    found = results["results"]["tides"]["bits_per_byte,none"]

    # lm-eval reads in windows of the context, each of which begins with the byte before it.
    model = GPT.from_pretrained(step)
    ids = [256, *document.encode()]
    T = model.config.block_size
    bits = 0.0
    for start in range(0, len(ids) - 1, T):
        end = min(start + T, len(ids) - 1)
        idx = torch.tensor([ids[max(0, end - T) : end]])
        with torch.no_grad():
            log_p = model(idx)[0].log_softmax(-1)
        targets = torch.tensor(ids[start + 1 : end + 1])
        bits -= log_p[-len(targets) :].gather(1, targets[:, None]).sum().item() / np.log(2)
    assert found == pytest.approx(bits / len(document.encode()), rel=1e-4)


def test_a_run_directory_is_a_name_for_from_pretrained_as_for_model(finished):
    one = GPT.from_pretrained(finished)
    other, _, picked = sample.load_model(str(finished))
    assert picked == str(finished / "step_000002")
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_model_with_more_rows_than_its_encoding_writes_text(tmp_path):
    """As after a pad token was added and the embedding resized to a round number."""
    model = tiny_model(vocab_size=320)
    model.save_pretrained(tmp_path, encoding="bytes")
    assert run_main(sample.main, "--model", tmp_path, "--max-new-tokens", 40) == 0


# ------------------------------------------------------------------ reading needs no right to write


def test_training_on_prepared_data_leaves_them_as_they_are(finished, in_tmp):
    (data,) = (finished.parent / "data").iterdir()

    def state() -> list:
        files = sorted([data, *data.iterdir()])
        return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    found = state()
    assert train("--data", data, "--save-every", 0) == 0
    assert state() == found


# ------------------------------------------------------------------------ what a run says of itself


def test_sampling_passes_over_newer_runs_without_a_checkpoint(finished, in_tmp, capsys):
    (in_tmp / "runs").mkdir()
    (in_tmp / "runs" / "old").symlink_to(finished)
    for name in ("no-checkpoint", "no-log"):
        (in_tmp / "runs" / name).mkdir()
        (in_tmp / "runs" / name / "train.json").write_text("{}")
    (in_tmp / "runs" / "no-checkpoint" / "log.jsonl").touch()
    assert run_main(sample.main, "--max-new-tokens", 1) == 0
    assert "runs/old/step_000002" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/typo", "runs/never-began", "runs"])
def test_a_name_below_runs_that_is_no_run_is_said_with_those_there_are(
    name, finished, in_tmp, capsys
):
    (in_tmp / "runs" / "never-began").mkdir(parents=True)
    (in_tmp / "runs" / "old").symlink_to(finished)
    assert run_main(sample.main, "--model", name) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{name}: no such run; expected one of runs/old; " in error


def test_a_run_without_checkpoints_offers_none(text, capsys):
    assert train("--data", text, "--save-every", 0) == 0
    out = capsys.readouterr().out
    assert "No checkpoint: --save-every is 0" in out and "sample.py" not in out


def test_printed_commands_can_be_pasted_whatever_the_runs_name(text, capsys):
    folder = "runs/it's mine; $HOME"
    assert train("--data", text, "--out", folder) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sample.py" in line]
    assert shlex.split(line)[:4] == ["python", "sample.py", "--model", folder]


def test_a_line_of_progress_has_mean_validation_speed_and_time_left():
    config = train_gpt2.RECIPES["first-run"]
    run = SimpleNamespace(step=500, listeners=[])
    rt = train_gpt2.start("cpu", "float32")
    with report.TrainingProgress(config, config.shape("bytes"), run, rt) as progress:
        progress.losses = [2.0, 3.0]
        progress.seconds = 5.0
        progress.step = 550
        progress.hear("eval", 500, {"val_loss": 2.19})
        assert progress.describe() == "loss 2.500 (mean of 2)  val 2.190  10.2k tok/s"


def test_the_time_of_a_run_that_goes_on_is_told_apart_from_all(in_tmp):
    """A fork's time begins with that of the run that it is forked from."""
    config = train_gpt2.RECIPES["first-run"]
    run = SimpleNamespace(step=500, listeners=[], elapsed=28.0, folder=in_tmp, validation_losses={})
    rt = train_gpt2.start("cpu", "float32")
    with report.TrainingProgress(config, config.shape("bytes"), run, rt) as progress:
        progress.seconds = 3.0
        assert progress.summary() == ["Done: 3 s of training since step 500, 28 s in all."]


@pytest.mark.parametrize("losses, is_said", [((2.3, 2.1, 2.2), True), ((2.3, 2.2, 2.1), False)])
def test_a_run_whose_lowest_loss_was_not_kept_says_so(text, capsys, monkeypatch, losses, is_said):
    of_validations = iter(losses)
    real = train_gpt2.evaluate

    def evaluate_by_list(*args, **how):
        return real(*args, **how) | {"val_loss": next(of_validations)}

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate_by_list)
    flags = ("--max-steps", 2, "--warmup-steps", 1, "--eval-every", 1, "--save-every", 0)
    assert train("--data", text, *flags) == 0
    said = "Lowest: step 1, validation loss 2.1000. With --keep-best" in capsys.readouterr().out
    assert said == is_said


@pytest.mark.parametrize("warmup_steps, is_said", [(1, False), (2, True), (3, True)])
def test_a_warm_up_of_most_of_the_run_is_pointed_out(text, capsys, warmup_steps, is_said):
    flags = ("--max-steps", 2, "--warmup-steps", warmup_steps, "--save-every", 0)
    assert train("--data", text, *flags) == 0
    note = f"note: {warmup_steps} steps of warm-up in a run of 2: "
    assert (note in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("load, threads, is_said", [(2.1, 2, True), (0.2, 2, False), (9, 1, False)])
def test_busy_cores_are_pointed_out_with_the_remedy(load, threads, is_said, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rt = train_gpt2.start("cpu", "float32")
    said = "".join(report.note_on_busy_cores(rt))
    assert ("OMP_NUM_THREADS=1" in said) == is_said


# ---------------------------------------------------------------------- numbers that are comparable


def test_evaluation_of_a_folder_reads_all_of_its_texts(finished, in_tmp, capsys):
    (in_tmp / "novels").mkdir()
    for name in ("one.txt", "two.md"):
        (in_tmp / "novels" / name).write_text("Call me Ishmael. " * 20)
    flags = ("--eval-only", "--init-from", finished, "--data", "novels/")
    assert run_main(train_gpt2.main, *flags) == 0
    out = capsys.readouterr().out
    num_tokens = 2 * (1 + 17 * 20)  # each document begins with <|endoftext|>
    assert f"{num_tokens - 1:,} of the {num_tokens:,} tokens of novels/" in out
    assert "recipe" not in out


def test_evaluation_on_one_byte_is_a_number(finished, in_tmp, capsys):
    (in_tmp / "a.txt").write_text("a")
    flags = ("--eval-only", "--init-from", finished, "--data", "a.txt")
    assert run_main(train_gpt2.main, *flags) == 0
    model = GPT.from_pretrained(finished)
    with torch.no_grad():
        expected = -model(torch.tensor([[256]]))[0, 0].log_softmax(-1)[ord("a")].item()
    found = re.search(r"^loss +([\d.]+)", capsys.readouterr().out, re.M)[1]
    assert float(found) == pytest.approx(expected, abs=0.02)  # the script may use bfloat16


# ---------------------------------------------------------- a run that can be repeated and compared


def test_a_run_is_repeated_from_its_directory_with_another_seed(finished, in_tmp):
    flags = ("--config", f"{finished}/", "--seed", 3, "--out", "again")
    assert run_main(train_gpt2.main, *flags) == 0
    saved, again = (
        json.loads((folder / "train.json").read_text()) for folder in (finished, Path("again"))
    )
    different = {key for key in saved if saved[key] != again[key]}
    assert different == {"seed", "started"}


def test_the_table_of_a_folder_of_runs_can_be_read_without_a_picture(finished, in_tmp, capsys):
    assert run_main(plot.main, f"{finished.parent}/", "--table") == 0
    assert "| run |  | 1 |" in capsys.readouterr().out
    assert os.listdir() == []


# --------------------------------------------------------------------------- fine-tuning that moves


def test_the_learning_rate_of_fine_tuning_is_said_and_bounded(finished, in_tmp, capsys):
    flags = ("--init-from", finished, "--data", ROOT / "input.txt", "--dry-run")
    assert run_main(train_gpt2.main, *flags) == 0
    assert "--learning-rate is 0.001 by default" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- a changed model


@pytest.mark.parametrize("max_steps", [1, 2])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_shortest_runs_have_a_learning_rate(max_steps, schedule):
    config = replace(
        train_gpt2.RECIPES["first-run"], max_steps=max_steps, warmup_steps=0, schedule=schedule
    )
    assert train_gpt2.learning_rate(0, config) == config.learning_rate


# ------------------------------------------------------------------------------------- environments


def test_without_a_compiler_one_line_names_the_flag(text):
    run = run_python(
        "train_gpt2.py",
        *TINY,
        *("--data", text, "--compile", "--eval-every", 0),
        env={"CXX": "there-is-none", "TORCHINDUCTOR_CACHE_DIR": str(text.parent / "cache")},
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "compiler" in line and "--no-compile" in line


def test_gpt2_without_its_corpus_names_the_script_that_makes_it(in_tmp, capsys):
    assert run_main(train_gpt2.main, "--recipe", "gpt2", "--device", "cpu") == 2
    assert "python fineweb.py" in capsys.readouterr().err.splitlines()[-1]


# -------------------------------------------------------------------------- what the help texts say


@pytest.mark.parametrize("script", [train_gpt2, fineweb, hellaswag, sample, plot])
def test_each_flag_has_a_help_text_of_its_own_without_values_of_python(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    assert run_main(script.main, "--help") == 0
    shown = capsys.readouterr().out
    for words in ("(default: None)", "(default: )", "{None}", "[STR [STR", "[PATH [PATH"):
        assert words not in shown
    texts = []
    for line in shown.splitlines():
        text, found, _ = line.partition(" (default: ")
        if found:
            texts.append(re.split("  +", text)[-1])
    assert len(texts) > 1 and len(set(texts)) == len(texts)


# ------------------------------------------------------------------------------------ small corpora


@pytest.mark.parametrize("content", [b"", b"hi"])
def test_a_corpus_too_small_to_train_on_is_one_line_that_names_it(content, text, capsys):
    text.write_bytes(content)
    assert train("--data", text) == 2
    assert "novel.txt" in capsys.readouterr().err.splitlines()[-1]


def test_the_smallest_corpus_that_has_a_window_trains(text):
    """33 training tokens are one window of 32; the last tenth validates."""
    text.write_bytes(b"x" * 40)
    assert train("--data", text, "--save-every", 0) == 0
