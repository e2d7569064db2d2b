"""What an endpoint adds to every conversation: one place, so that jobs ask for the same as online calls."""

from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.request import Asked
from pipeline.teacher.seeds import wants_seeds


def prepare(endpoint: Endpoint, asked: Asked, kind: str) -> None:
    """Make an endpoint ask for what is wanted; call it before its first request and after `settle_seeds`, where there
    is a trial.

    Args:
        kind: of the teacher.
    """
    endpoint.logprobs = asked.logprobs
    endpoint.sends_seeds = endpoint.takes_seeds and wants_seeds(asked, kind)
