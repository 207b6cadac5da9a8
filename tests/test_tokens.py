"""tokens.py: encodings, a corpus as one long array, and the order of training."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import write_counting_data

from support import shards
from support.huggingface import save_tokenizer
from support.script import UserError
from support.shards import Shard, write_shard
from tokens import (
    TokenArray,
    encoding_of,
    get_encoding,
    open_data,
    token_bytes,
    training_windows,
)

# ---------------------------------------------------------------------------------------- encodings


@given(st.text())
def test_the_bytes_encoding_is_the_bytes(text):
    encoding = get_encoding("bytes")
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


@given(st.text())
def test_token_bytes_add_up_to_the_text(text):
    encoding = get_encoding("gpt2")
    assert token_bytes(encoding)[encoding.encode_ordinary(text)].sum() == len(text.encode())
    assert token_bytes(encoding)[encoding.eot_token] == 0


def model_of(vocab_size, encoding_name):
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=vocab_size), encoding_name=encoding_name
    )


@pytest.mark.parametrize(
    "vocab_size, name, encoding",
    [
        (257, None, "bytes"),
        (50257, None, "gpt2"),
        (257, "bytes", "bytes"),
        (320, "bytes", "bytes"),
        (50304, "gpt2", "gpt2"),
    ],
)
def test_the_encoding_of_a_model(vocab_size, name, encoding):
    assert encoding_of(model_of(vocab_size, name), "the/model").name == encoding


@pytest.mark.parametrize(
    "vocab_size, name, named",
    [
        (50258, None, r"resize_token_embeddings\(50257\)"),
        (0, None, "0 tokens"),
        (256, "bytes", "256 tokens, encoding bytes"),
        (257, "gpt2", "257 tokens, encoding gpt2"),
        (257, "klingon", "klingon"),
    ],
)
def test_a_model_of_another_encoding_is_refused(vocab_size, name, named):
    with pytest.raises(UserError, match=named):
        encoding_of(model_of(vocab_size, name), "the/model")


def test_a_model_with_tokenizer_files_of_another_encoding_is_refused(tmp_path):
    save_tokenizer(get_encoding("bytes"), tmp_path)
    assert encoding_of(model_of(257, "bytes"), str(tmp_path)).name == "bytes"
    with pytest.raises(UserError, match="vocab.json"):
        encoding_of(model_of(50257, "gpt2"), str(tmp_path))


# ------------------------------------------------------------------------ a corpus as one array


@settings(max_examples=50)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=5), data=st.data())
def test_shards_form_one_array(tmp_path_factory, counts, data):
    folder = tmp_path_factory.mktemp("s")
    stream = np.arange(sum(counts), dtype=np.uint16)
    parts = []
    for i, part in enumerate(np.split(stream, np.cumsum(counts)[:-1])):
        write_shard(folder / f"{i}.bin", part)
        parts.append(Shard.open(folder / f"{i}.bin"))
    array = TokenArray(parts, vocab_size=257)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert len(array) == len(stream)
    assert array.read(start, stop).tolist() == list(range(start, stop))


def test_windows_overlap_by_the_token_that_is_target_and_input(tmp_path):
    train = open_data(write_counting_data(tmp_path)).train
    T = 13
    rows = train.windows(np.arange(train.num_windows(T)), T)
    assert rows.shape == ((len(train) - 1) // T, T + 1)
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    inputs = rows[:, :-1].flatten().tolist()
    assert inputs == list(range(40, 40 + len(inputs)))  # 40 validate; window 7 crosses the shards


def test_fewer_tokens_than_a_window_are_no_windows(tmp_path):
    train = open_data(write_counting_data(tmp_path)).train
    assert [train.num_windows(T) for T in (159, 160, 1000)] == [1, 0, 0]


# -------------------------------------------------------------- what trains and what validates


def test_splits_come_from_the_whole_name(tmp_path):
    """A corpus called `x_val_y` is not all validation: build-nanogpt's substring test was."""
    data = open_data(write_counting_data(tmp_path, corpus="x_val_y"))
    assert (len(data.val), len(data.train)) == (40, 160)


@pytest.mark.parametrize(
    "name",
    [
        "fw_val_000000.bin",
        "tiny_shakespeare_val.bin",
        "validation-00000.bin",
        "valid.bin",
        "fw.val.bin",
        "val_00000_00000_doc_shuffled.bin",
    ],
)
def test_the_validation_split_is_known_by_its_name(tmp_path, name):
    write_shard(tmp_path / name, np.full(40, 0, dtype=np.uint16))
    write_shard(tmp_path / "train.bin", np.full(40, 1, dtype=np.uint16))
    assert open_data(tmp_path).val.read(0, 40).tolist() == [0] * 40


def test_without_a_name_the_last_tenth_validates_up_to_a_greatest_length(tmp_path, monkeypatch):
    for i in range(20):
        write_shard(tmp_path / f"{i:02d}.bin", np.full(2, i, dtype=np.uint16))
    data = open_data(tmp_path)
    assert data.val.read(0, len(data.val)).tolist() == [18, 18, 19, 19]
    monkeypatch.setattr(shards, "MAX_VALIDATION_TOKENS", 3)
    data = open_data(tmp_path)
    assert data.val.read(0, len(data.val)).tolist() == [18, 19, 19]
    assert len(data.train) == 37


# ----------------------------------------------------------------------------------- training order

sizes, seeds = st.integers(1, 500), st.integers(0, 2**63)


@pytest.mark.learning
@given(n=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_each_epoch_shows_each_window_once(n, seed, epoch):
    assert sorted(training_windows(epoch * n, n, n, seed)) == list(range(n))


@pytest.mark.learning
@settings(max_examples=40)
@given(
    n=sizes,
    seed=seeds,
    first=st.integers(0, 10**9),
    batch=st.integers(1, 16),
    world_size=st.sampled_from([1, 2, 4]),
    steps=st.integers(1, 3),
)
def test_ranks_and_steps_only_slice_the_single_stream(n, seed, first, batch, world_size, steps):
    stream = training_windows(first, batch * world_size * steps, n, seed)
    parts = []
    for part in range(world_size * steps):
        parts.append(training_windows(first + part * batch, batch, n, seed))
    assert np.array_equal(np.concatenate(parts), stream)


def window_by_definition(sample, n, seed):
    """The window of one sample, written a second time with Python's whole numbers."""
    epoch, place = divmod(sample, n)
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    key += hashlib.sha256(key).digest()
    half = max(1, -(-(n - 1).bit_length() // 2))
    while True:
        left, right = divmod(place, 2**half)
        for i in range(8):
            x = right ^ int.from_bytes(key[8 * i : 8 * i + 8], "little")
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x = x ^ (x >> 31)
            left, right = right, left ^ (x % 2**half)
        place = left * 2**half + right
        if place < n:
            return place


@settings(max_examples=40)
@given(n=st.integers(1, 10**7), seed=seeds, first=st.integers(0, 10**9))
def test_the_order_is_that_of_a_second_implementation(n, seed, first):
    expected = [window_by_definition(first + i, n, seed) for i in range(8)]
    assert training_windows(first, 8, n, seed).tolist() == expected


def test_the_order_is_pinned():
    """A run resumed by a later version must see the same order: these come from the first one."""
    expected = [7, 1, 0, 5, 3, 9, 8, 6, 4, 2, 9, 0, 4, 1, 6, 2]
    assert training_windows(0, 16, 10, 1337).tolist() == expected


def test_the_order_differs_by_seed_and_epoch():
    orders = set()
    for seed in range(5):
        for epoch in range(5):
            orders.add(tuple(training_windows(epoch * 100, 100, 100, seed)))
    assert len(orders) == 25


def test_the_order_is_spread_evenly():
    """Chi-square of the places of 50 windows over many epochs; bias would favour some places."""
    n, epochs = 50, 4000
    order = training_windows(0, n * epochs, n, 7).reshape(epochs, n)
    counts = np.stack([np.bincount(order[:, place], minlength=n) for place in range(n)])
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    degrees = (n - 1) ** 2
    assert abs(chi_square - degrees) < 6 * np.sqrt(2 * degrees)
