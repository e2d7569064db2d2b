"""Numbers about all rows of a training, counted while they are encoded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.student.tokenise import Encoded


@dataclass(slots=True)
class Checks:
    """Numbers about the encoded rows, gathered before the first step; JSON through `facts`.

    Attributes:
        rows_in: training rows of the data set.
        rows: those that are trained; all that follows but the reasons is about these.
        without_stop: rows whose last trained token is no stop token: their student would not learn to stop.
        double_bos: rows that begin with two BOS tokens.
        tokens, trained_tokens: ids of the rows, and those that count in the loss.
        longest: tokens of the longest row.
        length_limit: tokens of the longest row that may be trained, see `shards.length_limit`.
        over_length, unfinished, template_refuses, prompt_not_prefix, reasoning_dropped, round_trip,
            tool_calls_dropped, fully_masked: rows left out, by reason; see `text_path.TextPath.encode` and
            `shards.encode_shards`.
        neutralised_rows, neutralised_texts: rows with texts of special tokens in their messages, and how many of these
            texts were encoded as ordinary text.
        end_tokens_cut: rows whose completion ended with the teacher's end token.
        end_tokens: the same for each token; `end_tokens_cut[TOKEN]` in `facts`.
        end_tokens_left: rows that end with what is an end token in some chat format: it was not cut.
        reasoning_inlined, reasoning_left_out: rows whose thinking went into the content, or was dropped.
        trimmed: rows whose completion lost white space at an end of its thinking or its content.
        with_system: rows with a system message.
        completion_bytes: UTF-8 bytes of what is trained, without what the template adds.
        student_tokens: trained tokens, the template's among them.
        teacher_tokens, teacher_bytes: tokens that the teacher counted, and the bytes of just these rows as received.
    """

    rows_in: int = 0
    rows: int = 0
    without_stop: int = 0
    double_bos: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    length_limit: int = 0
    over_length: int = 0
    unfinished: int = 0
    template_refuses: int = 0
    prompt_not_prefix: int = 0
    reasoning_dropped: int = 0
    round_trip: int = 0
    tool_calls_dropped: int = 0
    fully_masked: int = 0
    neutralised_rows: int = 0
    neutralised_texts: int = 0
    end_tokens_cut: int = 0
    end_tokens: Counter[str] = field(default_factory=Counter)
    end_tokens_left: int = 0
    reasoning_inlined: int = 0
    reasoning_left_out: int = 0
    trimmed: int = 0
    with_system: int = 0
    completion_bytes: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    teacher_bytes: int = 0

    def add(self, row: Encoded, stops: Sequence[int], bos: int | None, teacher_tokens: int | None = None) -> None:
        """Count a row that is trained.

        Args:
            teacher_tokens: of the completion, as the teacher counted; None where it did not.
        """
        facts = row.facts
        self.rows += 1
        self.without_stop += row.ids[-1] not in stops
        self.double_bos += bos is not None and row.ids[:2] == (bos, bos)
        self.tokens += len(row.ids)
        self.trained_tokens += row.trained_tokens
        self.longest = max(self.longest, len(row.ids))
        self.neutralised_rows += facts.neutralised > 0
        self.neutralised_texts += facts.neutralised
        self.end_tokens_cut += bool(facts.end_tokens_cut)
        self.end_tokens.update({*facts.end_tokens_cut})
        self.end_tokens_left += facts.end_token_left
        self.reasoning_inlined += facts.reasoning_inlined
        self.reasoning_left_out += facts.reasoning_left_out
        self.trimmed += facts.trimmed
        self.with_system += facts.with_system
        self.completion_bytes += facts.completion_bytes
        self.student_tokens += row.trained_tokens
        if teacher_tokens is not None:
            self.teacher_tokens += teacher_tokens
            self.teacher_bytes += facts.received_bytes

    def reject(self, reason: str, rows: int) -> None:
        """Count rows that are not trained."""
        setattr(self, reason, getattr(self, reason) + rows)

    def facts(self) -> dict[str, int | float]:
        """The numbers, with the share of the tokens that is trained, and the tokens a byte of both tokenizers."""
        counted = {name: getattr(self, name) for name in Checks.__slots__ if name != "end_tokens"}
        return {
            **counted,
            **{f"end_tokens_cut[{token}]": rows for token, rows in sorted(self.end_tokens.items())},
            "trained_share": _ratio(self.trained_tokens, self.tokens),
            "student_tokens_per_byte": _ratio(self.student_tokens, self.completion_bytes),
            "teacher_tokens_per_byte": _ratio(self.teacher_tokens, self.teacher_bytes),
        }


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
