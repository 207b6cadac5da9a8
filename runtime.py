"""Where we compute: this process's rank among the others, its device and its precision.

`start()` makes the one `Runtime` of a process. Everything that depends on ranks, devices, dtypes or
attention kernels asks it; the model knows of none of them.
"""

import contextlib
import ctypes
import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
from cli import UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # how long a rank waits for the others


@dataclass(frozen=True)
class Runtime:
    """This process's place among the others, and the device and precision it computes with."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and losses stay float32

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Print on rank 0, above any progress bar."""
        if self.is_main:
            cli.say(*lines)

    # ------------------------------------------------------------------------------- precision

    def autocast(self):
        """The one autocast context, for training and evaluation alike."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def attention_kernels(self, T: int) -> list[SDPBackend]:
        """The attention kernels for training at context T, the preferred one first."""
        if self.device.type == "cuda":
            return [
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            ]
        if unfused_attention_is_faster(self.device, self.dtype, T):
            return [SDPBackend.MATH]
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def attention(self, T: int):
        """A context in which scaled_dot_product_attention takes the first kernel that it can."""
        return sdpa_kernel(self.attention_kernels(T), set_priority=True)

    # ----------------------------------------------------------------------------- collectives

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks. Gloo has no reliable average: sum, then divide."""
        if self.world_size == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank, once all ranks have come here."""
        if self.world_size == 1:
            return value
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values[0]

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock can be read."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


# ---------------------------------------------------------------------------------------- start


def start(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Join the process group if torchrun has started us; settle device and precision."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    if chosen.type == "cpu":
        keep_freed_memory()
        # Despite its name it rules the CPU too: unfused attention stays in bfloat16.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return Runtime(rank, world_size, chosen, choose_dtype(dtype, chosen))


def choose_device(name: str) -> torch.device:
    """The device called `name`. `auto` is CUDA, else Apple's MPS, else the CPU."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    kind = name.split(":")[0]
    if kind not in available:
        raise UserError(
            f"--device {name} is not available",
            expected=f"one of {', '.join(available)}",
            remedy="choose one of them, or install a build of torch for it",
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`. `auto` is bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products. Emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        instructions = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is Arm's
        return any(capabilities.get(name) for name in instructions)
    return False


def unfused_attention_is_faster(device: torch.device, dtype: torch.dtype, T: int) -> bool:
    """Whether plain matrix products beat the fused attention kernel in training at context T.

    On a CPU the fused kernel's bfloat16 backward pass is slow. Measured on Zen 4 the two are equal
    at a context of about 512 (docs/benchmarks.md).
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and T <= 512


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the kernel.

    By default every large tensor is mapped afresh, and touching its pages for the first time costs
    more than the arithmetic on it: about a million page faults a training step at 124M parameters.
    The effect is that of MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment.
    Other C libraries have no such setting and do without.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


# ---------------------------------------------------------------------------------------- peaks

# Dense bfloat16 matrix throughput in FLOP/s, from the vendors' datasheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None where no datasheet figure is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for card, flops in PEAK_FLOPS.items():
        if card in name:
            return flops
    return None
