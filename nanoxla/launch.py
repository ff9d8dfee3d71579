"""Start the worker on every core, pass on a request to stop, and end all cores when one fails.

    python train.py            the main process must not open the TPU, or the workers could not
      | main thread            receives signals, and watches the workers
      | second thread          xmp.spawn(...), which waits for the workers
      |
      +-- worker of core 0     a TPU core belongs to one process, so there is a process for each
      +-- worker of core 1     (on a CPU one process with one core; tests/replicas.py has several
      +-- ...                  cores as threads of one process)

Messages are passed as files in a temporary directory:

    DIR/stop                 main process to workers: the user asked to stop
    DIR/running/PID.CORE     worker to main process: I am running; removed at the end
    DIR/failed/CODE          worker to main process: I failed; exit with CODE

A Ctrl-C (SIGINT) or SIGTERM:
 1. A terminal sends SIGINT to all processes. The workers have inherited a signal mask that blocks
    it, or a KeyboardInterrupt would end each of them in the middle of a step. Only the main thread
    of the main process receives it.
 2. The handler prints a note. The main thread creates DIR/stop.
 3. Each worker looks for the file at every step and sends a flag through the step's all-reduce. So
    all cores read the request in the same report, at most log_every + 1 steps later. (If each
    stopped when it saw the file, some core would do one step more than the others, and wait forever
    in that step's all-reduce.)
 4. Core 0 saves; all cores leave the loop and return. xmp.spawn returns; the exit code is 0.
A second Ctrl-C, while 2. to 4. are going on, kills the workers at once; the exit code is 130.

A core that fails, by an exception or by a kill:
 1. The other cores wait for it in the next all-reduce, where no exception reaches them.
 2. If it raised an exception, it prints its message, creates DIR/failed/CODE and ends its process
    with os._exit. (An ordinary exit would first wait for threads and for the device, which wait for
    the other cores.) If several fail, only the first prints. A killed worker does none of this.
 3. The main thread sees that a process is gone that has not returned, and kills all workers.
 4. The main process exits with CODE: 2 for a user's mistake or a failure of the operating system,
    1 for a bug or a killed worker.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from nanoxla.errors import user_message
from nanoxla.processes import exit_with_parent, signals_blocked

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM


def run_on_all_cores(spawn, worker, *arguments):
    """Calls worker(*arguments, stop_requested) on every core, and waits until all have returned.

    spawn is xmp.spawn. stop_requested() is true in every worker after a SIGINT or SIGTERM. Exits
    the process if a worker failed, or at a SIGINT that follows a first SIGINT or SIGTERM."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as thread:
        received, workers = [], set()
        Path(directory, "running").mkdir()

        def request_stop(number, _):
            if number == signal.SIGINT and received:
                kill(workers)
                os._exit(130)
            received.append(number)
            note = (f"{signal.Signals(number).name}: stopping within log_every + 1 steps, and "
                    "saving; Ctrl-C ends at once\n")
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(sys.stderr.fileno(), note.encode())

        for number in STOP_SIGNALS:
            signal.signal(number, request_stop)
        with signals_blocked(*STOP_SIGNALS):  # for the new thread, and so for the workers it starts
            spawned = thread.submit(spawn, supervised, (worker, arguments, directory))
        while wait([spawned], timeout=0.1).not_done:
            if received:
                with contextlib.suppress(OSError):  # the disk is full: try again in the next round
                    Path(directory, "stop").touch()
            workers.update(multiprocessing.active_children())
            # The process pool in xmp.spawn watches the workers that existed when it last woke up.
            # It misses the end of one that started after that, so look here.
            if any(process.exitcode for process in workers) or any_lost(directory):
                kill(workers)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # nothing is left to stop
        try:
            spawned.result()
        except BrokenProcessPool:
            codes = [int(path.name) for path in Path(directory).glob("failed/*")]
            sys.exit(codes[0] if codes else "a worker was killed, perhaps for lack of memory")


def any_lost(directory):
    """Whether a process is gone although its worker has not returned. (A process that started and
    ended between two looks of the main thread is not in its set of workers, but its file is
    there.)"""
    pids = [path.name.split(".")[0] for path in Path(directory, "running").iterdir()]
    return any(not Path("/proc", pid).exists() for pid in pids)


def kill(processes):
    for process in processes:
        process.kill()


def supervised(index, worker, arguments, directory):
    """xmp.spawn calls this on core `index`. It runs the worker. If the worker fails, it prints the
    error message and ends the process with code 1; the main process takes the exit code of the
    command from the name of the file in failed/."""
    exit_with_parent()
    running = Path(directory, "running", f"{os.getpid()}.{index}")
    try:
        running.touch()
        worker(*arguments, Path(directory, "stop").exists)
        running.unlink()
    except BaseException as error:
        message = user_message(error)
        failed = Path(directory, "failed")
        try:
            failed.mkdir()  # succeeds on one core only
        except FileExistsError:
            time.sleep(5)  # another core failed first: let it print its message
            os._exit(1)
        except OSError:
            pass  # the disk is full
        with contextlib.suppress(OSError):
            print(message or traceback.format_exc(), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            # An empty file, whose name is the exit code: it needs no space on the disk.
            (failed / ("2" if message else "1")).touch()
        os._exit(1)
