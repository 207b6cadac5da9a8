"""tokens.py: encodings, shards of ours and of others, their faults, and the order of the data."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import ROOT

import tokens
from support.huggingface import save_tokenizer
from support.script import UserError
from tokens import (
    Shard,
    TokenArray,
    add_downloaded_shard,
    encoding_for,
    get_encoding,
    open_data,
    token_bytes,
    training_windows,
    verify,
    write_manifest,
    write_shard,
)

# ---------------------------------------------------------------------------------------- encodings


@given(st.text())
def test_bytes_encoding_is_the_bytes(text):
    encoding = get_encoding("bytes")
    assert (
        encoding.encode_ordinary(text) == list(text.encode())
        and encoding.decode(list(text.encode())) == text
    )
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


@given(st.text())
def test_token_bytes_add_up_to_the_text(text):
    encoding = get_encoding("gpt2")
    assert token_bytes(encoding)[encoding.encode_ordinary(text)].sum() == len(text.encode())
    assert token_bytes(encoding)[encoding.eot_token] == 0


# ------------------------------------------------------------------- the encoding of other programs


def test_the_encoding_of_a_model():
    assert encoding_for(257, None, "m").name == "bytes"
    assert encoding_for(50257, None, "m").name == "gpt2"
    for rows in (257, 258, 320):
        assert encoding_for(rows, "bytes", "m").name == "bytes"
    assert encoding_for(50304, "gpt2", "m").name == "gpt2"


@pytest.mark.parametrize(
    "vocab_size, name, named",
    [
        (50258, None, r"resize_token_embeddings\(50257\)"),
        (0, None, "0 tokens"),
        (256, "bytes", "at least 257"),
        (257, "gpt2", "at least 50,257"),
        (257, "klingon", "klingon"),
    ],
)
def test_a_model_of_another_encoding_is_refused(vocab_size, name, named):
    with pytest.raises(UserError, match=named):
        encoding_for(vocab_size, name, "the/model")


# --------------------------------------------------------------------------------------- our shards


def make_data(
    folder, shards=((40, "val"), (100, "train"), (60, "train")), corpus="c", end_token=2**16
):
    """A finished data directory; token i of the whole stream is i modulo end_token."""
    folder.mkdir(exist_ok=True)
    start, entries = 0, []
    for i, (count, split) in enumerate(shards):
        entries.append(
            write_shard(
                folder / f"{corpus}_{split}_{i:06d}.bin",
                (np.arange(start, start + count) % end_token).astype(np.uint16),
            )
        )
        start += count
    write_manifest(
        folder,
        {
            "encoding": "bytes",
            "vocab_size": 257,
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


# ---------------------------------------------------------------------------------- faults 14 to 22


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


def test_verify_ends_with_exit_code_2_and_one_line(tmp_path):
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


# ----------------------------------------------------------------------------- other people's files


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


def run_datatrove(folder, num_files, tasks, shuffle, log="log"):
    """datatrove's DocumentTokenizer on small documents; its output folder, and the documents."""
    pytest.importorskip("datatrove")
    pytest.importorskip("tokenizers")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers import ByteLevelBPETokenizer

    save_tokenizer(get_encoding("gpt2"), folder)
    tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    documents = []
    (folder / "in").mkdir()
    for i in range(num_files):
        lines = []
        for j in range(20):
            documents.append(f"Document {j} of file {i}: the quick brown fox, naïve café, {j * j}.")
            lines.append(json.dumps({"text": documents[-1], "id": str(j)}) + "\n")
        (folder / "in" / f"{i}.jsonl").write_text("".join(lines))
    pipeline = [
        JsonlReader(str(folder / "in"), compression=None),
        DocumentTokenizer(
            str(folder / "out"),
            tokenizer_name_or_path=str(folder / "tokenizer.json"),
            eos_token="<|endoftext|>",
            shuffle_documents=shuffle,
            seed=1,
        ),
    ]
    LocalPipelineExecutor(
        pipeline,
        tasks=tasks,
        workers=1,
        logging_dir=str(folder / log),
        skip_completed=False,
    ).run()
    return folder / "out", documents


def whole(data):
    """All tokens of a corpus that names no split: those for training, then those for validation."""
    train = data.train.read(0, len(data.train)).tolist()
    return train + data.val.read(0, len(data.val)).tolist()


def test_datatrove_output_is_read_as_its_documents(tmp_path):
    folder, documents = run_datatrove(tmp_path, num_files=2, tasks=2, shuffle=False)
    encoding = get_encoding("gpt2")
    expected = []
    for text in documents:  # datatrove ends documents with <|endoftext|>
        expected += encoding.encode_ordinary(text) + [encoding.eot_token]
    data = open_data(folder)
    assert whole(data) == expected
    assert len(data.val) == len(expected) // 10


def test_one_input_file_and_many_tasks_of_datatrove_are_divided(tmp_path):
    """All tokens are in one file then, and each other task leaves an empty unshuffled one."""
    folder, documents = run_datatrove(tmp_path, num_files=1, tasks=4, shuffle=True)
    assert sum(file.stat().st_size == 0 for file in folder.glob("*_unshuffled.ds")) == 3
    data = open_data(folder)
    total = sum(len(get_encoding("gpt2").encode_ordinary(text)) + 1 for text in documents)
    assert (len(data.train) + len(data.val), len(data.val)) == (total, total // 10)


def datatrove_folder(folder, names, sidecars=(".index", ".metadata")):
    """Files as datatrove names them, 40 tokens each."""
    folder.mkdir()
    for name in names:
        np.arange(40, dtype="<u2").tofile(folder / name)
        if ".index" in sidecars:
            (folder / f"{name}.index").write_bytes(struct.pack("<Q", 40))
        if ".metadata" in sidecars:
            (folder / f"{name}.metadata").write_text("gpt2|2\n40\n40 T")
    return folder


SHUFFLED = [f"{task:05d}_00000_doc_shuffled.ds" for task in range(4)]


@pytest.mark.parametrize("sidecars", [(".index", ".metadata"), (".metadata",), ()])
def test_the_last_tenth_validates_whatever_the_number_of_files(tmp_path, sidecars):
    for num_files in (1, 2, 4):
        folder = tmp_path / f"{num_files}"
        data = open_data(datatrove_folder(folder, SHUFFLED[:num_files], sidecars))
        assert whole(data) == list(range(40)) * num_files
        assert len(data.val) == 4 * num_files


def test_the_last_tenth_may_span_files_and_has_a_greatest_length(tmp_path, monkeypatch):
    for i in range(20):
        np.full(2, i, dtype="<u2").tofile(tmp_path / f"{i:02d}.ds")
    data = open_data(tmp_path)
    assert data.val.read(0, len(data.val)).tolist() == [18, 18, 19, 19]
    monkeypatch.setattr(tokens, "MAX_VALIDATION_TOKENS", 3)
    data = open_data(tmp_path)
    assert data.val.read(0, len(data.val)).tolist() == [18, 19, 19]
    assert len(data.train) == 37


MERGED = [f"{number:03d}_fw.ds" for number in range(3)]
PARTS = [f"00000_{part:05d}_doc_shuffled.ds" for part in range(3)]

# The files of a directory, one that is removed, further ones without a token, what is named.
UNFINISHED = {
    "left unshuffled": ([*SHUFFLED[:3], "00003_unshuffled.ds"], "", [], "00003_unshuffled.ds"),
    "chunks not shuffled": (
        ["00000_00000_chunk_shuffled.ds", "00001_00000_doc_shuffled.ds"],
        "",
        [],
        "00001_00000_doc_shuffled.ds",
    ),
    "task missing": ([SHUFFLED[0], *SHUFFLED[2:]], "", [], "task 00001"),
    "first task missing": (SHUFFLED[1:], "", [], "task 00000"),
    "task missing after 99999": (["100000_unshuffled.ds"], "", [], "task 00000"),
    "task of one of two pipelines missing": (
        [*SHUFFLED, "fw_00000_unshuffled.ds", "fw_00002_unshuffled.ds"],
        "",
        [],
        "task 00001",
    ),
    "part missing": ([PARTS[0], PARTS[2]], "", [], "part 00001"),
    "no index": (SHUFFLED, f"{SHUFFLED[2]}.index", [], SHUFFLED[2]),
    "no metadata": (SHUFFLED, f"{SHUFFLED[3]}.metadata", [], SHUFFLED[3]),
    "metadata alone": (SHUFFLED, SHUFFLED[3], [], SHUFFLED[3]),
    "own name, no metadata": (
        ["fw_00000_unshuffled.ds", "fw_00001_unshuffled.ds"],
        "fw_00001_unshuffled.ds.metadata",
        [],
        "fw_00001_unshuffled.ds",
    ),
    "merged one missing": ([MERGED[0], MERGED[2]], "", [], MERGED[1]),
    "merged beside tasks": ([*SHUFFLED, *MERGED], "", [], "the same tokens twice"),
    "rsync under way": (SHUFFLED, "", [".00004_00000_doc_shuffled.ds.Xy1Z2a"], "00004_00000"),
    "browser under way": (SHUFFLED, "", ["00004_00000_doc_shuffled.ds.part"], "00004_00000"),
    "compressed": (SHUFFLED, "", ["00004_00000_doc_shuffled.ds.gz"], "00004_00000"),
    "in capitals": (SHUFFLED, "", ["00004_00000_doc_shuffled.DS"], "00004_00000"),
    "two formats": (SHUFFLED, "", ["fineweb_train_000001.bin"], "several formats"),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_datatrove_output_is_refused_by_name(tmp_path, name):
    names, removed, further, named = UNFINISHED[name]
    folder = datatrove_folder(tmp_path / "d", names)
    if removed:
        (folder / removed).unlink()
    for file in further:
        (folder / file).touch()
    with pytest.raises(UserError, match=f"{folder}.*{named}"):
        open_data(folder)


@pytest.mark.parametrize(
    "names, further",
    [
        ([*SHUFFLED, "fw_00000_unshuffled.ds"], []),  # two pipelines, of which one does not shuffle
        ([f"{task:05d}_unshuffled.ds" for task in (0, 1)], []),
        ([*PARTS, "00001_00000_doc_shuffled.ds"], []),
        (MERGED, []),
        # What file systems, macOS and datatrove's --save-loss-metadata leave beside the tokens.
        (
            SHUFFLED,
            [".nfs000000000451a3e2", f"._{SHUFFLED[0]}", f"{SHUFFLED[0]}.loss", ".DS_Store"],
        ),
    ],
)
def test_finished_datatrove_output_is_taken(tmp_path, names, further):
    folder = datatrove_folder(tmp_path / "d", names)
    for file in further:
        (folder / file).write_bytes(bytes(4096))
    assert len(whole(open_data(folder))) == 40 * len(names)


@pytest.mark.parametrize("content", [b"", bytes(80)])
def test_a_task_that_stopped_before_all_others_is_refused(tmp_path, content):
    """It has written neither index nor metadata, and nothing else is there to compare it with."""
    (tmp_path / "00000_unshuffled.ds").write_bytes(content)
    with pytest.raises(UserError, match="00000_unshuffled.ds: .* neither .index nor .metadata"):
        open_data(tmp_path)


def test_without_metadata_the_index_tells_the_length(tmp_path):
    folder = datatrove_folder(tmp_path / "d", SHUFFLED, sidecars=(".index",))
    os.truncate(folder / SHUFFLED[1], 60)
    with pytest.raises(UserError, match=f"{SHUFFLED[1]}: 60 bytes; expected 80 bytes"):
        open_data(folder)


@pytest.mark.parametrize("tokenizer, is_gpt2", [
    ("gpt2", True),
    ("openai-community/gpt2-xl", True),
    ("/data/tokenizer.json", True),
    ("Unknown Tokenizer|2", True),
    ("mistralai/Mistral-7B-v0.1", False),
    ("EleutherAI/gpt-neox-20b", False),
])  # fmt: skip
def test_datatrove_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer, is_gpt2):
    folder = datatrove_folder(tmp_path / "d", SHUFFLED)
    (folder / f"{SHUFFLED[2]}.metadata").write_text(f"{tokenizer}|2\n40\n40 T")
    if is_gpt2:
        assert len(whole(open_data(folder))) == 160
        return
    with pytest.raises(UserError, match=f"{SHUFFLED[2]}.metadata: the tokenizer '{tokenizer}'"):
        open_data(folder)


def test_merged_files_are_compared_with_their_total(tmp_path):
    folder = datatrove_folder(tmp_path / "d", MERGED)
    (folder / "fw.ds.metadata").write_text("gpt2|2\n120\n120 T")
    assert len(whole(open_data(folder))) == 120
    for name in (MERGED[2], f"{MERGED[2]}.index", f"{MERGED[2]}.metadata"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="fw.ds.metadata: 80 tokens .*; expected 120"):
        open_data(folder)


def test_the_log_of_datatrove_in_the_same_folder_counts_the_tasks(tmp_path):
    """A pipeline of four tasks, of which the last one has not finished."""
    folder, _ = run_datatrove(tmp_path, num_files=4, tasks=4, shuffle=True, log="out")
    assert len(open_data(folder).train.shards) == 4
    (folder / "completions" / "00003").unlink()
    for file in folder.glob("00003_*"):
        file.unlink()
    with pytest.raises(UserError, match="completions: 3 complete tasks .*; expected 4"):
        open_data(folder)


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".ds"])
def test_a_copy_of_a_foreign_shard_is_refused(tmp_path, suffix):
    """As a browser names it that fetches a file again: the same tokens twice."""
    for number in range(2):
        content = np.arange(number, 2000 + number, dtype="<u2")
        if suffix == ".npy":
            np.save(tmp_path / f"fw_train_{number}.npy", content)
        elif suffix == ".bin":
            write_shard(tmp_path / f"fw_train_{number}.bin", content)
        else:
            content.tofile(tmp_path / f"fw_train_{number}.ds")
    open_data(tmp_path)
    shutil.copy(tmp_path / f"fw_train_1{suffix}", tmp_path / f"fw_train_1 (1){suffix}")
    with pytest.raises(UserError, match=f"the same tokens as in fw_train_1.*{suffix}"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "names, gap",
    [
        (["fw_val_000000", "fw_train_000001", "fw_train_000003"], 2),
        (["fw_val_000000", "fw_train_000002"], 1),
        (["part-0", "part-1", "part-10"], 2),
        (["fw_val_000000", "fw_train_000000", "fw_train_000001"], None),
        (["fw_train_000500", "fw_train_000502"], None),
        (["CC-2024-10", "CC-2024-18"], None),
        (["a_val", "a_train"], None),
    ],
)
def test_a_gap_in_the_numbers_of_foreign_shards_is_refused(tmp_path, names, gap):
    for i, name in enumerate(names):
        write_shard(tmp_path / f"{name}.bin", np.full(40, i, dtype=np.uint16))
    if gap is None:
        open_data(tmp_path)
        return
    with pytest.raises(UserError, match=f"{names[-1]}.bin: number {gap} before it is missing"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "fw_val_000000.bin",
        "validation-00000.bin",
        "valid.bin",
        "fw.val.bin",
        "val_00000_00000_doc_shuffled.ds",
    ],
)
def test_the_validation_split_is_known_by_its_name(tmp_path, name):
    for i, file in enumerate((name, f"train.{name[-3:].lstrip('.')}")):
        content = np.full(40, i, dtype=np.uint16)
        if name.endswith(".ds"):
            content.tofile(tmp_path / file)
        else:
            write_shard(tmp_path / file, content)
    assert open_data(tmp_path).val.read(0, 40).tolist() == [0] * 40


def test_a_link_in_place_of_a_headerless_file_is_refused(tmp_path):
    """Any file on the machine would otherwise be read as tokens."""
    (tmp_path / "private").write_bytes(b"0123456789")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "00000_merged.ds").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="00000_merged.ds: a symbolic link"):
        open_data(tmp_path / "d")


# ------------------------------------------------------------------------------------ fingerprint


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("position", [1024, 1300, -1])
def test_the_fingerprint_sees_a_flipped_bit_of_a_small_corpus(tmp_path, foreign, position):
    make_data(tmp_path)
    if foreign:
        (tmp_path / "manifest.json").unlink()
    fingerprint = open_data(tmp_path).fingerprint
    assert open_data(tmp_path).fingerprint == fingerprint
    for shard in ("c_val_000000.bin", SHARD, "c_train_000002.bin"):
        content = bytearray((tmp_path / shard).read_bytes())
        place = min(position, len(content) - 2) if position > 0 else len(content) - 1
        content[place] ^= 1
        (tmp_path / shard).write_bytes(content)
        assert open_data(tmp_path).fingerprint != fingerprint
        content[place] ^= 1
        (tmp_path / shard).write_bytes(content)


def test_the_fingerprint_is_of_the_data_and_not_of_their_place(tmp_path):
    make_data(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_data(tmp_path / "a").fingerprint == open_data(tmp_path / "b").fingerprint


def test_the_fingerprint_of_a_large_shard_reads_samples_of_it_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SAMPLES", 8)
    monkeypatch.setattr(tokens, "SAMPLE_BYTES", 64)
    folder = make_data(tmp_path / "d", shards=((50, "val"), (5000, "train")), end_token=200)
    shard = folder / "c_train_000001.bin"
    good = shard.read_bytes()
    fingerprint = open_data(folder).fingerprint
    seen = set()
    for place in range(1024, len(good), 32):
        patch(shard, place, bytes([good[place] ^ 1]))
        if open_data(folder).fingerprint != fingerprint:
            seen.add(place)
        patch(shard, place, good[place : place + 1])
    assert max(seen) >= len(good) - 64  # the end
    assert len(seen) < (len(good) - 1024) // 32 // 4  # not everything
    assert max(seen) - min(seen) > len(good) // 2  # and spread


# --------------------------------------------------------------------------- reading needs no more


def test_reading_writes_nothing(tmp_path):
    make_data(tmp_path / "d")
    earlier = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "d").iterdir()}
    folder_time = (tmp_path / "d").stat().st_mtime_ns
    open_data(tmp_path / "d")
    verify(tmp_path / "d")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "d").iterdir()} == earlier
    assert (tmp_path / "d").stat().st_mtime_ns == folder_time


def test_more_shards_than_files_may_be_open(tmp_path):
    """Under the limit of 256 open files that macOS has."""
    pytest.importorskip("resource")
    make_data(tmp_path, shards=[(40, "val")] + [(40, "train")] * 300, end_token=200)
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from tokens import open_data\n"
        "train = open_data(sys.argv[1]).train\n"
        "read_at_once = train.read(0, len(train)).tolist()\n"
        "one_by_one = [int(train.read(i, i + 1)[0]) for i in range(len(train))]\n"
        "assert len(train) == 12000 and read_at_once == one_by_one\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {}},
        {"shards": [5]},
        {"shards": [{"name": "../secret.bin", "tokens": 1, "sha256": ""}]},
        {"shards": [{"name": "/etc/passwd", "tokens": 1, "sha256": ""}]},
        {"shards": [{"name": "c_train_000001.bin", "tokens": "1", "sha256": ""}]},
        {"shards": [{"name": "c_train_000001.bin", "tokens": True, "sha256": ""}]},
        {"shards": [{"name": "c_train_000001.bin", "tokens": 10**30, "sha256": ""}]},
        {"shards": [{"name": "manifest.json", "tokens": 1, "sha256": ""}]},
        {"shards": [{"name": "a.bin", "tokens": 1, "sha256": ""}] * 2},
        {"encoding": 5},
        {"encoding": "gpt2"},
        {"vocab_size": 10**18},
        {"vocab_size": 257.0},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, change):
    make_data(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json: "):
        open_data(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"files": {}}', "[]", "5", "[" * 10**5])
def test_other_json_as_manifest_is_refused(tmp_path, content):
    make_data(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json: "):
        open_data(tmp_path)


NPY_HEADERS = [
    "{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000000000000,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-9,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (9.0,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': 9, }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (9,), }",
    "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (9,), }",
    "{'descr': ('<u2', (10**9,)), 'fortran_order': False, 'shape': (9,), }",
    "(" * 5000,
    "__import__('os').system('true')",
    "",
    "\0" * 100,
]


@pytest.mark.parametrize("header", NPY_HEADERS, ids=lambda header: header[:70])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_foreign_npy_header_is_refused(tmp_path, header, version):
    length = struct.pack("<H" if version == 1 else "<I", len(header) + 1)
    content = b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + b"\n" + bytes(18)
    (tmp_path / "a_val_000000.npy").write_bytes(content)
    with pytest.raises(UserError, match="a_val_000000.npy"):
        open_data(tmp_path)


def test_mutated_shards_and_manifests_are_read_or_refused(tmp_path):
    """600 random changes of a byte or of the length, in files of every format."""
    random = np.random.default_rng(0)
    for suffix in ("bin", "npy", "ds"):
        (tmp_path / suffix).mkdir()
    make_data(tmp_path / "bin")
    np.save(tmp_path / "npy" / "a_val_000000.npy", np.arange(50, dtype=np.uint16))
    np.save(tmp_path / "npy" / "a_train_000001.npy", np.arange(50, dtype=np.uint16))
    np.arange(40, dtype="<u2").tofile(tmp_path / "ds" / "0.ds")
    (tmp_path / "ds" / "0.ds.metadata").write_text("gpt2|2\n40\n40 T")
    for folder in tmp_path.iterdir():
        names = sorted(file.name for file in folder.iterdir())
        for _ in range(200):
            file = folder / names[random.integers(len(names))]
            good = file.read_bytes()
            bad = bytearray(good)
            # Half of the changes hit the first 128 bytes, where headers are.
            end = min(128, len(bad)) if random.random() < 0.5 else len(bad)
            bad[random.integers(end)] = random.integers(256)
            if random.random() < 0.2:
                bad = bad[: random.integers(len(bad))]
            file.write_bytes(bad)
            try:
                verify(folder)
            except UserError as error:
                assert str(folder) in str(error)
            finally:
                file.write_bytes(good)


def test_a_downloaded_shard_is_taken_only_if_it_is_right(tmp_path):
    entry = write_shard(tmp_path / "download.bin", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match="the download was damaged"):
        add_downloaded_shard(tmp_path / "download.bin", tmp_path / "a.bin", "0" * 64)
    assert not (tmp_path / "a.bin").exists()
    added = add_downloaded_shard(tmp_path / "download.bin", tmp_path / "a.bin", entry["sha256"])
    assert added == entry | {"name": "a.bin"} and (tmp_path / "a.bin").exists()


# ----------------------------------------------------------------------------------- training order

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
    """Chi-square of the places of 50 windows over many epochs; bias would favour some places."""
    n, epochs = 50, 4000
    order = training_windows(0, n * epochs, n, 7).reshape(epochs, n)
    counts = np.stack(
        [np.bincount(order[:, place], minlength=n) for place in range(n)]
    )  # (place, window)
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    degrees = (n - 1) ** 2
    assert abs(chi_square - degrees) < 6 * np.sqrt(2 * degrees)


def test_the_fingerprint_of_many_shards_reads_no_more_than_of_few(tmp_path, monkeypatch):
    """With room for 8 blocks, of 40 shards every tenth is read. Names and lengths all count."""
    monkeypatch.setattr(tokens, "SAMPLES", 8)
    for i in range(40):
        np.full(20, i, dtype="<u2").tofile(tmp_path / f"{i:02d}.ds")
    fingerprint = open_data(tmp_path).fingerprint
    seen = []
    for i in range(40):
        patch(tmp_path / f"{i:02d}.ds", 0, b"x")
        if open_data(tmp_path).fingerprint != fingerprint:
            seen.append(i)
        np.full(20, i, dtype="<u2").tofile(tmp_path / f"{i:02d}.ds")
    assert seen == [0, 10, 20, 30]
    np.full(21, 5, dtype="<u2").tofile(tmp_path / "05.ds")
    assert open_data(tmp_path).fingerprint != fingerprint


# ---------------------------------------------------------------------------- reading while in use


def test_a_shard_that_is_cut_off_while_it_is_in_use_is_refused_by_name(tmp_path):
    """Mapped into memory it would kill the process."""
    np.arange(100, dtype="<u2").tofile(tmp_path / "00000_a.ds")
    data = open_data(tmp_path)
    os.truncate(tmp_path / "00000_a.ds", 2 * 50 + 1)
    assert data.train.read(0, 50).tolist() == list(range(50))
    with pytest.raises(UserError, match=r"00000_a.ds: ends at token 50\b"):
        data.train.read(40, 60)


@pytest.mark.skipif(not hasattr(os, "pread"), reason="opens a file each time")
def test_few_files_are_open_at_a_time(tmp_path):
    import resource

    for i in range(1200):
        np.full(2, i, dtype="<u2").tofile(tmp_path / f"{i:04d}.ds")
    data = open_data(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, limits[1]))
    try:
        assert data.train.read(0, len(data.train))[::2].tolist() == list(range(1080))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_corpus_prepared_anew_in_its_place_is_read_anew(tmp_path):
    for first in (0, 100):
        for name in ("0.ds", "1.ds"):
            (tmp_path / name).unlink(missing_ok=True)
            np.arange(first, first + 9, dtype="<u2").tofile(tmp_path / name)
        assert open_data(tmp_path).train.read(0, 1) == [first]
