"""Text of special tokens in messages: encoded as ordinary text, never as the token that ends a turn or begins one.

A message is data. `<|im_end|>` in a completion would end it early, and in a prompt it would let the prompt speak in
another role. So such texts are replaced by private-use characters before the template sees them; in what it renders,
its own special tokens become aliases that a copy of the tokenizer knows as plain added tokens; then the texts come
back, and the whole is encoded with `split_special_tokens`, which matches the aliases and no special token.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, TypeAlias

from pipeline.student.tokenise import special_texts

THINK_TAGS: Final = ("<think>", "</think>")
"""Never neutralised: in a teacher's text they are markup, and most tokenizers do not call them special."""
PRIVATE: Final = range(0xF0000, 0xFFFFE)
"""Code points of supplementary private use area A."""
EDGE: Final = "\U0010fffd"
"""Begins and ends the text of an alias; of the other private use area."""

Ids: TypeAlias = list[int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text that a template rendered, in which each marker stands for a text that is not to become a token.

    Attributes:
        marked: the text with the markers.
        markers: marker, one character -> the text it stands for.
    """

    marked: str
    markers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the model reads."""
        return unmarked(self.marked, self.markers)


def unmarked(text: str, markers: Mapping[str, str]) -> str:
    """The text with what its markers stand for."""
    return text.translate({ord(marker): content for marker, content in markers.items()}) if markers else text


def free_characters(texts: Iterable[str]) -> Iterator[str]:
    """Private-use characters that none of the texts holds."""
    taken = {character for text in texts for character in text if ord(character) >= PRIVATE.start}
    return (chr(code) for code in PRIVATE if chr(code) not in taken)


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value, its keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(strings_in, chain(value.keys(), value.values())))
    elif isinstance(value, Sequence):
        yield from chain.from_iterable(map(strings_in, value))


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed, its keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): map_strings(each, change) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [map_strings(each, change) for each in value]
    return value


@dataclass(frozen=True, slots=True)
class Twin:
    """A copy of a tokenizer that knows aliases of its special tokens, and a separator, as plain added tokens.

    Attributes:
        aliases: text of a special token -> its alias.
        ids: id of an alias -> id of the special token.
        separator: a text that keeps its two sides apart, and its id.
    """

    tokenizer: Any
    aliases: Mapping[str, str]
    ids: Mapping[int, int]
    separator: tuple[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Twin":
        """Copy a fast tokenizer; it takes as much memory again."""
        from transformers import AddedToken

        twin = copy.deepcopy(tokenizer)
        special = {id: token for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = {token.content: f"{EDGE}{number}{EDGE}" for number, token in enumerate(special.values())}
        separator = f"{EDGE}-{EDGE}"
        added = [
            AddedToken(
                names[token.content],
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
                special=False,
            )
            for token in special.values()
        ]
        twin.add_tokens([*added, AddedToken(separator, normalized=False, special=False)])
        ids = {twin.convert_tokens_to_ids(names[token.content]): id for id, token in special.items()}
        return cls(twin, names, ids, (separator, twin.convert_tokens_to_ids(separator)))

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts whose special tokens are aliases; the ids are the twin's."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        ids: list[Ids] = encoded["input_ids"]
        return ids

    def own_ids(self, ids: Ids) -> Ids:
        """The tokenizer's own ids: without separators and aliases."""
        return [self.ids.get(id, id) for id in ids if id != self.separator[1]]


@dataclass(slots=True)
class Neutraliser:
    """Finds the texts of special tokens in messages, and encodes what holds some.

    Attributes:
        in_messages: finds the text of a special token that a message may not write.
        anywhere: finds the text of any special token.
        special: ids of the special tokens, but not the unknown one: text may hold what is unknown.
        twin: made when the first row needs it; slow tokenizers need none.
    """

    tokenizer: Any
    in_messages: re.Pattern[str]
    anywhere: re.Pattern[str]
    special: frozenset[int]
    twin: Twin | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> "Neutraliser":
        """What there is to know about a tokenizer."""
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        in_messages = special_texts(tokenizer, without=THINK_TAGS)
        return cls(tokenizer, in_messages, special_texts(tokenizer), frozenset(special - {tokenizer.unk_token_id}))

    def count(self, texts: Iterable[str]) -> int:
        """How many texts of special tokens the texts hold."""
        search = self.in_messages.search
        return sum(len(self.in_messages.findall(text)) for text in texts if search(text) is not None)

    def markers(self, texts: Sequence[str], free: Iterator[str]) -> dict[str, str]:
        """Text of a special token -> the character that stands for it, for those that the texts hold."""
        found = {match for text in texts for match in self.in_messages.findall(text)}
        return dict(zip(sorted(found), free, strict=False))

    def mark(self, value: Any, markers: Mapping[str, str]) -> Any:
        """A JSON value with markers in the place of the texts."""
        return map_strings(value, lambda text: self.in_messages.sub(lambda match: markers[match.group()], text))

    def encode(self, rendered: Sequence[Rendered]) -> list[Ids | None]:
        """Ids of each text; None where what a marker stands for becomes a special token in spite of all."""
        if not rendered:
            return []
        if not self.tokenizer.is_fast:
            return [self._encode_in_pieces(each) for each in rendered]
        if self.twin is None:
            self.twin = Twin.of(self.tokenizer)
        return [self._encode(self.twin, each) for each in rendered]

    def _encode(self, twin: Twin, rendered: Rendered) -> Ids | None:
        """A model that looks whole pieces up in its vocabulary (Unigram) finds `</s>` there: then its first character
        is kept apart from the others."""
        if EDGE in rendered.text:  # could read like an alias
            return None
        aliased = self.anywhere.sub(lambda match: twin.aliases[match.group()], rendered.marked)
        apart = {marker: text[0] + twin.separator[0] + text[1:] for marker, text in rendered.markers.items()}
        for markers in (rendered.markers, apart):
            ids = twin.encode([unmarked(aliased, markers)])[0]
            if self.special.isdisjoint(ids):
                return twin.own_ids(ids)
        return None

    def _encode_in_pieces(self, rendered: Rendered) -> Ids | None:
        """For tokenizers in Python, whose `split_special_tokens` matches no added token at all."""
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        ids: Ids = []
        for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", rendered.marked):
            if piece in added:
                ids.append(added[piece])
            elif piece:
                plain = unmarked(piece, rendered.markers)
                ids += self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
