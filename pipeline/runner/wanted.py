"""The requests that a config's step `generate` makes, so that the stored answers to them can be found."""

from collections import Counter

from pipeline.core.config import GenerateStep
from pipeline.core.config_length import Raise
from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.errors import UsageError
from pipeline.runner.run import committed_before
from pipeline.runner.session import Session
from pipeline.runner.steps import plan_steps
from pipeline.stages.generate.requests import requests_of
from pipeline.teacher.wanted import Wanted


def wanted_of(session: Session) -> Wanted:
    """All requests of the config's `generate`, from the committed rows of `prompts`; those to a file that is replayed
    are not among them.

    Raises:
        UsageError: all teachers replay files, the prompts are not made yet, or a file is missing.
        CorruptArtefact: the prompts are not what was committed.
    """
    step = next(step for step in plan_steps() if step.name == "generate")
    cfg = session.config_of(step)
    assert isinstance(cfg, GenerateStep)
    asked = [name for name, teacher in cfg.teachers.items() if not isinstance(teacher, ReplayTeacher)]
    if not asked:
        what = "this config's teacher replays a file: it asks nobody, and no answer is stored"
        raise UsageError(what, where=f"{session.loaded.path}: teachers.{cfg.generate.teacher}", todo=TODO)
    counted: Counter[bytes] = Counter()
    rooms: dict[bytes, int] = {}
    logprobs: dict[bytes, LogprobsAsked] = {}
    with session.disk_errors():
        rows = committed_before(session, "generate")["prompts"].path / "rows"
        requests = requests_of(cfg, rows, session.data)
        for name in asked:
            keys = [bytes.fromhex(request.key) for request in requests.of(name)]
            counted.update(keys)
            room = requests.asked[name].room
            rooms |= {} if room is None else dict.fromkeys(keys, room)
            told = requests.asked[name].logprobs
            logprobs |= {} if told is None else dict.fromkeys(keys, told)
    session.digests.save()
    policy = cfg.generate.on_length
    more = policy.caps if isinstance(policy, Raise) else ()
    return Wanted(counted, (cfg.generate.sampling.max_tokens, *more), rooms, logprobs)


TODO = "name a config whose teacher is a server or an API"
