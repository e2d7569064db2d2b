"""The tasks that the tiny models know: their facts, their prompts and the split of the facts.

A *fact* is the thing that must not leak from one split into another. Everything that gives it away shares its
`group_id`: both orders of a sum and its two subtractions, a number and its words, all questions about one set of
letters. The split is decided by the pipeline's own hash of that name, so the recipes, the prompt set and a run of the
pipeline always agree on what was held out.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.text.split import Split, split_of

VALIDATION_SHARE = 0.05
TEST_SHARE = 0.10
WORDS_SEED = 42
PAIRS_SEED = 12
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ROMAN = (
    (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One way to ask for a fact: what fills the slots of a template, and the answer."""

    group_id: str
    slots: tuple[str, ...]
    answer: str

    @property
    def split(self) -> Split:
        """The split that the fact belongs to."""
        return split_of(self.group_id, validation=VALIDATION_SHARE, test=TEST_SHARE)


@dataclass(frozen=True)
class Task:
    """A family of questions with one kind of answer."""

    name: str
    items: Callable[[], Iterator[Item]]
    templates: tuple[str, ...]


def in_words(number: int) -> str:
    """Spell a number from 0 to 999: `in_words(246) == "two hundred forty-six"`."""
    if number >= 100:
        rest = f" {in_words(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number >= 20:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    return ONES[number]


def in_roman(number: int) -> str:
    """Write a number from 1 to 999 in Roman numerals: `in_roman(46) == "XLVI"`."""
    out = ""
    for value, letters in ROMAN:
        out += letters * (number // value)
        number %= value
    return out


def made_up_words() -> list[str]:
    """Distinct random strings of three to five capital letters, always the same ones."""
    rng = random.Random(WORDS_SEED)
    words: dict[str, None] = {}
    while len(words) < 8000:
        length = rng.choices((3, 4, 5), weights=(1, 3, 4))[0]
        words["".join(rng.choices(ALPHABET, k=length))] = None
    return list(words)


def number_pairs() -> list[tuple[int, int]]:
    """Distinct random pairs of unequal numbers below 1,000, the smaller first, always the same ones."""
    rng = random.Random(PAIRS_SEED)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < 5000:
        top = rng.choice((99, 999, 999))
        low, high = sorted((rng.randint(0, top), rng.randint(0, top)))
        if low != high:
            pairs[low, high] = None
    return list(pairs)


def _sums() -> Iterator[Item]:
    for low in range(100):
        for high in range(low, 100):
            for a, b in {(low, high): None, (high, low): None}:
                yield Item(f"sum:{low}+{high}", (str(a), str(b)), str(a + b))


def _differences() -> Iterator[Item]:
    for low in range(100):
        for high in range(low, 100):
            for a, b in {(low, high): None, (high, low): None}:
                yield Item(f"sum:{low}+{high}", (str(a + b), str(a)), str(b))


def _pairs(pick: Callable[[int, int], int]) -> Callable[[], Iterator[Item]]:
    def items() -> Iterator[Item]:
        for low, high in number_pairs():
            for a, b in ((low, high), (high, low)):
                yield Item(f"pair:{low},{high}", (str(a), str(b)), str(pick(a, b)))

    return items


def _numbers(
    first: int, last: int, group: str, ask: Callable[[int], str], answer: Callable[[int], str]
) -> Callable[[], Iterator[Item]]:
    def items() -> Iterator[Item]:
        for number in range(first, last + 1):
            yield Item(f"{group}:{number}", (ask(number),), answer(number))

    return items


def _letters(answer: Callable[[str], str]) -> Callable[[], Iterator[Item]]:
    """All questions about one set of letters share a group: a word, its reverse, its other anagrams, every task."""

    def items() -> Iterator[Item]:
        for word in made_up_words():
            yield Item("letters:" + "".join(sorted(word)), (word,), answer(word))

    return items


def _vowels(word: str) -> str:
    return str(sum(letter in "AEIOU" for letter in word))


TASKS: tuple[Task, ...] = (
    Task("add", _sums, (
        "What is {0} plus {1}?", "Add {0} and {1}.", "{0} + {1} = ?", "Calculate the sum of {0} and {1}.",
        "How much is {0} + {1}?", "Find the total of {0} and {1}.")),
    Task("subtract", _differences, (
        "What is {0} minus {1}?", "Subtract {1} from {0}.", "{0} - {1} = ?", "Take {1} away from {0}.",
        "How much is {0} - {1}?", "Find the difference when {1} is taken from {0}.")),
    Task("larger", _pairs(max), (
        "Which is larger, {0} or {1}?", "Give the maximum of {0} and {1}.", "Pick the bigger number: {0}, {1}",
        "What is the greater of {0} and {1}?", "Name the larger of these two: {0} and {1}.", "max({0}, {1}) = ?")),
    Task("smaller", _pairs(min), (
        "Which is smaller, {0} or {1}?", "Give the minimum of {0} and {1}.", "Pick the lower number: {0}, {1}",
        "What is the lesser of {0} and {1}?", "Name the smaller of these two: {0} and {1}.", "min({0}, {1}) = ?")),
    Task("double", _numbers(1, 999, "double", str, lambda n: str(2 * n)), (
        "What is twice {0}?", "Double the number {0}.", "Double {0}.", "What do you get when you double {0}?",
        "Calculate two times {0}.", "2 * {0} = ?")),
    Task("halve", _numbers(1, 999, "double", lambda n: str(2 * n), str), (
        "What is half of {0}?", "Halve the number {0}.", "Halve {0}.", "What do you get when you halve {0}?",
        "Divide {0} by two.", "{0} / 2 = ?")),
    Task("next", _numbers(0, 999, "next", str, lambda n: str(n + 1)), (
        "Which number comes after {0}?", "Count one up from {0}.", "Give the number right after {0}.",
        "What follows {0} when counting?", "What is the successor of {0}?", "Name the next number after {0}.")),
    Task("previous", _numbers(0, 999, "next", lambda n: str(n + 1), str), (
        "Which number comes before {0}?", "Count one down from {0}.", "Give the number right before {0}.",
        "What precedes {0} when counting?", "What is the predecessor of {0}?", "Name the number just before {0}.")),
    Task("parity", _numbers(0, 999, "parity", str, lambda n: ("even", "odd")[n % 2]), (
        "Is {0} even or odd?", "Even or odd: {0}", "Tell me the parity of {0}.", "Is the number {0} odd or even?",
        "Say whether {0} is even or odd.", "What is the parity of {0}?")),
    Task("to_words", _numbers(0, 999, "words", str, in_words), (
        "Write {0} in words.", "Spell out the number {0}.", "How do you say {0} in English?",
        "Put the number {0} into words.", "What is {0} in words?", "Spell {0} as words.")),
    Task("from_words", _numbers(0, 999, "words", in_words, str), (
        "Write {0} in digits.", "Which number is {0}?", "Give the digits of {0}.", "Put {0} into digits.",
        "What is {0} as a number?", "Turn the words {0} into digits.")),
    Task("to_roman", _numbers(1, 999, "roman", str, in_roman), (
        "Write {0} in Roman numerals.", "Convert {0} to a Roman numeral.", "What is {0} in Roman numerals?",
        "Give the Roman numeral for {0}.", "How did the Romans write {0}?", "Turn {0} into a Roman numeral.")),
    Task("from_roman", _numbers(1, 999, "roman", in_roman, str), (
        "Which number is the Roman numeral {0}?", "Convert the Roman numeral {0} to digits.",
        "What is {0} in ordinary digits?", "Read the Roman numeral {0}.", "How much is {0} in Roman numerals worth?",
        "Turn the Roman numeral {0} into a number.")),
    Task("sort", _letters(lambda w: "".join(sorted(w))), (
        "Sort the letters of {0}.", "Put the letters of {0} in alphabetical order.", "Order the letters: {0}",
        "Arrange the letters of {0} from A to Z.", "Alphabetize the letters of {0}.",
        "What is {0} with its letters sorted?")),
    Task("reverse", _letters(lambda w: w[::-1]), (
        "Reverse the letters of {0}.", "Spell {0} backwards.", "Write {0} backwards.", "Turn around the letters: {0}",
        "What is {0} in reverse?", "Read {0} from right to left.")),
    Task("dashes", _letters("-".join), (
        "Spell {0} with dashes.", "Put dashes between the letters of {0}.", "Join the letters of {0} with dashes.",
        "Write {0} with a dash between its letters.", "What is {0} spelled with dashes?",
        "Separate the letters of {0} by dashes.")),
    Task("first_letter", _letters(lambda w: w[0]), (
        "What is the first letter of {0}?", "Which letter does {0} start with?", "Give the first letter of {0}.",
        "What letter begins {0}?", "Name the opening letter of {0}.", "{0} starts with which letter?")),
    Task("last_letter", _letters(lambda w: w[-1]), (
        "What is the last letter of {0}?", "Which letter does {0} end with?", "Give the last letter of {0}.",
        "What letter ends {0}?", "Name the final letter of {0}.", "{0} ends with which letter?")),
    Task("length", _letters(lambda w: str(len(w))), (
        "How many letters are in {0}?", "Count the letters of {0}.", "How long is {0}?", "What is the length of {0}?",
        "Give the number of letters in {0}.", "{0} has how many letters?")),
    Task("vowels", _letters(_vowels), (
        "How many vowels are in {0}?", "Count the vowels of {0}.", "Give the number of vowels in {0}.",
        "How many letters of {0} are vowels?", "{0} has how many vowels?", "Tell me the vowel count of {0}.")),
)  # fmt: skip

PREFIXES = ("", "", "", "Please answer: ", "Quick question: ", "Task: ", "A small exercise. ", "Hello! ")
SUFFIXES = ("", "", "", " Answer briefly.", " Just the answer.", " Only give the result.", " Be brief.", " Thanks!")


def items_by_task(split: Split) -> dict[str, list[Item]]:
    """All items of one split, by the name of their task."""
    return {task.name: [item for item in task.items() if item.split == split] for task in TASKS}


def ask(task: Task, item: Item, rng: random.Random) -> str:
    """Draw one wording of the question: a template with, now and then, something before and after it."""
    return rng.choice(PREFIXES) + rng.choice(task.templates).format(*item.slots) + rng.choice(SUFFIXES)
