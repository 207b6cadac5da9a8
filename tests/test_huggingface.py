"""Hugging Face's formats: round trips with transformers, tokenizers, refusals, the hub's client."""

import hashlib
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT, MLP, GPTConfig, NextTokenLoss
from support import huggingface
from support.huggingface import INDEX, TRANSPOSED, check_tokenizer, read_config, save_tokenizer
from support.script import UserError
from tokens import get_encoding

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=257)


def same(a: GPT, b: GPT) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def model() -> GPT:
    return GPT(CONFIG).eval()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "saved", encoding="bytes")
    return tmp_path / "saved"


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a saved model, as a dict by name."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------- transformers


def test_round_trip_through_transformers(model, saved, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(saved)
    x = torch.randint(257, (2, 24))
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, model(x), atol=1e-5)
    assert theirs.generation_config.eos_token_id == theirs.generation_config.bos_token_id == 256
    assert theirs.config.encoding == "bytes"
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert same(GPT.from_pretrained(tmp_path / "whole"), model)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same(GPT.from_pretrained(tmp_path / "sharded"), model)


def test_tied_weights_are_stored_once(model, saved):
    assert load_file(saved / "model.safetensors").keys() == dict(model.named_parameters()).keys()


def test_saved_weights_can_be_read_by_others(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_a_link_is_replaced_and_what_it_points_to_stays(model, saved, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model.safetensors").symlink_to(saved / "model.safetensors")
    before = (saved / "model.safetensors").read_bytes()
    GPT(CONFIG).save_pretrained(tmp_path / "links")
    assert (saved / "model.safetensors").read_bytes() == before


def test_old_names(model, saved):
    """OpenAI's own upload: no prefix, and each layer's causal mask among the weights."""

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(CONFIG.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(saved, age)
    assert same(GPT.from_pretrained(saved), model)


def test_an_explicit_head_must_be_the_embedding(model, saved):
    rewrite(saved, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert same(GPT.from_pretrained(saved), model)
    rewrite(saved, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match="lm_head.weight is not transformer.wte.weight"):
        GPT.from_pretrained(saved)


def test_a_head_without_an_embedding_is_the_embedding(model, saved):
    rewrite(saved, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert same(GPT.from_pretrained(saved), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_float32(model, saved, dtype):
    rewrite(saved, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert same(GPT.from_pretrained(saved), model.to(dtype).float())


def test_a_loaded_model_trains_on_as_transformers_does(saved):
    """One SGD step from the same directory moves every parameter to the same place."""
    from transformers import AutoModelForCausalLM

    ours = GPT.from_pretrained(saved).train()
    theirs = AutoModelForCausalLM.from_pretrained(saved).train()
    x = torch.randint(257, (4, 24))
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    losses = [NextTokenLoss(ours)(x[:, :-1], x[:, 1:]), theirs(x, labels=x).loss]
    for network, loss in zip([ours, theirs], losses, strict=True):
        loss.backward()
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        their_parameter = expected[name].t() if name.endswith(TRANSPOSED) else expected[name]
        assert torch.allclose(parameter, their_parameter, atol=1e-6), name
        assert not torch.equal(parameter, start[name]), name


def test_a_model_is_loaded_for_evaluation_with_the_dropout_asked_for(saved):
    model = GPT.from_pretrained(saved, dropout=0.1)
    assert not model.training
    x = torch.zeros(1, 24, dtype=torch.long)
    assert torch.equal(model(x), GPT.from_pretrained(saved)(x))
    assert not torch.equal(model.train()(x), model(x))  # two draws


def test_rows_beyond_the_encoding_load(tmp_path):
    wide = GPT(replace(CONFIG, vocab_size=264))
    wide.save_pretrained(tmp_path, encoding="bytes")
    assert same(GPT.from_pretrained(tmp_path), wide)


@pytest.mark.parametrize("vocab_size, end_of_text", [(257, 256), (50257, 50256), (300, None)])
def test_saving_alone_writes_the_end_of_text_and_the_tokenizer(tmp_path, vocab_size, end_of_text):
    GPT(GPTConfig(1, 1, 4, 8, vocab_size)).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        assert values.get("bos_token_id") == values.get("eos_token_id") == end_of_text
    assert (tmp_path / "vocab.json").exists() == (end_of_text is not None)


def test_what_is_added_to_config_json_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path / "a", encoding="other", eos_token_id=7)
    again = GPT.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert read_config(tmp_path / "a")["eos_token_id"] == 7
    assert read_config(tmp_path / "b")["encoding"] == again.encoding_name == "other"


def test_a_pipeline_without_a_length_stops_at_the_context(tmp_path):
    from transformers import pipeline

    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=24)).save_pretrained(tmp_path)
    (answer,) = pipeline("text-generation", str(tmp_path), device="cpu")("Hello world")
    assert 2 < len(get_encoding("gpt2").encode(answer["generated_text"])) <= 24


def test_lm_eval_scores_a_saved_model(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    encoding = get_encoding("gpt2")
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)).eval()
    model.save_pretrained(tmp_path)
    harness = HFLM(pretrained=str(tmp_path), tokenizer=str(tmp_path), device="cpu", batch_size=1)
    context, ending = "The water in the pan", " began to boil."
    request = Instance("loglikelihood", {}, (context, ending), 0)
    ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    first, second = encoding.encode(context), encoding.encode(ending)
    with torch.no_grad():
        log_p = model(torch.tensor([first + second])).log_softmax(-1)[0]
    expected = sum(log_p[len(first) + i - 1, token] for i, token in enumerate(second))
    assert score == pytest.approx(expected.item(), abs=1e-3)
    assert harness.max_length == 64 and harness.eot_token_id == 50256


# ---------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "Hello world",
    " leading, trailing  \t\n\n  and   inner\r\n space ",
    "I'll say we've 'S 't don't\u2019t",
    "1234567890 3.14159 1e-5 ١٢٣",
    "naïve façade Ünïcödé 世界 こんにちは עברית \u0301\u200b\ufeff\u00ad\x00\x7f",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈",
    "def f(x):\n    return {'a': [x] * 2}  # ok\n",
    "<|endoftext|>a<|endoftext|>",
    "",
    Path(__file__).read_text(encoding="utf-8"),
]


def auto_tokenizer(folder: Path, name: str, block_size: int | None = None):
    """What transformers makes of a model directory with the tokenizer files."""
    from transformers import AutoTokenizer, GPT2Config

    GPT2Config(vocab_size=get_encoding(name).n_vocab, n_layer=1, n_embd=8).save_pretrained(folder)
    save_tokenizer(get_encoding(name), folder, block_size)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_autotokenizer_is_the_same_encoding(tmp_path, name):
    encoding = get_encoding(name)
    tokenizer = auto_tokenizer(tmp_path, name, 128)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(1, 0xD800, (20, 200), generator=generator).tolist()
    for text in TEXTS + ["".join(map(chr, characters)) for characters in noise]:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"] == ids, text[:80]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == encoding.eot_token
    assert len(tokenizer) == encoding.n_vocab and tokenizer.model_max_length == 128


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_its_own_tokenizer_files_pass_with_tokens_added(tmp_path, name):
    check_tokenizer(tmp_path, get_encoding(name))  # a model without tokenizer files
    tokenizer = auto_tokenizer(tmp_path, name)
    check_tokenizer(tmp_path, get_encoding(name))
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    check_tokenizer(tmp_path, get_encoding(name))


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def exchange(vocab: dict) -> None:
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


TOKENIZER_CHANGES = {
    "vocab.json": lambda file: change_json(file, exchange),
    "merges.txt": lambda file: file.write_text(file.read_text() + "a b\n"),
    "tokenizer.json": lambda file: change_json(file, lambda c: exchange(c["model"]["vocab"])),
}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("file", TOKENIZER_CHANGES)
def test_a_model_with_another_tokenizer_is_refused(tmp_path, name, file):
    auto_tokenizer(tmp_path, name).save_pretrained(tmp_path)
    save_tokenizer(get_encoding(name), tmp_path)
    TOKENIZER_CHANGES[file](tmp_path / file)
    with pytest.raises(UserError, match=f"{tmp_path / file}: .*not this encoding's"):
        check_tokenizer(tmp_path, get_encoding(name))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', '{"a": 1.5}', "5"])
@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_damaged_vocabulary_is_refused(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=file):
        check_tokenizer(tmp_path, get_encoding("bytes"))


# --------------------------------------------------------------------------------------- model card


def card_of(folder: Path, model: GPT, **values):
    """The card as the hub's own client reads it."""
    from huggingface_hub import ModelCard

    about = {"name": "a run, step 900", "step": 900, "tokens": 10**6, "data": "my data"}
    about |= {"losses": [(step, 1 + 1 / (1 + step)) for step in range(0, 1000, 10)]}
    about |= {"command": "python train_gpt2.py --out 'a run'"} | values
    config, _ = model.saved_form()
    huggingface.write_model_card(folder, config, model.num_parameters(), **about)
    return ModelCard.load(folder / "README.md")


def test_a_card_says_what_was_trained_on_what_and_how(model, tmp_path):
    card = card_of(tmp_path, model, base_model="openai-community/gpt2")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.license is None and "# license:" in (tmp_path / "README.md").read_text()
    for words in (
        f"{model.num_parameters():,} parameters",
        "1,000,000 tokens of my data",
        "900 updates",
        "| 990 |",
    ):
        assert words in card.content
    assert card.content.count("\n| ") == huggingface.MOST_LOSSES + 1
    assert "python train_gpt2.py --out 'a run'" in card.content


def test_a_card_draws_its_losses_as_bars_of_their_length(model, tmp_path):
    losses = [(0, 6.0), (10, 3.0), (20, math.inf), (30, 1.5)]
    card = card_of(tmp_path, model, losses=losses)
    bars = [line.count("█") for line in card.content.splitlines() if "█" in line]
    assert bars == [30, 15, 8]


def test_a_card_names_no_local_path_as_a_model_of_the_hub(model, tmp_path):
    card = card_of(tmp_path, model, base_model=str(tmp_path))
    assert card.data.base_model is None and f"the weights of {tmp_path}" in card.content


def test_the_card_of_an_edited_network_does_not_promise_transformers(squared_relu, model, tmp_path):
    card = card_of(tmp_path, model)
    assert card.data.library_name is None and "needs the `model.py`" in card.content


# ---------------------------------------------------------------------------------- another network


@pytest.fixture
def squared_relu(monkeypatch):
    """model.py with another activation."""

    def forward(self, x):
        return self.dropout(self.c_proj(self.c_fc(x).relu().square()))

    monkeypatch.setattr(MLP, "forward", forward)


def test_an_edited_network_loads_its_own_files_without_a_word(squared_relu, saved, model, capfd):
    assert same(GPT.from_pretrained(saved), model)
    assert capfd.readouterr().err == ""


def test_an_edited_network_loads_gpt2_with_a_warning(saved, model, monkeypatch, request, capfd):
    request.getfixturevalue("squared_relu")
    assert same(GPT.from_pretrained(saved), model)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"warning: {saved}: saved by another network than this model.py's"


def test_gpt2_loads_an_edited_network_with_a_warning(monkeypatch, tmp_path, model, capfd):
    with monkeypatch.context() as edit:
        edit.setattr(torch.nn.LayerNorm, "forward", lambda self, x: x)
        model.save_pretrained(tmp_path)
    assert same(GPT.from_pretrained(tmp_path), model)
    assert "saved by another network" in capfd.readouterr().err


def test_transformers_refuses_an_edited_network(squared_relu, saved):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    with pytest.raises(ValueError, match="edited_gpt2"):
        AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(KeyError, match="edited model.py"):
        GPT2LMHeadModel.from_pretrained(saved)


class Wider(GPT):
    """GPT-2 with a learned temperature, a table that is computed, and two layers that are one."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.full((1,), 3.0))
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.transformer.h[1] = self.transformer.h[0]

    def head(self, x):
        return super().head(x) * self.scale + self.table[0]


def test_added_shared_and_computed_tensors_come_back(tmp_path, capfd):
    wider = Wider(CONFIG).eval()
    with torch.no_grad():
        wider.scale.fill_(2.0)
    wider.save_pretrained(tmp_path)
    again = Wider.from_pretrained(tmp_path)
    assert same(again, wider) and again.transformer.h[1] is again.transformer.h[0]
    assert torch.equal(again.table, wider.table) and capfd.readouterr().err == ""


def test_what_only_one_network_has_is_named(model, saved, tmp_path, capfd):
    again = Wider.from_pretrained(saved)
    assert again.scale.item() == 3.0
    assert "new here, and untrained: scale" in capfd.readouterr().err
    again.save_pretrained(tmp_path / "wider")
    GPT.from_pretrained(tmp_path / "wider")
    assert "not in this network, and left out: scale" in capfd.readouterr().err


def test_a_checkpoint_is_continued_by_its_network_or_with_a_word(saved, monkeypatch, capfd):
    weights = load_file(saved / "model.safetensors")
    weights = {n: t.t() if n.endswith(TRANSPOSED) else t for n, t in weights.items()}
    config = read_config(saved)
    with pytest.raises(UserError, match="missing weights: scale"):
        huggingface.load_into(Wider(CONFIG), saved, config, weights)
    with pytest.raises(UserError, match="wpe.weight is of shape 24×32; expected 25×32"):
        huggingface.load_into(GPT(replace(CONFIG, block_size=25)), saved, config, weights)
    huggingface.load_into(GPT(CONFIG), saved, config, weights)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: x)
    huggingface.load_into(GPT(CONFIG), saved, config, weights)
    assert "saved by another network" in capfd.readouterr().err


class Untied(GPT):
    """GPT-2 with a head of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return self.lm_head.weight


def test_a_head_of_its_own_goes_to_transformers_and_back(tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    untied = Untied(CONFIG).eval()
    untied.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    x = torch.randint(257, (2, 24))
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, untied(x), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    capfd.readouterr()
    for folder in ("ours", "theirs"):
        assert same(Untied.from_pretrained(tmp_path / folder), untied)
    assert capfd.readouterr().err == ""


def test_a_head_of_its_own_begins_as_the_embedding_of_gpt2(model, saved):
    untied = Untied.from_pretrained(saved)
    assert torch.equal(untied.lm_head.weight, model.transformer.wte.weight)
    with torch.no_grad():
        untied.lm_head.weight.zero_()
    assert torch.equal(untied.transformer.wte.weight, model.transformer.wte.weight)


# ----------------------------------------------------------------------------------------- refusals


def test_read_config_reads_no_weights(saved):
    (saved / "model.safetensors").unlink()
    for place in (saved, saved / "config.json"):
        assert read_config(place)["block_size"] == 24


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("n_inner", 100),
        ("quantization_config", {"bits": 4}),
        ("n_layer", "2"),
        ("n_positions", None),
        ("vocab_size", True),
        ("network_probe", "x"),
    ],
)
def test_other_configs_are_refused_by_file_and_field(saved, key, value):
    edit_config(saved, **{key: value})
    with pytest.raises(UserError, match=f"saved/config.json: .*{key}"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("key, size", [("n_layer", 10**9), ("n_embd", 10**9), ("n_head", 3)])
def test_a_size_that_makes_no_sense_builds_no_network(saved, monkeypatch, key, size):
    edit_config(saved, **{key: size})
    monkeypatch.setattr(GPT, "__init__", lambda *args: pytest.fail("a network was built"))
    with pytest.raises(UserError, match=f"saved/config.json: .*{size}"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"[1]", b"\xff\xfe", None])
def test_a_config_that_is_none_is_refused(saved, content):
    (saved / "config.json").unlink()
    if content is not None:
        (saved / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="saved/config.json: "):
        GPT.from_pretrained(saved)


def take(name):
    return lambda tensors: tensors.pop(f"transformer.{name}")


def put(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def fill(name, value):
    return lambda tensors: tensors[f"transformer.{name}"].view(-1)[5].fill_(value)


@pytest.mark.parametrize(
    "change, found",
    [
        (take("ln_f.bias"), "missing weights: transformer.ln_f.bias, unknown weights: none"),
        (put("extra", 3), "missing weights: none, unknown weights: extra"),
        (put("\x1b]52;c;ZXZpbA==\x07", 3), r"\\x1b\]52"),
        (put("ln_f.bias", 32), "transformer.ln_f.bias is there twice"),
        (put("transformer.wpe.weight", 25, 32), "wpe.weight is of shape 25×32; expected 24×32"),
        (
            put("transformer.h.1.mlp.c_fc.weight", 128, 32),
            "c_fc.weight is of shape 32×128; expected 128×32",
        ),
        (put("transformer.ln_f.bias", 32, dtype=torch.int32), "ln_f.bias is of type I32"),
        (put("transformer.ln_f.bias", 32, dtype=torch.float8_e4m3fn), "is of type F8_E4M3"),
        (fill("h.0.mlp.c_fc.weight", torch.nan), "h.0.mlp.c_fc.weight holds NaN or Inf"),
        (fill("ln_f.bias", -torch.inf), "transformer.ln_f.bias holds NaN or Inf"),
    ],
)
def test_wrong_weights_are_refused_by_name(saved, change, found):
    rewrite(saved, change)
    with pytest.raises(UserError, match=found):
        GPT.from_pretrained(saved)


def test_weights_of_other_shapes_are_refused_unread(saved, monkeypatch):
    rewrite(saved, put("transformer.wpe.weight", 25, 32))
    monkeypatch.setattr(huggingface, "read_tensors", lambda *args: pytest.fail("read"))
    with pytest.raises(UserError, match="wpe.weight is of shape 25×32"):
        GPT.from_pretrained(saved)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"
BAD_FILES = {
    "empty": b"",
    "git-lfs": LFS_POINTER,
    "huge": (2**62).to_bytes(8, "little") + b"{}",
    "no-json": (8).to_bytes(8, "little") + b"not json",
    "pickle": b"\x80\x04\x95" + b"\x00" * 100,
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_weight_file_is_refused_by_name(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="saved/model.safetensors: .*fetch the file again"):
        GPT.from_pretrained(saved)


def test_a_weight_file_that_was_cut_is_refused_by_name(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(UserError, match="saved/model.safetensors: .*fetch the file again"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin", ".."]
)
def test_an_index_leads_only_to_weights_beside_it(saved, name):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    (saved / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match=f"{INDEX}: names the file"):
        GPT.from_pretrained(saved)


def test_pickled_weights_are_refused_with_the_way_out(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors: not there.*save_pretrained"):
        GPT.from_pretrained(saved)
    with pytest.raises(UserError, match="pytorch_model.bin: a file.*name the directory"):
        GPT.from_pretrained(saved / "pytorch_model.bin")


def test_an_adapter_is_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: not there.*merge_and_unload"):
        GPT.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download needs of the hub; `server.root/<owner>/<name>` are its repositories."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, length: int = 0, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self) -> None:
        repository, _, rest = self.path[1:].partition("/resolve/")
        file = self.server.root / repository / rest.partition("/")[2]
        owner = repository.partition("/")[0]
        self.server.requests.append((self.command, repository, file.name))
        if owner == "busy":
            return self.answer(503)
        if owner == "gated":
            return self.answer(401, X_Error_Code="GatedRepo")
        if not file.parent.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound")
        if not file.exists():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = file.read_bytes()
        etag = '"' + hashlib.sha256(content).hexdigest() + '"'
        self.answer(200, len(content), X_Repo_Commit=COMMIT, ETag=etag)
        if self.command == "GET":
            is_broken = owner == "broken" and file.suffix == ".safetensors"
            self.wfile.write(content[:100] if is_broken else content)
            self.close_connection = is_broken

    do_GET = do_HEAD

    def log_message(self, *args) -> None:
        pass


LOADER = """
import hashlib, json, sys, time
time.sleep = lambda seconds: None  # the client waits between retries
from model import GPT
from support.huggingface import read_config
from support.script import UserError
for name in sys.argv[1:]:
    try:
        model = GPT.from_pretrained(name)
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        print(json.dumps([name, hashlib.sha256(weights).hexdigest()]))
    except UserError as error:
        print(json.dumps([name, str(error)]))
slow = {"transformers", "torch._dynamo", "huggingface_hub"}
print(json.dumps(["modules", sorted(slow & sys.modules.keys())]))
"""


def load_elsewhere(names: list[str], **env: str) -> dict[str, str]:
    """Weight hash or error of each name, loaded in a fresh process with these variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", LOADER, *names]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture
def hub(model, tmp_path):
    """A local hub with one small model in several states: the server, and its weights' hash."""
    from transformers import AutoModelForCausalLM

    root = tmp_path / "hub"
    for name in ("plain/single", "broken/single", "gated/single", "other/pickle"):
        model.save_pretrained(root / name)
    (root / "other/pickle/model.safetensors").rename(root / "other/pickle/pytorch_model.bin")
    (root / "other/llama").mkdir()
    (root / "other/llama/config.json").write_text('{"model_type": "llama", "hidden_size": 4096}')
    theirs = AutoModelForCausalLM.from_pretrained(root / "plain/single")
    theirs.save_pretrained(root / "plain/sharded", max_shard_size="30KB")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.requests = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    yield server, hashlib.sha256(weights).hexdigest()
    server.shutdown()
    server.server_close()


def test_the_real_client_on_a_local_hub(hub, tmp_path):
    server, weights = hub
    place = {"HF_HOME": str(tmp_path / "home")}
    endpoint = f"http://127.0.0.1:{server.server_port}"
    faults = {
        "broken/single": "RemoteProtocolError.*check the name.* then try again",
        "gated/single": "gated.*accept its terms .* and set HF_TOKEN",
        "other/llama": "config.json: model_type is llama",
        "other/pickle": "no safetensors.*save_pretrained",
        "no/such": "neither a directory nor a model on the hub.*HF_TOKEN",
        "busy/hub": "503.*try again",
        "no/hub/name": "neither a directory nor a possible hub name",
        "../up": "neither a directory nor a possible hub name",
    }
    names = ["plain/single", "plain/sharded"]
    found = load_elsewhere([*names, *faults], HF_ENDPOINT=endpoint, **place)
    assert found["plain/single"] == found["plain/sharded"] == weights
    for name, fault in faults.items():
        assert re.search(fault, found[name]), found[name]
        assert "\n" not in found[name]

    def asked_for(repository: str) -> list[tuple[str, str]]:
        return [(how, file) for how, name, file in server.requests if name == repository]

    files = ("config.json", "model.safetensors")
    assert asked_for("plain/single") == [(how, f) for f in files for how in ("HEAD", "GET")]
    assert asked_for("other/llama") == [("HEAD", "config.json"), ("GET", "config.json")]

    # What is cached loads without a hub; what is not gives one line.
    server.requests.clear()
    offline = load_elsewhere([*names, "no/such"], HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1", **place)
    assert offline["plain/single"] == offline["plain/sharded"] == weights
    assert re.search("not in the cache.*HF_HUB_OFFLINE", offline["no/such"])
    assert not server.requests
    unreachable = load_elsewhere(["no/such"], HF_ENDPOINT="http://127.0.0.1:9", **place)
    assert "the hub cannot be reached" in unreachable["no/such"]


def test_loading_imports_no_more_than_it_needs(saved):
    """The imports of any of these cost more than reading 124M parameters."""
    assert load_elsewhere([str(saved)])["modules"] == []
