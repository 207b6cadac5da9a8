"""GPT-2: configuration, network, KV cache, loss.

Sources: GPT-2's paper (section 2.3), OpenAI's code for what it leaves out, and GPT-3's paper
(table 2.1).

Shapes: B batch, T time, S places in the cache, C = n_embd channels, H = n_head heads, D = C // H
head size, V = vocab_size. They stand in names where a function has many tensors: x_NC is (N, C).

To change the network, read docs/change-the-network.md first.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from support import huggingface
from support.network import probe, sizes_of
from support.run_directory import resolve_model
from support.runtime import LOGIT_ROWS, PAD_VOCABULARY_TO
from support.script import Range, check_fields, require
from tokens import ENCODINGS, get_encoding

# ---------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Raises UserError for sizes that make no network."""

    # No GPT-2 comes near the upper ends. They stop a wrong size before memory is taken for it.
    n_layer: Annotated[int, Range(1, 400)] = 12
    n_head: Annotated[int, Range(1, 2**12)] = 12
    n_embd: Annotated[int, Range(1, 2**16)] = 768
    block_size: Annotated[int, Range(1, 2**20)] = 1024  # longest context, in tokens
    vocab_size: Annotated[int, Range(1, 2**20)] = 50257
    # On embeddings, attention weights and residual branches.
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0

    def __post_init__(self):
        check_fields(self)
        head_size = max(1, round(self.n_embd / self.n_head))
        require(
            self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} with n_head {self.n_head}; expected heads of one size; "
            f"use n_embd {head_size * self.n_head}",
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
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # each (B, H, S, D)
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

    Parameters carry Hugging Face's names. Linear weights are stored [out, in]. All parameters that
    the module has are saved and loaded, by name: an added one needs no further edit.
    """

    encoding_name: str | None = None  # of the tokens, as a loaded model's config.json says it

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
    def head_weight(self) -> torch.Tensor:
        """The output head (V, C): the token embedding, used a second time.

        Logits, loss and scoring read the head through this property alone. To untie it, add a
        parameter and return it here (docs/change-the-network.md).
        """
        return self.transformer.wte.weight

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

        Without positions and cache, more than block_size tokens raise ValueError. With a cache this
        is not checked, because the host would wait for the device: the caller counts, as
        sample.stream does.
        """
        T = idx.size(1)
        if cache is not None:
            positions, mask = cache.next_positions(T)
        elif positions is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}")
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:  # gradient checkpointing would wrap this call
            x = block(x, mask, cache)
        if cache is not None:
            cache.position += T
        return self.transformer.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) of hidden states (…, C)."""
        return F.linear(x, self.head_weight)

    def forward(self, idx: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        """Logits (B, T, V) for tokens idx (B, T), int64."""
        return self.head(self.hidden(idx, cache=cache))

    def crop_context(self, block_size: int) -> None:
        """Shorten the context by dropping the last positions. Raises UserError if it would grow."""
        learned = self.config.block_size
        require(
            block_size <= learned,
            f"a context of {block_size} tokens; expected at most the {learned} that the model has "
            "learned; choose a shorter one",
        )
        self.config = replace(self.config, block_size=block_size)
        positions = self.transformer.wpe.weight.detach()[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(positions, freeze=False)

    # ------------------------------------------------------------------------- saving and loading

    def save_pretrained(self, folder: str | os.PathLike, **extra) -> None:
        """Write configuration, weights and, where it is known, the tokenizer for transformers.

        extra: further keys of config.json, such as encoding="bytes".
        """
        config, tensors = self.saved_form(**extra)
        huggingface.save_model(folder, config, tensors)
        of_size = {size: name for name, size in ENCODINGS.items()}
        name = config.get("encoding", of_size.get(self.config.vocab_size))
        if name in ENCODINGS:
            huggingface.save_tokenizer(get_encoding(name), folder, self.config.block_size)

    def saved_form(self, **extra) -> tuple[dict, dict[str, torch.Tensor]]:
        """What is saved: values for config.json, and the weights by name, which are not copied."""
        config = asdict(self.config)
        config["tie_word_embeddings"] = self.head_weight is self.transformer.wte.weight
        config["network_probe"] = probe(self.tiny)  # tells other networks' files
        if self.encoding_name:
            config["encoding"] = self.encoding_name
        return config | extra, self.state_dict()

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike, dropout: float = 0.0) -> "GPT":
        """GPT-2 from a local Hugging Face directory, a run, or a hub name such as `gpt2`.

        Of a run the best checkpoint is loaded if it keeps one, else the newest. The model is in
        float32 and in evaluation mode. Weights of another network than this file's are loaded as
        far as names agree, with a warning. Raises UserError for what is missing, unfit or damaged.
        """
        if Path(name_or_dir, "train.json").exists():  # a run
            name_or_dir = resolve_model(str(name_or_dir))
        folder = huggingface.fetch(name_or_dir)
        config = huggingface.read_config(folder)
        sizes = sizes_of(config, GPTConfig, folder / "config.json", dropout)
        model = huggingface.load_model(folder, config, lambda: cls(sizes), probe(cls.tiny))
        model.encoding_name = config.get("encoding")
        return model

    @classmethod
    def tiny(cls) -> "GPT":
        """The size in which support/network.py tries what a network computes."""
        return cls(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=16))


def _embedding(rows: int, channels: int) -> nn.Embedding:
    """An embedding without values. nn.Embedding(…) draws some: slow at first on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, channels), freeze=False)


# ------------------------------------------------------------------------------------------ cache


class KVCache:
    """Keys and values of every layer, with `length` places for tokens.

    position: how many places, the first ones, hold a token. It is a tensor on the device, so that
        a compiled step for one token is the same graph at every position. No query sees the other
        places: the mask of `next_positions` hides them.
    num_places_read: attention reads this many of the places, at first all. A caller may lower it,
        before each call, to the number of tokens that the cache will hold when the call returns.
        That changes no result, because the mask decides, but saves time (sample.py does so).
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

    def next_positions(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (T,) of the next T tokens, and their mask (T, S).

        A token sees the places up to its own position: the tokens before it and itself.
        """
        device = self.position.device
        positions = self.position + torch.arange(T, device=device)
        places = torch.arange(self.num_places_read, device=device)
        return positions, places <= positions[:, None]

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, H, T, D) of the next T tokens.

        Returns the keys and values that attention reads, (B, H, S, D), in the cache's dtype.
        """
        positions = self.position + torch.arange(k.size(2), device=k.device)
        keys, values = self.k[layer], self.v[layer]
        keys.index_copy_(2, positions, k.to(keys.dtype))
        values.index_copy_(2, positions, v.to(values.dtype))
        return keys[:, :, : self.num_places_read], values[:, :, : self.num_places_read]


# ------------------------------------------------------------------------------------------- loss


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, in float32: what is trained.

    The loss is the forward of a module because of DDP, which averages gradients over ranks only for
    what is computed in the forward that it wraps. Outside of it each rank would keep gradients of
    its own, without an error.

    It never holds more than LOGIT_ROWS rows of logits. Those of a large batch would be its largest
    tensor by far: a token has V = 50257 logits and only C = 768 channels.
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
            self.model.head_weight,
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

    Shapes: N tokens, n of them at a time; P is V rounded up to a size that suits matrix units.
    """

    @staticmethod
    def forward(ctx, x_NC, weight_VC, targets_N, needs_grad):
        """targets_N is int64. Returns the loss, a float32 scalar."""
        N, V = len(x_NC), len(weight_VC)
        w_PC = weight_VC.to(x_NC.dtype)
        if V % PAD_VOCABULARY_TO:  # or F.pad copies for nothing
            w_PC = F.pad(w_PC, (0, 0, 0, -V % PAD_VOCABULARY_TO))
        loss = torch.zeros((), device=x_NC.device, dtype=torch.float32)
        dx_NC = dw_PC = None
        if needs_grad:
            dx_NC = torch.empty_like(x_NC)
            dw_PC = torch.zeros_like(w_PC, dtype=torch.float32)

        n = LOGIT_ROWS[x_NC.device.type]
        for start in range(0, N, n):
            x_nC = x_NC[start : start + n]
            target_n1 = targets_N[start : start + n, None]
            logits_nP = x_nC @ w_PC.t()
            logits_nP[:, V:] = -torch.inf  # the added columns have probability 0
            log_p_nP = torch.log_softmax(logits_nP, dim=1, dtype=torch.float32)
            loss -= _log_p_of_target(log_p_nP, target_n1).sum()
            if needs_grad:
                # The gradient with respect to the logits is the probabilities minus the one-hot
                # target (divided by N, which backward does).
                d_logits_nP = _probabilities_minus_target(log_p_nP, target_n1).to(x_NC.dtype)
                dx_NC[start : start + n] = d_logits_nP @ w_PC
                dw_PC += d_logits_nP.t() @ x_nC
            logits_nP = log_p_nP = d_logits_nP = None  # free them before the next ones are made

        ctx.save_for_backward(dx_NC, dw_PC[:V] if needs_grad else None)
        return loss / N

    @staticmethod
    @torch.autograd.function.once_differentiable  # its gradients are constants of the backward pass
    def backward(ctx, grad):
        """grad: the derivative of the final loss with respect to this one, a scalar."""
        dx_NC, dw_VC = ctx.saved_tensors
        scale = grad / len(dx_NC)
        return dx_NC * scale, dw_VC * scale, None, None


def _log_p_of_target(log_p_nP: torch.Tensor, target_n1: torch.Tensor) -> torch.Tensor:
    """log_p at the target of each row, float32, n numbers."""
    if torch.compiler.is_compiling() and log_p_nP.is_cuda:
        # Compiled for a GPU, this sum is part of the pass that makes the gradient. What is gathered
        # would be read for all chunks at once, and all their logits be kept until then.
        columns_P = torch.arange(log_p_nP.size(1), device=log_p_nP.device)
        return torch.where(columns_P == target_n1, log_p_nP, 0.0).sum(dim=1)
    return log_p_nP.gather(1, target_n1)


def _probabilities_minus_target(log_p_nP: torch.Tensor, target_n1: torch.Tensor) -> torch.Tensor:
    """exp(log_p) - one_hot(target), float32 (n, P). It may overwrite log_p."""
    if torch.compiler.is_compiling():
        # Compiled, this is one pass over the logits, and no float32 tensor of their size is made.
        # A scatter operation would need such a tensor.
        columns_P = torch.arange(log_p_nP.size(1), device=log_p_nP.device)
        return log_p_nP.exp() - (columns_P == target_n1).float()
    # Without compile each operation makes a tensor of that size, so these work in place.
    p_nP = log_p_nP.exp_()
    minus_one_n1 = torch.full_like(target_n1, -1.0, dtype=torch.float32)
    return p_nP.scatter_add_(1, target_n1, minus_one_n1)
