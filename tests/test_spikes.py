"""The guard against loss spikes, by itself; test_train.py and test_distributed.py train with it."""

import numpy as np
import pytest
import torch

from support.spikes import SpikeGuard


def guard_after(losses, skips: bool = True) -> tuple[SpikeGuard, list[int]]:
    """A guard that has seen these losses, and the numbers of those that it called spikes."""
    guard = SpikeGuard(skips)
    spikes = []
    for number, loss in enumerate(losses):
        guard.leaves_out(torch.tensor(loss, dtype=torch.float64))
        if not skips:
            guard.note(float(loss))
        if guard.sees_spike:
            spikes.append(number)
    return guard, spikes


def wavering(count: int, mean: float = 3.0, deviation: float = 0.05) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, deviation, count)


def test_z_counts_standard_deviations_above_the_mean_of_the_128_losses_before():
    losses = wavering(300)
    guard, _ = guard_after(losses)
    before = losses[-129:-1]
    assert guard.z == pytest.approx((losses[-1] - before.mean()) / before.std())


def test_a_loss_that_wavers_or_falls_steeply_is_no_spike():
    steep = 3 + 8 / np.arange(1, 2000) ** 0.5
    assert guard_after(steep + wavering(1999, 0))[1] == []


def test_a_loss_that_jumps_is_a_spike_once():
    losses = wavering(1000)
    losses[700] += 0.5
    losses[900] -= 0.5  # no harm
    assert guard_after(losses)[1] == [700]


@pytest.mark.parametrize("number, is_seen", [(31, False), (32, True), (60, True)])
def test_an_early_jump_is_judged_by_the_32_losses_before_it_or_more(number, is_seen):
    losses = wavering(100)
    losses[number] += 1
    assert guard_after(losses)[1] == [number] * is_seen


def test_after_a_rise_that_lasts_training_goes_on():
    """Of the steps at the new level four are left out, however high it is."""
    losses = np.concatenate([wavering(500), wavering(500, 300.0)])
    guard, spikes = guard_after(losses)
    assert spikes == [500, 501, 502, 503]
    assert guard.left_out == 4


def test_losses_that_are_equal_are_no_spikes():
    assert guard_after([0.1] * 300)[1] == []


def test_without_skipping_nothing_is_left_out():
    losses = wavering(200)
    losses[150] += 5
    guard, spikes = guard_after(losses, skips=False)
    assert spikes == [150]
    assert guard.left_out == 0
