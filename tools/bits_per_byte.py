"""How well a model predicts the held-out documents, in bits per byte, compared with xz.

    python tools/bits_per_byte.py --checkpoint out/demo [--data data/demo]

Cross-entropy in nats per token cannot be compared between vocabularies. The bits that a model needs
per byte of UTF-8 text can, and so can those of a compressor. The model predicts every token of the
validation shards once, from the tokens before it in the same window of its context. xz -9e
compresses the text of the same documents in one piece.
"""
import argparse
import lzma
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from model import load_model
from nanoxla import checkpoint
from nanoxla.errors import UserError, run_command
from nanoxla.progress import Progress
from nanoxla.shards import find_shards, open_shards
from nanoxla.tokenizer import load_tokenizer


@torch.inference_mode()
def total_bits(model, ids):
    """The bits that the model needs for ids[1:], predicted window by window."""
    context = model.config.context
    bits = 0.0
    starts = range(0, len(ids) - 1, context)
    with Progress(len(starts), "window", "predicting") as progress:
        for start in starts:
            window = torch.from_numpy(ids[start:start + context + 1].astype(np.int64))
            logits = model(window[None, :-1])[0]
            bits += F.cross_entropy(logits, window[1:], reduction="sum").item() / math.log(2)
            progress.update()
    return bits


def documents(ids, processor):
    """The texts between bos and eos."""
    ends = np.flatnonzero(ids == processor.eos_id())
    starts = np.flatnonzero(ids == processor.bos_id())
    return [processor.decode(ids[start + 1:end].tolist()) for start, end in zip(starts, ends)]


def main():
    parser = argparse.ArgumentParser(description="Bits per byte of the validation documents.")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or the run's directory")
    parser.add_argument("--data", help="directory of the shards (default: the run's data_dir)")
    arguments = parser.parse_args()
    path = checkpoint.find_checkpoint(arguments.checkpoint)
    state = checkpoint.read_state(path)
    if not state["tokenizer"]:
        raise UserError(f"{path} has no tokenizer, so its tokens have no text")
    data_dir = arguments.data or state["config"].get("data_dir")
    if not data_dir:  # a model imported by convert_to_hf.py --from-hf
        raise UserError(f"{path} does not name its training data; "
                        "name a directory of shards with --data")
    shards = find_shards(data_dir, state["config"].get("val_glob", "val_*.bin"))
    shard_format = state["config"].get("shard_format", "auto")
    ids = np.concatenate(open_shards(shards, shard_format))

    texts = documents(ids, load_tokenizer(path / "tokenizer.model"))
    text = "".join(texts).encode()
    bits = total_bits(load_model(*checkpoint.load(path), path).eval(), ids)
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    print(f"held-out text: {len(texts)} documents, {len(text):,} bytes, {len(ids):,} tokens")
    print(f"model          {bits / len(text):.3f} bits per byte   ({bits / 8:,.0f} bytes)")
    print(f"xz -9e         {8 * packed / len(text):.3f} bits per byte   ({packed:,} bytes)")


if __name__ == "__main__":
    run_command(main)
