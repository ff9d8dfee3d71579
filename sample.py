"""Continue a prompt with a trained model.

    python sample.py --prompt "The state of the Union is"             # the newest run under out/
    python sample.py --checkpoint out/demo --prompt "..." --num-samples 3 --temperature 0.8 --top-k 50
    python sample.py < tools/prompts.txt                              # a prompt per line; a terminal is asked for them

--checkpoint takes a run's directory (its newest checkpoint), a checkpoint, or a Hugging Face directory. The text appears as
it is generated, and ends with the document (eos), after --max-new-tokens, or when the model's context is full, which is
said. An empty prompt begins a document; one that leaves no room in the context is an error. In prompts read line by line,
\\n stands for a line break. On a machine with a TPU it runs there, on one core; else on the CPU in plain PyTorch.
"""
import argparse
import contextlib
import importlib.util
import math
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # has torch put weights into memory pages of 2 MB: 2 % faster

import torch

from checkpoint import find_checkpoint, load_model, read_state
from convert_to_hf import is_hf, load_hf
from data import load_tokenizer
from model import KVCache
from process import UserError, run_command

CHUNK = 128  # tokens of a prompt that an XLA device reads at once


def trace(function, inputs):
    """The operations that function(*inputs) runs, to be run again without Python. It is called once: real inputs, please."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that shapes become constants: they are
        return torch.jit.trace(function, inputs, check_trace=False)


class Decoder:
    """Reads tokens, and returns the logits of the next one.

    XLA compiles a graph for each shape that it meets, which takes seconds. So on an XLA device there are two shapes, a chunk
    of a prompt and a single token, whatever the prompt and however long the text: a chunk is padded, the cache is as long as
    the context, and where to write and which logits to return are tensors, not numbers. A CPU computes at once what it is
    told: there prompts need no padding, and the cache is about as long as needed, because attention reads all of it. What
    costs time there, next to reading the weights, is Python, so a single token's operations are traced once.
    """

    def __init__(self, model, device="cpu"):
        self.model, self.on_xla, self.cache = model.eval().requires_grad_(False), device == "xla", None
        if self.on_xla:
            import torch_xla
            self.sync = torch_xla.sync
            self.chunk = math.gcd(CHUNK, model.config.context)  # so that the last chunk, padded, ends within the context
        else:
            self.sync = lambda: None
            self.chunk = model.config.context
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear):  # the same, but stored column by column: 5 % faster for a single token
                    layer.weight.data = layer.weight.data.t().contiguous().t()
        self.device = torch.device(device)
        model.to(self.device)

    def reserve(self, length):
        """Makes room for `length` tokens, at most the model's context. If there was less, what was read is forgotten."""
        if self.cache is None or self.cache.length < length:
            context = self.model.config.context
            rounded = context if self.on_xla else min(context, 1 << (length - 1).bit_length())
            self.cache, self.traced = KVCache(self.model.config, 1, self.device, rounded), None
            self.sync()  # so that the cache is a buffer from the start, and not zeros that a graph makes

    @torch.no_grad()  # inference_mode does not work on XLA
    def read(self, ids, position):
        """Reads ids, of which the first is the text's token number `position`; all before it must have been read. Returns
        the logits [V] of the token behind the last, on the CPU."""
        for start in range(0, len(ids), self.chunk):
            part = ids[start:start + self.chunk]
            padding = self.chunk - len(part) if self.on_xla and len(part) > 1 else 0
            inputs = [torch.tensor(x).to(self.device)
                      for x in ([part + [0] * padding], [position + start], [len(part) - 1])]
            if len(part) > 1 or self.on_xla:
                logits = self.compute(*inputs)
            else:
                self.traced = self.traced or trace(self.compute, inputs)
                with torch.jit.optimized_execution(False):  # or it would look for something to fuse, for 0.1 s and in vain
                    logits = self.traced(*inputs)
            self.sync()
        return logits.cpu()

    def compute(self, tokens, position, last):
        """tokens [1, T], the first of them at position [1]; returns the logits [V] behind token number last [1] of them."""
        self.cache.position = position
        hidden = self.model.hidden(tokens, self.cache)  # [1, T, D]
        return self.model.lm_head(hidden.index_select(1, last))[0, 0]  # [V]


def pick(logits, temperature, top_k, top_p, generator):
    """Draws a token id from logits [V]: the likeliest at temperature 0; otherwise at random among the top_k likeliest
    (0: all) and, of those, the fewest whose probabilities reach top_p (https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = logits.topk(min(top_k or len(logits), len(logits)))  # likeliest first
    probabilities = (logits / temperature).softmax(0)
    before = probabilities.cumsum(0) - probabilities  # probability of all likelier ones
    probabilities[1:][before[1:] >= top_p] = 0  # the likeliest stays whatever top_p rounds to
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def generate(decoder, ids, max_new_tokens, vocab_size, eos, temperature=0.8, top_k=0, top_p=1.0, seed=0):
    """Yields the ids that follow `ids`, all below vocab_size, until eos, max_new_tokens or the end of the model's context.
    The draws are made on the CPU: a seed means the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    end = min(len(ids) + max_new_tokens, decoder.model.config.context)
    decoder.reserve(end)
    position = 0
    while position + len(ids) < end:
        logits = decoder.read(ids, position)[:vocab_size]  # what a model has beyond that is padding
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or its training has diverged")
        position += len(ids)
        token = pick(logits, temperature, top_k, top_p, generator)
        if token == eos:
            return
        yield token
        ids = [token]  # the decoder remembers the others


def stream(processor, ids, tokens):
    """Yields the text that each of `tokens` adds to `ids`, and what is left at the end.

    A piece alone does not tell its text: SentencePiece drops the space that the first one starts with, and a character may
    take several tokens, a byte each. So what is decoded begins one visible token earlier, and waits until all bytes of a
    character are there.
    """
    window = list(ids)
    shown = processor.decode(window)
    for token in tokens:
        window.append(token)
        text = processor.decode(window)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
            continue
        yield text[len(shown):]
        if text != shown:
            window = [token]
            text = processor.decode(window)
        shown = text
    yield processor.decode(window)[len(shown):]


# --- the command ------------------------------------------------------------------------------------------------------


def load(path):
    """The model, on the CPU, and the tokenizer of a run (its newest checkpoint), a checkpoint or a Hugging Face directory; of
    the newest run under out/ if path is None."""
    if path is not None and is_hf(path):
        directory = Path(path)
        if not (directory / "tokenizer.model").is_file():
            raise UserError(f"{directory} has no tokenizer.model, the SentencePiece model that text is encoded with")
        model = load_hf(directory)
    else:
        directory = find_checkpoint(path)
        if not read_state(directory)["tokenizer"]:
            raise UserError(f"{directory} has no tokenizer; its run named none (config key tokenizer)")
        model = load_model(directory, attention="math")
    return model, load_tokenizer(directory / "tokenizer.model", model.config.vocab_size)


def default_device():
    """xla on a machine with a TPU, otherwise cpu. Where there is no libtpu, torch_xla, which takes seconds, is not loaded."""
    if os.environ.get("PJRT_DEVICE") == "CPU" or not importlib.util.find_spec("libtpu"):
        return "cpu"
    import torch_xla.runtime as xr
    return "xla" if xr.device_type() == "TPU" else "cpu"


def prompts():
    """The lines of standard input; a terminal is asked for them, until Ctrl-D."""
    if sys.stdin is None:
        raise UserError("standard input is closed; give a --prompt")
    if sys.stdin.isatty():
        import readline  # noqa: F401  lets input() edit lines and recall earlier ones
        with contextlib.suppress(EOFError):
            while True:
                if not sys.stdout.isatty():  # a file, which is not to have this in it
                    print("prompt> ", end="", file=sys.stderr, flush=True)
                yield input("prompt> " if sys.stdout.isatty() else "").replace("\\n", "\n")
        print()
    else:
        for line in sys.stdin.buffer:
            yield line.decode(errors="surrogateescape").rstrip("\r\n").replace("\\n", "\n")


def continue_prompt(prompt, decoder, processor, arguments):
    """Prints --num-samples continuations of the prompt. Returns the number of tokens."""
    context = decoder.model.config.context
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 come as surrogates
        raise UserError(f"the prompt {prompt!r} is not UTF-8") from None
    ids = [processor.bos_id()] + processor.encode(prompt)
    if len(ids) >= context:
        raise UserError(f"the prompt has {len(ids):,} tokens; the model reads {context:,} and needs room for one more")
    total = 0
    for i in range(arguments.num_samples):
        tokens = generate(decoder, ids, arguments.max_new_tokens, processor.vocab_size(), processor.eos_id(),
                          arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed + i)
        print(prompt, end="", flush=True)
        count = -1  # stream yields once more at the end
        for text in stream(processor, ids, tokens):
            print(text, end="", flush=True)
            count += 1
        print("\n", flush=True)
        total += count
        if len(ids) + count == context and count < arguments.max_new_tokens:
            print(f"[the model's context of {context:,} tokens is full]\n", file=sys.stderr)
    return total


def main():
    parser = argparse.ArgumentParser(description="Continue a prompt with a trained model.")
    parser.add_argument("--prompt", help="text to continue; may be empty (default: the lines of standard input)")
    parser.add_argument("--checkpoint", help="a run, a checkpoint or a Hugging Face directory (default: newest run under out/)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many likeliest tokens; 0: all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that reach this sum (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations, with seeds from --seed on (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "xla"), help="xla is a TPU (default: where there is one)")
    arguments = parser.parse_args()
    if not (arguments.temperature == 0 or 1e-3 <= arguments.temperature <= 1e3):
        raise UserError(f"--temperature {arguments.temperature}: expected 0, or from 0.001 to 1000")
    if arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        raise UserError("expected --top-k of at least 0 and --top-p above 0, at most 1")
    if arguments.max_new_tokens < 1 or arguments.num_samples < 1:
        raise UserError("expected --max-new-tokens and --num-samples of at least 1")
    if not 0 <= arguments.seed < arguments.seed + arguments.num_samples <= 2**63:
        raise UserError("expected a --seed of at least 0, and --seed + --num-samples of at most 2^63")
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for a terminal that is not UTF-8

    model, processor = load(arguments.checkpoint)
    decoder = Decoder(model, arguments.device or default_device())
    tokens, seconds = 0, 0.0
    for prompt in [arguments.prompt] if arguments.prompt is not None else prompts():
        started = time.perf_counter()
        try:
            tokens += continue_prompt(prompt, decoder, processor, arguments)
        except UserError as error:
            if arguments.prompt is not None or not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)  # at a terminal there is another try
        seconds += time.perf_counter() - started
    if tokens and sys.stdout and sys.stdout.isatty():
        print(f"[{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
