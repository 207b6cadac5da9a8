"""Where and how a script runs: ranks, device, precision, signals, and the way errors become exit codes.

Every script calls `run_script(main)`. Bad input raises `UserError` where it is seen; `run_script` is the only
place that turns it, an `OSError` or a signal into an exit code (0; 2 bad input; 130 SIGINT; 143 SIGTERM).
"""

import contextlib
import ctypes
import datetime
import fcntl
import functools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

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
    except torch.OutOfMemoryError as error:
        code = 2
        message = f"error: {str(error).splitlines()[0]}; expected the work to fit in memory; lower --micro-batch or --seq-len"
    except BrokenPipeError:  # the reader of our output has gone, as in `python sample.py | head`
        silence_stdout()
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code, message = 2, f"error: {place}{error.strerror or error}; expected to read or write it; check the path, its permissions and the free space"
    except Exception:  # a fault of ours: the traceback is what a report needs
        traceback.print_exc()
        code = 1
    # A process group is left to die with the process on failure: destroying it would wait for the other ranks.
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    if message:
        print(message, file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)


def silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_flags(config_class: type[T], default: T, description: str, args: list[str] | None = None) -> T:
    """Command line from the fields of a dataclass; their comments are the help. Exits 2 on flags it does not know."""
    import tyro

    return tyro.cli(config_class, default=default, description=description, args=args)


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


@dataclass(frozen=True)
class Runtime:
    """This process's place among the others, and the device and precision it computes with."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and losses stay float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Print on rank 0, above any progress bar. When nobody reads standard output any more, go on in silence."""
        if self.is_main:
            try:
                tqdm.write("\n".join(lines))
                sys.stdout.flush()
            except BrokenPipeError:
                silence_stdout()

    def autocast(self):
        """The one autocast context, for training and evaluation alike."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def attention(self, T: int):
        """The attention kernels for training at context T, fastest first by measurement (docs/benchmarks.md).

        On a CPU the fused kernel's bfloat16 backward is slow: plain matrix products beat it up to a context of about 512.
        """
        if self.device.type == "cuda":
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            return sdpa_kernel(backends, set_priority=True)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and T <= 512:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks (gloo has no trustworthy average: sum, then divide)."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank, once every rank has come here."""
        if self.world_size == 1:
            return value
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values[0]

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock can be read."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        here = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"--device {name} is not available", expected=f"one of {here}", remedy="choose one of them or install a torch build for it")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # avx512_bf16 or AMX: below that bfloat16 is emulated and slower than float32.
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return torch.bfloat16 if fast else torch.float32


def start(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Join the process group when torchrun started us, else stand alone; settle device and precision."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = choose_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", where.index or 0)))
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    if where.type == "cpu":
        keep_freed_memory()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for the CPU too: unfused attention stays in bfloat16
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))
    return Runtime(rank, world_size, where, choose_dtype(dtype, where))


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


# Dense bfloat16 matrix throughput in FLOP/s, from the vendors' datasheets; the denominator of MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "4090": 165e12, "3090": 71e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of the device in FLOP/s, or None where no datasheet figure is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
