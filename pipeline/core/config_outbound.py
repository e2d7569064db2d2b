"""Config of the outbound guard: what is scanned before prompts leave this machine, and what becomes of a match."""

from typing import Any, Final, Literal

from pydantic import field_validator

from pipeline.core.config_base import ConfigModel, identity
from pipeline.core.stage import Json

Action = Literal["block", "redact", "off"]

STAY_HERE: Final = frozenset({"vllm", "server", "replay"})
"""Kinds of teachers that never leave this machine; every other kind is guarded, whatever its URL."""


class OutboundConfig(ConfigModel):
    """What is looked for in prompts before they leave this machine for an API.

    `block`: the row leaves with the reason `outbound:<kind>` and is not asked. `redact`: each match is replaced by
    `[REDACTED:<kind>]`, in what is asked and in the row, which is flagged `redacted`. `off`: not looked for. All turns
    are scanned, system messages and reasoning too. A URL on this machine is guarded as well: what listens there may
    pass prompts on. Teachers that run here (vllm, server) or are not asked (replay) are not concerned. Test prompts,
    which `evaluate` asks, are treated alike, for all models.
    """

    secrets: Action = "block"
    """API keys, tokens, private keys, credentials in URLs; see pipeline/text/secrets.py."""
    personal: Action = "off"
    """E-mail and IP addresses, phone numbers, payment cards, IBANs, US social security numbers; see
    pipeline/text/personal.py. Names and postal addresses are not found."""

    @field_validator("secrets", "personal", mode="before")
    @classmethod
    def _off_is_a_word_here(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value


def guard_towards(outbound: OutboundConfig | None, kind: str) -> OutboundConfig | None:
    """What holds for a kind of teacher; None where nothing leaves this machine, or nothing is looked for."""
    return None if kind in STAY_HERE else outbound


def outbound_that_counts(outbound: OutboundConfig | None) -> dict[str, Json]:
    """What of the guard counts in a step's key; nothing where it does not act."""
    return {} if outbound is None else identity(outbound)
