"""Whether an API still answers with the model that it answered with first, as far as its answers say."""

import json
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pipeline.core.config_api import ApiTeacher
from pipeline.core.errors import Incomplete
from pipeline.core.stage import Context
from pipeline.core.store import sync_folder
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.wire import Reply

log = logging.getLogger(__name__)

SNAPSHOT: Final = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8}|\d{6}|\d{4}|\d{3}|latest)$")
"""What a provider puts behind a model's name to say which state of it answers."""


@dataclass(slots=True)
class Drift:
    """What an API teacher's answers said of themselves so far.

    It is kept beside the stored answers, by teacher, so that a resume compares too, and every later run with whatever
    prompts and settings: their answers stand beside these.

    Attributes:
        teacher: its policies say what a change leads to.
        memory: the file.
        model: name under which the answers come; of a name and its snapshot the snapshot. None: none said so yet.
        fingerprints: of the backends, in the order in which they were first seen.
    """

    teacher: ApiTeacher
    memory: Path
    ctx: Context
    model: str | None = None
    fingerprints: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, teacher: ApiTeacher, identity: str, ctx: Context) -> "Drift":
        """Go on from what is remembered; a damaged file is none, since it decides nothing but when to stop."""
        memory = ctx.data / "responses" / f"answers-from-{identity[:16]}.json"
        try:
            known = json.loads(memory.read_text("utf-8"))
            return cls(teacher, memory, ctx, known["model"], list(known["fingerprints"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(teacher, memory, ctx)

    def hear(self, endpoint: Endpoint, reply: Reply) -> None:
        """Compare an answer, which is stored by then, with the ones before.

        Raises:
            Incomplete: something changed, and the teacher's policy is to stop.
        """
        if reply.model is not None and reply.model != self.model:
            self._hear_model(endpoint, reply.model)
        if reply.fingerprint is not None and reply.fingerprint not in self.fingerprints:
            self._hear_fingerprint(endpoint, reply.fingerprint)

    def _hear_model(self, endpoint: Endpoint, model: str) -> None:
        if self.model is None:
            self._remember(model, self.fingerprints)
            if not is_same_model(model, endpoint.model):
                log.warning("asked for %s, %s answers as %s", endpoint.model, endpoint.host, model)
            return
        if is_same_model(model, self.model):
            if len(model) > len(self.model):
                self._remember(model, self.fingerprints)
            return
        before = self.model
        if self.teacher.on_model_change == "warn":  # each change once, so the new name is the one to compare with
            self._remember(model, self.fingerprints)
        self._say("model", before, model, endpoint, self.teacher.on_model_change)

    def _hear_fingerprint(self, endpoint: Endpoint, fingerprint: str) -> None:
        policy, before = self.teacher.on_fingerprint_change, self.fingerprints
        if policy != "stop" or not before:
            self._remember(self.model, [*before, fingerprint])
        if before and policy != "ignore":
            self._say("fingerprint", before[-1], fingerprint, endpoint, policy)

    def _say(self, what: str, before: str, after: str, endpoint: Endpoint, policy: str) -> None:
        self.ctx.events.emit(f"{what}_changed", before=before, after=after, host=endpoint.host)
        if policy == "warn":
            log.warning("%s answers with another %s: %s, before %s", endpoint.host, what, after, before)
            return
        todo = f"to go on with it, set on_{what}_change: warn, and resume with: {self.ctx.resume_command}"
        message = f"the teacher answers with another {what}: {after}, before {before}; all answers are kept"
        raise Incomplete(message, where=endpoint.host, todo=todo)

    def _remember(self, model: str | None, fingerprints: Sequence[str]) -> None:
        self.model, self.fingerprints = model, [*fingerprints]
        known = json.dumps({"model": model, "fingerprints": self.fingerprints})
        temporary = self.memory.with_name(f".{self.memory.name}.{secrets.randbits(48)}")  # several may write at once
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(known)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.memory)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.memory.parent)


def is_same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: equal but for case and `models/`, or one is a snapshot of the other."""
    one, other = (name.casefold().removeprefix("models/") for name in (one, other))
    return one == other or SNAPSHOT.sub("", one) == other or SNAPSHOT.sub("", other) == one
