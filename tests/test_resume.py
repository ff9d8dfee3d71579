"""Stopping, crashing and resuming: a run ends with the same bytes as one that nothing
interrupted."""
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from conftest import ROOT, TINY, limit_file_size, rows, run, start, train_here
from kill_and_resume import kill_and_resume, outcome

import train
from model import Llama, num_parameters
from nanoxla import checkpoint
from nanoxla.checkpoint import list_checkpoints, state_bytes, verify
from nanoxla.errors import UserError
from nanoxla.log import TrainingLog
from nanoxla.resume import checkpoint_to_resume
from nanoxla.saver import Saver
from train import AdamW, Config, TracedModel, train_step

FILES = "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "state.json"


def wait_for_line(process, beginning):
    assert any(line.startswith(beginning) for line in process.stdout), process.stderr.read()


def ended(process):
    """(exit code, stdout, stderr), as soon as no process holds the pipes any more."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture
def cut_short(uninterrupted, tmp_path):
    """The out_dir of a run that was killed after step 11: its newest checkpoint is that of step
    8."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    return tmp_path / "run"


AS_UNINTERRUPTED = "--log_every=2", "--checkpoint_every=4"


def test_resume_is_bitwise(tiny, uninterrupted, cut_short):
    code, out, err = run("train.py", tiny, f"--out_dir={cut_short}", *AS_UNINTERRUPTED)
    assert code == 0 and "continuing from" in out, err
    assert outcome(cut_short) == outcome(uninterrupted)
    resumed = rows(cut_short)[0][-2:]  # of steps 10 and 12
    assert resumed[0]["compile_s"] > 0 and resumed[1]["compile_s"] == 0


def test_resume_from_a_downloaded_checkpoint_brings_its_history(tiny, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints/step_00000008", tmp_path / "downloaded")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={tmp_path / 'downloaded'}",
               *AS_UNINTERRUPTED)
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_another_run_in_the_same_directory_is_refused(tiny, uninterrupted, train_fails, tmp_path):
    out_dir = f"--out_dir={uninterrupted}"
    message = train_fails(tiny, out_dir, "--learning_rate=0.5", "--n_layers=3")
    assert "n_layers was 2, is 3" in message and "learning_rate was 0.01, is 0.5" in message
    message = train_fails(tiny, out_dir, "--train_glob=train_00001.bin")
    assert "the training data was train_*.bin" in message and "is train_00001.bin" in message
    assert "not empty" in train_fails(tiny, out_dir, "--resume=never")
    older = uninterrupted / "checkpoints/step_00000008"
    message = train_fails(tiny, out_dir, f"--resume={older}")
    assert "has checkpoints of its own, the newest of them step_00000012" in message


def test_session_keys_and_the_place_of_the_data_may_change(tiny, uninterrupted, tmp_path):
    shutil.copytree(tiny.parent, tmp_path / "moved")
    changes = dict(data_dir=str(tmp_path / "moved"), micro_batch_size=4, log_every=5, eval_every=0,
                   checkpoint_every=3, keep_checkpoints=9, max_hours=9.0, max_skipped=3,
                   peak_tflops=1.0, attention="flash")
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(uninterrupted), **changes)
    fingerprint = train.data.open_data(config)[0].fingerprint()
    assert checkpoint_to_resume(config, fingerprint).name == "step_00000012"


# --- stopping -----------------------------------------------------------------------------------


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import nanoxla.saver, train
from nanoxla.errors import run_command

def slow(function, name):
    def announced(*arguments):
        print(name, flush=True)
        time.sleep(1)
        result = function(*arguments)
        print(name, "ends", flush=True)
        return result
    return announced

train.evaluate = slow(train.evaluate, "evaluation")
nanoxla.saver.write = slow(nanoxla.saver.write, "save")
if __name__ == "__main__":
    run_command(train.main)
"""


def test_a_run_stopped_in_every_way_ends_like_an_uninterrupted_one(tiny, tmp_path):
    """Each stop saves, says how to go on, and exits with 0. Then the same command goes on."""
    common = "--max_steps=80", "--micro_batch_size=4", "--eval_every=20", "--keep_checkpoints=1"
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    out_dir = tmp_path / "stopped"
    train_here(tiny, f"--out_dir={tmp_path / 'uninterrupted'}", *common)
    command = "train.py", tiny, f"--out_dir={out_dir}", *common

    def stopped(process, at_least):
        code, out, err = ended(process)
        assert code == 0 and "Traceback" not in err, err
        note = r"stopped after step (\d+); to go on: the same command$"
        step = int(re.search(note, out, re.MULTILINE)[1])
        assert [path.name for path in list_checkpoints(out_dir)] == [f"step_{step:08d}"]
        assert at_least <= step < 80
        verify(list_checkpoints(out_dir)[0])
        return step

    process = start(*command)
    wait_for_line(process, "starting")  # then it compiles
    os.kill(process.pid, signal.SIGTERM)
    step = stopped(process, 1)

    process = start(*command)
    wait_for_line(process, "step")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the group
    step = stopped(process, step + 1)

    for moment in ("evaluation", "save"):
        process = start(tmp_path / "slow.py", *command[1:], "--checkpoint_every=10")
        wait_for_line(process, moment)
        os.killpg(process.pid, signal.SIGTERM)  # to every process, as when a machine shuts down
        step = stopped(process, step + 1)

    step = stopped(start(*command, "--max_hours=1e-9"), step + 1)
    train_here(*command[1:])
    assert outcome(out_dir) == outcome(tmp_path / "uninterrupted")


def test_a_second_interrupt_ends_at_once(tiny, tmp_path):
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000",
                    "--log_every=100000", "--eval_every=0")
    wait_for_line(process, "step")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    started = time.monotonic()
    code, _, err = ended(process)
    assert code == 130 and time.monotonic() - started < 5
    assert "SIGINT: stopping within log_every steps" in err and "Traceback" not in err
    assert not list_checkpoints(tmp_path)


def test_ctrl_c_saves_even_if_it_ends_the_reader_of_the_output(tiny, tmp_path):
    """As in python train.py ... 2>&1 | tee log."""
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000")
    wait_for_line(process, "step")
    process.stdout.close()
    process.stderr.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert len(list_checkpoints(tmp_path)) == 1


def test_no_worker_outlives_its_parent(tiny, tmp_path):
    """It would hold the TPU."""
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000")
    wait_for_line(process, "step")
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL


def test_max_hours_leaves_time_to_save(tiny, tmp_path):
    """Twice the time of a save and between two reports. Here that is short, so the run uses nearly
    all of its 13 seconds."""
    started = time.monotonic()
    code, out, err = run("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000",
                         "--max_hours=0.0036")
    assert code == 0 and "stopped after step" in out, err
    assert 9 < time.monotonic() - started < 60  # importing takes seconds, before the clock starts


WORKERS = """
import ctypes, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
sys.path.insert(0, sys.argv[2])
from nanoxla.errors import run_command
from nanoxla.launch import run_on_all_cores

def worker(index, mode, stop_requested):
    os.write(1, b"here\\n")  # in one piece: print might mix the lines of two workers
    while not os.path.exists(__file__ + ".go"):
        time.sleep(0.01)
    if index == 0 and "deaf" in mode:
        ctypes.PyDLL(None).sleep(30)  # holds the interpreter's lock
    if index == 1 and "raises" in mode:
        raise RuntimeError("the first failure")
    if index == 1 and mode == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while not stop_requested():  # as in an all-reduce that never ends
        time.sleep(0.01)
    os.write(1, b"asked to stop\\n")

def start_one(supervised, work, arguments, directory, index):
    supervised(index, partial(worker, index), arguments, directory)

def spawn(supervised, arguments):
    with ProcessPoolExecutor(3, get_context("spawn")) as executor:  # as torch_xla does on a TPU
        list(executor.map(partial(start_one, supervised, *arguments), range(3)))

if __name__ == "__main__":
    run_command(lambda: run_on_all_cores(spawn, worker, sys.argv[1]))
"""


@pytest.fixture
def workers(tmp_path):
    """workers(mode) starts three idle worker processes, without a TPU, under train.py's own
    supervision."""
    (tmp_path / "workers.py").write_text(WORKERS)

    def begin(mode):
        process = start(tmp_path / "workers.py", mode, ROOT)
        for _ in range(3):
            wait_for_line(process, "here")
        (tmp_path / "workers.py.go").touch()
        return process
    return begin


@pytest.mark.parametrize("mode, message", [
    ("raises", "RuntimeError: the first failure"),
    ("is killed", "a worker was killed, perhaps for lack of memory")])
def test_a_failing_core_ends_all_within_seconds(workers, mode, message):
    process, started = workers(mode), time.monotonic()
    code, out, err = ended(process)
    assert time.monotonic() - started < 8
    assert code == 1 and err.count(message) == 1 and "asked to stop" not in out, err
    assert err.count("Traceback") == (mode == "raises")


def test_a_failing_core_ends_all_even_if_its_message_cannot_be_printed(workers):
    process = workers("raises")
    process.stderr.close()
    assert process.wait(timeout=8) == 1


def test_a_core_that_holds_the_interpreters_lock_is_ended_too(workers):
    process, started = workers("raises beside a deaf one"), time.monotonic()
    assert ended(process)[0] == 1 and time.monotonic() - started < 8


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_requests_a_stop(workers, signal_):
    process = workers("nothing")
    os.killpg(process.pid, signal_)
    code, out, err = ended(process)
    assert code == 0 and out.count("asked to stop") == 3 and "Traceback" not in err, err


# --- kill -9 ------------------------------------------------------------------------------------


def test_kill_9_loses_nothing():
    assert kill_and_resume(kills=5, seed=1)[0] == 5


# --- faults while saving ------------------------------------------------------------------------


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
    reason = r"is not saved: .*File too large.*; the newest checkpoint is .*step_00000008"
    assert re.search(f"warning: step 10 {reason}; training goes on", out)
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
    assert "warning: step 10 is not saved: [Errno 13] Permission denied" in out
    assert "error: step 12 is not saved" in err
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
        log.validation(step, 1.0)
    assert capsys.readouterr().out.count("metrics.jsonl: [Errno 21] Is a directory") == 2
    (tmp_path / "metrics.jsonl").rmdir()
    log.validation(3, float("nan"))
    losses = [(row["step"], row["val_loss"]) for row in rows(tmp_path)[1]]
    assert losses == [(1, 1.0), (2, 1.0), (3, None)]


class SilentLog:
    """Stands in for TrainingLog: keeps what the saver says."""

    def __init__(self):
        self.is_writer, self.rows, self.said = True, b"", []
        self.say = self.said.append


@pytest.fixture
def save(tiny, tmp_path):
    """save(step) saves and waits. save.said: what the saver said."""
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path),
                                 keep_checkpoints=1)
    model, log = Llama(config, seed=0), SilentLog()
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
    assert "warning: step 2 is not saved" in save.said[-1]
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


# --- damaged checkpoints ------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, at=0.5):
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def make_newer(directory):
    """Raises the format's number, as a later version of the code may do."""
    state = json.loads((directory / "state.json").read_text())
    del state["sha256"]
    (directory / "state.json").write_bytes(state_bytes(state | {"format": state["format"] + 1}))


def put_in_other_weights(directory):
    shutil.copy(directory.with_name("step_00000008") / "model.safetensors", directory)


DAMAGES = {  # name: (function of the checkpoint's directory, part of the message)
    f"{damage.__name__} {file}":
        (lambda directory, damage=damage, file=file: damage(directory / file), file)
    for damage in (truncate, flip, os.unlink) for file in FILES
} | {
    "flip the last byte of state.json":
        (lambda directory: flip(directory / "state.json", 0.9999), "state.json"),
    "put in a file":
        (lambda directory: (directory / "notes.txt").write_text(""), "notes.txt is not part"),
    "put in other weights": (put_in_other_weights, "model.safetensors is damaged"),
    "empty": (empty, "has no state.json"),
    "make newer": (make_newer, "has format 3, of another version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
        tiny, uninterrupted, tmp_path, capsys, train_fails, damage):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before, damaged = list_checkpoints(tmp_path / "run")
    do, expected = DAMAGES[damage]
    do(damaged)
    message = train_fails(tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={damaged}")
    assert str(damaged) in message and expected in message
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path / "run"))
    fingerprint = json.loads((before / "state.json").read_text())["data_sha256"]
    assert checkpoint_to_resume(config, fingerprint) == before
    warning = capsys.readouterr().err
    assert expected in warning
    assert "renamed to step_00000012.set_aside, continuing from the one before" in warning
    assert damaged.with_name("step_00000012.set_aside").exists()


def test_if_every_checkpoint_is_damaged_nothing_is_overwritten(tiny, uninterrupted, tmp_path,
                                                               train_fails):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for directory in list_checkpoints(tmp_path / "run"):
        flip(directory / "model.safetensors")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = train_fails(tiny, f"--out_dir={tmp_path / 'run'}")
    for name in ("step_00000012", "step_00000008"):
        assert f"{name}/model.safetensors is damaged" in message
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_continues_bitwise_from_before_a_damaged_checkpoint(tiny, uninterrupted, tmp_path,
                                                                  capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    flip(tmp_path / "run/checkpoints/step_00000012/optimizer.safetensors")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", *AS_UNINTERRUPTED, "--keep_checkpoints=1")
    assert "optimizer.safetensors is damaged" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_a_damaged_checkpoint_is_not_sampled_from(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints/step_00000012", tmp_path / "damaged")
    flip(tmp_path / "damaged/model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        checkpoint.load(tmp_path / "damaged")


# --- updates that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_in_the_graph(where, value):
    """Weights and moments keep their bits, the count rises, nothing is compiled, and the next
    update
    happens."""
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
