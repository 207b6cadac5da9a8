"""The CUDA paths, run on fake tensors of an H100: fake_cuda.py runs them, here is what must hold.

Fake tensors have a device and a shape, and no values, so no figure is checked, and nothing that is
compiled. What is seen is which attention kernel torch would take, where the host would wait for the
GPU, and whether devices are mixed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools import run_python

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What each piece of work asked of the GPU: {name: {"kernels", "waits", "mixed"}}."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build fake_cuda.cpp with")
    if sys.platform != "linux" or torch.version.cuda:
        pytest.skip("fake_cuda.cpp stands in for CUDA in a Linux build of torch without it")
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"fake_cuda.cpp was written for torch 2.13, and this is {torch.__version__}")
    folder = tmp_path_factory.mktemp("fake_cuda")
    library = folder / "fake_cuda.so"
    torch_folder = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O0", "-fPIC", "-shared", HERE / "fake_cuda.cpp"]
    command += ["-I", torch_folder / "include", "-o", library]
    command += ["-L", torch_folder / "lib", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    done = run_python("tests/fake_cuda.py", library, folder / "report.json")
    assert done.returncode == 0, done.stderr[-3000:]  # fake tensors on two devices fail here
    return json.loads((folder / "report.json").read_text())


OPTIMIZERS = ("adamw", "muon")
STEPS = [f"{when}, {name}" for when in ("first step", "step after loading") for name in OPTIMIZERS]


@pytest.mark.parametrize("step", STEPS)
def test_on_an_h100_training_takes_cudnn_attention(report, step):
    # 2 layers, 4 micro-batches.
    assert report[step]["kernels"] == {"cudnn_attention": 8, "cudnn_attention_backward": 8}


def test_evaluation_takes_the_kernel_of_training(report):
    assert report["evaluation of 4 batches"]["kernels"] == {"cudnn_attention": 8}


@pytest.mark.parametrize("work, calls", [("HellaSwag of 1 batch", 2), ("33 tokens", 66)])
def test_attention_with_a_mask_takes_the_kernel_that_is_meant_for_it(report, work, calls):
    assert report[work]["kernels"] == {"efficient_attention": calls}


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_never_waits_for_the_gpu(report, step):
    assert waits(report[step]) == []


def test_the_log_waits_for_a_step_when_the_next_one_is_launched(report):
    """So of three steps it has read two."""
    assert waits(report["three logged steps"]) == [("report.py", "a list read", 2)]


def test_an_evaluation_waits_for_the_gpu_once_a_batch(report):
    assert waits(report["evaluation of 4 batches"]) == [("train_gpt2.py", "a value read", 4)]


def test_hellaswag_waits_for_the_gpu_once_a_batch(report):
    found = waits(report["HellaSwag of 1 batch"])
    assert found == [("hellaswag.py", "copied to the host", 1)]


def test_generation_waits_for_the_gpu_at_every_16th_token(report):
    assert waits(report["33 tokens"]) == [("sample.py", "a value read", 3)]


@pytest.mark.parametrize("step", STEPS)
def test_an_optimizer_reads_nothing_that_lies_on_the_cpu(report, step):
    assert report[step]["mixed"] == {}


def waits(work: dict) -> list[tuple[str, str, int]]:
    """(file, what the host waits for, how often), for each line of the file that waits."""
    found = []
    for wait, count in work["waits"].items():
        place, what = wait.split(" ", 1)
        found.append((place.split(":")[0], what, count))
    return found
