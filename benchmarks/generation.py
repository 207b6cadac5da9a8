"""Subject `sample`: greedy decoding."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from harness import Case, Ready, Setting, random_tokens

from model import GPT


class Work(NamedTuple):
    """A round of decoding, the same for every contender."""

    setting: Setting
    folder: str  # the weights
    B: int  # sequences
    prompt: int  # tokens of each prompt
    new: int  # tokens generated after it


def warmed_up(work: Callable[[], torch.Tensor]) -> Ready:
    """The output is a second round's: a compiled decoder records its graphs in the first."""
    work()
    return Ready(work()[:4].cpu().numpy(), work)


def sample_ours(work: Work, prepared: bool) -> Ready:
    """prepared: as sample.py does for long texts, compiled on CUDA and packed on a CPU."""
    from sample import generate
    from support.runtime import pack_linears

    rt = work.setting.our_runtime()
    model = GPT.from_pretrained(work.folder).to(rt.device, rt.dtype)
    idx = random_tokens(work.B, work.prompt).to(rt.device)
    if prepared and work.setting.device == "cpu":
        pack_linears(model, work.B)
    compiled = prepared and work.setting.device == "cuda"
    return warmed_up(lambda: generate(model, idx, work.new, temperature=0, compiled=compiled))


def sample_transformers(work: Work, compiled: bool) -> Ready:
    """compiled: its static cache, and torch.compile for the step of one token."""
    from transformers import CompileConfig, GPT2LMHeadModel

    rt = work.setting.peer_runtime()
    model = GPT2LMHeadModel.from_pretrained(work.folder, dtype=rt.dtype).to(rt.device).eval()
    model.generation_config.eos_token_id = None
    idx = random_tokens(work.B, work.prompt).to(rt.device)
    options = {}
    if compiled:
        mode = "reduce-overhead" if work.setting.device == "cuda" else "default"
        compile_config = CompileConfig(mode=mode)
        compile_config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compile_config}

    def generate() -> torch.Tensor:
        return model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=work.new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    return warmed_up(generate)


def read_weights(work: Work) -> Ready:
    """The bound of decoding at batch 1: all weights are read once a token."""
    rt = work.setting.peer_runtime()
    model = GPT.from_pretrained(work.folder)
    size = model.num_parameters() * rt.dtype.itemsize
    buffer = torch.ones(size // 4, device=rt.device)
    return Ready(np.zeros((0, 0)), lambda: [buffer.sum() for _ in range(work.new)])


def sample(setting: Setting) -> Iterator[Case]:
    """Decoding with GPT-2 124M, one text and several at once."""
    # As initialised, a tied head likes the last token best whatever came before. Larger weights
    # make the text depend on the model.
    folder = setting.weights(scale=setting.size(4, 8))
    on_cuda = setting.device == "cuda"
    batches = (1, 256) if on_cuda else (1, 4)
    new = setting.size(128 if on_cuda else 64, 8)
    for B in batches:
        yield sample_case(Work(setting, folder, B, setting.size(32, 8), new))


def sample_case(work: Work, only_ours: bool = False) -> Case:
    dtype = work.setting.dtype
    on_cuda = work.setting.device == "cuda"
    contenders = {
        f"PyGPT2, {'compiled' if on_cuda else 'weights packed'}": (sample_ours, work, True),
        "PyGPT2": (sample_ours, work, False),
    }
    peers = {
        "transformers": (sample_transformers, work, False),
        "transformers, compiled, static cache": (sample_transformers, work, True),
    }
    if not only_ours:
        contenders |= peers
    if work.B == 1:
        contenders["bound: reading the weights once a token"] = (read_weights, work)
    reference = GPT.from_pretrained(work.folder)
    return Case(
        f"sample 124M, batch {work.B}, prompt {work.prompt}, {work.new} new tokens, greedy, "
        f"{dtype} weights",
        "tok",
        work.B * work.new,
        contenders,
        tolerance=0.1 if dtype == "bfloat16" else 1e-3,
        difference=lambda texts, _: regret(reference, texts, work.prompt),
        set_up_together=on_cuda,
    )


@torch.no_grad()
def regret(reference: GPT, texts: np.ndarray, prompt: int) -> np.ndarray:
    """How far each text's worst token is below the likeliest one, in nats, float64 (rows,).

    The float32 model judges, after the same tokens. Greedy texts cannot be compared with each
    other: in bfloat16 they part where two tokens are as likely.
    """
    if texts.size == 0:  # the bound generates nothing
        return np.zeros(1)
    rows = torch.from_numpy(texts)
    logits = reference(rows[:, :-1])[:, prompt - 1 :]  # (rows, new, V)
    chosen = logits.gather(-1, rows[:, prompt:, None])[..., 0]  # (rows, new)
    return (logits.amax(-1) - chosen).amax(1).numpy()
