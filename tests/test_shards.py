"""support/shards.py: token files of ours and of other programs, and the faults that are refused."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tools import ROOT, run_python, write_counting_data

from support.huggingface import save_tokenizer
from support.script import UserError
from support.shards import (
    Shard,
    add_downloaded_shard,
    fingerprint,
    holds_tokens,
    listed,
    verify,
    write_shard,
)
from tokens import get_encoding, open_data

# --------------------------------------------------------------------------------------- our shards


def test_the_format_is_that_of_llm_c(tmp_path):
    """Read as llm.c's and modded-nanogpt's loaders do, from their description of the format."""
    entry = write_shard(tmp_path / "a.bin", np.array([1, 2, 50256], dtype=np.uint16))
    content = (tmp_path / "a.bin").read_bytes()
    header, body = struct.unpack("<256i", content[:1024]), content[1024:]
    assert header[:3] == (20240520, 1, 3) and not any(header[3:])
    assert struct.unpack("<3H", body) == (1, 2, 50256)
    assert entry == {"name": "a.bin", "tokens": 3, "sha256": hashlib.sha256(content).hexdigest()}


def test_a_folder_holds_tokens_or_not(tmp_path):
    assert not holds_tokens(tmp_path) and not holds_tokens(tmp_path / "missing")
    (tmp_path / "a.txt").touch()
    (tmp_path / "manifest.partial.json").touch()
    assert not holds_tokens(tmp_path) and not holds_tokens(tmp_path / "a.txt")
    for name in ("manifest.json", "a.bin", "a.npy", "a.ds"):
        (tmp_path / name).touch()
        assert holds_tokens(tmp_path)
        (tmp_path / name).unlink()


def test_verify_reads_everything(tmp_path):
    assert verify(write_counting_data(tmp_path, modulus=257)) == 200


def test_a_downloaded_shard_is_taken_only_if_it_is_right(tmp_path):
    entry = write_shard(tmp_path / "download.bin", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match="the download was damaged"):
        add_downloaded_shard(tmp_path / "download.bin", tmp_path / "a.bin", "0" * 64)
    assert not (tmp_path / "a.bin").exists()
    added = add_downloaded_shard(tmp_path / "download.bin", tmp_path / "a.bin", entry["sha256"])
    assert added == entry | {"name": "a.bin"} and (tmp_path / "a.bin").exists()


# ------------------------------------------------------------------------------------------- faults

SHARD = "c_train_000001.bin"


def patch(file, position, new):
    content = bytearray(file.read_bytes())
    content[position : position + len(new)] = new
    file.write_bytes(content)


def swap(folder):
    a, b = folder / SHARD, folder / "c_train_000002.bin"
    a.rename(folder / "t")
    b.rename(a)
    (folder / "t").rename(b)


def replace_by(make):
    def fault(folder):
        (folder / SHARD).unlink()
        make(folder / SHARD)

    return fault


def write_manifest_text(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


FAULTS = {
    "truncated": (lambda d: os.truncate(d / SHARD, 1100), SHARD),
    "truncated in the header": (lambda d: os.truncate(d / SHARD, 10), SHARD),
    "empty": (lambda d: os.truncate(d / SHARD, 0), SHARD),
    "trailing bytes": (lambda d: os.truncate(d / SHARD, 1226), SHARD),
    "wrong magic": (lambda d: patch(d / SHARD, 0, b"X"), SHARD),
    "wrong version": (lambda d: patch(d / SHARD, 4, b"\7"), SHARD),
    "big-endian": (lambda d: patch(d / SHARD, 0, struct.pack(">3i", 20240520, 1, 100)), SHARD),
    "negative count": (lambda d: patch(d / SHARD, 8, struct.pack("<i", -5)), SHARD),
    "missing": (lambda d: (d / SHARD).unlink(), SHARD),
    "extra": (lambda d: shutil.copy(d / SHARD, d / "c_train_000003.bin"), "c_train_000003.bin"),
    "swapped": (swap, SHARD),
    "a directory": (replace_by(os.mkdir), SHARD),
    "a dangling link": (replace_by(lambda file: file.symlink_to("nowhere")), SHARD),
    "manifest is not JSON": (write_manifest_text("{"), "manifest.json"),
    "manifest is a list": (write_manifest_text("[]"), "manifest.json"),
    "manifest lacks hashes": (write_manifest_text('{"shards": [{"name": "a"}]}'), "manifest.json"),
    "another encoding": (write_manifest_text('{"shards": [], "encoding": "klingon"}'), "klingon"),
    "not finished": (
        lambda d: (d / "manifest.json").rename(d / "manifest.partial.json"),
        "manifest.partial.json",
    ),
    "no shards at all": (lambda d: shutil.rmtree(d) or d.mkdir(), ""),
    "no directory": (shutil.rmtree, ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_on_opening(tmp_path, name):
    spoil, named = FAULTS[name]
    open_data(write_counting_data(tmp_path / "d"))
    spoil(tmp_path / "d")
    with pytest.raises(UserError, match=f"{tmp_path / 'd'}.*{named}.*; expected .*; "):
        open_data(tmp_path / "d")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {}},
        {"shards": [{"name": "../secret.bin", "tokens": 1, "sha256": ""}]},
        {"shards": [{"name": "/etc/passwd.bin", "tokens": 1, "sha256": ""}]},
        {"shards": [{"name": "c_train_000001.bin", "tokens": "1", "sha256": ""}]},
        {"shards": [{"name": "manifest.json", "tokens": 1, "sha256": ""}]},
        {"shards": [{"name": "a.bin", "tokens": 1, "sha256": ""}] * 2},
        {"encoding": 5},
        {"encoding": "gpt2"},
        {"vocab_size": 10**18},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, change):
    write_counting_data(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json: "):
        listed(tmp_path)


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    write_counting_data(tmp_path)
    patch(tmp_path / SHARD, 1024 + 50, b"\1")
    with pytest.raises(UserError, match=SHARD):
        verify(tmp_path)


def test_a_token_beyond_the_vocabulary_is_found_when_read(tmp_path):
    data = open_data(write_counting_data(tmp_path))
    patch(tmp_path / SHARD, 1024 + 50, struct.pack("<H", 257))
    data.train.read(0, 25)
    with pytest.raises(UserError, match=f"{SHARD}: token 257"):
        data.train.read(20, 40)


def test_verify_ends_with_exit_code_2_and_one_line(tmp_path):
    write_counting_data(tmp_path)
    os.truncate(tmp_path / SHARD, 1100)
    done = run_python("fineweb.py", "--verify", tmp_path)
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
    assert (data.encoding, len(data.val), len(data.train)) == ("gpt2", 10, 50)
    assert verify(tmp_path) == 60


def test_build_nanogpt_shards_train_as_they_are(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(10, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(10, 40, dtype=np.uint16))
    data = open_data(tmp_path)
    assert data.val.read(0, 10).tolist() == list(range(10))
    assert data.train.read(5, 30).tolist() == list(range(15, 40))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_without_a_manifest_the_tokens_tell_the_encoding(tmp_path, name):
    text = (ROOT / "README.md").read_text()
    encoded = get_encoding(name).encode_ordinary(text)
    write_shard(tmp_path / "a.bin", np.array(encoded, dtype=np.uint16))
    assert open_data(tmp_path).encoding == name


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"pickled": 1}], dtype=object),
        np.arange(9, dtype=np.int64),
        np.arange(9, dtype=">u2"),
        np.zeros((3, 3), dtype=np.uint16),
    ],
    ids=["object", "int64", "big-endian", "two dimensions"],
)
def test_npy_of_another_kind_is_refused_without_unpickling(tmp_path, array):
    np.save(tmp_path / "a_val_000000.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match="a_val_000000.npy"):
        listed(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda c: c[:-1], lambda c: c + b"\0", lambda c: c[:9], lambda c: b"", lambda c: b"<html>"],
)
def test_npy_that_is_damaged_is_refused(tmp_path, change):
    file = tmp_path / "a_val_000000.npy"
    np.save(file, np.arange(9, dtype=np.uint16))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match="a_val_000000.npy"):
        listed(tmp_path)


def test_files_of_two_formats_are_refused(tmp_path):
    write_shard(tmp_path / "a.bin", np.zeros(9, dtype=np.uint16))
    np.save(tmp_path / "a.npy", np.zeros(9, dtype=np.uint16))
    with pytest.raises(UserError, match=r"several formats \(.bin, .npy\)"):
        listed(tmp_path)


# ---------------------------------------------------------------------------------- datatrove's .ds


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


def tokens_of(folder):
    """All tokens of a corpus that names no split: those for training, then those for validation."""
    data = open_data(folder)
    train = data.train.read(0, len(data.train)).tolist()
    return train + data.val.read(0, len(data.val)).tolist()


def test_datatrove_output_is_read_as_its_documents(tmp_path):
    folder, documents = run_datatrove(tmp_path, num_files=2, tasks=2, shuffle=False)
    encoding = get_encoding("gpt2")
    expected = []
    for text in documents:  # datatrove ends documents with <|endoftext|>
        expected += encoding.encode_ordinary(text) + [encoding.eot_token]
    assert tokens_of(folder) == expected
    assert len(open_data(folder).val) == len(expected) // 10


def test_one_input_file_and_many_tasks_of_datatrove_are_divided(tmp_path):
    """All tokens are in one file then, and each other task leaves an empty unshuffled one."""
    folder, documents = run_datatrove(tmp_path, num_files=1, tasks=4, shuffle=True)
    assert sum(file.stat().st_size == 0 for file in folder.glob("*_unshuffled.ds")) == 3
    total = sum(len(get_encoding("gpt2").encode_ordinary(text)) + 1 for text in documents)
    assert len(tokens_of(folder)) == total


def test_the_log_of_datatrove_in_the_same_folder_counts_the_tasks(tmp_path):
    """A pipeline of four tasks, of which the last one has not finished."""
    folder, _ = run_datatrove(tmp_path, num_files=4, tasks=4, shuffle=True, log="out")
    assert len(open_data(folder).train.shards) == 4
    (folder / "completions" / "00003").unlink()
    for file in folder.glob("00003_*"):
        file.unlink()
    with pytest.raises(UserError, match="completions: 3 complete tasks .*; expected 4"):
        open_data(folder)


NAMES = [f"{task:05d}_00000_doc_shuffled.ds" for task in range(3)]


def datatrove_folder(folder, names=NAMES, beside=(".index", ".metadata")):
    """Files as datatrove names them, 40 tokens each."""
    folder.mkdir()
    for name in names:
        np.arange(500, 540, dtype="<u2").tofile(folder / name)
        if ".index" in beside:
            (folder / f"{name}.index").write_bytes(struct.pack("<2Q", 20, 40))
        if ".metadata" in beside:
            (folder / f"{name}.metadata").write_text("gpt2|2\n40\n40 T")
    return folder


@pytest.mark.parametrize("beside", [(".index", ".metadata"), (".index",), (".metadata",)])
def test_index_or_metadata_tells_the_length(tmp_path, beside):
    folder = datatrove_folder(tmp_path / "d", beside=beside)
    assert tokens_of(folder) == 3 * list(range(500, 540))
    os.truncate(folder / NAMES[1], 60)
    with pytest.raises(UserError, match=f"{NAMES[1]}: 60 bytes; expected 80 bytes"):
        listed(folder)


def test_a_task_that_has_not_finished_is_refused(tmp_path):
    """It has written tokens, but neither index nor metadata."""
    folder = datatrove_folder(tmp_path / "d")
    np.arange(40, dtype="<u2").tofile(folder / "00003_unshuffled.ds")
    with pytest.raises(UserError, match="00003_unshuffled.ds: neither .index nor .metadata"):
        listed(folder)


@pytest.mark.parametrize("metadata", ["gpt2|4\n40\n40T", "gpt2|2\n39\n39T", "gpt2|2", ""])
def test_metadata_that_does_not_agree_is_refused(tmp_path, metadata):
    folder = datatrove_folder(tmp_path / "d")
    (folder / f"{NAMES[0]}.metadata").write_text(metadata)
    with pytest.raises(UserError, match=NAMES[0]):
        listed(folder)


@pytest.mark.parametrize("tokenizer, is_gpt2", [
    ("gpt2", True),
    ("openai-community/gpt2-xl", True),
    ("/data/tokenizer.json", True),
    ("Unknown Tokenizer|2", True),
    ("mistralai/Mistral-7B-v0.1", False),
    ("EleutherAI/gpt-neox-20b", False),
])  # fmt: skip
def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer, is_gpt2):
    folder = datatrove_folder(tmp_path / "d")
    (folder / f"{NAMES[2]}.metadata").write_text(f"{tokenizer}|2\n40\n40 T")
    if is_gpt2:
        assert len(tokens_of(folder)) == 120
        return
    with pytest.raises(UserError, match=f"{NAMES[2]}.metadata: the tokenizer '{tokenizer}'"):
        listed(folder)


def test_merged_files_are_compared_with_their_total(tmp_path):
    names = [f"{number:03d}_fw.ds" for number in range(3)]
    folder = datatrove_folder(tmp_path / "d", names)
    (folder / "fw.ds.metadata").write_text("gpt2|2\n120\n120 T")
    assert len(tokens_of(folder)) == 120
    for beside in ("", ".index", ".metadata"):
        (folder / f"{names[2]}{beside}").unlink()
    with pytest.raises(UserError, match="fw.ds.metadata: 80 tokens .*; expected 120"):
        listed(folder)


def test_metadata_without_its_tokens_is_refused(tmp_path):
    folder = datatrove_folder(tmp_path / "d")
    (folder / NAMES[2]).unlink()
    with pytest.raises(UserError, match=f"{NAMES[2]}.metadata: 0 tokens .*; expected 40"):
        listed(folder)


# ------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_is_of_the_data_and_not_of_their_place(tmp_path):
    write_counting_data(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_a_shard_of_other_tokens_has_another_fingerprint(tmp_path):
    write_counting_data(tmp_path / "a", modulus=100)
    write_counting_data(tmp_path / "b", modulus=99)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_without_a_manifest_names_and_sizes_are_the_fingerprint(tmp_path):
    prints = set()
    for name, count in (("a", 9), ("b", 9), ("a", 10)):
        folder = tmp_path / f"{name}{count}"
        folder.mkdir()
        write_shard(folder / f"{name}.bin", np.zeros(count, dtype=np.uint16))
        prints.add(fingerprint(folder))
    assert len(prints) == 3


# ------------------------------------------------------------------------------------------ reading


def test_opening_and_reading_write_nothing(tmp_path):
    folder = write_counting_data(tmp_path / "d", modulus=257)
    paths = [folder, *sorted(folder.iterdir())]
    earlier = [path.stat().st_mtime_ns for path in paths]
    open_data(folder)
    verify(folder)
    assert [folder, *sorted(folder.iterdir())] == paths
    assert [path.stat().st_mtime_ns for path in paths] == earlier


def test_more_shards_than_files_may_be_open(tmp_path):
    """Under the limit of 256 open files that macOS has."""
    pytest.importorskip("resource")
    write_counting_data(tmp_path, shards=[(40, "val")] + [(40, "train")] * 300, modulus=200)
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from tokens import open_data\n"
        "train = open_data(sys.argv[1]).train\n"
        "assert len(train.read(0, len(train))) == 12000\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_threads_read_at_the_same_time(tmp_path):
    train = open_data(write_counting_data(tmp_path, modulus=257)).train
    expected = train.windows(np.arange(15), 10)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: train.windows(np.arange(15), 10), range(100)):
            assert np.array_equal(found, expected)


def test_a_shard_that_is_cut_off_while_it_is_in_use_is_refused_by_name(tmp_path):
    """Mapped into memory it would kill the process."""
    write_shard(tmp_path / "a.bin", np.arange(100, dtype=np.uint16))
    shard = Shard.open(tmp_path / "a.bin")
    os.truncate(tmp_path / "a.bin", 1024 + 2 * 50 + 1)
    assert shard.read(0, 50, vocab_size=257).tolist() == list(range(50))
    with pytest.raises(UserError, match=r"a.bin: ends at token 50\b"):
        shard.read(40, 20, vocab_size=257)


def test_mutated_shards_and_manifests_are_read_or_refused(tmp_path):
    """300 random changes of a byte or of the length, in files of every format."""
    random = np.random.default_rng(0)
    write_counting_data(tmp_path / "bin", modulus=257)
    datatrove_folder(tmp_path / "ds")
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "a_val_000000.npy", np.arange(50, dtype=np.uint16))
    for folder in sorted(tmp_path.iterdir()):
        names = sorted(file.name for file in folder.iterdir())
        for _ in range(100):
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
