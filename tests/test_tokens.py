"""tokens.py: encodings, shards of ours and of others, their faults, and the order of training data."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import tokens
from cli import UserError
from tokens import (
    Shard,
    TokenArray,
    get_encoding,
    open_data,
    token_bytes,
    training_windows,
    verify,
    write_manifest,
    write_shard,
)

# ---------------------------------------------------------------------------------------------------- encodings


@given(st.text())
def test_bytes_encoding_is_the_bytes(text):
    encoding = get_encoding("bytes")
    assert (
        encoding.encode_ordinary(text) == list(text.encode())
        and encoding.decode(list(text.encode())) == text
    )
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


@given(st.text())
def test_token_bytes_add_up_to_the_text(gpt2_vocabulary, text):
    encoding = get_encoding("gpt2")
    assert token_bytes(encoding)[encoding.encode_ordinary(text)].sum() == len(text.encode())
    assert token_bytes(encoding)[encoding.eot_token] == 0


# ---------------------------------------------------------------------------------------------------- our shards


def make_data(
    folder, shards=((40, "val"), (100, "train"), (60, "train")), corpus="c", vocab_size=257
):
    """A finished data directory; token i of the whole stream is i."""
    folder.mkdir(exist_ok=True)
    start, entries = 0, []
    for i, (count, split) in enumerate(shards):
        entries.append(
            write_shard(
                folder / f"{corpus}_{split}_{i:06d}.bin",
                np.arange(start, start + count, dtype=np.uint16),
            )
        )
        start += count
    write_manifest(
        folder,
        {
            "encoding": "bytes",
            "vocab_size": vocab_size,
            "source": {},
            "revision": None,
            "shards": entries,
        },
    )
    return folder


def test_format_is_that_of_llm_c(tmp_path):
    """Read as llm.c's and modded-nanogpt's loaders do, from their description of the format."""
    entry = write_shard(tmp_path / "a.bin", np.array([1, 2, 50256], dtype=np.uint16))
    content = (tmp_path / "a.bin").read_bytes()
    header, body = struct.unpack("<256i", content[:1024]), content[1024:]
    assert header[:3] == (20240520, 1, 3) and not any(header[3:])
    assert struct.unpack("<3H", body) == (1, 2, 50256)
    assert entry == {"name": "a.bin", "tokens": 3, "sha256": hashlib.sha256(content).hexdigest()}


@settings(max_examples=50)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=5), data=st.data())
def test_shards_form_one_array(tmp_path_factory, counts, data):
    folder, stream = tmp_path_factory.mktemp("s"), np.arange(sum(counts), dtype=np.uint16)
    parts = np.split(stream, np.cumsum(counts)[:-1])
    for i, part in enumerate(parts):
        write_shard(folder / f"{i}.bin", part)
    array = TokenArray([Shard.open(folder / f"{i}.bin") for i in range(len(parts))], 257)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert len(array) == len(stream) and array.read(start, stop).tolist() == list(
        range(start, stop)
    )


def test_windows_overlap_by_the_token_that_is_target_and_input(tmp_path):
    train = open_data(make_data(tmp_path)).train
    T = 13
    rows = train.windows(np.arange(train.num_windows(T)), T)
    assert rows.shape == ((len(train) - 1) // T, T + 1) and (rows[1:, 0] == rows[:-1, -1]).all()
    assert rows[:, :-1].flatten().tolist() == list(
        range(40, 40 + rows.shape[0] * T)
    )  # 40 validate; window 7 crosses the shards


def test_splits_come_from_the_whole_name(tmp_path):
    """A corpus called `x_val_y` is not all validation: build-nanogpt's substring test was."""
    data = open_data(make_data(tmp_path, corpus="x_val_y"))
    assert (len(data.val), len(data.train)) == (40, 160)


def test_verify_reads_everything(tmp_path):
    assert verify(make_data(tmp_path)) == 200


# ---------------------------------------------------------------------------------------------------- faults 14 to 22


def patch(file, position, new):
    content = bytearray(file.read_bytes())
    content[position : position + len(new)] = new
    file.write_bytes(content)


def swap(folder):
    a, b = folder / "c_train_000001.bin", folder / "c_train_000002.bin"
    a.rename(folder / "t")
    b.rename(a)
    (folder / "t").rename(b)


def replaced(make):
    def fault(folder):
        file = folder / "c_train_000001.bin"
        file.unlink()
        make(file)

    return fault


SHARD = "c_train_000001.bin"
FAULTS = {
    "14 truncated": (lambda d: os.truncate(d / SHARD, 1100), SHARD),
    "14 truncated in the header": (lambda d: os.truncate(d / SHARD, 10), SHARD),
    "14 empty": (lambda d: os.truncate(d / SHARD, 0), SHARD),
    "15 trailing bytes": (lambda d: os.truncate(d / SHARD, 1226), SHARD),
    "17 wrong magic": (lambda d: patch(d / SHARD, 0, b"X"), SHARD),
    "17 wrong version": (lambda d: patch(d / SHARD, 4, b"\7"), SHARD),
    "17 big-endian": (lambda d: patch(d / SHARD, 0, struct.pack(">3i", 20240520, 1, 100)), SHARD),
    "17 negative count": (lambda d: patch(d / SHARD, 8, struct.pack("<i", -5)), SHARD),
    "19 missing": (lambda d: (d / SHARD).unlink(), SHARD),
    "19 extra": (lambda d: shutil.copy(d / SHARD, d / "c_train_000003.bin"), "c_train_000003.bin"),
    "19 swapped": (swap, SHARD),
    "22 directory": (replaced(os.mkdir), SHARD),
    "22 FIFO": (replaced(os.mkfifo), SHARD),
    "22 dangling link": (replaced(lambda file: file.symlink_to("nowhere")), SHARD),
    "manifest is not JSON": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json"),
    "manifest lacks hashes": (
        lambda d: (d / "manifest.json").write_text('{"shards": [{"name": "a"}]}'),
        "manifest.json",
    ),
    "manifest of another encoding": (
        lambda d: (d / "manifest.json").write_text('{"shards": [], "encoding": "klingon"}'),
        "klingon",
    ),
    "not finished": (
        lambda d: (d / "manifest.json").rename(d / "manifest.partial.json"),
        "manifest.partial.json",
    ),
    "no shards at all": (lambda d: shutil.rmtree(d) or d.mkdir(), ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_refused_on_opening(tmp_path, name):
    spoil, named = FAULTS[name]
    open_data(make_data(tmp_path / "d"))
    spoil(tmp_path / "d")
    with pytest.raises(UserError, match=f"{tmp_path / 'd'}.*{named}.*; expected .*; "):
        open_data(tmp_path / "d")


def test_fault_16_a_flipped_bit_is_found_by_verify(tmp_path):
    make_data(tmp_path)
    patch(tmp_path / SHARD, 1024 + 50, b"\1")
    with pytest.raises(UserError, match=SHARD):
        verify(tmp_path)


def test_fault_18_a_token_beyond_the_vocabulary_is_found_when_read(tmp_path):
    data = open_data(make_data(tmp_path))
    patch(tmp_path / SHARD, 1024 + 50, struct.pack("<H", 257))
    data.train.read(0, 25)
    with pytest.raises(UserError, match=f"{SHARD}: token 257"):
        data.train.read(20, 40)


def test_fault_20_fewer_tokens_than_a_window_are_no_windows(tmp_path):
    train = open_data(make_data(tmp_path)).train
    assert [train.num_windows(T) for T in (159, 160, 1000)] == [1, 0, 0]


def test_fault_22_the_directory_itself(tmp_path):
    for name, make in (
        ("missing", lambda p: None),
        ("file", lambda p: p.touch()),
        ("link", lambda p: p.symlink_to("nowhere")),
    ):
        make(tmp_path / name)
        with pytest.raises(UserError, match=name):
            open_data(tmp_path / name)


def test_faults_end_the_trainer_with_exit_code_2_and_one_line(tmp_path):
    make_data(tmp_path)
    os.truncate(tmp_path / SHARD, 1100)
    done = subprocess.run(
        [sys.executable, ROOT / "fineweb.py", "--verify", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / SHARD}: 1,100 bytes; expected 1,224 bytes for 100 tokens; "
        "the file is truncated or damaged: prepare or fetch it again"
    )


# ---------------------------------------------------------------------------------------------------- other people's files


def test_llm_c_and_modded_nanogpt_shards_train_as_they_are(tmp_path):
    for name, count in (
        ("fineweb_val_000000.bin", 10),
        ("fineweb_train_000001.bin", 20),
        ("fineweb_train_000002.bin", 30),
    ):
        header = struct.pack("<256i", 20240520, 1, count, *[0] * 253)
        (tmp_path / name).write_bytes(header + np.full(count, 50256, dtype="<u2").tobytes())
    data = open_data(tmp_path)
    assert (data.encoding, len(data.val), len(data.train)) == ("gpt2", 10, 50) and verify(
        tmp_path
    ) == 60


def test_llm_c_names_without_numbers(tmp_path):
    write_shard(tmp_path / "tiny_shakespeare_val.bin", np.zeros(5, dtype=np.uint16))
    write_shard(tmp_path / "tiny_shakespeare_train.bin", np.zeros(9, dtype=np.uint16))
    assert len(open_data(tmp_path).val) == 5


def test_build_nanogpt_shards_train_as_they_are(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(10, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(10, 40, dtype=np.uint16))
    data = open_data(tmp_path)
    assert data.val.read(0, 10).tolist() == list(range(10)) and data.train.read(
        5, 30
    ).tolist() == list(range(15, 40))


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"pickled": 1}], dtype=object),
        np.arange(9, dtype=np.int64),
        np.arange(9, dtype=">u2"),
        np.zeros((3, 3), dtype=np.uint16),
    ],
    ids=["21 object", "17 int64", "17 big-endian", "two dimensions"],
)
def test_npy_of_another_kind_is_refused_without_unpickling(tmp_path, array):
    np.save(tmp_path / "a_val_000000.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match="a_val_000000.npy"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda c: c[:9],
        lambda c: b"",
        lambda c: b"<html>not found</html>",
    ],
)
def test_npy_that_is_damaged_is_refused(tmp_path, change):
    np.save(tmp_path / "a_val_000000.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "a_val_000000.npy").write_bytes(
        change((tmp_path / "a_val_000000.npy").read_bytes())
    )
    with pytest.raises(UserError, match="a_val_000000.npy"):
        open_data(tmp_path)


def test_one_foreign_shard_is_divided(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "00000_merged.ds")
    data = open_data(tmp_path)
    assert (len(data.train), data.val.read(0, 10).tolist()) == (90, list(range(90, 100)))


@pytest.mark.parametrize("metadata", ["gpt2|4\n50\n50T", "gpt2|2\n49\n49T", "gpt2|2", ""])
def test_datatrove_metadata_must_agree(tmp_path, metadata):
    np.arange(50, dtype="<u2").tofile(tmp_path / "00000_shuffled.ds")
    (tmp_path / "00000_shuffled.ds.metadata").write_text(metadata)
    with pytest.raises(UserError, match="00000_shuffled.ds"):
        open_data(tmp_path)


def test_odd_ds_is_refused(tmp_path):
    (tmp_path / "00000_a.ds").write_bytes(b"abc")
    with pytest.raises(UserError, match="00000_a.ds: 3 bytes"):
        open_data(tmp_path)


def test_trains_on_what_datatrove_wrote(tmp_path, gpt2_vocabulary):
    """datatrove's DocumentTokenizer, run locally on two tasks; then two training steps on its files."""
    pytest.importorskip("datatrove")
    pytest.importorskip("tokenizers")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers import ByteLevelBPETokenizer

    tokens.save_tokenizer(get_encoding("gpt2"), tmp_path)
    tokenizer = ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    documents = [
        f"Document number {i}: the quick brown fox, naïve café, \n\n{i * i}." for i in range(40)
    ]
    (tmp_path / "in").mkdir()
    for task in range(2):
        (tmp_path / "in" / f"{task}.jsonl").write_text(
            "".join(
                json.dumps({"text": text, "id": str(i)}) + "\n"
                for i, text in enumerate(documents[task * 20 : task * 20 + 20])
            )
        )
    pipeline = [
        JsonlReader(str(tmp_path / "in"), compression=None),
        DocumentTokenizer(
            str(tmp_path / "out"),
            tokenizer_name_or_path=str(tmp_path / "tokenizer.json"),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
        ),
    ]
    LocalPipelineExecutor(
        pipeline, tasks=2, workers=1, logging_dir=str(tmp_path / "log"), skip_completed=False
    ).run()

    data, encoding = open_data(tmp_path / "out"), get_encoding("gpt2")
    expected = [
        token
        for text in documents
        for token in encoding.encode_ordinary(text) + [encoding.eot_token]
    ]  # datatrove ends documents with it
    assert (
        np.concatenate(
            [data.val.read(0, len(data.val)), data.train.read(0, len(data.train))]
        ).tolist()
        == expected
    )
    flags = "--n-layer 1 --n-head 1 --n-embd 16 --seq-len 16 --micro-batch 2 --total-batch-tokens 32 --max-steps 2 --device cpu --eval-tokens 64"
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train_gpt2.py",
            "--data",
            tmp_path / "out",
            "--out",
            tmp_path / "run",
            *flags.split(),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "train"] == [1, 2]


# ---------------------------------------------------------------------------------------------------- training order

sizes, seeds = st.integers(1, 500), st.integers(0, 2**63)


@given(n=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_each_epoch_shows_each_window_once(n, seed, epoch):
    assert sorted(training_windows(epoch * n, n, n, seed)) == list(range(n))


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
    parts = [
        training_windows(first + (step * world_size + rank) * batch, batch, n, seed)
        for step in range(steps)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate(parts), stream)


def test_order_is_pinned():
    """A run resumed by a later version must see the same order: these come from the first one."""
    assert training_windows(0, 16, 10, 1337).tolist() == [
        7,
        1,
        0,
        5,
        3,
        9,
        8,
        6,
        4,
        2,
        9,
        0,
        4,
        1,
        6,
        2,
    ]


def test_order_differs_by_seed_and_epoch():
    orders = [
        tuple(training_windows(epoch * 100, 100, 100, seed))
        for seed in range(5)
        for epoch in range(5)
    ]
    assert len(set(orders)) == 25


def test_order_is_spread_evenly():
    """Chi-square of where window 0 … 49 lands, over many epochs: a biased permutation would favour some places."""
    n, epochs = 50, 4000
    order = training_windows(0, n * epochs, n, 7).reshape(epochs, n)
    counts = np.stack(
        [np.bincount(order[:, place], minlength=n) for place in range(n)]
    )  # (place, window)
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    degrees = (n - 1) ** 2
    assert abs(chi_square - degrees) < 6 * np.sqrt(2 * degrees)
