"""Hugging Face's format: round trips with transformers, refusals, the real hub client."""

import hashlib
import http.server
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from model import (
    GPT,
    INDEX,
    LARGEST_JSON,
    MLP,
    TRANSPOSED,
    GPTConfig,
    NextTokenLoss,
    read_config,
)
from support.huggingface import save_tokenizer
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
    """A directory as training writes it, without a tokenizer."""
    model.save_pretrained(tmp_path / "saved", encoding="bytes", bos_token_id=256, eos_token_id=256)
    return tmp_path / "saved"


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a saved model, as a dict by name."""
    tensors = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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


def test_an_explicit_head_must_be_the_tied_one(model, saved):
    rewrite(
        saved,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        ),
    )
    assert same(GPT.from_pretrained(saved), model)
    rewrite(saved, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match="lm_head.weight is not wte.weight"):
        GPT.from_pretrained(saved)


def test_half_precision_becomes_float32(model, saved):
    rewrite(
        saved,
        lambda tensors: tensors.update(
            {name: tensor.bfloat16() for name, tensor in tensors.items()}
        ),
    )
    assert same(GPT.from_pretrained(saved), model.bfloat16().float())


def test_a_loaded_model_trains_on_as_transformers_does(saved):
    """One AdamW step from the same directory moves every parameter to the same place."""
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


def test_autotokenizer_equals_tiktoken(gpt2_vocabulary, tmp_path):
    from transformers import AutoTokenizer

    encoding = get_encoding("gpt2")
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=64)).save_pretrained(tmp_path)
    save_tokenizer(encoding, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    generator = torch.Generator().manual_seed(0)
    noise = [
        "".join(chr(c) for c in torch.randint(1, 0xD800, (200,), generator=generator).tolist())
        for _ in range(20)
    ]
    for text in TEXTS + noise:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"] == ids, text[:80]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_autotokenizer_gives_the_bytes(model, tmp_path):
    from transformers import AutoTokenizer

    model.save_pretrained(tmp_path)
    save_tokenizer(get_encoding("bytes"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 257 and tokenizer.eos_token_id == 256
    for text in TEXTS:
        ids = get_encoding("bytes").encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"] == ids, text[:80]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_lm_eval_scores_a_saved_model(gpt2_vocabulary, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    encoding = get_encoding("gpt2")
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)).eval()
    model.save_pretrained(tmp_path, encoding="gpt2", bos_token_id=50256, eos_token_id=50256)
    save_tokenizer(encoding, tmp_path)
    harness = HFLM(pretrained=str(tmp_path), tokenizer=str(tmp_path), device="cpu", batch_size=1)
    context, ending = "The water in the pan", " began to boil."
    ((score, _),) = harness.loglikelihood(
        [Instance("loglikelihood", {}, (context, ending), 0)], disable_tqdm=True
    )
    first, second = encoding.encode(context), encoding.encode(ending)
    with torch.no_grad():
        log_p = model(torch.tensor([first + second])).log_softmax(-1)[0]
    expected = sum(log_p[len(first) + i - 1, token] for i, token in enumerate(second))
    assert score == pytest.approx(expected.item(), abs=1e-3)
    assert harness.max_length == 64 and harness.eot_token_id == 50256


def test_a_head_without_an_embedding_is_the_embedding(model, saved):
    rewrite(
        saved,
        lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}),
    )
    assert same(GPT.from_pretrained(saved), model)


def test_rows_beyond_the_encoding_load(tmp_path):
    wide = GPT(replace(CONFIG, vocab_size=264))
    wide.save_pretrained(tmp_path, encoding="bytes")
    assert same(GPT.from_pretrained(tmp_path), wide)


@pytest.mark.parametrize("vocab_size, end_of_text", [(257, 256), (50257, 50256), (300, None)])
def test_saving_alone_writes_the_end_of_text(tmp_path, vocab_size, end_of_text):
    GPT(GPTConfig(1, 1, 4, 8, vocab_size)).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        assert values.get("bos_token_id") == values.get("eos_token_id") == end_of_text


def test_extra_config_replaces_and_adds(model, tmp_path):
    model.save_pretrained(tmp_path, encoding="other", eos_token_id=7)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["encoding"], config["bos_token_id"], config["eos_token_id"]) == ("other", 256, 7)


def test_a_pipeline_without_a_length_stops_at_the_context(gpt2_vocabulary, tmp_path):
    from transformers import pipeline

    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=24)).save_pretrained(tmp_path)
    save_tokenizer(get_encoding("gpt2"), tmp_path)
    (answer,) = pipeline("text-generation", str(tmp_path), device="cpu")("Hello world")
    assert 2 < len(get_encoding("gpt2").encode(answer["generated_text"])) <= 24


# ---------------------------------------------------------------------------------- another network


def test_saving_leaves_the_random_numbers_as_they_are(model, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "activation",
    [lambda x: x.relu().square(), torch.nn.functional.gelu, torch.nn.functional.silu],
    ids=["squared-relu", "exact-gelu", "silu"],
)
def test_a_model_of_another_activation_is_refused_once_the_edit_is_undone(
    tmp_path, monkeypatch, activation
):
    def forward(self, x):
        return self.dropout(self.c_proj(activation(self.c_fc(x))))

    with monkeypatch.context() as edit:
        edit.setattr(MLP, "forward", forward)
        edited = GPT(CONFIG)
        edited.save_pretrained(tmp_path)
        assert same(GPT.from_pretrained(tmp_path), edited)
    with pytest.raises(UserError, match="config.json: saved by another network"):
        GPT.from_pretrained(tmp_path)


def test_a_model_without_layer_norm_is_refused(saved, monkeypatch):
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: x)
    with pytest.raises(UserError, match="config.json: saved by another network"):
        read_config(saved)


@pytest.mark.parametrize("probe", ["x", [], [1, 2, 3, 4], [None] * 4, {}, 0, [1e999] * 4])
def test_a_probe_that_is_none_is_refused(saved, probe):
    edit_config(saved, network_probe=probe)
    with pytest.raises(UserError, match="config.json: saved by another network"):
        read_config(saved)


def test_a_config_without_a_probe_is_plain_gpt2(model, saved):
    config = json.loads((saved / "config.json").read_text())
    del config["network_probe"]
    (saved / "config.json").write_text(json.dumps(config))
    assert same(GPT.from_pretrained(saved), model)


# -------------------------------------------------------------------------------------- read_config


def test_read_config_reads_no_weights(saved):
    (saved / "model.safetensors").unlink()
    assert read_config(saved) == read_config(saved / "config.json") == CONFIG


# ----------------------------------------------------------------------------------------- refusals


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "key, size",
    [
        ("n_layer", 10**9),
        ("n_layer", 10**5),
        ("n_embd", 10**9),
        ("n_head", 10**9),
        ("n_positions", 10**12),
        ("vocab_size", 10**18),
        ("vocab_size", -1),
        ("n_layer", 1e3),
    ],
)
def test_a_size_that_makes_no_sense_builds_no_network(saved, monkeypatch, key, size):
    edit_config(saved, **{key: size})
    monkeypatch.setattr(GPT, "__init__", lambda *args: pytest.fail("a network was built"))
    monkeypatch.setattr(model_module, "network_probe", lambda: pytest.fail("a network was built"))
    with pytest.raises(UserError, match=f"config.json: {key} is "):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a":' * 100_000, b"{}" + b" " * 2**21, b"1" * 10_000, b'"' + b"a" * 2**21],
    ids=["lists", "objects", "spaces", "digits", "string"],
)
def test_json_too_deep_or_too_long_is_refused(saved, name, content):
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=f"saved/{name}: ") as error:
        GPT.from_pretrained(saved)
    assert len(str(error.value)) < 1000
    assert ("more than" in str(error.value)) == (len(content) > LARGEST_JSON)


def plant_fifo(file: Path) -> None:
    os.mkfifo(file)


def plant_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def plant_folder(file: Path) -> None:
    file.mkdir()


def plant_dangling_link(file: Path) -> None:
    file.symlink_to(file.parent / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("plant", [plant_fifo, plant_device, plant_folder, plant_dangling_link])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_only_regular_files_are_opened(saved, name, plant):
    if name == INDEX:
        (saved / "model.safetensors").unlink()
    else:
        (saved / name).unlink()
    plant(saved / name)
    with pytest.raises(UserError, match="saved/.*(not a regular file|not there)"):
        GPT.from_pretrained(saved)


def read_raw(folder: Path) -> tuple[dict, bytes]:
    """The header of the weights, and the data behind it."""
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize("dtype", ["I32", "U32", "I64", "F8_E4M3", "F8_E5M2", "BOOL", "F4"])
def test_weights_of_another_type_are_refused_unread(saved, monkeypatch, dtype):
    bits = {"I32": 32, "U32": 32, "I64": 64, "F4": 4}.get(dtype, 8)
    tensors, data = read_raw(saved)
    offset = 0
    for name, entry in tensors.items():
        if name != "__metadata__":
            size = math.prod(entry["shape"]) * bits // 8
            entry |= {"dtype": dtype, "data_offsets": [offset, offset + size]}
            offset += size
    content = header(**tensors) + (data * 2)[:offset]
    (saved / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(model_module, "_read_tensors", lambda stored: pytest.fail("read"))
    with pytest.raises(UserError, match=f"model.safetensors: .* is of type {dtype}"):
        GPT.from_pretrained(saved)


def test_a_sparse_file_of_other_shapes_is_refused_unread(saved, monkeypatch):
    rows = 2**24
    size = rows * 32 * 4
    entry = {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, size]}
    start = header(**{"lm_head.weight": entry})
    with open(saved / "model.safetensors", "wb") as f:
        f.write(start)
        f.truncate(len(start) + size)
    monkeypatch.setattr(model_module, "_read_tensors", lambda stored: pytest.fail("read"))
    with pytest.raises(UserError, match="has shape"):
        GPT.from_pretrained(saved)


def test_a_header_of_a_million_tensors_is_refused_unparsed(saved, monkeypatch):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    content = header(**{f"t{i}": empty for i in range(20_000)})
    assert len(content) > LARGEST_JSON
    (saved / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(model_module, "safe_open", lambda *args, **kwargs: pytest.fail("parsed"))
    with pytest.raises(UserError, match="model.safetensors: a header of"):
        GPT.from_pretrained(saved)


def test_a_weight_under_two_names_is_refused(saved):
    rewrite(saved, lambda t: t.update({"ln_f.bias": torch.zeros(32)}))
    with pytest.raises(UserError, match="transformer.ln_f.bias is there twice"):
        GPT.from_pretrained(saved)


def test_a_name_from_a_file_cannot_write_to_the_terminal(saved):
    rewrite(saved, lambda t: t.update({"\x1b]52;c;ZXZpbA==\x07": torch.zeros(3)}))
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(saved)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "file, remedy",
    [
        ("model.fp16.safetensors", "rename it"),
        ("tf_model.h5", "of another framework"),
        ("model.onnx", "of another framework"),
        ("flax_model.msgpack", "of another framework"),
        ("pytorch_model.bin", "save_pretrained"),
    ],
)
def test_the_remedy_fits_the_weights_that_are_there(saved, file, remedy):
    (saved / "model.safetensors").rename(saved / file)
    with pytest.raises(UserError, match=f"model.safetensors: not there.*{remedy}"):
        GPT.from_pretrained(saved)


def test_an_adapter_is_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: not there.*merge_and_unload"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/../b", "/no/such", "a\\b", "a/b/c", "-/x\n", "~"])
def test_a_name_that_is_no_hub_name_reaches_no_client(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(UserError, match="neither a directory nor a possible hub name"):
        GPT.from_pretrained(name)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("n_inner", 100),
        ("quantization_config", {"bits": 4}),
        ("n_layer", "2"),
        ("n_head", 0),
        ("n_head", 3),
        ("n_positions", None),
        ("vocab_size", True),
    ],
)
def test_other_configs_are_refused_by_field(saved, key, value):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=key):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"[1]", b"\xff\xfe", None])
def test_a_config_that_is_none_is_refused(saved, content):
    (saved / "config.json").unlink()
    if content is not None:
        (saved / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="saved/config.json: "):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize(
    "change, found",
    [
        (
            lambda t: t.pop("transformer.ln_f.bias"),
            "transformer.ln_f.bias has shape nothing; expected 32",
        ),
        (
            lambda t: t.update(extra=torch.zeros(3)),
            "transformer.extra has shape 3; expected nothing",
        ),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.zeros(25, 32)}),
            "transformer.wpe.weight has shape 25×32; expected 24×32",
        ),
        (
            lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(128, 32)}),
            "c_fc.weight has shape 32×128; expected 128×32",
        ),
        (
            lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(2, 0, 2)}),
            "c_fc.weight has shape 2×0×2",
        ),
        (
            lambda t: t["transformer.h.0.mlp.c_fc.weight"][3, 4].fill_(torch.nan),
            "transformer.h.0.mlp.c_fc.weight holds NaN or Inf",
        ),
        (
            lambda t: t["transformer.ln_f.bias"][0].fill_(-torch.inf),
            "transformer.ln_f.bias holds NaN or Inf",
        ),
    ],
)
def test_wrong_weights_are_refused_by_name(saved, change, found):
    rewrite(saved, change)
    with pytest.raises(UserError, match=found):
        GPT.from_pretrained(saved)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + b"0" * 64
        + b"\nsize 548105171\n",
        (2**62).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"not json",
        b"\x80\x04\x95" + b"\x00" * 100,
        header(a=F32 | {"data_offsets": [0, 8]}),  # no data
        header(a=F32 | {"data_offsets": [0, 8]}, b=F32 | {"data_offsets": [4, 12]})
        + bytes(12),  # overlap
        header(a=F32 | {"data_offsets": [0, 8]}, b=F32 | {"data_offsets": [16, 24]})
        + bytes(24),  # hole
        header(a=F32 | {"data_offsets": [0, 8]}) + bytes(9),  # trailing bytes
    ],
    ids=[
        "empty",
        "short",
        "lfs",
        "huge",
        "no-json",
        "pickle",
        "no-data",
        "overlap",
        "hole",
        "trailing",
    ],
)
def test_a_bad_weight_file_is_refused_by_name(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="saved/model.safetensors: "):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin", "..", 3, None]
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


# ---------------------------------------------------------------------------------------------- hub

DROP = (
    10 * 2**20
)  # where the flaky repository hangs up: the client keeps only whole pieces of this size
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download needs of the hub; `server.root/<owner>/<name>` are its repositories."""

    protocol_version = "HTTP/1.1"

    def refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self, body: bool = False) -> None:
        repository, _, rest = self.path[1:].partition("/resolve/")
        file = self.server.root / repository / rest.partition("/")[2]
        owner = repository.partition("/")[0]
        self.server.requests.append(
            (self.command, repository, file.name, self.headers.get("Range"))
        )
        if owner == "captive":  # a portal that answers everything
            return self.refuse(200)
        if owner == "busy":
            return self.refuse(503)
        if owner == "gated" and self.headers.get("Authorization") != "Bearer sesame":
            return self.refuse(401, X_Error_Code="GatedRepo")
        if self.headers.get("Authorization") not in (None, "Bearer sesame"):
            return self.refuse(401, X_Error_Message="Invalid credentials in Authorization header")
        if not file.parent.is_dir():
            return self.refuse(401, X_Error_Code="RepoNotFound")
        if not file.exists():
            return self.refuse(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"' + hashlib.sha256(content).hexdigest() + '"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            drop = file.suffix == ".safetensors" and (
                owner == "broken" or (owner == "flaky" and not start)
            )
            self.wfile.write(
                content[start : start + DROP]
                if drop and owner == "flaky"
                else b""
                if drop
                else content[start:]
            )
            self.close_connection = drop

    def do_GET(self) -> None:
        self.do_HEAD(body=True)

    def log_message(self, *args) -> None:
        pass


LOADER = """
import hashlib, json, sys, time
time.sleep = lambda seconds: None  # the client waits between retries
from model import GPT
from support.script import UserError
for name in sys.argv[1:]:
    try:
        model = GPT.from_pretrained(name)
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        print(json.dumps([name + " revision", model.revision]))
        print(json.dumps([name, hashlib.sha256(weights).hexdigest()]))
    except UserError as error:
        print(json.dumps([name, str(error)]))
slow = {"transformers", "torch._dynamo", "huggingface_hub"}
print(json.dumps(["modules", sorted(slow & sys.modules.keys())]))
"""


def weight_hash(model: GPT) -> str:
    return hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    ).hexdigest()


def load_elsewhere(names: list[str], **env: str) -> dict[str, str]:
    """Weight hash or error of each name, loaded in a fresh process with these variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *names],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture
def hub(model, tmp_path):
    """A local hub with one small model in many states: the server, and its weights' hash."""
    from transformers import AutoModelForCausalLM

    root = tmp_path / "hub"
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=8, vocab_size=45_000)).save_pretrained(
        root / "flaky/single"
    )
    for name in (
        "plain/single",
        "broken/single",
        "gated/single",
        "other/llama",
        "other/pickle",
        "other/escape",
    ):
        model.save_pretrained(root / name)
    for name in ("pickle", "escape"):
        (root / "other" / name / "model.safetensors").rename(
            root / "other" / name / "pytorch_model.bin"
        )
    (root / "other/escape" / INDEX).write_text(
        json.dumps({"weight_map": {"wte.weight": "../../secret.safetensors"}})
    )
    (root / "other/llama/config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 4096})
    )
    AutoModelForCausalLM.from_pretrained(root / "plain/single").save_pretrained(
        root / "plain/sharded", max_shard_size="30KB"
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.requests = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, weight_hash(model)
    server.shutdown()
    server.server_close()


def test_the_real_client_on_a_local_hub(hub, tmp_path):
    server, weights = hub
    place = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    names = [
        "plain/single",
        "plain/sharded",
        "flaky/single",
        "broken/single",
        "gated/single",
        "other/llama",
        "other/pickle",
        "other/escape",
        "no/such",
        "captive/portal",
        "busy/hub",
        "no/hub/name",
        "plain/single",
    ]
    found = load_elsewhere(names, **place)
    for name in ("plain/single", "plain/sharded"):
        assert found[name] == weights, name
        assert found[name + " revision"] == COMMIT
    # Only the config and the weights were fetched. The second time the client only asked whether
    # they are still the newest. After a dropped connection only what was missing was fetched.
    assert [
        (method, file)
        for method, repository, file, _ in server.requests
        if repository == "plain/single"
    ] == [
        ("HEAD", "config.json"),
        ("GET", "config.json"),
        ("HEAD", "model.safetensors"),
        ("GET", "model.safetensors"),
        ("HEAD", "config.json"),
    ]
    assert found["flaky/single"] == weight_hash(GPT.from_pretrained(server.root / "flaky/single"))
    assert ("GET", "flaky/single", "model.safetensors", f"bytes={DROP}-") in server.requests
    assert not any(
        repository == "other/llama" and file != "config.json"
        for _, repository, file, _ in server.requests
    )
    for name, fault in {
        "broken/single": "RemoteProtocolError.*check the name, the connection",
        "gated/single": "gated.*accept its terms .* and set HF_TOKEN",
        "other/llama": "config.json: model_type is 'llama'",
        "other/pickle": "repository has no model.safetensors.index.json.*save_pretrained",
        "other/escape": "names the file '../../secret.safetensors'",
        "no/such": "no such directory, and on the hub no such model.*HF_TOKEN",
        "captive/portal": "FileMetadataError.*HF_ENDPOINT",
        "busy/hub": "503.*try again",
        "no/hub/name": "neither a directory nor a possible hub name",
    }.items():
        with pytest.raises(UserError, match=fault):
            raise UserError(f"{found[name]}; expected ; ")
        assert "\n" not in found[name]

    # The token is the client's. What is cached loads without a hub; what is not gives one line.
    assert load_elsewhere(["gated/single"], HF_TOKEN="sesame", **place)["gated/single"] == weights
    server.requests.clear()
    offline = load_elsewhere(
        ["plain/single", "plain/sharded", "no/such"], HF_HUB_OFFLINE="1", **place
    )
    assert offline["plain/single"] == offline["plain/sharded"] == weights and not server.requests
    assert (
        "not in the hub client's cache" in offline["no/such"]
        and "HF_HUB_OFFLINE" in offline["no/such"]
    )


def test_a_refused_connection_and_a_refused_token(hub, tmp_path):
    server, _ = hub
    place = {"HF_HOME": str(tmp_path / "home")}
    endpoint = f"http://127.0.0.1:{server.server_port}"
    assert (
        "the hub refused the token"
        in load_elsewhere(["plain/single"], HF_ENDPOINT=endpoint, HF_TOKEN="wrong", **place)[
            "plain/single"
        ]
    )
    assert (
        "the hub cannot be reached"
        in load_elsewhere(["plain/single"], HF_ENDPOINT="http://127.0.0.1:9", **place)[
            "plain/single"
        ]
    )


def test_a_password_in_the_endpoint_is_not_printed(hub, tmp_path):
    server, _ = hub
    endpoint = f"http://user:s3cret@127.0.0.1:{server.server_port}"
    found = load_elsewhere(["busy/hub"], HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"))
    assert "s3cret" not in found["busy/hub"]
    assert f"127.0.0.1:{server.server_port}" in found["busy/hub"]  # the rest of it is


def test_read_config_downloads_the_config_alone(hub, tmp_path):
    server, _ = hub
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    env["HF_HOME"] = str(tmp_path / "home")
    script = "from model import read_config; print(read_config('plain/single').n_embd)"
    output = subprocess.check_output([sys.executable, "-c", script], env=env, text=True)
    assert output == "32\n"
    requested = {file for _, name, file, _ in server.requests if name == "plain/single"}
    assert requested == {"config.json"}


def test_loading_imports_no_more_than_it_needs(saved):
    """The imports of any of these cost more than reading 124M parameters."""
    assert load_elsewhere([str(saved)])["modules"] == []
