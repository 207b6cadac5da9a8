"""What a corpus of very many files costs each rank: opening it, and finding a step's windows.

    python benchmarks/shards.py 10000 100000 1000000

The files are sparse: they have the length of real shards and take no room, apart from an entry for
each file and for the two that datatrove writes beside it. The last row is an array of 10^7 shards
that all are one file. docs/scaling.md has the results.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.shards import Shard
from tokens import TokenArray, open_data, training_windows

TOKENS = 1_500_000  # of a shard: 10^7 of them hold 15T
T = 1024
SEQUENCES = 64  # of a rank in a step
STEPS = 20


def make_shards(folder: Path, number: int) -> None:
    for i in range(number):
        name = f"{folder}/{i // 100:05d}_{i % 100:05d}_doc_shuffled.ds"
        with open(name, "wb") as file:
            file.truncate(2 * TOKENS)
        with open(f"{name}.index", "wb"):
            pass
        with open(f"{name}.metadata", "w") as file:
            file.write(f"gpt2|2\n{TOKENS}\n{TOKENS / 1e6} MT")


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def seconds_a_batch(array: TokenArray) -> tuple[float, float]:
    """Median seconds to find, and to find and read, the windows of steps all over an epoch.

    Each step is far from the one before, as after a resume, and most of its files are not open.
    """
    num_windows = array.num_windows(T)
    found, read = [], []
    for step in range(STEPS):
        first = num_windows // STEPS * step
        start = time.perf_counter()
        indices = training_windows(first, SEQUENCES, num_windows, seed=1337)
        found.append(time.perf_counter() - start)
        array.windows(indices, T)
        read.append(time.perf_counter() - start)
    return float(np.median(found)), float(np.median(read))


def measure_files(number: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), number)
        before, start = resident_bytes(), time.perf_counter()
        data = open_data(folder)
        seconds = time.perf_counter() - start
        size = resident_bytes() - before
        found, read = seconds_a_batch(data.train)
    return (
        f"| {number:,} | {data.train.num_windows(T):.1e} | {seconds:.1f} s | {size / 1e6:.0f} MB "
        f"| {1000 * found:.1f} ms | {1000 * read:.1f} ms |"
    )


def measure_array(number: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), 1)
        (file,) = Path(folder).glob("*.ds")
        array = TokenArray([Shard.open(file)] * number, vocab_size=50257)
        found, _ = seconds_a_batch(array)
    return f"| {number:,} | {array.num_windows(T):.1e} | – | – | {1000 * found:.1f} ms | – |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure corpora of very many files.")
    parser.add_argument("numbers", type=int, nargs="+", help="numbers of files")
    print("| files | windows | opening | memory | a batch of 64 found | and read |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for number in parser.parse_args().numbers:
        print(measure_files(number), flush=True)
    print(measure_array(10**7))


if __name__ == "__main__":
    main()
