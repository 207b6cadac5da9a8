"""Files that survive a crash, and directories that have one writer: write, read, hash, lock.

Everything that a run or a corpus leaves on disk is written by `write_file`: under a temporary name,
flushed to the disk, then renamed. A reader sees the old file or the new one, never half of it.

A link that stands where a file is written is replaced, and what it points to stays. Reading follows
links, since Hugging Face's cache is made of them. Only regular files are read, up to a limit of
size, and JSON must have a declared shape.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from support.script import UserError, require, shown

# What a file system answers when it has no such operation: Lustre, CIFS and FUSE lack some of them.
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP}


@functools.cache
def _warn_once(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- writing


def write_file(file: Path, *parts: bytes | memoryview) -> str:
    """Write the parts as one file, whole and on disk before it has its name; returns its sha256.

    An OSError names the file and leaves the old content, if there was any, as it was.
    """
    # A name that nobody can guess, and that is short enough for any file name beside it.
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as f:  # x: fails on any existing name, links included
            for part in parts:
                f.write(part)
                digest.update(part)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise
    sync(file.parent)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Return once a file's content, or a directory's list of names, is on disk.

    Some file systems cannot flush a directory. Then one warning says so, and the work goes on.
    """
    is_folder = os.path.isdir(path)
    if is_folder and os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in UNSUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from None
        _warn_once(
            f"{path}: this file system cannot flush a directory ({error.strerror}); "
            "after a power failure the newest files may be missing"
        )
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash left half-written in `folder`. Call with its lock held.

    These are the entries `.*.tmp`.
    """
    for entry in folder.glob(".*.tmp"):
        remove(entry)


def remove(path: Path) -> None:
    """Remove a file, a directory or a link (never what the link points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except OSError as error:  # it names files without their folder
            raise OSError(error.errno, error.strerror, str(path)) from None
    elif os.path.lexists(path):
        path.unlink()


# ---------------------------------------------------------------------------------------- reading


def open_file(file: Path) -> BinaryIO:
    """Open a regular file for reading; a FIFO, a device or a directory is refused without waiting.

    Raises UserError, also where the file is missing; OSError where it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(file, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{file}: {error.strerror}; expected a file that can be read; check the path"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{file}: not a regular file; expected one; remove it, or name another")
    return open(descriptor, "rb")


def read_bytes(file: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes. Raises UserError."""
    with open_file(file) as f:
        content = f.read(limit + 1)
    require(
        len(content) <= limit,
        f"{file}: more than {limit:,} bytes; expected at most that; it is not the kind of file "
        "that it should be: restore it",
    )
    return content


def read_jsonl(file: Path) -> Iterator[tuple[bytes, dict | None]]:
    """The lines of a file of JSON objects, each with its object, or None where it is none.

    A line comes without its newline. One of more than 16 MiB comes in pieces, which are no JSON.
    Raises UserError.
    """
    with open_file(file) as f:
        while line := f.readline(2**24):
            line = line.removesuffix(b"\n")
            try:
                entry = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                entry = None
            yield line, entry if isinstance(entry, dict) else None


def read_json(file: Path, shape: dict, limit: int = 2**24) -> dict:
    """A JSON file of at most `limit` bytes, checked against `shape`. Raises UserError.

    The shape is an example of the file, with types in place of values:

        {"step": int,                         a key that must be there
         "loss": (int, float),                one of several types
         "note?": str,                        a key that may be missing
         "shards": [{"name": str}],           a list, each element of one shape
         "files": {str: {"size": int}}}       an object with any keys, each value of one shape

    Types are exact: true is no int, and 1 is no float. Integers fit in 64 bits and floats are
    finite. Keys that the shape does not name are allowed and not checked.
    """
    try:
        text = read_bytes(file, limit).decode("utf-8")
        value = json.loads(text, parse_constant=_finite_float, parse_float=_finite_float)
        _check(value, shape, "")
        return value
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or not of the shape
        raise UserError(
            f"{file}: {error}; expected the JSON that this program writes; restore the file, or "
            "use another"
        ) from None


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number that is not finite")
    return number


def _check(value: Any, shape: Any, place: str) -> None:
    """Raise ValueError, naming the key, unless the value has the shape; `read_json` explains it."""
    where = place or "the file"
    if isinstance(shape, dict):
        if type(value) is not dict:
            raise ValueError(f"{where} is {_json_name(type(value))}, not an object")
        _check_keys(value, shape, place)
    elif isinstance(shape, list):
        if type(value) is not list:
            raise ValueError(f"{where} is {_json_name(type(value))}, not a list")
        for i, element in enumerate(value):
            _check(element, shape[0], f"{place}[{i}]")
    else:
        types = shape if isinstance(shape, tuple) else (shape,)
        if type(value) not in types:
            wanted = " or ".join(_json_name(kind) for kind in types)
            raise ValueError(f"{where} is {_json_name(type(value))}, not {wanted}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} is an integer of more than 64 bits")


def _check_keys(value: dict, shape: dict, place: str) -> None:
    if str in shape:  # any keys
        for key, element in value.items():
            _check(element, shape[str], f"{place}[{key[:80]!r}]")
        return
    for key, element_shape in shape.items():
        name = key.removesuffix("?")
        key_place = f"{place}.{name}" if place else f"key {name!r}"
        if name in value:
            _check(value[name], element_shape, key_place)
        elif name == key:
            raise ValueError(f"{key_place} is missing")


def _json_name(kind: type) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "an integer",
        float: "a decimal number",
        type(None): "null",
    }
    return names[kind]


def file_sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal. Raises UserError or OSError."""
    with open_file(file) as f:
        try:
            return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None


# ---------------------------------------------------------------------------------------- names


def plain_name(name: str) -> bool:
    """Whether a name read from a file can only be that of an entry of the same folder."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def same_folder(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    """Whether two paths lead to one place, however they are spelled."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


# ---------------------------------------------------------------------------------------- locking


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is not there, for this process alone.

    Raises UserError, which names the holder, while another process has it. The system frees the
    lock however a process ends. Where the file system has no locks, one warning says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    if file.is_symlink():  # some versions of filelock empty what it points to
        file.unlink()
    lock = FileLock(file)
    holder = folder / ".lock-holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: in use by {_read_holder(holder)}; expected one writer at a time; wait for "
            "it, stop it, or choose another directory"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter from filelock 3
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise OSError(error.errno, error.strerror, str(file)) from None
        _warn_once(
            f"{folder}: this file system has no locks; make sure that no other process writes here"
        )
    try:
        # The holder only serves the message above. A disk that is full is no reason to stop here.
        with contextlib.suppress(OSError):
            write_file(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _read_holder(file: Path) -> str:
    """Who holds the lock, as far as the file can say it."""
    try:
        text = read_bytes(file, 300).decode()
    except (UserError, OSError, ValueError):
        return "another process"
    return shown(text) or "another process"
