"""Tokens: encodings, a corpus as one long array, windows of it, and the order of training.

A corpus is a directory of token files (support/shards.py). The files of a split form one long array
of tokens. Training cuts it into windows: window k is tokens kT … kT+T, that is T inputs and the T
targets one token later. `training_windows`, at the end, decides which windows a step sees.

Shapes: T tokens per sequence.
"""

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from support.huggingface import check_tokenizer
from support.script import UserError, require
from support.shards import ENCODINGS, Shard, cut, fingerprint, listed

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
            f"the gpt2 vocabulary could not be downloaded ({type(error).__name__}); expected a "
            "connection or a filled cache; connect once, or set TIKTOKEN_CACHE_DIR to a folder "
            "that holds tiktoken's gpt2 files, or use the tokenizer bytes"
        ) from None


def encoding_for(vocab_size: int, name: str | None, place: str) -> tiktoken.Encoding:
    """The encoding of a model with `vocab_size` rows.

    name: what its config.json says, or None. place: the model's name in an error.
    A vocabulary may have more rows than a named encoding has tokens: a row may have been added for
    padding. Without a name the size must be that of an encoding. Raises UserError.
    """
    if name is not None:
        size = get_encoding(name).n_vocab
        if vocab_size < size:
            raise UserError(
                f"{place}: {vocab_size:,} rows for the encoding {name!r}; expected at least "
                f"{size:,}; use a model that was trained with this encoding"
            )
        return get_encoding(name)
    for known, size in ENCODINGS.items():
        if vocab_size == size:
            return get_encoding(known)
    raise UserError(
        f"{place}: a vocabulary of {vocab_size:,} tokens; expected 50257 (gpt2) or 257 (bytes); if "
        "tokens were added to GPT-2's, remove them in transformers with "
        "model.resize_token_embeddings(50257) and save it again"
    )


def encoding_of(model, place: str) -> tiktoken.Encoding:
    """The encoding that a model reads; place: the directory or name that it was loaded from.

    Its config.json names it, or the size of its vocabulary tells. Tokenizer files that lie beside
    the model must say the same.
    """
    encoding = encoding_for(model.config.vocab_size, model.encoding_name, place)
    if os.path.isdir(place):
        check_tokenizer(place, encoding)
    return encoding


@functools.cache
def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """Length in bytes of each token's text, int64 (n_vocab,).

    It is 0 for <|endoftext|>, which stands for no text.
    """
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
        """Tokens start … stop-1, uint16 (stop - start,), across the ends of shards.

        Raises UserError for a token outside the vocabulary.
        """
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
        """How many windows of T + 1 tokens fit: window k is tokens kT … kT+T."""
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


def open_data(folder: str | os.PathLike) -> TokenData:
    """Open a directory of token files, ours or another program's. Nothing is written to it."""
    folder = Path(folder)
    encoding, shards = listed(folder)
    train, val = _split(shards)
    require(
        len(train) > 0,
        f"{folder}: {len(shards)} token shards; expected at least one for training and one for "
        "validation; prepare them with fineweb.py, or name text files instead of the folder",
    )
    vocab_size = ENCODINGS[encoding]
    return TokenData(
        encoding,
        train=TokenArray(train, vocab_size),
        val=TokenArray(val, vocab_size),
        fingerprint=fingerprint(folder),
    )


# corpus_val_000000.bin, val.npy, validation-00000.bin, val_00000_00000_doc_shuffled.ds
VALIDATION_FILE = re.compile(r"(^|[_.-])val(id|idation)?([_.-]?\d+)*(_\w*shuffled)?\.\w+$")
# An evaluation reads at most 10,485,760 tokens, and the last one needs a target.
MAX_VALIDATION_TOKENS = 10_485_760 + 1


def _split(shards: list[Shard]) -> tuple[list[Shard], list[Shard]]:
    """The shards for training and those for validation.

    Names say which is which, as in `corpus_val_000000.bin`. fineweb.py always writes such a shard,
    and chooses what it holds. Where no name does, as in datatrove's files, the last tenth of the
    tokens validates, as they lie, at most MAX_VALIDATION_TOKENS.
    """
    train = []
    val = []
    for shard in shards:
        if VALIDATION_FILE.search(shard.path.name):
            val.append(shard)
        else:
            train.append(shard)
    if val:
        return train, val
    total = sum(shard.count for shard in shards)
    return cut(shards, total - min(total // 10, MAX_VALIDATION_TOKENS))


# ----------------------------------------------------------------------------------- training order
#
# All training is one endless stream of samples, numbered 0, 1, 2, …; each sample is one window.
# Step s of S sequences takes samples sS … sS+S-1. The ranks divide these into equal, consecutive
# parts. With 32 sequences a step, step 10 takes samples 320 … 351, and of these rank 1 of 4 takes
# 328 … 335. `training_windows` says which windows these samples are.


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
