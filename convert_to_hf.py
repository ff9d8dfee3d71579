"""Convert a checkpoint to a Hugging Face directory, or a Hugging Face directory to a run.

    python convert_to_hf.py                      # the newest run under out/, into its hf/
    python convert_to_hf.py --checkpoint out/demo --output demo-hf --dtype bfloat16
    python convert_to_hf.py --from-hf path/to/TinyLlama --output out/tiny

model.py computes exactly what Hugging Face's LlamaForCausalLM computes, down to the rotary
embedding. So writing a Hugging Face directory only renames the weights:

    model.py                                    Hugging Face
    embed_tokens.weight                         model.embed_tokens.weight
    layers.0.input_layernorm.weight             model.layers.0.input_layernorm.weight
    layers.0.self_attn.q_proj.weight            model.layers.0.self_attn.q_proj.weight
    ...                                         ...
    norm.weight                                 model.norm.weight
    lm_head.weight                              lm_head.weight

The config is renamed too: dim is hidden_size, n_layers is num_hidden_layers, and so on; hf_config
below has the whole table.

transformers, lm-evaluation-harness, vLLM and llama.cpp read the directory. Writing it needs none of
them. A model that the other side cannot express exactly is refused, never approximated. A tokenizer
that it cannot express is left out, with a warning.

--from-hf renames the weights back. Weights that the Hugging Face model shares are copied: a
key-value head of several attention heads, and an embedding that is also the output head. It writes
a run with a single checkpoint, of step 0. `sample.py --checkpoint out/tiny` samples from it, and
`train.py CONFIG --resume=out/tiny` trains it further. nanoxla/hf_directory.py reads the Hugging
Face directory.
"""
import argparse
import json
import sys
from pathlib import Path

from model import load_model, num_parameters
from nanoxla import checkpoint, hf_directory
from nanoxla.errors import UserError, run_command
from nanoxla.files import check_unused, write_directory, write_file
from nanoxla.hf_directory import DTYPES, hf_name, json_bytes
from nanoxla.hf_tokenizer import tokenizer_files
from nanoxla.init_from import check_finite
from nanoxla.model_card import model_card
from nanoxla.tokenizer import load_tokenizer

# --- to Hugging Face ----------------------------------------------------------------------------


def hf_config(config, dtype, bos, eos):
    """config.json of a ModelConfig, as a dict. bos, eos: token ids, or None."""
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
        "rope_theta": config.rope_theta,  # the name in transformers 4
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and in 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,  # the name in transformers 4
        "dtype": dtype,  # and in 5
    }


def hf_tensors(model, dtype):
    """{Hugging Face's name: tensor} of the model's weights in DTYPES[dtype]."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[hf_name(name)] = tensor = p.detach().to(DTYPES[dtype])
        if not tensor.isfinite().all():
            raise UserError(f"{name} has values too large for {dtype}; try another --dtype")
    return tensors


def to_hf(source, output, dtype):
    """Writes the checkpoint `source` as the Hugging Face directory `output`."""
    state = checkpoint.verify(source, without=["optimizer.safetensors"])
    weights = checkpoint.load_tensors(source, "model")
    check_finite(source, weights)
    model = load_model(state["config"], weights, source)
    files, bos, eos = {}, None, None
    if state["tokenizer"]:
        path = source / "tokenizer.model"
        processor = load_tokenizer(path, model.config.vocab_size)
        bos, eos = processor.bos_id(), processor.eos_id()
        try:
            files = tokenizer_files(path, processor, model.config.context)
        except ValueError as error:
            warn_no_tokenizer(f"transformers can't express {path}: {error}")
    else:
        warn_no_tokenizer("the checkpoint has none")
    rows = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    parameters = num_parameters(model.config)
    card = model_card(state, rows, model.config, parameters, dtype)
    files |= {"config.json": json_bytes(hf_config(model.config, dtype, bos, eos)),
              "generation_config.json": json_bytes({"bos_token_id": bos, "eos_token_id": eos}),
              "README.md": card.encode()}
    tensors = hf_tensors(model, dtype)
    with write_directory(output) as directory:
        for name, content in files.items():
            write_file(directory / name, content)
        checkpoint.write_tensors(directory / "model.safetensors", tensors)
    print(f"{source} -> {output}: {len(tensors)} tensors, {parameters[0]:,} parameters in {dtype}")


def warn_no_tokenizer(reason):
    print(f"warning: the output has no tokenizer, because {reason}", file=sys.stderr)


# --- from Hugging Face --------------------------------------------------------------------------


def from_hf(source, output):
    """Writes the Hugging Face directory `source` as the run `output`, with a checkpoint of step
    0."""
    values, weights = hf_directory.read(source)
    check_finite(source, weights)
    model = load_model(values, weights, source)
    path, tokenizer = source / "tokenizer.model", None
    if path.is_file():
        load_tokenizer(path, model.config.vocab_size)  # raises UserError if the two do not fit
        tokenizer = path.read_bytes()
    else:
        warn_no_tokenizer(f"{source} has no tokenizer.model (SentencePiece)")
    files = {"metrics.jsonl": b""} | ({"tokenizer.model": tokenizer} if tokenizer else {})
    state = checkpoint.describe(0, 0, model.config, None, tokenizer)
    with write_directory(output) as directory:
        checkpoint.write(directory / "checkpoints" / "step_00000000",
                         {"model": dict(model.named_parameters())}, files, state)
    print(f"{source} -> {output}: {num_parameters(model.config)[0]:,} parameters in float32")


# --- the command --------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint to a Hugging Face directory, or back.")
    add = parser.add_argument
    add("--checkpoint",
        help="directory of a run, or a checkpoint (default: the newest run under out/)")
    add("--output", help="directory to create (default: hf/ in the directory of the run)")
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: float32)")
    add("--from-hf", metavar="DIR", help="convert this Hugging Face directory to a run instead")
    arguments = parser.parse_args()
    if arguments.from_hf is not None:
        if arguments.output is None or arguments.checkpoint is not None or arguments.dtype:
            raise UserError("--from-hf needs --output, the directory of the new run, "
                            "and takes no --checkpoint and no --dtype")
        output = Path(arguments.output)
        check_output(output)
        return from_hf(Path(arguments.from_hf), output)
    source = checkpoint.find_checkpoint(arguments.checkpoint)
    if arguments.output is not None:
        output = Path(arguments.output)
    elif source.absolute().parent.name == "checkpoints":
        output = source.absolute().parent.parent / "hf"
    else:
        raise UserError(f"{source} is not in the checkpoints/ of a run; "
                        "name a directory with --output")
    check_output(output)
    to_hf(source, output, arguments.dtype or "float32")


def check_output(output):
    check_unused(output, "--output")
    if output.resolve() == Path.cwd():
        raise UserError("--output is the current directory, which can't be replaced; "
                        "name a new one")


if __name__ == "__main__":
    run_command(main)
