"""What a network computes: a fingerprint of it, and a trial of it before it is trained.

model.py is there to be edited. An edit can leave old weights that mean something else, a head that
nothing trains, or files that cannot be read back. A tiny network shows it in a moment.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.script import UserError, require

Sizes = TypeVar("Sizes")  # GPTConfig

TEXT = [3, 1, 4, 1, 5, 9, 2, 6]  # for a tiny network of 16 tokens and a context of 8

# What `probe` gives for GPT-2.
PROBE_OF_GPT2 = [-0.984688, 2.524143, 3.567916, 1.127291]


@torch.no_grad()
def probe(tiny: Callable[[], nn.Module]) -> list[float]:
    """What a network computes, as four numbers: logits of a tiny one whose weights are known.

    tiny: makes such a network, of 16 tokens and a context of 8.
    An edit of the network, such as another activation, changes the numbers. Names, formatting and
    speed do not. Nor does a head of its own, which Hugging Face's GPT-2 can have too: here it gets
    the values of the token embedding.
    """
    model = with_known_weights(tiny).double()
    model.head_weight.copy_(model.transformer.wte.weight)
    idx = torch.tensor([TEXT], device="cpu")
    return [round(logit, 6) for logit in model(idx)[0, -1, :4].tolist()]


@torch.no_grad()
def with_known_weights(tiny: Callable[[], nn.Module]) -> nn.Module:
    """A tiny network with large weights, always the same ones, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # training's noise stays as it is
        model = tiny().eval()
    for number, parameter in enumerate(model.parameters(), start=1):
        places = torch.arange(parameter.numel(), device="cpu", dtype=torch.float64)
        parameter.copy_(torch.sin(number + 1.7 * places).view(parameter.shape))
    return model


def same_probe(a: list[float], b: list[float]) -> bool:
    """Whether two probes are of one network. Versions of torch may round the last digit apart."""
    return len(a) == len(b) and all(abs(x - y) < 1e-5 for x, y in zip(a, b, strict=True))


def sizes_of(config: dict, config_class: type[Sizes], place: object, dropout: float = 0.0) -> Sizes:
    """The fields of a configuration class among the values of a saved model.

    place: what an error names.
    """
    names = {field.name for field in fields(config_class)}
    values = {name: value for name, value in config.items() if name in names}
    try:
        return config_class(**(values | {"dropout": dropout}))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def with_weights(build: Callable[[], nn.Module], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The network that `build` makes with these weights, in evaluation mode."""
    with torch.device("meta"):  # no weights are drawn, and none take memory twice
        model = build()
    num_parameters = len(list(model.parameters()))
    model.load_state_dict(tensors, strict=False, assign=True)
    left = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_meta]
    if left or len(list(model.parameters())) != num_parameters:
        # An edited network may also have new, computed or shared tensors.
        model = build()
        model.load_state_dict(tensors, strict=False)
    return model.requires_grad_(True).eval()


@torch.enable_grad()
def check_network(network: type, loss: type, cache: type) -> None:
    """Raise UserError unless a network is trained, sampled and saved as one and the same.

    network, loss, cache: GPT, NextTokenLoss and KVCache of model.py. Each check names the edit that
    would make it fail. Called before training, so that no run ends in files that mean nothing.
    """
    model = with_known_weights(network.tiny)
    idx = torch.tensor([TEXT], device="cpu")
    logits = model(idx)

    loss_found = loss(model)(idx, idx)
    expected = F.cross_entropy(logits[0], idx[0])
    require(
        torch.allclose(loss_found, expected, atol=1e-3),
        f"model.py: the loss of a tiny network is {loss_found:.4f}, that of its logits "
        f"{expected:.4f}; expected the same; let GPT.head and NextTokenLoss compute the same from "
        "head_weight",
    )
    loss_found.backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    require(
        not untrained,
        f"model.py: the loss does not depend on {', '.join(untrained)}; expected each parameter to "
        "be trained; use it in the network, or make it a buffer",
    )

    filled = cache(model.config, 1, len(TEXT), idx.device, torch.float32)
    parts = [model(part, cache=filled) for part in idx.split([3, 4, 1], 1)]
    require(
        torch.allclose(torch.cat(parts, 1), logits, atol=1e-3),
        "model.py: a text read in parts with a cache gets other logits than one read at once; "
        "expected the same; let what depends on a token's place use `positions` of GPT.hidden",
    )

    config, tensors = model.saved_form()
    sizes = sizes_of(json.loads(json.dumps(config)), type(model.config), "model.py")
    with torch.random.fork_rng(devices=[]):
        again = with_weights(lambda: network(sizes), tensors)
    require(
        torch.equal(again(idx), logits),
        "model.py: a network that is saved and loaded again gets other logits; expected the same; "
        "make what is learned or drawn a parameter or a buffer, and each size a field of GPTConfig",
    )
