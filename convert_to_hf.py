"""Between this project's checkpoints and Hugging Face directories, which transformers and lm-evaluation-harness read.

    python convert_to_hf.py                                           # the newest run under out/ -> its hf/
    python convert_to_hf.py --checkpoint out/demo --output demo-hf --dtype bfloat16
    python convert_to_hf.py --from-hf TinyLlama --output out/tiny     # the way back: sample it, train it further

The model is a LlamaForCausalLM down to its names and its rotary convention, so converting is a rename. Needs no transformers.
What one side can't express is refused, not approximated. The way back writes a run whose only checkpoint is step 0:
`sample.py --checkpoint out/tiny` reads it, and `train.py CONFIG --resume=out/tiny` trains it from there.
"""
import argparse
import json
import sys
from pathlib import Path

import safetensors.torch
import torch

from checkpoint import describe, find_checkpoint, load_model, verify, write, write_tensors
from data import load_tokenizer
from model import Llama, ModelConfig, num_parameters
from process import UserError, refuse_used, run_command, write_directory, write_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hf_name(name):
    """What Hugging Face calls the parameter `name` of model.py."""
    return name if name.startswith("lm_head.") else f"model.{name}"


# --- to Hugging Face: the model ---------------------------------------------------------------------------------------


def hf_config(config, dtype, bos, eos):
    """config.json of a ModelConfig. What it says twice is under the names of transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "head_dim": config.dim // config.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def hf_tensors(model, dtype):
    """The model's weights in DTYPES[dtype], under Hugging Face's names."""
    tensors = {hf_name(name): p.detach().to(DTYPES[dtype]) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{name} has values that are not finite: the weights are damaged, or the training has diverged")
        if not tensors[hf_name(name)].isfinite().all():
            raise UserError(f"{name} has values too large for {dtype}; try another --dtype")
    return tensors


# --- to Hugging Face: the tokenizer -----------------------------------------------------------------------------------


def tokenizer_json(processor):
    """tokenizer.json, which makes the `tokenizers` package encode as a SentencePiece model does. Raises ValueError if it can't.

    transformers would write one too, but its version 5 reads a tokenizer of the class LlamaTokenizer in such a way that
    text starting with a space gets other ids. SentencePiece's BPE joins the neighbours whose union is the piece with the
    highest score, the leftmost of several; here a list of pairs in the order of that score says the same. Where scores are
    equal, as Mistral's are for runs of spaces, the longest left part comes first.
    """
    ids = range(processor.vocab_size())
    texts = ["a", "  a  b ", "\n\t", "e\N{COMBINING ACUTE ACCENT}", "\N{LATIN SMALL LIGATURE FI}", "\N{IDEOGRAPHIC SPACE}"]
    if any(processor.normalize(text) != "▁" + text.replace(" ", "▁") for text in texts):
        raise ValueError("it changes the text before it encodes it")
    if sum(map(processor.is_byte, ids)) != 256:
        raise ValueError("it has no tokens for single bytes")
    vocab = {processor.id_to_piece(i): i for i in ids}
    normal = {piece: i for piece, i in vocab.items()
              if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i) or processor.is_unused(i))}
    merges = []
    for piece, i in normal.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        if len(piece) > 1 and not pairs:
            raise ValueError(f"its piece {piece!r} is not the union of two others, as in BPE")
        merges += [(-processor.get_score(i), -len(left), -len(right), left, right) for left, right in pairs]
    control = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    bos = processor.id_to_piece(processor.bos_id())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": processor.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in control],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [processor.bos_id()], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": processor.id_to_piece(processor.unk_id()),
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "ignore_merges": False, "vocab": vocab, "merges": [[left, right] for *_, left, right in sorted(merges)]},
    }


def tokenizer_files(path, processor, context):
    """{name: bytes} of the tokenizer at `path`, for a model that reads `context` tokens."""
    special = {f"{role}_token": processor.id_to_piece(i) for role, i in
               (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("unk", processor.unk_id()))}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids, which generate() would refuse
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # "</s>" in a text is four characters, as for SentencePiece, and ends nothing
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.model": path.read_bytes(), "tokenizer.json": as_json(tokenizer_json(processor)),
            "tokenizer_config.json": as_json(config), "special_tokens_map.json": as_json(special)}


def as_json(content):
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


# --- to Hugging Face: the whole directory -----------------------------------------------------------------------------


def model_card(state, rows, config, dtype):
    """README.md: what the run says of itself, state.json and the rows of its metrics.jsonl, and nothing else."""
    total, in_matmuls = num_parameters(config)
    facts = [("parameters", f"{total:,}, of which {in_matmuls:,} in matrix products"),
             ("shape", f"{config.n_layers} layers, width {config.dim:,}, {config.n_heads} heads, SwiGLU {config.hidden_dim:,}, "
                       f"vocabulary {config.vocab_size:,}, context {config.context:,}, untied head"),
             ("weights", dtype)]
    training, evaluations = ([row for row in rows if row.get(key) is not None] for key in ("loss", "val_loss"))
    run = state["config"]
    if state["step"]:
        facts += [("trained on", f"{state['tokens']:,} tokens in {state['step']:,} steps of {run['batch_size']} windows"),
                  ("optimiser", f"AdamW, peak learning rate {run['learning_rate']:g}, {run['warmup_steps']:,} warm-up steps, "
                                f"cosine over {run['max_steps']:,} steps to {run['min_lr']:g}, weight decay "
                                f"{run['weight_decay']:g}, gradients clipped at {run['grad_clip']:g}"),
                  ("precision", f"matrix products in {run['dtype']}, weights and moments in float32")]
    if training:
        facts.append(("training loss", f"{training[-1]['loss']:.4f} at step {training[-1]['step']:,}"))
    if evaluations:
        facts.append(("validation loss", f"{evaluations[-1]['val_loss']:.4f} at step {evaluations[-1]['step']:,} "
                                         "(cross-entropy in nats per token)"))
    facts.append(("software", ", ".join(f"{package} {version}" for package, version in state["versions"].items())))
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A Llama, written by nanoxla

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0], skip_special_tokens=True))
```

A base model: it continues text and has not been taught to follow instructions.
"""


def to_hf(checkpoint, output, dtype):
    """Writes a checkpoint as the Hugging Face directory `output`."""
    state = verify(checkpoint, without=["model.safetensors", "optimizer.safetensors"])  # load_model verifies the weights
    model = load_model(checkpoint, attention="math")
    others, bos, eos = {}, None, None
    if state["tokenizer"]:
        path = checkpoint / "tokenizer.model"
        processor = load_tokenizer(path, model.config.vocab_size)
        bos, eos = processor.bos_id(), processor.eos_id()
        try:
            others = tokenizer_files(path, processor, model.config.context)
        except ValueError as error:
            print(f"warning: without a tokenizer, because transformers can't express {path}: {error}", file=sys.stderr)
    else:
        print("warning: without a tokenizer, because the checkpoint has none", file=sys.stderr)
    rows = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    others |= {"config.json": as_json(hf_config(model.config, dtype, bos, eos)),
               "generation_config.json": as_json({"bos_token_id": bos, "eos_token_id": eos}),
               "README.md": model_card(state, rows, model.config, dtype).encode()}
    tensors = hf_tensors(model, dtype)
    with write_directory(output) as directory:
        for name, content in others.items():
            write_file(directory / name, content)
        write_tensors(directory / "model.safetensors", tensors)
    print(f"{checkpoint} -> {output}: {len(tensors)} tensors, {num_parameters(model.config)[0]:,} parameters in {dtype}")


# --- from Hugging Face ------------------------------------------------------------------------------------------------


def is_hf(path):
    return Path(path, "config.json").is_file()


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


MUST_BE = {  # what model.py computes: value, and what a config means that does not say it
    "model_type": ("llama", None),
    "architectures": (["LlamaForCausalLM"], ["LlamaForCausalLM"]),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "attention_dropout": (0, 0),
    "quantization_config": (None, None),
}


def read_config(directory):
    """What config.json of a Hugging Face directory says: a ModelConfig, the number of key-value heads, and whether the
    embedding is the head too. Raises, with the reason, if model.py can't compute that."""
    path = directory / "config.json"
    hf = read_json(path)
    for key, (value, default) in MUST_BE.items():
        if hf.get(key, default) != value:
            raise UserError(f"{path}: {key} = {hf.get(key)!r}, and this model can do {value!r} only")
    thetas = {hf["rope_theta"]} if "rope_theta" in hf else set()  # it may be said three times
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key) or {}
        default = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
        if not default or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{path}: {key} = {rope!r}, and this model can do the default rotary embedding only")
        thetas |= {rope["rope_theta"]} if "rope_theta" in rope else set()
    if len(thetas) > 1:
        raise UserError(f"{path} contradicts itself: rope_theta is {' and '.join(map(str, thetas))}")
    hf = hf | {"rope_theta": thetas.pop() if thetas else 10_000.0}

    def number(key, kind, default=None):
        value = hf.get(key)
        value = default if value is None else value
        if type(value) not in (int, kind) or not 0 < value < 2**31:
            raise UserError(f"{path}: {key} = {value!r}, expected a positive {kind.__name__}")
        return kind(value)

    heads, width = number("num_attention_heads", int), number("hidden_size", int)
    kv_heads = number("num_key_value_heads", int, heads)
    if heads * number("head_dim", int, width // heads) != width or heads % kv_heads:
        raise UserError(f"{path}: {heads} heads of head_dim = {hf.get('head_dim')} and {kv_heads} key-value heads do not make "
                        f"up hidden_size = {width}")
    try:
        config = ModelConfig(
            vocab_size=number("vocab_size", int), dim=width, n_layers=number("num_hidden_layers", int), n_heads=heads,
            hidden_dim=number("intermediate_size", int), context=number("max_position_embeddings", int),
            rope_theta=number("rope_theta", float), norm_eps=number("rms_norm_eps", float, 1e-6))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config, kv_heads, bool(hf.get("tie_word_embeddings", False))


def read_tensors(directory):
    """{name: tensor} of a Hugging Face directory: of model.safetensors or, without it, of the files that an index lists."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (directory / files[0]).exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} is damaged: weight_map is not a file for each tensor")
        files = sorted(set(weight_map.values()))
    tensors = {}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(f"{directory} has no {file}; weights in another form, such as pytorch_model.bin, are not read")
        try:
            found = safetensors.torch.load_file(directory / file)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{directory / file} can't be read: {error}") from None
        if twice := tensors.keys() & found.keys():
            raise UserError(f"{directory} has the tensor {min(twice)} twice, the second time in {file}")
        tensors |= found
    # transformers once stored the rotary wavelengths, which follow from rope_theta
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}


@torch.no_grad()
def load_hf(directory):
    """The model in a Hugging Face directory, as a Llama on the CPU in float32. Heads that share keys and values get copies of
    them, and a head that is the embedding becomes a copy of it: the same function, with more parameters."""
    directory = Path(directory)
    config, kv_heads, tied = read_config(directory)
    tensors = read_tensors(directory)
    if tied and "model.embed_tokens.weight" in tensors:
        print(f"note: {directory} has one matrix for embedding and head; here the head is a copy", file=sys.stderr)
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
            raise UserError(f"{directory}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
    copies = config.n_heads // kv_heads
    if copies > 1:
        print(f"note: {directory} has {kv_heads} key-value heads for {config.n_heads} heads; here each head has a copy",
              file=sys.stderr)
    described, held = num_parameters(config)[0], sum(tensor.numel() for tensor in tensors.values())
    if described > 2 * copies * held or config.context > 2**20:  # before memory is taken for it
        raise UserError(f"{directory}/config.json describes {described:,} parameters and a context of {config.context:,}; the "
                        f"tensors hold {held:,} numbers, and a context may have {2**20:,}")
    model = Llama(config)
    parameters = {hf_name(name): p for name, p in model.named_parameters()}
    if strange := parameters.keys() ^ tensors.keys():
        raise UserError(f"{directory} lacks, or should not have, the tensor {min(strange)}")
    for name, p in parameters.items():
        tensor = tensors[name]
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{directory}: {name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        rows, *others = p.shape
        shared = name.endswith(("k_proj.weight", "v_proj.weight"))
        expected = [rows // copies if shared else rows, *others]
        if list(tensor.shape) != expected:
            raise UserError(f"{directory}: {name} has the shape {list(tensor.shape)}, and by config.json it is {expected}")
        if shared:
            heads = tensor.unflatten(0, (kv_heads, -1))  # [H / copies, K, D]
            tensor = heads.repeat_interleave(copies, dim=0).flatten(0, 1)  # each head's next to its copies: [D, D]
        p.copy_(tensor)
    return model


def from_hf(directory, output):
    """Writes a Hugging Face directory as a run in `output`, whose only checkpoint is of step 0."""
    model, path = load_hf(directory), Path(directory, "tokenizer.model")
    tokenizer = None
    if path.is_file():
        load_tokenizer(path, model.config.vocab_size)
        tokenizer = path.read_bytes()
    else:
        print(f"warning: without a tokenizer, because {directory} has no tokenizer.model (SentencePiece)", file=sys.stderr)
    others = {"metrics.jsonl": b""} | ({"tokenizer.model": tokenizer} if tokenizer else {})
    with write_directory(output) as partial:
        write(partial / "checkpoints" / "step_00000000", {"model": dict(model.named_parameters())}, others,
              describe(0, 0, model.config, None, tokenizer))
    print(f"{directory} -> {output}: {num_parameters(model.config)[0]:,} parameters in float32")


# --- the command ------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a Hugging Face directory, or back.")
    parser.add_argument("--checkpoint", help="a run's directory or a checkpoint (default: the newest run under out/)")
    parser.add_argument("--output", help="directory to make (default: hf/ in the run's)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")
    parser.add_argument("--from-hf", metavar="DIR", help="convert this Hugging Face directory to a run instead")
    arguments = parser.parse_args()
    back = arguments.from_hf is not None
    if back and (arguments.output is None or arguments.checkpoint is not None or arguments.dtype):
        raise UserError("--from-hf needs --output, the directory of the run to make, and takes no --checkpoint and no --dtype")
    checkpoint = None if back else find_checkpoint(arguments.checkpoint)
    if arguments.output is None and checkpoint.absolute().parent.name != "checkpoints":
        raise UserError(f"{checkpoint} is in no run's checkpoints/; name a directory with --output")
    output = Path(checkpoint.absolute().parent.parent / "hf" if arguments.output is None else arguments.output)
    refuse_used(output, "--output")
    if output.resolve() == Path.cwd():
        raise UserError("--output is the current directory, which would be replaced; name one that is yet to be made")
    if back:
        from_hf(arguments.from_hf, output)
    else:
        to_hf(checkpoint, output, arguments.dtype or "float32")


if __name__ == "__main__":
    run_command(main)
