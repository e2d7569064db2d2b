"""What a person is told when a teacher cannot be asked at all."""

from pipeline.core.errors import Incomplete, PipelineError, UsageError
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.verdict import Abort, Verdict


def abort_error(endpoint: Endpoint, verdict: Verdict) -> PipelineError:
    """What a person is told when everything stops. What the server said about a refused key is not repeated: it may
    quote the key."""
    assert verdict.abort is not None
    what = f"{verdict.abort.value} ({verdict.reason})"
    if verdict.abort is Abort.QUOTA:
        return Incomplete(what, where=endpoint.host, todo="top up the account, then run again; answers are kept")
    if verdict.abort is Abort.KEY:
        if endpoint.key_variable is None:
            todo = "give the teacher `api_key: ${env:NAME}` and set that environment variable"
        else:
            todo = f"check the value of the environment variable {endpoint.key_variable}"
        return UsageError(what, where=endpoint.host, todo=todo)
    if verdict.abort is Abort.MODEL:
        what = f"{what}: {verdict.detail}"
    return UsageError(what, where=endpoint.host, todo="check the teacher's `base_url` and `model`")


def refused_error(endpoint: Endpoint, count: int, detail: str) -> UsageError:
    """What a person is told when nothing was answered and everything was refused."""
    what = f"the teacher refused all of the first {count} requests: {detail}"
    return UsageError(what, where=endpoint.host, todo="correct the teacher's settings or `sampling`")
