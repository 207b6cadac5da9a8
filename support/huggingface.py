"""Hugging Face's file formats: the tokenizer of a model directory, out and in.

This file knows nothing of GPT. It takes and gives plain values: an encoding, a folder.
"""

import functools
import json
import os
from pathlib import Path

import tiktoken
from tiktoken.load import read_file_cached

from support.files import read_bytes, read_json, write_file
from support.script import UserError

# --------------------------------------------------------------------------------------- tokenizer

# OpenAI's file of GPT-2's merges. tiktoken reads the same file to make its encoding, and keeps it.
MERGES_OF_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def save_tokenizer(
    encoding: tiktoken.Encoding, folder: str | os.PathLike, block_size: int | None = None
) -> None:
    """Write the files from which transformers' AutoTokenizer builds the same encoding.

    block_size: the model's context; other programs then cut a longer text instead of failing.
    """
    folder = Path(folder)
    end_of_text = encoding.decode([encoding.eot_token])
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "add_prefix_space": False,
    }
    if block_size is not None:
        config["model_max_length"] = block_size
    vocab = json.dumps(vocabulary(encoding), ensure_ascii=False)
    merges = "\n".join(["#version: 0.2", *merges_of(encoding)]) + "\n"
    write_file(folder / "vocab.json", vocab.encode())
    write_file(folder / "merges.txt", merges.encode())
    write_file(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def check_tokenizer(folder: str | os.PathLike, encoding: tiktoken.Encoding) -> None:
    """Refuse a model whose tokenizer files, if it has any, say something else than `encoding`.

    It reads vocab.json, merges.txt and tokenizer.json. Tokens added after those of the encoding are
    allowed. Raises UserError, which names the file.
    """
    folder = Path(folder)
    if (folder / "vocab.json").exists():
        file = folder / "vocab.json"
        _check_vocabulary(file, read_json(file, {str: int}, limit=2**24), encoding)
    if (folder / "merges.txt").exists():
        file = folder / "merges.txt"
        lines = read_bytes(file, limit=2**24).decode(errors="replace").splitlines()
        lines = [line for line in lines if line and not line.startswith("#version")]
        _check_merges(file, lines, encoding)
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.json"
        shape = {
            "added_tokens?": [{"id": int, "content": str}],
            "model": {"vocab": {str: int}, "merges?": [(str, list)]},
        }
        content = read_json(file, shape, limit=2**24)
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        _check_vocabulary(file, content["model"]["vocab"] | added, encoding)
        merges = content["model"].get("merges", [])
        joined = [m if isinstance(m, str) else " ".join(map(str, m)) for m in merges]
        _check_merges(file, joined, encoding)


def _check_vocabulary(file: Path, found: dict[str, int], encoding: tiktoken.Encoding) -> None:
    expected = vocabulary(encoding)
    if {token: i for token, i in found.items() if i < len(expected)} != expected:
        raise UserError(
            f"{file}: a vocabulary of {len(found):,} tokens that is not this encoding's; expected "
            f"the {len(expected):,} tokens of the encoding in their order; this model has a "
            "tokenizer of another kind and cannot be used here"
        )


def _check_merges(file: Path, found: list[str], encoding: tiktoken.Encoding) -> None:
    expected = merges_of(encoding)
    if found != expected:
        raise UserError(
            f"{file}: {len(found):,} merges that are not this encoding's; expected the "
            f"{len(expected):,} merges of {encoding.name}; this model has a tokenizer of another "
            "kind and cannot be used here"
        )


@functools.cache
def vocabulary(encoding: tiktoken.Encoding) -> dict[str, int]:
    """The id of each token, the token written in GPT-2's alphabet."""
    alphabet = visible_bytes()
    vocab = {}
    for i in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(i)
        vocab["".join(alphabet[byte] for byte in token)] = i
    vocab[encoding.decode([encoding.eot_token])] = encoding.eot_token
    return vocab


@functools.cache
def visible_bytes() -> dict[int, str]:
    """GPT-2's alphabet: a visible character for each of the 256 bytes (OpenAI's encoder.py).

    A byte that Latin-1 prints stands for itself. The others get the characters from U+0100 on.
    """
    alphabet = {}
    next_character = 256
    for byte in range(256):
        character = chr(byte)
        if character.isprintable() and not character.isspace():
            alphabet[byte] = character
        else:
            alphabet[byte] = chr(next_character)
            next_character += 1
    return alphabet


@functools.cache
def merges_of(encoding: tiktoken.Encoding) -> list[str]:
    """For each token of several bytes, in order, the two tokens that are merged into it."""
    if encoding.name != "gpt2":  # a vocabulary of bytes: nothing is merged
        return []
    text = read_file_cached(MERGES_OF_GPT2, MERGES_SHA256).decode()
    return text.splitlines()[1:]  # after the line "#version: 0.2"
