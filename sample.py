"""Text from a GPT-2: drawing tokens, decoding with a cache, and the command line.

    python sample.py                                   the newest run under runs/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"

The text goes to standard output; one sample appears token by token. Everything else goes to
standard error.

How a text is generated: the model reads the prompt, a token is drawn from what it predicts, the
model reads that token, and so on. A cache (model.KVCache) holds the attention keys and values of
all tokens read so far, so each token is read only once.

When the context is full: GPT-2 has learned block_size positions and no more. After the token at
the last position, the cache starts again at position 0: the last block_size // 2 tokens of the text
are read into it, and generation goes on behind them. A prompt of more than block_size tokens starts
in the same way: only its last block_size // 2 tokens are read.

Shapes: B samples, T tokens, V = vocab_size.
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that Ctrl-C ends them too
    from support import script

    script.exit_on_signals()


import codecs
import functools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import tiktoken
import torch
import torch.nn as nn
import tyro

from model import GPT, KVCache
from support.run_directory import load_model
from support.runtime import masked_attention, start
from support.script import UserError, parse_flags, printable, run_script

# ---------------------------------------------------------------------------- one token


def next_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one token for each row of logits (B, V); returns int64 (B, 1).

    temperature: divides the logits; 0, or less than 1e-6, takes the likeliest token.
    top_k: draw only from the top_k likeliest tokens; None: from all.
    top_p: draw only from the nucleus, the smallest set of likeliest tokens whose probabilities add
    up to top_p (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"); None: from
    all. With both, top_k comes first and the probabilities are those among the top_k.
    generator: the source of randomness, on the logits' device; None: torch's default one.

    No operation here makes the host wait for a GPU.
    """
    if temperature < 1e-6:  # a division by less would overflow
        return logits.float().argmax(-1, keepdim=True)
    logits = logits.float()
    V = logits.size(-1)
    k = V if top_k is None else min(top_k, V)
    has_nucleus = top_p is not None and top_p < 1
    sort_first = k < V or has_nucleus  # the nucleus alone needs all V tokens in order
    if sort_first:
        logits, tokens = logits.topk(k)  # both (B, k), the likeliest first
    p = torch.softmax(logits / temperature, -1)
    if has_nucleus:
        # A token is in the nucleus if those before it do not reach top_p yet.
        p_of_likelier = p.cumsum(-1) - p
        p = p.masked_fill(p_of_likelier >= top_p, 0.0)
    # If every e_i is drawn from Exp(1), the argmax of p_i / e_i is i with probability p_i.
    # torch.multinomial does the same, but first checks p, and that makes the host wait.
    noise = torch.empty_like(p).exponential_(generator=generator)
    choice = (p / noise).argmax(-1, keepdim=True)  # (B, 1)
    if sort_first:
        return tokens.gather(-1, choice)  # from a place in the sorted order to a token
    return choice


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise UserError unless `next_token` can draw with these settings."""
    if not 0 <= temperature < math.inf:
        raise UserError(
            f"temperature {temperature}; expected a number from 0 (the likeliest token) up; 0.8 is "
            "a good start"
        )
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}; expected 1 or more; use None to draw from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"top_p {top_p}; expected above 0 and at most 1; use None to draw from all tokens"
        )


# ---------------------------------------------------------------------------- many tokens


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
    """Continue the prompts idx, int64 (B, T), and yield the new tokens one by one, int64 (B, 1).

    The model must be in eval mode. The texts end after max_new_tokens, or when all have stopped.
    temperature, top_k, top_p, generator: how a token is drawn, see `next_token`.
    stop_token: a row that has drawn it has stopped, and yields it from then on; None: never.
    vocab_size: draw only ids below it, for a model with more rows than its encoding has tokens.
    compiled: compile the reading of one token; None: decide by the number of tokens wanted.
    Raises UserError for settings that `check_sampling` refuses.
    """
    check_sampling(temperature, top_k, top_p)
    block_size = model.config.block_size
    on_cpu = idx.device.type == "cpu"
    if compiled is None:
        compiled = idx.device.type == "cuda" and max_new_tokens >= COMPILE_REPAID
    cache = new_cache(model, len(idx), idx.size(1) + max_new_tokens, compiled)
    num_reread = max(1, block_size // 2)  # tokens that are read again when the context is full

    pieces = [idx]  # all tokens so far, in pieces of shape (B, …)
    unread = idx  # the tokens that the model reads next
    if idx.size(1) > block_size:
        unread = idx[:, -num_reread:]
    # How many tokens the cache will hold after `unread` is read. The cache counts too, but on the
    # device, and reading its count would make the host wait.
    num_cached = unread.size(1)
    stopped = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for n in range(max_new_tokens):
        # 1) Read: afterwards the cache holds num_cached tokens, and nothing is unread.
        if on_cpu and not compiled:
            cache.num_places_read = num_cached  # the filled part of the cache
        read = compiled_read() if compiled and unread.size(1) == 1 else last_logits
        with masked_attention(idx.device):
            logits = read(model, unread, cache)[:, :vocab_size]  # (B, V); None keeps all columns

        # 2) Draw.
        token = next_token(logits, temperature, top_k, top_p, generator)  # (B, 1)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped |= token == stop_token
        yield token
        pieces.append(token)

        # 3) Stop when all rows have stopped. Asking makes the host wait for a GPU, so it is asked
        # only now and then there.
        may_look = on_cpu or n % 16 == 0
        if stop_token is not None and may_look and stopped.all():
            return

        # 4) Choose what is read next: the new token. When the context is full, the last num_reread
        # tokens of the text are read instead, from position 0 on.
        if num_cached < block_size:
            unread = token
            num_cached += 1
        else:
            unread = torch.cat(pieces, 1)[:, -num_reread:]
            num_cached = num_reread
            cache.position.zero_()


def last_logits(model: GPT, unread: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Read tokens, int64 (B, T), into the cache; returns logits (B, V) of the token after them."""
    x = model.hidden(unread, cache=cache)  # (B, T, C)
    return model.head(x[:, -1])


def new_cache(model: GPT, batch_size: int, num_tokens: int, compiled: bool) -> KVCache:
    """An empty cache for texts of num_tokens tokens, or for a full context if that is less."""
    device = model.device
    if device.type == "cpu":
        dtype = torch.float32  # attention of one query takes half as long as in bfloat16
    elif torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = model.transformer.wte.weight.dtype
    length = model.config.block_size
    if not compiled:
        length = min(length, num_tokens)
    cache = KVCache(model.config, batch_size, length, device, dtype)
    if compiled:
        # The compiled code is made for one length, hence always the whole context. And a CUDA graph
        # writes to the addresses it was recorded with.
        for tensor in [*cache.k, *cache.v, cache.position]:
            torch._dynamo.mark_static_address(tensor)
    return cache


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
    """Continue each prompt of idx, int64 (B, T), by max_new_tokens tokens.

    Returns prompts and new tokens, int64 (B, T + max_new_tokens).

    A model in training mode is put in eval mode meanwhile.
    temperature, top_k, top_p, generator: how a token is drawn, see `next_token`.
    stop_token: a row that has drawn it is filled up with it; None: never.
    vocab_size: draw only ids below it, for a model with more rows than its encoding has tokens.
    compiled: compile the reading of one token; None: decide by the number of tokens wanted.
    Raises UserError for settings that `check_sampling` refuses.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = list(
            stream(
                model,
                idx,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_token=stop_token,
                generator=generator,
                vocab_size=vocab_size,
                compiled=compiled,
            )
        )
    finally:
        model.train(was_training)
    num_missing = max_new_tokens - len(tokens)  # not 0 where all rows have stopped
    filling = idx.new_full((len(idx), num_missing), stop_token or 0)
    return torch.cat([idx, *tokens, filling], 1)


# ---------------------------------------------------------------------------- text

# tiktoken's regular expression overflows its stack somewhere above 500,000 spaces in a row.
LONGEST_SPACE = 100_000


def encode_prompt(
    model: GPT, encoding: tiktoken.Encoding, prompt: str, batch_size: int
) -> torch.Tensor:
    """The prompt's tokens on the model's device, once for each sample: int64 (batch_size, T).

    An empty prompt is <|endoftext|>, the beginning of a new document. The words "<|endoftext|>" in
    a prompt are text. Lone surrogates, which is how Python passes bytes that are not UTF-8, become
    replacement characters.
    """
    longest_space = max(map(len, re.findall(r"\s+", prompt)), default=0)
    if longest_space > LONGEST_SPACE:
        raise UserError(
            f"the prompt has {longest_space:,} spaces in a row; expected at most "
            f"{LONGEST_SPACE:,}; shorten the prompt"
        )
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"the prompt has token {max(ids)}; expected tokens below the model's vocab_size "
            f"{model.config.vocab_size}; use a model that was trained with the {encoding.name} "
            "encoding"
        )
    return torch.tensor(ids, device=model.device).repeat(batch_size, 1)


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
    """`num` texts that begin with the prompt and end before <|endoftext|>, generated as one batch.

    temperature, top_k, top_p, generator: how a token is drawn, see `next_token`.
    """
    idx = encode_prompt(model, encoding, prompt, num)
    rows = generate(
        model,
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=encoding.eot_token,
        generator=generator,
        vocab_size=encoding.n_vocab,
    )
    texts = []
    for new_tokens in rows[:, idx.size(1) :].tolist():
        if encoding.eot_token in new_tokens:
            new_tokens = new_tokens[: new_tokens.index(encoding.eot_token)]
        continuation = encoding.decode_bytes(new_tokens).decode("utf-8", "replace")
        texts.append(prompt + continuation)
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
    """Yield the prompt, then its continuation up to <|endoftext|>, piece by piece.

    A character whose bytes are spread over several tokens comes with the last of them. The pieces
    together are the text that `sample_text` gives for num=1. The model must be in eval mode.
    temperature, top_k, top_p, generator: how a token is drawn, see `next_token`.
    """
    idx = encode_prompt(model, encoding, prompt, 1)
    yield prompt
    tokens = stream(
        model,
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=encoding.eot_token,
        generator=generator,
        vocab_size=encoding.n_vocab,
    )
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token.item() == encoding.eot_token:
            break
        yield utf8.decode(encoding.decode_single_token_bytes(token.item()))
    yield utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------- faster reading

# From this many new tokens on a preparation saves more time than it costs. On a CPU compiling
# saves nothing.
PACK_REPAID = 100  # CPU, measured at 124M parameters: 0.4 s once, 5 ms saved a token
COMPILE_REPAID = 10_000  # CUDA, an estimate: some 30 s once, a few ms saved a token


@functools.cache  # compiled code lives as long as the function that torch.compile returned
def compiled_read():
    """`last_logits`, compiled for one token: on CUDA one graph in place of hundreds of kernels."""
    return torch.compile(last_logits, mode="reduce-overhead", fullgraph=True, dynamic=False)


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight is in oneDNN's layout for products with few rows.

    torch.compile would use the same two operators for constant weights, after a minute of
    compiling.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: GPT, rows: int) -> bool:
    """Make a model generate `rows` texts faster, in place; returns whether that was possible.

    It is possible for bfloat16 weights on a CPU with bfloat16 products. A packed model can neither
    be trained nor saved.
    """
    weight = model.transformer.wte.weight
    if model.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, rows))
    model.head = PackedLinear(weight, None, rows).forward  # the head is a method, not a layer
    return True


# ---------------------------------------------------------------------------- command line

newest_run = tyro.conf.arg(help_behavior_hint="(default: the newest run under runs/)")
optional_int = tyro.conf.arg(metavar="INT")
all_tokens = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: all tokens)")


@dataclass(frozen=True)
class SampleConfig:
    # The model: a name on the hub (gpt2), a Hugging Face directory, a run or one of its steps.
    model: Annotated[str, newest_run] = ""
    prompt: str = ""  # How the text begins. An empty prompt begins a new document.
    num_samples: int = 1  # How many texts to generate, as one batch.
    max_new_tokens: int = 200  # The most tokens to generate. A text can end earlier by itself.
    temperature: float = 0.8  # Below 1 favours likely tokens; 0 always takes the likeliest.
    # Draw from this many of the likeliest tokens; None: from all.
    top_k: Annotated[int | None, optional_int] = 50
    # Draw from the fewest likeliest tokens that together reach this probability; None: from all.
    top_p: Annotated[float | None, all_tokens] = None
    seed: int = 0  # The same seed gives the same text on the same machine.
    device: str = "auto"  # Compute on cuda, mps or cpu; auto takes the first that is there.
    # The precision of the weights; auto takes bfloat16 where the hardware multiplies it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        for flag, value, least, most in [
            ("--num-samples", self.num_samples, 1, 2**20),
            ("--max-new-tokens", self.max_new_tokens, 1, 10**9),
            ("--seed", self.seed, -(2**63), 2**63 - 1),
        ]:
            if not least <= value <= most:
                raise UserError(
                    f"{flag} {value}; expected a number from {least} to {most}; choose one in that "
                    "range"
                )


def main() -> None:
    config = parse_flags(SampleConfig, SampleConfig(), "Generate text from a GPT-2.")
    rt = start(config.device, config.dtype)
    model, encoding, picked = load_model(config.model or None)
    print(printable(f"model {picked}, seed {config.seed}", sys.stderr), file=sys.stderr)
    model.to(rt.device, rt.dtype)
    if config.max_new_tokens >= PACK_REPAID:
        pack_linears(model, config.num_samples)
    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    sampling = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "generator": torch.Generator(rt.device).manual_seed(config.seed),
    }
    if config.num_samples == 1:
        for piece in stream_text(model, encoding, config.prompt, config.max_new_tokens, **sampling):
            print(printable(piece, sys.stdout), end="", flush=True)
        print()
        return
    texts = sample_text(
        model, encoding, config.prompt, config.num_samples, config.max_new_tokens, **sampling
    )
    for number, text in enumerate(texts, 1):
        print(f"--- sample {number}")
        print(printable(text, sys.stdout))


if __name__ == "__main__":
    run_script(main, out_of_memory="lower --num-samples")
