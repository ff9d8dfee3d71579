"""What the commands have in common: a mistake is told in one sentence, progress is shown, files are written whole or not at
all, settings are checked, and several processes start, stop and fail together.
"""
import contextlib
import dataclasses
import difflib
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its default is a semaphore between processes, reported as leaked if one ends at once


class UserError(Exception):
    """A mistake the user can mend. The message says what was found, where, and what was expected."""


def told(error):
    """What to tell the user of a mistake of theirs, or of the operating system's word on a file; None for a bug."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"error: {error.filename or 'writing'}: {error.strerror}"
    return None


def run_command(main):
    """Calls main(). A mistake of the user's ends in its message on stderr and exit code 2; a bug in its traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has seen enough, as head does; Python would try again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell says it of a program that SIGPIPE ended
    except Exception as error:
        if told(error) is None:
            raise
        print(told(error), file=sys.stderr)
        sys.exit(2)


class Progress(tqdm):
    """A bar with an ETA on a terminal; elsewhere a plain line every 30 seconds."""

    def __init__(self, total, unit, description):
        self.plain = not sys.stderr.isatty()
        super().__init__(total=total, unit=unit, desc=description, unit_scale=True, leave=False,
                         mininterval=30 if self.plain else 0.1,
                         bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]" if self.plain else None)

    def display(self, msg=None, pos=None):
        if not self.plain:
            super().display(msg, pos)
        elif 0 < self.n < self.total and msg != "":  # "": closing
            print(self, file=sys.stderr, flush=True)


def write_file(path, content):
    """Writes bytes so that `path` is absent, old or complete, whatever happens, and complete means on the disk. Returns it."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)
    return path


def refuse_used(directory, option):
    """Raises unless write_directory can make `directory`, which the user named by `option`: before any work is done for it."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{option} {directory} exists and is not an empty directory; name a new one, or delete it first")


@contextlib.contextmanager
def write_directory(directory):
    """A directory to write files into. It gets the name `directory`, which may be that of an empty one, when all of them are
    on the disk; until then it ends in .partial, and if anything fails it is gone."""
    whole = Path(directory).resolve()  # "." has no name, and a link can't be replaced by a directory
    partial = whole.with_name(f"{whole.name}.partial")
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        partial.rename(whole)
        flush(whole.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not to stay full
        raise


def flush(path):
    """Has the disk store a file's bytes, or a directory's names (a file's own flush does not make its name durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- settings ---------------------------------------------------------------------------------------------------------


def read_assignments(config_class, path, overrides):
    """{key: value} of the assignments in the Python file `path`, under overrides like "--key=value"; the keys and their
    types are those of the dataclass config_class."""
    values = {}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), str(path), "exec"), values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} can't be read: {error}") from None
    except Exception as error:
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    values = {key: typed(types, key, value, path) for key, value in values.items() if not key.startswith("__")}
    for argument in overrides:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument}: expected --key=value; --help lists the keys")
        values[key] = typed(types, key, value, "the command line", parse=True)
    return values


def typed(types, key, value, where, parse=False):
    """`value`, if types has `key` and value is of its type; with `parse`, value is a string to make it of."""
    if key not in types:
        nearest = difflib.get_close_matches(key, types, n=1, cutoff=0)[0]
        raise UserError(f"{where}: there is no key {key!r}; the nearest is {nearest!r}")
    kind = types[key]
    if parse or (kind is float and type(value) is int):
        with contextlib.suppress(ValueError):
            value = kind(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} = {value!r}, expected {kind.__name__}")
    return value


# --- several processes ------------------------------------------------------------------------------------------------

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM


def alone(function, *arguments, environment=()):
    """function(*arguments), in a process of its own, whose environment has the variables of the dict `environment` too."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def end_with_parent():
    """In a spawned process: ends it when its parent ends, even by kill -9, instead of leaving it to work on unseen."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def blocked(*signals):
    """Threads and processes that are started inside never get these signals, which a terminal sends to a whole group of
    processes: they inherit that they are blocked."""
    multiprocessing.resource_tracker.ensure_running()  # or the first spawn starts it, which would unblock them again
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def guarded_worker(index, worker, arguments, directory):
    """Calls worker(*arguments, stop_wanted). The others would wait in the next all-reduce for ever for a core that failed:
    so the first to fail says why, on stderr and by its exit code, and ends its process, at which run_on_all_cores ends all.
    The code is the name of a file in `directory`/failed: an empty file needs no space on a full disk."""
    end_with_parent()
    try:
        worker(*arguments, Path(directory, "stop").exists)
    except BaseException as error:
        try:
            Path(directory, "failed").mkdir()  # which only one core can
            Path(directory, "failed", "2" if told(error) else "1").touch()
        except FileExistsError:
            time.sleep(5)  # another was first: let it finish its sentence
            os._exit(1)
        finally:
            with contextlib.suppress(OSError):
                print(told(error) or traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)


def run_on_all_cores(spawn, worker, *arguments):
    """Has spawn(function, arguments), which is xmp.spawn, call worker(*arguments, stop_wanted) on each core, and waits for
    the end. After SIGINT (Ctrl-C) or SIGTERM, stop_wanted() is true everywhere; a second SIGINT ends all at once."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as thread:
        asked, workers = [], set()

        def ask_to_stop(number, _):
            if number == signal.SIGINT and asked:
                for process in workers:
                    process.kill()
                os._exit(130)
            asked.append(number)
            with contextlib.suppress(OSError):  # a terminal that is gone; print would try again at the end, and exit with 120
                os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: stopping within log_every steps, and saving; "
                         "Ctrl-C ends at once\n".encode())

        for number in STOP_SIGNALS:
            signal.signal(number, ask_to_stop)
        with blocked(*STOP_SIGNALS):  # so a blocked thread starts the workers, while this one listens
            spawned = thread.submit(spawn, guarded_worker, (worker, arguments, directory))
        while wait([spawned], timeout=0.1).not_done:
            if asked:
                with contextlib.suppress(OSError):  # on a full disk it may go another time
                    Path(directory, "stop").touch()
            workers.update(multiprocessing.active_children())
            if any(process.exitcode for process in workers):  # the executor in xmp.spawn may miss the end of a process that
                for process in workers:  # it started late (it waits for those it knew when it began to), but not of all
                    process.kill()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it is over, there is nothing left to stop
        try:
            spawned.result()
        except BrokenProcessPool:
            codes = [int(path.name) for path in Path(directory).glob("failed/*")]
            sys.exit(codes[0] if codes else "a worker was killed, perhaps for memory")
