"""The verdict of a report in two sentences, and its key numbers. Says less where a number is not known, never more."""

from dataclasses import dataclass

from pipeline.stages.report.facts import Evaluation, Interval
from pipeline.stages.report.text import bounds, count, fraction, percent, times

CI = "95\u202f% CI "


@dataclass(frozen=True, slots=True)
class Card:
    """One key number: its label, the number, and what a reader needs to judge it."""

    label: str
    number: str
    note: str


def verdict(found: Evaluation) -> str:
    """One sentence: how much of the teacher's accuracy the student keeps, at which size and speed."""
    _, _, student = found.models
    if found.retained.value is None:
        start = f"The student answers {percent(student.accuracy.value)} of {count(found.n)} test prompts correctly"
    else:
        start = f"The student keeps {_with_interval(found.retained, CI)} of its teacher’s accuracy"
    size, speed = parameter_ratio(found), speed_ratio(found)
    if size is not None:
        start += f" {_size_clause(size)}"
    if speed is not None:
        start += f" and {_speed_clause(speed)}"
    return start + "."


def base_sentence(found: Evaluation) -> str:
    """One sentence: what the training added over the base, asked in the way that served the base best."""
    teacher, base, _ = found.models
    start = (
        f"Before training, the same model answers {percent(base.accuracy.value)} correctly "
        f"when asked in the way that suits it best ({method_name(found.method)})"
    )
    gap = found.gap_closed
    if (base.accuracy.value or 0.0) >= (teacher.accuracy.value or 0.0):
        return start + ", no less than the teacher: there is no gap to close."
    if gap.value is None:
        return start + "."
    if gap.value <= 0:
        return start + "; training did not bring it closer to the teacher."
    doubt = " – within the error, this may be nothing" if gap.low is not None and gap.low <= 0 else ""
    return f"{start}; training closed {_with_interval(gap)} of the gap to the teacher{doubt}."


def parameter_ratio(found: Evaluation) -> float | None:
    """Parameters of the student over those of the teacher."""
    teacher, _, student = found.models
    if teacher.parameters is None or student.parameters is None or teacher.parameters == 0:
        return None
    return student.parameters / teacher.parameters


def speed_ratio(found: Evaluation) -> float | None:
    """Answers per second of the student over those of the teacher."""
    teacher, _, student = found.models
    if not teacher.answers_per_second or student.answers_per_second is None:
        return None
    return student.answers_per_second / teacher.answers_per_second


def method_name(method: str) -> str:
    """`three_shot` as `three shot`."""
    return method.replace("_", " ")


def cards(found: Evaluation, rows: int) -> tuple[Card, ...]:
    """The key numbers under the verdict; `rows` is the size of the data set."""
    teacher, _, student = found.models
    return (
        Card("Accuracy retained", percent(found.retained.value), _interval_note(found.retained)),
        Card("Gap closed", percent(found.gap_closed.value), _interval_note(found.gap_closed)),
        Card("Parameters", fraction(parameter_ratio(found)), _of(student.parameters, teacher.parameters)),
        Card("Answers per second", times(speed_ratio(found)), "of the teacher’s"),
        Card("Data set", count(rows), "rows kept"),
        Card("Test", count(found.n), "prompts, unseen in training"),
    )


def _size_clause(ratio: float) -> str:
    if 0.98 < ratio < 1.02:
        return "with as many parameters"
    return f"at {fraction(ratio)} of its parameters" if ratio < 1 else f"at {times(ratio)} its parameters"


def _speed_clause(ratio: float) -> str:
    return "answers as fast" if 0.98 < ratio < 1.02 else f"answers {times(ratio)} as fast"


def _with_interval(found: Interval, prefix: str = "") -> str:
    if found.low is None or found.high is None:
        return percent(found.value)
    return f"{percent(found.value)} ({prefix}{bounds(found.low, found.high)})"


def _interval_note(found: Interval) -> str:
    if found.value is None:
        return "not defined here"
    return f"{CI}{bounds(found.low, found.high)}" if found.low is not None else "no interval"


def _of(student: int | None, teacher: int | None) -> str:
    if student is None or teacher is None:
        return "not known" if student is None else f"{count(student)}; the teacher’s are not known"
    return f"{count(student)} of {count(teacher)}"
