"""Draw the figures of docs/tour.md and of the README as SVG, from the code that they explain.

    python benchmarks/figures.py        # into docs/figures/

Shapes, sizes, orders, masks and imports come from the code; places and colors are set here.
tests/test_docs.py holds the files to this output.
"""

import ast
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import SIZES, GPTConfig, KVCache  # noqa: E402
from support.mixture import pattern  # noqa: E402
from support.plan import flops_per_token, parameters  # noqa: E402
from support.runtime import LOGIT_ROWS  # noqa: E402
from tokens import get_encoding, training_windows  # noqa: E402

FOLDER = ROOT / "docs" / "figures"

INK, GREY, PALE = "#222222", "#6e6e6e", "#f2f2f2"
BLUE, ORANGE, GREEN, RED, YELLOW = "#d5e5f5", "#fde3c8", "#d8eed6", "#f8d7d3", "#fff2bf"
WHITE = "#ffffff"


@dataclass
class Picture:
    """An SVG on a white ground, which reads the same on a dark page."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def rect(self, x, y, w, h, fill=WHITE, stroke=INK, dashed=False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" '
            f'stroke="{stroke}"{dash}/>'
        )

    def text(self, x, y, text, size=13, anchor="middle", color=INK, code=False, bold=False) -> None:
        """One line, its middle at height y. code: in a font of equal widths."""
        font = ' font-family="Menlo, Consolas, DejaVu Sans Mono, monospace"' if code else ""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="{color}"{font}{weight}>{escape(text, quote=False)}</text>'
        )

    def lines(self, x, y, lines, size=13, anchor="middle", **style) -> None:
        """Several lines around height y."""
        step = 1.35 * size
        for number, line in enumerate(lines):
            self.text(x, y + (number - (len(lines) - 1) / 2) * step, line, size, anchor, **style)

    def box(self, x, y, w, h, *lines, fill=WHITE, size=13, stroke=INK, dashed=False, **style):
        """A rectangle with text in its middle."""
        self.rect(x, y, w, h, fill, stroke, dashed)
        self.lines(x + w / 2, y + h / 2, lines, size, **style)

    def line(self, *points, color=INK, arrow=False, dashed=False) -> None:
        """A line through points (x, y), with an arrow at its end if asked for."""
        head = f' marker-end="url(#{"grey" if color == GREY else "ink"})"' if arrow else ""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.3"'
            f"{dash}{head}/>"
        )

    def arrow(self, *points, color=INK, dashed=False) -> None:
        self.line(*points, color=color, arrow=True, dashed=dashed)

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
            for name, color in (("ink", INK), ("grey", GREY))
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" '
                f'height="{self.height}" viewBox="0 0 {self.width} {self.height}" '
                'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                f"<defs>{heads}</defs>",
                f'<rect width="{self.width}" height="{self.height}" fill="{WHITE}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


# ---------------------------------------------------------------------------------------- GPT-2


def gpt2() -> Picture:
    """GPT-2 124M from tokens to logits, with shapes and parameters."""
    c = SIZES["gpt2"]
    C, V, T, L = c.n_embd, c.vocab_size, c.block_size, c.n_layer
    layer = parameters(c) - parameters(GPTConfig(L - 1, c.n_head, C, T, V))
    p = Picture(760, 560, "GPT-2 and its shapes")
    # On the left the whole, from the bottom up.
    x, w = 30, 230
    middle = x + w / 2
    p.text(middle, 544, "idx: token ids (B, T)")
    p.arrow((middle, 532), (middle, 508))
    p.box(x, 460, w, 46, "wte[idx] + wpe[0 … T−1]", f"({V:,} + {T:,}) × {C} values", fill=BLUE)
    p.arrow((middle, 460), (middle, 418))
    p.text(middle + 10, 441, "x (B, T, C)", anchor="start", color=GREY)
    for shift in (12, 6, 0):
        p.rect(x + shift, 222 - shift, w, 194, YELLOW)
    p.lines(middle, 290, [f"{L} blocks", f"of {layer:,} parameters"])
    p.lines(middle, 352, ["each adds two changes", "to the stream x"], color=GREY)
    p.arrow((middle, 210), (middle, 174))
    p.text(middle + 10, 193, "x (B, T, C)", anchor="start", color=GREY)
    p.box(x, 138, w, 34, "ln_f", fill=GREEN)
    p.arrow((middle, 138), (middle, 112))
    p.box(x, 64, w, 46, "× wteᵀ, the head:", "the embedding once more", fill=BLUE)
    p.arrow((middle, 64), (middle, 38))
    p.text(middle, 24, f"logits (B, T, V), V = {V:,}")
    # On the right one block.
    left, top, wide = 330, 70, 416
    p.line((272, 212), (left, top), color=GREY, dashed=True)
    p.line((260, 414), (left, 516), color=GREY, dashed=True)
    p.rect(left, top, wide, 446, YELLOW)
    p.text(left + wide - 12, top + 18, "one Block", anchor="end", bold=True)
    stream, inner = left + 34, left + 146
    p.arrow((stream, 544), (stream, 40))
    p.text(stream + 10, 534, "x (B, T, C)", anchor="start", color=GREY)
    branch(p, stream, inner, 496, 340, [("ln_1", GREEN), ("attention", ORANGE)])
    branch(p, stream, inner, 282, 126, [("ln_2", GREEN), ("MLP", ORANGE)])
    attention = [
        "c_attn: C → 3C, which is",
        f"q, k, v of {c.n_head} heads (B, H, T, D)",
        "softmax(q kᵀ / √D) v, where",
        "no token sees the next",
        "heads joined; c_proj: C → C",
    ]
    p.lines(inner + 76, 398, attention, size=12, anchor="start")
    p.lines(inner + 76, 184, ["c_fc: C → 4C", "GELU", "c_proj: 4C → C"], size=12, anchor="start")
    words = f"{parameters(c):,} parameters; {flops_per_token(c) / 1e6:,.0f} MFLOP to train a token"
    p.text(left + wide, 24, words, size=12, anchor="end", color=GREY)
    return p


def branch(p: Picture, stream, inner, bottom, top, boxes) -> None:
    """From the residual stream through some boxes and back into it."""
    p.arrow((stream, bottom), (inner, bottom), (inner, bottom - 16))
    y = bottom
    for name, fill in boxes:
        y -= 56
        p.box(inner - 64, y, 128, 40, name, fill=fill)
        p.arrow((inner, y), (inner, y - 14))
    p.arrow((inner, y), (inner, top), (stream + 11, top))
    p.parts.append(f'<circle cx="{stream}" cy="{top}" r="10" fill="{WHITE}" stroke="{INK}"/>')
    p.text(stream, top, "+", size=15)


# ------------------------------------------------------------------------------------- one token


def token() -> Picture:
    """A text on its way into the weights."""
    text = "To be, or"
    ids = get_encoding("bytes").encode_ordinary(text)
    T = 4
    p = Picture(760, 430, "Where a token goes, from text to update")
    rows = [(50, "fineweb.py"), (150, "tokens.py"), (253, "model.py"), (271, "train_gpt2.py")]
    for y, name in [*rows, (363, "support/"), (381, "optimizer.py")]:
        p.text(10, y, name, anchor="start", code=True, size=12, color=GREY)
    # 1) Text becomes ids, ids become shards.
    p.box(124, 30, 92, 40, f"“{text}”", fill=BLUE)
    p.arrow((216, 50), (276, 50))
    p.text(246, 36, "encode", size=12, color=GREY)
    cell = 34
    for i, number in enumerate(ids):
        p.box(278 + i * cell, 34, cell, 32, str(number), fill=YELLOW, size=12)
    end = 278 + len(ids) * cell
    p.arrow((end, 50), (end + 36, 50))
    p.box(end + 38, 26, 124, 48, "shards,", "files of uint16", fill=GREEN, size=12)
    # 2) Shards form one long array, which is cut into windows.
    p.arrow((end + 100, 74), (end + 100, 100), (430, 100), (430, 132))
    start = 278
    for i, number in enumerate(ids):
        fill = ORANGE if T <= i <= 2 * T else YELLOW
        p.box(start + i * cell, 134, cell, 32, str(number), fill=fill, size=12)
    p.text(start - 8, 150, "…", anchor="end")
    p.text(end + 8, 150, "… one long array", anchor="start", size=12)
    p.lines(190, 150, ["window k: T + 1", "tokens from k·T on"], size=12, color=GREY)
    # 3) A window is the input, and shifted by one the targets.
    p.arrow((start + 6.5 * cell, 166), (start + 6.5 * cell, 194), (260, 194), (260, 226))
    for row, (name, shift) in enumerate((("input", 0), ("target", 1))):
        y = 228 + row * 36
        p.text(184, y + 16, name, anchor="end", size=12)
        for i in range(T):
            number = ids[T + i + shift]
            p.box(192 + i * cell, y, cell, 32, str(number), fill=ORANGE, size=12)
    p.arrow((336, 262), (372, 262))
    p.box(374, 236, 116, 52, "GPT,", "NextTokenLoss", fill=BLUE, size=12)
    p.arrow((490, 262), (520, 262))
    p.box(522, 236, 70, 52, "loss", "in nats", size=12)
    p.arrow((592, 262), (622, 262))
    p.box(624, 236, 122, 52, "backward", "adds to p.grad", fill=RED, size=12)
    # 4) The gradient changes the weights.
    p.arrow((685, 288), (685, 372), (660, 372))
    p.box(520, 348, 138, 48, "its norm clipped", fill=RED, size=12)
    p.arrow((520, 372), (486, 372))
    p.box(292, 348, 192, 48, "AdamW or Muon:", "p −= rate · f(p.grad)", fill=GREEN, size=12)
    p.arrow((292, 372), (258, 372))
    p.box(140, 348, 116, 48, "new weights", fill=BLUE)
    return p


# ----------------------------------------------------------------------------------- data order


def order() -> Picture:
    """Which windows each step sees, and who reads them: 1, 2 and 4 ranks."""
    windows, per_step, steps, seed = 10, 4, 5, 1337
    samples = per_step * steps
    indices = training_windows(0, samples, windows, seed)
    p = Picture(760, 330, "The order of the data over ranks")
    x0, cell = 150, 29
    fills = (BLUE, ORANGE, GREEN, RED)

    def label(y, text) -> None:
        p.text(x0 - 14, y, text, anchor="end", size=12)

    label(28, "step")
    for step in range(steps):
        x = x0 + step * per_step * cell
        p.box(x, 14, per_step * cell - 3, 28, str(step), fill=PALE, size=12)
    label(62, "sample g")
    label(94, f"epoch g // {windows}")
    label(131, "permuted: window")
    for g, window in enumerate(indices):
        x = x0 + g * cell
        p.text(x + cell / 2, 62, str(g), size=12, color=GREY)
        p.box(x, 116, cell, 30, str(window), fill=YELLOW, size=12)
    for epoch in range(samples // windows):
        x = x0 + epoch * windows * cell
        p.box(x, 80, windows * cell - 3, 28, str(epoch), fill=PALE, size=12)
    for row, ranks in enumerate((1, 2, 4)):
        y = 172 + row * 40
        label(y + 14, f"{ranks} rank{'s' * (ranks > 1)}")
        share = per_step // ranks
        for g in range(samples):
            rank = g % per_step // share
            p.box(x0 + g * cell, y, cell, 28, f"r{rank}", fill=fills[rank], size=11)
    p.lines(
        380,
        308,
        [
            "A step takes the next samples, and ranks divide them. An epoch shows each window",
            "once, in an order of its own. Ranks, restarts and micro-batches change nothing.",
        ],
        size=12,
        color=GREY,
    )
    return p


def mixture() -> Picture:
    """Which of three corpora each sample is of, and which of its windows."""
    weights = {"edu": 0.7, "code": 0.2, "notes": 0.1}
    windows = {"edu": 12, "code": 3, "notes": 4}
    samples, seed = 20, 1337
    one = pattern(list(weights.values())).tolist()
    corpora = [one[g % len(one)] for g in range(samples)]
    p = Picture(760, 262, "A mixture of three corpora")
    x0, cell = 150, 29
    fills = (BLUE, ORANGE, GREEN)

    def label(y, text) -> None:
        p.text(x0 - 14, y, text, anchor="end", size=12)

    label(28, "pattern")
    for repetition in range(samples // len(one)):
        x = x0 + repetition * len(one) * cell
        p.box(x, 14, len(one) * cell - 3, 28, f"repetition {repetition}", fill=PALE, size=12)
    label(62, "sample g")
    for g, corpus in enumerate(corpora):
        x = x0 + g * cell
        p.text(x + cell / 2, 62, str(g), size=12, color=GREY)
        p.rect(x, 78, cell, 12, fill=fills[corpus])
    for corpus, (name, weight) in enumerate(weights.items()):
        y = 104 + corpus * 38
        label(y + 14, f"{name}={weight:g}")
        own = [g for g in range(samples) if corpora[g] == corpus]
        order = training_windows(0, len(own), windows[name], seed).tolist()
        p.line((x0, y + 14), (x0 + samples * cell, y + 14), color=GREY, dashed=True)
        for g, window in zip(own, order, strict=True):
            p.box(x0 + g * cell, y, cell, 28, str(window), fill=fills[corpus], size=12)
    p.lines(
        380,
        240,
        [
            "The pattern says which corpus a sample is of. The numbers are windows: each corpus",
            "goes through its own as if it were alone. Of code there are three, so it begins anew.",
        ],
        size=12,
        color=GREY,
    )
    return p


# ---------------------------------------------------------------------------------- one step


def step() -> Picture:
    """One step on two ranks, time from left to right."""
    p = Picture(760, 340, "One step on two ranks")
    p.text(380, 26, "Gradients meet once in a step, in the last backward pass.", bold=True)
    for rank, y in ((0, 70), (1, 210)):
        middle = y + 30
        p.text(10, middle, f"rank {rank}", anchor="start", bold=True)
        p.box(68, y, 92, 60, "its half of", "the samples", fill=BLUE, size=12)
        p.arrow((160, middle), (178, middle))
        p.box(180, y, 106, 60, "micro-batch 0", "forward", "backward", fill=YELLOW, size=12)
        p.arrow((286, middle), (304, middle))
        p.box(306, y, 106, 60, "micro-batch 1", "forward", "backward", fill=YELLOW, size=12)
        p.arrow((412, middle), (430, middle))
        p.arrow((504, middle), (524, middle))
        p.box(526, y, 80, 60, "clip", "the norm", fill=RED, size=12)
        p.arrow((606, middle), (624, middle))
        p.box(626, y, 120, 60, "optim.step()", fill=GREEN, size=12)
    p.box(432, 62, 70, 216, "DDP:", "mean", "of p.grad", "over", "ranks", fill=ORANGE, size=12)
    alone = ["p.grad grows on each rank by itself;", "nothing is sent"]
    p.lines(270, 170, alone, size=12, color=GREY)
    same = ["the same gradient,", "so the same new weights"]
    p.lines(632, 170, same, size=12, color=GREY)
    words = "It is the gradient of the mean loss of the global batch, whoever computed which part."
    p.text(380, 312, words, size=12, color=GREY)
    return p


# ------------------------------------------------------------------------------------- a commit


def commit() -> Picture:
    """What is on the disk while a checkpoint is committed."""
    p = Picture(760, 330, "What a commit is")
    columns = [
        (
            "1",
            "files are written",
            ".step_000500.tmp/",
            ["config.json", "model.safetensors", "…"],
            0,
        ),
        (
            "2",
            "flushed and hashed",
            ".step_000500.tmp/",
            ["config.json", "model.safetensors", "…"],
            0,
        ),
        ("3", "manifest, the last", ".step_000500.tmp/", ["…", "manifest.json"], 0),
        ("4", "one rename", "step_000500/", ["…", "manifest.json"], 1),
    ]
    w, gap = 168, 20
    for number, (name, words, folder, files, done) in enumerate(columns):
        x = 14 + number * (w + gap)
        p.text(x + w / 2, 24, f"{name}) {words}", bold=True)
        p.rect(x, 46, w, 152, GREEN if done else PALE, dashed=not done)
        p.text(x + 10, 64, folder, anchor="start", code=True, size=12)
        for row, file in enumerate(files):
            flushed = number > 0
            y = 84 + row * 36
            p.box(x + 14, y, w - 28, 28, file, fill=BLUE if flushed else WHITE, size=12, code=True)
        if number:
            p.arrow((x - gap + 2, 122), (x - 3, 122))
    p.line((14, 222), (14 + 3 * w + 2 * gap, 222), color=GREY)
    p.line((14 + 3 * (w + gap), 222), (14 + 4 * w + 3 * gap, 222), color=GREY)
    p.lines(
        14 + (3 * w + 2 * gap) / 2,
        246,
        ["A crash here leaves the checkpoint before.", "The next start removes the rest."],
        size=13,
    )
    p.lines(14 + 3.5 * w + 3 * gap, 246, ["A crash here leaves", "this one, whole."], size=13)
    p.lines(
        380,
        302,
        [
            "A checkpoint is valid when every file has the size and the sha256 of its manifest.",
            "Training waits only for a copy; a thread writes it beside the next steps.",
        ],
        size=12,
        color=GREY,
    )
    return p


# -------------------------------------------------------------------------------------- the loss


def loss() -> Picture:
    """The loss of many rows, whose logits are never held at once."""
    c = SIZES["gpt2"]
    B, rows = 16, LOGIT_ROWS["cuda"]
    N, V, C = B * c.block_size, c.vocab_size, c.n_embd
    p = Picture(760, 350, "The loss without its logits")
    # The rows of the hidden states, cut into chunks.
    chunks = -(-N // rows)
    height = 200
    part = height / chunks
    p.text(75, 28, f"x ({N:,}, {C})", size=12)
    for i in range(chunks):
        p.rect(50, 46 + i * part, 50, part - 4, ORANGE if i == 0 else PALE)
        p.text(75, 46 + (i + 0.5) * part - 2, "rows", size=11, color=GREY)
    p.arrow((102, 46 + part / 2), (144, 46 + part / 2))
    p.text(122, 46 + part / 2 - 14, "× Wᵀ", size=12)
    p.box(
        148,
        46,
        260,
        part - 4,
        f"logits of {rows:,} rows",
        f"({rows:,}, {V:,})",
        "log-softmax in float32",
        fill=ORANGE,
        size=12,
    )
    p.text(278, 28, "one chunk at a time", bold=True)
    p.rect(148, 46 + part, 260, height - part - 4, WHITE, GREY, dashed=True)
    p.lines(
        278,
        46 + part + (height - part) / 2 - 2,
        ["dropped before the next is made"],
        size=12,
        color=GREY,
    )
    # What is kept of it.
    kept = [
        ("loss", "its part of one number", 46),
        ("dx", f"({rows:,}, {C}) = (p − target) × W", 46 + 36),
        ("dW", f"({V:,}, {C}) += (p − target)ᵀ × x", 46 + 72),
    ]
    for name, shape, y in kept:
        p.arrow((410, 46 + part / 2 - 2), (448, y + 14))
        p.box(450, y, 46, 28, name, fill=GREEN, size=12)
        p.text(504, y + 14, shape, anchor="start", size=12)
    words = "kept; backward only scales them"
    p.text(450, 178, words, anchor="start", size=12, color=GREY)
    whole, chunk = N * V * 4 / 1e9, rows * V * 4 / 1e9
    scale = 500 / whole
    for y, words, size, fill in (
        (268, f"all logits in float32: {whole:.1f} GB", whole, RED),
        (306, f"one chunk: {chunk:.1f} GB", chunk, ORANGE),
    ):
        p.rect(50, y, scale * size, 26, fill)
        p.text(60, y + 13, words, anchor="start", size=12)
    words = f"{B} sequences of {c.block_size:,}"
    p.text(50 + 500 + 14, 281, words, anchor="start", size=12, color=GREY)
    return p


# ------------------------------------------------------------------------------------- the cache


def cache() -> Picture:
    """What is read and what is seen while a text grows beyond the context."""
    block, prompt = 8, 3
    c = GPTConfig(n_layer=1, n_head=1, n_embd=1, block_size=block, vocab_size=257)
    p = Picture(760, 400, "The cache")
    p.text(30, 26, "keys and values by place", anchor="start", bold=True)
    p.text(520, 26, "mask: queries × places", anchor="start", bold=True)
    cell = 30
    reads = [(0, prompt, "the prompt, at once"), (prompt, 1, "one token a step"), (4, 1, "")]
    reads.append((7, 1, "the context is full"))
    y = 48
    for position, count, words in reads:
        draw_places(p, 30, y, cell, block, position, count)
        p.text(30 + block * cell + 14, y + 15, words, anchor="start", size=12)
        draw_mask(p, c, 520, y + 6, position, count)
        y += 56 if count == 1 else 76
    p.line((14, y - 6), (746, y - 6), color=GREY, dashed=True)
    y += 14
    draw_places(p, 30, y, cell, block, 0, block // 2)
    p.lines(
        30 + block * cell + 14,
        y + 15,
        ["the last half is read", "again, from place 0 on"],
        anchor="start",
        size=12,
    )
    draw_mask(p, c, 520, y - 6, 0, block // 2)
    for x, fill, words in (
        (30, ORANGE, "read now"),
        (130, BLUE, "read before"),
        (250, WHITE, "hidden"),
    ):
        p.rect(x, 368, 18, 18, fill)
        p.text(x + 26, 377, words, anchor="start", size=12, color=GREY)
    return p


def draw_places(p: Picture, x, y, cell, block, position, count) -> None:
    for place in range(block):
        fill = WHITE
        if place < position:
            fill = BLUE
        elif place < position + count:
            fill = ORANGE
        p.box(x + place * cell, y, cell, 30, str(place), fill=fill, size=12)


def draw_mask(p: Picture, c: GPTConfig, x, y, position, count) -> None:
    """The mask that the cache gives for `count` tokens after `position` others."""
    cache = KVCache(c, 1, c.block_size, torch.device("cpu"), torch.float32)
    cache.position += position
    _, mask = cache.next_positions(count)
    for row, places in enumerate(mask.tolist()):
        for place, is_seen in enumerate(places):
            p.rect(x + 20 * place, y + 18 * row, 20, 18, ORANGE if is_seen else WHITE, GREY)


# ------------------------------------------------------------------------------------- the house

# What each file is for, in two lines.
TOP = {
    "model": ("the network,", "its loss, its cache"),
    "tokens": ("one long array,", "the order of it"),
    "train_gpt2": ("recipes, the step,", "the loop"),
    "sample": ("text from", "a model"),
    "hellaswag": ("a benchmark,", "zero-shot"),
    "fineweb": ("corpora into", "token shards"),
}
SUPPORT = {
    "script": ("flags, errors,", "signals, exit codes"),
    "spikes": ("losses that", "jump"),
    "files": ("survive a crash;", "JSON, locks"),
    "progress": ("a bar, or lines", "in a log"),
    "ranks": ("meet, agree,", "end together"),
    "mixture": ("proportions", "of corpora"),
    "network": ("tells edited", "networks apart"),
    "runtime": ("device, dtype,", "kernels"),
    "huggingface": ("its formats,", "in and out"),
    "shards": ("token files", "and manifests"),
    "trackers": ("Weights & Biases,", "TensorBoard"),
    "plot": ("curves of runs", ""),
    "optimizer": ("AdamW, Muon", ""),
    "documents": ("of files and", "of the hub"),
    "plan": ("what a run costs", ""),
    "checkpoint": ("contents, commit,", "what is valid"),
    "run_directory": ("lock, log,", "checkpoints"),
    "launch": ("what a command", "line means"),
    "report": ("what is said", "of a run"),
}


def imports_of(file: Path) -> set[str]:
    """The modules of support/ that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("support."):
            found.add(node.module.removeprefix("support."))
    return found


def storeys() -> list[list[str]]:
    """The modules of support/, each below all that import it; the lowest storey first."""
    files = {file.stem: file for file in (ROOT / "support").glob("[a-z]*.py")}
    left = {name: imports_of(file) & files.keys() for name, file in sorted(files.items())}
    found = []
    while left:
        lowest = [name for name, imports in left.items() if not imports & left.keys()]
        assert lowest, f"{sorted(left)} import each other in a circle"
        found.append(lowest)
        left = {name: left[name] for name in left if name not in lowest}
    return found


def house() -> Picture:
    """The files, each above those that it imports."""
    rows = storeys()
    p = Picture(700, 166 + 74 * len(rows), "The files of PyGPT2")
    draw_storey(p, 12, 676, 12, {name: TOP[name] for name in TOP}, YELLOW)
    top = 92
    p.parts.append(
        f'<path d="M320,76 h60 v18 h20 l-50,26 l-50,-26 h20 z" fill="{PALE}" stroke="{INK}"/>'
    )
    p.text(350, 92, "import", size=12)
    top += 38
    p.rect(6, top, 688, 26 + 74 * len(rows), WHITE, GREY, dashed=True)
    p.text(16, top + 14, "support/", anchor="start", size=12, code=True, bold=True)
    p.text(
        684,
        top + 14,
        "a file imports only from the rows below it",
        size=11,
        anchor="end",
        color=GREY,
    )
    for number, row in enumerate(reversed(rows)):
        names = {name: SUPPORT[name] for name in row}
        draw_storey(p, 12, 676, top + 26 + 74 * number, names, BLUE)
    return p


def draw_storey(p: Picture, x, width, y, words: dict[str, tuple], fill: str) -> None:
    """A row of files. None is wider than a sixth of the picture."""
    w = min(width / len(words), width / 6)
    x += (width - w * len(words)) / 2
    for number, (name, lines) in enumerate(words.items()):
        left = x + number * w
        p.rect(left + 3, y, w - 6, 64, fill)
        p.text(left + w / 2, y + 15, f"{name}.py", size=11.5 if len(name) < 13 else 10.5, code=True)
        p.lines(left + w / 2, y + 42, [line for line in lines if line], size=11)


FIGURES = {
    "gpt2": gpt2,
    "token": token,
    "order": order,
    "mixture": mixture,
    "step": step,
    "commit": commit,
    "loss": loss,
    "cache": cache,
    "house": house,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
