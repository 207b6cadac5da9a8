"""fineweb.py: every source gives build-nanogpt's token stream, whatever the threads and kills.

Commands run in processes of their own, forked from one that has imported everything, because
importing takes longer than the work. The hub's real clients talk to a stand-in on localhost.
KILLS=30 kills 30 times instead of five.
"""

import contextlib
import csv
import dataclasses
import gzip
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import hypothesis
import hypothesis.strategies
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tiktoken
from tools import ROOT, Hub

import fineweb
import tokens
from fineweb import PrepareConfig, prepare
from support import documents as support_documents
from support import shards as token_files
from support.script import UserError, run_script

END = "<|endoftext|>"


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Random text with what tends to go wrong: empty documents, runs, NUL, <|endoftext|>."""
    rng = random.Random(seed)
    words = [
        "the",
        " quick",
        "Fox's",
        "\n\n",
        "  ",
        "naïve",
        "日本",
        "🙂",
        "1234",
        "\0",
        "\t",
        "def f(x):",
        ".",
        ",",
        END,
        "a" * 50,
    ]
    return ["".join(rng.choices(words, k=rng.randrange(60))) for _ in range(n)]


def write_parquet(file: Path, documents: list, row_group_size: int = 100) -> None:
    """FineWeb-Edu's columns."""
    n = len(documents)
    columns = {
        "text": documents,
        "id": [f"<urn:uuid:{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": ["https://example.org"] * n,
        "file_path": ["s3://x"] * n,
        "language": ["en"] * n,
        "language_score": [0.9] * n,
        "token_count": [1] * n,
        "score": [3.1] * n,
        "int_score": [3] * n,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=row_group_size)


def reference(documents: list[str]) -> list[int]:
    """build-nanogpt's stream, with tiktoken alone."""
    encoding = tiktoken.get_encoding("gpt2")
    stream = []
    for document in documents:
        stream.append(encoding.eot_token)
        stream.extend(encoding.encode_ordinary(document))
    return stream


def shards(folder: Path) -> list[list[int]]:
    """Tokens of each shard, in order, after checking every size and hash."""
    token_files.verify(folder)
    return [
        np.fromfile(folder / entry["name"], dtype="<u2", offset=1024).tolist()
        for entry in token_files.read_manifest(folder)["shards"]
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"
    }


def quiet(*lines):
    pass


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    """Small corpora, yet hundreds of batches that may end in another order."""
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 5000)


@pytest.fixture(scope="module")
def documents():
    return make_documents(1500)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("parquet")
    for i in range(3):
        write_parquet(
            folder / f"{i:03d}.parquet", documents[500 * i : 500 * i + 500], row_group_size=180
        )
    return str(folder / "*.parquet")


# ------------------------------------------------------------------------------------- the stream


def cut(stream: list[int], size: int) -> list[list[int]]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def test_shards_equal_the_reference_for_rows_that_datasets_reads(tmp_path, parquet):
    """The rows come from `datasets`, the tokens from tiktoken alone, as in build-nanogpt."""
    import datasets

    rows = datasets.load_dataset(
        "parquet", data_files=parquet, split="train", cache_dir=tmp_path / "cache"
    )["text"]
    folder = prepare(
        PrepareConfig(input=(parquet,), out=str(tmp_path / "o"), shard_tokens=5000, workers=2),
        quiet,
    )
    assert shards(folder) == cut(reference(list(rows)), 5000)
    names = sorted(file.name for file in folder.glob("*.bin"))
    assert [name.split("_", 1)[1] for name in names[-1:] + names[:2]] == [
        "val_000000.bin",
        "train_000001.bin",
        "train_000002.bin",
    ]


def test_the_number_of_threads_changes_no_byte(tmp_path, parquet):
    written = []
    for workers in (1, 2, 4):
        out = str(tmp_path / str(workers))
        config = PrepareConfig(input=(parquet,), out=out, shard_tokens=5000, workers=workers)
        written.append(contents(prepare(config, quiet)))
    assert written[0] == written[1] == written[2]


def write_csv(file: Path, documents: list, delimiter: str) -> None:
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(["id", "body"])
        writer.writerows(enumerate(documents))


def write_every_format(folder: Path, documents: list[str]) -> dict[str, PrepareConfig]:
    """The same documents in every format, and how each is read."""
    import zstandard

    rows = [{"id": i, "body": text} for i, text in enumerate(documents)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "texts").mkdir()
    for i, text in enumerate(documents):
        (folder / f"texts/{i:04d}.txt").write_bytes(text.encode())
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.JSONL").write_bytes(lines)
    (folder / "c.ndjson").write_bytes(lines)
    (folder / "lines.json").write_bytes(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "objects.json").write_text(json.dumps(rows, indent=1))
    (folder / "strings.json").write_text(json.dumps(documents))
    write_csv(folder / "f.csv", documents, ",")
    write_csv(folder / "g.TSV", documents, "\t")
    (folder / "h.csv.gz").write_bytes(gzip.compress((folder / "f.csv").read_bytes()))
    table = pyarrow.table({"body": documents})
    pyarrow.parquet.write_table(table, folder / "i.PARQUET", row_group_size=30)
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    with pyarrow.ipc.new_file(folder / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    (folder / "k.text").write_bytes(f"\n{END}\n".join(documents).encode())
    configs = {"texts": PrepareConfig(input=(f"{folder}/texts",))}
    configs["texts/*.txt"] = PrepareConfig(input=(f"{folder}/texts/*.txt",))
    for file in sorted(folder.iterdir()):
        if file.is_file():
            configs[file.name] = PrepareConfig(input=(str(file),), text_column="body")
    configs["k.text"] = PrepareConfig(input=(f"{folder}/k.text",), split_on=f"\\n{END}\\n")
    return configs


FORMATS = (
    "texts texts/*.txt a.jsonl b.JSONL c.ndjson lines.json d.jsonl.gz e.jsonl.zst objects.json"
    " strings.json f.csv g.TSV h.csv.gz i.PARQUET stream.arrow file.arrow k.text"
)


@pytest.mark.parametrize("name", FORMATS.split())
def test_every_format_gives_the_documents_from_every_position(
    tmp_path, documents, monkeypatch, name
):
    """A source opened again at any of its positions goes on exactly there."""
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 2000)
    # END separates text, so it cannot be inside. csv.reader takes \r and \r\n alike in quotes.
    documents = [text.replace(END, "") for text in documents[:100]] + ["last"]
    config = write_every_format(tmp_path, documents)[name]
    source = support_documents.file_source(config, support_documents.expand(config.input))
    batches = list(fineweb.in_batches(source(None)))
    assert len(batches) > 5
    assert [text for batch in batches for text in batch.documents] == documents
    fractions = [batch.fraction for batch in batches]
    assert fractions == sorted(fractions) and fractions[-1] <= 1
    for i, batch in enumerate(batches):
        position = json.loads(json.dumps(batch.position))
        rest = [row.document for row in source(position)]
        assert rest == [text for later in batches[i + 1 :] for text in later.documents]


def test_files_of_several_formats_are_one_corpus(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "two"])
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "c.txt").write_text("four")
    config = PrepareConfig(input=(str(tmp_path),))
    rows = support_documents.file_source(config, support_documents.expand(config.input))(None)
    assert [row.document for row in rows] == ["one", "two", "three", "four"]


def test_max_tokens_ends_the_stream_there(tmp_path, parquet, documents):
    folder = prepare(
        PrepareConfig(
            input=(parquet,), out=str(tmp_path / "o"), shard_tokens=3000, max_tokens=10_000
        ),
        quiet,
    )
    assert shards(folder) == cut(reference(documents)[:10_000], 3000)


def test_small_corpora_validate_on_the_last_tenth(tmp_path):
    """Cut between documents when there are ten, inside the novel when there is one."""
    novel = " ".join(f"word{i}" for i in range(2000))
    (tmp_path / "novel.txt").write_text(novel)
    (tmp_path / "many.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} {i} {i} " * (i % 5)}) + "\n" for i in range(100))
    )
    stream = reference([novel])
    val, train = shards(
        prepare(PrepareConfig(input=(str(tmp_path / "novel.txt"),), out=str(tmp_path / "a")), quiet)
    )
    assert train + val == stream and len(val) == len(stream) // 10
    val, train = shards(
        prepare(
            PrepareConfig(input=(str(tmp_path / "many.jsonl"),), out=str(tmp_path / "b")), quiet
        )
    )
    assert train + val == reference([f"{i} {i} {i} " * (i % 5) for i in range(100)])
    assert val[0] == 50256 and abs(len(val) - len(train) / 9) < 20


def test_batches_are_read_only_as_far_ahead_as_allowed():
    """However long the source, what has been read and not yet passed on stays below the limit."""

    class Now:
        def submit(self, function, *args):
            future = Future()
            future.set_result(function(*args))
            return future

    characters_read = 0

    def endless():
        nonlocal characters_read
        while True:
            batch = fineweb.Batch(["a" * 900], [], {}, None)
            characters_read += batch.characters
            yield batch

    encoding = tokens.get_encoding("bytes")
    results = fineweb.encode_in_order(Now(), encoding, endless(), most_characters=6000)
    for number, _ in zip(range(1, 50), results, strict=False):
        assert characters_read - 1000 * number <= 6000


# ------------------------------------------------------------------------------------------ kills


def command(flags: list[str], output: Path, patient: bool) -> None:
    """fineweb.py's command line, in a process of its own."""
    sys.argv = ["fineweb.py", *flags]
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
    if not patient:
        time.sleep = lambda seconds: None
    run_script(fineweb.main)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def start(hub, tmp_path_factory):
    """start(flags...) runs a command and returns its process; process.lines() is its output."""
    outputs = tmp_path_factory.mktemp("outputs")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_fineweb", "datasets"])
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(outputs / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    # One that an earlier test file has started has another environment. There is no public way.
    stop_server = multiprocessing.forkserver._forkserver._stop
    stop_server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # The clients read the environment when they are imported there.
        multiprocessing.forkserver.ensure_running()

    processes = []

    def run(*flags, patient: bool = True):
        output = outputs / str(len(list(outputs.iterdir())))
        output.touch()
        process = context.Process(target=command, args=(list(map(str, flags)), output, patient))
        process.start()
        process.lines = lambda: output.read_text().splitlines()
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.join()
    stop_server()


@pytest.fixture(scope="module")
def run(start):
    """run(flags...) gives exit code and lines of a command that does not wait between attempts."""

    def run_to_the_end(*flags):
        process = start(*flags, patient=False)
        process.join(120)
        lines = process.lines()
        assert process.exitcode in (0, 2) and not any("Traceback" in line for line in lines), lines
        return process.exitcode, lines

    return run_to_the_end


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, start):
    """Flags of a run of a few seconds, what it writes when nothing disturbs it, and its seconds."""
    folder = tmp_path_factory.mktemp("long")
    rng = random.Random(1)
    for i in range(3):
        texts = ["".join(rng.choices("abcdefghij \n", k=4000)) for _ in range(800)]
        texts[10:700:100] = [None] * 7  # skipped, and counted in the manifest
        write_parquet(folder / f"in/{i}.parquet", texts, row_group_size=160)
    flags = ["--input", folder / "in/*.parquet", "--shard-tokens", 300_000, "--workers", 2]
    process, began = start(*flags, "--out", folder / "whole"), time.monotonic()
    process.join()
    assert process.exitcode == 0, process.lines()
    return flags, contents(folder / "whole"), time.monotonic() - began


def test_kills_at_random_moments_change_nothing(tmp_path, start, long_run):
    flags, whole, seconds = long_run
    for _ in range(int(os.environ.get("KILLS", 5))):
        process = start(*flags, "--out", tmp_path / "o")
        time.sleep(random.SystemRandom().uniform(0, 0.7) * seconds)
        process.kill()
        process.join()
    process = start(*flags, "--out", tmp_path / "o")
    process.join()
    assert process.exitcode == 0, process.lines()
    assert contents(tmp_path / "o") == whole


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_process_is_told_who_has_the_directory(tmp_path, start, long_run):
    flags = long_run[0]
    process = start(*flags, "--out", tmp_path / "o")
    wait_for((tmp_path / "o" / "manifest.partial.json").exists)
    os.kill(process.pid, signal.SIGSTOP)
    second = start(*flags, "--out", tmp_path / "o")
    second.join()
    assert second.exitcode == 2 and f"in use by process {process.pid} on " in second.lines()[-1]
    process.kill()


def test_ctrl_c_twice_ends_it(tmp_path, start):
    """One document of many megabytes keeps a thread busy; the others wait in the queue."""
    text = "word " * 400_000
    write_parquet(tmp_path / "in.parquet", [f"{i} {text}" for i in range(20)])
    flags = ["--input", tmp_path / "in.parquet", "--workers", 1, "--out", tmp_path / "o"]
    process = start(*flags)
    wait_for((tmp_path / "o" / "manifest.partial.json").exists)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130


def test_a_full_disk_ends_with_its_name_and_the_next_call_goes_on(tmp_path, parquet):
    """A limit on file size stands in for the disk: manifests fit, shards do not."""
    folder = tmp_path / "o"
    config = PrepareConfig(input=(parquet,), out=str(folder), shard_tokens=5000, workers=2)
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, -1)); "
        "import fineweb; from support.script import run_script; "
        f"run_script(lambda: fineweb.prepare(fineweb.{config!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "o/" in done.stderr.splitlines()[-1]
        and "expected to read or write it; check" in done.stderr.splitlines()[-1]
    )
    assert not list(folder.glob("*.bin"))
    whole = prepare(
        PrepareConfig(input=(parquet,), out=str(tmp_path / "whole"), shard_tokens=5000, workers=2),
        quiet,
    )
    assert contents(prepare(config, quiet)) == contents(whole)


def test_damage_to_a_committed_shard_is_found_when_going_on(tmp_path, parquet, monkeypatch):
    config = PrepareConfig(input=(parquet,), out=str(tmp_path / "o"), shard_tokens=5000)
    monkeypatch.setattr(fineweb.Writer, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config, quiet)
    file = (
        tmp_path
        / "o"
        / token_files.read_manifest(tmp_path / "o", partial=True)["shards"][1]["name"]
    )
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match=file.name):
        prepare(config, quiet)


# ---------------------------------------------------------------------------------- bad documents


def test_documents_longer_than_a_shard_or_just_filling_it(tmp_path):
    encoding = tiktoken.get_encoding("gpt2")
    texts = [
        " a" * 99,
        " b" * 99,
        " c" * 1000,
        " d" * 98,
        "e",
    ]  # one token each: shards of 100 are just filled, then much overrun
    assert len(encoding.encode_ordinary(texts[0])) == 99
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = prepare(
        PrepareConfig(
            input=(str(tmp_path / "a.jsonl"),), out=str(tmp_path / "o"), shard_tokens=100
        ),
        quiet,
    )
    assert shards(folder) == cut(reference(texts), 100)


@pytest.mark.parametrize(
    "text",
    ["\ud800 lone", "a\0b", "x" * 200_000, f"a{END}b", "\r\n", "\ufeff"],
    ids=["surrogate", "NUL", "run", "eot", "crlf", "bom"],
)
def test_odd_text_is_tokenised_as_tiktoken_does(text):
    encoding = tokens.get_encoding("gpt2")
    assert fineweb.encode_batch(encoding, [text]).tolist() == reference([text])


@pytest.mark.parametrize("middle", [" ", "\n", "\u2003", " \n", "\r\n\t"])
def test_a_run_of_a_million_spaces_has_the_tokens_of_the_rules(middle):
    """tiktoken alone overflows its stack here; of a run at the end of a text it does not."""
    encoding = tokens.get_encoding("gpt2")
    run = middle * (1_000_000 // len(middle) + 1)
    encoded = fineweb.encode_document(encoding, "a" + run + "b c").tolist()
    before_last = encoding.encode_ordinary("a" + run[:-1])
    assert encoded == before_last + encoding.encode_ordinary(run[-1] + "b c")


PIECES = ["a", " ", "  ", "\n", "\t", "\x1c", "\u2003", "\x85", "\xa0", "1", "'s", "'", "!"]
PIECES += ["日", "é", "🙂", "\r\n", "\u200b", END]


@hypothesis.given(hypothesis.strategies.lists(hypothesis.strategies.sampled_from(PIECES)))
def test_a_text_encoded_in_parts_has_the_tokens_of_the_whole(pieces):
    text = "".join(pieces)
    for name in ("gpt2", "bytes"):
        encoding = tokens.get_encoding(name)
        with mock.patch.object(support_documents, "PART_CHARACTERS", 3):
            assert fineweb.encode_document(encoding, text).tolist() == encoding.encode_ordinary(
                text
            )


def texts(config: PrepareConfig) -> list:
    """The documents that a source yields."""
    source = support_documents.file_source(config, support_documents.expand(config.input))
    return [row.document for row in source(None)]


def reasons(config: PrepareConfig) -> list[str | None]:
    """Why each document is skipped; None where it is not."""
    return [None if isinstance(text, str) else text.reason for text in texts(config)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_a_document_that_is_not_utf_8_is_skipped_and_its_neighbours_are_not(tmp_path, name):
    file = tmp_path / name
    column = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"text": column})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, file)
    elif name == "a.arrow":
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif name == "a.jsonl":
        file.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n{"text": "fine"}\n')
    elif name == "a.txt":
        file.write_bytes(b"good|\xff|fine")
    else:
        file.write_bytes(b"text\ngood\n\xff\nfine\n")
    assert reasons(PrepareConfig(input=(str(file),), split_on="|")) == [None, "not UTF-8", None]


@pytest.mark.parametrize(
    "name", ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.zst", "e.csv", "f.arrow"]
)
def test_a_document_that_is_too_long_is_skipped_with_its_place(tmp_path, monkeypatch, name):
    """And its neighbours are not. It is longer than what is read at once."""
    monkeypatch.setattr(support_documents, "MOST_DOCUMENT_BYTES", 2**20)
    documents = ["good", "long " * 2**18, "fine"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    file = tmp_path / name
    kind = name.split(".")[1]
    if kind == "csv":
        file.write_text("text\n" + "\n".join(documents))
    elif kind == "arrow":
        table = pyarrow.table({"text": documents})
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        compression = support_documents.COMPRESSIONS.get(file.suffix)
        with pyarrow.output_stream(str(file), compression=compression) as out:
            out.write("|".join(documents).encode() if kind == "txt" else lines)
    config = PrepareConfig(input=(str(file),), split_on="|")
    assert reasons(config) == [None, "too long", None]
    place = {"txt": "from byte 5 on", "jsonl": "from byte 17 on"}.get(kind, "row 2")
    assert texts(config)[1].place == f"{file}, {place}"


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_text_file_that_is_one_document_may_be_longer(tmp_path, monkeypatch, compression):
    """Whole corpora come as one file. A compressed one may not be much smaller than its text."""
    monkeypatch.setattr(support_documents, "MOST_DOCUMENT_BYTES", 2**20)
    file = tmp_path / ("a.txt.zst" if compression else "a.txt")
    with pyarrow.output_stream(str(file), compression=compression) as out:
        out.write(b"long " * 2**18)
    assert reasons(PrepareConfig(input=(str(file),))) == ["too long" if compression else None]


def test_unusable_documents_are_counted_and_too_many_refused(tmp_path):
    good = [json.dumps({"text": f"text {i}"}) for i in range(60)]
    bad = ['{"text": null}', '{"other": 1}', '{"text": 7}', "[1]", "{", '{"text": "\xff"}']
    file, said = tmp_path / "a.jsonl", []
    file.write_bytes("\n".join(good + bad).encode("latin-1"))
    folder = prepare(PrepareConfig(input=(str(file),), out=str(tmp_path / "o")), said.append)
    skipped = {"missing text": 2, "int instead of text": 1, "not a JSON object": 2, "not UTF-8": 1}
    manifest = token_files.read_manifest(folder)
    assert (manifest["documents"], manifest["skipped"]) == (60, skipped)
    assert (
        "skipped documents: 2 missing text, 1 int instead of text, 2 not a JSON object, 1 not UTF-8"
        in said[-1]
    )
    file.write_bytes("\n".join(good[:20] + bad).encode("latin-1"))
    with pytest.raises(UserError, match="6 of 26 documents cannot be used"):
        prepare(PrepareConfig(input=(str(file),), out=str(tmp_path / "p")), quiet)


def test_text_in_another_encoding_is_refused_with_its_line_and_the_command_that_converts(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(input=(str(tmp_path / "a.txt"),), out=str(tmp_path / "o")), quiet)
    assert "a.txt, line 2 has the byte 0xe9" in str(error.value)
    assert "iconv" in str(error.value) and "--text-column" not in str(error.value)


def test_one_bad_file_among_few_is_skipped_and_named_at_the_end(tmp_path):
    said = []
    for name, content in (("a", b"one"), ("b", b"\xff"), ("c", b"three")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    prepare(PrepareConfig(input=(f"{tmp_path}/*.txt",), out=str(tmp_path / "o")), said.append)
    assert f"1 not UTF-8 ({tmp_path}/b.txt, line 1 has the byte 0xff)" in said[-1]


def test_a_source_without_text_is_refused(tmp_path):
    for name, content in (
        ("empty.txt", ""),
        ("empty.jsonl", ""),
        ("blank.jsonl", '{"text": ""}\n' * 20),
    ):
        (tmp_path / name).write_text(content)
    write_parquet(tmp_path / "none.parquet", [])
    for name in ("empty.txt", "empty.jsonl", "blank.jsonl", "none.parquet"):
        with pytest.raises(UserError, match=f"{name}: .* documents? without any text"):
            prepare(
                PrepareConfig(input=(str(tmp_path / name),), out=str(tmp_path / "o" / name)), quiet
            )


def test_bad_input_ends_with_exit_code_2_and_one_line(tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "hello there"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"<html>")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:-20])
    write_parquet(tmp_path / "p.parquet", ["a"])
    (tmp_path / "o").mkdir()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    np.save(tmp_path / "o" / "a_val_000000.npy", np.zeros(3, dtype=np.uint16))
    done = prepare(PrepareConfig(input=(str(good),), out=str(tmp_path / "done")), quiet)
    for flags, named in (
        (["--input", "nothing-*.txt"], "nothing-*.txt: no such file"),
        (["--input", tmp_path / "empty"], "empty: nothing to read"),
        (["--input", tmp_path / "fifo"], "fifo: nothing to read; expected a regular file"),
        (["--input", "/dev/zero"], "/dev/zero: nothing to read; expected a regular file"),
        (["--input", tmp_path / "broken.parquet"], "broken.parquet: "),
        (["--input", tmp_path / "broken.jsonl.gz"], "broken.jsonl.gz: "),
        (
            ["--input", tmp_path / "p.parquet", "--text-column", "body"],
            "--text-column body: no such column; expected one of text, id, dump",
        ),
        (["--input", good, "--out", tmp_path / "o"], "holds a_val_000000.npy and no manifest"),
        (
            ["--input", good, "--out", done, "--tokenizer", "bytes"],
            "encoding was 'gpt2', now 'bytes'",
        ),
        (["--input", good, "--shard-tokens", "0"], "--shard-tokens 0"),
        (["--verify", tmp_path / "no"], f"{tmp_path / 'no'}: no such data directory"),
    ):
        arguments = [str(flag) for flag in flags] + (
            [] if "--out" in flags else ["--out", str(tmp_path / "new")]
        )
        with pytest.raises(UserError) as error:
            config = fineweb.parse_flags(PrepareConfig, PrepareConfig(), "", arguments)
            token_files.verify(Path(config.verify)) if config.verify else prepare(config, quiet)
        assert named in str(error.value) and str(error.value).count("; ") >= 2


# --------------------------------------------------------------------- what users really bring


NOT_TEXT = "a.pdf b.DOCX c.zip d.exe e.png f.tar.gz g.parquet.gz h.safetensors i.xlsx j.mp3"


@pytest.mark.parametrize("name", NOT_TEXT.split())
def test_what_is_not_text_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("looks like text")
    with pytest.raises(UserError, match=f"{name}: .* cannot be read"):
        texts(PrepareConfig(input=(str(tmp_path / name),)))


@pytest.mark.parametrize(
    "name", ["a.py", "b.c", "c.tex", "d.html", "Makefile", "e.MD", "f.unheard"]
)
def test_source_files_of_any_name_are_text(tmp_path, name):
    (tmp_path / name).write_text("int x;")
    assert texts(PrepareConfig(input=(str(tmp_path / name),))) == ["int x;"]


def test_a_json_file_that_is_neither_an_array_nor_lines_is_refused(tmp_path):
    for content in ("[1, 2", "[" * 200_000, '["a" "b"]'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match="a.json: not JSON"):
            texts(PrepareConfig(input=(str(tmp_path / "a.json"),)))


def test_an_unknown_column_of_a_csv_file_is_refused_with_those_it_has(tmp_path):
    (tmp_path / "a.csv").write_text("title,body\nx,y\n")
    with pytest.raises(UserError, match="--text-column text: .* one of title, body"):
        texts(PrepareConfig(input=(str(tmp_path / "a.csv"),)))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("split_on", ["\\n\\n", "\\n--\\n"])
def test_a_separator_of_lines_is_found_whatever_the_line_endings(tmp_path, ending, split_on):
    separator = split_on.replace("\\n", ending)
    (tmp_path / "a.txt").write_bytes(separator.join(["one", "two", "three"]).encode())
    config = PrepareConfig(input=(str(tmp_path / "a.txt"),), split_on=split_on)
    assert texts(config) == ["one", "two", "three"]


def test_a_carriage_return_may_be_part_of_the_separator(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n\nstill two")
    config = PrepareConfig(input=(str(tmp_path / "a.txt"),), split_on="\\r\\n\\r\\n")
    assert texts(config) == ["one", "two\n\nstill two"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_of_end_of_text_are_pointed_out_with_the_flag_that_splits_there(tmp_path, ending):
    file, said = tmp_path / "stories.txt", []
    file.write_bytes(f"{ending}{END}{ending}".join(["A story."] * 20).encode())
    config = PrepareConfig(input=(str(file),), out=str(tmp_path / "a"))
    prepare(config, said.append)
    assert any(f"--split-on '{END}'" in line for line in said)
    said.clear()
    prepare(dataclasses.replace(config, out=str(tmp_path / "b"), split_on=END), said.append)
    assert "20 documents" in said[0] and not any("--split-on" in line for line in said)


def test_a_corpus_of_one_document_and_very_long_ones_are_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "LONG_DOCUMENT", 100_000)
    said = []
    (tmp_path / "one.txt").write_text("A novel. " * 100)
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "' + "b c " * 26_000 + '"}\n')
    for name in ("one.txt", "two.jsonl"):
        out = str(tmp_path / "o" / name)
        config = PrepareConfig(input=(str(tmp_path / name),), out=out, tokenizer="bytes")
        prepare(config, said.append)
    assert any("the whole corpus is one document" in line for line in said)
    assert any("the longest document has 104,000 characters" in line for line in said)


def test_a_folder_is_read_as_its_texts(tmp_path):
    folder = tmp_path / "my-novels"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("no")
    (folder / "more/b.MD").write_text("two")
    (folder / "more/c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (folder / "more/loop").symlink_to(folder)
    for spelling in (str(folder), f"{folder}/", f"{tmp_path}/./my-novels"):
        config = PrepareConfig(input=(spelling,))
        assert texts(config) == ["one", "two", "three"] and config.corpus == "my-novels"


def test_globs_find_files_in_folders_with_brackets_and_do_not_follow_circles(tmp_path, monkeypatch):
    folder = tmp_path / "novels [1850] *"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/b.txt").write_text("two")
    (folder / "a.txt").write_text("one")
    (folder / ".c.txt").write_text("hidden")
    os.mkfifo(folder / "d.txt")
    for name in ("x", "y"):
        (folder / f"deep/{name}").symlink_to(folder)  # 2**40 paths, if they were followed
    assert texts(PrepareConfig(input=(f"{folder}/*.txt",))) == ["one"]
    assert texts(PrepareConfig(input=(f"{folder}/**/*.txt",))) == ["one", "two"]
    assert texts(PrepareConfig(input=(f"{folder}/**",))) == ["one", "two"]
    monkeypatch.chdir(folder)
    assert texts(PrepareConfig(input=("./**/*.txt",))) == ["one", "two"]
    assert texts(PrepareConfig(input=("[ab].txt", "deep/*/?.txt"))) == ["one", "two", "one", "one"]


LONG_NAME = "n" * 241 + ".txt"
ODD_NAMES = [LONG_NAME, "日" * 80 + ".txt", os.fsdecode(b"\xff\xfe.txt"), 'it\'s "a" $(name).txt']
ODD_NAMES += ["-rf.txt", "..txt", "a\nb.txt"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_any_file_name_gives_a_directory_that_can_be_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("It was a dark and stormy night. " * 50)
    folder = fineweb.prepare_path(name, "bytes", quiet)
    assert len(tokens.open_data(folder).train) == 1441
    assert re.fullmatch(r"[\w.-]+", folder.name)


def test_the_printed_command_can_be_pasted_whatever_the_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    arguments = ["fineweb.py", "--input", "a.txt", "--out", "my data; rm -rf 'x'"]
    monkeypatch.setattr(sys, "argv", arguments)
    fineweb.main()
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("train on it: ")
    assert shlex.split(command) == ["python", "train_gpt2.py", "--data", arguments[-1]]


def test_prepared_data_are_accepted_without_writing_anything(tmp_path, monkeypatch):
    """As on a read-only mount: no lock, no file touched."""
    (tmp_path / "a.txt").write_text("some text " * 20)
    config = PrepareConfig(input=(str(tmp_path / "a.txt"),), out=str(tmp_path / "o"))
    prepare(config, quiet)
    names = sorted(os.listdir(tmp_path / "o"))

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fineweb, "locked", read_only)
    monkeypatch.setattr(token_files, "write_file", read_only)
    assert prepare(config, quiet) == tmp_path / "o"
    assert sorted(os.listdir(tmp_path / "o")) == names


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"name": "../victim/a_val_000000.bin", "tokens": 1, "sha256": "0"}]},
        {"shards": [{"name": "/etc/passwd", "tokens": 1, "sha256": "0"}]},
        {"shards": [{"name": "a_val_000000.bin", "tokens": "1", "sha256": "0"}]},
        {"position": None},
        {"position": {"source": {"file": -1, "at": 0}}},
        {"source": "x"},
    ],
    ids=["outside", "absolute", "type", "no position", "short position", "source"],
)
def test_a_partial_manifest_of_somebody_else_cannot_reach_outside(tmp_path, change):
    victim = tmp_path / "victim" / "a_val_000000.bin"
    victim.parent.mkdir()
    victim.write_text("precious")
    (tmp_path / "a.txt").write_text("some text " * 20)
    folder = tmp_path / "o"
    folder.mkdir()
    (folder / "b_train_000001.bin").symlink_to(victim)
    partial = {"encoding": "gpt2", "source": {}, "shards": [], "position": None}
    partial["position"] = dataclasses.asdict(fineweb.Position())
    (folder / "manifest.partial.json").write_text(json.dumps(partial | change))
    with pytest.raises(UserError, match="manifest.partial.json"):
        prepare(PrepareConfig(input=(str(tmp_path / "a.txt"),), out=str(folder)), quiet)
    assert victim.read_text() == "precious"


def test_what_a_kill_left_is_removed_and_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.txt").write_text("some text " * 20)
    folder = tmp_path / "o"
    folder.mkdir()
    (folder / "a_train_000007.bin").symlink_to(victim)
    partial = {"encoding": "gpt2", "source": {}, "shards": []}
    partial["position"] = dataclasses.asdict(fineweb.Position())
    (folder / "manifest.partial.json").write_text(json.dumps(partial))
    prepare(PrepareConfig(input=(str(tmp_path / "a.txt"),), out=str(folder)), quiet)
    token_files.verify(folder)
    assert victim.read_text() == "precious"


# ------------------------------------------------------------------------------- CPU cores


CGROUPS = {
    "version 2": (
        "0::/jobs/1\n",
        {"jobs/cpu.max": "150000 100000", "jobs/1/cpu.max": "max 100000"},
        1.5,
    ),
    "version 2 in a container": ("0::/\n", {"cpu.max": "200000 100000"}, 2.0),
    "version 1": (
        "3:cpu,cpuacct:/docker/x\n0::/\n",
        {"cpu/docker/x/cpu.cfs_quota_us": "50000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
        0.5,
    ),
    "version 1 without limit": (
        "3:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        None,
    ),
    "none": ("", {}, None),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_the_quota_of_the_control_group_is_found(tmp_path, name):
    groups, files, quota = CGROUPS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for path, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert fineweb.cgroup_quota(str(tmp_path)) == quota


@pytest.mark.parametrize("slurm, quota, cores", [("", None, 8), ("3", None, 3), ("3", 1.2, 2)])
def test_the_least_of_affinity_quota_and_slurm_is_the_number_of_cores(
    monkeypatch, slurm, quota, cores
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    monkeypatch.setattr(fineweb, "cgroup_quota", lambda: quota)
    assert fineweb.num_cores() == cores


# ---------------------------------------------------------------------------------------- the hub


def fails(status: int, times: int, matching: str):
    """A fault: the first matching requests get this status, or are dropped half-way if it is 0."""
    left = [times]

    def fault(handler, path):
        if matching not in path or left[0] == 0:
            return False
        left[0] -= 1
        handler.reply(
            status or 206, b"x" * 1000, {"X-Repo-Commit": "a" * 40}, send=None if status else 500
        )
        return True

    return fault


def in_turn(*faults):
    return lambda handler, path: any(fault(handler, path) for fault in faults)


@pytest.fixture(scope="module")
def long_documents(documents):
    """Several tasks' worth."""
    return [20 * text for text in documents]


@pytest.fixture
def edu(hub, long_documents):
    """A dataset with FineWeb-Edu's layout and columns, and the flags that read it."""
    hub.fault, hub.commit = lambda handler, path: False, "a" * 40
    folder = hub.root / "someone/edu"
    for i in range(3):
        write_parquet(
            folder / f"sample/10BT/{i:03d}_00000.parquet", long_documents[500 * i : 500 * i + 500]
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
        "  - split: train\n    path: sample/10BT/*\n---\n"
    )
    return ["--dataset", "someone/edu", "--shard-tokens", 40_000, "--workers", 1]


def test_streams_the_hub_through_errors_and_names_what_is_not_there(
    hub, run, edu, tmp_path, long_documents
):
    hub.fault = in_turn(
        fails(429, 2, "/revision/main"),
        fails(503, 2, "001_00000.parquet"),
        fails(0, 2, "002_00000.parquet"),
        fails(500, 1, "/tree/"),
    )
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 0, lines
    assert shards(tmp_path / "o") == cut(reference(long_documents), 40_000)
    assert token_files.read_manifest(tmp_path / "o")["revision"] == "a" * 40
    assert f"train on it: python train_gpt2.py --data {tmp_path / 'o'}" in lines
    for flags, named in (
        (["--dataset", "someone/else"], "someone/else"),
        (["--name", "other"], "other"),
        (["--split", "other"], "--split other"),
    ):
        code, lines = run(*edu, *flags, "--out", tmp_path / "p")
        assert code == 2 and named in lines[-1]


def test_no_network_then_a_moved_revision_then_the_pinned_one(
    hub, run, edu, tmp_path, long_documents
):
    """Shards before the failure stay, and going on needs the pinned commit and no file twice."""
    hub.fault = fails(503, 10**9, "002_00000.parquet")
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 2 and "check the names and the connection" in lines[-1]
    assert len(token_files.read_manifest(tmp_path / "o", partial=True)["shards"]) > 2
    hub.fault, hub.commit = lambda handler, path: False, "b" * 40
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 2 and f"revision was '{'a' * 40}', now '{'b' * 40}'" in lines[-1]
    hub.commit = "a" * 40
    hub.requests.clear()
    assert run(*edu, "--out", tmp_path / "o", "--revision", "a" * 40)[0] == 0
    assert shards(tmp_path / "o") == cut(reference(long_documents), 40_000)
    assert (
        sum("000_00000.parquet" in path for _, path, _ in hub.requests) <= 1
    )  # `datasets` looks at the first file's footer for the columns


def test_other_formats_on_the_hub_go_through_a_datasets_stream(hub, run, tmp_path, documents):
    (hub.root / "someone/lines").mkdir(parents=True)
    (hub.root / "someone/lines/train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents)
    )
    hub.fault = lambda handler, path: False
    code, lines = run(
        "--dataset",
        "someone/lines",
        "--name",
        "",
        "--shard-tokens",
        10_000,
        "--out",
        tmp_path / "o",
    )
    assert code == 0, lines
    assert shards(tmp_path / "o") == cut(reference(documents), 10_000)


def test_pretokenized_shards_are_fetched_checked_and_never_kept_when_wrong(hub, run, tmp_path):
    folder = hub.root / "kjj0/finewebedu10B-gpt2"
    folder.mkdir(parents=True)
    for i, split in enumerate(("val", "train", "train", "train")):
        token_files.write_shard(
            folder / f"finewebedu_{split}_{i:06d}.bin",
            np.random.default_rng(i).integers(0, 50257, 3000, dtype=np.uint16),
        )
    flags = ["--pretokenized", "--max-tokens", 8000, "--out", tmp_path / "o"]

    right = (folder / "finewebedu_train_000001.bin").read_bytes()
    for wrong in (
        b"<html>".ljust(len(right)),
        right[:-1] + b"\7",
    ):  # a captive portal's page; a bit flipped on the way

        def answer(handler, path, wrong=wrong):
            if "resolve" not in path or "train_000001" not in path or handler.command != "GET":
                return False
            handler.reply(200, wrong, {"ETag": '"x"', "X-Repo-Commit": "a" * 40})
            return True

        hub.fault = answer
        code, lines = run(*flags)
        assert code == 2 and "finewebedu_train_000001.bin" in lines[-1]
        assert [file.name for file in (tmp_path / "o").glob("*.bin")] == [
            "finewebedu_val_000000.bin"
        ]
    hub.fault = in_turn(
        fails(429, 1, "/revision/main"), fails(503, 1, "train_000001"), fails(0, 1, "train_000002")
    )
    hub.requests.clear()
    assert run(*flags)[0] == 0
    for name in (
        "finewebedu_val_000000.bin",
        "finewebedu_train_000001.bin",
        "finewebedu_train_000002.bin",
    ):
        assert (tmp_path / "o" / name).read_bytes() == (folder / name).read_bytes()
    assert (
        len(tokens.open_data(tmp_path / "o").train) == 6000
        and token_files.verify(tmp_path / "o") == 9000
    )
    assert not any(
        "000000.bin" in path or "000003.bin" in path for _, path, _ in hub.requests
    )  # kept; not needed


def endless(sent: list[int], matching: str):
    """A fault: matching files come without an end. sent[0] becomes the bytes sent, 1 GB at most."""

    def fault(handler, path):
        if matching not in path or "resolve" not in path or handler.command != "GET":
            return False
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            while sent[0] < 2**30:
                sent[0] += handler.wfile.write(bytes(2**20))
        return True

    return fault


def test_a_parquet_stream_that_does_not_end_is_ended(hub, run, edu, tmp_path):
    sent = [0]
    hub.fault = endless(sent, "001_00000.parquet")
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 2 and "001_00000.parquet: more bytes came" in lines[-1]
    assert sent[0] < 2**26


def test_a_download_that_does_not_end_is_ended(hub, run, tmp_path):
    folder = hub.root / "someone/endless"
    folder.mkdir(parents=True)
    for name in ("x_val_000000.bin", "x_train_000001.bin"):
        token_files.write_shard(folder / name, np.zeros(3000, dtype=np.uint16))
    sent = [0]
    hub.fault = endless(sent, ".bin")
    flags = ["--pretokenized", "--dataset", "someone/endless", "--out", tmp_path / "o"]
    code, lines = run(*flags)
    assert code == 2 and "x_val_000000.bin: more bytes came" in lines[-1]
    assert sent[0] < 2**28
    hub.fault = lambda handler, path: False
    assert run(*flags)[0] == 0


# The heads of a README, by which `datasets` finds the files of a dataset and their types.
READMES = {
    "private": 'configs: [{config_name: a, data_files: "/etc/passwd"}]',
    "outside": 'configs: [{config_name: a, data_files: "../../../../../../etc/passwd"}]',
    "other": 'configs: [{config_name: a, data_files: "hf://datasets/someone/mine@main/a.jsonl"}]',
    "circular": "configs: &a [*a]",
    "no-yaml": ": : :",
    "no-list": "configs: [5]",
    "code": "configs: !!python/object/apply:os.system [touch /tmp/pygpt2-canary]",
    "types": "dataset_info: {features: 5}",
    "numbers": "dataset_info: {splits: [{name: train, num_bytes: x, num_examples: x}]}",
}


@pytest.mark.parametrize("name", READMES)
def test_a_readme_reaches_for_nothing_outside_of_its_repository(hub, run, tmp_path, name):
    hub.fault = lambda handler, path: False
    for repository in (name, "mine"):
        folder = hub.root / "someone" / repository
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.jsonl").write_text('{"text": "private words"}\n' * 20)
    (hub.root / "someone" / name / "README.md").write_text(f"---\n{READMES[name]}\n---\n")
    code, lines = run("--dataset", f"someone/{name}", "--name", "", "--out", tmp_path / "o")
    assert code == 2
    assert f"someone/{name}" in lines[-1]
    assert not list((tmp_path / "o").glob("*.bin"))
    assert not Path("/tmp/pygpt2-canary").exists()


def test_a_script_in_a_repository_is_not_run(hub, run, tmp_path):
    hub.fault = lambda handler, path: False
    folder = hub.root / "someone/script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    code, lines = run("--dataset", "someone/script", "--name", "", "--out", tmp_path / "o")
    assert code == 2 and "someone/script" in lines[-1]
    assert not (tmp_path / "canary").exists()


SHARD_FILES = ["a_val_000000.bin", "a_train_000001.bin"]
DATASET_INFOS = {
    "a list": [],
    "no commit": {"sha": None},
    "a path for a commit": {"sha": "../../x"},
    "a number for files": {"siblings": 5},
    "files without a name": {"siblings": [{"rfilename": 5}]},
    "files without a size": {"siblings": [{"rfilename": name} for name in SHARD_FILES]},
    "words for sizes": {"siblings": [{"rfilename": name, "size": "x"} for name in SHARD_FILES]},
}


@pytest.mark.parametrize("kind", DATASET_INFOS)
def test_an_answer_of_another_shape_is_one_line(hub, run, tmp_path, kind):
    info = DATASET_INFOS[kind]
    if info:
        info = {"id": "someone/odd", "sha": "a" * 40, "tags": [], "siblings": []} | info

    def answer(handler, path):
        if "/api/datasets/someone/odd" not in path:
            return False
        handler.reply_json(info)
        return True

    hub.fault = answer
    flags = ["--pretokenized", "--dataset", "someone/odd", "--name", ""]
    code, lines = run(*flags, "--out", tmp_path / "o")
    assert code == 2 and "someone/odd" in lines[-1]
    if "commit" in kind:
        assert "the commit" in lines[-1]


# ------------------------------------------------------------------------------ for train_gpt2.py


def test_prepare_path_prepares_once_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    Path("novel.txt").write_text("It was a dark and stormy night. " * 50)
    folder = fineweb.prepare_path("novel.txt", "bytes", said.append)
    assert (
        folder.parent == Path("data")
        and folder.name.startswith("novel-")
        and len(tokens.open_data(folder).train) == 1441
    )
    before = contents(folder)
    assert (
        fineweb.prepare_path("novel.txt", "bytes", said.append)
        == folder
        == fineweb.prepare_path(str(folder), "bytes", said.append)
    )
    assert contents(folder) == before
    others = {
        fineweb.prepare_path("novel.txt", "gpt2", quiet),
        fineweb.prepare_path("*.txt", "gpt2", quiet),
    }
    Path("novel.txt").write_text("It was a bright and stormy day. " * 50)
    others.add(fineweb.prepare_path("novel.txt", "bytes", quiet))
    assert folder not in others and len(others) == 3
    with pytest.raises(UserError, match="nothing.txt"):
        fineweb.prepare_path("nothing.txt", "bytes", quiet)


def test_first_run_corpus_is_python_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tokens.open_data(fineweb.prepare_first_run(quiet))
    assert (
        data.encoding == "bytes"
        and 5e6 < len(data.train) < 3e7
        and 0.08 < len(data.val) / len(data.train) < 0.14
    )
    text = tokens.get_encoding("bytes").decode(data.val.read(0, len(data.val)).tolist())
    assert text.startswith(END) and text.count("\ndef ") > 100 and text.count("import ") > 100


def test_a_source_of_which_hardly_anything_is_read_has_a_time_left():
    lines = []
    progress = fineweb.Progress(lines.append, 0)
    progress.next_line = 0
    progress.show(1, 1e-20, shard=1)
    assert "left" in lines[0]
