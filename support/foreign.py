"""Token files that other programs have made, datatrove above all.

Nothing lists such files. Whether a directory holds all of a corpus, and each part of it once, can
only be told from their names and from what lies beside them. tokens.py opens the files themselves.
"""

import os
import re
from pathlib import Path
from typing import NoReturn

from support.files import open_descriptor, open_file, read_json
from support.script import UserError

SUFFIXES = (".bin", ".npy", ".ds")  # of token files: llm.c and ours, build-nanogpt, datatrove

# ---------------------------------------------------------------------------------- datatrove's .ds

# The last part of the name of GPT-2's tokenizer: openai-community/gpt2-xl is gpt2's too.
GPT2_NAME = re.compile(r"(.*/)?(distil)?gpt2(-medium|-large|-xl)?", re.IGNORECASE)


def ds_count(path: Path, size: int) -> int:
    """Number of the tokens of datatrove's .ds, which has no header.

    The .metadata that datatrove writes beside it says which tokenizer it was, how many bytes a
    token has, and the number. Without it the .index does: its last entry is where the last document
    ends. Files of another program have neither.
    """
    # A link could lead to any file, and without a header any file passes for tokens.
    if os.path.islink(path):
        raise UserError(
            f"{path}: a symbolic link; expected the file itself; copy it here, or name the folder "
            "that it is in"
        )
    metadata = f"{path}.metadata"
    if os.path.exists(metadata):
        return _count_in_metadata(metadata)
    index = Path(f"{path}.index")
    if index.exists():
        with open_file(index) as f:
            length = f.seek(0, os.SEEK_END)
            f.seek(max(0, length - 8))
            return int.from_bytes(f.read(8), "little")
    if size == 0 or path.name.endswith("unshuffled.ds"):
        raise UserError(
            f"{path}: {size:,} bytes, and neither .index nor .metadata; expected what a task of "
            "datatrove writes beside its tokens when it has finished; run the pipeline again, "
            "with save_final_metadata, or copy all of its files"
        )
    return size // 2


def _count_in_metadata(file: str | Path) -> int:
    """The number of tokens in datatrove's .metadata; they must be GPT-2's, of two bytes.

    The tokenizer is known by its name on the hub. A file or folder of this machine may have any
    name, and datatrove writes "Unknown Tokenizer" where it was told none.
    """
    descriptor = open_descriptor(file)
    try:
        lines = os.read(descriptor, 2**12).decode(errors="replace").splitlines()
    finally:
        os.close(descriptor)
    if len(lines) < 2 or not lines[0].endswith("|2") or not re.fullmatch("[0-9]{1,15}", lines[1]):
        raise UserError(
            f"{file}: {[line[:80] for line in lines[:2]]}; expected <tokenizer>|2, for tokens of 2 "
            "bytes, and their number; tokenise with gpt2, or remove the file if it is not of "
            "datatrove"
        )
    name = lines[0].partition("|")[0]
    is_local = name.startswith((".", "/", "~")) or name.endswith(".json") or "\\" in name
    if not (GPT2_NAME.fullmatch(name) or is_local or name == "Unknown Tokenizer"):
        raise UserError(
            f"{file}: the tokenizer {name[:80]!r}; expected gpt2; tokenise with gpt2; if this one "
            "has the same tokens, call it gpt2 in this file"
        )
    return int(lines[1])


# ---------------------------------------------------------------------------------- names

# What datatrove's tasks write: `fw_00003_00000_doc_shuffled.ds` is part 0 of task 3, here with the
# prefix fw. Its merger writes `000_fw.ds`, `001_fw.ds`, … and `fw.ds.metadata` with their total.
TASK_FILE = re.compile(r"(?:(.+?)_)??(\d{5,})_(?:(\d{5,})_)?(un|doc_|chunk_|)shuffled\.ds")
MERGED_FILE = re.compile(r"(\d{3,})_(.+\.ds)")
STAGES = {"un": 0, "doc_": 1, "": 1, "chunk_": 2}  # in the order in which a task writes them

PIPELINE = "run the datatrove pipeline again: it does what is missing"
COPY = "finish the copy, or remove what is not of this corpus"


def check_names(folder: Path, names: list[str], present: set[str]) -> None:
    """Refuse a directory whose names do not tell that each of its token files is there once.

    There must be no copy that is under way, no gap in their numbers, and of datatrove's files those
    of one stage. names: the token files in order; present: all files.
    """
    _check_formats(folder, names, present)
    _check_numbers(folder, names)
    _check_datatrove(folder, [name for name in names if name.endswith(".ds")], present)
    _check_completions(folder, present)


def _refuse(place: Path, found: str, expected: str, remedy: str) -> NoReturn:
    raise UserError(f"{place}: {found}; expected {expected}; {remedy}")


def _check_formats(folder: Path, names: list[str], present: set[str]) -> None:
    """Refuse files of several formats, and a file that belongs to a token file that is not there.

    That is a .metadata, or what a copy has left: `.00003_a.ds.Xy12`, `a.bin.part`, `a.npy.gz`.
    """
    for name in sorted(present.difference(names)):
        if name.lower().endswith(SUFFIXES) and not name.startswith("."):
            _refuse(folder / name, "an ending in capitals", "one in small letters", "rename it")
        owner = name.rpartition(".")[0]
        if owner in present:
            continue
        match = re.fullmatch(r"(?:\._|\.)?(.+?\.(?:bin|npy|ds))(?:\..+)?", name)
        if match and match[1] not in present and not _merged_names(match[1], names):
            _refuse(folder / name, f"there is no {match[1]}", "that file beside it", COPY)
    first_of = {name.rpartition(".")[2]: name for name in reversed(names)}
    if len(first_of) > 1:
        _refuse(
            folder,
            f"token files of several formats ({', '.join(sorted(first_of.values()))})",
            "one format, since two may hold the same tokens",
            "put each into a folder of its own",
        )


def _merged_names(total: str, names: list[str]) -> list[str]:
    """The files of datatrove's merger whose common name is `total`."""
    return [name for name in names if (m := MERGED_FILE.fullmatch(name)) and m[2] == total]


def _first_gap(numbers: set[int], start: int = 0) -> int | None:
    """The first number from `start` on that is missing before the largest one."""
    return next((n for n in range(start, max(numbers)) if n not in numbers), None)


def _check_numbers(folder: Path, names: list[str]) -> None:
    """Refuse a gap in `fineweb_val_000000.bin`, `fineweb_train_000001.bin`, …

    The splits share one count there. It begins with 0 or 1: larger numbers are dates, or a part of
    a corpus that somebody has chosen.
    """
    series = {}
    for name in names:
        stem = re.sub(r"(^|[_.-])(train|val[a-z]*)(?=[_.-])", "", name.rpartition(".")[0])
        if match := re.fullmatch(r"(.*?)(\d{1,9})", stem):
            series.setdefault(match[1], {})[int(match[2])] = name
    for numbered in series.values():
        start = min(numbered)
        gap = _first_gap(set(numbered), start) if start <= 1 else None
        if gap is not None:
            last = folder / numbered[max(numbered)]
            remedy = "finish the copy, or number the files without a gap"
            _refuse(last, f"number {gap} before it is missing", "all of them", remedy)


def _check_datatrove(folder: Path, names: list[str], present: set[str]) -> None:
    """Refuse a directory that datatrove has not finished, as far as its names tell.

    A task first writes `00003_unshuffled.ds`, then its index, then its metadata. If documents are
    shuffled, it next writes the same tokens as `00003_00000_doc_shuffled.ds`, and then removes the
    unshuffled file if that is not empty. Chunks are shuffled in the same way after that. So these
    signs are looked for:

    1. a file has no index or no metadata while other files have them;
    2. a file that is not empty is of an earlier stage than others;
    3. the number of a task, or of a part of a task, is missing before others.

    A task missing after the last number leaves no sign here, but in datatrove's log.
    """
    for suffix in (".index", ".metadata"):
        without = [name for name in names if name + suffix not in present]
        if without and len(without) < len(names):
            found = f"has no {suffix}, other files have one"
            _refuse(folder / without[0], found, "the whole output of datatrove", PIPELINE)
    tasks, merged = {}, {}
    for name in names:
        if match := TASK_FILE.fullmatch(name):
            tasks.setdefault(match[1], []).append(match)
        elif match := MERGED_FILE.fullmatch(name):
            merged.setdefault(match[2], set()).add(int(match[1]))
    for files in tasks.values():
        _check_tasks(folder, files)
    for name, numbers in merged.items():
        gap = _first_gap(numbers)
        if gap is not None and len(numbers) > 1:
            _refuse(folder / f"{gap:03d}_{name}", "missing", "all merged files", COPY)
    if tasks and merged:
        _refuse(
            folder,
            "merged files of datatrove beside those of its tasks: the same tokens twice",
            "one of both",
            "put the merged ones into a folder of their own",
        )


def _check_tasks(folder: Path, files: list[re.Match]) -> None:
    """Signs 2 and 3 in the files of one pipeline."""
    stage = max(STAGES[file[4]] for file in files)
    parts = {}
    for file in files:
        if STAGES[file[4]] < stage and (folder / file[0]).stat().st_size > 0:
            found = "a task of datatrove stopped before it had shuffled"
            _refuse(folder / file[0], found, "shuffled files only", PIPELINE)
        parts.setdefault(int(file[2]), set()).add(int(file[3] or 0))
    gap = _first_gap(set(parts))
    if gap is not None:
        expected = f"one of each task up to {max(parts):05d}"
        _refuse(folder, f"no file of datatrove's task {gap:05d}", expected, PIPELINE)
    for task, numbers in parts.items():
        gap = _first_gap(numbers)
        if gap is not None:
            found = f"no part {gap:05d} of datatrove's task {task:05d}"
            _refuse(folder, found, f"one of each part up to {max(numbers):05d}", PIPELINE)


def _check_completions(folder: Path, present: set[str]) -> None:
    """Count the tasks that are complete, where datatrove's `logging_dir` is the same folder."""
    if not {"executor.json", "completions"} <= present:
        return
    tasks = read_json(folder / "executor.json", {"world_size?": int}).get("world_size", 0)
    complete = len(os.listdir(folder / "completions"))
    if complete != tasks:  # more, where fewer tasks were started anew beside the files of others
        found = f"{complete:,} complete tasks of datatrove"
        _refuse(folder / "completions", found, f"{tasks:,}, as executor.json says", PIPELINE)


def check_totals(folder: Path, counts: dict[str, int], present: set[str]) -> None:
    """Compare merged files with the total that datatrove's merger has written.

    counts: the number of tokens of each token file.
    """
    for name in present:
        total = name.removesuffix(".metadata")
        if total not in present and name.endswith(".ds.metadata"):
            count = sum(counts[merged] for merged in _merged_names(total, list(counts)))
            expected = _count_in_metadata(folder / name)
            if count != expected:
                found = f"{count:,} tokens in the merged files"
                _refuse(folder / name, found, f"{expected:,}, as it says", COPY)
