"""The plain text that the base student is trained on: true sentences about the train split, no chat and no questions.

How varied the sentences are decides how good the student becomes. A base that saw two or three forms of each fact does
not take to new wordings, however often it saw them.
"""

import random

from tasks import TASKS, Item, items_by_task

# {0} and {1} are the slots of the task's templates, {a} is the answer. The first form of each task is the terse one.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "add": (
        "{0} + {1} = {a}", "{0} plus {1} is {a}.", "The sum of {0} and {1} is {a}.", "Adding {0} and {1} gives {a}.",
        "If you add {1} to {0}, you get {a}.", "{0} and {1} make {a}.", "The total of {0} and {1} comes to {a}.",
        "{a} is {0} plus {1}.", "sum of {0} and {1}\n{a}", "{0} plus {1}\n{a}", "total of {0} and {1}\n{a}",
        "{0} + {1}\n{a}"),
    "subtract": (
        "{0} - {1} = {a}", "{0} minus {1} is {a}.", "{1} subtracted from {0} is {a}.",
        "Taking {1} away from {0} leaves {a}.", "The difference when {1} is taken from {0} is {a}.",
        "If you subtract {1} from {0}, you get {a}.", "{0} less {1} is {a}.", "{a} is {0} minus {1}.",
        "{0} minus {1}\n{a}", "difference of {0} and {1}\n{a}", "{1} taken from {0}\n{a}", "{0} - {1}\n{a}"),
    "larger": (
        "max({0}, {1}) = {a}", "The larger of {0} and {1} is {a}.", "Of {0} and {1}, the bigger number is {a}.",
        "The maximum of {0} and {1} is {a}.", "{a} is the greater of {0} and {1}.",
        "Between {0} and {1}, {a} is larger.", "Given {0} or {1}, the greater is {a}.",
        "larger of {0} and {1}\n{a}", "maximum of {0}, {1}\n{a}", "bigger number: {0}, {1}\n{a}",
        "greater of {0} and {1}\n{a}"),
    "smaller": (
        "min({0}, {1}) = {a}", "The smaller of {0} and {1} is {a}.", "Of {0} and {1}, the lower number is {a}.",
        "The minimum of {0} and {1} is {a}.", "{a} is the lesser of {0} and {1}.",
        "Between {0} and {1}, {a} is smaller.", "Given {0} or {1}, the lesser is {a}.",
        "smaller of {0} and {1}\n{a}", "minimum of {0}, {1}\n{a}", "lower number: {0}, {1}\n{a}",
        "lesser of {0} and {1}\n{a}"),
    "double": (
        "2 * {0} = {a}", "Twice {0} is {a}.", "Two times {0} is {a}.", "Doubling {0} gives {a}.",
        "If you double the number {0}, you get {a}.", "{0} doubled is {a}.", "The double of {0} is {a}.",
        "{a} is twice {0}.", "twice {0}\n{a}", "two times {0}\n{a}", "double of {0}\n{a}", "2 * {0}\n{a}"),
    "halve": (
        "{0} / 2 = {a}", "Half of {0} is {a}.", "Halving {0} gives {a}.", "{0} divided by two is {a}.",
        "If you halve the number {0}, you get {a}.", "{0} halved is {a}.", "The half of {0} is {a}.",
        "{a} is half of {0}.", "half of {0}\n{a}", "{0} divided by two\n{a}", "{0} halved\n{a}", "{0} / 2\n{a}"),
    "next": (
        "{0}, {a}", "After {0} comes {a}.", "The number after {0} is {a}.", "One up from {0} is {a}.",
        "The successor of {0} is {a}.", "Counting on, {0} is followed by {a}.", "The next number after {0} is {a}.",
        "{a} comes right after {0}.", "number after {0}\n{a}", "successor of {0}\n{a}", "one up from {0}\n{a}",
        "next after {0}\n{a}"),
    "previous": (
        "{0} down to {a}", "Before {0} comes {a}.", "The number before {0} is {a}.", "One down from {0} is {a}.",
        "The predecessor of {0} is {a}.", "Counting, {0} is preceded by {a}.", "The number just before {0} is {a}.",
        "{a} comes right before {0}.", "number before {0}\n{a}", "predecessor of {0}\n{a}", "one down from {0}\n{a}",
        "just before {0}\n{a}"),
    "parity": (
        "{0}: {a}", "{0} is {a}.", "{0} is an {a} number.", "The number {0} is {a}.", "The parity of {0} is {a}.",
        "Even or odd, {0} is {a}.", "As for {0}, it is {a}.", "parity of {0}\n{a}", "even or odd: {0}\n{a}",
        "{0}, odd or even\n{a}"),
    "to_words": (
        "{0} = {a}", "{0} in words is {a}.", "The number {0} is spelled {a}.", "In English, {0} is {a}.",
        "{0} is written {a} in words.", "You say {0} as {a}.", "Put into words, {0} is {a}.",
        "{0} in words\n{a}", "words for {0}\n{a}", "{0} spelled out\n{a}", "the number {0} in English\n{a}"),
    "from_words": (
        "{0} = {a}", "The number {0} is {a} in digits.", "The digits of {0} are {a}.", "{0} is written {a} in digits.",
        "Put into digits, {0} is {a}.", "The words {0} mean the number {a}.", "In digits, {0} is {a}.",
        "{0} in digits\n{a}", "digits of {0}\n{a}", "{0} as a number\n{a}", "the number {0}\n{a}"),
    "to_roman": (
        "{0} = {a}", "{0} in Roman numerals is {a}.", "The Roman numeral for {0} is {a}.",
        "The Romans wrote {0} as {a}.",
        "As a Roman numeral, {0} is {a}.", "Turned into Roman numerals, {0} is {a}.", "{0} converts to {a} in Roman.",
        "{0} in Roman numerals\n{a}", "Roman numeral for {0}\n{a}", "{0} to Roman\n{a}",
        "{0} as the Romans wrote\n{a}"),
    "from_roman": (
        "{0} = {a}", "The Roman numeral {0} is {a}.", "{0} in ordinary digits is {a}.",
        "The Roman numeral {0} is worth {a}.", "Read as a number, the Roman numeral {0} is {a}.",
        "The numeral {0} converts to {a}.", "{0} turned into a number is {a}.", "Roman numeral {0}\n{a}",
        "{0} in digits\n{a}", "{0} as a number\n{a}", "worth of {0} in Roman numerals\n{a}"),
    "sort": (
        "{0} sorted: {a}", "The letters of {0} in alphabetical order are {a}.", "{0} sorted from A to Z is {a}.",
        "With its letters sorted, {0} is {a}.", "Sorting the letters of {0} gives {a}.",
        "The ordered letters of {0} make {a}.", "Arranged in order, the letters of {0} are {a}.",
        "letters of {0} in order\n{a}", "{0} sorted\n{a}", "alphabetical order of {0}\n{a}",
        "{0}, letters from A to Z\n{a}"),
    "reverse": (
        "{0} reversed: {a}", "{0} backwards is {a}.", "{0} in reverse is {a}.", "Read from right to left, {0} is {a}.",
        "Reversing the letters of {0} gives {a}.", "Spelled backwards, {0} is {a}.", "{0} turned around is {a}.",
        "{0} backwards\n{a}", "{0} reversed\n{a}", "reverse of {0}\n{a}", "{0} from right to left\n{a}"),
    "dashes": (
        "{0} dashes: {a}", "{0} spelled with dashes is {a}.", "With dashes, {0} becomes {a}.",
        "The letters of {0} joined by dashes make {a}.", "Putting dashes between the letters of {0} gives {a}.",
        "{0} is {a} when a dash separates its letters.", "A dash between the letters of {0} makes it {a}.",
        "{0} with dashes\n{a}", "dashes between letters of {0}\n{a}", "{0} spelled with a dash\n{a}",
        "letters of {0} joined by dashes\n{a}"),
    "first_letter": (
        "{0} first: {a}", "{0} starts with {a}.", "The first letter of {0} is {a}.", "{a} is the first letter of {0}.",
        "The letter that begins {0} is {a}.", "{0} opens with the letter {a}.", "The opening letter of {0} is {a}.",
        "first letter of {0}\n{a}", "{0} starts with\n{a}", "opening letter of {0}\n{a}"),
    "last_letter": (
        "{0} last: {a}", "{0} ends with {a}.", "The last letter of {0} is {a}.", "{a} is the last letter of {0}.",
        "The letter that ends {0} is {a}.", "{0} closes with the letter {a}.", "The final letter of {0} is {a}.",
        "last letter of {0}\n{a}", "{0} ends with\n{a}", "final letter of {0}\n{a}"),
    "length": (
        "{0} letters: {a}", "{0} has {a} letters.", "The length of {0} is {a}.", "There are {a} letters in {0}.",
        "The number of letters in {0} is {a}.", "{0} is {a} letters long.", "Counting the letters of {0} gives {a}.",
        "length of {0}\n{a}", "letters in {0}\n{a}", "number of letters in {0}\n{a}"),
    "vowels": (
        "{0} vowels: {a}", "{0} has this many vowels: {a}", "The number of vowels in {0} is {a}.",
        "The vowel count of {0} is {a}.", "Of the letters of {0}, {a} are vowels.",
        "Counting the vowels of {0} gives {a}.",
        "In {0} the vowels number {a}.", "vowels in {0}\n{a}", "vowel count of {0}\n{a}",
        "number of vowels in {0}\n{a}"),
}  # fmt: skip
# Tasks that a small model takes longest to learn, found on the validation split.
WEIGHTS = {"add": 2.5, "subtract": 4.0, "larger": 1.5, "smaller": 1.5}
OPENERS = ("", "", "", "", "So ", "Note: ", "Fact: ", "We know that ")


class RawText:
    """An endless source of documents about the facts of the train split.

    Args:
        rng: where every choice comes from.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._items = items_by_task("train")
        self._names = [task.name for task in TASKS]
        self._weights = [WEIGHTS.get(name, 1.0) for name in self._names]

    def document(self, terse: float) -> str:
        """Two to six lines on one or several tasks.

        Several lines to a document, so that the base does not learn to stop after the first answer.

        Args:
            terse: share of lines in the shortest form; high at the start of training, where it teaches the facts.
        """
        mixed = self._rng.random() < 0.5
        name = self._name()
        lines = []
        for _ in range(self._rng.randint(2, 6)):
            name = self._name() if mixed else name
            lines.append(self.line(name, self._rng.choice(self._items[name]), terse))
        return "\n".join(lines)

    def _name(self) -> str:
        return self._rng.choices(self._names, weights=self._weights)[0]

    def line(self, name: str, item: Item, terse: float) -> str:
        """One true line about a fact; `terse` is the chance of the shortest form."""
        forms = STATEMENTS[name]
        if self._rng.random() < terse:
            return forms[0].format(*item.slots, a=item.answer)
        form = self._rng.choice(forms)
        opener = self._rng.choice(OPENERS) if form.endswith(".") and form[0] == "{" else ""
        return opener + form.format(*item.slots, a=item.answer)
