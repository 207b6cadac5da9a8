"""Run the CUDA paths on fake tensors, and write down what a real GPU would have been asked to do.

    python tests/fake_cuda.py fake_cuda.so report.json

fake_cuda.so is made from fake_cuda.cpp. test_cuda_guard.py does both, and checks the report: for
each piece of work its attention kernels, the places where the host waits for the GPU, and the
operations that mix devices.

This needs a process of its own, since what torch believes of its GPU is for the whole process.
"""

import ctypes
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before torch, which asks only once whether there is a GPU

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402
from model import GPT, GPTConfig, NextTokenLoss  # noqa: E402
from sample import generate  # noqa: E402
from support.optimizer import (  # noqa: E402
    Optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from support.report import UpdateLog  # noqa: E402
from support.runtime import Runtime, start  # noqa: E402
from support.spikes import SpikeGuard  # noqa: E402
from tokens import get_encoding, token_bytes  # noqa: E402

CUDA = torch.device("cuda", 0)
CUDNN_VERSION = 91501  # the first that is right at every context

# ------------------------------------------------------------------------------- the GPU


def pretend_that_there_is_an_h100() -> None:
    """From now on torch reports one H100, and fake tensors can lie on it."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_arch_list": ["sm_80", "sm_90"],
        "is_bf16_supported": True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    torch.backends.cudnn.version = lambda: CUDNN_VERSION
    # Otherwise fake tensors would begin with a real one, now that there is a GPU.
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    FakeTensor.tolist = read_list
    # Where nobody has chosen the kernels, torch takes unfused attention from now on, and it shows.
    # A real H100's order depends on what the process has done before.
    kernels = ("MATH", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
    torch._C._set_sdp_priority_order([int(getattr(SDPBackend, name)) for name in kernels])


# ------------------------------------------------------------------------------ the record

# The host waits in these: the first checks its input's values, and the size of what the others
# return depends on values.
WAITING = ("multinomial", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")


class Record(TorchDispatchMode):
    """Notes attention kernels, waits and mixed devices of all that runs while it is entered.

    A value that the host asks for is 0, or 1 if it is a floating-point number. Tensors on the CPU
    stay real, for numpy to read.
    """

    current: "Record"

    def __init__(self):
        super().__init__()
        self.kernels = Counter()
        self.waits = Counter()
        self.mixed = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and operation.namespace == "aten":
            # There an operation that is made of others comes as a whole.
            with self:
                result = operation.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if not involves_cuda(args, kwargs):
            with unset_fake_temporarily():
                return operation(*args, **kwargs)

        name = operation.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.kernels[name.removeprefix("_scaled_dot_product_")] += 1
        if mixes_devices(args):
            self.mixed[f"{place()} {name}"] += 1
        wait = wait_of(name, args, kwargs)
        if wait:
            self.waits[f"{place()} {wait}"] += 1
        if wait == READ:
            return 1.0 if args[0].dtype.is_floating_point else 0
        if wait == TO_HOST:
            return on_the_host(args[0], kwargs.get("dtype"))
        return operation(*args, **kwargs)


READ, TO_HOST, TO_GPU = "a value read", "copied to the host", "copied to the GPU"


def wait_of(name: str, args: tuple, kwargs: dict) -> str | None:
    """What the host waits for in an operation, or None where it only asks for work."""
    if name == "_to_copy":
        target = torch.device(kwargs.get("device") or args[0].device).type
        if is_on_cuda(args[0]):
            return TO_HOST if target == "cpu" else None
        return None if kwargs.get("non_blocking") else TO_GPU
    if name == "copy_" and is_on_cuda(args[0]) != is_on_cuda(args[1]):
        return "copied between devices"
    if not args or not is_on_cuda(args[0]):
        return None
    if name == "_local_scalar_dense":
        return READ
    waits = name in WAITING
    if name == "index":
        waits = any(i is not None and i.dtype == torch.bool for i in args[1])
    return name if waits else None


def mixes_devices(args: tuple) -> bool:
    """Whether a list of tensors on the GPU has another beside it with tensors on the CPU.

    Fake tensors let CPU scalars pass everywhere. A real fused optimizer would read one by an
    address that the GPU does not have.
    """
    devices = set()
    for arg in args:
        if isinstance(arg, list | tuple):
            devices |= {leaf.device.type for leaf in arg if isinstance(leaf, torch.Tensor)}
    return len(devices) > 1


def read_list(tensor: FakeTensor) -> list:
    """tensor.tolist(), which is one wait, where a fake tensor's would ask for each element."""
    Record.current.waits[f"{place()} a list read"] += 1
    return (on_the_host(tensor, None) + 1).tolist()


def on_the_host(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A real tensor of zeros in place of a fake one."""
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=dtype or tensor.dtype)


def involves_cuda(args: tuple, kwargs: dict) -> bool:
    """Whether an operation reads a tensor on the GPU, or makes one there."""
    if torch.device(kwargs.get("device") or "cpu").type == "cuda":
        return True
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))


def is_on_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def place() -> str:
    """File and line of the project's code that runs now."""
    frame = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.parent in (ROOT, ROOT / "support"):
            return f"{file.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"  # autograd has a thread of its own for each GPU


# -------------------------------------------------------------------------------- the work


def record(work: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Do some work on fake tensors; returns what `Record` has noted of it."""
    Record.current = Record()
    with Record.current as noted:
        work()
    return {
        "kernels": dict(noted.kernels),
        "waits": dict(noted.waits),
        "mixed": dict(noted.mixed),
    }


class Tokens:
    """As many tokens as an evaluation of four batches reads."""

    def __len__(self):
        return 4 * 2 * T + 1

    def windows(self, indices, T):
        return np.zeros((len(indices), T + 1), dtype=np.int64)


T = 128
CONFIG = train_gpt2.TrainConfig(
    n_layer=2,
    n_head=2,
    n_embd=128,
    seq_len=T,
    total_batch_tokens=4 * 2 * T,
    micro_batch=2,
    eval_tokens=4 * 2 * T,
    compile=False,
)


def sample(model: GPT, rt: Runtime) -> None:
    idx = torch.zeros(3, 5, dtype=torch.long, device=CUDA)
    with rt.autocast():
        generate(model, idx, 33, top_k=50, stop_token=0)


def score(model: GPT, rt: Runtime) -> None:
    item = hellaswag.Item("She", (" sits down.", " eats.", " runs away.", " sleeps now."), 0)
    hellaswag.evaluate(model, get_encoding("bytes"), [item] * 4, rt=rt)


def train_step(loss_fn: NextTokenLoss, optimizer: Optimizer, rt: Runtime) -> dict:
    batch = torch.zeros(4 * 2, T + 1, dtype=torch.long)
    return train_gpt2.train_step(loss_fn, optimizer, batch, CONFIG, rt)


def three_logged_steps(loss_fn: NextTokenLoss, optimizer: Optimizer, rt: Runtime) -> None:
    run = SimpleNamespace(elapsed=0.0, log=lambda *args, **values: None)
    progress = SimpleNamespace(step_done=lambda *args: {})
    updates = UpdateLog(run, SpikeGuard(skips=False), progress, rt)
    for step in range(3):
        updates.add(step + 1, 1e-3, train_step(loss_fn, optimizer, rt))


def run_everything() -> dict[str, dict]:
    """The report: what `Record` has noted of each piece of work."""
    rt = start("cuda", "auto")
    with torch.device(CUDA):
        model = GPT(GPTConfig(2, 2, 128, block_size=T, vocab_size=257))
    report = {}
    report["33 tokens"] = record(lambda: sample(model, rt))
    report["HellaSwag of 1 batch"] = record(lambda: score(model, rt))
    bytes_per_token = token_bytes(get_encoding("bytes"))
    report["evaluation of 4 batches"] = record(
        lambda: train_gpt2.evaluate(model, Tokens(), CONFIG, rt, bytes_per_token)
    )
    loss_fn = NextTokenLoss(model)
    for name in ("adamw", "muon"):
        config = replace(CONFIG, optimizer=name)
        optimizer = train_gpt2.build_optimizer(model, config)
        step = functools.partial(train_step, loss_fn, optimizer, rt)
        report[f"first step, {name}"] = record(step)

        saved = optimizer_tensors(model, optimizer)
        optimizer = train_gpt2.build_optimizer(model, config)
        load_optimizer_tensors(model, optimizer, saved, step=1)
        step = functools.partial(train_step, loss_fn, optimizer, rt)
        report[f"step after loading, {name}"] = record(step)
    report["three logged steps"] = record(lambda: three_logged_steps(loss_fn, optimizer, rt))
    return report


if __name__ == "__main__":
    pretend_that_there_is_an_h100()
    with FakeTensorMode(allow_non_fake_inputs=True):
        report = run_everything()
    Path(sys.argv[2]).write_text(json.dumps(report, indent=2))
