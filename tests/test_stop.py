"""Stopping a run, and what happens when a core fails."""
import os
import re
import signal
import time

import pytest
from conftest import ROOT, ended, run, start, train_here, wait_for_line
from kill_and_resume import outcome

from nanoxla.checkpoint import list_checkpoints, verify

# --- stopping a run -----------------------------------------------------------------------------


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
    """Each stop saves, says how to resume, and exits with 0. Then the same command resumes."""
    common = "--max_steps=80", "--micro_batch_size=4", "--eval_every=20", "--keep_checkpoints=1"
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    out_dir = tmp_path / "stopped"
    train_here(tiny, f"--out_dir={tmp_path / 'uninterrupted'}", *common)
    command = "train.py", tiny, f"--out_dir={out_dir}", *common

    def stopped(process, at_least):
        code, out, err = ended(process)
        assert code == 0 and "Traceback" not in err, err
        note = r"stopped after step (\d+); to resume, run the same command$"
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
    assert "SIGINT: stopping within log_every + 1 steps" in err and "Traceback" not in err
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
    """An orphan would hold the TPU."""
    process = start("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000")
    wait_for_line(process, "step")
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL


def test_max_hours_leaves_time_to_save(tiny, tmp_path):
    """The run reserves twice the sum of its longest save and its longest time between two reports.
    Here that is short, so it uses nearly all of its 13 seconds."""
    started = time.monotonic()
    code, out, err = run("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000",
                         "--max_hours=0.0036")
    assert code == 0 and "stopped after step" in out, err
    assert 9 < time.monotonic() - started < 60  # importing takes seconds, before the clock starts


# --- cores that fail ----------------------------------------------------------------------------


WORKERS = """
import ctypes, glob, multiprocessing, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
sys.path.insert(0, sys.argv[2])
from nanoxla.errors import run_command
from nanoxla import launch

def worker(index, mode, stop_requested):
    os.write(1, b"here\\n")  # in one piece: print might mix the lines of two workers
    while not os.path.exists(__file__ + ".go"):
        time.sleep(0.01)
    if index == 0 and "holds the GIL" in mode:
        ctypes.PyDLL(None).sleep(30)  # holds the GIL
    if index == 1 and "raises" in mode:
        raise RuntimeError("the first failure")
    if "all are killed" in mode or index == 1 and "is killed" in mode:
        os.kill(os.getpid(), signal.SIGKILL)
    if index == 1 and "hangs" in mode:
        time.sleep(100)
    while not stop_requested():  # as in an all-reduce that never ends
        time.sleep(0.01)
    os.write(1, b"asked to stop\\n")

def start_one(supervised, work, arguments, directory, index):
    if index == 2 and "never opens" in arguments[0]:
        time.sleep(100)
    if "busy" in arguments[0]:
        tries = len(glob.glob(__file__ + ".try*"))
        open(f"{__file__}.try{time.time()}", "x").close()
        if "always" in arguments[0] or tries < 3:
            raise RuntimeError("TPU initialization failed: Device or resource busy\\ntrace")
    supervised(index, partial(worker, index), arguments, directory)

def spawn(supervised, arguments):
    with ProcessPoolExecutor(3, get_context("spawn")) as executor:  # as torch_xla does on a TPU
        list(executor.map(partial(start_one, supervised, *arguments), range(3)))

first_seen, active_children = {}, multiprocessing.active_children

def seen_for_a_second():
    return [process for process in active_children()
            if time.monotonic() - first_seen.setdefault(process.pid, time.monotonic()) > 1]

class LateExitCode(multiprocessing.context.SpawnProcess):
    late = True

    @property
    def exitcode(self):  # None at first, as when another thread is reaping the process just now
        return None if LateExitCode.late else super().exitcode

    def kill(self):
        LateExitCode.late = False
        super().kill()

if __name__ == "__main__":
    if "unseen" in sys.argv[1]:
        multiprocessing.active_children = seen_for_a_second
    if "late" in sys.argv[1]:
        multiprocessing.context.SpawnContext.Process = LateExitCode
    launch.BUSY_PAUSE = 0.1
    hang_minutes = 2 / 60 if "hang" in sys.argv[1] else 15
    run_command(lambda: launch.run_on_all_cores(spawn, worker, sys.argv[1:2], hang_minutes))
"""


@pytest.fixture
def workers(tmp_path):
    """workers(mode) starts three idle worker processes, without a TPU, under train.py's own
    supervision."""
    (tmp_path / "workers.py").write_text(WORKERS)

    def begin(mode, at_once=False):
        if at_once:
            (tmp_path / "workers.py.go").touch()
        process = start(tmp_path / "workers.py", mode, ROOT)
        if not at_once:
            for _ in range(3):
                wait_for_line(process, "here")
            time.sleep(0.5)  # so that the main process has seen them: it looks ten times a second
            (tmp_path / "workers.py.go").touch()
        return process
    return begin


@pytest.mark.parametrize("mode, message", [
    ("raises", "RuntimeError: the first failure"),
    ("is killed", "error: a worker was ended by SIGKILL, perhaps for lack of memory"),
    ("is killed, and its exit code is late", "error: a worker was ended by SIGKILL"),
    ("all are killed", "error: a worker was ended by SIGKILL, perhaps for lack of memory")])
def test_a_failing_core_ends_all_within_seconds(workers, mode, message):
    process, started = workers(mode), time.monotonic()
    code, out, err = ended(process)
    assert time.monotonic() - started < 8
    assert code == 1 and err.count(message) == 1 and "asked to stop" not in out, err
    assert err.count("Traceback") == (mode == "raises")


@pytest.mark.parametrize("mode, message", [
    ("raises unseen", "RuntimeError: the first failure"),
    ("is killed unseen", "error: a worker ")])
def test_a_core_that_ends_before_the_main_process_has_seen_it_ends_all(workers, mode, message):
    process, started = workers(mode, at_once=True), time.monotonic()
    code, _, err = ended(process)
    assert code == 1 and err.count(message) == 1, err
    assert time.monotonic() - started < 20


def test_a_failing_core_ends_all_even_if_its_message_cannot_be_printed(workers):
    process = workers("raises")
    process.stderr.close()
    assert process.wait(timeout=8) == 1


def test_a_core_that_holds_the_gil_is_ended_too(workers):
    process, started = workers("raises beside one that holds the GIL"), time.monotonic()
    assert ended(process)[0] == 1 and time.monotonic() - started < 8


@pytest.mark.parametrize("mode, message", [
    ("hangs", r"error: core 1 has not come to its next step for 0.0333 minutes\. A chip, "),
    ("never opens, hangs", r"error: process \d+ has been waiting for its core of the TPU for ")])
def test_a_core_that_hangs_is_reported_and_ends_all(workers, mode, message):
    process, started = workers(mode, at_once=True), time.monotonic()
    code, _, err = ended(process)
    assert code == 1 and re.match(message, err) and len(err.splitlines()) == 1, err
    assert time.monotonic() - started < 20
    wait_until_gone(process)


def wait_until_gone(process):
    """Fails unless nothing of the process group of a started process is left."""
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_run_suspended_for_longer_than_hang_minutes_goes_on(workers):
    """As by Ctrl-Z. The suspended time of the main process does not count."""
    process = workers("no hang")
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 0, err


def test_a_busy_tpu_is_tried_again(workers):
    """The chips of a process that was killed are busy for a while."""
    process = workers("busy", at_once=True)
    for _ in range(3):
        wait_for_line(process, "here")
    process.terminate()
    code, _, err = ended(process)
    note = "the TPU is busy (TPU initialization failed: Device or resource busy); trying again"
    assert code == 0 and err.startswith(note) and err.count("trying again") == 1, err


def test_a_tpu_that_stays_busy_ends_in_a_sentence(workers):
    code, _, err = ended(workers("always busy", at_once=True))
    assert code == 2 and err.count("trying again") == 3 and "Traceback" not in err, err
    assert "error: torch_xla can't open the TPU: TPU initialization failed: Device or" in err


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_requests_a_stop(workers, signal_):
    process = workers("nothing")
    os.killpg(process.pid, signal_)
    code, out, err = ended(process)
    assert code == 0 and out.count("asked to stop") == 3 and "Traceback" not in err, err
