"""Finds personal data that has a form of its own and can be checked, in time linear in the text.

Not found: names, postal addresses, dates of birth, numbers of identity papers, phone numbers without `+` and country
code, and whatever is spelt out ("jane at host dot org") or split. Found, though it belongs to nobody: card numbers
that payment providers publish for tests, since their checksum is right.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Final

from pipeline.text.found import Found, merge

KINDS: Final = ("email", "iban", "payment_card", "us_ssn", "phone", "ip_address")
"""All kinds; where matches overlap, the first names them."""


def find_personal(text: str) -> list[Found]:
    """Personal data in a text, in order; none overlap."""
    found = [one for detect in _DETECTORS for one in detect(text)]
    return merge(found, KINDS) if found else []


# ------------------------------------------------------------------------------------------------ e-mail addresses

_LOCAL_REVERSED: Final = re.compile(r"[A-Za-z0-9!#$%&*+/=?^_`{|}~.'-]{1,65}+")
_DOMAIN: Final = re.compile(
    r"(?:[A-Za-z0-9-]{1,63}+\.){1,8}(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{2,59})(?![A-Za-z0-9_(-]|\.[A-Za-z0-9])"
)
_QUOTES: Final = "'`{|}=/*!?"
"""Legal in front of an address, but a quotation mark, a bracket or a link more often."""
RESERVED_DOMAINS: Final = ("example.com", "example.net", "example.org", "example.edu")
RESERVED_ENDINGS: Final = frozenset({"example", "invalid", "localhost", "local", "test", "internal"})
"""No mailbox can lie there (RFC 2606, 6761, 6762, 9476), so an address in them is nobody's."""


def _emails(text: str) -> Iterator[Found]:
    """Unquoted addresses of RFC 5321 in ASCII, without those under reserved domains, the user `git` of clone URLs, and
    calls such as `A@B.sum()`."""
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        before = _LOCAL_REVERSED.match(text[max(0, at - 65) : at][::-1]) if domain is not None else None
        if domain is not None and before is not None:
            local = before[0][::-1].lstrip(_QUOTES + ".")
            if _is_local_part(local) and not _is_reserved(domain[0].lower()):
                yield Found("email", at - len(local), domain.end())
        at = text.find("@", at + 1)


def _is_local_part(local: str) -> bool:
    return 1 <= len(local) <= 64 and local != "git" and ".." not in local and not local.endswith(".")


def _is_reserved(domain: str) -> bool:
    inside = any(domain == one or domain.endswith("." + one) for one in RESERVED_DOMAINS)
    return inside or domain.rpartition(".")[2] in RESERVED_ENDINGS


# ---------------------------------------------------------------------------------------------------- IP addresses

_IPV4: Final = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", re.ASCII)
_IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{6,40}+(?![\w:])")
_VERSION_WORDS: Final = ("version", "release", "section", "chapter", "ver.", "sec.", "§", "v.", "==", ">=", "<=")
RESOLVERS: Final = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"})
"""Public name servers, which examples are full of."""
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_DOCUMENTATION: Final = ipaddress.IPv6Network("2001:db8::/32")


def _ip_addresses(text: str) -> Iterator[Found]:
    """Public addresses: no private, reserved or documentation networks, no name servers, no version numbers."""
    for match in _IPV4.finditer(text) if text.count(".") >= 3 else ():
        before = text[max(0, match.start() - 12) : match.start()].rstrip().lower()
        if _is_public_ipv4(match[0]) and not before.endswith(_VERSION_WORDS):
            yield Found("ip_address", match.start(), match.end())
    for match in _IPV6.finditer(text) if text.count(":") >= 2 else ():
        address = match[0] if match[0].endswith("::") else match[0].removesuffix(":")
        if _is_public_ipv6(address):
            yield Found("ip_address", match.start(), match.start() + len(address))


def _is_public_ipv4(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and text not in RESOLVERS


def _is_public_ipv6(text: str) -> bool:
    """Three groups at least: `a::b` is a name in C++ and Rust."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    groups = sum(group != "" for group in text.split(":"))
    return groups >= 3 and address in _GLOBAL_UNICAST and address not in _DOCUMENTATION


# --------------------------------------------------------------------------------------------------- phone numbers

_PHONE: Final = re.compile(r"(?<![\w+])\+(?=[1-9])\d(?:[ .()/-]{0,2}\d){7,14}(?!\w)", re.ASCII)
_NOT_DIGITS: Final = re.compile(r"\D")
_NANP: Final = re.compile(r"1[2-9]\d\d[2-9]\d{6}")
_FICTION: Final = re.compile(r"1\d{3}55501\d\d")
_CODES: Final = """
    1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82 84
    86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 232 233 234 235 236
    237 238 239 240 241 242 243 244 245 246 247 248 249 250 251 252 253 254 255 256 257 258 260 261 262 263 264 265
    266 267 268 269 290 291 297 298 299 350 351 352 353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 378
    379 380 381 382 383 385 386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 591 592 593 594 595
    596 597 598 599 670 672 673 674 675 676 677 678 679 680 681 682 683 685 686 687 688 689 690 691 692 850 852 853
    855 856 880 886 960 961 962 963 964 965 966 967 968 970 971 972 973 974 975 976 977 979 992 993 994 995 996 998
"""
COUNTRY_CODES: Final = frozenset(_CODES.split())
"""Country codes that ITU-T E.164 assigns to places."""


def _phones(text: str) -> Iterator[Found]:
    """International numbers (`+`, country code, 8 to 15 digits); not those kept for fiction (555-01xx in +1)."""
    for match in _PHONE.finditer(text) if "+" in text else ():
        digits = _NOT_DIGITS.sub("", match[0])
        assigned = any(digits[:length] in COUNTRY_CODES for length in (1, 2, 3))
        if assigned and (digits[0] != "1" or (_NANP.fullmatch(digits) and not _FICTION.fullmatch(digits))):
            yield Found("phone", match.start(), match.end())


# ------------------------------------------------------------------------------------------- cards, accounts, SSN

_CARD: Final = re.compile(
    r"(?<![\w.])(?<!\d[ -])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{4,5})(?!\w)(?![ -]\d{4})",
    re.ASCII,
)
"""In one piece, in four groups of four, or 4-6-5 and 4-6-4; more groups than that are a table of numbers."""
_ISSUERS: Final = (
    (re.compile(r"4"), (13, 16, 19)),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"6011|64[4-9]|65"), (16, 17, 18, 19)),  # Discover
    (re.compile(r"36|38|39|30[0-5]"), (14,)),  # Diners Club
    (re.compile(r"352[89]|35[3-8]"), (16, 17, 18, 19)),  # JCB
    (re.compile(r"62"), (16, 17, 18, 19)),  # UnionPay
)


def _payment_cards(text: str) -> Iterator[Found]:
    """Numbers of 13 to 19 digits in the groups of a card, with an issuer's prefix and length and a right checksum."""
    for match in _CARD.finditer(text):
        digits = _NOT_DIGITS.sub("", match[0])
        if _has_issuer(digits) and luhn(digits):
            yield Found("payment_card", match.start(), match.end())


def _has_issuer(digits: str) -> bool:
    return any(prefix.match(digits) and len(digits) in lengths for prefix, lengths in _ISSUERS)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812-1."""
    doubled = (int(d) * 2 if at % 2 else int(d) for at, d in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


_IBAN: Final = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})[0-9]{2}(?= ?[A-Z0-9]{3})")
_IBAN_LENGTHS: Final = {
    length: frozenset(countries.split())
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
}  # fmt: skip
"""Characters of an IBAN -> its countries (registry of ISO 13616)."""


def _ibans(text: str) -> Iterator[Found]:
    """IBANs in one piece or in groups, of their country's length, whose remainder is 1 (ISO 7064, mod 97-10)."""
    for match in _IBAN.finditer(text):
        length = next((n for n, countries in _IBAN_LENGTHS.items() if match[1] in countries), None)
        end = None if length is None else _end_of(text, match.start(), length)
        if end is not None and _remainder(text[match.start() : end].replace(" ", "")) == 1:
            yield Found("iban", match.start(), end)


def _end_of(text: str, start: int, length: int) -> int | None:
    """Where `length` characters that are no spaces end; None if the text or the word does not end so."""
    at, left = start, length
    while left > 0 and at < min(len(text), start + 2 * length):
        left -= text[at] != " "
        at += 1
    return at if left == 0 and not text[at : at + 1].isalnum() else None


def _remainder(iban: str) -> int:
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 if iban.isascii() and iban.isalnum() else 0


_SSN: Final = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)", re.ASCII)
_KNOWN_SSN: Final = frozenset({"078-05-1120", "219-09-9999", "123-45-6789"})
"""Printed in advertisements, and the one everybody makes up: nobody's."""


def _us_ssns(text: str) -> Iterator[Found]:
    for match in _SSN.finditer(text) if text.count("-") >= 2 else ():
        if match[0] not in _KNOWN_SSN:
            yield Found("us_ssn", match.start(), match.end())


_DETECTORS: Final[tuple[Callable[[str], Iterator[Found]], ...]] = (
    _emails,
    _ibans,
    _payment_cards,
    _us_ssns,
    _phones,
    _ip_addresses,
)
