"""Checkpoints on disk: their format, finding them, verifying them, reading and writing them.

    out/run/checkpoints/step_00001000/
        model.safetensors       weights under the names of model.py, float32
        optimizer.safetensors   AdamW's moments, exp_avg.NAME and exp_avg_sq.NAME; skipped: the
                                number of skipped updates, in total and in a row
        metrics.jsonl           the rows that the run had logged by then
        tokenizer.model         the SentencePiece model of the data, if there is one
        state.json              step, tokens seen, the config, a fingerprint of the data, versions,
                                and the size and SHA-256 of every other file

A directory named step_NNNNNNNN is complete and on the disk. Anything else ends in .partial,
.removed or .set_aside (or .set_aside1, ...). Nothing is pickled, so reading a stranger's checkpoint
cannot run code.
"""
import dataclasses
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import safetensors.torch

from nanoxla.errors import UserError
from nanoxla.files import fsync, sha256, write_directory, write_file

FORMAT = 2
COMPLETE = re.compile(r"step_\d{8}")


# --- finding ------------------------------------------------------------------------------------


def list_checkpoints(out_dir):
    """The complete checkpoints of the run in out_dir, oldest first."""
    return sorted(path for path in Path(out_dir, "checkpoints").glob("step_*")
                  if COMPLETE.fullmatch(path.name) and path.is_dir())


def newest_run():
    """The directory of the run under out/ that saved last."""
    runs = [path for path in Path("out").glob("*")
            if path.suffix != ".partial" and list_checkpoints(path)]
    if not runs:
        raise UserError("there is no run with a checkpoint under out/; "
                        "train one, or name one with --checkpoint")
    return max(runs, key=lambda run: list_checkpoints(run)[-1].stat().st_mtime)


def find_checkpoint(path):
    """The checkpoint that the user means by `path`: a checkpoint directory; a run's directory,
    meaning its newest checkpoint; or None, meaning the newest checkpoint of the newest run under
    out/."""
    path = newest_run() if path is None else Path(path)
    if Path(path, "state.json").is_file() or (path.is_dir() and COMPLETE.fullmatch(path.name)):
        return path
    if found := list_checkpoints(path):
        return found[-1]
    raise UserError(f"no checkpoint in {path}; expected a directory with a state.json, "
                    "or the directory of a run, with checkpoints/step_...")


# --- state.json ---------------------------------------------------------------------------------


def describe(step, tokens, config, data_sha256, tokenizer):
    """The content of state.json, without the list of files: after `step` steps and `tokens` tokens,
    with the fingerprint of the data (None if unknown) and the bytes of tokenizer.model (or
    None)."""
    return {"format": FORMAT, "step": step, "tokens": tokens,
            "config": dataclasses.asdict(config), "data_sha256": data_sha256,
            "tokenizer": "tokenizer.model" if tokenizer else None,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest() if tokenizer else None,
            "versions": {name: version(name) for name in ("torch", "torch_xla", "safetensors")}}


def state_bytes(state):
    """The bytes of state.json: `state`, with a checksum of itself, so that any change is
    detected."""
    content = json.dumps(state, indent=1)
    checksum = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps(state | {"sha256": checksum}, indent=1).encode()


def read_state(checkpoint):
    """The content of state.json, as a dict."""
    path = Path(checkpoint, "state.json")
    try:
        content = path.read_bytes()
        state = json.loads(content)
        found = state["format"]
    except FileNotFoundError:
        raise UserError(f"{checkpoint} has no state.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, of another version of this code; "
                        f"this version reads format {FORMAT}")
    state.pop("sha256", None)
    if state_bytes(state) != content:
        raise UserError(f"{path} is damaged: its content does not match its checksum")
    return state


# --- verifying and reading ----------------------------------------------------------------------


def verify(checkpoint, without=()):
    """Raises UserError unless the files are, byte for byte, those that were saved, except for the
    files in `without`. If `without` is empty, there must be no other files either, except hidden
    ones, such as Jupyter's. Returns the state. Raises OSError if a file can't be read, which need
    not be damage: a network disk may fail for a moment."""
    state = read_state(checkpoint)
    files = state["files"]
    for name in files.keys() - set(without):
        path = Path(checkpoint, name)
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if (size := path.stat().st_size) != files[name]["bytes"]:
            raise UserError(f"{path} is damaged: {size:,} bytes, expected {files[name]['bytes']:,}")
        if sha256(path) != files[name]["sha256"]:
            raise UserError(f"{path} is damaged: its content does not match the checksum in "
                            "state.json")
    names = {path.name for path in Path(checkpoint).iterdir() if not path.name.startswith(".")}
    if not without and (foreign := names - {"state.json", *files}):
        raise UserError(f"{Path(checkpoint, min(foreign))} is not part of the checkpoint")
    return state


def load_tensors(checkpoint, name):
    """{key: tensor} of checkpoint/NAME.safetensors, on the CPU."""
    path = Path(checkpoint, f"{name}.safetensors")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def load(checkpoint):
    """The config (a dict) and the verified weights {name: tensor} of a checkpoint: the first two
    arguments of load_model in model.py."""
    state = verify(checkpoint, without=["optimizer.safetensors", "metrics.jsonl"])
    return state["config"], load_tensors(checkpoint, "model")


# --- writing ------------------------------------------------------------------------------------


def write_tensors(path, tensors):
    """Writes {name: tensor} to a safetensors file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} can't be written: {error}") from None
    path.chmod(mode)  # save_file makes the file readable to its owner only


def write(directory, tensors, others, state):
    """Writes a checkpoint.

    tensors: {file: {name: tensor on the CPU}}. others: {file: bytes}. state: made by `describe`."""
    with write_directory(directory) as partial:
        for name, content in others.items():
            write_file(partial / name, content)
        for name in tensors:
            write_tensors(partial / f"{name}.safetensors", tensors[name])
        paths = sorted(partial.iterdir())
        with ThreadPoolExecutor() as threads:  # flush and hash side by side: they take equally long
            digests = threads.map(sha256, paths)
            for path in paths:
                fsync(path)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest}
                 for path, digest in zip(paths, digests)}
        write_file(partial / "state.json", state_bytes(state | {"files": files}))
