"""Text that others wrote, made harmless: what a rank, a file or a daemon says must not act on a terminal or a page.

    RunState, read_info    whatever comes from ranks and from disk
    the clients            whatever a daemon sends, which may be another user's on another node
    LogView, the reports   lines of logs
    distui logs            a log as it is, with its colours and progress bars

Escape sequences go as a whole; so do control characters and what turns the direction of writing or takes no place. A
rank's own output that the launcher copies to the user's terminal while it runs is not touched.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Container, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, the cursor
    # OSC and the like: a title, a link. One that does not end hides nothing.
    r"|(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])(?:[^\n\x07\x1b\x90\x98\x9b-\x9f]*(?:\x07|\x1b\\|\x9c))?"
    r"|\x1b[ -/]*[0-~]?"
)
_DROPPED = frozenset({"Cc", "Cf", "Cs"})
_SPACES = frozenset({"Zs", "Zl", "Zp"})
_OF_SEVERAL_LINES = frozenset({"config_toml"})
"""Fields in which a new line means one."""


def harmless(text: str, *, lines: bool = False) -> str:
    """Return `text` without what a terminal acts on; tabs and ends of lines stay with `lines`, else become blanks."""
    if text.isprintable():
        return text
    return "".join(_characters(_SEQUENCE.sub("", text), lines))


def _characters(text: str, lines: bool) -> Iterator[str]:
    for character in text:
        if character in "\n\t":
            yield character if lines else " "
        elif character.isprintable():
            yield character
        else:
            kind = unicodedata.category(character)
            if kind in _SPACES:
                yield " "
            elif kind not in _DROPPED:
                yield character


_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_UNFINISHED = re.compile(
    r"(?:(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}"
    r"|(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])[^\n\x07\x1b\x90\x98\x9b-\x9f]{0,256}\x1b?"
    r"|\x1b[ -/]{0,8})\Z"
)
_ACTS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


class HarmlessStream:
    """Writes a log on to a stream: colours and the return to the line's start stay, whatever else acts goes."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._held = out, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: bytes) -> int:
        """Write what of it is text; a sequence that has only begun waits for its end, or for `flush`."""
        text = self._held + self._decoder.decode(data)
        begun = _UNFINISHED.search(text)
        cut = len(text) if begun is None else begun.start()
        text, self._held = text[:cut], text[cut:]
        self._write(text)
        return len(data)

    def flush(self) -> None:
        """Write what was held back."""
        text, self._held = self._held, ""
        self._write(text)
        self._out.flush()

    def _write(self, text: str) -> None:
        parts, at = [], 0
        for colour in _COLOUR.finditer(text):
            parts += [self._clean(text[at : colour.start()]), colour[0]]
            at = colour.end()
        self._out.write("".join([*parts, self._clean(text[at:])]).encode(errors="replace"))

    @staticmethod
    def _clean(text: str) -> str:
        return text if text.isprintable() else _ACTS.sub("", _SEQUENCE.sub("", text))


def make_harmless(message: Message, but: Container[str] = ()) -> None:
    """Make every text in a message harmless, in place; keys of maps too. Fields named in `but` are left as they are."""
    for field, what in _plan(message.DESCRIPTOR):
        if field in but:
            continue
        if what == "text":
            value = getattr(message, field)
            if not value.isprintable():
                setattr(message, field, harmless(value, lines=field in _OF_SEVERAL_LINES))
        elif what == "texts":
            values = getattr(message, field)
            if not all(map(str.isprintable, values)):
                values[:] = [harmless(value) for value in values]
        elif what == "keys":
            values = getattr(message, field)
            if not all(map(str.isprintable, values)):
                _clean_keys(values)
        elif what == "keys and texts":
            _clean_keys(getattr(message, field))
        elif what == "message":
            if message.HasField(field):
                make_harmless(getattr(message, field), but)
        else:
            for one in getattr(message, field):
                make_harmless(one, but)


def _clean_keys(values: Any) -> None:
    """Make keys, and values that are text, harmless; two that then are the same become one."""
    for key in list(values):
        value = values[key]
        told = harmless(value) if isinstance(value, str) else value
        if (name := harmless(key)) != key:
            del values[key]
            values[name] = told
        elif told is not value:
            values[key] = told


@lru_cache(maxsize=256)
def _plan(descriptor: Descriptor) -> tuple[tuple[str, str], ...]:
    """Return the fields of a message that hold text, or messages that do."""
    found = []
    for field in descriptor.fields:
        if field.type == field.TYPE_STRING:
            found.append((field.name, "texts" if field.is_repeated else "text"))
        elif field.message_type is None or not _has_text(field.message_type):
            continue
        elif field.message_type.GetOptions().map_entry:
            is_text = field.message_type.fields_by_name["value"].type == field.TYPE_STRING
            found.append((field.name, "keys and texts" if is_text else "keys"))
        else:
            found.append((field.name, "messages" if field.is_repeated else "message"))
    return tuple(found)


def _has_text(descriptor: Descriptor, above: frozenset[str] = frozenset()) -> bool:
    if descriptor.full_name in above:
        return False
    inner = above | {descriptor.full_name}
    return any(
        field.type == field.TYPE_STRING or (field.message_type is not None and _has_text(field.message_type, inner))
        for field in descriptor.fields
    )
