"""The outbound guard on texts made of secrets, personal data, pieces of them and words around them."""

from __future__ import annotations

import base64
import random
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.core.config_outbound import OutboundConfig
from pipeline.core.record import Message
from pipeline.text.found import redact
from pipeline.text.outbound import Checked, Guard
from pipeline.text.personal import find_personal
from pipeline.text.secrets import find_secrets
from tests.examples import examples

WORD = string.ascii_letters + string.digits


def drawn(length: int) -> str:
    """Text that looks like a key's; made here, so that no scanner takes this file for a leak."""
    return "".join(random.Random(length).choices(WORD, k=length))


JWT_HEAD = base64.urlsafe_b64encode(b'{"alg":"HS256"}').decode().rstrip("=")
WHOLE = [
    "sk-" + "ant-api03-" + drawn(60),
    "gh" + "p_" + drawn(36),
    "AKI" + "A" + "ABCDEFGHIJKLMNOP",
    drawn(40),
    f"{JWT_HEAD}.{JWT_HEAD}.{drawn(43)}",
    "-----BEGIN PRIVATE KEY-----\n" + drawn(64) + "\n-----END PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----" + drawn(64),
    "redis://jane:" + drawn(9) + "@db:1",
    "token=" + drawn(24),
    "jane" + "@gmail.com",
    "93.184." + "216.34",
    "2a00:1450:4001:" + "82a::200e",
    "+44 20 7946 0958",
    "4111 1111 " + "1111 1111",
    "DE89 3704 0044 " + "0532 0130 00",
    "536-22-" + "4417",
]
PIECES = [
    *("sk-", "ant-", "AKIA", "eyJ", ".", "://", ":", "@", "+", "-", " ", "\\n", "\n", "=", '"', "4", "4111 ", "DE89"),
    *("::", "1.2.3", "token", "password: ", "bearer ", "PRIVATE KEY", "-----BEGIN PRIVATE KEY-----"),
    *("-----END PRIVATE KEY-----", "gmail.com", "ü", "[", "]", "\ud800"),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from([*WHOLE, *PIECES]) | st.text(max_size=8), max_size=12).map("".join)


@pytest.mark.parametrize("detect", [find_secrets, find_personal])
class TestRedaction:
    @examples(200)
    @given(text=TEXTS)
    def test_nothing_is_found_in_what_is_left(self, detect, text: str) -> None:
        assert detect(redact(text, detect)[0]) == []

    @examples(200)
    @given(text=TEXTS)
    def test_twice_is_once(self, detect, text: str) -> None:
        once, _ = redact(text, detect)
        assert redact(once, detect) == (once, [])

    @examples(200)
    @given(text=TEXTS)
    @example(text="A child has 12 marbles, 3 of them red.")
    def test_it_changes_a_text_exactly_where_something_is_found(self, detect, text: str) -> None:
        redacted, kinds = redact(text, detect)
        assert (redacted == text) is (kinds == []) is (detect(text) == [])

    @examples(100)
    @given(text=TEXTS)
    def test_matches_are_in_order_and_apart(self, detect, text: str) -> None:
        found = detect(text)
        ends = [0, *(one.end for one in found)]
        assert all(end <= one.start < one.end <= len(text) for end, one in zip(ends, found, strict=False))


class TestGuard:
    MESSAGES = st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXTS, st.none() | TEXTS), max_size=3
    ).map(tuple)
    ACTIONS = st.sampled_from(["block", "redact", "off"])
    POLICIES = st.builds(OutboundConfig, secrets=ACTIONS, personal=ACTIONS)

    @staticmethod
    def texts(checked: Checked) -> list[str]:
        return [text for turn in checked.messages for text in (turn.content, turn.reasoning_content or "")]

    @examples(200)
    @given(messages=MESSAGES, policy=POLICIES)
    def test_nothing_that_is_looked_for_is_left_in_any_turn(self, messages, policy: OutboundConfig) -> None:
        checked = Guard(policy).check(messages)
        for text in self.texts(checked):
            assert policy.secrets == "off" or find_secrets(text) == []
            assert policy.personal == "off" or find_personal(text) == []

    @examples(200)
    @given(messages=MESSAGES, policy=POLICIES)
    def test_a_prompt_without_matches_is_as_it_was(self, messages, policy: OutboundConfig) -> None:
        checked = Guard(policy).check(messages)
        assert (checked.messages == messages) is (checked.kinds == ())
        assert checked.reason is None or checked.kinds

    @examples(200)
    @given(messages=MESSAGES)
    def test_only_block_blocks(self, messages) -> None:
        redacted = Guard(OutboundConfig(secrets="redact", personal="redact")).check(messages)
        blocked = Guard(OutboundConfig(secrets="block", personal="block")).check(messages)
        assert redacted.reason is None
        assert (blocked.messages, blocked.kinds) == (redacted.messages, redacted.kinds)
        assert blocked.reason == (f"outbound:{blocked.kinds[0]}" if blocked.kinds else None)


# ------------------------------------------------------------------------------------------- long and hostile texts

MEGABYTE = 1_000_000
UNITS = [
    *("a", "A", "1", " ", ".", "-", ":", "@", "/", "+", "=", "\n", "\\n", "a.", "a-", "aB3", "1 ", "1-", "1.", "1:"),
    *("a@", "@a.", "a@b.", "a@b.c ", "@@a.aa", "://", "://a:", "://a:b@", "a://" + "b" * 64 + ":" + "c" * 200 + " "),
    *("sk-", "sk-ant-", "sk-ant-" + drawn(19) + " ", "sk-" + drawn(31) + " ", "AIza", "hf_", "ghp_", "xoxb-"),
    *("SG.", "SG." + drawn(22) + ".", "AKIA", "AKIA" + "B" * 16 + " ", "AKIA" + "B" * 16 + drawn(40)),
    *("eyJ", "eyJ-", "eyJ" + drawn(20) + ".", JWT_HEAD + "." + JWT_HEAD + "."),
    *("-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----" + drawn(30)),
    *("-----END PRIVATE KEY-----", "PRIVATE KEY", "bearer ", "bearer " + drawn(19) + " "),
    *("token", "token=", "token=" + "a" * 15 + " ", 'password: "', "api_key", "api_key = '" + drawn(16)),
    *("1.1.1.1", "93.184.216.34.", "::", "1::", "2a00:", "ffff:1 ", "+1", "+1 ", "+44 20 7946 0958 9 "),
    *("4111 ", "4111-1111-1111-1112 ", "4111111111111112 ", "111-11-", "536-22-44170 "),
    *("GB82 ", "GB82", "DE89 3704 ", "AA00" + " " * 40),
]  # fmt: skip
"""Beginnings of matches that come to nothing, again and again: what makes a careless pattern quadratic."""


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_takes_one_pass(unit: str) -> None:
    """A scan that were quadratic would end in the test's timeout: 10^12 steps."""
    text = (unit * (MEGABYTE // len(unit) + 1))[:MEGABYTE]
    for detect in (find_secrets, find_personal):
        detect(text + "\0")


@examples(3)
@given(units=st.lists(st.sampled_from(UNITS), min_size=2, max_size=4))
def test_a_mixture_takes_one_pass_too(units: list[str]) -> None:
    text = "".join(units) * (MEGABYTE // 4 // len("".join(units)))
    for detect in (find_secrets, find_personal):
        detect(text)
