"""Damage what a run and a corpus leave on disk, at random, and read it as a user would.

    python tests/mutate.py --files 200 --seed 0
    python tests/mutate.py --files 500 --seed 0 --flips     one bit of one file each time

Each case changes one file: bits are flipped, the end is cut off, bytes are replaced, and in JSON,
headers included, values are swapped for others. In half of the cases the manifest is made to agree
with the changed file, as somebody would who means harm. Then the readers of that file are called in
this process. Accepted is a file that reads as it did, or an error that names it. Everything else is
a finding, and is printed with the seed that repeats it:

- any exception but UserError and OSError, or a message that does not name the file;
- more than 5 seconds of processor time, or 1 GB of memory more than before;
- weights, optimizer state or tokens that differ from what was written, unless the manifest has been
  made to agree, or a log or a configuration holds another value of the right type.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tools import ROOT, run_main, save_tiny_model, write_bytes_data

import fineweb
import hellaswag
import train_gpt2
from support import plot, run_directory
from support.huggingface import save_tokenizer
from support.run_directory import RunDirectory, load_model
from support.script import UserError
from support.shards import verify, verify_shards
from tokens import get_encoding, open_data

MOST_SECONDS = 5.0
MOST_BYTES = 10**9

TINY_FLAGS = """
    --n-layer 1 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 128 --micro-batch 4
    --max-steps 4 --warmup-steps 1 --eval-every 2 --eval-tokens 200 --sample-every 4
    --save-every 2 --keep-best --optimizer muon --dtype float32 --device cpu --no-compile
"""


# ---------------------------------------------------------------------------------- what is damaged


def build(root: Path) -> None:
    """A run of two checkpoints, a model without a manifest, and corpora of
    every format: finished, interrupted, and of a text."""
    torch.manual_seed(0)
    data = write_bytes_data(root / "data")
    (root / "runs").mkdir()
    quiet = contextlib.redirect_stdout(open(os.devnull, "w"))  # noqa: SIM115
    with quiet, contextlib.redirect_stderr(sys.stdout):
        code = run_main(
            train_gpt2.main, "--data", data, *TINY_FLAGS.split(), "--out", root / "runs" / "r"
        )
    assert code == 0, code

    model = save_tiny_model(root / "model")
    save_tokenizer(get_encoding("bytes"), model, 32)

    tokens = np.arange(3000, dtype="<u2") % 50257
    for folder in ("npy", "ds", "partial"):
        (root / folder).mkdir()
    np.save(root / "npy/edufineweb_val_000000.npy", tokens[:500])
    np.save(root / "npy/edufineweb_train_000001.npy", tokens)
    (root / "ds/00000_unshuffled.ds").write_bytes(tokens.tobytes())
    (root / "ds/00000_unshuffled.ds.metadata").write_text("gpt2|2\n3000\n6 KB")
    (root / "ds/00000_unshuffled.ds.index").write_bytes(np.array([3000], "<u8").tobytes())
    (root / "text").mkdir()
    (root / "text/novel.txt").write_bytes((ROOT / "input.txt").read_bytes()[:3000])
    corpus = prepare_text(root)
    for shard in corpus.glob("*.bin"):
        shutil.copy(shard, root / "partial")
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["position"] = dataclasses.asdict(fineweb.Position())
    (root / "partial/manifest.partial.json").write_text(json.dumps(manifest))

    item = {"ctx": "a b", "endings": ["c", "d", "e", "f"], "label": 1, "activity_label": "g"}
    (root / "items").mkdir()
    (root / "items/items.jsonl").write_text((json.dumps(item) + "\n") * 3)


def prepare_text(root: Path) -> Path:
    """What --data makes of a text, or finds that it has made; returns the corpus."""
    before = os.getcwd()
    os.chdir(root / "text")
    try:
        return root / "text" / fineweb.prepare_path("novel.txt", "bytes", lambda *lines: None)
    finally:
        os.chdir(before)


def files_to_damage(root: Path) -> list[Path]:
    """All that is written and read again. Pictures are not read, nor are locks, which are empty."""
    files = []
    for file in sorted(root.rglob("*")):
        is_read = not file.name.startswith(".") and file.suffix not in (".png", ".txt")
        if file.is_file() and is_read:
            files.append(file.relative_to(root))
    return files


# --------------------------------------------------------------------------------------- the damage

DEEP = "DEEP"  # stands for 200,000 brackets, which json cannot write
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 2**40, 10**18, 10**30, 10**4000, 0.5, -0.0, 1e308),
    *(
        "",
        "x",
        "..",
        "../../x",
        "/etc/passwd",
        "\0",
        "\ud800",
        "a\nb",
        "\x1b]0;title\x07",
        "9" * 50,
    ),
    *([], {}, [1], [[]], [{}], {"a": 1}, [None] * 10_000, float("nan"), float("inf"), DEEP),
]


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    place = rng.randrange(8 * len(content))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, replace, repeat or add bytes."""
    place = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 8, 100])
    noise = rng.randbytes(length)
    return rng.choice(
        [
            content[:place],
            b"",
            content + noise,
            content + content,
            content[:place] + noise + content[place + length :],
            content[:place] + b"\0" * length + content[place + length :],
            content[:place] + b"\xff" * length + content[place + length :],
            content[:place] + content[place + length :],
            noise + content,
        ]
    )


def damage_json(text: str, rng: random.Random) -> str:
    """Swap a value anywhere in a JSON text, or lose, rename or repeat a key."""
    value = json.loads(text)
    places = list(places_in({"": value}))
    holder, key = rng.choice(places)
    new = rng.choice(VALUES)
    how = rng.choice(["swap", "swap", "swap", "lose", "rename", "add"])
    if how == "swap" or isinstance(holder, list):
        holder[key] = new
    elif how == "lose" and key:
        del holder[key]
    elif how == "rename" and key:
        holder[rng.choice(["x", "../x", "a/b", "\0", ""])] = holder.pop(key)
    else:
        holder["added"] = new
    if isinstance(holder, dict) and "" in holder:  # the outermost value itself
        value = holder[""]
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 200_000)


def places_in(value: object) -> Iterator[tuple[object, object]]:
    """Every place in a JSON value that can hold another: its holder, and its key there."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return
    for key in keys:
        yield value, key
        yield from places_in(value[key])


def damage_structure(file: Path, content: bytes, rng: random.Random) -> bytes:
    """Damage that keeps a file's outer form: JSON stays JSON, and a header keeps its length."""
    if file.suffix == ".json":
        return damage_json(content.decode(), rng).encode()
    if file.suffix == ".jsonl":
        lines = content.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = damage_json(lines[number], rng)
        return ("\n".join(lines) + "\n").encode()
    if file.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = damage_json(content[8 : 8 + length].decode(), rng).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    if file.suffix == ".npy":
        words = ["True", "<u2", "|O", "<f8", "(3000,)", "(10**9,)", "999999999999999", "'shape'"]
        old = rng.choice([b"False", b"<u2", b"(3000,)", b"(500,)", b"'shape'"])
        return content.replace(old, rng.choice(words).encode(), 1)
    if file.suffix == ".bin":
        number = rng.choice([0, 1, 2, 3, 255])
        value = rng.choice([0, -1, 2, 2**31 - 1, -(2**31), 20240520])
        changed = bytearray(content)
        changed[4 * number : 4 * number + 4] = value.to_bytes(4, "little", signed=True)
        return bytes(changed)
    return damage_bytes(content, rng)


def make_manifest_agree(file: Path) -> bool:
    """Give the manifest beside a file the file's new hash and size; whether there is one."""
    manifest = file.parent / "manifest.json"
    if not manifest.exists() or file.name == "manifest.json":
        return False
    values = json.loads(manifest.read_text())
    content = file.read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if "files" in values:
        values["files"][file.name] = entry
    for shard in values.get("shards", []):
        if shard["name"] == file.name:
            shard |= {"sha256": entry["sha256"], "tokens": max(0, len(content) - 1024) // 2}
    manifest.write_text(json.dumps(values))
    return True


# -------------------------------------------------------------------------------------- the readers
#
# A reader returns what it has accepted, as a text that can be compared with that of the undamaged
# file. It is given the root and a function for warnings.


FINGERPRINT = "fingerprint"  # begins what is returned by a reader whose caller compares it


def digest(tensors: dict[str, torch.Tensor]) -> str:
    result = hashlib.sha256()
    for name in sorted(tensors):
        result.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return result.hexdigest()


def read_model(place: str) -> Callable:
    def read(root: Path, warn: Callable) -> str:
        model, encoding, _ = load_model(str(root / place), warn)
        return f"{encoding.name} {digest(dict(model.named_parameters()))}"

    return read


def continue_run(root: Path, warn: Callable) -> str:
    """What --resume does, in its order, up to the first step."""
    folder = root / "runs/r"
    args = ["--out", str(folder), "--resume"]
    config, _ = train_gpt2.config_of_command_line(args)
    with RunDirectory(folder, config.total_batch_tokens, writes=True, say=warn) as run:
        run.claim(may_hold_run=True)
        checkpoint = run.load_newest()
        if checkpoint is None:
            return "none"
        run.continue_from(checkpoint)
        run.lowest_validation_loss()
        run_directory.prune(folder, keep=5)
        return f"{checkpoint.step} {digest(checkpoint.weights)} {digest(checkpoint.moments)}"


def draw(root: Path, warn: Callable) -> str:
    runs = plot.find_runs([root / "runs"], warn)
    plot.table(plot.group_by_configuration([plot.read_run(run, warn) for run in runs]))
    return ""


def read_tokens(folder: str) -> Callable:
    def read(root: Path, warn: Callable) -> str:
        data = open_data(root / folder)
        result = hashlib.sha256(data.encoding.encode())
        for split in (data.train, data.val):
            result.update(split.read(0, len(split)).tobytes() + b"/")
        return f"{FINGERPRINT} {data.fingerprint} {result.hexdigest()}"

    return read


def verify_tokens(folder: str) -> Callable:
    def read(root: Path, warn: Callable) -> str:
        verify(root / folder)
        return read_tokens(folder)(root, warn).split()[2]

    return read


def read_text_corpus(root: Path, warn: Callable) -> str:
    return read_tokens(str(prepare_text(root)))(root, warn)


def continue_preparation(root: Path, warn: Callable) -> str:
    """What fineweb.py does first where a preparation was interrupted."""
    manifest = fineweb.read_partial_manifest(root / "partial")
    verify_shards(root / "partial", manifest, "manifest.partial.json")
    return " ".join(shard["sha256"] for shard in manifest["shards"])


def read_items(root: Path, warn: Callable) -> str:
    hellaswag.load_items(root / "items/items.jsonl")
    return ""


def readers_of(file: Path) -> list[Callable]:
    first = file.parts[0]
    if first == "runs":
        readers = [read_model("runs/r"), continue_run]
        if file.name in ("train.json", "log.jsonl"):
            readers.insert(0, draw)
        if is_in_checkpoint(file):
            readers.insert(0, read_model(str(file.parent)))
        return readers
    if first == "partial":
        return [continue_preparation]
    if first == "text":
        return [read_text_corpus, verify_tokens(str(file.parent))]
    if first == "items":
        return [read_items]
    if first == "model":
        return [read_model("model")]
    return [read_tokens(first), verify_tokens(first)]


def is_in_checkpoint(file: Path) -> bool:
    return file.parent.name.startswith("step_")


def has_checksum(file: Path) -> bool:
    """Whether a change of the content must be seen: the folder has a manifest with hashes."""
    return file.parts[0] in ("data", "text", "partial") or is_in_checkpoint(file)


# ------------------------------------------------------------------------------------- the campaign


@dataclass
class Outcome:
    """What a reader made of a damaged file."""

    accepted: str | None  # what it returned, or None where it refused
    text: str  # its warnings and its error
    finding: str  # what is wrong with that; empty if nothing is
    seconds: float = 0.0


class TooLong(BaseException):
    pass


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """End a reader that hangs, or, on Linux, one that asks for much more memory than there is."""

    def too_long(signum, frame):
        raise TooLong

    previous = signal.signal(signal.SIGALRM, too_long)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status")
    if status.exists():
        # Data are what is allocated; a file that is only mapped to be read takes no memory.
        allocated = int(re.search(r"VmData:\s*(\d+) kB", status.read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (allocated + MOST_BYTES, before[1]))
    signal.alarm(60)  # of wall time: the machine may be busy
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, before)
        signal.signal(signal.SIGALRM, previous)


def read_damaged(reader: Callable, root: Path, file: Path) -> Outcome:
    said = []
    began = time.process_time()
    accepted = None
    finding = ""
    try:
        with limits():
            accepted = reader(root, lambda *lines: said.extend(lines))
    except (UserError, OSError) as error:
        said.append(str(error))
        text = "\n".join(said)
        names = [file.name]
        if file.suffix == ".metadata":  # where it contradicts its .ds file, that one is named
            names.append(file.stem)
        if file.name == "state.json":  # where it contradicts train.json, the checkpoint is named
            names.append(file.parent.name)
        if not any(name in text for name in names):
            finding = f"the message does not name {file.name}: {text!r}"
        if isinstance(error, OSError) and not error.filename:
            finding = f"an OSError without a file: {error!r}"
    except TooLong:
        finding = "still reading after a minute"
    except BaseException:
        finding = traceback.format_exc()
    seconds = time.process_time() - began
    if seconds > MOST_SECONDS:
        finding = f"{seconds:.1f} s of processor time"
    return Outcome(accepted, "\n".join(said), finding, seconds)


def damage(file: Path, rng: random.Random, flips: bool) -> str:
    """Change a file; returns how."""
    content = file.read_bytes()
    how = "a flipped bit"
    new = flip_bit(content, rng)
    if not flips and rng.random() < 0.9:
        how = "damaged structure"
        new = damage_structure(file, content, rng)
        if rng.random() < 0.3:
            how = "damaged bytes"
            new = damage_bytes(content, rng)
    file.write_bytes(new)
    return how


def check(original: Path, scratch: Path, seed: str, flips: bool, expected: dict) -> list[Outcome]:
    """One case: damage one file of a copy, and call its readers."""
    rng = random.Random(seed)
    file = rng.choice(files_to_damage(original))
    outcomes = []
    for number, reader in enumerate(readers_of(file)):
        # Each reader gets a fresh copy with the same damage, for some of them repair or rename.
        same = random.Random(f"{seed} damage")
        top = scratch / file.parts[0]
        shutil.rmtree(top, ignore_errors=True)
        shutil.copytree(original / file.parts[0], top)
        how = damage(scratch / file, same, flips)
        agrees = not flips and same.random() < 0.5 and make_manifest_agree(scratch / file)
        outcome = read_damaged(reader, scratch, file)
        changed = has_checksum(file) and is_changed(outcome.accepted, expected[file][number])
        if changed and not agrees and not outcome.finding:
            outcome.finding = f"changed content was accepted: {outcome.accepted}"
        if outcome.finding:
            agreeing = " and a manifest that agrees" if agrees else ""
            outcome.finding = f"seed {seed!r}: {file}: {how}{agreeing}: {outcome.finding}"
        outcomes.append(outcome)
    return outcomes


def is_changed(accepted: str | None, expected: set[str]) -> bool:
    """Whether other content was read than was written, without a sign of it.

    A corpus with another fingerprint is seen when a run is continued, so that is a sign.
    """
    if accepted is None or accepted in expected:
        return False
    if not accepted.startswith(FINGERPRINT):
        return True
    fingerprints = {text.split()[1] for text in expected}
    return accepted.split()[1] in fingerprints


def accepted_when_whole(original: Path, scratch: Path) -> dict[Path, list[set[str]]]:
    """What the readers of each file return when nothing is damaged, or an older step is read."""
    expected = {}
    cache: dict = {}
    for file in files_to_damage(original):
        expected[file] = []
        for number, reader in enumerate(readers_of(file)):
            key = (
                file.parts[0],
                str(file.parent),
                file.name in ("train.json", "log.jsonl"),
                number,
            )
            if key not in cache:
                cache[key] = {run_whole(original, scratch, file.parts[0], reader)}
                if file.parts[0] == "runs":
                    cache[key].add(
                        run_whole(original, scratch, "runs", reader, without="step_000004")
                    )
                    cache[key].add(
                        run_whole(original, scratch, "runs", reader, without="best.json")
                    )
                    cache[key].discard(None)
            expected[file].append(cache[key])
    return expected


def run_whole(
    original: Path, scratch: Path, part: str, reader: Callable, without: str = ""
) -> str | None:
    shutil.rmtree(scratch / part, ignore_errors=True)
    shutil.copytree(original / part, scratch / part)
    if without:
        run_directory.remove(scratch / part / "r" / without)
    try:
        return reader(scratch, lambda *lines: None)
    except UserError:
        if without:
            return None
        raise


def campaign(
    files: int, seed: int, flips: bool, say: Callable[[str], None] = print
) -> tuple[int, list[str]]:
    """So many cases; returns how many reads there were, and the findings."""
    with tempfile.TemporaryDirectory() as folder:
        original, scratch = Path(folder, "original"), Path(folder, "scratch")
        original.mkdir()
        scratch.mkdir()
        build(original)
        expected = accepted_when_whole(original, scratch)
        reads = refused = 0
        slowest = 0.0
        findings = []
        began = time.monotonic()
        for number in range(files):
            for outcome in check(original, scratch, f"{seed}/{number}", flips, expected):
                reads += 1
                refused += outcome.accepted is None
                slowest = max(slowest, outcome.seconds)
                if outcome.finding:
                    findings.append(outcome.finding)
                    say(outcome.finding)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    say(
        f"{files} damaged files, {reads} reads: {refused} refused, {reads - refused} read, "
        f"{len(findings)} findings; slowest read {slowest:.2f} s, peak memory {memory:.2f} GB, "
        f"{time.monotonic() - began:.0f} s in all"
    )
    return reads, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=200, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", action="store_true", help="flip one bit each time")
    flags = parser.parse_args()
    sys.exit(bool(campaign(flags.files, flags.seed, flags.flips)[1]))
