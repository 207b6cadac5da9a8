"""fineweb.py: every source gives build-nanogpt's token stream, whatever the threads and kills.

Commands run in processes of their own, forked from one that has imported everything, because
importing takes longer than the work. The hub's real clients talk to a stand-in on localhost.
KILLS=30 kills 30 times instead of five, and disturbs each format of the hub in more ways.
"""

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
import pyarrow.parquet
import pytest
import tiktoken
from test_documents import END, make_documents, write_arrow, write_csv
from tools import ROOT, Hub

import fineweb
import tokens
from fineweb import PrepareConfig, prepare, tokens_for
from support import documents as support_documents
from support import shards as token_files
from support.script import UserError, run_script


def write_parquet(file: Path, documents: list, row_group_size: int = 100) -> None:
    """FineWeb-Edu's columns."""
    n = len(documents)
    columns = {
        "text": documents,
        "id": [f"<urn:uuid:{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": ["https://example.org"] * n,
        "language_score": [0.9] * n,
        "token_count": [1] * n,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=row_group_size)


def write_lines(file: Path, texts: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def reference(documents: list[str]) -> list[int]:
    """build-nanogpt's stream, with tiktoken alone."""
    encoding = tiktoken.get_encoding("gpt2")
    stream = []
    for document in documents:
        stream.append(encoding.eot_token)
        stream.extend(encoding.encode_ordinary(document))
    return stream


def cut(stream: list[int], size: int) -> list[list[int]]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def shards(folder: Path) -> list[list[int]]:
    """Tokens of each shard, in order, after checking every size and hash."""
    token_files.verify(folder)
    return [
        np.fromfile(folder / entry["name"], dtype="<u2", offset=1024).tolist()
        for entry in token_files.read_manifest(folder)["shards"]
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
    }


def quiet(*lines):
    pass


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    """Small corpora, yet hundreds of batches that may end in another order."""
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 5000)


@pytest.fixture(scope="module")
def documents():
    return [text + END * (i % 50 == 0) for i, text in enumerate(make_documents(1500))]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("parquet")
    for i in range(3):
        part = documents[500 * i : 500 * i + 500]
        write_parquet(folder / f"{i:03d}.parquet", part, row_group_size=180)
    return str(folder / "*.parquet")


# ------------------------------------------------------------------------------------- the stream


def test_shards_equal_the_reference_for_rows_that_datasets_reads(tmp_path, parquet):
    """The rows come from `datasets`, the tokens from tiktoken alone, as in build-nanogpt."""
    import datasets

    cache = tmp_path / "cache"
    rows = datasets.load_dataset("parquet", data_files=parquet, split="train", cache_dir=cache)
    out = str(tmp_path / "o")
    config = PrepareConfig(input=(parquet,), out=out, shard_tokens=5000, workers=2)
    folder = prepare(config, quiet)
    assert shards(folder) == cut(reference(list(rows["text"])), 5000)
    names = sorted(file.name.split("_", 1)[1] for file in folder.glob("*.bin"))
    assert names[-1] == "val_000000.bin" and names[:2] == ["train_000001.bin", "train_000002.bin"]


def test_the_number_of_threads_changes_no_byte(tmp_path, parquet):
    written = []
    for workers in (1, 2, 4):
        out = str(tmp_path / str(workers))
        config = PrepareConfig(input=(parquet,), out=out, shard_tokens=5000, workers=workers)
        written.append(contents(prepare(config, quiet)))
    assert written[0] == written[1] == written[2]


def test_max_tokens_ends_the_stream_there(tmp_path, parquet, documents):
    out = str(tmp_path / "o")
    config = PrepareConfig(input=(parquet,), out=out, shard_tokens=3000, max_tokens=10_000)
    assert shards(prepare(config, quiet)) == cut(reference(documents)[:10_000], 3000)


def test_documents_longer_than_a_shard_or_just_filling_it(tmp_path):
    """One token each word: shards of 100 are just filled, then much overrun."""
    texts = [" a" * 99, " b" * 99, " c" * 1000, " d" * 98, "e"]
    assert len(reference(texts[:1])) == 100
    file = write_lines(tmp_path / "a.jsonl", texts)
    config = PrepareConfig(input=(str(file),), out=str(tmp_path / "o"), shard_tokens=100)
    assert shards(prepare(config, quiet)) == cut(reference(texts), 100)


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
            row = fineweb.Row("a" * 900, "a.txt", {}, 0.0)
            batch = fineweb.Batch([row])
            characters_read += batch.characters
            yield batch

    encoding = tokens.get_encoding("bytes")
    results = fineweb.encode_in_order(Now(), encoding, endless(), most_characters=6000)
    for number, _ in zip(range(1, 50), results, strict=False):
        assert characters_read - 1000 * number <= 6000


# ---------------------------------------------------------------- the validation of small corpora


def test_a_single_document_validates_on_its_last_tenth(tmp_path):
    novel = " ".join(f"word{i}" for i in range(2000))
    (tmp_path / "novel.txt").write_text(novel)
    config = PrepareConfig(input=(str(tmp_path / "novel.txt"),), out=str(tmp_path / "o"))
    val, train = shards(prepare(config, quiet))
    assert train + val == reference([novel]) and len(val) == len(train + val) // 10


def test_validation_is_spread_over_the_files_and_their_documents(tmp_path):
    """A folder validates on documents of each of its files, in an order that nothing changes."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        texts = [f"{name} {i} {'word ' * (i % 9)}" for i in range(200)]
        write_lines(folder / f"{name}.jsonl", texts)
    found = []
    for number, workers in enumerate((1, 3)):
        out = str(tmp_path / str(number))
        paths = (str(folder),) if number else tuple(f"{folder}/{name}.jsonl" for name in "abc")
        config = PrepareConfig(input=paths, out=out, workers=workers, tokenizer="bytes")
        found.append(shards(prepare(config, quiet)))
    assert found[0] == found[1]
    val, train = found[0]
    assert abs(len(val) / len(train + val) - 0.1) < 0.01
    texts = {"".join(map(chr, text)) for text in split_at(256, val)}
    for name in ("a", "b", "c"):
        assert sum(text.startswith(name) for text in texts) > 5
    everything = {"".join(map(chr, text)) for text in split_at(256, train + val)}
    assert len(everything) == 600 and len(texts) > 40


def split_at(separator: int, stream: list[int]) -> list[list[int]]:
    parts = []
    for token in stream:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_the_order_of_a_small_corpus_does_not_depend_on_where_it_lies(tmp_path):
    files = []
    for where in ("here", "elsewhere/deep"):
        for i in range(30):
            file = tmp_path / where / f"{i % 3}/{i}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"text {i}")
        config = PrepareConfig(input=(str(tmp_path / where),), out=str(tmp_path / f"o-{where[:4]}"))
        files.append(shards(prepare(config, quiet)))
    assert files[0] == files[1]
    assert sorted(files[0][1] + files[0][0]) == sorted(reference([f"text {i}" for i in range(30)]))


# --------------------------------------------------------------------------------------- encoding


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
            encoded = fineweb.encode_document(encoding, text).tolist()
        assert encoded == encoding.encode_ordinary(text)


# ------------------------------------------------------------------------------------------ kills


def command(flags: list[str], output: Path, how: dict) -> None:
    """fineweb.py's command line, in a process of its own, in small pieces.

    how: patient: wait between attempts. client_seconds: MOST_CLIENT_SECONDS. stop: (signal,
    shards): send it to oneself in the middle of what follows that many shards. forget: a negative
    control, in which a resumed preparation has forgotten its position in the files.
    """
    sys.argv = ["fineweb.py", *flags]
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
    fineweb.BATCH_CHARACTERS = how.get("batch", 5000)
    support_documents.CHUNK_BYTES = support_documents.HUB_BLOCK_BYTES = how.get("chunk", 2**22)
    support_documents.MOST_CLIENT_SECONDS = how.get("client_seconds", 60)
    if not how.get("patient"):
        time.sleep = lambda seconds: None
    if "stop" in how:
        stop_after(*how["stop"])
    if how.get("forget"):
        read_files = fineweb.read_files
        fineweb.read_files = lambda *args: read_files(*args[:-1], None)
    run_script(fineweb.main)


def stop_after(signum: int, num_shards: int) -> None:
    add = fineweb.Writer.add

    def add_or_stop(writer, *args):
        add(writer, *args)
        if len(writer.shards) >= num_shards and writer.filled:
            os.kill(os.getpid(), signum)

    fineweb.Writer.add = add_or_stop


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
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
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

    def run(*flags, **how):
        output = outputs / str(len(list(outputs.iterdir())))
        output.touch()
        process = context.Process(target=command, args=(list(map(str, flags)), output, how))
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

    def run_to_the_end(*flags, **how):
        process = start(*flags, **how)
        process.join(120)
        lines = process.lines()
        assert not any("Traceback" in line for line in lines), lines
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
    process, began = start(*flags, "--out", folder / "whole", batch=2**19), time.monotonic()
    process.join()
    assert process.exitcode == 0, process.lines()
    return flags, contents(folder / "whole"), time.monotonic() - began


def test_kills_at_random_moments_change_nothing(tmp_path, start, long_run):
    flags, whole, seconds = long_run
    for _ in range(int(os.environ.get("KILLS", 5))):
        process = start(*flags, "--out", tmp_path / "o", batch=2**19)
        time.sleep(random.SystemRandom().uniform(0, 0.7) * seconds)
        process.kill()
        process.join()
    process = start(*flags, "--out", tmp_path / "o", batch=2**19)
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
    last = done.stderr.splitlines()[-1]
    assert "o/" in last and "expected to read or write it; check" in last
    assert not list(folder.glob("*.bin"))
    whole = prepare(dataclasses.replace(config, out=str(tmp_path / "whole")), quiet)
    assert contents(prepare(config, quiet)) == contents(whole)


def test_damage_to_a_committed_shard_is_found_when_going_on(tmp_path, parquet, monkeypatch):
    config = PrepareConfig(input=(parquet,), out=str(tmp_path / "o"), shard_tokens=5000)
    monkeypatch.setattr(fineweb.Writer, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config, quiet)
    partial = token_files.read_manifest(tmp_path / "o", partial=True)
    file = tmp_path / "o" / partial["shards"][1]["name"]
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match=file.name):
        prepare(config, quiet)


# -------------------------------------------------------- each format on the hub × each disturbance


def fails(status: int, times: int, matching: str, after: int = 0):
    """A fault: so many matching requests get this status, or are dropped half-way if it is 0.

    after: how many are answered before.
    """
    seen = 0

    def fault(handler, path):
        nonlocal seen
        if matching not in path or handler.command == "HEAD":
            return False
        seen += 1
        if not after < seen <= after + times:
            return False
        handler.reply(
            status or 206, b"x" * 1000, {"X-Repo-Commit": "a" * 40}, send=None if status else 500
        )
        return True

    return fault


def in_turn(*faults):
    return lambda handler, path: any(fault(handler, path) for fault in faults)


def write_as(kind: str, file: Path, texts: list) -> None:
    if kind == "parquet":
        write_parquet(file, texts, row_group_size=20)
    elif kind == "csv":
        write_csv(file, ["id", "text"], [[i, text or ""] for i, text in enumerate(texts)])
    elif kind == "arrow":
        write_arrow(file, pyarrow.table({"text": texts}))
    elif kind == "jsonl.gz":
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        write_lines(file, texts)


# Each format, and how many requests for a file are answered before it fails in its middle.
HUB_FORMATS = {"parquet": 4, "jsonl": 8, "jsonl.gz": 1, "csv": 8, "arrow": 4}


@pytest.fixture(scope="module")
def on_hub(hub, run, tmp_path_factory):
    """For a format: flags that read it from the hub, and what an undisturbed run writes."""
    rng = random.Random(2)
    # Digits, so that a compressed file has several of the pieces that pyarrow reads.
    texts = [f"{text} {rng.getrandbits(2800):x}" for text in make_documents(600)]
    texts[5:600:100] = [None] * 6
    made = {}

    def prepare_once(kind: str):
        hub.fault, hub.commit = lambda handler, path: False, "a" * 40
        if kind not in made:
            folder = hub.root / "formats" / kind.replace(".", "-")
            folder.mkdir(parents=True)
            for i in range(3):
                write_as(kind, folder / f"{i}.{kind}", texts[200 * i : 200 * i + 200])
            flags = ["--dataset", f"formats/{folder.name}", "--name", "", "--workers", 1]
            flags += ["--shard-tokens", 20_000, "--tokenizer", "bytes"]
            out = tmp_path_factory.mktemp("whole") / "o"
            code, lines = run(*flags, "--out", out)
            assert code == 0, lines
            made[kind] = flags, contents(out)
        return made[kind]

    return prepare_once


def disturb(hub, run, flags, out, disturbances: list[str], after: int = 0, **how) -> None:
    """Prepare it with disturbances, each in another place, up to the end."""
    signals = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT}
    for number, disturbance in enumerate(disturbances):
        if disturbance in signals:
            stop = (signals[disturbance], 2 + 5 * number)
            code, lines = run(*flags, "--out", out, stop=stop, chunk=4000, **how)
        else:
            # More than the client's own attempts, 6 a request, and ours, of which there are 4.
            hub.fault = fails(503 if disturbance == "503s" else 0, 24, f"/{number}.", after)
            code, lines = run(*flags, "--out", out, chunk=4000, **how)
            hub.fault = lambda handler, path: False
        assert code != 0, f"disturbance {number} has disturbed nothing: {lines}"
    code, lines = run(*flags, "--out", out, chunk=4000, **how)
    assert code == 0, lines


DISTURBANCES = [["kill -9", "503s", "broken connection", "Ctrl-C"]]
if "KILLS" in os.environ:
    DISTURBANCES += [3 * [disturbance] for disturbance in DISTURBANCES[0]]


@pytest.mark.parametrize("disturbances", DISTURBANCES, ids=", ".join)
@pytest.mark.parametrize("kind", HUB_FORMATS)
def test_every_format_of_the_hub_resumes_byte_for_byte(
    hub, run, on_hub, tmp_path, kind, disturbances
):
    """After disturbances one after the other; with KILLS, after three of each as well."""
    flags, whole = on_hub(kind)
    disturb(hub, run, flags, tmp_path / "o", disturbances, HUB_FORMATS[kind])
    assert contents(tmp_path / "o") == whole


@pytest.mark.parametrize("kind", HUB_FORMATS)
def test_a_position_that_were_forgotten_would_be_seen(hub, run, on_hub, tmp_path, kind):
    """The negative control: a kill without the position in the files."""
    flags, whole = on_hub(kind)
    disturb(hub, run, flags, tmp_path / "o", ["kill -9"], forget=True)
    assert contents(tmp_path / "o") != whole


@pytest.mark.parametrize("kind", HUB_FORMATS)
def test_short_faults_of_the_hub_end_nothing(hub, run, on_hub, tmp_path, kind):
    """Inside one process: its client asks again, and then we do, from where it broke off."""
    flags, whole = on_hub(kind)
    after = HUB_FORMATS[kind]
    hub.fault = in_turn(fails(503, 12, "/1.", after), fails(0, 12, "/2.", after))
    code, lines = run(*flags, "--out", tmp_path / "o", chunk=4000)
    assert code == 0, lines
    assert contents(tmp_path / "o") == whole
    assert any("trying again" in line for line in lines)


# ---------------------------------------------------------------------------------------- the hub


@pytest.fixture
def edu(hub, documents):
    """A dataset with FineWeb-Edu's layout and columns, and the flags that read it."""
    hub.fault, hub.commit = lambda handler, path: False, "a" * 40
    folder = hub.root / "someone/edu"
    for i in range(3):
        part = documents[500 * i : 500 * i + 500]
        write_parquet(folder / f"sample/10BT/{i:03d}_00000.parquet", part)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
        "  - split: train\n    path: sample/10BT/*\n---\n"
    )
    return ["--dataset", "someone/edu", "--shard-tokens", 4000, "--workers", 1]


def test_streams_the_hub_through_errors_and_names_what_is_not_there(
    hub, run, edu, tmp_path, documents
):
    hub.fault = in_turn(fails(429, 2, "/revision/main"), fails(500, 1, "/tree/"))
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 0, lines
    assert shards(tmp_path / "o") == cut(reference(documents), 4000)
    assert token_files.read_manifest(tmp_path / "o")["revision"] == "a" * 40
    assert f"train on it: python train_gpt2.py --data {tmp_path / 'o'}" in lines
    for flags, named in (
        (["--dataset", "someone/else"], "someone/else"),
        (["--name", "other"], "other"),
        (["--split", "other"], "--split other"),
    ):
        code, lines = run(*edu, *flags, "--out", tmp_path / "p")
        assert code == 2 and named in lines[-1]
        assert not (tmp_path / "p").exists()  # a start that failed leaves nothing


def test_without_a_network_nothing_is_left_behind(run, hub, tmp_path, monkeypatch):
    hub.fault = fails(503, 10**9, "/")
    code, lines = run("--out", tmp_path / "edu")
    assert code == 2 and "check the names and the connection" in lines[-1]
    assert not (tmp_path / "edu").exists()
    hub.fault = lambda handler, path: False


@pytest.mark.parametrize("silent", ["/revision/", "/tree/", ".parquet"])
def test_a_silent_server_is_not_waited_for_for_ever(hub, run, edu, tmp_path, silent):
    def silence(handler, path):
        if silent in path:
            time.sleep(100)
        return False

    hub.fault = silence
    began = time.monotonic()
    code, lines = run(*edu, "--out", tmp_path / "o", client_seconds=3)
    assert code == 2 and "someone/edu" in lines[-1]
    assert time.monotonic() - began < 30  # six timeouts of a second, and no waiting in between
    hub.fault = lambda handler, path: False


def test_a_preparation_goes_on_at_its_commit_when_the_branch_has_moved(
    hub, run, edu, tmp_path, documents
):
    hub.fault = fails(503, 10**9, "002_00000.parquet")
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 2 and "check the names and the connection" in lines[-1]
    assert len(token_files.read_manifest(tmp_path / "o", partial=True)["shards"]) > 2
    hub.fault, hub.commit = lambda handler, path: False, "b" * 40

    def of_the_first_commit(handler, path):
        hub.commit = "a" * 40 if "a" * 40 in path else "b" * 40
        return False

    hub.fault = of_the_first_commit
    hub.requests.clear()
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 0, lines
    assert shards(tmp_path / "o") == cut(reference(documents), 4000)
    assert token_files.read_manifest(tmp_path / "o")["revision"] == "a" * 40
    # `datasets` looks at the first file's footer for the columns.
    assert sum("000_00000.parquet" in path for _, path, _ in hub.requests) <= 1


def test_a_tag_or_branch_is_compared_by_its_name_and_by_its_commit(hub, run, edu, tmp_path):
    flags = [*edu, "--max-tokens", 10_000, "--out", tmp_path / "o"]
    assert run(*flags, "--revision", "v1.0")[0] == 0
    for revision in ("v1.0", "a" * 40):
        code, lines = run(*flags, "--revision", revision)
        assert code == 0 and any("already prepared" in line for line in lines)
    code, lines = run(*flags, "--revision", "v2.0")
    assert code == 2 and "revision was v1.0, now v2.0" in lines[-1]


def test_rows_of_the_hub_are_skipped_by_the_rules_of_local_files(hub, run, tmp_path):
    """Structs, numbers, nulls, lone surrogates, and a column that is null at first."""
    values = [None] * 300 + ["text one", 42, {"a": 1}, "lone \ud800", "text two"] + ["more"] * 100
    write_lines(hub.root / "someone/mixed/train.jsonl", values)
    hub.fault = lambda handler, path: False
    flags = ["--dataset", "someone/mixed", "--name", "", "--shard-tokens", 50]
    code, lines = run(*flags, "--out", tmp_path / "hub")
    assert code == 0, lines
    skipped = "300 missing text, 1 int instead of text, 1 dict instead of text"
    assert any(skipped in line for line in lines)
    local = PrepareConfig(
        input=(str(hub.root / "someone/mixed/train.jsonl"),),
        out=str(tmp_path / "local"),
        shard_tokens=50,
    )
    assert shards(prepare(local, quiet)) == shards(tmp_path / "hub")


# The heads of a README, by which `datasets` finds the files of a dataset and their types.
READMES = {
    "private": 'configs: [{config_name: a, data_files: "/etc/passwd"}]',
    "outside": 'configs: [{config_name: a, data_files: "../../../../../../etc/passwd"}]',
    "other": 'configs: [{config_name: a, data_files: "hf://datasets/someone/mine@main/a.jsonl"}]',
    "no-yaml": ": : :",
    "no-list": "configs: [5]",
    "code": "configs: !!python/object/apply:os.system [touch /tmp/pygpt2-canary]",
}


@pytest.mark.parametrize("name", READMES)
def test_a_readme_reaches_for_nothing_outside_of_its_repository(hub, run, tmp_path, name):
    hub.fault = lambda handler, path: False
    for repository in (name, "mine"):
        write_lines(hub.root / "someone" / repository / "a.jsonl", ["private words"] * 20)
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


def test_pretokenized_shards_are_fetched_checked_and_never_kept_when_wrong(hub, run, tmp_path):
    folder = hub.root / "kjj0/finewebedu10B-gpt2"
    folder.mkdir(parents=True)
    for i, split in enumerate(("val", "train", "train", "train")):
        shard = np.random.default_rng(i).integers(0, 50257, 3000, dtype=np.uint16)
        token_files.write_shard(folder / f"finewebedu_{split}_{i:06d}.bin", shard)
    flags = ["--pretokenized", "--max-tokens", 8000, "--out", tmp_path / "o"]
    right = (folder / "finewebedu_train_000001.bin").read_bytes()
    # A captive portal's page, and a bit that flipped on the way.
    for wrong in (b"<html>".ljust(len(right)), right[:-1] + b"\7"):

        def answer(handler, path, wrong=wrong):
            if "resolve" not in path or "train_000001" not in path or handler.command != "GET":
                return False
            handler.reply(200, wrong, {"ETag": '"x"', "X-Repo-Commit": "a" * 40})
            return True

        hub.fault = answer
        code, lines = run(*flags)
        assert code == 2 and "finewebedu_train_000001.bin" in lines[-1]
        names = [file.name for file in (tmp_path / "o").glob("*.bin")]
        assert names == ["finewebedu_val_000000.bin"]
    hub.fault = in_turn(
        fails(429, 1, "/revision/"), fails(503, 1, "train_000001"), fails(0, 1, "train_000002")
    )
    hub.requests.clear()
    assert run(*flags)[0] == 0
    for name in ("val_000000", "train_000001", "train_000002"):
        file = f"finewebedu_{name}.bin"
        assert (tmp_path / "o" / file).read_bytes() == (folder / file).read_bytes()
    assert len(tokens.open_data(tmp_path / "o").train) == 6000
    assert token_files.verify(tmp_path / "o") == 9000
    fetched = [path for _, path, _ in hub.requests]
    assert not any("000000.bin" in path or "000003.bin" in path for path in fetched)


def test_a_dataset_without_shards_is_refused_by_name(hub, run, tmp_path):
    hub.fault = lambda handler, path: False
    write_lines(hub.root / "someone/texts/a.jsonl", ["a"])
    flags = ["--pretokenized", "--dataset", "someone/texts", "--name", "", "--out", tmp_path / "o"]
    code, lines = run(*flags)
    assert code == 2 and "someone/texts: no *_val_*.bin" in lines[-1]


# ------------------------------------------------------------------- what is skipped, and refused


def test_unusable_documents_are_counted_and_too_many_damaged_ones_refused(tmp_path):
    good = [json.dumps({"text": f"text {i}"}) for i in range(60)]
    bad = ['{"text": null}', '{"other": 1}', '{"text": 7}', "[1]", "{", '{"text": "\xff"}']
    file, said = tmp_path / "a.jsonl", []
    file.write_bytes("\n".join(good + bad).encode("latin-1"))
    folder = prepare(PrepareConfig(input=(str(file),), out=str(tmp_path / "o")), said.append)
    skipped = {
        "missing text": 2,
        "int instead of text": 1,
        "list instead of text": 1,
        "not JSON": 1,
        "not UTF-8": 1,
    }
    manifest = token_files.read_manifest(folder)
    assert (manifest["documents"], manifest["skipped"]) == (60, skipped)
    assert "skipped documents: 2 missing text, 1 int instead of text, 1 list" in said[-1]
    file.write_bytes("\n".join(good[:20] + bad).encode("latin-1"))
    with pytest.raises(UserError, match="6 of 26 documents cannot be used"):
        prepare(PrepareConfig(input=(str(file),), out=str(tmp_path / "p")), quiet)


def test_what_is_only_missing_never_ends_a_corpus_of_which_something_remains(tmp_path):
    """A column that is null in its first rows, that one of the files lacks; an empty file."""
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", [None] * 6000 + ["text"] * 20)
    write_csv(folder / "b.csv", ["id", "body"], [[1, "x"]] * 30)
    (folder / "c.csv").write_text("")
    said = []
    config = PrepareConfig(input=(str(folder),), out=str(tmp_path / "o"))
    manifest = token_files.read_manifest(prepare(config, said.append))
    assert manifest["documents"] == 20 and manifest["skipped"] == {"missing text": 6030}
    assert "skipped documents: 6,030 missing text" in said[-1]


def test_a_column_that_no_row_has_is_refused_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "MOST_UNUSABLE_AT_FIRST", 2000)
    write_csv(tmp_path / "a.csv", ["title", "body"], [["x", "y"]] * 9000)
    config = PrepareConfig(input=(str(tmp_path / "a.csv"),), out=str(tmp_path / "o"))
    with pytest.raises(UserError) as error:
        prepare(config, quiet)
    found = re.search("([0-9,]+) of .* documents cannot be used", str(error.value))
    assert int(found[1].replace(",", "")) < 4000  # the rest was not read
    assert "which has title, body" in str(error.value) and "--text-column" in str(error.value)


def test_text_in_another_encoding_is_refused_with_its_line_and_the_command_that_converts(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(input=(str(tmp_path / "a.txt"),), out=str(tmp_path / "o")), quiet)
    assert "a.txt, line 2 has the byte 0xe9" in str(error.value)
    assert "iconv" in str(error.value) and "--text-column" not in str(error.value)


def test_one_bad_file_among_few_is_skipped_and_what_was_left_out_is_said_at_the_end(tmp_path):
    said = []
    for name, content in (
        ("a.txt", b"one"),
        ("b.txt", b"\xff"),
        ("c.txt", b"three"),
        ("d.pdf", b""),
    ):
        (tmp_path / name).write_bytes(content)
    prepare(PrepareConfig(input=(str(tmp_path),), out=str(tmp_path / "o")), said.append)
    assert f"1 not UTF-8 ({tmp_path}/b.txt, line 1 has the byte 0xff)" in said[-1]
    assert said[-1].endswith("files left out, since they are no text: 1 .pdf")


def test_a_source_without_text_is_refused(tmp_path):
    for name, content in (
        ("empty.txt", ""),
        ("empty.jsonl", ""),
        ("blank.jsonl", '{"text": ""}\n' * 20),
    ):
        (tmp_path / name).write_text(content)
    write_parquet(tmp_path / "none.parquet", [])
    for name in ("empty.txt", "empty.jsonl", "blank.jsonl", "none.parquet"):
        config = PrepareConfig(input=(str(tmp_path / name),), out=str(tmp_path / "o" / name))
        with pytest.raises(UserError, match=f"{name}: .* documents? without any text"):
            prepare(config, quiet)


def test_bad_input_ends_with_one_line(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", ["hello there"])
    (tmp_path / "broken.parquet").write_bytes(b"<html>")
    (tmp_path / "o").mkdir()
    np.save(tmp_path / "o" / "a_val_000000.npy", np.zeros(3, dtype=np.uint16))
    done = prepare(PrepareConfig(input=(str(good),), out=str(tmp_path / "done")), quiet)
    for flags, named in (
        (["--input", "nothing-*.txt"], "nothing-*.txt: no such file"),
        (["--input", tmp_path / "broken.parquet"], "broken.parquet: "),
        (["--input", good, "--out", tmp_path / "o"], "holds a_val_000000.npy and no manifest"),
        (["--input", good, "--out", done, "--tokenizer", "bytes"], "encoding was gpt2, now bytes"),
        (["--input", good, "--shard-tokens", "0"], "--shard-tokens 0"),
        (["--verify", tmp_path / "no"], f"{tmp_path / 'no'}: no such data directory"),
    ):
        arguments = [str(flag) for flag in flags]
        if "--out" not in flags:
            arguments += ["--out", str(tmp_path / "new")]
        with pytest.raises(UserError) as error:
            config = fineweb.parse_flags(PrepareConfig, PrepareConfig(), "", arguments)
            token_files.verify(Path(config.verify)) if config.verify else prepare(config, quiet)
        assert named in str(error.value)


# --------------------------------------------------------------------- what users really bring


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_of_end_of_text_are_pointed_out_with_the_flag_that_splits_there(tmp_path, ending):
    file, said = tmp_path / "stories.txt", []
    file.write_bytes(f"{ending}{END}{ending}".join(["A story."] * 20).encode())
    config = PrepareConfig(input=(str(file),), out=str(tmp_path / "a"))
    prepare(config, said.append)
    assert any(f"--split-on '{END}'" in line for line in said)
    said.clear()
    prepare(dataclasses.replace(config, out=str(tmp_path / "b"), split_on=END), said.append)
    assert "20 documents" in said[-1] and not any("--split-on" in line for line in said)


def test_a_corpus_of_one_document_is_pointed_out(tmp_path):
    said = []
    (tmp_path / "one.txt").write_text("A novel. " * 100)
    prepare(PrepareConfig(input=(str(tmp_path / "one.txt"),), out=str(tmp_path / "o")), said.append)
    assert any("the whole corpus is one document" in line for line in said)


ODD_NAMES = ["n" * 241 + ".txt", "日" * 80 + ".txt", os.fsdecode(b"\xff\xfe.txt")]
ODD_NAMES += ['it\'s "a" $(name).txt', "-rf.txt", "..txt", "a\nb.txt"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_any_file_name_gives_a_directory_that_can_be_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("It was a dark and stormy night. " * 50)
    folder = tokens_for(name, "bytes", quiet)
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


def test_an_input_that_is_given_twice_is_not_half_forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["fineweb.py", "--input", "a.txt", "--input", "b.txt"])
    with pytest.raises(UserError, match="--input 2 times"):
        fineweb.main()


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


@pytest.mark.parametrize("is_finished", [True, False])
def test_an_input_edited_without_changing_its_size_is_noticed(tmp_path, monkeypatch, is_finished):
    """Neither taken for prepared, nor mixed with what was read before the edit."""
    texts = [f"text {i:05d}" for i in range(2000)]
    file = write_lines(tmp_path / "a.jsonl", texts)
    config = PrepareConfig(input=(str(file),), out=str(tmp_path / "o"), shard_tokens=1000)
    if is_finished:
        prepare(config, quiet)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(fineweb.Writer, "finish", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare(config, quiet)
    write_lines(file, [text.replace("text", "test") for text in texts])
    with pytest.raises(UserError, match="contents was .*, now .*; expected the settings"):
        prepare(config, quiet)
    write_lines(file, texts)
    if not is_finished:  # a position with a key of another version is no traceback
        partial = tmp_path / "o/manifest.partial.json"
        manifest = json.loads(partial.read_text())
        manifest["position"]["of another version"] = 1
        partial.write_text(json.dumps(manifest))
    assert shards(prepare(config, quiet)) == cut(reference(texts), 1000)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"name": "../victim/a_val_000000.bin", "tokens": 1, "sha256": "0"}]},
        {"shards": [{"name": "/etc/passwd", "tokens": 1, "sha256": "0"}]},
        {"position": None},
        {"source": "x"},
    ],
    ids=["outside", "absolute", "no position", "source"],
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


# ------------------------------------------------------------------------------ for train_gpt2.py


def test_tokens_for_a_text_are_made_once_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("It was a dark and stormy night. " * 50)
    folder = tokens_for("novel.txt", "bytes", quiet)
    assert folder.parent == Path("data") and folder.name.startswith("novel-")
    assert len(tokens.open_data(folder).train) == 1441
    before = contents(folder)
    assert tokens_for("novel.txt", "bytes", quiet) == folder
    assert tokens_for(str(folder), "bytes", quiet) == folder
    assert contents(folder) == before
    others = {tokens_for("novel.txt", "gpt2", quiet), tokens_for("*.txt", "gpt2", quiet)}
    Path("novel.txt").write_text("It was a bright and stormy day. " * 50)
    others.add(tokens_for("novel.txt", "bytes", quiet))
    assert folder not in others and len(others) == 3
    with pytest.raises(UserError, match="nothing.txt"):
        tokens_for("nothing.txt", "bytes", quiet)


def test_several_paths_are_one_corpus(tmp_path, monkeypatch):
    """As a shell makes them of `--data books/*.txt` without quotes."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("books")
    for i in range(12):
        Path(f"books/{i}.txt").write_text(f"Book {i}. " * 20)
    paths = tuple(f"books/{i}.txt" for i in range(12))
    several = tokens_for(paths, "bytes", quiet)
    assert several.name.startswith("books-")
    quoted = tokens_for("books/*.txt", "bytes", quiet)
    assert sorted(map(sorted, shards(several))) == sorted(map(sorted, shards(quoted)))
    with pytest.raises(UserError, match="token shards beside other paths"):
        tokens_for(("books/1.txt", str(several)), "bytes", quiet)


def test_a_directory_holds_tokens_only_once_it_has_a_shard(tmp_path, monkeypatch):
    """A preparation that was only begun, or has failed, is no corpus."""
    monkeypatch.chdir(tmp_path)
    folder = Path(fineweb.FINEWEB_EDU_FOLDER)
    assert not fineweb.holds_tokens(folder)
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "manifest.partial.json").write_text("{}")
    assert not fineweb.holds_tokens(folder)
    with pytest.raises(UserError, match="no token shards are there; .* python fineweb.py"):
        tokens_for(str(folder), "gpt2", quiet)
    with pytest.raises(UserError, match="no shard of it is finished"):
        tokens_for(str(folder.rename("other")), "gpt2", quiet)
    (Path("other") / "a_val_000000.bin").touch()
    assert fineweb.holds_tokens("other") and tokens_for("other", "gpt2", quiet) == Path("other")


def test_first_run_corpus_is_python_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tokens.open_data(fineweb.prepare_first_run(quiet))
    assert data.encoding == "bytes" and 5e6 < len(data.train) < 3e7
    assert 0.08 < len(data.val) / len(data.train) < 0.14
    text = tokens.get_encoding("bytes").decode(data.val.read(0, len(data.val)).tolist())
    assert text.startswith(END) and text.count("\ndef ") > 100 and text.count("import ") > 100
