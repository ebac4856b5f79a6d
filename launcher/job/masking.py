"""Arguments of a script as a run may keep them: without passwords, tokens and keys.

The script itself gets them whole. Names decide: `--password x`, `--hub-token=x`, `WANDB_API_KEY=x`, `+wandb.api_key=x`,
`{"secret": "x"}`, `?token=x`; and so does the place in `https://user:x@host`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MASK = "***"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET = re.compile(
    r".*(password|passwd|passphrase|passcode|secret|credential|api_?key|api_?token|auth_?token|bearer|authorization).*"
    r"|(.*_)?(pwd|auth|token)"
    r"|(.*_)?(access|account|deploy|encryption|license|master|private|service|signing|ssh|storage)_?key"
)
_NO_SECRET = re.compile(
    r".*_(dir|env|file|filename|format|length|name|path|type)"  # says where or of what kind it is
    r"|(.*_)?(audio|bos|cls|each|eos|eot|image|mask|max|min|num|pad|per|prompt|sep|sot|special|start|stop|unk)_token"
)
_NAMED = re.compile(r"""(?<![\w.-])(?P<name>[A-Za-z][\w.-]{0,63})["']?\s{0,4}(?:=|:(?!//))\s{0,4}""")
_VALUE = re.compile(r""""(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[^"',;&\s}\]]+""")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def is_secret(name: str) -> bool:
    """Tell whether a name is that of a secret."""
    words = "_".join(_WORDS.findall(name)).lower()
    return bool(_SECRET.fullmatch(words)) and not _NO_SECRET.fullmatch(words)


def masked(words: Sequence[str], what: str) -> list[str]:
    """Return a script and its arguments with `***` for the values of `secrets`, of `all` arguments, or of `none`."""
    if what == "none":
        return list(words)
    first = 2 if words[:1] == ["-m"] else 1
    told, hidden = list(words[:first]), False
    for word in words[first:]:
        name, sign, value = word.partition("=")
        option = word.startswith("-")
        if hidden and not option:
            told.append(MASK)
            hidden = False
            continue
        secret = what == "all" or is_secret(name)
        hidden = secret and option and not sign
        if secret and sign:
            told.append(f"{name}={MASK}")
        elif what == "all" and not option:
            told.append(MASK)
        else:
            told.append(_USER_OF_URL.sub(MASK, f"{_inside(name)}{sign}{_inside(value)}"))
    return told


def _inside(text: str) -> str:
    """Return `text` with the values of secrets that are named in it masked, in their quotes."""
    parts, done = [], 0
    for named in _NAMED.finditer(text):
        if named.start() < done or not is_secret(named["name"]):
            continue
        if (value := _VALUE.match(text, named.end())) is not None:
            quote = value[0][0] if value[0][0] in "\"'" else ""
            parts += [text[done : value.start()], f"{quote}{MASK}{quote}"]
            done = value.end()
    return "".join([*parts, text[done:]])
