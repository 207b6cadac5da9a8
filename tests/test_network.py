"""What is tried of a network before it is trained: each test is an edit that must be noticed."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from tools import ROOT, edited, run_main

import train_gpt2
from model import GPT, GPTConfig, KVCache, NextTokenLoss
from support.network import PROBE_OF_GPT2, check_network, probe, same_probe
from support.script import UserError


def check(network: type[GPT]) -> None:
    check_network(network, NextTokenLoss, KVCache)


def test_gpt2_passes_and_has_the_probe_of_gpt2():
    check(GPT)
    assert same_probe(probe(GPT.tiny), PROBE_OF_GPT2)


def test_neither_check_nor_probe_draws_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check(GPT)
    probe(GPT.tiny)
    assert torch.equal(torch.rand(1), expected)


class Untied(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return self.lm_head.weight


def test_a_head_of_its_own_passes_as_gpt2():
    check(Untied)
    assert same_probe(probe(Untied.tiny), PROBE_OF_GPT2)


@pytest.mark.parametrize("flags", [("--dry-run",), ("--data", ROOT / "input.txt")])
def test_training_and_its_plan_count_what_the_network_has(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "GPT", Untied)
    tiny = ("--n-layer", 1, "--n-head", 1, "--n-embd", 16, "--seq-len", 32, "--max-steps", 1)
    tiny += ("--total-batch-tokens", 256, "--eval-every", 0, "--save-every", 0, "--device", "cpu")
    assert run_main(train_gpt2.main, "--recipe", "first-run", *tiny, *flags) == 0
    count = Untied(GPTConfig(1, 1, 16, 32, 257)).num_parameters()
    assert f"model          {count:,} parameters" in capsys.readouterr().out


class OtherHead(Untied):
    """The logits come from another head than the loss."""

    def head(self, x):
        return x @ self.transformer.wte.weight.t()


class Unused(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.ones(3))


class PlacesWithoutCache(GPT):
    """What depends on a token's place begins anew with each part that is read."""

    def hidden(self, idx, *args, **how):
        x = super().hidden(idx, *args, **how)
        return x * torch.arange(1, 1 + idx.size(1)).view(-1, 1)


class Unsaved(GPT):
    """A random tensor that is neither a parameter nor a buffer."""

    def __init__(self, config):
        super().__init__(config)
        self.noise = torch.rand(config.n_embd, device="cpu")

    def hidden(self, idx, *args, **how):
        return super().hidden(idx, *args, **how) * self.noise


@pytest.mark.parametrize(
    "network, found",
    [
        (OtherHead, "the loss of a tiny network is .* head_weight"),
        (Unused, "does not depend on gate"),
        (PlacesWithoutCache, "read in parts with a cache"),
        (Unsaved, "saved and loaded again gets other logits"),
    ],
)
def test_an_edit_that_would_ruin_a_run_is_said_before_it(network, found):
    with pytest.raises(UserError, match=found):
        check(network)


# ------------------------------------------------------------------------------- the page about it

PAGE = ROOT / "docs/change-the-network.md"
EDITS = re.findall(r"## ([^\n]*)\n[^#]*?```diff\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.parametrize("diff", [diff for _, diff in EDITS], ids=[name for name, _ in EDITS])
def test_an_edit_of_the_page_applies_and_passes(diff, tmp_path):
    """model.py with the edit, in a process of its own."""
    (tmp_path / "model.py").write_text(edited((ROOT / "model.py").read_text(), diff))
    (command,) = re.findall(r"^python -c \"(.*)\"$", PAGE.read_text(), re.M)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=environment, check=True)
