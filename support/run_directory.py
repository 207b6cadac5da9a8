"""What a run leaves on disk: its configuration, its log, its checkpoints.

    runs/gpt2/train.json        the configuration, and where and when the run was started
    runs/gpt2/log.jsonl         one JSON object a line
    runs/gpt2/curves.png        the curves of that log
    runs/gpt2/step_001000/      a checkpoint: the model after exactly 1,000 updates
    runs/gpt2/best.json         the step of lowest validation loss, where the run keeps it

A run is continued from its newest valid checkpoint; support/checkpoint.py says what makes one.
One process writes a run: it holds the lock of the directory. Reading needs none.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import tiktoken
import torch
from torch import Tensor

from support.checkpoint import (
    ANOTHER,
    MODEL_FILES,
    SCHEMA,
    Checkpoint,
    check_finite,
    commit_checkpoint,
    cpu_copies,
    fault_in,
    fault_of,
    load_checkpoint,
    step_name,
    step_number,
)
from support.files import (
    file_sha256,
    locked,
    plain_name,
    read_json,
    read_jsonl,
    remove,
    remove_leftovers,
    write_file,
)
from support.huggingface import read_config
from support.ranks import Ranks
from support.script import Stopped, UserError, require, say, shown
from support.shards import ENCODINGS

# The shapes of the JSON files; see files.read_json.
# What a start that began no run may have left.
OWN_NAMES = re.compile(r"\.lock|\.lock-holder|log(-old)?\.jsonl|\.\w+\.tmp")
BEST = {"step": int, "val_loss": float}
ORIGIN = {"run": str, "step": int, "samples": int, "weights": str}


class RunDirectory:
    """A run directory that this process writes, and holds alone.

    begin, load_newest       how a run starts, or goes on
    log                      a line of log.jsonl
    save, wait_for_commit    a checkpoint, written beside the training
    mark_best                the checkpoint of lowest validation loss

    Every rank has one, and only rank 0's (`writes=True`) locks, writes and deletes, so that the
    training loop need not ask who it is.
    """

    def __init__(
        self, folder: Path, tokens_per_step: int, writes: bool, say: Callable[[str], None]
    ):
        self.folder = folder
        self.tokens_per_step = tokens_per_step
        self.writes = writes
        self.say = say
        self.listeners: list[Callable[[str, int, dict], None]] = []  # told what is logged
        self.step = 0  # updates done when this process took the run over
        self.tokens = 0  # read until then
        self.elapsed = 0.0  # seconds of training, evaluations and saves excluded
        self.last_saved: int | None = None
        self.logged: frozenset[str] = frozenset()  # events of `step` that are done already
        self.validation_losses: dict[int, float] = {}  # by step; rank 0 knows them
        self._lock = contextlib.ExitStack()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._commit: Future | None = None  # the checkpoint that is being written
        self._log_error: OSError | None = None  # why a line of the log could not be written

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if isinstance(error, Stopped) and error.at_once:
            return  # the process is about to end, and with it the writer and the lock
        self._writer.shutdown()
        self._lock.close()

    # Beginning, on rank 0: `claim`, then `begin` or `load_newest`. On all ranks: `continue_from`.

    def claim(self, may_hold_run: bool) -> None:
        """Lock the directory. Raises UserError while another process has it.

        may_hold_run: whether a run that is there already is welcome, or refused with a UserError.
        """
        is_new = not self.folder.exists()
        self._lock.enter_context(locked(self.folder))
        if is_new:  # what is entered last is left first: with the lock still held
            self._lock.callback(remove_if_unused, self.folder)
        if not may_hold_run and (is_run(self.folder) or step_directories(self.folder)):
            self._lock.close()
            raise UserError(
                f"{self.folder}: holds a run; expected a new directory; continue that run with "
                "--resume, or choose another --out"
            )
        others = [name for name in os.listdir(self.folder) if not OWN_NAMES.fullmatch(name)]
        if not is_run(self.folder) and others:
            self._lock.close()
            raise UserError(
                f"{self.folder}: holds {sorted(others)[0]}; expected an empty or a new directory, "
                "since a run removes what it takes for its own; choose another --out"
            )

    def begin(self, config: dict, device: torch.device, origin: dict | None = None) -> None:
        """Start a new run: at step 0, or as a fork of another one (see `Checkpoint.as_origin`).

        The log of a fork begins with the lines of the other run. From train.json on the directory
        holds a run, so it is written last.
        """
        remove_leftovers(self.folder)
        remove(self.folder / "best.json")
        if origin:
            copy_log(Path(origin["run"]), self.folder, origin["step"])
        else:
            begin_log(self.folder, self.say)
        self.validation_losses = validation_losses(self.folder)
        values = config | {"origin": origin, "started": provenance(device)}
        write_file(self.folder / "train.json", (json.dumps(values, indent=2) + "\n").encode())

    def load_newest(self) -> Checkpoint | None:
        """Go back to the newest valid checkpoint; None where nothing was saved.

        A fork that has saved nothing goes back to the checkpoint that it began with. The log is
        cut back to the checkpoint's step: what came after it is trained and logged again. Newer
        checkpoints, which are damaged, are set aside, so that they are never counted again.
        """
        remove_leftovers(self.folder)
        read_best(self.folder)  # what is wrong with it is said now, not at the first save
        checkpoint = newest_valid(self.folder, self.say)
        if checkpoint:
            check_train_json(checkpoint)
            for folder in step_directories(self.folder):
                if step_number(folder) > checkpoint.step:
                    set_aside(folder)
            cut_log(self.folder, checkpoint.step, self.say)
            checkpoint = with_events(checkpoint)
        else:
            checkpoint = go_back_to_origin(self.folder, self.say)
        self.validation_losses = validation_losses(self.folder)
        return checkpoint

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Take over step, tokens and time of a checkpoint, of this run or of one that is forked."""
        state = checkpoint.state
        self.step = state["step"]
        self.tokens = state.get("tokens", self.step * self.tokens_per_step)
        self.elapsed = state["elapsed"]
        self.logged = checkpoint.logged
        if checkpoint.folder.parent == self.folder:
            self.last_saved = self.step

    # While the run goes on.

    def log(self, event: str, step: int, **values) -> None:
        """Append one line to log.jsonl. If that fails, `wait_for_commit` raises the error."""
        if not self.writes:
            return
        values = {"tokens": self.tokens_at(step), **values}
        line = json.dumps({"event": event, "step": step, **values}) + "\n"
        try:
            append(self.folder / "log.jsonl", line, flush_to_disk=event != "train")
        except OSError as error:
            self._log_error = self._log_error or error
        if event == "eval":
            self.validation_losses[step] = values["val_loss"]
        for listener in self.listeners:
            listener(event, step, values)

    def tokens_at(self, step: int) -> int:
        """Tokens read in `step` updates, those of a run that this one is forked from included."""
        return self.tokens + (step - self.step) * self.tokens_per_step

    def has_logged(self, event: str, step: int) -> bool:
        """Whether a continued run did this already, before it was stopped."""
        return step == self.step and event in self.logged

    def save(
        self,
        step: int,
        config: dict,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        encoding: tiktoken.Encoding,
        state: dict,
        keep: int,
        spare: Iterable[int] = (),
    ) -> None:
        """Commit the checkpoint of this step, and then remove those that need not be kept.

        config, weights: what GPT.saved_form gives. moments: the optimizer's tensors, by name. Both
        may lie on any device. state: `data` (the fingerprint), `samples`, and what else STATE
        names. keep, spare: see `prune`.

        Training waits until weights and moments are copied to the CPU and checked for NaN and Inf.
        They are written, hashed and flushed in a thread beside the next steps. `wait_for_commit`
        waits for its end and raises what went wrong; `has_failed` tells without waiting whether
        something did. A save waits for the one before it.
        """
        self.wait_for_commit()
        began = time.perf_counter()
        weights = cpu_copies(weights)
        moments = cpu_copies(moments)
        check_finite(f"step {step}", weights | moments)
        state = {
            "schema": SCHEMA,
            "step": step,
            "tokens": self.tokens_at(step),
            "elapsed": self.elapsed,
            "train_json": self.hash_of_train_json,
            **state,
        }
        # The event is in the log before the checkpoint is there: a resumed run cuts the log back to
        # its checkpoint, so an event too many disappears, and one too few would never come back.
        self.log("save", step, seconds=round(time.perf_counter() - began, 3))
        self.wait_for_commit()

        card = card_of(self.folder, state, self.validation_losses)

        def commit() -> None:
            commit_checkpoint(self.folder, config, weights, moments, encoding, card, state)
            prune(self.folder, keep, spare)

        self._commit = self._writer.submit(commit)

    @functools.cached_property
    def hash_of_train_json(self) -> str:
        """Taken once: an edit during the run shows at the next resume."""
        return file_sha256(self.folder / "train.json")

    def wait_for_commit(self) -> None:
        """Return once log and last checkpoint are on disk. Raises what went wrong with them."""
        if self._log_error:
            raise self._log_error
        if self._commit:
            commit, self._commit = self._commit, None
            commit.result()

    def has_failed(self) -> bool:
        """Whether `wait_for_commit` would raise, as far as is known without waiting."""
        if self._commit and self._commit.done() and self._commit.exception():
            return True
        return self._log_error is not None

    def in_background(self, work: Callable[[], None]) -> None:
        """Have some work done beside the next steps, by the thread that writes checkpoints.

        It must not fail: nobody asks how it ended. The run waits for its end when it closes.
        """
        self._writer.submit(work)

    def lowest_validation_loss(self) -> float:
        """The lowest validation loss of a step that was kept as the best; infinite without one."""
        best = read_best(self.folder)
        if best is None or not (self.folder / step_name(best["step"])).is_dir():
            return math.inf  # there is none, or it was damaged and set aside
        return best["val_loss"]

    def mark_best(self, step: int, val_loss: float) -> None:
        """Name this step, which is saved, the best one so far: pruning spares it."""
        self.wait_for_commit()
        content = json.dumps({"step": step, "val_loss": val_loss}) + "\n"
        write_file(self.folder / "best.json", content.encode())


def opened(out: str, recipe: str, resume: bool, tokens_per_step: int, ranks: Ranks) -> RunDirectory:
    """Claim a run's directory at once, so that no other process begins a run there meanwhile.

    Without `out` it is the first of runs/<recipe>, runs/<recipe>-2, … that is free.
    """
    for folder in directories_to_try(out, recipe):
        run = RunDirectory(folder, tokens_per_step, writes=ranks.is_main, say=ranks.say)
        if ranks.on_main(try_to_claim, run, resume, not out):
            check_main_sees_the_newest(folder, ranks)
            return run
    raise AssertionError("there is always another directory to try")


def check_main_sees_the_newest(folder: Path, ranks: Ranks) -> None:
    """End all ranks where each machine has a folder of its own, and rank 0's is behind.

    Rank 0 would begin anew, or go back, where it was on another machine before.
    """
    newest = [step_number(step) for step in step_directories(folder)[-1:]]
    of_ranks = ranks.gather(newest)
    ahead = of_ranks.index(max(of_ranks))
    if of_ranks[ahead] > of_ranks[0]:
        ranks.raise_on_all(
            UserError(
                f"{folder}: rank {ahead} sees step {of_ranks[ahead][0]} there, and rank 0 "
                f"{f'step {of_ranks[0][0]}' if of_ranks[0] else 'no checkpoint'}; expected one "
                "directory that all machines see; name one of a shared file system with --out, or "
                "copy the checkpoint to rank 0's machine"
            )
        )


def directories_to_try(out: str, recipe: str) -> Iterator[Path]:
    """`out` alone where it is given; else runs/<recipe>, runs/<recipe>-2, runs/<recipe>-3, …"""
    if out:
        yield Path(out)
        return
    # It may come from a train.json.
    require(plain_name(recipe), f"--recipe {shown(recipe)}; expected a name; name another")
    yield Path("runs", recipe)
    for number in itertools.count(2):
        yield Path("runs", f"{recipe}-{number}")


def try_to_claim(run: RunDirectory, may_hold_run: bool, may_be_taken: bool) -> bool:
    """Whether this process holds the directory now. Raises UserError if it had to be this one."""
    try:
        run.claim(may_hold_run)
    except UserError:
        if not may_be_taken:
            raise
        return False
    return True


# --------------------------------------------------------------------- the checkpoints of a run


def prune(run: Path, keep: int, spare: Iterable[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints, the best one, and the trunks of forks.

    spare: for each of these steps the last checkpoint at or before it stays. The step at which a
    decay of the learning rate begins spares the checkpoint from which another decay can begin.

    The newest checkpoint was committed or verified by this process, so a valid one always stays.
    One that cannot be removed, as on NFS while somebody reads it, is a warning; the next call
    tries again.
    """
    folders = step_directories(run)
    stays = set(folders[-keep:])
    stays.add(best_step(run))
    for step in spare:
        stays.update([folder for folder in folders if step_number(folder) <= step][-1:])
    for folder in folders:
        if folder in stays:
            continue
        try:
            (folder / "manifest.json").unlink(missing_ok=True)  # half-removed, it is never valid
            remove(folder)
        except OSError as error:
            say(f"warning: {error.filename}: not removed ({error.strerror}); training goes on")


def card_of(run: Path, state: dict, losses: dict[int, float]) -> dict:
    """What a checkpoint's model card says of its run; see huggingface.write_model_card."""
    begun = read_json(run / "train.json", {})
    data = begun.get("data", "unknown data")
    return {
        "name": f"{run.resolve().name}, step {state['step']:,}",
        "step": state["step"],
        "tokens": state["tokens"],
        "data": data if isinstance(data, str) else ", ".join(data),
        "losses": sorted(losses.items()),
        "command": begun.get("started", {}).get("command", "python train_gpt2.py"),
        "base_model": begun.get("init_from", ""),
    }


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it counts no more and a person can look at it."""
    target = folder.with_name(f"damaged_{folder.name}")
    remove(target)
    folder.rename(target)


def remove_if_unused(folder: Path) -> None:
    """Remove a directory in which no run was begun, as by a start that found no data."""
    with contextlib.suppress(OSError):
        if set(os.listdir(folder)) <= {".lock", ".lock-holder"}:
            shutil.rmtree(folder)


def with_events(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with what its run's log tells of its step."""
    entries = log_entries(checkpoint.folder.parent)
    events = frozenset(entry["event"] for entry in entries if entry["step"] == checkpoint.step)
    return replace(checkpoint, logged=events)


def newest_valid(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is valid; newer ones that are not are reported.

    A disk that cannot read a file has damaged it. Any other OSError is raised: after a restart the
    file may be read, and be sound.
    """
    folders = step_directories(run)
    while folders:
        folder = folders.pop()
        try:
            return load_checkpoint(folder)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise
            if not folder.exists():  # the run goes on elsewhere, and has pruned it meanwhile
                folders = step_directories(run)
                continue
            warn(f"warning: {fault_in(error)}; using an earlier checkpoint")
    return None


def checkpoint_of(place: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint to fork from: of a run the newest valid one, or the step that is named.

    Nothing is written there, and its run may go on meanwhile.
    """
    if is_run(place):
        checkpoint = newest_valid(place, warn)
        require(
            checkpoint is not None,
            f"{place}: no valid checkpoint; expected at least one step directory; let the run save "
            "one, or name another run",
        )
    else:
        refuse_missing(place)
        require(
            is_run(place.parent) and (place / "manifest.json").exists(),
            f"{place}: not a run, nor a checkpoint in its run; expected a directory with "
            "train.json, or a step directory in it; check the path",
        )
        checkpoint = load_checkpoint(place)
    check_train_json(checkpoint)
    return with_events(checkpoint)


def go_back_to_origin(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Where a run without a valid checkpoint goes on: a fork where it began, others at step 0."""
    require(
        not step_directories(run),
        f"{run}: none of its checkpoints is valid; expected at least one to continue from; restore "
        "one, or start a new run in another directory",
    )
    saved = [entry["step"] for entry in log_entries(run) if entry["event"] == "save"]
    origin = read_origin(run)
    if origin is None:
        if saved:
            say(
                f"warning: {run}: no checkpoint is there, although the log tells of one at step "
                f"{max(saved)}"
            )
        return None
    parent = Path(origin["run"])
    checkpoint = checkpoint_of(parent / step_name(origin["step"]), say)
    require(
        checkpoint.weights_sha256 == origin["weights"],
        f"{checkpoint.folder}: other weights than {run} was forked from; expected that checkpoint, "
        "since the fork has saved none of its own; restore it, or fork into another directory",
    )
    copy_log(parent, run, checkpoint.step)
    return checkpoint


def check_train_json(checkpoint: Checkpoint) -> None:
    """Refuse a configuration that was edited after the checkpoint was saved."""
    file = checkpoint.folder.parent / "train.json"
    require(
        file_sha256(file) == checkpoint.state["train_json"],
        f"{file}: changed since {checkpoint.folder.name} was saved; expected the configuration "
        "that the checkpoint was trained with; restore it, or start a new run from the "
        "checkpoint's weights",
    )


# ------------------------------------------------------------------------------------- finding


def step_directories(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, valid or not. A link is none of them."""
    folders = []
    for path in run.glob("step_*"):
        if path.name[5:].isdecimal() and path.is_dir() and not path.is_symlink():
            folders.append(path)
    return sorted(folders, key=step_number)


def is_run(folder: Path) -> bool:
    return (folder / "train.json").exists()


def read_origin(run: Path) -> dict | None:
    """Where a fork comes from, as its train.json says it; None for a run that began by itself."""
    file = run / "train.json"
    if not file.exists() or read_json(file, {}).get("origin") is None:
        return None
    return read_json(file, {"origin": ORIGIN})["origin"]


def read_best(run: Path) -> dict | None:
    """best.json, or None where the run has none."""
    file = run / "best.json"
    return read_json(file, BEST) if file.exists() else None


def best_step(run: Path) -> Path | None:
    """The checkpoint that best.json names, or None where the run has none."""
    best = read_best(run)
    return run / step_name(best["step"]) if best else None


def newest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` with a checkpoint that was started or resumed last."""
    runs = [run for run in root.glob("*/") if is_run(run) and step_directories(run)]
    require(
        bool(runs),
        f"{root}: no run with a checkpoint; expected a training run; train one with "
        "train_gpt2.py, or name a model with --model",
    )

    def last_written(run: Path) -> float:
        log = run / "log.jsonl"
        return log.stat().st_mtime if log.exists() else 0.0

    return max(runs, key=last_written)


def resolve_model(
    name: str | None, warn: Callable[[str], None] = say, names: Iterable[str] = MODEL_FILES
) -> str:
    """The hub name or the directory with a model that `name` stands for.

    A run directory stands for its best checkpoint if it keeps one, else for its newest valid one;
    None for the newest run under runs/. Other names are left as they are. names: the files of a
    checkpoint that are verified, those that will be read.
    """
    place = Path(name) if name else newest_run()
    refuse_missing(place)
    if is_run(place):
        return str(checkpoint_to_load(place, names, warn))
    if (place / "manifest.json").exists():
        fault = fault_of(place, names)
        require(fault is None, f"{fault}; {ANOTHER}")
    return str(place)


def describe_model(name: str) -> tuple[SimpleNamespace, str]:
    """Sizes and encoding of the model that `name` stands for; its weights are not read."""
    picked = resolve_model(name, lambda line: None, ("config.json",))
    config = read_config(picked)
    names = {size: name for name, size in ENCODINGS.items()}
    encoding = config.get("encoding", names.get(config["vocab_size"]))
    require(
        encoding in ENCODINGS,
        f"{picked}: {config['vocab_size']:,} tokens, encoding {shown(str(encoding))}; expected one "
        f"of {', '.join(ENCODINGS)}; use a model that reads one of them",
    )
    return SimpleNamespace(**config), encoding


def checkpoint_to_load(run: Path, names: Iterable[str], warn: Callable[[str], None]) -> Path:
    """The best checkpoint of a run if it keeps one, else the newest whose model is whole."""
    candidates = list(reversed(step_directories(run)))
    best = best_step(run)
    if best in candidates:
        candidates.insert(0, best)
    for folder in candidates:
        fault = fault_of(folder, names)
        if fault is None:
            return folder
        warn(f"warning: {fault}; using another checkpoint")
    raise UserError(
        f"{run}: no valid checkpoint; expected at least one step directory; train it further with "
        "train_gpt2.py --resume"
    )


def refuse_missing(place: Path) -> None:
    """Say what is there, where a run or one of its checkpoints is named that is not."""
    if place.is_file() or any(place.glob("*.json")):  # a folder without one never became a run
        return
    if is_run(place.parent):
        steps = [folder.name for folder in step_directories(place.parent)]
        expected = f"one of {', '.join(steps)}" if steps else "a run that has saved one"
        raise UserError(
            f"{place}: no such checkpoint; expected {expected}; check the name, or name the run "
            "alone"
        )
    if place.parts[:1] == ("runs",):  # nothing of that name is looked for on the hub
        runs = sorted(str(run) for run in Path("runs").glob("*") if is_run(run))
        expected = f"one of {', '.join(runs)}" if runs else "a run that train_gpt2.py has made"
        raise UserError(f"{place}: no such run; expected {expected}; check the name")


# ----------------------------------------------------------------------------------------- log


def append(file: Path, line: str, flush_to_disk: bool) -> None:
    """Add a line to a file. An OSError names the file, which a full disk does not do by itself."""
    try:
        with open(file, "a", encoding="utf-8") as f:
            f.write(line)
            f.flush()
            if flush_to_disk:
                os.fsync(f.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def read_log(run: Path) -> Iterator[tuple[bytes, dict | None]]:
    """The lines of log.jsonl, each with the entry that it is, or None where it is not one."""
    file = run / "log.jsonl"
    if not file.exists():
        return
    for line, entry in read_jsonl(file):
        yield line, entry if is_entry(entry) else None


def is_entry(entry: dict | None) -> bool:
    return bool(entry) and type(entry.get("event")) is str and type(entry.get("step")) is int


def log_entries(run: Path) -> Iterator[dict]:
    """What the log tells, without lines that are torn."""
    return (entry for _, entry in read_log(run) if entry)


def validation_losses(run: Path) -> dict[int, float]:
    """Those that the log tells of, by step."""
    evaluations = [entry for entry in log_entries(run) if entry["event"] == "eval"]
    return {entry["step"]: entry.get("val_loss", math.nan) for entry in evaluations}


def lines_up_to(run: Path, step: int) -> tuple[list[bytes], int]:
    """The log's lines of the first `step` updates, and how many lines of it are torn."""
    kept = []
    torn = 0
    for line, entry in read_log(run):
        if entry is None:
            torn += 1
        elif entry["step"] <= step:
            kept.append(line + b"\n")
    return kept, torn


def cut_log(run: Path, step: int, warn: Callable[[str], None]) -> None:
    """Cut log.jsonl back to `step`, and drop lines that a crash has torn."""
    file = run / "log.jsonl"
    kept, torn = lines_up_to(run, step)
    if torn:
        warn(f"warning: {file}: left out {torn} damaged lines")
    if step > 0 and not kept:
        warn(f"warning: {file}: nothing is there of the {step} steps before; the curves lack them")
    write_file(file, b"".join(kept))


def copy_log(parent: Path, run: Path, step: int) -> None:
    """Let a fork's log be that of the other run up to `step`."""
    kept, _ = lines_up_to(parent, step)  # one may be torn: the other run may be writing it
    write_file(run / "log.jsonl", b"".join(kept))


def begin_log(run: Path, say: Callable[[str], None]) -> None:
    """Begin an empty log. That of a start that saved nothing is kept beside it, until the next."""
    file = run / "log.jsonl"
    if any(log_entries(run)):
        file.replace(run / "log-old.jsonl")
        say(f"{run} begins at step 0 again; its log up to here is now log-old.jsonl")
    write_file(file)


# ----------------------------------------------------------------------------------- provenance


def provenance(device: torch.device) -> dict:
    """Where and when a run was started, for whoever wants to repeat it."""
    device_name = device.type
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    commit = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # not a git checkout
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "device": device_name,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": commit,
        "code": hash_of_code(),
    }


# The files at the top whose code a run depends on.
SCRIPTS = ("fineweb.py", "hellaswag.py", "model.py", "sample.py", "tokens.py", "train_gpt2.py")


def hash_of_code() -> str:
    """A hash of the code that runs. Other scripts at the top level do not count."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in [*(root / name for name in SCRIPTS), *sorted(root.glob("support/*.py"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
