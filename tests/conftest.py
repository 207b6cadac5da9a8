"""Shared by all tests: the environment that they and the processes they start run in."""

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more at a thread barrier than they gain
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

from tools import fill_tiktoken_cache  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None)  # this machine may be busy
hypothesis.settings.load_profile("untimed")

VOCABULARY = tempfile.TemporaryDirectory(prefix="tiktoken_cache_")  # removed when pytest exits
if "TIKTOKEN_CACHE_DIR" not in os.environ:
    fill_tiktoken_cache(VOCABULARY.name)
    os.environ["TIKTOKEN_CACHE_DIR"] = VOCABULARY.name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
