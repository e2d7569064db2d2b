"""Which texts hold secrets, and which only look as if they did."""

from __future__ import annotations

import base64
import random
import string

import pytest

from pipeline.text.found import Found, merge, redact, replace
from pipeline.text.secrets import KINDS, entropy, find_secrets, looks_random

WORD = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


def drawn(length: int, alphabet: str = WORD) -> str:
    """Text that looks like a key's; made here, so that no scanner takes this file for a leak."""
    return "".join(random.Random(length).choices(alphabet, k=length))


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def pem(kind: str = "RSA ", *, newline: str = "\n", end: bool = True) -> str:
    lines = [f"-----BEGIN {kind}PRIVATE KEY-----", drawn(64), drawn(64), *([f"-----END {kind}PRIVATE KEY-----"] * end)]
    return newline.join(lines)


AWS_ID = "AKI" + "A" + drawn(16, string.ascii_uppercase + "234567")
AWS_SECRET = drawn(40, WORD + "/+")
JWT = ".".join([encoded('{"alg":"HS256","typ":"JWT"}'), encoded('{"sub":"1234567890"}'), drawn(43)])

SECRETS = {
    "anthropic_key": ["sk-" + "ant-api03-" + drawn(93, WORD + "-_") + "AA"],
    "openrouter_key": ["sk-" + "or-v1-" + drawn(64, HEX)],
    "openai_key": [
        "sk-" + drawn(20) + "T3Blbk" + "FJ" + drawn(21),
        "sk-" + drawn(32, HEX),
        "sk-" + "proj-" + drawn(120, WORD + "-_"),
        "sk-" + "svcacct-" + drawn(80, WORD + "-_"),
    ],
    "google_key": ["AI" + "za" + drawn(35, WORD + "-_"), "GOC" + "SPX-" + drawn(28, WORD + "-_")],
    "huggingface_token": ["h" + "f_" + drawn(34, string.ascii_letters), "api_" + "org_" + drawn(34)],
    "github_token": [
        *(f"gh{kind}" + "_" + drawn(36) for kind in "pousr"),
        "github_" + "pat_" + drawn(22) + "_" + drawn(59),
    ],
    "gitlab_token": ["gl" + "pat-" + drawn(20)],
    "xai_key": ["x" + "ai-" + drawn(80)],
    "groq_key": ["g" + "sk_" + drawn(52)],
    "perplexity_key": ["p" + "plx-" + drawn(48)],
    "nvidia_key": ["nv" + "api-" + drawn(64, WORD + "-_")],
    "replicate_key": ["r" + "8_" + drawn(37)],
    "npm_token": ["np" + "m_" + drawn(36)],
    "sendgrid_key": ["S" + "G." + drawn(22) + "." + drawn(43)],
    "slack_token": [
        "xo" + "xb-1234567890-1234567890-" + drawn(24),
        "xa" + "pp-1-A0B1C2D3E-1234567890-" + drawn(40, HEX),
    ],
    "slack_webhook": ["hooks.slack" + ".com/services/T0" + drawn(9) + "/B0" + drawn(9) + "/" + drawn(24)],
    "stripe_key": ["sk" + "_live_" + drawn(24), "rk" + "_test_" + drawn(24), "wh" + "sec_" + drawn(32)],
    "aws_key_id": [AWS_ID, "ASI" + AWS_ID[3:]],
    "private_key": [pem(), pem(""), pem("ENCRYPTED "), pem(newline="\\n")],
    "jwt": [JWT],
}
"""Kind -> tokens that are found wherever they stand."""

AROUND = (
    "{}",
    "use {} for this",
    "key={}",
    '"{}"',
    "({}).",
    "it is:{}\n",
    "`{}`",
    'in JSON: "first\\n{}"',
    "{}, or not",
)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("kind", "secret"), [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]
)
def test_a_token_is_found_as_what_it_is_and_as_a_whole(kind: str, secret: str, around: str) -> None:
    text = around.format(secret)
    (found,) = find_secrets(text)
    assert (found.kind, text[found.start : found.end].strip()) == (kind, secret)


PLACED = {
    "aws_secret": [
        (f"{AWS_ID} {{}}", AWS_SECRET),
        (f"id {AWS_ID}\nsecret {{}}\n", AWS_SECRET),
        (f"{{}} / {AWS_ID}", AWS_SECRET),
    ],
    "url_credentials": [
        ("postgresql://{}@db.internal:5432/prod", "app:" + drawn(12)),
        ("git clone https://{}@git.internal/x.git", "jane:hunter2"),
        ("redis://{}@10.0.0.1", ":" + drawn(9)),
    ],
    "bearer_token": [("curl -H 'Authorization: Bearer {}' x", drawn(40)), ("authorization: bearer {}", drawn(32, HEX))],
    "assigned_secret": [
        ('api_key = "{}"', drawn(32)),
        ("API_KEY={}", drawn(32, HEX)),
        ('"clientSecret": "{}",', drawn(40, WORD + "-_")),
        ("export MY_ACCESS_TOKEN={} && run", drawn(24)),
        ("password: '{}'", drawn(20)),
        ("secret_key := `{}`", drawn(43, WORD + "/+") + "="),
        ("AWS_SECRET_ACCESS_KEY={}", AWS_SECRET),
        ("storage key: {}", drawn(700, WORD)),
    ],
}
"""Kind -> (text, secret): secrets that are known by what stands beside them."""


@pytest.mark.parametrize(
    ("kind", "text", "secret"), [(kind, *pair) for kind, pairs in PLACED.items() for pair in pairs]
)
def test_a_secret_is_found_by_its_place(kind: str, text: str, secret: str) -> None:
    text = text.format(secret)
    assert [text[one.start : one.end] for one in find_secrets(text) if one.kind == kind] == [secret]


def test_every_kind_is_in_the_tables() -> None:
    assert {*SECRETS, *PLACED} == {*KINDS}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Natalia sold 48 clips in April, and then half as many in May.",
        "the task-oriented desk-bound risk-averse disk-1234567890123456789012345678901234567890",
        "sk-" + "ant-your-api-key-goes-here-please",
        "sk-" + "proj-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "sk-" + "X" * 48,
        "sk-" + "ab1" * 16,
        "sk-" + drawn(20),
        "sk-learn-contrib-is-a-collection-of-packages-for-machine-learning",
        "hf_" + "transfer is faster than hf_hub_download_with_resume_and_retries",
        "h" + "f_" + "a" * 34,
        "gh" + "p_" + drawn(35),
        "AI" + "za" + drawn(36),
        "AI" + "za" + drawn(34),
        "AKI" + "AIOSFODNN7EXAMPLE",
        "AKI" + "A" + drawn(17, string.ascii_uppercase),
        AWS_SECRET,
        "what does -----BEGIN PRIVATE KEY----- mean, and -----END PRIVATE KEY-----?",
        "-----BEGIN PUBLIC KEY-----\n" + drawn(64) + "\n-----END PUBLIC KEY-----",
        ".".join(["eyJ" + drawn(20), "eyJ" + drawn(20), drawn(43)]),
        JWT.rpartition(".")[0],
        "postgres://user:password@localhost/db",
        "https://user:${PASSWORD}@host/ and https://user:<token>@host/ and https://user:****@host/",
        "http://localhost:8080/@scope/package and https://medium.com/@user:name",
        "see https://host:443/a?user=b@c",
        "Authorization: Bearer YOUR_ACCESS_TOKEN_GOES_HERE",
        "the bearer internationalisation-specialist-of-2024",
        "api_key = os.environ['OPENAI_API_KEY']",
        "token = get_token_from_storage_account2(request1)",
        "token: tokenizer.apply_chat_template12345",
        "password: correct-horse-battery-staple",
        "key: " + drawn(32),
        "monkey = " + drawn(32),
        "tokens = 1234567890123456789012",
        "secret: /usr/local/lib/python3.11/site-packages",
        "password = '" + "Password12345678" + "'",
        "commit " + drawn(40, HEX) + " and sha256:" + drawn(64, HEX),
        "id 123e4567-e89b-12d3-a456-426614174000",
    ],
)
def test_near_misses(text: str) -> None:
    assert [(one.kind, text[one.start : one.end]) for one in find_secrets(text)] == []


def test_a_secret_far_from_the_key_id_is_any_text() -> None:
    text = AWS_ID + " word" * 60 + " " + AWS_SECRET
    assert [one.kind for one in find_secrets(text)] == ["aws_key_id"]


def test_a_private_key_ends_before_the_next_begins() -> None:
    text = f"a header such as -----BEGIN PRIVATE KEY----- opens it:\n{pem()}\n, then {pem('EC ')} and the rest"
    assert [text[one.start : one.end] for one in find_secrets(text)] == [pem(), pem("EC ")]


def test_of_a_private_key_that_was_cut_nothing_stays() -> None:
    text = f"my key: {pem(end=False)}\n, and no more"
    assert [text[one.start : one.end].strip() for one in find_secrets(text)] == [pem(end=False)]


def test_what_two_formats_claim_is_one_match_named_by_the_more_telling() -> None:
    text = 'api_key = "' + SECRETS["github_token"][0] + '"'
    assert [one.kind for one in find_secrets(text)] == ["github_token"]


class TestRandomness:
    def test_entropy_in_bits(self) -> None:
        assert [entropy(text) for text in ("", "aaaa", "abab", "abcdabcd")] == [0, 0, 1, 2]

    def test_one_kind_of_character_is_a_word(self) -> None:
        assert not looks_random("abcdefghijklmnop")
        assert looks_random("abcdefghIJKLMNOP")


class TestMerging:
    def test_overlaps_become_one_under_the_first_kind(self) -> None:
        found = [Found("b", 5, 9), Found("a", 7, 12), Found("b", 12, 13), Found("a", 0, 2)]
        assert merge(found, ("a", "b")) == [Found("a", 0, 2), Found("a", 5, 12), Found("b", 12, 13)]

    def test_the_order_in_which_they_were_found_does_not_count(self) -> None:
        found = [Found("b", 5, 9), Found("a", 5, 9), Found("b", 8, 12), Found("a", 11, 20)]
        assert merge(found, ("a", "b")) == merge(found[::-1], ("a", "b")) == [Found("a", 5, 20)]


class TestRedaction:
    def test_each_match_gives_way_to_its_kind(self) -> None:
        assert replace("ab12cd34", [Found("x", 2, 4), Found("y", 6, 8)]) == "ab[REDACTED:x]cd[REDACTED:y]"

    def test_what_a_match_hid_is_found_behind_it(self) -> None:
        hidden = iter([[Found("x", 0, 1)], [Found("y", 12, 13)], []])
        assert redact("ab", lambda _: next(hidden)) == ("[REDACTED:x][REDACTED:y]", ["x", "y"])

    def test_a_text_that_always_shows_more_goes_as_a_whole(self) -> None:
        text, kinds = redact("a", lambda text: [Found("x", 0, 1)])
        assert (text, set(kinds)) == ("[REDACTED:text]", {"x"})
