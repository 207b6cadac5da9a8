"""Kill training runs at random moments, resume them, and compare them with undisturbed ones.

    python tests/chaos.py --kills 25

Runs of a tiny model with one, two, three and four ranks are killed with SIGKILL, a rank at a time,
and resumed, until the wanted number of kills is reached. Half of the kills are aimed at a save:
they wait until its temporary directory appears. In the end the weights, the optimizer's state, the
log without its timing, and the list of checkpoints must be those of a run that nobody disturbed,
byte for byte.

The ranks are forked from a process that has imported everything, so that a start takes a fraction
of a second. They meet as the workers of torchrun do.
"""

import argparse
import multiprocessing
import os
import random
import signal
import socket
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

from tools import read_log, write_bytes_data  # noqa: E402

WORLD_SIZES = (1, 2, 3, 4)
FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 768 --micro-batch 2
    --max-steps 12 --warmup-steps 2 --eval-every 3 --eval-tokens 1000 --sample-every 0
    --save-every 2 --keep 2 --keep-best --dropout 0.1 --dtype float32 --device cpu --no-compile
"""

fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["train_gpt2", "tyro", "matplotlib.pyplot", "torch.distributed"])


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
    from cli import run_script

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
    steps = sorted(path.name for path in run.glob("step_*"))
    last = run / steps[-1]
    return {
        "checkpoints": steps,
        "weights": (last / "model.safetensors").read_bytes(),
        "moments": (last / "optimizer.safetensors").read_bytes(),
        "best": (run / "best.json").read_bytes() if (run / "best.json").exists() else b"",
        "log": read_log(run),
    }


def differences(expected: dict, found: dict) -> list[str]:
    return [name for name in expected if expected[name] != found[name]]


# -------------------------------------------------------------------------------------- killing


@dataclass
class Score:
    """What a campaign has done so far."""

    kills: int = 0
    in_saves: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def save_in_progress(run: Path) -> bool:
    return any(run.glob(".step_*.tmp"))


def wait_for_moment(ranks: Ranks, run: Path, seconds: float, generator: random.Random) -> None:
    """Return at a random moment of the run: half of the time in the midst of a save."""
    if generator.random() < 0.5:
        time.sleep(generator.uniform(0, seconds / 2))
        while ranks.running() and not save_in_progress(run):
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.004))
        return
    deadline = time.monotonic() + generator.uniform(0, seconds)
    while ranks.running() and time.monotonic() < deadline:
        time.sleep(0.005)


def kill_one_then_all(ranks: Ranks, generator: random.Random) -> None:
    """A rank dies; a moment later the launcher ends the others."""
    os.kill(generator.choice(ranks.processes).pid, signal.SIGKILL)
    time.sleep(generator.uniform(0, 0.02))
    ranks.kill()


def disturbed_run(
    world_size: int,
    args: list,
    run: Path,
    kills: int,
    seconds: float,
    generator: random.Random,
    score: Score,
) -> None:
    """A run that is killed up to `kills` times and resumed each time, to its end."""
    scratch = run.with_name(f"{run.name}-output")
    score.runs += 1
    while kills:
        ranks = start_ranks(world_size, [*args, "--out", run, "--resume"], scratch)
        wait_for_moment(ranks, run, seconds, generator)
        if not ranks.running():
            codes = ranks.wait()
            if any(codes):
                score.faults.append(f"{run.name}: exit codes {codes}: {ranks.output()[-500:]}")
            return
        in_save = save_in_progress(run)
        kill_one_then_all(ranks, generator)
        score.kills += 1
        score.in_saves += in_save
        kills -= 1
    run_ranks(world_size, [*args, "--out", run, "--resume"], scratch)


def campaign(
    kills: int, world_sizes: list[int], folder: Path, seed: int, flags: list[str]
) -> Score:
    """Spread `kills` over the world sizes, and compare every run with an undisturbed one."""
    generator = random.Random(seed)
    score = Score()
    args = ["--data", write_bytes_data(folder / "data"), *flags]
    for number, world_size in enumerate(world_sizes):
        calm = folder / f"calm-{world_size}"
        began = time.monotonic()
        run_ranks(world_size, [*args, "--out", calm], folder / "calm-output")
        seconds = time.monotonic() - began
        expected = final_state(calm)
        quota = kills * (number + 1) // len(world_sizes)
        while score.kills < quota and not score.faults:
            run = folder / f"ranks-{world_size}-run-{score.runs}"
            at_most = min(8, quota - score.kills)
            disturbed_run(world_size, args, run, at_most, seconds, generator, score)
            wrong = differences(expected, final_state(run))
            if wrong:
                score.faults.append(f"{run}: {', '.join(wrong)} differ from {calm}")
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--ranks", default="1,2,3,4", help="world sizes, with commas")
    parser.add_argument("--seed", type=int, default=None, help="a random one where it is missing")
    parser.add_argument("--flags", default="", help="further flags of train_gpt2.py")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    world_sizes = [int(number) for number in options.ranks.split(",")]
    flags = [*FLAGS.split(), *options.flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        score = campaign(options.kills, world_sizes, Path(folder), seed, flags)
    print(
        f"seed {seed}: {score.kills} kills, {score.in_saves} of them inside saves, "
        f"in {score.runs} runs; {len(score.faults)} differ"
    )
    for fault in score.faults:
        print(fault)
    return 1 if score.faults else 0


if __name__ == "__main__":
    sys.exit(main())
