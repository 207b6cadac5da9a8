"""Subject `hellaswag`: log-probabilities of HellaSwag's endings."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from harness import ROOT, Case, Ready, Setting

from hellaswag import DATA, Item, evaluate, load_items, render
from model import GPT
from tokens import get_encoding


def find_items(n: int) -> tuple[list[Item], str]:
    """n items and where they are from: the official file if it is there, else made up."""
    if DATA.is_file():
        items = load_items()
        chosen = np.linspace(0, len(items) - 1, n).astype(int)
        return [items[i] for i in chosen], "official"
    rng = np.random.default_rng(0)
    words = (ROOT / "input.txt").read_text().split()
    return [make_item(words, rng) for _ in range(n)], "synthetic"


def make_item(words: list[str], rng: np.random.Generator) -> Item:
    """An item as long as the official ones, a third of which are from WikiHow and longer."""
    context_mean, context_deviation = 28, 10  # words
    ending_mean, ending_deviation = 20, 9
    if rng.random() < 0.32:
        context_mean, context_deviation = 50, 6
        ending_mean, ending_deviation = 28, 4
    mean_of_endings = rng.normal(ending_mean, ending_deviation)
    context = make_text(words, rng, context_mean, context_deviation)
    endings = tuple(make_text(words, rng, mean_of_endings, 4) for _ in range(4))
    return Item(context, endings, 0)


def make_text(words: list[str], rng: np.random.Generator, mean: float, deviation: float) -> str:
    start = rng.integers(len(words) - 100)
    length = int(np.clip(rng.normal(mean, deviation), 2, 70))
    return " ".join(words[start : start + length])


def score_ours(setting: Setting, n: int) -> Ready:
    rt = setting.our_runtime()
    model = GPT.from_pretrained(setting.weights()).to(rt.device)
    items, _ = find_items(n)

    def work() -> np.ndarray:
        return evaluate(model, get_encoding("gpt2"), items, rt=rt, progress=False).log_p

    return Ready(work(), work)


def score_plain(setting: Setting, n: int) -> Ready:
    """Our model in build-nanogpt's scheme.

    An item at a time, in four padded rows, with logits everywhere and a masked cross-entropy.
    """
    rt = setting.peer_runtime()
    encoding = get_encoding("gpt2")
    model = GPT.from_pretrained(setting.weights()).to(rt.device)
    items, _ = find_items(n)

    def score(item: Item) -> np.ndarray:
        context = encoding.encode_ordinary(item.ctx)
        endings = [encoding.encode_ordinary(" " + ending) for ending in item.endings]
        longest = len(context) + max(map(len, endings))
        tokens = torch.zeros(4, longest, dtype=torch.long)
        mask = torch.zeros(4, longest - 1)  # of the targets
        for k, ending in enumerate(endings):
            end = len(context) + len(ending)
            tokens[k, :end] = torch.tensor(context + ending)
            mask[k, len(context) - 1 : end - 1] = 1
        tokens = tokens.to(rt.device)
        with rt.autocast():  # entered for each item, as there: the weights are cast anew
            logits = model(tokens)
        predictions = logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(predictions, tokens[:, 1:].flatten(), reduction="none")
        return -(losses.view(4, -1) * mask.to(rt.device)).sum(1).cpu().numpy()

    @torch.no_grad()
    def work() -> np.ndarray:
        return np.stack([score(item) for item in items])

    return Ready(work(), work)


def score_harness(setting: Setting, n: int) -> Ready:
    """lm-evaluation-harness, on the same contexts and endings."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast

    rt = setting.peer_runtime()
    model = GPT2LMHeadModel.from_pretrained(setting.weights(), dtype=rt.dtype).to(rt.device)
    scorer = HFLM(
        model,
        tokenizer=GPT2TokenizerFast.from_pretrained(setting.weights()),
        batch_size=256 if setting.device == "cuda" else 8,
        device=setting.device,
    )
    items, _ = find_items(n)
    requests = []
    for item in items:
        context, endings = render(item, "completion")[:2]
        for k, ending in enumerate(endings):
            requests.append(Instance("loglikelihood", {}, (context, ending), k))

    def work() -> np.ndarray:
        answers = scorer.loglikelihood(requests, disable_tqdm=True)
        return np.array([log_p for log_p, _ in answers]).reshape(-1, 4)

    return Ready(work(), work)


def hellaswag(setting: Setting) -> Iterator[Case]:
    """Scores of GPT-2 124M; on CUDA of the whole file too, which only we finish in seconds."""
    setting.weights()  # once, here, and not by every contender
    peers = {
        "PyGPT2": score_ours,
        "one item at a time, as build-nanogpt does": score_plain,
        "lm-evaluation-harness": score_harness,
    }
    if setting.device == "cuda":
        yield hellaswag_case(setting, 10_042, {"PyGPT2": score_ours})
        yield hellaswag_case(setting, 300, peers)
    else:
        yield hellaswag_case(setting, setting.size(40, 4), peers)


def hellaswag_case(setting: Setting, n: int, scorers: dict) -> Case:
    _, kind = find_items(1)
    return Case(
        f"hellaswag 124M, {n:,} {kind} items, {setting.dtype}",
        "items",
        n,
        {name: (scorer, setting, n) for name, scorer in scorers.items()},
        # Of sums over an ending, about -320 with random weights. In bfloat16 the harness rounds
        # and sums in bfloat16, and is off by 1.
        tolerance=3.0 if setting.dtype == "bfloat16" else 2e-3,
        set_up_together=setting.device == "cuda",
    )
