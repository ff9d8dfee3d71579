"""Start the worker on every core, pass on a request to stop, and end all cores when one fails or
hangs.

    python train.py            the main process must not open the TPU, or the workers could not
      | main thread            receives signals, and watches the workers
      | second thread          xmp.spawn(...), which waits for the workers
      |
      +-- worker of core 0     a TPU core belongs to one process, so there is a process for each
      +-- worker of core 1     (on a CPU one process with one core; tests/replicas.py has several
      +-- ...                  cores as threads of one process)

Messages are passed as files in a temporary directory:

    DIR/stop                 main process to workers: the user asked to stop
    DIR/started/PID          worker to main process: my core of the TPU is open
    DIR/running/PID.CORE     worker to main process: I am running; removed at the end. Its time of
                             modification is the worker's last sign of life
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

A core that hangs, because its chip or another core does not answer:
 1. It gives no sign of life: it does not begin, or does not come to its next step.
 2. After hang_minutes the main thread prints which core that is and what to do, and kills all
    workers. The exit code is 1.
On a pod slice every host watches its own cores. When a host fails, the cores of the others wait for
it in an all-reduce, and so their hosts end after hang_minutes too.
"""
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from nanoxla.errors import UserError, first_line, user_message
from nanoxla.processes import exit_with_parent, signals_blocked

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
BUSY_TRIES, BUSY_PAUSE = 4, 10  # how often to try to open the TPU, and seconds in between


def run_on_all_cores(spawn, worker, arguments, hang_minutes):
    """Calls worker(*arguments, stop_requested) on every core, and waits until all have returned.

    spawn is xmp.spawn. stop_requested() is true in every worker after a SIGINT or SIGTERM; a call
    is also a sign of life. Exits the process if a worker failed, if a core gave no sign of life for
    hang_minutes (0: never), or at a SIGINT that follows a first SIGINT or SIGTERM."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as thread:
        received, workers, lost = [], set(), None
        for name in ("started", "running"):
            Path(directory, name).mkdir()
        watchdog = Watchdog(Path(directory), 60 * hang_minutes or math.inf)

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
            spawned = thread.submit(spawn_patiently, spawn, (worker, arguments, directory))
        while wait([spawned], timeout=0.1).not_done:
            if received:
                with contextlib.suppress(OSError):  # the disk is full: try again in the next round
                    Path(directory, "stop").touch()
            alive = multiprocessing.active_children()
            workers.update(alive)
            # The process pool in xmp.spawn watches the workers that existed when it last woke up.
            # It misses the end of one that started after that, so look here.
            missing = any_lost(directory)  # first, so that it is among those that are gone
            gone = {process for process in workers if not exists(process.pid)}
            if missing or any(process.exitcode for process in gone):
                lost = gone if lost is None else lost  # before anything is killed here
                kill(workers)
            if hanging := watchdog.look(alive):
                kill(workers)
                with contextlib.suppress(OSError):
                    print(f"error: {hanging}", file=sys.stderr, flush=True)
                if wait([spawned], timeout=10).not_done:  # not even a kill ends a worker
                    shutil.rmtree(directory, ignore_errors=True)
                    os._exit(1)
                sys.exit(1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # nothing is left to stop
        try:
            spawned.result()
        except BrokenProcessPool:
            codes = [int(path.name) for path in Path(directory).glob("failed/*")]
            # None: all ended between two looks, and so nothing was killed here.
            exit_codes = [process.exitcode or 0 for process in (workers if lost is None else lost)]
            sys.exit(codes[0] if codes else lost_worker(min(exit_codes, default=0)))
        except RuntimeError as error:
            raise UserError(f"torch_xla can't open the TPU: {first_line(error)}. Another process "
                            "may hold it, or a chip has failed: restart the machine") from None


def spawn_patiently(spawn, arguments):
    """spawn(supervised, arguments). Tries again for a while if a chip is busy: after a
    kill -9 it takes some seconds until it is free."""
    for _ in range(BUSY_TRIES - 1):
        try:
            return spawn(supervised, arguments)
        except RuntimeError as error:  # of torch_xla: `supervised` raises nothing
            if "busy" not in str(error).lower() or isinstance(error, BrokenProcessPool):
                raise
            print(f"the TPU is busy ({first_line(error)}); trying again in {BUSY_PAUSE} s",
                  file=sys.stderr, flush=True)
            time.sleep(BUSY_PAUSE)
    return spawn(supervised, arguments)


class Watchdog:
    """Notices a core that gives no sign of life."""

    def __init__(self, directory, limit):
        """directory: of the messages. limit: seconds."""
        self.directory, self.limit = directory, limit
        self.looked = time.monotonic()
        self.awake = 0.0  # seconds, without times in which this process was suspended as well
        self.last_signs = {}  # {what was seen: self.awake when it was first seen}

    def look(self, workers):
        """What is wrong, in words, or None. workers: the living worker processes."""
        now = time.monotonic()
        self.looked, self.awake = now, self.awake + min(now - self.looked, 1.0)
        started = {path.name for path in (self.directory / "started").iterdir()}
        signs = {process.pid: "" for process in workers if str(process.pid) not in started}
        for path in (self.directory / "running").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just returned
                signs[path.name] = path.stat().st_mtime_ns
        self.last_signs = {sign: self.last_signs.get(sign, self.awake) for sign in signs.items()}
        if not self.last_signs:
            return None
        (silent, _), since = min(self.last_signs.items(), key=lambda item: item[1])
        if self.awake - since < self.limit:
            return None
        minutes = f"{self.limit / 60:.3g} minutes"
        if isinstance(silent, int):
            return (f"process {silent} has been waiting for its core of the TPU for {minutes}. "
                    "Another process or another host may hold the TPU, or a chip has failed: "
                    "end the process, or restart the machine")
        return (f"core {silent.split('.')[1]} has not come to its next step for {minutes}. A chip, "
                "another core or another host does not answer. Run the same command again: "
                "training continues from the newest checkpoint. If compiling, evaluating or "
                "saving takes that long, raise hang_minutes")


def any_lost(directory):
    """Whether a process is gone although its worker has not returned. (A process that started and
    ended between two looks of the main thread is not in its set of workers, but its file is
    there.)"""
    pids = [path.name.split(".")[0] for path in Path(directory, "running").iterdir()]
    return any(not exists(pid) for pid in pids)


def exists(pid):
    return Path("/proc", str(pid)).exists()


def lost_worker(exit_code):
    """An error message. exit_code: of a worker; that of a killed one is minus the signal."""
    if exit_code >= 0:
        return "error: a worker ended without a message"
    name = signal.Signals(-exit_code).name
    advice = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"error: a worker was ended by {name}{advice}"


def kill(processes):
    for process in processes:
        process.kill()


def supervised(index, worker, arguments, directory):
    """xmp.spawn calls this on core `index`. It runs the worker. If the worker fails, it prints the
    error message and ends the process with code 1; the main process takes the exit code of the
    command from the name of the file in failed/."""
    exit_with_parent()
    running = Path(directory, "running", f"{os.getpid()}.{index}")
    stop = Path(directory, "stop")

    def stop_requested():
        os.utime(running)
        return stop.exists()
    try:
        running.touch()
        Path(directory, "started", str(os.getpid())).touch()
        worker(*arguments, stop_requested)
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
