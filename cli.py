"""How every script begins and ends: flags, messages, signals, and errors as exit codes.

A script ends with `run_script(main)`. Bad input raises `UserError` where it is seen, and `run_script`
is the one place that turns an error or a signal into an exit code:

    0     the work is done
    1     a fault of this program: its traceback is what a report needs
    2     bad input, or a file that cannot be read or written; the last line of stderr names the remedy
    128+n stopped by signal n, after saving (129 SIGHUP, 130 SIGINT, 138 SIGUSR1, 143 SIGTERM)
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

Config = TypeVar("Config")


class UserError(Exception):
    """Something that the user can mend.

    found: what is wrong, with the file or the flag it is in. expected: what should be there.
    remedy: what to do about it.
    """

    def __init__(self, found: str, *, expected: str, remedy: str):
        super().__init__(f"{found}; expected {expected}; {remedy}")


class Stopped(Exception):
    """A signal has ended the work."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


# ---------------------------------------------------------------------------------------- flags


def parse_flags(
    config_class: type[Config],
    default: Config,
    description: str,
    args: list[str] | None = None,
) -> Config:
    """The command line as an instance of a dataclass: a flag for each field, its comment as help.

    Flags override the values of `default`. An unknown or malformed flag exits with code 2.
    """
    import tyro  # slow to import, and a notebook does without

    return tyro.cli(config_class, default=default, description=description, args=args)


# ---------------------------------------------------------------------------------------- output


def say(*lines: str) -> None:
    """Print lines above any progress bar. A reader who has gone away does not end the work."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):
        tqdm.write("\n".join(lines))
        sys.stdout.flush()


def _write_message(message: str) -> None:
    """One write for the whole message: under torchrun other ranks write to the same terminal."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------- signals

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is entered, the first stop signal only sets `signum`; the second one stops at once.

    The work looks at `signum` where stopping is safe. Under torchrun a repeated signal is ignored:
    Ctrl-C reaches a worker twice there, once from the terminal and once from torchrun, and
    torchrun itself kills workers that take longer than its grace period.
    """

    def __init__(self):
        self.signum = 0

    def _handle(self, signum, frame):
        repeated = self.signum != 0
        self.signum = signum
        if repeated and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise Stopped(signum)

    def __enter__(self) -> "StopRequest":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------- the end


def run_script(main: Callable[[], None]) -> None:
    """Run `main`, report what went wrong in one line, and exit."""

    def stop(signum, frame):
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
        code, message = 0, ""
    except Exception as error:
        code, message = exit_code_and_message(error)
        if code == 1:
            traceback.print_exc()
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    # After a failure the process group is left to die with the process: to destroy it in good
    # order would be to wait for the other ranks.
    distributed = sys.modules.get("torch.distributed")
    if code == 0 and distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    if message:
        _write_message(message)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _point_stdout_nowhere()  # or the interpreter would complain once more when it exits
    sys.exit(code)


def exit_code_and_message(error: Exception) -> tuple[int, str]:
    """The exit code that an error becomes, and the line that explains it."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, Stopped):
        return 128 + error.signum, ""
    if isinstance(error, BrokenPipeError):  # the reader has gone, as in `python sample.py | head`
        return 0, ""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        remedy = "check the path, its permissions and the free space"
        return 2, f"error: {place}{reason}; expected to read or write it; {remedy}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's class; torch is not imported here
        reason = str(error).splitlines()[0]
        return 2, f"error: {reason}; expected the work to fit in memory; make it smaller"
    return 1, ""


def _point_stdout_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
