"""Where requests go: a URL, the name its model has there, and the reference to its key."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.core.config_teacher import OpenAITeacher
from pipeline.core.errors import UsageError
from pipeline.teacher.limits import AdaptiveLimit
from pipeline.teacher.wire import Wire
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT


@dataclass(slots=True)
class Endpoint:
    """One server that answers.

    Attributes:
        url: where requests are posted.
        wire: their format.
        model: name of the model there.
        engine: server and version, where known; recorded with each answer, part of no key.
        key_variable: environment variable with the API key; None: no key is sent.
        limit: how many requests it gets at a time.
        max_tokens_field: name under which it takes the cap.
        up: False while the server is being restarted.
    """

    url: str
    wire: Wire
    model: str
    engine: str
    key_variable: str | None
    limit: AdaptiveLimit
    max_tokens_field: str = "max_tokens"
    up: bool = True

    @property
    def host(self) -> str:
        """Host and port, for messages: a URL's path may hold account names."""
        return urlsplit(self.url).netloc

    def read_key(self) -> str | None:
        """The API key, read now from the environment and kept nowhere.

        Raises:
            UsageError: the variable is not set.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            what = f"the environment variable {self.key_variable} is not set"
            raise UsageError(what, where=f"teachers.*.api_key (for {self.host})", todo=f"export {self.key_variable}=…")
        return key


def api_endpoint(teacher: OpenAITeacher) -> Endpoint:
    """The endpoint of an API teacher."""
    return Endpoint(
        url=OPENAI_CHAT.url(teacher.base_url, teacher.model),
        wire=OPENAI_CHAT,
        model=teacher.model,
        engine="",
        key_variable=teacher.key_variable,
        limit=AdaptiveLimit(teacher.concurrency),
        max_tokens_field=teacher.max_tokens_field,
    )
