"""The pipeline as a table of stages, and the steps of a plan."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pipeline.core import config as c
from pipeline.core.config_base import ConfigModel
from pipeline.core.config_budget import Spending
from pipeline.core.config_outbound import guard_towards
from pipeline.core.config_refusals import takes_temperature
from pipeline.core.config_teacher import ReplayTeacher, Teacher
from pipeline.core.stage import StageModule
from pipeline.teacher.prices import token_price_of
from pipeline.terms.declared import declared_student, declared_teacher, with_family, with_terms


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A kind of stage: its module is `pipeline.stages.<kind>`.

    Attributes:
        kind: name of the stage.
        after: kinds whose artefacts it reads.
        config: the part of a run's config that it is given.
        shows_manifests: it reads what upstream contents do not cover, so that upstream keys count in its key too.
        samples: its content may differ between machines for one recipe: it holds what an engine computed in floating
            point, so `run --locked` calls a difference drift, not damage.
    """

    kind: str
    after: tuple[str, ...]
    config: Callable[[c.RunConfig], ConfigModel]
    shows_manifests: bool = False
    samples: bool = False


def _teacher(run: c.RunConfig) -> Teacher:
    return run.teachers[run.generate.teacher]


def _generate_step(run: c.RunConfig) -> c.GenerateStep:
    """With the guard only where a prompt leaves this machine, and the checks only where rows are counted by them, so
    that they count in no other key."""
    teachers = {name: with_terms(run.teachers[name], run.policy) for name in run.generate.teachers}
    leaves = any(guard_towards(run.generate.outbound, teacher.kind) is not None for teacher in teachers.values())
    return c.GenerateStep(
        generate=run.generate if leaves else run.generate.model_copy(update={"outbound": None}),
        teachers=teachers,
        checks=None if run.generate.accept is None else run.filter,
        spending=_spending(run).model_copy(update={"teacher": None}),
    )


def _dataset_step(run: c.RunConfig) -> c.DatasetStep:
    return c.DatasetStep(dataset=run.dataset, policy=run.policy, declared=declared_sources(run))


def _train_step(run: c.RunConfig) -> c.TrainStep:
    return c.TrainStep(train=run.train, student=with_family(run.student, run.policy), policy=run.policy)


def declared_sources(run: c.RunConfig) -> tuple[c.DeclaredSource, ...]:
    """The teachers that answer and the student's base, as the config declares them."""
    teachers = {name: with_terms(run.teachers[name], run.policy) for name in run.generate.teachers}
    declared = [declared_teacher(name, teacher) for name, teacher in teachers.items()]
    return (*declared, declared_student(with_family(run.student, run.policy)))


def _spending(run: c.RunConfig) -> Spending:
    spending = Spending(run=run.name, teacher=run.generate.teacher, budget=run.budget)
    if not spending.is_money_capped:
        return spending
    asked = {name: each for name, each in run.teachers.items() if not isinstance(each, ReplayTeacher)}
    prices = {name: price for name, each in asked.items() if (price := token_price_of(each)) is not None}
    return spending.model_copy(update={"prices": prices})


STAGES = (
    StageSpec("prompts", (), lambda run: c.PromptsStep(prompts=run.prompts)),
    StageSpec("generate", ("prompts",), _generate_step, samples=True),
    StageSpec("filter", ("generate",), lambda run: c.FilterStep(filter=run.filter)),
    StageSpec("dedup", ("filter",), lambda run: c.DedupStep(dedup=run.dedup)),
    StageSpec("dataset", ("dedup", "prompts", "generate", "filter"), _dataset_step),
    StageSpec("train", ("dataset",), _train_step, samples=True),
    StageSpec(
        "evaluate",
        ("train", "prompts"),
        lambda run: c.EvaluateStep(
            evaluate=run.evaluate,
            teacher=_teacher(run),
            student=run.student,
            retry=run.generate.retry,
            greedy_teacher=takes_temperature(_teacher(run), run.generate.sampling),
            outbound=guard_towards(run.generate.outbound, _teacher(run).kind),
            spending=_spending(run),
        ),
        samples=True,
    ),
    StageSpec(
        "report",
        ("prompts", "generate", "filter", "dedup", "dataset", "train", "evaluate"),
        lambda run: c.ReportStep(report=run.report, name=run.name),
        shows_manifests=True,
        samples=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan; its name is its kind until a plan holds two of a kind.

    Attributes:
        name: what the lock, the runs folder and the command line call it.
        kind: which stage it is.
        inputs: names of the steps whose artefacts it reads.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]


def plan_steps() -> list[Step]:
    """The steps of a run, in the order in which data flows."""
    return [Step(spec.kind, spec.kind, spec.after) for spec in STAGES]


def step_names() -> Sequence[str]:
    """Names of the steps, for the command line."""
    return [step.name for step in plan_steps()]


def spec_of(step: Step) -> StageSpec:
    """The stage that a step is one of."""
    return next(spec for spec in STAGES if spec.kind == step.kind)


def stage_module(kind: str) -> StageModule:
    """The module of a stage, imported on first use: stages load heavy libraries."""
    return cast(StageModule, importlib.import_module(f"pipeline.stages.{kind}"))


def ancestors(steps: Mapping[str, Step], name: str) -> list[str]:
    """Names of all steps that `name` builds on, in the order in which data flows."""
    wanted = set(steps[name].inputs)
    for step in reversed([*steps.values()]):
        if step.name in wanted:
            wanted.update(step.inputs)
    return [step for step in steps if step in wanted]
