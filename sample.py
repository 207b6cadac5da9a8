"""Text from a GPT-2: sampling, cached decoding, and the command line.

    python sample.py                                   the newest run under runs/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"

The text goes to standard output, as it is generated when one sample is asked for; what is not text goes to standard
error. Shapes: B samples, T tokens of the prompt, V vocabulary.

Learned positions cannot slide, so one rule holds for whatever exceeds the context, prompts included: when more than
block_size tokens would have to be read, the last block_size // 2 are read afresh and generation goes on from there.
"""

import codecs
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import tiktoken
import torch
import torch.nn as nn

from cli import UserError, parse_flags, run_script
from model import GPT, KVCache
from run_directory import load_model
from runtime import start

# ---------------------------------------------------------------------------------------------------- one step

# New tokens from which the preparation of a faster step is repaid.
PACK_REPAID = 100  # on a CPU, measured at 124M: 0.4 s, to save 5 ms a token
COMPILE_REPAID = 10_000  # on CUDA, an estimate: some 30 s, to save a few ms a token. On a CPU compiling saves nothing.


def last_logits(model: GPT, unread: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Read the tokens, (B, T), into the cache; logits of what follows, (B, V)."""
    return model.head(model.hidden(unread, cache=cache)[:, -1])


@functools.cache  # torch.compile forgets what it compiled with the function it returned
def compiled_step():
    """`last_logits` compiled for one token: on CUDA the hundreds of kernel launches of a step become one graph's."""
    return torch.compile(last_logits, mode="reduce-overhead", fullgraph=True, dynamic=False)


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight lies in the blocks that oneDNN multiplies few rows by.

    The two operators are what torch.compile itself uses for constant weights, without the minute a compiler takes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int):
        super().__init__()
        self.weight, self.bias = (
            torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows),
            bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: GPT, rows: int) -> bool:
    """Change a model in place so that it generates `rows` texts faster, and does nothing else any more: it cannot be
    trained or saved. Only for bfloat16 on a CPU that multiplies it; returns whether it was done."""
    weight, has = (
        model.transformer.wte.weight,
        torch.cpu.get_capabilities() if model.device.type == "cpu" else {},
    )
    if weight.dtype != torch.bfloat16 or not (has.get("avx512_bf16") or has.get("amx_bf16")):
        return False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, rows))
    model.head = PackedLinear(weight, None, rows).forward
    return True


# ---------------------------------------------------------------------------------------------------- tokens


def next_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one token per row of logits (B, V): int64 (B, 1). Nothing here makes the host wait for a GPU.

    Temperature first, then the top_k likeliest, then of their renormalised probabilities the nucleus: the smallest set
    that reaches top_p (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
    """
    logits, V = logits.float(), logits.size(-1)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    k = min(top_k or V, V)
    nucleus = top_p is not None and top_p < 1
    filtered = k < V or nucleus
    if filtered:
        logits, tokens = logits.topk(k)  # both (B, k), largest first
    p = torch.softmax(logits / temperature, -1)
    if nucleus:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    # With e_i ~ Exp(1), argmax p_i / e_i is i with probability p_i: torch.multinomial without its checks, which wait.
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(
        -1, keepdim=True
    )  # (B, 1)
    return tokens.gather(-1, choice) if filtered else choice


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(
            f"--temperature {temperature}",
            expected="a number from 0 (greedy) up",
            remedy="0.8 is a good start",
        )
    if top_k is not None and top_k < 1:
        raise UserError(
            f"--top-k {top_k}", expected="1 or more", remedy="use None to draw from all tokens"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"--top-p {top_p}",
            expected="above 0 and at most 1",
            remedy="use None to draw from all tokens",
        )


@torch.no_grad()
def stream(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    compiled: bool | None = None,
) -> Iterator[torch.Tensor]:
    """Continue idx, int64 (B, T): yields every row's next token, (B, 1), until max_new_tokens or all rows have stopped.

    A row that has drawn stop_token yields it ever after. vocab_size: draw only ids below it, for a model that has more
    rows than its encoding has tokens. compiled: use `compiled_step`; None: where the run repays it. The generator
    lives on the model's device; the model is in eval mode.
    """
    check_sampling(temperature, top_k, top_p)
    B, T = idx.shape
    block_size, kind = model.config.block_size, idx.device.type
    dtype = (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind)
        else model.transformer.wte.weight.dtype
    )
    if kind == "cpu":
        dtype = torch.float32  # attention of a single query takes half as long as in bfloat16
    cache = KVCache(model.config, B, min(block_size, T + max_new_tokens), idx.device, dtype)
    if compiled is None:
        compiled = kind == "cuda" and max_new_tokens >= COMPILE_REPAID
    if compiled:
        for tensor in (
            *cache.k,
            *cache.v,
            cache.position,
        ):  # so that a CUDA graph writes to them in place
            torch._dynamo.mark_static_address(tensor)
    reread = max(1, block_size // 2)
    tokens, unread, used = [idx], idx if T <= block_size else idx[:, -reread:], 0
    stopped = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
    for n in range(max_new_tokens):
        used += unread.size(1)
        if kind == "cpu" and not compiled:
            cache.seen = used
        step = compiled_step() if compiled and unread.size(1) == 1 else last_logits
        unread = next_token(
            step(model, unread, cache)[:, :vocab_size], temperature, top_k, top_p, generator
        )  # (B, 1)
        if stop_token is not None:
            unread = unread.masked_fill(stopped, stop_token)
            stopped |= unread == stop_token
        yield unread
        tokens.append(unread)
        # Looking makes the host wait for the device: worth it at every token only where there is nothing to wait for.
        if stop_token is not None and (kind == "cpu" or n % 16 == 0) and stopped.all():
            return
        if used == block_size:
            unread, used = torch.cat(tokens, 1)[:, -reread:], 0
            cache.position.zero_()


def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    compiled: bool | None = None,
) -> torch.Tensor:
    """Continue idx, int64 (B, T), by max_new_tokens: int64 (B, T + max_new_tokens), prompt included.

    temperature 0 is greedy. Rows that have stopped are filled with stop_token. See `stream` for the other arguments;
    a model in training mode is put in eval mode meanwhile.
    """
    training = model.training
    model.eval()
    try:
        tokens = list(
            stream(
                model,
                idx,
                max_new_tokens,
                temperature,
                top_k,
                top_p,
                stop_token,
                generator,
                vocab_size,
                compiled,
            )
        )
    finally:
        model.train(training)
    missing = max_new_tokens - len(tokens)
    return torch.cat([idx, *tokens, idx.new_full((len(idx), missing), stop_token or 0)], 1)


# ---------------------------------------------------------------------------------------------------- text


def encode_prompt(model: GPT, encoding: tiktoken.Encoding, prompt: str, num: int) -> torch.Tensor:
    """The prompt's tokens on the model's device, int64 (num, T). An empty prompt is <|endoftext|>: a new document."""
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"--prompt has token {max(ids)}",
            expected=f"tokens below the model's vocab_size {model.config.vocab_size}",
            remedy=f"use a model that was trained with the {encoding.name} encoding",
        )
    return torch.tensor(ids, device=model.device).repeat(num, 1)


def sample_text(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str,
    num: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """`num` texts that begin with the prompt and end before <|endoftext|>, generated as one batch."""
    idx = encode_prompt(model, encoding, prompt, num)
    rows = generate(
        model,
        idx,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        encoding.eot_token,
        generator,
        encoding.n_vocab,
    )
    texts = []
    for row in rows[:, idx.size(1) :].tolist():
        end = row.index(encoding.eot_token) if encoding.eot_token in row else len(row)
        texts.append(prompt + encoding.decode_bytes(row[:end]).decode("utf-8", "replace"))
    return texts


def stream_text(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """The text of `sample_text` with num=1, piece by piece: whole characters, however tokens cut them."""
    yield prompt
    idx = encode_prompt(model, encoding, prompt, 1)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream(
        model,
        idx,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        encoding.eot_token,
        generator,
        encoding.n_vocab,
    ):
        if token.item() == encoding.eot_token:
            break
        yield utf8.decode(encoding.decode_single_token_bytes(token.item()))
    yield utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class SampleConfig:
    model: str | None = (
        None  # hub name, Hugging Face directory, step directory or run directory; None: the newest run
    )
    prompt: str = ""  # how the text begins; empty: a new document
    num_samples: int = 1  # texts, generated as one batch
    max_new_tokens: int = 200  # at most; a text ends earlier where the model writes <|endoftext|>
    temperature: float = 0.8  # below 1 sharpens the distribution; 0 takes the likeliest token
    top_k: int | None = 50  # draw from the k likeliest tokens; None: from all
    top_p: float | None = (
        None  # draw from the likeliest tokens that together reach this probability; None: from all
    )
    seed: int = 0  # the same seed gives the same text on the same machine
    device: str = "auto"  # cuda, mps, cpu; auto takes the first that is there
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the weights; auto is bfloat16 where the hardware has it
    )

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        for flag, value in (
            ("--num-samples", self.num_samples),
            ("--max-new-tokens", self.max_new_tokens),
        ):
            if value < 1:
                raise UserError(
                    f"{flag} {value}", expected="1 or more", remedy="give a positive number"
                )


def main() -> None:
    config = parse_flags(SampleConfig, SampleConfig(), "Generate text from a GPT-2.")
    rt = start(config.device, config.dtype)
    model, encoding, picked = load_model(config.model)
    print(f"model {picked}, seed {config.seed}", file=sys.stderr)
    model.to(rt.device, rt.dtype)
    if config.max_new_tokens >= PACK_REPAID:
        pack_linears(model, config.num_samples)
    sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal that is not UTF-8 shows ? where it lacks a character
    sampling = dict(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(rt.device).manual_seed(config.seed),
    )
    if config.num_samples == 1:
        for piece in stream_text(model, encoding, config.prompt, config.max_new_tokens, **sampling):
            print(piece, end="", flush=True)
        print()
    else:
        for i, text in enumerate(
            sample_text(
                model,
                encoding,
                config.prompt,
                config.num_samples,
                config.max_new_tokens,
                **sampling,
            ),
            1,
        ):
            print(f"--- sample {i}", text, sep="\n")


if __name__ == "__main__":
    run_script(main)
