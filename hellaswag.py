"""HellaSwag: fetch, render and score the commonsense benchmark of Zellers et al. 2019 (arXiv 1905.07830).

    python hellaswag.py --model gpt2 --device cuda      accuracy over the 10,042 validation items
    python hellaswag.py --download                      fetch the data and stop

An item is a context with four endings, one of them right; a model is right when it finds that ending the likeliest.
Two conventions are in use, and their figures must not be mixed:

- completion (build-nanogpt, llm.c): `ctx`, then " " + ending. acc takes the ending with the highest summed
  log-probability, acc_norm the highest mean per token.
- harness (lm-evaluation-harness): "activity label: ctx_a Ctx_b" and the endings, cleaned of WikiHow's brackets. acc
  takes the highest sum, acc_norm the highest sum divided by the number of characters of the ending.

Their contexts differ from the first token on, so one forward pass cannot serve both; acc and acc_norm share theirs.

How it is fast: a context is read once, its endings after it in the same row, where a mask and positions let each
ending see the context and itself; items sorted by length leave next to no padding; and the projection onto the
vocabulary, a third of the work at 124M, runs only at the positions that predict a token of an ending.

An item longer than block_size loses the start of its context, as in lm-evaluation-harness.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import load_model
from model import GPT
from runtime import Runtime, UserError, choose_dtype, parse_flags, run_script, start

DATA = Path("data/hellaswag/hellaswag_val.jsonl")
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE, ROWS = 12_246_618, 10_042
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

Style = Literal["completion", "harness"]


# ---------------------------------------------------------------------------------------------------- data

@dataclass(frozen=True)
class Item:
    ctx: str
    endings: tuple[str, str, str, str]
    label: int  # which ending is right
    activity_label: str | None = None  # these three for harness style only
    ctx_a: str | None = None
    ctx_b: str | None = None


def fetch(file: Path = DATA, url: str = URL, size: int = SIZE, sha256: str = SHA256, attempts: int = 5) -> None:
    """Fetch the official validation set. The file appears whole and proven or not at all, so any number of processes
    may fetch it at once."""
    import requests

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        for attempt in range(attempts):
            try:
                with requests.get(url, stream=True, timeout=30) as response, open(temporary, "wb") as f:
                    response.raise_for_status()
                    for block in response.iter_content(1 << 20):
                        f.write(block)
                    f.flush()
                    os.fsync(f.fileno())
                break
            except requests.RequestException as error:
                status = getattr(error.response, "status_code", 500)
                if attempt + 1 == attempts or (status < 500 and status != 429):
                    why = f"HTTP status {error.response.status_code}" if error.response is not None else type(error).__name__
                    raise UserError(f"{url}: {why}", expected="the HellaSwag validation set",
                                    remedy=f"check the connection, or copy the file to {file}") from None
                time.sleep(2 ** attempt)
        if found := _mismatch(temporary.read_bytes(), size, sha256):
            raise UserError(f"{url}: {found}", expected=f"{size:,} bytes with sha256 {sha256[:8]}…",
                            remedy=f"try again later, or copy the file to {file}")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _mismatch(content: bytes, size: int, sha256: str) -> str:
    """What a file is instead of what it should be; empty if it is right."""
    rows, digest = len(content.splitlines()), hashlib.sha256(content).hexdigest()
    return "" if (len(content), digest) == (size, sha256) else f"{len(content):,} bytes in {rows:,} rows with sha256 {digest[:8]}…"


def load_items(file: Path | None = None) -> list[Item]:
    """Items of a JSON-lines file in the official schema; None is the official file, checked against its hash."""
    path = file or DATA
    if not path.is_file():
        raise UserError(f"{path}: no such file", expected="HellaSwag items as JSON lines", remedy="fetch it with hellaswag.py --download, or check --data")
    content = path.read_bytes()
    if file is None and (found := _mismatch(content, SIZE, SHA256)):
        raise UserError(f"{path}: {found}", expected=f"the official file of {ROWS:,} rows", remedy="hellaswag.py --download fetches it again")
    items = [_parse(line, f"{path}:{number}") for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not items:
        raise UserError(f"{path}: no items", expected="at least one", remedy="check --data")
    return items


def _parse(line: bytes, place: str) -> Item:
    def fault(found):
        return UserError(f"{place}: {found}", expected="ctx, four endings that are not empty, and a label from 0 to 3", remedy="mend the line or fetch the file again")

    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell lone surrogates, which are no text
    except (ValueError, RecursionError) as error:
        raise fault(f"{type(error).__name__}: {error}") from None
    if not isinstance(row, dict):
        raise fault(f"a JSON {type(row).__name__}")
    endings, optional = row.get("endings"), {key: row.get(key) for key in ("activity_label", "ctx_a", "ctx_b")}
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise fault(f"endings {str(endings)[:80]}")
    if str(row.get("label")) not in ("0", "1", "2", "3"):  # a string in some copies
        raise fault(f"label {row.get('label')!r}")
    if not isinstance(row.get("ctx"), str) or not row["ctx"].strip() or not all(isinstance(v, str | None) for v in optional.values()):
        raise fault(f"ctx {str(row.get('ctx'))[:80]!r}")
    return Item(row["ctx"], tuple(endings), int(row["label"]), **optional)


def find_items(rt: Runtime) -> list[Item] | None:
    """For the training loop: the official items, fetched if they are not there; None, and one line that says why,
    if that fails. Rank 0 reads, all ranks receive."""
    items = None
    if rt.is_main:
        try:
            if not DATA.is_file():
                fetch(attempts=1)
            items = load_items()
        except UserError as error:
            rt.say(f"HellaSwag is skipped: {error}")
    return rt.share(items)


# ---------------------------------------------------------------------------------------------------- text to tokens

def render(item: Item, style: Style) -> tuple[str, list[str], list[int]]:
    """Context, the four continuations to score after it, and the endings' lengths in characters."""
    if style == "completion":
        return item.ctx, [" " + ending for ending in item.endings], [len(ending) for ending in item.endings]
    if item.activity_label is None or item.ctx_a is None or item.ctx_b is None:
        raise UserError("--style harness: the items lack activity_label, ctx_a or ctx_b", expected="items in the official schema",
                        remedy="use --style completion, or the official data")
    query = _clean(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    endings = [_clean(ending) for ending in item.endings]
    context = query.rstrip()  # GPT-2's tokens begin with a space, never end with one: the harness scores it with the ending
    gap = query[len(context):] + " "
    return context, [gap + ending for ending in endings], [len(ending) for ending in endings]


def _clean(text: str) -> str:
    """lm-evaluation-harness's clean-up; the brackets come from the WikiHow half of the data."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


@dataclass(frozen=True)
class Question:
    """An item in tokens. rows: (context, [(k, tokens of ending k), …]); one row unless truncation cuts the endings'
    contexts differently."""

    index: int
    rows: list[tuple[list[int], list[tuple[int, list[int]]]]]
    longest: int  # tokens of the longest row
    tokens: list[int]  # scored, per ending

    @classmethod
    def encode(cls, index: int, context: str, endings: list[str], encoding: tiktoken.Encoding, block_size: int) -> "Question":
        head = encoding.encode_ordinary(context)
        rows, counts = {}, []
        for k, ending in enumerate(endings):
            tokens = encoding.encode_ordinary(ending)
            # The last token is predicted, never read, so block_size + 1 fit; one of them has to come before the first scored.
            whole = (head + tokens)[-(block_size + 1):]
            scored = min(len(tokens), block_size)
            rows.setdefault(tuple(whole[:-scored]), []).append((k, whole[-scored:]))
            counts.append(scored)
        rows = [(list(cut), branches) for cut, branches in rows.items()]
        return cls(index, rows, max(len(cut) + sum(len(tokens) - 1 for _, tokens in branches) for cut, branches in rows), counts)


# ---------------------------------------------------------------------------------------------------- scoring

# Tokens in a batch, and the multiple its rows are padded to: a CPU wants what its caches hold, a GPU few large shapes.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}
PAD_TO = {"cpu": 8, "cuda": 32, "mps": 32}
HEAD_ROWS = {"cpu": 512, "cuda": 4096, "mps": 2048}  # logits in memory at once


def make_batches(questions: list[Question], batch_tokens: int, pad_to: int) -> list[tuple[list[Question], int]]:
    """Questions of similar length together, each batch with the row length T that holds them. Ranks share out whole
    batches, so that scores are the same at any world size; shuffled, so that the running accuracy is not that of
    the longest items and ranks carry even loads."""
    batches, i = [], 0
    questions = sorted(questions, key=lambda q: -q.longest)
    while i < len(questions):
        T = math.ceil(questions[i].longest / pad_to) * pad_to
        rows, first = 0, i
        while i < len(questions) and (i == first or (rows + len(questions[i].rows)) * T <= batch_tokens):
            rows += len(questions[i].rows)
            i += 1
        batches.append((questions[first:i], T))
    random.Random(0).shuffle(batches)
    return batches


def head_weight(model: GPT, dtype: torch.dtype) -> torch.Tensor:
    """wte.weight in dtype with rows of zeros up to a multiple of 64: matrix units dislike the odd 50257 (a CPU's too,
    whose float32 product gains 30%)."""
    weight = model.transformer.wte.weight.detach().to(dtype)
    return F.pad(weight, (0, 0, 0, -len(weight) % 64))


def log_probabilities(model: GPT, weight: torch.Tensor, questions: list[Question], T: int) -> np.ndarray:
    """Summed log-probability of every ending, float64 (len(questions), 4), from one forward pass over rows of T tokens.
    weight: from head_weight."""
    B = sum(len(question.rows) for question in questions)
    idx, positions, branch = (np.zeros((B, T), dtype=np.int64) for _ in range(3))  # branch 0 is context, k + 1 ending k
    where, targets, owners = [], [], []  # flat positions that predict, the tokens they predict, the endings these belong to
    b = 0
    for q, question in enumerate(questions):
        for context, branches in question.rows:
            n = end = len(context)
            idx[b, :n], positions[b, :n] = context, np.arange(n)
            for k, tokens in branches:
                first, end = end, end + len(tokens) - 1
                idx[b, first:end], positions[b, first:end], branch[b, first:end] = tokens[:-1], np.arange(n, n + end - first), k + 1
                where += [b * T + n - 1, *range(b * T + first, b * T + end)]
                targets += tokens
                owners += [4 * q + k] * len(tokens)
            branch[b, end:] = -1  # padding: nothing real comes after it
            b += 1
    idx, positions, branch, where, targets = (torch.as_tensor(x).to(model.device) for x in (idx, positions, branch, where, targets))
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # (B, T, T)
    mask = same & torch.ones(T, T, dtype=torch.bool, device=model.device).tril()
    x = model.hidden(idx, positions, mask[:, None]).flatten(0, 1)[where]  # (N, C)
    log_p = []
    for rows, target in zip(*(y.split(HEAD_ROWS[x.device.type]) for y in (x, targets)), strict=True):
        logits = F.linear(rows.to(weight.dtype), weight)  # (n, V + padding)
        logits[:, model.config.vocab_size:] = -torch.inf
        log_p.append(-F.cross_entropy(logits.float(), target, reduction="none"))
    return np.bincount(owners, torch.cat(log_p).cpu().numpy(), minlength=4 * len(questions)).reshape(-1, 4)


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
        return {key: value for key, value in asdict(self).items() if not key.startswith("log_p")}

    def __str__(self) -> str:
        return (f"HellaSwag, {self.style} style, {self.items:,} items, {self.model}: "
                f"acc {100 * self.acc:.2f} ± {100 * self.acc_stderr:.2f}, acc_norm {100 * self.acc_norm:.2f} ± {100 * self.acc_norm_stderr:.2f} "
                f"({self.seconds:.1f} s, {self.items_per_second:.1f} items/s)")


class Progress:
    """A bar on a terminal, a line every tenth elsewhere, nothing on other ranks."""

    def __init__(self, total: int, rt: Runtime, show: bool):
        self.bar = tqdm(total=total, unit="item", desc="HellaSwag", disable=not (show and rt.is_main and sys.stderr.isatty()))
        self.say = rt.say if show and self.bar.disable else lambda line: None
        self.total, self.done = total, 0

    def update(self, items: int, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(items)
        before, self.done = self.done, self.done + items
        if 10 * before // self.total < 10 * self.done // self.total:
            self.say(f"{self.done:,} of {self.total:,} items, {text}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.bar.close()


def evaluate(model: GPT, encoding: tiktoken.Encoding, items: list[Item], style: Style = "completion", rt: Runtime | None = None,
             name: str = "model", progress: bool = True, batch_tokens: int | None = None) -> Result:
    """Score items with a raw GPT (neither compiled nor wrapped by DDP); every rank gets the whole result.

    rt: where to compute and with how many; default here, alone, in the fastest dtype. name: for the report.
    """
    rt = rt or Runtime(0, 1, model.device, choose_dtype("auto", model.device))
    start_time = time.monotonic()
    texts = [render(item, style) for item in items]
    questions = [Question.encode(i, context, endings, encoding, model.config.block_size) for i, (context, endings, _) in enumerate(texts)]
    # An ending that the clean-up leaves empty must not win: as in the harness its score is -inf, though never by a division by 0.
    lengths = np.array([question.tokens if style == "completion" else [n or 1e-9 for n in characters]
                        for question, (_, _, characters) in zip(questions, texts, strict=True)])
    labels = np.array([item.label for item in items])
    kind = model.device.type
    batches = make_batches(questions, batch_tokens or BATCH_TOKENS[kind], PAD_TO[kind])[rt.rank::rt.world_size]

    log_p, done = np.zeros((len(items), 4)), []
    training = model.training
    model.eval()
    with torch.inference_mode(), rt.autocast(), Progress(sum(len(batch) for batch, _ in batches), rt, progress) as bar:
        weight = head_weight(model, rt.dtype)
        for batch, T in batches:
            rows = [question.index for question in batch]
            log_p[rows] = log_probabilities(model, weight, batch, T)
            done += rows
            bar.update(len(rows), f"acc_norm {100 * ((log_p[done] / lengths[done]).argmax(1) == labels[done]).mean():.2f}")
    model.train(training)
    log_p = rt.sum(torch.from_numpy(log_p).float().to(rt.device)).cpu().numpy()  # each rank's rows are zero on the others
    log_p_norm = log_p / lengths
    acc, acc_norm = (float((scores.argmax(1) == labels).mean()) for scores in (log_p, log_p_norm))
    seconds = time.monotonic() - start_time
    stderr = [math.sqrt(p * (1 - p) / max(1, len(items) - 1)) for p in (acc, acc_norm)]
    return Result(name, style, acc, acc_norm, *stderr, len(items), seconds, len(items) / seconds, log_p, log_p_norm)


# ---------------------------------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class Config:
    model: str | None = None  # hub name (gpt2), Hugging Face directory, step or run directory; default: the newest run
    style: Style = "completion"  # convention: completion (build-nanogpt, llm.c) or harness (lm-evaluation-harness)
    data: Path | None = None  # items as JSON lines; default: the official validation set, fetched if it is not there
    limit: int | None = None  # score only the first so many items
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products
    show: int = 0  # print so many items with their endings' scores
    json: Path | None = None  # write the result to this file
    download: bool = False  # fetch the official validation set and stop

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}", expected="1 or more items", remedy="leave it out to score all")
        if self.show < 0:
            raise UserError(f"--show {self.show}", expected="0 or more items", remedy="leave it out to show none")


def describe(item: Item, log_p: np.ndarray, log_p_norm: np.ndarray) -> str:
    """An item with its endings' scores: > marks the ending chosen by acc_norm, * the right one."""
    lines = [f"\n{item.ctx}"]
    for k, ending in enumerate(item.endings):
        marks = (">" if k == log_p_norm.argmax() else " ") + ("*" if k == item.label else " ")
        lines.append(f"  {marks} sum {log_p[k]:9.3f}  norm {log_p_norm[k]:8.4f}  {ending}")
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
    items = rt.share(load_items(config.data)[:config.limit] if rt.is_main else None)
    result = evaluate(model.to(rt.device), encoding, items, config.style, rt, name=picked)
    if config.show:
        rt.say(*map(describe, items[:config.show], result.log_p, result.log_p_norm), "\n> chosen, * right")
    rt.say(str(result))
    if config.json and rt.is_main:
        config.json.write_text(json.dumps(result.summary(), indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
