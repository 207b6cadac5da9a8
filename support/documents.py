"""Documents, one by one, from local files and from datasets on the hub.

A source yields rows: a text, and the position after it, at which a later call can go on. fineweb.py
turns them into shards.

    what a source is   rows, and what is skipped as unusable, with its place
    local files        text, JSON, JSON lines, CSV and TSV, also compressed; Parquet and Arrow
    the hub            parquet files read directly, other formats by `datasets`

Nobody knows where a corpus comes from. A small file can unpack to terabytes, so every size is
compared with what is reasonable before memory is taken for it, and a text that cannot be used is
skipped and counted, not the end of a corpus.
"""

import contextlib
import csv
import errno
import functools
import io
import json
import mmap
import os
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO

from support.files import open_file, refuse_holes, walking
from support.hub import (
    MOST_ANSWER_BYTES,
    EndlessDownload,
    at_most,
    foreign_errors,
    guard,
    without_secrets,
)
from support.script import UserError

# Bytes of the longest document that is read, but for a text file that is one document: longer ones
# are skipped. Crawled pages have at most 5 MB, the longest novels 10 MB.
MOST_DOCUMENT_BYTES = 2**25
# Bytes of the longest text file that is one document.
MOST_TEXT_BYTES = 2**30
# Characters of the longest run without a place where tiktoken's work can be divided. For each it
# takes up to 170 bytes of memory.
MOST_RUN = 2**22
# A small file can unpack to terabytes. What has to be in memory at once may have so many bytes, or
# so many times what it takes in the file. Text packed by zstd or in Parquet has 3 to 5 times.
AT_ONCE = (2**28, 16)
# The same for everything that a file unpacks to, and for the characters of all its documents.
IN_ALL = (2**28, 100)
IN_ALL_DOCUMENTS = (2**24, 100)
# Bytes of a parquet footer, or this part of the file. A column takes 14 of them, and 1.6 KB once it
# is read.
MOST_FOOTER = (2**22, 1 / 16)
# Attempts at the hub in a row without progress, after 1, 2, 4 … seconds. The hub's client has its
# own attempts below these.
RETRIES = 6


# -------------------------------------------------------------------------------- what a source is


class SourceConfig(Protocol):
    """What is read here of the configuration of a preparation, fineweb.PrepareConfig."""

    dataset: str
    name: str
    split: str
    revision: str
    text_column: str
    split_on: str
    source_name: str  # how messages name the source


class Unusable(NamedTuple):
    """Stands for a document that is skipped, and says why and where."""

    reason: str
    place: str = ""


class Row(NamedTuple):
    """One document of a source, as read.

    position: JSON that says where to go on after this document; None where that is not known.
    fraction: how much of the source has been read, or of the file where it is a file's row; None if
    that is not known.
    """

    document: str | Unusable
    position: Any
    fraction: float | None


# A source is a function of a position (None: the start) that yields what comes after it.
Source = Callable[[Any], Iterator[Row]]


TOO_LONG = Unusable("too long")
ENDLESS_RUN = f"without a space in {MOST_RUN:,} characters"


def weight(document: str | Unusable) -> int:
    """The length of a text, and 100, so that empty ones fill a batch too."""
    return 100 + len(document) if isinstance(document, str) else 100


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


def usable(document: Any, place: str) -> str | Unusable:
    """A document as it was found at a place: itself if it is text that can be encoded."""
    if isinstance(document, Unusable):
        return Unusable(document.reason, ", ".join(filter(None, (place, document.place))))
    if document is None:
        return Unusable("missing text", place)
    if not isinstance(document, str):
        return Unusable(f"{type(document).__name__} instead of text", place)
    if len(document) > MOST_RUN and any(len(part) > MOST_RUN for part in parts_of(document)):
        return Unusable(ENDLESS_RUN, place)
    return document


def decode(content: bytes | bytearray) -> str | Unusable:
    try:
        return content.decode("utf-8-sig")  # without the mark that editors on Windows begin with
    except UnicodeDecodeError as error:
        return not_utf8(error)


def not_utf8(error: UnicodeDecodeError) -> Unusable:
    line = error.object.count(b"\n", 0, error.start) + 1
    return Unusable("not UTF-8", f"line {line:,} has the byte 0x{error.object[error.start]:02x}")


def text_of(item: Any, text_column: str) -> Any:
    """The text of one JSON value: the value itself if it is a string, else one of its keys."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        return item.get(text_column)
    return Unusable("not a JSON object")


def check_column(name: str, text_column: str, columns: list[str]) -> None:
    if columns.count(text_column) != 1:
        shown = ", ".join(str(column)[:80] for column in columns[:50])
        raise UserError(
            f"{name}, --text-column {text_column}: "
            f"{'several columns' if text_column in columns else 'no such column'}; expected one of "
            f"{shown}; choose the one with the text"
        )


def check_text_column(name: str, text_column: str, schema: Any) -> None:
    """Raise UserError unless a table has one such column, and it holds text."""
    from pyarrow import types

    check_column(name, text_column, schema.names)
    found = schema.field(text_column).type
    of = found.value_type if types.is_dictionary(found) else found
    # A column without any text has the type null.
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_kind(of) for is_kind in kinds):
        raise UserError(
            f"{name}, --text-column {text_column}: holds {str(found)[:80]}; expected a column of "
            "text; choose the one with the text"
        )


def column_values(column: Any) -> Iterator[Any]:
    """The values of a pyarrow column of text, each as a str, None or Unusable.

    One at a time, because many rows can share one long text, which is stored once.
    """
    for value in column:
        value = getattr(value, "value", value)  # of a dictionary
        if value is None or not value.is_valid:
            yield None
        elif value.as_buffer().size > MOST_DOCUMENT_BYTES:
            yield TOO_LONG
        else:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield not_utf8(error)


def most(size: float, limits: tuple[int, float]) -> float:
    """How large something may be that takes `size` bytes in a file."""
    least, times = limits
    return max(least, times * size)


def check_unpacked(name: str, size: int, limits: tuple[int, float], unpacked: int) -> None:
    """Raise UserError if what takes `size` bytes in a file is beyond reason when unpacked."""
    if unpacked > most(size, limits):
        raise UserError(
            f"{name}: {size:,} bytes unpack to {unpacked:,} or more; expected at most "
            f"{most(size, limits):,.0f}; leave it out, or unpack it by other means and see what it "
            "holds"
        )


# -------------------------------------------------------------------------------- local files


COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

# Suffixes of what is certainly not text. Every other unknown suffix is read as text, because source
# files have hundreds; what is not UTF-8 is refused after all, by its content.
NOT_TEXT = re.compile(
    r"\.(pdf|docx?|odt|rtf|xlsx?|ods|pptx?|epub|mobi|djvu"
    r"|zip|tar|tgz|tbz|txz|xz|7z|rar|lz4|br|lzma|jar|whl|iso|dmg|deb|rpm"
    r"|exe|dll|so|dylib|o|a|lib|class|pyc|wasm"
    r"|png|jpe?g|gif|bmp|tiff?|webp|ico|heic|psd"
    r"|mp3|mp4|m4a|wav|flac|ogg|avi|mkv|mov|webm|[to]tf|woff2?"
    r"|bin|np[yz]|ds|pth?|ckpt|pkl|pickle|safetensors|gguf|onnx|h5|hdf5"
    r"|db|sqlite3?|orc|avro|feather|msgpack)"
)

# What is read of a folder.
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".parquet")


def kind_and_compression(file: str) -> tuple[str, str | None]:
    """A file's format, as its suffix in lower case, and pyarrow's name of its compression."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    compression = None
    if suffixes and suffixes[-1] in COMPRESSIONS:
        compression = COMPRESSIONS[suffixes.pop()]
    kind = suffixes[-1] if suffixes else ""
    is_table = kind in (".parquet", ".arrow")
    if NOT_TEXT.fullmatch(kind) or (is_table and compression):
        raise UserError(
            f"{file}: {''.join(suffixes[-1:])} files cannot be "
            f"read{' compressed' if is_table else ''}; expected text, .jsonl, .json, .csv, .tsv, "
            ".parquet or .arrow; convert it to one of these, or leave it out"
        )
    return kind, compression


def expand(patterns: Iterable[str]) -> list[str]:
    """The regular files that paths, folders and globs name, in this order, each sorted by name."""
    files = []
    for pattern in patterns:
        with walking(pattern):
            files += files_of(pattern)
    return files


def files_of(pattern: str) -> list[str]:
    """The regular files that one path, folder or glob names. Raises UserError if there are none."""
    if os.path.isdir(pattern):
        found = texts_in(pattern)
        expected = f"{', '.join(TEXT_SUFFIXES)} files in it"
    elif os.path.lexists(pattern):
        found = [pattern] if os.path.isfile(pattern) else []
        expected = "a regular file"
    else:
        found = glob_files(pattern)
        expected = "a file, a folder, or a glob that matches files"
    if not found:
        exists = os.path.lexists(pattern)
        raise UserError(
            f"{pattern}: {'nothing to read' if exists else 'no such file'}; expected {expected}; "
            "check the path; put a glob in quotes, for example 'folder/**/*.txt'"
        )
    return found


def texts_in(folder: str) -> list[str]:
    """The text files in a folder and its subfolders. Links to folders are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffixes = Path(name.lower()).suffixes
            if suffixes and suffixes[-1] in COMPRESSIONS:
                suffixes.pop()
            is_text = bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES
            if is_text and not name.startswith(".") and os.path.isfile(Path(parent, name)):
                found.append(os.path.join(parent, name))
    return sorted(found)


def glob_files(pattern: str) -> list[str]:
    """The regular files that a glob matches. `**` does not follow links, which may form circles.

    As in a shell, wildcards do not match names that begin with a dot.
    """
    # A folder whose name has brackets or stars is taken by its name, not as a pattern.
    parts = list(Path(pattern).parts)
    base = Path()
    while parts and (base / parts[0]).is_dir():
        base /= parts.pop(0)
    if not parts:
        return []
    if parts[-1] == "**":
        parts.append("*")
    try:
        matches = list(base.glob("/".join(parts)))
    except (ValueError, NotImplementedError, OSError):
        # It is not a pattern, for example 'a**b', or it is too long.
        return []
    found = set()
    for match in matches:
        names = match.relative_to(base).parts
        is_hidden = any(
            name.startswith(".") and not part.startswith(".")
            for name, part in zip(reversed(names), reversed(parts), strict=False)
        )
        if not is_hidden and match.is_file():
            found.add(str(match))
    return sorted(found)


def file_and_place(position: Any) -> tuple[int, int]:
    """The file, by its number, and the place in it at which to go on."""
    if position is None:
        return 0, 0
    numbers = (position.get("file"), position.get("at"))
    if any(type(number) is not int or number < 0 for number in numbers):
        raise UserError(
            f"manifest.partial.json: position {str(position)[:80]}; expected a file and a place in "
            "it; remove the directory, or choose another --out"
        )
    return numbers


def file_source(config: SourceConfig, files: list[str]) -> Source:
    """The documents of local files, one file after another. Files of several formats may be mixed.

    A position is {"file": index, "at": place in it}. What a place is, each format's reader says.
    """
    readers = [file_reader(config, file) for file in files]
    sizes = [os.path.getsize(file) for file in files]
    total = max(1, sum(sizes))

    def read(position: Any) -> Iterator[Row]:
        first, start = file_and_place(position)
        size_before = sum(sizes[:first])
        for index in range(first, len(files)):
            file = files[index]
            with naming_the_file(file, OSError):
                for row in named(readers[index](start), file, sizes[index]):
                    place = {"file": index, "at": row.position}
                    if row.position is None:
                        place = {"file": index + 1, "at": 0}
                    done = size_before + (row.fraction or 0) * sizes[index]
                    yield Row(row.document, place, done / total)
            start = 0
            size_before += sizes[index]

    return read


def named(rows: Iterator[Row], file: str, size: int) -> Iterator[Row]:
    """The rows of a file of so many bytes. What is skipped is placed in this file.

    Raises UserError where the documents together are larger than it can honestly hold.
    """
    characters = 0
    for document, position, fraction in rows:
        characters += weight(document)
        check_unpacked(file, size, IN_ALL_DOCUMENTS, characters)
        if isinstance(document, Unusable):
            document = usable(document, file)
        yield Row(document, position, fraction)


@contextlib.contextmanager
def naming_the_file(file: str, *errors: type[Exception]) -> Iterator[None]:
    """Errors of pyarrow, of csv and of damaged headers do not name the file they are about."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, csv.Error, struct.error, ValueError, *errors) as error:
        if getattr(error, "filename", None):  # one of the system, which names it
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{file}: {reason}; expected a whole, readable file; mend it or leave it out of --input"
        ) from None


def file_reader(config: SourceConfig, file: str) -> Callable[[int], Iterator[Row]]:
    """The function that reads this file from a place on."""
    kind, compression = kind_and_compression(file)
    if kind == ".parquet":
        return functools.partial(read_parquet_file, file, config)
    if kind == ".arrow":
        return functools.partial(read_arrow, file, config)
    if kind in (".csv", ".tsv"):
        delimiter = "," if kind == ".csv" else "\t"
        return functools.partial(read_csv, file, compression, delimiter, config)
    if kind in (".jsonl", ".ndjson"):
        return functools.partial(read_json_lines, file, compression, config)
    if kind == ".json":
        return functools.partial(read_array_or_lines, file, compression, config)
    return functools.partial(read_text, file, compression, config)


class Unpacked(io.RawIOBase):
    """What a compressed file holds. Raises UserError where that is beyond reason for its size."""

    def __init__(self, file: str, compression: str):
        import pyarrow

        self.file = file
        self.size = os.path.getsize(file)
        self.unpacked = 0
        # Not by its name: pyarrow cannot open a name that is not UTF-8.
        self.stream = pyarrow.input_stream(open_file(Path(file)), compression=compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.stream.readinto(buffer)
        self.unpacked += count
        check_unpacked(self.file, self.size, IN_ALL, self.unpacked)
        return count


def open_stream(file: str, compression: str | None) -> BinaryIO:
    if compression:
        return io.BufferedReader(Unpacked(file, compression), 2**16)
    opened = open_file(Path(file))
    refuse_holes(opened, Path(file))
    return opened


def read_text(
    file: str, compression: str | None, config: SourceConfig, start: int
) -> Iterator[Row]:
    """A text file as one document, or cut at --split-on.

    A place is a byte of the uncompressed content.
    """
    separator = unescaped(config.split_on)
    if not separator:
        yield Row(usable(read_whole(file, compression), ""), None, 1.0)
        return
    # With \n asked for, lines that end in \r\n separate documents as well.
    if b"\r" not in separator and b"\r\n" in beginning(file, compression):
        separator = separator.replace(b"\n", b"\r\n")
    for part, first, after, fraction in split_file(file, compression, separator, start):
        document = part if isinstance(part, Unusable) else decode(part)
        yield Row(usable(document, f"from byte {first:,} on"), after, fraction)


def unescaped(split_on: str) -> bytes:
    r"""What --split-on stands for: \n, \r and \t, as typed on a command line, are characters."""
    text = split_on.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    return text.encode(errors="surrogateescape")  # any bytes can be typed


def beginning(file: str, compression: str | None, size: int = 2**20) -> bytes:
    with open_stream(file, compression) as stream:
        return stream.read(size)


def read_json_lines(
    file: str, compression: str | None, config: SourceConfig, start: int
) -> Iterator[Row]:
    """A JSON value on each line. A place is a byte of the file's uncompressed content."""
    for line, first, after, fraction in split_file(file, compression, b"\n", start):
        if isinstance(line, bytearray) and not line.strip():
            continue
        yield Row(usable(json_text(line, config), f"from byte {first:,} on"), after, fraction)


def json_text(line: bytearray | Unusable, config: SourceConfig) -> Any:
    if isinstance(line, Unusable):
        return line
    try:
        return text_of(json.loads(line), config.text_column)
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except (ValueError, RecursionError):
        return Unusable("not a JSON object")


def read_array_or_lines(
    file: str, compression: str | None, config: SourceConfig, start: int
) -> Iterator[Row]:
    """One JSON array of objects or strings, or JSON lines. A place is an item of it, or a byte."""
    if not beginning(file, compression).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from read_json_lines(file, compression, config, start)
        return
    with open_stream(file, compression) as stream:
        items = json_items(io.TextIOWrapper(stream, "utf-8-sig"))
        try:
            for number, item in enumerate(items, start=1):
                if number > start:
                    document = usable(text_of(item, config.text_column), f"item {number:,}")
                    yield Row(document, number, fraction_read(stream))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}: not JSON ({str(error)[:200]}); expected an array of objects or strings, "
                "or an object on each line; mend it or leave it out of --input"
            ) from None


def json_items(text: TextIO) -> Iterator[Any]:
    """The items of a JSON array. Only one is in memory at a time, because parsed JSON takes up to
    30 times the memory of its text. Raises ValueError, also where an item is too long.
    """
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    buffer = text.read(2**20).lstrip()
    at = space.match(buffer, 1).end()
    is_first = True
    while not (is_first and buffer[at : at + 1] == "]"):
        try:
            item, end = decoder.raw_decode(buffer, at)
            end = space.match(buffer, end).end()
            if buffer[end] not in ",]":
                raise ValueError(f"no comma, but {buffer[end]!r}")
        except (ValueError, IndexError) as error:  # perhaps the rest of the item is not yet read
            more = text.read(max(2**20, len(buffer) - at))
            if not more or len(buffer) - at > MOST_DOCUMENT_BYTES:
                raise ValueError(str(error)) from None
            buffer = buffer[at:] + more
            at = space.match(buffer).end()
            continue
        yield item
        is_first = False
        if buffer[end] == "]":
            at = end
            break
        at = space.match(buffer, end + 1).end()
    if (buffer[at + 1 :] + text.read(2**20)).strip():
        raise ValueError("more text behind the array")


def fraction_read(stream: BinaryIO) -> float | None:
    """How much of a file has been read; of a compressed one that is not known."""
    if not stream.seekable():
        return None
    return min(1.0, stream.tell() / max(1, os.fstat(stream.fileno()).st_size))


def read_csv(
    file: str, compression: str | None, delimiter: str, config: SourceConfig, start: int
) -> Iterator[Row]:
    """A column of a CSV or TSV file, whose first row has the names. A place is a number of rows."""
    csv.field_size_limit(2 * MOST_DOCUMENT_BYTES)
    with open_stream(file, compression) as stream:
        # Bytes that are not UTF-8 come out as lone surrogates, so that only their row is lost.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv_rows(text, delimiter)
        columns = next(rows, [])
        check_column(file, config.text_column, columns)
        column = columns.index(config.text_column)
        for number, row in enumerate(rows, start=1):
            if number <= start or not row:
                continue
            document = row[column] if column < len(row) else None
            if document and len(document) > MOST_DOCUMENT_BYTES:
                document = TOO_LONG
            elif document and re.search("[\udc80-\udcff]", document):
                document = Unusable("not UTF-8")
            yield Row(usable(document, f"row {number:,}"), number, fraction_read(stream))


def csv_rows(text: TextIO, delimiter: str) -> Iterator[list[str]]:
    """The rows of a CSV file. Raises csv.Error where one has no end, as one of many fields may."""
    characters = 0

    def lines() -> Iterator[str]:
        nonlocal characters
        while line := text.readline(2 * MOST_DOCUMENT_BYTES):
            characters += len(line)
            if characters >= 2 * MOST_DOCUMENT_BYTES:
                raise csv.Error(f"a row of more than {characters:,} characters")
            yield line

    for row in csv.reader(lines(), delimiter=delimiter):
        yield row
        characters = 0


def read_whole(file: str, compression: str | None) -> str | Unusable:
    """The text of a file that is one document."""
    longest = MOST_TEXT_BYTES
    if compression:
        longest = min(longest, most(os.path.getsize(file), (MOST_DOCUMENT_BYTES, AT_ONCE[1])))
    content = bytearray()
    with open_stream(file, compression) as stream:
        while chunk := stream.read(2**22):
            content += chunk
            if len(content) > longest:
                return TOO_LONG
    return decode(content)


def split_file(
    file: str, compression: str | None, separator: bytes, start: int
) -> Iterator[tuple[bytearray | Unusable, int, int, float]]:
    """The parts of a file between separators, from byte `start` on.

    Each comes with its first byte, the byte after it, and the fraction of the file read until
    then. Bytes are those of the uncompressed content. The fraction of a compressed file is only an
    estimate. What is too long is read past, and not kept.
    """
    size = max(1, os.path.getsize(file))
    first = start
    rest = bytearray()
    dropped = 0  # bytes of the part so far that are not in `rest`, because it is too long

    def part_and_places(part: bytearray, end: int) -> tuple:
        after = first + dropped + len(part) + end
        too_long = dropped + len(part) > MOST_DOCUMENT_BYTES
        return TOO_LONG if too_long else part, first, after, min(1.0, after / size)

    with open_stream(file, compression) as stream:
        skip_bytes(stream, start)
        while chunk := stream.read(2**22):
            unsearched = max(0, len(rest) - len(separator))
            rest += chunk
            if rest.find(separator, unsearched) >= 0:
                *parts, rest = rest.split(separator)
                for part in parts:
                    found = part_and_places(part, len(separator))
                    first = found[2]
                    dropped = 0
                    yield found
            if len(rest) > MOST_DOCUMENT_BYTES:
                dropped += len(rest) - len(separator)
                del rest[: -len(separator)]
    if rest:
        yield part_and_places(rest, 0)


def skip_bytes(stream: Any, count: int) -> None:
    """Go on after so many bytes. A compressed stream has to be unpacked once more up to there."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0:
        skipped = len(stream.read(min(count, 2**22)))
        if skipped == 0:
            return
        count -= skipped


def read_arrow(file: str, config: SourceConfig, start: int) -> Iterator[Row]:
    """An Arrow IPC file or stream, as `datasets` saves them. A place is a number of rows."""
    import pyarrow

    with open_file(Path(file)) as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            return
        # Mapped, not read: a record batch that is not compressed takes no memory.
        content = pyarrow.py_buffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    if content[:6].to_pybytes() == b"ARROW1":  # a file is a stream between this mark and a footer
        content = content.slice(8)
    for message in pyarrow.ipc.MessageReader.open_stream(content):
        if message.body:
            check_unpacked(file, message.body.size, AT_ONCE, unpacked_size(message))
    reader = pyarrow.ipc.open_stream(content)
    check_text_column(file, config.text_column, reader.schema)
    row = 0
    for batch in reader:
        if row + batch.num_rows <= start:
            row += batch.num_rows
            continue
        for document in column_values(checked(batch.column(config.text_column))):
            row += 1
            if row > start:
                yield Row(usable(document, f"row {row:,}"), row, None)


def checked(column: Any) -> Any:
    """A column of an Arrow file. Raises ArrowInvalid where a text would lie outside of its memory.

    That its bytes are UTF-8 is not checked here.
    """
    import pyarrow

    as_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
        pyarrow.null(): pyarrow.null(),
    }
    if pyarrow.types.is_dictionary(column.type):
        checked(column.dictionary)
        pyarrow.DictionaryArray.from_arrays(column.indices, pyarrow.nulls(len(column.dictionary)))
    else:
        column.view(as_bytes[column.type]).validate(full=True)
    return column


def unpacked_size(message: Any) -> int:
    """The bytes that the buffers of an Arrow IPC message say to have when unpacked; 0: not packed.

    A message describes itself in a flatbuffer, whose fields have these numbers in Arrow's
    Message.fbs. A packed buffer begins with its size, as an int64.
    """
    data = message.metadata.to_pybytes()

    def number(kind: str, place: int) -> int:
        return struct.unpack_from("<" + kind, data, place)[0]

    def field(table: int, index: int) -> int:
        """Where a field of a table is; 0 if it is not there."""
        offsets = table - number("i", table)
        if 4 + 2 * index >= number("H", offsets):
            return 0
        offset = number("H", offsets + 4 + 2 * index)
        return table + offset if offset else 0

    def target(place: int) -> int:
        return place + number("I", place)

    batch = target(field(target(0), 2))
    if message.type == "dictionary":
        batch = target(field(batch, 1))
    elif message.type != "record batch":
        return 0
    if not field(batch, 3):  # not compressed
        return 0
    buffers = target(field(batch, 2))
    total = 0
    for i in range(number("I", buffers)):
        offset = number("q", buffers + 4 + 16 * i)
        length = number("q", buffers + 12 + 16 * i)
        if length > 0:
            size = int.from_bytes(
                message.body[offset : offset + 8].to_pybytes(), "little", signed=True
            )
            total += max(0, size)
    return total


def read_parquet_file(file: str, config: SourceConfig, start: int) -> Iterator[Row]:
    with open_file(Path(file)) as opened:
        yield from read_parquet(opened, file, config, start)


def read_parquet(opened: BinaryIO, name: str, config: SourceConfig, start: int) -> Iterator[Row]:
    """The text column of a parquet file, local or on the hub. A place is a number of rows.

    `datasets` finds the files of a hub dataset, but its streams resume by reading the current file
    from its start again (2 GB in FineWeb-Edu). Read directly, the footer tells where to go on.
    """
    import pyarrow.parquet

    size, groups = read_footer(opened, name, config.text_column)
    file = pyarrow.parquet.ParquetFile(opened)
    check_text_column(name, config.text_column, file.schema_arrow)
    row = 0
    unpacked = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if row + num_rows <= start:
            row += num_rows
            continue
        pages = pages_of(opened, name, groups[group])
        unpacked += sum(pages)
        check_unpacked(name, size, IN_ALL, unpacked)
        # A string that is repeated is stored once, so that each row may be as long as a page.
        rows_at_once = AT_ONCE[0] // max(1, *pages)
        for batch in file.iter_batches(
            max(1, min(128, rows_at_once)), row_groups=[group], columns=[config.text_column]
        ):
            for document in column_values(batch.column(config.text_column)):
                row += 1
                if row > start:
                    place = f"row {row:,}"
                    yield Row(usable(document, place), row, row / file.metadata.num_rows)


class Column(NamedTuple):
    """Where a row group has the pages of one column, and how many values these hold."""

    start: int
    size: int
    values: int


def read_footer(opened: BinaryIO, name: str, text_column: str) -> tuple[int, list[list[Column]]]:
    """The size of a parquet file, and the columns of text of each of its row groups.

    Raises UserError where the footer would fill the memory, or is damaged. It is parsed here too,
    because pyarrow ends the process where it is asked for a damaged column.
    """
    size = opened.seek(0, os.SEEK_END)
    tail = min(size, 2**16)  # what pyarrow will read, so that the hub is asked once
    opened.seek(size - tail)
    length = int.from_bytes(opened.read(tail)[-8:-4], "little")
    if length > most(size, MOST_FOOTER):
        raise UserError(
            f"{name}: a footer of {length:,} bytes in {size:,}; expected at most "
            f"{most(size, MOST_FOOTER):,.0f}; leave it out, or write it anew with fewer columns "
            "and row groups"
        )
    opened.seek(max(0, size - 8 - length))
    try:
        footer, _ = thrift_struct(opened.read(length), 0)
        return size, [columns_of(group, text_column) for group in footer.get(4, [])]
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        raise UserError(
            f"{name}: a damaged footer; expected a parquet file; mend it or leave it out"
        ) from None


def columns_of(group: dict[int, Any], text_column: str) -> list[Column]:
    """The columns of a row group, as the footer has it, whose path begins with a name."""
    found = []
    for chunk in group[1]:
        column = chunk[3]
        path = b".".join(column[3]) + b"."
        if path.startswith(text_column.encode(errors="surrogateescape") + b"."):
            dictionary_page = column.get(11, 0)
            start = min(column[9], dictionary_page) if dictionary_page > 0 else column[9]
            if min(start, column[7], column[5]) < 0:
                raise ValueError("a negative place or size")
            found.append(Column(start, column[7], column[5]))
    return found


def pages_of(opened: BinaryIO, name: str, columns: list[Column]) -> list[int]:
    """The sizes of the unpacked pages of a row group's text.

    The footer has their sum, but only a page's own header says what pyarrow will allocate. Raises
    UserError where that is beyond reason.
    """
    pages = [0]
    for start, size, num_values in columns:
        end = start + size
        # On the hub this is one request. What is read below is then in the client's memory.
        opened.seek(start)
        opened.read(min(size, AT_ONCE[0]))
        values = 0
        while start < end and values < num_values:
            page = read_page_header(opened, start, name)
            check_unpacked(name, page.packed, AT_ONCE, page.unpacked)
            pages.append(page.unpacked)
            values += page.values
            start += page.header + page.packed
    return pages


class Page(NamedTuple):
    """Sizes of a page of a parquet file: its header, and what it holds, packed and unpacked."""

    header: int
    packed: int
    unpacked: int
    values: int


def read_page_header(opened: BinaryIO, start: int, name: str) -> Page:
    """The header of the page that begins at byte `start`. Raises UserError."""
    for longest in (2**13, 2**24):  # pyarrow has the second limit, too
        opened.seek(start)
        data = opened.read(longest)
        try:
            fields, length = thrift_struct(data, 0)
            details = fields.get(5) or fields.get(8) or {}
            page = Page(length, fields[3], fields[2], details.get(1, 0))
            if min(page) >= 0:
                return page
        except IndexError:  # the header is longer than that
            pass
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            break
    raise UserError(
        f"{name}: no page of a column begins at byte {start:,}; expected a parquet file; mend it "
        "or leave it out"
    )


def thrift_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol at a place, by the numbers of its fields, and its end.

    Raises IndexError where the data end, and ValueError for what the protocol does not have.
    """
    fields = {}
    number = 0
    while head := data[at]:
        step, kind = head >> 4, head & 15
        at += 1
        if step:
            number += step
        else:
            number, at = thrift_number(data, at)
        if kind in (1, 2):  # a truth value, which has no bytes of its own
            fields[number] = kind == 1
        else:
            fields[number], at = thrift_value(data, at, kind)
    return fields, at + 1


def thrift_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """A value of a kind at a place, and its end."""
    if kind in (4, 5, 6):
        return thrift_number(data, at)
    if kind == 8:  # a string of bytes
        length, at = thrift_varint(data, at)
        return data[at : at + length], at + length
    if kind in (9, 10):  # a list or a set
        return thrift_list(data, at)
    if kind == 12:
        return thrift_struct(data, at)
    sizes = {1: 1, 2: 1, 3: 1, 7: 8}  # truth values in a list, bytes, and floats
    if kind not in sizes:
        raise ValueError(f"type {kind}")
    return None, at + sizes[kind]  # of no interest here


def thrift_list(data: bytes, at: int) -> tuple[list, int]:
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = thrift_varint(data, at)
    values = []
    for _ in range(count):
        value, at = thrift_value(data, at, kind)
        values.append(value)
        if at > len(data):
            raise IndexError("the data end in a list")
    return values, at


def thrift_number(data: bytes, at: int) -> tuple[int, int]:
    """An integer, of which the last bit is the sign."""
    value, at = thrift_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def thrift_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


# -------------------------------------------------------------------------------- the hub


def dataset_source(config: SourceConfig, revision: str) -> Source:
    """The documents of a dataset on the hub."""
    import datasets

    guard()
    with foreign_errors():
        name = config.name or None
        with at_most(config.dataset, MOST_ANSWER_BYTES):
            builder = datasets.load_dataset_builder(config.dataset, name, revision=revision)
        data_files = builder.config.data_files or {}
        splits = builder.info.splits or {}
        if config.split not in (data_files or splits):
            raise UserError(
                f"--split {config.split}: no such split; expected one of "
                f"{', '.join(map(str, data_files or splits))[:1000]}; choose one of them"
            )
        urls = list(data_files.get(config.split, []))
        refuse_files_elsewhere(config, urls)
        if builder.name == "parquet":
            return hub_parquet_source(config, urls)
        info = splits.get(config.split)
        num_rows = int(info.num_examples) if info else None
        stream = builder.as_streaming_dataset(split=config.split)
    return functools.partial(read_stream, stream, num_rows, config)


def refuse_files_elsewhere(config: SourceConfig, urls: Iterable[str]) -> None:
    """A dataset's README names its files, and could name yours, or those of another repository."""
    for url in urls:
        if not url.startswith(f"hf://datasets/{config.dataset}@"):
            raise UserError(
                f"--dataset {config.dataset}: names the file {url[:200]}; expected files of its "
                "own repository; do not use it: this reaches for what is not its own"
            )


def hub_parquet_source(config: SourceConfig, urls: list[str]) -> Source:
    """The rows of parquet files on the hub. Only the text column is downloaded, 32 MB at a time."""

    def read(position: Any) -> Iterator[Row]:
        first, start = file_and_place(position)
        for index in range(first, len(urls)):
            path = urls[index].removeprefix("hf://")
            with naming_the_file(path), open_on_hub(path) as opened:
                rows = read_parquet(opened, path, config, start)
                for row in named(rows, path, opened.size):
                    place = {"file": index, "at": row.position}
                    yield Row(row.document, place, (index + row.fraction) / len(urls))
            start = 0

    return read


def open_on_hub(path: str) -> BinaryIO:
    """A file on the hub. Of an answer only as many bytes are read as were asked for."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemFile
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    class BoundedFile(HfFileSystemFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            headers = build_hf_headers() | {"range": f"bytes={start}-{end - 1}"}
            content = bytearray()
            with get_session().stream("GET", self.url(), headers=headers) as response:
                hf_raise_for_status(response)
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > end - start:
                        raise EndlessDownload(path, end - start)
            return bytes(content)

    with foreign_errors():
        return BoundedFile(HfFileSystem(), path, block_size=2**25)


def read_stream(
    stream: Any, num_rows: int | None, config: SourceConfig, position: Any
) -> Iterator[Row]:
    """Rows of a `datasets` stream. Its state is the position, and known after every 128 rows."""
    row = 0
    with foreign_errors():  # the position may be somebody else's
        if position:
            row = int(position["rows"])
            stream.load_state_dict(position["state"])
        tables = stream.with_format("arrow").iter(128)
    while True:
        with foreign_errors():
            table = next(tables, None)
        if table is None:
            return
        check_text_column(config.source_name, config.text_column, table.schema)
        last = row + table.num_rows
        place = {"state": stream.state_dict(), "rows": last}
        for document in column_values(table[config.text_column]):
            row += 1
            document = usable(document, f"row {row:,}")
            fraction = row / num_rows if num_rows else None
            yield Row(document, place if row == last else None, fraction)


def on_hub(config: SourceConfig, say: Callable, action: Callable[[], Any]) -> Any:
    """`action()`, tried again while the connection fails.

    This is the one place where the many errors of the hub's clients become ours.
    """
    from huggingface_hub.errors import HTTPError

    guard()
    for attempt in range(RETRIES + 1):
        try:
            return action()
        # A ValueError is an unknown configuration or a malformed name.
        except (HTTPError, OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            if attempt == RETRIES or not may_pass(error):
                reason = without_secrets(" ".join(str(error).split()))[:300]
                raise UserError(
                    f"{config.source_name} --revision {config.revision}: {type(error).__name__}: "
                    f"{reason}; expected to read it from the hub; check the names and the "
                    "connection, then run the same command again"
                ) from error
            say(f"the hub did not answer ({type(error).__name__}), trying again in {2**attempt} s")
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


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


def dataset_info(config: SourceConfig, dataset: str, say: Callable) -> Any:
    """What the hub says of a dataset: its commit, and its files with their sizes."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        with foreign_errors():
            info = HfApi().dataset_info(dataset, revision=config.revision, files_metadata=True)
            if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
                raise ValueError(f"the commit {str(info.sha)[:80]!r}")
        return info

    return on_hub(config, say, ask)
