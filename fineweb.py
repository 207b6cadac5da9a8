"""Corpora into token shards: FineWeb-Edu, any hub dataset, local files, or shards that others have tokenised.

    python fineweb.py                                             FineWeb-Edu sample-10BT into edu_fineweb10B/
    python fineweb.py --input 'books/**/*.txt' --out data/books   your own text
    python fineweb.py --pretokenized --max-tokens 1_000_000_000   ready-made shards of FineWeb-Edu
    python fineweb.py --verify edu_fineweb10B                     read and check everything

The parent reads batches of documents, workers tokenise them, the parent joins the tokens in order and writes shards.
Each shard is committed together with the position of the source after it: killed at any moment and started again,
the same command goes on after the last shard and ends with the same bytes, whatever the number of workers.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sysconfig
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import tokens
from cli import UserError, parse_flags, run_script
from files import locked

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = (
    "kjj0/finewebedu10B-gpt2"  # the same corpus as llm.c shards, from the author of modded-nanogpt
)
TASK_BYTES = (
    2**19
)  # text per task: long enough to hide the cost of handing it over, short enough to keep memory small
MOST_SKIPPED = 0.1  # of all documents; beyond that the input is not what was meant
RETRIES = (
    6  # in a row and without progress, after 1, 2, 4 … seconds, on top of the hub client's own
)


@dataclass(frozen=True)
class Source:
    dataset: str = FINEWEB_EDU  # dataset on the hub
    name: str = (
        "sample-10BT"  # its configuration, for example sample-100BT; '': the dataset's default one
    )
    split: str = "train"  # its split
    revision: str = (
        "main"  # branch, tag or commit; the commit it stands for is pinned in the manifest
    )
    text_column: str = "text"  # column, or key of a .jsonl line, that holds the text
    input: tuple[
        str, ...
    ] = ()  # local files or globs instead: .txt and source files, .jsonl[.gz|.zst], .parquet
    split_on: str = ""  # what separates documents inside a text file (\n and \t are understood); '': each file is one document
    pretokenized: bool = False  # fetch ready-made llm.c shards (kjj0/finewebedu10B-gpt2, or --dataset), whole ones up to --max-tokens


@dataclass(frozen=True)
class Output:
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # encoding
    out: str = (
        ""  # output directory; '': edu_fineweb10B for the default dataset, else data/<corpus>
    )
    shard_tokens: int = 100_000_000  # tokens per shard
    max_tokens: int = 0  # stop after so many tokens; 0: never
    workers: int = 0  # tokenising processes; 0: one per CPU core
    verify: str = ""  # check every size, sha256 and token of this data directory, and nothing else


@dataclass(frozen=True)
class PrepareConfig(Output, Source):
    def __post_init__(self):
        for field, least in (("shard_tokens", 1), ("max_tokens", 0), ("workers", 0)):
            if getattr(self, field) < least:
                raise UserError(
                    f"--{field.replace('_', '-')} {getattr(self, field)}",
                    expected=f"{least} or more",
                    remedy="change it",
                )
        if self.pretokenized and (self.input or self.tokenizer != "gpt2"):
            raise UserError(
                "--pretokenized with --input or --tokenizer bytes",
                expected="gpt2 shards from the hub",
                remedy="leave one of them out",
            )

    @property
    def corpus(self) -> str:
        """What the names of the shards begin with."""
        if self.input:
            name = Path(
                self.input[0].split("*")[0]
                if len(self.input) == 1
                else os.path.commonpath(self.input)
            ).name.split(".")[0]
        else:
            name = self.dataset.rsplit("/", 1)[-1]
        return re.sub(r"[^\w.-]", "-", name).strip("-.") or "corpus"

    @property
    def source(self) -> str:
        """How messages name it."""
        return (
            " ".join(self.input[:3]) + " …" * (len(self.input) > 3)
            if self.input
            else f"--dataset {self.dataset} --name {self.name!r}"
        )

    @property
    def folder(self) -> Path:
        is_default = not self.input and (self.dataset, self.name) == (FINEWEB_EDU, "sample-10BT")
        return Path(self.out or ("edu_fineweb10B" if is_default else f"data/{self.corpus}"))


# ---------------------------------------------------------------------------------------------------- sources

# A source is a function of a position (None: the start) that yields (document, position after it, fraction of the source
# then done). Positions are JSON; position and fraction are None where they are not known. What is not a str cannot be used.
Rows = Iterator[tuple[Any, dict | None, float | None]]


def reason_to_skip(document: Any) -> str | None:
    if isinstance(document, ValueError):
        return str(document)
    return (
        None
        if isinstance(document, str)
        else "missing text"
        if document is None
        else f"{type(document).__name__} instead of text"
    )


def read_text(files: list[str], text_column: str, split_on: str, position: dict | None) -> Rows:
    """Local text, compressed (.gz, .bz2, .zst) or not: whole files, files split at a separator, or lines of JSON.

    A position is a file and a byte of its uncompressed content.
    """
    first, start = (position["file"], position["byte"]) if position else (0, 0)
    separator = split_on.replace("\\n", "\n").replace("\\t", "\t").encode()
    ends = np.cumsum([os.path.getsize(file) for file in files])
    for i in range(first, len(files)):
        is_jsonl = ".jsonl" in Path(files[i]).suffixes
        for piece, byte in pieces(files[i], b"\n" if is_jsonl else separator, start):
            if is_jsonl and not piece.strip():
                continue
            done = ends[i] if byte is None else min(ends[i], (ends[i - 1] if i else 0) + byte)
            yield (
                decode(piece, text_column if is_jsonl else None),
                {"file": i, "byte": byte} if byte else {"file": i + 1, "byte": 0},
                done / max(1, ends[-1]),
            )
        start = 0


def decode(piece: bytes, key: str | None) -> Any:
    """The text of a document, or of this key of a JSON object."""
    try:
        return json.loads(piece).get(key) if key is not None else piece.decode()
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    except (ValueError, AttributeError, RecursionError):
        return ValueError("not a JSON object")


def pieces(file: str, separator: bytes, start: int) -> Iterator[tuple[bytes, int | None]]:
    """The parts of a file between separators, from byte `start` on, each with the byte after it; without separator the whole file."""
    import pyarrow  # it opens compressed files as well as plain ones

    try:
        with pyarrow.input_stream(file) as stream:
            if not separator:
                yield stream.read(), None
                return
            position, rest = start, b""
            if stream.seekable():
                stream.seek(start)
            while (
                not stream.seekable() and start > 0
            ):  # compressed: what is done has to be unpacked once more
                start -= len(stream.read(min(start, 2**22))) or start
            while chunk := stream.read(
                max(2**22, len(rest))
            ):  # growing: a long document is not copied again and again
                *parts, rest = (rest + chunk).split(separator)
                for part in parts:
                    position += len(part) + len(separator)
                    yield part, position
            if rest:
                yield rest, position + len(rest)
    except OSError as error:  # its own errors do not name the file
        raise UserError(
            f"{file}: {error}",
            expected="a whole, readable file",
            remedy="mend it or leave it out of --input",
        ) from None


def read_parquet(files: list[str], text_column: str, position: dict | None) -> Rows:
    """Rows of parquet files, local or on the hub, where only the text column is fetched, 32 MB at a time. A position is a file and a row.

    `datasets` finds the files of a hub dataset, but its streams resume by reading the current file from its start again
    (2 GB in FineWeb-Edu), or, resharded by row group, fetch the footer anew for each of 10,000 groups. Read directly,
    the footer tells in which group to go on.
    """
    import pyarrow.parquet
    from huggingface_hub import HfFileSystem

    first, row = (position["file"], position["row"]) if position else (0, 0)
    for i in range(first, len(files)):
        try:
            with (
                HfFileSystem().open(files[i][len("hf://") :], block_size=2**25)
                if files[i].startswith("hf://")
                else open(files[i], "rb") as f
            ):
                file, end = pyarrow.parquet.ParquetFile(f), 0
                check_column(text_column, file.schema_arrow.names)
                for group in range(file.num_row_groups):
                    start, end = end, end + file.metadata.row_group(group).num_rows
                    if end <= row:
                        continue
                    for batch in file.iter_batches(128, row_groups=[group], columns=[text_column]):
                        for document in batch.column(0).to_pylist()[max(0, row - start) :]:
                            row += 1
                            yield (
                                document,
                                {"file": i, "row": row},
                                (i + row / file.metadata.num_rows) / len(files),
                            )
                        start += batch.num_rows
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{files[i]}: {error}",
                expected="a whole parquet file",
                remedy="fetch it again or leave it out",
            ) from None
        row = 0


def read_stream(stream, num_rows: int | None, text_column: str, position: dict | None) -> Rows:
    """Rows of a `datasets` stream of any other format. A position is the stream's own state, known after every 128 rows."""
    rows = position["rows"] if position else 0
    if position:
        stream.load_state_dict(position["state"])
    for table in stream.with_format("arrow").iter(128):
        check_column(text_column, table.column_names)
        *documents, last = table[text_column].to_pylist()
        rows += table.num_rows
        yield from ((document, None, None) for document in documents)
        yield (
            last,
            {"state": stream.state_dict(), "rows": rows},
            rows / num_rows if num_rows else None,
        )


def check_column(column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(
            f"--text-column {column}: no such column",
            expected=f"one of {', '.join(columns)}",
            remedy="choose the one with the text",
        )


class Batch(NamedTuple):
    documents: list[Any]
    after: dict  # position of the source after them
    fraction: float | None


def in_batches(rows: Rows) -> Iterator[Batch]:
    """Documents in tasks of about TASK_BYTES; short ones count as 100 bytes, so that a task never holds too many."""
    documents, size, after, fraction = [], 0, None, None
    for document, after, fraction in rows:
        documents.append(document)
        size += 100 + (len(document) if isinstance(document, str) else 0)
        if size >= TASK_BYTES and after:
            yield Batch(documents, after, fraction)
            documents, size = [], 0
    if documents:
        yield Batch(documents, after, fraction)


def expand(patterns: Iterable[str]) -> list[str]:
    """The files that paths and globs name: in the order given, sorted within a glob."""
    found = [
        [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for pattern in patterns
    ]
    for pattern, names in zip(patterns, found):
        if not any(os.path.isfile(name) for name in names):
            raise UserError(
                f"{pattern}: no such file",
                expected="a file, or a glob that matches files",
                remedy="check the path; for a folder write 'folder/**/*.txt', in quotes; fineweb.py makes prepared directories",
            )
    return [name for names in found for name in names if os.path.isfile(name)]


def open_files(config: PrepareConfig, files: list[str]) -> Callable[[dict | None], Rows]:
    num_parquet = sum(file.endswith(".parquet") for file in files)
    if num_parquet == 0:
        return functools.partial(read_text, files, config.text_column, config.split_on)
    if num_parquet < len(files):
        raise UserError(
            f"{config.source}: parquet and other files",
            expected="one kind",
            remedy="prepare them separately",
        )
    return functools.partial(read_parquet, files, config.text_column)


def open_dataset(config: PrepareConfig, revision: str) -> Callable[[dict | None], Rows]:
    import datasets

    builder = datasets.load_dataset_builder(config.dataset, config.name or None, revision=revision)
    splits = list(builder.config.data_files or {}) or list(builder.info.splits or {})
    if config.split not in splits:
        raise UserError(
            f"--split {config.split}: no such split",
            expected=f"one of {', '.join(splits)}",
            remedy="choose one of them",
        )
    if builder.name == "parquet":
        return functools.partial(
            read_parquet, list(builder.config.data_files[config.split]), config.text_column
        )
    info = (builder.info.splits or {}).get(config.split)
    return functools.partial(
        read_stream,
        builder.as_streaming_dataset(split=config.split),
        info and info.num_examples,
        config.text_column,
    )


def on_hub(config: PrepareConfig, say: Callable, action: Callable[[], Any]) -> Any:
    """`action()`, tried again while the connection fails; the one place where the hub clients' many errors become ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    for attempt in range(RETRIES + 1):
        try:
            return action()
        except (
            HTTPError,
            OSError,
            ValueError,
        ) as error:  # ValueError: an unknown configuration, a malformed name
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            passing = isinstance(
                error, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
            )
            if isinstance(error, HfHubHTTPError):
                passing = (
                    error.response.status_code in (408, 429) or error.response.status_code >= 500
                )
            if not passing or isinstance(error, OfflineModeIsEnabled) or attempt == RETRIES:
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"{config.source} --revision {config.revision}: {type(error).__name__}: {reason}",
                    expected="to read it from the hub",
                    remedy="check the names and the connection, then run the same command again",
                ) from error
            say(f"the hub did not answer ({type(error).__name__}), trying again in {2**attempt} s")
            time.sleep(2**attempt)


def hub_batches(
    config: PrepareConfig, revision: str, position: dict | None, say: Callable
) -> Iterator[Batch]:
    """Batches of a hub dataset; after a failed connection it is opened again where it failed."""
    batches = None

    def pull() -> Batch | None:
        nonlocal batches
        batches, current = None, batches or in_batches(open_dataset(config, revision)(position))
        batch = next(current, None)
        batches = current  # one that raised has ended and is not kept
        return batch

    while batch := on_hub(config, say, pull):
        position = batch.after
        yield batch


# ---------------------------------------------------------------------------------------------------- tokenising


def tokenise(documents: list[str], encoding_name: str) -> np.ndarray:
    """Tokens of the documents, each after <|endoftext|>, uint16."""
    encoding = tokens.get_encoding(encoding_name)
    start, parts = np.array([encoding.eot_token], dtype=np.uint16), []
    for text in documents:
        try:
            encoded = encoding.encode_to_numpy(text, disallowed_special=())
        except (
            UnicodeEncodeError
        ):  # a lone surrogate: U+FFFD takes its place, as in tiktoken's other methods
            encoded = encoding.encode_to_numpy(
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
                disallowed_special=(),
            )
        parts += [start, encoded.astype(np.uint16)]
    return np.concatenate(parts) if parts else start[:0]


def start_worker(encoding_name: str) -> None:
    """First thing in a worker: leave signals to the parent, but end with it, whatever ends it; load the vocabulary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    tokens.get_encoding(encoding_name)


@contextlib.contextmanager
def worker_pool(workers: int, encoding_name: str) -> Iterator[Executor]:
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(encoding_name,))
    try:
        pool.submit(
            tokenise, [], encoding_name
        ).result()  # where processes are forked, they are so now, before there are threads
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process was killed",
            expected=f"{workers} of them to run to the end",
            remedy="usually memory ran out: run the same command again, perhaps with fewer --workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def tokenised(
    pool: Executor, batches: Iterable[Batch], encoding_name: str, ahead: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Tokens of each batch, in order. At most `ahead` batches are under way, so memory is bounded whatever the corpus."""
    under_way: deque = deque()
    for batch in batches:
        under_way.append(
            (
                pool.submit(
                    tokenise,
                    [text for text in batch.documents if isinstance(text, str)],
                    encoding_name,
                ),
                batch,
            )
        )
        if len(under_way) >= ahead:
            future, first = under_way.popleft()
            yield future.result(), first
    for future, batch in under_way:
        yield future.result(), batch


# ---------------------------------------------------------------------------------------------------- writing


class Writer:
    """Cuts the stream of tokens into shards, and commits each with the position of the source after its last token.

    While one half of the buffer is on its way to disk, in `background`, the other is filled. The first two shards are
    committed together: a corpus that ends before them is divided in another way.
    """

    def __init__(
        self, folder: Path, corpus: str, settings: dict, eot_token: int, background: Executor
    ):
        self.folder, self.corpus, self.settings, self.eot_token, self.background = (
            folder,
            corpus,
            settings,
            eot_token,
            background,
        )
        partial = resume(folder, settings)
        self.shards, self.position = partial["shards"], partial["position"]
        self.num_tokens = sum(shard["tokens"] for shard in self.shards)
        self.buffer = np.empty((2, settings["shard_tokens"]), dtype=np.uint16)
        self.half, self.fill = 0, 0
        self.filling = self.buffer[:1] if self.shards else self.buffer
        self.commit = background.submit(int)  # the one under way; at first none

    def add(self, new: np.ndarray, before: dict, skip: int) -> None:
        """Append new[skip:], where `before` is the position at the start of `new`."""
        while skip < len(new):
            room = self.filling.reshape(-1)[self.fill :]
            n = min(len(new) - skip, len(room))
            room[:n] = new[skip : skip + n]
            self.fill, skip, self.num_tokens = self.fill + n, skip + n, self.num_tokens + n
            if n == len(room):
                self.commit.result()
                self.commit = self.background.submit(
                    self.write, self.filling, before | {"skip": skip}
                )
                if len(self.filling) == 2:
                    self.commit.result()
                self.half, self.fill = 1 - self.half, 0
                self.filling = self.buffer[self.half : self.half + 1]

    def write(self, parts: Iterable[np.ndarray], position: dict | None = None) -> None:
        """Write these shards; with their position they are committed, the last ones of a corpus are by its manifest."""
        for part in parts:
            split = "train" if self.shards else "val"
            self.shards.append(
                tokens.write_shard(
                    self.folder / f"{self.corpus}_{split}_{len(self.shards):06d}.bin", part
                )
            )
        if position:
            tokens.write_manifest(
                self.folder,
                self.settings | {"shards": self.shards, "position": position},
                partial=True,
            )

    def finish(self, summary: dict) -> None:
        """Write what is left, and the manifest."""
        self.commit.result()
        rest = self.filling.reshape(-1)[: self.fill]
        cut = len(rest) if self.shards else validation_cut(rest, self.eot_token)
        self.write(part for part in (rest[cut:], rest[:cut]) if len(part))
        tokens.write_manifest(self.folder, self.settings | summary | {"shards": self.shards})


def validation_cut(stream: np.ndarray, eot_token: int) -> int:
    """Where the validating last tenth of a small corpus begins: at the nearest document if there are ten or more."""
    cut = len(stream) - max(1, len(stream) // 10)
    starts = np.flatnonzero(
        stream == eot_token
    )  # text never has this token: a literal <|endoftext|> is ordinary text
    return int(starts[1 + np.abs(starts[1:] - cut).argmin()]) if len(starts) >= 10 else cut


def resume(folder: Path, settings: dict) -> dict:
    """The partial manifest of an interrupted preparation with the same settings, its shards checked; or a fresh one."""
    if (folder / "manifest.partial.json").exists():
        partial = tokens.read_manifest(folder, partial=True)
        for file in folder.iterdir():  # what a kill left unfinished or not yet in the manifest
            if file.suffix in (".tmp", ".bin") and file.name not in {
                shard["name"] for shard in partial["shards"]
            }:
                file.unlink()
        if partial["shards"]:  # else nothing is lost by beginning anew
            check_settings(folder, partial, settings)
            tokens.verify_shards(folder, partial)
            return partial
    elif foreign := [file.name for file in folder.iterdir() if file.suffix in tokens.SUFFIXES]:
        raise UserError(
            f"{folder}: holds {foreign[0]} and no manifest",
            expected="an empty directory",
            remedy="choose another --out",
        )
    partial = settings | {"shards": [], "position": None}
    tokens.write_manifest(folder, partial, partial=True)
    return partial


def check_settings(folder: Path, manifest: dict, settings: dict) -> None:
    """Refuse to go on with another source or another cut than the folder was begun with."""
    old, new = (
        m["source"]
        | {key: m[key] for key in ("encoding", "revision", "shard_tokens", "max_tokens")}
        for m in (manifest, settings)
    )
    if differing := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        raise UserError(
            f"{folder}: {', '.join(f'{key} was {old.get(key)!r}, now {new.get(key)!r}' for key in differing)}",
            expected="the settings and source it was begun with",
            remedy=f"repeat them{' (--revision ' + old['revision'] + ')' if 'revision' in differing else ''}, or choose another --out",
        )


class Progress:
    """Tokens done of the total as far as it is known, tokens/s, time left, shard: a bar on a terminal, else lines."""

    def __init__(self, say: Callable, done: int):
        from tqdm import tqdm

        self.say, self.first, self.start = say, done, time.monotonic()
        self.next_line = self.start + 10
        self.bar = tqdm(
            initial=done, unit=" tokens", unit_scale=True, disable=None
        )  # None: disabled unless on a terminal

    def show(self, done: int, fraction: float | None, shard: int) -> None:
        now, total = time.monotonic(), done / fraction if fraction else None
        if not self.bar.disable:
            self.bar.total = total
            self.bar.set_postfix_str(f"shard {shard}", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now > self.next_line:
            self.next_line = now + 30
            rate = (done - self.first) / (now - self.start)
            left = (
                f"of about {total:,.0f} ({fraction:.1%}), {datetime.timedelta(seconds=round((total - done) / rate))} left"
                if total and rate
                else "of an unknown total"
            )
            self.say(f"shard {shard}: {done:,} tokens {left}, {rate:,.0f} tokens/s")

    def close(self, done: int) -> str:
        self.bar.close()
        seconds = time.monotonic() - self.start
        return f"{seconds:.1f} s, {(done - self.first) / seconds:,.0f} tokens/s"


# ---------------------------------------------------------------------------------------------------- preparing


def prepare(config: PrepareConfig, say: Callable = print) -> Path:
    """Make the data directory that the flags describe, or go on where an earlier call was interrupted; returns it."""
    files = expand(config.input)
    folder = config.folder
    if files:
        sizes = [[os.path.basename(file), os.path.getsize(file)] for file in files]
        source = {
            "files": len(files),
            "bytes": sum(size for _, size in sizes),
            "names_and_sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
            "text_column": config.text_column,
            "split_on": config.split_on,
        }
    elif config.pretokenized:
        source = {"dataset": PRETOKENIZED if config.dataset == FINEWEB_EDU else config.dataset}
    else:
        source = {
            "dataset": config.dataset,
            "name": config.name,
            "split": config.split,
            "text_column": config.text_column,
        }
    encoding = tokens.get_encoding(config.tokenizer)
    settings = {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "source": source,
        "revision": None,
        "shard_tokens": config.shard_tokens,
        "max_tokens": config.max_tokens,
    }
    with locked(folder):
        if (folder / "manifest.json").exists():
            manifest = tokens.read_manifest(folder)
            pinned = manifest["revision"] if config.revision == "main" or files else config.revision
            check_settings(folder, manifest, settings | {"revision": pinned})
            (folder / "manifest.partial.json").unlink(
                missing_ok=True
            )  # the last thing a kill can leave
            say(f"{folder} is already prepared")
        elif config.pretokenized:
            fetch(config, settings, say)
        else:
            write(config, settings, files, say)
    return folder


def write(config: PrepareConfig, settings: dict, files: list[str], say: Callable) -> None:
    """Read, tokenise and write; the one path that every corpus takes."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # Slurm gives a job some of the cores
    workers = config.workers or allowed
    with worker_pool(workers, config.tokenizer) as pool, ThreadPoolExecutor(1) as background:
        if not files:
            settings["revision"] = hub_info(config, config.dataset, say).sha
        writer = Writer(
            config.folder,
            config.corpus,
            settings,
            tokens.get_encoding(config.tokenizer).eot_token,
            background,
        )
        before = writer.position or {"source": None, "documents": 0, "skipped": {}, "skip": 0}
        skip, documents, skipped = before["skip"], before["documents"], Counter(before["skipped"])
        if writer.shards:
            say(f"going on after shard {len(writer.shards) - 1} and {documents:,} documents")
        if files:
            batches = in_batches(open_files(config, files)(before["source"]))
        else:
            batches = hub_batches(config, settings["revision"], before["source"], say)
        progress = Progress(say, writer.num_tokens)
        limit = config.max_tokens or 2**63
        for new, batch in tokenised(pool, batches, config.tokenizer, 3 * workers):
            new = new[: skip + limit - writer.num_tokens]
            writer.add(new, before, skip)
            documents, skip = (
                documents + int(np.count_nonzero(new == writer.eot_token)),
                0,
            )  # text never has this token
            skipped.update(filter(None, map(reason_to_skip, batch.documents)))
            before = {"source": batch.after, "documents": documents, "skipped": dict(skipped)}
            progress.show(
                writer.num_tokens,
                max(batch.fraction or 0, writer.num_tokens / limit),
                len(writer.shards),
            )
            if documents + skipped.total() > 1000:
                check_skipped(config, documents, skipped)
            if writer.num_tokens >= limit:
                break
        check_skipped(config, documents, skipped)
        num_tokens, speed = writer.num_tokens, progress.close(writer.num_tokens)
        if num_tokens <= documents:
            raise UserError(
                f"{config.source}: {documents:,} documents without any text",
                expected="some text",
                remedy="check the source",
            )
        writer.finish({"documents": documents, "skipped": dict(skipped)})
    say(
        f"{config.folder}: {documents:,} documents, {num_tokens:,} tokens in {len(writer.shards)} shards, {speed}; skipped documents: {listed(skipped)}"
    )


def listed(skipped: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "none"


def check_skipped(config: PrepareConfig, documents: int, skipped: Counter) -> None:
    found = documents + skipped.total()
    if skipped.total() > MOST_SKIPPED * found:
        raise UserError(
            f"{config.source}: {skipped.total():,} of {found:,} documents cannot be used: {listed(skipped)}",
            expected=f"at most {MOST_SKIPPED:.0%}",
            remedy=f"check the source; fineweb.py --text-column takes its text from another place than {config.text_column!r}",
        )


def hub_info(config: PrepareConfig, dataset: str, say: Callable):
    from huggingface_hub import HfApi

    return on_hub(
        config,
        say,
        lambda: HfApi().dataset_info(dataset, revision=config.revision, files_metadata=True),
    )


def fetch(config: PrepareConfig, settings: dict, say: Callable) -> None:
    """Download llm.c shards from the hub, the validation shard first, whole ones until --max-tokens are there."""
    from huggingface_hub import hf_hub_download

    dataset, folder = settings["source"]["dataset"], config.folder
    info = hub_info(config, dataset, say)
    shards = sorted(
        (file for file in info.siblings if re.search(r"_(val|train)_\d+\.bin$", file.rfilename)),
        key=lambda file: ("_val_" not in file.rfilename, file.rfilename),
    )
    if len(shards) < 2:
        raise UserError(
            f"--dataset {dataset}: no *_val_*.bin and *_train_*.bin",
            expected="token shards in llm.c's format",
            remedy="leave out --pretokenized to tokenise its text",
        )
    ends = np.cumsum([(file.size - tokens.HEADER_BYTES) // 2 for file in shards])
    wanted = (
        shards[: max(2, int(np.searchsorted(ends, config.max_tokens)) + 1)]
        if config.max_tokens
        else shards
    )
    settings["revision"] = info.sha
    done = resume(folder, settings)["shards"]
    for i, file in enumerate(wanted[len(done) :], start=len(done)):
        say(f"shard {i} of {len(wanted)}: {file.rfilename}, {file.size / 1e6:,.0f} MB")
        path = Path(
            on_hub(
                config,
                say,
                functools.partial(
                    hf_hub_download,
                    dataset,
                    file.rfilename,
                    repo_type="dataset",
                    revision=info.sha,
                    local_dir=folder / ".download",
                ),
            )
        )
        try:
            done.append(
                tokens.adopt_shard(path, folder / path.name, file.lfs.sha256 if file.lfs else None)
            )
        except UserError:
            path.unlink()  # or it would be taken for good the next time
            raise
        tokens.write_manifest(folder, settings | {"shards": done, "position": None}, partial=True)
    shutil.rmtree(folder / ".download", ignore_errors=True)
    tokens.write_manifest(folder, settings | {"shards": done})
    say(f"{folder}: {sum(shard['tokens'] for shard in done):,} tokens in {len(done)} shards")


# ---------------------------------------------------------------------------------------------------- for train_gpt2.py


def prepare_path(path: str, tokenizer: str, say: Callable = print) -> Path:
    """`--data PATH`: a directory as it is; text, .jsonl and .parquet files or globs, once, into data/<corpus>-<content key>."""
    if os.path.isdir(path):
        return Path(path)
    key = hashlib.sha256(tokenizer.encode())
    for file in expand([path]):
        with open(file, "rb") as f:
            key.update(
                os.path.basename(file).encode() + b"\0" + hashlib.file_digest(f, "sha256").digest()
            )
    config = PrepareConfig(input=(path,), tokenizer=tokenizer)
    return prepare(
        dataclasses.replace(config, out=f"data/{config.corpus}-{key.hexdigest()[:12]}"), say
    )


def prepare_first_run(say: Callable = print) -> Path:
    """The first run's corpus, without a download: the standard library of the running Python as bytes, in data/first-run."""
    folder = Path("data/first-run")
    if (folder / "manifest.json").exists():
        return folder
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = [
        file
        for file in library.rglob("*.py")
        if not left_out.intersection(file.relative_to(library).parts)
    ]
    # Ordered by a hash, so that the last tenth, which validates, is like the rest.
    files.sort(
        key=lambda file: hashlib.sha256(file.relative_to(library).as_posix().encode()).digest()
    )
    return prepare(
        PrepareConfig(input=tuple(map(str, files)), tokenizer="bytes", out=str(folder)), say
    )


def main() -> None:
    config = parse_flags(
        PrepareConfig,
        PrepareConfig(),
        "Prepare token shards from a hub dataset, local files or ready-made shards.",
    )
    say = functools.partial(print, flush=True)
    if config.verify:
        num_tokens = tokens.verify(Path(config.verify))
        say(f"{config.verify}: {num_tokens:,} tokens, all sizes, hashes and tokens are right")
    else:
        say(f"train on it: python train_gpt2.py --data {prepare(config, say)}")


if __name__ == "__main__":
    run_script(main)
