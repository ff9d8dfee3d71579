"""How well a model predicts the held-out documents, in bits per byte, beside what xz makes of the same text.

    python tools/bits_per_byte.py --checkpoint out/demo [--data data/demo]

Cross-entropy in nats per token can't be compared between vocabularies; the bits that a text costs per byte of UTF-8 can,
and also with a compressor. Every token of the validation shards is predicted once, from at most a context of those before
it. xz -9e gets the text of the same documents in one piece.
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

from checkpoint import find_checkpoint, load_model, read_state
from data import TOKEN, find_shards, load_tokenizer
from process import Progress, UserError, run_command


@torch.inference_mode()
def total_bits(model, ids):
    """Bits that the model needs for ids[1:], predicted window after window."""
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
    parser = argparse.ArgumentParser(description="Bits per byte on the validation documents, a model's and xz's.")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint directory or a run's")
    parser.add_argument("--data", help="directory of the shards (default: the one the run was trained on)")
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.checkpoint)
    state = read_state(checkpoint)
    if not state["tokenizer"]:
        raise UserError(f"{checkpoint} has no tokenizer, so its tokens have no text")
    data_dir = arguments.data or state["config"].get("data_dir")
    if not data_dir:  # an imported model
        raise UserError(f"{checkpoint} does not say what data it was trained on; name a directory of shards with --data")
    shards = find_shards(data_dir, state["config"].get("val_glob", "val_*.bin"))
    ids = np.concatenate([np.fromfile(path, TOKEN) for path in shards])

    texts = documents(ids, load_tokenizer(checkpoint / "tokenizer.model"))
    text = "".join(texts).encode()
    bits = total_bits(load_model(checkpoint, attention="math").eval(), ids)
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    print(f"held-out text: {len(texts)} documents, {len(text):,} bytes, {len(ids):,} tokens")
    print(f"model          {bits / len(text):.3f} bits per byte   ({bits / 8:,.0f} bytes)")
    print(f"xz -9e         {8 * packed / len(text):.3f} bits per byte   ({packed:,} bytes)")


if __name__ == "__main__":
    run_command(main)
