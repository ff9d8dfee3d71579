"""Faults: disks that are full or cannot be written, and updates that are not finite."""
import ctypes
import dataclasses
import os
import re
import shutil
import signal

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from conftest import (
    AS_UNINTERRUPTED,
    TINY,
    ended,
    limit_file_size,
    rows,
    run,
    start,
    train_here,
    wait_for_line,
)
from kill_and_resume import outcome

import train
from model import Llama, num_parameters
from nanoxla import checkpoint
from nanoxla.checkpoint import list_checkpoints, state_bytes, verify
from nanoxla.files import write_file
from nanoxla.log import TrainingLog
from nanoxla.saver import Saver
from train import AdamW, Config, TracedModel, train_step

# --- faults while saving ------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def obey_permissions():
    """A preexec_fn: root may write anywhere, unless the capability for that is dropped."""
    drop_from_bounding_set, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_dac_override, 0, 0, 0)


def test_a_full_disk_costs_checkpoints_but_not_the_run(tiny, cut_short):
    process = start("train.py", tiny, f"--out_dir={cut_short}", *AS_UNINTERRUPTED,
                    "--checkpoint_every=2",
                    preexec_fn=limit_file_size(50_000))  # enough for metrics.jsonl, not for tensors
    code, out, err = ended(process)
    assert code == 2 and "Traceback" not in err
    reason = r"was not saved: .*File too large.*; the newest checkpoint is .*step_00000008"
    assert re.search(f"warning: step 10 {reason}; training continues", out)
    assert re.search(f"error: step 12 {reason}$", err.strip())
    kept = [path.name for path in (cut_short / "checkpoints").iterdir()]
    assert kept == ["step_00000008"]
    verify(cut_short / "checkpoints/step_00000008")


def test_a_read_only_directory_costs_checkpoints_but_not_the_run(tiny, uninterrupted, cut_short):
    (cut_short / "checkpoints").chmod(0o555)
    command = ("train.py", tiny, f"--out_dir={cut_short}", *AS_UNINTERRUPTED,
               "--checkpoint_every=2")
    code, out, err = ended(start(*command, preexec_fn=obey_permissions))
    assert code == 2 and "Traceback" not in err
    assert "warning: step 10 was not saved: [Errno 13] Permission denied" in out
    assert "error: step 12 was not saved" in err
    (cut_short / "checkpoints").chmod(0o755)
    train_here(*command[1:])
    assert outcome(cut_short) == outcome(uninterrupted)


@pytest.mark.parametrize("removed", ["checkpoints", "."])
def test_a_directory_removed_during_the_run_is_made_again(tiny, uninterrupted, tmp_path, removed):
    process = start("train.py", tiny, f"--out_dir={tmp_path / 'run'}", *AS_UNINTERRUPTED)
    wait_for_line(process, "saved")
    os.killpg(process.pid, signal.SIGSTOP)
    shutil.rmtree(tmp_path / "run" / removed)
    os.killpg(process.pid, signal.SIGCONT)
    code, _, err = ended(process)
    assert code == 0, err
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_rows_that_could_not_be_written_are_written_later(tiny, tmp_path, capsys):
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path))
    log = TrainingLog(config, None, 0, 1)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (1, 2):
        log.validation(step, 1.0, None)
    assert capsys.readouterr().out.count("metrics.jsonl: [Errno 21] Is a directory") == 2
    (tmp_path / "metrics.jsonl").rmdir()
    log.validation(3, float("nan"), 4.0)
    losses = [(row["step"], row["val_loss"]) for row in rows(tmp_path)[1]]
    assert losses == [(1, 1.0), (2, 1.0), (3, None)]


class RecordingLog:
    """Stands in for TrainingLog: keeps what the saver says."""

    def __init__(self):
        self.is_writer, self.rows, self.said = True, b"", []
        self.say = self.said.append


@pytest.fixture
def save(tiny, tmp_path):
    """save(step) saves and waits. save.said: what the saver said."""
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path),
                                 keep_checkpoints=1)
    model, log = Llama(config, seed=0), RecordingLog()
    optimizer = AdamW(model.parameters(), config)
    saver = Saver(config, num_parameters(config)[0], None, "", log)

    def save(step):
        saver.save(step, model, optimizer, last=False)
        saver.wait()
    save.said = log.said
    return save


def test_a_checkpoint_removed_before_it_is_complete_gets_no_name(save, tmp_path, monkeypatch):
    save(1)

    def remove_first(state):
        shutil.rmtree(tmp_path / "checkpoints/step_00000002.partial")
        return state_bytes(state)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "state_bytes", remove_first)
        save(2)
    assert "warning: step 2 was not saved" in save.said[-1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    verify(tmp_path / "checkpoints/step_00000001")


def test_an_old_checkpoint_that_cannot_be_deleted_is_reported(save, tmp_path, monkeypatch):
    save(1)

    def refuse(*arguments, **kwargs):
        raise PermissionError(13, "Permission denied", "model.safetensors")
    monkeypatch.setattr("shutil.rmtree", refuse)
    save(2)
    assert "step_00000001 can't be deleted: [Errno 13] Permission denied" in save.said[-1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]


# --- updates that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_in_the_graph(where, value):
    """Weights and moments keep their bits, the count rises, nothing is compiled, and the next
    update happens."""
    device, draw = torch_xla.device(), torch.Generator().manual_seed(0)
    config = Config(**TINY | {"batch_size": 2, "dtype": "bfloat16"})
    model = Llama(config, seed=0).to(device)
    optimizer, traced = AdamW(model.parameters(), config), TracedModel(model, config)
    bad = torch.full((), value, device=device)
    torch_xla.sync()
    compiled, states, reports = [], [], []
    for step in range(8):
        shape = 2, config.context + 1
        batch = torch.randint(0, config.vocab_size, shape, dtype=torch.int32, generator=draw)
        if where == "gradient" and step in (4, 5):
            for p in list(model.parameters())[::5]:
                p.grad.copy_(bad.expand_as(p))  # the backward pass adds to it
            torch_xla.sync()
        if where == "loss" and step in (4, 5):
            traced.loss_sum = bad  # the forward pass adds to it
        before = met.metric_data("CompileTime")[0]
        reports.append(train_step(traced, optimizer, batch, step, stop=False).tolist())
        compiled.append(met.metric_data("CompileTime")[0] - before)
        states.append([tensor.detach().cpu() for p in model.parameters()
                       for tensor in (p, *optimizer.state[p].values())])
    unchanged = [all(torch.equal(a, b) for a, b in zip(*pair)) for pair in zip(states, states[1:])]
    assert unchanged == [False, False, False, True, True, False, False]
    skipped = [report[2:4] for report in reports]
    assert skipped == [[0, 0]] * 4 + [[1, 1], [2, 2], [2, 0], [2, 0]]
    assert compiled[3:] == [0] * 5


def test_a_run_that_diverges_ends_and_keeps_its_checkpoints(tiny, tmp_path):
    """The first update makes the weights useless; all others are skipped."""
    code, out, err = run("train.py", tiny, f"--out_dir={tmp_path}", "--learning_rate=1e30",
                         "--warmup_steps=0", "--max_skipped=4", "--checkpoint_every=1",
                         "--keep_checkpoints=1")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert re.search("error: step 6: loss .*, gradient norm nan, 5 updates skipped in a row: "
                     "the run has diverged", err)
    kept = list_checkpoints(tmp_path)
    assert kept[0].name == "step_00000001", "the last one before the first skipped update is gone"
    for directory in kept:
        verify(directory)
