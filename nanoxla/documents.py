"""Reading documents from .txt files (one document each), .jsonl, .jsonl.gz and .parquet files.

One process reads raw documents from the files. Decoding and parsing them (document_text) is more
work, and can be shared between processes.
"""
import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import NamedTuple

from nanoxla.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
MAX_DOCUMENT_BYTES = 256 << 20  # a document is encoded in one piece
BATCH_BYTES = 1 << 20  # size of the documents sent to a process at a time


class RawDocument(NamedTuple):
    """A document before it is decoded and parsed."""
    place: str  # for error messages: the file, with the line or row
    kind: str  # "text" or "json"
    content: bytes


def find_inputs(inputs):
    """The files in the list `inputs`. A directory stands for all files below it that have a known
    suffix, sorted. Raises UserError for a path that does not exist or has an unknown suffix."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        elif not path.exists():
            raise UserError(f"--input {path} does not exist")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"--input {path}: expected one of {' '.join(SUFFIXES)} "
                            "or a directory of them")
        else:
            files.append(path)
    if not files:
        raise UserError(f"no {' '.join(SUFFIXES)} file in {' '.join(map(str, inputs))}")
    return files


def total_size(files):
    """The size of all files together, in bytes."""
    return sum(file.stat().st_size for file in files)


def read_documents(path, text_key):
    """Yields (RawDocument, position) for each document of a file. position, for the progress bar,
    is the number of bytes of the file that have been read so far; None if that is the total length
    of the contents so far, as in a plain .jsonl file."""
    if path.suffix == ".txt":
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise UserError(f"{path} is {size / 2**20:,.0f} MB; a .txt file is one document and "
                            f"may have {MAX_DOCUMENT_BYTES >> 20} MB. Split it, or put one "
                            "document per line into a .jsonl file")
        content = path.read_bytes()
        yield RawDocument(str(path), "text", content), len(content)
    elif path.suffix == ".parquet":
        yield from read_parquet(path, text_key)
    else:
        yield from read_lines(path)


def read_lines(path):
    """read_documents for .jsonl and .jsonl.gz: each line is a document."""
    with path.open("rb") as file:
        lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            for number, line in enumerate(lines, start=1):
                position = file.tell() if path.suffix == ".gz" else None
                yield RawDocument(f"{path}:{number}", "json", line), position
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is not a complete gzip file: {error}") from None


def read_parquet(path, text_key):
    """read_documents for .parquet: each row is a document. A null is an empty one."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = {field.name: field.type for field in file.schema_arrow}
        if columns.get(text_key) not in (pyarrow.string(), pyarrow.large_string()):
            names = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise UserError(f"{path} has no column {text_key!r} of strings; see --text-key. "
                            f"Its columns: {names}")
        size, row = path.stat().st_size, 0
        for batch in file.iter_batches(batch_size=1_000, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                document = RawDocument(f"{path}: row {row}", "text", (text or "").encode())
                yield document, int(size * row / file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk failed; the format may be right
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable parquet file: {reason}") from None


def batches(files, text_key, progress):
    """Yields the documents of all files in lists of about BATCH_BYTES. Advances `progress` by the
    bytes read from the files."""
    batch, size = [], 0
    for path in files:
        before = 0
        for document, position in read_documents(path, text_key):
            batch.append(document)
            size += len(document.content)
            if position is None:
                position = before + len(document.content)
            progress.update(position - before)
            before = position
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def document_text(document, text_key):
    """The text of a RawDocument: all of it, or the value of text_key in its JSON object. Raises
    UserError if it is not UTF-8, not JSON, or has no such text."""
    place, kind, content = document
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
                        f"{error.start:,}") from None
    if kind == "text" or not text.strip():
        return text
    try:
        value = json.loads(text)[text_key]
        value.encode()  # JSON allows half of a surrogate pair, which is not text
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a JSON object with valid text: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{place}: expected a JSON object whose {text_key!r} is a string; "
                        "see --text-key") from None


def hash_fraction(text, salt):
    """A number in [0, 1) that depends only on the text and the salt, so that equal documents go to
    the same split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**64


def in_validation_split(text, val_fraction):
    return hash_fraction(text, b"split") < val_fraction
