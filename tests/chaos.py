"""Disturb training runs at random moments, resume them, and compare them with undisturbed ones.

    python tests/chaos.py --kills 25             SIGKILL to a rank, then to all of them
    python tests/chaos.py --schedules 20         the same with --deterministic, and after each kill
                                                 another number of ranks
    python tests/chaos.py --signals 20           SIGTERM, SIGINT, SIGHUP, …
    python tests/chaos.py --power-failures 20    only what was flushed is still on the disk
    python tests/chaos.py --full-disks 20        disks that are full at some moment (needs unshare)
    python tests/chaos.py --damages 20           one file of the newest checkpoint is damaged
    python tests/chaos.py --forks 10             SIGKILL in the first save of a fork
    python tests/chaos.py --torchrun 10          SIGKILL to torchrun, to a worker, or to all

Runs of a tiny model with one, two, three and four ranks. Half of them have Muon and a mixture of
two corpora. In the end all files of all checkpoints, the log without its timing, and the list of
what is in the directory must be those of a run that nobody disturbed, byte for byte. Every second
of the kills is aimed at a save, and fewer than 30% of kills inside saves count as a failure too.

The ranks are forked from a process that has imported everything, so that a start takes a tenth of
a second. They meet as the workers of torchrun do. Only full disks and torchrun start real commands.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # several ranks share the cores
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of semaphores that killed processes leave
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools import read_log, write_bytes_data, write_counting_data  # noqa: E402

OPTIMIZERS = ("adamw", "muon")
STEPS = 9
FLAGS = f"""
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 384 --micro-batch 1
    --max-steps {STEPS} --warmup-steps 2 --eval-every 3 --eval-tokens 1000 --sample-every 0
    --save-every 2 --keep 2 --keep-best --dropout 0.1 --dtype float32 --device cpu --no-compile
"""
LEAST_SHARE_IN_SAVES = 0.3
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

fork_server = multiprocessing.get_context("forkserver")
# torch imports the last one when the first optimizer is made, which takes a second.
PRELOAD = ["train_gpt2", "tyro", "matplotlib.pyplot", "torch.distributed", "torch._dynamo"]


# ------------------------------------------------------------------------------- several ranks


def be_rank(
    environment: dict, args: list[str], output: str, prepare: Callable[[], None] | None
) -> None:
    """What a process of `start_ranks` does: it is train_gpt2.py under torchrun."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    import train_gpt2
    from support.script import run_script

    torch.set_num_threads(1)
    sys.argv = ["train_gpt2.py", *args]
    if prepare:
        prepare()
    run_script(train_gpt2.main, out_of_memory="lower --micro-batch")


@dataclass
class Ranks:
    """The processes of a run, and the files that their output goes to."""

    processes: list
    outputs: list[Path]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc_info) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all of them; returns when they are gone."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 120) -> list[int]:
        """Their exit codes, once all have ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def output(self, rank: int = 0) -> str:
        return self.outputs[rank].read_text()


def start_ranks(
    world_size: int,
    args: list,
    scratch: Path,
    args_of_rank: dict[int, list] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Ranks:
    """Start train_gpt2.py with these arguments as that many ranks of one run.

    args_of_rank: further arguments of single ranks. scratch: a folder for their output. prepare:
    called in each process before it begins, to bring a fault in.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch.mkdir(parents=True, exist_ok=True)
    ranks = Ranks([], [])
    for rank in range(world_size):
        environment = {}
        if world_size > 1:
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        output = scratch / f"output_{rank}.txt"
        output.write_text("")
        arguments = [str(arg) for arg in [*args, *(args_of_rank or {}).get(rank, [])]]
        fork_server.set_forkserver_preload(PRELOAD)  # another test may have set others
        process = fork_server.Process(
            target=be_rank, args=(environment, arguments, str(output), prepare), daemon=True
        )
        process.start()
        ranks.processes.append(process)
        ranks.outputs.append(output)
    return ranks


def run_ranks(world_size: int, args: list, scratch: Path, timeout: float = 120, **start) -> Ranks:
    """Such a run to its end; it must succeed. `start` goes to start_ranks."""
    ranks = start_ranks(world_size, args, scratch, **start)
    codes = ranks.wait(timeout)
    if any(codes):
        ranks.kill()
        raise AssertionError(f"exit codes {codes}: {ranks.output()}")
    return ranks


# ------------------------------------------------------------------------------------ comparing


def final_state(run: Path) -> dict:
    """All of a finished run that must not depend on what happened to it on its way."""
    state = {"log": read_log(run), "time in the log rises": time_rises(run), "directory": []}
    for path in sorted(run.iterdir()):
        # The log of a start that had saved nothing yet is kept under such a name.
        if path.name != "log-old.jsonl":  # the log of a start that had saved nothing yet
            state["directory"].append(path.name)
    for file in sorted([*run.glob("step_*/*"), *run.glob("best.json")]):
        # A manifest only says again what the other files hold, and a model card has the run's name.
        if file.name not in ("manifest.json", "README.md"):
            state[str(file.relative_to(run))] = file.read_bytes()
        if file.name == "state.json":
            state[str(file.relative_to(run))] = without_time(json.loads(file.read_text()))
    return state


def without_time(state: dict) -> dict:
    """A state.json without what differs between equal runs; train.json has the date in it."""
    return {key: state[key] for key in state if key not in ("elapsed", "train_json")}


def without_saves(state: dict) -> dict:
    """A final state without the lines of saves in its log."""
    return state | {"log": [entry for entry in state["log"] if entry["event"] != "save"]}


def time_rises(run: Path) -> bool:
    """Whether the seconds of training in the log never go back."""
    lines = (run / "log.jsonl").read_text().splitlines()
    seconds = [entry["elapsed"] for entry in map(json.loads, lines) if "elapsed" in entry]
    return seconds == sorted(seconds)


def differences(expected: dict, found: dict) -> list[str]:
    """What the two states do not have in common."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


# -------------------------------------------------------------------------------------- killing


@dataclass
class Score:
    """What a campaign has done so far."""

    kills: int = 0  # or other disturbances
    in_saves: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        in_saves = f", {self.in_saves} of them inside saves," if self.in_saves else ""
        return f"{self.kills} times{in_saves} in {self.runs} runs; {len(self.faults)} differ"


def mark_saves(scratch: Path) -> None:
    """In a rank: have a file in `scratch` from the begin of each save to its end."""
    from support import run_directory

    real = run_directory.commit_checkpoint

    def commit(run, *files):
        state = files[-1]
        mark = scratch / f"step_{state['step']:06d}"
        mark.touch()
        real(run, *files)
        mark.unlink()

    run_directory.commit_checkpoint = commit


def hold_up_the_commit(seconds: float) -> None:
    """In a rank: have the save of step 4 take so much longer, when all its files are written."""
    from support import checkpoint

    real = checkpoint.write_checkpoint_files

    def write_slowly(folder, *args):
        real(folder, *args)
        if "step_000004" in folder.name:
            time.sleep(seconds)

    checkpoint.write_checkpoint_files = write_slowly


def is_in_save(run: Path, scratch: Path) -> bool:
    """Whether a save has begun, and its checkpoint does not have its name yet."""
    return any(not (run / mark.name).exists() for mark in scratch.glob("step_*"))


def wait_for_save(ranks: Ranks, run: Path, scratch: Path, generator: random.Random) -> None:
    """Return at a random moment of a save, with rank 0 halted in it; or at the end of the run."""
    pid = ranks.processes[0].pid
    with contextlib.suppress(ProcessLookupError):
        while ranks.running():
            if is_in_save(run, scratch):
                time.sleep(generator.uniform(0, 0.03))
                os.kill(pid, signal.SIGSTOP)
                if is_in_save(run, scratch):
                    return
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.0005)


def wait_at_random(
    ranks: Ranks, run: Path, seconds: float, generator: random.Random, aims: bool
) -> None:
    """Return at a random moment of the run, whose start and steps take so many seconds in all.

    aims: to wait for a save after that, for which some steps must be left.
    """
    steps = [int(folder.name.removeprefix("step_")) for folder in run.glob("step_*")]
    left = 1 - max(steps, default=0) / STEPS
    deadline = time.monotonic() + generator.uniform(0, seconds * left * (0.4 if aims else 0.9))
    while ranks.running() and time.monotonic() < deadline:
        time.sleep(0.002)


def kill_one_then_all(ranks: Ranks, generator: random.Random) -> None:
    """A rank dies; a moment later the launcher ends the others."""
    generator.choice(ranks.processes).kill()
    time.sleep(generator.uniform(0, 0.02))
    ranks.kill()


def disturbed_run(
    world_sizes: list[int],
    args: list,
    run: Path,
    kills: int,
    seconds: float,
    generator: random.Random,
    score: Score,
) -> None:
    """A run that is killed up to `kills` times and resumed each time, to its end.

    Each start has a number of ranks from `world_sizes`, drawn at random. seconds: what an
    undisturbed run takes.
    """
    scratch = run.with_name(f"{run.name}-output")
    score.runs += 1
    args = [*args, "--out", run, "--resume"]
    for _ in range(kills):
        for mark in scratch.glob("step_*"):
            mark.unlink()
        world_size = generator.choice(world_sizes)
        prepare = functools.partial(mark_saves, scratch)
        ranks = start_ranks(world_size, args, scratch, prepare=prepare)
        aims = score.kills % 2 == 1
        wait_at_random(ranks, run, seconds, generator, aims)
        if aims:
            wait_for_save(ranks, run, scratch, generator)
        codes = [process.exitcode for process in ranks.processes]
        if any(codes):
            ranks.kill()
            score.faults.append(f"{run.name}: exit codes {codes}: {ranks.output()[-500:]}")
            return
        if not ranks.running():
            return
        kill_one_then_all(ranks, generator)
        score.kills += 1
        score.in_saves += is_in_save(run, scratch)
    run_ranks(generator.choice(world_sizes), args, scratch)


def calm_run(world_size: int, args: list, run: Path) -> tuple[dict, float]:
    """The final state of an undisturbed run, and how many seconds it has taken."""
    fork_server.set_forkserver_preload(PRELOAD)
    warm_up = fork_server.Process(target=os.getpid)  # which waits for what is imported before
    warm_up.start()
    warm_up.join()
    began = time.monotonic()
    run_ranks(world_size, [*args, "--out", run], run.with_name(f"{run.name}-output"))
    return final_state(run), time.monotonic() - began


def data_of_optimizers(folder: Path) -> dict[str, list]:
    """The values of --data: Muon trains on a mixture."""
    text = write_bytes_data(folder / "text")
    numbers = write_counting_data(
        folder / "numbers", ((1_000, "val"), (5_000, "train")), modulus=256
    )
    return {"adamw": [text], "muon": [f"{text}=0.7", f"{numbers}=0.3"]}


def campaign(
    kills: int, cases: list[tuple[int, str]], folder: Path, seed: int, flags: list[str]
) -> Score:
    """Spread `kills` over the cases, and compare every run with an undisturbed one.

    A case is a number of ranks and an optimizer. Its undisturbed run is `calm-<ranks>-<optimizer>`.
    """
    generator = random.Random(seed)
    score = Score()
    data = data_of_optimizers(folder)
    for number, (world_size, optimizer) in enumerate(cases):
        args = ["--data", *data[optimizer], *flags, "--optimizer", optimizer]
        expected, seconds = calm_run(world_size, args, folder / f"calm-{world_size}-{optimizer}")
        quota = kills * (number + 1) // len(cases)
        while score.kills < quota and not score.faults:
            run = folder / f"{optimizer}-on-{world_size}-run-{score.runs}"
            at_most = min(8, quota - score.kills)
            disturbed_run([world_size], args, run, at_most, seconds, generator, score)
            compare(expected, run, score)
    return score


def compare(expected: dict, run: Path, score: Score, with_saves: bool = True) -> None:
    """Add to the faults of a score what is not as expected in a finished run.

    with_saves: whether both must have saved at the same steps.
    """
    if score.faults:
        return
    found = final_state(run)
    if not with_saves:
        expected, found = without_saves(expected), without_saves(found)
    wrong = differences(expected, found)
    if wrong:
        score.faults.append(f"{run.name}: not as in an undisturbed run: {', '.join(wrong)}")


def schedules(count: int, folder: Path, seed: int, flags: list[str]) -> Score:
    """Deterministic runs, each killed four times, that go on with 1, 2 or 4 ranks every time."""
    generator = random.Random(seed)
    score = Score()
    data = data_of_optimizers(folder)
    # Sixteen sequences a step: a power of two of micro-batches on each of the ranks.
    flags = [*flags, "--total-batch-tokens", 512, "--micro-batch", 2, "--deterministic"]
    calm = {}
    for number in range(count):
        optimizer = OPTIMIZERS[number % 2]
        dropout = 0.1 * (number // 2 % 2)
        args = ["--data", *data[optimizer], *flags, "--optimizer", optimizer, "--dropout", dropout]
        name = f"{optimizer}-dropout-{dropout}"
        if name not in calm:
            calm[name] = calm_run(1, args, folder / f"calm-{name}")
        expected, seconds = calm[name]
        run = folder / f"schedule-{number}-{name}"
        disturbed_run([1, 2, 4], args, run, 4, seconds, generator, score)
        compare(expected, run, score)
        if score.faults:
            break
    return score


# ----------------------------------------------------------------------- other disturbances
#
# Each of these takes a run to its end, disturbed in its own way, and counts that in the score.
# `calm` is the undisturbed run that it will be compared with, and `seconds` what that has taken.


@dataclass
class Case:
    """A run that is to be disturbed."""

    world_size: int
    args: list
    run: Path
    calm: Path
    seconds: float
    generator: random.Random
    score: Score

    @property
    def scratch(self) -> Path:
        return self.run.with_name(f"{self.run.name}-output")

    @property
    def args_to_resume(self) -> list:
        return [*self.args, "--out", self.run, "--resume"]

    def start(self, **how) -> Ranks:
        return start_ranks(self.world_size, self.args_to_resume, self.scratch, **how)

    def finish(self) -> None:
        run_ranks(self.world_size, self.args_to_resume, self.scratch)

    def wait(self, ranks: Ranks) -> None:
        wait_at_random(ranks, self.run, self.seconds, self.generator, aims=False)

    def fault(self, text: str) -> None:
        self.score.faults.append(f"{self.run.name}: {text}")


SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def signalled(case: Case) -> None:
    """A signal to one rank stops all of them, and once they train they save first."""
    ranks = case.start()
    # Ranks that have not met yet wait five minutes for one that is gone; torchrun would end them.
    while ranks.running() and not (case.run / "train.json").exists():
        time.sleep(0.01)
    case.wait(ranks)
    number = getattr(signal, case.generator.choice(SIGNALS))
    process = case.generator.choice(ranks.processes)
    with contextlib.suppress(ProcessLookupError):  # the run may have ended
        os.kill(process.pid, number)
    codes = ranks.wait()
    log = case.run / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    # Before the first update and after the last one a signal ends the process that it reaches.
    trains = '"train"' in text and f'"event": "train", "step": {STEPS}' not in text
    if None in codes or (trains and set(codes) not in ({128 + number}, {0})):
        case.fault(f"exit codes {codes} after signal {number}: {ranks.output()[-500:]}")
        return
    case.score.kills += any(codes)
    case.finish()


def keep_what_is_flushed(shadow: Path) -> None:
    """In a rank: keep in `shadow` what a power failure would leave, by number of the inode."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        place = f"/proc/self/fd/{descriptor}"
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            entries = {e.name: [e.inode(), e.is_dir()] for e in os.scandir(os.readlink(place))}
            content = json.dumps(entries).encode()
        else:
            content = Path(place).read_bytes()
        temporary = shadow / f"{os.getpid()}.{status.st_ino}"
        temporary.write_bytes(content)
        temporary.rename(shadow / str(status.st_ino))

    os.fsync = fsync


def without_power(shadow: Path, folder: int, target: Path) -> None:
    """Write what was flushed of a folder, given by its inode; a file that never was is empty."""
    target.mkdir()
    listing = shadow / str(folder)
    entries = json.loads(listing.read_bytes()) if listing.exists() else {}
    for name, (inode, is_folder) in entries.items():
        if is_folder:
            without_power(shadow, inode, target / name)
        else:
            flushed = shadow / str(inode)
            content = flushed.read_bytes() if flushed.exists() else b""
            (target / name).write_bytes(content)


def powerless(case: Case) -> None:
    """All ranks are killed, and what was not flushed is gone."""
    shadow = case.run.with_name(f"{case.run.name}-flushed")
    shadow.mkdir()
    case.run.mkdir()
    ranks = case.start(prepare=functools.partial(keep_what_is_flushed, shadow))
    case.wait(ranks)
    ranks.kill()
    case.score.kills += 1
    before = case.run.rename(case.run.with_name(f"{case.run.name}-before"))
    without_power(shadow, before.stat().st_ino, case.run)
    case.finish()


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "gone": lambda file: file.unlink(),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1])),
}


def damaged(case: Case) -> None:
    """One file of the newest checkpoint of a finished run is damaged."""
    shutil.copytree(case.calm, case.run)
    newest = max(case.run.glob("step_*"))
    files = [file for file in sorted(newest.iterdir()) if file.name != "README.md"]
    file = case.generator.choice(files)
    how = case.generator.choice(list(DAMAGES))
    DAMAGES[how](file)
    case.score.kills += 1
    case.finish()
    aside = case.run / f"damaged_{newest.name}"
    if not aside.is_dir():
        case.fault(f"{file.name} {how}, and not noticed")
        return
    shutil.rmtree(aside)


def forked(case: Case) -> None:
    """A fork of the last checkpoint but one is killed in its first save, and started again."""
    parent = sorted(case.calm.glob("step_*"))[-2]
    args = ["--fork", parent, "--out", case.run, "--resume"]
    prepare = functools.partial(mark_saves, case.scratch)
    ranks = start_ranks(case.world_size, args, case.scratch, prepare=prepare)
    wait_for_save(ranks, case.run, case.scratch, case.generator)
    kill_one_then_all(ranks, case.generator)
    case.score.kills += 1
    case.score.in_saves += is_in_save(case.run, case.scratch)
    run_ranks(case.world_size, args, case.scratch)
    shutil.copytree(parent, case.run / parent.name)  # which the fork has not saved


def on_a_full_disk(case: Case) -> None:
    """A disk of random size that the run may not fit on: one line names the file."""
    largest = sum(file.stat().st_size for file in case.calm.rglob("*"))
    kilobytes = case.generator.randrange(16, largest // 1024)
    disk = case.run.with_name(f"{case.run.name}-disk")
    disk.mkdir()
    command = [sys.executable, ROOT / "train_gpt2.py", *case.args, "--out", disk / "run"]
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk}"
    run = " ".join(map(str, command))
    script = f"{mount} && {run}; code=$?; cp -a {disk}/run {case.run}; exit $code"
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    lines = ended.stderr.splitlines()
    errors = [line for line in lines if line.startswith(("error:", "Traceback"))]
    if ended.returncode not in (0, 2) or len(errors) != (ended.returncode == 2):
        case.fault(f"exit code {ended.returncode} on {kilobytes} kB: {ended.stderr[-500:]}")
    elif errors and f"{disk}/run" not in errors[0]:
        case.fault(f"no file is named on {kilobytes} kB: {errors[0]}")
    case.score.kills += ended.returncode == 2
    case.finish()


def under_torchrun(case: Case) -> None:
    """SIGKILL to torchrun and its workers, to one worker, or to torchrun alone, up to four times.

    Workers whose torchrun has gone end by themselves.
    """
    command = [BIN / "torchrun", "--standalone", f"--nproc-per-node={case.world_size}"]
    command += ["--max-restarts=3", ROOT / "train_gpt2.py", *case.args_to_resume]
    case.scratch.mkdir()
    for number in range(4):
        output = open(case.scratch / f"{number}.txt", "w")  # noqa: SIM115
        agent = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(case.generator.uniform(0, 1.5 * SECONDS_UNDER_TORCHRUN))
        workers = children_of(agent.pid)
        whom = case.generator.choice(["all", "worker", "agent"])
        if agent.poll() is None:
            case.score.kills += 1
            if whom == "worker" and workers:
                os.kill(case.generator.choice(workers), signal.SIGKILL)
                agent.wait(120)
            elif whom == "agent":
                agent.kill()
            else:
                os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
        deadline = time.monotonic() + 20
        while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [worker for worker in workers if is_running(worker)]
        if left:
            case.fault(f"workers {left} have outlived torchrun ({whom} killed)")
            os.killpg(agent.pid, signal.SIGKILL)
            return
        if agent.returncode not in (0, -signal.SIGKILL):
            text = (case.scratch / f"{number}.txt").read_text()
            case.fault(f"exit code {agent.returncode} ({whom} killed): {text[-500:]}")
            return
    case.finish()


SECONDS_UNDER_TORCHRUN = 12  # most of it imports


def children_of(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only waits for its parent to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


KINDS = {
    "signals": signalled,
    "power_failures": powerless,
    "damages": damaged,
    "full_disks": on_a_full_disk,
    "forks": forked,
    "torchrun": under_torchrun,
}


def disturbances(
    kind: str, count: int, cases: list[tuple[int, str]], folder: Path, seed: int, flags: list[str]
) -> Score:
    """So many runs of a kind, each compared with an undisturbed one."""
    generator = random.Random(seed)
    score = Score()
    data = data_of_optimizers(folder)
    calm = {}
    if kind == "full_disks":  # a real command
        cases = [case for case in cases if case[0] == 1]
    for number in range(count):
        world_size, optimizer = cases[number % len(cases)]
        args = ["--data", *data[optimizer], *flags, "--optimizer", optimizer]
        undisturbed = folder / f"calm-{world_size}-{optimizer}"
        if undisturbed not in calm:
            calm[undisturbed] = calm_run(world_size, args, undisturbed)
        expected, seconds = calm[undisturbed]
        run = folder / f"{kind}-{number}-{optimizer}-on-{world_size}"
        score.runs += 1
        KINDS[kind](Case(world_size, args, run, undisturbed, seconds, generator, score))
        # A stop saves at a step where an undisturbed run does not, or before its validation. So do
        # workers whose torchrun has died.
        compare(expected, run, score, with_saves=kind not in ("signals", "torchrun"))
        if score.faults:
            break
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in ("kills", "schedules", *KINDS):
        parser.add_argument(f"--{kind.replace('_', '-')}", type=int, default=0)
    parser.add_argument("--ranks", default="1,2,3,4", help="world sizes, with commas")
    parser.add_argument("--seed", type=int, default=None, help="a random one where it is missing")
    parser.add_argument("--flags", default="", help="further flags of train_gpt2.py")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    flags = [*FLAGS.split(), *options.flags.split()]
    world_sizes = [int(number) for number in options.ranks.split(",")]
    cases = list(itertools.product(world_sizes, OPTIMIZERS))
    failed = False
    for kind in ("kills", "schedules", *KINDS):
        count = getattr(options, kind)
        if not count:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if kind == "kills":
                score = campaign(count, cases, Path(folder), seed, flags)
            elif kind == "schedules":
                score = schedules(count, Path(folder), seed, flags)
            else:
                score = disturbances(kind, count, cases, Path(folder), seed, flags)
        if kind in ("kills", "schedules") and score.in_saves < LEAST_SHARE_IN_SAVES * score.kills:
            score.faults.append("too few kills inside saves")
        print(f"{kind}, seed {seed}: {score}; {time.monotonic() - began:.0f} s", flush=True)
        for fault in score.faults:
            print(fault)
        failed = failed or bool(score.faults)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
