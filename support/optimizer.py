"""Optimizers: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

AdamW is GPT-3's (appendix B). Muon keeps a momentum of each matrix's gradients, replaces it by the
nearest matrix whose singular values are all about 1, and steps along that (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon; with weight decay: Liu et al. 2025, arXiv 2502.16982).
It is meant for matrices between hidden layers. Embeddings, positions, biases and layer norms stay
with AdamW, which looks at each number by itself.

Under DDP every rank holds the same averaged gradients, and keeps all of the state. Only the
iterations that make matrices orthogonal, which are most of the work, are shared among the ranks.

Shapes: N matrices of one shape, R rows and C columns with R <= C.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support.ranks import ALONE, Ranks
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
# Matrices that go through the iterations together. Several ranks need batches enough to share, and
# the same ones whatever their number, since a GPU may round another batch size otherwise. A rank
# alone is faster with few large ones: by 5% of the first run's step.
MATRICES_AT_ONCE = 32  # of a rank alone
MATRICES_SHARED = 4


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


def blank_updates(batch: list[Matrix]) -> Tensor:
    """Memory for what `orthogonalize` makes of a batch on another rank."""
    direction = batch[0].wide_direction
    dtype = choose_dtype("auto", direction.device)
    return torch.empty(len(batch), *direction.shape, dtype=dtype, device=direction.device)


def work_of(batch: list[Matrix]) -> int:
    """Floating-point operations of its iterations."""
    R, C = batch[0].wide_direction.shape
    return len(batch) * ITERATIONS * 2 * R * R * (2 * C + R)


def share(work: list[int], world_size: int) -> list[int]:
    """Which rank does each piece of work: the largest first, each by the rank with the least."""
    owners = [0] * len(work)
    loads = [0] * world_size
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += work[i]
    return owners


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, with decoupled weight decay.

    Each group names in `matrices` how many matrices, one below the other, its parameters hold.
    The learning rate is Jordan's: the singular values of an update are all about
    lr * sqrt(max(1, out / in)).

    torch.optim.Muon (of torch 2.13) does the same to one matrix at a time, on every rank. This one
    takes matrices of equal shape together, sees c_attn as three, and shares them among the ranks.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        ranks: Ranks = ALONE,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.ranks = ranks

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient. The gradients are used up."""
        batches = self._batches()
        owners = share([work_of(batch) for batch in batches], self.ranks.world_size)
        # 1) Each rank makes its part of the updates.
        made = {}
        for i, batch in enumerate(batches):
            if owners[i] == self.ranks.rank:
                made[i] = orthogonalize(torch.stack([matrix.wide_direction for matrix in batch]))
        # 2) It sends them to the others. So all weights make the same steps everywhere.
        for i, batch in enumerate(batches):
            updates = made.pop(i) if i in made else blank_updates(batch)  # (N, R, C)
            self.ranks.send(updates, source=owners[i])
            for matrix, update in zip(batch, updates, strict=True):
                matrix.descend(update)

    def _batches(self) -> list[list[Matrix]]:
        """All matrices, some of one shape together."""
        size = MATRICES_AT_ONCE if self.ranks.world_size == 1 else MATRICES_SHARED
        by_shape = defaultdict(list)
        for group in self.param_groups:
            for matrix in self._matrices(group):
                by_shape[matrix.wide_direction.shape].append(matrix)
        batches = []
        for matrices in by_shape.values():
            for start in range(0, len(matrices), size):
                batches.append(matrices[start : start + size])
        return batches

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
            direction = parameter.grad.lerp_(state["momentum"], group["momentum"])
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


# ---------------------------------------------------------------------------------- one optimizer

Optimizer = torch.optim.AdamW | MuonAndAdamW


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    kind: str,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    ranks: Ranks = ALONE,
) -> Optimizer:
    """AdamW over all of a GPT's parameters (`adamw`), or Muon and AdamW (`muon`).

    learning_rate: AdamW's peak. muon_learning_rate: Muon's. Weight decay acts on matrices and
    embeddings, never on biases and layer norms (GPT-3, appendix B).
    """
    groups = []
    rest = []
    for name, parameter in named_parameters:
        part = name.split(".", 3)[-1]  # attn.c_attn.weight of transformer.h.0.attn.c_attn.weight
        if kind == "muon" and part in MATRICES_IN:
            groups.append({"params": [parameter], "matrices": MATRICES_IN[part]})
        else:
            rest.append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=1e-8,
        fused=True,
    )
    if kind == "adamw":
        return adamw
    muon = Muon(groups, muon_learning_rate, weight_decay, ranks=ranks)
    for group in muon.param_groups:
        group["rate_ratio"] = muon_learning_rate / learning_rate
    return MuonAndAdamW(muon, adamw)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set AdamW's rate for the next step, and Muon's to the same share of its own peak.

    So both warm up and fall together, by the one schedule of AdamW's rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_ratio", 1.0)


# ---------------------------------------------------------------------------- state, in and out

# What an optimizer keeps of each parameter, in tensors of the parameter's shape.
STATE_OF = {Muon: ("momentum",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<kind>`, empty at first.

    AdamW's step count is left out: it is the number of updates that the run has made.
    """
    return {
        name: state[kind]
        for name, (state, kind, _) in _state_by_name(model, optimizer).items()
        if kind in state
    }


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """A copy of that state on the CPU."""
    return {
        name: tensor.to("cpu", copy=True).contiguous()
        for name, tensor in state_tensors(model, optimizer).items()
    }


def blank_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What `optimizer_tensors` will return after an update, all zero."""
    places = _state_by_name(model, optimizer)
    return {name: torch.zeros_like(parameter) for name, (_, _, parameter) in places.items()}


def load_optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], step: int
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


def _state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, tuple[dict, str, Tensor]]:
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


def restore(
    model: nn.Module,
    optimizer: Optimizer,
    moments: dict[str, Tensor] | None,
    updates: int,
    ranks: Ranks,
) -> None:
    """Put the state after so many updates back on every rank; rank 0 alone has the moments."""
    if updates == 0:  # before the first one there is no state
        return
    tensors = moments if ranks.is_main else blank_tensors(model, optimizer)
    ranks.on_all(load_optimizer_tensors, model, optimizer, tensors, updates)
    ranks.send_from_main(state_tensors(model, optimizer).values())
