"""HellaSwag: parity with lm-evaluation-harness and a plain scorer, ranks, batches, and faults."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tools import ROOT, SHARED

import hellaswag
from hellaswag import Item, download, evaluate, load_items
from model import GPT, GPTConfig, NextTokenLoss
from support.runtime import Runtime
from support.script import UserError
from tokens import get_encoding

CPU = Runtime(device=torch.device("cpu"), dtype=torch.float32)
TEXT = (
    "the a man woman dog quickly runs jumps over under water roof it's 12 Élan, naïve and then "
    "slowly paints wall. She [header] he"
)
WORDS = TEXT.split()


def make_items(n: int, longest: int = 40) -> list[Item]:
    """Items in the official schema, WikiHow's brackets and odd spaces included."""
    rng = np.random.default_rng(0)

    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    items = []
    for i in range(n):
        a, b = text(3, longest), text(1, 4) if i % 3 else ""
        if i % 4 == 0:
            a = f"[header] How to {a} [title] {text(2, 5)}. [step]"
        endings = tuple(
            text(1, 14) + (" [title] " + text(1, 5) if k == i % 5 else "") for k in range(4)
        )
        items.append(Item(f"{a} {b}".strip(), endings, int(rng.integers(4)), text(1, 3), a, b))
    return items


def write(items: list[Item], file: Path) -> Path:
    rows = [{"ind": i, "split": "val", **vars(item)} for i, item in enumerate(items)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tiny(vocab_size: int = 257, block_size: int = 1024, dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            n_layer=2,
            n_head=2,
            n_embd=32,
            block_size=block_size,
            vocab_size=vocab_size,
            dropout=dropout,
        )
    ).eval()
    # Predictions far from uniform, so that parity means something.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def plain(model: GPT, encoding, items: list[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Completion style, one ending at a time: sums and means of log-probabilities, (items, 4)."""
    sums, means = [], []
    for item in items:
        context = encoding.encode_ordinary(item.ctx)
        for ending in item.endings:
            tokens = encoding.encode_ordinary(" " + ending)
            whole = torch.tensor((context + tokens)[-(model.config.block_size + 1) :])
            loss = F.cross_entropy(model(whole[None, :-1])[0], whole[1:], reduction="none")[
                -len(tokens) :
            ]
            sums.append(-loss.sum().item())
            means.append(-loss.mean().item())
    return np.array(sums).reshape(-1, 4), np.array(means).reshape(-1, 4)


# ---------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    "block_size", [1024, 96]
)  # the second cuts contexts, differently for each ending
def test_completion_style_is_the_plain_scorer(block_size):
    model, items = tiny(block_size=block_size), make_items(12)
    result = evaluate(model, get_encoding("bytes"), items, "completion", CPU)
    sums, means = plain(model, get_encoding("bytes"), items)
    labels = [item.label for item in items]
    np.testing.assert_allclose(result.log_p, sums, atol=1e-3)
    np.testing.assert_allclose(result.log_p_norm, means, atol=1e-4)
    assert (result.acc, result.acc_norm) == (
        (sums.argmax(1) == labels).mean(),
        (means.argmax(1) == labels).mean(),
    )


def test_completion_style_on_real_items():
    file = SHARED / "data" / "hellaswag_val_sample.jsonl"
    items = load_items(file)[::20] if file.exists() else make_items(50)
    model = tiny(vocab_size=50257)
    result = evaluate(model, get_encoding("gpt2"), items, "completion", CPU)
    sums, means = plain(model, get_encoding("gpt2"), items)
    np.testing.assert_allclose(result.log_p, sums, atol=1e-3)
    assert (result.log_p.argmax(1) == sums.argmax(1)).all() and (
        result.log_p_norm.argmax(1) == means.argmax(1)
    ).all()


@pytest.mark.parametrize("block_size", [1024, 48])
def test_harness_style_is_lm_evaluation_harness(tmp_path, block_size):
    pytest.importorskip("lm_eval", reason="needs lm-eval[hf]")
    pytest.importorskip("accelerate", reason="needs lm-eval[hf]")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    from transformers import GPT2TokenizerFast

    model, items = tiny(vocab_size=50257, block_size=block_size), make_items(24)
    file = write(items, tmp_path / "items.jsonl")
    model.save_pretrained(tmp_path / "model", bos_token_id=50256, eos_token_id=50256)
    # tiktoken names its cached files by the address.
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(
            Path(os.environ["TIKTOKEN_CACHE_DIR"])
            / hashlib.sha1((base + theirs).encode()).hexdigest(),
            tmp_path / "model" / ours,
        )
    lm = HFLM(
        pretrained=str(tmp_path / "model"),
        tokenizer=GPT2TokenizerFast.from_pretrained(tmp_path / "model"),
        device="cpu",
        dtype="float32",
        batch_size=8,
    )
    task = ConfigurableTask(
        config={  # lm-eval's hellaswag.yaml, reading our file
            "task": "hellaswag",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": str(tmp_path)},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("acc", "acc_norm")
            ],
        }
    )
    theirs = harness(lm, {"hellaswag": task}, log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    log_p = np.array(
        [[resp[0] for resp in sample["filtered_resps"]] for sample in samples], dtype=float
    )

    result = evaluate(model, get_encoding("gpt2"), items, "harness", CPU)
    np.testing.assert_allclose(result.log_p, log_p, atol=1e-3)
    assert result.acc == theirs["results"]["hellaswag"]["acc,none"]
    assert result.acc_norm == theirs["results"]["hellaswag"]["acc_norm,none"]


# ---------------------------------------------------------------------------- ranks and batches


def test_batch_size_changes_no_score():
    model, items = tiny(), make_items(20)
    results = [
        evaluate(model, get_encoding("bytes"), items, rt=CPU, batch_tokens=n).log_p
        for n in (1, 1000, 10**6)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    np.testing.assert_allclose(results[0], results[2], atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_items_and_agree(tmp_path, world_size):
    """The command line under torchrun gives bit for bit what one process gives."""
    tiny().save_pretrained(tmp_path / "model")
    file = write(make_items(70), tmp_path / "items.jsonl")

    def run(launcher, name):
        command = [
            sys.executable,
            *launcher,
            "hellaswag.py",
            "--model",
            tmp_path / "model",
            "--data",
            file,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--show",
            "70",
            "--json",
            tmp_path / name,
        ]
        ran = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert ran.returncode == 0, ran.stderr
        scores = json.loads((tmp_path / name).read_text())
        return [line for line in ran.stdout.splitlines() if " sum " in line], {
            k: v for k, v in scores.items() if "seconds" not in k and "per_" not in k
        }

    alone = run([], "1.json")
    assert len(alone[0]) == 4 * 70 and alone[1]["items"] == 70
    assert (
        run(
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"],
            "n.json",
        )
        == alone
    )


def test_evaluation_leaves_compiled_training_alone():
    """Inside training: a compiled loss, dropout on, bfloat16.

    The scores are those of the model in eval mode. The gradients before and after are the same.
    """
    model, items = tiny(dropout=0.5), make_items(6)
    expected = evaluate(model.eval(), get_encoding("bytes"), items, rt=CPU).log_p
    model.train()
    loss = torch.compile(NextTokenLoss(model), backend="aot_eager")
    idx = torch.randint(257, (2, 16))

    def gradient():
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss(idx, idx).backward()
        return model.transformer.wte.weight.grad.clone()

    before = gradient()
    bf16 = evaluate(
        model, get_encoding("bytes"), items, rt=replace(CPU, dtype=torch.bfloat16)
    ).log_p
    fp32 = evaluate(model, get_encoding("bytes"), items, rt=CPU).log_p
    assert model.training and torch.equal(gradient(), before)
    assert np.array_equal(fp32, expected)
    assert 0 < abs(bf16 / expected - 1).max() < 0.1


def scoring_calls(monkeypatch, rank: int, world_size: int) -> list[str]:
    """What rank `rank` does in an evaluation: its calls of between_batches and its batches."""
    calls = []
    score = hellaswag.log_probabilities

    def log_probabilities(*args):
        calls.append("batch")
        return score(*args)

    monkeypatch.setattr(hellaswag, "log_probabilities", log_probabilities)
    rt = replace(CPU, rank=rank, world_size=world_size)
    monkeypatch.setattr(Runtime, "sum", lambda self, values: values)
    monkeypatch.setattr(Runtime, "gather", lambda self, value: [value])
    evaluate(
        tiny(),
        get_encoding("bytes"),
        make_items(7),
        rt=rt,
        batch_tokens=1,  # 7 batches
        between_batches=lambda: calls.append("between"),
    )
    monkeypatch.undo()
    return calls


def test_all_ranks_call_between_batches_equally_often_and_first(monkeypatch):
    round_ = ["between", "batch"]
    assert scoring_calls(monkeypatch, 0, 3) == 3 * round_
    assert scoring_calls(monkeypatch, 1, 3) == 2 * round_ + ["between"]
    assert scoring_calls(monkeypatch, 2, 3) == 2 * round_ + ["between"]


def test_an_evaluation_that_is_stopped_leaves_the_model_in_training():
    def stop():
        raise KeyboardInterrupt

    model = tiny().train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, get_encoding("bytes"), make_items(2), rt=CPU, between_batches=stop)
    assert model.training


def test_items_are_tokenised_once(monkeypatch):
    model, encoding, items = tiny(), get_encoding("bytes"), make_items(5)
    first = evaluate(model, encoding, items, rt=CPU).log_p
    monkeypatch.setattr(hellaswag, "tokenize_item", None)  # a second call of it would fail
    assert np.array_equal(evaluate(model, encoding, list(items), rt=CPU).log_p, first)


# ---------------------------------------------------------------------------- faults

GOOD = {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 1}


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        {**GOOD, "label": 4},
        {**GOOD, "label": True},
        {**GOOD, "endings": ["a", "b", "c"]},
        {**GOOD, "endings": ["a", "b", " ", "d"]},
        {**GOOD, "endings": "abcd"},
        {**GOOD, "label": 1.0},
        {**GOOD, "label": "1 "},
        {**GOOD, "label": None},
        {**GOOD, "label": [1]},
        {**GOOD, "ctx": ["A man"]},
        {**GOOD, "ctx": ""},
        {"endings": GOOD["endings"], "label": 1},
        b"\xff",
    ],
    ids=lambda bad: str(bad)[:60],
)
def test_bad_line_is_named(tmp_path, bad):
    line = (
        bad
        if isinstance(bad, bytes)
        else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    )
    (tmp_path / "items.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match="items.jsonl:2: "):
        load_items(tmp_path / "items.jsonl")


def test_an_ending_that_the_clean_up_empties_never_wins():
    item = Item("A man", ("[title]", "runs fast", "sits down", "[step] "), 0, "Sport", "A man", "")
    result = evaluate(tiny(), get_encoding("bytes"), [item], "harness", CPU)
    assert np.isfinite(result.log_p).all() and result.log_p_norm.argmax() in (1, 2)


def test_brackets_are_removed_within_lines_like_the_harness():
    text = "a [b\nc] d [e] [f [g] h\n] [i"
    assert hellaswag._clean(text) == re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def test_labels_may_be_strings(tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({**GOOD, "label": "2"}) + "\n")
    assert load_items(tmp_path / "items.jsonl")[0].label == 2


def test_command_line_faults_exit_2(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "items.jsonl").write_text(json.dumps(GOOD) + "\n")
    data = tmp_path / "run" / hellaswag.DATA
    data.parent.mkdir(parents=True)
    write(make_items(3), data)
    command = [
        sys.executable,
        ROOT / "hellaswag.py",
        "--model",
        tmp_path / "model",
        "--device",
        "cpu",
    ]
    for flags, words in [
        (["--data", tmp_path / "items.jsonl", "--style", "harness"], "--style completion"),
        ([], "damaged; expected the official 10,042 items"),
    ]:
        ran = subprocess.run(
            list(map(str, command + flags)), cwd=tmp_path / "run", capture_output=True, text=True
        )
        assert (
            ran.returncode == 2
            and words in ran.stderr.splitlines()[-1]
            and "Traceback" not in ran.stderr
        )


class Server(http.server.BaseHTTPRequestHandler):
    """Serves /good, and the faults of a download by their names."""

    body = json.dumps(GOOD).encode() * 50000
    asked = 0

    def do_GET(self):
        Server.asked += 1
        kind = self.path.strip("/")
        if kind == "moody" and Server.asked == 1:
            kind = "503"
        body = b"<html>not found</html>" if kind in ("404", "html", "503") else self.body
        self.send_response(int(kind) if kind.isdigit() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(
            body[:1000]
            if kind == "short"
            else body.replace(b"man", b"mam")
            if kind == "corrupt"
            else body
        )

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    Server.asked = 0
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(Server.body).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda file, kind, retries=1: download(
            file, f"http://127.0.0.1:{server.server_port}/{kind}", retries
        )
        server.shutdown()


@pytest.mark.parametrize(
    "kind, attempts", [("404", 1), ("html", 1), ("corrupt", 1), ("short", 1), ("503", 2)]
)
def test_bad_download_leaves_nothing(tmp_path, server, kind, attempts):
    with pytest.raises(UserError, match="127.0.0.1"):
        server(tmp_path / "val.jsonl", kind)
    assert list(tmp_path.iterdir()) == [] and Server.asked == attempts


def test_download_survives_a_moody_server_and_company(tmp_path, server):
    file = tmp_path / "data" / "val.jsonl"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: server(file, "moody"), range(4)))
    assert (
        [f.name for f in file.parent.iterdir()] == ["val.jsonl"]
        and file.read_bytes() == Server.body
        and Server.asked == 5
    )


def test_training_goes_on_without_data_and_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        hellaswag.download,
        "__defaults__",
        (hellaswag.DATA, "http://127.0.0.1:9/", 4),
    )
    assert hellaswag.find_items(CPU) is None
    assert capsys.readouterr().out.count("\n") == 1


def test_progress_says_items_and_accuracy(capsys):
    items = make_items(6)
    evaluate(tiny(), get_encoding("bytes"), items, rt=CPU, progress=True, batch_tokens=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"batch 1/6  1 items, acc_norm (0|100)\.00", line)


@pytest.mark.parametrize("name", ["", "missing/result.json"])
def test_a_place_for_the_result_that_cannot_be_written_is_known_before(tmp_path, name):
    with pytest.raises(UserError, match="expected a file in a folder that is there"):
        hellaswag.Config(json=tmp_path / name)
