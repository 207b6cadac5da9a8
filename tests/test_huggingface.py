"""Hugging Face's file formats: the tokenizer that transformers builds from a model directory."""

import json

import pytest

from support.huggingface import check_tokenizer, save_tokenizer
from support.script import UserError
from tokens import get_encoding


def auto_tokenizer(folder, encoding, block_size=None):
    """What transformers makes of a model directory with the tokenizer files."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=encoding.n_vocab, n_layer=1, n_head=1, n_embd=8)
    config.save_pretrained(folder)
    save_tokenizer(encoding, folder, block_size)
    return transformers.AutoTokenizer.from_pretrained(folder)


TEXTS = [
    "Hello, world!  Two spaces, a\ttab\r\n and lines.\n\n",
    " naïve café — 日本語 🎉 e\u0301 \u202e \0 \x7f",
    "",
    "it's we'll 12345 ...",
]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_auto_tokenizer_is_the_same_encoding(tmp_path, name):
    encoding = get_encoding(name)
    tokenizer = auto_tokenizer(tmp_path, encoding)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode_ordinary(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == encoding.eot_token
    assert tokenizer("a<|endoftext|>")["input_ids"][1:] == [encoding.eot_token]
    assert len(tokenizer) == encoding.n_vocab


def test_the_byte_tokenizer_has_every_byte(tmp_path):
    save_tokenizer(get_encoding("bytes"), tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(257)) and vocab["<|endoftext|>"] == 256
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\n"


def test_the_tokenizer_knows_the_context(tmp_path):
    assert auto_tokenizer(tmp_path, get_encoding("bytes"), 128).model_max_length == 128


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_its_own_tokenizer_files_pass(tmp_path, name):
    encoding = get_encoding(name)
    check_tokenizer(tmp_path, encoding)  # a model without tokenizer files
    tokenizer = auto_tokenizer(tmp_path, encoding)
    check_tokenizer(tmp_path, encoding)
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    check_tokenizer(tmp_path, encoding)


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def exchange(vocab):
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


TOKENIZER_CHANGES = {
    "vocab.json": lambda file: change_json(file, exchange),
    "merges.txt": lambda file: file.write_text(file.read_text() + "a b\n"),
    "tokenizer.json": lambda file: change_json(file, lambda c: exchange(c["model"]["vocab"])),
}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("file", TOKENIZER_CHANGES)
def test_a_model_with_another_tokenizer_is_refused(tmp_path, name, file):
    tokenizer = auto_tokenizer(tmp_path, get_encoding(name))
    tokenizer.save_pretrained(tmp_path)
    save_tokenizer(get_encoding(name), tmp_path)
    TOKENIZER_CHANGES[file](tmp_path / file)
    with pytest.raises(UserError, match=f"{tmp_path / file}: .*not this encoding's"):
        check_tokenizer(tmp_path, get_encoding(name))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', '{"a": 1.5}', "5"])
def test_a_damaged_vocabulary_is_refused(tmp_path, content):
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            check_tokenizer(tmp_path, get_encoding("bytes"))
        (tmp_path / name).unlink()
