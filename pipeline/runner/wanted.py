"""The requests that a config's step `generate` makes, so that the stored answers to them can be found."""

from collections import Counter

from pipeline.core.config import GenerateStep
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.errors import UsageError
from pipeline.runner.run import committed_before
from pipeline.runner.session import Session
from pipeline.runner.steps import plan_steps
from pipeline.stages.generate import requests_of
from pipeline.teacher.wanted import Wanted


def wanted_of(session: Session) -> Wanted:
    """All requests of the config's `generate`, from the committed rows of `prompts`.

    Raises:
        UsageError: the teacher replays a file, the prompts are not made yet, or a file is missing.
        CorruptArtefact: the prompts are not what was committed.
    """
    step = next(step for step in plan_steps() if step.name == "generate")
    cfg = session.config_of(step)
    assert isinstance(cfg, GenerateStep)
    if isinstance(cfg.teacher, ReplayTeacher):
        what = "this config's teacher replays a file: it asks nobody, and no answer is stored"
        raise UsageError(what, where=f"{session.loaded.path}: teachers.{cfg.generate.teacher}", todo=TODO)
    with session.disk_errors():
        rows = committed_before(session, "generate")["prompts"].path / "rows"
        requests = requests_of(cfg, rows, session.data)
        counted = Counter(bytes.fromhex(request.key) for request in requests)
    session.digests.save()
    return Wanted(counted, requests.asked.sampling.max_tokens, requests.asked.room)


TODO = "name a config whose teacher is a server or an API"
