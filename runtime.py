"""Where we compute: this process's rank among the others, its device and its precision."""

import contextlib
import datetime
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from script import UserError, keep_freed_memory, silence_stdout


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

    def attention_backends(self, T: int) -> list[SDPBackend]:
        """The attention kernels for training at context T, fastest first by measurement (docs/benchmarks.md).

        On a CPU the fused kernel's bfloat16 backward is slow: plain matrix products beat it up to a context of about 512.
        """
        if self.device.type == "cuda":
            return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and T <= 512:
            return [SDPBackend.MATH]
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def attention(self, T: int):
        """A context in which scaled_dot_product_attention takes the first of them that serves."""
        return sdpa_kernel(self.attention_backends(T), set_priority=True)

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


# Dense bfloat16 matrix throughput in FLOP/s, from the vendors' datasheets; the denominator of MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "4090": 165e12, "3090": 71e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of the device in FLOP/s, or None where no datasheet figure is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
