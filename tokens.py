"""Text, tokens, shards and windows: encodings, the shard format, the manifest, the order of data.

A data directory holds shards `<corpus>_{val,train}_%06d.bin` in llm.c's format: 256 little-endian
int32 (magic, version, token count), then uint16 tokens. `manifest.json`, written last, lists them.
Directories of llm.c, modded-nanogpt, build-nanogpt and datatrove, which have no manifest, are read
as they are.

The shards of a split form one long array of tokens. Training cuts it into windows: window k is
tokens kT … kT+T, that is T inputs and the T targets one token later. `training_windows`, at the end
of this file, decides which windows a step sees.

Shapes: B sequences, T tokens per sequence.
"""

import functools
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken

from support import foreign
from support.files import (
    file_sha256,
    open_descriptor,
    open_file,
    plain_name,
    read_json,
    sync,
    write_file,
)
from support.foreign import SUFFIXES
from support.script import UserError

# ---------------------------------------------------------------------------------------- encodings

END_OF_TEXT = "<|endoftext|>"
ENCODINGS = {"gpt2": 50257, "bytes": 257}  # sizes of their vocabularies, <|endoftext|> included


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """`gpt2`, or `bytes`: ids 0-255 are the bytes themselves, 256 is <|endoftext|>."""
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name != "gpt2":
        raise UserError(
            f"encoding {name!r}; expected one of {', '.join(ENCODINGS)}; choose one of them"
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UserError(
            f"the gpt2 vocabulary could not be downloaded ({type(error).__name__}); expected a "
            "connection or a filled cache; connect once, or set TIKTOKEN_CACHE_DIR to a folder "
            "that holds tiktoken's gpt2 files, or use the tokenizer bytes"
        ) from None


def encoding_for(vocab_size: int, name: str | None, place: str) -> tiktoken.Encoding:
    """The encoding of a model with `vocab_size` rows.

    name: what its config.json says, or None. place: the model's name in an error.
    A vocabulary may have more rows than a named encoding has tokens: a row may have been added for
    padding. Without a name the size must be that of an encoding. Raises UserError.
    """
    if name is not None:
        size = get_encoding(name).n_vocab
        if vocab_size < size:
            raise UserError(
                f"{place}: {vocab_size:,} rows for the encoding {name!r}; expected at least "
                f"{size:,}; use a model that was trained with this encoding"
            )
        return get_encoding(name)
    for known, size in ENCODINGS.items():
        if vocab_size == size:
            return get_encoding(known)
    raise UserError(
        f"{place}: a vocabulary of {vocab_size:,} tokens; expected 50257 (gpt2) or 257 (bytes); if "
        "tokens were added to GPT-2's, remove them in transformers with "
        "model.resize_token_embeddings(50257) and save it again"
    )


@functools.cache
def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """Length in bytes of each token's text, int64 (n_vocab,).

    It is 0 for <|endoftext|>, which stands for no text.
    """
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in range(encoding.n_vocab):
        if token != encoding.eot_token:
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    return lengths


# ------------------------------------------------------------------------------------------- shards

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4


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
    if sha256 is not None and sha256 != digest:
        raise UserError(
            f"{file}: sha256 {digest}; expected {sha256}; the download was damaged: run the same "
            "command again"
        )
    os.replace(download, file)
    sync(file.parent)
    return {"name": file.name, "tokens": shard.count, "sha256": digest}


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of uint16 tokens, or a part of one: `count` tokens from byte `offset` on."""

    path: Path
    offset: int
    count: int

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Check the header and size of a .bin, .npy or .ds file without reading its tokens."""
        suffix = path.suffix
        descriptor = open_descriptor(path)
        try:
            size = os.fstat(descriptor).st_size
            start = b"" if suffix == ".ds" else os.read(descriptor, 2**14)  # more than any header
        finally:
            os.close(descriptor)
        if suffix == ".npy":
            offset, count = _npy_header(path, start)
        elif suffix == ".ds":
            offset, count = 0, foreign.ds_count(path, size)
        else:
            offset, count = _bin_header(path, start)
        if count < 0 or size != offset + 2 * count:
            raise UserError(
                f"{path}: {size:,} bytes; expected {offset + 2 * count:,} bytes for {count:,} "
                "tokens; the file is truncated or damaged: prepare or fetch it again"
            )
        return cls(path, offset, count)


def _bin_header(path: Path, start: bytes) -> tuple[int, int]:
    """Offset and number of the tokens of a file in llm.c's format."""
    magic, version, count = struct.unpack("<3i", start[:12].ljust(12, b"\0"))
    if magic != MAGIC or version != VERSION:
        raise UserError(
            f"{path}: header {[magic, version, count]}; expected a shard with magic {MAGIC} and "
            f"version {VERSION}; prepare the data again with fineweb.py"
        )
    return HEADER_BYTES, count


def _npy_header(path: Path, start: bytes) -> tuple[int, int]:
    """Offset and number of the tokens of a .npy file of uint16 in one dimension.

    Its header is the text of a Python dictionary. It is matched and never evaluated, so that any
    other array, pickled objects above all, is refused.
    """
    # Versions 1 and 2 of the format give the header's length in 2 and in 4 bytes. With neither
    # the header below is empty, and so refused.
    length_bytes = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(start[:8], 0)
    header_end = 8 + length_bytes + int.from_bytes(start[8 : 8 + length_bytes], "little")
    header = start[8 + length_bytes : header_end]
    match = re.fullmatch(
        rb"\{'descr': '<u2', 'fortran_order': (?:False|True), 'shape': \((\d{1,15}),\), \} *\n",
        header,
    )
    if not length_bytes or match is None:
        raise UserError(
            f"{path}: header {header[:100]!r}; expected a .npy array of one dimension of uint16; "
            "fetch the file again, or prepare the data with fineweb.py"
        )
    return header_end, int(match[1])


def _most_open_files() -> int:
    """How many shards are kept open. A process may have few files open in all."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return 256
    return max(1, min(256, limit // 4))


@functools.lru_cache(maxsize=_most_open_files())
def _open_for_windows(path: Path) -> BinaryIO:
    """A shard's file. The system is told not to read more than it is asked for.

    It would otherwise read far beyond each window, which is of no use in a random order.
    """
    file = open_file(path)
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _read_tokens(shard: Shard, first: int, count: int) -> np.ndarray:
    """`count` tokens of a shard from its token `first` on, uint16 (count,).

    It moves no file position, so that threads can read at the same time.
    """
    offset = shard.offset + 2 * first
    if hasattr(os, "pread"):
        file = _open_for_windows(shard.path)  # a name for it keeps it open until it has been read
        content = os.pread(file.fileno(), 2 * count, offset)
        found = np.frombuffer(content[: len(content) // 2 * 2], dtype="<u2")
    else:  # Windows
        found = np.fromfile(shard.path, dtype="<u2", count=count, offset=offset)
    if len(found) < count:
        raise UserError(
            f"{shard.path}: ends at token {first + len(found):,}; expected {shard.count:,} tokens, "
            "as when it was opened; it was changed while it was in use: restore it"
        )
    return found


class TokenArray:
    """Shards joined into one long array of tokens.

    Of the files only what is asked for is read, so opening a large corpus costs little.
    """

    def __init__(self, shards: list[Shard], vocab_size: int):
        self.shards = [shard for shard in shards if shard.count > 0]
        self.vocab_size = vocab_size
        # Shard i holds tokens ends[i-1] … ends[i]-1 of the array.
        self.ends = np.cumsum([shard.count for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1, uint16 (stop - start,), across the ends of shards.

        Raises UserError for a token outside the vocabulary.
        """
        result = np.empty(stop - start, dtype=np.uint16)
        filled = 0
        i = int(np.searchsorted(self.ends, start, side="right"))  # the shard that holds `start`
        while filled < len(result):
            shard = self.shards[i]
            shard_start = int(self.ends[i]) - shard.count
            first = start + filled - shard_start
            count = min(shard.count - first, len(result) - filled)
            part = _read_tokens(shard, first, count)
            if part.max() >= self.vocab_size:
                raise UserError(
                    f"{shard.path}: token {part.max()} near position {first:,}; expected tokens "
                    f"below {self.vocab_size}; the file is damaged or of another encoding: prepare "
                    "it again"
                )
            result[filled : filled + len(part)] = part
            filled += len(part)
            i += 1
        return result

    def num_windows(self, T: int) -> int:
        """How many windows of T + 1 tokens fit: window k is tokens kT … kT+T."""
        return max(0, (len(self) - 1) // T)

    def windows(self, indices: np.ndarray, T: int) -> np.ndarray:
        """The windows with these indices, int64 (len(indices), T + 1)."""
        rows = []
        for k in indices.tolist():
            rows.append(self.read(k * T, k * T + T + 1))
        return np.stack(rows).astype(np.int64)


# -------------------------------------------------------------------------------- data directories


@dataclass(frozen=True)
class TokenData:
    """A prepared corpus: its encoding, and its two splits.

    fingerprint: a hash of the manifest and of samples of the shards; a run records it to recognise
    the data it was trained on, wherever they lie.
    """

    encoding: str
    train: TokenArray
    val: TokenArray
    fingerprint: str


# If no file has "val" in its name, the last tenth of the corpus is the validation split, but at
# most so many tokens. An evaluation reads 10,485,760 tokens, and the last one needs a target.
MAX_VALIDATION_TOKENS = 10_485_760 + 1


def open_data(folder: str | os.PathLike) -> TokenData:
    """Open a data directory, ours or a foreign one. Reads only; needs no right to write.

    It checks the manifest, every shard's header and size, and that a foreign directory is complete
    as far as its names tell. The tokens are checked when they are read, or by `verify`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such data directory; expected a directory of token shards; check the "
            "path, or prepare one with fineweb.py"
        )
    if (folder / "manifest.partial.json").exists():
        raise UserError(
            f"{folder}: its preparation is not finished (manifest.partial.json); expected a "
            "finished data directory; run the same fineweb.py command again: it continues where "
            "it stopped"
        )
    _open_for_windows.cache_clear()  # a corpus may have been prepared anew in the same place
    # A hidden file is what a copy has left, or a file's attributes as macOS copies them.
    names = [name for name in os.listdir(folder) if name.endswith(SUFFIXES) and name[0] != "."]
    names.sort()
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        encoding = manifest["encoding"]
        shards = _open_listed(folder, manifest, names)
    else:
        encoding = "gpt2"  # what the other projects use
        present = set(os.listdir(folder))
        foreign.check_names(folder, names, present)
        shards = [Shard.open(folder / name) for name in names]
        foreign.check_totals(folder, {shard.path.name: shard.count for shard in shards}, present)
    train, val = _split(shards)
    if not train:
        raise UserError(
            f"{folder}: {len(names)} token shards; expected at least one for training and one for "
            "validation; prepare them with fineweb.py, or name text files instead of the folder"
        )
    vocab_size = ENCODINGS[encoding]
    return TokenData(
        encoding,
        TokenArray(train, vocab_size),
        TokenArray(val, vocab_size),
        _fingerprint(folder, shards),
    )


def _open_listed(folder: Path, manifest: dict, present: list[str]) -> list[Shard]:
    """The shards of a manifest in its order; they must be exactly the folder's token files."""
    counts = {entry["name"]: entry["tokens"] for entry in manifest["shards"]}
    for name in sorted(counts.keys() ^ set(present)):
        if name in counts:
            found = "listed in manifest.json but missing"
        else:
            found = "not listed in manifest.json"
        raise UserError(
            f"{folder / name}: {found}; expected exactly the shards of the manifest; restore it, "
            "or prepare the data again"
        )
    shards = [Shard.open(folder / name) for name in counts]
    for shard in shards:
        count = counts[shard.path.name]
        if shard.count != count:
            raise UserError(
                f"{shard.path}: {shard.count:,} tokens; expected {count:,} tokens as manifest.json "
                "says; shards were swapped or damaged: prepare the data again"
            )
    return shards


# corpus_val_000000.bin, val.npy, validation-00000.bin, val_00000_00000_doc_shuffled.ds
VALIDATION_FILE = re.compile(r"(^|[_.-])val(id|idation)?([_.-]?\d+)*(_\w*shuffled)?\.\w+$")


def _split(shards: list[Shard]) -> tuple[list[Shard], list[Shard]]:
    """The shards for training and those for validation.

    Names say which is which, as in `corpus_val_000000.bin`. Where none does, as in datatrove's
    files, the last tenth of all tokens validates, at most MAX_VALIDATION_TOKENS.
    """
    train = []
    val = []
    for shard in shards:
        if VALIDATION_FILE.search(shard.path.name):
            val.append(shard)
        else:
            train.append(shard)
    if val:
        return train, val
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


# What the fingerprint reads: 64 MB of a corpus, spread evenly. It is two blocks of each shard at
# least, up to 2,048 shards. Of more shards it reads every second, or every third, and so on.
SAMPLE_BYTES = 2**14
SAMPLES = 2**12
LEAST_COPY = 1024  # tokens from which on two equal files are no chance


def _fingerprint(folder: Path, shards: list[Shard]) -> str:
    """A hash of the manifest or the names, and of blocks spread evenly over the shards.

    A corpus of less than 64 MB is hashed whole. In a larger one most blocks are not read, and a
    change in these is not seen. `verify` reads everything.
    Without a manifest two files of the same content are refused: one of them is a copy.
    """
    digest = hashlib.sha256()
    is_ours = (folder / "manifest.json").exists()
    if is_ours:
        digest.update((folder / "manifest.json").read_bytes())
    else:
        names_and_counts = [(shard.path.name, shard.count) for shard in shards]
        digest.update(json.dumps(names_and_counts).encode())
    seen = {}
    for shard, sample in _samples(shards):
        digest.update(sample)
        content = (shard.count, hashlib.sha256(sample).digest())
        twin = seen.setdefault(content, shard)
        if twin is not shard and shard.count >= LEAST_COPY and not is_ours:
            raise UserError(
                f"{shard.path}: the same tokens as in {twin.path.name}; expected each file once; "
                "remove one of the two"
            )
    return digest.hexdigest()


def _samples(shards: list[Shard]) -> Iterator[tuple[Shard, bytes]]:
    """What the fingerprint reads of which shards."""
    blocks_per_shard = max(2, SAMPLES // len(shards))
    for shard in shards[:: math.ceil(2 * len(shards) / SAMPLES)]:
        size = shard.offset + 2 * shard.count
        with open_file(shard.path) as f:
            if size <= blocks_per_shard * SAMPLE_BYTES:
                yield shard, f.read()
                continue
            blocks = []
            for i in range(blocks_per_shard):
                f.seek((size - SAMPLE_BYTES) * i // (blocks_per_shard - 1))
                blocks.append(f.read(SAMPLE_BYTES))
            yield shard, b"".join(blocks)


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
    if encoding not in ENCODINGS:
        _refuse_manifest(file, f"encoding {encoding[:80]!r}", f"one of {', '.join(ENCODINGS)}")
    vocab_size = ENCODINGS[encoding]
    if manifest.get("vocab_size", vocab_size) != vocab_size:
        _refuse_manifest(file, f"vocab_size {manifest['vocab_size']}", f"{vocab_size}")
    names = set()
    for entry in manifest["shards"]:
        name = entry["name"]
        if not plain_name(name) or Path(name).suffix not in SUFFIXES:
            _refuse_manifest(file, f"shard {name[:80]!r}", "the name of a shard in this folder")
        if name in names:
            _refuse_manifest(file, f"shard {name[:80]!r} listed twice", "each shard once")
        names.add(name)
    return manifest


def _refuse_manifest(file: Path, found: str, expected: str) -> None:
    raise UserError(f"{file}: {found}; expected {expected}; prepare the data again")


def verify_shards(folder: Path, manifest: dict, listed_in: str = "manifest.json") -> None:
    """Check size and sha256 of every shard in the manifest, which is the file `listed_in`."""
    for entry in manifest["shards"]:
        if not (folder / entry["name"]).exists():
            raise UserError(
                f"{folder / entry['name']}: listed in {listed_in} but missing; expected all shards "
                "of the manifest; restore it, or prepare into a new directory"
            )
        shard = Shard.open(folder / entry["name"])
        if shard.count != entry["tokens"] or file_sha256(shard.path) != entry["sha256"]:
            raise UserError(
                f"{shard.path}: {shard.count:,} tokens, not those that {listed_in} lists; expected "
                f"{entry['tokens']:,} tokens of sha256 {entry['sha256']}; the file is damaged or "
                "was replaced: restore it, or prepare into a new directory"
            )


def verify(folder: Path) -> int:
    """Read everything and return the number of tokens.

    It checks all sizes, the range of every token and, where there is a manifest, every sha256.
    A foreign directory has no hashes. There a changed token is found only if it is not below the
    vocabulary's size.
    """
    data = open_data(folder)
    if (folder / "manifest.json").exists():
        verify_shards(folder, read_manifest(folder))
    for split in (data.val, data.train):
        for start in range(0, len(split), 2**24):
            split.read(start, min(start + 2**24, len(split)))
    return len(data.val) + len(data.train)


# ----------------------------------------------------------------------------------- training order
#
# All training is one endless stream of samples, numbered 0, 1, 2, …; each sample is one window.
# Step s of S sequences takes samples sS … sS+S-1. The ranks divide these into equal, consecutive
# parts. With 32 sequences a step, step 10 takes samples 320 … 351, and of these rank 1 of 4 takes
# 328 … 335. `training_windows` says which windows these samples are.


def training_windows(first: int, count: int, num_windows: int, seed: int) -> np.ndarray:
    """Window indices of samples first … first+count-1, int64 (count,).

    With N windows, sample g belongs to epoch g // N and has place g mod N in it. Each epoch has a
    permutation of its own of the N windows, and the sample is the window that the permutation puts
    at that place. So an epoch shows each window exactly once. What a step sees depends on the seed
    and the step, and on nothing else: a resumed run needs no other state of the data.
    """
    samples = np.arange(first, first + count)
    epochs = samples // num_windows
    places = samples % num_windows
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permute(places[in_epoch], num_windows, seed, int(epoch))
    return indices


def _permute(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudorandom permutation of 0 … n-1, evaluated at `places`, without storing it.

    A Feistel network permutes the numbers of 2h bits, whatever its round function is (Luby and
    Rackoff 1988). Its domain 0 … 4^h-1 is a little larger than 0 … n-1. If a result is n or more,
    the network is applied to the result, again and again, until a result is below n. This makes a
    permutation of 0 … n-1 (cycle walking, Black and Rogaway 2002). The domain is at most four times
    as large as n, so few repetitions are needed.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(seed, epoch)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)  # results that are not below n yet; at first all
    while outside.any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
        outside = result >= n
    return result.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Keys from the seed and the epoch, uint64 (8,): two hashes give four each."""
    first_half = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    second_half = hashlib.sha256(first_half).digest()
    return np.frombuffer(first_half + second_half, dtype="<u8")


def _feistel(x: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass of the network over numbers of 2 * half_bits bits.

    A round changes the left half by a function of the right half, and then swaps the halves. It can
    be undone, so no two numbers become one.
    """
    shift = np.uint64(half_bits)
    low_bits = np.uint64((1 << half_bits) - 1)
    left = x >> shift
    right = x & low_bits
    for key in round_keys:
        changed = left ^ (_mix(right ^ key) & low_bits)
        left = right
        right = changed
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits: every output bit depends on every input bit.

    This is the finaliser of splitmix64 (Steele, Lea and Flood 2014).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
