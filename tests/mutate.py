"""Damage what a run and a corpus leave on disk, at random, and use it as a user would.

    python tests/mutate.py --files 200 --seed 0
    python tests/mutate.py --files 500 --seed 0 --flips     one bit of one file each time

Each case changes one file: bits are flipped, the end is cut off, bytes are replaced, and in JSON,
headers included, values are swapped for others. In half of the cases the manifest is made to agree
with the changed file, as somebody would who means harm. Then the commands that read the file are
run in this process. Everything but these two outcomes is a finding, and is printed with the seed
that repeats it:

- exit code 2, and output that names the file;
- exit code 0, and what is made of it (the weights that a continued run ends with, a model's
  weights, a corpus's tokens) is what was made before the damage, unless the manifest agrees with
  the damage, or nothing has a checksum of the file.

A command that takes a minute, or 1 GB of memory more than before, is a finding too.
"""

import argparse
import contextlib
import hashlib
import io
import json
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
from pathlib import Path

import torch
from tools import run_main, save_tiny_model, write_bytes_data

import fineweb
import hellaswag
import sample
import train_gpt2
from support import plot
from tokens import open_data

MOST_BYTES = 10**9

TINY_FLAGS = """
    --n-layer 1 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 128 --micro-batch 4
    --max-steps 3 --warmup-steps 1 --eval-every 1 --eval-tokens 200 --sample-every 3
    --save-every 1 --keep 9 --keep-best --optimizer muon --dtype float32 --device cpu --no-compile
"""


# ---------------------------------------------------------------------------------- what is damaged


def build(root: Path) -> None:
    """A run that lacks its last step, a model without a manifest, a corpus, and items."""
    torch.manual_seed(0)
    data = write_bytes_data(root / "data")
    code, said = command(
        train_gpt2.main, "--data", data, *TINY_FLAGS.split(), "--out", root / "runs" / "r"
    )
    assert code == 0, said
    shutil.rmtree(root / "runs/r/step_000003")
    save_tiny_model(root / "model")
    item = {"ctx": "a b", "endings": ["c", "d", "e", "f"], "label": 1, "activity_label": "g"}
    (root / "items").mkdir()
    (root / "items/items.jsonl").write_text((json.dumps(item) + "\n") * 3)


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


# ------------------------------------------------------------------------------------- the commands
#
# A reader takes the root of the damaged copy. It returns exit code, output, and what was made.


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


def command(main: Callable, *args) -> tuple[int, str]:
    """The exit code of a script with these arguments, and all that it has said."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = run_main(main, *args)
    output.seek(0)
    return code, output.read()


def function(work: Callable) -> tuple[int, str, str]:
    """A function of Python, as a notebook calls it, under the same conditions."""
    made = []
    code, said = command(lambda: made.append(work()))
    return code, said, "".join(made)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    result = hashlib.sha256()
    for name in sorted(tensors):
        result.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return result.hexdigest()


def continue_run(root: Path) -> tuple[int, str, str]:
    """The last step is trained again, from the newest checkpoint that is sound."""
    code, said = command(train_gpt2.main, "--out", root / "runs/r", "--resume")
    made = ""
    for name in ("model.safetensors", "optimizer.safetensors"):
        file = root / "runs/r/step_000003" / name
        made += hashlib.sha256(file.read_bytes()).hexdigest() if code == 0 else ""
    return code, said, made


def load(place: str) -> Callable:
    def read(root: Path) -> tuple[int, str, str]:
        def work() -> str:
            model, encoding, _ = sample.load_model(str(root / place))
            return f"{encoding.name} {digest(dict(model.named_parameters()))}"

        return function(work)

    return read


def draw(root: Path) -> tuple[int, str, str]:
    return *command(plot.main, root / "runs", "--table"), ""


def read_tokens(root: Path) -> tuple[int, str, str]:
    """Of what is not verified the tokens may be others."""

    def work() -> str:
        data = open_data(root / "data")
        for split in (data.train, data.val):
            split.read(0, len(split))
        return ""

    return function(work)


def verify(root: Path) -> tuple[int, str, str]:
    code, said = command(fineweb.main, "--verify", root / "data")
    tokens = [file.read_bytes()[1024:] for file in sorted((root / "data").glob("*.bin"))]
    return code, said, hashlib.sha256(b"".join(tokens)).hexdigest()


def score(root: Path) -> tuple[int, str, str]:
    flags = ("--model", root / "model", "--device", "cpu")
    return *command(hellaswag.main, "--data", root / "items/items.jsonl", *flags), ""


def readers_of(file: Path) -> list[Callable]:
    place = file.parts[0]
    if place == "runs":
        readers = [continue_run]
        if file.name in ("train.json", "log.jsonl"):
            readers.append(draw)
        if file.parent.name.startswith("step_"):
            readers.append(load(str(file.parent)))
        return readers
    if place == "model":
        return [load(place)]
    if place == "items":
        return [score]
    return [read_tokens, verify]


# ------------------------------------------------------------------------------------- the campaign


def finding(reader: Callable, root: Path, file: Path, expected: str | None) -> tuple[str, bool]:
    """What is wrong with what a reader made of a damaged file, and whether it was refused.

    expected: what it made before; None where the damage may change it.
    """
    try:
        with limits():
            code, said, made = reader(root)
    except TooLong:
        return "still reading after a minute", False
    except BaseException:
        return traceback.format_exc(), False
    if code == 2:
        # Where state.json contradicts train.json, or a manifest a file, the checkpoint is named.
        has_witness = file.name in ("state.json", "manifest.json")
        is_named = file.name in said or (has_witness and file.parent.name in said)
        return ("" if is_named else f"nothing names the file: {said}"), True
    if code != 0:
        return f"exit code {code}: {said}", False
    is_other = expected is not None and made != expected
    return ("other content was accepted" if is_other else ""), False


def damage(file: Path, rng: random.Random, flips: bool) -> str:
    """Change a file; returns how."""
    content = file.read_bytes()
    how, new = "a flipped bit", flip_bit(content, rng)
    if not flips and rng.random() < 0.9:
        how, new = "damaged structure", damage_structure(file, content, rng)
        if rng.random() < 0.3:
            how, new = "damaged bytes", damage_bytes(content, rng)
    file.write_bytes(new)
    return how


def fresh_copy(original: Path, scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(original, scratch)


def campaign(
    files: int, seed: int, flips: bool, say: Callable[[str], None] = print
) -> tuple[int, list[str]]:
    """So many cases; returns how many reads there were, and the findings."""
    with tempfile.TemporaryDirectory() as folder:
        original, scratch = Path(folder, "original"), Path(folder, "scratch")
        build(original)
        made_before = {}
        reads = num_refused = 0
        findings = []
        began = time.monotonic()
        for number in range(files):
            rng = random.Random(f"{seed}/{number}")
            file = rng.choice(files_to_damage(original))
            for which, reader in enumerate(readers_of(file)):
                key = (file.parent, which)
                if key not in made_before:
                    fresh_copy(original, scratch)
                    code, said, made_before[key] = reader(scratch)
                    assert code == 0, said
                # Each reader gets a fresh copy with the same damage: some repair or rename.
                same = random.Random(f"{seed}/{number} damage")
                fresh_copy(original, scratch)
                how = damage(scratch / file, same, flips)
                agrees = not flips and same.random() < 0.5 and make_manifest_agree(scratch / file)
                has_checksum = file.parts[0] == "data" or file.parts[0] == "runs"
                expected = made_before[key] if has_checksum and not agrees else None
                found, refused = finding(reader, scratch, file, expected)
                reads += 1
                num_refused += refused
                if found:
                    agreeing = " and a manifest that agrees" if agrees else ""
                    findings.append(f"seed '{seed}/{number}': {file}: {how}{agreeing}: {found}")
                    say(findings[-1])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    say(
        f"{files} damaged files, {reads} reads: {num_refused} refused, {reads - num_refused} read, "
        f"{len(findings)} findings; peak memory {memory:.2f} GB, {time.monotonic() - began:.0f} s"
    )
    return reads, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=200, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", action="store_true", help="flip one bit each time")
    flags = parser.parse_args()
    sys.exit(bool(campaign(flags.files, flags.seed, flags.flips)[1]))
