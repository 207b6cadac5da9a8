"""Hugging Face's file formats, out and in: configuration, weights, tokenizer, card, and the hub.

A model directory holds config.json, generation_config.json, model.safetensors (or its parts and
model.safetensors.index.json) and the tokenizer's vocab.json, merges.txt and tokenizer_config.json.

This file knows no GPT class. A configuration is a dict of sizes by our names, weights are a dict of
tensors by the names of `GPT.state_dict()`, linears as [out, in]. No file is unpickled, and none is
looked for outside of the directory.
"""

import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tiktoken.load import read_file_cached

from support.files import plain_name, read_bytes, read_json, sync, write_file
from support.network import PROBE_OF_GPT2, probe, same_probe, with_weights
from support.script import UserError, require, say, shown

Shape = tuple[int, ...]  # also torch.Size

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"

# Hugging Face's GPT-2 stores these four as [in, out] ("Conv1D"), the transpose of nn.Linear.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# <|endoftext|> begins and ends a text. It is the last token of both encodings.
END_OF_TEXT_IDS = {"bytes": 256, "gpt2": 50256}

# ----------------------------------------------------------------------------------- configuration

# Options of transformers' GPT2Config that change what is computed, with the values of plain GPT-2.
# The first is the default.
PLAIN_GPT2 = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}

# A network that an edit of model.py has made. transformers knows no such model_type and no such
# activation, so it refuses the directory instead of computing something else with its weights.
EDITED = {"model_type": "edited_gpt2", "activation_function": "that of an edited model.py"}

MERGE_ADAPTER = (
    "a peft adapter is no whole model: load it with peft, call merge_and_unload(), then "
    "save_pretrained(folder), and name that folder"
)
CONVERT = (
    "load the model in transformers where you trust it, call save_pretrained(folder), and name "
    "that folder"
)


def save_config(folder: Path, config: dict) -> None:
    """Write config.json and generation_config.json.

    config: what `GPT.saved_form` gives. Keys that are none of Hugging Face's are kept as they are.
    """
    values = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "dtype": "float32",
        **config,
    }
    block_size = values.pop("block_size")
    values["n_positions"] = values["n_ctx"] = block_size
    dropout = values.pop("dropout")
    values["embd_pdrop"] = values["attn_pdrop"] = values["resid_pdrop"] = dropout
    end_of_text = END_OF_TEXT_IDS.get(values.get("encoding"), values["vocab_size"] - 1)
    if end_of_text in END_OF_TEXT_IDS.values():
        values = {"bos_token_id": end_of_text, "eos_token_id": end_of_text} | values
    if not same_probe(values["network_probe"], PROBE_OF_GPT2):
        values |= EDITED
        say_edited()
    # Without max_length, transformers' pipeline generates past the last position and fails.
    generation = {"max_length": block_size}
    for key in ("bos_token_id", "eos_token_id"):
        if key in values:
            generation[key] = values[key]
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", generation)


@functools.cache  # once is enough
def say_edited() -> None:
    say(
        "note: the network of this model.py is not GPT-2's. Its checkpoints say so (model_type "
        f"{EDITED['model_type']}), and transformers refuses them."
    )


def read_config(place: str | os.PathLike) -> dict:
    """config.json as `GPT.saved_form` gives it: block_size for n_positions, all else as it is.

    place: a directory, or a name on the hub, of which config.json alone is fetched.
    Raises UserError if it is neither that of a plain GPT-2 nor one of an edited model.py.
    """
    folder = fetch_config(place)
    file = folder / "config.json"
    if not file.exists():
        is_adapter = (folder / "adapter_config.json").exists()
        remedy = MERGE_ADAPTER if is_adapter else "check the path or the hub name"
        raise UserError(f"{file}: not there; expected a Hugging Face GPT-2 directory; {remedy}")
    sizes = {"n_layer": int, "n_head": int, "n_embd": int, "n_positions": int, "vocab_size": int}
    values = read_json(file, {"model_type?": str})
    model_type = values.get("model_type", "gpt2")
    require(
        model_type in ("gpt2", EDITED["model_type"]),
        f"{file}: model_type is {shown(model_type)}; expected 'gpt2'; choose a GPT-2",
    )
    known = {"network_probe?": [float], "encoding?": (str, type(None))}
    values = read_json(file, sizes | known)
    values = {"network_probe": PROBE_OF_GPT2, "block_size": values["n_positions"]} | values
    plain = PLAIN_GPT2 | {"n_inner": (None, 4 * values["n_embd"])}
    if model_type == EDITED["model_type"]:
        plain = {}
    for key, accepted in plain.items():
        found = values.get(key, accepted[0])
        require(
            found in accepted,
            f"{file}: {key} is {shown(repr(found))}; expected {' or '.join(map(repr, accepted))}; "
            "only plain GPT-2 can be loaded",
        )
    return values


def write_json(file: Path, values: dict) -> None:
    write_file(file, (json.dumps(values, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------- weights: out


def save_model(folder: str | os.PathLike, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write config.json, generation_config.json and model.safetensors as transformers does.

    config, tensors: what `GPT.saved_form` gives. Each file is whole before it has its name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder, config)
    stored = {}
    places = set()  # in memory
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", torch.float32)
        stored[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
        if stored[name].data_ptr() in places:  # an edited network may share tensors; files cannot
            stored[name] = stored[name].clone()
        places.add(stored[name].data_ptr())
    temporary = folder / f".{WEIGHTS}.tmp"
    try:
        save_file(stored, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # it is raised for a full disk, too, and names no file
        raise OSError(f"{folder / WEIGHTS}: {error}") from None
    shutil.copymode(folder / "config.json", temporary)  # safetensors lets only the owner read it
    sync(temporary)
    os.replace(temporary, folder / WEIGHTS)
    sync(folder)


# ----------------------------------------------------------------------------------- weights: in


def load_model(
    folder: Path, config: dict, build: Callable[[], torch.nn.Module], network_probe: list[float]
) -> torch.nn.Module:
    """The network that `build` makes with the weights of a directory, in evaluation mode.

    config: from `read_config`. network_probe: of the network. Where the two are of different
    networks, weights are loaded as far as names agree, and a warning says so.
    """
    is_same = same_probe(config["network_probe"], network_probe)
    with torch.device("meta"):
        state = build().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return with_weights(build, read_weights(folder, shapes, strict=is_same))


def load_into(
    model: torch.nn.Module, folder: Path, config: dict, tensors: dict[str, torch.Tensor]
) -> None:
    """Put the weights of a checkpoint, which have been read already, into a network.

    Names and shapes must agree, since the optimizer's moments have the same. Where the network
    computes something else than the one that saved them, a warning says so.
    """
    state = model.state_dict()
    compare_names(folder, tensors.keys(), state.keys(), strict=True)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    compare_shapes(folder, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    if not same_probe(config["network_probe"], probe(model.tiny)):
        compare_names(folder, tensors.keys(), tensors.keys(), strict=False)
    model.load_state_dict(tensors)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, as the file's header describes it."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: Shape  # as the network has it: linears are [out, in]


def read_weights(
    folder: str | os.PathLike, shapes: dict[str, Shape], strict: bool = True
) -> dict[str, torch.Tensor]:
    """The weights of a directory by the network's names, in float32, linears as [out, in].

    shapes: of the network's state. Names, shapes and types are compared with it before a weight is
    read. Raises UserError where they differ, and for NaN and Inf.
    strict=False: what only the files or only the network have is left out, and a warning names it.
    """
    folder = Path(folder)
    stored = stored_tensors(folder)
    is_tied = HEAD not in shapes
    # Hugging Face stores a head that is the token embedding once, under either name. A network
    # with a head of its own begins with the same values in both.
    if HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    if HEAD in shapes and EMBEDDING in stored:
        stored.setdefault(HEAD, stored[EMBEDDING])
    elif HEAD in stored and EMBEDDING in shapes:
        shapes = shapes | {HEAD: shapes[EMBEDDING]}  # read too, and compared below
    compare_names(folder, stored.keys(), shapes.keys(), strict)
    stored = {name: tensor for name, tensor in stored.items() if name in shapes}
    compare_shapes(folder, {name: tensor.shape for name, tensor in stored.items()}, shapes)
    for name, tensor in stored.items():
        require(
            tensor.dtype in ("F64", "F32", "F16", "BF16"),
            f"{folder}: {name} is of type {tensor.dtype}; expected F32, F16, BF16 or F64; use "
            "weights that are not quantised",
        )

    tensors = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        names = {name: tensor.name for name, tensor in stored.items() if tensor.file == file}
        tensors |= read_tensors(file, names)
    if HEAD in tensors and stored[HEAD] is stored.get(EMBEDDING):
        tensors[HEAD] = tensors[HEAD].clone()  # each is trained by itself
    elif HEAD in tensors and is_tied:
        require(
            torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]),
            f"{folder}: {HEAD} is not {EMBEDDING}; expected GPT-2's head, which is the embedding; "
            "give the network of model.py a head of its own (docs/change-the-network.md)",
        )
    return tensors


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory's weights, by the network's names. Only headers are read."""
    stored = {}
    for file in weight_files(folder):
        for name, (dtype, shape) in read_header(file).items():
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask, which older files carry
            our_name = name
            if "." in name and name.split(".")[0] in ("wte", "wpe", "h", "ln_f"):
                our_name = f"transformer.{name}"  # OpenAI's own upload has no prefix
            require(
                our_name not in stored,
                f"{file}: {shown(our_name)} is there twice; expected each weight once; use another "
                "checkpoint",
            )
            if name.endswith(TRANSPOSED):
                shape = shape[::-1]
            stored[our_name] = StoredTensor(file, name, dtype, shape)
    return stored


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that model.safetensors.index.json names."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [folder / WEIGHTS]  # where there is neither, reading it says so
    names = set(read_json(index, {"weight_map": {str: str}})["weight_map"].values())
    for name in names:
        require(
            plain_name(name) and name.endswith(".safetensors"),
            f"{index}: names the file {shown(name)}; expected names of safetensors files beside "
            "it; use a checkpoint from a source you trust",
        )
    return [folder / name for name in sorted(names)]


def read_header(file: Path) -> dict[str, tuple[str, Shape]]:
    """Type and shape of each tensor of a safetensors file, by name. Raises UserError."""
    require(
        file.is_file(),
        f"{file}: not there, or not a file; expected weights as safetensors; for pickled weights: "
        f"{CONVERT}",
    )
    try:
        with safe_open(file, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise UserError(
            f"{file}: {shown(str(error))}; expected a safetensors file; fetch the file again "
            "(a Git LFS pointer is not the weights)"
        ) from None


def compare_names(folder: Path, found: Set[str], expected: Set[str], strict: bool) -> None:
    """Refuse weights that are not the network's by name, or, if not strict, warn of them."""
    missing = shown(", ".join(sorted(expected - found)))
    unknown = shown(", ".join(sorted(found - expected)))
    if strict:
        require(
            not missing and not unknown,
            f"{folder}: missing weights: {missing or 'none'}, unknown weights: "
            f"{unknown or 'none'}; expected those that belong to its config.json; use others",
        )
        return
    message = f"warning: {folder}: saved by another network than this model.py's"
    if missing:
        message += f"; new here, and untrained: {missing}"
    if unknown:
        message += f"; not in this network, and left out: {unknown}"
    print(message, file=sys.stderr, flush=True)


def compare_shapes(folder: Path, found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    """Refuse weights of other shapes than the network's."""
    for name, shape in found.items():
        require(
            tuple(shape) == tuple(expected[name]),
            f"{folder}: {name} is of shape {shown('×'.join(map(str, shape)))}; expected "
            f"{'×'.join(map(str, expected[name]))}; use weights that belong to this config.json",
        )


def read_tensors(file: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file in float32. Raises UserError for NaN and Inf.

    names: their names in the result, and in the file. GPT-2's linears come as [out, in].
    """
    with safe_open(file, framework="pt") as f:  # this maps the file: `convert` reads it
        mapped = {name: f.get_tensor(name_in_file) for name, name_in_file in names.items()}

    def convert(name: str) -> torch.Tensor:
        tensor = mapped[name].float()
        smallest, largest = torch.aminmax(tensor)  # 40 times as fast as testing each element
        require(
            bool(smallest.isfinite() and largest.isfinite()),
            f"{file}: {name} holds NaN or Inf; expected finite weights; use another checkpoint",
        )
        return tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor

    # Most of the time is spent in page faults, and several threads wait for them in parallel.
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(convert, names), strict=True))


# -------------------------------------------------------------------------------------- model card

CARD = "README.md"
MOST_LOSSES = 12  # rows of the card's table, whose bars draw the curve
LONGEST_BAR = 30  # characters


def write_model_card(
    folder: str | os.PathLike,
    config: dict,
    num_parameters: int,
    *,
    name: str,
    step: int,
    tokens: int,
    data: str,
    losses: list[tuple[int, float]],
    command: str,
    base_model: str = "",
) -> None:
    """Write README.md: what a model is, with the metadata that the hub reads at its head.

    config: what `GPT.saved_form` gives. losses: (step, validation loss) of the run so far.
    command: that started the run. base_model: hub name or path of the weights it began with.
    """
    c = config
    plain = same_probe(c["network_probe"], PROBE_OF_GPT2)
    metadata = [
        "# license: choose one, such as mit",
        "# language: of the data, such as en",
        "pipeline_tag: text-generation",
        f"tags: [{'gpt2' if plain else EDITED['model_type']}, pygpt2]",
    ]
    if plain:
        metadata.append("library_name: transformers")
    if base_model and not Path(base_model).exists():  # only the hub's names mean something there
        metadata.append(f"base_model: {json.dumps(base_model)}")
    origin = f"from the weights of {shown(base_model)}" if base_model else "from random weights"
    how = (
        "transformers loads it: `AutoModelForCausalLM.from_pretrained(folder)`, `AutoTokenizer` "
        "likewise."
    )
    if not plain:
        how = "Its network is not GPT-2's: it needs the `model.py` that it was trained with."
    shown_losses = [(at, loss) for at, loss in spread(losses, MOST_LOSSES) if math.isfinite(loss)]
    highest = max((loss for _, loss in shown_losses), default=1)
    rows = [
        f"| {at:,} | {loss:.4f} | {'█' * round(LONGEST_BAR * loss / highest)} |"
        for at, loss in shown_losses
    ]
    lines = [
        "---",
        *metadata,
        "---",
        "",
        f"# {shown(name)}",
        "",
        f"A GPT-2 of {num_parameters:,} parameters: {c['n_layer']} layers, {c['n_head']} heads, "
        f"{c['n_embd']} channels, a context of {c['block_size']:,} tokens, a vocabulary of "
        f"{c['vocab_size']:,}. It was trained with PyGPT2, {origin}, for {step:,} updates: "
        f"{tokens:,} tokens of {shown(data)}. {how}",
        "",
        "| update | validation loss, nats per token | |",
        "|---|---|---|",
        *rows,
        "",
        "```bash",
        shown(command, 2000),
        "```",
    ]
    write_file(Path(folder, CARD), ("\n".join(lines) + "\n").encode())


def spread(entries: list, most: int) -> list:
    """At most so many of the entries, evenly spread, the last one included."""
    stride = -(-len(entries) // most) or 1
    return entries[::-1][::stride][::-1]


# ----------------------------------------------------------------------------------------- the hub


def fetch(name: str | os.PathLike) -> Path:
    """The local directory of a model: itself if `name` is one, else a download from the hub.

    huggingface_hub downloads, with its cache (HF_HOME), mirrors (HF_ENDPOINT), tokens (HF_TOKEN),
    offline mode (HF_HUB_OFFLINE), timeouts and retries. The configuration comes first, and weights
    come only where it is a GPT-2's. All files are of one commit. Raises UserError.
    """
    folder = fetch_config(name)
    if Path(name).exists():
        return folder
    read_config(folder)
    commit = folder.name  # the branch may move meanwhile
    if download(str(name), WEIGHTS, commit, or_none=True) is None:
        download(str(name), INDEX, commit)
        for file in weight_files(folder):
            download(str(name), file.name, commit)
    return folder


def fetch_config(name: str | os.PathLike) -> Path:
    """The local directory of a model's config.json, which is all that is downloaded."""
    place = Path(name)
    if place.is_dir():
        return place
    require(
        not place.exists() or place.name == "config.json",
        f"{place}: a file; expected a directory with config.json and {WEIGHTS}; name the directory",
    )
    if place.exists():
        return place.parent
    return download(str(name), "config.json").parent


def download(name: str, file: str, commit: str | None = None, or_none: bool = False) -> Path | None:
    """Fetch one file of a hub repository into the client's cache. Raises UserError.

    or_none: give None where the repository has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=commit))
    except EntryNotFoundError as error:
        if or_none:
            return None
        raise UserError(f"{shown(name)}: {download_fault(error)}") from None
    except Exception as error:  # each version of the client has others
        if isinstance(error, OSError) and error.errno:
            raise  # a fault of the disk; the error names the file
        raise UserError(f"{shown(name)}: {download_fault(error)}") from None


def download_fault(error: Exception) -> str:
    """What went wrong in the hub's client, and the remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "neither a directory nor a possible hub name; expected one of them; check the path"
    if isinstance(error, errors.GatedRepoError):
        return "gated; expected access to it; accept its terms on its hub page and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "neither a directory nor a model on the hub that you may see; expected one of them; "
            "check the name, or set HF_TOKEN if it is private"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return (
            "the hub has no config.json or no safetensors of it; expected a GPT-2; for pickled "
            f"weights: {CONVERT}; {MERGE_ADAPTER}"
        )
    # Where a connection fails and the cache has nothing, the client wraps the connection's error.
    cause = error.__cause__ or error
    if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
        return "the hub refuses the token; expected access to the model; check HF_TOKEN"
    reason = shown(f"{type(cause).__name__}: {cause}".splitlines()[0])
    return (
        f"no such directory, not in the cache, and the hub cannot be reached ({reason}); expected "
        "a local directory or a connection; check the name, HF_ENDPOINT and HF_HUB_OFFLINE, then "
        "try again"
    )


# --------------------------------------------------------------------------------------- tokenizer

# OpenAI's file of GPT-2's merges. tiktoken reads the same file to make its encoding, and keeps it.
MERGES_OF_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def save_tokenizer(
    encoding: tiktoken.Encoding, folder: str | os.PathLike, block_size: int | None = None
) -> None:
    """Write the files from which transformers' AutoTokenizer builds the same encoding.

    block_size: the model's context; other programs then cut a longer text instead of failing.
    """
    folder = Path(folder)
    end_of_text = encoding.decode([encoding.eot_token])
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "add_prefix_space": False,
    }
    if block_size is not None:
        config["model_max_length"] = block_size
    vocab = json.dumps(vocabulary(encoding), ensure_ascii=False)
    merges = "\n".join(["#version: 0.2", *merges_of(encoding)]) + "\n"
    write_file(folder / "vocab.json", vocab.encode())
    write_file(folder / "merges.txt", merges.encode())
    write_file(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def check_tokenizer(folder: str | os.PathLike, encoding: tiktoken.Encoding) -> None:
    """Refuse a model whose tokenizer files, if it has any, say something else than `encoding`.

    It reads vocab.json, merges.txt and tokenizer.json. Tokens added after those of the encoding are
    allowed. Raises UserError, which names the file.
    """
    folder = Path(folder)
    if (folder / "vocab.json").exists():
        file = folder / "vocab.json"
        check_vocabulary(file, read_json(file, {str: int}, limit=2**24), encoding)
    if (folder / "merges.txt").exists():
        file = folder / "merges.txt"
        lines = read_bytes(file, limit=2**24).decode(errors="replace").splitlines()
        lines = [line for line in lines if line and not line.startswith("#version")]
        check_merges(file, lines, encoding)
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.json"
        shape = {
            "added_tokens?": [{"id": int, "content": str}],
            "model": {"vocab": {str: int}, "merges?": [(str, list)]},
        }
        content = read_json(file, shape, limit=2**24)
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        check_vocabulary(file, content["model"]["vocab"] | added, encoding)
        merges = content["model"].get("merges", [])
        joined = [m if isinstance(m, str) else " ".join(map(str, m)) for m in merges]
        check_merges(file, joined, encoding)


def check_vocabulary(file: Path, found: dict[str, int], encoding: tiktoken.Encoding) -> None:
    expected = vocabulary(encoding)
    if {token: i for token, i in found.items() if i < len(expected)} != expected:
        raise UserError(
            f"{file}: a vocabulary of {len(found):,} tokens that is not this encoding's; expected "
            f"the {len(expected):,} tokens of the encoding in their order; this model has a "
            "tokenizer of another kind and cannot be used here"
        )


def check_merges(file: Path, found: list[str], encoding: tiktoken.Encoding) -> None:
    expected = merges_of(encoding)
    if found != expected:
        raise UserError(
            f"{file}: {len(found):,} merges that are not this encoding's; expected the "
            f"{len(expected):,} merges of {encoding.name}; this model has a tokenizer of another "
            "kind and cannot be used here"
        )


@functools.cache
def vocabulary(encoding: tiktoken.Encoding) -> dict[str, int]:
    """The id of each token, the token written in GPT-2's alphabet."""
    alphabet = visible_bytes()
    vocab = {}
    for i in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(i)
        vocab["".join(alphabet[byte] for byte in token)] = i
    vocab[encoding.decode([encoding.eot_token])] = encoding.eot_token
    return vocab


@functools.cache
def visible_bytes() -> dict[int, str]:
    """GPT-2's alphabet: a visible character for each of the 256 bytes (OpenAI's encoder.py).

    A byte that Latin-1 prints stands for itself. The others get the characters from U+0100 on.
    """
    alphabet = {}
    next_character = 256
    for byte in range(256):
        character = chr(byte)
        if character.isprintable() and not character.isspace():
            alphabet[byte] = character
        else:
            alphabet[byte] = chr(next_character)
            next_character += 1
    return alphabet


@functools.cache
def merges_of(encoding: tiktoken.Encoding) -> list[str]:
    """For each token of several bytes, in order, the two tokens that are merged into it."""
    if encoding.name != "gpt2":  # a vocabulary of bytes: nothing is merged
        return []
    text = read_file_cached(MERGES_OF_GPT2, MERGES_SHA256).decode()
    return text.splitlines()[1:]  # after the line "#version: 0.2"
