"""Turn a corpus into token shards: FineWeb-Edu, any dataset on the hub, or local files.

    python fineweb.py                                            FineWeb-Edu into edu_fineweb10B/
    python fineweb.py --input 'books/**/*.txt' --out data/books  your own text
    python fineweb.py --pretokenized --max-tokens 1_000_000_000  ready-made shards of FineWeb-Edu
    python fineweb.py --verify edu_fineweb10B                    read and check everything

The way of a token, from file to shard:

    read     a source yields documents one by one, each with the position after it (documents.py)
    batch    documents are collected into batches of about half a million characters
    encode   threads turn batches into tokens (tiktoken releases the interpreter lock meanwhile)
    write    the main thread joins the tokens in the order of the documents and cuts shards

Each shard is committed together with the position of its last token. A preparation that was killed
goes on after the last committed shard when the same command is run again. It ends with the same
bytes as one that was never interrupted, whatever the number of threads.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tiktoken
import tyro

import tokens
from support import script
from support import shards as token_files
from support.documents import (
    ENDLESS_RUN,
    TOO_LONG,
    Row,
    Unusable,
    beginning,
    dataset_info,
    dataset_source,
    expand,
    file_source,
    kind_and_compression,
    naming_the_file,
    on_hub,
    parts_of,
    texts_in,
    weight,
)
from support.files import locked, plain_name, read_json, remove, remove_leftovers, walking
from support.hub import EndlessDownload
from support.script import UserError, parse_flags, run_script

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_SAMPLE = "sample-10BT"
# The same corpus as llm.c shards, from the author of modded-nanogpt.
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"

FINEWEB_EDU_FOLDER = "edu_fineweb10B"  # where the default dataset is prepared
FIRST_RUN_FOLDER = "data/first-run"  # where the first run's corpus is prepared

# Characters in a batch: enough to hide the cost of handing it to a thread, little enough to keep
# memory small.
BATCH_CHARACTERS = 2**19
# Characters of a document that is pointed out as probably several.
LONG_DOCUMENT = 10_000_000
# Share of documents that may be unusable. Beyond it the input is not what was meant. A single one
# never ends a corpus of which something remains.
MOST_SKIPPED = 0.1


# ---------------------------------------------------------------------------------------- flags


no_files = tyro.conf.arg(metavar="PATH …", help_behavior_hint="(default: none)")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and where to put it."""

    # The hub's dataset to read.
    dataset: str = FINEWEB_EDU
    # The dataset's configuration, for example sample-100BT. '' means the dataset's default one.
    name: str = FINEWEB_EDU_SAMPLE
    # The dataset's split to read.
    split: str = "train"
    # Branch, tag or commit of the dataset. The manifest records the commit it stands for.
    revision: str = "main"
    # Column, or key of a JSON object, that holds the text.
    text_column: str = "text"
    # Local files, folders or globs to read instead of a dataset. They may hold text or source
    # code, JSON, JSON lines, CSV or TSV (all of these also as .gz, .bz2 or .zst), Parquet, Arrow.
    input: Annotated[tuple[str, ...], no_files] = ()
    # What separates documents inside a text file; \n, \r and \t are understood. '' means that each
    # file is one document.
    split_on: str = ""
    # Download ready-made llm.c shards, whole ones up to --max-tokens.
    pretokenized: bool = False
    # The encoding of the shards.
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    # The output directory. '' means edu_fineweb10B for the default dataset, else data/<corpus>.
    out: str = ""
    # Tokens in a shard.
    shard_tokens: int = 100_000_000
    # Stop after this many tokens. 0 means never.
    max_tokens: int = 0
    # Encoding threads. 0 means one for each CPU core that this process may use: by its affinity
    # mask, its control group and SLURM_CPUS_PER_TASK.
    workers: int = 0
    # Check every size, sha256 and token of this data directory, and do nothing else.
    verify: str = ""

    def __post_init__(self):
        # A shard's header holds its token count in 31 bits.
        for name, least, most in (
            ("shard_tokens", 1, 2**31 - 1),
            ("max_tokens", 0, 2**62),
            ("workers", 0, 1024),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(
                    f"--{name.replace('_', '-')} {value}; expected a number from {least} to "
                    f"{most}; choose one in that range"
                )
        if self.pretokenized and (self.input or self.tokenizer != "gpt2"):
            raise UserError(
                "--pretokenized with --input or --tokenizer bytes; expected gpt2 shards from the "
                "hub; leave one of them out"
            )

    @property
    def corpus(self) -> str:
        """What the names of the shards begin with."""
        if not self.input:
            name = self.dataset.rsplit("/", 1)[-1]
        elif len(self.input) == 1:
            path = Path(self.input[0].split("*")[0])
            name = path.name or path.resolve().name
            name = name.split(".")[0]
        else:
            try:
                name = Path(os.path.commonpath(self.input)).name.split(".")[0]
            except ValueError:  # absolute and relative paths have nothing in common
                name = ""
        name = re.sub(r"[^\w.-]", "-", name)
        # A file name has at most 255 bytes, and `_train_000000.bin.tmp` must fit behind this one.
        name = name.encode()[:150].decode(errors="ignore")
        return name.strip("-.") or "corpus"

    @property
    def source_name(self) -> str:
        """How messages name the source."""
        if not self.input:
            return f"--dataset {self.dataset} --name {self.name!r}"
        more = " …" if len(self.input) > 3 else ""
        return " ".join(self.input[:3]) + more

    @property
    def folder(self) -> Path:
        """The output directory."""
        if self.out:
            return Path(self.out)
        if not self.input and (self.dataset, self.name) == (FINEWEB_EDU, FINEWEB_EDU_SAMPLE):
            return Path(FINEWEB_EDU_FOLDER)
        return Path("data") / self.corpus


# ------------------------------------------------------------------------- batch


class Batch(NamedTuple):
    """Documents that are encoded together, and those that were skipped between them.

    position: the position of the source after them. fraction: how much of it has been read then.
    """

    documents: list[str]
    skipped: list[Unusable]
    position: Any
    fraction: float | None

    @property
    def characters(self) -> int:
        return sum(weight(document) for document in [*self.documents, *self.skipped])


def in_batches(rows: Iterator[Row]) -> Iterator[Batch]:
    """Rows in batches of about BATCH_CHARACTERS, each of which ends at a known position."""
    documents, skipped = [], []
    characters = 0
    position, fraction = None, None
    for document, position, fraction in rows:  # noqa: B007  what the last row said is needed below
        if isinstance(document, str):
            documents.append(document)
        else:
            skipped.append(document)
        characters += weight(document)
        if characters >= BATCH_CHARACTERS and position is not None:
            yield Batch(documents, skipped, position, fraction)
            documents, skipped = [], []
            characters = 0
    if documents or skipped:
        yield Batch(documents, skipped, position, fraction)


def hub_batches(
    config: PrepareConfig, revision: str, position: Any, say: Callable
) -> Iterator[Batch]:
    """Batches of a dataset on the hub, which is opened again where a connection failed."""
    batches = None

    def next_batch() -> Batch | None:
        nonlocal batches
        if batches is None:
            batches = in_batches(dataset_source(config, revision)(position))
        current, batches = batches, None  # a generator that raises has ended and is of no more use
        batch = next(current, None)
        batches = current
        return batch

    while batch := on_hub(config, say, next_batch):
        position = batch.position
        yield batch


# ------------------------------------------------------------------------- encode


def encode_document(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of a text of any length, uint16. A literal <|endoftext|> in it is ordinary text.

    tiktoken's pattern matcher overflows its stack at a run of a million spaces, so a long text is
    encoded in parts. The tokens are those of the whole text, because each cut is where the pattern
    of the gpt2 encoding cuts anyway: before a whitespace character that is followed by something
    else. Let w be that character. The pattern never joins w to what stands before it:

    - After a character that is no whitespace: only `\\s+` takes whitespace as any but its first
      character, so the match before w has ended.
    - After more whitespace: `\\s+(?!\\S)` takes the run up to w, and leaves w to what follows.
      At the end of a part, where w is missing, `\\s++$` takes the same run.
    """
    return np.concatenate([_encode_part(encoding, part) for part in parts_of(text)])


def _encode_part(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    try:
        part = encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        # A lone surrogate: U+FFFD takes its place, as in tiktoken's other methods.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        part = encoding.encode_to_numpy(text, disallowed_special=())
    return part.astype(np.uint16)


def encode_batch(encoding: tiktoken.Encoding, documents: list[str]) -> np.ndarray:
    """The tokens of all documents, each after <|endoftext|>, uint16."""
    end_of_text = np.array([encoding.eot_token], dtype=np.uint16)
    parts = [end_of_text[:0]]
    for document in documents:
        parts.append(end_of_text)
        parts.append(encode_document(encoding, document))
    return np.concatenate(parts)


def encode_in_order(
    pool: Executor, encoding: tiktoken.Encoding, batches: Iterable[Batch], most_characters: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The tokens of each batch, in the order of the batches, encoded by the threads of `pool`.

    A batch is read while at most `most_characters` are under way, so memory is bounded whatever the
    length of the corpus.
    """
    under_way: deque = deque()
    characters = 0
    for batch in batches:
        under_way.append((pool.submit(encode_batch, encoding, batch.documents), batch))
        characters += batch.characters
        while under_way and characters > most_characters:
            future, first = under_way.popleft()
            characters -= first.characters
            yield future.result(), first
    for future, batch in under_way:
        yield future.result(), batch


def num_cores() -> int:
    """CPU cores that this process may use: by its affinity mask, its cgroup's quota, and Slurm."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdecimal():
        cores = min(cores, int(slurm))
    quota = cgroup_quota()
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    return max(1, cores)


def cgroup_quota(root: str = "/") -> float | None:
    """The CPU cores that the control groups of this process allow in time; None: no limit."""
    quotas = []
    mount = Path(root, "sys/fs/cgroup")
    folders = [mount, mount / "cpu"]
    with contextlib.suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                base = mount
            elif "cpu" in controllers.split(","):  # version 1
                base = mount / "cpu"
            else:
                continue
            group = base / path.lstrip("/")
            folders += [group, *group.parents]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))  # "max" is a ValueError: no limit
        with contextlib.suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0:  # -1: no limit
                quotas.append(quota / period)
    return min(quotas, default=None)


# ------------------------------------------------------------------------- write


@dataclass(frozen=True)
class Position:
    """Where the stream of tokens stands, so that a preparation can go on there.

    It is stored in manifest.partial.json with every shard.
    """

    source: Any = None  # position of the source before the current batch; None: its start
    batch_tokens: int = 0  # tokens of the current batch that are in committed shards
    documents: int = 0  # usable documents before the current batch
    skipped: dict[str, int] = field(default_factory=dict)  # unusable ones, by reason
    longest: int = 0  # characters of the longest document before the current batch
    places: list[str] = field(default_factory=list)  # of the first unusable ones

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def after(self, batch: Batch, num_documents: int) -> "Position":
        """The position after a batch, of which so many documents were used."""
        skipped = Counter(self.skipped)
        skipped.update(document.reason for document in batch.skipped)
        places = self.places + [document.place for document in batch.skipped]
        longest = max([self.longest, *map(len, batch.documents)])
        documents = self.documents + num_documents
        return Position(batch.position, 0, documents, dict(skipped), longest, places[:5])


class Writer:
    """Cuts the stream of tokens into shards, and commits each with the position of its last token.

    The first two shards are committed together, because a corpus that ends before them is divided
    in another way.
    """

    def __init__(self, folder: Path, corpus: str, settings: dict):
        self.folder = folder
        self.corpus = corpus
        self.settings = settings
        partial = begin_or_resume(folder, settings)
        self.shards = partial["shards"]
        self.position = Position(**partial["position"])
        self.num_tokens = sum(
            shard["tokens"] for shard in self.shards
        )  # those in `filled` included
        self.buffer = np.empty(2 * settings["shard_tokens"], dtype=np.uint16)
        self.filled = 0

    def add(self, batch_tokens: np.ndarray, position: Position) -> None:
        """Append a batch's tokens, from position.batch_tokens on. `position` is where it began."""
        done = position.batch_tokens
        while done < len(batch_tokens):
            size = self.settings["shard_tokens"]
            if not self.shards:
                size = 2 * size
            part = batch_tokens[done : done + size - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            self.num_tokens += len(part)
            done += len(part)
            if self.filled == size:
                for shard in self.buffer[:size].reshape(-1, self.settings["shard_tokens"]):
                    self.write_shard(shard)
                self.commit(dataclasses.replace(position, batch_tokens=done))
                self.filled = 0

    def write_shard(self, shard: np.ndarray) -> None:
        number = len(self.shards)
        split = "train" if number else "val"
        file = self.folder / f"{self.corpus}_{split}_{number:06d}.bin"
        self.shards.append(token_files.write_shard(file, shard))

    def commit(self, position: Position) -> None:
        """Record the shards so far, and where to go on after them."""
        progress = {"shards": self.shards, "position": dataclasses.asdict(position)}
        token_files.write_manifest(self.folder, self.settings | progress, partial=True)

    def finish(self, summary: dict, eot_token: int) -> None:
        """Write what is left, and the manifest."""
        rest = self.buffer[: self.filled]
        if not self.shards:
            cut = validation_cut(rest, eot_token)
            self.write_shard(rest[cut:])
            rest = rest[:cut]
        if len(rest):
            self.write_shard(rest)
        token_files.write_manifest(self.folder, self.settings | summary | {"shards": self.shards})


def validation_cut(stream: np.ndarray, eot_token: int) -> int:
    """Where the last tenth of a small corpus begins, which validates.

    It begins at a document if there are ten or more of them. Text never has the token eot_token.
    """
    cut = len(stream) - max(1, len(stream) // 10)
    starts = np.flatnonzero(stream == eot_token)
    if len(starts) < 10:
        return cut
    nearest = np.abs(starts[1:] - cut).argmin()
    return int(starts[1 + nearest])


PARTIAL_SHAPE = {
    "source": dict,
    "position": {
        "source": (dict, type(None)),
        "batch_tokens": int,
        "documents": int,
        "skipped": {str: int},
        "longest": int,
        "places?": [str],
    },
}
SHARD_NAME = re.compile(r"[\w.-]+_(val|train)_\d+\.bin")


def begin_or_resume(folder: Path, settings: dict) -> dict:
    """The partial manifest of an interrupted preparation, its shards checked; or a new one."""
    if (folder / "manifest.partial.json").exists():
        partial = read_partial_manifest(folder)
        if partial["shards"]:
            check_settings(folder / "manifest.partial.json", partial, settings)
            token_files.verify_shards(folder, partial, "manifest.partial.json")
        # Only now: a damaged name in the manifest must not cost the shard that has it.
        remove_uncommitted(folder, {shard["name"] for shard in partial["shards"]})
        if partial["shards"]:  # else nothing is lost by beginning anew
            return partial
    else:
        for file in folder.iterdir():
            if file.suffix in token_files.SUFFIXES:
                raise UserError(
                    f"{folder}: holds {file.name} and no manifest; expected an empty directory; "
                    "choose another --out"
                )
    partial = settings | {"shards": [], "position": dataclasses.asdict(Position())}
    token_files.write_manifest(folder, partial, partial=True)
    return partial


def read_partial_manifest(folder: Path) -> dict:
    """The partial manifest, which may come from somebody else. Its names stay in the folder."""
    read_json(folder / "manifest.partial.json", PARTIAL_SHAPE, token_files.MANIFEST_BYTES)
    return token_files.read_manifest(folder, partial=True)


def remove_uncommitted(folder: Path, committed: set[str]) -> None:
    """Remove what a kill left: unfinished files, and shards that are not yet in the manifest."""
    remove_leftovers(folder)
    for file in folder.iterdir():
        if SHARD_NAME.fullmatch(file.name) and file.name not in committed:
            file.unlink()


def check_settings(file: Path, manifest: dict, settings: dict) -> None:
    """Refuse to go on with another source or another cut than its manifest, `file`, tells of."""
    old = comparable_settings(manifest)
    new = comparable_settings(settings)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if not differing:
        return
    changes = [
        f"{key[:80]} was {str(old.get(key))[:200]!r}, now {new.get(key)!r}" for key in differing[:9]
    ]
    remedy = "repeat them"
    if "revision" in differing:
        remedy = f"repeat them (--revision {str(old['revision'])[:80]})"
    raise UserError(
        f"{file}: {', '.join(changes)}; expected the settings and source it was begun with; "
        f"{remedy}, or choose another --out"
    )


def comparable_settings(manifest: dict) -> dict:
    keys = ("encoding", "revision", "shard_tokens", "max_tokens")
    source = manifest.get("source")
    if not isinstance(source, dict):
        source = {}
    return source | {key: manifest.get(key) for key in keys}


class Progress:
    """Shows tokens done, speed and time left: as a bar on a terminal, elsewhere as lines."""

    def __init__(self, say: Callable, num_tokens: int):
        from tqdm import tqdm

        self.say = say
        self.first = num_tokens
        self.start = time.monotonic()
        self.next_line = self.start + 10
        # disable=None: no bar unless on a terminal.
        self.bar = tqdm(initial=num_tokens, unit=" tokens", unit_scale=True, disable=None)

    def show(self, num_tokens: int, fraction: float | None, shard: int) -> None:
        """Show that so many tokens, about this fraction of all, are done."""
        total = num_tokens / fraction if fraction else None
        if not self.bar.disable:
            self.bar.total = total
            self.bar.set_postfix_str(f"shard {shard}", refresh=False)
            self.bar.update(num_tokens - self.bar.n)
            return
        now = time.monotonic()
        if now < self.next_line:
            return
        self.next_line = now + 30
        rate = (num_tokens - self.first) / (now - self.start)
        left = "of an unknown total"
        if total and rate:
            seconds = min((total - num_tokens) / rate, 1e10)  # a timedelta holds little more
            seconds = datetime.timedelta(seconds=round(seconds))
            left = f"of about {total:,.0f} ({fraction:.1%}), {seconds} left"
        self.say(f"shard {shard}: {num_tokens:,} tokens {left}, {rate:,.0f} tokens/s")

    def close(self, num_tokens: int) -> str:
        """End the bar; returns time and speed in words."""
        self.bar.close()
        seconds = time.monotonic() - self.start
        return f"{seconds:.1f} s, {(num_tokens - self.first) / seconds:,.0f} tokens/s"


# ------------------------------------------------------------------------- the whole way


def prepare(config: PrepareConfig, say: Callable = print) -> Path:
    """Make the data directory that the flags describe; returns it.

    A finished one is accepted as it is, without writing. An interrupted one is gone on with.
    Raises UserError where the source cannot be used or the directory was begun in another way.
    """
    files = expand(config.input)
    folder = config.folder
    encoding = tokens.get_encoding(config.tokenizer)
    settings = {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "source": describe_source(config, files),
        "revision": None,
        "shard_tokens": config.shard_tokens,
        "max_tokens": config.max_tokens,
    }
    if is_prepared(config, settings, say):
        return folder
    with locked(folder):
        # Another process may have finished it before the lock was ours.
        if is_prepared(config, settings, say):
            return folder
        if config.pretokenized:
            download_shards(config, settings, say)
        else:
            write_corpus(config, settings, encoding, files, say)
    return folder


def describe_source(config: PrepareConfig, files: list[str]) -> dict:
    """What the manifest says of the source. A directory is only gone on with for the same one."""
    if files:
        sizes = [[os.path.basename(file), os.path.getsize(file)] for file in files]
        return {
            "files": len(files),
            "bytes": sum(size for _, size in sizes),
            "names_and_sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
            "text_column": config.text_column,
            "split_on": config.split_on,
        }
    if config.pretokenized:
        is_default = config.dataset == FINEWEB_EDU
        return {"dataset": PRETOKENIZED if is_default else config.dataset}
    return {
        "dataset": config.dataset,
        "name": config.name,
        "split": config.split,
        "text_column": config.text_column,
    }


def is_prepared(config: PrepareConfig, settings: dict, say: Callable) -> bool:
    """Whether the directory is finished; raises UserError if it is with other settings.

    Nothing is written or locked, so prepared data may lie where this user cannot write.
    """
    folder = config.folder
    if not (folder / "manifest.json").exists():
        return False
    manifest = token_files.read_manifest(folder)
    if config.input or config.revision == "main":
        settings = settings | {"revision": manifest.get("revision")}
    else:
        settings = settings | {"revision": config.revision}
    check_settings(folder / "manifest.json", manifest, settings)
    with contextlib.suppress(OSError):  # a kill between the two last writes leaves it
        (folder / "manifest.partial.json").unlink()
    say(f"{folder} is already prepared")
    return True


def write_corpus(
    config: PrepareConfig,
    settings: dict,
    encoding: tiktoken.Encoding,
    files: list[str],
    say: Callable,
) -> None:
    """Read, batch, encode and write: the way that every corpus takes."""
    if not files:
        settings["revision"] = dataset_info(config, config.dataset, say).sha
    writer = Writer(config.folder, config.corpus, settings)
    position = writer.position
    if writer.shards:
        say(f"going on after shard {len(writer.shards) - 1} and {position.documents:,} documents")
    else:
        point_out_separators(config, files, say)
    if files:
        batches = in_batches(file_source(config, files)(position.source))
    else:
        batches = hub_batches(config, settings["revision"], position.source, say)

    workers = config.workers or num_cores()
    limit = config.max_tokens or 2**63
    progress = Progress(say, writer.num_tokens)
    pool = ThreadPoolExecutor(workers)
    try:
        most_characters = 3 * workers * BATCH_CHARACTERS
        for batch_tokens, batch in encode_in_order(pool, encoding, batches, most_characters):
            room = limit - writer.num_tokens
            batch_tokens = batch_tokens[: position.batch_tokens + room]
            writer.add(batch_tokens, position)
            # Text never has this token, so it counts the documents.
            num_documents = int(np.count_nonzero(batch_tokens == encoding.eot_token))
            position = position.after(batch, num_documents)
            fraction = max(batch.fraction or 0, writer.num_tokens / limit)
            progress.show(writer.num_tokens, fraction, len(writer.shards))
            if position.documents + position.num_skipped > 1000:
                check_skipped(config, position)
            if writer.num_tokens >= limit:
                break
    finally:
        pool.shutdown(cancel_futures=True)  # a stop waits for the batches begun, not for all
    speed = progress.close(writer.num_tokens)
    check_skipped(config, position)
    if writer.num_tokens <= position.documents:
        raise UserError(
            f"{config.source_name}: {plural(position.documents, 'document')} without any text; "
            "expected some text; check the source"
        )
    summary = {"documents": position.documents, "skipped": position.skipped}
    writer.finish(summary, encoding.eot_token)
    say(
        f"{config.folder}: {plural(position.documents, 'document')}, {writer.num_tokens:,} tokens "
        f"in {plural(len(writer.shards), 'shard')}, {speed}; "
        f"skipped documents: {listed(position)}"
    )
    point_out_long_documents(position, say)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(position: Position) -> str:
    """How many documents were skipped and why, and where the first few are."""
    if not position.skipped:
        return "none"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in position.skipped.items())
    return f"{reasons} ({'; '.join(position.places)})"


REMEDIES = {
    "not UTF-8": "convert it, for example with iconv -f LATIN1 -t UTF-8 OLD > NEW",
    ENDLESS_RUN: "leave it out, or break its lines",
    TOO_LONG.reason: "give --split-on what separates documents, or divide them",
}


def check_skipped(config: PrepareConfig, position: Position) -> None:
    """Raise UserError if too many documents were unusable."""
    found = position.documents + position.num_skipped
    if position.num_skipped <= max(MOST_SKIPPED * found, position.documents > 0):
        return
    most_frequent = max(position.skipped, key=position.skipped.get)
    other_column = (
        "check the source; fineweb.py --text-column takes its text from another place "
        f"than {config.text_column!r}"
    )
    raise UserError(
        f"{config.source_name}: {position.num_skipped:,} of {plural(found, 'document')} cannot be "
        f"used: {listed(position)}; expected at most {MOST_SKIPPED:.0%}; "
        f"{REMEDIES.get(most_frequent, other_column)}"
    )


def point_out_separators(config: PrepareConfig, files: list[str], say: Callable) -> None:
    """Say so if lines of <|endoftext|> stand between documents and are not split on."""
    if tokens.END_OF_TEXT in config.split_on:
        return
    line = re.compile(rb"^<\|endoftext\|>\r?$", re.MULTILINE)
    for file in files[:10]:
        kind, compression = kind_and_compression(file)
        if kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"):
            continue
        with naming_the_file(file, OSError):
            found = line.search(beginning(file, compression))
        if found:
            say(
                f"{file}: lines of <|endoftext|> are read as ordinary text; "
                "fineweb.py --split-on '<|endoftext|>' separates documents there"
            )
            return


def point_out_long_documents(position: Position, say: Callable) -> None:
    """Say so if the corpus is one document, or has a very long one."""
    if position.documents == 1:
        say("the whole corpus is one document; fineweb.py --split-on separates a file into several")
    elif position.longest > LONG_DOCUMENT:
        say(
            f"the longest document has {position.longest:,} characters; fineweb.py --split-on "
            "separates a file into several"
        )


# ------------------------------------------------------------------------- ready-made shards


def download_shards(config: PrepareConfig, settings: dict, say: Callable) -> None:
    """Download llm.c shards: the validation shard first, then whole ones up to --max-tokens."""
    from huggingface_hub import hf_hub_download

    dataset = settings["source"]["dataset"]
    folder = config.folder
    info = dataset_info(config, dataset, say)
    wanted = wanted_shards(config, dataset, info)
    settings["revision"] = info.sha
    shards = begin_or_resume(folder, settings)["shards"]
    refuse_links(folder / ".download")
    for number, file in enumerate(wanted[len(shards) :], start=len(shards)):
        say(f"shard {number} of {len(wanted)}: {file.rfilename}, {file.size / 1e6:,.0f} MB")
        download = functools.partial(
            hf_hub_download,
            dataset,
            file.rfilename,
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder / ".download",
            tqdm_class=bar_that_stops(file.size, file.rfilename),
        )
        try:
            path = Path(on_hub(config, say, download))
        except EndlessDownload:
            remove(folder / ".download")  # the next call would go on behind its end
            raise
        try:
            sha256 = file.lfs.sha256 if file.lfs else None
            shards.append(token_files.add_downloaded_shard(path, folder / path.name, sha256))
        except UserError:
            path.unlink()  # the next call would take it without a download
            raise
        progress = {"shards": shards, "position": dataclasses.asdict(Position())}
        token_files.write_manifest(folder, settings | progress, partial=True)
    shutil.rmtree(folder / ".download", ignore_errors=True)
    token_files.write_manifest(folder, settings | {"shards": shards})
    num_tokens = sum(shard["tokens"] for shard in shards)
    say(f"{folder}: {num_tokens:,} tokens in {len(shards)} shards")


def refuse_links(folder: Path) -> None:
    """Raise UserError if another user has put a link where the hub's client is going to write."""
    with walking(folder):
        found = [folder, *folder.rglob("*")]
    for path in found:
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            raise UserError(f"{path}: a link; expected what this program made; remove {folder}")


def wanted_shards(config: PrepareConfig, dataset: str, info: Any) -> list:
    """The hub's shard files to download: validation first, then as many as --max-tokens needs."""
    shards = [file for file in info.siblings if is_shard(file)]
    shards.sort(key=lambda file: ("_val_" not in file.rfilename, file.rfilename))
    if len(shards) < 2:
        raise UserError(
            f"--dataset {dataset}: no *_val_*.bin and *_train_*.bin; expected token shards in "
            "llm.c's format; leave out --pretokenized to tokenise its text"
        )
    if not config.max_tokens:
        return shards
    ends = np.cumsum([(file.size - token_files.HEADER_BYTES) // 2 for file in shards])
    needed = int(np.searchsorted(ends, config.max_tokens)) + 1
    return shards[: max(2, needed)]


def is_shard(file: Any) -> bool:
    """Whether a file on the hub, of which its server may say anything, looks like a shard."""
    if type(file.rfilename) is not str or type(file.size) is not int:
        return False
    *folders, name = file.rfilename.split("/")
    has_plain_name = SHARD_NAME.fullmatch(name) and all(map(plain_name, folders))
    return bool(has_plain_name) and 0 <= file.size <= token_files.HEADER_BYTES + 2 * 2**31


def bar_that_stops(size: int, name: str) -> type:
    """A progress bar for the hub's client that ends a download which does not end by itself.

    The limit is twice the size, because the client also counts what it receives a second time.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        received = 0

        def __init__(self, *args, name=None, **kwargs):
            super().__init__(*args, **kwargs | {"disable": None})  # no bar unless on a terminal

        def update(self, n=1):
            self.received += n
            if self.received > 2 * size:
                raise EndlessDownload(name, size)
            return super().update(n)

    return Bar


# ------------------------------------------------------------------------- for train_gpt2.py


def prepare_path(path: str, tokenizer: str, say: Callable = print) -> Path:
    """The prepared directory for a path: itself if it holds tokens, else the text that it names.

    Text is prepared once, into data/<corpus>-<key>. The key follows from the names and contents of
    the files, so a changed file is prepared anew.
    """
    with walking(path):
        if os.path.isdir(path) and (holds_tokens(path) or not texts_in(path)):
            return Path(path)
    key = hashlib.sha256(tokenizer.encode())
    for file in expand([path]):
        with open(file, "rb") as opened:
            content = hashlib.file_digest(opened, "sha256").digest()
        key.update(os.fsencode(os.path.basename(file)) + b"\0" + content)
    config = PrepareConfig(input=(path,), tokenizer=tokenizer)
    out = f"data/{config.corpus}-{key.hexdigest()[:12]}"
    return prepare(dataclasses.replace(config, out=out), say)


def holds_tokens(folder: str) -> bool:
    """Whether a directory holds token files or a manifest, finished or not."""
    for file in Path(folder).iterdir():
        if file.suffix in token_files.SUFFIXES or file.name in (
            "manifest.json",
            "manifest.partial.json",
        ):
            return True
    return False


def prepare_first_run(say: Callable = print) -> Path:
    """The first run's corpus: the standard library of the running Python, as bytes. No download."""
    folder = Path(FIRST_RUN_FOLDER)
    if (folder / "manifest.json").exists():
        return folder
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = []
    for file in library.rglob("*.py"):
        if not left_out.intersection(file.relative_to(library).parts):
            files.append(file)

    # In the order of a hash, so that the last tenth, which validates, is like the rest.
    def name_hash(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(library).as_posix().encode()).digest()

    files.sort(key=name_hash)
    inputs = tuple(str(file) for file in files)
    return prepare(PrepareConfig(input=inputs, tokenizer="bytes", out=str(folder)), say)


def main() -> None:
    description = "Prepare token shards from a hub dataset, local files or ready-made shards."
    config = parse_flags(PrepareConfig, PrepareConfig(), description)
    if config.verify:
        num_tokens = token_files.verify(Path(config.verify))
        script.say(
            f"{config.verify}: {num_tokens:,} tokens, all sizes, hashes and tokens are right"
        )
        return
    folder = prepare(config, script.say)
    script.say(f"train on it: python train_gpt2.py --data {shlex.quote(str(folder))}")


if __name__ == "__main__":
    run_script(main)
