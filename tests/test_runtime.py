"""runtime.py: the choice of device, dtype and kernels, and what ranks tell each other."""

import json

import pytest
import torch
from tools import torchrun
from torch.nn.attention import SDPBackend

import runtime
from cli import UserError
from runtime import Runtime, choose_device, choose_dtype, peak_flops

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes torch report a machine with these devices and this card."""

    def pretend(cuda: bool = False, mps: bool = False, card: str = "", capability=(9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


# ------------------------------------------------------------------------------------- device


@pytest.mark.parametrize(
    "cuda, mps, chosen",
    [
        (False, False, "cpu"),
        (False, True, "mps"),
        (True, False, "cuda"),
        (True, True, "cuda"),
    ],
)
def test_auto_is_cuda_then_mps_then_the_cpu(machine, cuda, mps, chosen):
    machine(cuda=cuda, mps=mps)
    assert choose_device("auto") == torch.device(chosen)


def test_a_named_device_is_taken(machine):
    machine(cuda=True, mps=True)
    assert choose_device("cpu") == CPU
    assert choose_device("mps") == torch.device("mps")
    assert choose_device("cuda:3") == torch.device("cuda", 3)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "tpu", ""])
def test_a_device_that_is_not_there_is_refused_by_name(machine, name):
    machine()
    with pytest.raises(UserError, match=f"--device {name} is not available; expected one of cpu"):
        choose_device(name)


# -------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_dtype_on_cuda_is_bfloat16_from_ampere_on(machine, capability, dtype):
    machine(cuda=True, capability=capability)
    assert choose_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_dtype_on_a_cpu_is_bfloat16_where_it_multiplies_it(monkeypatch, instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    assert choose_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: False, "avx2": True})
    assert choose_dtype("auto", CPU) == torch.float32


def test_auto_dtype_on_mps_is_float32():
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_dtype_is_taken(name):
    assert choose_dtype(name, CPU) == getattr(torch, name)


def test_autocast_sets_the_dtype_of_matrix_products():
    weight = torch.randn(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with Runtime(0, 1, CPU, dtype).autocast():
            assert (weight @ weight).dtype == dtype


# -------------------------------------------------------------------------------------- peaks


@pytest.mark.parametrize(
    "card, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_card_or_unknown(machine, card, flops):
    machine(cuda=True, card=card)
    assert peak_flops(CUDA) == flops


def test_the_peak_of_a_cpu_is_unknown():
    assert peak_flops(CPU) is None


# ---------------------------------------------------------------------------------- attention


def test_on_a_cpu_the_unfused_kernel_is_for_short_bfloat16_alone():
    bfloat16 = Runtime(0, 1, CPU, torch.bfloat16)
    float32 = Runtime(0, 1, CPU, torch.float32)
    assert bfloat16.attention_kernels(512) == [SDPBackend.MATH]
    assert bfloat16.attention_kernels(513)[0] == SDPBackend.FLASH_ATTENTION
    assert float32.attention_kernels(512)[0] == SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize("dtype, fused", [(torch.float32, True), (torch.bfloat16, False)])
def test_attention_runs_in_a_kernel_of_the_list(dtype, fused):
    """A kernel is known by the operation that autograd records."""
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with Runtime(0, 1, CPU, dtype).attention(8):
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert ("Flash" in y.grad_fn.name()) == fused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_attention_runs_in_the_preferred_kernel():
    q = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with Runtime(0, 1, torch.device("cuda"), torch.bfloat16).attention(128):
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert "Cudnn" in y.grad_fn.name()


# ---------------------------------------------------------------------------------- processes

RANKS = """
import json, sys, torch, runtime
rt = runtime.start("cpu", "float32")
values = rt.sum(torch.tensor([1.0, 10.0]) * (rt.rank + 1))
answers = {
    "rank": rt.rank,
    "world_size": rt.world_size,
    "sum": values.tolist(),
    "largest": rt.largest(rt.rank + 3),
    "broadcast": rt.broadcast({"rank": rt.rank}),
}
rt.say("said by rank", str(rt.rank))
open(f"{sys.argv[1]}/{rt.rank}.json", "w").write(json.dumps(answers))
torch.distributed.destroy_process_group()
"""


def test_two_ranks_sum_compare_and_share_values(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "world_size": 2,
            "sum": [3.0, 30.0],
            "largest": 4,
            "broadcast": {"rank": 0},
        }
    assert done.stdout == "said by rank\n0\n"  # rank 1 is silent


def test_one_process_needs_no_process_group():
    rt = runtime.start("cpu", "float32")
    assert not torch.distributed.is_initialized()
    assert rt.is_main
    assert rt.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert rt.largest(3) == 3
    assert rt.broadcast("x") == "x"
