"""Encoding documents in a pool of processes. (Threads would not help: most of the work is
Python's.)"""
import collections
import itertools
import multiprocessing
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from nanoxla.documents import batches
from nanoxla.errors import UserError
from nanoxla.processes import exit_with_parent, signals_blocked
from nanoxla.shards import TOKEN_DTYPE
from nanoxla.texts import in_validation_split, read_texts
from nanoxla.tokenizer import load_tokenizer

SPLITS = "train", "val"

# --- word by word -------------------------------------------------------------------------------

SPACE = "▁"  # SentencePiece's sign for a space
WORD = re.compile(f"[ {SPACE}]([ {SPACE}]*[^ {SPACE}]*)")
MAX_WORDS = 1 << 17  # words whose ids a process remembers: about 30 MB
MAX_WORD_LENGTH = 64  # a longer one is hardly ever met again


class Words(dict):
    """{word: its ids as bytes}: encodes a text word by word, and each frequent word once.

    This gives the ids of processor.encode(text), for a processor with independent_words. BPE starts
    with single characters, and joins neighbours whose union is a piece, the best union first. If no
    piece contains a space after another character, nothing is ever joined across the beginning of a
    run of spaces. So what lies between two such places is encoded as if it were alone. A word here
    lacks the first space before it: SentencePiece puts one before each text."""

    def __init__(self, processor):
        self.processor = processor

    def encode(self, text):
        """The ids of a text that is not empty, as bytes."""
        return b"".join(map(self.__getitem__, WORD.findall(" " + text)))

    def __missing__(self, word):
        # An empty word is the end of a text after a space. SentencePiece encodes "" as nothing.
        ids = self.processor.encode(word) if word else [self.processor.piece_to_id(SPACE)]
        ids = np.array(ids, TOKEN_DTYPE).tobytes()
        if len(word) <= MAX_WORD_LENGTH:
            if len(self) == MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def independent_words(processor):
    """Whether `processor` encodes each word of a text (see Words) as if it were alone."""
    model = fields(processor.serialized_model_proto())
    trainer, normalizer = fields(model.get(2, b"")), fields(model.get(3, b""))
    ids = range(processor.vocab_size())
    space = processor.piece_to_id(SPACE)
    return (trainer.get(3) == 2  # BPE
            and not trainer.get(24, 0)  # treat_whitespace_as_suffix
            and not normalizer.get(2)  # precompiled_charsmap: what is replaced before encoding
            and normalizer.get(3, 1)  # add_dummy_prefix
            and not normalizer.get(4, 1)  # remove_extra_whitespaces
            and normalizer.get(5, 1)  # escape_whitespaces
            and not any(map(processor.is_unused, ids))  # taken apart as any other word did
            and not processor.is_unknown(space)  # neighbours that are unknown become one id
            and not any(re.search(f"[^ {SPACE}][ {SPACE}]", processor.id_to_piece(i)) for i in ids))


def fields(message):
    """{number: value} of a protobuf message: an int, or bytes. Of a repeated field the last."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            found[tag >> 3] = varint()
        else:
            size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
            found[tag >> 3] = message[at:at + size]
            at += size
    return found


# --- the pool -----------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """The documents of a batch that belong to one split, encoded."""
    ids: np.ndarray  # bos + ids + eos of each document, joined
    lengths: np.ndarray  # of each document, in tokens
    bytes: int  # length of their text


class Encoder:
    """Encodes batches of documents. Each process of the pool has one, in Encoder.current."""

    def __init__(self, tokenizer, val_fraction, text_key):
        self.processor = load_tokenizer(tokenizer)
        self.words = Words(self.processor) if independent_words(self.processor) else None
        self.val_fraction, self.text_key = val_fraction, text_key

    def __call__(self, batch):
        """Encodes a list of RawDocuments. Returns ({split: Encoded}, {fault: [count, message]})."""
        splits = {split: [] for split in SPLITS}
        texts, faults = read_texts(batch, self.text_key)
        for text in texts:
            in_val = in_validation_split(text, self.val_fraction)
            splits["val" if in_val else "train"].append(text)
        return {split: self.encode_texts(texts) for split, texts in splits.items()}, faults

    def encode_texts(self, texts):
        bos, eos = (np.array([i], TOKEN_DTYPE).tobytes()
                    for i in (self.processor.bos_id(), self.processor.eos_id()))
        documents = [bos + self.encode_text(text) + eos for text in texts]
        lengths = np.array(list(map(len, documents)), np.int64) // TOKEN_DTYPE.itemsize
        return Encoded(np.frombuffer(b"".join(documents), TOKEN_DTYPE), lengths,
                       sum(len(text.encode()) for text in texts))

    def encode_text(self, text):
        """The ids of a text, as bytes."""
        if self.words is not None:
            return self.words.encode(text)
        return np.array(self.processor.encode(text), TOKEN_DTYPE).tobytes()

    @classmethod
    def start(cls, *arguments):
        """Called once in each process of the pool, when it starts."""
        exit_with_parent()
        cls.current = cls(*arguments)

    @classmethod
    def encode(cls, batch):
        return cls.current(batch)


def encode_files(files, tokenizer, val_fraction, text_key, processes, first_batch=0):
    """Yields ({split: Encoded}, faults, bytes read from the files) of each batch of documents, from
    batch `first_batch` on.

    They come in the order of the documents, so the shards do not depend on the number of processes.
    At most three batches per process are in progress, to bound memory."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), Encoder.start,
                               (tokenizer, val_fraction, text_key))
    in_progress = collections.deque()

    def oldest():
        future, read = in_progress.popleft()
        return *future.result(), read

    try:
        for batch, read in itertools.islice(batches(files, text_key), first_batch, None):
            if len(in_progress) == 3 * processes:
                yield oldest()
            with signals_blocked(signal.SIGINT):  # the new processes ignore Ctrl-C
                in_progress.append((pool.submit(Encoder.encode, batch), read))
        while in_progress:
            yield oldest()
    except BrokenProcessPool:
        raise UserError("a process that encoded text was killed, perhaps for lack of memory; "
                        "try fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)
