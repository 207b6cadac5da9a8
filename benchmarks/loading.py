"""Subject `load`: fresh processes that load a model, or only start."""

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
from harness import ROOT, Case, Ready, Setting

LOAD_OURS = """
import sys, torch
from model import GPT
forward = GPT.from_pretrained(sys.argv[1])
"""
LOAD_TRANSFORMERS = """
import sys, torch
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval()
forward = lambda idx: model(idx).logits
"""
PRINT_LOGITS = """
torch.set_grad_enabled(False)
print(forward(torch.arange(8)[None])[0, -1, :50].tolist())
"""

SCRIPTS = ("train_gpt2.py", "sample.py", "hellaswag.py", "fineweb.py")


def run_python(*arguments: str) -> str:
    """What a Python process prints; its last line of stderr as an error if it fails."""
    command = [sys.executable, *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode == 0:
        return process.stdout
    lines = process.stderr.strip().splitlines()
    reason = lines[-1] if lines else "no message"
    if "ModuleNotFoundError" in reason:
        raise ImportError(reason)
    raise RuntimeError(reason)


def load_in_process(code: str, folder: str) -> Ready:
    """A round is a whole process that loads the model; the output is its logits."""
    logits = json.loads(run_python("-c", code + PRINT_LOGITS, folder))
    return Ready(np.array(logits), lambda: run_python("-c", code, folder))


def start_process(*arguments: str) -> Ready:
    """A round is a whole process; there is nothing to compare."""
    run_python(*arguments)
    return Ready(np.zeros(0), lambda: run_python(*arguments))


def load(setting: Setting) -> Iterator[Case]:
    """Loading 124M; and on a CPU how long each script takes to say its flags."""
    folder = setting.weights()
    yield Case(
        "load 124M, float32 on the CPU, a fresh process with its imports",
        "loads",
        1,
        {
            "PyGPT2": (load_in_process, LOAD_OURS, folder),
            "transformers": (load_in_process, LOAD_TRANSFORMERS, folder),
        },
        tolerance=1e-4,
    )
    if setting.device == "cuda":  # start-up is the CPU's
        return
    contenders = {"import torch": (start_process, "-c", "import torch")}
    for script in SCRIPTS:
        contenders[f"{script} --help"] = (start_process, script, "--help")
    yield Case("start-up beside torch alone, a fresh process", "starts", 1, contenders)
