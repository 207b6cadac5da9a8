"""How the ranks of a run meet, and how they notice that one of them is gone.

torchrun starts the processes and tells each of them its rank, how many there are, and the address
of a store: a small server of keys and values that every process can reach. `join()` lets the ranks
meet there and returns the store. From then on a heartbeat tells a rank that has died, or that has
been cut off, from one that is only slow.
"""

import atexit
import contextlib
import ctypes
import datetime
import functools
import itertools
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from support import script
from support.script import LostContact, UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # how long a rank waits in a collective
STORE_TIMEOUT = datetime.timedelta(seconds=30)  # how long the store may take to answer
MEETING_SECONDS = 300  # how long a rank waits for the others to come
FIRST_WORD_SECONDS = 15  # after which it says whom it waits for
HEARTBEAT_SECONDS = 10
BEATS_TO_WARN = 6  # heartbeats of a rank that are missing when it is named,
BEATS_TO_END = 12  # and when it counts as lost
LEFT = "left"  # the last heartbeat of a rank that has ended in good order

WHAT_TO_CHECK = "see the table of symptoms in docs/scaling.md, section Several nodes"


@functools.cache
def join(device: torch.device) -> dist.Store:
    """Meet the other ranks and start the process group. The store is this attempt's alone."""
    rank, world_size = place_in_environment()
    host, port = address_of_store()
    connection = connect(host, port, rank)
    name = agree_on_name(connection, rank, world_size, f"{host}:{port}")
    store = dist.PrefixStore(name, connection)
    Heartbeat(host, port, name, rank, world_size).start()
    start_process_group(store, rank, world_size, device)
    return store


def start_process_group(
    store: dist.Store, rank: int, world_size: int, device: torch.device
) -> None:
    """Connect the ranks with each other, by gloo and on GPUs also by NCCL."""
    backend, device_id = "gloo", None
    if device.type == "cuda":
        # Tensors on the CPU travel by gloo, so that a vote does not wait for the GPU.
        backend, device_id = "cpu:gloo,cuda:nccl", device
    with stop_signals_end_at_once():
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device_id,
            )
        except RuntimeError as error:
            raise LostContact(
                f"rank {rank} on {socket.gethostname()} has no connection to the other ranks "
                f"({first_line(error)}); expected each machine to reach all others; name the "
                f"network with GLOO_SOCKET_IFNAME; {WHAT_TO_CHECK}"
            ) from None


# ------------------------------------------------------------------------------------- meeting


def place_in_environment() -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun sets them; 0 and 1 for a process that was started alone."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        refuse_launchers_without_ranks()
    world_size = number_in_environment("WORLD_SIZE", "1", "a number of processes, from 1 on")
    default = "0" if world_size == 1 else ""
    rank = number_in_environment("RANK", default, f"a number below WORLD_SIZE, {world_size}")
    number_in_environment("LOCAL_RANK", "0", "the number of this process on its machine")
    if rank >= world_size:  # also where WORLD_SIZE is 0
        raise UserError(
            f"RANK is {rank}, and WORLD_SIZE is {world_size}; expected ranks from 0 to WORLD_SIZE "
            "- 1; start the ranks with torchrun, or unset both"
        )
    return rank, world_size


def number_in_environment(name: str, default: str, expected: str) -> int:
    value = os.environ.get(name, default)
    if not re.fullmatch("[0-9]{1,7}", value):
        raise UserError(
            f"{name} is {value[:80]!r}; expected {expected}; start the ranks with torchrun, which "
            "sets it, or unset RANK and WORLD_SIZE"
        )
    return int(value)


def refuse_launchers_without_ranks() -> None:
    """Slurm and MPI start many processes, and each would take itself for the only one."""
    for launcher, name in (
        ("srun", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("mpiexec", "PMI_SIZE"),
    ):
        tasks = os.environ.get(name, "")
        if re.fullmatch("[0-9]{1,7}", tasks) and int(tasks) > 1:
            raise UserError(
                f"{launcher} has started {tasks} processes, without torchrun; expected one "
                "torchrun on each node, which starts the ranks; see docs/scaling.md, section "
                "Slurm; where each process shall be a run of its own, set WORLD_SIZE=1"
            )


def address_of_store() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, MASTER_ADDR is {host!r} and MASTER_PORT "
            f"{port[:80]!r}; expected the address at which the ranks meet, as torchrun sets it; "
            "start the ranks with torchrun, or unset WORLD_SIZE"
        )
    return host, int(port)


def is_store_host(rank: int) -> bool:
    """Without torchrun's own store rank 0 is its host."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(host: str, port: int, rank: int) -> dist.Store:
    """A connection to the store.

    torch would wait in silence for a name that does not resolve or a port where something else
    listens, and would not hear a signal meanwhile. So a thread makes the connection, and this one
    says what it waits for.
    """
    outcome: list[dist.Store | RuntimeError] = []
    reason = "no answer yet"

    def make() -> None:
        nonlocal reason
        while not is_store_host(rank):
            try:
                socket.create_connection((host, port), timeout=5).close()
                break
            except OSError as error:
                reason = error.strerror or str(error)
                time.sleep(0.2)
        reason = "something listens there, but does not answer as rank 0 would"
        try:
            outcome.append(new_connection(host, port, rank))
        except RuntimeError as error:
            outcome.append(error)

    def what() -> str:
        return f"rank {rank} on {socket.gethostname()} waits for rank 0 at {host}:{port} ({reason})"

    threading.Thread(target=make, name="connect", daemon=True).start()
    # One rank of a machine speaks for all.
    wait(lambda: bool(outcome), what, speaks=os.environ.get("LOCAL_RANK", "0") == "0")
    if isinstance(outcome[0], RuntimeError):
        raise LostContact(
            f"no store at {host}:{port} ({first_line(outcome[0])}); expected a free port on rank "
            f"0's machine, which the other ranks can reach; {WHAT_TO_CHECK}"
        )
    return outcome[0]


def new_connection(host: str, port: int, rank: int) -> dist.TCPStore:
    """Raises RuntimeError. Its host reaches the store whatever others call it."""
    is_host = is_store_host(rank)
    return dist.TCPStore(
        "localhost" if is_host else host,
        port,
        is_master=is_host,
        timeout=STORE_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
    )


def leave_word(message: str) -> None:
    """Tell the others, who wait for this rank at torchrun's store, that it ends before they meet.

    They would wait for it in vain. The store may be out of reach, so this takes 5 seconds at most.
    """
    if dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return

    def write() -> None:
        with contextlib.suppress(RuntimeError, UserError):
            rank, _ = place_in_environment()
            store = new_connection(*address_of_store(), rank)
            here = f"rank {rank} on {socket.gethostname()}"
            reason = message.removeprefix("error: ") or "it cannot read its flags"
            store.set(f"failed/{rank}", f"{here} has ended: {reason}")

    writer = threading.Thread(target=write, name="leave word", daemon=True)
    writer.start()
    writer.join(5)


def check_has_not_failed(store: dist.Store, rank: int) -> None:
    """Raises what the rank has left by `leave_word`, and so ends the restarts here, too."""
    if store.check([f"failed/{rank}"]):
        raise UserError(
            f"{store.get(f'failed/{rank}').decode(errors='replace')}; expected each rank to come "
            "to the meeting; start all ranks with one command"
        )


def agree_on_name(store: dist.Store, rank: int, world_size: int, place: str) -> str:
    """A name that the ranks of this attempt have in common, and no earlier attempt had.

    torchrun keeps its store when it restarts the workers, and with it the addresses of those that
    died. Whoever reads them dials a process that is gone. So each attempt has keys of its own, and
    this is how it finds their prefix. Each rank writes a fresh token where rank 0 looks for it, and
    waits for the answer to that token. The answer is rank 0's own token. What earlier attempts have
    left is answered in vain, or overwritten. (torchrun's count of restarts would not do: an agent
    that joins later has counted fewer.)
    """
    token = secrets.token_hex(8)
    if rank == 0:
        store.set(f"{token}/heartbeat/0", "0")
        answer_all(store, token, world_size, place)
        return token
    store.set(f"call/{rank}", token)
    answer = f"answer/{token}"

    def has_answer() -> bool:
        check_has_not_failed(store, 0)
        return store.check([answer])

    wait(
        has_answer,
        lambda: f"rank {rank} on {socket.gethostname()} waits for rank 0, to meet at {place}",
        speaks=os.environ.get("LOCAL_RANK", "0") == "0",
    )
    name = store.get(answer).decode()
    store.set(f"{name}/heartbeat/{rank}", "0")
    return name


def answer_all(store: dist.Store, name: str, world_size: int, place: str) -> None:
    """Rank 0's part: answer each rank's token until all have set their first heartbeat."""
    missing = list(range(1, world_size))

    def all_have_come() -> bool:
        for rank in list(missing):
            if store.check([f"{name}/heartbeat/{rank}"]):
                missing.remove(rank)
                continue
            check_has_not_failed(store, rank)
            if store.check([f"call/{rank}"]):
                token = store.get(f"call/{rank}").decode()
                store.set(f"answer/{token}", name)
        return not missing

    def what() -> str:
        names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        return f"rank 0 on {socket.gethostname()} waits at {place} for rank {names} of {world_size}"

    wait(all_have_come, what, speaks=True)


def wait(is_done: Callable[[], bool], what: Callable[[], str], speaks: bool) -> None:
    """Wait until `is_done`, for at most MEETING_SECONDS. `what` says who waits for whom."""
    began = time.monotonic()
    next_word = FIRST_WORD_SECONDS
    pause = 0.01
    while True:
        try:
            if is_done():
                return
        except RuntimeError as error:  # the store has gone
            raise LostContact(
                f"{what()} ({first_line(error)}); expected the store; {WHAT_TO_CHECK}"
            ) from None
        waited = time.monotonic() - began
        if waited > MEETING_SECONDS:
            raise LostContact(
                f"after {MEETING_SECONDS} s {what()}; expected all ranks to be started within that "
                f"time; {WHAT_TO_CHECK}"
            )
        if speaks and waited > next_word:
            script.say(what())
            next_word += 60
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


# ---------------------------------------------------------------------------------- a rank lost


class Heartbeat:
    """Tells the others that this rank is alive, and ends the process when one of them is not.

    A process that dies closes its connections, and the others notice at once. One whose machine has
    lost its network, or that has been halted, is silent, and a collective would wait for it for
    ten minutes. Rank 0 watches all ranks, and all ranks watch rank 0. A lost rank ends the process;
    torchrun then restarts it, with the machines that are left if --nnodes allows that.

    One thread talks with the store. It may wait there for ever, whatever timeout is set, when the
    store's host is silent. So a second thread watches what the first one has heard.
    """

    def __init__(self, host: str, port: int, attempt: str, rank: int, world_size: int):
        self.host, self.port, self.attempt = host, port, attempt
        self.rank = rank
        watched = range(1, world_size) if rank == 0 else range(1)
        self.keys = {other: f"heartbeat/{other}" for other in watched}
        self.heard: list[bytes] | None = None  # the last answer, until it was looked at
        self.stopping = threading.Event()
        self.talker = threading.Thread(target=self.talk, name="heartbeat", daemon=True)
        self.watcher = threading.Thread(target=self.watch, name="heartbeat watch", daemon=True)

    def start(self) -> None:
        self.talker.start()
        self.watcher.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Take leave, so that nobody misses this rank."""
        self.stopping.set()
        self.talker.join(HEARTBEAT_SECONDS)

    def talk(self) -> None:
        """Write this rank's heartbeat and read those of the ranks that it watches."""
        store = None
        for beat in itertools.count(1):
            leaving = self.stopping.wait(HEARTBEAT_SECONDS)
            try:
                # A connection of its own: a slow answer must not hold up the process group.
                store = store or self.connect()
                store.set(f"heartbeat/{self.rank}", LEFT if leaving else str(beat))
                self.heard = store.multi_get(list(self.keys.values()))
            except RuntimeError:
                store = None  # an answer that comes late would be taken for the next one's
            if leaving:
                return

    def connect(self) -> dist.Store:
        host = "localhost" if is_store_host(self.rank) else self.host
        store = dist.TCPStore(host, self.port, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return dist.PrefixStore(self.attempt, store)

    def watch(self) -> None:
        """Count the heartbeats that are missing.

        They are counted, not timed: after a machine was halted as a whole, none is missing.
        """
        last = dict.fromkeys(self.keys, b"")
        missed = dict.fromkeys(self.keys, 0)
        unanswered = 0
        while not self.stopping.wait(HEARTBEAT_SECONDS):
            heard, self.heard = self.heard, None
            if heard is None:
                unanswered += 1
                self.judge(unanswered, f"the store at {self.host}:{self.port}")
                continue
            unanswered = 0
            for other, value in zip(self.keys, heard, strict=True):
                silent = value == last[other] and value != LEFT.encode()
                missed[other] = missed[other] + 1 if silent else 0
                last[other] = value
                self.judge(missed[other], f"rank {other}")

    def judge(self, beats: int, who: str) -> None:
        """Name whoever has been silent for a minute. After two, end this process."""
        if self.stopping.is_set() or beats < BEATS_TO_WARN:
            return
        here = f"rank {self.rank} on {socket.gethostname()}"
        text = f"{here} has heard nothing of {who} for {beats * HEARTBEAT_SECONDS} s"
        if beats == BEATS_TO_WARN:
            script.say(f"warning: {text}")
        if beats >= BEATS_TO_END:
            sys.stderr.write(f"error: {text}; expected a sign of life; {WHAT_TO_CHECK}\n")
            sys.stderr.flush()
            os._exit(2)  # the main thread is inside a collective, where no exception reaches it


def check_main_has_not_left(store: dist.Store) -> None:
    """For who waits for what rank 0 does alone: a rank that was stopped there is not missed."""
    if store.get("heartbeat/0").decode() == LEFT:
        raise LostContact(
            "rank 0 has ended; expected it to finish what the others wait for; look for what it "
            "said before it ended"
        )


def end_with_launcher() -> None:
    """Ask for SIGTERM when torchrun dies, so that no rank outlives it. Linux only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # from Linux's prctl.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextlib.contextmanager
def stop_signals_end_at_once():
    """While connections are made in C++, Python's handlers would not run: there is nothing to save.

    Outside the main thread signals cannot be handled, and are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced = script.handle_stop_signals(signal.SIG_DFL)
    try:
        yield
    finally:
        for signum, handler in replaced.items():
            signal.signal(signum, handler)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
