"""Reading documents from text files, JSON files, tables and standard input.

One process reads raw documents from the files. Decoding and parsing them (nanoxla/texts.py) is more
work, and can be shared between processes.
"""
import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from pathlib import Path

from nanoxla.errors import UserError
from nanoxla.progress import note
from nanoxla.texts import MAX_DOCUMENT_BYTES, RawDocument, look_up

COMPRESSIBLE = ".txt", ".md", ".jsonl", ".json", ".csv", ".tsv"
SUFFIXES = (*COMPRESSIBLE, *(suffix + end for suffix in COMPRESSIBLE for end in (".gz", ".zst")),
            ".parquet", ".arrow")
KNOWN = f"{' '.join(COMPRESSIBLE)} (all these also with .gz or .zst) .parquet .arrow"
MENDS = {".pdf": "extract its text first (pdftotext)", ".zip": "unpack it first (unzip)",
         ".gz": "unpack it first (tar xzf, gunzip)", ".tgz": "unpack it first (tar xzf)",
         ".tar": "unpack it first (tar xf)", ".bz2": "unpack it first (bunzip2)",
         ".xz": "unpack it first (unxz)", ".zst": "unpack it first (unzstd)",
         ".7z": "unpack it first (7z x)"}
NOT_DOCUMENTS = {"dataset_info.json", "dataset_dict.json", "state.json"}  # beside HF's .arrow files
STDIN = Path("/dev/stdin")  # --input -
BATCH_BYTES = 1 << 20  # size of the documents sent to a process at a time


def suffix_of(path):
    """The known suffix of a path in lower case, as (".jsonl", ".gz"), or ("", ""). The second part
    is empty without compression."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        return "", ""
    stem, last = os.path.splitext(name)
    return (os.path.splitext(stem)[1], last) if last in (".gz", ".zst") else (last, "")


def find_inputs(inputs, without=()):
    """The files in the list `inputs`. A directory stands for all files below it that have a known
    suffix and are not hidden, sorted; those below the directories `without` are ignored. "-" stands
    for standard input. Raises UserError for a path that does not exist or has an unknown suffix."""
    files, passed_over = [], []
    for name in inputs:
        path = Path(name)
        if name == "-":
            files.append(STDIN)
        elif path.is_dir():
            for file in sorted(files_below(path)):
                if not any(file.resolve().is_relative_to(directory) for directory in without):
                    is_input = suffix_of(file)[0] and file.name not in NOT_DOCUMENTS
                    (files if is_input else passed_over).append(file)
        elif not path.exists():
            raise UserError(f"--input {path} does not exist")
        elif not suffix_of(path)[0]:
            mend = MENDS.get(path.suffix.lower(), "put its text into a .txt or .jsonl file")
            raise UserError(f"--input {path}: expected one of {KNOWN}, or a directory of them; "
                            f"{mend}")
        else:
            files.append(path)
    if passed_over:
        kinds = {file.name if suffix_of(file)[0] else file.suffix or "no suffix"
                 for file in passed_over}
        note(f"note: {len(passed_over):,} other files were passed over: "
             f"{', '.join(sorted(kinds)[:20])}")
    if not files:
        raise UserError(f"no {KNOWN} file in {' '.join(map(str, inputs))}")
    return files


def files_below(directory):
    """Yields the files below a directory, each once, and those below symbolic links to directories.
    Leaves out what is hidden: .ipynb_checkpoints of Jupyter has copies, ._* of macOS are no
    text."""
    pending, seen = [directory], set()
    for start in pending:  # it grows: links come last, so that a file is found under its own name
        for folder, folders, names in os.walk(start):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = [os.path.join(folder, name) for name in sorted(folders)]
            pending += filter(os.path.islink, below)
            yield from (Path(folder, name) for name in names if not name.startswith("."))


def total_size(files):
    """The size of all files together, in bytes. That of a pipe is 0."""
    return sum(file.stat().st_size for file in files)


# --- the formats --------------------------------------------------------------------------------


def read_documents(path, text_key):
    """Yields (RawDocument, position) for each document of a file. position, for the progress bar,
    is the number of bytes of the file that have been read so far; None if that is the total length
    of the contents so far, as in a plain .jsonl file."""
    suffix, compression = suffix_of(path)
    if suffix in (".parquet", ".arrow"):
        yield from read_columns(path, suffix, text_key)
        return
    with open(0, "rb", closefd=False) if path == STDIN else path.open("rb") as stored:
        with decompressed(path, stored, compression) as file:
            if suffix in (".txt", ".md"):
                documents = read_text(path, file)
            elif suffix in (".csv", ".tsv"):
                documents = read_rows(path, file, text_key, "," if suffix == ".csv" else "\t")
            else:
                documents = read_lines(path, file, suffix)
            counted = compression or suffix in (".csv", ".tsv")
            for document in documents:
                yield document, stored.tell() if counted else None


@contextlib.contextmanager
def decompressed(path, stored, compression):
    """The contents of the open file `stored`, as a file. Raises UserError if half is missing."""
    try:
        if compression == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=stored), 1 << 20)
        elif compression == ".zst":
            pyarrow = import_pyarrow(path)
            yield io.BufferedReader(pyarrow.CompressedInputStream(stored, "zstd"), 1 << 20)
        else:
            yield stored
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from None
    except OSError as error:
        if error.errno is not None or compression != ".zst":
            raise
        raise UserError(f"{path} is not a complete zstd file: {error}") from None


def read_text(path, file):
    """The whole file is one document."""
    content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        yield RawDocument(str(path), "too large", b"")
    else:
        yield RawDocument(str(path), "text", content)


def read_lines(path, file, suffix):
    """Each line is a document. A .json file may also be one array of objects. The lines of standard
    input are text, unless the first begins with a brace."""
    number, kind = 0, "json" if suffix == ".jsonl" else None
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if kind is None and (first := line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]):
            if first == b"[" and suffix == ".json":
                yield from read_array(path, line + file.read(MAX_DOCUMENT_BYTES + 1))
                return
            kind = "json" if suffix == ".json" or first == b"{" else "text"
        if len(line) > MAX_DOCUMENT_BYTES:
            yield RawDocument(f"{path}:{number}", "too large", b"")
            while line and not line.endswith(b"\n"):
                line = file.readline(BATCH_BYTES)
        else:
            yield RawDocument(f"{path}:{number}", kind or "text",
                              line.rstrip(b"\r\n") if kind == "text" else line)


def read_array(path, content):
    """Each element of a JSON array is a document. The array is parsed as a whole."""
    if len(content) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{path} is one JSON array and larger than {MAX_DOCUMENT_BYTES >> 20} MB; "
                        f"make lines of it: jq -c '.[]' {path} > {path.stem}.jsonl")
    try:
        elements = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON array: {error}") from None
    for number, element in enumerate(elements, start=1):
        yield RawDocument(f"{path}: element {number}", "json", json.dumps(element).encode())


def text_or_null(place, text):
    """The RawDocument of a cell of a table."""
    if text is None:
        return RawDocument(place, "null", b"")
    return RawDocument(place, "text", text.encode("utf-8", "surrogateescape"))


def read_rows(path, file, text_key, delimiter):
    """Each row of a .csv or .tsv file after the first, which names the columns, is a document."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    # Bytes that are not UTF-8 pass through, for texts.py to find.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter=delimiter)
    try:
        if text_key not in (rows.fieldnames or []):
            raise UserError(f"{path} has no column {text_key!r}; see --text-key. Its columns: "
                            f"{', '.join(rows.fieldnames or [])}")
        for row in rows:
            yield text_or_null(f"{path}:{rows.line_num}", row[text_key])
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num} is not a row of a table: {error}") from None


def import_pyarrow(path):
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} needs pyarrow (pip install "
                        "pyarrow)") from None
    return pyarrow


def read_columns(path, suffix, text_key):
    """read_documents for .parquet and .arrow (a stream, as of Hugging Face datasets, or a file):
    each row is a document."""
    pyarrow = import_pyarrow(path)
    try:
        with path.open("rb") as stored:
            if suffix == ".parquet":
                file = pyarrow.parquet.ParquetFile(path)
                column = find_column(pyarrow, path, file.schema_arrow, text_key)
                tables = file.iter_batches(batch_size=1_000, columns=[column])
            elif stored.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(path)
                tables = map(file.get_batch, range(file.num_record_batches))
            else:
                stored.seek(0)
                tables = file = pyarrow.ipc.open_stream(stored)
            if suffix == ".arrow":
                column = find_column(pyarrow, path, file.schema, text_key)
            size, row = path.stat().st_size, 0
            for table in tables:
                for value in table.column(column).to_pylist():
                    row += 1
                    text = look_up({column: value}, text_key, None)
                    position = (int(size * row / file.metadata.num_rows)
                                if suffix == ".parquet" else stored.tell())
                    yield text_or_null(f"{path}: row {row}", text), position
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk failed; the format may be right
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable {suffix[1:]} file: {reason}") from None


def find_column(pyarrow, path, schema, text_key):
    """The column that holds text_key: that of this name, or the struct that a nested key begins
    with. Raises UserError if it does not hold strings."""
    def nested(kind):
        return ({field.name: nested(field.type) for field in kind}
                if pyarrow.types.is_struct(kind) else kind)
    columns = {field.name: nested(field.type) for field in schema}
    if look_up(columns, text_key, None) not in (pyarrow.string(), pyarrow.large_string()):
        names = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path} has no column {text_key!r} of strings; see --text-key. "
                        f"Its columns: {names}")
    return text_key if text_key in columns else text_key.split(".")[0]


def batches(files, text_key):
    """Yields the documents of all files in lists of about BATCH_BYTES, each as (list, bytes read
    from the files for it)."""
    batch, size, read = [], 0, 0
    for path in files:
        before = 0
        for document, position in read_documents(path, text_key):
            batch.append(document)
            size += len(document.content)
            if position is None:
                position = before + len(document.content)
            read += position - before
            before = position
            if size >= BATCH_BYTES:
                yield batch, read
                batch, size, read = [], 0, 0
    if batch:
        yield batch, read
