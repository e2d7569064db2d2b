"""Which texts hold personal data of a form that can be checked, and which only look as if they did."""

from __future__ import annotations

import pytest

from pipeline.text.personal import COUNTRY_CODES, KINDS, find_personal, luhn

# Nobody's: numbers that banks and regulators publish as examples, and domains that are no mail hosts. In pieces, so
# that no scanner takes this file for a leak.
PERSONAL = {
    "email": [
        "jane.doe" + "@gmail.com",
        "j+list_2" + "@mail.uni-town.ac.uk",
        "O'Neill" + "@host.museum",
        "a" + "@xn--bcher-kva.ch",
        "first" + "@sub.xn--p1ai",
    ],
    "ip_address": [
        "93.184." + "216.34",
        "2a00:1450:" + "4001:82a::200e",
        "2606:4700:4700:0:0:0:0:" + "64",
        "2a00:1:2::",
    ],
    "phone": [
        "+44 20 " + "7946 0958",
        "+44 (0)20 " + "7946 0958",
        "+1 (415) " + "867-5309",
        "+4930" + "123456",
        "+86-138-" + "0013-8000",
    ],
    "payment_card": [
        "4111 1111 " + "1111 1111",
        "5555-5555-" + "5555-4444",
        "378282" + "246310005",
        "3782 822463 " + "10005",
        "6011" + "111111111117",
        "3056 930902 " + "5904",
        "2223003" + "122003222",
        "3530111" + "333300000",
        "6200000" + "000000005",
    ],
    "iban": [
        "DE89 3704 0044 " + "0532 0130 00",
        "GB82WEST" + "12345698765432",
        "NO93 8601 " + "1117 947",
        "MT84MALT" + "011000012345MTLCAST001S",
    ],
    "us_ssn": ["536-22-" + "4417"],
}
AROUND = ("{}", "it is {}.", "({})", '"{}"', "a: {}, b", "x\n{}\ny", "<{}>")


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_found_as_what_it_is_and_as_a_whole(kind: str, text: str, around: str) -> None:
    whole = around.format(text)
    assert [(one.kind, whole[one.start : one.end]) for one in find_personal(whole)] == [(kind, text)]


def test_every_kind_is_in_the_table() -> None:
    assert set(PERSONAL) == set(KINDS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Natalia sold 48 clips in April 2024, 1,234,567 in all, at $3.50 each: 48/2 = 24.",
        # e-mail: reserved domains, clone URLs, code, handles
        "jane@example.com, a@sub.example.org, b@host.test, root@localhost, c@db.internal",
        "git@github.com:org/repo.git",
        "A@B.T @app.route('/') x@w.sum() @user@ a@b",
        ".@host.com and ..@host.com and a..b@host.com",
        # IP addresses: private, reserved, versions, name servers, times, names in code
        "10.0.0.1 192.168.1.1 127.0.0.1 172.16.0.1 169.254.1.1 203.0.113.7 0.0.0.0 255.255.255.255 224.0.0.251",
        "8.8.8.8 and 1.1.1.1",
        "version 93.184.216.34, v93.184.216.34, package==93.184.216.34, section 11.12.13.14, 11.12.13.14.15",
        "300.1.2.3 and 1.2.3 and 93.184.216.340 and 93.184.216.034",
        "fe80::1 ::1 2001:db8::1 fd00::1 12:30:45 aa:bb:cc:dd:ee:ff std::vector a::b dead::beef",
        # phones: no country code, too short, unassigned, fiction, sums
        "020 7946 0958 and (415) 867-5309 and 0049 30 123456",
        "+44 20 794 and +999 123 456 789 and +1 234 567",
        "+1 (415) 555-0123",
        "12+34567890123 and x +1234 + 5678 and a++4912345678",
        # cards: wrong checksum, no issuer, tables, longer numbers
        "4111 1111 1111 1112 and 1234 5678 9012 3452 and 0000 0000 0000 0000",
        "4111 1111 1111 1111 2222 3333 and 41 11 11 11 11 11 11 11",
        "id 41111111111111110000 and x4111111111111111 and 0.4111111111111111",
        # IBAN: wrong checksum, wrong length, unknown country
        "DE89 3704 0044 0532 0130 01 and DE89 3704 0044 0532 0130 and ZZ89 3704 0044 0532 0130 00",
        "ISBN 978-3-16-148410-0 and AB12 CD34 EF56 GH78",
        # SSN: never issued
        "000-12-3456 666-12-3456 900-12-3456 536-00-4417 536-22-0000 123-45-6789 078-05-1120",
        "536-22-44170 and 1536-22-4417 and 2024-10-2024",
    ],
)  # fmt: skip
def test_near_misses(text: str) -> None:
    assert [(one.kind, text[one.start : one.end]) for one in find_personal(text)] == []


def test_an_address_is_found_with_what_stands_before_it_left_out() -> None:
    text = "mailto:jane" + "@gmail.com, '{jane" + "@gmail.com}'"
    assert [text[one.start : one.end] for one in find_personal(text)] == ["jane" + "@gmail.com"] * 2


def test_an_iban_ends_where_its_country_says() -> None:
    text = "IBAN DE89 3704 0044 " + "0532 0130 00 BIC COBADEFF"
    assert [text[one.start : one.end] for one in find_personal(text)] == [PERSONAL["iban"][0]]


def test_the_checksum_of_cards() -> None:
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{last}") for last in "012456789")


def test_country_codes_are_unambiguous() -> None:
    """None is the beginning of another, else one of them would never be read."""
    assert not [
        (one, other) for one in COUNTRY_CODES for other in COUNTRY_CODES if one != other and other.startswith(one)
    ]
