"""Documents, one by one, from files on this machine and on the hub.

    which files    paths, folders and globs; the files of a dataset's split on the hub
    one file       text, JSON, JSON lines, CSV and TSV, also compressed; Parquet and Arrow
    all files      rows: a document, its place in the corpus, and where to go on after it

A file on the hub is read by the same functions as one on this machine. So both have one rule for
what cannot be used, which is skipped and counted, and one kind of position at which a preparation
goes on: a file, and a place in it.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from support.script import UserError, require, shown

# Bytes of the longest document that is one of several in a file: longer ones are skipped. Crawled
# pages have at most 5 MB, the longest novels 10 MB.
MOST_DOCUMENT_BYTES = 2**25
# Bytes of the longest file that is read as a whole: one document, or one JSON array.
MOST_FILE_BYTES = 2**30
# Bytes of text in the largest row group of a parquet file. It is in memory at once.
MOST_ROW_GROUP_BYTES = 2**32
# Characters of the longest run without a place where tiktoken's work can be divided. For each it
# takes up to 170 bytes of memory.
MOST_RUN = 2**22
# Bytes that are read at once, and that are asked of the hub at once.
CHUNK_BYTES = 2**22
HUB_BLOCK_BYTES = 2**25
# Seconds before the hub is asked again. Its client has attempts of its own below these, and where
# it has tried for so many seconds in vain, it is not asked again.
WAITS = (1, 4, 16)
MOST_CLIENT_SECONDS = 60


# ---------------------------------------------------------------------------------------- documents


class Unusable(NamedTuple):
    """Stands for a document that is skipped, and says why and where."""

    reason: str
    place: str = ""


MISSING = Unusable("missing text")
NOT_JSON = Unusable("not JSON")
TOO_LONG = Unusable("too long")
ENDLESS_RUN = Unusable(f"without a space in {MOST_RUN:,} characters")
NOT_UTF8 = Unusable("not UTF-8")


class Row(NamedTuple):
    """One document of a corpus.

    place: names it among all documents of the corpus, on every machine. position: where to go on
    after it, as JSON. fraction: how much of the corpus has been read then.
    """

    document: str | Unusable
    place: str
    position: dict[str, int]
    fraction: float


# What the pattern of the gpt2 encoding means by \s (Python's \s has four characters more).
WHITESPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LAST_WHITESPACE = re.compile(f"[{WHITESPACE}](?=[^{WHITESPACE}])")
PART_CHARACTERS = 2**18


def parts_of(text: str) -> Iterator[str]:
    """A text cut where its tokens do not change by it; fineweb.encode_document tells why."""
    start = 0
    while cut := LAST_WHITESPACE.search(text, start + PART_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def usable(document: Any) -> str | Unusable:
    """What a file holds where a document is expected: itself if it is text that can be encoded."""
    if document is None:
        return MISSING
    if isinstance(document, Unusable):
        return document
    if not isinstance(document, str):
        return Unusable(f"{type(document).__name__} instead of text")
    if len(document) > MOST_RUN and any(len(part) > MOST_RUN for part in parts_of(document)):
        return ENDLESS_RUN
    return document


def decoded(content: bytes) -> str | Unusable:
    try:
        return content.decode("utf-8-sig")  # without the mark that editors on Windows begin with
    except UnicodeDecodeError as error:
        return not_utf8(error)


def not_utf8(error: UnicodeDecodeError) -> Unusable:
    line = error.object.count(b"\n", 0, error.start) + 1
    byte = error.object[error.start]
    return Unusable(NOT_UTF8.reason, f"line {line:,} has the byte 0x{byte:02x}")


# -------------------------------------------------------------------------------------- which files


class File(NamedTuple):
    """A file of a corpus.

    path: as messages name it, on this machine, or hf://datasets/<owner>/<name>@<commit>/<path>.
    place: its path below the folder that holds all files of the corpus.
    size: what it counts for in the progress: its bytes, or 1 on the hub, where it is not asked for.
    """

    path: str
    place: str
    size: int

    @property
    def is_on_hub(self) -> bool:
        return self.path.startswith("hf://")

    def open(self) -> BinaryIO:
        if not self.is_on_hub:
            return open(self.path, "rb")
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(self.path, "rb", block_size=HUB_BLOCK_BYTES)


COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # pyarrow's names
TABLES = (".parquet", ".arrow")

# Suffixes of what is certainly not text. Every other unknown suffix is read as text, because source
# files have hundreds; what is not UTF-8 is skipped after all, by its content.
NOT_TEXT = re.compile(
    r"\.(pdf|docx?|odt|rtf|xlsx?|ods|pptx?|epub|mobi|djvu"
    r"|zip|tar|tgz|tbz|txz|xz|7z|rar|lz4|br|lzma|jar|whl|iso|dmg|deb|rpm"
    r"|exe|dll|so|dylib|o|a|lib|class|pyc|wasm"
    r"|png|jpe?g|gif|bmp|tiff?|webp|ico|heic|psd"
    r"|mp3|mp4|m4a|wav|flac|ogg|avi|mkv|mov|webm|[to]tf|woff2?"
    r"|bin|np[yz]|ds|pth?|ckpt|pkl|pickle|safetensors|gguf|onnx|h5|hdf5"
    r"|db|sqlite3?|orc|avro|feather|msgpack)"
)


def kind_and_compression(path: str) -> tuple[str, str | None]:
    """A file's format, as its suffix in lower case, and pyarrow's name of its compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = None
    if suffixes and suffixes[-1] in COMPRESSIONS:
        compression = COMPRESSIONS[suffixes.pop()]
    return (suffixes[-1] if suffixes else ""), compression


def can_be_read(path: str) -> bool:
    """Whether a file may hold text, by its name."""
    kind, compression = kind_and_compression(path)
    return not NOT_TEXT.fullmatch(kind) and not (kind in TABLES and compression)


def check_kind(path: str) -> None:
    require(
        can_be_read(path),
        f"{path}: {''.join(Path(path).suffixes[-2:])} files cannot be read; expected text, .jsonl, "
        ".json, .csv, .tsv, .parquet or .arrow; convert it to one of these, or leave it out",
    )


def expand(patterns: Iterable[str]) -> tuple[list[File], Counter[str]]:
    """The files that paths, folders and globs name, each once; and the suffixes of those left out.

    A folder or a glob may hold files that are no text. They are left out, and counted by suffix. A
    path that is given itself is refused instead.
    """
    found: dict[str, str] = {}  # by their absolute paths
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        if os.path.isfile(pattern):
            check_kind(pattern)
            files = [pattern]
        else:
            candidates = files_in(pattern) if os.path.isdir(pattern) else files_like(pattern)
            files = [file for file in candidates if can_be_read(file)]
            left_out.update(Path(file).suffix for file in candidates if not can_be_read(file))
        exists = os.path.lexists(pattern)
        require(
            bool(files),
            f"{pattern}: {'nothing to read' if exists else 'no such file'}; expected a file, a "
            "folder with files, or a glob that matches files of text; check the path; put a glob "
            "in quotes, for example 'folder/**/*.txt'",
        )
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    if not found:
        return [], left_out
    folder = os.path.commonpath([os.path.dirname(path) for path in found])
    files = []
    for path, name in found.items():
        place = Path(os.path.relpath(path, folder)).as_posix()
        files.append(File(name, place, os.path.getsize(path)))
    return files, left_out


def files_in(folder: str) -> list[str]:
    """The files of a folder and its subfolders, sorted, without hidden ones.

    Links to folders are not followed, because they may form circles.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and os.path.isfile(path):
                found.append(path)
    return sorted(found)


def files_like(pattern: str) -> list[str]:
    """The files that a glob matches, sorted. As in a shell, `*` matches no hidden names.

    A folder whose name has brackets or stars is taken by its name, not as a pattern. `**` does not
    follow links.
    """
    parts = list(Path(pattern).parts)
    base = Path()
    while parts and os.path.isdir(base / parts[0]):
        base /= parts.pop(0)
    if not parts or os.path.lexists(pattern):
        return []
    if parts[-1] == "**":
        parts.append("*")
    hidden_too = any(part.startswith(".") for part in parts)
    try:
        matches = list(base.glob("/".join(parts)))
    except (ValueError, NotImplementedError, OSError):  # no pattern, as 'a**b', or too long a name
        return []
    found = []
    for match in matches:
        is_hidden = any(part.startswith(".") for part in match.relative_to(base).parts)
        if match.is_file() and (hidden_too or not is_hidden):
            found.append(str(match))
    return sorted(found)


# ----------------------------------------------------------------------------------------- one file

# A reader yields (document, place after it). A place is a byte of the unpacked content or a number
# of rows. A reader that is called with a place goes on exactly there.
Documents = Iterator[tuple[Any, int | None]]


def read_file(
    file: File, text_column: str, split_on: str, start: int
) -> Iterator[tuple[str | Unusable, int | None, float]]:
    """(document, place after it, fraction of the file read until then), from a place on.

    The place is None after a file that is one document.
    """
    kind, _ = kind_and_compression(file.path)
    if kind == ".json" and has_json_lines(file):
        kind = ".jsonl"
    with opened(file) as (raw, stream):
        size = max(1, raw.seek(0, os.SEEK_END))
        raw.seek(0)
        if kind in READERS:
            documents = READERS[kind](stream, text_column, start)
        else:
            documents = read_text(stream, split_on, start)
        before = start
        for document, at in documents:
            document = usable(document)
            if isinstance(document, Unusable):
                where = f"row {at:,}" if kind in ROWS else f"byte {before:,}"
                where = [file.path, where if at is not None else "", document.place]
                document = Unusable(document.reason, ", ".join(filter(None, where)))
            yield document, at, min(1.0, raw.tell() / size)
            before = at


@contextlib.contextmanager
def opened(file: File) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file as it is stored, and what it holds, which differ if it is compressed."""
    _, compression = kind_and_compression(file.path)
    with file.open() as raw:
        if compression is None:
            yield raw, raw
        else:
            import pyarrow

            yield raw, pyarrow.input_stream(raw, compression=compression)


def read_text(stream: BinaryIO, split_on: str, start: int) -> Documents:
    """A text file as one document, or divided at `split_on`."""
    if split_on:
        for part, after in split(stream, separator_of(split_on), start):
            yield part if isinstance(part, Unusable) else decoded(part), after
        return
    content = read_whole(stream)
    yield content if isinstance(content, Unusable) else decoded(content), None


def separator_of(split_on: str) -> re.Pattern[bytes]:
    r"""What --split-on stands for: \n, \r and \t, as typed on a command line, are characters.

    Where \n is asked for, lines that end in \r\n separate documents as well.
    """
    text = split_on.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    separator = text.encode(errors="surrogateescape")  # any bytes can be typed
    lines = separator.split(b"\n")
    newline = rb"\n" if b"\r" in separator else rb"\r?\n"
    return re.compile(newline.join(map(re.escape, lines)))


def split(
    stream: BinaryIO, separator: re.Pattern[bytes], start: int
) -> Iterator[tuple[bytes | Unusable, int]]:
    """The parts of a stream between separators, and the byte after each, from a byte on.

    A part that is too long is read past, and not kept.
    """
    skip(stream, start)
    rest = b""
    at = start  # the byte at which `rest` begins
    is_too_long = False
    while chunk := stream.read(CHUNK_BYTES):
        rest += chunk
        done = 0
        for found in separator.finditer(rest):
            part = rest[done : found.start()]
            done = found.end()
            yield TOO_LONG if is_too_long else part, at + done
            is_too_long = False
        if len(rest) - done > MOST_DOCUMENT_BYTES:
            is_too_long = True
            done = len(rest) - len(separator.pattern)  # a separator may have begun
        rest = rest[done:]
        at += done
    if rest or is_too_long:
        yield TOO_LONG if is_too_long else rest, at + len(rest)


def skip(stream: BinaryIO, count: int) -> None:
    """Go on after so many bytes. A compressed stream has to be unpacked once more up to there."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0:
        skipped = len(stream.read(min(count, CHUNK_BYTES)))
        if skipped == 0:
            return
        count -= skipped


def read_whole(stream: BinaryIO) -> bytes | Unusable:
    content = bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        content += chunk
        if len(content) > MOST_FILE_BYTES:
            return TOO_LONG
    return content


NEWLINE = re.compile(rb"\n")


def read_json_lines(stream: BinaryIO, text_column: str, start: int) -> Documents:
    """A JSON value on each line."""
    for line, after in split(stream, NEWLINE, start):
        if isinstance(line, Unusable):
            yield line, after
        elif line.strip():
            yield text_of(parsed(line), text_column), after


def read_json(stream: BinaryIO, text_column: str, start: int) -> Documents:
    """A JSON array, of which each item is a document, or a single JSON value."""
    content = read_whole(stream)
    value = content if isinstance(content, Unusable) else parsed(content)
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items[start:], start=start + 1):
        yield text_of(item, text_column), number


def has_json_lines(file: File) -> bool:
    """Whether a .json file has a JSON object on each line, and not one value or array in all."""
    with opened(file) as (_, stream):
        first_line, newline, _ = stream.read(CHUNK_BYTES).partition(b"\n")
    if first_line.strip().removeprefix(b"\xef\xbb\xbf").startswith(b"["):
        return False
    return not newline or not isinstance(parsed(first_line), Unusable)


def parsed(content: bytes) -> Any:
    """A JSON value; Unusable if it is none."""
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except (ValueError, RecursionError):
        return NOT_JSON


def text_of(value: Any, text_column: str) -> Any:
    """The text of a JSON value: the value itself, or one of its keys."""
    if not isinstance(value, dict):
        return value
    return value[text_column] if text_column in value else without_column(list(value))


def read_csv(stream: BinaryIO, text_column: str, start: int, delimiter: str = ",") -> Documents:
    """A column of a CSV file, whose first row has the names."""
    csv.field_size_limit(2 * MOST_DOCUMENT_BYTES)
    # Bytes that are not UTF-8 come out as lone surrogates, so that only their row is lost.
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    names = lines.readline()
    for other in (delimiter, ";", "\t", "|"):
        if text_column in next(csv.reader([names], delimiter=other), []):
            delimiter = other
            break
    rows = csv.reader(itertools.chain([names], lines), delimiter=delimiter)
    columns = next(rows, [])
    for number, row in enumerate(filter(None, rows), start=1):
        if number > start:
            yield csv_text(dict(zip(columns, row, strict=False)), text_column), number


def read_tsv(stream: BinaryIO, text_column: str, start: int) -> Documents:
    return read_csv(stream, text_column, start, delimiter="\t")


def csv_text(row: dict[str, str], text_column: str) -> str | Unusable:
    text = row.get(text_column, "")
    if len(text) > MOST_DOCUMENT_BYTES:
        return TOO_LONG
    if re.search("[\udc80-\udcff]", text or "".join(row)):
        return NOT_UTF8
    return text if text_column in row else without_column(list(row))


def read_parquet(stream: BinaryIO, text_column: str, start: int) -> Documents:
    """A column of a parquet file."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    fault = fault_of_column(file.schema_arrow, text_column)
    row = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        if row + group.num_rows <= start:
            row += group.num_rows
            continue
        check_row_group(group, text_column)
        values = itertools.repeat(fault, group.num_rows)
        if fault is None:
            batches = file.iter_batches(128, row_groups=[number], columns=[text_column])
            columns = (batch.column(text_column) for batch in batches)
            values = itertools.chain.from_iterable(map(values_of, columns))
        for value in values:
            row += 1
            if row > start:
                yield value, row


def check_row_group(group: Any, text_column: str) -> None:
    """Raise UserError unless a row group's text fits into memory."""
    columns = map(group.column, range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_column)
    if size > MOST_ROW_GROUP_BYTES:
        raise ValueError(
            f"a row group with {size:,} bytes of text; expected at most "
            f"{MOST_ROW_GROUP_BYTES:,}: write it anew with smaller ones"
        )


def read_arrow(stream: BinaryIO, text_column: str, start: int) -> Documents:
    """A column of an Arrow IPC file or stream, as `datasets` saves them."""
    import pyarrow

    magic = stream.read(6)
    if not magic:
        return
    # A file is a stream between this mark and a footer.
    stream.seek(8 if magic == b"ARROW1" else 0)
    reader = pyarrow.ipc.open_stream(stream)
    fault = fault_of_column(reader.schema, text_column)
    row = 0
    for batch in reader:
        values = itertools.repeat(fault, batch.num_rows)
        if fault is None and row + batch.num_rows > start:
            column = batch.column(text_column)
            check_offsets(column)
            values = values_of(column)
        for value in values:
            row += 1
            if row > start:
                yield value, row


def fault_of_column(schema: Any, text_column: str) -> Unusable | None:
    """Why a table has no text in its column of this name; None: it may have some."""
    from pyarrow import types

    if text_column not in schema.names:
        return without_column(schema.names)
    found = schema.field(text_column).type
    of = found.value_type if types.is_dictionary(found) else found
    # A column without any text has the type null.
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if any(is_kind(of) for is_kind in kinds):
        return None
    return Unusable(f"{str(found)[:40]} instead of text")


def without_column(columns: list[str]) -> Unusable:
    return Unusable(MISSING.reason, f"which has {shown(', '.join(columns)) or 'none'}")


def values_of(column: Any) -> Iterator[str | None | Unusable]:
    """The values of a pyarrow column of text."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            yield not_utf8(error)


def check_offsets(column: Any) -> None:
    """Raise ArrowInvalid where a text lies outside of its column. Reading it would be a crash."""
    import pyarrow

    as_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
    }
    if column.type in as_bytes:  # as bytes, because text that is not UTF-8 is skipped later
        column.view(as_bytes[column.type]).validate(full=True)


READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
ROWS = (".json", ".csv", ".tsv", ".parquet", ".arrow")  # where a place is a number of rows


# ---------------------------------------------------------------------------------------- all files


def read_files(
    files: list[File], text_column: str, split_on: str, position: dict | None
) -> Iterator[Row]:
    """The documents of all files, from a position on. Files of several formats may be mixed.

    A position is {"file": index, "at": place in it}; None: the start.
    """
    first, start = file_and_place(position)
    size_before = sum(file.size for file in files[:first])
    total = max(1, sum(file.size for file in files))
    for index in range(first, len(files)):
        file = files[index]
        with naming(file):
            for document, at, fraction in read_file(file, text_column, split_on, start):
                place = file.place if at is None else f"{file.place}:{at}"
                after = {"file": index, "at": at}
                if at is None:
                    after = {"file": index + 1, "at": 0}
                yield Row(document, place, after, (size_before + fraction * file.size) / total)
        start = 0
        size_before += file.size


def file_and_place(position: dict | None) -> tuple[int, int]:
    """The number of the file, and the place in it, at which to go on."""
    if position is None:
        return 0, 0
    numbers = (position.get("file"), position.get("at"))
    require(
        all(type(number) is int and number >= 0 for number in numbers),
        f"manifest.partial.json: position {shown(str(position))}; expected a file and a place in "
        "it; remove the directory, or choose another --out",
    )
    return numbers


@contextlib.contextmanager
def naming(file: File) -> Iterator[None]:
    """Errors of pyarrow, of csv and of damaged files do not name the file that they are about."""
    import pyarrow

    errors = [pyarrow.ArrowException, csv.Error, ValueError]
    if not file.is_on_hub:  # where an OSError may be the connection's
        errors.append(OSError)
    try:
        yield
    except tuple(errors) as error:
        if getattr(error, "filename", None):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file.path}: {shown(reason)}; expected a whole, readable file; mend it or leave it "
            "out"
        ) from error


# ------------------------------------------------------------------------------------------ the hub


def ask_hub(what: str, question: Callable[[], Any], say: Callable) -> Any:
    """`question()`, asked again while the connection fails.

    This is the one place where the many errors of the hub's clients become ours.
    """
    wait_for_no_silent_server()
    for wait in (*WAITS, None):
        began = time.monotonic()
        try:
            return question()
        except UserError:
            raise
        except Exception as error:
            if getattr(error, "filename", None):  # a disk that is full
                raise
            is_patient = time.monotonic() - began > MOST_CLIENT_SECONDS
            if wait is None or is_patient or not may_pass(error):
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{what}: {type(error).__name__}: {shown(reason, 300)}; expected to read it "
                    "from the hub; check the names and the connection, then run the same command "
                    "again"
                ) from error
            say(f"the hub did not answer ({type(error).__name__}), trying again in {wait} s")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def wait_for_no_silent_server() -> None:
    """Let each request of huggingface_hub have its timeout for downloads; some have none."""
    from huggingface_hub import get_session, set_client_factory

    client = get_session()
    hooks = client.event_hooks
    if limit_waiting not in hooks["request"]:
        make_client = type(client)
        hooks = hooks | {"request": [*hooks["request"], limit_waiting]}
        set_client_factory(lambda: make_client(event_hooks=hooks, follow_redirects=True))


def limit_waiting(request: Any) -> None:
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    timeouts = request.extensions["timeout"]
    for kind in ("connect", "read", "write", "pool"):
        if timeouts.get(kind) is None:
            timeouts[kind] = HF_HUB_DOWNLOAD_TIMEOUT


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError))


def dataset_info(dataset: str, revision: str, say: Callable) -> Any:
    """What the hub says of a dataset: its commit, and its files with their sizes."""
    from huggingface_hub import HfApi, constants

    def ask() -> Any:
        info = HfApi().dataset_info(
            dataset,
            revision=revision,
            files_metadata=True,
            timeout=6 * constants.HF_HUB_DOWNLOAD_TIMEOUT,  # the client asks but once
        )
        require(
            bool(re.fullmatch("[0-9a-f]{40}", str(info.sha))),
            f"{dataset}: the commit {shown(str(info.sha))}; expected 40 hexadecimal digits; check "
            "HF_ENDPOINT",
        )
        return info

    return ask_hub(f"{dataset} --revision {revision}", ask, say)


def dataset_files(dataset: str, name: str, split: str, commit: str, say: Callable) -> list[File]:
    """The files of a split, as `datasets` finds them by their names or by the README."""
    import datasets

    what = f"--dataset {dataset} --name {name!r}"
    builder = ask_hub(
        what, lambda: datasets.load_dataset_builder(dataset, name or None, revision=commit), say
    )
    splits = builder.config.data_files or {}
    require(
        split in splits,
        f"{what} --split {split}: no such split; expected one of "
        f"{shown(', '.join(map(str, splits)))}; choose one of them",
    )
    repository = f"hf://datasets/{dataset}@{commit}/"
    files = []
    for path in splits[split]:
        # A README names the files, and could name yours, or those of another repository.
        require(
            path.startswith(repository),
            f"{dataset}: names the file {shown(path)}; expected files of its own repository; do "
            "not use it: this reaches for what is not its own",
        )
        check_kind(path)
        files.append(File(path, path.removeprefix(repository), 1))
    return files
