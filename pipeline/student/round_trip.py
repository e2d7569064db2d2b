"""What ids say when they are read back: the proof that what is trained is what the teacher wrote."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.student.turns import Piece, missing


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads ids back. Nothing is skipped and nothing cleaned up: tags of thinking and tool calls are text as well.

    Attributes:
        added: id of an added token -> its text; between two of them a tokenizer reads text on its own.
    """

    tokenizer: Any
    added: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: Any) -> "Reader":
        """The reader of a tokenizer."""
        return cls(tokenizer, {id: token.content for id, token in tokenizer.added_tokens_decoder.items()})

    def read_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many lists of ids."""
        if not self.tokenizer.is_fast:
            return [self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) for ids in rows]
        texts: list[str] = self.tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)
        return texts

    def read(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self.read_all([ids])[0]

    def readings(self, prompt: Sequence[int], ids: Sequence[int]) -> Iterator[str]:
        """What ids add to the text of the prompt, from its last added token on.

        First as a server streams them, then with each run between two added tokens read alone: some tokenizers put a
        space before each run, and take it away where text begins. A reading that changes the prompt is left out.
        """
        start = next((at for at in range(len(prompt) - 1, -1, -1) if prompt[at] in self.added), 0)
        before, both = prompt[start:], [*prompt[start:], *ids]
        for read in (self.read, self._read_in_runs):
            text, whole = read(before), read(both)
            if whole.startswith(text):
                yield whole.removeprefix(text)

    def _read_in_runs(self, ids: Sequence[int]) -> str:
        runs = groupby(ids, key=self.added.__contains__)
        return "".join(
            "".join(map(self.added.__getitem__, run)) if is_added else self.read([*run]) for is_added, run in runs
        )


def agrees(text: str, tail: str) -> bool:
    """Whether a text is what was rendered, but for white space that the template writes behind the end."""
    return text == tail or (tail.startswith(text) and not tail[len(text) :].strip())


def proven(reader: Reader, prompt: Sequence[int], ids: Sequence[int], tail: str, pieces: Sequence[Piece]) -> str | None:
    """The trained ids read back, if they hold what the teacher wrote; None if no way to read them shows it.

    Args:
        prompt, ids: of the row; the second are trained.
        tail: what the template rendered behind the prompt.
        pieces: what must be in the text where it differs from `tail` by white space, as it does for tokenizers that
            strip it beside special tokens.
    """
    first = reader.read(ids)
    if agrees(first, tail):
        return first
    texts = [first, *reader.readings(prompt, ids)]
    exact = (text for text in texts if agrees(text, tail))
    near = (text for text in texts if agrees(_dense(text), _dense(tail)) and missing(pieces, text) is None)
    return next(exact, next(near, None))


def _dense(text: str) -> str:
    return "".join(text.split())


def continues(reader: Reader, prompt: Sequence[int], ids: Sequence[int], tail: str) -> str | None:
    """The trained ids read behind the prompt, if they are the tail to the byte; else None."""
    return next((text for text in reader.readings(prompt, ids) if agrees(text, tail)), None)
