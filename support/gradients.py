"""Gradients summed in an order that does not depend on the number of ranks.

Floating-point addition is not associative: (a + b) + c and a + (b + c) differ in the last bits. DDP
sums each rank's micro-batches first and the ranks after, so another number of ranks gives other
bits. Here the micro-batches of a step, numbered over all ranks, are the leaves of one binary tree,
and every addition of that tree is made, by whichever rank.

    micro-batch   0   1   2   3   4   5   6   7
                   \\ /     \\ /     \\ /     \\ /
                     \\     /         \\     /
                      \\   /           \\   /        one rank sums a whole subtree,
                         \\___________/            all ranks together sum the top

It needs numbers of ranks, and of micro-batches on each, that are powers of two. It costs the memory
of log2(micro-batches) + 1 gradients, and every rank receives the gradients of all others, where DDP
exchanges two.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from support.runtime import Runtime
from support.script import UserError


def sum_in_fixed_order(
    micro_batches: Iterable[list[torch.Tensor]], rt: Runtime
) -> list[torch.Tensor]:
    """The sum over this rank's micro-batches and over all ranks, on every rank.

    Each micro-batch gives a list of tensors, the same shapes each time.
    """
    # Like a binary counter: two sums of equally many micro-batches become one of twice as many.
    sums: list[tuple[int, list[torch.Tensor]]] = []  # (micro-batches in it, tensors)
    for tensors in micro_batches:
        count = 1
        while sums and sums[-1][0] == count:
            _, earlier = sums.pop()
            tensors = [a + b for a, b in zip(earlier, tensors, strict=True)]
            count *= 2
        sums.append((count, tensors))
    ((_, tensors),) = sums
    return [sum_over_ranks(tensor, rt) for tensor in tensors]


def sum_over_ranks(tensor: torch.Tensor, rt: Runtime) -> torch.Tensor:
    """The sum of all ranks' tensors, pair by pair, on every rank."""
    if rt.world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(rt.world_size)]
    dist.all_gather(parts, tensor.contiguous())
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def check_tree(micro_batches: int, world_size: int) -> None:
    """Raise UserError unless the ranks' micro-batches form a whole tree."""
    for number, name in (
        (world_size, "ranks"),
        (micro_batches, "micro-batches a step on each rank"),
    ):
        if number & (number - 1):
            raise UserError(
                f"{number} {name} in a deterministic run; expected a power of two; change the "
                "number of ranks, --micro-batch or --total-batch-tokens"
            )
