"""One checkpoint: what is in it, how it is committed, what makes it valid.

    config.json, model.safetensors, …     a Hugging Face GPT-2 directory, with its tokenizer
    optimizer.safetensors                 the optimizer's moments
    state.json                            step, place in the data, and what else is needed to go on
    manifest.json                         size and sha256 of all these files
    README.md                             the model card, which people may edit

How it is committed. All files are written under a temporary name and flushed to the disk, the
manifest last. Then the directory is flushed, and one rename gives it its name. A crash at any
moment leaves the whole checkpoint or none.

What makes it valid. Every file that the manifest lists has the listed size and hash, and all
weights and moments are finite.

This file knows nothing of GPT. Weights and moments are dicts of tensors, by name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from support.files import file_sha256, plain_name, read_bytes, read_json, remove, sync, write_file
from support.huggingface import (
    CARD,
    TRANSPOSED,
    read_config,
    save_model,
    save_tokenizer,
    write_model_card,
)
from support.script import UserError, require

SCHEMA = 2  # of state.json; another one is refused
WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
MODEL_FILES = ("config.json", WEIGHTS)  # what sampling and scoring read
CHECKPOINT_FILES = (*MODEL_FILES, MOMENTS, "state.json")  # what continuing a run reads

# The shapes of the JSON files; see files.read_json.
STATE = {
    "schema": int,
    "step": int,
    "elapsed": float,
    "data": str,
    "train_json": str,
    "tokens?": int,  # read up to here, as the log counts them
    "samples?": int,  # windows seen up to here; a fork goes on with the next one
    "spikes?": {"losses": [float], "left_out": int},  # see support/spikes.py
}
MANIFEST = {"files": {str: {"size": int, "sha256": str}}}

ANOTHER = "expected the files that were saved; use another checkpoint of the run"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: as its manifest says, finite, on the CPU."""

    folder: Path
    config: dict  # of config.json, as huggingface.read_config gives it
    state: dict  # of state.json
    weights_sha256: str  # of model.safetensors
    weights: dict[str, Tensor]  # by name of the parameter, linears as [out, in]
    moments: dict[str, Tensor]  # as they were given to `save`
    logged: frozenset[str] = frozenset()  # the events of this step that the log tells of

    @property
    def step(self) -> int:
        return self.state["step"]

    def without_tensors(self) -> "Checkpoint":
        """What the other ranks need to know; rank 0 sends them the tensors."""
        return replace(self, weights={}, moments={})

    def as_origin(self, samples: int) -> dict:
        """What train.json of a fork says about this checkpoint.

        samples: how many samples the run had seen.
        """
        return {
            "run": str(self.folder.parent),
            "step": self.step,
            "samples": samples,
            "weights": self.weights_sha256,
        }


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


# ------------------------------------------------------------------------------------- writing


def cpu_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which later updates do not touch."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def check_finite(place: str, tensors: dict[str, Tensor]) -> None:
    """Raise UserError where a tensor holds NaN or Inf: a ruined model is never saved or used."""
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(
                f"{place}: {name} holds NaN or Inf; expected finite weights and moments; continue "
                "from an earlier checkpoint with a lower learning rate"
            )


def commit_checkpoint(
    run: Path,
    config: dict,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    encoding: tiktoken.Encoding,
    card: dict,
    state: dict,
) -> None:
    """Write `run/step_%06d` as the head of this file says."""
    target = run / step_name(state["step"])
    temporary = run / f".{target.name}.tmp"
    remove(temporary)
    temporary.mkdir()  # fails if somebody has put something there meanwhile
    write_checkpoint_files(temporary, config, weights, moments, encoding, card, state)
    remove(target)  # only ever a damaged one: from a valid one the run would have gone on
    os.rename(temporary, target)
    sync(run)


def write_checkpoint_files(
    folder: Path,
    config: dict,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    encoding: tiktoken.Encoding,
    card: dict,
    state: dict,
) -> None:
    """Every file of a checkpoint, on disk; manifest.json last.

    config, weights: see huggingface.save_model. card: what huggingface.write_model_card is told.
    """
    save_model(folder, config, weights)
    save_tokenizer(encoding, folder, config["block_size"])
    write_model_card(folder, config, sum(t.numel() for t in weights.values()), **card)
    write_file(folder / "state.json", (json.dumps(state, indent=2) + "\n").encode())
    file = folder / MOMENTS
    try:
        save_file(moments, file)
    except SafetensorError as error:  # it is raised for a full disk too, and names no file
        raise OSError(f"{file}: {error}") from None
    shutil.copymode(folder / "state.json", file)  # safetensors lets only the owner read it
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name == CARD:
            continue  # people edit it, and a checkpoint whose card was edited is whole
        sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_file(folder / "manifest.json", (json.dumps({"files": files}, indent=2) + "\n").encode())
    sync(folder)


# ------------------------------------------------------------------------- verifying and loading


def load_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, each of its tensor files read once: hashed, loaded, checked for NaN and Inf.

    Raises UserError or OSError where it is not valid.
    """
    files = read_manifest(folder, CHECKPOINT_FILES)
    for name in files.keys() - {WEIGHTS, MOMENTS}:
        verify(folder / name, files[name])
    state = read_state(folder)
    weights = load_tensors(folder / WEIGHTS, files[WEIGHTS])
    return Checkpoint(
        folder,
        config=read_config(folder),
        state=state,
        weights_sha256=files[WEIGHTS]["sha256"],
        weights={
            name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
            for name, tensor in weights.items()
        },
        moments=load_tensors(folder / MOMENTS, files[MOMENTS]),
    )


def load_tensors(file: Path, entry: dict) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which is read once. Raises UserError like `verify`."""
    require(file_size(file) == entry["size"], f"{file}: damaged; {ANOTHER}")
    content = read_bytes(file, limit=entry["size"])
    is_whole = hashlib.sha256(content).hexdigest() == entry["sha256"]
    require(is_whole, f"{file}: damaged; {ANOTHER}")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{file}: {error}; {ANOTHER}") from None
    check_finite(str(file), tensors)
    return tensors


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint."""
    file = folder / "state.json"
    state = read_json(file, STATE)
    require(
        state["schema"] == SCHEMA,
        f"{file}: schema {state['schema']}; expected schema {SCHEMA}; use the version of this "
        "program that wrote it",
    )
    require(
        state["step"] == step_number(folder),
        f"{file}: step {state['step']}; expected the step in the directory's name, {folder.name}; "
        "use another checkpoint",
    )
    return state


def fault_of(folder: Path, names: Iterable[str] = ()) -> str | None:
    """What is wrong with the files of a checkpoint, or None; their tensors are not looked at.

    names: verify these files only, as reading a model does without its optimizer.
    """
    try:
        files = read_manifest(folder, names or CHECKPOINT_FILES)
        for name in names or files:
            verify(folder / name, files[name])
    except (UserError, OSError) as error:
        return fault_in(error)
    return None


def fault_in(error: UserError | OSError) -> str:
    """What an error says is wrong, without the remedy."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error).partition(";")[0]


def read_manifest(folder: Path, needed: Iterable[str]) -> dict[str, dict]:
    """Size and sha256 of a checkpoint's files, by name. The needed ones are among them."""
    file = folder / "manifest.json"
    files = read_json(file, MANIFEST)["files"]
    for name in needed:
        require(name in files, f"{file}: does not list {name}; {ANOTHER}")
    for name in files:
        require(plain_name(name), f"{file}: lists {name!r}, which is no plain file name; {ANOTHER}")
    return files


def verify(file: Path, entry: dict) -> None:
    """Raise UserError unless a file has the size and the hash that the manifest says."""
    is_whole = file_size(file) == entry["size"] and file_sha256(file) == entry["sha256"]
    require(is_whole, f"{file}: damaged; {ANOTHER}")


def file_size(file: Path) -> int:
    """Its size; -1 where there is none."""
    return file.stat().st_size if file.exists() else -1
