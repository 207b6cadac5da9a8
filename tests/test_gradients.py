"""Sums in a fixed order give the same bits on any number of ranks. Runs: test_distributed.py."""

from unittest import mock

import pytest
import torch

from support import gradients
from support.gradients import check_tree, sum_in_fixed_order
from support.runtime import Runtime
from support.script import UserError

CPU = torch.device("cpu")


def micro_batches(count: int) -> list[list[torch.Tensor]]:
    """Two tensors a micro-batch, of very different sizes, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        size = 10.0 ** torch.randint(-3, 4, (1,), generator=generator)
        batches.append([size * torch.randn(100, generator=generator) for _ in range(2)])
    return batches


def sum_on_ranks(batches: list[list[torch.Tensor]], world_size: int) -> list[torch.Tensor]:
    """What rank 0 gets: the ranks run one after the other, and a stand-in gathers their sums."""
    count = len(batches) // world_size
    sums_of_ranks = []
    for rank in range(world_size):
        alone = Runtime(0, 1, CPU, torch.float32)
        part = batches[rank * count : (rank + 1) * count]
        sums_of_ranks.append(sum_in_fixed_order(iter(part), alone))
    results = []
    for sums in zip(*sums_of_ranks, strict=True):

        def all_gather(parts, tensor, sums=sums):
            assert torch.equal(tensor, sums[0])
            for place, value in zip(parts, sums, strict=True):
                place.copy_(value)

        with mock.patch.object(gradients.dist, "all_gather", all_gather):
            rt = Runtime(0, world_size, CPU, torch.float32)
            results.append(gradients.sum_over_ranks(sums[0], rt))
    return results


def test_one_rank_adds_pairs_then_pairs_of_pairs():
    a, b, c, d = micro_batches(4)
    sums = sum_in_fixed_order(iter([a, b, c, d]), Runtime(0, 1, CPU, torch.float32))
    for i in range(2):
        assert torch.equal(sums[i], (a[i] + b[i]) + (c[i] + d[i]))


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_any_number_of_ranks_gives_the_same_bits(world_size):
    batches = micro_batches(16)
    one = sum_on_ranks(batches, 1)
    for expected, found in zip(one, sum_on_ranks(batches, world_size), strict=True):
        assert torch.equal(expected, found)


def test_the_order_of_adding_shows_in_these_tensors():
    """Otherwise the test above would pass for any order."""
    batches = micro_batches(16)
    one_by_one = torch.zeros(100)
    for tensors in batches:
        one_by_one = one_by_one + tensors[0]
    assert not torch.equal(one_by_one, sum_on_ranks(batches, 1)[0])


@pytest.mark.parametrize(
    "numbers, found", [((8, 3), "3 ranks"), ((6, 2), "6 micro-batches"), ((0, 6), "6 ranks")]
)
def test_numbers_that_make_no_whole_tree_are_refused(numbers, found):
    with pytest.raises(UserError, match=found):
        check_tree(*numbers)


def test_powers_of_two_make_a_whole_tree():
    for micro_batches_of_a_rank, world_size in ((1, 1), (1, 8), (16, 1), (4, 4)):
        check_tree(micro_batches_of_a_rank, world_size)
