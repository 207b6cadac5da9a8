"""HellaSwag: fetch, render and score the commonsense benchmark of Zellers et al. 2019 (arXiv 1905.07830).

    python hellaswag.py --model gpt2 --device cuda      accuracy over the 10,042 validation items
    python hellaswag.py --download                      fetch the data and stop

An item is a context with four endings; a model is right when it finds the right one the likeliest. Two conventions
are in use, and their figures must not be mixed:

- completion (build-nanogpt, llm.c): `ctx`, then " " + ending. acc takes the ending with the highest summed
  log-probability, acc_norm the highest mean per token.
- harness (lm-evaluation-harness): "activity label: ctx_a Ctx_b" and the endings, cleaned of WikiHow's brackets. acc
  takes the highest sum, acc_norm the highest sum divided by the number of characters of the ending.

Their contexts differ from the first token on, so one forward pass cannot serve both; acc and acc_norm share theirs.
An item longer than block_size loses the start of its context, in either style, as in lm-evaluation-harness.
"""

import hashlib
import json
import math
import os
import random
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import UserError, parse_flags, run_script
from model import GPT
from run_directory import load_model
from runtime import Runtime, choose_dtype, start

DATA = Path("data/hellaswag/hellaswag_val.jsonl")
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE, ROWS = 12_246_618, 10_042
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

Style = Literal["completion", "harness"]


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Item:
    ctx: str
    endings: Sequence[str]  # four
    label: int  # which ending is right
    activity_label: str | None = None  # these three for harness style only
    ctx_a: str | None = None
    ctx_b: str | None = None


def fetch(
    file: Path = DATA, url: str = URL, size: int = SIZE, sha256: str = SHA256, attempts: int = 5
) -> None:
    """Fetch the official validation set. The file appears whole and proven or not at all, so any number of processes
    may fetch it at once."""
    import requests

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        for attempt in range(attempts):
            try:
                with (
                    requests.get(url, stream=True, timeout=30) as response,
                    open(temporary, "wb") as f,
                ):
                    response.raise_for_status()
                    for block in response.iter_content(1 << 20):
                        f.write(block)
                    f.flush()
                    os.fsync(f.fileno())
                break
            except requests.RequestException as error:
                status = getattr(error.response, "status_code", 500)
                if attempt + 1 == attempts or (status < 500 and status != 429):
                    why = (
                        f"HTTP status {error.response.status_code}"
                        if error.response is not None
                        else type(error).__name__
                    )
                    raise UserError(
                        f"{url}: {why}",
                        expected="the HellaSwag validation set",
                        remedy=f"check the connection, or copy the file to {file}",
                    ) from None
                time.sleep(2**attempt)
        if found := _mismatch(temporary.read_bytes(), size, sha256):
            raise UserError(
                f"{url}: {found}",
                expected=f"{size:,} bytes with sha256 {sha256[:8]}…",
                remedy=f"try again later, or copy the file to {file}",
            )
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _mismatch(content: bytes, size: int, sha256: str) -> str:
    """What a file is instead of what it should be; empty if it is right."""
    rows, digest = len(content.splitlines()), hashlib.sha256(content).hexdigest()
    return (
        ""
        if (len(content), digest) == (size, sha256)
        else f"{len(content):,} bytes in {rows:,} rows with sha256 {digest[:8]}…"
    )


def load_items(file: Path | None = None) -> list[Item]:
    """Items of a JSON-lines file in the official schema; None is the official file, checked against its hash."""
    path = file or DATA
    if not path.is_file():
        raise UserError(
            f"{path}: no such file",
            expected="HellaSwag items as JSON lines",
            remedy="check --data, or use --download",
        )
    content = path.read_bytes()
    if file is None and (found := _mismatch(content, SIZE, SHA256)):
        raise UserError(
            f"{path}: {found}",
            expected=f"the official file of {ROWS:,} rows",
            remedy="fetch it again with --download",
        )
    items = [
        _parse(line, f"{path}:{number}")
        for number, line in enumerate(content.split(b"\n"), 1)
        if line.strip()
    ]
    if not items:
        raise UserError(f"{path}: no items", expected="at least one", remedy="check --data")
    return items


def _parse(line: bytes, place: str) -> Item:
    try:
        row = json.loads(line)
        json.dumps(
            row, ensure_ascii=False
        ).encode()  # JSON can spell lone surrogates, which are no text
        item = Item(
            row["ctx"],
            row["endings"],
            int(str(row["label"])),
            row.get("activity_label"),
            row.get("ctx_a"),
            row.get("ctx_b"),
        )
        if (
            not isinstance(item.endings, list)
            or len(item.endings) != 4
            or item.label not in range(4)
        ):  # the label is a string in some copies
            raise ValueError(f"label {item.label}, endings {str(item.endings)[:80]}")
        if not all(isinstance(text, str) and text.strip() for text in (item.ctx, *item.endings)):
            raise ValueError("ctx or an ending is empty or not text")
        if not all(
            isinstance(text, str | None) for text in (item.activity_label, item.ctx_a, item.ctx_b)
        ):
            raise ValueError("activity_label, ctx_a or ctx_b is not text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{place}: {'no ' if isinstance(error, KeyError) else ''}{error}",
            expected="ctx, four endings that are not empty, and a label from 0 to 3",
            remedy="mend the line or fetch the file again",
        ) from None
    return item


def find_items(rt: Runtime) -> list[Item] | None:
    """For the training loop, which does not die of this: the official items, fetched if they are not there; None, and
    one line that says why, if that fails. Rank 0 reads, all ranks receive."""
    items = None
    if rt.is_main:
        try:
            if not DATA.is_file():
                fetch(attempts=1)
            items = load_items()
        except (UserError, OSError) as error:
            rt.say(f"HellaSwag is skipped: {error}")
    return rt.broadcast(items)


# ---------------------------------------------------------------------------------------------------- text to tokens


def render(item: Item, style: Style) -> tuple[str, list[str], list[float] | None]:
    """Context, the four continuations to score after it, and what acc_norm divides their scores by (None: by tokens)."""
    if style == "completion":
        return item.ctx, [" " + ending for ending in item.endings], None
    if item.activity_label is None or item.ctx_a is None or item.ctx_b is None:
        raise UserError(
            "--style harness: the items lack activity_label, ctx_a or ctx_b",
            expected="items in the official schema",
            remedy="use --style completion, or the official data",
        )
    query = _clean(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    endings = [_clean(ending) for ending in item.endings]
    context = query.rstrip()  # GPT-2's tokens begin with a space, never end with one: the harness scores it with the ending
    gap = query[len(context) :] + " "
    # An ending that the clean-up empties must not win: the harness divides by 0 and gets -inf, this gets close.
    return (
        context,
        [gap + ending for ending in endings],
        [len(ending) or 1e-9 for ending in endings],
    )


def _clean(text: str) -> str:
    """lm-evaluation-harness's clean-up; the brackets come from the WikiHow half of the data."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# A context, and the endings read after it: (number of the ending = 4 · number of the item + k, its tokens).
Row = tuple[list[int], list[tuple[int, list[int]]]]


def row_length(row: Row) -> int:
    return len(row[0]) + sum(
        len(tokens) - 1 for _, tokens in row[1]
    )  # an ending's last token is predicted, never read


def to_rows(
    number: int, item: Item, style: Style, encoding: tiktoken.Encoding, block_size: int
) -> tuple[list[Row], list[float]]:
    """The item's rows, one unless truncation leaves the endings different contexts, and what acc_norm divides by."""
    context, endings, lengths = render(item, style)
    head, rows, counts = encoding.encode_ordinary(context), {}, []
    for k, ending in enumerate(endings):
        tokens = encoding.encode_ordinary(ending)
        # block_size tokens are read, the last is predicted; the first scored one needs one before it.
        whole, scored = (head + tokens)[-(block_size + 1) :], min(len(tokens), block_size)
        rows.setdefault(tuple(whole[:-scored]), []).append((4 * number + k, whole[-scored:]))
        counts.append(scored)
    return [(list(start), branches) for start, branches in rows.items()], lengths or counts


# ---------------------------------------------------------------------------------------------------- scoring

# A context is read once, its endings after it in the same row, where a mask and positions let each ending see the context
# and itself: half the tokens of four padded rows. Items sorted by length leave next to no padding, and the projection onto
# the vocabulary, a third of the work at 124M, runs only where a token of an ending is predicted. A key-value cache or rows
# packed without padding do the same arithmetic; measured on a CPU they were within 5% of this, which is the simplest.

# Tokens in a batch, and the multiple its rows are padded to: a CPU does as well with small batches, which pad less, a GPU
# needs large ones of few shapes.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
PAD_TO = {"cpu": 1, "cuda": 32, "mps": 32}
HEAD_ROWS = {"cpu": 512, "cuda": 4096, "mps": 2048}  # logits in memory at once


def make_batches(rows: list[Row], batch_tokens: int, pad_to: int) -> list[tuple[list[Row], int]]:
    """Rows of similar length together, each batch with the length T that holds them. Ranks share out whole batches, so
    that scores are the same at any world size; shuffled, so that ranks carry even loads and the running accuracy is
    not that of the longest items."""
    rows, batches = sorted(rows, key=row_length, reverse=True), []
    while rows:
        T = math.ceil(row_length(rows[0]) / pad_to) * pad_to
        n = max(1, batch_tokens // T)
        batches.append((rows[:n], T))
        rows = rows[n:]
    random.Random(0).shuffle(batches)
    return batches


def head_weight(model: GPT, dtype: torch.dtype) -> torch.Tensor:
    """wte.weight in dtype with rows of zeros up to a multiple of 64: matrix units dislike the odd 50257 (a CPU's too,
    whose float32 product gains 30%)."""
    weight = model.transformer.wte.weight.detach().to(dtype)
    return F.pad(weight, (0, 0, 0, -len(weight) % 64))


def log_probabilities(
    model: GPT, weight: torch.Tensor, rows: list[Row], T: int
) -> tuple[list[int], np.ndarray]:
    """For every token of every ending, the number of its ending and its log-probability: one forward pass over rows
    padded to T tokens. weight: from head_weight."""
    idx, positions, branch = (
        np.zeros((len(rows), T), dtype=np.int64) for _ in range(3)
    )  # branch 0 is context, k + 1 its ending k
    numbers, where, targets = (
        [],
        [],
        [],
    )  # per token: of its ending, the flat position that predicts it, the token
    for b, (context, endings) in enumerate(rows):
        n = end = len(context)
        idx[b, :n], positions[b, :n] = context, np.arange(n)
        for k, (number, tokens) in enumerate(endings):
            first, end = end, end + len(tokens) - 1
            idx[b, first:end], positions[b, first:end], branch[b, first:end] = (
                tokens[:-1],
                np.arange(n, n + end - first),
                k + 1,
            )
            numbers += [number] * len(tokens)
            where += [b * T + n - 1, *range(b * T + first, b * T + end)]
            targets += tokens
        branch[b, end:] = -1  # padding, which nothing before it sees
    idx, positions, branch, where, targets = (
        torch.as_tensor(x).to(model.device) for x in (idx, positions, branch, where, targets)
    )
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # (B, T, T)
    mask = same & torch.ones(T, T, dtype=torch.bool, device=model.device).tril()
    x = model.hidden(idx, positions, mask[:, None]).flatten(0, 1)[where]  # (N, C)
    log_p = []
    for x, target in zip(*(y.split(HEAD_ROWS[y.device.type]) for y in (x, targets)), strict=True):
        logits = F.linear(x.to(weight.dtype), weight)  # (n, V + padding)
        logits[:, model.config.vocab_size :] = -torch.inf
        log_p.append(-F.cross_entropy(logits.float(), target, reduction="none"))
    return numbers, torch.cat(log_p).cpu().numpy()


@dataclass(frozen=True)
class Result:
    """Scores as fractions of 1; `log_p` (items, 4) sums the log-probabilities of each ending, `log_p_norm` is per token
    (completion) or per character (harness)."""

    model: str
    style: Style
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    items: int
    seconds: float
    items_per_second: float
    log_p: np.ndarray
    log_p_norm: np.ndarray

    def summary(self) -> dict:
        """All but the arrays, for JSON."""
        return {key: value for key, value in vars(self).items() if not key.startswith("log_p")}

    def __str__(self) -> str:
        return (
            f"HellaSwag, {self.style} style, {self.items:,} items, {self.model}: "
            f"acc {100 * self.acc:.2f} ± {100 * self.acc_stderr:.2f}, acc_norm {100 * self.acc_norm:.2f} ± {100 * self.acc_norm_stderr:.2f} "
            f"({self.seconds:.1f} s, {self.items_per_second:.1f} items/s)"
        )


def evaluate(
    model: GPT,
    encoding: tiktoken.Encoding,
    items: list[Item],
    style: Style = "completion",
    rt: Runtime | None = None,
    name: str = "model",
    progress: bool = False,
    batch_tokens: int | None = None,
) -> Result:
    """Score items with a raw GPT (neither compiled nor wrapped by DDP); every rank gets the whole result.

    rt: where to compute and with how many; default here, alone, in the fastest dtype. name: for the report.
    progress: a bar on a terminal, a line every tenth elsewhere.
    """
    rt = rt or Runtime(0, 1, model.device, choose_dtype("auto", model.device))
    start_time = time.monotonic()
    rows, lengths = zip(
        *(
            to_rows(i, item, style, encoding, model.config.block_size)
            for i, item in enumerate(items)
        ),
        strict=True,
    )
    lengths = np.array(lengths)  # (items, 4)
    labels = np.array([item.label for item in items])
    kind = model.device.type
    batches = make_batches(
        [row for some in rows for row in some], batch_tokens or BATCH_TOKENS[kind], PAD_TO[kind]
    )[rt.rank :: rt.world_size]

    log_p = np.zeros(4 * len(items))
    training = model.training
    model.eval()
    show_bar = progress and rt.is_main and sys.stderr.isatty()
    with (
        torch.inference_mode(),
        rt.autocast(),
        tqdm(total=len(batches), unit="batch", desc="HellaSwag", disable=not show_bar) as bar,
    ):
        weight = head_weight(model, rt.dtype)
        for n, (batch, T) in enumerate(batches, 1):
            log_p += np.bincount(*log_probabilities(model, weight, batch, T), minlength=len(log_p))
            bar.update()
            if progress:
                scores = log_p.reshape(-1, 4) / lengths
                done = scores.all(1)  # no ending is certain
                so_far = f"{done.sum():,} items" + (
                    f", acc_norm {100 * (scores.argmax(1) == labels)[done].mean():.2f}"
                    if done.any()
                    else ""
                )
                bar.set_postfix_str(so_far)
                if not show_bar and n % math.ceil(len(batches) / 10) == 0:
                    rt.say(so_far)
    model.train(training)
    log_p = (
        rt.sum(torch.from_numpy(log_p.reshape(-1, 4)).float().to(rt.device)).cpu().numpy()
    )  # each ending is scored by one rank, the others add 0
    log_p_norm = log_p / lengths
    acc, acc_norm = (float((scores.argmax(1) == labels).mean()) for scores in (log_p, log_p_norm))
    seconds = time.monotonic() - start_time
    stderr = [math.sqrt(p * (1 - p) / max(1, len(items) - 1)) for p in (acc, acc_norm)]
    return Result(
        name,
        style,
        acc,
        acc_norm,
        *stderr,
        len(items),
        seconds,
        len(items) / seconds,
        log_p,
        log_p_norm,
    )


# ---------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Config:
    model: str | None = (
        None  # hub name (gpt2), Hugging Face directory, step or run directory; default: the newest run
    )
    style: Style = "completion"  # convention: completion (build-nanogpt, llm.c) or harness (lm-evaluation-harness)
    data: Path | None = (
        None  # items as JSON lines with ctx, endings and label (harness: and activity_label, ctx_a, ctx_b); default: the official validation set, fetched if it is not there
    )
    limit: int | None = None  # score only the first so many items
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products
    show: int = 0  # print so many items with their endings' scores
    json: Path | None = None  # write the result to this file
    download: bool = False  # fetch the official validation set and stop

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise UserError(
                f"--limit {self.limit}",
                expected="1 or more items",
                remedy="leave it out to score all",
            )
        if self.show < 0:
            raise UserError(
                f"--show {self.show}",
                expected="0 or more items",
                remedy="leave it out to show none",
            )


def describe(item: Item, result: Result, i: int) -> str:
    """Item number i as the model saw it, with its endings' scores."""
    context, endings, _ = render(item, result.style)
    lines = [f"\n{context}"]
    for k, ending in enumerate(endings):
        marks = (">" if k == result.log_p_norm[i].argmax() else " ") + (
            "*" if k == item.label else " "
        )
        lines.append(
            f"  {marks} sum {result.log_p[i, k]:9.3f}  norm {result.log_p_norm[i, k]:8.4f} {ending}"
        )
    return "\n".join(lines)


def main() -> None:
    config = parse_flags(Config, Config(), __doc__)
    if config.download:
        try:
            load_items()
        except UserError:
            fetch()
        print(f"{DATA}: the official {ROWS:,} items")
        return
    rt = start(config.device, config.dtype)
    model, encoding, picked = load_model(config.model, warn=rt.say)
    rt.say(f"model {picked} on {rt.device}, {str(rt.dtype).removeprefix('torch.')}")
    if rt.is_main and config.data is None and not DATA.is_file():
        rt.say(f"fetching {URL}")
        fetch()
    items = rt.broadcast(load_items(config.data)[: config.limit] if rt.is_main else None)
    result = evaluate(
        model.to(rt.device), encoding, items, config.style, rt, name=picked, progress=True
    )
    if config.show:
        rt.say(
            *(describe(item, result, i) for i, item in enumerate(items[: config.show])),
            "\n> chosen by acc_norm, * right",
        )
    rt.say(str(result))
    if config.json and rt.is_main:
        config.json.write_text(json.dumps(result.summary(), indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
