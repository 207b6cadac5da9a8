"""support/runtime.py: the choice of device, dtype and kernels."""

import pytest
import torch
from tools import tiny_model
from torch.nn.attention import SDPBackend

from support import runtime
from support.runtime import Runtime, choose_device, choose_dtype, peak_flops
from support.script import UserError

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
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        real_ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *size, device=None: real_ones(*size))

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


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1"])
def test_a_device_whose_number_is_none_is_refused(machine, name):
    machine(cuda=True)
    with pytest.raises(UserError, match=f"--device {name} is not available"):
        choose_device(name)


def test_of_several_ranks_none_takes_mps_which_gloo_lacks(machine, monkeypatch):
    machine(mps=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("auto") == CPU


def test_a_gpu_whose_driver_is_too_old_is_not_passed_over_in_silence(machine, monkeypatch):
    machine(cuda=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(runtime.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    with pytest.raises(UserError, match="CUDA does not start; expected a driver for CUDA 13.0"):
        choose_device("auto")
    assert choose_device("cpu") == CPU


def test_a_gpu_beyond_the_last_is_refused(machine):
    machine(cuda=True)
    with pytest.raises(UserError, match="--device cuda:1 is not available; expected a GPU below 1"):
        runtime.start("cuda:1")


def test_a_rank_without_a_gpu_is_refused(machine, monkeypatch):
    machine(cuda=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 of this machine has no GPU: there are 1"):
        runtime.start("cuda")


def test_a_gpu_that_torch_has_no_code_for_is_refused(machine, monkeypatch):
    def ones(*size, device):
        raise RuntimeError("no kernel image is available for execution on the device")

    machine(cuda=True, card="Tesla V100-SXM2-16GB", capability=(7, 0))
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(UserError, match="Tesla V100-SXM2-16GB cannot multiply two numbers .no ker"):
        runtime.start("cuda")


@pytest.mark.parametrize("dtype, precision", [("float32", "highest"), ("bfloat16", "high")])
def test_who_asks_for_float32_on_cuda_gets_it(machine, monkeypatch, dtype, precision):
    machine(cuda=True)
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    runtime.start("cuda", dtype)
    assert chosen == [precision]


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
        with Runtime(device=CPU, dtype=dtype).autocast():
            assert (weight @ weight).dtype == dtype


def test_bfloat16_on_mps_needs_a_torch_whose_attention_is_right(monkeypatch):
    mps = torch.device("mps")
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    with pytest.raises(UserError, match="bfloat16 on MPS with torch 2.12.1"):
        choose_dtype("bfloat16", mps)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert choose_dtype("bfloat16", mps) == torch.bfloat16


# -------------------------------------------------------------------------------------- peaks


# Names as torch.cuda.get_device_name gives them.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    # Cards that have such a name within theirs, and are slower or faster, or not known.
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": None,
    "NVIDIA GB200": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA H20": None,
    "NVIDIA H800": None,
    "NVIDIA A800-SXM4-80GB": None,
    "NVIDIA A10": None,
    "NVIDIA L40": None,
    "NVIDIA RTX A1000": None,
    "NVIDIA RTX A1000 6GB Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA RTX 6000 Ada Generation": None,
    "Tesla V100-SXM2-16GB": None,
    "Tesla T4": None,
}


@pytest.mark.parametrize("card", PEAKS)
def test_the_peak_is_that_of_the_card_or_unknown(machine, card):
    machine(cuda=True, card=card)
    assert peak_flops(CUDA) == PEAKS[card]


def test_no_peak_is_known_for_float32(machine):
    machine(cuda=True, card="NVIDIA H200")
    assert peak_flops(CUDA, torch.float32) is None


def test_the_peak_of_a_cpu_is_unknown():
    assert peak_flops(CPU) is None


# ---------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    "capability, version, first",
    [
        ((9, 0), 91501, SDPBackend.CUDNN_ATTENTION),
        ((10, 0), 91501, SDPBackend.CUDNN_ATTENTION),
        ((9, 0), 91500, SDPBackend.FLASH_ATTENTION),  # wrong where 128 does not divide T
        ((9, 0), None, SDPBackend.FLASH_ATTENTION),
        ((8, 0), 91501, SDPBackend.FLASH_ATTENTION),  # slower there
        ((12, 0), 91501, SDPBackend.FLASH_ATTENTION),
    ],
)
def test_cudnn_attention_comes_first_where_it_is_right_and_faster(
    machine, monkeypatch, capability, version, first
):
    machine(cuda=True, capability=capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    kernels = Runtime(device=CUDA, dtype=torch.bfloat16).attention_kernels(1024)
    assert kernels[0] == first
    assert (SDPBackend.CUDNN_ATTENTION in kernels) == (first == SDPBackend.CUDNN_ATTENTION)


def test_compiled_code_is_kept_apart_by_its_order_of_kernels(machine, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    rt = Runtime(device=CUDA, dtype=torch.bfloat16)
    tags = set()
    with torch.compiler.config.patch(cache_key_tag=""):  # and put back in the end
        for capability in ((8, 0), (9, 0)):
            machine(cuda=True, capability=capability)
            rt.compile(torch.nn.Identity(), 1024)
            tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == 2


def test_on_a_cpu_the_unfused_kernel_is_for_short_bfloat16_alone():
    bfloat16 = Runtime(device=CPU, dtype=torch.bfloat16)
    float32 = Runtime(device=CPU, dtype=torch.float32)
    assert bfloat16.attention_kernels(512) == [SDPBackend.MATH]
    assert bfloat16.attention_kernels(513)[0] == SDPBackend.FLASH_ATTENTION
    assert float32.attention_kernels(512)[0] == SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize("dtype, fused", [(torch.float32, True), (torch.bfloat16, False)])
def test_attention_runs_in_a_kernel_of_the_list(dtype, fused):
    """A kernel is known by the operation that autograd records."""
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with Runtime(device=CPU, dtype=dtype).attention(8):
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert ("Flash" in y.grad_fn.name()) == fused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_attention_runs_in_the_preferred_kernel():
    q = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with Runtime(device=torch.device("cuda"), dtype=torch.bfloat16).attention(128):
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert "Cudnn" in y.grad_fn.name()


# ------------------------------------------------------------------------------- packed weights


def test_a_model_stays_as_it_is_where_torch_lacks_the_private_operators(monkeypatch):
    model = tiny_model().to(torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not runtime.pack_linears(model, rows=1)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 257)
