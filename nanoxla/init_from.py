"""init_from: a new run that starts with the weights of another model."""
import sys
from pathlib import Path

from nanoxla import checkpoint, hf_directory
from nanoxla.errors import UserError
from nanoxla.files import sha256
from nanoxla.shards import tokenizer_path

SHAPE = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "rope_theta", "norm_eps")


def find_model(path):
    """The Hugging Face directory, or the checkpoint, that the user means by `path`: see
    find_checkpoint."""
    if path is not None and hf_directory.is_hf(path):
        return Path(path)
    return checkpoint.find_checkpoint(path)


def read_model(directory):
    """The first two arguments of load_model in model.py, of a directory that find_model found."""
    read = hf_directory.read if hf_directory.is_hf(directory) else checkpoint.load
    return read(directory)


def check_init_from(config):
    """Raises UserError unless a run with this config can start with the weights of
    config.init_from. Prints what it starts with."""
    directory = find_model(config.init_from)
    values, weights = read_model(directory)
    wrong = [f"--{key}={values[key]}" for key in SHAPE if values[key] != getattr(config, key)]
    if wrong:
        raise UserError(f"init_from {directory} is a model of another shape than this config; "
                        f"for its shape, add {' '.join(wrong)}")
    check_finite(directory, weights)
    now, before = config.context, values["context"]
    change = "" if now == before else f"; its context was {before:,}, here it is {now:,}"
    print(f"init_from {directory}: its weights, a new optimiser state and schedule{change}")
    ours, its = tokenizer_path(config), directory / "tokenizer.model"
    if ours and its.is_file() and sha256(ours) != sha256(its):
        print(f"warning: {ours} is not the tokenizer of {directory}: its token ids mean other "
              "words, which the model has to learn anew", file=sys.stderr)


def check_finite(source, weights):
    """Raises UserError if a weight is infinite or not a number."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite: the weights are "
                            "damaged, or the training has diverged")


def load_initial_weights(model, config):
    """Copies the weights of config.init_from into model. Every core calls it; check_init_from has
    verified them, and printed the notes, once."""
    directory = find_model(config.init_from)
    if hf_directory.is_hf(directory):
        _, weights = hf_directory.read(directory, say=lambda note: None)
    else:
        weights = checkpoint.load_tensors(directory, "model")
    model.load_state_dict(weights)
