"""Continue a prompt with a trained model.

    python sample.py --prompt "The state of the Union is"            # the newest run under out/
    python sample.py --checkpoint out/demo --prompt "..." --num-samples 3 --temperature 0.8 --top-k 50

Runs on the CPU in plain PyTorch. The text appears as it is generated.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from checkpoint import find_checkpoint, list_checkpoints, load_model, read_state
from data import load_tokenizer
from model import KVCache
from process import UserError, run_command


def pick(logits, temperature, top_k, top_p, generator):
    """Draws a token id from logits [V]: the likeliest at temperature 0; otherwise at random among the top_k likeliest
    (0: all) and, of those, the fewest whose probabilities reach top_p (https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / temperature).sort(descending=True)
    if top_k:
        logits, ids = logits[:top_k], ids[:top_k]
    probabilities = logits.softmax(0)
    before = probabilities.cumsum(0) - probabilities  # probability of all likelier ones; 0 for the likeliest
    probabilities[before >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(model, ids, max_new_tokens, eos, temperature=0.8, top_k=0, top_p=1.0, seed=0):
    """Yields the ids that follow `ids`, until eos, max_new_tokens or the end of the model's context."""
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config, batch_size=1, device="cpu")
    room = model.config.context - len(ids)
    for _ in range(min(max_new_tokens, room)):
        logits = model(torch.tensor([ids]), cache=cache)[0, -1]
        token = pick(logits, temperature, top_k, top_p, generator)
        if token == eos:
            return
        yield token
        ids = [token]  # the cache knows the rest


def stream(processor, ids, tokens):
    """Yields the text that each of `tokens` adds to `ids`, and what is left at the end. Decodes all of it each time, because
    a token alone does not tell whether it starts with a space, and holds back a character whose bytes are not all there."""
    ids = list(ids)
    shown = processor.decode(ids)
    for token in tokens:
        ids.append(token)
        text = processor.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            text = shown
        yield text[len(shown):]
        shown = text
    yield processor.decode(ids)[len(shown):]


def newest_run():
    runs = [path for path in Path("out").glob("*") if list_checkpoints(path)]
    if not runs:
        raise UserError("there is no run with a checkpoint under out/; train one, or name one with --checkpoint")
    return max(runs, key=lambda run: list_checkpoints(run)[-1].stat().st_mtime)


def main():
    parser = argparse.ArgumentParser(description="Continue a prompt with a trained model.")
    parser.add_argument("--prompt", required=True, help="text to continue; may be empty")
    parser.add_argument("--checkpoint", help="a checkpoint directory or a run's (default: the newest run under out/)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many likeliest tokens; 0: all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that reach this sum (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations (%(default)s)")
    arguments = parser.parse_args()
    if arguments.temperature < 0 or arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        raise UserError("expected --temperature and --top-k of at least 0 and --top-p above 0, at most 1")

    checkpoint = find_checkpoint(arguments.checkpoint or newest_run())
    if not read_state(checkpoint)["tokenizer"]:
        raise UserError(f"{checkpoint} has no tokenizer; its run named none (config key tokenizer)")
    processor = load_tokenizer(checkpoint / "tokenizer.model")
    model = load_model(checkpoint, attention="math").eval()
    ids = [processor.bos_id()] + processor.encode(arguments.prompt)
    if len(ids) >= model.config.context:
        raise UserError(f"the prompt has {len(ids)} tokens; the model reads {model.config.context} and needs room for one more")
    for i in range(arguments.num_samples):
        started = time.perf_counter()
        tokens = generate(model, ids, arguments.max_new_tokens, processor.eos_id(), arguments.temperature, arguments.top_k,
                          arguments.top_p, arguments.seed + i)
        print(arguments.prompt, end="", flush=True)
        for count, text in enumerate(stream(processor, ids, tokens)):
            print(text, end="", flush=True)
        print("\n")
        if sys.stdout.isatty():
            seconds = time.perf_counter() - started
            print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s]\n", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
