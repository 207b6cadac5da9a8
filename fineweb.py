"""Turn a corpus into token shards: FineWeb-Edu, any dataset on the hub, or local files.

    python fineweb.py                                            FineWeb-Edu into edu_fineweb10B/
    python fineweb.py --input 'books/**/*.txt' --out data/books  your own text
    python fineweb.py --pretokenized --max-tokens 1_000_000_000  ready-made shards of FineWeb-Edu
    python fineweb.py --verify edu_fineweb10B                    read and check everything

The way of a token, from file to shard:

    read     files yield documents one by one, each with the position after it (documents.py)
    batch    documents are collected into batches of about half a million characters
    encode   threads turn batches into tokens (tiktoken releases the interpreter lock meanwhile)
    write    the main thread joins the tokens in the order of the documents and cuts shards

Each shard is committed together with the position of its last token. A preparation that was killed
goes on after the last committed shard when the same command is run again. It ends with the same
bytes as one that was never interrupted, whatever the number of threads.

A corpus below two shards is in memory as a whole when it ends. Its documents are put in the order
of a hash of their places, so that the last tenth, which validates, is like the rest.
"""

if __name__ == "__main__":
    from support import script

    script.begin()

import array
import contextlib
import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tiktoken
import tyro

from support import script
from support.documents import (
    ENDLESS_RUN,
    MISSING,
    NOT_UTF8,
    TOO_LONG,
    File,
    Row,
    Unusable,
    ask_hub,
    dataset_files,
    dataset_info,
    expand,
    parts_of,
    read_files,
)
from support.files import file_sha256, locked, read_json, remove_leftovers, same_folder
from support.progress import Progress
from support.script import Range, UserError, check_fields, parse_flags, require, run_script, shown
from support.shards import (
    HEADER_BYTES,
    MANIFEST_BYTES,
    SUFFIXES,
    add_downloaded_shard,
    holds_tokens,
    read_manifest,
    verify,
    verify_shards,
    write_manifest,
    write_shard,
)
from tokens import END_OF_TEXT, get_encoding

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_SAMPLE = "sample-10BT"
# The same corpus as llm.c shards, from the author of modded-nanogpt.
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"

FINEWEB_EDU_FOLDER = "edu_fineweb10B"  # where the default dataset is prepared
FIRST_RUN_FOLDER = "data/first-run"  # where the first run's corpus is prepared

# Characters in a batch: enough to hide the cost of handing it to a thread, little enough to keep
# memory small.
BATCH_CHARACTERS = 2**19
# Bytes of files whose reading is announced, since it takes a while.
LONG_READ = 10**9
# Share of documents that may be damaged. Beyond it the input is not what was meant. A single one
# never ends a corpus of which something remains. Documents that are only missing, as a null is,
# are the corpus's own matter.
MOST_DAMAGED = 0.1
# Documents in a row from the start that may be unusable, before the rest is not read.
MOST_UNUSABLE_AT_FIRST = 100_000


# ------------------------------------------------------------------------------------------- flags


no_files = tyro.conf.arg(metavar="PATH …", help_behavior_hint="(default: none)")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and where to put it."""

    # The hub's dataset to read.
    dataset: str = FINEWEB_EDU
    # The dataset's configuration. '' means sample-10BT of FineWeb-Edu, and of any other dataset its
    # default one.
    name: str = ""
    # The dataset's split to read.
    split: str = "train"
    # Branch, tag or commit of the dataset. The manifest also records the commit it stands for.
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
    shard_tokens: Annotated[int, Range(1, 2**31 - 1)] = 100_000_000  # its header has 31 bits
    # Stop after this many tokens. 0 means never.
    max_tokens: Annotated[int, Range(0, 2**62)] = 0
    # Encoding threads. 0 means one for each CPU core that this process may use.
    workers: Annotated[int, Range(0, 1024)] = 0
    # Check every size, sha256 and token of this data directory, and do nothing else.
    verify: str = ""

    def __post_init__(self):
        check_fields(self)
        require(
            not self.pretokenized or (not self.input and self.tokenizer == "gpt2"),
            "--pretokenized with --input or --tokenizer bytes; expected gpt2 shards from the hub; "
            "leave one of them out",
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
    def configuration(self) -> str:
        """--name, or what '' stands for."""
        is_fineweb_edu = self.dataset == FINEWEB_EDU
        return self.name or (FINEWEB_EDU_SAMPLE if is_fineweb_edu else "")

    @property
    def source_name(self) -> str:
        """How messages name the source."""
        if not self.input:
            return f"--dataset {self.dataset} --name {self.configuration!r}"
        more = " …" if len(self.input) > 3 else ""
        return " ".join(self.input[:3]) + more

    @property
    def folder(self) -> Path:
        """The output directory."""
        if self.out:
            return Path(self.out)
        default = (FINEWEB_EDU, FINEWEB_EDU_SAMPLE)
        if not self.input and (self.dataset, self.configuration) == default:
            return Path(FINEWEB_EDU_FOLDER)
        return Path("data") / self.corpus


# ------------------------------------------------------------------------------------------- batch


@dataclass(frozen=True)
class Batch:
    """Rows whose documents are encoded together."""

    rows: list[Row]

    @property
    def documents(self) -> list[str]:
        return [row.document for row in self.rows if isinstance(row.document, str)]

    @property
    def places(self) -> list[str]:
        """Of the documents."""
        return [row.place for row in self.rows if isinstance(row.document, str)]

    @property
    def skipped(self) -> list[Unusable]:
        return [row.document for row in self.rows if isinstance(row.document, Unusable)]

    @property
    def characters(self) -> int:
        return sum(map(weight, self.rows))


def weight(row: Row) -> int:
    """The length of a text, and 100, so that empty ones fill a batch too."""
    return 100 + (len(row.document) if isinstance(row.document, str) else 0)


def in_batches(rows: Iterable[Row]) -> Iterator[Batch]:
    """Rows in batches of about BATCH_CHARACTERS."""
    batch = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += weight(row)
        if characters >= BATCH_CHARACTERS:
            yield Batch(batch)
            batch = []
            characters = 0
    if batch:
        yield Batch(batch)


def hub_batches(
    config: PrepareConfig, files: list[File], position: dict | None, say: Callable
) -> Iterator[Batch]:
    """Batches of files on the hub, opened again after the last batch where a connection failed."""
    batches = None

    def next_batch() -> Batch | None:
        nonlocal batches
        if batches is None:
            batches = in_batches(read_files(files, config.text_column, config.split_on, position))
        current, batches = batches, None  # a generator that raises has ended and is of no more use
        batch = next(current, None)
        batches = current
        return batch

    while batch := ask_hub(config.source_name, next_batch, say):
        position = batch.rows[-1].position
        yield batch


# ------------------------------------------------------------------------------------------ encode


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
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ------------------------------------------------------------------------------------------- write


@dataclass(frozen=True)
class Position:
    """Where the stream of tokens stands, so that a preparation can go on there.

    It is stored in manifest.partial.json with every shard.
    """

    source: dict[str, int] | None = None  # position in the files before the current batch
    batch_tokens: int = 0  # tokens of the current batch that are in committed shards
    documents: int = 0  # usable documents before the current batch
    skipped: dict[str, int] = field(default_factory=dict)  # unusable ones, by reason
    places: list[str] = field(default_factory=list)  # of the first unusable one in a file

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def after(self, batch: Batch, num_documents: int) -> "Position":
        """The position after a batch, of which so many documents were used."""
        skipped = Counter(self.skipped)
        skipped.update(document.reason for document in batch.skipped)
        places = list(self.places)
        for document in batch.skipped:
            file = document.place.partition(",")[0]
            if len(places) < 5 and not any(place.startswith(file) for place in places):
                places.append(document.place)
        documents = self.documents + num_documents
        after = batch.rows[-1].position
        return Position(after, 0, documents, dict(skipped), places)


class Writer:
    """Cuts the stream of tokens into shards, and commits each with the position of its last token.

    The first two shards are committed together, because a corpus that ends before them is divided
    in another way.
    """

    def __init__(self, folder: Path, corpus: str, settings: dict, eot_token: int):
        self.folder = folder
        self.corpus = corpus
        self.settings = settings
        self.eot_token = eot_token
        self.shards, self.position = begin_or_resume(folder, settings)
        self.num_tokens = sum(shard["tokens"] for shard in self.shards)  # those in `filled` too
        self.keys = array.array("Q")  # of all documents, until two shards are full
        self.buffer = np.empty(2 * settings["shard_tokens"], dtype=np.uint16)
        self.filled = 0

    def add(self, batch_tokens: np.ndarray, places: list[str], position: Position) -> None:
        """Append a batch's tokens, from position.batch_tokens on. `position` is where it began."""
        if not self.shards:
            self.keys.extend(map(place_key, places))
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
                    self.add_shard(shard)
                self.commit(dataclasses.replace(position, batch_tokens=done))
                self.filled = 0

    def add_shard(self, shard: np.ndarray) -> None:
        number = len(self.shards)
        split = "train" if number else "val"
        file = self.folder / f"{self.corpus}_{split}_{number:06d}.bin"
        self.shards.append(write_shard(file, shard))

    def commit(self, position: Position) -> None:
        """Record the shards so far, and where to go on after them."""
        progress = {"shards": self.shards, "position": dataclasses.asdict(position)}
        write_manifest(self.folder, self.settings | progress, partial=True)

    def finish(self, summary: dict) -> None:
        """Write what is left, and the manifest."""
        rest = self.buffer[: self.filled]
        if not self.shards:
            rest = in_order_of_keys(rest, self.keys, self.eot_token)
            cut = validation_cut(rest, self.eot_token)
            self.add_shard(rest[cut:])
            rest = rest[:cut]
        if len(rest):
            self.add_shard(rest)
        write_manifest(self.folder, self.settings | summary | {"shards": self.shards})


def place_key(place: str) -> int:
    """What decides where a document stands in a small corpus: the first 64 bits of a hash."""
    digest = hashlib.sha256(place.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8])


def in_order_of_keys(stream: np.ndarray, keys: array.array, eot_token: int) -> np.ndarray:
    """The documents of a stream, of which each begins with eot_token, sorted by their keys."""
    starts = np.flatnonzero(stream == eot_token)
    documents = np.split(stream, starts[1:])
    order = np.argsort(np.array(keys[: len(starts)]), kind="stable")
    return np.concatenate([documents[i] for i in order] or [stream])


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
        "places?": [str],
    },
}
SHARD_NAME = re.compile(r"[\w.-]+_(val|train)_\d+\.bin")


def begin_or_resume(folder: Path, settings: dict) -> tuple[list[dict], Position]:
    """The shards of an interrupted preparation, checked, and where it goes on; or a new one."""
    file = folder / "manifest.partial.json"
    if file.exists():
        partial = read_partial_manifest(folder)
        shards = partial["shards"]
        if shards:
            check_settings(file, partial, settings)
            verify_shards(folder, partial, file.name)
        # Only now: a damaged name in the manifest must not cost the shard that has it.
        remove_uncommitted(folder, {shard["name"] for shard in shards})
        if shards:  # else nothing is lost by beginning anew
            known = {entry.name for entry in dataclasses.fields(Position)}
            position = partial["position"].items()
            return shards, Position(**{key: value for key, value in position if key in known})
    else:
        for other in folder.iterdir():
            require(
                other.suffix not in SUFFIXES,
                f"{folder}: holds {other.name} and no manifest; expected an empty directory; "
                "choose another --out",
            )
    start = {"shards": [], "position": dataclasses.asdict(Position())}
    write_manifest(folder, settings | start, partial=True)
    return [], Position()


def read_partial_manifest(folder: Path) -> dict:
    """The partial manifest, which may come from somebody else. Its names stay in the folder."""
    read_json(folder / "manifest.partial.json", PARTIAL_SHAPE, MANIFEST_BYTES)
    return read_manifest(folder, partial=True)


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
    if new["revision"] == manifest.get("revision"):  # the commit itself was asked for
        old["revision"] = new["revision"]
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changes = [
        f"{key[:80]} was {shown(str(old.get(key)))}, now {shown(str(new.get(key)))}"
        for key in differing[:9]
    ]
    require(
        not differing,
        f"{file}: {', '.join(changes)}; expected the settings and source it was begun with; repeat "
        "them, or choose another --out",
    )


def comparable_settings(manifest: dict) -> dict:
    """What must not change: of a revision its name, because a branch moves on."""
    source = manifest.get("source")
    if not isinstance(source, dict):
        source = {}
    keys = ("encoding", "shard_tokens", "max_tokens")
    revision = manifest.get("revision_name", "main")
    return source | {key: manifest.get(key) for key in keys} | {"revision": revision}


# ----------------------------------------------------------------------------------- the whole way


def prepare(config: PrepareConfig, say: Callable = script.say) -> Path:
    """Make the data directory that the flags describe; returns it.

    A finished one is accepted as it is, without writing. An interrupted one is gone on with.
    Raises UserError where the source cannot be used or the directory was begun in another way.
    """
    files, left_out = expand(config.input)
    contents = contents_key(files, config.tokenizer, say)
    return prepare_files(config, files, left_out, contents, say)


def contents_key(files: list[File], tokenizer: str, say: Callable) -> str:
    """A hash of the names and contents of all files, and of the tokenizer."""
    size = sum(file.size for file in files)
    if size > LONG_READ:
        say(f"reading {plural(len(files), 'file')}, {size / 1e9:,.1f} GB, to know their contents")
    key = hashlib.sha256(tokenizer.encode())
    for file in files:
        name = os.path.basename(file.path).encode(errors="surrogateescape")
        key.update(name + b"\0" + bytes.fromhex(file_sha256(Path(file.path))))
    return key.hexdigest()


def prepare_files(
    config: PrepareConfig, files: list[File], left_out: Counter[str], contents: str, say: Callable
) -> Path:
    """`prepare` for local files that have been found and read once, or for the hub."""
    folder = config.folder
    encoding = get_encoding(config.tokenizer)
    settings = {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "source": describe_source(config, files, contents),
        "revision": None,
        "shard_tokens": config.shard_tokens,
        "max_tokens": config.max_tokens,
    }
    if not config.input and config.revision != "main":
        settings["revision_name"] = config.revision
    if is_prepared(folder, settings, say):
        return folder
    # The hub is asked before the directory is made, so that a failure leaves nothing behind.
    wanted = []
    if not config.input:
        dataset = settings["source"]["dataset"]
        info = dataset_info(dataset, begun_commit(folder, settings) or config.revision, say)
        settings["revision"] = info.sha
        if config.pretokenized:
            wanted = wanted_shards(config, dataset, info)
        else:
            files = dataset_files(dataset, config.configuration, config.split, info.sha, say)
    with locked(folder):
        # Another process may have finished it before the lock was ours.
        if is_prepared(folder, settings, say):
            return folder
        if config.pretokenized:
            download_shards(config, settings, wanted, say)
        else:
            write_corpus(config, settings, encoding, files, left_out, say)
    return folder


def describe_source(config: PrepareConfig, files: list[File], contents: str) -> dict:
    """What the manifest says of the source. A directory is only gone on with for the same one."""
    if files:
        return {
            "files": len(files),
            "contents": contents,
            "text_column": config.text_column,
            "split_on": config.split_on,
        }
    if config.pretokenized:
        is_default = config.dataset == FINEWEB_EDU
        return {"dataset": PRETOKENIZED if is_default else config.dataset}
    return {
        "dataset": config.dataset,
        "name": config.configuration,
        "split": config.split,
        "text_column": config.text_column,
    }


def is_prepared(folder: Path, settings: dict, say: Callable) -> bool:
    """Whether the directory is finished; raises UserError if it is with other settings.

    Nothing is written or locked, so prepared data may lie where this user cannot write.
    """
    file = folder / "manifest.json"
    if not file.exists():
        return False
    check_settings(file, read_manifest(folder), settings)
    with contextlib.suppress(OSError):  # a kill between the two last writes leaves it
        (folder / "manifest.partial.json").unlink()
    say(f"{folder} is already prepared")
    return True


def begun_commit(folder: Path, settings: dict) -> str | None:
    """The commit at which an interrupted preparation goes on, though its branch may have moved."""
    file = folder / "manifest.partial.json"
    partial = read_partial_manifest(folder) if file.exists() else {"shards": []}
    if not partial["shards"]:
        return None
    check_settings(file, partial, settings)
    return partial.get("revision")


def write_corpus(
    config: PrepareConfig,
    settings: dict,
    encoding: tiktoken.Encoding,
    files: list[File],
    left_out: Counter[str],
    say: Callable,
) -> None:
    """Read, batch, encode and write: the way that every corpus takes."""
    writer = Writer(config.folder, config.corpus, settings, encoding.eot_token)
    position = writer.position
    if writer.shards:
        say(f"going on after shard {len(writer.shards) - 1} and {position.documents:,} documents")
    workers = config.workers or num_cores()
    limit = config.max_tokens or 2**63
    if config.input:
        rows = read_files(files, config.text_column, config.split_on, position.source)
        batches = in_batches(rows)
    else:
        batches = hub_batches(config, files, position.source, say)
    pool = ThreadPoolExecutor(workers)
    try:
        with Progress("token", initial=writer.num_tokens, say=say) as progress:
            most_characters = 3 * workers * BATCH_CHARACTERS
            for batch_tokens, batch in encode_in_order(pool, encoding, batches, most_characters):
                if not position.documents:
                    point_out_separators(config, batch.documents, say)
                room = limit - writer.num_tokens
                batch_tokens = batch_tokens[: position.batch_tokens + room]
                # Text never has this token, so it counts the documents.
                num_documents = int(np.count_nonzero(batch_tokens == encoding.eot_token))
                writer.add(batch_tokens, batch.places[:num_documents], position)
                position = position.after(batch, num_documents)
                check_skipped(config, position)
                fraction = max(batch.rows[-1].fraction, writer.num_tokens / limit)
                total = writer.num_tokens / fraction if fraction else None
                shard = len(writer.shards)
                progress.update(writer.num_tokens, lambda n=shard: f"shard {n}", total)
                if writer.num_tokens >= limit:
                    break
    finally:
        pool.shutdown(cancel_futures=True)  # a stop waits for the batches begun, not for all
    check_skipped(config, position, at_end=True)
    require(
        writer.num_tokens > position.documents,
        f"{config.source_name}: {plural(position.documents, 'document')} without any text; "
        "expected some text; check the source",
    )
    writer.finish({"documents": position.documents, "skipped": position.skipped})
    say(
        f"{config.folder}: {plural(position.documents, 'document')}, {writer.num_tokens:,} tokens "
        f"in {plural(len(writer.shards), 'shard')}, {progress.seconds:.1f} s, "
        f"{progress.rate:,.0f} tokens/s; skipped documents: {reasons(position)}"
        + describe_left_out(left_out)
    )
    if position.documents == 1:
        say("the whole corpus is one document; fineweb.py --split-on separates a file into several")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def reasons(position: Position) -> str:
    """How many documents were skipped and why, and where the first few are."""
    if not position.skipped:
        return "none"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in position.skipped.items())
    return f"{counts} ({shown('; '.join(position.places), 1000)})"


def describe_left_out(left_out: Counter[str]) -> str:
    if not left_out:
        return ""
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in left_out.most_common(9))
    return f"; files left out, since they are no text: {shown(counts)}"


REMEDIES = {
    NOT_UTF8.reason: "convert it, for example with iconv -f LATIN1 (or UTF-16) -t UTF-8 OLD > NEW",
    ENDLESS_RUN.reason: "leave it out, or break its lines",
    TOO_LONG.reason: "give --split-on what separates documents, or divide them; write a JSON array "
    "as JSON lines",
}


def check_skipped(config: PrepareConfig, position: Position, at_end: bool = False) -> None:
    """Raise UserError if too many documents were damaged, or none has been usable."""
    found = position.documents + position.num_skipped
    if not position.skipped or (found <= 1000 and not at_end):
        return
    damaged = position.num_skipped - position.skipped.get(MISSING.reason, 0)
    too_many = damaged > max(MOST_DAMAGED * found, 1)
    is_hopeless = not position.documents and (at_end or found > MOST_UNUSABLE_AT_FIRST)
    most_frequent = max(position.skipped, key=position.skipped.get)
    other_column = (
        "check the source; fineweb.py --text-column takes its text from another place "
        f"than {config.text_column!r}"
    )
    require(
        not (too_many or is_hopeless),
        f"{config.source_name}: {position.num_skipped:,} of {plural(found, 'document')} cannot be "
        f"used: {reasons(position)}; expected at most {MOST_DAMAGED:.0%}; "
        f"{REMEDIES.get(most_frequent, other_column)}",
    )


SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>\r?$", re.MULTILINE)


def point_out_separators(config: PrepareConfig, documents: list[str], say: Callable) -> None:
    """Say so if lines of <|endoftext|> stand between documents and are not split on."""
    if END_OF_TEXT in config.split_on:
        return
    if any(map(SEPARATOR_LINE.search, documents)):
        say(
            "lines of <|endoftext|> are read as ordinary text; fineweb.py --split-on "
            "'<|endoftext|>' separates documents there"
        )


# ------------------------------------------------------------------------------ ready-made shards


def download_shards(config: PrepareConfig, settings: dict, wanted: list, say: Callable) -> None:
    """Download llm.c shards: the validation shard first, then whole ones up to --max-tokens."""
    from huggingface_hub import hf_hub_download

    folder = config.folder
    dataset = settings["source"]["dataset"]
    downloads = folder / ".download"
    shards, _ = begin_or_resume(folder, settings)
    for number, file in enumerate(wanted[len(shards) :], start=len(shards)):
        say(f"shard {number} of {len(wanted)}: {file.rfilename}, {file.size / 1e6:,.0f} MB")

        def download(name=file.rfilename) -> str:
            return hf_hub_download(
                dataset,
                name,
                repo_type="dataset",
                revision=settings["revision"],
                local_dir=downloads,
            )

        path = Path(ask_hub(f"{dataset} {file.rfilename}", download, say))
        try:
            sha256 = file.lfs.sha256 if file.lfs else None
            shards.append(add_downloaded_shard(path, folder / path.name, sha256))
        except UserError:
            path.unlink()  # the next call would take it without a download
            raise
        progress = {"shards": shards, "position": dataclasses.asdict(Position())}
        write_manifest(folder, settings | progress, partial=True)
    shutil.rmtree(downloads, ignore_errors=True)
    write_manifest(folder, settings | {"shards": shards})
    num_tokens = sum(shard["tokens"] for shard in shards)
    say(f"{folder}: {num_tokens:,} tokens in {len(shards)} shards")


def wanted_shards(config: PrepareConfig, dataset: str, info: Any) -> list:
    """The hub's shard files to download: validation first, then as many as --max-tokens needs."""
    shards = [file for file in info.siblings if is_shard(file)]
    shards.sort(key=lambda file: ("_val_" not in file.rfilename, file.rfilename))
    require(
        len(shards) >= 2,
        f"--dataset {dataset}: no *_val_*.bin and *_train_*.bin; expected token shards in "
        "llm.c's format; leave out --pretokenized to tokenise its text",
    )
    if not config.max_tokens:
        return shards
    ends = np.cumsum([(file.size - HEADER_BYTES) // 2 for file in shards])
    needed = int(np.searchsorted(ends, config.max_tokens)) + 1
    return shards[: max(2, needed)]


def is_shard(file: Any) -> bool:
    """Whether a file on the hub has the name and a sensible size of a shard."""
    has_name = SHARD_NAME.fullmatch(file.rfilename.rsplit("/", 1)[-1])
    return bool(has_name) and 0 <= (file.size or 0) <= HEADER_BYTES + 2 * 2**31


# ------------------------------------------------------------------------------- for train_gpt2.py


def tokens_for(data: str | tuple[str, ...], tokenizer: str, say: Callable = script.say) -> Path:
    """The prepared directory that --data stands for, made if need be.

    Token shards are read where they are. Text, of one path or of several that are one corpus, is
    tokenised into data/<name>-<key>. The key follows from the names and contents of its files. So
    the same text is found there again. Changed text is tokenised anew, and what was made before
    stays, for the runs that read it.
    """
    paths = (data,) if isinstance(data, str) else tuple(data)
    if len(paths) == 1:
        (path,) = paths
        if same_folder(path, FIRST_RUN_FOLDER):
            return prepare_first_run(say)
        if holds_tokens(path):
            return Path(path)
        require(
            not same_folder(path, FINEWEB_EDU_FOLDER),
            f"{path}: no token shards are there; expected the FineWeb-Edu corpus; prepare it with "
            "python fineweb.py, or name other data with --data",
        )
    for path in paths:
        require(
            not holds_tokens(path),
            f"{path}: token shards beside other paths; expected files of text, which become one "
            "corpus; name it alone",
        )
        require(
            not Path(path, "manifest.partial.json").exists(),
            f"{path}: no shard of it is finished; expected token shards; run the fineweb.py "
            "command that began it again",
        )
    files, left_out = expand(paths)
    key = contents_key(files, tokenizer, say)
    config = PrepareConfig(input=paths, tokenizer=tokenizer)
    folder = Path("data", f"{config.corpus}-{key[:12]}")
    if (folder / "manifest.json").exists():
        return folder
    config = dataclasses.replace(config, out=str(folder))
    return prepare_files(config, files, left_out, key, say)


def prepare_first_run(say: Callable = script.say) -> Path:
    """The first run's corpus: the standard library of the running Python, as bytes. No download."""
    folder = Path(FIRST_RUN_FOLDER)
    if (folder / "manifest.json").exists():
        return folder
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = []
    for file in sorted(library.rglob("*.py")):
        if not left_out.intersection(file.relative_to(library).parts):
            files.append(str(file))
    return prepare(PrepareConfig(input=tuple(files), tokenizer="bytes", out=str(folder)), say)


def main() -> None:
    description = "Prepare token shards from a hub dataset, local files or ready-made shards."
    times = sys.argv.count("--input")
    require(times < 2, f"--input {times} times; expected once; give all paths after it")
    config = parse_flags(PrepareConfig, PrepareConfig(), description)
    if config.verify:
        num_tokens = verify(Path(config.verify))
        script.say(
            f"{config.verify}: {num_tokens:,} tokens, all sizes, hashes and tokens are right"
        )
        return
    folder = prepare(config, script.say)
    script.say(f"train on it: python train_gpt2.py --data {shlex.quote(str(folder))}")


if __name__ == "__main__":
    run_script(main)
