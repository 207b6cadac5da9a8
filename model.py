"""GPT-2: configuration, network, KV cache, loss, then Hugging Face's file format in and out.

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, section 2.3), OpenAI's
released code for what the paper leaves out, and "Language Models are Few-Shot Learners" (GPT-3,
table 2.1).

Shapes: B batch, T time, S cached time, C = n_embd channels, H = n_head heads, D = C // H head
size, V = vocab_size.
"""

import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support import hub
from support.files import refuse_holes
from support.script import UserError

# ---------------------------------------------------------------------------------- configuration

# No GPT-2 comes near these. They stop a wrong or hostile size before anything is allocated for it.
LARGEST_SIZES = {
    "n_layer": 400,
    "n_head": 2**12,
    "n_embd": 2**16,
    "block_size": 2**20,
    "vocab_size": 2**20,
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Raises UserError for sizes that make no network."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257
    dropout: float = 0.0  # on embeddings, attention weights and residual branches

    def __post_init__(self):
        for field, largest in LARGEST_SIZES.items():
            size = getattr(self, field)
            if not 1 <= size <= largest:
                raise UserError(
                    f"{field} {size}; expected 1 to {largest:,}; choose {field} in that range"
                )
        if self.n_embd % self.n_head:
            multiple = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise UserError(
                f"n_embd {self.n_embd} with n_head {self.n_head}; expected n_embd divisible by "
                f"n_head, so that all heads have one size; with {self.n_head} heads use n_embd "
                f"{multiple}"
            )


# GPT-2 paper, table 2; the released models count 124M, 355M, 774M and 1558M parameters.
SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


# ---------------------------------------------------------------------------------------- network


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens to its left."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.layer = layer  # the cache keeps keys and values by layer

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: "KVCache | None"
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D), one of the three for each name
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
            q = q.to(k.dtype)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        y = y.transpose(1, 2).reshape(B, T, C)
        y = y.to(qkv.dtype)  # a cache may be of another dtype than the activations
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with four times the channels between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # GPT-2's GELU is the tanh approximation, not the exact one.
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Pre-norm residual block (GPT-2 section 2.3: a layer norm at the input of each sub-block)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: "KVCache | None"
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2.

    Parameters carry Hugging Face's names. Linear weights are stored [out, in]. The output head is
    the token embedding `wte.weight` used a second time, so it has no parameter of its own.
    """

    revision: str | None = None  # commit of the hub's repository, if the weights come from the hub

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": _embedding(config.vocab_size, config.n_embd),
                "wpe": _embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        if self.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights.

        Weights are normal with standard deviation 0.02, positions 0.01 (OpenAI's source), biases 0.
        The two projections that write into the residual stream are scaled by 1/sqrt(2 n_layer),
        because 2 n_layer of them are added up (GPT-2 section 2.3).
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, residual_std)
            elif name.endswith("wpe.weight"):
                parameter.normal_(0.0, 0.01)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)
            # What is left are the layer norms' weights: they stay 1.

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
        cache: "KVCache | None" = None,
    ) -> torch.Tensor:
        """The final hidden states (B, T, C), layer norm applied, of tokens idx (B, T) int64.

        positions: (T,) or (B, T), by default 0 … T-1.
        mask: bool, True where a query (row) may see a key (column), broadcastable to (B, H, T, S),
            by default causal.
        cache: idx continues the tokens that are in it; positions and mask follow from it.

        Without positions and cache, more than block_size tokens raise a ValueError.
        """
        T = idx.size(1)
        if cache is not None:
            positions = cache.positions(T)
            places = torch.arange(cache.num_places_read, device=idx.device)  # (S,)
            mask = places <= positions[:, None]  # (T, S)
        elif positions is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}")
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.position += T
        return self.transformer.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) of hidden states (…, C)."""
        return F.linear(x, self.transformer.wte.weight)

    def forward(self, idx: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        """Logits (B, T, V) for tokens idx (B, T), int64."""
        return self.head(self.hidden(idx, cache=cache))

    def crop_context(self, block_size: int) -> None:
        """Shorten the context by dropping the last positions. Raises UserError if it would grow."""
        if block_size > self.config.block_size:
            raise UserError(
                f"a context of {block_size} tokens; expected at most {self.config.block_size}, the "
                "positions the model has learned; choose a shorter context"
            )
        self.config = replace(self.config, block_size=block_size)
        positions = self.transformer.wpe.weight.detach()[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(positions, freeze=False)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike, dropout: float = 0.0) -> "GPT":
        """GPT-2 from a local Hugging Face directory, a run, or a hub name such as `gpt2`.

        Of a run directory the best checkpoint is loaded if the run keeps one, else the newest.
        The model is in float32 and in evaluation mode. Its `revision` is the commit of a download.
        Raises UserError for a name that cannot be fetched, a config that is not plain GPT-2, and
        for weights that are missing, of another shape or type, or not finite.
        """
        if Path(name_or_dir, "train.json").exists():
            from support.run_directory import resolve_model  # it imports this module, so not above

            name_or_dir = resolve_model(str(name_or_dir))
        return _load(cls, name_or_dir, dropout)

    def save_pretrained(self, folder: str | os.PathLike, **extra_config) -> None:
        """Write config.json, generation_config.json and model.safetensors as transformers does.

        `extra_config` adds keys to config.json, or replaces them: encoding, bos_token_id,
        eos_token_id. For a vocabulary of GPT-2 or of bytes the two ids need not be given.
        """
        _save(self, Path(folder), extra_config)


def _embedding(rows: int, channels: int) -> nn.Embedding:
    """An embedding without values yet.

    nn.Embedding(…) would initialise it. On the meta device that imports a part of torch that takes
    two seconds to load.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, channels), freeze=False)


# ------------------------------------------------------------------------------------------ cache


class KVCache:
    """Keys and values of every layer, with room for `length` tokens.

    position: how many tokens are stored. It is a tensor on the device, so that a compiled step for
        one token is the same graph at every position.
    num_places_read: attention reads this many of the places, the first ones. KVCache sets it to
        `length`: places without a token are masked, so the result is right, but attention takes the
        time of a full cache. A caller may lower it, before each call, to the number of tokens that
        will be stored after the call (sample.py does).
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)  # (B, H, S, D)
        layers = range(config.n_layer)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.position = torch.zeros((), device=device, dtype=torch.long)
        self.num_places_read = length

    def positions(self, T: int) -> torch.Tensor:
        """Positions of the next T tokens, (T,)."""
        return self.position + torch.arange(T, device=self.position.device)

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, H, T, D) of the next T tokens.

        Returns the keys and values that attention reads, (B, H, S, D), in the cache's dtype.
        """
        positions = self.positions(k.size(2))
        keys, values = self.k[layer], self.v[layer]
        keys.index_copy_(2, positions, k.to(keys.dtype))
        values.index_copy_(2, positions, v.to(values.dtype))
        return keys[:, :, : self.num_places_read], values[:, :, : self.num_places_read]


# ------------------------------------------------------------------------------------------- loss

# Rows of logits that are held at once. More gains no speed, fewer leave matrix units idle.
LOSS_ROWS = {"cpu": 512, "cuda": 8192, "mps": 4096}

# The vocabulary is padded to a multiple of this inside the loss: matrix units work on aligned
# sizes, and 50257 is odd. On a CPU it saves 5% of a training step.
LOSS_ALIGNMENT = 64


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, in float32: what is trained.

    The loss is the forward of a module because of DDP and torch.compile. DDP averages gradients
    over ranks, but only for computations in the forward that it wraps. If the loss were computed
    outside of that forward, each rank would keep gradients of its own, without an error.
    torch.compile sees the network, the head and the loss as one graph, with tokens as input and one
    number as output.

    It never holds more than LOSS_ROWS rows of logits. Those of a large batch would be its largest
    tensor by far, because a token has V = 50257 logits and only C = 768 channels.
    LinearCrossEntropy says how.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """idx, targets: int64 (B, T). Returns a scalar in nats per token."""
        x = self.model.hidden(idx)  # (B, T, C)
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))  # the last layer norm gave float32
        return LinearCrossEntropy.apply(
            x.flatten(0, 1),
            self.model.transformer.wte.weight,
            targets.flatten(),
            torch.is_grad_enabled(),  # asked here, since inside of `apply` it is always off
        )


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T against targets, some rows at a time.

    The rows of logits do not depend on each other. So forward makes the logits of a few rows,
    takes from them their part of the loss and of both gradients, and drops them before it makes
    the next. Backward only scales the two gradients, which are no larger than x and weight.

    Softmax and loss are float32. The products are in x's dtype. The gradient of the weight is
    summed up in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, needs_grad):
        """x (N, C), weight (V, C), targets (N,) int64. Returns the loss, a float32 scalar."""
        N, V = x.size(0), weight.size(0)
        padding = -V % LOSS_ALIGNMENT  # rows up to the next multiple
        w = weight.to(x.dtype)
        if padding:
            w = F.pad(w, (0, 0, 0, padding))  # (P, C), P = V + padding
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        dx = dw = None
        if needs_grad:
            dx = torch.empty_like(x)
            dw = torch.zeros(w.shape, device=x.device, dtype=torch.float32)

        chunk = LOSS_ROWS[x.device.type]
        for start in range(0, N, chunk):
            rows = x[start : start + chunk]  # (n, C)
            target = targets[start : start + chunk, None]  # (n, 1)
            logits = rows @ w.t()  # (n, P)
            if padding:
                logits[:, V:] = -torch.inf  # probability 0: no part of the loss or the gradients
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            loss -= log_p.gather(1, target).sum()
            if needs_grad:
                # The gradient with respect to the logits is the probabilities minus the one-hot
                # target (divided by N, which backward does).
                d_logits = _probabilities_minus_target(log_p, target).to(x.dtype)  # (n, P)
                dx[start : start + chunk] = d_logits @ w
                dw += d_logits.t() @ rows
            logits = log_p = d_logits = None  # free this chunk before the next one is made

        ctx.save_for_backward(dx, dw[:V] if needs_grad else None)
        return loss / N

    @staticmethod
    def backward(ctx, grad):
        """grad: the derivative of the final loss with respect to this one, a scalar."""
        dx, dw = ctx.saved_tensors
        scale = grad / dx.size(0)
        return dx * scale, dw * scale, None, None


def _probabilities_minus_target(log_p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """exp(log_p) - one_hot(target), float32 (n, P). It may overwrite log_p (n, P)."""
    if torch.compiler.is_compiling():
        # Compiled, this is one pass over the logits, and no float32 tensor of their size is made.
        # A scatter operation would need such a tensor.
        columns = torch.arange(log_p.size(1), device=log_p.device)  # (P,)
        return log_p.exp() - (columns == target).float()
    # Without compile each operation makes a tensor of that size, so these work in place.
    p = log_p.exp_()
    minus_one = torch.full_like(target, -1.0, dtype=torch.float32)
    return p.scatter_add_(1, target, minus_one)


# ----------------------------------------------------------------------- Hugging Face's files: out

# Hugging Face's GPT-2 stores these four as [in, out] ("Conv1D"), the transpose of nn.Linear.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# <|endoftext|> begins and ends a text. It is the last token of both encodings, bytes and gpt2.
END_OF_TEXT_IDS = {257: 256, 50257: 50256}


def _save(model: GPT, folder: Path, extra_config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        if (folder / name).is_symlink():  # or what it points to would be overwritten
            (folder / name).unlink()
    c = model.config
    special_tokens = {}
    if c.vocab_size in END_OF_TEXT_IDS:
        end_of_text = END_OF_TEXT_IDS[c.vocab_size]
        special_tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
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
        "network_probe": network_probe(),
        **special_tokens,
        **extra_config,
    }
    # Without max_length, transformers' pipeline generates past the last position and fails.
    generation = {"max_length": c.block_size}
    for key in ("bos_token_id", "eos_token_id"):
        if key in config:
            generation[key] = config[key]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.float().cpu().contiguous()
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", weights)  # safetensors lets only the owner read it


@torch.no_grad()
def network_probe() -> list[float]:
    """What the network computes, as four numbers: logits of a tiny model with fixed weights.

    A saved model carries them. If somebody edits the network, another activation for instance, the
    numbers change. Then a model that was saved before the edit is refused, instead of giving
    plausible nonsense. A change of formatting, names or speed leaves them as they are.
    """
    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=16)
    # A training step may run in another thread. So no random numbers are drawn here: dropout there
    # would get others than without this call.
    with torch.device("meta"):
        model = GPT(config)
    tensors = {}
    for number, (name, parameter) in enumerate(model.named_parameters(), start=1):
        places = torch.arange(parameter.numel(), device="cpu", dtype=torch.float64)
        tensors[name] = torch.sin(number + 1.7 * places).view(parameter.shape)
    model.load_state_dict(tensors, assign=True)
    model.eval()
    idx = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]], device="cpu")
    logits = model(idx)[0, -1, :4]
    return [round(logit, 6) for logit in logits.tolist()]


# ------------------------------------------------------------------------ Hugging Face's files: in

INDEX = "model.safetensors.index.json"

# A config of GPT-2 has 1 kB, and the header of GPT-2 XL's weights 64 kB.
LARGEST_JSON = 2**20

# Options of Hugging Face's GPT2Config that change the function computed, with the values that are
# plain GPT-2. The first is the default.
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

# Our fields, and their keys in config.json.
SIZE_KEYS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}

CONVERT = (
    "for pickled weights convert them once where you trust them: transformers' "
    "AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder), then name the folder"
)
MERGE_ADAPTER = (
    "a peft adapter is not a whole model: load it with peft, call merge_and_unload(), then "
    "save_pretrained(folder), and name that folder"
)


def read_config(name_or_dir: str | os.PathLike) -> GPTConfig:
    """The shape of a saved GPT-2: of a directory, a config.json, or a name on the hub.

    Reads config.json and nothing else. Raises UserError if it is not that of a plain GPT-2.
    """
    file = _config_file(name_or_dir)
    values = _read_json(file)

    def refuse(key: str, expected: str):
        raise UserError(
            f"{file}: {key} is {_short(values.get(key))}; expected {expected}; only plain GPT-2 "
            "can be loaded"
        )

    for key, accepted in PLAIN_GPT2.items():
        if values.get(key, accepted[0]) not in accepted:
            refuse(key, " or ".join(map(repr, accepted)))
    sizes = {}
    for field, key in SIZE_KEYS.items():
        size = values.get(key)
        if type(size) is not int or not 1 <= size <= LARGEST_SIZES[field]:
            refuse(key, f"an integer from 1 to {LARGEST_SIZES[field]:,}")
        sizes[field] = size
    if sizes["n_embd"] % sizes["n_head"]:
        refuse("n_head", f"a divisor of n_embd, {sizes['n_embd']}")
    if values.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        refuse("n_inner", f"null or {4 * sizes['n_embd']}")
    _check_probe(file, values.get("network_probe"))
    return GPTConfig(**sizes)


def _check_probe(file: Path, saved: object) -> None:
    """Refuse a model that another network has written. Files of transformers have no probe."""
    if saved is None:
        return
    probe = network_probe()
    same_network = (
        isinstance(saved, list)
        and len(saved) == len(probe)
        and all(isinstance(number, float) for number in saved)
        # Other versions of torch may round the last digit differently.
        and all(abs(a - b) < 1e-5 for a, b in zip(saved, probe, strict=True))
    )
    if same_network:
        return
    raise UserError(
        f"{file}: saved by another network (network_probe {_short(saved)}); expected {probe}, "
        "which is what the network in this model.py computes; use the model.py that trained it, "
        "or train it again with this one"
    )


def _load(cls: type[GPT], name_or_dir: str | os.PathLike, dropout: float) -> GPT:
    """What GPT.from_pretrained does: everything is checked before a weight is read."""
    config_file = _config_file(name_or_dir)
    config = read_config(config_file)
    folder = config_file.parent
    with torch.device("meta"):
        model = cls(replace(config, dropout=dropout))
    revision = None
    if not Path(name_or_dir).exists():  # it came from the hub
        revision = folder.name  # all files of one commit, even if the branch moves meanwhile
        most = 16 * model.num_parameters() + 2**28  # older files hold causal masks too
        _download_weights(str(name_or_dir), folder, revision, most)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = _stored_tensors(folder)
    _check_stored(folder, stored, shapes)
    state = _read_tensors(stored)
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state["transformer.wte.weight"]):
        raise UserError(
            f"{folder}: lm_head.weight is not wte.weight; expected GPT-2's tied head; only plain "
            "GPT-2 can be loaded"
        )
    model.load_state_dict(state, assign=True)
    model.revision = revision
    return model.requires_grad_(True).eval()


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in a safetensors file, as its header describes it."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]  # as ours: [out, in]


def _stored_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """All tensors that are parameters or the head, by our names. Only headers are read."""
    stored = {}
    header_bytes = 0  # in all: a link for each of a thousand names takes no room
    for file in _weight_files(folder):
        header = read_header(file)
        header_bytes += sum(map(len, header))
        if header_bytes > LARGEST_JSON:
            raise UserError(
                f"{file}: more names of tensors in all files than {LARGEST_JSON:,} bytes; expected "
                "the tensors of a GPT-2; use another checkpoint"
            )
        for name, entry in header.items():
            # Older files carry the causal mask, which is no parameter.
            if name == "__metadata__" or name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            our_name = name
            if not name.startswith(("transformer.", "lm_head.")):  # OpenAI's upload has no prefix
                our_name = f"transformer.{name}"
            if our_name in stored:
                raise UserError(
                    f"{file}: {_plain(our_name)} is there twice; expected each weight once; use "
                    "another checkpoint"
                )
            shape = tuple(entry["shape"])
            if name.endswith(TRANSPOSED):
                shape = shape[::-1]
            stored[our_name] = _StoredTensor(file, name, entry["dtype"], shape)
    # The head and the token embedding are one tensor. Some tools store it only as lm_head.weight.
    if "lm_head.weight" in stored and "transformer.wte.weight" not in stored:
        stored["transformer.wte.weight"] = stored.pop("lm_head.weight")
    return stored


def read_header(file: Path) -> dict[str, dict]:
    """The header of a safetensors file: name, dtype and shape of each tensor."""
    if not file.is_file():
        raise _no_weights(file)
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        text = f.read(min(length, LARGEST_JSON))
    if length > LARGEST_JSON:
        raise UserError(
            f"{file}: a header of {length:,} bytes; expected a safetensors file with a header of "
            f"at most {LARGEST_JSON:,}; fetch the file again (a Git LFS pointer is not the "
            "weights)"
        )
    try:
        # safetensors checks that the header is whole and that no tensors overlap.
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, RuntimeError, MemoryError) as error:  # the others: too large to map
        raise UserError(
            f"{file}: {_plain(str(error))}; expected a safetensors file; fetch the file again (a "
            "Git LFS pointer is not the weights)"
        ) from None
    return json.loads(text)


def _check_stored(
    folder: Path, stored: dict[str, _StoredTensor], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Refuse stored tensors that are not the parameters of these shapes, in floating point."""
    if "lm_head.weight" in stored:
        shapes = shapes | {"lm_head.weight": shapes["transformer.wte.weight"]}
    files = {tensor.file for tensor in stored.values()}
    place = files.pop() if len(files) == 1 else folder
    for name in sorted(shapes.keys() | stored.keys()):
        found = stored[name].shape if name in stored else None
        if found != shapes.get(name):
            raise UserError(
                f"{place}: {_plain(name)} has shape {_shape(found)}; expected "
                f"{_shape(shapes.get(name))}; use weights that belong to this config.json"
            )
        dtype = stored[name].dtype
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"{stored[name].file}: {name} is of type {dtype}; expected F32, F16, BF16 or F64; "
                "use weights that are not quantised"
            )


def _read_tensors(stored: dict[str, _StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors in float32, linears as [out, in]. Raises UserError for NaN and Inf."""
    by_file = {}
    for our_name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append((our_name, tensor.name))

    state = {}
    for file, names in by_file.items():
        with open(file, "rb") as f:
            refuse_holes(f, file)
        with safe_open(file, framework="pt") as f:  # maps the file: `convert` reads it
            mapped = [(our_name, f.get_tensor(name)) for our_name, name in names]

        def convert(item: tuple[str, torch.Tensor], file: Path = file) -> torch.Tensor:
            name, tensor = item
            tensor = tensor.float()
            smallest_and_largest = torch.stack(torch.aminmax(tensor))
            if (
                not smallest_and_largest.isfinite().all()
            ):  # 40 times as fast as testing each element
                raise UserError(
                    f"{file}: {name} holds NaN or Inf; expected finite weights; use another "
                    "checkpoint"
                )
            if name.endswith(TRANSPOSED):
                tensor = tensor.t().contiguous()
            return tensor

        # Most of the time is spent in page faults, and several threads wait for them in parallel.
        with ThreadPoolExecutor(4) as pool:
            tensors = pool.map(convert, mapped)
            state |= {name: t for (name, _), t in zip(mapped, tensors, strict=True)}
    return state


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that model.safetensors.index.json names."""
    index = folder / INDEX
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]  # where there is neither, reading it says so
    weight_map = _read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        # An index must neither lead out of its folder nor to a pickle.
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(
                f"{index}: names the file {_short(name)}; expected names of safetensors files "
                "beside it; use a checkpoint from a source you trust"
            )
    return [folder / name for name in sorted(set(names))]


def _no_weights(file: Path) -> UserError:
    """The error for weights that are not there, with the remedy for what is there instead."""
    if file.exists() or file.is_symlink():
        return UserError(
            f"{file}: not a regular file; expected weights as safetensors; remove it, and fetch "
            "the weights again"
        )
    variants = sorted(other.name for other in file.parent.glob("model.*.safetensors"))
    other_formats = ("tf_model.h5", "flax_model.msgpack", "model.onnx", "onnx", "rust_model.ot")
    others = [name for name in other_formats if (file.parent / name).exists()]
    remedy = CONVERT
    if variants:
        remedy = f"{variants[0]} is there: if it holds the whole model, rename it"
    elif others and not (file.parent / "pytorch_model.bin").exists():
        remedy = f"{others[0]} is of another framework: get the model's safetensors for PyTorch"
    return UserError(f"{file}: not there; expected weights as safetensors; {remedy}")


def _read_json(file: Path) -> dict:
    """A JSON object of at most LARGEST_JSON bytes, from a regular file."""
    if not file.is_file():
        is_there = file.exists() or file.is_symlink()
        is_adapter = (file.parent / "adapter_config.json").exists()
        raise UserError(
            f"{file}: {'not a regular file' if is_there else 'not there'}; expected a Hugging Face "
            f"GPT-2 directory; {MERGE_ADAPTER if is_adapter else 'check the path or the hub name'}"
        )
    with open(file, "rb") as f:
        text = f.read(LARGEST_JSON + 1)
    try:
        if len(text) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON:,} bytes")
        values = json.loads(text.decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{file}: {error}; expected a JSON object; fetch the file again") from None
    return values


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "nothing"
    more = "×…" if len(shape) > 8 else ""
    return "×".join(map(str, shape[:8])) + more


def _short(value: object) -> str:
    """A value from a file, for an error: one line that is not endless."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _plain(text: str) -> str:
    """A name from a file, for an error: without control characters, and not endless."""
    visible = "".join(character for character in text if character.isprintable())
    return visible if len(visible) <= 200 else visible[:200] + "…"


# ---------------------------------------------------------------------------------------- the hub

# huggingface_hub does the downloads, with its cache (HF_HOME), mirrors (HF_ENDPOINT), tokens
# (HF_TOKEN), offline mode (HF_HUB_OFFLINE), retries and resumption. support/hub.py says
# what of a server's answers it does not get to see.


def _config_file(name_or_dir: str | os.PathLike) -> Path:
    """config.json of a directory, or of a repository on the hub, which is downloaded."""
    place = Path(name_or_dir)
    if place.name == "config.json":
        return place
    if place.is_dir():
        return place / "config.json"
    if place.exists():
        raise UserError(
            f"{place}: a file; expected a directory with config.json and model.safetensors; name "
            "the directory"
        )
    return _download(str(name_or_dir), "config.json")


def _download_weights(name: str, folder: Path, revision: str, most: int) -> None:
    """Fetch model.safetensors, or its parts, of a repository into the folder of its config.

    most: bytes of all parts together.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        _download(name, "model.safetensors", revision, most, missing_ok=True)
    except EntryNotFoundError:
        _download(name, INDEX, revision)
        for file in _weight_files(folder):
            most -= _download(name, file.name, revision, most).stat().st_size


def _download(
    name: str,
    file: str,
    revision: str | None = None,
    most: int = LARGEST_JSON,
    *,
    missing_ok: bool = False,
) -> Path:
    """Fetch one file of a hub repository, of at most `most` bytes.

    With missing_ok, EntryNotFoundError is raised.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    # Some versions of the client follow "..", so the name is checked here too.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII) or ".." in name:
        raise _download_error(name, "neither a directory nor a possible hub name", "check the path")
    hub.guard()
    try:
        with hub.at_most(f"{name}/{file}", most):
            return Path(hf_hub_download(name, file, revision=revision))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each version of the client has others
        if missing_ok and isinstance(error, EntryNotFoundError):
            raise
        if isinstance(error, OSError) and error.errno:
            raise  # a fault of the disk; the error names the file
        found, remedy = _download_fault(error, file)
        raise _download_error(name, found, remedy) from None


def _download_error(name: str, found: str, remedy: str) -> UserError:
    return UserError(
        f"{_plain(name)}: {found}; expected a local directory, or a GPT-2 with safetensors weights "
        f"on the hub; {remedy}"
    )


def _download_fault(error: Exception, file: str) -> tuple[str, str]:
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
        remedy = MERGE_ADAPTER if file == "config.json" else CONVERT
        return f"the hub's repository has no {file}", remedy
    if isinstance(error, GatedRepoError):
        return "gated", "accept its terms on its hub page and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        found = "no such directory, and on the hub no such model that you may see"
        return found, "check the name, or set HF_TOKEN if it is private"
    # If a connection fails and the cache has nothing, the client wraps the connection's error.
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return "the hub refused the token", "check HF_TOKEN"
    reason = hub.without_secrets(f"{type(cause).__name__}: {cause}".splitlines()[0])
    return (
        "no such directory, not in the hub client's cache, and the hub cannot be reached "
        f"({_plain(reason)})",
        "check the name, the connection, HF_ENDPOINT and HF_HUB_OFFLINE, then try again",
    )
