"""Continue a prompt with a trained model.

    python sample.py --prompt "The state of the Union is"      # the newest run under out/
    python sample.py --checkpoint out/demo --prompt "..." --num-samples 3 --temperature 0.8
    python sample.py < tools/prompts.txt                       # one prompt per line

--checkpoint takes the directory of a run (for its newest checkpoint), a checkpoint, or a Hugging
Face directory. Without --prompt, each line of standard input is a prompt, in which \\n stands for a
line break. An empty prompt starts a new document.

Text appears as it is generated. It ends where the model ends the document (with the token eos),
after --max-new-tokens, or, with a note, when the model's context is full. A machine with a TPU uses
one of its cores; any other uses the CPU, in plain PyTorch.

Read it from top to bottom: drawing a token, the loop that generates a text, the decoder that makes
this loop fast, turning tokens into text, the command.

Shapes:  B  texts    T  tokens read at once    D  width of the model    V  vocabulary
"""
import argparse
import importlib.util
import itertools
import math
import os
import sys
import time
import warnings

# torch reads these variables while it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # memory pages of 2 MB for large tensors
# A thread of torch that waits for another one spins, by default for milliseconds. Where other
# processes are busy, that takes the CPU from the thread it waits for. With this it sleeps sooner.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from model import KVCache, load_model
from nanoxla import tpu
from nanoxla.environment import check_environment, mend_environment, use_one_chip
from nanoxla.errors import UserError, first_line, run_command
from nanoxla.init_from import find_model, read_model
from nanoxla.prompts import read_prompts
from nanoxla.tokenizer import load_tokenizer

CHUNK = 128  # tokens of a prompt that an XLA device reads at once
ROWS = 8  # texts that the CPU generates together; the last bits of logits may depend on it


# --- drawing tokens -----------------------------------------------------------------------------


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draws a token id from logits [V].

    temperature: divides the logits. Below 1, likely tokens become even likelier. 0 always takes the
    likeliest (greedy sampling). top_k: draw only among the top_k likeliest tokens; 0 means all.
    top_p: of these, keep the smallest set of the likeliest tokens whose probabilities add up to at
    least top_p (nucleus sampling, https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = logits.topk(min(top_k or len(logits), len(logits)))  # the likeliest first
    probabilities = (logits / temperature).softmax(0)
    sum_before = probabilities.cumsum(0) - probabilities  # of all likelier tokens
    probabilities[1:][sum_before[1:] >= top_p] = 0  # [1:]: the likeliest stays in any case
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def generate(decoder, ids, max_new_tokens, vocab_size, eos, temperature=0.8, top_k=0, top_p=1.0,
             seed=0, count=1):
    """Continues the text `ids` `count` times, with the seeds seed, seed + 1 and so on. Yields the
    next token id of each continuation, a list [count].

    A continuation ends with the token `eos`, which then repeats until all have ended; a list of eos
    alone is not yielded. All end after max_new_tokens, or when the model's context is full.
    vocab_size: that of the tokenizer; the model's may be larger, for padding. The draws are made on
    the CPU, so a seed means the same draws on every device. Raises UserError if the logits are not
    finite."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    end = min(len(ids) + max_new_tokens, decoder.model.config.context)
    decoder.reserve(end, count)
    tokens = [None] * count
    unread, position = [ids], 0  # the tokens still to read [B, T], and the position of the first
    while position + len(unread[0]) < end:
        logits = decoder.read(unread, position)[:, :vocab_size]  # without the padding
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, "
                            "or its training has diverged")
        position += len(unread[0])
        # After the prompt, which all share, there is only one row of logits.
        tokens = [eos if last == eos else sample_token(row, temperature, top_k, top_p, generator)
                  for last, row, generator in zip(tokens, logits.expand(count, -1), generators)]
        if all(token == eos for token in tokens):
            return
        yield tokens
        unread = [[token] for token in tokens]  # the decoder's cache holds the others


# --- the decoder --------------------------------------------------------------------------------


class Decoder:
    """Reads the tokens of texts, and returns the logits of the next ones. A KV cache holds the keys
    and values of all tokens read so far, so the model computes each token only once. The texts
    begin with the same prompt, which is read once.

    XLA compiles a graph for every new shape, which takes seconds. So an XLA device uses two shapes,
    for any prompt and any length of text: a chunk of a prompt, [1, self.chunk], and a single token,
    [1, 1]. The last chunk of a prompt is padded, and the cache is always as long as the context.
    The position in the text is a tensor of shape [1] for the same reason: the Python numbers 0 and
    1 would become constants, and each would need a graph of its own.

    The CPU runs each operation immediately, whatever its shape. There a prompt is not padded, and
    attention reads only the part of the cache that is filled. For a single token, most of the time
    goes into reading the weights. So several texts, which share this, take little longer than one.
    Most of the rest goes into Python. So torch.jit.trace records the operations once, and they are
    replayed without Python overhead.
    """

    def __init__(self, model, device="cpu"):
        """device: "cpu" or "xla"."""
        self.model = model.eval().requires_grad_(False)
        self.on_xla = device == "xla"
        self.cache = None
        if self.on_xla:
            import torch_xla
            self.sync = torch_xla.sync
            # A divisor of the context, so that even a padded last chunk ends within it.
            self.chunk, self.rows = math.gcd(CHUNK, model.config.context), 1
        else:
            self.sync = lambda: None
            self.chunk, self.rows = model.config.context, ROWS
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):  # read fastest if stored by columns
                    module.weight.data = module.weight.t().contiguous().t()
        self.device = torch.device(device)
        model.to(self.device)

    def reserve(self, length, count=1):
        """Makes room for `count` texts of `length` tokens, at most the context. A cache that does
        not fit is replaced by another, empty one."""
        if self.cache is None or self.cache.length < length or self.cache.batch_size != count:
            context = self.model.config.context
            power_of_two = 1 << (length - 1).bit_length()
            room = context if self.on_xla else min(context, power_of_two)
            self.cache = KVCache(self.model.config, count, self.device, room)
            self.slots, self.traced = self.cache.slots, None
            # Make the zeros now. Otherwise the next graph would also make them, and differ from
            # the graphs after it: XLA would compile one more.
            self.sync()

    @torch.no_grad()  # torch.inference_mode does not work on XLA
    def read(self, texts, position):
        """Reads token ids [B, T], the first of which are at `position` in their texts. All earlier
        tokens must have been read. A single row is read for all texts. Returns the logits [B, V] of
        the tokens that follow, on the CPU."""
        for start in range(0, len(texts[0]), self.chunk):
            parts = [ids[start:start + self.chunk] for ids in texts]
            T = len(parts[0])
            padding = self.chunk - T if self.on_xla and T > 1 else 0
            inputs = [torch.tensor(values).to(self.device) for values in (
                [part + [0] * padding for part in parts],  # tokens [B, T]
                [position + start],  # position [1] of the first
                [T - 1])]  # index [1] of the last, before the padding
            inputs.append(self.slots if self.on_xla else self.slots[:position + start + T])
            if T > 1 or self.on_xla or len(texts) < self.cache.batch_size:
                logits = self.compute(*inputs)
            else:
                self.traced = self.traced or trace(self.compute, inputs)
                # TorchScript's optimiser would spend 0.1 s looking for operations to fuse, in vain.
                with torch.jit.optimized_execution(False):
                    logits = self.traced(*inputs)
            self.sync()
        return logits.cpu()

    def compute(self, tokens, position, last, slots):
        """The logits [B, V] of the tokens that follow tokens[:, last]. tokens [B, T]; position [1]
        of the first of them; last [1]; slots [S] of the cache that attention reads."""
        self.cache.seek(position, slots)  # the last chunk advanced over its padding
        hidden = self.model.hidden(tokens, self.cache)  # [B, T, D]
        return self.model.lm_head(hidden.index_select(1, last))[:, 0]  # [B, V]


def trace(function, inputs):
    """A function that replays the operations of function(*inputs) without Python overhead.

    Tracing calls the function once. The function writes to the cache, so the inputs must be
    real."""
    with warnings.catch_warnings():
        # The warning says that Python numbers become constants. Ours never change: the number of
        # slots is the size of an input, and a size is traced.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(function, inputs, check_trace=False)


# --- turning tokens into text -------------------------------------------------------------------


def stream(processor, ids, tokens):
    """Yields the text that each of `tokens` adds to a text that begins with `ids`; then, once more,
    whatever text is still held back. processor: a SentencePieceProcessor.

    A token cannot be decoded on its own, for two reasons:

    1. decode(["▁we", "▁the"]) is "we the", but decode(["▁the"]) is "the": SentencePiece drops the
       space at the start of a text. So we decode from one token earlier. "we the" without "we",
       which has been shown, leaves " the".
    2. "😀" is spelled with four tokens, one for each byte. The first three decode to a replacement
       character. So we wait for the fourth.
    """
    window = list(ids)  # the tokens to decode
    shown = processor.decode(window)  # the part of their text that has been shown
    for token in tokens:
        window.append(token)
        text = processor.decode(window)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
            continue
        yield text[len(shown):]
        if text != shown:  # a control token has no text, and starts no new window
            window = [token]
            text = processor.decode(window)
        shown = text
    yield processor.decode(window)[len(shown):]


# --- the command --------------------------------------------------------------------------------


def load(path):
    """The model, on the CPU, and the tokenizer at `path`: a run (its newest checkpoint), a
    checkpoint or a Hugging Face directory. None means the newest run under out/."""
    directory = find_model(path)
    if not (directory / "tokenizer.model").is_file():
        raise UserError(f"{directory} has no tokenizer.model, the SentencePiece model that encodes "
                        "the prompt; a run gets it by the config key tokenizer")
    model = load_model(*read_model(directory), directory)
    return model, load_tokenizer(directory / "tokenizer.model", model.config.vocab_size)


def open_device(wanted=None):
    """Returns "xla" or "cpu": the wanted one, or by default "xla" on a machine with a TPU. Of a TPU
    it opens one chip. Raises UserError if another process holds the TPU."""
    # Importing torch_xla takes seconds. Without libtpu there is no TPU, so do not import it.
    no_tpu = os.environ.get("PJRT_DEVICE") == "CPU" or not importlib.util.find_spec("libtpu")
    if wanted == "cpu" or (wanted is None and no_tpu):
        return "cpu"
    mend_environment()
    use_one_chip()
    import torch_xla
    import torch_xla.runtime as xr
    if xr.device_type() == "TPU":
        check_environment()
        if held := tpu.holders():
            raise UserError(f"the TPU is in use by {tpu.describe(held)}; wait until it ends, "
                            "or add --device cpu")
        try:
            torch_xla.device()
        except RuntimeError as error:
            raise UserError(f"torch_xla can't open the TPU: {first_line(error)}; "
                            "add --device cpu to sample without it") from None
        return "xla"
    return wanted or "cpu"


def continue_prompt(prompt, decoder, processor, arguments):
    """Prints --num-samples continuations of the prompt. Returns the number of new tokens."""
    context = decoder.model.config.context
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python represents bytes that are not UTF-8 by surrogates
        raise UserError(f"the prompt {prompt!r} is not UTF-8") from None
    ids = [processor.bos_id(), *processor.encode(prompt)]
    if len(ids) >= context:
        raise UserError(f"the prompt has {len(ids):,} tokens; the model's context of {context:,} "
                        f"has room for {context - 1:,} and a new token")
    total, eos = 0, processor.eos_id()
    for first in range(0, arguments.num_samples, decoder.rows):
        rows = min(decoder.rows, arguments.num_samples - first)
        steps = generate(decoder, ids, arguments.max_new_tokens, processor.vocab_size(), eos,
                         arguments.temperature, arguments.top_k, arguments.top_p,
                         arguments.seed + first, rows)
        # The first continuation appears as it is generated. tee stores the steps for the others,
        # which are printed after it.
        for row, copy in enumerate(itertools.tee(steps, rows)):
            tokens = itertools.takewhile(lambda token: token != eos, (step[row] for step in copy))
            print(prompt, end="", flush=True)
            for count, text in enumerate(stream(processor, ids, tokens)):  # once more than tokens
                print(text, end="", flush=True)
            print("\n", flush=True)
            total += count
            if len(ids) + count == context and count < arguments.max_new_tokens:
                print(f"[the model's context of {context:,} tokens is full]\n", file=sys.stderr)
    return total


def parse_arguments():
    parser = argparse.ArgumentParser(description="Continue a prompt with a trained model.")
    add = parser.add_argument
    add("--prompt", help="text to continue; may be empty (default: the lines of standard input)")
    add("--checkpoint", help="a run, a checkpoint or a Hugging Face directory "
                             "(default: the newest run under out/)")
    add("--max-new-tokens", type=int, default=200, help="stop after this many (%(default)s)")
    add("--temperature", type=float, default=0.8,
        help="below 1: likely tokens become likelier; 0: always the likeliest (%(default)s)")
    add("--top-k", type=int, default=50,
        help="draw among this many of the likeliest tokens; 0: among all (%(default)s)")
    add("--top-p", type=float, default=1.0,
        help="draw among the smallest set of likeliest tokens that adds up to this (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the first sample (%(default)s)")
    add("--num-samples", type=int, default=1,
        help="continuations of each prompt; their seeds count up from --seed (%(default)s)")
    add("--device", choices=("cpu", "xla"), help="xla is a TPU (default: a TPU if there is one)")
    arguments = parser.parse_args()
    temperature = arguments.temperature
    if not (temperature == 0 or 1e-3 <= temperature <= 1e3):
        raise UserError(f"--temperature {temperature}: expected 0, or from 0.001 to 1000")
    if arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        raise UserError("expected --top-k of at least 0 and --top-p above 0, at most 1")
    if arguments.max_new_tokens < 1 or arguments.num_samples < 1:
        raise UserError("expected --max-new-tokens and --num-samples of at least 1")
    if not 0 <= arguments.seed < arguments.seed + arguments.num_samples <= 2**63:
        raise UserError("expected a --seed of at least 0, "
                        "and --seed + --num-samples of at most 2^63")
    return arguments


def main():
    arguments = parse_arguments()
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for a terminal that is not UTF-8
    model, processor = load(arguments.checkpoint)
    decoder = Decoder(model, open_device(arguments.device))
    tokens, seconds = 0, 0.0
    for prompt in [arguments.prompt] if arguments.prompt is not None else read_prompts():
        started = time.perf_counter()
        try:
            tokens += continue_prompt(prompt, decoder, processor, arguments)
        except UserError as error:
            if arguments.prompt is not None or not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)  # on a terminal the user can try again
        seconds += time.perf_counter() - started
    if tokens and sys.stdout and sys.stdout.isatty():
        print(f"[{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s]",
              file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
