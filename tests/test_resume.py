"""What train.py promises of stopping, crashing and going on: the same bytes as a run that nobody interrupted."""
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from conftest import ROOT, TINY, limit_file_size, rows, run
from kill_and_resume import kill_and_resume, outcome

import train
from checkpoint import Saver, list_checkpoints, load_model, sealed, verify
from model import Llama
from process import UserError
from train import AdamW, Config

FILES = "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "state.json"


def start(*command, **kwargs):
    """A running command of the repository, with its output in pipes and in a process group of its own."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, **kwargs)


def wait_for(process, beginning):
    assert any(line.startswith(beginning) for line in process.stdout), process.stderr.read()


def ended(process):
    """(exit code, stdout, stderr), when no process holds the pipes any more."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_short(straight, tmp_path):
    """The out_dir of a run as a kill after step 11 would leave it: its newest checkpoint is that of step 8."""
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    return tmp_path / "run"


AS_STRAIGHT = "--log_every=2", "--checkpoint_every=4"


def test_resume_is_bitwise(tiny, straight, cut_short):
    code, out, err = run("train.py", tiny, f"--out_dir={cut_short}", *AS_STRAIGHT)
    assert code == 0 and "going on from" in out, err
    assert outcome(cut_short) == outcome(straight)


def test_resume_from_a_checkpoint_of_another_place_brings_its_history(tiny, straight, tmp_path):
    shutil.copytree(straight / "checkpoints/step_00000008", tmp_path / "downloaded")
    code, _, err = run("train.py", tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={tmp_path / 'downloaded'}", *AS_STRAIGHT)
    assert code == 0, err
    assert outcome(tmp_path / "run") == outcome(straight)


def test_resume_is_bitwise_with_several_replicas_too(tiny, tmp_path):
    """Only replica 0 looks at the clock; the others learn of it in the graph. On from two to one, which adds in another
    order, the data is the same and the result nearly so."""
    def train_on(replicas, out_dir, *arguments):
        code, out, err = run("tests/replicas.py", replicas, tiny, f"--out_dir={out_dir}", *arguments)
        assert code == 0, err
        return out
    train_on(2, tmp_path / "straight")
    assert "stopped after step 2" in train_on(2, tmp_path / "two", "--max_hours=1e-9")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert "step_00000002 (comp" in train_on(2, tmp_path / "two") and "step_00000002 (comp" in train_on(1, tmp_path / "one")
    assert outcome(tmp_path / "two") == outcome(tmp_path / "straight")
    for straight, other in zip(rows(tmp_path / "straight")[0], rows(tmp_path / "one")[0]):
        assert other["loss"] == pytest.approx(straight["loss"], rel=1e-5)


def test_another_run_in_the_same_place_is_refused(tiny, straight, fails_with, tmp_path):
    message = fails_with(tiny, f"--out_dir={straight}", "--learning_rate=0.5", "--n_layers=3")
    assert "n_layers was 2, is 3" in message and "learning_rate was 0.01, is 0.5" in message
    message = fails_with(tiny, f"--out_dir={straight}", "--train_glob=train_00001.bin")
    assert "the training data was train_*.bin" in message and "is train_00001.bin" in message
    assert "not empty" in fails_with(tiny, f"--out_dir={straight}", "--resume=never")
    message = fails_with(tiny, f"--out_dir={straight}", f"--resume={straight / 'checkpoints/step_00000008'}")
    assert "has checkpoints of its own, the newest of them step_00000012" in message


def test_what_does_not_define_the_run_may_change(tiny, straight, tmp_path):
    """Places, how often things happen, and how a batch is cut up; the data may have moved as long as it is the same."""
    shutil.copytree(tiny.parent, tmp_path / "moved")
    changes = dict(data_dir=str(tmp_path / "moved"), micro_batch_size=4, log_every=5, eval_every=0, checkpoint_every=3,
                   keep_checkpoints=9, max_hours=9.0, max_skipped=3, peak_tflops=1.0, attention="flash")
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(straight), **changes)
    checkpoint = train.checkpoint_to_resume(config, train.data.open_data(config)[0].sha256())
    assert checkpoint.name == "step_00000012"


# --- stopping ---------------------------------------------------------------------------------------------------------


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import checkpoint, process, train

def slow(function, name):
    def announced(*arguments):
        print(name, flush=True)
        time.sleep(1)
        result = function(*arguments)
        print(name, "ends", flush=True)
        return result
    return announced

train.evaluate, checkpoint.write = slow(train.evaluate, "evaluation"), slow(checkpoint.write, "save")
if __name__ == "__main__":
    process.run_command(train.main)
"""


def test_a_run_stopped_in_every_way_ends_as_one_that_nobody_stopped(tiny, tmp_path):
    """Each stop saves, says how to go on, and exits with 0; then the same command goes on."""
    common = "--max_steps=80", "--micro_batch_size=4", "--eval_every=20", "--keep_checkpoints=1"
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    straight, out_dir = tmp_path / "straight", tmp_path / "stopped"
    assert run("train.py", tiny, f"--out_dir={straight}", *common)[0] == 0
    command = "train.py", tiny, f"--out_dir={out_dir}", *common

    def stopped(process, at_least):
        code, out, err = ended(process)
        assert code == 0 and "Traceback" not in err, err
        step = int(re.search(r"stopped after step (\d+); to go on: the same command$", out, re.MULTILINE)[1])
        assert [path.name for path in list_checkpoints(out_dir)] == [f"step_{step:08d}"] and at_least <= step < 80
        verify(list_checkpoints(out_dir)[0])
        return step

    process = start(*command)
    wait_for(process, "starting")  # then it compiles
    os.kill(process.pid, signal.SIGTERM)
    step = stopped(process, 1)

    process = start(*command)
    wait_for(process, "step")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C goes to every process of the group
    step = stopped(process, step + 1)

    for what in ("evaluation", "save"):
        process = start(tmp_path / "slow.py", *command[1:], "--checkpoint_every=10")
        wait_for(process, what)
        os.killpg(process.pid, signal.SIGTERM)  # to every process, as a machine that shuts down does
        step = stopped(process, step + 1)

    step = stopped(start(*command, "--max_hours=1e-9"), step + 1)
    assert run(*command)[0] == 0
    assert outcome(out_dir) == outcome(straight)


def test_a_second_interrupt_ends_at_once(tiny, tmp_path):
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000", "--log_every=100000")
    wait_for(process, "step")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    started = time.monotonic()
    code, _, err = ended(process)
    assert code == 130 and time.monotonic() - started < 5
    assert "SIGINT: stopping within log_every steps" in err and "Traceback" not in err and not list_checkpoints(tmp_path)


def test_ctrl_c_saves_even_if_it_ends_the_reader_of_the_output(tiny, tmp_path):
    """As in python train.py ... 2>&1 | tee log."""
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000")
    wait_for(process, "step")
    process.stdout.close()
    process.stderr.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert len(list_checkpoints(tmp_path)) == 1


def test_no_worker_outlives_its_parent(tiny, tmp_path):
    """It would keep the TPU."""
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000")
    wait_for(process, "step")
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL


def test_max_hours_leaves_time_to_save(tiny, tmp_path):
    """Twice what a save and the time between two looks take. Here that is little, so nearly all the time is used."""
    started = time.monotonic()
    code, out, err = run("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000", "--max_hours=0.005")  # 18 s
    assert code == 0 and "stopped after step" in out, err
    assert 12 < time.monotonic() - started < 60  # two imports, which take seconds, come before the first step


WORKERS = """
import ctypes, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
sys.path.insert(0, sys.argv[2])
from process import run_command, run_on_all_cores

def worker(index, mode, stop_wanted):
    os.write(1, b"here\\n")  # at once, or two of these might end up in one line
    while not os.path.exists(__file__ + ".go"):
        time.sleep(0.01)
    if index == 0 and "deaf" in mode:
        ctypes.PyDLL(None).sleep(30)
    if index == 1 and "raises" in mode:
        raise RuntimeError("the first failure")
    if index == 1 and mode == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while not stop_wanted():  # as in an all-reduce that never ends
        time.sleep(0.01)
    os.write(1, b"asked to stop\\n")

def start_one(guarded_worker, work, arguments, directory, index):
    guarded_worker(index, partial(worker, index), arguments, directory)

def spawn(guarded_worker, arguments):
    with ProcessPoolExecutor(3, get_context("spawn")) as executor:  # as torch_xla does for the cores of a TPU
        list(executor.map(partial(start_one, guarded_worker, *arguments), range(3)))

if __name__ == "__main__":
    run_command(lambda: run_on_all_cores(spawn, worker, sys.argv[1]))
"""


@pytest.fixture
def processes(tmp_path):
    """Three worker processes without a TPU and with nothing to do, under train.py's own supervision."""
    (tmp_path / "workers.py").write_text(WORKERS)

    def begin(what):
        process = start(tmp_path / "workers.py", what, ROOT)
        for _ in range(3):
            wait_for(process, "here")
        (tmp_path / "workers.py.go").touch()
        return process
    return begin


@pytest.mark.parametrize("what, message", [("raises", "RuntimeError: the first failure"),
                                           ("is killed", "a worker was killed, perhaps for memory")])
def test_a_core_that_fails_ends_all_in_seconds(processes, what, message):
    process, started = processes(what), time.monotonic()
    code, out, err = ended(process)
    assert time.monotonic() - started < 8
    assert code == 1 and err.count(message) == 1 and "asked to stop" not in out, err
    assert err.count("Traceback") == (what == "raises")


def test_a_core_that_fails_with_nobody_listening_ends_all_too(processes):
    process = processes("raises")
    process.stderr.close()
    assert process.wait(timeout=8) == 1


def test_a_core_that_holds_the_interpreters_lock_is_ended_as_well(processes):
    process, started = processes("raises beside a deaf one"), time.monotonic()
    assert ended(process)[0] == 1 and time.monotonic() - started < 8


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_is_a_wish_to_stop(processes, signal_):
    process = processes("nothing")
    os.killpg(process.pid, signal_)
    code, out, err = ended(process)
    assert code == 0 and out.count("asked to stop") == 3 and "Traceback" not in err, err


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_kill_9_loses_nothing():
    assert kill_and_resume(kills=5, seed=1)[0] == 5


# --- faults while saving ----------------------------------------------------------------------------------------------


def obey_permissions():
    """root writes where it likes, unless the capability for that is dropped."""
    drop_from_bounding_set, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_dac_override, 0, 0, 0)


def test_a_full_disk_does_not_end_a_run_before_its_end(tiny, cut_short):
    process = start("train.py", tiny, f"--out_dir={cut_short}", *AS_STRAIGHT, "--checkpoint_every=2",
                    preexec_fn=limit_file_size(50_000))  # metrics.jsonl is smaller, the tensors are not
    code, out, err = ended(process)
    assert code == 2 and "Traceback" not in err
    assert re.search(r"warning: step 10 is not saved: .*File too large.*; the newest checkpoint is .*step_00000008; "
                     "training goes on", out)
    assert re.search(r"error: step 12 is not saved: .*File too large.*; the newest checkpoint is .*step_00000008$", err.strip())
    assert [path.name for path in (cut_short / "checkpoints").iterdir()] == ["step_00000008"]
    verify(cut_short / "checkpoints/step_00000008")


def test_a_read_only_directory_does_not_end_a_run_before_its_end(tiny, straight, cut_short):
    (cut_short / "checkpoints").chmod(0o555)
    command = "train.py", tiny, f"--out_dir={cut_short}", *AS_STRAIGHT, "--checkpoint_every=2"
    code, out, err = ended(start(*command, preexec_fn=obey_permissions))
    assert code == 2 and "Traceback" not in err
    assert "warning: step 10 is not saved: [Errno 13] Permission denied" in out and "error: step 12 is not saved" in err
    (cut_short / "checkpoints").chmod(0o755)
    assert run(*command)[0] == 0
    assert outcome(cut_short) == outcome(straight)


@pytest.mark.parametrize("removed", ["checkpoints", "."])
def test_a_directory_removed_meanwhile_is_made_again(tiny, straight, tmp_path, removed):
    process = start("train.py", tiny, f"--out_dir={tmp_path / 'run'}", *AS_STRAIGHT)
    wait_for(process, "saved")
    os.killpg(process.pid, signal.SIGSTOP)
    shutil.rmtree(tmp_path / "run" / removed)
    os.killpg(process.pid, signal.SIGCONT)
    code, _, err = ended(process)
    assert code == 0, err
    assert outcome(tmp_path / "run") == outcome(straight)


def test_rows_that_could_not_be_written_are_written_later(tiny, tmp_path, capsys):
    log = train.Log(dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path)), None, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (1, 2):
        log.write({"step": step, "val_loss": 1.0}, "")
    assert capsys.readouterr().out.count("metrics.jsonl: [Errno 21] Is a directory") == 2
    (tmp_path / "metrics.jsonl").rmdir()
    log.write({"step": 3, "val_loss": float("nan")}, "")
    assert rows(tmp_path)[1] == [{"step": 1, "val_loss": 1.0}, {"step": 2, "val_loss": 1.0}, {"step": 3, "val_loss": None}]


@pytest.fixture
def save(tiny, tmp_path):
    """save(step) saves and waits; save.said is what the saver said."""
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path), keep_checkpoints=1)
    model = Llama(config, seed=0)
    optimizer, said = AdamW(model.parameters(), config), []
    saver = Saver(config, None, "", said.append)

    def save(step):
        saver.save(step, model, optimizer, b"", last=False)
        saver.wait()
    save.said = said
    return save


def test_a_checkpoint_that_somebody_removes_before_it_is_complete_gets_no_name(save, tmp_path, monkeypatch):
    save(1)

    def remove_and_seal(state):
        shutil.rmtree(tmp_path / "checkpoints/step_00000002.partial")
        return sealed(state)
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.sealed", remove_and_seal)
        save(2)
    assert "warning: step 2 is not saved" in save.said[-1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    verify(tmp_path / "checkpoints/step_00000001")


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(save, tmp_path, monkeypatch):
    save(1)

    def refuse(*arguments, **kwargs):
        raise PermissionError(13, "Permission denied", "model.safetensors")
    monkeypatch.setattr("shutil.rmtree", refuse)
    save(2)
    assert "step_00000001 can't be deleted: [Errno 13] Permission denied" in save.said[-1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def make_newer(checkpoint):
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    (checkpoint / "state.json").write_bytes(sealed(state | {"format": state["format"] + 1}))


DAMAGES = {f"{damage.__name__} {file}": (lambda checkpoint, damage=damage, file=file: damage(checkpoint / file), file)
           for damage in (truncate, flip, os.unlink) for file in FILES}
DAMAGES |= {"flip the last byte of state.json": (lambda checkpoint: flip(checkpoint / "state.json", 0.9999), "state.json"),
            "put in a file": (lambda checkpoint: (checkpoint / "notes.txt").write_text(""), "notes.txt is not part"),
            "put in another's weights": (lambda checkpoint: shutil.copy(
                checkpoint.with_name("step_00000008") / "model.safetensors", checkpoint), "model.safetensors is damaged"),
            "empty": (empty, "has no state.json"), "make newer": (make_newer, "has format 3, of another version")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny, straight, tmp_path, capsys, fails_with, damage):
    shutil.copytree(straight, tmp_path / "run")
    before, damaged = list_checkpoints(tmp_path / "run")
    do, named = DAMAGES[damage]
    do(damaged)
    assert str(damaged) in (message := fails_with(tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={damaged}"))
    assert named in message
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path / "run"))
    assert train.checkpoint_to_resume(config, json.loads((before / "state.json").read_text())["data_sha256"]) == before
    warning = capsys.readouterr().err
    assert named in warning and "renamed to step_00000012.set_aside, going on from the one before" in warning
    assert damaged.with_name("step_00000012.set_aside").exists()


def test_with_no_whole_checkpoint_nothing_is_overwritten(tiny, straight, tmp_path, fails_with):
    shutil.copytree(straight, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run"):
        flip(checkpoint / "model.safetensors")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = fails_with(tiny, f"--out_dir={tmp_path / 'run'}")
    assert "step_00000012/model.safetensors is damaged" in message and "step_00000008/model.safetensors is damaged" in message
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_goes_on_bitwise_from_before_a_damaged_checkpoint(tiny, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    flip(tmp_path / "run/checkpoints/step_00000012/optimizer.safetensors")
    code, _, err = run("train.py", tiny, f"--out_dir={tmp_path / 'run'}", *AS_STRAIGHT, "--keep_checkpoints=1")
    assert code == 0 and "optimizer.safetensors is damaged" in err
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_damaged_checkpoint_is_not_sampled_from(straight, tmp_path):
    shutil.copytree(straight / "checkpoints/step_00000012", tmp_path / "damaged")
    flip(tmp_path / "damaged/model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_model(tmp_path / "damaged")


# --- updates that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_in_the_graph(where, value):
    """Weights and moments keep their bits, the count moves, nothing is compiled, and the next update happens."""
    device = torch_xla.device()
    config = Config(**TINY | {"batch_size": 2, "dtype": "bfloat16"})
    model = Llama(config, seed=0).to(device)
    optimizer, passes = AdamW(model.parameters(), config), train.Passes(model, config)
    zero, bad = torch.zeros((), device=device), torch.full((), value, device=device)
    torch_xla.sync()
    draw = torch.Generator().manual_seed(0)
    compiled, states, reports = [], [], []
    for step in range(8):
        batch = torch.randint(0, config.vocab_size, (2, config.context + 1), dtype=torch.int32, generator=draw)
        if where == "gradient" and step in (4, 5):
            for p in list(model.parameters())[::5]:
                p.grad.copy_(bad.expand_as(p))  # what a backward pass adds to
            torch_xla.sync()
        before = met.metric_data("CompileTime")[0]
        added = bad if where == "loss" and step in (4, 5) else zero
        reports.append(train.train_step(passes, optimizer, batch, step, False, added).tolist())
        compiled.append(met.metric_data("CompileTime")[0] - before)
        states.append([tensor.detach().cpu() for p in model.parameters() for tensor in (p, *optimizer.state[p].values())])
    same = [all(torch.equal(a, b) for a, b in zip(*pair)) for pair in zip(states, states[1:])]
    assert same == [False, False, False, True, True, False, False]
    assert [report[2:4] for report in reports] == [[0, 0]] * 4 + [[1, 1], [2, 2], [2, 0], [2, 0]]
    assert compiled[3:] == [0] * 5


def test_a_skipped_update_is_logged_and_agreed_on_by_all_cores(tiny, tmp_path):
    """One replica's loss at step 5 is nan."""
    code, out, err = run("tests/replicas.py", 2, tiny, f"--out_dir={tmp_path}", env={"BREAK": "nan"})
    assert code == 0, err
    training = rows(tmp_path)[0]
    assert [row["skipped"] for row in training] == [0] * 4 + [1] * 8
    assert training[4]["loss"] is None and all(row["loss"] for row in training if row["step"] != 5)
    assert "loss     nan" in out and "1 updates skipped" in out
    one, other = re.findall(r"weights of replica \d: (\w+)", out)
    assert one == other


def test_a_run_that_diverges_ends_with_its_checkpoints_as_they_were(tiny, tmp_path):
    """The first update makes the weights useless; the second and the following are skipped."""
    code, out, err = run("train.py", tiny, f"--out_dir={tmp_path}", "--learning_rate=1e30", "--warmup_steps=0",
                         "--max_skipped=4", "--checkpoint_every=1", "--keep_checkpoints=1")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert re.search("error: step 6: loss .*, gradient norm nan, 5 updates skipped in a row: diverged", err)
    kept = list_checkpoints(tmp_path)
    assert kept[0].name == "step_00000001", "the last checkpoint before the first skipped update is gone"
    for checkpoint in kept:
        verify(checkpoint)
