"""fineweb.py: every source gives build-nanogpt's token stream, whatever the workers, kills and faults on the way.

Commands run in processes of their own, forked from one that has imported everything, because importing takes longer
than the work. Real clients talk to a stand-in for the hub on localhost. KILLS=30 kills 30 times instead of five.
"""

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from conftest import ROOT
from hub import Hub

import fineweb
import tokens
from cli import UserError, run_script
from fineweb import PrepareConfig, prepare

pytestmark = pytest.mark.usefixtures("gpt2_vocabulary")
END = "<|endoftext|>"


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Random text with what tends to go wrong: empty documents, long runs, NUL, a literal <|endoftext|>, many scripts."""
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
    tokens.verify(folder)
    return [
        np.fromfile(folder / entry["name"], dtype="<u2", offset=1024).tolist()
        for entry in tokens.read_manifest(folder)["shards"]
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"
    }


def quiet(*lines):
    pass


@pytest.fixture(autouse=True)
def many_tasks(monkeypatch):
    """Small corpora, yet hundreds of tasks that may end in another order."""
    monkeypatch.setattr(fineweb, "TASK_BYTES", 5000)


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


# ---------------------------------------------------------------------------------------------------- the stream


def cut(stream: list[int], size: int) -> list[list[int]]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def test_shards_equal_the_reference_for_rows_that_datasets_reads(tmp_path, parquet):
    """The rows come from the real `datasets` library, the tokens from tiktoken alone: build-nanogpt's stream and boundaries."""
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


SPAWN = "import multiprocessing; multiprocessing.set_start_method('spawn'); import fineweb; fineweb.TASK_BYTES = 5000; fineweb.main()"


def test_fault_12_workers_and_start_method_change_nothing(tmp_path, parquet):
    one, two, four = (
        contents(
            prepare(
                PrepareConfig(
                    input=(parquet,), out=str(tmp_path / str(n)), shard_tokens=5000, workers=n
                ),
                quiet,
            )
        )
        for n in (1, 2, 4)
    )
    assert one == two == four
    flags = [
        "--input",
        parquet,
        "--out",
        tmp_path / "spawn",
        "--shard-tokens",
        "5000",
        "--workers",
        "2",
    ]
    subprocess.run([sys.executable, "-c", SPAWN, *flags], check=True)
    assert contents(tmp_path / "spawn") == one


def text_inputs(folder: Path, documents: list[str]) -> dict[str, PrepareConfig]:
    """The same documents in every format; END separates text, so it cannot be inside."""
    import zstandard

    lines = "".join(
        json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(documents)
    ).encode()
    for i, text in enumerate(documents):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "d.text").write_bytes(f"\n{END}\n".join(documents).encode())
    return (
        {"txt": PrepareConfig(input=(f"{folder}/*.txt",))}
        | {
            name: PrepareConfig(input=(f"{folder}/{name}",), text_column="body")
            for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
        }
        | {"d.text": PrepareConfig(input=(f"{folder}/d.text",), split_on=f"\\n{END}\\n")}
    )


@pytest.mark.parametrize(
    "kind", ["txt", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.text", "parquet"]
)
def test_every_format_gives_the_documents_from_every_position(
    tmp_path, parquet, documents, monkeypatch, kind
):
    """A source opened again at any of its positions goes on exactly there: nothing lost, nothing doubled."""
    monkeypatch.setattr(fineweb, "TASK_BYTES", 2000)
    if kind == "parquet":
        config = PrepareConfig(input=(parquet,))
    else:
        documents = [text.replace(END, "") for text in documents[:100]] + ["last"]
        config = text_inputs(tmp_path, documents)[kind]
    source = fineweb.open_files(config, fineweb.expand(config.input))
    batches = list(fineweb.in_batches(source(None)))
    assert len(batches) > 5 and [text for batch in batches for text in batch.documents] == documents
    assert batches[-1].fraction == 1 and all(
        a.fraction <= b.fraction for a, b in zip(batches, batches[1:])
    )
    for i, batch in enumerate(batches):
        position = json.loads(json.dumps(batch.after))
        rest = [text for text, _, _ in source(position)]
        assert rest == [text for later in batches[i + 1 :] for text in later.documents]


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


def test_memory_is_bounded_by_back_pressure():
    """However long the source, at most `ahead` batches are read beyond what has been taken."""

    class Now:
        def submit(self, function, *args):
            future = Future()
            future.set_result(function(*args))
            return future

    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield fineweb.Batch(["a"], {}, None)

    for taken, _ in enumerate(fineweb.tokenised(Now(), endless(), "bytes", ahead=6)):
        assert read - taken <= 6
        if taken == 50:
            break


# ---------------------------------------------------------------------------------------------------- kills


def command(flags: list[str], output: Path, patient: bool) -> None:
    """fineweb.py's command line, in a process of its own."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as a command has it on Linux; here it would inherit "forkserver"
    sys.argv = ["fineweb.py", *flags]
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    if not patient:
        time.sleep = lambda seconds: None
    run_script(fineweb.main)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def start(hub, tmp_path_factory):
    """start(flags...) runs a command and returns its process, to which `lines()` adds what it has said."""
    outputs = tmp_path_factory.mktemp("outputs")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_fineweb", "datasets"])
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(outputs / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()  # the clients read the environment when they are imported there

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
        write_parquet(folder / f"in/{i}.parquet", texts, row_group_size=160)
    flags = ["--input", folder / "in/*.parquet", "--shard-tokens", 300_000, "--workers", 2]
    process, began = start(*flags, "--out", folder / "whole"), time.monotonic()
    process.join()
    assert process.exitcode == 0, process.lines()
    return flags, contents(folder / "whole"), time.monotonic() - began


def test_fault_3_kills_at_random_moments_change_nothing(tmp_path, start, long_run):
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


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_ends_in_order_and_a_restart_reads_only_the_rest(tmp_path, start, long_run):
    flags, whole, _ = long_run
    process = start(*flags, "--out", tmp_path / "o")
    wait_for(lambda: len(list((tmp_path / "o").glob("*.bin"))) > 3)
    process.terminate()
    process.join()
    assert process.exitcode == 143 and "Traceback" not in "".join(process.lines())
    position = tokens.read_manifest(tmp_path / "o", partial=True)["position"]
    _, after, _ = next(
        fineweb.read_parquet(fineweb.expand([str(flags[1])]), "text", position["source"])
    )
    assert (
        position["documents"] > 100
        and after["row"] + 800 * after["file"] == position["documents"] + 1
    )
    process = start(*flags, "--out", tmp_path / "o")
    process.join()
    assert process.exitcode == 0 and contents(tmp_path / "o") == whole


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes through /proc"
)


@needs_proc
def test_lock_names_the_first_process_and_workers_die_with_it(tmp_path, start, long_run):
    flags = long_run[0][:1] + 5 * long_run[0][1:2] + long_run[0][2:]  # five times as long
    process = start(*flags, "--out", tmp_path / "o")
    wait_for((tmp_path / "o" / "manifest.partial.json").exists)
    wait_for(lambda: len(children(process.pid)) == 2)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    second = start(*flags, "--out", tmp_path / "o")
    second.join()
    assert second.exitcode == 2 and f"in use by process {process.pid} on " in second.lines()[-1]
    process.kill()
    process.join()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_starts_without_torch():
    """It is slow to import and of no use here; each worker would import it where processes are spawned."""
    subprocess.run(
        [sys.executable, "-c", "import sys, fineweb; assert 'torch' not in sys.modules"], check=True
    )


@needs_proc
def test_fault_11_a_killed_worker_ends_the_run_and_does_not_hang_it(tmp_path, start, long_run):
    process = start(
        *long_run[0][:1], *5 * long_run[0][1:2], *long_run[0][2:], "--out", tmp_path / "o"
    )
    wait_for((tmp_path / "o" / "manifest.partial.json").exists)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.join(30)
    assert process.exitcode == 2 and process.lines()[-1].startswith(
        "error: a tokenising process was killed; expected"
    )
    assert not any("Traceback" in line for line in process.lines())


def test_fault_13_a_full_disk_ends_with_its_name_and_the_next_call_goes_on(tmp_path, parquet):
    """A limit on file size stands in for the disk: manifests fit, shards do not. With room again, it goes on."""
    folder = tmp_path / "o"
    config = PrepareConfig(input=(parquet,), out=str(folder), shard_tokens=5000, workers=2)
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, -1)); import fineweb; from cli import run_script; "
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


def test_fault_16_damage_to_a_committed_shard_is_found_when_going_on(
    tmp_path, parquet, monkeypatch
):
    config = PrepareConfig(input=(parquet,), out=str(tmp_path / "o"), shard_tokens=5000)
    monkeypatch.setattr(fineweb.Writer, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config, quiet)
    file = tmp_path / "o" / tokens.read_manifest(tmp_path / "o", partial=True)["shards"][1]["name"]
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match=file.name):
        prepare(config, quiet)


# ---------------------------------------------------------------------------------------------------- bad documents


def test_faults_7_8_documents_longer_than_a_shard_or_just_filling_it(tmp_path):
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
    ["\ud800 lone", "a\0b", "x" * 2_000_000, f"a{END}b", "\r\n", "\ufeff"],
    ids=["surrogate", "NUL", "run", "eot", "crlf", "bom"],
)
def test_faults_9_10_odd_text_is_tokenised_as_tiktoken_does(text):
    assert fineweb.tokenise([text], "gpt2").tolist() == reference([text])


def test_fault_6_unusable_documents_are_counted_and_too_many_refused(tmp_path):
    good = [json.dumps({"text": f"text {i}"}) for i in range(60)]
    bad = ['{"text": null}', '{"other": 1}', '{"text": 7}', "[1]", "{", '{"text": "\xff"}']
    file, said = tmp_path / "a.jsonl", []
    file.write_bytes("\n".join(good + bad).encode("latin-1"))
    folder = prepare(PrepareConfig(input=(str(file),), out=str(tmp_path / "o")), said.append)
    skipped = {"missing text": 2, "int instead of text": 1, "not a JSON object": 2, "not UTF-8": 1}
    manifest = tokens.read_manifest(folder)
    assert (manifest["documents"], manifest["skipped"]) == (60, skipped)
    assert (
        "skipped documents: 2 missing text, 1 int instead of text, 2 not a JSON object, 1 not UTF-8"
        in said[-1]
    )
    file.write_bytes("\n".join(good[:20] + bad).encode("latin-1"))
    with pytest.raises(UserError, match="6 of 26 documents cannot be used"):
        prepare(PrepareConfig(input=(str(file),), out=str(tmp_path / "p")), quiet)


def test_fault_5_nothing_to_learn_from(tmp_path):
    for name, content in (
        ("empty.txt", ""),
        ("empty.jsonl", ""),
        ("blank.jsonl", '{"text": ""}\n' * 20),
    ):
        (tmp_path / name).write_text(content)
    write_parquet(tmp_path / "none.parquet", [])
    for name in ("empty.txt", "empty.jsonl", "blank.jsonl", "none.parquet"):
        with pytest.raises(UserError, match=f"{name}: .* documents without any text"):
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
    np.save(tmp_path / "o" / "a_val_000000.npy", np.zeros(3, dtype=np.uint16))
    done = prepare(PrepareConfig(input=(str(good),), out=str(tmp_path / "done")), quiet)
    for flags, named in (
        (["--input", "nothing-*.txt"], "nothing-*.txt: no such file"),
        (["--input", tmp_path], f"{tmp_path}: no such file"),
        (["--input", tmp_path / "broken.parquet"], "broken.parquet: "),
        (["--input", tmp_path / "broken.jsonl.gz"], "broken.jsonl.gz: "),
        (
            ["--input", tmp_path / "p.parquet", "--text-column", "body"],
            "--text-column body: no such column; expected one of text, id, dump",
        ),
        (["--input", tmp_path / "p.parquet", good], "parquet and other files"),
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
            tokens.verify(Path(config.verify)) if config.verify else prepare(config, quiet)
        assert named in str(error.value) and str(error.value).count("; ") >= 2


# ---------------------------------------------------------------------------------------------------- the hub


def fails(status: int, times: int, matching: str):
    """A fault: the first requests whose path matches are answered with `status`, or dropped half-way where that is 0."""
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
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    return ["--dataset", "someone/edu", "--shard-tokens", 40_000, "--workers", 1]


def test_faults_2_51_streams_the_hub_through_errors_and_names_what_is_not_there(
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
    assert tokens.read_manifest(tmp_path / "o")["revision"] == "a" * 40
    assert f"train on it: python train_gpt2.py --data {tmp_path / 'o'}" in lines
    for flags, named in (
        (["--dataset", "someone/else"], "someone/else"),
        (["--name", "other"], "other"),
        (["--split", "other"], "--split other"),
    ):
        code, lines = run(*edu, *flags, "--out", tmp_path / "p")
        assert code == 2 and named in lines[-1]


def test_faults_1_4_no_network_then_a_moved_revision_then_the_pinned_one(
    hub, run, edu, tmp_path, long_documents
):
    """Attempts are bounded; shards before the failure stay; going on needs the pinned commit and fetches no file that is done."""
    hub.fault = fails(503, 10**9, "002_00000.parquet")
    code, lines = run(*edu, "--out", tmp_path / "o")
    assert code == 2 and "check the names and the connection" in lines[-1]
    assert len(tokens.read_manifest(tmp_path / "o", partial=True)["shards"]) > 2
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


def test_faults_51_52_pretokenized_shards_are_fetched_checked_and_never_kept_when_wrong(
    hub, run, tmp_path
):
    folder = hub.root / "kjj0/finewebedu10B-gpt2"
    folder.mkdir(parents=True)
    for i, split in enumerate(("val", "train", "train", "train")):
        tokens.write_shard(
            folder / f"finewebedu_{split}_{i:06d}.bin",
            np.random.default_rng(i).integers(0, 50257, 3000, dtype=np.uint16),
        )
    flags = ["--pretokenized", "--max-tokens", 8000, "--out", tmp_path / "o"]

    right = (folder / "finewebedu_train_000001.bin").read_bytes()
    for wrong in (
        b"<html>".ljust(len(right)),
        right[:-1] + b"\7",
    ):  # a captive portal's page; a bit flipped on the way

        def answer(handler, path):
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
        and tokens.verify(tmp_path / "o") == 9000
    )
    assert not any(
        "000000.bin" in path or "000003.bin" in path for _, path, _ in hub.requests
    )  # kept; not needed


# ---------------------------------------------------------------------------------------------------- for train_gpt2.py


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
