"""Config of how the stages that work on text use this machine's CPUs."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config_base import ConfigModel


class InProcess(ConfigModel):
    """One shard after the other, in the pipeline's own process."""

    kind: Literal["in_process"]
    """No other process."""


class Processes(ConfigModel):
    """Shards are spread over worker processes of this machine; worth it from some 50,000 rows on."""

    kind: Literal["processes"]
    """Worker processes."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """How many; each holds about 250 MB with shards of the usual size. None: one per CPU that the pipeline may use."""


FanoutConfig = Annotated[InProcess | Processes, Field(discriminator="kind")]
