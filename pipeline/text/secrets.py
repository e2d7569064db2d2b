"""Finds keys, tokens and passwords in a text, in time linear in it.

No pattern nests quantifiers, and none reads a long run again from each place in it. Formats are those their issuers
document, and those that gitleaks and GitHub's secret scanning look for. A match must look random (see `looks_random`),
so that placeholders such as `sk-ant-your-key-here` are none.

Not found: secrets that are split, encoded (base64, URL escapes) or written with look-alike characters; passwords in
prose; keys that are random text without prefix or name beside them.
"""

import base64
import binascii
import bisect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.text.found import Found, merge

MIN_ENTROPY: Final = 3.0
"""Bits a character of what follows a provider's prefix; 16 random characters of base 62 have about 3.8, hex 3.2."""
NEAR_CHARS: Final = 200
"""How far from an AWS key id its secret is looked for."""
SHORTEST_KEY: Final = 16
"""Characters without white space that every secret has, but passwords in URLs."""
LONGEST_VALUE: Final = 512
"""Characters of a value whose randomness is looked at."""

# A token begins where no word runs on; the escapes \n, \r and \t in quoted JSON end a word.
_START: Final = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
_END: Final = r"(?![A-Za-z0-9])"


@dataclass(frozen=True, slots=True)
class _Format:
    """A token known by its prefix.

    Attributes:
        kind: name of the match.
        hints: one of them is in every text that holds such a token.
        pattern: the token; its group 1, or the whole match, must look random.
        random: whether that is asked.
    """

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    random: bool = True


def _format(kind: str, hints: tuple[str, ...], body: str, *, random: bool = True) -> _Format:
    return _Format(kind, hints, re.compile(_START + body), random)


_FORMATS: Final = (
    _format("anthropic_key", ("sk-ant-",), r"sk-ant-([A-Za-z0-9_-]{20,}+)"),
    _format("openrouter_key", ("sk-or-",), r"sk-or-(?:v1-)?([A-Za-z0-9]{32,}+)"),
    _format("openai_key", ("sk-",), r"sk-(?:proj|svcacct|admin|None)-([A-Za-z0-9_-]{20,}+)"),
    _format("openai_key", ("sk-",), r"sk-([A-Za-z0-9]{32,}+)"),
    _format("google_key", ("AIza",), rf"AIza([A-Za-z0-9_-]{{35}}){_END}"),
    _format("google_key", ("GOCSPX-",), rf"GOCSPX-([A-Za-z0-9_-]{{28}}){_END}"),
    _format("huggingface_token", ("hf_", "api_org_"), r"(?:hf|api_org)_([A-Za-z0-9]{34,}+)"),
    _format("github_token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_([A-Za-z0-9]{36,}+)"),
    _format("github_token", ("github_pat_",), r"github_pat_([A-Za-z0-9_]{36,}+)"),
    _format("gitlab_token", ("glpat-",), r"glpat-([A-Za-z0-9_-]{20,}+)"),
    _format("xai_key", ("xai-",), r"xai-([A-Za-z0-9]{40,}+)"),
    _format("groq_key", ("gsk_",), r"gsk_([A-Za-z0-9]{40,}+)"),
    _format("perplexity_key", ("pplx-",), r"pplx-([A-Za-z0-9]{40,}+)"),
    _format("nvidia_key", ("nvapi-",), r"nvapi-([A-Za-z0-9_-]{40,}+)"),
    _format("replicate_key", ("r8_",), rf"r8_([A-Za-z0-9]{{37}}){_END}"),
    _format("npm_token", ("npm_",), rf"npm_([A-Za-z0-9]{{36}}){_END}"),
    _format("sendgrid_key", ("SG.",), rf"SG\.([A-Za-z0-9_-]{{22}}\.[A-Za-z0-9_-]{{43}}){_END}"),
    _format("slack_token", ("xox",), r"xox[abeoprs]-([A-Za-z0-9-]{16,}+)"),
    _format("slack_token", ("xapp-",), r"xapp-([A-Za-z0-9-]{16,}+)"),
    _format("slack_webhook", ("hooks.slack.com/",), r"hooks\.slack\.com/services/(T\w{8,16}/B\w{8,16}/\w{20,32})"),
    _format("stripe_key", ("sk_", "rk_"), r"(?:sk|rk)_(?:live|test)_([A-Za-z0-9]{16,}+)"),
    _format("stripe_key", ("whsec_",), r"whsec_([A-Za-z0-9+/]{32,}+)"),
    # The vendor's documentation writes its example with this ending.
    _format("aws_key_id", ("AKIA", "ASIA"), rf"A[KS]IA(?![A-Z0-9]{{9}}EXAMPLE)[A-Z2-7]{{16}}{_END}", random=False),
)
"""A kind of several formats has several entries."""
_HINTS: Final = tuple((hint, each) for each in _FORMATS for hint in each.hints)

KINDS: Final = (
    "private_key",
    *dict.fromkeys(each.kind for each in _FORMATS),
    "aws_secret",
    "jwt",
    "url_credentials",
    "bearer_token",
    "assigned_secret",
)
"""All kinds, the telling ones first: where matches overlap, the first names them."""


def find_secrets(text: str) -> list[Found]:
    """Secrets in a text, in order; none overlap."""
    longest = max(map(len, text.split()), default=0)  # a pass over the words is cheaper than one for each format
    detectors = _DETECTORS if longest >= SHORTEST_KEY else _DETECTORS_OF_SHORT
    found = [one for detect in detectors for one in detect(text)]
    return merge(found, KINDS) if found else []


def looks_random(value: str, least: float = MIN_ENTROPY) -> bool:
    """Whether a value has `least` bits of Shannon entropy a character, and characters of two kinds out of small
    letters, capitals and digits: placeholders and words have not."""
    kinds = sum(any(low <= c <= high for c in value) for low, high in ("az", "AZ", "09"))
    return kinds >= 2 and entropy(value) >= least


def entropy(value: str) -> float:
    """Shannon entropy of a text's characters in bits; 0 for an empty text."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


# ---------------------------------------------------------------------------------------------- known by a prefix


def _known_formats(text: str) -> Iterator[Found]:
    for hint, each in _HINTS:
        for match in each.pattern.finditer(text) if hint in text else ():
            if not each.random or looks_random(match[1][:LONGEST_VALUE]):
                yield Found(each.kind, match.start(), match.end())


_AWS_ID: Final = next(each.pattern for each in _FORMATS if each.kind == "aws_key_id")
_AWS_SECRET: Final = re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")


def _aws_secrets(text: str) -> Iterator[Found]:
    """What has the form of an AWS secret, beside a key id."""
    if "AKIA" not in text and "ASIA" not in text:
        return
    ids = [match.start() for match in _AWS_ID.finditer(text)]
    for match in _AWS_SECRET.finditer(text) if ids else ():
        nearest = bisect.bisect_left(ids, match.start() - NEAR_CHARS)
        near = nearest < len(ids) and ids[nearest] <= match.end() + NEAR_CHARS
        if near and looks_random(match[0]):
            yield Found("aws_secret", match.start(), match.end())


_PEM_BEGIN: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END: Final = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_BODY: Final = re.compile(r"[A-Za-z0-9+/=\s\\]*+")
_PEM_LINE: Final = re.compile(r"[A-Za-z0-9+/=]{24}")


def _private_keys(text: str) -> Iterator[Found]:
    """PEM blocks; one without an end reaches as far as it can be a key."""
    if "PRIVATE KEY" not in text:
        return
    begins = [match.span() for match in _PEM_BEGIN.finditer(text)]
    ends = [match.end() for match in _PEM_END.finditer(text)]
    nexts = [*(start for start, _ in begins), len(text)][1:]
    for (start, head), before in zip(begins, nexts, strict=True):
        after = bisect.bisect_right(ends, head)
        body = _PEM_BODY.match(text, head)
        end = ends[after] if after < len(ends) and ends[after] <= before else body.end() if body else head
        if _PEM_LINE.search(text, head, end):
            yield Found("private_key", start, end)


# It cannot begin inside a run of its own characters: from each such place the run would be read again.
_JWT: Final = re.compile(
    r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))(eyJ[A-Za-z0-9_-]{10,}+)\.eyJ[A-Za-z0-9_-]{10,}+\.[A-Za-z0-9_-]{10,}+"
)


def _jwts(text: str) -> Iterator[Found]:
    for match in _JWT.finditer(text) if "eyJ" in text else ():
        head = match[1][:LONGEST_VALUE]
        try:
            header = base64.urlsafe_b64decode(head[: len(head) // 4 * 4])
        except (binascii.Error, ValueError):
            continue
        if b'"alg"' in header:
            yield Found("jwt", match.start(), match.end())


# ---------------------------------------------------------------------------------------------- known by their place

_USER_INFO: Final = re.compile(r"[^\s/?#@:<>\[\]{}\"'`]{0,64}:([^\s/?#@<>\[\]{}\"'`]{1,200})(?=@[A-Za-z0-9\[])")
_PLACEHOLDERS: Final = frozenset(
    {"pass", "passwd", "password", "pwd", "pw", "secret", "token", "key", "changeme", "example", "port"}
)


def _url_credentials(text: str) -> Iterator[Found]:
    """`user:password` between `://` and `@`."""
    at = text.find("://")
    while at >= 0:
        match = _USER_INFO.match(text, at + 3)
        if match is not None and not _is_placeholder(match[1]):
            yield Found("url_credentials", match.start(), match.end())
        at = text.find("://", at + 3)


def _is_placeholder(password: str) -> bool:
    word = password.lower().strip("_-.0123456789").removeprefix("your").strip("_-")
    return password[0] in "$%*" or set(password) <= set("xX.*") or word in _PLACEHOLDERS


_BEARER: Final = re.compile(r"(?i:\bbearer)[ \t]{1,5}([A-Za-z0-9_.~+/-]{20,}+=*+)")


def _bearer_tokens(text: str) -> Iterator[Found]:
    for match in _BEARER.finditer(text) if "earer" in text or "BEARER" in text else ():
        if _is_key(match[1]):
            yield Found("bearer_token", *match.span(1))


_NAME: Final = (
    r"(?i:(?:api|app|auth|access|account|client|consumer|encryption|master|private|secret|signing|storage)[_. -]?key"
    r"|token|secret|password|passwd|pwd)"
)
_ASSIGNED: Final = re.compile(
    _NAME + r"[\"'`]?[ \t]{0,5}(?::=|=>|=|:)[ \t]{0,5}([\"'`]?)([A-Za-z0-9_+/.~-]{16,}+=*+)(?=(.?))"
)
_NAME_HINTS: Final = ("key", "token", "secret", "passw", "pwd")
_IDENTIFIERS: Final = re.compile(r"[_.-]")
_DIGIT_LETTER: Final = re.compile(r"[0-9][A-Za-z]")


def _assigned_secrets(text: str) -> Iterator[Found]:
    """`api_key = "…"`, `"token": "…"`, `SECRET_KEY=…`: a value that looks like a key beside a name that says so."""
    lower = text.lower()
    if not any(hint in lower for hint in _NAME_HINTS):
        return
    for match in _ASSIGNED.finditer(text):
        quote, value, after = match[1], match[2], match[3]
        ended = after == quote if quote else after not in ("(", "[")
        if ended and _is_key(value):
            yield Found("assigned_secret", *match.span(2))


def _is_key(value: str) -> bool:
    """Whether a value is rather a key than an identifier, a path or a number: a part of it of 12 characters or more
    has two digits and goes on with a letter behind one, and the whole looks random."""
    head = value[:LONGEST_VALUE]
    parts = (part for part in _IDENTIFIERS.split(head) if len(part) >= 12)
    mixed = any(_DIGIT_LETTER.search(part) and sum(map(str.isdigit, part)) >= 2 for part in parts)
    return mixed and not head.startswith(("/", "~", "./", "../")) and looks_random(head)


_DETECTORS: Final[tuple[Callable[[str], Iterator[Found]], ...]] = (
    _private_keys,
    _known_formats,
    _aws_secrets,
    _jwts,
    _url_credentials,
    _bearer_tokens,
    _assigned_secrets,
)
_DETECTORS_OF_SHORT: Final = (_url_credentials,)
