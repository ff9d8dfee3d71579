"""Files that are written whole or not at all, and checksums.

Everything is written under a temporary name, flushed to the disk, and only then renamed. A rename
is atomic: whoever looks finds the old file or the complete new one. The flush has to come first: a
disk may store the new name before the content, and after a power failure the name would stand for a
file that is empty or half written.
"""
import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from pathlib import Path

from nanoxla.errors import UserError


def fsync(path):
    """Waits until the disk has stored the bytes of a file, or the list of names in a directory.

    Both are needed: flushing a file does not make its name durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path, content):
    """Writes bytes to `path` atomically and durably. Returns the path."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, make room again
        raise
    fsync(path.parent)
    return path


def is_used(path):
    """Whether `path` exists and is not an empty directory."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def check_unused(directory, option):
    """Raises UserError unless write_directory can create `directory`, which the user gave as
    `option`. Called before the work that would otherwise be lost."""
    if is_used(directory):
        raise UserError(f"{option} {directory} exists and is not an empty directory; "
                        "name a new one, or delete it first")


def try_lock(file):
    """Locks an open file or directory (or its descriptor) until it is closed or the process ends.
    Returns whether it did; False if another process has locked it. Raises OSError on a disk without
    locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def empty(directory):
    """Deletes everything in a directory."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def partial_of(directory):
    """DIRECTORY.partial, where write_directory writes until all is there."""
    final = Path(directory).resolve()  # "." has no name, and a symbolic link cannot be replaced
    return final.with_name(f"{final.name}.partial")


@contextlib.contextmanager
def write_directory(directory, progress=None):
    """Creates `directory` atomically: yields DIRECTORY.partial to write files into, and renames it
    when all of them are on the disk. `directory` may exist if it is empty. Raises UserError if
    another process is writing it.

    An exception deletes DIRECTORY.partial, unless it contains a file named `progress`. What a
    killed process left there is deleted, with the same exception: then this call has to go on from
    it. That file is deleted in the end."""
    final, partial = Path(directory).resolve(), partial_of(directory)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks know no locks
            if not try_lock(lock):
                raise UserError(f"another process is writing {partial}; wait for its end, or stop "
                                "it")
        if not (progress and (partial / progress).exists()):
            empty(partial)
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                fsync(path)
            if is_used(final):  # or the rename would fail, after `progress` is gone
                raise UserError(f"{final} is no longer empty. Delete what is there, and run the "
                                "same command again")
            if progress:
                (partial / progress).unlink(missing_ok=True)
            partial.rename(final)
            fsync(final.parent)
        except BaseException:
            if progress and (partial / progress).exists():
                print(f"{partial} keeps what is done: the same command goes on from there",
                      file=sys.stderr)
            else:
                shutil.rmtree(partial, ignore_errors=True)  # on a full disk, make room again
            raise
    finally:
        os.close(lock)


def sha256(path):
    """The SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        try:
            while block := file.read(1 << 20):
                digest.update(block)
        except OSError as error:  # of reading; unlike that of opening, it does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from None
    return digest.hexdigest()
