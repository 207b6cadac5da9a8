"""Hugging Face's format in and out: round trips with transformers, refusals, and the real hub client on a local server."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import UserError
from model import GPT, INDEX, GPTConfig
from tokens import get_encoding, save_tokenizer

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


# ---------------------------------------------------------------------------------------------------- transformers


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


def test_trains_on(saved):
    model = GPT.from_pretrained(saved, dropout=0.1)
    assert (
        not model.training
        and model.config.dropout == 0.1
        and all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    )


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


def test_bytes_have_no_tokenizer_files(tmp_path):
    save_tokenizer(get_encoding("bytes"), tmp_path)
    assert not list(tmp_path.iterdir())


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


# ---------------------------------------------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------------------------------------------- hub

DROP = (
    10 * 2**20
)  # where the flaky repository hangs up: the client keeps only whole pieces of this size
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that a download needs; `server.root/<owner>/<name>` are its repositories."""

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
from cli import UserError
for name in sys.argv[1:]:
    try:
        weights = b"".join(p.detach().numpy().tobytes() for p in GPT.from_pretrained(name).parameters())
        print(json.dumps([name, hashlib.sha256(weights).hexdigest()]))
    except UserError as error:
        print(json.dumps([name, str(error)]))
print(json.dumps(["modules", sorted({"transformers", "torch._dynamo", "huggingface_hub"} & sys.modules.keys())]))
"""


def weight_hash(model: GPT) -> str:
    return hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    ).hexdigest()


def load_elsewhere(names: list[str], **env: str) -> dict[str, str]:
    """Weight hash or error of each name, loaded one after the other in a fresh process with these variables."""
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
    """A local hub with the same small model in many states; yields the server and the hash of its weights."""
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
    # What was fetched: nothing but the config and the weights, the second time only the question whether they are still
    # the newest; after a dropped connection only what was still missing.
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
            raise UserError(found[name], expected="", remedy="")
        assert "\n" not in found[name]

    # The token is the client's; what is cached loads without a hub; what is not gives one clear line.
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
        "ConnectError"
        in load_elsewhere(["plain/single"], HF_ENDPOINT="http://127.0.0.1:9", **place)[
            "plain/single"
        ]
    )


def test_loading_imports_no_more_than_it_needs(saved):
    """The imports of any of these cost more than reading 124M parameters."""
    assert load_elsewhere([str(saved)])["modules"] == []
