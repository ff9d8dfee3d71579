"""Checkpoints: directories that training writes and that training and sampling read.

    out/run/checkpoints/step_00001000/
        model.safetensors       weights under the names of model.py, float32
        optimizer.safetensors   AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME; skipped: updates left out, see AdamW
        metrics.jsonl           what the run logged until then
        tokenizer.model         the SentencePiece model of the data, where there is one
        state.json              step, tokens seen, the whole config, what the data was, versions, and each file's sha256

A directory of that name is complete and on the disk; whatever is not ends in .partial, .removed or .set_aside. Nothing is
pickled: reading a stranger's checkpoint runs no code of theirs.
"""
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch

from data import tokenizer_path
from model import Llama, ModelConfig, num_parameters
from process import UserError, flush, write_directory, write_file

FORMAT = 2
COMPLETE = re.compile(r"step_\d{8}")


# --- finding and checking ---------------------------------------------------------------------------------------------


def list_checkpoints(out_dir):
    """The complete checkpoints of the run in out_dir, oldest first."""
    return sorted(path for path in Path(out_dir, "checkpoints").glob("step_*")
                  if COMPLETE.fullmatch(path.name) and path.is_dir())


def newest_run():
    """The directory under out/ of the run that saved last."""
    runs = [path for path in Path("out").glob("*") if path.suffix != ".partial" and list_checkpoints(path)]
    if not runs:
        raise UserError("there is no run with a checkpoint under out/; train one, or name one with --checkpoint")
    return max(runs, key=lambda run: list_checkpoints(run)[-1].stat().st_mtime)


def find_checkpoint(path):
    """The checkpoint at `path`: a checkpoint directory, or a run's directory, whose newest it then is; of the newest run under
    out/ if path is None."""
    path = newest_run() if path is None else Path(path)
    if Path(path, "state.json").is_file() or (path.is_dir() and COMPLETE.fullmatch(path.name)):
        return path
    if found := list_checkpoints(path):
        return found[-1]
    raise UserError(f"no checkpoint in {path}; expected a directory with a state.json, or a run's with checkpoints/step_...")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sealed(state):
    """state.json's bytes: `state` with a checksum of its own, so that no byte of the file can change unseen."""
    content = json.dumps(state, indent=1)
    return json.dumps(state | {"sha256": hashlib.sha256(content.encode()).hexdigest()}, indent=1).encode()


def read_state(checkpoint):
    """state.json as a dict."""
    path = Path(checkpoint, "state.json")
    try:
        content = path.read_bytes()
        state = json.loads(content)
        found = state["format"]
    except FileNotFoundError:
        raise UserError(f"{checkpoint} has no state.json") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, of another version of this code, which reads {FORMAT}")
    state.pop("sha256", None)
    if sealed(state) != content:
        raise UserError(f"{path} is damaged: its content and its checksum differ")
    return state


def verify(checkpoint, without=()):
    """Raises unless the checkpoint's files are those that were saved, byte for byte, and no others are there; but for those
    in `without`. Returns the state."""
    state = read_state(checkpoint)
    files = state["files"]
    for name in files.keys() - set(without):
        path = Path(checkpoint, name)
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if (size := path.stat().st_size) != files[name]["bytes"]:
            raise UserError(f"{path} is damaged: {size:,} bytes, expected {files[name]['bytes']:,}")
        try:
            digest = sha256(path)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None
        if digest != files[name]["sha256"]:
            raise UserError(f"{path} is damaged: its content and its checksum in state.json differ")
    if not without and (foreign := {path.name for path in Path(checkpoint).iterdir()} - {"state.json", *files}):
        raise UserError(f"{Path(checkpoint, min(foreign))} is not part of the checkpoint")
    return state


def newest_whole(out_dir):
    """The newest checkpoint of the run in out_dir that passes verify, None if there are none at all, and {newer one: what is
    wrong with it}."""
    damaged = {}
    for checkpoint in reversed(list_checkpoints(out_dir)):
        try:
            verify(checkpoint)
            return checkpoint, damaged
        except UserError as error:
            damaged[checkpoint] = error
    if damaged:
        raise UserError(f"no checkpoint in {out_dir} is whole: {'; '.join(map(str, damaged.values()))}. Nothing was changed; "
                        "move them away to start anew")
    return None, {}


def set_aside(checkpoint, why):
    """Renames it: nothing is deleted, but it is no longer in the way."""
    names = (checkpoint.with_name(f"{checkpoint.name}.set_aside{i or ''}") for i in itertools.count())
    aside = checkpoint.rename(next(name for name in names if not name.exists()))
    print(f"warning: {why}; renamed to {aside.name}, going on from the one before", file=sys.stderr)


# What makes a run the same run is all but where things are, how often they happen and how a batch is cut up.
MAY_CHANGE = ("out_dir data_dir train_glob val_glob tokenizer attention micro_batch_size peak_tflops log_every eval_every "
              "eval_batches checkpoint_every keep_checkpoints max_hours max_skipped resume").split()


def checkpoint_to_resume(config, data_sha256):
    """The checkpoint that a run with this config and data (Tokens.sha256) goes on from, or None for a new run."""
    if config.resume == "never":
        if Path(config.out_dir).exists() and any(Path(config.out_dir).iterdir()):
            raise UserError(f"out_dir {config.out_dir} is not empty and resume=never; choose another out_dir")
        return None
    damaged = {}
    if config.resume == "auto":
        checkpoint, damaged = newest_whole(config.out_dir)
        if checkpoint is None:
            return None
    else:
        checkpoint = find_checkpoint(config.resume)
        verify(checkpoint)
        own = list_checkpoints(config.out_dir)[-1:]
        if own and not own[0].samefile(checkpoint):
            raise UserError(f"out_dir {config.out_dir} has checkpoints of its own, the newest of them {own[0].name}; "
                            f"resume=auto goes on from that, and for {checkpoint} choose another out_dir")
    refuse_another_run(config, data_sha256, checkpoint)
    for newer, why in damaged.items():
        set_aside(newer, why)
    return checkpoint


def refuse_another_run(config, data_sha256, checkpoint):
    """Raises, with a list of the differences, unless a run with this config and data can go on from the checkpoint."""
    state = read_state(checkpoint)
    then, tokenizer = state["config"], tokenizer_path(config)
    imported = state["step"] == 0  # then only its shape is known
    changed = [f"{key} was {then.get(key)!r}, is {value!r}" for key, value in dataclasses.asdict(config).items()
               if key not in MAY_CHANGE and then.get(key, value if imported else None) != value]
    if state["data_sha256"] not in (None, data_sha256):
        changed.append(f"the training data was {then['train_glob']} in {then['data_dir']}, is {config.train_glob} in "
                       f"{config.data_dir} and differs")
    if tokenizer and state["tokenizer"] and sha256(tokenizer) != state["tokenizer_sha256"]:
        changed.append(f"the tokenizer was another than {tokenizer}")
    if changed:
        raise UserError(f"{checkpoint} is of another run: {'; '.join(changed)}. Put that back, or choose another out_dir")


# --- saving -----------------------------------------------------------------------------------------------------------


def tensors_of(model, optimizer):
    """All that a checkpoint stores, by file: the weights, and the moments under the names of their weights."""
    moments = {f"{moment}.{name}": tensor for name, p in model.named_parameters()
               for moment, tensor in optimizer.state[p].items()}
    return {"model": dict(model.named_parameters()), "optimizer": moments | {"skipped": optimizer.skipped}}


def write_tensors(path, tensors):
    """Writes {name: tensor} to a safetensors file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} can't be written: {error}") from None
    path.chmod(mode)  # save_file leaves it readable to its owner only


def write(directory, tensors, others, state):
    """Writes a checkpoint. tensors: {file: {name: tensor on the CPU}}; others: the other files' bytes; state: what state.json
    says beside checksums, as `describe` has it."""
    with write_directory(directory) as partial:
        for name, content in others.items():
            write_file(partial / name, content)
        for name in tensors:
            write_tensors(partial / f"{name}.safetensors", tensors[name])
        paths = sorted(partial.iterdir())
        with ThreadPoolExecutor() as threads:
            digests = threads.map(sha256, paths)
            for path in paths:  # the disk and the checksums take about as long: side by side
                flush(path)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests)}
        write_file(partial / "state.json", sealed(state | {"files": files}))


def describe(step, tokens, config, data_sha256, tokenizer):
    """What state.json says, but for checksums. tokenizer: its file's bytes, or None."""
    return {"format": FORMAT, "step": step, "tokens": tokens, "config": dataclasses.asdict(config), "data_sha256": data_sha256,
            "tokenizer": "tokenizer.model" if tokenizer else None,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest() if tokenizer else None,
            "versions": {package: version(package) for package in ("torch", "torch_xla", "safetensors")}}


class Saver:
    """Saves the checkpoints of a run, one at a time. Training waits for the copy from the device; a thread does the rest."""

    def __init__(self, config, resumed, data_sha256, say):
        """resumed: the checkpoint that the run goes on from, or None."""
        self.config, self.data_sha256, self.say = config, data_sha256, say
        self.directory = Path(config.out_dir, "checkpoints")
        self.directory.mkdir(parents=True, exist_ok=True)
        flush(self.directory.parent)
        source = tokenizer_path(config) or (resumed and resumed / "tokenizer.model")
        self.tokenizer = source.read_bytes() if source and source.exists() else None
        if not self.tokenizer:
            say("no tokenizer is known for this data, so sample.py will have none; name one with --tokenizer=PATH")
        self.thread, self.job = ThreadPoolExecutor(1), None
        self.host = {}  # what is being saved, by file and name: memory that is allocated once
        self.seconds = num_parameters(config)[0] * 12 / 100e6  # the longest save; until there was one, at 100 MB/s
        for leftover in [*self.directory.glob("step_*.partial"), *self.directory.glob("step_*.removed")]:
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed

    def save(self, step, model, optimizer, metrics, last):
        """Starts saving the checkpoint of `step` finished steps. metrics: the bytes of metrics.jsonl. If it fails, that is
        told and training goes on; but if it is the last, `wait` raises."""
        started = time.perf_counter()
        self.wait()  # for the one before, which needs `host` as it is
        waited = time.perf_counter() - started
        for file, tensors in tensors_of(model, optimizer).items():
            if file not in self.host:
                self.host[file] = {key: torch.empty(tensor.shape) for key, tensor in tensors.items()}
            for key, tensor in tensors.items():
                self.host[file][key].copy_(tensor.detach())
        copied = time.perf_counter() - started - waited
        self.job = self.thread.submit(self.finish, step, metrics, last, started, waited, copied)

    def finish(self, step, metrics, last, started, waited, copied):
        """What is left to do when all is in the host's memory."""
        config, directory = self.config, self.directory / f"step_{step:08d}"
        others = {"metrics.jsonl": metrics} | ({"tokenizer.model": self.tokenizer} if self.tokenizer else {})
        state = describe(step, step * config.batch_size * config.context, config, self.data_sha256, self.tokenizer)
        try:
            write(directory, self.host, others, state)
        except (OSError, UserError) as error:
            newest = (list_checkpoints(config.out_dir) or ["none"])[-1]
            message = f"step {step} is not saved: {error}; the newest checkpoint is {newest}"
            if last:
                raise UserError(message) from None
            return self.say(f"warning: {message}; training goes on")
        seconds = time.perf_counter() - started
        self.seconds = max(self.seconds, seconds)
        self.say(f"saved {directory} in {seconds:.1f} s; training waited {waited:.2f} s for the save before and {copied:.2f} s "
                 "for the copy from the device")
        if not self.host["optimizer"]["skipped"][1]:  # else this one may be no good, and an older one is still wanted
            for old in list_checkpoints(config.out_dir)[:-config.keep_checkpoints]:
                self.remove(old)

    def remove(self, checkpoint):
        """Deletes it under another name, or a kill would leave half of it under the name of a whole one."""
        try:
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.removed")))
        except OSError as error:
            self.say(f"warning: {checkpoint} can't be deleted: {error}; training goes on")

    def wait(self):
        """Waits for the save in progress."""
        if self.job:
            self.job.result()


# --- loading ----------------------------------------------------------------------------------------------------------


def load_tensors(checkpoint, name):
    """{key: tensor} of checkpoint/NAME.safetensors, on the CPU."""
    path = Path(checkpoint, f"{name}.safetensors")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


@torch.no_grad()
def restore(checkpoint, model, optimizer):
    """Fills model and optimizer, on whatever device they are, from the checkpoint; returns its number of finished steps.
    An imported model (convert_to_hf.py --from-hf) has no optimizer.safetensors: the moments stay what they are, zero."""
    state = read_state(checkpoint)
    for name, tensors in tensors_of(model, optimizer).items():
        if name == "optimizer" and state["step"] == 0:
            continue
        saved = load_tensors(checkpoint, name)
        if strange := tensors.keys() ^ saved.keys():
            raise UserError(f"{checkpoint}/{name}.safetensors lacks, or should not have, {min(strange)}")
        for key, tensor in tensors.items():
            tensor.copy_(saved[key])
    return state["step"]


def load_model(checkpoint, **changes):
    """The model of a checkpoint as a Llama on the CPU, its config under `changes`."""
    config = verify(checkpoint, without=["optimizer.safetensors", "metrics.jsonl"])["config"]
    shape = {field.name: config[field.name] for field in dataclasses.fields(ModelConfig)}
    model = Llama(ModelConfig(**shape | changes))
    try:
        model.load_state_dict(load_tensors(checkpoint, "model"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint}/model.safetensors does not fit the config in state.json: {error}") from None
    return model
