"""Prompts for sample.py from standard input: a pipe, a file or a terminal."""
import contextlib
import sys

from nanoxla.errors import UserError


def read_prompts():
    """Yields a prompt for each line of standard input. \\n in a line stands for a line break.

    On a terminal, the user is asked for each line, until Ctrl-D. Elsewhere, bytes that are not
    UTF-8 become surrogates, which str.encode() refuses."""
    if sys.stdin is None:
        raise UserError("standard input is closed; give a --prompt")
    lines = typed_lines() if sys.stdin.isatty() else piped_lines()
    for line in lines:
        yield line.replace("\\n", "\n")


def piped_lines():
    for line in sys.stdin.buffer:
        yield line.decode(errors="surrogateescape").rstrip("\r\n")


def typed_lines():
    import readline  # noqa: F401  lets input() edit lines and recall earlier ones
    question = "prompt> "
    with contextlib.suppress(EOFError):
        while True:
            if sys.stdout.isatty():
                yield input(question)
            else:  # stdout is a file or a pipe, where the question does not belong
                print(question, end="", file=sys.stderr, flush=True)
                yield input()
    print()
