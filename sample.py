"""Text from a GPT-2: drawing a token, decoding with a cache, text, and the command line.

    python sample.py                                   the newest run under runs/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"
    python sample.py --model gpt2 --prompt-file - < story.txt

The model reads the prompt, a token is drawn from what it predicts, the model reads that token, and
so on. model.KVCache keeps keys and values, so each token is read once. After block_size tokens the
last block_size // 2 of the text are read again from position 0 on: positions are learned, so the
text cannot slide over them.

Shapes: B samples, T tokens, V = vocab_size.
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that Ctrl-C ends them too
    from support import script

    script.begin()


import codecs
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tiktoken
import torch
import tyro

from model import GPT, KVCache
from support.run_directory import resolve_model
from support.runtime import masked_attention, pack_linears, start
from support.script import (
    Range,
    UserError,
    check_fields,
    parse_flags,
    require,
    run_script,
    shown,
)
from tokens import encoding_of

# ---------------------------------------------------------------------------- one token


def next_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one token for each row of logits (B, V); returns int64 (B, 1).

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw only from the top_k likeliest tokens.
    top_p: draw only from the nucleus, the smallest set of likeliest tokens whose probabilities
    (among the top_k) add up to at least top_p (Holtzman et al. 2020, arXiv 1904.09751).
    generator: the source of randomness, on the logits' device.

    Nothing here makes the host wait for a GPU.
    """
    logits = logits.float()
    if temperature < 1e-6:  # dividing by less would overflow
        return logits.argmax(-1, keepdim=True)
    V = logits.size(-1)
    k = V if top_k is None else min(top_k, V)
    has_nucleus = top_p is not None and top_p < 1
    sort_first = k < V or has_nucleus
    if sort_first:
        logits, tokens = logits.topk(k)  # both (B, k), the likeliest first
    p = torch.softmax(logits / temperature, -1)
    if has_nucleus:
        # A token is in the nucleus if those before it do not reach top_p yet.
        p_of_likelier = p.cumsum(-1) - p
        p = p.masked_fill(p_of_likelier >= top_p, 0.0)
    # If every e_i is drawn from Exp(1), the argmax of p_i / e_i is i with probability p_i.
    # torch.multinomial does the same, but checks p first, for which the host waits.
    noise = torch.empty_like(p).exponential_(generator=generator)
    choice = (p / noise).argmax(-1, keepdim=True)  # (B, 1)
    if sort_first:
        return tokens.gather(-1, choice)  # from a place in the order to a token
    return choice


# ---------------------------------------------------------------------------- many tokens


@torch.no_grad()
def stream(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    compiled: bool = False,
    **how,
) -> Iterator[torch.Tensor]:
    """Continue prompts idx, int64 (B, T), with a model in eval mode; yields tokens, int64 (B, 1).

    stop_token: a row that has drawn it yields it from then on; when all have, the texts end.
    vocab_size: draw only ids below it, for a model with more rows than its encoding has tokens.
    compiled: use `compiled_read`, which pays for long texts on a GPU.
    how: temperature, top_k, top_p and generator, see `next_token`.
    """
    block_size = model.config.block_size
    on_cpu = idx.device.type == "cpu"
    cache = new_cache(model, len(idx), idx.size(1) + max_new_tokens, compiled)
    num_cached = 0  # as cache.position, but reading that would make the host wait
    pieces = [idx]  # all of the text
    unread = idx  # what the model reads next
    stopped = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for n in range(max_new_tokens):
        # 1) Make room: after this the unread tokens fit behind those in the cache.
        if num_cached + unread.size(1) > block_size:
            unread = torch.cat(pieces, 1)[:, -max(1, block_size // 2) :]
            num_cached = 0
            cache.position.zero_()  # keys and values beyond it count no more

        # 2) Read: after this nothing is unread.
        num_cached += unread.size(1)
        if on_cpu and not compiled:
            cache.num_places_read = num_cached
        read = compiled_read() if compiled and unread.size(1) == 1 else last_logits
        with masked_attention(idx.device):
            logits = read(model, unread, cache)[:, :vocab_size]  # (B, V)

        # 3) Draw.
        token = next_token(logits, **how)  # (B, 1)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped |= token == stop_token
        yield token
        pieces.append(token)
        unread = token

        # 4) Stop when all rows have stopped. Asking makes the host wait for a GPU: hence seldom.
        may_ask = on_cpu or n % 16 == 0
        if stop_token is not None and may_ask and stopped.all():
            return


def last_logits(model: GPT, unread: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Read tokens, int64 (B, T), into the cache; returns the last one's logits (B, V)."""
    x = model.hidden(unread, cache=cache)  # (B, T, C)
    return model.head(x[:, -1])


@functools.cache  # compiled code lives as long as the function that torch.compile returned
def compiled_read():
    """`last_logits` for one token as one CUDA graph, in place of hundreds of kernels.

    It is the same graph at every position, because how full the cache is is data, not code.
    Attention reads all block_size places. cache.position, on the device, says which are valid:
    KVCache.next_positions hides the places to the right of the token that is read.
    """
    return torch.compile(last_logits, mode="reduce-overhead", fullgraph=True, dynamic=False)


def new_cache(model: GPT, batch_size: int, num_tokens: int, compiled: bool) -> KVCache:
    """An empty cache for texts of num_tokens tokens; a full context if compiled."""
    length = model.config.block_size
    if not compiled:
        length = min(length, num_tokens)
    # On a CPU, attention of one query in float32 takes half the time that it takes in bfloat16.
    dtype = torch.float32 if model.device.type == "cpu" else model.head_weight.dtype
    cache = KVCache(model.config, batch_size, length, model.device, dtype)
    if compiled:  # a CUDA graph writes to the addresses it was recorded with
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
    **options,
) -> torch.Tensor:
    """Prompts idx, int64 (B, T), and their continuations, int64 (B, T + max_new_tokens).

    A row that has drawn stop_token is filled up with it. Meanwhile the model is in eval mode.
    For the other arguments see `next_token` and `stream`.
    """
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    was_training = model.training
    model.eval()
    try:
        tokens = list(stream(model, idx, max_new_tokens, stop_token, **options, **how))
    finally:
        model.train(was_training)
    num_missing = max_new_tokens - len(tokens)  # not 0 where all rows have stopped
    filling = idx.new_full((len(idx), num_missing), stop_token or 0)
    return torch.cat([idx, *tokens, filling], 1)


# ---------------------------------------------------------------------------- text


def encode_prompt(
    model: GPT, encoding: tiktoken.Encoding, prompt: str, batch_size: int
) -> torch.Tensor:
    """The prompt's tokens, int64 (batch_size, T); of an empty one <|endoftext|>, a new document."""
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    return torch.tensor(ids, device=model.device).repeat(batch_size, 1)


def sample_text(
    model: GPT, encoding: tiktoken.Encoding, prompt: str, num: int, max_new_tokens: int, **how
) -> list[str]:
    """`num` texts that begin with the prompt and end before <|endoftext|>, as one batch."""
    idx = encode_prompt(model, encoding, prompt, num)
    end = encoding.eot_token
    rows = generate(model, idx, max_new_tokens, stop_token=end, vocab_size=encoding.n_vocab, **how)
    texts = []
    for new_tokens in rows[:, idx.size(1) :].tolist():
        if end in new_tokens:
            new_tokens = new_tokens[: new_tokens.index(end)]
        texts.append(prompt + encoding.decode_bytes(new_tokens).decode("utf-8", "replace"))
    return texts


def stream_text(
    model: GPT, encoding: tiktoken.Encoding, prompt: str, max_new_tokens: int, **how
) -> Iterator[str]:
    """Yield the one continuation that `sample_text` appends to the prompt, in pieces.

    A character whose bytes are spread over several tokens comes with the last of them.
    """
    idx = encode_prompt(model, encoding, prompt, 1)
    end = encoding.eot_token
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream(model, idx, max_new_tokens, end, encoding.n_vocab, **how):
        if token.item() == end:
            break
        yield utf8.decode(encoding.decode_single_token_bytes(token.item()))
    yield utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------- command line

COMPILE_REPAID = 10_000  # new tokens; an estimate: 30 s once, a few ms saved a token

newest_run = tyro.conf.arg(help_behavior_hint="(default: the newest run under runs/)")
all_tokens = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: all tokens)")
no_file = tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: no file)")


@dataclass(frozen=True)
class SampleConfig:
    # The model: a name on the hub (gpt2), a Hugging Face directory, a run or one of its steps.
    model: Annotated[str, newest_run] = ""
    prompt: str = ""  # How the text begins. An empty prompt begins a new document.
    # A file whose whole content is the prompt; - is standard input.
    prompt_file: Annotated[Path | None, no_file] = None
    interactive: bool = False  # Continue each line that is typed, until Ctrl-D.
    num_samples: Annotated[int, Range(1, 2**20)] = 1  # How many texts to generate, as one batch.
    # The most tokens to generate. A text can end earlier by itself.
    max_new_tokens: Annotated[int, Range(1, 2**30)] = 200
    # Below 1 favours likely tokens; 0 always takes the likeliest.
    temperature: Annotated[float, Range(0, math.inf, below=True)] = 0.8
    # Draw from this many of the likeliest tokens; None: from all.
    top_k: Annotated[int | None, Range(1), tyro.conf.arg(metavar="INT")] = 50
    # Draw from the fewest likeliest tokens that reach this probability together.
    top_p: Annotated[float | None, Range(0, 1, above=True), all_tokens] = None
    # The same seed gives the same text on the same machine.
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"  # Compute on cuda, mps or cpu; auto takes the first that is there.
    # The precision of the weights; auto takes bfloat16 where the hardware multiplies it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        check_fields(self)
        given = [self.prompt != "", self.prompt_file is not None, self.interactive]
        require(sum(given) <= 1, "expected only one of --prompt, --prompt-file and --interactive")


def load_model(name: str, dropout: float = 0.0) -> tuple[GPT, tiktoken.Encoding, str]:
    """The model that a name stands for ("": the newest run), its encoding, what was picked."""
    picked = resolve_model(name)
    model = GPT.from_pretrained(picked, dropout)
    return model, encoding_of(model, picked), picked


def given_prompt(config: SampleConfig) -> str:
    """The prompt of the flag or of the file."""
    file = config.prompt_file
    if file is None:
        return config.prompt
    if str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text("utf-8", "replace")
    except OSError as error:
        raise UserError(
            f"--prompt-file {file}: cannot be read ({error.strerror}); expected a text file, or - "
            "for stdin; check the path"
        ) from None


def typed_lines() -> Iterator[str]:
    """The lines of standard input. On a terminal a sign asks for each."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        write("> " if on_terminal else "")
        line = sys.stdin.readline()
        if not line:
            break
        yield line.rstrip("\n")
    write("\n" if on_terminal else "")


def main() -> None:
    config = parse_flags(SampleConfig, SampleConfig(), "Generate text from a GPT-2.")
    prompts = typed_lines() if config.interactive else [given_prompt(config)]
    rt = start(config.device, config.dtype)
    model, encoding, picked = load_model(config.model)
    print(f"model {shown(picked)}, seed {config.seed}", file=sys.stderr)
    model.to(rt.device, rt.dtype)
    pack_linears(model, config.num_samples)  # 0.4 s once, 5 ms saved a token at 124M
    how = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "generator": torch.Generator(rt.device).manual_seed(config.seed),
        # Each line that is typed has a cache, and compiled code is made for one cache.
        "compiled": rt.device.type == "cuda"
        and config.max_new_tokens >= COMPILE_REPAID
        and not config.interactive,
    }
    for prompt in prompts:
        note_on_length(prompt, model, encoding)
        if config.num_samples == 1:
            write("" if config.interactive else prompt)  # what was typed is on the screen
            for piece in stream_text(model, encoding, prompt, config.max_new_tokens, **how):
                write(piece)
            write("\n")
        else:
            texts = sample_text(
                model, encoding, prompt, config.num_samples, config.max_new_tokens, **how
            )
            for number, text in enumerate(texts, 1):
                write(f"--- sample {number}\n{text}\n")


def note_on_length(prompt: str, model: GPT, encoding: tiktoken.Encoding) -> None:
    """Say what is read of a prompt that is longer than the context."""
    length = len(encoding.encode_ordinary(prompt))
    block_size = model.config.block_size
    if length > block_size:
        kept = f"only its last {max(1, block_size // 2):,} are read"
        print(f"prompt of {length:,} tokens, context of {block_size:,}: {kept}", file=sys.stderr)


def write(text: str) -> None:
    """Print at once. A model may write what controls a terminal, so there it is escaped."""
    if sys.stdout.isatty():
        text = shown(text, lines=True)
    print(text, end="", flush=True)


if __name__ == "__main__":
    run_script(main, out_of_memory="lower --num-samples")
