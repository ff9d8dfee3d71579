"""The format of a shard, recognised by its first bytes and by a sample of its ids:

- .npy: by the first 6 bytes.
- llm.c, modded-nanogpt: by a header of 256 int32: magic number, version, number of tokens, zeros.
- int64 or uint32 ids without a header: by rule 1.
- Big-endian ids without a header: by rules 1 and 2. They are refused.
- uint16 ids without a header, as `data.py prepare` and nanoGPT write them: everything else.

The sample is 4 KB at each quarter of the file. The rules ask whether it can be a file of uint16:

1. No: its integers of 64 or 32 bits, in either byte order, are all below 2^18, and at least 16 of
   their lower halves (the lower 16 bits) are above 3, at least 4 of them different. So the other
   bits are 0, or at most 3 in a vocabulary as large as Llama 3's. In a file of uint16 they would be
   tokens like the others.
2. No, it is big-endian: its ids have more different upper bytes, by 32 at least, than the largest
   lower byte. In text, the lower byte takes all values up to 255, and the upper byte those up to
   vocab_size / 256. (From vocab_size = 57,600 on, the two look alike, and this rule finds nothing.)
"""
import json
import os
import shlex
from typing import NamedTuple

import numpy as np

from nanoxla.errors import UserError

SHARD_FORMATS = "auto", "uint16", "uint32", "int64"  # all but auto: without a header
LLM_C = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, dtype
LLM_C_HEADER = 1_024  # bytes
NPY_DTYPES = [np.dtype(name) for name in ("uint16", "uint32", "int32", "int64")]
PAGE = 4_096  # bytes


class ShardFormat(NamedTuple):
    """How a shard stores its ids, and where the first one is."""
    header: str  # its name; "" if there is none
    start: int  # bytes before the first id
    dtype: np.dtype
    tokens: int

    def __str__(self):
        if self.header:
            return f"{self.header}, {self.dtype.name} after a {self.start:,}-byte header"
        return f"{self.dtype.name} without a header"


def recognise(path, shard_format):
    """The ShardFormat of a file. shard_format: one of SHARD_FORMATS. Raises UserError for a file
    that cannot be a shard."""
    size = path.stat().st_size
    sample = read_sample(path, size) if shard_format == "auto" else b""
    magic, version, tokens = np.frombuffer(sample[:12].ljust(12, b"\0"), "<i4").tolist()
    if sample.startswith(b"\x93NUMPY"):
        found = read_npy_header(path)
    elif magic in LLM_C:
        found = check_llm_c_header(path, size, magic, version, tokens)
    else:
        dtype = guess_dtype(sample) if shard_format == "auto" else np.dtype(shard_format)
        found = check_headerless(path, size, dtype)
    if found.tokens == 0:
        raise UserError(f"{path} is empty")
    return found


def read_npy_header(path):
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise UserError(f"{path} is a .npy file that can't be read: {error}") from None
    if array.ndim != 1 or array.dtype.newbyteorder("=") not in NPY_DTYPES:
        ids = 'numpy.load(old).ravel().astype("uint32")'
        raise UserError(f"{path} is a .npy file of {array.dtype}, shape {array.shape}; expected "
                        "one dimension of uint16, uint32, int32 or int64. To rewrite it: "
                        + mending_command(path, f"numpy.save(new, {ids})"))
    return ShardFormat(".npy", array.offset, array.dtype, len(array))


def check_llm_c_header(path, size, magic, version, tokens):
    expected, dtype = LLM_C[magic]
    needed = LLM_C_HEADER + tokens * dtype.itemsize
    if (version, size) != (expected, needed):
        raise UserError(f"{path} has the header of llm.c: version {version}, {tokens:,} tokens of "
                        f"{dtype.name}; expected version {expected} and {needed:,} bytes, found "
                        f"{size:,}. Download or write it again")
    return ShardFormat("llm.c", LLM_C_HEADER, dtype, tokens)


def check_headerless(path, size, dtype):
    if dtype.byteorder == ">":
        ids = f'numpy.fromfile(old, "{dtype.str}").byteswap()'
        raise UserError(f"{path} looks like big-endian {dtype.name}; expected little-endian ids. "
                        "If it is right as it is, set shard_format to uint16; to rewrite it: "
                        + mending_command(path, f"{ids}.tofile(new)"))
    if size % dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, not a multiple of {dtype.itemsize}: it does "
                        f"not hold {dtype.name} token ids, or it was cut short")
    return ShardFormat("", 0, dtype, size // dtype.itemsize)


def read_sample(path, size):
    """The page at each quarter of a file, as bytes."""
    with path.open("rb") as file:
        pages = []
        for offset in sorted({size * i // 4 // PAGE * PAGE for i in range(4)}):
            file.seek(offset)
            pages.append(file.read(PAGE))
    return b"".join(pages)


def guess_dtype(sample):
    """The dtype of ids without a header, by the two rules above."""
    for dtype in map(np.dtype, ("<i8", "<u4", ">i8", ">u4")):
        ids = np.frombuffer(sample, dtype, len(sample) // dtype.itemsize)
        lower = (ids & 0xFFFF)[ids & 0xFFFF > 3]
        if not (ids >> 18).any() and len(lower) >= 16 and len(np.unique(lower)) >= 4:
            return dtype
    ids = np.frombuffer(sample, "<u2", len(sample) // 2)
    big_endian = len(np.unique(ids >> 8)) >= (ids & 0xFF).max(initial=0) + 32
    return np.dtype(">u2" if big_endian else "<u2")


def mending_command(path, write):
    """A command for a shell that rewrites a file: in place, or, if its directory is read-only as
    /kaggle/input is, in the current one. write: the Python that reads `old` and writes `new`."""
    in_place = os.access(path.parent, os.W_OK)
    output = str(path) if in_place else path.name
    code = (f"import numpy, os; old = {json.dumps(str(path))}; new = {json.dumps(output + '.npy')};"
            f" {write}; os.replace(new, {json.dumps(output)})")
    note = "" if in_place else " (it writes the copy here, because that directory is read-only)"
    return f"python -c {shlex.quote(code)}{note}"
