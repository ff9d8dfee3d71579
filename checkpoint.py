"""Checkpoints: directories that training writes and that training and sampling read.

    out/run/checkpoints/step_00001000/
        model.safetensors       weights under the names of model.py, float32
        optimizer.safetensors   AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME
        tokenizer.model         the SentencePiece model of the data, where there is one
        state.json              step, tokens seen, the whole config, the tokenizer's sha256, versions

A directory of that name is complete and on the disk; whatever is not ends in .partial or .removed. Nothing is pickled:
reading a stranger's checkpoint runs no code of theirs.
"""
import dataclasses
import hashlib
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch

from data import UserError, flush, tokenizer_path, write_file
from model import Llama, ModelConfig

FORMAT = 1


def list_checkpoints(out_dir):
    """The complete checkpoints of the run in out_dir, oldest first."""
    return sorted(path for path in Path(out_dir, "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def find_checkpoint(path):
    """The checkpoint at `path`: a checkpoint directory, or a run's directory, whose newest it then is."""
    if Path(path, "state.json").is_file():
        return Path(path)
    if found := list_checkpoints(path):
        return found[-1]
    raise UserError(f"no checkpoint in {path}; expected a directory with a state.json, or a run's with checkpoints/step_...")


def read_state(checkpoint):
    """state.json as a dict."""
    path = Path(checkpoint, "state.json")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"{path} has format {state['format']}, this code reads {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the state of a checkpoint: {error!r}") from None
    return state


def tensors_of(model, optimizer):
    """All that a checkpoint stores: the weights, and the moments under the names of their weights."""
    moments = {f"{moment}.{name}": tensor for name, p in model.named_parameters()
               for moment, tensor in optimizer.state[p].items()}
    return {"model": dict(model.named_parameters()), "optimizer": moments}


def save(config, step, model, optimizer):
    """Writes the checkpoint of `step` finished steps into config.out_dir, under another name until all of it is on the
    disk, then deletes all but the newest config.keep_checkpoints."""
    directory = Path(config.out_dir, "checkpoints", f"step_{step:08d}")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while saving
    partial.mkdir(parents=True)
    for name, tensors in tensors_of(model, optimizer).items():
        path = partial / f"{name}.safetensors"
        safetensors.torch.save_file({key: tensor.detach().cpu() for key, tensor in tensors.items()}, path, {"format": "pt"})
        flush(path)
    state = {"format": FORMAT, "step": step, "tokens": step * config.batch_size * config.context,
             "config": dataclasses.asdict(config), "tokenizer": None, "tokenizer_sha256": None,
             "versions": {package: version(package) for package in ("torch", "torch_xla", "safetensors")}}
    if source := tokenizer_path(config):
        content = source.read_bytes()
        write_file(partial / "tokenizer.model", content)
        state |= {"tokenizer": "tokenizer.model", "tokenizer_sha256": hashlib.sha256(content).hexdigest()}
    write_file(partial / "state.json", json.dumps(state, indent=1).encode())
    if directory.exists():  # of the same step, from before a resume
        remove(directory)
    partial.rename(directory)
    flush(directory.parent)
    for old in list_checkpoints(config.out_dir)[:-config.keep_checkpoints]:
        remove(old)


def remove(checkpoint):
    """Deletes it under another name, or a kill would leave half of it under the name of a whole one."""
    doomed = checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.removed"))
    shutil.rmtree(doomed)


def load_tensors(checkpoint, name):
    """{key: tensor} of checkpoint/NAME.safetensors, on the CPU."""
    path = Path(checkpoint, f"{name}.safetensors")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


@torch.no_grad()
def restore(checkpoint, model, optimizer):
    """Fills model and optimizer, on whatever device they are, from the checkpoint; returns its number of finished steps."""
    for name, tensors in tensors_of(model, optimizer).items():
        saved = load_tensors(checkpoint, name)
        if strange := tensors.keys() ^ saved.keys():
            raise UserError(f"{checkpoint}/{name}.safetensors lacks, or should not have, {min(strange)}")
        for key, tensor in tensors.items():
            tensor.copy_(saved[key])
    return read_state(checkpoint)["step"]


def load_model(checkpoint, **changes):
    """The model of a checkpoint as a Llama on the CPU, its config under `changes`."""
    config = read_state(checkpoint)["config"]
    shape = {field.name: config[field.name] for field in dataclasses.fields(ModelConfig)}
    model = Llama(ModelConfig(**shape | changes))
    try:
        model.load_state_dict(load_tensors(checkpoint, "model"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint}/model.safetensors does not fit the config in state.json: {error}") from None
    return model


# What makes a run the same run is all but where things are, how often they happen and how a batch is cut up.
MAY_CHANGE = ("out_dir data_dir train_glob val_glob tokenizer attention micro_batch_size peak_tflops log_every eval_every "
              "eval_batches checkpoint_every keep_checkpoints resume").split()


def checkpoint_to_resume(config):
    """The checkpoint that a run with this config goes on from, or None for a new run."""
    if config.resume == "never":
        if Path(config.out_dir).exists() and any(Path(config.out_dir).iterdir()):
            raise UserError(f"out_dir {config.out_dir} is not empty and resume=never; choose another out_dir")
        return None
    if config.resume == "auto" and not list_checkpoints(config.out_dir):
        return None
    checkpoint = find_checkpoint(config.out_dir if config.resume == "auto" else config.resume)
    then = read_state(checkpoint)["config"]
    changed = [f"{key} was {then.get(key)!r}, is {value!r}" for key, value in dataclasses.asdict(config).items()
               if key not in MAY_CHANGE and then.get(key) != value]
    if changed:
        raise UserError(f"{checkpoint} is of another run: {'; '.join(changed)}. Put that back, or choose another out_dir")
    return checkpoint
