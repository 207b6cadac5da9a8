"""support/optimizer.py: Muon against plain references, what decays, learning rates, state in and
out."""

import copy
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from tools import ROOT, tiny_model, torchrun
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, NextTokenLoss
from support.optimizer import (
    Matrix,
    MuonAndAdamW,
    Optimizer,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    orthogonalize,
    set_learning_rate,
    share,
    work_of,
)
from support.ranks import ALONE, Ranks
from support.script import UserError

MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def optimizer_of(model: GPT, kind: str = "muon", ranks: Ranks = ALONE) -> Optimizer:
    return make_optimizer(
        model.named_parameters(),
        kind,
        learning_rate=4e-3,
        muon_learning_rate=0.02,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        ranks=ranks,
    )


def set_gradients(model: GPT, seed: int) -> None:
    """The gradients of one batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(257, (2, 33), generator=generator)
    model.zero_grad()
    NextTokenLoss(model)(tokens[:, :-1], tokens[:, 1:]).backward()


def train(model: GPT, optimizer, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        set_learning_rate(optimizer, 4e-3 / (1 + seed))
        optimizer.step()


# ---------------------------------------------------------------------------------------- Muon


def test_an_orthogonal_update_keeps_singular_vectors_and_levels_singular_values():
    matrices = torch.randn(3, 64, 128)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = U.mT @ orthogonalize(matrices).float() @ Vh.mT  # diagonal if vectors are kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert (S.amax(1) / S.amin(1)).min() > 4
    assert values.min() > 0.65
    assert values.max() < 1.2
    # The other directions hold nothing beyond bfloat16's rounding.
    assert (inner - torch.diag_embed(values)).square().mean().sqrt() < 1e-2


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_orthogonalize_applies_jordans_polynomial_five_times_to_the_singular_values(
    monkeypatch, dtype, tolerance
):
    monkeypatch.setattr("support.optimizer.choose_dtype", lambda name, device: dtype)
    matrices = torch.randn(1, 16, 32)
    U, S, Vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    expected = U @ torch.diag_embed(S) @ Vh
    result = orthogonalize(matrices)
    assert result.dtype == dtype
    assert (result.double() - expected).square().mean().sqrt() < tolerance


def test_blocks_are_trained_as_torchs_muon_trains_q_k_v_and_the_other_matrices_one_by_one(
    monkeypatch,
):
    monkeypatch.setattr(
        "support.optimizer.choose_dtype", lambda name, device: torch.bfloat16
    )  # as torch's
    model = tiny_model()
    model.requires_grad_(True)
    optimizer = optimizer_of(model)
    peers = {}
    for name, parameter in model.named_parameters():
        if name.endswith(MATRICES):
            count = 3 if name.endswith("c_attn.weight") else 1
            peers[name] = [torch.nn.Parameter(p.clone()) for p in parameter.detach().chunk(count)]
    parts = [peer for matrices in peers.values() for peer in matrices]
    reference = torch.optim.Muon(parts, lr=0.02, weight_decay=0.1, momentum=0.95)
    for seed in range(3):
        set_gradients(model, seed)
        for name, matrices in peers.items():
            gradients = model.get_parameter(name).grad.chunk(len(matrices))
            for peer, gradient in zip(matrices, gradients, strict=True):
                peer.grad = gradient.clone()
        optimizer.step()
        reference.step()
    for name, matrices in peers.items():
        assert torch.equal(model.get_parameter(name), torch.cat(matrices)), name


def test_everything_but_the_blocks_matrices_is_trained_as_by_adamw_alone():
    model = tiny_model()
    peer = copy.deepcopy(model)
    muon = optimizer_of(model)
    adamw = optimizer_of(peer, "adamw")
    set_gradients(model, 0)
    for parameter, other in zip(model.parameters(), peer.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    muon.step()
    adamw.step()
    same = {n for n, p in model.named_parameters() if torch.equal(p, peer.get_parameter(n))}
    assert same == {n for n, _ in model.named_parameters() if not n.endswith(MATRICES)}


# ---------------------------------------------------------------------------------- shared work

MUON_ON_RANKS = """
import sys
from safetensors.torch import save_file
from support import runtime, script
from test_optimizer import trained_by_muon

def main():
    rt = runtime.start("cpu", "float32")
    save_file(trained_by_muon(rt), f"{sys.argv[1]}/{rt.rank}.safetensors")

script.run_script(main)
"""


def trained_by_muon(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Weights after three steps of six batches of matrices, the same gradients on every rank."""
    torch.manual_seed(0)
    model = tiny_model(n_layer=4)
    train(model, optimizer_of(model, ranks=ranks), range(3))
    return dict(model.state_dict())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_share_muons_work_make_the_bits_of_one(tmp_path, world_size):
    script = tmp_path / "muon.py"
    script.write_text(MUON_ON_RANKS)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = torchrun(world_size, script, tmp_path, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    alone = trained_by_muon(ALONE)
    for rank in range(world_size):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, weights in alone.items():
            assert torch.equal(found[name], weights), name


def test_each_rank_makes_half_of_each_steps_updates(monkeypatch):
    made = []
    monkeypatch.setattr(Ranks, "send", lambda self, tensor, source: None)
    monkeypatch.setattr("support.optimizer.orthogonalize", lambda x: made.append(x.shape) or x)
    trained_by_muon(Ranks(1, 2))
    assert [tuple(shape) for shape in made] == 3 * [(4, 32, 32), (4, 32, 32), (4, 32, 128)]


def test_work_is_counted_as_torch_counts_it():
    weights = torch.nn.Parameter(torch.randn(4, 16, 32))
    batch = [Matrix(part, part, {}) for part in weights]
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.stack([matrix.wide_direction for matrix in batch]))
    assert work_of(batch) == counter.get_total_flops()


def test_work_is_shared_evenly():
    """That of GPT-2 124M: twelve batches of small matrices, and six of large ones."""
    work = 12 * [1] + 6 * [3]
    for world_size, most in ((1, 30), (2, 15), (4, 8), (8, 4)):
        owners = share(work, world_size)
        loads = [0] * world_size
        for owner, size in zip(owners, work, strict=True):
            loads[owner] += size
        assert max(loads) == most


# --------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_and_embeddings_only(kind):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    matrices = {f"transformer.h.{layer}.{name}" for layer in range(2) for name in MATRICES}
    assert decayed == embeddings | matrices
    rate = 0.02 if kind == "muon" else 4e-3
    expected = torch.full((96, 32), 1 - rate * 0.1)
    torch.testing.assert_close(model.get_parameter("transformer.h.0.attn.c_attn.weight"), expected)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(kind):
    model = tiny_model()
    optimizer = optimizer_of(model, kind)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


@pytest.mark.learning
def test_adamw_alone_is_torchs_fused_adamw_at_gpt3s_settings():
    optimizer = optimizer_of(tiny_model(), "adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.95), 1e-8)


def test_adamw_takes_the_learning_rate_as_it_is_and_muon_in_proportion_to_its_peak():
    rate = 4e-3 * 7 / 11
    adamw = optimizer_of(tiny_model(), "adamw")
    set_learning_rate(adamw, rate)
    assert {group["lr"] for group in adamw.param_groups} == {rate}
    both = optimizer_of(tiny_model())
    set_learning_rate(both, rate)
    muon, rest = both.parts
    assert {group["lr"] for group in rest.param_groups} == {rate}
    assert all(math.isclose(group["lr"], 0.02 * 7 / 11) for group in muon.param_groups)


def test_zero_grad_drops_every_gradient():
    model = tiny_model()
    optimizer = optimizer_of(model)
    set_gradients(model, 0)
    optimizer.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_goes_on_to_the_last_bit_from_saved_state(kind):
    model = tiny_model()
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    fresh = optimizer_of(resumed, kind)
    load_optimizer_tensors(resumed, fresh, optimizer_tensors(model, optimizer), step=3)
    train(model, optimizer, range(3, 6))
    train(resumed, fresh, range(3, 6))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_state_is_named_by_parameter_and_kind():
    model = tiny_model()
    optimizer = optimizer_of(model)
    assert isinstance(optimizer, MuonAndAdamW)
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(model, optimizer)
    expected = set()
    for name, _ in model.named_parameters():
        if name.endswith(MATRICES):
            expected.add(f"{name}.momentum")
        else:
            expected |= {f"{name}.exp_avg", f"{name}.exp_avg_sq"}
    assert set(tensors) == expected


@pytest.mark.parametrize("saved, resumed", [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(saved, resumed):
    model = tiny_model()
    optimizer = optimizer_of(model, saved)
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(model, optimizer)
    other = optimizer_of(model, resumed)
    with pytest.raises(UserError, match="attn.c_attn.weight"):
        load_optimizer_tensors(model, other, tensors, step=1)


def test_state_of_another_shape_is_refused():
    model = tiny_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(model, optimizer)
    name = "transformer.h.1.mlp.c_fc.weight.momentum"
    tensors[name] = tensors[name][:, :16]
    with pytest.raises(UserError, match=name):
        load_optimizer_tensors(model, optimizer_of(model), tensors, step=1)
