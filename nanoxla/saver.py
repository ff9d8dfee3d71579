"""Saving a run's checkpoints in the background, and restoring one."""
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nanoxla.checkpoint import describe, list_checkpoints, load_tensors, read_state, write
from nanoxla.errors import UserError
from nanoxla.files import fsync
from nanoxla.shards import tokenizer_path


def tensors_to_save(model, optimizer):
    """{file: {key: tensor}}: the weights, and the moments under the names of their weights."""
    weights = dict(model.named_parameters())
    moments = {f"{moment}.{name}": tensor for name, p in weights.items()
               for moment, tensor in optimizer.state[p].items()}
    return {"model": weights, "optimizer": moments | {"skipped": optimizer.skipped}}


@torch.no_grad()
def restore(checkpoint, model, optimizer):
    """Copies a checkpoint into model and optimizer, on whatever device they are. Returns the number
    of finished steps.

    A model imported by convert_to_hf.py --from-hf is at step 0 and has no optimizer.safetensors.
    The moments then stay what they are: zero."""
    state = read_state(checkpoint)
    for file, tensors in tensors_to_save(model, optimizer).items():
        if file == "optimizer" and state["step"] == 0:
            continue
        saved = load_tensors(checkpoint, file)
        if different := tensors.keys() ^ saved.keys():
            raise UserError(f"{checkpoint}/{file}.safetensors lacks, or should not have, "
                            f"{min(different)}")
        for key, tensor in tensors.items():
            tensor.copy_(saved[key])
    return state["step"]


class Saver:
    """Saves the checkpoints of a run, one at a time. Only core 0's saver writes.

    Training waits while the tensors are copied from the device to the host's memory. A thread then
    writes the files, flushes them to the disk and deletes old checkpoints."""

    def __init__(self, config, num_parameters, resumed, data_sha256, log):
        """resumed: the checkpoint that the run continues from, or None. log: a TrainingLog."""
        self.config, self.data_sha256, self.log = config, data_sha256, log
        self.directory = Path(config.out_dir, "checkpoints")
        self.executor, self.job = ThreadPoolExecutor(1), None
        self.host_tensors = {}  # {file: {key: tensor}} in the host's memory, allocated once
        # Seconds to allow for a save: the longest so far, but at least 12 bytes per parameter (a
        # weight and two moments) at 100 MB/s.
        self.longest_save = num_parameters * 12 / 100e6
        self.tokenizer = None  # the bytes of tokenizer.model
        if log.is_writer:
            self.prepare_directory(resumed)

    def prepare_directory(self, resumed):
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync(self.directory.parent)
        source = tokenizer_path(self.config) or (resumed and resumed / "tokenizer.model")
        if source and source.exists():
            self.tokenizer = source.read_bytes()
        else:
            self.log.say("no tokenizer is known for this data, so sample.py will have none; "
                         "name one with --tokenizer=PATH")
        for pattern in ("step_*.partial", "step_*.removed"):  # left by a run that was killed
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step, model, optimizer, last):
        """Starts saving the checkpoint after `step` steps. If a save fails, that is reported and
        training continues; if the `last` one fails, `wait` raises UserError."""
        if not self.log.is_writer:
            return
        started = time.perf_counter()
        self.wait()  # the previous save may still be reading self.host_tensors
        waited = time.perf_counter() - started
        for file, tensors in tensors_to_save(model, optimizer).items():
            if file not in self.host_tensors:
                self.host_tensors[file] = {key: torch.empty(p.shape) for key, p in tensors.items()}
            for key, tensor in tensors.items():
                self.host_tensors[file][key].copy_(tensor.detach())
        copied = time.perf_counter() - started - waited
        metrics = bytes(self.log.rows)
        self.job = self.executor.submit(self.finish, step, metrics, last, started, waited, copied)

    def finish(self, step, metrics, last, started, waited, copied):
        """The part of a save that runs in the thread."""
        config, directory = self.config, self.directory / f"step_{step:08d}"
        others = {"metrics.jsonl": metrics}
        if self.tokenizer:
            others["tokenizer.model"] = self.tokenizer
        tokens = step * config.batch_size * config.context
        state = describe(step, tokens, config, self.data_sha256, self.tokenizer)
        try:
            write(directory, self.host_tensors, others, state)
        except (OSError, UserError) as error:
            newest = (list_checkpoints(config.out_dir) or ["none"])[-1]
            message = f"step {step} was not saved: {error}; the newest checkpoint is {newest}"
            if last:
                raise UserError(message) from None
            return self.log.say(f"warning: {message}; training continues")
        seconds = time.perf_counter() - started
        self.longest_save = max(self.longest_save, seconds)
        self.log.say(f"saved {directory} in {seconds:.1f} s; training waited {waited:.2f} s for "
                     f"the previous save and {copied:.2f} s for the copy from the device")
        in_a_row = self.host_tensors["optimizer"]["skipped"][1]
        if in_a_row == 0:  # else the run may be diverging, and an older checkpoint may be needed
            for old in list_checkpoints(config.out_dir)[:-config.keep_checkpoints]:
                if not config.decay_start or old.name != f"step_{config.decay_start:08d}":
                    self.remove(old)

    def remove(self, checkpoint):
        """Deletes a checkpoint. It is renamed first: a kill in the middle must not leave half of it
        under the name of a complete one."""
        try:
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.removed")))
        except OSError as error:
            self.log.say(f"warning: {checkpoint} can't be deleted: {error}; training continues")

    def wait(self):
        """Waits until the save in progress is on the disk. Raises if it was the last and failed."""
        if self.job:
            self.job.result()
