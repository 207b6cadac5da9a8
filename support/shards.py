"""Token files: their formats, the manifest that lists them, and their checks.

A directory that fineweb.py has prepared holds shards `<corpus>_{val,train}_%06d.bin` in llm.c's
format: 256 little-endian int32 (magic, version, token count), then uint16 tokens. `manifest.json`,
written last, lists them with their hashes.

A directory without a manifest comes from another program and is read as it is: .bin of llm.c and
modded-nanogpt, .npy of build-nanogpt, .ds of datatrove.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from support.files import file_sha256, plain_name, read_bytes, read_json, sync, write_file
from support.script import UserError, require

ENCODINGS = {"gpt2": 50257, "bytes": 257}  # sizes of their vocabularies, <|endoftext|> included
SUFFIXES = (".bin", ".npy", ".ds")  # of token files: llm.c and ours, build-nanogpt, datatrove

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4

# ----------------------------------------------------------------------------------- one token file


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of uint16 tokens, or a part of one: `count` tokens from byte `offset` on."""

    path: Path
    offset: int
    count: int

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Check the header and size of a .bin, .npy or .ds file without reading its tokens."""
        require(
            path.is_file(),
            f"{path}: missing, or not a regular file; expected a token file; restore it",
        )
        size = path.stat().st_size
        if path.suffix == ".ds":
            offset, count = 0, _ds_count(path)
        else:
            with open(path, "rb") as f:
                start = f.read(2**12)  # more than either header
            read_header = _npy_header if path.suffix == ".npy" else _bin_header
            offset, count = read_header(path, start)
        require(
            count >= 0 and size == offset + 2 * count,
            f"{path}: {size:,} bytes; expected {offset + 2 * count:,} bytes for {count:,} tokens; "
            "the file is truncated or damaged: prepare or fetch it again",
        )
        return cls(path, offset, count)

    def read(self, first: int, count: int, vocab_size: int) -> np.ndarray:
        """Tokens first … first+count-1, uint16 (count,), each checked to be below vocab_size.

        The file is opened for each read, which takes some ten microseconds. So threads share
        nothing, and a thousand shards need no thousand open files. A file that was cut off
        meanwhile is an error that names it; mapped into memory, it would kill the process.
        """
        with open(self.path, "rb") as f:
            f.seek(self.offset + 2 * first)
            content = f.read(2 * count)
        tokens = np.frombuffer(content[: len(content) // 2 * 2], dtype="<u2")
        if len(tokens) < count:
            raise UserError(
                f"{self.path}: ends at token {first + len(tokens):,}; expected {self.count:,} "
                "tokens, as when it was opened; it was changed while it was in use: restore it"
            )
        largest = tokens.max(initial=0)
        if largest >= vocab_size:
            raise UserError(
                f"{self.path}: token {largest} near position {first:,}; expected tokens below "
                f"{vocab_size}; the file is damaged or of another encoding: prepare it again"
            )
        return tokens


def _bin_header(path: Path, start: bytes) -> tuple[int, int]:
    """Offset and number of the tokens of a file in llm.c's format."""
    magic, version, count = struct.unpack("<3i", start[:12].ljust(12, b"\0"))
    require(
        (magic, version) == (MAGIC, VERSION),
        f"{path}: header {[magic, version, count]}; expected a shard with magic {MAGIC} and "
        f"version {VERSION}; prepare the data again with fineweb.py",
    )
    return HEADER_BYTES, count


# What numpy.save writes before a one-dimensional array of uint16: format 1.0, the header's length
# in two bytes, and a Python dictionary as text. It is matched and never evaluated.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<u2', 'fortran_order': (?:False|True), "
    rb"'shape': \((\d{1,15}),\), \} *\n",
    re.DOTALL,
)


def _npy_header(path: Path, start: bytes) -> tuple[int, int]:
    """Offset and number of the tokens of a .npy file; any other array is refused."""
    match = NPY_HEADER.match(start)
    require(
        match is not None,
        f"{path}: header {start[:100]!r}; expected a .npy array of one dimension of uint16; fetch "
        "the file again, or prepare the data with fineweb.py",
    )
    return match.end(), int(match[1])


# The tokenizers in datatrove's .metadata that may be GPT-2's: known by their name on the hub, or a
# file of that machine, or none named.
MAY_BE_GPT2 = re.compile(
    r"(.*/)?(distil)?gpt2(-medium|-large|-xl)?|[./~].*|.*\\.*|.*\.json|unknown tokenizer.*",
    re.IGNORECASE,
)


def _ds_count(path: Path) -> int:
    """Number of the tokens of datatrove's .ds, which has no header.

    When a task has finished it writes .index, where each document ends, and .metadata: the
    tokenizer, bytes a token, and the number of tokens.
    """
    metadata = Path(f"{path}.metadata")
    if metadata.exists():
        return _count_in_metadata(metadata)
    index = Path(f"{path}.index")
    require(
        index.exists(),
        f"{path}: neither .index nor .metadata beside it; expected what a task of datatrove writes "
        "when it has finished; run the pipeline again, or copy all of its files",
    )
    last_end = np.fromfile(index, dtype="<u8", offset=max(0, index.stat().st_size - 8))
    return int(last_end[0]) if len(last_end) else 0


def _count_in_metadata(file: Path) -> int:
    """The number of tokens that datatrove's .metadata tells; they must be GPT-2's, of two bytes."""
    lines = read_bytes(file, 2**12).decode(errors="replace").splitlines()
    is_right = len(lines) >= 2 and lines[0].endswith("|2") and re.fullmatch(r"\d{1,15}", lines[1])
    require(
        is_right,
        f"{file}: {[line[:80] for line in lines[:2]]}; expected <tokenizer>|2, for tokens of 2 "
        "bytes, and their number; run the pipeline again with gpt2",
    )
    name = lines[0].removesuffix("|2")
    require(
        MAY_BE_GPT2.fullmatch(name) is not None,
        f"{file}: the tokenizer {name[:80]!r}; expected gpt2; tokenise with gpt2; if this one has "
        "the same tokens, call it gpt2 in this file",
    )
    return int(lines[1])


def write_shard(file: Path, tokens: np.ndarray) -> dict:
    """Write one shard, whole and on disk before it has its name; returns its manifest entry."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[0] = MAGIC
    header[1] = VERSION
    header[2] = len(tokens)
    digest = write_file(file, header.tobytes(), tokens.astype("<u2", copy=False).data)
    return {"name": file.name, "tokens": len(tokens), "sha256": digest}


def add_downloaded_shard(download: Path, file: Path, sha256: str | None) -> dict:
    """Move a downloaded shard to its place once it is known to be right; its manifest entry.

    sha256: what the hub says the file's hash is; None where it says nothing.
    """
    shard = Shard.open(download)
    digest = file_sha256(download)
    require(
        sha256 in (None, digest),
        f"{file}: sha256 {digest}; expected {sha256}; the download was damaged: run the same "
        "command again",
    )
    sync(download)
    os.replace(download, file)
    sync(file.parent)
    return {"name": file.name, "tokens": shard.count, "sha256": digest}


# --------------------------------------------------------------------------------- a data directory


def listed(folder: Path) -> tuple[str, list[Shard]]:
    """The encoding of a data directory, and its shards in order.

    Reads only; needs no right to write. Headers and sizes are checked here, tokens when they are
    read, everything by `verify`. Raises UserError.
    """
    require(
        folder.is_dir(),
        f"{folder}: no such data directory; expected a directory of token shards; check the path, "
        "or prepare one with fineweb.py",
    )
    require(
        not (folder / "manifest.partial.json").exists(),
        f"{folder}: its preparation is not finished (manifest.partial.json); expected a finished "
        "data directory; run the same fineweb.py command again: it continues where it stopped",
    )
    names = token_files(folder)
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        return manifest["encoding"], _shards_of_manifest(folder, manifest, names)
    formats = sorted({Path(name).suffix for name in names})
    require(
        len(formats) <= 1,
        f"{folder}: token files of several formats ({', '.join(formats)}); expected one format, "
        "since two may hold the same tokens; put each into a folder of its own",
    )
    shards = [Shard.open(folder / name) for name in names]
    _check_datatrove(folder, shards)
    return _encoding_of(shards), shards


def holds_tokens(folder: str | os.PathLike) -> bool:
    """Whether a folder is a corpus, finished or not.

    One whose preparation was only begun has no token file, and counts as little as none.
    """
    if not os.path.isdir(folder):
        return False
    return any(name.endswith(SUFFIXES) or name == "manifest.json" for name in os.listdir(folder))


def token_files(folder: Path) -> list[str]:
    """The names of a directory's token files in order. Hidden files are what a copy has left."""
    names = [name for name in os.listdir(folder) if name.endswith(SUFFIXES) and name[0] != "."]
    return sorted(names)


def _shards_of_manifest(folder: Path, manifest: dict, present: list[str]) -> list[Shard]:
    """The shards of a manifest in its order; they must be exactly the folder's token files."""
    counts = {entry["name"]: entry["tokens"] for entry in manifest["shards"]}
    for name in sorted(counts.keys() ^ set(present)):
        found = "listed in manifest.json but missing" if name in counts else "not in manifest.json"
        raise UserError(
            f"{folder / name}: {found}; expected exactly the shards of the manifest; restore it, "
            "or prepare the data again"
        )
    shards = [Shard.open(folder / name) for name in counts]
    for shard in shards:
        count = counts[shard.path.name]
        require(
            shard.count == count,
            f"{shard.path}: {shard.count:,} tokens; expected {count:,} tokens as manifest.json "
            "says; shards were swapped or damaged: prepare the data again",
        )
    return shards


def _check_datatrove(folder: Path, shards: list[Shard]) -> None:
    """Refuse what datatrove has not finished, as far as its own records beside the tokens tell."""
    counts = {shard.path.name: shard.count for shard in shards}
    # The merger writes 000_NAME.ds, 001_NAME.ds, …, and NAME.ds.metadata with the total of all.
    for metadata in sorted(folder.glob("*.ds.metadata")):
        name = metadata.name.removesuffix(".metadata")
        if name in counts:
            continue
        merged = re.compile(r"\d+_" + re.escape(name))
        found = sum(count for other, count in counts.items() if merged.fullmatch(other))
        expected = _count_in_metadata(metadata)
        require(
            found == expected,
            f"{metadata}: {found:,} tokens in the files that it speaks of; expected {expected:,}, "
            "as it says; finish the copy, or remove what is not of this corpus",
        )
    # The executor's log, where it is in the same folder, counts the tasks that are complete.
    if (folder / "executor.json").exists() and (folder / "completions").is_dir():
        tasks = read_json(folder / "executor.json", {"world_size?": int}).get("world_size", 0)
        complete = len(os.listdir(folder / "completions"))
        require(
            complete == tasks,
            f"{folder / 'completions'}: {complete:,} complete tasks of datatrove; expected "
            f"{tasks:,}, as executor.json says; run the pipeline again: it does what is missing",
        )


def _encoding_of(shards: list[Shard]) -> str:
    """The encoding of files that name none: bytes if the first ones are only bytes, else gpt2.

    GPT-2's first 257 tokens are single characters; no text of that length has no others. Should
    this be wrong, the first token above 256 is refused when it is read.
    """
    for shard in shards:
        if shard.count:
            first = shard.read(0, min(shard.count, 2**16), vocab_size=2**16)
            return "bytes" if first.max() < ENCODINGS["bytes"] else "gpt2"
    return "gpt2"


# corpus_val_000000.bin, val.npy, validation-00000.bin, val_00000_00000_doc_shuffled.ds
VALIDATION_FILE = re.compile(r"(^|[_.-])val(id|idation)?([_.-]?\d)*(_\w*shuffled)?\.\w+$")
# An evaluation reads at most 10,485,760 tokens, and the last one needs a target.
MAX_VALIDATION_TOKENS = 10_485_760 + 1


def split(shards: list[Shard]) -> tuple[list[Shard], list[Shard]]:
    """The shards for training and those for validation.

    Names say which is which, as in `corpus_val_000000.bin`. fineweb.py always writes such a shard,
    and decides what it holds. Where no name does, as in datatrove's files, the last tenth of the
    tokens validates, as they lie, at most MAX_VALIDATION_TOKENS.
    """
    val = [shard for shard in shards if VALIDATION_FILE.search(shard.path.name)]
    if val:
        return [shard for shard in shards if not VALIDATION_FILE.search(shard.path.name)], val
    total = sum(shard.count for shard in shards)
    return _cut(shards, total - min(total // 10, MAX_VALIDATION_TOKENS))


def _cut(shards: list[Shard], num_tokens: int) -> tuple[list[Shard], list[Shard]]:
    """Divide shards into their first `num_tokens` tokens and the others."""
    remaining = num_tokens  # of the first part
    before_cut = []
    after_cut = []
    for shard in shards:
        count = min(shard.count, remaining)  # tokens of this shard in the first part
        if count > 0:
            before_cut.append(replace(shard, count=count))
        if count < shard.count:
            rest = replace(shard, offset=shard.offset + 2 * count, count=shard.count - count)
            after_cut.append(rest)
        remaining -= count
    return before_cut, after_cut


def fingerprint(folder: Path) -> str:
    """What a run records to recognise its data, wherever they lie: a hash.

    It is of the manifest, which has every shard's hash; without a manifest, of names and sizes.
    Runs begun before December 2026 recorded a hash that included samples of the tokens. They cannot
    be resumed; --fork or --init-from takes their weights into a new run.
    """
    if (folder / "manifest.json").exists():
        content = (folder / "manifest.json").read_bytes()
    else:
        sizes = [(name, (folder / name).stat().st_size) for name in token_files(folder)]
        content = json.dumps(sizes).encode()
    return hashlib.sha256(content).hexdigest()


# ----------------------------------------------------------------------------------------- manifest

MANIFEST_BYTES = 2**24  # the most that is read: some hundred thousand shards
MANIFEST_SHAPE = {
    "encoding": str,
    "vocab_size?": int,
    "shards": [{"name": str, "tokens": int, "sha256": str}],
}


def write_manifest(folder: Path, manifest: dict, partial: bool = False) -> None:
    """Put the manifest in place.

    The partial one is written after each shard. The final one, written after the last shard,
    replaces it and thereby ends the preparation.
    """
    file = folder / ("manifest.partial.json" if partial else "manifest.json")
    write_file(file, json.dumps(manifest, indent=1).encode())
    if not partial:
        (folder / "manifest.partial.json").unlink(missing_ok=True)


def read_manifest(folder: Path, partial: bool = False) -> dict:
    """The manifest of a data directory.

    Its keys: encoding, vocab_size, source, revision, and name, tokens and sha256 of each shard.
    Raises UserError unless it has them and every name is a plain one.
    """
    file = folder / ("manifest.partial.json" if partial else "manifest.json")
    manifest = read_json(file, MANIFEST_SHAPE, MANIFEST_BYTES)
    encoding = manifest["encoding"]
    require(
        encoding in ENCODINGS,
        f"{file}: encoding {encoding[:80]!r}; expected one of {', '.join(ENCODINGS)}; prepare the "
        "data again",
    )
    vocab_size = manifest.get("vocab_size", ENCODINGS[encoding])
    require(
        vocab_size == ENCODINGS[encoding],
        f"{file}: vocab_size {vocab_size}; expected {ENCODINGS[encoding]}; prepare the data again",
    )
    names = set()
    for entry in manifest["shards"]:
        name = entry["name"]
        require(
            plain_name(name) and name.endswith(SUFFIXES) and name not in names,
            f"{file}: shard {name[:80]!r}; expected names of shards in this folder, each once; "
            "prepare the data again",
        )
        names.add(name)
    return manifest


# ------------------------------------------------------------------------------------- verification


def verify_shards(folder: Path, manifest: dict, listed_in: str = "manifest.json") -> None:
    """Check size and sha256 of every shard in the manifest, which is the file `listed_in`."""
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        require(
            path.exists(),
            f"{path}: listed in {listed_in} but missing; expected all shards of the manifest; "
            "restore it, or prepare into a new directory",
        )
        shard = Shard.open(path)
        require(
            shard.count == entry["tokens"] and file_sha256(path) == entry["sha256"],
            f"{path}: {shard.count:,} tokens, not those that {listed_in} lists; expected "
            f"{entry['tokens']:,} tokens of sha256 {entry['sha256']}; the file is damaged or was "
            "replaced: restore it, or prepare into a new directory",
        )


def verify(folder: Path) -> int:
    """Read everything and return the number of tokens.

    It checks all sizes, the range of every token and, where there is a manifest, every sha256.
    Other directories have no hashes. There a changed token is found only if it is not below the
    vocabulary's size.
    """
    encoding, shards = listed(folder)
    require(
        len(shards) > 0,
        f"{folder}: no token shards; expected .bin, .npy or .ds files; check the path",
    )
    if (folder / "manifest.json").exists():
        verify_shards(folder, read_manifest(folder))
    for shard in shards:
        for first in range(0, shard.count, 2**24):
            shard.read(first, min(2**24, shard.count - first), ENCODINGS[encoding])
    return sum(shard.count for shard in shards)
