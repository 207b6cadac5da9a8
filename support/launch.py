"""Which configuration a command line means, and which directory its run is kept in.

All values come from one source, and flags replace single ones. The source is
    with --resume   the train.json of the run in --out, if there is one,
    with --fork     the train.json of that run,
    with --config   that file,
    else            a recipe, with the shape of the model that --init-from names, if it is given.

The configuration's class and the recipes are the caller's. Every field of the class is a flag.
"""

import argparse
import dataclasses
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from support import plan, run_directory
from support.files import read_json, same_folder
from support.mixture import parse_data
from support.ranks import check_tree, require_named_run
from support.run_directory import Checkpoint, RunDirectory
from support.runtime import Runtime
from support.script import UserError, parse_flags, require
from support.shards import holds_tokens, listed

# Flags whose value may change when a run is continued. A changed value of any other flag is
# refused: it would change what is learned, what validations compare, or which checkpoint is the
# best. The path of the data may change, since the data are known by their fingerprint.
FREE_ON_RESUME = {
    "out",
    "resume",
    "config",
    "data",
    "device",
    "micro_batch",
    "compile",
    "wandb",
    "tensorboard",
    "eval_every",
    "hellaswag_every",
    "sample_every",
    "save_every",
    "keep",
    "eval_only",
    "dry_run",
}

# What a fork takes over with the weights and moments, so that it cannot be another.
FIXED_IN_FORK = ("n_layer", "n_head", "n_embd", "seq_len", "tokenizer", "optimizer")

# Where a run is kept, and whether one is trained at all, is never taken from a file.
NEVER_FROM_FILE = {
    "out": "",
    "resume": False,
    "config": "",
    "eval_only": False,
    "dry_run": False,
}

# What every version has written into train.json; older ones one path of data.
ALWAYS_THERE = {"recipe": str, "data": (str, list)}
# Values that older versions have written, and that decide nothing any more.
GONE = {"gpus", "gpu"}


def flag(name: str) -> str:
    """How the command line spells a field."""
    return f"--{name.replace('_', '-')}"


def as_flag(name: str, value: Any) -> list[str]:
    """A field's value as it is typed."""
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    values = value if isinstance(value, tuple) else (value,)
    return [flag(name), *map(str, values)]


def configuration(
    config_class: type, recipes: dict[str, Any], description: str, args: list[str]
) -> tuple[Any, list[str]]:
    """The configuration of a command line, and lines that say where it comes from."""
    source = source_flags(args)
    require_named_run(source.out, source.resume)
    if source.resume and source.out and run_directory.is_run(Path(source.out)):
        return continued(config_class, Path(source.out), description, args)
    recipe, why = choose_recipe(config_class, source, recipes)
    out = source.out
    if source.resume:
        out = str(run_to_continue(source, recipe))
        if run_directory.is_run(Path(out)):
            return continued(config_class, Path(out), description, args)
        why += f"; there is no run in {out} yet, so it is started"
    if source.fork:
        return forked(config_class, source, recipe, out, description, args)
    asks_for_help = "-h" in args or "--help" in args  # which must not fetch a model
    if source.config:
        file = train_json(source.config)
        defaults = replace(read_train_json(config_class, file), fork="")
        lines = [f"with the values of {file}"]
        lines += newer_flags(config_class, file) + what_it_names(defaults)
    elif source.init_from and not asks_for_help:
        defaults = shaped_like(recipes[recipe], source.init_from)
        why += f"; for a model of this size --learning-rate is {defaults.learning_rate:g}"
        lines = [f"recipe {recipe}, {why} by default"]
    else:
        defaults = recipes[recipe]
        lines = [f"recipe {recipe}, {why}"]
    if source.eval_only:  # as many as published figures are measured on
        defaults = replace(defaults, eval_tokens=config_class.eval_tokens)
    defaults = replace(defaults, recipe=recipe, out=out)
    return parse_flags(config_class, defaults, description, args), lines


def source_flags(args: list[str]) -> argparse.Namespace:
    """The flags that say where the other values come from.

    They are looked at first, without any check, because tyro needs the default of every flag before
    it reads the command line. It reads and checks these again, with all the others.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--out", "--config", "--fork"):
        parser.add_argument(name, nargs="?", default="")
    parser.add_argument("--init-from", "--init_from", nargs="?", default="")
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--eval-only", "--eval_only", action="store_true")
    return parser.parse_known_args(args)[0]


def choose_recipe(
    config_class: type, source: argparse.Namespace, recipes: dict[str, Any]
) -> tuple[str, str]:
    """The recipe, and why: as asked, or what the other flags and the data that are here suggest."""
    if source.recipe:
        require(
            source.recipe in recipes,
            f"--recipe {source.recipe}; expected one of {', '.join(recipes)}; choose one of them",
        )
        return source.recipe, "as asked"
    if source.config or source.fork:
        file = train_json(source.config or source.fork)
        return read_train_json(config_class, file).recipe, f"that of {file}"
    if source.init_from:
        return "finetune", "because --init-from is given"
    (corpus,) = recipes["gpt2"].data
    is_asked_for = not source.data or all(same_folder(path, corpus) for path in source.data)
    if is_asked_for and holds_tokens(corpus):
        return "gpt2", f"because {corpus}/ is here"
    if source.data:
        return "first-run", f"on {' '.join(source.data)}"
    return (
        "first-run",
        f"because there are no token shards in {corpus}/ (fineweb.py makes them)",
    )


# ------------------------------------------------------------------------------ a run as the source


def train_json(run: str) -> Path:
    """The train.json of a run, of one of its checkpoints, or the file itself."""
    place = Path(run)
    if place.is_file():
        return place
    if not run_directory.is_run(place) and run_directory.is_run(place.parent):
        place = place.parent
    run_directory.refuse_missing(place)
    require(
        run_directory.is_run(place),
        f"{run}: no train.json is there, so it is not a run; expected a run or one of its "
        f"checkpoints; check the path, or take a model's weights alone with --init-from {run}",
    )
    return place / "train.json"


def read_train_json(config_class: type, file: Path) -> Any:
    """A saved configuration. A flag that is newer than the file has its default."""
    shape = dict(ALWAYS_THERE)
    for field in dataclasses.fields(config_class):
        kind = type(field.default)
        if field.name not in shape:
            shape[f"{field.name}?"] = list if kind is tuple else kind
    values = read_json(file, shape)
    for name in {"started", "origin"} | GONE:
        values.pop(name, None)
    unknown = values.keys() - {field.name for field in dataclasses.fields(config_class)}
    require(
        not unknown,
        f"{file}: has a value {min(unknown, default='')!r}; expected the flags that this code has; "
        "use the code that wrote it, or remove it from a copy, which --config takes",
    )
    data = values["data"]
    values["data"] = [data] if isinstance(data, str) else list(map(str, data))
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return config_class(**(values | NEVER_FROM_FILE))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def newer_flags(config_class: type, file: Path) -> list[str]:
    """A line for each flag that there was not yet when a train.json was written."""
    saved = read_json(file, {})
    fields = [field for field in dataclasses.fields(config_class) if field.name not in saved]
    return [f"{file} has no {field.name}, which is newer: {field.default!r}" for field in fields]


def what_it_names(config: Any) -> list[str]:
    """What a configuration from a file reaches outside of its run."""
    lines = [f"data           {' '.join(config.data)}"]
    if config.init_from:
        lines.append(f"init from      {config.init_from}")
    if config.wandb:
        lines.append("sent to        Weights & Biases")
    return lines


def run_to_continue(source: argparse.Namespace, recipe: str) -> Path:
    """--out, or without it the newest of runs/<recipe>, runs/<recipe>-2, …"""
    if source.out:
        return Path(source.out)
    newest = Path("runs", recipe)
    for folder in run_directory.directories_to_try("", recipe):
        if not run_directory.is_run(folder):
            return newest
        newest = folder
    return newest


def continued(
    config_class: type, folder: Path, description: str, args: list[str]
) -> tuple[Any, list[str]]:
    """The configuration of a run that is continued, with the flags that may change."""
    file = folder / "train.json"
    saved = replace(read_train_json(config_class, file), out=str(folder), resume=True)
    config = parse_flags(config_class, saved, description, args)
    names = changes(saved, config, FREE_ON_RESUME)
    if names:
        is_fixed = set(names).intersection(FIXED_IN_FORK)
        source_of_new = ["--config", str(folder), "--init-from"] if is_fixed else ["--fork"]
        command = ["python", "train_gpt2.py", *source_of_new, str(folder)]
        for name in names:
            command += as_flag(name, getattr(config, name))
        raise UserError(
            f"{', '.join(flag(name) for name in names)}: cannot change in a run that is continued; "
            f"expected the values of {file}; begin a new run from this one with: "
            f"{shlex.join(command)}"
        )
    why = f"continuing {folder}"
    if not run_directory.step_directories(folder):
        why = f"{folder} holds no checkpoint, so it begins where it began before"
    return config, [why, *newer_flags(config_class, file), *what_it_names(config)]


def forked(
    config_class: type,
    source: argparse.Namespace,
    recipe: str,
    out: str,
    description: str,
    args: list[str],
) -> tuple[Any, list[str]]:
    """The configuration of a new run that begins at another one's checkpoint."""
    require(
        not (source.config or source.init_from),
        f"--fork {source.fork} with --config or --init-from; expected one of them, since a fork "
        "takes its values and its weights from that run; leave out the others",
    )
    file = train_json(source.fork)
    saved = replace(read_train_json(config_class, file), fork="", init_from="")
    defaults = replace(saved, fork=source.fork, out=out, recipe=recipe)
    config = parse_flags(config_class, defaults, description, args)
    fixed = [name for name in FIXED_IN_FORK if getattr(saved, name) != getattr(config, name)]
    require(
        not fixed,
        f"{', '.join(map(flag, fixed))}: cannot change in a fork, which takes over weights and "
        f"moments; expected the values of {file}; start from its weights alone with "
        f"--config {source.fork} --init-from {source.fork} in place of --fork",
    )
    lines = [f"a fork of {source.fork}, with the values of {file}"]
    lines += newer_flags(config_class, file) + what_it_names(config)
    for name in changes(saved, config, {"fork", "out", "resume", "recipe"}):
        lines.append(f"  {name:<20} {words(getattr(saved, name))} → {words(getattr(config, name))}")
    return config, lines


def changes(old: Any, new: Any, left_out: set[str]) -> list[str]:
    """Names of the fields that differ."""
    names = [field.name for field in dataclasses.fields(old) if field.name not in left_out]
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def words(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return " ".join(value) if isinstance(value, tuple) else str(value)


# -------------------------------------------------------------------------- a model as the source


def shaped_like(defaults: Any, name: str) -> Any:
    """The recipe with the shape and the encoding of the model to start from.

    Fine-tuning takes a larger learning rate for a smaller model: 3e-5 at 124M parameters, 1e-3 at
    the first run's 0.84M and below, and in between by the power law through these two, which were
    tried.
    """
    model, encoding = run_directory.describe_model(name)
    if defaults.recipe == "finetune":
        rate = defaults.learning_rate * (plan.parameters(model) / 124_439_808) ** -0.7
        rate = min(1e-3, float(f"{rate:.1g}"))
        defaults = replace(defaults, learning_rate=rate, min_lr=rate / 2)
    return replace(
        defaults,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        seq_len=min(defaults.seq_len, model.block_size),
        tokenizer=encoding,
    )


def check_fits(config: Any, sizes: Any, encoding: str, encoding_of_data: str, picked: str) -> None:
    """Refuse weights, those of `picked`, of another shape or encoding than flags and data have."""
    for name in ("n_layer", "n_head", "n_embd"):
        found, asked = getattr(sizes, name), getattr(config, name)
        require(
            found == asked,
            f"{flag(name)} {asked}; expected {found} as in {picked}; drop the flag",
        )
    require(
        config.seq_len <= sizes.block_size,
        f"--seq-len {config.seq_len}; expected at most {sizes.block_size}, the positions that "
        f"{picked} has learned; lower it",
    )
    require(
        encoding == encoding_of_data,
        f"--data {' '.join(config.data)}: tokens of the encoding {encoding_of_data}; expected "
        f"{encoding}, which {picked} reads; prepare it with --tokenizer {encoding}",
    )


# --------------------------------------------------------------------------------- where it goes on


def saved_values(config: Any) -> dict:
    """What train.json says: all but where the values come from, and where the run is kept."""
    return asdict(replace(config, out="", resume=False, config=""))


def check_agreement(config: Any, rt: Runtime) -> None:
    """Refuse ranks that were started with other flags, on other code, or with another torch."""
    values = {flag(name): value for name, value in asdict(replace(config, out="")).items()}
    values |= {"the code": run_directory.hash_of_code(), "torch": torch.__version__}
    values |= {"kind of device": rt.device.type, "precision": str(rt.dtype)}
    rt.same_on_all(values, "the same flags, train.json and code on every rank")


def next_sample(
    found: Checkpoint, config: Any, fingerprint: str, run: RunDirectory, rt: Runtime
) -> int:
    """The sample that a run reads next which goes on from a checkpoint, its own or another run's.

    A fork reads other data from their first sample. A run that is continued must have the same.
    """
    same_data = found.state["data"] == fingerprint
    if found.folder.parent == run.folder and not same_data:
        rt.raise_on_all(
            UserError(
                f"the data are not those that {found.folder} was trained on; expected the same "
                "shards, wherever they lie; restore them, name their place with --data, or go on "
                f"with others in a new run: --fork {run.folder}"
            )
        )
    require(
        found.step <= config.max_steps,
        f"--max-steps {config.max_steps}; expected at least {found.step}, the step of "
        f"{found.folder}; raise it, or fork an earlier step",
    )
    if not same_data:
        return 0
    return found.state.get("samples", found.step * config.sequences_per_step)


def encoding_of_data(config: Any) -> str:
    """What --data holds, as far as it is known before text is tokenised."""
    for paths, _ in parse_data(config.data):
        for path in paths:
            if holds_tokens(path):
                encoding, _ = listed(Path(path))
                return encoding
    return config.tokenizer


def check_batch(config: Any, world_size: int) -> None:
    """Refuse a batch that does not divide among ranks and micro-batches; name sizes that do."""
    sequences = config.sequences_per_step
    per_rank = sequences // world_size
    if sequences % (config.micro_batch * world_size) == 0:
        if config.deterministic:
            check_tree(per_rank // config.micro_batch, world_size)
        return
    expected = f"a multiple of {world_size * config.seq_len:,} tokens a batch"
    if sequences % world_size == 0:
        sizes = [str(n) for n in range(1, min(per_rank, 1024) + 1) if per_rank % n == 0]
        expected = f"--micro-batch one of {', '.join(sizes)}"
    raise UserError(
        f"--micro-batch {config.micro_batch} on {world_size} rank(s) with --total-batch-tokens "
        f"{config.total_batch_tokens:,}, which is {sequences} sequences of {config.seq_len}; "
        f"expected {expected}; change --micro-batch or --total-batch-tokens"
    )
