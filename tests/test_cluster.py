"""Several processes, agents and hosts: how they meet, and what happens when one of them is lost.

Slurm, and hosts with a network of their own, are brought up on this machine where it allows that.
The rest runs everywhere.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from tools import ROOT, read_log, run_python, torchrun, write_bytes_data

from support import ranks, script
from support.huggingface import save_tokenizer
from support.script import UserError
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


def agent_command(port: int, nodes: str, arguments: list[str]) -> list[str]:
    """One of several agents that meet at a port of this machine, with one worker each."""
    return [
        BIN / "torchrun",
        f"--nnodes={nodes}",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-id=job{port}",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--local-addr=127.0.0.1",
        "--rdzv-conf=last_call_timeout=2",  # seconds for which it waits for more agents
        ROOT / "train_gpt2.py",
        *arguments,
    ]


def workers(out: Path) -> list[int]:
    """The processes that train into a run directory, as torchrun has started them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
            is_worker = f"--out={out}\0".encode() in arguments and b"\0LOCAL_RANK=" in environment
            if is_worker and b"torchrun" not in arguments:
                found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], bool], what: str, log: Path, limit: float = 150) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} within {limit} s:\n{log.read_text()[-5000:]}")
        time.sleep(0.1)


def last_step(out: Path) -> int:
    if not (out / "log.jsonl").exists():
        return 0
    steps = re.findall(r'"train", "step": (\d+)', (out / "log.jsonl").read_text())
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


# -------------------------------------------------------------------------------------- meeting


def test_ranks_agree_on_a_name_whatever_earlier_attempts_have_left():
    """The store holds the calls and answers of three attempts, in two of which a rank was lost."""
    store = dist.HashStore()
    names = []
    for lost in (None, 1, None):
        answers = [""] * 3

        def meet(rank: int, answers: list[str] = answers) -> None:
            answers[rank] = ranks.agree_on_name(store, rank, 3, "here")

        if lost is not None:  # its rank 2 called, and rank 0 never heard of rank 1
            store.set("call/2", "a token of a process that died")
            continue
        threads = [threading.Thread(target=meet, args=[rank]) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[0] and set(answers) == {answers[0]}
        names.append(answers[0])
    assert len(set(names)) == 2  # no attempt has the name of another one


SHORT_WAITS = """
import sys, time, os, signal
from support import ranks, runtime, script
from datetime import timedelta
ranks.FIRST_WORD_SECONDS = 0.1
ranks.HEARTBEAT_SECONDS = 0.5
"""


def ranks_script(folder: Path, code: str) -> Path:
    script = folder / "ranks.py"
    script.write_text(f"{SHORT_WAITS}\n{code}")
    return script


def test_a_rank_without_peers_names_them_and_ends(tmp_path):
    script = ranks_script(
        tmp_path,
        "ranks.MEETING_SECONDS = 2\nscript.run_script(lambda: runtime.start('cpu', 'float32'))\n",
    )
    port = str(free_port())
    address = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = run_python(script, env=address | {"RANK": "0"})
    assert done.returncode == 2
    assert f"waits at 127.0.0.1:{port} for rank 1, 2 of 3" in done.stdout
    assert done.stderr.count("\n") == 1 and "for rank 1, 2 of 3" in done.stderr
    done = run_python(script, env=address | {"RANK": "2"})
    assert done.returncode == 2
    assert f"waits for rank 0 at 127.0.0.1:{port}" in done.stdout
    assert done.stderr.count("\n") == 1 and "Connection refused" in done.stderr


WRONG_PLACES = [
    ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE is 1"),
    ({"WORLD_SIZE": "2"}, "RANK is ''"),
    ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0, and WORLD_SIZE is 0"),
    ({"WORLD_SIZE": "-1", "RANK": "0"}, "WORLD_SIZE is '-1'"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 processes"),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
    ({"PMI_RANK": "0", "PMI_SIZE": "3"}, "mpiexec has started 3 processes"),
]


def set_place(monkeypatch, environment: dict[str, str]) -> None:
    for name in list(os.environ):
        if re.match("(LOCAL_)?RANK|WORLD_SIZE|MASTER_|SLURM_|OMPI_|PMI_", name):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("environment, message", WRONG_PLACES, ids=str)
def test_a_wrong_place_among_the_ranks_is_refused(monkeypatch, environment, message):
    set_place(monkeypatch, environment)
    with pytest.raises(UserError, match=message):
        ranks.place_in_environment()


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2", "RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),  # torchrun's
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (0, 1)),  # runs of their own
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),  # a batch script, without srun
    ],
    ids=str,
)
def test_a_place_among_the_ranks(monkeypatch, environment, place):
    set_place(monkeypatch, environment)
    assert ranks.place_in_environment() == place


@pytest.mark.parametrize("host", ["", "node0"])
@pytest.mark.parametrize("port", ["", "0", "70000", "-1", "http"])
def test_a_wrong_address_of_the_store_is_refused(monkeypatch, host, port):
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": host, "MASTER_PORT": port}
    set_place(monkeypatch, place)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, MASTER_ADDR is .* MASTER_PORT"):
        ranks.address_of_store()


@pytest.mark.parametrize(
    "host, reason",
    [
        ("127.0.0.1", "something listens there, but does not answer as rank 0 would"),
        ("no.such.host.invalid", r"\w"),  # the system's own words
    ],
)
def test_who_does_not_find_rank_0_says_so_and_ends(tmp_path, host, reason):
    """The port is another program's, which is silent; or the name does not resolve."""
    script = ranks_script(
        tmp_path,
        "ranks.MEETING_SECONDS = 2\nscript.run_script(lambda: runtime.start('cpu', 'float32'))\n",
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        address = {"WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port}
        done = run_python(script, env=address | {"RANK": "1"})
    assert done.returncode == 2
    error = rf"error: after 2 s rank 1 on \S+ waits for rank 0 at {host}:{port} \({reason}"
    assert re.match(error, done.stderr), done.stderr


def test_a_rank_ends_when_rank_0_has_left_what_it_did_alone(tmp_path):
    """As by a SIGTERM to its agent. The store is torchrun's, on another machine, and stays."""
    script = ranks_script(
        tmp_path,
        "def main():\n"
        "    rt = runtime.start('cpu', 'float32')\n"
        "    print('met', flush=True)\n"
        "    rt.on_main(lambda: time.sleep(600))\n"
        "script.run_script(main)\n",
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = []
    for rank in ("0", "1"):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | place | {"RANK": rank}
        ranks.append(subprocess.Popen([sys.executable, script], env=environment, **pipes))
    try:
        for process in ranks:
            assert "met\n" in process.stdout  # before it may say whom it waits for
        ranks[0].terminate()
        _, stderr = ranks[1].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[1].returncode == 2
    assert re.match(r"error: rank 1 on \S+: rank 0 has ended", stderr)


def test_a_rank_that_waits_ends_on_sigterm(tmp_path):
    script = ranks_script(tmp_path, "script.run_script(lambda: runtime.start('cpu', 'float32'))\n")
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    waiting = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | address | {"RANK": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "waits at" in waiting.stdout.readline()
    waiting.terminate()
    waiting.communicate(timeout=60)
    assert waiting.returncode == 128 + signal.SIGTERM


# ------------------------------------------------------------------------- collectives, lost ranks


def test_rank_0_may_work_alone_for_longer_than_a_collective_may_take(tmp_path):
    script = ranks_script(
        tmp_path,
        "ranks.COLLECTIVE_TIMEOUT = timedelta(seconds=3)\n"
        "def main():\n"
        "    rt = runtime.start('cpu', 'float32')\n"
        "    def work():\n"
        "        time.sleep(6)\n"
        "        return 'done by 0'\n"
        "    assert rt.on_main(work) == 'done by 0'\n"
        "    assert rt.on_main(lambda: 'again') == 'again'\n"
        "script.run_script(main)\n",
    )
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("halted, other", [(1, 0), (0, 1)])
def test_a_halted_rank_is_named_and_ends_the_others(tmp_path, halted, other):
    """It is alive, and its connections are open, but it does nothing any more."""
    script = ranks_script(
        tmp_path,
        "def main():\n"
        "    rt = runtime.start('cpu', 'float32')\n"
        f"    if rt.rank == {halted}:\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    rt.gather(rt.rank)\n"
        "script.run_script(main)\n",
    )
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        environment = os.environ | address | {"RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([sys.executable, script], env=environment, **pipes))
    try:
        stdout, stderr = ranks[other].communicate(timeout=120)
    finally:
        ranks[halted].kill()
        ranks[halted].communicate()
    assert ranks[other].returncode == 2
    # Rank 0 is the store's host here, and it is the store that rank 1 misses first.
    missed = "rank 1" if halted == 1 else "the store at 127.0.0.1"
    heard = rf"rank {other} on \S+ has heard nothing of {missed}.* for"
    assert re.search(f"warning: {heard}", stdout)
    assert re.search(f"^error: {heard}", stderr, re.MULTILINE)


def test_a_rank_that_has_finished_is_not_missed(tmp_path):
    script = ranks_script(
        tmp_path,
        "def main():\n"
        "    rt = runtime.start('cpu', 'float32')\n"
        "    if rt.is_main:\n"
        "        time.sleep(6)\n"
        "script.run_script(main)\n",
    )
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr
    assert "has heard nothing" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "rank, message, said",
    [
        ("1", "error: out of memory", r"error: rank 1 on \S+: out of memory"),
        ("0", "error: out of memory", "error: out of memory"),
        ("1", "error: rank 1 has lost another rank", "error: rank 1 has lost another rank"),
    ],
)
def test_an_error_says_of_which_rank_it_is(monkeypatch, rank, message, said):
    set_place(monkeypatch, {"RANK": rank, "WORLD_SIZE": "2"})
    assert re.fullmatch(said, script.with_rank(message))


@needs_proc
def test_workers_end_when_torchrun_is_killed(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "output"
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", ROOT / "train_gpt2.py"]
    with agents([*command, *flags(data, out)], log=log) as (agent,):
        wait_for_steps(out, 0, log)
        agent.kill()
        wait_for(lambda: "stopped after step" in log.read_text(), "stop", log)
        wait_for(lambda: not workers(out), "end of the workers", log)
    check_log(out)
    saved = [entry["step"] for entry in read_log(out, "save")]
    assert saved[-1] == last_step(out)  # they were asked to stop, and saved first


# ----------------------------------------------------------------------------------- restarts


@needs_proc
@pytest.mark.parametrize("number_of_agents, kills", [(1, 2), (2, 1)])
def test_killed_workers_are_replaced_and_the_run_goes_on(data, tmp_path, number_of_agents, kills):
    out, log = tmp_path / "run", tmp_path / "output"
    if number_of_agents == 1:
        launcher = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        commands = [[*launcher, ROOT / "train_gpt2.py", *flags(data, out)]]
    else:
        commands = [agent_command(free_port(), "2", flags(data, out))] * 2
    with agents(*commands, log=log):
        wait_for_steps(out, 0, log)
        for _ in range(kills):
            kill_a_worker(out, log)
            wait_for_steps(out, last_step(out), log)
    check_log(out)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--data=/not/there", "/not/there: no such file"),
        ("--max-stepss=5", "--max-stepss"),
    ],
)
def test_bad_input_is_said_once_and_uses_up_no_restarts(data, tmp_path, wrong, message):
    """A restart ends before it imports torch. torchrun repeats the message when it gives up."""
    arguments = [*flags(data, tmp_path / "run"), wrong]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    done = run_python("-m", *launcher, ROOT / "train_gpt2.py", *arguments)
    assert done.returncode == 1
    said, _, summary = done.stderr.partition("ChildFailedError")
    if wrong == "--max-stepss=5":
        assert said.count("╭") == 1  # tyro draws a box around what it says
        assert message in said
        assert "has said why it ends" in summary
    else:
        assert len(re.findall(f"^error: .*{re.escape(message)}", said, re.MULTILINE)) == 1
        assert message in summary


def test_bad_input_on_one_of_two_machines_ends_both(data, tmp_path):
    """Rank 0, on the other machine, would wait for minutes. It is told, and says what it was."""
    log = tmp_path / "output"
    command = agent_command(free_port(), "2", flags(data, tmp_path / "run"))
    with agents(command, [*command, "--device=cuda:99"], log=log) as started:
        for agent in started:
            assert agent.wait(120) == 1
    heard = "^error: rank 1 on .* has ended: --device cuda:99 is not available"
    assert len(re.findall(heard, log.read_text(), re.MULTILINE)) == 1


@pytest.mark.parametrize(
    "message, heard",
    [("error: no GPU", "has ended: no GPU"), ("", "has ended: it cannot read its flags")],
)
def test_a_rank_that_ends_before_the_meeting_leaves_word(monkeypatch, message, heard):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    set_place(monkeypatch, place | {"MASTER_PORT": str(store.port)})
    ranks.leave_word(message)  # of ranks started by hand the store may not be there yet
    ranks.check_has_not_failed(store, 1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks.leave_word(message)
    with pytest.raises(UserError, match=f"rank 1 on .* {heard}"):
        ranks.check_has_not_failed(store, 1)
    ranks.check_has_not_failed(store, 0)


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


def with_replacements(script: str, changes: dict[str, str]) -> str:
    """A text of the page with each of these parts, which are in it, written otherwise."""
    for written, here in changes.items():
        assert written in script
        script = script.replace(written, here)
    return script


def page_script(folder: Path, arguments: list[str]) -> Path:
    """The sbatch script of docs/scaling.md, made small enough for this machine."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)
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
    """Start a job that was requeued. Slurm by itself would wait for two minutes."""
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
    page = (ROOT / "docs" / "scaling.md").read_text()
    (script,) = re.findall(r"```python\n(from datatrove.*?)```", page, re.DOTALL)
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
import torch.distributed as dist

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
    page = (ROOT / "docs" / "scaling.md").read_text()
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", page, re.DOTALL)
    script = tmp_path / "engine.py"
    script.write_text(code + ENGINE_MAIN)
    done = torchrun(2, script, data, out / "step_000002")
    assert done.returncode == 0, done.stderr[-5000:]
    loss, part = json.loads(done.stdout)
    assert loss == pytest.approx(read_log(out, "train")[2]["loss"], abs=1e-6)
    assert 0.45 < part < 0.55


# ------------------------------------------------------------------------ hosts with a network


MEETING = "10.77.0.1"  # the address of the first host, where the agents meet
HOSTS = {"pygpt2a": MEETING, "pygpt2b": "10.77.0.2"}


@pytest.fixture
def two_hosts() -> Iterator[dict[str, str]]:
    """Network namespaces as hosts: names and addresses. A bridge connects them."""
    if not AS_ROOT or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    remove_hosts()  # of a test that was killed
    commands = ["link add pygpt2br type bridge", "link set pygpt2br up"]
    for name, address in HOSTS.items():
        commands += [
            f"netns add {name}",
            f"link add v{name} type veth peer name eth0 netns {name}",
            f"link set v{name} master pygpt2br up",
            f"-n {name} link set lo up",
            f"-n {name} addr add {address}/24 dev eth0",
            f"-n {name} link set eth0 up",
        ]
    try:
        for command in commands:
            done = ip(command)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {command}: {done.stderr.strip()}")
        yield HOSTS
    finally:
        remove_hosts()


def ip(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=60)


def remove_hosts() -> None:
    """Also what still runs on them: a host with a process keeps its end of the cable."""
    for name in HOSTS:
        for process in ip(f"netns pids {name}").stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        ip(f"link del v{name}")
        ip(f"netns del {name}")
    ip("link del pygpt2br")


def host_command(name: str, address: str, *arguments) -> list[str]:
    """One agent on one of the hosts, with one worker. They meet at the first host."""
    return [
        *("ip", "netns", "exec", name, BIN / "torchrun"),
        *("--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=run"),
        *(f"--rdzv-endpoint={MEETING}:29500", f"--local-addr={address}"),
        f"--rdzv-conf=last_call_timeout=2,is_host={int(address == MEETING)}",
        *arguments,
    ]


def test_two_hosts_train_are_cut_off_and_go_on(two_hosts, data, tmp_path):
    """The cable of one host is pulled. A heartbeat notices, and the other ends or goes on alone."""
    out, log = tmp_path / "run", tmp_path / "output"
    launcher = tmp_path / "train.py"  # the same script, with a heartbeat that is quick for a test
    launcher.write_text(
        "from support import ranks, script; import train_gpt2\n"
        "ranks.HEARTBEAT_SECONDS = 0.5\n"
        "script.run_script(train_gpt2.main)\n"
    )

    commands = []
    for name, address in two_hosts.items():
        more = ["--nnodes=2", "--max-restarts=0", launcher, *flags(data, out)]
        commands.append(host_command(name, address, *more))
    interface = {"GLOO_SOCKET_IFNAME": "eth0"}
    with agents(*commands, log=log, env=interface):
        wait_for_steps(out, 0, log)
        ip("link set vpygpt2b down").check_returncode()
        wait_for(lambda: re.search("error: rank . on", log.read_text()), "rank that is missed", log)
        assert re.search(r"has heard nothing of (rank \d|the store)", log.read_text())
    ip("link set vpygpt2b up").check_returncode()
    reached = last_step(out)
    with agents(*commands, log=log, env=interface):
        wait_for_steps(out, reached, log)
    check_log(out)


@pytest.fixture
def join_commands(request) -> Callable[..., list[list[str]]]:
    """Makes the commands of two agents: on two hosts, or where these cannot be had on this one."""
    try:
        hosts = request.getfixturevalue("two_hosts")
    except pytest.skip.Exception:
        port = free_port()
        return lambda *arguments: [agent_command(port, "1:2", arguments)] * 2

    def commands(*arguments) -> list[list[str]]:
        script = ["--nnodes=1:2", ROOT / "train_gpt2.py", *arguments]
        return [host_command(name, address, *script) for name, address in hosts.items()]

    return commands


@needs_proc
def test_a_machine_joins_a_running_job_and_leaves_it(join_commands, data, tmp_path):
    """It is a host of its own where namespaces can be had; else a second agent on this machine."""
    out, log = tmp_path / "run", tmp_path / "output"
    command, late_command = join_commands(*flags(data, out))
    # torch 2.13 tells an agent that joins later no address without this.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if "netns" in command:
        environment["GLOO_SOCKET_IFNAME"] = "eth0"
    with agents(command, log=log, env=environment) as started, log.open("ab") as output:
        wait_for_steps(out, 0, log)
        assert len(workers(out)) == 1
        started.append(start_agent(late_command, output, environment))
        wait_for(lambda: len(workers(out)) == 2, "second worker", log)
        wait_for(lambda: " 2 ranks" in log.read_text(), "run on two ranks", log)
        wait_for_steps(out, last_step(out), log)
        started[1].terminate()
        started[1].wait(60)
        wait_for(lambda: len(workers(out)) == 1, "end of the second worker", log)
        wait_for(lambda: log.read_text().count(" 1 rank,") == 2, "run on one rank again", log)
        wait_for_steps(out, last_step(out), log)
    check_log(out)
