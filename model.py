"""GPT-2: the network, its KV cache, its loss, and Hugging Face's file format in and out.

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, section 2.3), OpenAI's released code for what
the paper leaves out, and "Language Models are Few-Shot Learners" (GPT-3, table 2.1).

Shapes: B batch, T time, S cached time, C = n_embd channels, H = n_head heads, D = C // H head size, V = vocab_size.
"""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli import UserError


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257
    dropout: float = 0.0  # on embeddings, attention weights and residual branches

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd {self.n_embd} with n_head {self.n_head}",
                expected="n_embd divisible by n_head",
                remedy="change one of them",
            )


# GPT-2 paper, table 2; the released models count 124M, 355M, 774M and 1558M parameters.
SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class KVCache:
    """Keys and values of every layer, allocated once for `length` tokens.

    `position` counts the tokens stored so far. It is a tensor, so that a compiled one-token step sees the same graph
    at every position. `seen` bounds what attention reads: whoever knows the position on the host may lower it to the
    tokens that are there, including those of the next call, and spare attention the empty rest.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.k, self.v = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
            for _ in range(2)
        )  # (B, H, S, D)
        self.position = torch.zeros((), device=device, dtype=torch.long)
        self.seen = length

    def positions(self, T: int) -> torch.Tensor:
        """Positions of the next T tokens, (T,)."""
        return self.position + torch.arange(T, device=self.position.device)

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, H, T, D) of the next T tokens; return what attention reads, (B, H, seen, D) in the cache's dtype."""
        positions = self.positions(k.size(2))
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept.index_copy_(2, positions, new.to(kept.dtype))
        return self.k[layer][:, :, : self.seen], self.v[layer][:, :, : self.seen]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
            q = q.to(k.dtype)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        y = (
            y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)
        )  # changes only what a cache of another dtype gave
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # GPT-2's GELU is the tanh approximation, not the exact one.
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Pre-norm residual block (GPT-2 section 2.3: layer norm moved to the input of each sub-block)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. Parameters carry Hugging Face's names; linears are stored [out, in]; the head re-uses `wte.weight`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                # Not nn.Embedding(...): on the meta device its own initialisation imports two seconds' worth of modules.
                "wte": nn.Embedding.from_pretrained(
                    torch.empty(config.vocab_size, config.n_embd), freeze=False
                ),
                "wpe": nn.Embedding.from_pretrained(
                    torch.empty(config.block_size, config.n_embd), freeze=False
                ),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        if self.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights of 0.02, positions of 0.01 (OpenAI's source), biases 0, and the two projections that write
        into the residual stream scaled by 1/sqrt(2 n_layer), the number of residual branches (GPT-2 section 2.3)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                std = (
                    residual_std
                    if name.endswith("c_proj.weight")
                    else 0.01
                    if name.endswith("wpe.weight")
                    else 0.02
                )
                parameter.normal_(0.0, std)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Final normed hidden states (B, T, C) of tokens idx (B, T).

        positions: (T,) or (B, T), default 0 … T-1. mask: bool, True where a query (row) sees a key (column),
        broadcastable to (B, H, T, S); default causal. With a cache, idx continues the tokens already in it.
        """
        T = idx.size(1)
        if cache is not None:
            positions = cache.positions(T)
            mask = torch.arange(cache.seen, device=idx.device) <= positions[:, None]  # (T, S)
        elif positions is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}")
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(
            self.transformer.wte(idx) + self.transformer.wpe(positions)
        )  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.position += T
        return self.transformer.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) of hidden states (…, C)."""
        return F.linear(x, self.transformer.wte.weight)

    def forward(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits (B, T, V) for tokens idx (B, T), int64."""
        return self.head(self.hidden(idx, cache=cache))

    def crop_context(self, block_size: int) -> None:
        """Shorten the context by dropping the last positions."""
        if block_size > self.config.block_size:
            raise UserError(
                f"a context of {block_size} tokens",
                expected=f"at most {self.config.block_size}, the positions the model has learned",
                remedy="lower --seq-len",
            )
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        self.transformer.wpe = nn.Embedding.from_pretrained(
            wpe.weight.detach()[:block_size].clone(), freeze=False
        )

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike, dropout: float = 0.0) -> "GPT":
        """GPT-2 from a local Hugging Face directory or a hub name such as `gpt2`, in float32, in eval mode.

        Raises UserError for a name that cannot be fetched, a config that is not plain GPT-2, and for missing,
        misshapen or non-finite weights.
        """
        folder = Path(name_or_dir)
        if folder.is_file():
            raise UserError(
                f"{folder}: a file",
                expected="a directory with config.json and model.safetensors",
                remedy="name the directory",
            )
        if not folder.is_dir():
            folder = _download(str(name_or_dir))
        config = _read_config(folder / "config.json", dropout)
        with torch.device("meta"):
            model = cls(config)
        state = {}
        for file in _weight_files(folder):
            state |= _read_weights(file)
        head = state.pop("lm_head.weight", None)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        found = {name: tensor.shape for name, tensor in state.items()}
        if wanted != found:
            wrong = sorted(
                name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
            )[0]
            raise UserError(
                f"{folder}: {wrong} has shape {_shape(found.get(wrong))}",
                expected=_shape(wanted.get(wrong)),
                remedy="use weights that belong to this config.json",
            )
        if head is not None and not torch.equal(head, state["transformer.wte.weight"]):
            raise UserError(
                f"{folder}: lm_head.weight is not wte.weight",
                expected="GPT-2's tied head",
                remedy="only plain GPT-2 can be loaded",
            )
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(True).eval()

    def save_pretrained(self, folder: str | os.PathLike, **extra_config) -> None:
        """Write config.json, generation_config.json and model.safetensors, which transformers loads unchanged.

        `extra_config` adds keys to config.json (encoding, bos_token_id, eos_token_id).
        """
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_embd": c.n_embd,
            "n_positions": c.block_size,
            "n_ctx": c.block_size,
            "vocab_size": c.vocab_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "resid_pdrop": c.dropout,
            "tie_word_embeddings": True,
            "dtype": "float32",
            **extra_config,
        }
        generation = {
            key: extra_config[key]
            for key in ("bos_token_id", "eos_token_id")
            if key in extra_config
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        state = {
            name: (p.t() if name.endswith(TRANSPOSED) else p).detach().float().cpu().contiguous()
            for name, p in self.named_parameters()
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(
            folder / "config.json", folder / "model.safetensors"
        )  # safetensors lets only the owner read it


# Hugging Face's GPT-2 stores these four as [in, out] ("Conv1D"), the transpose of nn.Linear.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Options of Hugging Face's GPT2Config that change the function computed, with the values that are plain GPT-2.
PLAIN_GPT2 = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}

# Our fields: their keys.
SIZE_KEYS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}

INDEX = "model.safetensors.index.json"
CONVERT = (
    "for pickled weights convert them once where you trust them: "
    "transformers' AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder), then name the folder"
)


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else "×".join(map(str, shape))


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        fault = f"a {type(values).__name__}"
    except FileNotFoundError:
        raise UserError(
            f"{file}: not there",
            expected="a Hugging Face GPT-2 directory",
            remedy="check the path or the hub name",
        ) from None
    except ValueError as error:
        fault = str(error)
    raise UserError(f"{file}: {fault}", expected="a JSON object", remedy="fetch the file again")


def _read_config(file: Path, dropout: float) -> GPTConfig:
    values = _read_json(file)

    def refuse(key: str, expected: str):
        raise UserError(
            f"{file}: {key} is {values.get(key)!r}",
            expected=expected,
            remedy="only plain GPT-2 can be loaded",
        )

    for key, good in PLAIN_GPT2.items():
        if values.get(key, good[0]) not in good:
            refuse(key, " or ".join(map(repr, good)))
    for key in SIZE_KEYS.values():
        if type(values.get(key)) is not int or values[key] < 1:
            refuse(key, "a positive integer")
    if values.get("n_inner") not in (None, 4 * values["n_embd"]):
        refuse("n_inner", f"null or {4 * values['n_embd']}")
    return GPTConfig(
        **{ours: values[theirs] for ours, theirs in SIZE_KEYS.items()}, dropout=dropout
    )


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that model.safetensors.index.json names."""
    index = folder / INDEX
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    weight_map = _read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        # An index must neither lead out of its folder nor to a pickle.
        if (
            not isinstance(name, str)
            or os.path.basename(name) != name
            or not name.endswith(".safetensors")
        ):
            raise UserError(
                f"{index}: names the file {name!r}",
                expected="names of safetensors files beside it",
                remedy="use a checkpoint from a source you trust",
            )
    return [folder / name for name in sorted(set(names))]


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    """One safetensors file in float32 under our names: with prefix, linears [out, in], without causal masks."""
    try:
        raw = load_file(file)  # maps the file: it is read below
    except FileNotFoundError:
        raise UserError(
            f"{file}: not there", expected="weights as safetensors", remedy=CONVERT
        ) from None
    except SafetensorError as error:
        raise UserError(
            f"{file}: {error}",
            expected="a safetensors file",
            remedy="fetch the file again (a Git LFS pointer is not the weights)",
        ) from None

    def convert(name: str) -> tuple[str, torch.Tensor]:
        tensor = raw[name].float()
        if (
            tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all()
        ):  # 40 times as fast as isfinite(tensor)
            raise UserError(
                f"{file}: {name} holds NaN or Inf",
                expected="finite weights",
                remedy="use another checkpoint",
            )
        if name.endswith(TRANSPOSED):
            tensor = tensor.transpose(0, -1).contiguous()
        return name if name.startswith(
            ("transformer.", "lm_head.")
        ) else f"transformer.{name}", tensor

    # Older files carry the causal mask, which is no parameter.
    names = [name for name in raw if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    with ThreadPoolExecutor(
        4
    ) as pool:  # most of the time goes into page faults, which threads share
        return dict(pool.map(convert, names))


def _download(name: str) -> Path:
    """Fetch the config and, if it is plain GPT-2, the safetensors of a hub repository; return their folder.

    The hub's own client does it, with its cache (HF_HOME), mirrors (HF_ENDPOINT), tokens (HF_TOKEN), offline mode
    (HF_HUB_OFFLINE), retries and resumption.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        config = Path(hf_hub_download(name, "config.json"))
        _read_config(config, 0.0)
        folder, revision = (
            config.parent,
            config.parent.name,
        )  # all files of one commit, even if the branch moves meanwhile
        try:
            hf_hub_download(name, "model.safetensors", revision=revision)
        except EntryNotFoundError:
            hf_hub_download(name, INDEX, revision=revision)
            for file in _weight_files(folder):
                hf_hub_download(name, file.name, revision=revision)
        return folder
    except (
        HTTPError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError is what its Rust extension raises
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's fault, which it names
        found, remedy = _download_fault(error)
        raise UserError(
            f"{name}: {found}",
            expected="a local directory, or a GPT-2 with safetensors weights on the hub",
            remedy=remedy,
        ) from None


def _download_fault(error: Exception) -> tuple[str, str]:
    """What went wrong in the hub client, and the remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return "neither a directory nor a possible hub name", "check the path"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the hub's repository has no {str(error.response.url).rpartition('/')[2]}", CONVERT
    if isinstance(error, GatedRepoError):
        return "gated", "accept its terms on its hub page and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "no such directory, and on the hub no such model that you may see",
            "check the name, or set HF_TOKEN if it is private",
        )
    cause = (
        error.__cause__ or error
    )  # the client wraps connection faults once it has found nothing in its cache
    if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
        return "the hub refused the token", "check HF_TOKEN"
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return (
        f"no such directory, not in the hub client's cache, and not to be had from the hub ({reason})",
        "check the name, the connection, HF_ENDPOINT and HF_HUB_OFFLINE, then try again",
    )


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, float32: what DDP wraps and torch.compile compiles.

    DDP synchronises only what its own forward computed, so the loss is a module's forward, not a method beside it.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """idx, targets: int64 (B, T); returns a scalar in nats per token."""
        x = self.model.hidden(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return LinearCrossEntropy.apply(
            x.flatten(0, 1),
            self.model.transformer.wte.weight,
            targets.flatten(),
            torch.is_grad_enabled(),
        )


LOSS_ROWS = {
    "cpu": 512,
    "cuda": 8192,
    "mps": 4096,
}  # a chunk of the loss: larger gains nothing, smaller starves the matrix units
LOSS_ALIGNMENT = 64  # rows of zeros keep matrix units aligned (50257 is odd), 5% of a training step on a CPU; they never leave the loss


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, a chunk of rows at a time.

    The logits of a whole batch are the largest tensor of a GPT-2 by far (V = 50257 against C = 768) and are never
    needed at once: each chunk's logits give its share of the loss and, in the same pass, of both gradients, and are
    dropped. Softmax and loss are float32, products in x's dtype, the weight gradient is summed in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, needs_grad):
        """x (N, C), weight (V, C), targets (N,)."""
        N, V = x.size(0), weight.size(0)
        padding = -V % LOSS_ALIGNMENT
        w = weight.to(x.dtype)
        if padding:
            w = F.pad(w, (0, 0, 0, padding))
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        dx = torch.empty_like(x) if needs_grad else None
        dw = torch.zeros(w.shape, device=x.device, dtype=torch.float32) if needs_grad else None
        chunk = LOSS_ROWS[x.device.type]
        for start in range(0, N, chunk):
            rows, target = (
                x[start : start + chunk],
                targets[start : start + chunk, None],
            )  # (n, C), (n, 1)
            logits = rows @ w.t()  # (n, V + padding)
            if padding:
                logits[:, V:] = -torch.inf
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            loss -= log_p.gather(1, target).sum()
            if needs_grad:
                d_logits = (
                    log_p.exp_()
                    .scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
                    .to(x.dtype)
                )
                dx[start : start + chunk] = d_logits @ w
                dw += d_logits.t() @ rows
            logits = log_p = d_logits = None  # gone before the next chunk's are made
        ctx.save_for_backward(dx, dw[:V] if needs_grad else None)
        return loss / N

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / dx.size(0)
        return dx * scale, dw * scale, None, None
