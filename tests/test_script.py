"""support/script.py: what each error and signal becomes, and output that never ends the work."""

import errno
import io
import os
import pty
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from tools import ROOT, run_main, run_python, start_script
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from support import script
from support.script import Range, Stopped, UserError, check_fields, parse_flags

HEADER = "import os, signal, sys, time\nfrom support import script\n"


def exit_code_of(error: BaseException, capsys, **run) -> tuple[int, str]:
    """The exit code and what stands on stderr when a script's main raises this error."""

    def main():
        raise error

    return run_main(main, **run), capsys.readouterr().err


def write_script(folder, body: str):
    """A script whose main is `body`, under run_script."""
    file = folder / "script.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(f"{HEADER}def main():\n{lines}script.run_script(main)\n")
    return file


# --------------------------------------------------------------------------------- exit codes


def test_success_is_0(capsys):
    assert run_main(lambda: None) == 0
    assert capsys.readouterr().err == ""


def test_bad_input_is_2_and_one_line(capsys):
    error = UserError("--top-p 2; expected at most 1; lower it")
    code, err = exit_code_of(error, capsys)
    assert (code, err) == (2, "error: --top-p 2; expected at most 1; lower it\n")


def test_an_os_error_is_2_and_names_the_file(capsys, tmp_path):
    code, err = exit_code_of(FileNotFoundError(errno.ENOENT, "No such file", "a/b.txt"), capsys)
    assert code == 2
    assert err.startswith("error: a/b.txt: No such file; expected ")
    assert err.count("\n") == 1


def test_a_fault_of_ours_is_1_with_its_traceback(capsys):
    code, err = exit_code_of(KeyError("n_layer"), capsys)
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("KeyError: 'n_layer'\n")


def test_a_reader_who_has_gone_is_no_error(capsys):
    assert exit_code_of(BrokenPipeError(), capsys) == (0, "")


def test_a_file_system_that_has_gone_is_an_error(capsys):
    """Lustre says ESHUTDOWN, which is a BrokenPipeError to Python, as is a reader who has gone."""
    error = OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), "run/log.jsonl")
    assert isinstance(error, BrokenPipeError)
    code, err = exit_code_of(error, capsys)
    assert code == 2
    assert "run/log.jsonl: " in err


def test_a_working_directory_that_was_removed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_main(lambda: os.getcwd()) == 2
    assert "error: the working directory: No such file" in capsys.readouterr().err


def test_too_many_threads_are_one_line(capsys):
    code, err = exit_code_of(RuntimeError("can't start new thread"), capsys)
    assert code == 2
    assert "ulimit -u" in err


def test_interrupts_are_130_without_a_traceback(capsys):
    assert exit_code_of(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    assert exit_code_of(Stopped(signal.SIGINT), capsys) == (130, "interrupted\n")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines"),
    torch.AcceleratorError("CUDA error: out of memory\nmore lines"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_2_with_what_the_script_advises(error, capsys):
    code, message = script.exit_code_and_message(error, "lower --micro-batch")
    assert code == 2
    assert message.startswith("error: ")
    assert message.endswith("; lower --micro-batch")
    assert "\n" not in message
    code, err = exit_code_of(error, capsys)
    assert code == 2
    assert "--" not in err  # a script that names no flag has none that helps


def test_what_torch_raises_when_the_cpu_has_no_memory_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert script.is_out_of_memory(raised.value)


def test_another_runtime_error_is_a_fault(capsys):
    assert exit_code_of(RuntimeError("shapes do not match"), capsys)[0] == 1


@pytest.mark.parametrize("kind", ["UserError", "KeyError"])
def test_a_message_is_written_in_one_piece(kind, monkeypatch):
    """Ranks write to the same terminal; in pieces their messages would be mixed."""
    pieces = []
    monkeypatch.setattr(sys.stderr, "write", lambda text: pieces.append(text) or len(text))

    def main():
        if kind == "KeyError":
            raise KeyError("n_layer")
        raise UserError("this; expected that; do it")

    run_main(main)
    assert len(pieces) == 1
    assert kind == "UserError" or "Traceback" in pieces[0]


@pytest.fixture
def report(tmp_path, monkeypatch) -> Path:
    """The file whose message torchrun shows when it gives up."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "1")
    return file


@pytest.mark.parametrize("local_rank, printed", [("0", True), ("1", False)])
@pytest.mark.parametrize(
    "error, message",
    [
        (UserError("this; expected that; do it"), "error: this; expected that; do it"),
        (RuntimeError("Connection closed by peer"), "error: rank 1 has lost another rank"),
    ],
    ids=["bad input", "lost contact"],
)
def test_what_ranks_share_is_said_once_a_machine_and_in_torchruns_report(
    report, monkeypatch, capsys, local_rank, printed, error, message
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    _, err = exit_code_of(error, capsys)
    assert ("that" in err or "rank 1 has lost another rank" in err) == printed
    failure = ProcessFailure(local_rank=1, pid=9, exitcode=2, error_file=str(report))
    assert f": {message}" in str(ChildFailedError("train_gpt2.py", {1: failure}))


def test_torchruns_report_says_how_to_go_on_after_a_stop(report, capsys):
    error = Stopped(signal.SIGUSR1, "stopped; to go on: that command")
    assert exit_code_of(error, capsys) == (128 + signal.SIGUSR1, "")
    failure = ProcessFailure(local_rank=1, pid=9, exitcode=138, error_file=str(report))
    assert ": stopped; to go on: that command" in str(ChildFailedError("x", {1: failure}))


def test_what_one_rank_has_alone_is_said_by_it(report, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    _, err = exit_code_of(OSError(errno.EIO, "Input/output error", "log.jsonl"), capsys)
    assert err.startswith(f"error: rank 1 on {socket.gethostname()}: log.jsonl: Input/output error")
    _, err = exit_code_of(KeyError("n_layer"), capsys)
    assert err.startswith("Traceback")
    assert "KeyError" in report.read_text()


# -------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flags:
    width: int = 3  # of a line, in characters


def test_a_field_is_a_flag_and_its_comment_the_help(capsys):
    assert parse_flags(Flags, Flags(4), "What it does.", []) == Flags(4)
    assert parse_flags(Flags, Flags(4), "What it does.", ["--width", "5"]) == Flags(5)
    with pytest.raises(SystemExit) as stopped:
        parse_flags(Flags, Flags(4), "What it does.", ["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "What it does." in out
    assert "of a line, in characters" in out


SCRIPTS = ["train_gpt2.py", "sample.py", "hellaswag.py", "fineweb.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_no_docstrings(name):
    """`python -OO` leaves none."""
    done = run_python("-OO", ROOT / name, "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("args", [["--height", "3"], ["--width", "wide"], ["--width"]])
def test_a_wrong_flag_is_2_and_named(args, capsys):
    assert run_main(lambda: parse_flags(Flags, Flags(), "What it does."), *args) == 2
    assert args[0] in capsys.readouterr().err


@dataclass(frozen=True)
class Checked:
    micro_batch: Annotated[int, Range(1)] = 4
    top_p: Annotated[float | None, Range(0, 1, above=True)] = None
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    dtype: Literal["auto", "float32"] = "auto"
    limit: Annotated[int, Range(most=5)] | None = None

    def __post_init__(self):
        check_fields(self)


def test_all_fields_that_are_out_of_range_are_named_at_once():
    assert Checked(1, 1.0, 0.0, "float32", 5)
    with pytest.raises(UserError) as caught:
        Checked(0, 0.0, 1.0, "a\nb", 6)
    assert str(caught.value).split("; ") == [
        "--micro-batch 0: expected at least 1",
        "--top-p 0.0: expected more than 0 and at most 1",
        "--dropout 1.0: expected at least 0 and less than 1",
        "--dtype a\\nb: expected auto or float32",
        "--limit 6: expected at most 5",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True])
def test_what_is_no_number_of_the_range_is_refused(value):
    with pytest.raises(UserError, match=f"--dropout {value}: "):
        Checked(dropout=value)


def test_a_range_leaves_the_flag_as_it_is(capsys):
    flags = ["--micro-batch", "2", "--top-p", "0.5", "--limit", "3"]
    assert parse_flags(Checked, Checked(), "What it does.", flags) == Checked(2, 0.5, limit=3)
    with pytest.raises(SystemExit):
        parse_flags(Checked, Checked(), "What it does.", ["--help"])
    assert "Range" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------ signals


def start_and_wait(script) -> subprocess.Popen:
    """The script, started, once it has printed `ready`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start_script(script, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


STOPS = [getattr(signal, name) for name in script.STOP_SIGNALS]


@pytest.mark.parametrize("signum", STOPS, ids=lambda signum: signum.name)
def test_a_stop_signal_ends_a_script_with_its_code(tmp_path, signum):
    script = write_script(tmp_path, "print('ready', flush=True)\ntime.sleep(60)")
    process = start_and_wait(script)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert "Traceback" not in err


@pytest.mark.parametrize("signum", STOPS, ids=lambda signum: signum.name)
def test_a_stop_request_lets_the_work_end_where_it_is_safe(tmp_path, signum):
    body = """
with script.StopRequest() as stop:
    print('ready', flush=True)
    while not stop.signum:
        time.sleep(0.01)
    print('saved', flush=True)
raise script.Stopped(stop.signum)"""
    process = start_and_wait(write_script(tmp_path, body))
    process.send_signal(signum)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + signum, "saved\n")


SAVES_SLOWLY = """
with script.StopRequest() as stop:
    print('ready', flush=True)
    while not stop.signum:
        time.sleep(0.01)
    print('saving', flush=True)
    time.sleep(float(sys.argv[1]))
    print('saved', flush=True)
raise script.Stopped(stop.signum)"""


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    script = write_script(tmp_path, SAVES_SLOWLY)
    process = start_script(script, 60, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_under_torchrun_a_repeated_signal_does_not_cut_the_saving_short(tmp_path):
    script = write_script(tmp_path, SAVES_SLOWLY)
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    process = start_script(script, 0.5, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "saved\n")


def test_nohup_is_respected(tmp_path):
    script = write_script(tmp_path, "print('ready', flush=True)\ntime.sleep(0.5)\nprint('done')")
    ignoring = 'trap \'\' HUP; exec "$0" "$@"'
    command = ["sh", "-c", ignoring, sys.executable, script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "done\n")


def test_a_library_that_catches_every_exception_does_not_lose_a_stop(tmp_path):
    body = """
try:
    print('ready', flush=True)
    time.sleep(60)
except Exception:
    pass"""
    process = start_and_wait(write_script(tmp_path, body))
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda signum: signum.name)
def test_a_signal_while_torch_is_imported_gives_no_traceback(tmp_path, signum):
    script = tmp_path / "script.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    from support import script\n\n"
        "    script.begin()\n"
        "print('ready', flush=True)\n"
        "import torch\n"
        "script.run_script(lambda: None)\n"
    )
    process = start_and_wait(script)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signum, "")


def test_importing_script_leaves_the_signals_alone():
    done = run_python(
        "-c",
        "import signal; before = signal.getsignal(2), signal.getsignal(15);"
        "from support import script;"
        "assert before == (signal.getsignal(2), signal.getsignal(15))",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the signal")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_ends_with_torchrun(tmp_path, when):
    """Also where torchrun has ended before the worker could ask to be told."""
    script = tmp_path / "script.py"
    script.write_text(
        f"{HEADER}"
        "if sys.argv[1] == 'before': sys.stdin.readline()\n"
        "script.begin()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    # A launcher that starts the worker, and is killed.
    launcher = '"$0" "$1" "$2" <&3 & echo started; wait'
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    process = subprocess.Popen(
        ["sh", "-c", f"exec 3<&0; {launcher}", sys.executable, script, when],
        stdin=reader,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "started\n"
    if when == "after":
        assert process.stdout.readline().strip().isdigit()
    process.kill()
    process.wait()
    os.write(writer, b"go\n")
    assert process.stdout.read() == ""  # at the end of which no worker holds it open
    os.close(reader)
    os.close(writer)
    process.stdout.close()


# ------------------------------------------------------------------------------------- output


def test_a_name_from_a_file_is_shown_in_one_line_that_a_terminal_does_not_obey():
    assert script.shown("a\x1b[2J\u202eb\nc\t\ud800é") == "a\\x1b[2J\\u202eb\\nc\\t\\ud800é"
    assert script.shown("x" * 1000) == "x" * 200 + "…"
    assert script.shown("a\n\tb" * 100 + "\x1b", lines=True) == "a\n\tb" * 100 + "\\x1b"


WRITES = """
import warnings
from support.progress import Progress
with Progress("step", 300) as progress:
    for i in range(300):
        script.say(f"line {i} " + "x" * 100)
        warnings.warn(f"warning {i}", stacklevel=1)
        progress.update(i)
open(sys.argv[1], "w").write("done")"""


def finishes(script, tmp_path, shell_redirection: str) -> int:
    """Whether the work is done and the exit code is 0, with stdout and stderr redirected so."""
    done = tmp_path / "done.txt"
    command = f'exec "$0" "$@" {shell_redirection}'
    buffered = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        ["sh", "-c", command, sys.executable, script, done], env=buffered, timeout=60
    )
    return done.read_text() == "done" and result.returncode == 0


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
BROKEN = [
    pytest.param(">/dev/full", marks=needs_full),
    pytest.param("2>/dev/full", marks=needs_full),
    pytest.param(">/dev/full 2>&1", marks=needs_full),
    ">&-",
    "2>&-",
    ">&- 2>&-",
]


@pytest.mark.parametrize("redirection", BROKEN)
def test_a_full_or_closed_output_does_not_end_the_work(tmp_path, redirection):
    assert finishes(write_script(tmp_path, WRITES), tmp_path, redirection)


@needs_full
def test_an_error_that_cannot_be_written_keeps_its_exit_code(tmp_path):
    script = write_script(tmp_path, "raise script.UserError('this; expected that; do it')")
    with open("/dev/full", "w") as full:
        assert start_script(script, stderr=full).wait(timeout=60) == 2


def test_a_reader_of_both_outputs_who_has_gone_does_not_end_the_work(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = tmp_path / "done.txt"
    script = write_script(tmp_path, WRITES)
    with start_script(script, done, stdout=writer, stderr=writer) as process:
        os.close(writer)
        assert process.wait(timeout=60) == 0
    assert done.read_text() == "done"


def test_a_terminal_that_is_gone_does_not_end_the_work(tmp_path):
    """Writing to it fails with EIO. It is not the controlling one, so no SIGHUP comes."""
    terminal, side_of_process = pty.openpty()
    done = tmp_path / "done.txt"
    script = write_script(tmp_path, "sys.stdin.readline()\n" + WRITES)
    with start_script(
        script, done, stdin=subprocess.PIPE, stdout=side_of_process, stderr=side_of_process
    ) as process:
        os.close(side_of_process)
        os.close(terminal)
        process.communicate(b"go\n", timeout=60)
    assert done.read_text() == "done"
    assert process.returncode == 0


def test_a_locale_without_a_character_does_not_end_the_work(tmp_path):
    body = "script.say('\\u2192 caf\\u00e9')\nprint('\\u2192')"
    script = write_script(tmp_path, body)
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\\u2192 caf\xe9\n\\u2192\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def reconfigure(self, errors):
        """It shows every character."""


def test_a_message_cannot_move_the_cursor_of_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def main():
        raise UserError("file [2Jx; expected a name; rename it")

    assert run_main(main) == 2
    assert terminal.getvalue() == "error: file \\x1b[2Jx; expected a name; rename it\n"
