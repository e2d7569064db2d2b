"""A teacher's turns as a student's chat template takes them: reasoning, end tokens and tool calls."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, permutations
from typing import Any, Final, Literal, TypeAlias

from pipeline.core.config_train import END_TOKENS

Reasoning: TypeAlias = Literal["template", "inline", "drop"]
Turn: TypeAlias = dict[str, Any]

REASONING_NAMES: Final = ("thinking", "reasoning")
"""Fields in which templates look for the thinking, besides `reasoning_content`."""
BORNE: Final = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
"""Thinking at the beginning of a content, as DeepSeek-R1 and servers without a reasoning parser give it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a completion that must be in what is trained.

    Attributes:
        reason: why a row leaves where it is missing.
        text: the part; white space at its ends is the template's to trim.
        is_json: the part is a tool call's arguments, which a template may write anew.
        turn: of the completion.
    """

    reason: str
    text: str
    is_json: bool = False
    turn: int = 0

    @property
    def bytes(self) -> int:
        """Its size in UTF-8."""
        return len(self.text.encode("utf-8", "surrogatepass"))

    def end_in(self, text: str, start: int) -> int | None:
        """Where the part ends in a text behind `start`; None: it is not there."""
        bare = self.text.strip()
        at = text.find(bare, start)
        if at >= 0:
            return at + len(bare)
        return _end_of_arguments(self.text, text, start) if self.is_json else None


def _end_of_arguments(arguments: str, text: str, start: int) -> int | None:
    """Where the last of the names and values ends; None unless each is there, and not as Python would write them."""
    value = parsed(arguments)
    if not isinstance(value, dict) or (value and repr(value) in text[start:]):
        return None
    ends = [start]
    for leaf in _leaves(value):
        found = [at + len(form) for form in _written(leaf) if (at := text.find(form, start)) >= 0]
        if not found:
            return None
        ends.append(min(found))
    return max(ends)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _written(leaf: Any) -> tuple[str, ...]:
    plain = json.dumps(leaf, ensure_ascii=False)
    return (leaf, plain[1:-1], json.dumps(leaf)[1:-1]) if isinstance(leaf, str) else (plain, str(leaf))


def parsed(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Form:
    """A row as one of the ways to hand it to a chat template.

    Attributes:
        inline: turn of the completion -> the text that belongs before its content, whatever the template does.
        pieces: what must be in the completion's text.
    """

    prompt: Sequence[Turn]
    completion: Sequence[Turn]
    inline: Mapping[int, str]
    pieces: tuple[Piece, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it can be rendered as it is, and no other form is worth a trial."""
        return not self.inline and not any("tool_calls" in turn for turn in (*self.prompt, *self.completion))


@dataclass(frozen=True)
class Adapter:
    """Brings rows into forms for one template.

    Attributes:
        reasoning: as `TrainConfig`.
        end_tokens: of the teacher; cut where nothing is said of a row's own.
        template: the source of the student's chat template.
    """

    reasoning: Reasoning
    end_tokens: tuple[str, ...]
    template: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Other fields in which the template looks for the thinking."""
        looked = (rf"(?:\.|['\"]){name}\b(?!_)" for name in REASONING_NAMES)
        return tuple(name for name, look in zip(REASONING_NAMES, looked, strict=True) if re.search(look, self.template))

    def cut(self, completion: Sequence[Turn], ends: Sequence[str] | None) -> tuple[Sequence[Turn], tuple[str, ...]]:
        """The completion without the teacher's end tokens at its end, and those that were there.

        An answer that is nothing but end tokens stays as it is.

        Args:
            ends: the tokens; None: `end_tokens`.
        """
        rest, cut = without_ends(completion[-1]["content"], self.end_tokens if ends is None else ends)
        if not cut or not rest.strip():
            return completion, ()
        return [*completion[:-1], {**completion[-1], "content": rest}], cut

    def ends_alike(self, completion: Sequence[Turn]) -> bool:
        """Whether a completion ends with what is an end token in some chat format."""
        return bool(without_ends(completion[-1]["content"], (*END_TOKENS, *self.end_tokens))[1])

    def forms(self, prompt: Sequence[Turn], completion: Sequence[Turn]) -> Iterator[Form]:
        """The forms of a row, the likeliest first; the first whose pieces are all in the rendered text is taken."""
        for turns, inline in self._thinking(completion):
            pieces = tuple(_pieces(turns, self._inline_thoughts(completion)))
            asked, told = [self._named(turn) for turn in prompt], [self._named(turn) for turn in turns]
            if not any("tool_calls" in turn for turn in (*asked, *told)):
                yield Form(asked, told, inline, pieces)
                continue
            for as_mapping in (True, False):
                for as_none in (False, True):  # DeepSeek's templates want no content rather than an empty one
                    before, after = (
                        [_calling(turn, as_mapping, as_none) for turn in turns_of] for turns_of in (asked, told)
                    )
                    yield Form(before, after, inline, pieces)

    def left_out(self, completion: Sequence[Turn]) -> bool:
        """Whether reasoning is dropped."""
        return self.reasoning == "drop" and any(_has_thinking(turn) for turn in completion)

    def inlined(self, completion: Sequence[Turn]) -> bool:
        """Whether reasoning goes into the content."""
        return self.reasoning == "inline" and any("reasoning_content" in turn for turn in completion)

    def _thinking(self, completion: Sequence[Turn]) -> Iterator[tuple[Sequence[Turn], Mapping[int, str]]]:
        if not any(_has_thinking(turn) for turn in completion):
            yield completion, {}
        elif self.reasoning == "template":
            yield completion, {}
            if any(_borne(turn) is not None for turn in completion):
                yield [_moved(turn) for turn in completion], {}
        else:
            bare = [_bare(turn) for turn in completion]
            told = {at: text for at, turn in enumerate(completion) if (text := _inline(turn))}
            yield bare, told if self.reasoning == "inline" else {}

    def _inline_thoughts(self, completion: Sequence[Turn]) -> dict[int, str]:
        """Turn -> its thinking without tags: the prompt may end with the first of them."""
        if self.reasoning != "inline":
            return {}
        return {at: _thought(turn) for at, turn in enumerate(completion)}

    def _named(self, turn: Turn) -> Turn:
        if "reasoning_content" not in turn or not self.names:
            return turn
        return {**turn, **dict.fromkeys(self.names, turn["reasoning_content"])}


def without_ends(text: str, ends: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A text without the end tokens at its end, and the white space behind them; and the tokens, the last one first."""
    found: list[str] = []
    while (end := next(filter(text.rstrip().endswith, filter(None, ends)), None)) is not None:
        text = text.rstrip().removesuffix(end)
        found.append(end)
    return text, tuple(found)


def _borne(turn: Turn) -> re.Match[str] | None:
    """The thinking at the beginning of the content, if it has no field of its own."""
    return BORNE.match(turn["content"]) if turn["role"] == "assistant" and "reasoning_content" not in turn else None


def _has_thinking(turn: Turn) -> bool:
    return "reasoning_content" in turn or _borne(turn) is not None


def _moved(turn: Turn) -> Turn:
    """The thinking in the field where templates look for it."""
    found = _borne(turn)
    return turn if found is None else {**_bare(turn), "reasoning_content": found.group(1)}


def _bare(turn: Turn) -> Turn:
    """A turn without its thinking."""
    found = _borne(turn)
    content = turn["content"] if found is None else turn["content"][found.end() :]
    return {**{name: value for name, value in turn.items() if name != "reasoning_content"}, "content": content}


def _inline(turn: Turn) -> str:
    """What belongs before the content: the thinking in its tags, as the teacher wrote them if it did."""
    found, thought = _borne(turn), _thought(turn)
    if found is not None:
        return found.group()
    return f"<think>\n{thought}\n</think>\n\n" if thought else ""


def _thought(turn: Turn) -> str:
    found = _borne(turn)
    text: str = turn.get("reasoning_content", "") if found is None else found.group(1)
    return text.strip("\n")


def _calling(turn: Turn, as_mapping: bool, as_none: bool) -> Turn:
    """A turn with its calls' arguments as values where they are a JSON object, or as text."""
    if "tool_calls" not in turn:
        return turn
    calls = [{**call, "function": _function(call["function"], as_mapping)} for call in turn["tool_calls"]]
    content = None if as_none and not turn["content"] else turn["content"]
    return {**turn, "content": content, "tool_calls": calls}


def _function(function: Mapping[str, Any], as_mapping: bool) -> dict[str, Any]:
    arguments = function.get("arguments") or "{}"
    value = parsed(arguments) if as_mapping else None
    return {**function, "arguments": value if isinstance(value, dict) else arguments}


def _pieces(turns: Sequence[Turn], inline_thoughts: Mapping[int, str]) -> Iterator[Piece]:
    for at, turn in enumerate(turns):
        yield Piece("reasoning_dropped", inline_thoughts.get(at, turn.get("reasoning_content", "")), turn=at)
        yield Piece("round_trip", turn["content"], turn=at)
        for call in turn.get("tool_calls", ()):
            yield Piece("tool_calls_dropped", call["function"]["name"], turn=at)
            yield Piece("tool_calls_dropped", call["function"].get("arguments") or "{}", is_json=True, turn=at)


KINDS: Final = ("reasoning_dropped", "round_trip", "tool_calls_dropped")
"""The parts of a turn, in the order in which most templates write them."""


def missing(pieces: Sequence[Piece], text: str) -> str | None:
    """The reason of the first piece that a text does not hold, in one of the orders in which a template may write the
    parts of all turns; None: it holds all.

    Each piece is looked for behind the one before: an answer of one word is often in the thinking too.
    """
    flaws: list[tuple[int, str]] = []
    for kinds in permutations(KINDS):
        flaw = _missing_in_order(sorted(pieces, key=lambda piece: (piece.turn, kinds.index(piece.reason))), text)
        if flaw is None:
            return None
        flaws.append(flaw)
    return max(flaws, key=lambda flaw: flaw[0])[1]


def _missing_in_order(pieces: Sequence[Piece], text: str) -> tuple[int, str] | None:
    """How many characters were found, and the reason of the first piece that was not; a call's name and arguments may
    come in either order."""
    start, found = 0, 0
    for _, together in groupby(enumerate(pieces), lambda item: item[0] - item[1].is_json):
        ends = [start]
        for _, piece in together:
            end = piece.end_in(text, start)
            if end is None:
                return found, piece.reason
            ends.append(end)
            found += len(piece.text)
        start = max(ends)
    return None


def trimmed(pieces: Sequence[Piece], text: str) -> bool:
    """Whether a text holds a piece without the white space at its ends."""
    return any(piece.text not in text for piece in pieces if not piece.is_json)


def text_bytes(turns: Sequence[Turn]) -> int:
    """UTF-8 bytes of all that turns say: thinking, content, names and arguments of calls."""
    return sum(piece.bytes for piece in _pieces(turns, {}))
