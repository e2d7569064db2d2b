"""Soft targets beside the rows of stage `generate`, where the config asks for them: a row for each kept row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.core.config import GenerateStep
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import Teacher
from pipeline.core.stage import Result
from pipeline.core.targets import TargetFacts, TargetWriter, count_in, tokenizer_digest
from pipeline.stages.generate.rows import Row
from pipeline.teacher.ask import Asker
from pipeline.teacher.request import model_folder


class Targets:
    """The side file of a stage; nothing at all where the config asks for none."""

    def __init__(self, writer: TargetWriter | None, facts: TargetFacts | None) -> None:
        self._writer, self._facts = writer, facts

    def write(self, rows: Sequence[Row]) -> None:
        """Add those of the rows that are kept.

        Raises:
            ValueError: one has none.
        """
        if self._writer is None:
            return
        kept = [row for row in rows if row.answer.rejected is None]
        told = [row.answer.logprobs for row in kept if row.answer.logprobs is not None]
        self._writer.write([row.record.row_id for row in kept], told)

    def counted_in(self, result: Result) -> Result:
        """The stage's result with the side file in it; call it when the file is closed.

        It is part of the content: what trains on soft targets must see that they are others, and so must a lock file.
        """
        if self._writer is None or self._facts is None:
            return result
        written = self._writer.written()
        metrics = {**result.metrics, "targets": {"rows": written.rows, **self._facts.json()}}
        return replace(result, content=count_in(result.content, written.content), metrics=metrics)


@contextmanager
def open_targets(cfg: GenerateStep, askers: Mapping[str, Asker], out: Path) -> Iterator[Targets]:
    """The side file in `out`, open for the block; call it when the teachers have answered."""
    logprobs = cfg.generate.logprobs
    if logprobs is None:
        yield Targets(None, None)
        return
    tokenizers = {name: _tokenizer(cfg.teachers[name]) for name in askers}
    facts = TargetFacts(logprobs.top_k, tokenizers, {name: asker.scale for name, asker in askers.items()})
    with TargetWriter(out, facts) as writer:
        yield Targets(writer, facts)


def _tokenizer(teacher: Teacher) -> str | None:
    """Digest of the tokenizer whose ids a teacher gives; None: an API's, which nobody has seen."""
    return tokenizer_digest(model_folder(teacher)) if isinstance(teacher, LocalServer) else None
