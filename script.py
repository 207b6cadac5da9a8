"""How every script begins and ends: flags from a dataclass, locks, signals, and errors as exit codes.

Every script calls `run_script(main)`. Bad input raises `UserError` where it is seen; `run_script` is the only
place that turns it, an `OSError` or a signal into an exit code (0; 2 bad input; 130 SIGINT; 143 SIGTERM).
Nothing here imports torch, so that preparing data and each of its worker processes start without it.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend: what was found (naming the file or flag), what was expected, the remedy."""

    def __init__(self, found: str, *, expected: str, remedy: str):
        super().__init__(f"{found}; expected {expected}; {remedy}")
        self._parts = found, expected, remedy

    def __reduce__(self):  # exceptions with keyword arguments do not survive the way back from a worker process by themselves
        found, expected, remedy = self._parts
        return functools.partial(UserError, expected=expected, remedy=remedy), (found,)


class Stopped(Exception):
    """A signal ended the work in good order, everything saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Run `main` and exit: the one mapping from errors and signals to exit codes."""
    code, message = 0, None

    def on_sigterm(signum, frame):
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        main()
    except UserError as error:
        code, message = 2, f"error: {error}"
    except Stopped as error:
        code = 128 + error.signum
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # the reader of our output has gone, as in `python sample.py | head`
        silence_stdout()
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code, message = 2, f"error: {place}{error.strerror or error}; expected to read or write it; check the path, its permissions and the free space"
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            code, message = 2, f"error: {str(error).splitlines()[0]}; expected the work to fit in memory; lower --micro-batch or --seq-len"
        else:  # a fault of ours: the traceback is what a report needs
            traceback.print_exc()
            code = 1
    # A process group is left to die with the process on failure: destroying it would wait for the other ranks.
    distributed = sys.modules.get("torch.distributed")
    if code == 0 and distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    if message:
        sys.stderr.write(message + "\n")  # in one piece: other ranks write there too
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)


def silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_flags(config_class: type[T], default: T, description: str, args: list[str] | None = None) -> T:
    """Command line from the fields of a dataclass; their comments are the help. Exits 2 on flags it does not know.

    Where the class inherits its fields from several dataclasses, `--help` shows a box for each, the last base first.
    """
    import tyro

    groups = [base for base in reversed(config_class.__bases__) if dataclasses.is_dataclass(base)]
    if not groups:
        return tyro.cli(config_class, default=default, description=description, args=args)
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(config_class)}
    boxes = [(group.__name__.lower(), group, group(**{field.name: values[field.name] for field in dataclasses.fields(group)})) for group in groups]
    given = tyro.cli(dataclasses.make_dataclass("Flags", boxes), description=description, args=args, config=(tyro.conf.OmitArgPrefixes,))
    return config_class(**{name: value for box in vars(given).values() for name, value in vars(box).items()})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; refuse, naming the holder, while another process has it. The system frees
    the lock however a process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the two kinds the one that worker processes do not inherit
        except BlockingIOError:
            f.seek(0)
            raise UserError(f"{folder}: in use by {f.read() or 'another process'}", expected="one writer at a time",
                            remedy="wait for it, stop it, or choose another directory") from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield


class StopRequest:
    """First SIGINT or SIGTERM: `signum` is set and the work ends at its next safe point. A second one stops at once.

    Under torchrun repeats are ignored: Ctrl-C reaches a worker twice there, from the terminal and from torchrun,
    which itself kills workers that take longer than its grace period.
    """

    def __init__(self):
        self.signum = 0

    def _handle(self, signum, frame):
        if self.signum and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt if signum == signal.SIGINT else Stopped(signum)
        self.signum = signum

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the kernel.

    By default every large tensor is mapped afresh, and touching its pages for the first time costs more than the
    arithmetic on it: about a million page faults per training step at 124M parameters. Same effect as starting with
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; other C libraries do without.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
