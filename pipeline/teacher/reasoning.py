"""Thinking that a model writes into its text, told apart from the answer by a rule that the config declares."""

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import Teacher


def tags_of(teacher: Teacher) -> tuple[str, str] | None:
    """The tags around the thinking in this teacher's texts; None where the config declares none."""
    return teacher.reasoning_tags if isinstance(teacher, OpenAITeacher | LocalServer) else None


def split_reasoning(text: str, finish_reason: str, tags: tuple[str, str]) -> tuple[str | None, str]:
    """Thinking (None if there is none) and answer of a text, both without the white space around the tags.

    What stands before the first closing tag is thinking, whether or not it begins with the opening one: some chat
    templates put that into the prompt. A text without a closing tag is thinking as a whole where it was cut (`length`)
    or begins with the opening tag; else it is an answer.
    """
    opening, closing = tags
    before, found, answer = text.partition(closing)
    if not found and finish_reason != "length" and not text.lstrip().startswith(opening):
        return None, text
    return before.strip().removeprefix(opening).strip() or None, answer.lstrip()
