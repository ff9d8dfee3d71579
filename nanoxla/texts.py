"""The text of a document, and the documents that have none: they are skipped and counted."""
import hashlib
import json
from typing import NamedTuple

from nanoxla.errors import UserError
from nanoxla.progress import note

MAX_DOCUMENT_BYTES = 256 << 20  # a document is encoded in one piece
ENOUGH = 1_000  # documents, to judge the share of bad ones


class RawDocument(NamedTuple):
    """A document before it is decoded and parsed."""
    place: str  # for error messages: the file, with the line or row
    kind: str  # "text" or "json"; "null" or "too large" for a document without content
    content: bytes


class BadDocument(UserError):
    """A document without a text. fault: the kind of reason, for counting."""

    def __init__(self, fault, message):
        super().__init__(message)
        self.fault = fault


def document_text(document, text_key):
    """The text of a RawDocument: all of it, or the value of text_key in its JSON object. Raises
    BadDocument."""
    place, kind, content = document
    if kind == "null":
        raise BadDocument("no text", f"{place}: {text_key!r} is null; expected a string")
    if kind == "too large":
        raise BadDocument("too large", f"{place} is larger than {MAX_DOCUMENT_BYTES >> 20} MB, the "
                          "most for one document. Split it, or put one document per line into a "
                          ".jsonl file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocument("not UTF-8", f"{place} is not UTF-8: byte 0x{content[error.start]:02x} "
                          f"at offset {error.start:,}") from None
    if kind == "text" or not text.strip():
        return text
    try:
        value = json.loads(text)
        text = look_up(value, text_key)
        text.encode()  # JSON allows half of a surrogate pair, which is not text
        return text
    except (ValueError, RecursionError) as error:
        raise BadDocument("not JSON", f"{place} is not a JSON object with valid text: "
                          f"{error}") from None
    except (KeyError, TypeError, AttributeError):
        keys = ", ".join(strings_in(value)[:20]) if isinstance(value, dict) else ""
        found = f"; see --text-key. It has strings at: {keys}" if keys else "; see --text-key"
        raise BadDocument("no text", f"{place}: expected a JSON object whose {text_key!r} is a "
                          f"string{found}") from None


def look_up(value, key, *default):
    """value[key]. Without such a key, "a.b" stands for value["a"]["b"]. If there is neither,
    returns the default, or raises KeyError or TypeError."""
    try:
        if isinstance(value, dict) and key not in value and "." in key:
            first, rest = key.split(".", 1)
            return look_up(value[first], rest)
        return value[key]
    except (KeyError, TypeError):
        if not default:
            raise
        return default[0]


def strings_in(value):
    """The keys of the strings in a dict, and in the dicts in it, these as "a.b"."""
    nested = {f"{key}.{inner}": text for key, part in value.items() if isinstance(part, dict)
              for inner, text in part.items()}
    return [key for key, text in (value | nested).items() if isinstance(text, str)]


def read_texts(batch, text_key):
    """The texts of a list of RawDocuments without the blank ones, and the bad documents as
    {fault: [count, message of the first]}."""
    texts, faults = [], {}
    for document in batch:
        try:
            text = document_text(document, text_key)
        except BadDocument as error:
            faults.setdefault(error.fault, [0, str(error)])[0] += 1
        else:
            if text.strip():
                texts.append(text)
    return texts, faults


class Skipped:
    """Counts bad documents. Shows the first of each kind."""

    def __init__(self, max_bad, strict):
        self.max_bad, self.strict = max_bad, strict
        self.first = {}  # fault: message, in the order in which they were found
        self.restart()

    def restart(self, seen=0, counts=()):
        """Sets the numbers of documents that were seen, and of bad ones of each kind."""
        self.seen, self.counts = seen, dict(counts)

    def add(self, good, faults):
        """Takes the number of good documents of a batch, and `faults` of read_texts. Raises
        UserError for the first bad document (strict), or for too large a share of them."""
        self.seen += good
        for fault, (count, message) in faults.items():
            if self.strict:
                raise UserError(message)
            if fault not in self.first:
                self.first[fault] = message
                note(f"skipped: {message}")
            self.counts[fault] = self.counts.get(fault, 0) + count
            self.seen += count
        if self.seen >= ENOUGH:
            self.check()

    def check(self):
        bad = sum(self.counts.values())
        if bad > self.max_bad * self.seen:
            raise UserError(f"{bad:,} of {self.seen:,} documents cannot be read, more than "
                            f"--max-bad {self.max_bad:g} of them; the first: "
                            f"{next(iter(self.first.values()), 'before this run')}")


def hash_fraction(text, salt):
    """A number in [0, 1) that depends only on the text and the salt, so that equal documents go to
    the same split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**64


def in_validation_split(text, val_fraction):
    return hash_fraction(text, b"split") < val_fraction
