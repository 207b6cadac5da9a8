"""Sampling: decoding with and without cache, distributions, stopping, text, the command line."""

import copy
import itertools
import os
import subprocess

import pytest
import torch
from tools import command, run_python, save_tiny_model, sharpen

import sample
from model import GPT, GPTConfig
from sample import (
    SampleConfig,
    encode_prompt,
    generate,
    last_logits,
    next_token,
    sample_text,
    stream_text,
)
from support.runtime import pack_linears
from support.script import UserError
from tokens import get_encoding

SHAPES = [
    GPTConfig(2, 2, 16, 24, 97),
    GPTConfig(1, 1, 8, 7, 33),
    GPTConfig(3, 4, 32, 64, 257),
    GPTConfig(2, 5, 40, 16, 131),
]


def wide(config: GPTConfig) -> GPT:
    return sharpen(GPT(config))


@torch.no_grad()
def greedy_uncached(model: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """The documented rule: past block_size tokens, go on from the last block_size // 2 of them."""
    start, block_size = 0, model.config.block_size
    for _ in range(n):
        if idx.size(1) - start > block_size:
            start = idx.size(1) - max(1, block_size // 2)
        idx = torch.cat([idx, model(idx[:, start:])[:, -1].argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.learning
@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_greedy_with_cache_equals_without_cache_and_transformers(config, tmp_path):
    from transformers import GPT2LMHeadModel

    model = wide(config)
    idx = torch.randint(config.vocab_size, (3, 3))
    n = config.block_size - 3
    ours = generate(model, idx, n, temperature=0)
    assert torch.equal(ours, greedy_uncached(model, idx, n))
    model.save_pretrained(tmp_path)
    peer = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs = peer.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [1, 6, 7, 8, 9, 40])
@pytest.mark.parametrize("config", SHAPES[:2] + [GPTConfig(1, 1, 8, 1, 33)], ids=str)
def test_past_the_context_the_last_half_is_read_again(config, length):
    model = wide(config)
    idx = torch.randint(config.vocab_size, (2, length))
    n = 3 * config.block_size + 2
    out = generate(model, idx, n, temperature=0)
    assert out.shape == (2, length + n) and torch.equal(out[:, :length], idx)
    assert torch.equal(out, greedy_uncached(model, idx, n))


def plain_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """Temperature, top-k and top-p by their definitions, one number at a time."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).exp().tolist()
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    total = sum(weights[i] for i in order)
    if top_p is not None:
        reached = itertools.accumulate(weights[i] / total for i in order)
        order = order[: 1 + sum(r < top_p for r in reached)]
        total = sum(weights[i] for i in order)
    return [weights[i] / total if i in order else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, None),
        (0.5, None, None),
        (2.0, None, None),
        (1.0, 1, None),
        (1.0, 5, None),
        (0.7, 100, None),
        (1.0, None, 0.8),
        (1.0, None, 1e-9),
        (1.0, None, 1.0),
        (1.5, None, 0.95),
        (1.3, 6, 0.7),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits, n = torch.randn(12) * 2, 50_000
    expected = torch.tensor(
        plain_probabilities(logits.tolist(), temperature, top_k, top_p), dtype=torch.float64
    )
    draws = next_token(
        logits.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(1)
    )
    seen = torch.bincount(draws.flatten(), minlength=12) / n
    assert torch.equal(seen > 0, (expected > 0) & (seen > 0))  # nothing outside the support
    deviation = (seen - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp_min(1e-9)
    assert deviation.max() < 4.5


def test_the_seed_decides_the_text_and_rows_differ():
    model, idx = wide(SHAPES[2]), torch.zeros(4, 1, dtype=torch.long)
    a, b, c = (
        generate(model, idx, 30, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({tuple(row) for row in a.tolist()}) == 4


def test_a_stopped_row_is_filled_and_the_others_go_on():
    model, idx = wide(SHAPES[2]), torch.randint(257, (6, 4))
    free = generate(model, idx, 20, temperature=0)
    stop = int(free[0, 7])
    out = generate(model, idx, 20, temperature=0, stop_token=stop)
    for row, unstopped in zip(out[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = unstopped.index(stop) if stop in unstopped else 20
        assert row == unstopped[:end] + [stop] * (20 - end)


def test_generation_ends_when_all_rows_have_stopped(monkeypatch):
    model, idx = wide(SHAPES[2]), torch.randint(257, (1, 4))
    stop = int(generate(model, idx, 1, temperature=0)[0, -1])
    calls = []
    monkeypatch.setattr(model, "head", lambda x: calls.append(1) or GPT.head(model, x))
    out = generate(model, idx, 50, temperature=0, stop_token=stop)
    assert out[0, 4:].tolist() == [stop] * 50 and len(calls) == 1


def test_a_model_in_training_generates_without_dropout_and_stays_in_training():
    model, idx = wide(GPTConfig(2, 2, 16, 24, 97, dropout=0.5)), torch.randint(97, (1, 4))
    expected = generate(model, idx, 10, temperature=0)
    assert torch.equal(generate(model.train(), idx, 10, temperature=0), expected) and model.training


def test_autocast_applies_to_what_the_model_reads(monkeypatch):
    model, idx = wide(SHAPES[0]), torch.randint(97, (2, 4))
    dtypes = []

    def head(x):
        logits = GPT.head(model, x)
        dtypes.append(logits.dtype)
        return logits

    monkeypatch.setattr(model, "head", head)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, idx, 3, temperature=0)
    generate(model, idx, 1, temperature=0)
    assert dtypes == 3 * [torch.bfloat16] + [torch.float32]


def saying(monkeypatch, ids: list[int], vocab_size: int) -> GPT:
    """A model that says `ids` whatever it reads."""
    model, script = GPT(GPTConfig(1, 1, 8, 64, vocab_size)).eval(), iter(ids)
    monkeypatch.setattr(
        model,
        "head",
        lambda x: torch.full((len(x), vocab_size), -50.0).index_fill_(
            1, torch.tensor([next(script)]), 50.0
        ),
    )
    return model


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_streamed_text_is_the_text_and_never_cuts_a_character(monkeypatch, name):
    encoding = get_encoding(name)
    text = "naïve 日本語 🦜🌍 end"
    ids = [*encoding.encode_ordinary(text), encoding.eot_token, *encoding.encode_ordinary("unseen")]
    assert any("�" in encoding.decode([i]) for i in ids)  # the test is about cut characters
    pieces = list(stream_text(saying(monkeypatch, ids, encoding.n_vocab), encoding, "> ", 60))
    assert "".join(pieces) == text and len(pieces) > 5
    assert sample_text(saying(monkeypatch, ids, encoding.n_vocab), encoding, "> ", 1, 60) == [
        "> " + text
    ]


def test_invalid_utf8_streams_as_it_is_sampled():
    model, encoding = wide(GPTConfig(1, 2, 16, 64, 257)), get_encoding("bytes")
    streamed = "".join(
        stream_text(model, encoding, "é", 100, generator=torch.Generator().manual_seed(5))
    )
    assert ["é" + streamed] == sample_text(
        model, encoding, "é", 1, 100, generator=torch.Generator().manual_seed(5)
    )
    assert "�" in streamed


def test_ids_outside_the_encoding_are_never_drawn():
    model, encoding = wide(GPTConfig(1, 2, 16, 64, 400)), get_encoding("bytes")
    assert (
        len(sample_text(model, encoding, "", 20, 50)) == 20
    )  # decoding raises on an id it does not have
    idx = torch.zeros(50, 1, dtype=torch.long)
    assert generate(model, idx, 20, vocab_size=257).max() < 257 <= generate(model, idx, 20).max()


def test_an_empty_prompt_is_a_new_document():
    model, encoding = wide(SHAPES[2]), get_encoding("bytes")
    assert encode_prompt(model, encoding, "", 2).tolist() == [[256], [256]]
    assert encode_prompt(model, encoding, "<|endoftext|>", 1).tolist() == [
        list(b"<|endoftext|>")
    ]  # a literal one is text


def test_a_prompt_that_is_not_utf8_becomes_replacement_characters():
    assert encode_prompt(wide(SHAPES[2]), get_encoding("bytes"), "a\udcff", 1).tolist() == [
        list("a�".encode())
    ]


@pytest.mark.parametrize(
    "flag, value",
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("num_samples", 0),
        ("max_new_tokens", 0),
        ("seed", 2**63),
    ],
)
def test_bad_flags_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')} {value}: expected "):
        SampleConfig(**{flag: value})


def test_two_sources_of_a_prompt_are_refused():
    with pytest.raises(UserError, match="only one of --prompt, --prompt-file"):
        SampleConfig(prompt="a", prompt_file="b")


def command_line(*args: str) -> subprocess.CompletedProcess:
    return run_python("sample.py", "--device", "cpu", *args)


def test_command_line(tmp_path):
    wide(SHAPES[2]).save_pretrained(tmp_path, encoding="bytes")
    one = command_line("--model", str(tmp_path), "--prompt", "def f", "--max-new-tokens", "20")
    assert one.returncode == 0 and one.stdout.startswith("def f") and str(tmp_path) in one.stderr, (
        one.stderr
    )
    two = command_line(
        "--model",
        str(tmp_path),
        "--num-samples",
        "2",
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        "--top-k",
        "None",
    )
    assert two.returncode == 0 and two.stdout.count("--- sample") == 2, two.stderr
    bad = command_line("--model", str(tmp_path), "--top-p", "2")
    assert (
        bad.returncode == 2
        and bad.stderr.splitlines()[-1].startswith("error: --top-p 2.0: expected ")
        and "Traceback" not in bad.stderr
    )


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"),
    reason="this CPU does not multiply bfloat16",
)
@torch.no_grad()
def test_packed_weights_compute_the_same():
    model, idx = wide(SHAPES[2]).bfloat16(), torch.randint(257, (3, 5))
    packed = copy.deepcopy(model)
    assert pack_linears(packed, rows=3)
    torch.testing.assert_close(packed(idx), model(idx), rtol=0.02, atol=0.05)
    out = generate(packed, idx, 50, temperature=0)
    logits = model(out)[
        :, 4:-1
    ].float()  # what the plain model thinks of each token that the packed one chose
    assert (
        (logits.max(-1).values - logits.gather(-1, out[:, 5:, None])[..., 0]).max()
        < 0.3
        < logits.std()
    )


def test_packing_leaves_a_float32_model_alone():
    model = wide(SHAPES[0])
    assert (
        not pack_linears(model, rows=1) and type(model.transformer.h[0].mlp.c_fc) is torch.nn.Linear
    )


def test_the_compiled_step_is_one_graph_for_all_positions_and_lengths(monkeypatch):
    graphs = []
    step = torch.compile(
        last_logits,
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
        fullgraph=True,
        dynamic=False,
    )
    monkeypatch.setattr(sample, "compiled_read", lambda: step)
    model, idx = wide(SHAPES[0]), torch.randint(97, (2, 5))
    for n in (60, 60, *range(1, 12)):  # more lengths than torch compiles one function for
        ours = generate(model, idx, n, temperature=0, compiled=True)
        assert torch.equal(ours, greedy_uncached(model, idx, n))
    assert len(graphs) == 1


def test_command_line_accepts_a_prompt_of_bytes_that_are_not_utf8(tmp_path):
    save_tiny_model(tmp_path)
    args = ["--model", tmp_path, "--device", "cpu", "--max-new-tokens", 2, "--prompt"]
    ran = subprocess.run([*command("sample.py", *args), b"a\xff"], capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(b"a\\udcff")


def test_a_prompt_longer_than_the_context_continues_from_its_last_half(tmp_path):
    save_tiny_model(tmp_path, block_size=16)
    args = ["--model", str(tmp_path), "--temperature", "0", "--max-new-tokens", "8", "--prompt"]
    long_prompt = "".join(chr(97 + i % 26) for i in range(100))
    whole = command_line(*args, long_prompt)
    half = command_line(*args, long_prompt[-8:])
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout == long_prompt[:-8] + half.stdout
    assert "prompt of 100 tokens, context of 16: only its last 8 are read" in whole.stderr
    assert "only its last" not in half.stderr


@pytest.mark.parametrize("name", ["prompt.txt", "-"])
def test_a_prompt_comes_from_a_file_or_a_pipe_as_it_is(tmp_path, name):
    save_tiny_model(tmp_path / "model")
    text = "naïve\n  two lines\n"
    (tmp_path / "prompt.txt").write_text(text)
    args = ["--model", tmp_path / "model", "--device", "cpu", "--max-new-tokens", 8]
    expected = run_python("sample.py", *args, "--prompt", text)
    ran = run_python("sample.py", *args, "--prompt-file", name, cwd=tmp_path, input=text)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == expected.stdout and ran.stdout.startswith(text)


def test_a_prompt_file_that_is_missing_is_said_before_a_model_is_loaded(tmp_path):
    ran = command_line("--model", "runs/none", "--prompt-file", str(tmp_path / "none.txt"))
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert "none.txt: cannot be read (No such file" in line and "or - for stdin" in line


def test_each_line_is_continued_until_the_input_ends(tmp_path):
    save_tiny_model(tmp_path)
    args = ["--model", tmp_path, "--device", "cpu", "--max-new-tokens", 8, "--temperature", 0]
    ran = run_python("sample.py", *args, "--interactive", input="def f\nimport \n")
    assert ran.returncode == 0, ran.stderr
    expected = []
    for line in ("def f", "import "):
        expected.append(run_python("sample.py", *args, "--prompt", line).stdout[len(line) :])
    assert ran.stdout == "".join(expected)


def test_on_a_terminal_a_sign_asks_for_each_line(tmp_path):
    save_tiny_model(tmp_path)
    args = ["--model", tmp_path, "--device", "cpu", "--max-new-tokens", 1, "--temperature", 0]
    parent, child = os.openpty()
    os.write(parent, b"def f\n\x04")
    with subprocess.Popen(
        command("sample.py", *args, "--interactive"),
        stdin=child,
        stdout=child,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.wait() == 0
    _, _, on_terminal = os.read(parent, 10_000).partition(b"def f\r\n")
    os.close(parent)
    os.close(child)
    assert on_terminal.startswith(b"> ") and on_terminal.endswith(b"\r\n> \r\n")


@pytest.mark.parametrize("num_samples", [1, 2])
def test_sampled_text_is_escaped_on_a_terminal_only(tmp_path, num_samples):
    save_tiny_model(tmp_path)
    args = ["--model", tmp_path, "--device", "cpu", "--max-new-tokens", 1]
    args += ["--num-samples", num_samples, "--prompt", "\x1b[2J"]
    parent, child = os.openpty()
    with subprocess.Popen(
        command("sample.py", *args), stdout=child, stderr=subprocess.DEVNULL
    ) as process:
        assert process.wait() == 0
    on_terminal = os.read(parent, 10_000)
    os.close(parent)
    os.close(child)
    assert b"\\x1b[2J" in on_terminal and b"\x1b" not in on_terminal
    piped = run_python("sample.py", *args)
    assert "\x1b[2J" in piped.stdout
