"""Several processes, agents and hosts: how they meet, and what happens when one of them is lost.

Slurm, and hosts with a network of their own, are brought up on this machine where it allows that.
The rest runs everywhere.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tools import ROOT, read_log, run_python, torchrun, write_bytes_data

from support.huggingface import save_tokenizer
from tokens import TokenData, get_encoding, open_data

BIN = Path(sys.executable).parent  # where torchrun is
ON_LINUX = sys.platform == "linux"
AS_ROOT = ON_LINUX and os.geteuid() == 0


# --------------------------------------------------------------------------------- a tiny run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("cluster") / "data")


def flags(data: Path, out: Path, **changes) -> list[str]:
    """A run without an end, of steps of a few milliseconds, that saves every 50 of them."""
    values = {
        "recipe": "first-run",
        "data": data,
        "out": out,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "seq_len": 32,
        "total_batch_tokens": 256,
        "micro_batch": 4,
        "max_steps": 1_000_000,
        "warmup_steps": 10,
        "eval_every": 0,
        "sample_every": 0,
        "save_every": 50,
        "keep": 10_000,
        "device": "cpu",
        "dtype": "float32",
    } | changes
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return [*arguments, "--resume"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def agents(*commands: list[str], log: Path, env: dict | None = None) -> Iterator[list]:
    """torchrun agents that run side by side; whatever is left of them in the end is killed."""
    started = []
    with log.open("wb") as output:
        for command in commands:
            started.append(start_agent(command, output, env))
        try:
            yield started
        finally:
            for agent in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()


def start_agent(command: list[str], output, env: dict | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)),
        stdout=output,
        stderr=output,
        env=os.environ | (env or {}),
        start_new_session=True,
    )


def page() -> str:
    return (ROOT / "docs" / "scaling.md").read_text()


def with_replacements(text: str, changes: dict[str, str]) -> str:
    """A text of the page with each of these parts, which are in it, written otherwise."""
    for written, here in changes.items():
        assert written in text
        text = text.replace(written, here)
    return text


def page_command(port: int, arguments: list[str], nodes: str = "2") -> list[str]:
    """What the page runs on each of two nodes, with one worker each, on this machine."""
    (command,) = re.findall(r"```bash\n(export TORCH_DISABLE.*?)```", page(), re.DOTALL)
    changes = {
        "torchrun --nnodes=2 --nproc-per-node=8": f"exec {BIN}/torchrun --nnodes={nodes} "
        "--nproc-per-node=1 --local-addr=127.0.0.1 --rdzv-conf=last_call_timeout=2",
        "node0:29500": f"127.0.0.1:{port}",
        "train_gpt2.py --recipe gpt2 --out runs/gpt2 --resume": shlex.join(
            [str(ROOT / "train_gpt2.py"), *arguments]
        ),
    }
    return ["bash", "-c", with_replacements(command, changes)]


def workers(out: Path) -> list[int]:
    """The processes that train into a run directory, as torchrun has started them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
            is_worker = f"--out={out}\0".encode() in arguments and b"\0LOCAL_RANK=" in environment
            if is_worker:
                found.append(int(folder.name))
    return found


def children(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def wait_for(condition: Callable[[], bool], what: str, log: Path, limit: float = 150) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} within {limit} s:\n{log.read_text()[-5000:]}")
        time.sleep(0.1)


def last_step(out: Path) -> int:
    try:
        text = (out / "log.jsonl").read_text()
    except FileNotFoundError:  # a start without a checkpoint sets the log aside
        return 0
    steps = re.findall(r'"train", "step": (\d+)', text)
    return int(steps[-1]) if steps else 0


def wait_for_steps(out: Path, first: int, log: Path) -> None:
    """Wait until the run has made more steps than that, and 20 more."""
    wait_for(lambda: last_step(out) > first + 20, f"step after {first}", log)


def kill_a_worker(out: Path, log: Path) -> None:
    """kill -9 for one worker; returns once all workers of that attempt are gone."""
    old = workers(out)
    os.kill(old[-1], signal.SIGKILL)
    wait_for(lambda: not set(old) & set(workers(out)), "end of the other workers", log)


def check_log(out: Path) -> None:
    """Each step stands in the log once, in order."""
    steps = [entry["step"] for entry in read_log(out, "train")]
    assert steps == list(range(1, len(steps) + 1))


needs_proc = pytest.mark.skipif(not ON_LINUX, reason="finds workers by Linux's /proc")


# ------------------------------------------------------------------------- ranks that wait or end

SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from support import ranks, runtime, script

ranks.FIRST_WORD_SECONDS = 1
ranks.COLLECTIVE_TIMEOUT = timedelta(seconds=4)

def main():
    rt = runtime.start("cpu", "float32")
    rt.gather("all have met")
{work}

script.run_script(main)
"""


def start_script_on(world_size: int, folder: Path, work: str) -> list[subprocess.Popen]:
    """Lines of Python, run by ranks that no torchrun looks after."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(work=textwrap.indent(textwrap.dedent(work), "    ")))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place["WORLD_SIZE"] = str(world_size)
    started = []
    for rank in range(world_size):
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, script], env=environment, **pipes))
    return started


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, once the process has ended."""
    try:
        stdout, stderr = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


def test_rank_0_may_work_for_longer_than_a_collective_may_take_and_the_others_say_so(tmp_path):
    """Such as to verify a large checkpoint on a slow disk."""
    work = """
        def load_newest(folder):
            time.sleep(7)
            return folder
        assert rt.on_main(load_newest, "run") == "run"
    """
    (code, silent, _), (other, said, _) = map(outcome, start_script_on(2, tmp_path, work))
    assert (code, other, silent) == (0, 0, "")
    assert said == "rank 1 has waited 1 s for rank 0: load newest\n"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_that_wait_for_rank_0_end_when_it_ends(tmp_path, signum):
    started = start_script_on(2, tmp_path, "rt.on_main(os.kill, os.getpid(), signal.SIGSTOP)")
    assert started[1].stdout.readline() == "rank 1 has waited 1 s for rank 0: kill\n"
    started[0].send_signal(signum)
    started[0].send_signal(signal.SIGCONT)
    code, _, stderr = outcome(started[1])
    assert code == 2
    assert re.fullmatch(r"error: rank 1 has lost rank 0 .*\n", stderr)
    outcome(started[0])


@pytest.mark.parametrize("signum, lost", [("SIGKILL", 0), ("SIGKILL", 1), ("SIGSTOP", 1)])
def test_a_rank_that_has_died_or_does_nothing_is_named_in_one_line(tmp_path, lost, signum):
    """A halted rank is alive, and its connections are open."""
    work = f"""
        if rt.rank == {lost}:
            os.kill(os.getpid(), signal.{signum})
        rt.gather(rt.rank)
    """
    started = start_script_on(3, tmp_path, work)
    for rank in {0, 1, 2} - {lost}:
        code, _, stderr = outcome(started[rank])
        assert code == 2
        assert re.fullmatch(rf"error: rank {rank} has lost rank .*{lost}.*\n", stderr), stderr
    started[lost].kill()
    outcome(started[lost])


def test_a_rank_that_waits_for_the_others_ends_on_sigterm(tmp_path):
    rank_0, rank_1 = start_script_on(2, tmp_path, "")
    rank_1.kill()
    outcome(rank_1)
    time.sleep(5)  # until it has begun to wait
    rank_0.terminate()
    assert outcome(rank_0) == (-signal.SIGTERM, "", "")


# --------------------------------------------------------------------------- torchrun, and restarts


def test_torchrun_with_restarts_asks_for_the_name_of_the_run(data, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    arguments = [ROOT / "train_gpt2.py", "--recipe=first-run", f"--data={data}"]
    done = run_python("-m", *launcher, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: --max-restarts 1 without --out and --resume" in done.stderr
    assert not list(tmp_path.iterdir())


STANDALONE = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]


@needs_proc
def test_workers_end_when_torchrun_is_killed(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "output"
    with agents([*STANDALONE, ROOT / "train_gpt2.py", *flags(data, out)], log=log) as (agent,):
        wait_for_steps(out, 0, log)
        agent.kill()
        wait_for(lambda: "stopped after step" in log.read_text(), "stop", log)
        wait_for(lambda: not workers(out), "end of the workers", log)
    check_log(out)
    saved = [entry["step"] for entry in read_log(out, "save")]
    assert saved[-1] == last_step(out)  # they were asked to stop, and saved first


@needs_proc
@pytest.mark.parametrize("seconds", [0, 0.05, 0.5, 1.5])
def test_workers_end_when_torchrun_is_killed_while_they_import_torch(data, tmp_path, seconds):
    """Or they would meet in the store of the next job at that port."""
    out, log = tmp_path / "run", tmp_path / "output"
    with agents([*STANDALONE, ROOT / "train_gpt2.py", *flags(data, out)], log=log) as (agent,):
        wait_for(lambda: workers(out), "worker", log)
        time.sleep(seconds)
        agent.kill()
        wait_for(lambda: not workers(out), "end of the workers", log, limit=15)
    assert not out.exists()


@needs_proc
def test_killed_workers_are_replaced_and_the_run_goes_on(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "output"
    with agents([*STANDALONE, ROOT / "train_gpt2.py", *flags(data, out)], log=log):
        wait_for_steps(out, 0, log)
        for _ in range(2):
            kill_a_worker(out, log)
            wait_for_steps(out, last_step(out), log)
    check_log(out)


@needs_proc
def test_the_pages_two_nodes_survive_that_a_worker_and_then_a_node_is_killed(data, tmp_path):
    """Not the one that hosts the meeting. It is started again with the same command."""
    out, log = tmp_path / "run", tmp_path / "output"
    port = free_port()
    command = page_command(port, flags(data, out))
    with agents(command, log=log) as started, log.open("ab") as output:
        wait_for(lambda: listens(port), "store of the first agent", log)
        started.append(start_agent(command, output))
        wait_for_steps(out, 0, log)
        kill_a_worker(out, log)
        wait_for_steps(out, last_step(out), log)
        for process in children(started[1].pid):
            os.kill(process, signal.SIGKILL)
        started[1].kill()
        wait_for(lambda: not workers(out), "end of the other node's worker", log)
        started.append(start_agent(command, output))
        wait_for_steps(out, last_step(out), log)
        assert started[0].poll() is None
    check_log(out)


@needs_proc
def test_a_node_joins_a_running_job_and_leaves_it(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "output"
    command = page_command(free_port(), flags(data, out), nodes="1:2")
    with agents(command, log=log) as started, log.open("ab") as output:
        wait_for_steps(out, 0, log)
        assert len(workers(out)) == 1
        started.append(start_agent(command, output))
        wait_for(lambda: " 2 ranks" in log.read_text(), "run on two ranks", log)
        wait_for_steps(out, last_step(out), log)
        started[1].terminate()
        started[1].wait(60)
        wait_for(lambda: log.read_text().count(" 1 rank,") == 2, "run on one rank again", log)
        wait_for_steps(out, last_step(out), log)
    check_log(out)


# -------------------------------------------------------------------------------------- Slurm

SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n[1-2] PriorityTier=1 Default=YES
PartitionName=urgent Nodes=n[1-2] PriorityTier=2
"""


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def slurm_cluster(tmp_path, monkeypatch) -> Iterator[Path]:
    """A Slurm of two nodes on this machine; yields the folder of its files."""
    if not AS_ROOT or not shutil.which("slurmctld") or not shutil.which("munged"):
        pytest.skip("needs root, slurmctld and munged (Debian: slurm-wlm, munge)")
    folder = tmp_path / "slurm"
    folder.mkdir()
    configuration = folder / "slurm.conf"
    ports = [free_port() for _ in range(3)]
    configuration.write_text(SLURM.format(host=socket.gethostname(), folder=folder, ports=ports))
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    hosts = Path("/etc/hosts")
    known = hosts.read_text()
    try:
        if " n1 n2" not in known:
            hosts.write_text(f"{known.rstrip()}\n127.0.0.1 n1 n2\n")
        start_munge()
        subprocess.run(["slurmctld"], check=True)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node], check=True)
        log = folder / "slurmctld.log"
        try:
            wait_for(lambda: "idle" in slurm("sinfo", "-h", "-o", "%T"), "Slurm", log, limit=30)
        except (subprocess.SubprocessError, pytest.fail.Exception) as error:
            pytest.skip(f"Slurm does not come up here: {error}")
        yield folder
        slurm("scancel", "--user=root")
        wait_for(lambda: not slurm("squeue", "-h"), "end of all jobs", log, limit=60)
    finally:
        for file in folder.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        hosts.write_text(known)


def start_munge() -> None:
    """Slurm's processes know each other by munge. It stays when the tests are over."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["su", "munge", "-s", "/bin/sh", "-c", "munged"], check=True)


def page_script(folder: Path, arguments: list[str]) -> Path:
    """The sbatch script of docs/scaling.md, made small enough for this machine."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page(), re.DOTALL)
    changes = {
        "--nodes=8": "--nodes=2",
        " --gpus-per-node=8": "",
        "--cpus-per-task=64": "--cpus-per-task=1",
        "--nproc-per-node=8": "--nproc-per-node=1",
        "OMP_NUM_THREADS=8": "OMP_NUM_THREADS=1",
        "--signal=TERM@180": "--signal=TERM@90",
        "logs/%x-%j.out": f"{folder}/output",
        ":29500": f":{free_port()}",
        "train_gpt2.py --recipe gpt2-xl --out runs/gpt2-xl --resume": " ".join(
            ["train_gpt2.py", *arguments]
        ),
    }
    script = with_replacements(script, changes)
    file = folder / "page.sh"
    file.write_text(script)
    return file


def test_tasks_of_srun_are_ranks(slurm_cluster, data, tmp_path):
    """Without torchrun, on two nodes."""
    out, log = tmp_path / "run", tmp_path / "output"
    arguments = flags(data, out, max_steps=20, save_every=20)
    command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, ROOT / "train_gpt2.py"]
    with agents([*command, *arguments], log=log) as (job,):
        assert job.wait(120) == 0, log.read_text()
    assert " 2 ranks, " in log.read_text()
    check_log(out)


def test_the_pages_slurm_script_survives_what_a_cluster_does(slurm_cluster, data, tmp_path):
    """A worker killed, the time limit, the next job, preemption, a dead node: nothing is lost."""
    out, log = tmp_path / "run", tmp_path / "output"
    log.touch()
    script = page_script(tmp_path, flags(data, out))
    jobs = []
    for _ in range(2):
        answer = slurm("sbatch", f"--chdir={ROOT}", str(script))
        jobs.append(answer.split()[-1])
    wait_for_steps(out, 0, log)
    assert len(workers(out)) == 2
    assert "Dependency" in slurm("squeue", "-h", "-j", jobs[1], "-o", "%r")

    kill_a_worker(out, log)
    wait_for_steps(out, last_step(out), log)

    # A limit that is nearer than the warning: Slurm sends SIGTERM when it looks next.
    slurm("scontrol", "update", f"JobId={jobs[0]}", "TimeLimit=2")
    # The state is that of torchrun, which exits with 1 when it was told to stop.
    wait_for(lambda: state(jobs[0]) == "FAILED", "end of the first job", log)
    assert "stopped after step" in log.read_text()

    wait_for(lambda: state(jobs[1]) == "RUNNING", "start of the second job", log)
    wait_for_steps(out, last_step(out), log)
    everything = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    urgent = slurm("sbatch", *everything, "--wrap=true").split()[-1]
    wait_for(lambda: state(jobs[1]) == "PENDING", "preemption", log)
    wait_for(lambda: state(urgent) == "COMPLETED", "end of the urgent job", log)
    start_again(jobs[1], log)
    wait_for_steps(out, last_step(out), log)

    kill_node(slurm_cluster, "n2")
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=died")
    wait_for(lambda: state(jobs[1]) == "PENDING", "requeue after the death of a node", log)
    subprocess.run(["slurmd", "-N", "n2"], check=True)
    # By ReturnToService it is in use again as soon as it has registered.
    wait_for(
        lambda: "idle" in slurm("sinfo", "-h", "-n", "n2", "-o", "%t"), "return of the node", log
    )
    start_again(jobs[1], log)
    wait_for_steps(out, last_step(out), log)
    slurm("scancel", jobs[1])
    wait_for(lambda: not workers(out), "end of the second job", log)
    check_log(out)
    check_weights(out, data, tmp_path)


def start_again(job: str, log: Path) -> None:
    """Start a job that was requeued. Slurm by itself would wait for two minutes.

    A part of that is kept: what Slurm still sends to a node about the job's end would end it again.
    """
    time.sleep(5)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: state(job) == "RUNNING", "start of the requeued job", log)


def kill_node(folder: Path, node: str) -> None:
    """kill -9 for everything that runs on a node of Slurm, as if its power had failed."""
    dying = {int((folder / f"{node}.pid").read_text())}  # slurmd
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"\0SLURMD_NODENAME={node}\0".encode() in (process / "environ").read_bytes():
                dying.add(int(process.name))
                parent = re.search(r"PPid:\t(\d+)", (process / "status").read_text())[1]
                if Path("/proc", parent, "comm").read_text() == "slurmstepd\n":
                    dying.add(int(parent))
    for process in dying:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def state(job: str) -> str:
    return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[1]


def check_weights(out: Path, data: Path, folder: Path) -> None:
    """The newest checkpoint of a run holds the weights that an undisturbed run has at that step."""
    steps = sorted(out.glob("step_*"))
    undisturbed, log = folder / "undisturbed", folder / "undisturbed.log"
    newest = [step for step in steps if int(step.name.removeprefix("step_")) % 50 == 0][-1]
    launcher = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", ROOT / "train_gpt2.py"]
    with agents([*launcher, *flags(data, undisturbed)], log=log):
        same = undisturbed / newest.name
        wait_for(same.exists, f"checkpoint {newest.name}", log)
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (same / name).read_bytes() == (newest / name).read_bytes()


# ---------------------------------------------------------------------------------------- Ray


def page_pipeline(folder: Path, tasks: int) -> Path:
    """The datatrove script of docs/scaling.md with Ray's executor, on documents in `folder`."""
    (script,) = re.findall(r"```python\n(from datatrove.*?)```", page(), re.DOTALL)
    changes = {
        "import SlurmPipelineExecutor  # or RayPipelineExecutor, LocalPipelineExecutor": (
            "import RayPipelineExecutor"
        ),
        "    SlurmPipelineExecutor(": "    RayPipelineExecutor(",
        'time="04:00:00",': "mem_per_cpu_gb=0.5,",
        'partition="cpu",': "",
        "import ParquetReader": "import JsonlReader",
        'ParquetReader("hf://datasets/HuggingFaceFW/fineweb-edu/sample/100BT")': (
            f'JsonlReader("{folder}/documents", compression=None)'
        ),
        '"tokens/fineweb-edu-100BT"': f'"{folder}/tokens"',  # the log's, too
        'tokenizer_name_or_path="gpt2"': f'tokenizer_name_or_path="{folder}/tokenizer.json"',
        "max_tokens_per_file=100_000_000": "max_tokens_per_file=500",
        "tasks=200": f"tasks={tasks}",
    }
    script = with_replacements(script, changes)
    file = folder / "pipeline.py"
    file.write_text(script)
    return file


def documents_of(data: TokenData) -> list[list[int]]:
    """The tokens of each document, in a fixed order. They are divided at <|endoftext|>."""
    documents = [[]]
    for split in (data.train, data.val):
        for token in split.read(0, len(split)).tolist():
            if token == get_encoding("gpt2").eot_token:
                documents.append([])
            else:
                documents[-1].append(token)
    return sorted(documents)


def test_ray_tokenises_with_the_pages_lines_and_the_trainer_takes_a_step(tmp_path):
    """The same documents by fineweb.py give the same tokens, a literal <|endoftext|> included."""
    pytest.importorskip("ray", reason="ray is not installed (pip install ray)")
    from transformers import AutoTokenizer

    lines = []
    for number in range(120):
        text = f"Document {number}, a naïve café:{' fox' * number}\n"
        if number == 7:
            text += "what <|endoftext|> stands for"
        lines.append(json.dumps({"text": text, "id": str(number)}) + "\n")
    (tmp_path / "documents").mkdir()
    for file in range(3):
        content = "".join(lines[40 * file : 40 * (file + 1)])
        (tmp_path / "documents" / f"{file}.jsonl").write_text(content)
    save_tokenizer(get_encoding("gpt2"), tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)  # writes tokenizer.json

    done = run_python(page_pipeline(tmp_path, tasks=3))
    assert done.returncode == 0, done.stderr[-5000:]
    ours = ["--input", tmp_path / "documents", "--tokenizer", "gpt2", "--out", tmp_path / "ours"]
    done = run_python("fineweb.py", *ours)
    assert done.returncode == 0, done.stderr

    by_ray = open_data(tmp_path / "tokens")
    assert len(by_ray.train.shards) > 3
    documents = documents_of(by_ray)
    assert documents == documents_of(open_data(tmp_path / "ours"))
    assert len(documents) == 121  # one after the last <|endoftext|>, or before the first

    out = tmp_path / "run"
    arguments = flags(tmp_path / "tokens", out, tokenizer="gpt2", max_steps=1, warmup_steps=0)
    done = run_python("train_gpt2.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in read_log(out, "train")] == [1]


# --------------------------------------------------------------------------------- another engine

ENGINE_MAIN = """
import json, sys

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
data, step_directory = sys.argv[1:]
windows = Windows(data, 32, 8, 1337, rank, world_size)
windows.load_state_dict({"step": 2})
loss_fn = sharded(step_directory)
optimizer = torch.optim.AdamW(loss_fn.parameters(), lr=1e-3)
(inputs, targets) = next(iter(loader(windows, rank, world_size)))
loss = loss_fn(inputs["input"], targets)
loss.backward()
optimizer.step()
losses = [None] * world_size
dist.all_gather_object(losses, loss.item())
if rank == 0:
    here = sum(p.to_local().numel() for p in loss_fn.parameters())
    whole = sum(p.numel() for p in loss_fn.parameters())
    print(json.dumps([sum(losses) / world_size, here / whole]))
dist.destroy_process_group()
"""


def test_torchtitans_loader_and_fsdp_go_on_from_a_step_directory(data, tmp_path):
    """By the page's lines. The next step has the loss that the trainer has, on a half each."""
    pytest.importorskip("torchtitan", reason="torchtitan is not installed")
    out = tmp_path / "run"
    done = run_python("train_gpt2.py", *flags(data, out, max_steps=3, save_every=1, warmup_steps=1))
    assert done.returncode == 0, done.stderr
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", page(), re.DOTALL)
    script = tmp_path / "engine.py"
    script.write_text(code + ENGINE_MAIN)
    done = torchrun(2, script, data, out / "step_000002")
    assert done.returncode == 0, done.stderr[-5000:]
    loss, part = json.loads(done.stdout)
    assert loss == pytest.approx(read_log(out, "train")[2]["loss"], abs=1e-6)
    assert 0.45 < part < 0.55
