"""Text, tokens, shards and batches: encodings, the shard format, the manifest, and the order of training data.

A data directory holds shards `<corpus>_{val,train}_%06d.bin` in llm.c's format (256 little-endian int32: magic,
version, token count; then uint16 tokens) and `manifest.json`, written last. Directories of llm.c, modded-nanogpt,
build-nanogpt and datatrove, which have no manifest, are read as they are.

Shapes: B sequences, T tokens per sequence; a window is T inputs and the T targets one token later: T + 1 tokens.
"""

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken

from cli import UserError
from files import file_sha256, write_file

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".bin", ".npy", ".ds")  # of token files: llm.c and ours, build-nanogpt, datatrove


# ---------------------------------------------------------------------------------------------------- encodings

ENCODINGS = {
    "gpt2": 50257,
    "bytes": 257,
}  # and the size of their vocabularies, <|endoftext|> included


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
            f"encoding {name!r}",
            expected=f"one of {', '.join(ENCODINGS)}",
            remedy="choose one of them",
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UserError(
            f"the gpt2 vocabulary could not be fetched ({type(error).__name__})",
            expected="a connection or a filled cache",
            remedy="connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's gpt2 files, or prepare bytes: --tokenizer bytes",
        ) from None


@functools.cache
def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """Length in bytes of each token's text, (n_vocab,); 0 for <|endoftext|>, which stands for no text."""
    return np.array(
        [
            0 if i == encoding.eot_token else len(encoding.decode_single_token_bytes(i))
            for i in range(encoding.n_vocab)
        ]
    )


def save_tokenizer(encoding: tiktoken.Encoding, folder: str | os.PathLike) -> None:
    """Write vocab.json and merges.txt, from which transformers' AutoTokenizer builds the same `gpt2` encoding.

    Writes nothing for `bytes`, which transformers has no tokenizer for.
    """
    if encoding.name == "gpt2":
        for name, text in _gpt2_tokenizer_files().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")


@functools.cache
def _gpt2_tokenizer_files() -> dict[str, str]:
    """OpenAI's two files, rebuilt from tiktoken's table of tokens and ranks."""
    encoding = get_encoding("gpt2")
    # The files show each byte as one visible character: itself where Latin-1 prints it, else the next one from U+0100 on.
    shown = {b: chr(b) for b in range(256) if chr(b).isprintable() and not chr(b).isspace()}
    shown |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - shown.keys()))}
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    vocab, merges = {}, ["#version: 0.2"]
    for token, rank in ranks.items():
        vocab["".join(shown[b] for b in token)] = rank
        parts = [token[i : i + 1] for i in range(len(token))]
        while (
            len(parts) > 2
        ):  # what the earlier merges make of this token are the two parts that its own merge joins
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(shown[b] for b in part) for part in parts))
    vocab[END_OF_TEXT] = encoding.eot_token
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
    }


# ---------------------------------------------------------------------------------------------------- shards


def write_shard(file: Path, tokens: np.ndarray) -> dict:
    """Write one shard, whole and on disk before it gets its name; returns its manifest entry."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    digest = write_file(file, header.tobytes(), tokens.astype("<u2", copy=False).data)
    return {"name": file.name, "tokens": len(tokens), "sha256": digest}


def adopt_shard(download: Path, file: Path, sha256: str | None) -> dict:
    """Give a downloaded shard its name once it is known to be right; returns its manifest entry."""
    shard = Shard.open(download)
    digest = file_sha256(download)
    if sha256 not in (digest, None):
        raise UserError(
            f"{file}: sha256 {digest}",
            expected=sha256,
            remedy="the download was damaged: run the same command again",
        )
    os.replace(download, file)
    return {"name": file.name, "tokens": shard.count, "sha256": digest}


@dataclass(frozen=True)
class Shard:
    """A file of uint16 tokens: `count` of them from byte `offset` on."""

    path: Path
    offset: int
    count: int

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Check the header and size of a .bin, .npy or .ds file without reading its tokens."""
        if not path.is_file():  # a directory, FIFO or dangling link
            raise UserError(
                f"{path}: not a regular file",
                expected="a token shard",
                remedy="remove it or prepare the data again",
            )
        size = path.stat().st_size
        if path.suffix == ".npy":
            offset, count = _npy_header(path)
        elif path.suffix == ".ds":
            offset, count = 0, _ds_count(path, size)
        else:
            header = np.fromfile(path, dtype="<i4", count=3)
            if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
                raise UserError(
                    f"{path}: header {header.tolist()}",
                    expected=f"a shard with magic {MAGIC} and version {VERSION}",
                    remedy="prepare the data again with fineweb.py",
                )
            offset, count = HEADER_BYTES, int(header[2])
        if count < 0 or size != offset + 2 * count:
            raise UserError(
                f"{path}: {size:,} bytes",
                expected=f"{offset + 2 * count:,} bytes for {count:,} tokens",
                remedy="the file is truncated or damaged: prepare or fetch it again",
            )
        return cls(path, offset, count)


def _npy_header(path: Path) -> tuple[int, int]:
    """Offset and length of a one-dimensional uint16 .npy; anything else, pickled objects above all, is refused."""
    with open(path, "rb") as f:
        try:
            version = np.lib.format.read_magic(f)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(f)
        except ValueError as error:
            raise UserError(
                f"{path}: {error}", expected="a .npy array of uint16", remedy="fetch the file again"
            ) from None
        if dtype != np.dtype("<u2") or len(shape) != 1:
            raise UserError(
                f"{path}: dtype {dtype}, shape {shape}",
                expected="one dimension of uint16",
                remedy="prepare the data again with fineweb.py",
            )
        return f.tell(), shape[0]


def _ds_count(path: Path, size: int) -> int:
    """Length of datatrove's headerless .ds; the .metadata that it writes beside it says the token size and the count."""
    metadata = path.with_name(path.name + ".metadata")
    if not metadata.is_file():
        return size // 2
    lines = metadata.read_text(errors="replace").splitlines()
    if len(lines) < 2 or not lines[0].endswith("|2") or not lines[1].isdecimal():
        raise UserError(
            f"{metadata}: {lines[:2]}",
            expected="<tokenizer>|2, for tokens of 2 bytes, and their number",
            remedy="tokenise with gpt2, or remove the file if it is not of datatrove",
        )
    return int(lines[1])


# A map costs a file descriptor while it is open, so a corpus of thousands of shards keeps only some of them.
@functools.lru_cache(maxsize=256)
def _map(shard: Shard) -> np.ndarray:
    return np.memmap(shard.path, dtype="<u2", mode="r", offset=shard.offset, shape=(shard.count,))


class TokenArray:
    """Shards joined into one virtual array of tokens, memory-mapped: opening and holding it costs next to nothing."""

    def __init__(self, shards: list[Shard], vocab_size: int):
        self.shards, self.vocab_size = shards, vocab_size
        self.ends = np.cumsum([shard.count for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1, uint16, across shard boundaries; a token outside the vocabulary is an error."""
        parts = []
        i = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            shard, end = self.shards[i], int(self.ends[i])
            first = start - (end - shard.count)
            part = _map(shard)[first : first + min(stop, end) - start]
            if len(part) and part.max() >= self.vocab_size:
                raise UserError(
                    f"{shard.path}: token {part.max()} near position {first:,}",
                    expected=f"tokens below {self.vocab_size}",
                    remedy="the file is damaged or of another encoding: prepare it again",
                )
            parts.append(part)
            start, i = min(stop, end), i + 1
        return np.concatenate([np.empty(0, dtype=np.uint16), *parts])

    def num_windows(self, T: int) -> int:
        """Windows kT … kT+T that fit."""
        return max(0, (len(self) - 1) // T)

    def windows(self, indices: np.ndarray, T: int) -> np.ndarray:
        """The given windows, int64 (len(indices), T + 1)."""
        rows = [self.read(k * T, k * T + T + 1) for k in map(int, indices)]
        return np.stack(rows).astype(np.int64)


# ---------------------------------------------------------------------------------------------------- directories


@dataclass(frozen=True)
class TokenData:
    """A prepared corpus: its encoding, and its two splits."""

    encoding: str
    train: TokenArray
    val: TokenArray
    fingerprint: (
        str  # of the manifest, or of names and sizes where there is none: what a run was trained on
    )


def open_data(folder: str | os.PathLike) -> TokenData:
    """Open a data directory, ours or a foreign one; every header and size is checked against the manifest."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such data directory",
            expected="a directory of token shards",
            remedy="check --data, or prepare one with fineweb.py",
        )
    if (folder / "manifest.partial.json").exists():
        raise UserError(
            f"{folder}: its preparation is not finished (manifest.partial.json)",
            expected="a finished data directory",
            remedy="run the same fineweb.py command again: it continues where it stopped",
        )
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        encoding, listed = (
            manifest["encoding"],
            {entry["name"]: entry["tokens"] for entry in manifest["shards"]},
        )
        for name in sorted(listed.keys() ^ {file.name for file in files}):
            found = (
                "listed in manifest.json but missing"
                if name in listed
                else "not listed in manifest.json"
            )
            raise UserError(
                f"{folder / name}: {found}",
                expected="exactly the shards of the manifest",
                remedy="restore it, or prepare the data again",
            )
        shards = [Shard.open(folder / name) for name in listed]
        for shard in shards:
            if shard.count != listed[shard.path.name]:
                raise UserError(
                    f"{shard.path}: {shard.count:,} tokens",
                    expected=f"{listed[shard.path.name]:,} tokens as manifest.json says",
                    remedy="shards were swapped or damaged: prepare the data again",
                )
        fingerprint = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    else:
        encoding, shards = (
            "gpt2",
            [Shard.open(file) for file in files],
        )  # what all those projects use
        fingerprint = hashlib.sha256(
            json.dumps([(s.path.name, s.count) for s in shards]).encode()
        ).hexdigest()
    val = [shard for shard in shards if re.search(r"(^|_)val(_\d+)?\.\w+$", shard.path.name)]
    train = [shard for shard in shards if shard not in val]
    if not val and len(shards) == 1:  # as of every small corpus, the last tenth validates
        cut = shards[0].count - shards[0].count // 10
        train, val = (
            [replace(shards[0], count=cut)],
            [replace(shards[0], offset=shards[0].offset + 2 * cut, count=shards[0].count - cut)],
        )
    elif not val:  # datatrove does not name splits: as everywhere, the first shard validates
        train, val = shards[1:], shards[:1]
    if not train:
        raise UserError(
            f"{folder}: {len(files)} token shards",
            expected="at least one for training and one for validation",
            remedy=f"prepare them with fineweb.py, or name texts: --data '{folder}/*.txt'",
        )
    vocab_size = ENCODINGS[encoding]
    return TokenData(
        encoding, TokenArray(train, vocab_size), TokenArray(val, vocab_size), fingerprint
    )


def write_manifest(folder: Path, manifest: dict, partial: bool = False) -> None:
    """Put the manifest in place: the partial one after each shard, the final one, which ends it, after the last."""
    file = folder / ("manifest.partial.json" if partial else "manifest.json")
    write_file(file, json.dumps(manifest, indent=1).encode())
    if not partial:
        (folder / "manifest.partial.json").unlink(missing_ok=True)


def read_manifest(folder: Path, partial: bool = False) -> dict:
    """The manifest of a data directory: encoding, vocab_size, source, revision, and name, tokens, sha256 per shard."""
    file = folder / ("manifest.partial.json" if partial else "manifest.json")
    try:
        manifest = json.loads(file.read_text())
        [(entry["name"], entry["tokens"], entry["sha256"]) for entry in manifest["shards"]]
        if manifest["encoding"] not in ENCODINGS:
            raise ValueError(f"encoding {manifest['encoding']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: {type(error).__name__}: {error}",
            expected="a manifest written by fineweb.py",
            remedy="prepare the data again",
        ) from None
    return manifest


def verify_shards(folder: Path, manifest: dict) -> None:
    """Check size and sha256 of every shard in the manifest."""
    for entry in manifest["shards"]:
        shard = Shard.open(folder / entry["name"])
        if (shard.count, file_sha256(shard.path)) != (entry["tokens"], entry["sha256"]):
            raise UserError(
                f"{shard.path}: {shard.count:,} tokens, contents changed",
                expected=f"{entry['tokens']:,} tokens of sha256 {entry['sha256']}",
                remedy="the file is damaged or was replaced: restore it, or prepare into a new directory",
            )


def verify(folder: Path) -> int:
    """Read everything: sizes, sha256 where there is a manifest, and the range of every token. Returns the number of tokens."""
    data = open_data(folder)
    if (folder / "manifest.json").exists():
        verify_shards(folder, read_manifest(folder))
    for split in (data.val, data.train):
        for start in range(0, len(split), 2**24):
            split.read(start, min(start + 2**24, len(split)))
    return len(data.val) + len(data.train)


# ---------------------------------------------------------------------------------------------------- training order


def training_windows(first: int, count: int, num_windows: int, seed: int) -> np.ndarray:
    """Window indices of training samples first … first+count-1, int64 (count,).

    Sample g is in epoch g // N, at place g mod N of that epoch's own permutation of the N windows. So each window is
    seen exactly once per epoch, and what a step sees depends on the seed and the step, on nothing else.
    """
    g = np.arange(first, first + count)
    epochs, places = np.divmod(g, num_windows)
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permute(places[here].astype(np.uint64), num_windows, seed, int(epoch))
    return indices


def _permute(x: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudorandom permutation of 0 … n-1 evaluated at x (uint64), without storing it.

    A Feistel network permutes the numbers of 2h bits whatever its round function is (Luby and Rackoff 1988); walking
    on until the result is below n restricts it to 0 … n-1 (Black and Rogaway 2002, cycle walking). The domain is less
    than four times n, so the walk is short.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    rounds = np.frombuffer(key + hashlib.sha256(key).digest(), dtype="<u8")  # eight round keys
    out, todo = x.copy(), np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for k in rounds:
            left, right = right, left ^ (_mix(right ^ k) & low)
        out[todo] = (left << half) | right
        todo = out >= n
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
