"""What a check found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        name: what was looked at, in a word or two.
        state: "ok"; "warn" (a run may work, or work badly); "fail" (it will not).
        detail: what was seen; never a secret's value.
        todo: what to do about it; None if all is well.
    """

    name: str
    state: State
    detail: str
    todo: str | None = None
