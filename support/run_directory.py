"""What a run leaves on disk: its configuration, its log, its checkpoints.

    runs/gpt2/train.json        the configuration, and where and when the run was started
    runs/gpt2/log.jsonl         one JSON object a line
    runs/gpt2/curves.png        the curves of that log
    runs/gpt2/step_001000/      a checkpoint: the model after exactly 1,000 updates
    runs/gpt2/best.json         the step of lowest validation loss, where the run keeps it

A checkpoint is a Hugging Face GPT-2 directory with three files more: optimizer.safetensors,
state.json and manifest.json, which lists every file with its size and sha256. A checkpoint is
*valid* when every listed file is as the manifest says.

It is committed in four steps: all files are written under a temporary name and flushed to the disk,
the manifest is written last, the directory is flushed, and one rename gives it its name. A crash at
any moment leaves the whole checkpoint or none.
"""

import contextlib
import datetime
import hashlib
import hmac
import itertools
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig, read_config, read_header
from support.files import (
    file_sha256,
    locked,
    plain_name,
    read_json,
    read_lines,
    remove,
    remove_leftovers,
    set_mode,
    sync,
    write_file,
)
from support.huggingface import check_tokenizer, save_tokenizer
from support.optimizer import STATE_OF
from support.script import Stopped, UserError, say
from support.shards import ENCODINGS
from tokens import encoding_for

SCHEMA = 2  # of state.json; a newer one is refused
MODEL_FILES = ("config.json", "model.safetensors")  # what sampling and scoring read

STATE = {
    "schema": int,
    "step": int,
    "elapsed": float,
    "data": str,
    "train_json": str,
    "spikes?": {"losses": [float], "left_out": int},  # see support/spikes.py
}
MANIFEST = {"files": {str: {"size": int, "sha256": str}}}
BEST = {"step": int, "val_loss": float}


class RunDirectory:
    """A run directory that this process writes, and holds alone.

    Every rank has one, and only rank 0's (`writes=True`) locks, writes and deletes, so that the
    training loop need not ask who it is. `step` is the number of updates that the run stands at.
    """

    def __init__(
        self, folder: Path, tokens_per_step: int, writes: bool, say: Callable[[str], None]
    ):
        self.folder = folder
        self.tokens_per_step = tokens_per_step
        self.writes = writes
        self.say = say
        self.also_log: Callable[[str, int, dict], None] | None = None  # told what is logged
        self.step = 0
        self.elapsed = 0.0  # seconds of training, evaluations and saves excluded
        self.last_saved: int | None = None
        self.logged: set[tuple[str, int]] = set()  # events of the step that a run goes on from
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

    # ------------------------------------------------------------------------------- starting

    def claim(self, may_hold_run: bool) -> None:
        """Lock the directory. Raises UserError while another process has it.

        may_hold_run: whether a run that is there already is welcome, or refused with a UserError.
        """
        refuse_inside_checkpoint(self.folder)
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

    def begin(self, config: dict, device: torch.device) -> None:
        """Start a new run in the claimed directory."""
        remove_leftovers(self.folder)
        remove(self.folder / "best.json")  # of no run: where there is one, begin is not called
        keep_old_log(self.folder)
        values = config | {"started": provenance(device) | {"seal": seal(config)}}
        write_file(self.folder / "train.json", (json.dumps(values, indent=2) + "\n").encode())

    def newest_checkpoint(self) -> Path | None:
        """Go back to the newest checkpoint that is whole and finite; None where none was saved.

        Damaged checkpoints after it are set aside, so that they are never counted again. The log
        is cut back to the checkpoint's step, so that each step stands in it once.
        """
        remove_leftovers(self.folder)
        read_best(self.folder)  # what is wrong with it is said now, not at the first save
        checkpoint = newest_valid(self.folder, self.say)
        if checkpoint is None:
            if step_directories(self.folder):
                raise UserError(
                    f"{self.folder}: none of its checkpoints is valid; expected at least one to "
                    "continue from; restore one, or start a new run in another directory"
                )
            return None
        check_train_json(self.folder, checkpoint)
        for folder in step_directories(self.folder):
            if step_number(folder) > step_number(checkpoint):
                set_aside(folder)
        cut_log(self.folder, step_number(checkpoint), self.say)
        return checkpoint

    def continue_from(self, state: dict, logged: set[tuple[str, int]]) -> None:
        """Take over step and time of a checkpoint's state.json, and what `events_of` that step."""
        self.step = self.last_saved = state["step"]
        self.elapsed = state["elapsed"]
        self.logged = logged

    def events_of(self, step: int) -> set[tuple[str, int]]:
        """What the log says was done at a step, as (event, step)."""
        entries = (entry for _, entry in read_log(self.folder) if entry)
        return {(entry["event"], step) for entry in entries if entry["step"] == step}

    def has_logged(self, event: str, step: int) -> bool:
        """Whether a resumed run did this already, before it was stopped."""
        return (event, step) in self.logged

    # ----------------------------------------------------------------------------------- log

    def log(self, event: str, step: int, **values) -> None:
        """Append one line to log.jsonl. If that fails, `wait_for_commit` raises the error."""
        if not self.writes:
            return
        values = {"tokens": step * self.tokens_per_step, **values}
        line = json.dumps({"event": event, "step": step, **values}) + "\n"
        try:
            append(self.folder / "log.jsonl", line, flush_to_disk=event != "train")
        except OSError as error:
            self._log_error = self._log_error or error
        if self.also_log:
            self.also_log(event, step, values)

    # --------------------------------------------------------------------------- checkpoints

    def save(
        self,
        step: int,
        model: GPT,
        optimizer_tensors: Callable[[], dict[str, torch.Tensor]],
        encoding: tiktoken.Encoding,
        data_fingerprint: str,
        keep: int,
        **state,
    ) -> None:
        """Commit the checkpoint of this step.

        state: further values for state.json, of the shape that STATE says. Training waits only
        until weights and moments are copied. Writing, hashing and flushing them goes on in a thread
        beside the next steps. `wait_for_commit` waits for its end and raises what went wrong, and
        `has_failed` tells without waiting whether something did.
        """
        self.wait_for_commit()
        began = time.perf_counter()
        snapshot = cpu_copy(model)
        tensors = optimizer_tensors()
        check_finite(f"step {step}", dict(snapshot.named_parameters()) | tensors)
        state = {
            "schema": SCHEMA,
            "step": step,
            "elapsed": self.elapsed,
            "data": data_fingerprint,
            "train_json": file_sha256(self.folder / "train.json"),
            **state,
        }
        # The event is in the log before the checkpoint is there: a resumed run cuts the log back to
        # its checkpoint, so an event too many disappears, and one too few would never come back.
        self.log("save", step, seconds=round(time.perf_counter() - began, 3))
        self.wait_for_commit()
        self._commit = self._writer.submit(
            commit_checkpoint, self.folder, snapshot, encoding, tensors, state, keep
        )

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

    # ---------------------------------------------------------------------------------- best

    def lowest_validation_loss(self) -> float:
        """The lowest validation loss of a step that was kept as the best; infinite without one."""
        best = best_step(self.folder)
        if best is None or not best.is_dir():  # it was damaged and set aside
            return math.inf
        return read_best(self.folder)["val_loss"]

    def mark_best(self, step: int, val_loss: float) -> None:
        """Name this step, which is saved, the best one so far: pruning spares it."""
        self.wait_for_commit()
        content = json.dumps({"step": step, "val_loss": val_loss}) + "\n"
        write_file(self.folder / "best.json", content.encode())


# ---------------------------------------------------------------------------------- committing


def commit_checkpoint(
    run: Path,
    model: GPT,
    encoding: tiktoken.Encoding,
    optimizer_tensors: dict[str, torch.Tensor],
    state: dict,
    keep: int,
) -> Path:
    """Write `run/step_%06d` as the head of this file says, then remove what need not be kept."""
    step = state["step"]
    target = run / f"step_{step:06d}"
    temporary = run / f".step_{step:06d}.tmp"
    remove(temporary)
    temporary.mkdir()  # fails if somebody has put something there meanwhile
    write_checkpoint_files(temporary, model, encoding, optimizer_tensors, state)
    remove(target)  # only ever a damaged one: from a valid one the run would have gone on
    os.rename(temporary, target)
    sync(run)
    prune(run, keep)
    return target


def write_checkpoint_files(
    folder: Path,
    model: GPT,
    encoding: tiktoken.Encoding,
    optimizer_tensors: dict[str, torch.Tensor],
    state: dict,
) -> None:
    """Every file of a checkpoint, on disk; manifest.json last."""
    file = folder / "model.safetensors"
    try:
        model.save_pretrained(
            folder,
            encoding=encoding.name,
            bos_token_id=encoding.eot_token,
            eos_token_id=encoding.eot_token,
        )
        save_tokenizer(encoding, folder, model.config.block_size)
        file = folder / "optimizer.safetensors"
        save_file(optimizer_tensors, file)
    except SafetensorError as error:  # it is raised for a full disk too, and names no file
        raise OSError(f"{file}: {error}") from None
    write_file(folder / "state.json", (json.dumps(state, indent=2) + "\n").encode())
    mode = (folder / "state.json").stat().st_mode & 0o777  # as the user's umask wants it
    files = {}
    for file in sorted(folder.iterdir()):
        set_mode(file, mode)  # safetensors makes its files readable for their owner alone
        sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_file(folder / "manifest.json", (json.dumps({"files": files}, indent=2) + "\n").encode())
    sync(folder)


def cpu_copy(model: GPT) -> GPT:
    """A copy of the model on the CPU that later updates do not touch."""
    with torch.device("meta"):
        copy = GPT(model.config)
    weights = {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
    }
    copy.load_state_dict(weights, assign=True)
    return copy


def check_finite(place: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raise UserError where a tensor holds NaN or Inf: a ruined model is never saved or used."""
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            raise UserError(
                f"{place}: {name} holds NaN or Inf; expected finite weights and moments; continue "
                "from an earlier checkpoint with a lower learning rate"
            )


# ----------------------------------------------------------------------------------- verifying


def fault_of(folder: Path, names: tuple[str, ...] | None = None) -> str | None:
    """What is wrong with a checkpoint, or None when it is as its manifest says.

    names: look at these files only, as reading a model does without its optimizer.
    """
    try:
        files = read_json(folder / "manifest.json", MANIFEST)["files"]
        missing = [name for name in names or (*MODEL_FILES, "state.json") if name not in files]
        if missing:
            return f"manifest.json does not list {missing[0]}"
        for name in names or files:
            if not plain_name(name):
                return f"manifest.json lists {name!r}, which is not a plain file name"
            if not is_regular(folder / name):
                return f"{name} is missing or not a regular file"
            entry = files[name]
            size = (folder / name).stat().st_size
            if size != entry["size"] or file_sha256(folder / name) != entry["sha256"]:
                return f"{name} is damaged"
    except UserError as error:
        return str(error).partition(";")[0]
    except OSError as error:
        return f"{os.path.basename(error.filename or '')} cannot be read ({error.strerror})"
    return None


def is_regular(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def newest_valid(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies and loads; newer ones that do not are reported."""
    for folder in reversed(step_directories(run)):
        fault = fault_of(folder) or fault_in_tensors(folder)
        if fault is None:
            return folder
        warn(f"warning: {folder}: {fault}; using an earlier checkpoint")
    return None


def fault_in_tensors(folder: Path) -> str | None:
    """What keeps a checkpoint whose files are whole from being continued, or None."""
    try:
        read_state(folder)
        GPT.from_pretrained(folder)
        check_finite("optimizer.safetensors", read_optimizer_tensors(folder))
    except (UserError, OSError) as error:
        return str(error).partition(";")[0]
    return None


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint."""
    file = folder / "state.json"
    state = read_json(file, STATE)
    if state["schema"] != SCHEMA:
        raise UserError(
            f"{file}: schema {state['schema']}; expected schema {SCHEMA}; use the version of this "
            "program that wrote it"
        )
    if state["step"] != step_number(folder):
        raise UserError(
            f"{file}: step {state['step']}; expected the step in the directory's name, "
            f"{folder.name}; use another checkpoint"
        )
    spikes = state.get("spikes", {"losses": [], "left_out": 0})
    if not 0 <= spikes["left_out"] <= state["step"]:
        raise UserError(
            f"{file}: {spikes['left_out']} updates left out; expected at most as many as steps, "
            f"{state['step']}; use another checkpoint"
        )
    if any(abs(loss) > torch.finfo(torch.float32).max for loss in spikes["losses"]):
        raise UserError(
            f"{file}: a loss of {max(spikes['losses'], key=abs)}; expected float32 numbers; use "
            "another checkpoint"
        )
    return state


def read_optimizer_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """optimizer.safetensors of a checkpoint."""
    file = folder / "optimizer.safetensors"
    if not file.exists():
        raise UserError(
            f"{file}: not there; expected the optimizer's state beside the weights; start a new "
            "run from these weights instead of continuing the old one"
        )
    check_optimizer_header(file, read_config(folder))
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(
            f"{file}: {error}; expected a safetensors file; use another checkpoint"
        ) from None


def check_optimizer_header(file: Path, config: GPTConfig) -> None:
    """Refuse tensors that are no optimizer's state of such a model, before one of them is read."""
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    kinds = set(itertools.chain(*STATE_OF.values()))
    for name, entry in read_header(file).items():
        if name == "__metadata__":
            continue
        parameter, _, kind = name.rpartition(".")
        found = (entry["dtype"], entry["shape"])
        if kind not in kinds or found != ("F32", shapes.get(parameter)):
            raise UserError(
                f"{file}: {name[:200]!r} is {entry['dtype']} of shape {entry['shape'][:9]}; "
                "expected the moments of the model's parameters, as F32; use another checkpoint"
            )


def check_train_json(run: Path, checkpoint: Path) -> None:
    """Refuse a configuration that was edited after the checkpoint was saved."""
    if file_sha256(run / "train.json") != read_state(checkpoint)["train_json"]:
        raise UserError(
            f"{run / 'train.json'}: changed since {checkpoint.name} was saved; expected the "
            "configuration that the checkpoint was trained with; restore it, or start a new run "
            "from the checkpoint's weights"
        )


# ------------------------------------------------------------------------------------- finding


def step_directories(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, valid or not. A link is none of them."""
    folders = []
    for path in run.glob("step_*"):
        if path.name[5:].isdecimal() and path.is_dir() and not path.is_symlink():
            folders.append(path)
    return sorted(folders, key=step_number)


def step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_best(run: Path) -> dict | None:
    """best.json, or None where the run has none."""
    file = run / "best.json"
    return read_json(file, BEST) if file.exists() else None


def best_step(run: Path) -> Path | None:
    """The checkpoint that best.json names, or None where the run has none."""
    best = read_best(run)
    return run / f"step_{best['step']:06d}" if best else None


def refuse_inside_checkpoint(folder: Path) -> None:
    """A run inside a checkpoint would be deleted with it, or would change what it holds."""
    place = Path(os.path.realpath(folder))  # Path.resolve fails where links form a circle
    for parent in (place, *place.parents):
        if (parent / "manifest.json").exists() and (parent / "state.json").exists():
            raise UserError(
                f"{folder}: inside the checkpoint {parent}; expected a directory of its own for "
                "the run; choose another --out"
            )


def is_run(folder: Path) -> bool:
    return (folder / "train.json").exists()


def was_begun_by_this_job(folder: Path) -> bool:
    """Whether the processes of this torchrun command have begun the run, before a restart."""
    if not is_run(folder):
        return False
    started = read_json(folder / "train.json", {}).get("started")
    return isinstance(started, dict) and started.get("job") == job_name()


def newest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` with a checkpoint that was started or resumed last."""
    runs = [run for run in root.glob("*/") if is_run(run) and step_directories(run)]
    if not runs:
        raise UserError(
            f"{root}: no run with a checkpoint; expected a training run; train one with "
            "train_gpt2.py, or name a model with --model"
        )

    def last_written(run: Path) -> float:
        log = run / "log.jsonl"
        return log.stat().st_mtime if log.exists() else 0.0

    return max(runs, key=last_written)


def resolve_model(name: str | None, warn: Callable[[str], None] = print) -> str:
    """The hub name or the directory with a model that `name` stands for.

    A run directory stands for its best checkpoint if it keeps one, else for its newest valid one;
    None for the newest run under runs/. A checkpoint is verified; other names are left as they are.
    """
    place = Path(name) if name else newest_run()
    # Below runs/ nothing is looked up on the hub. A folder without any .json never became a run.
    is_there = place.is_file() or any(place.glob("*.json"))
    if is_run(place.parent) and not is_there:
        steps = [folder.name for folder in step_directories(place.parent)]
        expected = f"one of {', '.join(steps)}" if steps else "a run that has saved one"
        raise UserError(
            f"{place}: no such checkpoint; expected {expected}; check the name, or name the run "
            "alone"
        )
    if place.parts[:1] == ("runs",) and not is_there:
        runs = sorted(str(run) for run in Path("runs").glob("*") if is_run(run))
        expected = f"one of {', '.join(runs)}" if runs else "a run that train_gpt2.py has made"
        raise UserError(f"{place}: no such run; expected {expected}; check the name")
    if is_run(place):
        return str(checkpoint_to_load(place, warn))
    if (place / "manifest.json").exists():
        fault = fault_of(place, MODEL_FILES)
        if fault:
            raise UserError(
                f"{place}: {fault}; expected the files that its manifest.json lists; use another "
                "checkpoint of the run"
            )
    return str(place)


def checkpoint_to_load(run: Path, warn: Callable[[str], None]) -> Path:
    """The best checkpoint of a run if it keeps one, else the newest whose model is whole."""
    candidates = list(reversed(step_directories(run)))
    best = best_step(run)
    if best is not None and not best.is_symlink():
        candidates.insert(0, best)
    for folder in candidates:
        fault = fault_of(folder, MODEL_FILES)
        if fault is None:
            return folder
        warn(f"warning: {folder}: {fault}; using another checkpoint")
    raise UserError(
        f"{run}: no valid checkpoint; expected at least one step directory; train it further with "
        "train_gpt2.py --resume"
    )


def load_model(
    name: str | None, warn: Callable[[str], None] = print, dropout: float = 0.0
) -> tuple[GPT, tiktoken.Encoding, str]:
    """The model that `name` stands for (see `resolve_model`), its encoding, and what was picked."""
    picked = resolve_model(name, warn)
    model = GPT.from_pretrained(picked, dropout)
    return model, encoding_of(model.config, picked), picked


def describe_model(name: str) -> tuple[GPTConfig, str]:
    """Shape and encoding of the model that `name` stands for; its weights are not read."""
    picked = resolve_model(name, lambda line: None)
    config = read_config(picked)
    return config, encoding_of(config, picked).name


def encoding_of(config: GPTConfig, picked: str) -> tiktoken.Encoding:
    """The encoding that a model reads: named by its config.json, else known by its vocabulary."""
    file = Path(picked, "config.json")
    name = None
    if file.is_file():
        name = read_json(file, {"encoding?": (str, type(None))}).get("encoding")
    if name is not None and name not in ENCODINGS:
        raise UserError(
            f"{file}: encoding {name[:80]!r}; expected one of {', '.join(ENCODINGS)}; use a model "
            "that reads one of them"
        )
    encoding = encoding_for(config.vocab_size, name, picked)
    if Path(picked).is_dir():
        check_tokenizer(Path(picked), encoding)
    return encoding


# ------------------------------------------------------------------------------------- tidying


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; never the best one.

    It is called right after a checkpoint was committed, and damaged ones are set aside when a run
    is resumed, so at least one valid checkpoint always stays. One that cannot be removed, as on NFS
    while somebody reads it, is a warning; the next call tries again.
    """
    best = best_step(run)
    for folder in step_directories(run)[:-keep]:
        if folder == best:
            continue
        try:
            (folder / "manifest.json").unlink(missing_ok=True)  # half-removed, it is never valid
            remove(folder)
        except OSError as error:
            say(f"warning: {error.filename}: not removed ({error.strerror}); training goes on")


def remove_if_unused(folder: Path) -> None:
    """Remove a directory in which no run was begun, as by a start that found no data."""
    locks = {".lock", ".lock-holder"}
    with contextlib.suppress(OSError):
        if set(os.listdir(folder)) <= locks:
            shutil.rmtree(folder)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it counts no more and a person can look at it."""
    target = folder.with_name(f"damaged_{folder.name}")
    remove(target)
    folder.rename(target)


# ----------------------------------------------------------------------------------- log, begin


def append(file: Path, line: str, flush_to_disk: bool) -> None:
    """Add a line to a file. An OSError names the file, which a full disk does not do by itself."""
    try:
        with open(file, "a", encoding="utf-8", opener=without_following_links) as f:
            f.write(line)
            f.flush()
            if flush_to_disk:
                os.fsync(f.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def without_following_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def read_log(run: Path) -> Iterator[tuple[bytes, dict | None]]:
    """The lines of log.jsonl, each with the entry that it is, or None where it is not one."""
    file = run / "log.jsonl"
    if not file.exists():
        return
    for line in read_lines(file):
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            entry = None
        yield line, entry if is_entry(entry) else None


def is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("event"), str)
        and type(entry.get("step")) is int
    )


def cut_log(run: Path, step: int, warn: Callable[[str], None]) -> None:
    """Cut log.jsonl back to `step`, and drop lines that a crash has torn."""
    file = run / "log.jsonl"
    damaged = 0
    kept = []
    for line, entry in read_log(run):
        if entry is None:
            damaged += 1
        elif entry["step"] <= step:
            kept.append(line + b"\n")
    if damaged:
        warn(f"warning: {file}: left out {damaged} damaged lines")
    write_file(file, b"".join(kept))


def keep_old_log(run: Path) -> None:
    """Keep the log of a run that had saved nothing, and so begins anew, under another name."""
    file = run / "log.jsonl"
    if any(entry for _, entry in read_log(run)):
        number = 1
        while os.path.lexists(run / f"log-{number}.jsonl"):
            number += 1
        file.rename(run / f"log-{number}.jsonl")
    write_file(file)


# The values of a train.json that reach outside of the run directory: to files, to the hub, to a
# service. A run or a train.json that comes from somebody else must not choose them.
REACHING_OUT = ("data", "init_from", "wandb")


def seal(config: dict) -> str | None:
    """A mark of these values that nobody else can make: it needs a key that this user keeps.

    None where no key can be kept, as where the home directory cannot be written.
    """
    key = seal_key()
    if key is None:
        return None
    values = json.dumps([config[name] for name in REACHING_OUT])
    return hmac.new(key, values.encode(), "sha256").hexdigest()


def is_sealed(file: Path) -> bool:
    """Whether these values of a train.json were written by this user, on this machine."""
    config = read_json(file, {name: (str, bool) for name in REACHING_OUT})
    started = config.get("started")
    found = started.get("seal") if isinstance(started, dict) else None
    expected = seal(config)
    return expected is not None and found == expected


def seal_key() -> bytes | None:
    """The key of this user's seals, made when it is first needed."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    file = Path(state, "pygpt2", "key")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            # With these flags the file is new, no link is followed, and nobody else can read it.
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as f:
                f.write(secrets.token_hex(32))
        key = file.read_bytes()
    except (OSError, RuntimeError):  # the latter where there is no home directory
        return None
    return key if len(key) == 64 else None


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
        "git_commit": commit,
        "code": hash_of_code(),
        "job": job_name(),
    }


def hash_of_code() -> str:
    """A hash of the code that runs: the top level and all of support/."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted([*root.glob("*.py"), *root.glob("support/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def job_name() -> str | None:
    """What the processes of one torchrun command have in common, through all their restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # torchrun's default, which every job has: its own process tells them apart
        return f"torchrun {os.getppid()} on {socket.gethostname()}"
    return name
