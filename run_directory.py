"""Run directories that survive a crash: commit, verify, find, prune, and load what is in them.

A run directory holds train.json (the config), log.jsonl, curves.png and one directory per saved step. A step
directory is a Hugging Face GPT-2 directory plus optimizer.safetensors, state.json and manifest.json. It is written
under a temporary name, fsynced, and renamed into place, so a directory called step_000500 is whole or damaged later;
readers trust none that its manifest does not prove.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import tiktoken
import torch
from safetensors.torch import load_file, save_file

from cli import UserError
from files import file_sha256, sync
from model import GPT
from tokens import get_encoding, save_tokenizer

SCHEMA = 1  # of state.json; a newer one is refused


def save_step(
    run: Path,
    step: int,
    model: GPT,
    encoding: tiktoken.Encoding,
    optimizer: torch.optim.AdamW,
    state: dict,
) -> Path:
    """Commit `run/step_%06d`: weights, optimizer and `state` (JSON values) after `step` updates."""
    temporary, target = run / f".step_{step:06d}.tmp", run / f"step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(
        temporary,
        encoding=encoding.name,
        bos_token_id=encoding.eot_token,
        eos_token_id=encoding.eot_token,
    )
    save_tokenizer(encoding, temporary)
    save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(
        json.dumps({"schema": SCHEMA, "step": step, **state}, indent=2) + "\n"
    )
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    for file in sorted(temporary.iterdir()):
        file.chmod(0o666 & ~umask)  # safetensors creates its files for the owner alone
        sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=2) + "\n")
    sync(temporary / "manifest.json")
    sync(temporary)
    shutil.rmtree(
        target, ignore_errors=True
    )  # only ever a damaged one: a valid one would have been resumed from
    os.rename(temporary, target)
    sync(run)
    return target


def _optimizer_tensors(model: GPT, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's two moments by parameter name; its step count is the step of the directory."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in ("exp_avg", "exp_avg_sq")
    }


def load_optimizer(folder: Path, step: int, model: GPT, optimizer: torch.optim.AdamW) -> None:
    """Put the moments saved in a step directory back into `optimizer`."""
    tensors = load_file(folder / "optimizer.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [
        names[parameter] for group in optimizer.param_groups for parameter in group["params"]
    ]
    state = {
        i: {
            "step": torch.tensor(float(step)),
            **{m: tensors[f"{name}.{m}"] for m in ("exp_avg", "exp_avg_sq")},
        }
        for i, name in enumerate(ordered)
        if f"{name}.exp_avg" in tensors
    }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def problem(folder: Path) -> str | None:
    """What is wrong with a step directory, or None when every file is as its manifest says."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, entry in files.items():
            if (folder / name).stat().st_size != entry["size"] or file_sha256(
                folder / name
            ) != entry["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    return None


def read_state(folder: Path) -> dict:
    """state.json of a valid step directory."""
    state = json.loads((folder / "state.json").read_text())
    if state["schema"] > SCHEMA:
        raise UserError(
            f"{folder}/state.json: schema {state['schema']}",
            expected=f"at most {SCHEMA}",
            remedy="use the newer version that wrote it",
        )
    return state


def steps(run: Path) -> list[Path]:
    """Step directories, oldest first, valid or not."""
    return sorted(
        (p for p in run.glob("step_*") if p.name[5:].isdecimal() and p.is_dir()),
        key=lambda p: int(p.name[5:]),
    )


def newest_valid(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest step directory that verifies; damaged newer ones are reported."""
    for folder in reversed(steps(run)):
        fault = problem(folder)
        if fault is None:
            return folder
        warn(f"warning: {folder}: {fault}; using an earlier checkpoint")
    return None


def best_step(run: Path) -> Path | None:
    """The step directory that best.json names, where the recipe keeps the best."""
    file = run / "best.json"
    return run / f"step_{json.loads(file.read_text())['step']:06d}" if file.exists() else None


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` step directories; never the best. Called right after a valid one was committed."""
    best = best_step(run)
    for folder in steps(run)[:-keep]:
        if folder != best:
            doomed = folder.rename(
                folder.with_name(f".{folder.name}.tmp")
            )  # half-removed never looks like a step
            shutil.rmtree(doomed)


def clean(run: Path) -> None:
    """Remove what a crash left half-written. Call with the run's lock held."""
    for left_over in run.glob(".*.tmp"):
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()


def is_run(folder: Path) -> bool:
    return (folder / "train.json").exists()


def newest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` that was started or resumed last."""
    runs = [p for p in root.glob("*/") if is_run(p)]
    if not runs:
        raise UserError(
            f"{root}: no runs",
            expected="a finished training run, or --model",
            remedy="train one with train_gpt2.py, or name a model",
        )
    return max(
        runs,
        key=lambda run: (
            (run / "log.jsonl").stat().st_mtime if (run / "log.jsonl").exists() else 0.0
        ),
    )


def load_model(
    name: str | None, warn: Callable[[str], None] = print, dropout: float = 0.0
) -> tuple[GPT, tiktoken.Encoding, str]:
    """Model, its encoding, and what was picked: from a hub name, any Hugging Face directory, a step directory or a
    run directory (its best step if it keeps one, else its newest valid one); None is the newest run under runs/."""
    place = newest_run() if name is None else Path(name)
    if place.parts[:1] == ("runs",) and not place.exists():  # else it would be looked up on the hub
        raise UserError(
            f"{place}: no such run",
            expected=", ".join(sorted(map(str, Path("runs").glob("*"))))
            or "a run that train_gpt2.py has made",
            remedy="check the name",
        )
    if is_run(place):
        best = best_step(place)
        if best is not None and (fault := problem(best)):
            warn(f"warning: {best}: {fault}; using the newest checkpoint")
            best = None
        place = best or newest_valid(place, warn)
        if place is None:
            raise UserError(
                f"{name or newest_run()}: no valid checkpoint",
                expected="at least one step directory",
                remedy="train it further with --resume",
            )
    elif place.is_dir() and (place / "manifest.json").exists() and (fault := problem(place)):
        raise UserError(
            f"{place}: {fault}",
            expected="the files its manifest.json lists",
            remedy="use another step of the run",
        )
    picked = str(place)
    model = GPT.from_pretrained(picked, dropout)
    return model, encoding_of(model, picked), picked


def encoding_of(model: GPT, picked: str) -> tiktoken.Encoding:
    """The encoding a model was trained with, told by the size of its vocabulary."""
    for name, size in (("bytes", 257), ("gpt2", 50257)):
        if model.config.vocab_size == size:
            return get_encoding(name)
    raise UserError(
        f"{picked}: a vocabulary of {model.config.vocab_size:,} tokens",
        expected="257 (bytes) or 50257 (gpt2)",
        remedy="use a model with GPT-2's vocabulary",
    )
