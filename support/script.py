"""How every script begins and ends: flags, messages, signals, and errors as exit codes.

A script ends with `run_script(main)`. Bad input raises `UserError` where it is seen. `run_script`
is the one place that turns an error or a signal into an exit code:

    0     the work is done
    1     a fault of this program: its traceback is what a report needs
    2     bad input, too little memory, a file that cannot be read or written, or another rank
          that is lost; the last line of stderr names the remedy
    128+n stopped by signal n, after saving (129 SIGHUP, 130 SIGINT, 143 SIGTERM, …)
"""

import contextlib
import ctypes
import json
import math
import os
import re
import signal
import socket
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO, TypeVar

Config = TypeVar("Config")


class UserError(Exception):
    """What the user can mend, in one line: what is wrong; what was expected; what to do."""


def require(ok: bool, message: str) -> None:
    """Raise UserError with this message unless something is as it should be."""
    if not ok:
        raise UserError(message)


class Stopped(BaseException):
    """A signal has ended the work.

    Like KeyboardInterrupt it is no Exception: an `except Exception` in a library must not lose it.
    message: what torchrun's report shall say of it, such as how to go on.
    at_once: it was not the first one, and nothing is waited for: neither a checkpoint that is being
    written, nor threads, nor what libraries do when a process ends.
    """

    def __init__(self, signum: int, message: str = "", at_once: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.message = message
        self.at_once = at_once


# ---------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have, beside its type: `Annotated[int, Range(1)]`."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # `least` itself is not among them
    below: bool = False  # `most` itself is not among them

    def __contains__(self, value: object) -> bool:
        if type(value) not in (int, float):
            return False
        is_high_enough = value > self.least if self.above else value >= self.least
        is_low_enough = value < self.most if self.below else value <= self.most
        return is_high_enough and is_low_enough

    def __str__(self) -> str:
        bounds = []
        if self.least > -math.inf:
            bounds.append(f"{'more than' if self.above else 'at least'} {self.least:,}")
        if self.most < math.inf:
            bounds.append(f"{'less than' if self.below else 'at most'} {self.most:,}")
        return " and ".join(bounds) or "a number"


def check_fields(config: object) -> None:
    """Compare the fields of a dataclass with their `Range` or `Literal`. None is always allowed.

    Raises one UserError that names every field which is not as it should be.
    """
    faults = []
    types_of_fields = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        for allowed in _allowed_values(types_of_fields[field.name]):
            if value is not None and value not in allowed:
                expected = allowed if isinstance(allowed, Range) else _alternatives(allowed)
                flag = "--" + field.name.replace("_", "-")
                faults.append(f"{flag} {shown(str(value))}: expected {expected}")
    require(not faults, "; ".join(faults))


def _allowed_values(kind: object) -> Iterator[Range | tuple]:
    """The ranges and choices that stand in a type, which may be Annotated or one of several."""
    if typing.get_origin(kind) is typing.Literal:
        yield typing.get_args(kind)
    elif typing.get_origin(kind) is typing.Annotated:
        inner, *metadata = typing.get_args(kind)
        yield from _allowed_values(inner)
        yield from (entry for entry in metadata if isinstance(entry, Range))
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        for inner in typing.get_args(kind):
            yield from _allowed_values(inner)


def _alternatives(values: tuple) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def parse_flags(
    config_class: type[Config],
    default: Config,
    description: str | None,
    args: list[str] | None = None,
) -> Config:
    """The command line as an instance of a dataclass: a flag for each field, its comment as help.

    Flags override the values of `default`. An unknown or malformed flag exits with code 2. Of
    several ranks only the first one of each machine prints help or errors. `python -OO` leaves no
    docstring for a description.
    """
    import tyro  # slow to import, and a notebook does without

    return tyro.cli(
        config_class,
        default=default,
        description=description or "",
        args=args,
        console_outputs=os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0",
    )


# ---------------------------------------------------------------------------------------- output


# What can move a terminal's cursor, set its title, or show text in an order that it does not have:
# control characters but newline and tab, marks of text direction, and lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str, longest: int = 200, lines: bool = False) -> str:
    """A name or a text that comes from a file or a model, as it is safe to show.

    What is UNPRINTABLE in it becomes \\x1b or \\u202e, newlines become \\n, and it is cut.
    lines: newlines and tabs stay, and so does the whole length.
    """
    if not lines:
        text = text if len(text) <= longest else text[:longest] + "…"
        text = text.replace("\n", "\\n").replace("\t", "\\t")
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _written(text: str, stream: TextIO) -> str:
    """The text as it is written there: escaped on a terminal, and unchanged in a file or a pipe."""
    return shown(text, lines=True) if stream.isatty() else text


def say(*lines: str) -> None:
    """Print lines above any progress bar. A reader who has gone away does not end the work."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):
        tqdm.write(_written("\n".join(lines), sys.stdout))
        sys.stdout.flush()


def _write_message(message: str) -> None:
    """One write for the whole message: under torchrun other ranks write to the same terminal."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(_written(message, sys.stderr) + "\n")
        sys.stderr.flush()


def _open_output() -> None:
    """Make stdout and stderr fit to be written to, whatever they were when the script started."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `>&-` in a shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # A locale that lacks a character, as Latin-1 does most, shows its number instead.
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _close_output() -> None:
    """Flush stdout and stderr. What cannot be written is dropped.

    Otherwise the interpreter would try again when it exits, fail, and make the exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---------------------------------------------------------------------------------------- signals

# SIGHUP comes when the terminal is closed. Shortly before the end of a job's time SIGUSR1 comes
# from Slurm, SIGUSR2 from LSF and Grid Engine, and SIGXCPU from a limit of processor time.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def handle_stop_signals(handler: Callable) -> dict:
    """Install the handler for the stop signals that this platform has; returns what it replaces."""
    replaced = {}
    for name in STOP_SIGNALS:
        signum = getattr(signal, name, None)
        if signum is None:
            continue
        if name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN:
            continue  # nohup asks that the work outlive its terminal
        replaced[signum] = signal.signal(signum, handler)
    return replaced


def begin() -> None:
    """What a script does before its heavy imports, which take seconds:

        if __name__ == "__main__":
            from support import script

            script.begin()

    Until `run_script` takes over, a stop signal ends the process without a traceback. And under
    torchrun, a worker ends when torchrun does, however that was ended (on Linux).
    """
    handle_stop_signals(lambda signum, frame: os._exit(128 + signum))
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1  # of <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if _parent_has_ended():  # before it was asked for
            os._exit(128 + signal.SIGTERM)


def _parent_has_ended() -> bool:
    """Whether process 1 is the parent now, and not because it is torchrun, as in a container."""
    if os.getppid() != 1:
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:  # other users' processes are hidden, so it is none of ours
        return True


class StopRequest:
    """While it is entered, a stop signal only sets `signum`; Ctrl-C or SIGTERM twice stops at once.

    The work looks at `signum` where stopping is safe. Schedulers send one signal after another, and
    a closed terminal sends SIGHUP twice: that is no haste. Under torchrun a repeated signal is
    ignored: Ctrl-C reaches a worker twice there, once from the terminal and once from torchrun,
    and torchrun itself kills workers that take longer than its grace period.
    """

    def __init__(self):
        self.signum = 0

    def _handle(self, signum, frame):
        repeated = self.signum == signum and signum in (signal.SIGINT, signal.SIGTERM)
        self.signum = signum
        if repeated and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise Stopped(signum, at_once=True)

    def __enter__(self) -> "StopRequest":
        self._previous = handle_stop_signals(self._handle)
        return self

    def __exit__(self, *exc_info) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------- the end


def run_script(main: Callable[[], None], out_of_memory: str = "ask for less at a time") -> None:
    """Run `main`, report what went wrong in one line, and exit.

    out_of_memory: what helps where memory runs out; a script names its flags here.
    """

    def stop(signum, frame):
        raise Stopped(signum)

    handle_stop_signals(stop)
    _open_output()
    code, at_once = 0, False
    try:
        main()
        _leave_ranks()
    except (Exception, KeyboardInterrupt, Stopped, SystemExit) as error:
        handle_stop_signals(lambda signum, frame: None)  # it ends already
        code, message = exit_code_and_message(error, out_of_memory)
        message = message.replace("\n", "\\n")  # the name of a file may have more lines
        if code == 1:
            message = traceback.format_exc().rstrip()
        told_torchrun = _tell_torchrun(error.message if isinstance(error, Stopped) else message)
        if message and not (told_torchrun and _first_rank_says_it(error)):
            _write_message(with_rank(message) if code == 2 else message)
        # While a rank ends in good order gloo's threads, whose peers have gone, may abort it.
        at_once = _has_met_ranks() or (isinstance(error, Stopped) and error.at_once)
    handle_stop_signals(lambda signum, frame: None)  # its code is settled
    _close_output()
    if at_once:
        os._exit(code)
    sys.exit(code)


def _has_met_ranks() -> bool:
    """Whether this process is in a process group."""
    if "RANK" not in os.environ:
        return False
    from torch import distributed  # heavy, and then long since imported

    return distributed.is_initialized()


def _leave_ranks() -> None:
    """End the process group in good order, which is to wait for the other ranks."""
    if _has_met_ranks():
        from torch import distributed

        distributed.destroy_process_group()


def _tell_torchrun(message: str) -> bool:
    """Leave the message for the report with which torchrun ends; returns whether there is one.

    The file and its form are those of torch.distributed.elastic.multiprocessing.errors.record,
    which would write the traceback of an error in place of the line that is for the user.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull)
    if file == os.devnull:
        return False
    text = shown(message, lines=True) or "see above"
    report = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": int(time.time())}}
    try:
        Path(file).write_text(json.dumps({"message": report}))
    except OSError:
        return False
    return True


def _first_rank_says_it(error: BaseException) -> bool:
    """Whether this machine's first rank ends with the same error as this rank."""
    is_shared = isinstance(error, (UserError, Stopped)) or has_lost_contact(error)
    return is_shared and os.environ.get("LOCAL_RANK", "0") != "0"


def with_rank(message: str) -> str:
    """The message of an error, with the rank and the machine that it is of, where that is not 0."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or f"rank {rank} " in message:
        return message
    return f"error: rank {rank} on {socket.gethostname()}: {message.removeprefix('error: ')}"


def exit_code_and_message(error: BaseException, out_of_memory: str) -> tuple[int, str]:
    """The exit code that an error becomes, and the line that explains it."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, Stopped):
        return 128 + error.signum, "interrupted" if error.signum == signal.SIGINT else ""
    if isinstance(error, SystemExit):  # of the command line's reader, which has said why
        return error.code or 0, ""
    if has_lost_contact(error):
        # gloo begins with a place in its source, and ends with advice.
        reason = re.sub(r"^\[\S+\] |\. This is .*", "", str(error).partition("\n")[0])
        rank = os.environ.get("RANK", "0")
        found = f"error: rank {rank} has lost {who_is_lost()} ({reason})"
        return 2, f"{found}; expected all to stay; look for what the others said before they ended"
    # The reader has gone, as in `python sample.py | head`. Of a file it is Lustre's ESHUTDOWN.
    if isinstance(error, BrokenPipeError) and not error.filename:
        return 0, ""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        if isinstance(error, FileNotFoundError) and not place:  # os.getcwd names nothing
            place = "the working directory: "
        reason = error.strerror or str(error)
        remedy = "check the path, its permissions and the free space"
        return 2, f"error: {place}{reason}; expected to read or write it; {remedy}"
    message = what_the_machine_lacks(error, out_of_memory)
    return (2, message) if message else (1, "")


def describe(error: BaseException) -> str:
    """What an error says, in one line."""
    _, message = exit_code_and_message(error, "ask for less at a time")
    text = message.removeprefix("error: ") or f"{type(error).__name__}: {error}"
    return text.replace("\n", "\\n")


def what_the_machine_lacks(error: BaseException, out_of_memory: str) -> str:
    """The line for an error that says that memory or a compiler is missing; else empty."""
    reason = str(error).partition("\n")[0]
    if is_out_of_memory(error):
        reason = reason or "out of memory"
        return f"error: {reason}; expected the work to fit in memory; {out_of_memory}"
    if isinstance(error, RuntimeError) and "can't start new thread" in reason:
        remedy = "raise the limit (ulimit -u, or the container's), or end other processes"
        return f"error: {reason}; expected to be allowed more threads; {remedy}"
    if type(error).__name__ == "InductorError" and "ompiler" in str(error):  # torch.compile's
        remedy = "install one (on Debian with apt install g++), or use --no-compile"
        return f"error: torch.compile: {reason}; expected a working C++ compiler; {remedy}"
    return ""


def who_is_lost() -> str:
    """Whom this rank has lost. support/ranks.py puts a function here that asks the others."""
    return "another rank"


def has_lost_contact(error: BaseException) -> bool:
    """Whether another process of the run has ended, or was cut off, while this one waited for it.

    NCCL's and the store's errors have classes; gloo raises a RuntimeError that says it in words.
    """
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return type(error) is RuntimeError and any(phrase in str(error) for phrase in words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out: Python's, or that of a device.

    torch has a class for its allocator on a GPU. CUDA itself and its libraries, Apple's MPS and the
    allocator on a CPU raise a RuntimeError that says it in words. torch is not imported here.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words)
