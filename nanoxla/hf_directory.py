"""Reading a Hugging Face directory: the config and the weights of a Llama, as model.py has them.

    DIRECTORY/
        config.json                    the shape of the model
        model.safetensors              the weights; or
        model.safetensors.index.json   a list of the files that hold them
        tokenizer.model                the SentencePiece model of its tokenizer, if it has one

config.json may come from anyone. Whatever model.py cannot compute exactly is refused, never
approximated.
"""
import json
import sys
from pathlib import Path

import safetensors.torch
import torch

from nanoxla.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_CONTEXT = 2**20  # the rotary tables and the mask grow with it

# {key: (the value that model.py supports, the value that a missing key stands for)}
REQUIRED = {
    "model_type": ("llama", None),
    "architectures": (["LlamaForCausalLM"], ["LlamaForCausalLM"]),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "attention_dropout": (0, 0),
    "quantization_config": (None, None),
}


def is_hf(path):
    """Whether `path` is a Hugging Face directory, and not a run or a checkpoint."""
    return Path(path, "config.json").is_file()


def hf_name(name):
    """The name that LlamaForCausalLM gives to the parameter `name` of model.py."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def print_note(text):
    print(f"note: {text}", file=sys.stderr)


@torch.no_grad()
def read(directory, say=print_note):
    """The model in a Hugging Face directory: a dict with the keys of ModelConfig, and its weights
    {name in model.py: float32 tensor}. load_model of model.py takes both.

    In model.py the output head has a matrix of its own, and each attention head has keys and values
    of its own. A model that shares either gets copies, which compute the same function with more
    parameters; say() is called with a sentence about each. Raises UserError for a model that
    model.py cannot compute."""
    directory = Path(directory)
    values, n_kv_heads, tied = read_config(directory / "config.json")
    tensors = read_tensors(directory)
    if tied:
        copy_embedding(directory, tensors, say)
    copies = values["n_heads"] // n_kv_heads
    if copies > 1:
        say(f"{directory} has {n_kv_heads} key-value heads for {values['n_heads']} heads; "
            "here each head gets its own copy")
    check_size(directory, values, copies, tensors)
    weights = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # frees its memory once it has been converted
        ours = name.removeprefix("model.")
        if hf_name(ours) != name:
            raise UserError(f"{directory} should not have the tensor {name}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{directory}: {name} is {tensor.dtype}, "
                            f"expected one of {', '.join(DTYPES)}")
        if copies > 1 and ours.endswith(("k_proj.weight", "v_proj.weight")):
            expected = [values["dim"] // copies, values["dim"]]
            if list(tensor.shape) != expected:
                raise UserError(f"{directory}: {name} has the shape {list(tensor.shape)}; "
                                f"its config implies {expected}")
            heads = tensor.unflatten(0, (n_kv_heads, -1))  # [H / copies, K, D]
            # The heads that share a key-value head are neighbours.
            tensor = heads.repeat_interleave(copies, dim=0).flatten(0, 1)  # [D, D]
        weights[ours] = tensor.float()
    return values, weights


def read_config(path):
    """config.json as (a dict with the keys of ModelConfig, the number of key-value heads, whether
    the embedding is also the head). Raises UserError for what model.py cannot compute."""
    hf = read_json(path)
    for key, (required, default) in REQUIRED.items():
        if (found := hf.get(key, default)) != required:
            raise UserError(f"{path}: {key} = {found!r}; model.py supports only {required!r}")
    hf["rope_theta"] = rope_theta(path, hf)

    def number(key, kind, default=None):
        value = hf.get(key)
        value = default if value is None else value
        if type(value) not in (int, kind) or not 0 < value < 2**31:
            raise UserError(f"{path}: {key} = {value!r}, expected a positive {kind.__name__}")
        return kind(value)

    heads, width = number("num_attention_heads", int), number("hidden_size", int)
    n_kv_heads = number("num_key_value_heads", int, heads)
    head_dim = number("head_dim", int, width // heads)
    if heads * head_dim != width or heads % n_kv_heads:
        raise UserError(f"{path}: {heads} heads of head_dim = {head_dim} and {n_kv_heads} "
                        f"key-value heads do not make up hidden_size = {width}")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim = {head_dim} is odd; the rotary embedding turns pairs")
    values = {
        "vocab_size": number("vocab_size", int),
        "dim": width,
        "n_layers": number("num_hidden_layers", int),
        "n_heads": heads,
        "hidden_dim": number("intermediate_size", int),
        "context": number("max_position_embeddings", int),
        "rope_theta": number("rope_theta", float),
        "norm_eps": number("rms_norm_eps", float, 1e-6),
        "attention": "math",
    }
    return values, n_kv_heads, bool(hf.get("tie_word_embeddings", False))


def rope_theta(path, hf):
    """The base of the rotary wavelengths. transformers 4 writes it as rope_theta, transformers 5
    into rope_parameters; a config.json may have both. Raises UserError for a scaled or partial
    rotary embedding."""
    found = [hf["rope_theta"]] if "rope_theta" in hf else []
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key) or {}
        if (not isinstance(rope, dict)
                or rope.get("rope_type", rope.get("type", "default")) != "default"
                or rope.get("partial_rotary_factor", 1) != 1):
            raise UserError(f"{path}: {key} = {rope!r}; "
                            "model.py supports only the default rotary embedding")
        if "rope_theta" in rope and rope["rope_theta"] not in found:
            found.append(rope["rope_theta"])
    if len(found) > 1:
        raise UserError(f"{path} contradicts itself: rope_theta is {' and '.join(map(str, found))}")
    return found[0] if found else 10_000.0


def check_size(directory, values, copies, tensors):
    """Raises UserError if config.json describes a model much larger than the tensors. The model is
    built before the shapes are compared, and a mistake must not take all of the memory."""
    D, M, V = values["dim"], values["hidden_dim"], values["vocab_size"]
    described = 2 * V * D + values["n_layers"] * (4 * D * D + 3 * D * M + 2 * D) + D
    held = sum(tensor.numel() for tensor in tensors.values())
    if described > 2 * copies * held or values["context"] > MAX_CONTEXT:
        raise UserError(f"{directory}/config.json describes {described:,} parameters and a context "
                        f"of {values['context']:,}; the tensors hold {held:,} numbers, "
                        f"and the context is limited to {MAX_CONTEXT:,}")


def copy_embedding(directory, tensors, say):
    """Uses the embedding as the weights of the output head too. Raises UserError if `tensors` has a
    different lm_head.weight."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        return  # load_model reports it
    say(f"{directory} has one matrix for embedding and head; here the head is a copy")
    if not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
        raise UserError(f"{directory}: tie_word_embeddings is true, "
                        "but lm_head.weight is not model.embed_tokens.weight")


def read_tensors(directory):
    """{name: tensor} of model.safetensors or, without it, of the files that the index lists."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (directory / files[0]).exists():
        weight_map = read_json(index).get("weight_map")
        if (not isinstance(weight_map, dict)
                or not all(isinstance(file, str) for file in weight_map.values())):
            raise UserError(f"{index} is damaged: weight_map does not name a file for each tensor")
        files = sorted(set(weight_map.values()))
    tensors = {}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(f"{directory} has no {file}; "
                            "weights in another form, such as pytorch_model.bin, are not read")
        try:
            found = safetensors.torch.load_file(directory / file)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{directory / file} can't be read: {error}") from None
        if twice := tensors.keys() & found.keys():
            raise UserError(f"{directory} has the tensor {min(twice)} twice, "
                            f"the second time in {file}")
        tensors |= found
    # Old versions of transformers stored the rotary frequencies, which follow from rope_theta.
    return {name: tensor for name, tensor in tensors.items()
            if not name.endswith(".rotary_emb.inv_freq")}


def read_json(path):
    """The JSON object in a file, as a dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def json_bytes(content):
    """The bytes of a JSON file."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode()
