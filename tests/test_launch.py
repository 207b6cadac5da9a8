"""support/launch.py: which configuration a command line means, and what it may change."""

import hashlib
import json
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from tools import configuration, run_main, run_python, save_tiny_model, write_bytes_data

from support import launch
from support.script import UserError
from train_gpt2 import RECIPES, TrainConfig, main

TINY = [
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--seq-len",
    "32",
    "--total-batch-tokens",
    "512",
    "--micro-batch",
    "4",
    "--max-steps",
    "4",
    "--warmup-steps",
    "1",
    "--eval-every",
    "0",
    "--eval-tokens",
    "500",
    "--sample-every",
    "0",
    "--save-every",
    "2",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with the data `text` and a run `r` of four steps on it."""
    folder = tmp_path_factory.mktemp("finished")
    write_bytes_data(folder / "text")
    done = run_python("train_gpt2.py", "--data", "text", *TINY, "--out", "r", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, as the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*args) -> int:
    return run_main(main, *args)


def last_error(capfd) -> str:
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


# -------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("spelling", ["edu_fineweb10B", "edu_fineweb10B/", "./edu_fineweb10B"])
def test_recipe_is_gpt2_however_the_corpus_is_spelled(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    write_bytes_data(Path("edu_fineweb10B"))
    assert configuration("--data", spelling).recipe == "gpt2"
    assert configuration("--data", tmp_path / spelling).recipe == "gpt2"
    assert configuration().recipe == "gpt2"


def test_shards_decide_the_recipe_and_not_a_folder(tmp_path, monkeypatch):
    """A preparation that failed has left a folder with a lock."""
    monkeypatch.chdir(tmp_path)
    Path("edu_fineweb10B").mkdir()
    Path("edu_fineweb10B/.lock").touch()
    assert configuration().recipe == "first-run"


def test_text_is_trained_on_with_the_first_runs_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configuration("--data", "a.txt", "b.txt")
    assert config == replace(RECIPES["first-run"], data=("a.txt", "b.txt"))


def test_weights_to_start_from_are_fine_tuned_in_their_own_shape(here):
    config = configuration("--init-from", "r", "--data", "text")
    assert config.recipe == "finetune"
    assert (config.n_layer, config.n_head, config.n_embd, config.seq_len) == (1, 2, 16, 32)
    assert config.tokenizer == "bytes"
    assert config.learning_rate == 1e-3


# ------------------------------------------------------------------------ a saved run as the source


def test_config_takes_all_values_of_a_run_and_flags_replace_them(here):
    saved = launch.read_train_json(TrainConfig, Path("r/train.json"))
    for source in ("r", "r/train.json", "r/step_000002"):
        config = configuration("--config", source, "--max-steps", 7)
        assert config == replace(saved, config=source, max_steps=7)


def test_where_a_run_is_kept_is_never_taken_from_a_file(here):
    values = json.loads(Path("r/train.json").read_text())
    Path("theirs.json").write_text(json.dumps(values | {"out": "elsewhere", "dry_run": True}))
    config = configuration("--config", "theirs.json")
    assert (config.out, config.dry_run) == ("", False)


def test_a_train_json_of_an_older_version_is_read(here):
    """It has one path as its data, two flags that are gone, and lacks what came later."""
    values = json.loads(Path("r/train.json").read_text())
    for name in ("skip_spikes", "fork", "decay_steps", "tensorboard", "origin"):
        del values[name]
    values |= {"data": "text", "gpus": 0, "gpu": "H100"}
    Path("old.json").write_text(json.dumps(values))
    config = launch.read_train_json(TrainConfig, Path("old.json"))
    assert config == launch.read_train_json(TrainConfig, Path("r/train.json"))


@dataclass(frozen=True)
class WithFlag(TrainConfig):
    my_flag: int = 0  # one that was added to the configuration
    my_names: tuple[str, ...] = ()  # another


@pytest.mark.parametrize("source", [("--fork", "r"), ("--config", "r"), ("--out", "r", "--resume")])
def test_a_flag_that_is_newer_than_a_run_has_its_default_and_is_said(here, source):
    config, lines = launch.configuration(WithFlag, RECIPES, "", list(source))
    assert config.my_flag == 0
    assert lines.count("r/train.json has no my_flag, which is newer: 0") == 1


def test_a_flag_of_several_values_is_read_as_it_was(here):
    values = json.loads(Path("r/train.json").read_text())
    Path("mine.json").write_text(json.dumps(values | {"my_names": ["a", "b"]}))
    config = launch.read_train_json(WithFlag, Path("mine.json"))
    assert config.my_names == ("a", "b")


def test_a_flag_that_is_gone_is_refused_and_the_named_remedy_works(here):
    values = json.loads(Path("r/train.json").read_text())
    Path("theirs.json").write_text(json.dumps(values | {"gone": 1}))
    with pytest.raises(UserError, match="'gone'.* remove it from a copy, which --config takes"):
        configuration("--config", "theirs.json")
    Path("copy.json").write_text(json.dumps(values))
    assert configuration("--config", "copy.json").max_steps == 4


@pytest.mark.parametrize("flag", ["--fork", "--config"])
def test_a_model_that_is_no_run_is_said_to_be_none(here, flag):
    save_tiny_model(Path("model"))
    with pytest.raises(UserError, match="^model: .* not a run; .* with --init-from model$"):
        configuration(flag, "model")


@pytest.mark.parametrize(
    "content", [b"", b'{"recipe": "first-run"', b"[]", b"\xff", b"[" * 100_000]
)
def test_a_torn_train_json_is_one_line_that_names_it(here, capfd, content):
    Path("r/train.json").write_bytes(content)
    assert train("--out", "r", "--resume") == 2
    assert "r/train.json" in last_error(capfd)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1337.0),
        ("learning_rate", None),
        ("learning_rate", 1),
        ("data", 5),
        ("compile", 0),
        ("optimizer", "sgd"),
        ("no_such_flag", 1),
    ],
)
def test_a_train_json_of_other_types_is_refused(here, capfd, key, value):
    values = json.loads(Path("r/train.json").read_text())
    Path("r/train.json").write_text(json.dumps(values | {key: value}))
    assert train("--out", "r", "--resume") == 2
    assert key.replace("_", "-") in last_error(capfd).replace("_", "-")


def test_an_edited_train_json_is_refused(here, capfd):
    file = Path("r/train.json")
    file.write_text(file.read_text().replace('"seed": 1337', '"seed": 1338'))
    assert train("--out", "r", "--resume") == 2
    assert "train.json: changed" in last_error(capfd)


# ------------------------------------------------------------------ what a continued run may change


def test_what_would_change_what_is_learned_is_refused_by_name(here, capfd):
    assert train("--out", "r", "--resume", "--learning-rate", 1, "--micro-batch", 2) == 2
    message = last_error(capfd)
    assert "--learning-rate: cannot change" in message
    assert "micro" not in message


@pytest.mark.parametrize(
    "flags, begins_with",
    [
        (["--max-steps", 6], "python train_gpt2.py --fork r --max-steps 6"),
        (["--optimizer", "adamw"], "python train_gpt2.py --config r --init-from r --optimizer"),
        (["--deterministic"], "python train_gpt2.py --fork r --deterministic"),
    ],
)
def test_the_command_that_a_refusal_names_works_as_it_stands(here, capfd, flags, begins_with):
    assert train("--out", "r", "--resume", *flags) == 2
    command = last_error(capfd).rpartition("begin a new run from this one with: ")[2]
    assert command.startswith(begins_with)
    assert train(*shlex.split(command)[2:], "--out", "new") == 0


def test_the_same_command_starts_a_run_and_continues_it(here):
    """As a job's that may be restarted, with values from a file."""
    command = ("--config", "r/train.json", "--seed", 5, "--out", "job", "--resume")
    assert train(*command) == 0
    shutil.rmtree("job/step_000004")
    assert train(*command) == 0
    assert Path("job/step_000004").exists()


# --------------------------------------------------------------------------------------- a fork


def test_a_fork_has_the_runs_values_and_says_what_differs(here, capfd):
    assert train("--fork", "r", "--max-steps", 6, "--learning-rate", 1e-3, "--out", "f") == 0
    out = capfd.readouterr().out
    assert "  max_steps            4 → 6\n" in out
    assert "  learning_rate        0.008 → 0.001\n" in out
    assert "seed" not in out
    saved = launch.read_train_json(TrainConfig, Path("r/train.json"))
    forked = launch.read_train_json(TrainConfig, Path("f/train.json"))
    assert forked == replace(saved, fork="r", max_steps=6, learning_rate=1e-3)


def test_the_run_that_is_forked_is_only_read(here):
    def contents() -> dict:
        files = [path for path in Path("r").rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}

    before = contents()
    assert train("--fork", "r/step_000002", "--max-steps", 5, "--out", "f") == 0
    assert contents() == before


@pytest.mark.parametrize(
    "flags", [["--n-embd", 32], ["--seq-len", 16], ["--optimizer", "adamw"], ["--init-from", "r"]]
)
def test_what_a_fork_cannot_change_is_refused_and_init_from_named(here, capfd, flags):
    assert train("--fork", "r", *flags) == 2
    assert "--init-from" in last_error(capfd)


def test_every_flag_has_help():
    help_text = run_python("train_gpt2.py", "--help").stdout
    for name in asdict(RECIPES["gpt2"]):
        assert launch.flag(name) in help_text, name


def test_values_of_a_fork_do_not_fork_again(here):
    """--config takes values alone."""
    assert train("--fork", "r/step_000002", "--out", "f") == 0
    assert configuration("--config", "f").fork == ""


def test_a_run_from_a_file_is_found_again_under_its_recipe(here):
    """Without --out: the directory follows from the file's recipe, with --resume as without."""
    values = json.loads(Path("r/train.json").read_text()) | {"recipe": "mine"}
    Path("mine.json").write_text(json.dumps(values))
    assert train("--config", "mine.json") == 0
    assert configuration("--config", "mine.json", "--resume").out == "runs/mine"


def test_a_fork_that_would_end_before_it_begins_is_refused(here, capfd):
    assert train("--fork", "r", "--max-steps", 3, "--out", "f") == 2
    assert "--max-steps 3; expected at least 4" in last_error(capfd)
    assert not Path("f").exists()


def test_a_train_json_may_name_many_files(here):
    Path("books").mkdir()
    for number in range(3):
        Path(f"books/{number}.txt").write_text("A book of some words. " * 100)
    names = [f"books/{number}.txt" for number in range(3)]
    values = json.loads(Path("r/train.json").read_text())
    values["data"] = names + [f"books/{'x' * 200}.txt"] * 8000
    Path("long.json").write_text(json.dumps(values))
    assert configuration("--config", "long.json").data[:3] == tuple(names)


def test_a_folder_of_other_files_is_no_run_directory(here, capfd):
    Path("mine").mkdir()
    Path("mine/.draft.tmp").write_text("not yours")
    Path("mine/thesis.tex").write_text("nor this")
    assert train("--data", "text", *TINY, "--out", "mine") == 2
    assert "mine: holds thesis.tex" in last_error(capfd)
    assert Path("mine/.draft.tmp").read_text() == "not yours"
