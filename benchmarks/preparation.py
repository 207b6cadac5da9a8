"""Subject `data`: text into shards of tokens."""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from harness import Case, Ready, Setting

from support.runtime import keep_freed_memory
from support.shards import HEADER_BYTES
from tokens import get_encoding


def make_corpus(file: Path, size: int) -> int:
    """Write a parquet file of about `size` bytes of text, and return how many it has.

    The text is the Python sources installed here, in documents of up to 5 kB, FineWeb-Edu's mean.
    """
    import pyarrow
    import pyarrow.parquet

    total = 0
    documents = []
    for source in python_sources():
        if total >= size:
            break
        text = source.read_text(errors="replace")
        for start in range(0, len(text), 5000):
            documents.append(text[start : start + 5000])
        total += len(text.encode(errors="replace"))
    columns = pyarrow.table({"text": documents})
    pyarrow.parquet.write_table(columns, file, row_group_size=1000)  # as in FineWeb-Edu
    return total


def python_sources() -> Iterable[Path]:
    folders = [Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "purelib")]
    return itertools.chain.from_iterable(sorted(folder.rglob("*.py")) for folder in folders)


def read_corpus(file: Path) -> Iterator[str]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000, columns=["text"]):
        yield from batch.column(0).to_pylist()


def digest(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The sha256 of a stream of tokens, as the 32 numbers that are compared."""
    stream = np.concatenate(list(parts)).astype("<u2").tobytes()
    return np.frombuffer(hashlib.sha256(stream).digest(), dtype=np.uint8).astype(int)


def prepare_ours(file: Path, workers: int, shard_tokens: int) -> Ready:
    from fineweb import PrepareConfig, prepare

    keep_freed_memory()
    out = file.parent / "ours"
    config = PrepareConfig(
        input=(str(file),), out=str(out), workers=workers, shard_tokens=shard_tokens
    )

    def work() -> None:
        shutil.rmtree(out, ignore_errors=True)
        prepare(config, say=lambda *lines: None)

    work()
    shards = sorted(out.glob("*.bin"), key=lambda shard: shard.stem[-6:])  # by number
    return Ready(digest(np.fromfile(s, "<u2", offset=HEADER_BYTES) for s in shards), work)


def prepare_plain(file: Path, workers: int, shard_tokens: int) -> Ready:
    """build-nanogpt's scheme.

    A pool of processes, one document per task, lists of Python integers, shards as .npy.
    """
    keep_freed_memory()
    get_encoding("gpt2")  # once, before the pool forks
    out = file.parent / "plain"

    def work() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            documents = pool.imap(encode_document, read_corpus(file), chunksize=16)
            write_plain_shards(documents, shard_tokens, out)

    work()
    return Ready(digest(map(np.load, sorted(out.iterdir()))), work)


def encode_document(text: str) -> np.ndarray:
    encoding = get_encoding("gpt2")
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)]).astype(np.uint16)


def write_plain_shards(documents: Iterable[np.ndarray], shard_tokens: int, out: Path) -> None:
    shard = np.empty(shard_tokens, dtype=np.uint16)
    fill = 0
    written = 0
    for tokens in documents:
        while fill + len(tokens) >= shard_tokens:
            room = shard_tokens - fill
            shard[fill:] = tokens[:room]
            np.save(out / f"{written:06d}", shard)
            tokens = tokens[room:]
            written += 1
            fill = 0
        shard[fill : fill + len(tokens)] = tokens
        fill += len(tokens)
    np.save(out / f"{written:06d}", shard[:fill])


def tiktoken_alone(file: Path, threads: int) -> Ready:
    """The bound: threads that do nothing but encode text which is in memory already."""
    keep_freed_memory()
    encoding = get_encoding("gpt2")
    documents = list(read_corpus(file))
    groups = [documents[first : first + 64] for first in range(0, len(documents), 64)]
    end_of_text = np.array([encoding.eot_token], dtype=np.uint32)

    def encode(group: list[str]) -> list[np.ndarray]:
        parts = []
        for text in group:
            parts.append(end_of_text)
            parts.append(encoding.encode_to_numpy(text, disallowed_special=()))
        return parts

    def work() -> list[np.ndarray]:
        with ThreadPoolExecutor(threads) as pool:
            return [part for parts in pool.map(encode, groups) for part in parts]

    return Ready(digest(work()), work)


def data(setting: Setting) -> Iterator[Case]:
    """100 MB of text, in as many workers as there are cores."""
    file = setting.scratch / "corpus.parquet"
    workers = min(8, os.cpu_count())
    shard_tokens = setting.size(10_000_000, 20_000)
    megabytes = make_corpus(file, setting.size(100_000_000, 300_000)) / 1e6

    alone = f"tiktoken alone, {workers} threads"

    def part_of_bound(rows: dict[str, dict]) -> str:
        if "PyGPT2" not in rows or alone not in rows:
            return ""
        return f"PyGPT2 reaches {rows[alone]['ratio'][0]:.0%} of tiktoken alone in as many threads"

    yield Case(
        f"data, {megabytes:.0f} MB of Python sources in parquet, {workers} workers",
        "MB",
        megabytes,
        {
            "PyGPT2": (prepare_ours, file, workers, shard_tokens),
            "one document a task, as build-nanogpt does": (
                prepare_plain,
                file,
                workers,
                shard_tokens,
            ),
            "tiktoken alone, 1 thread": (tiktoken_alone, file, 1),
            alone: (tiktoken_alone, file, workers),
        },
        remark=part_of_bound,
    )
