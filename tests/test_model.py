"""The network against transformers' GPT-2, the loss against the plain one, initialisation."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import (
    GPT,
    SIZES,
    GPTConfig,
    KVCache,
    LinearCrossEntropy,
    NextTokenLoss,
)
from support.huggingface import TRANSPOSED
from support.runtime import LOGIT_ROWS
from support.script import UserError

SHAPES = [
    GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=257),
    GPTConfig(n_layer=3, n_head=4, n_embd=48, block_size=40, vocab_size=1000),
    GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=16, vocab_size=128),
]


def random_model(config: GPTConfig) -> GPT:
    """Every parameter random, so that a bias or a norm left out would show."""
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter[..., :1]), alpha=0.05)
    return model


def transformers_twin(model: GPT):
    """transformers' GPT-2 around views of the same weights: large models cost no second copy."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    with torch.device("meta"):
        twin = GPT2LMHeadModel(
            GPT2Config(
                n_layer=c.n_layer,
                n_head=c.n_head,
                n_embd=c.n_embd,
                n_positions=c.block_size,
                vocab_size=c.vocab_size,
                resid_pdrop=c.dropout,
                embd_pdrop=c.dropout,
                attn_pdrop=c.dropout,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    state = {
        name: (p.t() if name.endswith(TRANSPOSED) else p).detach()
        for name, p in model.named_parameters()
    }
    twin.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, assign=True)
    twin.tie_weights()
    return twin.eval().requires_grad_(True)


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def twin_gradients(twin) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.t() if name.endswith(TRANSPOSED) else p.grad
        for name, p in twin.named_parameters()
    }


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= relative * tensor.norm() + 1e-12, name


@pytest.mark.learning
@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.n_layer}x{c.n_embd}x{c.vocab_size}")
def test_equals_transformers(config):
    model = random_model(config)
    twin = transformers_twin(model)
    x = torch.randint(config.vocab_size, (3, config.block_size))
    theirs = twin(x, labels=x)
    theirs.loss.backward()
    loss = NextTokenLoss(model)(x[:, :-1], x[:, 1:])
    loss.backward()
    assert torch.allclose(model(x), theirs.logits, atol=1e-4, rtol=0)
    assert model(x[:, :-3]).shape == (3, config.block_size - 3, config.vocab_size)
    assert abs(loss - theirs.loss) < 1e-4
    assert_close(gradients(model), twin_gradients(twin), 1e-4)


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.n_layer}x{c.n_embd}x{c.vocab_size}")
@torch.no_grad()
def test_cached_equals_transformers(config):
    model = random_model(config)
    x = torch.randint(config.vocab_size, (2, 12))
    cache = KVCache(config, batch_size=2, length=16, device=x.device, dtype=torch.float32)
    logits = torch.cat(
        [model(part, cache=cache) for part in x.split([5, 1, 1, 3, 2], dim=1)], dim=1
    )
    assert torch.allclose(logits, transformers_twin(model)(x).logits, atol=1e-4, rtol=0)


def test_compiled_equals_transformers():
    config = SHAPES[2]
    model = random_model(config)
    twin = transformers_twin(model)
    x = torch.randint(config.vocab_size, (2, 9))
    theirs = twin(x, labels=x)
    theirs.loss.backward()
    loss = torch.compile(NextTokenLoss(model))(x[:, :-1], x[:, 1:])
    loss.backward()
    assert abs(loss - theirs.loss) < 1e-4
    assert_close(gradients(model), twin_gradients(twin), 1e-4)


PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.fixture(scope="module")
def noise():
    return torch.empty(81_000_000).normal_(0.0, 0.02)


@pytest.mark.parametrize(
    "name, layers", [("gpt2", 12), ("gpt2-medium", 24), ("gpt2-large", 2), ("gpt2-xl", 2)]
)
@torch.no_grad()
def test_openai_sizes(name, layers, noise):
    with torch.device("meta"):
        assert GPT(SIZES[name]).num_parameters() == PARAMETERS[name]
        model = GPT(replace(SIZES[name], n_layer=layers)).eval()
    state = {}
    # Views of random places in one block of noise: drawing all of it would take half a minute.
    for key, parameter in model.named_parameters():
        start = int(torch.randint(noise.numel() - parameter.numel(), ()))
        state[key] = noise[start : start + parameter.numel()].view(parameter.shape)
        if ".ln_" in key and key.endswith("weight"):
            state[key] = 1 + state[key]
    model.load_state_dict(state, assign=True)
    x = torch.randint(50257, (1, 8))
    assert torch.allclose(model(x), transformers_twin(model)(x).logits, atol=1e-4, rtol=0)


@pytest.mark.learning
@torch.no_grad()
def test_no_token_sees_the_future():
    model = random_model(SHAPES[0])
    x = torch.randint(257, (1, 32))
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 257
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(
        before[:, 20], after[:, 20]
    )


@pytest.mark.parametrize(
    "sizes, found",
    [
        ({"n_embd": 30, "n_head": 4}, "use n_embd 32"),
        ({"n_embd": 3, "n_head": 8}, "use n_embd 8"),
        ({"n_head": 0}, "--n-head 0: expected at least 1"),
        ({"n_layer": 10**9}, "--n-layer 1000000000: expected at least 1 and at most 400"),
        ({"vocab_size": 10**18}, "--vocab-size 1000000000000000000: expected"),
    ],
)
def test_sizes_that_make_no_network_are_refused(sizes, found):
    with pytest.raises(UserError, match=found):
        GPTConfig(**sizes)


def test_a_context_can_only_shrink():
    model = random_model(SHAPES[0])
    x = torch.randint(257, (1, 16))
    expected = model(x)
    model.crop_context(16)
    assert model.config.block_size == 16 and torch.equal(model(x), expected)
    with pytest.raises(UserError, match="a context of 17 tokens; expected at most the 16"):
        model.crop_context(17)


def test_context_is_bounded():
    with pytest.raises(ValueError, match="33 tokens, but block_size is 32"):
        random_model(SHAPES[0])(torch.zeros(1, 33, dtype=torch.long))


def test_dropout_equals_transformers():
    """With the same seed both drop the same values, and in evaluation nothing."""
    model = random_model(
        GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64, dropout=0.2)
    )
    twin = transformers_twin(model)
    x = torch.randint(64, (2, 16))
    logits = []
    for network in (model.train(), twin.train()):
        torch.manual_seed(1)
        logits.append(network(x))
    assert torch.allclose(logits[0], logits[1].logits, atol=1e-4)
    assert not torch.allclose(logits[0], model(x), atol=1e-2)
    assert torch.allclose(model.eval()(x), twin.eval()(x).logits, atol=1e-4)


# --------------------------------------------------------------------------------------------- loss


def reference(x, weight, targets):
    """Loss and gradients of the plain expression that LinearCrossEntropy computes in pieces."""
    loss = F.cross_entropy(x.float() @ weight.float().t(), targets)
    return loss, *torch.autograd.grad(loss, (x, weight))


@pytest.mark.learning
@pytest.mark.parametrize("chunk, multiple", [(1024, 1), (7, 1), (1024, 64), (7, 64)])
def test_chunks_and_padding_change_nothing(monkeypatch, chunk, multiple):
    monkeypatch.setitem(LOGIT_ROWS, "cpu", chunk)
    monkeypatch.setattr("model.PAD_VOCABULARY_TO", multiple)
    x, weight = torch.randn(30, 16, requires_grad=True), torch.randn(257, 16, requires_grad=True)
    targets = torch.randint(257, (30,))
    loss = LinearCrossEntropy.apply(x, weight, targets, True)
    dx, dw = torch.autograd.grad(3 * loss, (x, weight))
    expected, expected_dx, expected_dw = reference(x, weight, targets)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert dw.shape == weight.shape
    assert_close({"x": dx, "weight": dw}, {"x": 3 * expected_dx, "weight": 3 * expected_dw}, 1e-5)
    with torch.no_grad():
        assert torch.equal(LinearCrossEntropy.apply(x, weight, targets, False), loss)


def test_bfloat16_loss_is_close_to_transformers():
    config = SHAPES[0]
    model = random_model(config)
    twin = transformers_twin(model)
    x = torch.randint(config.vocab_size, (4, 32))
    theirs = twin(x, labels=x).loss
    theirs.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NextTokenLoss(model)(x[:, :-1], x[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and all(
        p.grad.dtype == torch.float32 for p in model.parameters()
    )
    assert abs(loss - theirs) < 0.01
    assert_close(gradients(model), twin_gradients(twin), 0.03)


@pytest.mark.learning
def test_accumulated_micro_batches_give_the_gradient_of_the_batch():
    model = random_model(SHAPES[0])
    step = NextTokenLoss(model)
    x, y = torch.randint(257, (8, 32)), torch.randint(257, (8, 32))
    step(x, y).backward()
    whole = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for part in range(4):
        (step(x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2]) / 4).backward()
    assert_close(gradients(model), whole, 1e-5)


# ----------------------------------------------------------------------------------- initialisation


def test_initialisation():
    config = GPTConfig(n_layer=3, n_head=4, n_embd=256, block_size=512, vocab_size=2000)
    for name, parameter in GPT(config).named_parameters():
        if parameter.dim() == 1:
            assert (
                parameter == (1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
            ).all(), name
            continue
        std = 0.01 if "wpe" in name else 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * std, name


@pytest.mark.learning
@torch.no_grad()
@pytest.mark.parametrize("vocab_size, n_embd", [(257, 1024), (5000, 256)])
def test_first_loss(vocab_size, n_embd):
    model = GPT(
        GPTConfig(n_layer=2, n_head=4, n_embd=n_embd, block_size=128, vocab_size=vocab_size)
    )
    x, y = torch.randint(vocab_size, (8, 128)), torch.randint(vocab_size, (8, 128))
    assert NextTokenLoss(model)(x, y).item() == pytest.approx(
        math.log(vocab_size) + 0.02**2 * n_embd / 2, rel=0.01
    )


@pytest.mark.learning
def test_overfits_one_batch():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=16, vocab_size=257))
    step = NextTokenLoss(model)
    x, y = torch.randint(257, (4, 16)), torch.randint(257, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = step(x, y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
