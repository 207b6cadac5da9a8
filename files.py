"""Files that survive a crash, and directories that have one writer: write, hash, lock.

Everything that a run or a corpus leaves on disk is written by `write_file`: under a temporary name,
flushed to the disk, then renamed. A reader sees the old file or the new one, never half of it.
"""

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cli import UserError


def write_file(file: Path, *parts: bytes | memoryview) -> str:
    """Write the parts as one file, whole and on disk before it has its name; returns its sha256."""
    temporary = file.with_name(file.name + ".tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as f:
            for part in parts:
                f.write(part)
                digest.update(part)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:  # a full disk does not say which file it was
        raise OSError(error.errno, error.strerror, str(file)) from None
    os.replace(temporary, file)
    sync(file.parent)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Return once a file's content, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is not there, for this process alone.

    Raises UserError, which names the holder, while another process has it. The system frees the
    lock however a process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    holder = folder / ".lock-holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        raise UserError(
            f"{folder}: in use by {name}",
            expected="one writer at a time",
            remedy="wait for it, stop it, or choose another directory",
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
