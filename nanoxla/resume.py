"""Which checkpoint a run continues from: the newest undamaged one, if it belongs to the same
run."""
import dataclasses
import itertools
import sys
from pathlib import Path

from nanoxla.checkpoint import find_checkpoint, list_checkpoints, read_state, verify
from nanoxla.errors import UserError
from nanoxla.files import sha256
from nanoxla.shards import tokenizer_path


def checkpoint_to_resume(config, data_sha256):
    """The checkpoint that a run with this config and training data continues from; None for a new
    run. Raises UserError if the checkpoint there belongs to another run."""
    if config.resume == "never":
        if Path(config.out_dir).exists() and any(Path(config.out_dir).iterdir()):
            raise UserError(f"out_dir {config.out_dir} is not empty and resume=never; "
                            "choose another out_dir")
        return None
    damaged = {}
    if config.resume == "auto":
        checkpoint, damaged = newest_undamaged(config.out_dir)
        if checkpoint is None:
            return None
    else:
        checkpoint = find_checkpoint(config.resume)
        verify(checkpoint)
        own = list_checkpoints(config.out_dir)[-1:]
        if own and not own[0].samefile(checkpoint):
            raise UserError(
                f"out_dir {config.out_dir} has checkpoints of its own, the newest of them "
                f"{own[0].name}; resume=auto continues from that one. To continue from "
                f"{checkpoint}, choose another out_dir")
    check_same_run(config, data_sha256, checkpoint)
    for newer, reason in damaged.items():
        set_aside(newer, reason)
    return checkpoint


def newest_undamaged(out_dir):
    """The newest checkpoint of the run in out_dir that passes verify (None if there is none at
    all), and {newer checkpoint: its damage}. Raises UserError if all of them are damaged."""
    damaged = {}
    for checkpoint in reversed(list_checkpoints(out_dir)):
        try:
            verify(checkpoint)
            return checkpoint, damaged
        except UserError as error:
            damaged[checkpoint] = error
    if damaged:
        raise UserError(f"every checkpoint in {out_dir} is damaged: "
                        f"{'; '.join(map(str, damaged.values()))}. Nothing was changed; "
                        "to start from the beginning, move them away")
    return None, {}


def set_aside(checkpoint, reason):
    """Renames a damaged checkpoint, so that it is no longer found. Nothing is deleted."""
    names = (f"{checkpoint.name}.set_aside{i or ''}" for i in itertools.count())
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    checkpoint.rename(aside)
    print(f"warning: {reason}; renamed to {aside.name}, continuing from the previous one",
          file=sys.stderr)


def check_same_run(config, data_sha256, checkpoint):
    """Raises UserError, with a list of the differences, unless a run with this config and training
    data may continue from the checkpoint. Session keys (nanoxla/config.py) may differ."""
    state = read_state(checkpoint)
    saved, tokenizer = state["config"], tokenizer_path(config)
    imported = state["step"] == 0  # by convert_to_hf.py --from-hf: only the shape is known
    changes = []
    for entry in dataclasses.fields(config):
        now = getattr(config, entry.name)
        before = saved.get(entry.name, now if imported else None)
        if before != now and not entry.metadata["per_session"]:
            changes.append(f"{entry.name} was {before!r}, is {now!r}")
    if state["data_sha256"] not in (None, data_sha256):
        changes.append(f"the training data differs: it was {saved['train_glob']} in "
                       f"{saved['data_dir']}, is {config.train_glob} in {config.data_dir}")
    if tokenizer and state["tokenizer"] and sha256(tokenizer) != state["tokenizer_sha256"]:
        changes.append(f"the tokenizer of the run was not {tokenizer}")
    if changes:
        raise UserError(f"{checkpoint} belongs to another run: {'; '.join(changes)}. "
                        "Undo these changes, or choose another out_dir")
