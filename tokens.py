"""Tokens: encodings, a corpus as one long array, windows of it, and the order of training.

A corpus is a directory of token files (support/shards.py). The files of a split form one long array
of tokens. Training cuts it into windows: window k is tokens kT … kT+T, that is T inputs and the T
targets one token later. `training_windows` decides which windows a step sees,
and `Mixture` from which corpus.
"""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from support import mixture
from support.huggingface import check_tokenizer
from support.script import UserError, require, shown
from support.shards import ENCODINGS, Shard, fingerprint, listed, split

# ---------------------------------------------------------------------------------------- encodings

END_OF_TEXT = "<|endoftext|>"


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """`gpt2`, or `bytes`: ids 0-255 are the bytes themselves, 256 is <|endoftext|>."""
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    require(name == "gpt2", f"encoding {name!r}; expected one of {', '.join(ENCODINGS)}")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UserError(
            f"gpt2's vocabulary could not be downloaded ({type(error).__name__}); expected a "
            "connection; connect once, fill TIKTOKEN_CACHE_DIR, or use the tokenizer bytes"
        ) from None


def encoding_of(model, place: str) -> tiktoken.Encoding:
    """The encoding that a model reads: named by its config.json, else known by its vocabulary.

    place: what it was loaded from. Tokenizer files there must say the same. A model may have more
    rows than a named encoding has tokens, added for padding.
    """
    rows = model.config.vocab_size
    names = {size: name for name, size in ENCODINGS.items()}
    name = model.encoding_name or names.get(rows)
    require(
        name in ENCODINGS and rows >= ENCODINGS[name],
        f"{place}: {rows:,} tokens, encoding {shown(str(name))}; expected 50257 of gpt2 or 257 of "
        "bytes, or more if config.json names the encoding; if tokens were added to GPT-2's, remove "
        "them in transformers with model.resize_token_embeddings(50257)",
    )
    encoding = get_encoding(name)
    if os.path.isdir(place):
        check_tokenizer(place, encoding)
    return encoding


@functools.cache
def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """Length in bytes of each token's text, int64 (n_vocab,); 0 for <|endoftext|>."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in range(encoding.n_vocab):
        if token != encoding.eot_token:
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    return lengths


# ------------------------------------------------------------------------------------------- corpus


class TokenArray:
    """Shards joined into one long array of tokens, of which only what is asked for is read."""

    def __init__(self, shards: list[Shard], vocab_size: int):
        self.shards = [shard for shard in shards if shard.count > 0]
        self.vocab_size = vocab_size
        # Shard i holds tokens ends[i-1] … ends[i]-1 of the array.
        self.ends = np.cumsum([shard.count for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1, uint16 (stop - start,), across the ends of shards."""
        result = np.empty(stop - start, dtype=np.uint16)
        filled = 0
        i = int(np.searchsorted(self.ends, start, side="right"))  # the shard that holds `start`
        while filled < len(result):
            shard = self.shards[i]
            shard_start = int(self.ends[i]) - shard.count
            first = start + filled - shard_start
            count = min(shard.count - first, len(result) - filled)
            result[filled : filled + count] = shard.read(first, count, self.vocab_size)
            filled += count
            i += 1
        return result

    def num_windows(self, T: int) -> int:
        """How many windows of T + 1 tokens fit."""
        return max(0, (len(self) - 1) // T)

    def windows(self, indices: np.ndarray, T: int) -> np.ndarray:
        """The windows with these indices, int64 (len(indices), T + 1)."""
        rows = np.empty((len(indices), T + 1), dtype=np.int64)
        for row, k in zip(rows, indices.tolist(), strict=True):
            row[:] = self.read(k * T, k * T + T + 1)
        return rows


@dataclass(frozen=True)
class TokenData:
    """A corpus: its encoding, its two splits, and the hash by which a run recognises it."""

    encoding: str
    train: TokenArray
    val: TokenArray
    fingerprint: str

    @property
    def whole(self) -> TokenArray:
        """Both splits, one behind the other."""
        return TokenArray([*self.train.shards, *self.val.shards], self.train.vocab_size)


def open_data(folder: str | os.PathLike) -> TokenData:
    """Open a directory of token files, ours or another program's. Nothing is written to it."""
    folder = Path(folder)
    encoding, shards = listed(folder)
    train, val = split(shards)
    require(
        len(train) > 0,
        f"{folder}: no shards to train on; expected token shards; prepare them with fineweb.py, or "
        "name text files",
    )
    vocab_size = ENCODINGS[encoding]
    return TokenData(
        encoding,
        train=TokenArray(train, vocab_size),
        val=TokenArray(val, vocab_size),
        fingerprint=fingerprint(folder),
    )


# ----------------------------------------------------------------------------------- training order
#
# All training is one endless stream of samples, numbered 0, 1, 2, …; each sample is one window.
# Step s of S sequences takes samples sS … sS+S-1. The ranks divide these into equal, consecutive
# parts. With 32 sequences a step, step 10 takes samples 320 … 351, and of these rank 1 of 4 takes
# 328 … 335.


def training_windows(first: int, count: int, num_windows: int, seed: int) -> np.ndarray:
    """Window indices of samples first … first+count-1, int64 (count,).

    With N windows, sample g belongs to epoch g // N and has place g mod N in it. Each epoch has a
    permutation of its own of the N windows, and the sample is the window that the permutation puts
    at that place. So an epoch shows each window exactly once. What a step sees depends on the seed
    and the step, and on nothing else: a resumed run needs no other state of the data.
    """
    samples = np.arange(first, first + count)
    epochs = samples // num_windows
    places = samples % num_windows
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permute(places[in_epoch], num_windows, seed, int(epoch))
    return indices


def _permute(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudorandom permutation of 0 … n-1, evaluated at `places`, without storing it.

    A Feistel network permutes the numbers of 2h bits, whatever its round function is (Luby and
    Rackoff 1988). Its domain 0 … 4^h-1 is a little larger than 0 … n-1. If a result is n or more,
    the network is applied to the result, again and again, until a result is below n. This makes a
    permutation of 0 … n-1 (cycle walking, Black and Rogaway 2002). The domain is at most four times
    as large as n, so few repetitions are needed.
    """
    # The smallest h with 4^h >= n.
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(seed, epoch)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)  # results that are not below n yet; at first all
    while outside.any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
        outside = result >= n
    return result.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Keys from the seed and the epoch, uint64 (8,): two hashes give four each."""
    first_half = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    second_half = hashlib.sha256(first_half).digest()
    return np.frombuffer(first_half + second_half, dtype="<u8")


def _feistel(x: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass of the network over numbers of 2 * half_bits bits.

    A round changes the left half by a function of the right half, and then swaps the halves. It can
    be undone, so no two numbers become one.
    """
    shift = np.uint64(half_bits)
    low_bits = np.uint64((1 << half_bits) - 1)
    left = x >> shift
    right = x & low_bits
    for key in round_keys:
        changed = left ^ (_mix(right ^ key) & low_bits)
        left = right
        right = changed
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits: every output bit depends on every input bit.

    This is the finaliser of splitmix64 (Steele, Lea and Flood 2014).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ------------------------------------------------------------------------------- several corpora


class Mixture:
    """Corpora that are trained on together, in proportion to their weights; or a single one.

    A pattern, repeated without end, says which corpus each sample is of. The k-th sample of a
    corpus is the one that it would be if this corpus were trained on alone. So each is shuffled
    anew when it has been read once, and again nothing but seed and step decide.
    """

    def __init__(self, corpora: dict[str, TokenData], weights: list[float]):
        encodings = sorted({data.encoding for data in corpora.values()})
        require(
            len(encodings) == 1,
            f"--data mixes the encodings {' and '.join(encodings)}; expected one; prepare all "
            "corpora with the same --tokenizer",
        )
        self.corpora = corpora
        self.encoding = encodings[0]
        self.pattern = mixture.pattern(weights)
        self.counts = np.bincount(self.pattern)  # samples of each corpus in one repetition
        self.shares = self.counts / len(self.pattern)

    @property
    def fingerprint(self) -> str:
        """That of the one corpus, or a hash of them all and the pattern."""
        fingerprints = [data.fingerprint for data in self.corpora.values()]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(f"{fingerprints} {self.pattern.tolist()}".encode()).hexdigest()

    def samples_of_each(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each corpus has, int64 (corpora,)."""
        repetitions, rest = divmod(samples, len(self.pattern))
        of_rest = np.bincount(self.pattern[:rest], minlength=len(self.counts))
        return repetitions * self.counts + of_rest

    def times_read(self, samples: int, T: int) -> np.ndarray:
        """How often the first `samples` samples read each corpus, float64 (corpora,)."""
        num_windows = [data.train.num_windows(T) for data in self.corpora.values()]
        return self.samples_of_each(samples) / num_windows

    def windows_of_samples(self, first: int, count: int, T: int, seed: int) -> np.ndarray:
        """The windows of samples first … first+count-1, int64 (count, T + 1)."""
        rows = np.empty((count, T + 1), dtype=np.int64)
        corpus_of = self.pattern[np.arange(first, first + count) % len(self.pattern)]
        earlier = self.samples_of_each(first)
        for i, data in enumerate(self.corpora.values()):
            own = corpus_of == i
            num_windows = data.train.num_windows(T)
            indices = training_windows(earlier[i], own.sum(), num_windows, seed)
            rows[own] = data.train.windows(indices, T)
        return rows
