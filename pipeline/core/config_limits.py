"""Config of how fast a teacher may be asked: requests and tokens per minute."""

from typing import Annotated

from pydantic import Field

from pipeline.core.config_base import OPERATIONAL, ConfigModel

PerMinute = Annotated[int, Field(ge=1)]


class Limits(ConfigModel):
    """What one URL may get per minute; None: no limit of ours. Whatever is set here, the server's own refusals
    (429, Retry-After) are obeyed and the number of requests in flight adapts."""

    requests_per_minute: Annotated[PerMinute | None, OPERATIONAL] = None
    """Most requests per minute."""
    input_tokens_per_minute: Annotated[PerMinute | None, OPERATIONAL] = None
    """Most prompt tokens per minute."""
    output_tokens_per_minute: Annotated[PerMinute | None, OPERATIONAL] = None
    """Most completion tokens per minute. A request in flight counts with its `max_tokens`; what it did not use is
    given back when it is answered."""
