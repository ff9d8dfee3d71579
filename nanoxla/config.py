"""Configs: a frozen dataclass of defaults, a Python file of assignments laid over it, and
--key=value arguments laid over both. "~" and $VARIABLE in a string stand for what they mean in a
shell.

A config class declares one key per line:

    batch_size: int = key(256, "windows per optimiser step, over all cores", at_least(1))
"""
import contextlib
import dataclasses
import difflib
import math
import os
import traceback
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from nanoxla.errors import UserError


class Check(NamedTuple):
    """What a value must satisfy: a function, and the same in words."""
    holds: callable
    words: str


ANY = Check(lambda x: True, "")
POSITIVE = Check(lambda x: 0 < x < math.inf, "more than 0")
BELOW_ONE = Check(lambda x: 0 <= x < 1, "at least 0 and below 1")


def at_least(low):
    return Check(lambda x: low <= x < math.inf, f"at least {low}")


def between(low, high, note):
    return Check(lambda x: low <= x <= high, f"from {low} to {high} ({note})")


def one_of(*values):
    return Check(lambda x: x in values, " or ".join(values))


def key(default, meaning, check=ANY, per_session=False):
    """A dataclass field that documents and validates itself. per_session: the value may change when
    a run is resumed; the values of all other keys define the run."""
    metadata = {"meaning": meaning, "check": check, "per_session": per_session}
    return field(default=default, metadata=metadata)


def session_key(default, meaning, check=ANY):
    """A key whose value may change from one session of a run to the next. (A session is one start
    of train.py; resuming begins another.)"""
    return key(default, meaning, check, per_session=True)


def load(config_class, path, overrides=()):
    """config_class with the values of the config file `path` and of overrides like "--key=value".
    Raises UserError for an unknown key, a wrong type and a value out of range."""
    fields = {entry.name: entry for entry in dataclasses.fields(config_class)}
    values = {name: typed(fields, name, value, path) for name, value in assignments(path).items()}
    for name, text in split_overrides(overrides):
        values[name] = typed(fields, name, text, "the command line", parse=True)
    for name, value in values.items():
        check = fields[name].metadata["check"]
        if not check.holds(value):
            raise UserError(f"{name} = {value!r}, expected {check.words}")
    try:
        return config_class(**values)
    except ValueError as error:  # values that do not go together: the class's __post_init__
        raise UserError(error) from None


def split_overrides(arguments):
    """Yields (key, text) for each "--key=value" or "--key", "value". "-" in a key means "_"."""
    arguments = iter(arguments)
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            text = next(arguments, "--")
        if not argument.startswith("--") or (not equals and text.startswith("--")):
            raise UserError(f"{argument}: expected --key=value; --help lists the keys")
        yield name.replace("-", "_"), text


def assignments(path):
    """{name: value} of the variables that the Python file `path` assigns. Modules, functions,
    classes and names that begin with "_" are the file's own business."""
    values = {}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), str(path), "exec"), values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} can't be read: {error}") from None
    except Exception as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        line = getattr(error, "lineno", None) or innermost.lineno
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {name: value for name, value in values.items()
            if not (name.startswith("_") or callable(value) or isinstance(value, ModuleType))}


def typed(fields, name, value, where, parse=False):
    """`value`, if it has the type of the field `name`. parse: convert it from text first."""
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
        hint = "" if parse else ". The name of a helper variable has to begin with _"
        raise UserError(f"{where}: there is no key {name!r}; the nearest is {nearest!r}{hint}")
    kind = fields[name].type
    if parse or (kind is float and type(value) is int):
        with contextlib.suppress(ValueError):
            value = kind(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {name} = {value!r}, expected {kind.__name__}")
    return os.path.expanduser(os.path.expandvars(value)) if kind is str else value


def print_keys(config_class):
    """Prints every key with its type, default and meaning, and the values that it takes."""
    for entry in dataclasses.fields(config_class):
        check = entry.metadata["check"].words
        meaning = entry.metadata["meaning"] + (f" ({check})" if check else "")
        print(f"  --{entry.name:18} {entry.type.__name__:6} {entry.default!r:14} {meaning}")
