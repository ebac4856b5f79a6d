"""Arguments of a script as a run may keep them: without passwords, tokens and keys.

The script itself gets them whole. Names decide: `--password x`, `--hub-token=x`, `WANDB_API_KEY=x`, `+wandb.api_key=x`,
`{"secret": "x"}`, `?token=x`, `Authorization: Bearer x`; and so do the place in `https://user:x@host`, and the form of
tokens that say whose they are (`hf_...`, `ghp_...`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MASK = "***"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_VENDORS = (
    "anthropic|aws|azure|clearml|cohere|comet|gcp|github|gitlab|google|groq|hf|hub|huggingface|kaggle|mistral|neptune|ngc"
    "|openai|replicate|s3|slack|together|wandb"
)
_SECRET = re.compile(
    r".*(password|passwd|passphrase|passcode|secret|credential|api_?key|api_?token|auth_?token|bearer|authorization).*"
    r"|(.*_)?(auth|cookies?|jwt|otp|pass|pwd|sig|signature|token|webhook)"
    rf"|(.*_)?(access|account|deploy|encryption|license|master|private|service|signing|ssh|storage|{_VENDORS})_?key"
    rf"|(.*_)?(access|bot|git|id|refresh|session|user|{_VENDORS})tokens?"
)
_NO_SECRET = re.compile(
    r".*_(dir|env|file|filename|format|length|name|path|type)"  # says where or of what kind it is
    r"|(.*_)?(audio|bos|cls|each|eos|eot|image|mask|max|min|num|pad|per|prompt|sep|sot|special|start|stop|unk)_token"
    r"|(.*_)?(backward|extra|first|forward|max|multi|num|one|per|second|single|two)_pass"
)
_SEVERAL = re.compile(r".*(passwords|secrets|credentials|keys|tokens|cookies|webhooks)")
_NAMED = re.compile(r"""(?<![\w.])(?P<name>[A-Za-z][\w.-]{0,63})["']?\s{0,4}(?P<sign>=|:(?!//))\s{0,4}""")
_VALUE = r""""(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|\[[^\]]*\]?|\{[^}]*\}?|"""
_WORD = re.compile(_VALUE + r"""[^"',;&\s}\]]+""")
_LINE = re.compile(_VALUE + r"""[^"',;&\n}\]]+""")
"""What stands behind a colon, as in a header: it may have blanks."""
_USER_OF_URL = re.compile(r"(?<=://)[^/\s]+(?=@)")
_BY_FORM = re.compile(
    r"(?<![\w-])(hf_\w{20,}|sk-[\w-]{20,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{15,}|xox[a-z]-[\w-]{10,}|A[KS]IA[0-9A-Z]{12,}"
    r"|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|(?<=hooks\.slack\.com/)[\w/]+"
    r"|(?<=-----BEGIN )[A-Z ]*PRIVATE KEY-----[^-]*"
)
"""What is a secret whatever it is called: tokens that say by how they begin whose they are."""


def is_secret(name: str) -> bool:
    """Tell whether a name is that of a secret."""
    words = _words(name)
    return bool(_SECRET.fullmatch(words)) and not _NO_SECRET.fullmatch(words)


def _words(name: str) -> str:
    return "_".join(_WORDS.findall(name)).lower()


def masked(words: Sequence[str], what: str) -> list[str]:
    """Return a script and its arguments with `***` for the values of `secrets`, of `all` arguments, or of `none`."""
    if what == "none":
        return list(words)
    first = 2 if words[:1] == ["-m"] else 1
    told, hidden, several = list(words[:first]), False, False
    for word in words[first:]:
        name, sign, value = word.partition("=")
        option = word.startswith("--" if hidden and len(word) > 2 else "-")  # a value may begin with a dash
        if hidden and not option:
            told.append(MASK)
            hidden = several
            continue
        secret = what == "all" or is_secret(name)
        hidden = secret and option and not sign
        several = hidden and bool(_SEVERAL.fullmatch(_words(name)))
        if secret and sign:
            told.append(f"{name}={MASK}")
        elif what == "all" and not option:
            told.append(MASK)
        else:
            told.append(_BY_FORM.sub(MASK, _USER_OF_URL.sub(MASK, f"{_inside(name)}{sign}{_inside(value)}")))
    return told


def _inside(text: str) -> str:
    """Return `text` with the values of secrets that are named in it masked, in their quotes."""
    parts, done = [], 0
    for named in _NAMED.finditer(text):
        if named.start() < done or not is_secret(named["name"]):
            continue
        if (value := (_LINE if named["sign"] == ":" else _WORD).match(text, named.end())) is not None:
            quote = value[0][0] if value[0][0] in "\"'" else ""
            parts += [text[done : value.start()], f"{quote}{MASK}{quote}"]
            done = value.end()
    return "".join([*parts, text[done:]])
