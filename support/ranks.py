"""How the ranks of a run meet, agree and end together; sums in an order of their own.

torchrun starts the processes and tells each one its rank, how many there are, and the address of a
store: a small server of keys and values that all can reach. `join()` lets them meet there. `Ranks`
is what they tell each other from then on. `GradientTree` sums gradients in an order that does not
depend on the number of ranks.
"""

import contextlib
import datetime
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import script
from support.script import UserError, require

MEETING_SECONDS = 300  # how long a rank waits for the others to come
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)  # how long it waits for them from then on
PATIENCE = datetime.timedelta(days=1)  # and for what rank 0 does alone
FIRST_WORD_SECONDS = 30  # after which it says so, and again whenever ten times as long has passed

ANSWER_SECONDS = 3  # how long a rank may take to answer when another one is lost

WHAT_TO_CHECK = "see the table of symptoms in docs/scaling.md"


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run, and what they tell each other.

    `ALONE` is that of a process without others.
    """

    rank: int = 0
    world_size: int = 1
    patient: dist.ProcessGroup | None = None  # all ranks, with PATIENCE; None for a process alone

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Print on rank 0, above any progress bar."""
        if self.is_main:
            script.say(*lines)

    # ------------------------------------------------------------------------------ numbers

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place. Gloo has no reliable average: sum, then divide."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max_over_ranks(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank, once all ranks have come here."""
        return self.gather(value)[0]

    def send_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors of equal shapes on all ranks those of rank 0."""
        for tensor in tensors:
            self.send(tensor, source=0)

    def send(self, tensor: Tensor, source: int) -> None:
        """Make a tensor, of equal shape on all ranks, that of one rank."""
        if self.world_size > 1:
            dist.broadcast(tensor.detach(), src=source)

    # --------------------------------------------------------------------- work and its failure

    def on_main(self, work: Callable, *args, share: bool = True) -> Any:
        """Call `work(*args)` on rank 0 alone; returns its result on every rank.

        Rank 0 may take as long as it needs. Where it fails all ranks end: rank 0 with the error,
        the others with a line that repeats it. share: without it the others get None, as of a
        result that is large.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work(*args)
            except Exception as caught:
                error = caught
        self._wait_for_main(work)
        shared = result if share else None
        reason, shared = self.broadcast((error and script.describe(error), shared))
        if error:
            raise error
        if reason:
            self._end_with(0, reason)
        return result if self.is_main else shared

    def on_all(self, work: Callable, *args) -> Any:
        """Call `work(*args)` on every rank. Where one fails all end, as by `on_main`."""
        result, error = None, None
        try:
            result = work(*args)
        except Exception as caught:
            error = caught
        reasons = self.gather(error and script.describe(error))
        for rank, reason in enumerate(reasons):
            if reason and rank == self.rank:
                raise error
            if reason:
                self._end_with(rank, reason)
        return result

    def raise_on_all(self, error: Exception) -> NoReturn:
        """End all ranks, which have found the same error: rank 0 with it."""
        if self.is_main:
            raise error
        self._end_with(0, str(error))

    def _end_with(self, other: int, reason: str) -> NoReturn:
        """End this rank, since another one has failed."""
        raise UserError(f"rank {self.rank} ends, since rank {other} has failed: {reason}")

    def _wait_for_main(self, work: Callable) -> None:
        """Wait until rank 0 has come here.

        Its word comes by gloo, whose connection breaks when rank 0's process ends, for whatever
        reason.
        """
        if self.world_size == 1:
            return
        word = dist.broadcast(torch.zeros(1), src=0, group=self.patient, async_op=True)
        speaks = self.rank == 1 or os.environ.get("LOCAL_RANK") == "0"  # one on each machine
        began = time.monotonic()
        next_word, pause = FIRST_WORD_SECONDS, 0.001
        while not word.is_completed():  # unlike wait() it lets Python handle signals
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            waited = time.monotonic() - began
            if speaks and waited > next_word:
                name = getattr(work, "__name__", "its work").strip("_").replace("_", " ")
                script.say(f"rank {self.rank} has waited {waited:.0f} s for rank 0: {name}")
                next_word *= 10
        word.wait()

    # ---------------------------------------------------------------------------- agreement

    def same_on_all(self, values: dict[str, Any], expected: str) -> None:
        """End all ranks unless each has the values, by name, that rank 0 has; say which differ."""
        of_ranks = self.gather(values)
        different = [rank for rank, other in enumerate(of_ranks) if other != of_ranks[0]]
        if not different:
            return
        other = of_ranks[different[0]]
        # Another version of the code may have other names.
        names = ", ".join(name for name in values if other.get(name) != of_ranks[0].get(name))
        self.raise_on_all(
            UserError(
                f"the flags or the data of rank {', '.join(map(str, different))} differ from rank "
                f"0's: {names}; expected {expected}; start all ranks with one command, on the same "
                "data"
            )
        )

    def check_equal(self, tensors: Iterable[Tensor], what: str) -> None:
        """End all ranks where the bits of one rank's float32 tensors are not those of the others.

        All ranks make the same updates. So this is a fault of a machine, such as a bit that flipped
        in its memory. Which rank is wrong is a matter of majority, and of two ranks it is open.
        """
        if self.world_size == 1:
            return
        sums = self.gather(checksum(tensors))
        usual = max(sums, key=sums.count)  # the first of those that are equally frequent: rank 0's
        different = [str(rank) for rank, value in enumerate(sums) if value != usual]
        if different:
            self.raise_on_all(
                UserError(
                    f"{what} of rank {', '.join(different)} are not those of rank "
                    f"{sums.index(usual)}; expected the same bits on every rank; nothing was "
                    "saved; continue with --resume from the last checkpoint, which is sound, and "
                    "test the machines' memory if it happens again"
                )
            )


ALONE = Ranks()


def checksum(tensors: Iterable[Tensor]) -> int:
    """A sum over the bits of float32 tensors, which any single flipped bit changes.

    It is one pass over them, where they are; on a GPU the host waits once, for the sum.
    """
    sums = []
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(torch.int32)
        # torch makes 64-bit integers of all before it adds them, so a large tensor goes in pieces.
        sums += [piece.sum() for piece in bits.split(2**19)]
    return int(torch.stack(sums).sum())


# --------------------------------------------------------------------------- sums in a fixed order


class GradientTree:
    r"""Gradients summed in an order that does not depend on the number of ranks.

    Floating-point addition is not associative: (a + b) + c and a + (b + c) differ in the last bits.
    DDP sums each rank's micro-batches first and the ranks after, so another number of ranks gives
    other bits. Here the micro-batches of a step, numbered over all ranks, are the leaves of one
    binary tree, and every addition of that tree is made, by whichever rank.

        micro-batch   0   1   2   3   4   5   6   7
                       \ /     \ /     \ /     \ /
                         \     /         \     /
                          \   /           \   /        one rank sums a whole subtree,
                             \___________/            all ranks together sum the top

    It needs numbers of ranks, and of micro-batches on each, that are powers of two (`check_tree`).
    It costs the memory of log2(micro-batches) + 1 gradients, and every rank receives the gradients
    of all others, where DDP exchanges two.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks):
        self.parameters = list(parameters)
        self.ranks = ranks
        # Like a binary counter: two sums of equally many micro-batches become one of twice as many.
        self.sums: list[tuple[int, list[Tensor]]] = []  # (micro-batches in it, loss and gradients)

    def take(self, loss: Tensor) -> None:
        """Add a micro-batch's loss, and the gradients that its backward pass has left."""
        tensors = [loss.detach(), *(p.grad for p in self.parameters)]
        for p in self.parameters:
            p.grad = None  # or the next backward pass would add to it
        count = 1
        while self.sums and self.sums[-1][0] == count:
            _, earlier = self.sums.pop()
            tensors = [a + b for a, b in zip(earlier, tensors, strict=True)]
            count *= 2
        self.sums.append((count, tensors))

    def finish(self) -> Tensor:
        """Set every gradient to the sum over micro-batches and ranks; returns that of the loss."""
        ((_, tensors),) = self.sums
        loss, *gradients = [self._sum_over_ranks(tensor) for tensor in tensors]
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        self.sums = []
        return loss

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, pair by pair, on every rank."""
        if self.ranks.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.ranks.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]


def check_tree(micro_batches: int, world_size: int) -> None:
    """Raise UserError unless the ranks' micro-batches form a whole tree."""
    for number, name in (
        (world_size, "ranks"),
        (micro_batches, "micro-batches a step on each rank"),
    ):
        require(
            number & (number - 1) == 0,
            f"{number} {name} in a deterministic run; expected a power of two; change the number "
            "of ranks, --micro-batch or --total-batch-tokens",
        )


# ---------------------------------------------------------------------------------------- place


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 for a process that was started alone.

    torchrun says them in RANK and WORLD_SIZE.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            take_place_from_slurm()
            return place()  # srun may have set PMI_SIZE too
        for launcher, name in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpiexec", "PMI_SIZE")):
            tasks = os.environ.get(name, "1")  # each would take itself for the only one
            require(
                tasks == "1",
                f"{launcher} has started {tasks} processes, without RANK and WORLD_SIZE; expected "
                "torchrun, which sets them; where each process shall be a run of its own, set "
                "WORLD_SIZE=1",
            )
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    are_numbers = rank.isdecimal() and world_size.isdecimal()
    require(
        are_numbers and int(rank) < int(world_size),
        f"RANK is {rank!r}, and WORLD_SIZE is {world_size!r}; expected ranks from 0 to WORLD_SIZE "
        "- 1; start the ranks with torchrun, which sets both, or unset both",
    )
    return int(rank), int(world_size)


def take_place_from_slurm() -> None:
    """Say in torchrun's words where srun has put this process: each task is a rank."""
    slurm = os.environ
    # The first host of a list such as gpu[07-09,12],cpu1.
    name, number = re.match(r"([^,\[]+)(?:\[(\w+))?", slurm["SLURM_STEP_NODELIST"]).groups()
    slurm["RANK"] = slurm["SLURM_PROCID"]
    slurm["WORLD_SIZE"] = slurm["SLURM_STEP_NUM_TASKS"]
    slurm["LOCAL_RANK"] = slurm["SLURM_LOCALID"]
    slurm.setdefault("MASTER_ADDR", name + (number or ""))
    slurm.setdefault("MASTER_PORT", str(15_000 + int(slurm["SLURM_JOB_ID"]) % 15_000))


def require_named_run(out: str, resume: bool) -> None:
    """Raise UserError where torchrun may restart a job that does not say which run is its own.

    A restarted process has the same arguments. Without --out and --resume it would begin a new run.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    require(
        restarts == "0" or bool(out and resume),
        f"--max-restarts {restarts} without --out and --resume; expected both, so that a restart "
        "goes on with this run; add --out FOLDER --resume, which starts the run if there is none",
    )


# -------------------------------------------------------------------------------------- meeting


def join(device: torch.device) -> dist.ProcessGroup:
    """Meet the other ranks and start the process groups; returns the patient one."""
    rank, world_size = place()
    host, port = address_of_store()
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    backend, device_id = "gloo", None
    if device.type == "cuda":
        # Tensors on the CPU travel by gloo, so that a vote does not wait for the GPU.
        backend, device_id = "cpu:gloo,cuda:nccl", device
    with stop_signals_end_at_once():
        if not is_host:
            wait_for_store(host, port, rank)
        try:
            connection = dist.TCPStore(
                "localhost" if is_host else host,  # its host reaches it whatever others call it
                port,
                is_master=is_host,
                timeout=COLLECTIVE_TIMEOUT,
                wait_for_workers=False,
                multi_tenant=True,
            )
            store = dist.PrefixStore(agree_on_name(connection, rank, world_size), connection)
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device_id,
            )
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise UserError(
                f"rank {rank} on {socket.gethostname()} has no connection to the other ranks at "
                f"{host}:{port} ({first_line(error)}); expected a free port on rank 0's machine, "
                "which all others reach; torchrun --standalone finds one, GLOO_SOCKET_IFNAME names "
                f"the network, and {WHAT_TO_CHECK}"
            ) from None
    script.who_is_lost = lambda: lost_ranks(rank, world_size, patient)
    return patient


def lost_ranks(rank: int, world_size: int, group: dist.ProcessGroup) -> str:
    """Which ranks no longer answer, asked by one whose collective has failed.

    The connection to a process that has died is closed. The others ask, too, and thereby answer.
    """
    words = {}
    closed = []
    for other in range(world_size):
        if other == rank:
            continue
        try:
            dist.isend(torch.zeros(1), other, group)
            words[other] = dist.irecv(torch.zeros(1), other, group)
        except RuntimeError:
            closed.append(other)
    if not closed:
        time.sleep(ANSWER_SECONDS)
    lost = closed or [other for other, word in words.items() if not word.is_completed()]
    return f"rank {', '.join(map(str, lost))}" if lost else "another rank"


def address_of_store() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    require(
        bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
        f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, MASTER_ADDR is {host!r} and MASTER_PORT "
        f"{port!r}; expected the address at which the ranks meet, as torchrun sets it; start the "
        "ranks with torchrun, or unset WORLD_SIZE",
    )
    return host, int(port)


def wait_for_store(host: str, port: int, rank: int) -> None:
    """Wait until something listens there. torch would wait, too, but would not say why in vain."""
    deadline = time.monotonic() + MEETING_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            require(
                time.monotonic() < deadline,
                f"rank {rank} on {socket.gethostname()} waited {MEETING_SECONDS} s for rank 0 at "
                f"{host}:{port} ({error.strerror or error}); expected all ranks to be started "
                f"within that time; {WHAT_TO_CHECK}",
            )
            time.sleep(0.2)


def agree_on_name(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that the ranks of this attempt have in common, and no earlier attempt had.

    torchrun keeps its store when it restarts the workers, and with it the addresses of those that
    died; whoever reads them dials a process that is gone. So the keys of each attempt begin with a
    name of its own, which the ranks find here. (torchrun's count of restarts would not do: an agent
    that joins later has counted fewer.)

    Each rank writes a fresh token where rank 0 looks for it, and waits for the answer to that
    token, which is rank 0's own. What earlier attempts have left is answered in vain, or
    overwritten.
    """
    token = secrets.token_hex(8)
    if rank > 0:
        store.set(f"call/{rank}", token)
        store.wait([f"answer/{token}"], datetime.timedelta(seconds=MEETING_SECONDS))
        name = store.get(f"answer/{token}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    deadline = time.monotonic() + MEETING_SECONDS
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{token}/{other}"]):
                missing.remove(other)
            elif store.check([f"call/{other}"]):
                store.set(f"answer/{store.get(f'call/{other}').decode()}", token)
        require(
            not missing or time.monotonic() < deadline,
            f"rank 0 waited {MEETING_SECONDS} s for rank {', '.join(map(str, sorted(missing)))} of "
            f"{world_size}; expected all ranks to be started within that time; {WHAT_TO_CHECK}",
        )
        time.sleep(0.01)
    return token


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
