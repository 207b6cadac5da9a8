"""Corpora into token shards: FineWeb-Edu, any hub dataset, local files, or ready-made shards.

    python fineweb.py                                             FineWeb-Edu sample-10BT into edu_fineweb10B/
    python fineweb.py --input 'books/**/*.txt' --out data/books   one's own text
    python fineweb.py --pretokenized --max-tokens 1000000000      shards that others have already tokenised
    python fineweb.py --verify edu_fineweb10B                     read and check everything

Killed at any moment and started again, it goes on after the last shard written, and ends with the same bytes.
The parent reads documents, workers tokenise batches of them, the parent joins the tokens and writes the shards.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import random
import socket
import sysconfig
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import tokens
from runtime import UserError, parse_flags, run_script

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FIRST_RUN = "data/first-run"  # where the corpus of a first run is put, made of what every Python has
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"  # the same corpus in llm.c's format, by the author of modded-nanogpt
TASK_BYTES = 2**19  # text per task: long enough to hide the cost of passing it, short enough to keep memory small
MOST_SKIPPED = 0.1  # of all documents; above that the input is probably not what was meant


@dataclass(frozen=True)
class PrepareConfig:
    dataset: str = FINEWEB_EDU  # dataset on the hub
    name: str = "sample-10BT"  # its configuration, for example sample-100BT; empty: the dataset's default
    split: str = "train"  # its split
    revision: str = "main"  # branch, tag or commit; the commit is pinned in the manifest
    text_column: str = "text"  # column, or key of a .jsonl line, that holds the text
    input: tuple[str, ...] = ()  # local files or globs instead: .txt and source files, .jsonl[.gz|.zst], .parquet
    split_on: str = ""  # what separates the documents inside a text file (\n and \t are understood); empty: one document a file
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # encoding
    out: str = ""  # output directory; empty: edu_fineweb10B for the default dataset, else data/<corpus>
    shard_tokens: int = 100_000_000  # tokens per shard
    max_tokens: int = 0  # stop after so many tokens; 0: all
    workers: int = 0  # tokenising processes; 0: one per CPU core
    pretokenized: bool = False  # fetch ready-made llm.c shards (kjj0/finewebedu10B-gpt2, or --dataset) instead
    verify: str = ""  # check every size, sha256 and token of this directory and do nothing else

    def __post_init__(self):
        for flag, least in (("shard_tokens", 1), ("max_tokens", 0), ("workers", 0)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag.replace('_', '-')} {getattr(self, flag)}", expected=f"{least} or more", remedy="change it")

    @property
    def corpus(self) -> str:
        """The name that shards begin with."""
        name = Path(self.input[0].split("*")[0]).stem if self.input else self.dataset.rsplit("/", 1)[-1]
        return "".join(c if c.isalnum() or c in "-." else "-" for c in name).strip("-.") or "corpus"

    @property
    def folder(self) -> Path:
        is_default = not self.input and (self.dataset, self.name) == (FINEWEB_EDU, "sample-10BT")
        return Path(self.out or ("edu_fineweb10B" if is_default else f"data/{self.corpus}"))


# ---------------------------------------------------------------------------------------------------- sources
# A source has an `identity` for the manifest, and `batches(position)`, which yields (documents, position after them,
# fraction of the corpus done or None). A document that cannot be used comes as anything but a str.

class Unreadable:
    def __init__(self, reason: str):
        self.reason = reason


class Files:
    """Local text: whole files, files split at a separator, or JSON lines; compressed or not."""

    def __init__(self, files: list[str], text_column: str, split_on: str):
        self.files, self.text_column = files, text_column
        self.split_on = split_on.replace("\\n", "\n").replace("\\t", "\t").encode()
        self.sizes = [os.path.getsize(file) for file in files]
        self.identity = {"files": [[os.path.basename(file), size] for file, size in zip(files, self.sizes)],
                         "text_column": text_column, "split_on": split_on}

    def batches(self, position: dict | None) -> Iterator[tuple[list, dict, float | None]]:
        """A position is a file and a byte in its uncompressed content."""
        first, start = (position["file"], position["byte"]) if position else (0, 0)
        done, total = sum(self.sizes[:first]), max(1, sum(self.sizes))
        batch, size = [], 0
        for i in range(first, len(self.files)):
            lines = ".jsonl" in Path(self.files[i]).suffixes
            for piece, end in pieces(self.files[i], b"\n" if lines else self.split_on, start):
                if not lines or piece.strip():
                    batch.append(self.document(piece, lines))
                    size += len(piece)
                if size >= TASK_BYTES:
                    yield batch, {"file": i, "byte": end}, min(1.0, (done + end) / total)
                    batch, size = [], 0
            done, start = done + self.sizes[i], 0
        if batch:
            yield batch, {"file": len(self.files), "byte": 0}, 1.0

    def document(self, piece: bytes, is_json: bool):
        try:
            return json.loads(piece).get(self.text_column) if is_json else piece.decode()
        except UnicodeDecodeError:
            return Unreadable("not UTF-8")
        except (ValueError, AttributeError):
            return Unreadable("not a JSON object")


def pieces(file: str, separator: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """The parts of a file between separators from byte `start` on, each with the position after it; no separator: the file."""
    import pyarrow  # reads .gz, .bz2 and .zst as well as plain files

    with pyarrow.input_stream(file) as stream:
        while start > 0:  # compressed streams cannot seek
            start -= len(stream.read(min(start, 2**24))) or start
        position, rest = 0, b""
        while separator and (chunk := stream.read(max(2**22, len(rest)))):
            *parts, rest = (rest + chunk).split(separator)
            for part in parts:
                position += len(part) + len(separator)
                yield part, position
        rest += stream.read()
        if rest or not separator:
            yield rest, position + len(rest)


class Stream:
    """Rows of a hub dataset or of local parquet files, through `datasets`, without downloading them first."""

    def __init__(self, stream, identity: dict, text_column: str, num_rows: int | None):
        self.stream, self.identity, self.text_column, self.num_rows = stream.with_format("arrow"), identity, text_column, num_rows

    def batches(self, position: dict | None) -> Iterator[tuple[list, dict, float | None]]:
        """A position is the state of the `datasets` stream, and the rows read."""
        rows = 0
        if position:
            self.stream.load_state_dict(position["state"])
            rows = position["rows"]
        for table in self.stream.iter(batch_size=128):
            rows += table.num_rows
            yield table[self.text_column].to_pylist(), {"state": self.stream.state_dict(), "rows": rows}, self.num_rows and rows / self.num_rows


def open_source(config: PrepareConfig):
    """The source that the flags describe."""
    if not config.input:
        return open_hub(config)
    files = [file for pattern in config.input for file in ([pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True)))]
    files = [file for file in files if not os.path.isdir(file)]
    if not files:
        raise UserError(f"--input {' '.join(config.input)}: no such file", expected="files or globs",
                        remedy="check the path; for a folder write 'folder/**/*.txt', in quotes")
    is_parquet = [file.endswith(".parquet") for file in files]
    if not any(is_parquet):
        return Files(files, config.text_column, config.split_on)
    if not all(is_parquet):
        raise UserError(f"--input {' '.join(config.input)}: parquet beside other files", expected="one kind", remedy="prepare them apart")
    import datasets

    identity = {"files": [[os.path.basename(file), os.path.getsize(file)] for file in files], "text_column": config.text_column}
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return Stream(select(stream, config), identity, config.text_column, None)


def open_hub(config: PrepareConfig) -> Stream:
    import datasets
    from huggingface_hub import HfApi

    revision = HfApi().dataset_info(config.dataset, revision=config.revision).sha
    stream = datasets.load_dataset(config.dataset, config.name or None, split=config.split, revision=revision, streaming=True)
    identity = {"dataset": config.dataset, "name": config.name, "split": config.split, "revision": revision, "text_column": config.text_column}
    info = (stream.info.splits or {}).get(config.split)
    return Stream(select(stream, config), identity, config.text_column, info.num_examples if info else None)


def select(stream, config: PrepareConfig):
    columns = stream.column_names or stream._resolve_features().column_names
    if config.text_column not in columns:
        raise UserError(f"--text-column {config.text_column} is not among the columns", expected=f"one of {', '.join(columns)}", remedy="choose one")
    return stream.select_columns([config.text_column])


# ---------------------------------------------------------------------------------------------------- tokenising

def tokenise(documents: list[str], encoding_name: str) -> np.ndarray:
    """Tokens of the documents, each after <|endoftext|>, uint16."""
    encoding = tokens.get_encoding(encoding_name)
    start = np.array([encoding.eot_token], dtype=np.uint16)
    parts = []
    for text in documents:
        try:
            encoded = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which becomes U+FFFD as in the rest of tiktoken
            encoded = encoding.encode_to_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), disallowed_special=())
        parts += [start, encoded.astype(np.uint16)]
    return np.concatenate(parts) if parts else start[:0]


def start_worker(encoding_name: str) -> None:
    """In a new worker: end with the parent, whatever ends it; leave signals to the parent; load the vocabulary."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    tokens.get_encoding(encoding_name)


@contextlib.contextmanager
def worker_pool(workers: int, encoding_name: str) -> Iterator[Executor]:
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(encoding_name,))
    try:
        pool.submit(tokenise, [], encoding_name).result()  # starts the processes before this one has any threads
        yield pool
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed", expected=f"{workers} of them to run to the end",
                        remedy="usually memory ran out: run the same command again, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------- writing

class Writer:
    """Cuts the token stream into shards and commits each with the position after it, so that a restart can go on there."""

    def __init__(self, folder: Path, corpus: str, settings: dict, shard_tokens: int, eot: int):
        self.folder, self.corpus, self.settings, self.shard_tokens, self.eot = folder, corpus, settings, shard_tokens, eot
        self.shards: list[dict] = []
        # The first two shards are held back: a corpus that ends before them is divided in another way.
        self.buffer, self.fill = np.empty(2 * shard_tokens, dtype=np.uint16), 0

    @property
    def num_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.fill

    def add(self, new: np.ndarray, before: dict, skip: int) -> None:
        """Append tokens `new[skip:]`; `before` is the position of the source before `new`."""
        while skip < len(new):
            target = self.shard_tokens if self.shards else 2 * self.shard_tokens
            n = min(len(new) - skip, target - self.fill)
            self.buffer[self.fill:self.fill + n] = new[skip:skip + n]
            self.fill, skip = self.fill + n, skip + n
            if self.fill == target:
                for part in self.buffer[:target].reshape(-1, self.shard_tokens):
                    self.write(part)
                self.fill = 0
                tokens.write_manifest(self.folder, self.settings | {"shards": self.shards, "position": before | {"skip_tokens": skip}}, partial=True)

    def write(self, part: np.ndarray) -> None:
        kind = "train" if self.shards else "val"
        self.shards.append(tokens.write_shard(self.folder / f"{self.corpus}_{kind}_{len(self.shards):06d}.bin", part))

    def finish(self, documents: int, skipped: dict) -> None:
        rest = self.buffer[:self.fill]
        if not self.shards:
            cut = validation_cut(rest, self.eot)
            self.write(rest[cut:])
            rest = rest[:cut]
        if len(rest):
            self.write(rest)
        tokens.write_manifest(self.folder, self.settings | {"documents": documents, "skipped": skipped, "shards": self.shards})


def validation_cut(stream: np.ndarray, eot: int) -> int:
    """Where the last 10% of a small corpus begin: at the nearest document boundary when it has ten documents or more."""
    cut = len(stream) - len(stream) // 10
    starts = np.flatnonzero(stream == eot)
    return int(starts[1 + np.abs(starts[1:] - cut).argmin()]) if len(starts) >= 10 else cut


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Refuse a second process on the same folder, naming the first; the system frees it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this kind is not inherited by workers
        except OSError:
            f.seek(0)
            raise UserError(f"{folder} is being prepared by {f.read() or 'another process'}", expected="one process at a time",
                            remedy="wait for it or stop it") from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield


def prepare(config: PrepareConfig, say: Callable = print) -> Path:
    """Prepare what the flags describe; returns the folder. Goes on where an earlier, interrupted call stopped."""
    workers = config.workers or len(os.sched_getaffinity(0))
    encoding = tokens.get_encoding(config.tokenizer)
    folder = config.folder
    with lock(folder), worker_pool(workers, config.tokenizer) as pool:
        source = open_source(config)
        settings = {"encoding": config.tokenizer, "vocab_size": encoding.n_vocab, "source": source.identity, "revision": source.identity.get("revision"),
                    "shard_tokens": config.shard_tokens, "max_tokens": config.max_tokens}
        writer = Writer(folder, config.corpus, settings, config.shard_tokens, encoding.eot_token)
        if (folder / "manifest.json").exists():
            return folder
        position = None
        if (folder / "manifest.partial.json").exists():
            partial = tokens.read_manifest(folder, partial=True)
            writer.shards, position = partial["shards"], partial["position"]
        else:
            tokens.write_manifest(folder, settings | {"shards": [], "position": None}, partial=True)
        position = position or {"source": None, "documents": 0, "skipped": {}, "skip_tokens": 0}
        skip, documents, skipped = position["skip_tokens"], position["documents"], Counter(position["skipped"])
        before = position
        for new, after, values in tokenised(pool, source.batches(position["source"]), config.tokenizer, 3 * workers):
            if config.max_tokens:
                new = new[:max(0, config.max_tokens - writer.num_tokens + skip)]
            writer.add(new, before, skip)
            skip = 0
            for value in values:
                if not isinstance(value, str):
                    skipped["missing text" if value is None else getattr(value, "reason", f"{type(value).__name__} for text")] += 1
            documents += len(values)
            before = {"source": after, "documents": documents, "skipped": dict(skipped)}
            if config.max_tokens and writer.num_tokens >= config.max_tokens:
                break
        if writer.num_tokens <= documents:
            raise UserError(f"{documents} documents without text", expected="some text", remedy="check the source")
        writer.finish(documents, dict(skipped))
    return folder


def tokenised(pool: Executor, batches: Iterable, encoding_name: str, ahead: int) -> Iterator[tuple[np.ndarray, dict, list]]:
    """Tokens of each batch, in order, with at most `ahead` batches under way: memory stays bounded."""
    under_way: deque = deque()
    for values, after, _ in batches:
        texts = [value for value in values if isinstance(value, str)]
        under_way.append((pool.submit(tokenise, texts, encoding_name), after, values))
        if len(under_way) > ahead:
            future, after, values = under_way.popleft()
            yield future.result(), after, values
    for future, after, values in under_way:
        yield future.result(), after, values


# ---------------------------------------------------------------------------------------------------- for train_gpt2.py

def prepare_path(path: str, tokenizer: str, say: Callable = print) -> Path:
    """`--data PATH`: a data directory as it is; text, .jsonl and .parquet files or globs once into data/<name>-<content key>."""
    if os.path.isdir(path):
        return Path(path)
    files = [path] if os.path.exists(path) else sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    key = hashlib.sha256(tokenizer.encode())
    for file in files:
        with open(file, "rb") as f:
            key.update(hashlib.file_digest(f, "sha256").digest())
    config = PrepareConfig(input=(path,), tokenizer=tokenizer)
    return prepare(dataclasses.replace(config, out=f"data/{config.corpus}-{key.hexdigest()[:12]}"), say)


def prepare_first_run(say: Callable = print) -> Path:
    """The first run's corpus: the running Python's standard library as bytes, into data/first-run. No download."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
    files = [file for file in library.rglob("*.py") if not folders & set(file.relative_to(library).parts[:-1])]
    # In the order of a hash: the last tenth, which validates, is then like the rest.
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(library).as_posix().encode()).digest())
    return prepare(PrepareConfig(input=tuple(map(str, files)), tokenizer="bytes", out=FIRST_RUN), say)


def main() -> None:
    config = parse_flags(PrepareConfig, PrepareConfig(), "Prepare token shards from a hub dataset, local text or ready-made shards.")
    folder = prepare(config)
    print(f"train on it: python train_gpt2.py --data {folder}")


if __name__ == "__main__":
    run_script(main)
