"""SentencePiece tokenizers: loading one, and training one on the training split."""
import io
import os
from pathlib import Path

import sentencepiece

from nanoxla.documents import batches, total_size
from nanoxla.errors import UserError
from nanoxla.files import write_file
from nanoxla.progress import Progress
from nanoxla.shards import MAX_VOCAB_SIZE
from nanoxla.texts import Skipped, hash_fraction, in_validation_split, read_texts

SAMPLE_BYTES = 100 << 20  # train on about this much of the files (compressed, if they are)


def load_tokenizer(path, vocab_size=None):
    """The SentencePieceProcessor of a model file. Raises UserError if it does not suit shards (more
    than 65,536 tokens, no bos or no eos), or does not fit a model with vocab_size ids. (vocab_size
    may exceed the size of the tokenizer by up to 127, for padding to a multiple of 128.)"""
    if not Path(path).is_file():
        raise UserError(f"there is no tokenizer {path}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(f"{path} is not a SentencePiece model") from None
    size = processor.vocab_size()
    if size > MAX_VOCAB_SIZE:
        raise UserError(f"{path} has {size:,} tokens; uint16 shards can hold {MAX_VOCAB_SIZE:,}")
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise UserError(f"{path} has no bos or no eos token; documents are stored as "
                        "bos + ids + eos")
    if vocab_size is not None and not 0 <= vocab_size - size < 128:
        raise UserError(f"{path} has {size:,} tokens and vocab_size is {vocab_size:,}; expected "
                        "the same number, or less than 128 more for padding")
    return processor


def train_tokenizer(path, files, vocab_size, val_fraction, text_key, skipped=None):
    """Trains a SentencePiece BPE model on a sample of the training split, and writes it to `path`.

    The options are Llama's: no normalisation, byte fallback for unknown characters, numbers split
    into digits. So decode(encode(text)) == text, except for U+2581, SentencePiece's sign for a
    space. skipped: a Skipped, which decides about documents that cannot be read; by default any
    ends it.
    """
    skipped = skipped or Skipped(max_bad=0, strict=True)
    share = SAMPLE_BYTES / max(1, total_size(files))
    raised = []

    def lines():
        try:
            with Progress(total_size(files), "B", "reading for the tokenizer") as progress:
                for batch, read in batches(files, text_key):
                    progress.update(read)
                    texts, faults = read_texts(batch, text_key)
                    skipped.add(len(texts), faults)
                    for text in texts:
                        if (not in_validation_split(text, val_fraction)
                                and hash_fraction(text, b"tokenizer") < share):
                            yield from filter(None, text.splitlines())
            skipped.check()
        except BaseException as error:  # SentencePiece turns any exception into a RuntimeError
            raised.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.99995,
            max_sentence_length=1 << 16, num_threads=os.cpu_count(), minloglevel=2)
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        reason = str(error).splitlines()[-1]
        raise UserError(f"a vocabulary of {vocab_size:,} could not be trained on this text: "
                        f"{reason}") from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(Path(path), model.getvalue())
