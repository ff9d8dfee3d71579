"""`data.py inspect`: reports on any shards, prepared or downloaded."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoxla.errors import UserError
from nanoxla.shards import (
    MAX_VOCAB_SIZE,
    TOKEN_DTYPE,
    find_shards,
    first_out_of_vocabulary,
    read_meta,
    scan,
)
from nanoxla.tokenizer import load_tokenizer

LLAMA_EOS = 2  # assumed if no tokenizer is known


@dataclass
class Report:
    """The counts of one shard, collected piece by piece."""
    tokens: int = 0
    smallest: int = MAX_VOCAB_SIZE
    largest: int = 0
    documents: int = 0  # the number of eos ids
    odd_zeros: int = 0  # zeros at odd positions, where 32-bit ids would have their upper halves
    out_of_vocabulary: UserError | None = None  # for the first id that is too large

    def add(self, path, offset, ids, eos, vocab_size):
        self.tokens += len(ids)
        self.smallest = min(self.smallest, int(ids.min()))
        self.largest = max(self.largest, int(ids.max()))
        self.documents += int(np.count_nonzero(ids == eos))
        self.odd_zeros += int(np.count_nonzero(ids[1::2] == 0))
        if vocab_size and self.out_of_vocabulary is None:
            self.out_of_vocabulary = first_out_of_vocabulary(path, offset, ids, vocab_size)

    def warnings(self, path):
        """Yields a warning for each sign that the shard does not hold the ids that it should."""
        if self.out_of_vocabulary:
            yield self.out_of_vocabulary
        if self.tokens > 2 and self.odd_zeros == self.tokens // 2:
            yield f"{path}: every second id is 0; these look like 32-bit ids"
        if warning := header_warning(path):
            yield f"{path}: {warning}"


def header_warning(path):
    """A warning if the file begins with a header that we know, else None."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(b"\x93NUM"):
        return "this is a .npy file; shards have no header (write the array with .tofile)"
    if head == (20240520).to_bytes(4, "little"):
        return "this shard has the 1,024-byte header of llm.c; cut it off with tail -c +1025"
    return None


def inspect(where, vocab_size=None, context=1_024, tokenizer=None):
    """Reports on the shards of a directory, a file or a glob: their tokens, ids, documents and
    windows. Warns about ids outside the vocabulary, and about files that do not hold uint16 ids."""
    if context < 1:
        raise UserError(f"--context {context}: expected at least 1")
    where = Path(where)
    paths = (find_shards(where, "*.bin") if where.is_dir()
             else find_shards(where.parent, where.name))
    meta = read_meta(paths[0].parent)
    vocab_size = vocab_size or meta.get("vocab_size")
    if tokenizer is None and meta.get("tokenizer"):
        tokenizer = paths[0].parent / meta["tokenizer"]
    processor = load_tokenizer(tokenizer) if tokenizer else None
    eos = processor.eos_id() if processor else LLAMA_EOS

    reports = {path: Report() for path in paths}
    for path, offset, ids in scan(paths, "reading"):
        reports[path].add(path, offset, ids, eos, vocab_size)

    width = max(len(path.name) for path in paths)
    print(f"{'shard':{width}}  {'tokens':>15}  {'ids':>13}  {'documents':>11}  {'windows':>11}")
    for path, report in reports.items():
        ids = f"{report.smallest} - {report.largest}"
        print(f"{path.name:{width}}  {report.tokens:15,}  {ids:>13}  {report.documents:11,}  "
              f"{report.tokens // context:11,}")
    total = sum(report.tokens for report in reports.values())
    print(f"{len(paths)} shards, {total:,} tokens, {total // context:,} windows of {context:,}; "
          f"documents are counted by their last token, eos = {eos}")
    for path, report in reports.items():
        for warning in report.warnings(path):
            print(f"WARNING: {warning}")
    if processor:
        start = np.fromfile(paths[0], TOKEN_DTYPE, 48).astype(int)
        known = [int(token) for token in start if token < processor.vocab_size()]
        print(f"{paths[0].name} begins: {processor.decode(known)!r}")
