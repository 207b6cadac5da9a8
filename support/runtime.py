"""Where we compute: this process's rank among the others, its device and its precision.

`start()` makes the one `Runtime` of a process. Everything that depends on ranks, devices, dtypes or
attention kernels asks it; the model knows of none of them.
"""

import contextlib
import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from support import ranks
from support.ranks import Ranks
from support.script import UserError


@dataclass(frozen=True, kw_only=True)
class Runtime(Ranks):
    """This process's place among the ranks, and the device and precision it computes with."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and losses stay float32

    def autocast(self):
        """The one autocast context, for training and evaluation alike."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def attention_kernels(self, T: int) -> list[SDPBackend]:
        """The attention kernels for training at context T, the preferred one first."""
        if unfused_attention_is_faster(self.device, self.dtype, T):
            return [SDPBackend.MATH]
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if cudnn_attention_is_faster(self.device):
            kernels.insert(0, SDPBackend.CUDNN_ATTENTION)
        return kernels

    def attention(self, T: int):
        """A context in which scaled_dot_product_attention takes the first kernel that it can."""
        return sdpa_kernel(self.attention_kernels(T), set_priority=True)

    def compile(self, module: torch.nn.Module, T: int) -> torch.nn.Module:
        """The module compiled for training at context T; the module itself stays as it is."""
        # The cache of compiled code on disk does not know which attention kernels were asked for
        # (pytorch #185449): without this a process would run what another one compiled for others.
        kernels = [kernel.name for kernel in self.attention_kernels(T)]
        torch.compiler.config.cache_key_tag = " ".join(kernels)
        # DDP's averaging of gradients breaks the graph.
        return torch.compile(module, dynamic=False, fullgraph=self.world_size == 1)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock can be read."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


# Rows of logits, each as long as the vocabulary, that are in memory at once: in the loss and in
# HellaSwag's head. More gains no speed, fewer leave matrix units idle.
LOGIT_ROWS = {"cpu": 512, "cuda": 8192, "mps": 4096}

# The vocabulary is padded to a multiple of this inside both: matrix units work on aligned sizes,
# and 50257 is odd. On a CPU it saves 5% of a training step.
PAD_VOCABULARY_TO = 64


# ---------------------------------------------------------------------------------------- start


def start(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Join the process group if torchrun has started us; settle device and precision."""
    rank, world_size = ranks.place()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = cuda_device_of_rank(chosen)
        torch.cuda.set_device(chosen)
    chosen_dtype = choose_dtype(dtype, chosen)
    if chosen.type == "cuda":
        # In a bfloat16 run the few float32 products may be TF32; who asks for float32 gets it.
        precision = "highest" if chosen_dtype == torch.float32 else "high"
        torch.set_float32_matmul_precision(precision)
    if chosen.type == "cpu" or rank == 0:
        keep_freed_memory()  # on a GPU for the copies that checkpoints are written from
    if chosen.type == "cpu":
        # Despite its name it rules the CPU too: unfused attention stays in bfloat16.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    patient = ranks.join(chosen) if world_size > 1 else None
    return Runtime(rank, world_size, patient, device=chosen, dtype=chosen_dtype)


def choose_device(name: str) -> torch.device:
    """The device called `name`. `auto` is CUDA, else Apple's MPS, else the CPU.

    Gloo cannot send what lies on MPS, so of several ranks each takes the CPU there.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available() and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    elif name == "auto" and torch.version.cuda and Path("/dev/nvidia0").exists():
        raise UserError(
            "there is an NVIDIA GPU, but CUDA does not start; expected a driver for CUDA "
            f"{torch.version.cuda}, which this torch was built for; update the driver, install a "
            "torch built for it, or use --device cpu"
        )
    if name == "auto":
        name = available[0]
    kind, colon, number = name.partition(":")
    if kind not in available or (colon and not re.fullmatch("[0-9]{1,2}", number)):
        raise UserError(
            f"--device {name} is not available; expected one of {', '.join(available)}; choose one "
            "of them, or install a build of torch for it"
        )
    return torch.device(name)


def cuda_device_of_rank(device: torch.device) -> torch.device:
    """The GPU of this process: under torchrun each rank of a machine has one of its own."""
    index = int(os.environ.get("LOCAL_RANK", device.index or 0))
    count = torch.cuda.device_count()
    if index >= count and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"--device {device} is not available; expected a GPU below {count}, the number of this "
            "machine's GPUs; choose one of them"
        )
    if index >= count:
        raise UserError(
            f"process {index} of this machine has no GPU: there are {count}; expected a GPU for "
            f"each process; start torchrun with --nproc_per_node={count}, or train with --device "
            "cpu"
        )
    device = torch.device("cuda", index)
    try:
        torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)
    except RuntimeError as error:  # as "no kernel image is available for execution on the device"
        raise UserError(
            f"{torch.cuda.get_device_name(device)} cannot multiply two numbers ({error}); expected "
            "a GPU that this torch was built for; install a torch that was built for it, or use "
            "--device cpu"
        ) from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`. `auto` is bfloat16 where the hardware has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name == "bfloat16" and device.type == "mps" and torch_version() < (2, 13):
        # Its attention sees future tokens there (pytorch #195910).
        raise UserError(
            f"bfloat16 on MPS with torch {torch.__version__}; expected torch 2.13 or later; update "
            "torch, or use float32"
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products. Emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        instructions = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is Arm's
        return any(capabilities.get(name) for name in instructions)
    return False


def masked_attention(device: torch.device):
    """A context with the kernels for attention with a mask: HellaSwag's rows and the cache.

    On CUDA FlashAttention takes no mask. cuDNN takes one, but builds a plan for each new shape, and
    there are many here. Without this context the choice would depend on torch's version and on the
    card.
    """
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        kernels.insert(0, SDPBackend.FLASH_ATTENTION)  # the CPU's takes a mask
    return sdpa_kernel(kernels, set_priority=True)


def cudnn_attention_is_faster(device: torch.device) -> bool:
    """Whether cuDNN's attention kernel comes first on this GPU.

    It is 1.7 to 2.3 times as fast as the others on Hopper, and slower on A100 (0.82) and on
    consumer Blackwell (0.88). Before cuDNN 9.15.1 it was wrong at contexts that 128 does not divide
    (pytorch #169849, #171627). The figures are from those reports; none was measured here.
    """
    if device.type != "cuda":
        return False
    major, _ = torch.cuda.get_device_capability(device)
    version = torch.backends.cudnn.version() or 0
    return major in (9, 10) and version > 91500


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


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes that this process has held; on CUDA only those of tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------------------- packed weights


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight is in oneDNN's layout for products with few rows.

    The two operators are private to torch: this is the one place that calls such. torch.compile
    would use the same two for constant weights, after a minute of compiling.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module, rows: int) -> bool:
    """Make a GPT generate `rows` texts faster, in place; returns whether that was possible.

    It is possible for bfloat16 weights on a CPU with bfloat16 products, as long as torch has the
    operators. A packed model can neither be trained nor saved.
    """
    weight = model.head_weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, rows))
    model.head = PackedLinear(weight, None, rows).forward  # the head is a method, not a layer
    return True


# ---------------------------------------------------------------------------------------- peaks

# Dense bfloat16 matrix throughput in FLOP/s, from the vendors' datasheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

# What else torch's name of such a card holds: the memory, the module. A name with anything more is
# another card: a laptop's, a slice of one (MIG), an RTX A1000.
DETAILS = re.compile(r"GeForce|HBM3e?|SXM\d?|PCIE|\d+ ?GB", re.IGNORECASE)


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """The device's dense peak in FLOP/s with that dtype, or None where no figure is known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").removeprefix("NVIDIA ")
    if name in PEAK_FLOPS:
        return PEAK_FLOPS[name]
    return PEAK_FLOPS.get(" ".join(DETAILS.sub(" ", name).split()))
