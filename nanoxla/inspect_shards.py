"""`data.py inspect`: reports on any shards, prepared or downloaded."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoxla.errors import UserError
from nanoxla.shards import (
    find_shards,
    first_out_of_vocabulary,
    open_shards,
    other_formats,
    read_meta,
    scan,
)
from nanoxla.tokenizer import load_tokenizer

LLAMA_EOS = 2  # assumed if no tokenizer is known


@dataclass
class Report:
    """The counts of one shard, collected piece by piece."""
    tokens: int = 0
    smallest: int = math.inf
    largest: int = 0
    documents: int = 0  # the number of eos ids
    out_of_vocabulary: UserError | None = None  # for the first id that is too large

    def add(self, path, found, offset, ids, eos, vocab_size):
        self.tokens += len(ids)
        self.smallest = min(self.smallest, int(ids.min()))
        self.largest = max(self.largest, int(ids.max()))
        self.documents += int(np.count_nonzero(ids == eos))
        if vocab_size and self.out_of_vocabulary is None:
            self.out_of_vocabulary = first_out_of_vocabulary(path, found, offset, ids,
                                                             vocab_size)


def inspect(where, vocab_size=None, context=1_024, tokenizer=None, shard_format="auto"):
    """Reports on the shards of a directory, a file or a glob: their tokens, ids, documents, windows
    and format. Warns about ids outside the vocabulary."""
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
    for path, found, offset, ids in scan(paths, "reading", shard_format):
        reports[path].add(path, found, offset, ids, eos, vocab_size)

    width = max(len(path.name) for path in paths)
    print(f"{'shard':{width}}  {'tokens':>15}  {'ids':>13}  {'documents':>11}  {'windows':>11}")
    for path, report in reports.items():
        ids = f"{report.smallest} - {report.largest}"
        print(f"{path.name:{width}}  {report.tokens:15,}  {ids:>13}  {report.documents:11,}  "
              f"{report.tokens // context:11,}")
    total = sum(report.tokens for report in reports.values())
    print(f"{len(paths)} shards, {total:,} tokens, {total // context:,} windows of {context:,}; "
          f"documents are counted by their last token, eos = {eos}")
    for words, number in other_formats(paths, shard_format).items():
        print(f"format: {words}" + f" ({number:,} of them)" * (number < len(paths)))
    for report in reports.values():
        if report.out_of_vocabulary:
            print(f"WARNING: {report.out_of_vocabulary}")
    if processor:
        start = open_shards(paths[:1], shard_format)[0][:48]
        known = [int(token) for token in start if 0 <= token < processor.vocab_size()]
        print(f"{paths[0].name} begins: {processor.decode(known)!r}")
