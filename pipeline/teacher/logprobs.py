"""Log-probabilities of tokens as they are read from stored bodies: all of what was asked for, or none at all.

Formats: OpenAI's `choices[0].logprobs.content` (vLLM's too, whose `token_id:123` in place of texts are ids) and
Google's `candidates[0].logprobsResult`. Numbers are read as float64 and given as float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from pipeline.core.config_api import ApiTeacher, OpenAITeacher
from pipeline.core.config_logprobs import LogprobsAsked, LogprobsConfig, logprobs_asked, logprobs_flags
from pipeline.core.config_server import LocalServer, ServerTeacher
from pipeline.core.config_teacher import Teacher, VllmTeacher
from pipeline.core.targets import TokenLogprobs
from pipeline.teacher.verdict import Action, Verdict
from pipeline.teacher.wire import load_json
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

Served = TypeVar("Served", bound=LocalServer | ApiTeacher)

BAD_LOGPROBS: Final = "bad_logprobs"
"""An answer without the logprobs that were asked for. Stored with their number behind a colon."""
FLOOR: Final = -9999.0
"""What OpenAI and vLLM write where there is no value: the token is unlikely beyond their list, or impossible."""
TOKEN_ID: Final = "token_id:"
MASS: Final = 1.01
"""What probabilities of different tokens may add up to, with all the rounding of their making."""
LARGEST: Final = math.log(MASS)
SAME: Final = 1e-3
"""How far two numbers for one token may lie apart."""


class BadLogprobs(ValueError):
    """Logprobs of a body that cannot be used, and why."""


class Candidate(NamedTuple):
    """A token as a body names it; `id` is None where it gives texts only. There are 20 for each token of an answer, so
    that it is a tuple."""

    id: int | None
    text: bytes | None
    logprob: float

    @property
    def name(self) -> int | bytes | None:
        """What tells it from others."""
        return self.text if self.id is None else self.id


@dataclass(frozen=True, slots=True)
class Position:
    """The sampled token, and the best ones in the order of the body; the sampled one may be among them."""

    sampled: Candidate
    top: Sequence[Candidate]


def wanted_logprobs(config: LogprobsConfig | None, teacher: Teacher) -> LogprobsAsked | None:
    """What a config asks of a teacher; None: no logprobs."""
    known = isinstance(teacher, OpenAITeacher | ServerTeacher) and teacher.structured_outputs == "vllm"
    return logprobs_asked(config, teacher.kind, is_vllm=known or isinstance(teacher, VllmTeacher))


def started_for(teacher: Served, asked: LogprobsAsked | None) -> Served:
    """A teacher whose vLLM servers give these logprobs when they are started. It has other arguments, which are in no
    key: keys are made of the teacher of the config."""
    if asked is None or not isinstance(teacher, VllmTeacher):
        return teacher
    return teacher.model_copy(update={"args": (*teacher.args, *logprobs_flags(asked))})


def read_logprobs(wire: str, body: bytes, asked: LogprobsAsked) -> TokenLogprobs:
    """What a body says of its tokens, cut to `asked.top_k` a position.

    Args:
        wire: name of the body's format.

    Raises:
        BadLogprobs: they are missing, fewer than asked, not of all tokens, or no log-probabilities at all.
    """
    reader = READERS.get(wire)
    if reader is None:
        raise BadLogprobs("the format has none")
    parsed, _ = load_json(body)
    try:
        positions = reader(parsed, asked.ids)
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise BadLogprobs("there are none") from error
    return _assembled([_settled(position, asked.top_k) for position in positions])


def with_logprobs(verdict: Verdict, wire: str, body: bytes, asked: LogprobsAsked | None) -> Verdict:
    """The verdict on a response of which logprobs were asked: an answer without all of them is a strike."""
    if asked is None or verdict.action is not Action.ANSWER:
        return verdict
    try:
        read_logprobs(wire, body, asked)
    except BadLogprobs as error:
        return replace(verdict, action=Action.STRIKE, reason=stored_reason(asked), detail=f"logprobs: {error}"[:200])
    return verdict


def stored_reason(asked: LogprobsAsked) -> str:
    """The reason under which an answer without these logprobs is stored."""
    return f"{BAD_LOGPROBS}:{asked.top_k}"


def find_logprobs(wire: str, body: bytes, asked: LogprobsAsked) -> TokenLogprobs | None:
    """As `read_logprobs`; None: a body does not hold them."""
    try:
        return read_logprobs(wire, body, asked)
    except BadLogprobs:
        return None


def held_logprobs(wire: str, body: bytes) -> LogprobsAsked | None:
    """The most that a body holds, as somebody would ask for it; None: none that can be used."""
    if b"ogprobs" not in body:
        return None
    for ids in (True, False):
        try:
            positions = READERS[wire](load_json(body)[0], ids)
        except (KeyError, TypeError, IndexError, AttributeError, OverflowError, BadLogprobs):
            continue
        told = min((_told(each.sampled, _distinct(each.top)) for each in positions), default=0)
        asked = LogprobsAsked(max(1, told), told, ids)
        return None if find_logprobs(wire, body, asked) is None else asked
    return None


def lacks_logprobs(rejected: str | None) -> bool:
    """Whether a stored refusal is for lack of logprobs."""
    return rejected is not None and rejected.partition(":")[0] == BAD_LOGPROBS


def is_refused(rejected: str, asked: LogprobsAsked | None) -> bool:
    """Whether a stored refusal holds for who asks this: lacking logprobs are no fault for who wants none or fewer."""
    reason, _, count = rejected.partition(":")
    if reason != BAD_LOGPROBS or not count.isdecimal():
        return True
    return asked is not None and asked.top_k >= int(count)


# ---------------------------------------------------------------------------------------------- formats of bodies


def _openai_positions(parsed: Any, ids: bool) -> list[Position]:
    choice = parsed["choices"][0]
    content = choice["logprobs"]["content"]
    if not isinstance(content, list):
        raise BadLogprobs("there are none")
    positions = [
        Position(_openai_token(each, ids), [_openai_token(top, ids, is_top=True) for top in each["top_logprobs"]])
        for each in content
    ]
    if ids:
        _check_ids(positions, choice.get("token_ids"), (parsed.get("usage") or {}).get("completion_tokens"))
    else:
        _check_text(positions, choice["message"])
    return positions


def _openai_token(plain: Mapping[str, Any], ids: bool, *, is_top: bool = False) -> Candidate:
    token, logprob = plain["token"], _logprob(plain["logprob"])
    if ids and is_top:  # in whose bytes vLLM spells "token_id:123"
        return Candidate(_token_id(token), None, logprob)
    numbers = plain.get("bytes")
    if ids:
        return Candidate(_token_id(token), None if numbers is None else _bytes(numbers), logprob)
    return Candidate(None, token.encode("utf-8", "surrogatepass") if numbers is None else _bytes(numbers), logprob)


def _token_id(token: str) -> int:
    digits = token.removeprefix(TOKEN_ID)
    if digits == token or not (digits.isascii() and digits.isdecimal()) or int(digits) >= 2**31:
        raise BadLogprobs("tokens come without their ids")
    return int(digits)


def _bytes(numbers: Any) -> bytes:
    try:
        return bytes(numbers)
    except (TypeError, ValueError) as error:
        raise BadLogprobs("a token's bytes are none") from error


def _logprob(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise BadLogprobs("a value is no number")
    if not value <= LARGEST:
        raise BadLogprobs(f"{value:g} is no log-probability")
    return float(value)


def _check_ids(positions: Sequence[Position], token_ids: Any, completion_tokens: Any) -> None:
    """Two accounts of the sampled tokens must agree: vLLM's `token_ids`, or where there is none the count."""
    if isinstance(token_ids, list):
        if [position.sampled.id for position in positions] != token_ids:
            raise BadLogprobs("they are of other tokens than the answer's")
    elif isinstance(completion_tokens, int) and completion_tokens != len(positions):
        raise BadLogprobs(f"they are of {len(positions)} tokens of {completion_tokens}")


def _check_text(positions: Sequence[Position], message: Mapping[str, Any]) -> None:
    """The tokens' bytes must hold the answer. Where a server strips or splits it, they hold more; of an answer that
    calls tools the text is no account."""
    text = message.get("content")
    if not isinstance(text, str) or message.get("tool_calls"):
        if not positions:
            raise BadLogprobs("there are none")
        return
    told = b"".join(position.sampled.text or b"" for position in positions)
    if text.encode("utf-8", "surrogatepass") not in told:
        raise BadLogprobs("they are of other tokens than the answer's")


def _gemini_positions(parsed: Any, _: bool) -> list[Position]:
    candidate = parsed["candidates"][0]
    result = candidate["logprobsResult"]
    sampled, tops = result["chosenCandidates"], result["topCandidates"]
    if len(sampled) != len(tops):
        raise BadLogprobs(f"they are of {len(sampled)} tokens, the best ones of {len(tops)}")
    positions = [
        Position(_gemini_token(one), [_gemini_token(each) for each in top["candidates"]])
        for one, top in zip(sampled, tops, strict=True)
    ]
    parts = candidate.get("content", {}).get("parts", [])
    text = "".join(part.get("text", "") for part in parts if part.get("thought") is not True)
    _check_text(positions, {"content": text})
    return positions


def _gemini_token(plain: Mapping[str, Any]) -> Candidate:
    id_ = plain.get("tokenId")
    if id_ is not None and not (type(id_) is int and 0 <= id_ < 2**31):
        raise BadLogprobs("a token's id is none")
    text: str = plain["token"]
    return Candidate(id_, text.encode("utf-8", "surrogatepass"), _logprob(plain["logProbability"]))


READERS: Final[Mapping[str, Callable[[Any, bool], list[Position]]]] = {
    OPENAI_CHAT.name: _openai_positions,
    GEMINI.name: _gemini_positions,
}


# -------------------------------------------------------------------------------------------------- one position


@dataclass(frozen=True, slots=True)
class Settled:
    """A position in our form: the best tokens sorted, the sampled one's rank among them (0: beyond them)."""

    sampled: Candidate
    rank: int
    best: Sequence[Candidate]


def _settled(position: Position, top_k: int) -> Settled:
    """The best tokens of a position, without those that may not be among the best.

    vLLM names the sampled token first, also when it is not among the best; it is then the least of the list, and others
    between it and the rest are unknown.
    """
    sampled, top = position.sampled, _distinct(position.top)
    twins = [each for each in top if each.name == sampled.name]
    twin = min(twins, key=lambda each: abs(each.logprob - sampled.logprob), default=None)
    told = _told(sampled, top)
    if told < top_k or sampled.name is None:
        raise BadLogprobs(f"a token comes with {told} of {top_k}")
    if twin is not None and abs(twin.logprob - sampled.logprob) > SAME:
        raise BadLogprobs("two values for one token")
    rest = [each for each in top if each is not twin]
    if twin is not None and top[0] is twin and rest and twin.logprob <= min(each.logprob for each in rest):
        top = rest
    best = sorted((each for each in top if each.logprob > FLOOR), key=lambda each: (-each.logprob, each.id or 0))
    if sum(math.exp(each.logprob) for each in best) > MASS:
        raise BadLogprobs("probabilities that add up to more than 1")
    rank = next((at for at, each in enumerate(best, start=1) if each is twin), 0)
    return Settled(sampled, rank, best[:top_k])


def _told(sampled: Candidate, top: Sequence[Candidate]) -> int:
    """Different tokens that a position tells of."""
    return len(top) + all(each.name != sampled.name for each in top)


def _distinct(top: Sequence[Candidate]) -> list[Candidate]:
    """Each token once. Different tokens may have one text, so that those without ids are told apart by value too."""
    seen: dict[object, Candidate] = {}
    for each in top:
        known = seen.setdefault((each.text, each.logprob) if each.id is None else each.id, each)
        if known.logprob != each.logprob:
            raise BadLogprobs("two values for one token")
    return [*seen.values()]


def _assembled(positions: Sequence[Settled]) -> TokenLogprobs:
    """All positions as arrays.

    Raises:
        BadLogprobs: some tokens have ids and some have none.
    """
    best = [each for position in positions for each in position.best]
    sampled = [position.sampled for position in positions]
    ids = {each.id is not None for each in (*best, *sampled)}
    if len(ids) > 1:
        raise BadLogprobs("some tokens come without their ids")
    has_ids, has_texts = ids == {True}, any(each.text is not None for each in best) or ids != {True}
    values = [each.logprob if each.logprob > FLOOR else math.nan for each in sampled]
    return TokenLogprobs(
        ids=np.array([each.id for each in sampled], np.int32) if has_ids else None,
        texts=tuple(each.text for each in sampled) if has_texts else None,
        logprobs=np.array(values, np.float32),
        ranks=np.array([position.rank for position in positions], np.int32),
        sizes=np.array([len(position.best) for position in positions], np.int32),
        top_ids=np.array([each.id for each in best], np.int32) if has_ids else None,
        top_texts=tuple(each.text for each in best) if has_texts else None,
        top_logprobs=np.array([each.logprob for each in best], np.float32),
    )
