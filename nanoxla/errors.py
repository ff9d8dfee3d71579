"""How a command ends: a user's mistake with a sentence and exit code 2, a bug with its
traceback."""
import os
import sys


class UserError(Exception):
    """A mistake that the user can mend. The message says what was found, where, and what was
    expected."""


def user_message(error):
    """The line that tells the user of a mistake, or of a failure of the operating system. None for
    a bug, which deserves a traceback."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"error: {error.filename or 'writing'}: {error.strerror}"
    if "Mosaic" in str(error):  # of libtpu, with the whole kernel as text after the first line
        return ("error: libtpu does not compile the attention kernel: "
                f"{first_line(error)}. Use --attention=math")
    return None


def first_line(error):
    """The first line of an exception's message. Compilers add hundreds of others."""
    return str(error).strip().partition("\n")[0][:300]


def run_command(main):
    """Calls main(), the whole of a command, and exits with the code that fits how it ended."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has quit, as `head` does. Python flushes stdout once more when it
        # exits, so give it somewhere to flush to. 141 is what a shell reports for SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(2)
