"""Starting processes that end with their parent, or that Ctrl-C does not reach."""
import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def call_in_new_process(function, *arguments, environment=()):
    """The result of function(*arguments), computed in a new process. Its environment variables are
    ours, updated by the dict `environment`."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def exit_with_parent():
    """Called in a spawned process: makes it exit when its parent ends, even by kill -9. Otherwise
    it would keep running unnoticed, and hold the TPU."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signals_blocked(*signals):
    """Threads and processes started inside this block never receive these signals.

    Ctrl-C in a terminal sends SIGINT to every process of the foreground group. A new thread or
    process inherits the set of blocked signals, so blocking them here is enough."""
    # At the first spawn Python starts its resource tracker, and that unblocks these signals. So
    # start the tracker first.
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
