"""Which checkpoint a run continues from: the newest undamaged one, if it belongs to the same
run."""
import dataclasses
import itertools
import sys
from pathlib import Path

from nanoxla.checkpoint import COMPLETE, find_checkpoint, list_checkpoints, read_state, verify
from nanoxla.errors import UserError
from nanoxla.files import sha256
from nanoxla.shards import tokenizer_path


def checkpoint_to_resume(config, data_sha256):
    """The checkpoint that a run with this config and training data continues from; None for a new
    run. Raises UserError if the checkpoint there belongs to another run."""
    own = list_checkpoints(config.out_dir)
    if config.resume == "never":
        if Path(config.out_dir).exists() and any(Path(config.out_dir).iterdir()):
            raise UserError(f"out_dir {config.out_dir} is not empty and resume=never; "
                            "choose another out_dir")
        return None
    if config.resume != "auto":
        checkpoint = find_checkpoint(config.resume)
        verify(checkpoint)
        if own and not own[-1].samefile(checkpoint):
            raise UserError(
                f"out_dir {config.out_dir} has checkpoints of its own, the newest of them "
                f"{own[-1].name}; resume=auto continues from that one. To continue from "
                f"{checkpoint}, choose another out_dir")
        check_same_run(config, data_sha256, checkpoint)
        return checkpoint
    if not own:
        return newest_elsewhere(config, data_sha256)
    checkpoint, damaged = newest_undamaged(config.out_dir)
    check_same_run(config, data_sha256, checkpoint)
    for newer, reason in damaged.items():
        set_aside(newer, reason)
    return checkpoint


def newest_elsewhere(config, data_sha256):
    """The newest undamaged checkpoint of this run under config.resume_search, or None. That is
    where a new Kaggle session finds the output of an earlier one. Nothing there is changed. Raises
    UserError if there are checkpoints, but none from which this run can continue."""
    if not config.resume_search:
        return None
    found = [path.parent for path in sorted(Path(config.resume_search).rglob("state.json"))
             if COMPLETE.fullmatch(path.parent.name)
             and path.parent.name != "step_00000000"]  # imported by convert_to_hf.py: no run yet
    reasons = []
    for checkpoint in sorted(found, key=lambda path: path.name, reverse=True):
        try:
            verify(checkpoint)
            check_same_run(config, data_sha256, checkpoint)
            return checkpoint
        except UserError as error:
            reasons.append(str(error))
    if reasons and not config.init_from:  # which may name a run there
        raise UserError(f"no checkpoint in {config.resume_search} fits this run. The newest: "
                        f"{reasons[0]}. To start a new run, add --resume=never")
    return None


def newest_undamaged(out_dir):
    """The newest checkpoint of the run in out_dir that passes verify, and {newer checkpoint: its
    damage}. Raises UserError if all of them are damaged."""
    damaged = {}
    for checkpoint in reversed(list_checkpoints(out_dir)):
        try:
            verify(checkpoint)
            return checkpoint, damaged
        except UserError as error:
            damaged[checkpoint] = error
    raise UserError(f"every checkpoint in {out_dir} is damaged: "
                    f"{'; '.join(map(str, damaged.values()))}. Nothing was changed; "
                    "to start from the beginning, move them away")


def set_aside(checkpoint, reason):
    """Renames a damaged checkpoint, so that it is no longer found. Nothing is deleted."""
    names = (f"{checkpoint.name}.set_aside{i or ''}" for i in itertools.count())
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    try:
        checkpoint.rename(aside)
    except FileNotFoundError:  # another host of a pod slice has just done it
        return
    print(f"warning: {reason}; renamed to {aside.name}, continuing from the previous one",
          file=sys.stderr)


def check_same_run(config, data_sha256, checkpoint):
    """Raises UserError, with a list of the differences, unless a run with this config and training
    data may continue from the checkpoint. Session keys (nanoxla/config.py) may differ."""
    state = read_state(checkpoint)
    saved, tokenizer = state["config"], tokenizer_path(config)
    imported = state["step"] == 0  # by convert_to_hf.py --from-hf: only the shape is known
    free = {"max_steps", "decay_steps"} if length_may_change(saved, config, state["step"]) else ()
    changes = []
    for entry in dataclasses.fields(config):
        now = getattr(config, entry.name)
        # A key that a checkpoint lacks is newer than the checkpoint: its default changes nothing.
        before = saved.get(entry.name, now if imported else entry.default)
        if before != now and not entry.metadata["per_session"] and entry.name not in free:
            changes.append(f"{entry.name} was {before!r}, is {now!r}")
    if state["data_sha256"] not in (None, data_sha256):
        changes.append(f"the training data differs: it was {saved['train_glob']} in "
                       f"{saved['data_dir']}, is {config.train_glob} in {config.data_dir}")
    if tokenizer and state["tokenizer"] and sha256(tokenizer) != state["tokenizer_sha256"]:
        changes.append(f"the tokenizer of the run was not {tokenizer}")
    if changes:
        raise UserError(f"{checkpoint} belongs to another run: {'; '.join(changes)}. "
                        "Undo these changes, or start a new run in another out_dir; "
                        f"--init_from={checkpoint} starts it with these weights")


def length_may_change(saved, config, step):
    """Whether a run may have another max_steps and decay_steps from now on. That is so until the
    learning rate of a wsd schedule begins to decay: the steps so far were the same for both.

    saved: the config of the checkpoint, as a dict. step: the finished steps."""
    if not saved.get("schedule") == config.schedule == "wsd":
        return False
    return step <= min(saved["max_steps"] - saved["decay_steps"], config.decay_start)
