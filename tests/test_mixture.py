"""tokens.Mixture and support/mixture.py: several corpora in given proportions."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import write_counting_data

from support.mixture import parse_data, pattern
from support.script import UserError
from tokens import Mixture, open_data, training_windows

T = 4
weights = st.lists(st.floats(0.01, 1), min_size=1, max_size=8)


class Numbered:
    """A corpus of which each token of window k is 1000 · number + k."""

    def __init__(self, number, size):
        self.number = number
        self.size = size

    def num_windows(self, T):
        return self.size

    def windows(self, indices, T):
        return np.repeat(1000 * self.number + indices[:, None], T + 1, axis=1)


def mix(sizes, weights):
    corpora = {}
    for i, size in enumerate(sizes):
        train = Numbered(i, size)
        corpora[f"corpus{i}"] = SimpleNamespace(encoding="gpt2", train=train, fingerprint=f"{i}")
    return Mixture(corpora, weights)


def samples(mixture, first, count, seed=0):
    """For each sample its corpus and its window in it."""
    rows = mixture.windows_of_samples(first, count, T, seed)
    assert rows.shape == (count, T + 1) and rows.dtype == np.int64
    assert (rows == rows[:, :1]).all()
    return np.divmod(rows[:, 0], 1000)


# -------------------------------------------------------------------------------------- proportions


@settings(max_examples=40)
@given(weights=weights)
def test_at_every_length_each_corpus_is_within_one_sample_of_its_share(weights):
    one = pattern(weights)
    count = len(weights)
    counts = np.bincount(one, minlength=count)
    so_far = (one[:, None] == np.arange(count)).cumsum(axis=0)
    share = np.arange(1, len(one) + 1)[:, None] * counts / len(one)
    assert np.abs(so_far - share).max() < 1


@settings(max_examples=40)
@given(weights=weights)
def test_the_shares_are_the_weights(weights):
    one = pattern(weights)
    wanted = np.array(weights) / sum(weights)
    shares = np.bincount(one, minlength=len(weights)) / len(one)
    # Each end of a share is rounded to a thousandth.
    assert len(one) <= 1000 and np.abs(shares - wanted).max() <= 1 / 1000


@pytest.mark.parametrize(
    "weights, counts",
    [
        ([5], [1]),
        ([1, 1], [1, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([2, 6], [1, 3]),
        ([0.999, 0.001], [999, 1]),
    ],
)
def test_simple_weights_are_exact(weights, counts):
    assert np.bincount(pattern(weights)).tolist() == counts


def test_a_weight_too_small_to_count_is_refused():
    with pytest.raises(UserError, match="1/1000 of their sum"):
        pattern([1, 0.0001])


@settings(max_examples=25)
@given(weights=weights, length=st.integers(0, 5000))
def test_the_counts_are_those_of_the_samples(weights, length):
    mixture = mix([100] * len(weights), weights)
    corpora, _ = samples(mixture, 0, length)
    counts = np.bincount(corpora, minlength=len(weights))
    assert mixture.samples_of_each(length).tolist() == counts.tolist()
    assert np.allclose(mixture.times_read(length, T), counts / 100)
    assert np.abs(counts - length * mixture.shares).max() < 1


def test_the_pattern_is_pinned():
    """A run resumed by a later version must see the same order."""
    assert pattern([0.7, 0.2, 0.1]).tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 2]


# -------------------------------------------------------------------------------- which windows


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**63),
)
def test_no_window_comes_twice_within_an_epoch_of_its_corpus(sizes, data, seed):
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(sizes), max_size=len(sizes)))
    corpora, windows = samples(mix(sizes, weights), 0, 1000, seed)
    for i, size in enumerate(sizes):
        own = windows[corpora == i]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=25)
@given(weights=weights, seed=st.integers(0, 2**63))
def test_each_corpus_is_in_the_order_in_which_it_would_be_alone(weights, seed):
    mixture = mix([37] * len(weights), weights)
    corpora, windows = samples(mixture, 0, 500, seed)
    for i in range(len(weights)):
        own = windows[corpora == i]
        assert np.array_equal(own, training_windows(0, len(own), 37, seed))


@settings(max_examples=25)
@given(
    weights=weights,
    first=st.integers(0, 10**9),
    batch=st.integers(1, 16),
    world_size=st.sampled_from([1, 2, 4]),
    steps=st.integers(1, 3),
)
def test_ranks_and_steps_only_slice_the_single_stream(weights, first, batch, world_size, steps):
    mixture = mix([11, 23, 5, 7, 90, 3, 1, 8][: len(weights)], weights)
    stream = mixture.windows_of_samples(first, batch * world_size * steps, T, 1)
    parts = []
    for part in range(world_size * steps):
        parts.append(mixture.windows_of_samples(first + part * batch, batch, T, 1))
    assert np.array_equal(np.concatenate(parts), stream)


@settings(max_examples=25)
@given(first=st.integers(0, 10**9), size=st.integers(1, 999), seed=st.integers(0, 2**63))
def test_one_corpus_is_read_as_without_a_mixture(first, size, seed):
    mixture = mix([size], [0.3])
    _, windows = samples(mixture, first, 20, seed)
    assert np.array_equal(windows, training_windows(first, 20, size, seed))
    assert mixture.fingerprint == "0"


def test_the_windows_are_those_of_the_token_files(tmp_path):
    low = open_data(write_counting_data(tmp_path / "low", modulus=100))
    high = open_data(write_counting_data(tmp_path / "high", shards=((9, "val"), (200, "train"))))
    mixture = Mixture({"low": low, "high": high}, [3, 1])
    rows = mixture.windows_of_samples(0, 8, T, seed=5)
    of_low = low.train.windows(training_windows(0, 6, low.train.num_windows(T), 5), T)
    of_high = high.train.windows(training_windows(0, 2, high.train.num_windows(T), 5), T)
    assert mixture.pattern.tolist() == [0, 0, 0, 1]
    expected = [*of_low[:3], of_high[0], *of_low[3:], of_high[1]]
    assert np.array_equal(rows, np.stack(expected))


# ------------------------------------------------------------------------------- what is recognised


def test_the_fingerprint_knows_corpora_order_and_proportions():
    prints = {
        mix([9, 9], [1, 1]).fingerprint,
        mix([9, 9], [1, 2]).fingerprint,
        mix([9, 9], [2, 1]).fingerprint,
        mix([9], [1]).fingerprint,
        mix([9, 9, 9], [1, 1, 1]).fingerprint,
    }
    assert len(prints) == 5
    assert mix([9, 9], [1, 1]).fingerprint == mix([9, 9], [0.5, 0.5]).fingerprint


def test_corpora_of_two_encodings_are_refused():
    corpora = {
        "a": SimpleNamespace(encoding="gpt2", train=None),
        "b": SimpleNamespace(encoding="bytes", train=None),
    }
    with pytest.raises(UserError, match="mixes the encodings bytes and gpt2"):
        Mixture(corpora, [1, 1])


# --------------------------------------------------------------------------------- values of --data


@pytest.mark.parametrize(
    "values, corpora",
    [
        ((), [((), 1.0)]),
        (("edu_fineweb10B",), [(("edu_fineweb10B",), 1.0)]),
        (("books/a.txt", "books/b.txt"), [(("books/a.txt", "books/b.txt"), 1.0)]),
        (("a=0.7", "b=0.2", "c=0.1"), [(("a",), 0.7), (("b",), 0.2), (("c",), 0.1)]),
        (("a=3",), [(("a",), 3.0)]),
        (("b/*.txt=1", "c=2e-1"), [(("b/*.txt",), 1.0), (("c",), 0.2)]),
        ((r"C:\data\a=0.5", r"C:\b=0.5"), [((r"C:\data\a",), 0.5), ((r"C:\b",), 0.5)]),
        (("x=y",), [(("x=y",), 1.0)]),
        (("x=y=2",), [(("x=y",), 2.0)]),
        (("=0.5",), [(("=0.5",), 1.0)]),
    ],
)
def test_values_of_data(values, corpora):
    assert parse_data(values) == corpora


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert parse_data(("lr=0.1",)) == [(("lr=0.1",), 1.0)]
    assert parse_data(("lr=0.1=2",)) == [(("lr=0.1",), 2.0)]


@pytest.mark.parametrize(
    "values, named",
    [
        (("a=0.5", "b"), "--data b has no weight"),
        (("a=0.5", "b=0,5"), "--data b=0,5 has no weight"),
        (("a=0.5", "b=0"), "--data b=0; expected a weight above 0"),
        (("a=-1",), "--data a=-1; expected a weight above 0"),
        (("a=nan",), "--data a=nan; expected a weight above 0"),
        (("a=inf",), "--data a=inf; expected a weight above 0"),
        (("a=0.5", "a=0.5"), "--data names a twice"),
    ],
)
def test_values_that_are_no_mixture_are_refused(values, named):
    with pytest.raises(UserError, match=named):
        parse_data(values)
