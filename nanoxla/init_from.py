"""init_from: a new run that starts with the weights of another model."""
import contextlib
import io
import sys
from pathlib import Path

from nanoxla import checkpoint, hf_directory
from nanoxla.errors import UserError
from nanoxla.files import sha256
from nanoxla.shards import tokenizer_path

SHAPE = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "rope_theta", "norm_eps")


def read_weights(path):
    """(directory, values, weights) of a run (its newest checkpoint), a checkpoint or a Hugging Face
    directory; None means the newest run under out/. values and weights are the first two arguments
    of load_model in model.py."""
    if path is not None and hf_directory.is_hf(path):
        return Path(path), *hf_directory.read(path)
    directory = checkpoint.find_checkpoint(path)
    return directory, *checkpoint.load(directory)


def check_init_from(config):
    """Raises UserError unless a run with this config can start with the weights of
    config.init_from. Prints what it starts with."""
    directory, values, weights = read_weights(config.init_from)
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
    """Copies the weights of config.init_from, which check_init_from has checked, into model."""
    with contextlib.redirect_stderr(io.StringIO()):  # check_init_from has printed the notes
        _, _, weights = read_weights(config.init_from)
    model.load_state_dict(weights)
