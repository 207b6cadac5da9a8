"""Optimizers: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

AdamW is GPT-3's (appendix B). Muon keeps a momentum of each matrix's gradients, replaces it by the
nearest matrix whose singular values are all about 1, and steps along that (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon; with weight decay: Liu et al. 2025, arXiv 2502.16982).
It is meant for matrices between hidden layers. Embeddings, positions, biases and layer norms stay
with AdamW, which looks at each number by itself.

Under DDP every rank holds the same averaged gradients and computes the same update, so nothing is
sent and nothing can drift apart. The price is that every rank repeats the iterations.

Shapes: N matrices of one shape, R rows and C columns with R <= C.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from model import GPT
from support.runtime import choose_dtype
from support.script import UserError

# The parts of a block that Muon trains, and how many matrices each holds. The rows of c_attn are
# queries, keys and values: three maps that only share a tensor, so each is made orthogonal alone.
MATRICES_IN = {
    "attn.c_attn.weight": 3,
    "attn.c_proj.weight": 1,
    "mlp.c_fc.weight": 1,
    "mlp.c_proj.weight": 1,
}

# ---------------------------------------------------------------------------------------- Muon

# Jordan's polynomial a x + b x^3 + c x^5. It is steep at 0, so that five iterations are enough, and
# takes singular values to between about 0.7 and 1.2 rather than to 1 exactly, which does no harm.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MATRICES_AT_ONCE = 32  # bounds the memory of an iteration; a GPU is busy with fewer


def orthogonalize(matrices: Tensor) -> Tensor:
    """The matrices (N, R, C), R <= C, with singular vectors kept and singular values near 1.

    Newton-Schulz iterations: matrix products alone, no decomposition. bfloat16 is precise enough,
    but only where the hardware multiplies it. Elsewhere it is emulated, and 17 times as slow as
    float32 was measured.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(choose_dtype("auto", matrices.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (N, R, C)
    return x


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter in one step of Muon."""

    weight: Tensor  # (out, in), a part of the parameter
    direction: Tensor  # (out, in), where its momentum points
    group: dict  # of the parameter: its learning rate and weight decay

    @property
    def is_tall(self) -> bool:
        return self.weight.size(0) > self.weight.size(1)

    @property
    def wide_direction(self) -> Tensor:
        """(R, C): turned over where it is tall, so that the iterations' products are small."""
        return self.direction.mT if self.is_tall else self.direction

    def descend(self, wide_update: Tensor) -> None:
        """Decay the weight, and move it against its orthogonal update, (R, C)."""
        update = wide_update.mT if self.is_tall else wide_update
        scale = math.sqrt(max(1.0, self.weight.size(0) / self.weight.size(1)))
        self.weight.mul_(1 - self.group["lr"] * self.group["weight_decay"])
        self.weight.add_(update, alpha=-self.group["lr"] * scale)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, with decoupled weight decay.

    Each group names in `matrices` how many matrices, one below the other, its parameters hold.
    The learning rate is Jordan's: the singular values of an update are all about
    lr * sqrt(max(1, out / in)).

    torch.optim.Muon does the same to one matrix at a time. This one takes matrices of equal shape
    together, whatever parameters they are in, and sees c_attn as three.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        by_shape = defaultdict(list)
        for group in self.param_groups:
            for matrix in self._matrices(group):
                by_shape[matrix.wide_direction.shape].append(matrix)
        for matrices in by_shape.values():
            for start in range(0, len(matrices), MATRICES_AT_ONCE):
                some = matrices[start : start + MATRICES_AT_ONCE]
                directions = torch.stack([matrix.wide_direction for matrix in some])  # (N, R, C)
                for matrix, update in zip(some, orthogonalize(directions), strict=True):
                    matrix.descend(update)

    def _matrices(self, group: dict) -> Iterator[Matrix]:
        """The matrices of a group's parameters, with their momentum brought up to date."""
        count = group["matrices"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            # The running mean of the gradients, then the same seen one step ahead (Nesterov).
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            direction = parameter.grad.lerp(state["momentum"], group["momentum"])
            parts = zip(parameter.chunk(count), direction.chunk(count), strict=True)
            for weight, part in parts:
                yield Matrix(weight, part, group)


class MuonAndAdamW:
    """Muon and AdamW as one optimizer: what the training loop needs of an optimizer."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


# -------------------------------------------------------------------------- from the configuration

Optimizer = torch.optim.AdamW | MuonAndAdamW


class OptimizerConfig(Protocol):
    """What is read here of a training configuration."""

    optimizer: Literal["adamw", "muon"]
    learning_rate: float  # AdamW's peak
    beta1: float
    beta2: float
    muon_learning_rate: float  # Muon's peak
    weight_decay: float


def make_optimizer(model: GPT, config: OptimizerConfig) -> Optimizer:
    """The optimizer that `config` names, over all of the model's parameters.

    Weight decay acts on matrices and embeddings, never on biases and layer norms (GPT-3,
    appendix B).
    """
    if config.optimizer == "adamw":
        return _make_adamw(list(model.parameters()), config)
    groups = []
    rest = []
    for name, parameter in model.named_parameters():
        kind = name.split(".", 3)[-1]  # attn.c_attn.weight of transformer.h.0.attn.c_attn.weight
        if kind in MATRICES_IN:
            groups.append({"params": [parameter], "matrices": MATRICES_IN[kind]})
        else:
            rest.append(parameter)
    muon = Muon(groups, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    for group in muon.param_groups:
        group["rate_ratio"] = config.muon_learning_rate / config.learning_rate
    return MuonAndAdamW(muon, _make_adamw(rest, config))


def _make_adamw(parameters: list[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """AdamW's learning rate for the next step. Muon's follows it, in proportion to their peaks."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_ratio", 1.0)


# ---------------------------------------------------------------------------- state, in and out

# What an optimizer keeps of each parameter, in tensors of the parameter's shape.
STATE_OF = {Muon: ("momentum",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}


def state_tensors(model: GPT, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<kind>`, empty at first.

    AdamW's step count is left out: it is the number of updates that the run has made.
    """
    return {
        name: state[kind]
        for name, (state, kind, _) in _state_by_name(model, optimizer).items()
        if kind in state
    }


def optimizer_tensors(model: GPT, optimizer: Optimizer) -> dict[str, Tensor]:
    """A copy of that state on the CPU."""
    return {
        name: tensor.to("cpu", copy=True).contiguous()
        for name, tensor in state_tensors(model, optimizer).items()
    }


def blank_tensors(model: GPT, optimizer: Optimizer) -> dict[str, Tensor]:
    """What `optimizer_tensors` will return after an update, all zero."""
    places = _state_by_name(model, optimizer)
    return {name: torch.zeros_like(parameter) for name, (_, _, parameter) in places.items()}


def load_optimizer_tensors(
    model: GPT, optimizer: Optimizer, tensors: dict[str, Tensor], step: int
) -> None:
    """Put what `optimizer_tensors` returned after `step` updates back, to the last bit.

    Raises UserError when the tensors are another optimizer's or another model's.
    """
    if step == 0 and not tensors:  # before the first update there is no state
        return
    places = _state_by_name(model, optimizer)
    for name in sorted(places.keys() | tensors.keys()):
        wanted = tuple(places[name][2].shape) if name in places else "nothing"
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        if wanted != found:
            raise UserError(
                f"saved optimizer state: {found} under {name}; expected {wanted}; go on with the "
                "optimizer and the model that the state was saved with"
            )
    for name, (state, kind, parameter) in places.items():
        state[kind] = tensors[name].to(parameter.device, copy=True)
        if kind == "exp_avg":
            state["step"] = torch.tensor(float(step), device=parameter.device)


def _state_by_name(model: GPT, optimizer: Optimizer) -> dict[str, tuple[dict, str, Tensor]]:
    """For each name of optimizer_tensors: the parameter's state, the key in it, the parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = {}
    for part in getattr(optimizer, "parts", (optimizer,)):
        for group in part.param_groups:
            for parameter in group["params"]:
                for kind in STATE_OF[type(part)]:
                    name = f"{names[parameter]}.{kind}"
                    places[name] = (part.state[parameter], kind, parameter)
    return places
