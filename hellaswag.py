"""HellaSwag: download, render and score the commonsense benchmark of Zellers et al. 2019.

    python hellaswag.py --model gpt2 --device cuda      accuracy over the 10,042 validation items
    python hellaswag.py --download                      download the data and stop

An item is a context with four endings, one of which is right. A model is right where it finds that
ending the likeliest. Two conventions are in use, and their figures must not be mixed:

- completion (build-nanogpt, llm.c): the context is `ctx`, followed by a space and the ending. acc
  chooses the ending with the highest sum of log-probabilities, acc_norm the highest mean per token.
- harness (lm-evaluation-harness): the context is "activity_label: ctx_a Ctx_b". WikiHow's brackets
  are removed from it and from the endings. acc chooses the highest sum, acc_norm the highest sum
  divided by the number of characters of the ending.

The contexts of the two styles differ from the first token on, so each style needs forward passes of
its own. Where context and ending together exceed block_size, the start of the context is cut off,
in both styles, as in lm-evaluation-harness.

Source: arXiv 1905.07830.
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that Ctrl-C ends them too
    from support import script

    script.begin()


import functools
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
import tyro

from model import GPT
from sample import load_model
from support.files import file_sha256, read_jsonl, write_file
from support.progress import Progress
from support.runtime import (
    LOGIT_ROWS,
    PAD_VOCABULARY_TO,
    Runtime,
    choose_dtype,
    masked_attention,
    start,
)
from support.script import (
    Range,
    UserError,
    check_fields,
    is_out_of_memory,
    parse_flags,
    require,
    run_script,
    shown,
)

DATA = Path("data/hellaswag/hellaswag_val.jsonl")
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 items

Style = Literal["completion", "harness"]


# ---------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Item:
    ctx: str
    endings: tuple[str, ...]  # four
    label: int  # which ending is right, 0 to 3
    activity_label: str | None = None  # these three for harness style only
    ctx_a: str | None = None
    ctx_b: str | None = None


def download(file: Path = DATA, url: str = URL, retries: int = 4) -> None:
    """Download the official validation set. The file appears whole and checked, or not at all."""
    import requests
    from urllib3.util import Retry

    # Waits of 0, 1, 2, 4, … seconds after a connection that fails and the answer of a busy server.
    retry = Retry(
        retries,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        try:
            response = session.get(url, timeout=30)
            response.raise_for_status()
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", type(error).__name__)
            raise UserError(
                f"{url}: {status}; expected HellaSwag's validation set; check the connection, or "
                f"copy the file to {file}"
            ) from None
    sha256 = hashlib.sha256(response.content).hexdigest()
    require(
        sha256 == SHA256,
        f"{url}: sha256 {sha256[:8]}… of {len(response.content):,} bytes; expected {SHA256[:8]}…; "
        f"try again later, or copy the file to {file}",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, response.content)


def load_items(file: Path | None = None) -> list[Item]:
    """The items of a JSON-lines file in the official schema; None: of the official file."""
    if file is None:
        file = DATA
        require(
            file_sha256(file) == SHA256,
            f"{file}: damaged; expected the official 10,042 items; fetch them with --download",
        )
    items = []
    for number, (line, row) in enumerate(read_jsonl(file), 1):
        if line.strip():
            items.append(parse_item(row, f"{file}:{number}"))
    require(bool(items), f"{file}: no items; expected at least one; name another file")
    return items


def parse_item(row: dict | None, place: str) -> Item:
    """The item in a line of JSON. Some copies have its label as a string. place: for the error."""
    try:
        label = ("0", "1", "2", "3").index(str(row["label"]))
        harness_texts = (row.get(key) for key in ("activity_label", "ctx_a", "ctx_b"))
        item = Item(row["ctx"], tuple(row["endings"]), label, *harness_texts)
        is_right = isinstance(row["endings"], list) and len(item.endings) == 4
        is_right &= all(text.strip() for text in (item.ctx, *item.endings))
    except (TypeError, KeyError, ValueError, AttributeError):
        is_right = False
    require(
        is_right,
        f"{place}: no item; expected an object with ctx, four endings that are not empty, and a "
        "label from 0 to 3; mend the line",
    )
    return item


def find_items(rt: Runtime) -> list[Item] | None:
    """The official items for the training loop, downloaded by rank 0 if they are not there.

    Training goes on without them: if they cannot be had, one line says why and the result is None.
    """

    def find() -> list[Item] | None:
        try:
            if not DATA.is_file():
                download(retries=0)
            return load_items()
        except (UserError, OSError) as error:
            rt.say(f"HellaSwag is skipped: {error}")
            return None

    return rt.on_main(find)


# ---------------------------------------------------------------------------- text to tokens


def render(item: Item, style: Style) -> tuple[str, list[str], list[float] | None]:
    """The context, the four texts that are scored after it, and the four divisors for acc_norm.

    The divisors are None in completion style, where the number of tokens divides.
    """
    if style == "completion":
        return item.ctx, [" " + ending for ending in item.endings], None
    require(
        None not in (item.activity_label, item.ctx_a, item.ctx_b),
        "harness style: items without activity_label, ctx_a or ctx_b; expected the official "
        "schema; use --style completion, or the official data",
    )
    query = _clean(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    endings = [_clean(ending) for ending in item.endings]
    # GPT-2's tokens begin with a space and never end with one. So the harness scores the spaces at
    # the end of the context with the ending.
    context = query.rstrip()
    spaces = query[len(context) :] + " "
    # The clean-up can leave nothing of an ending. The harness divides by 0 then and gets -inf; here
    # the score becomes very low, and the ending loses as well.
    lengths = [len(ending) or 1e-9 for ending in endings]
    return context, [spaces + ending for ending in endings], lengths


def _clean(text: str) -> str:
    """lm-evaluation-harness's clean-up; the brackets come from the WikiHow half of the data."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass(frozen=True)
class Ending:
    number: int  # 4 · number of the item + 0, 1, 2 or 3
    tokens: np.ndarray  # (n,) int32


@dataclass(frozen=True)
class Row:
    """A context and the endings that are scored after it. See `log_probabilities`."""

    context: np.ndarray  # (n,) int32
    endings: list[Ending]

    def __len__(self) -> int:
        """How many tokens the model reads. An ending's last token is predicted, but not read."""
        return len(self.context) + sum(len(ending.tokens) - 1 for ending in self.endings)


@functools.lru_cache(maxsize=2)  # a training run scores the same items again and again
def tokenize(
    items: tuple[Item, ...], style: Style, encoding: tiktoken.Encoding, block_size: int
) -> tuple[list[Row], np.ndarray]:
    """Rows for all items, and the divisors for acc_norm, (items, 4)."""
    rows, lengths = [], []
    for i, item in enumerate(items):
        item_rows, item_lengths = tokenize_item(i, item, style, encoding, block_size)
        rows += item_rows
        lengths.append(item_lengths)
    return rows, np.array(lengths)


def tokenize_item(
    i: int, item: Item, style: Style, encoding: tiktoken.Encoding, block_size: int
) -> tuple[list[Row], list[float]]:
    """The rows of item number i, and its four divisors for acc_norm.

    An item is one row, unless it is too long: cutting the start of the context off can then leave
    each ending another context, and endings with different contexts are in different rows.
    """
    context_text, ending_texts, lengths = render(item, style)
    context = encoding.encode_ordinary(context_text)
    endings_by_context: dict[tuple[int, ...], list[Ending]] = {}
    num_scored = []
    for k, ending_text in enumerate(ending_texts):
        ending = encoding.encode_ordinary(ending_text)
        # block_size tokens are read, and one more is predicted. At least one is context, as the
        # first scored token needs one before it.
        kept = (context + ending)[-(block_size + 1) :]
        n = min(len(ending), block_size)
        tokens = np.array(kept[-n:], dtype=np.int32)
        endings_by_context.setdefault(tuple(kept[:-n]), []).append(Ending(4 * i + k, tokens))
        num_scored.append(n)
    rows = [
        Row(np.array(kept_context, dtype=np.int32), endings)
        for kept_context, endings in endings_by_context.items()
    ]
    return rows, num_scored if lengths is None else lengths


# ---------------------------------------------------------------------------- scoring

# Tokens in a batch, and the multiple that its rows are padded to. A CPU does as well with small
# batches, which need less padding. A GPU needs large ones of few different shapes.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
PAD_TO = {"cpu": 1, "cuda": 32, "mps": 32}


@dataclass(frozen=True)
class Batch:
    rows: list[Row]
    T: int  # the length that the rows are padded to


def make_batches(rows: list[Row], batch_tokens: int, pad_to: int) -> list[Batch]:
    """All rows in batches of some batch_tokens tokens, the same batches at any number of ranks.

    Rows of similar length are together, so that there is little padding. The batches are then
    shuffled, so that ranks have equal work and the running accuracy is not that of long items.
    """
    rows = sorted(rows, key=len, reverse=True)
    batches = []
    while rows:
        T = math.ceil(len(rows[0]) / pad_to) * pad_to
        n = max(1, batch_tokens // T)
        batches.append(Batch(rows[:n], T))
        rows = rows[n:]
    random.Random(0).shuffle(batches)
    return batches


def log_probabilities(
    model: GPT, weight: torch.Tensor, batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Each ending's tokens: their ending's number and their log-probability. One forward pass.

    weight: of the head, with rows of zeros that make the product faster.

    A row holds the context once and its endings one after the other, which is half as many tokens
    as four rows with a context each. This is the row of a context "a b c" with only two endings,
    "d e f" and "g h". The dot is padding.

        token      a  b  c  d  e  g  .
        branch     0  0  0  1  1  2 -1      0 is the context, 1 and 2 are the endings
        position   0  1  2  3  4  3  0      each ending's positions go on from the context's
        predicts         d  e  f  h         c also predicts g, the other ending's first token

    A token sees the tokens to its left that are in branch 0 or in the same branch. An ending's last
    token (f, h) is predicted but not read. The projection onto the vocabulary, which
    is a third of the work at 124M parameters, runs only where a token of an ending is predicted.
    """
    B, T = len(batch.rows), batch.T
    idx = np.zeros((B, T), dtype=np.int64)
    positions = np.zeros((B, T), dtype=np.int64)
    branch = np.full((B, T), -1, dtype=np.int64)
    # For every token that is predicted: its ending, the place in idx.flatten() that predicts it,
    # and the token.
    numbers, places, targets = [], [], []
    for b, row in enumerate(batch.rows):
        n = len(row.context)
        idx[b, :n] = row.context
        positions[b, :n] = np.arange(n)
        branch[b, :n] = 0
        first = n
        for k, ending in enumerate(row.endings, 1):
            num_read = len(ending.tokens) - 1
            end = first + num_read
            idx[b, first:end] = ending.tokens[:-1]
            positions[b, first:end] = np.arange(n, n + num_read)
            branch[b, first:end] = k
            numbers += [ending.number] * len(ending.tokens)
            places += [b * T + n - 1, *range(b * T + first, b * T + end)]
            targets.append(ending.tokens)
            first = end
    device = model.device

    def to_device(array: np.ndarray) -> torch.Tensor:
        # CUDA has a copy of the array when this returns, though it has not done the work before it.
        return torch.as_tensor(array).to(device, non_blocking=device.type == "cuda")

    idx, positions, branch = to_device(idx), to_device(positions), to_device(branch)
    places = to_device(np.array(places))
    targets = to_device(np.concatenate(targets).astype(np.int64))

    query_branch, key_branch = branch[:, :, None], branch[:, None, :]
    mask = (key_branch == 0) | (key_branch == query_branch)  # (B, T, T)
    mask &= torch.ones(T, T, dtype=torch.bool, device=device).tril()
    x = model.hidden(idx, positions, mask[:, None])  # (B, T, C)
    x = x.flatten(0, 1)[places]  # (N, C)
    log_p = []
    step = LOGIT_ROWS[device.type]
    for some_x, some_targets in zip(x.split(step), targets.split(step), strict=True):
        logits = F.linear(some_x.to(weight.dtype), weight)  # (n, V and the padding)
        logits[:, model.config.vocab_size :] = -torch.inf
        log_p.append(-F.cross_entropy(logits.float(), some_targets, reduction="none"))
    return np.array(numbers), torch.cat(log_p).cpu().numpy()


@dataclass(frozen=True)
class Result:
    """Accuracies and their standard errors as fractions of 1, and the scores of all endings.

    log_p (items, 4): each ending's sum of log-probabilities. log_p_norm (items, 4): log_p per token
    (completion) or per character (harness).
    """

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
        """All but the two arrays, for JSON."""
        return {key: value for key, value in vars(self).items() if not key.startswith("log_p")}

    def __str__(self) -> str:
        acc = f"{100 * self.acc:.2f} ± {100 * self.acc_stderr:.2f}"
        acc_norm = f"{100 * self.acc_norm:.2f} ± {100 * self.acc_norm_stderr:.2f}"
        speed = f"{self.seconds:.1f} s, {self.items_per_second:.1f} items/s"
        return (
            f"HellaSwag, {self.style} style, {self.items:,} items, {self.model}: "
            f"acc {acc}, acc_norm {acc_norm} ({speed})"
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
    between_batches: Callable[[], None] | None = None,
) -> Result:
    """Score items with a GPT that is neither compiled nor wrapped; all ranks get the whole result.

    rt: the ranks that divide the work, and where and how they compute; None: this process alone,
    in the fastest dtype. name: the model's name in the report. progress: show it.
    batch_tokens: tokens in a batch; None: by device.
    between_batches: called before each batch, equally often on all ranks, so that it may be a
    collective. What it raises ends the evaluation.
    """
    if rt is None:
        rt = Runtime(device=model.device, dtype=choose_dtype("auto", model.device))
    start_time = time.monotonic()
    rows, lengths = tokenize(tuple(items), style, encoding, model.config.block_size)
    labels = np.array([item.label for item in items])
    kind = model.device.type
    batches = make_batches(rows, batch_tokens or BATCH_TOKENS[kind], PAD_TO[kind])
    rounds = range(0, len(batches), rt.world_size)  # in each one every rank scores one batch
    weight = model.head_weight.detach().to(rt.dtype)
    weight = F.pad(weight, (0, 0, 0, -len(weight) % PAD_VOCABULARY_TO))

    log_p = np.zeros(4 * len(items))  # 0 for the endings that other ranks score

    def so_far() -> str:
        scores = log_p.reshape(-1, 4) / lengths
        is_scored = scores.all(1)
        acc_norm, _ = accuracy(scores[is_scored], labels[is_scored])
        return f"{is_scored.sum():,} items, acc_norm {100 * acc_norm:.2f}"

    fault = None
    was_training = model.training
    model.eval()
    bar = Progress("batch", total=len(rounds), enabled=progress and rt.is_main, say=rt.say)
    try:
        with torch.inference_mode(), rt.autocast(), masked_attention(model.device), bar:
            for number, first in enumerate(rounds, 1):
                if between_batches is not None:
                    between_batches()
                # In the last round some ranks have no batch left. One that has failed scores no
                # more, but stays in step with the others.
                if first + rt.rank < len(batches) and fault is None:
                    try:
                        batch = batches[first + rt.rank]
                        numbers, token_log_p = log_probabilities(model, weight, batch)
                        log_p += np.bincount(numbers, token_log_p, minlength=len(log_p))
                    except Exception as error:
                        if is_out_of_memory(error):
                            raise
                        fault = error
                bar.update(number, so_far)
    finally:
        model.train(was_training)
    raise_fault_of_any(fault, rt)

    log_p = rt.sum(torch.from_numpy(log_p.reshape(-1, 4)).float()).numpy()
    log_p_norm = log_p / lengths
    acc, acc_stderr = accuracy(log_p, labels)
    acc_norm, acc_norm_stderr = accuracy(log_p_norm, labels)
    seconds = time.monotonic() - start_time
    return Result(
        model=name,
        style=style,
        acc=acc,
        acc_norm=acc_norm,
        acc_stderr=acc_stderr,
        acc_norm_stderr=acc_norm_stderr,
        items=len(items),
        seconds=seconds,
        items_per_second=len(items) / seconds,
        log_p=log_p,
        log_p_norm=log_p_norm,
    )


def raise_fault_of_any(fault: Exception | None, rt: Runtime) -> None:
    """Raise an error on every rank if one of them had a fault, so that they stay in step."""
    reasons = rt.gather(None if fault is None else f"{type(fault).__name__}: {fault}")
    if fault is not None:
        raise fault
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise RuntimeError(f"rank {rank}: {reason}")


def accuracy(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The fraction of items whose highest score (items, 4) is that of the label; its std. error."""
    p = float((scores.argmax(1) == labels).mean())
    return p, math.sqrt(p * (1 - p) / max(1, len(labels) - 1))


# ---------------------------------------------------------------------------- command line

newest_run = tyro.conf.arg(help_behavior_hint="(default: the newest run under runs/)")
official_file = tyro.conf.arg(
    metavar="FILE", help_behavior_hint="(default: the official validation set, downloaded once)"
)
all_items = tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")
optional_file = tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: no file)")


@dataclass(frozen=True)
class Config:
    # The model: a name on the hub (gpt2), a Hugging Face directory, a run or one of its steps.
    model: Annotated[str, newest_run] = ""
    style: Style = "completion"  # The convention of scoring, see above.
    # The items: JSON lines with ctx, endings, label; for harness also activity_label, ctx_a, ctx_b.
    data: Annotated[Path | None, official_file] = None
    # Score only so many items, from the first on.
    limit: Annotated[int | None, Range(1), all_items] = None
    device: str = "auto"  # Compute on cuda, mps or cpu; auto takes the first that is there.
    # The precision of matrix products; auto takes bfloat16 where the hardware multiplies it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    show: Annotated[int, Range(0)] = 0  # Print so many items, with the scores of their endings.
    json: Annotated[Path | None, optional_file] = None  # Write the result to this file.
    download: bool = False  # Download the official validation set and stop.

    def __post_init__(self):
        check_fields(self)
        if self.json is not None:  # known now, and not after an hour of scoring
            can_be_written = self.json.parent.is_dir() and not self.json.is_dir()
            require(
                can_be_written, f"--json {self.json}; expected a file in a folder that is there"
            )


def describe(item: Item, result: Result, i: int) -> str:
    """Item number i as the model saw it, with the scores of its endings."""
    context, endings, _ = render(item, result.style)
    chosen = result.log_p_norm[i].argmax()
    lines = [f"\n{context}"]
    for k, ending in enumerate(endings):
        marks = (">" if k == chosen else " ") + ("*" if k == item.label else " ")
        scores = f"sum {result.log_p[i, k]:9.3f}  norm {result.log_p_norm[i, k]:8.4f}"
        lines.append(f"  {marks} {scores} {ending}")
    return "\n".join(lines)


def main() -> None:
    config = parse_flags(Config, Config(), __doc__)
    if config.download:
        if not DATA.is_file() or file_sha256(DATA) != SHA256:
            download()
        print(f"{DATA}: the official {len(load_items()):,} items")
        return
    rt = start(config.device, config.dtype)
    model, encoding, picked = load_model(config.model)
    rt.say(f"model {shown(picked)} on {rt.device}, {str(rt.dtype).removeprefix('torch.')}")

    def read_items() -> list[Item]:
        if config.data is None and not DATA.is_file():
            rt.say(f"downloading {URL}")
            download()
        return load_items(config.data)[: config.limit]

    items = rt.on_main(read_items)
    result = evaluate(
        model.to(rt.device), encoding, items, config.style, rt, name=picked, progress=True
    )
    for i, item in enumerate(items[: config.show]):
        rt.say(describe(item, result, i))
    if config.show:
        rt.say("\n> chosen by acc_norm, * right")
    rt.say(str(result))
    if config.json is not None and rt.is_main:
        write_file(config.json, (json.dumps(result.summary(), indent=2) + "\n").encode())


if __name__ == "__main__":
    run_script(main, out_of_memory="use a smaller model, or another --device")
