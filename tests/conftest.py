"""Shared by all tests: the repository on the path, offline clients, and the optional real data beside the project."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real data that some tests use when it is there
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more at a thread barrier than they gain
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
hypothesis.settings.register_profile("untimed", deadline=None)  # this machine may be busy
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """Skips where OpenAI's vocabulary is neither cached nor beside the project."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs the gpt2 vocabulary: set TIKTOKEN_CACHE_DIR")
