"""Files that are written whole or not at all, and checksums.

Everything is written under a temporary name, flushed to the disk, and only then renamed. A rename
is atomic: whoever looks finds the old file or the complete new one. The flush has to come first: a
disk may store the new name before the content, and after a power failure the name would stand for a
file that is empty or half written.
"""
import contextlib
import hashlib
import os
import shutil
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
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)
    return path


def check_unused(directory, option):
    """Raises UserError unless write_directory can create `directory`, which the user gave as
    `option`. Called before the work that would otherwise be lost."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{option} {directory} exists and is not an empty directory; "
                        "name a new one, or delete it first")


@contextlib.contextmanager
def write_directory(directory):
    """Creates `directory` atomically: yields DIRECTORY.partial to write files into, and renames it
    when all of them are on the disk. An exception deletes DIRECTORY.partial. `directory` may exist
    if it is empty."""
    final = Path(directory).resolve()  # "." has no name, and a symbolic link cannot be replaced
    partial = final.with_name(f"{final.name}.partial")
    if partial.exists():  # left by a process that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        partial.rename(final)
        fsync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk, make room again
        raise


def sha256(path):
    """The SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
