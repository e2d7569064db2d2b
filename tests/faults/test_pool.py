"""Several URLs of one teacher, and what happens to one of them that fails, or serves another model when it is back."""

import json
import socket
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_teacher import Retry, Sampling
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.ask import ask
from pipeline.teacher.identity import Listed, is_same_root, listed_in
from pipeline.teacher.request import Asked
from tests.faults.scripted_server import Act, ScriptedServer, Seen, echo, failure
from tests.support import make_context, wait_for

QUICK = Retry(budget_s=20, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
PROMPTS = [f"prompt {i}" for i in range(80)]


def slowly(seen: Seen, number: int) -> Act:
    """The prompt in capitals, after a while."""
    return Act(**{**vars(echo(seen, number)), "delay_s": 0.02})


class Pool:
    """A teacher at several URLs."""

    def __init__(self, folder: Path, urls: list[str], **teacher: Any) -> None:
        self.ctx, self.folder = make_context(folder), folder
        settings = {"kind": "openai", "base_url": urls[0], "replicas": urls[1:], "provider": "p", "model": "m"}
        self.teacher = OpenAITeacher.model_validate({"concurrency": 4, **settings, **teacher})

    def texts(self, prompts: list[str], retry: Retry = QUICK) -> list[str]:
        asked = Asked.of(self.teacher, Sampling(max_tokens=32), 0, DigestCache(self.folder / "digests.json"))
        requests = [asked.request("set", f"p{i}", 0, [Message("user", prompt)]) for i, prompt in enumerate(prompts)]
        return [answer.rejected or answer.text for answer in ask(self.teacher, asked, retry, requests, self.ctx)]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.ctx.events.seen if event == name]


def listing(models: list[dict[str, Any]]) -> Act:
    """A list of models."""
    return Act(body=json.dumps({"object": "list", "data": models}).encode())


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def upper(prompts: list[str]) -> list[str]:
    return [prompt.upper() for prompt in prompts]


def test_requests_are_spread_over_all_urls_and_each_is_asked_once(tmp_path):
    with ScriptedServer(slowly) as one, ScriptedServer(slowly) as two:
        assert Pool(tmp_path, [one.url, two.url]).texts(PROMPTS) == upper(PROMPTS)
    assert Counter(one.prompts + two.prompts) == Counter(PROMPTS)
    assert min(len(one.seen), len(two.seen)) >= 20


def test_one_that_takes_no_connection_gets_no_requests_and_the_others_take_its_load(tmp_path):
    dead = f"http://127.0.0.1:{closed_port()}/v1"
    with ScriptedServer(slowly) as alive:
        pool = Pool(tmp_path, [dead, alive.url])
        assert pool.texts(PROMPTS) == upper(PROMPTS)
    (out,) = pool.events("endpoint_out")
    assert out["host"] in dead
    (asked,) = pool.events("teacher_asked")
    assert sum(asked["retries"].values()) <= 8, "what was on its way when the first was refused"


def test_one_that_is_back_gets_requests_again(tmp_path):
    port = closed_port()
    with ExitStack() as stack:
        late = ScriptedServer(slowly)

        def open_late(seen: Seen, number: int) -> Act:
            if number == 20:
                stack.enter_context(late.at(port))
            return slowly(seen, number)

        alive = stack.enter_context(ScriptedServer(open_late))
        pool = Pool(tmp_path, [f"http://127.0.0.1:{port}/v1", alive.url])
        prompts = [f"prompt {i}" for i in range(400)]
        assert pool.texts(prompts) == upper(prompts)
        assert len(late.seen) >= 1 and late.probes[0].path.endswith("/models")
    assert len(pool.events("endpoint_back")) == 1


def test_when_none_answers_the_run_ends_resumable_within_the_budget(tmp_path):
    urls = [f"http://127.0.0.1:{closed_port()}/v1" for _ in range(2)]
    brief = QUICK.model_copy(update={"budget_s": 1.0})
    with pytest.raises(Incomplete, match=r"has not answered|have no answer yet"):
        Pool(tmp_path, urls).texts(PROMPTS, brief)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_host_that_refuses_it(tmp_path, status):
    with ScriptedServer(slowly) as fine, ScriptedServer(lambda *_: failure(status)) as strict:
        with pytest.raises(UsageError, match="refuses the key") as caught:
            Pool(tmp_path, [fine.url, strict.url]).texts(PROMPTS)
        assert caught.value.where == f"127.0.0.1:{strict.port}"


def test_one_that_refuses_the_key_does_not_cost_rows_because_the_others_take_it(tmp_path):
    """An answer shows that a 403 is about a row only where it comes from the same host."""

    def late(seen: Seen, number: int) -> Act:
        return Act(**{**vars(failure(403)), "delay_s": 0.1})

    with ScriptedServer(slowly) as fine, ScriptedServer(late) as strict:
        with pytest.raises(UsageError, match="refuses the key") as caught:
            Pool(tmp_path, [fine.url, strict.url]).texts(PROMPTS[:12])
        assert caught.value.where == f"127.0.0.1:{strict.port}"


class TestTheSameModel:
    ONE = [{"id": "m", "root": "org/one"}]  # noqa: RUF012 (a table)

    def script(self, server_models: list[dict[str, Any]]):
        """Fails three times in a row, listing other models from then on."""

        def answer(seen: Seen, number: int) -> Act:
            if 10 <= number < 13:
                self.server.on_get = lambda _: listing(server_models)
                return failure(502)
            return slowly(seen, number)

        return answer

    def run(self, folder: Path, after: list[dict[str, Any]]) -> list[str]:
        self.server = ScriptedServer(self.script(after))
        self.server.on_get = lambda _: listing(self.ONE)
        with self.server as server:
            return Pool(folder, [server.url]).texts(PROMPTS)

    def test_an_outage_of_one_that_serves_the_same_passes(self, tmp_path):
        assert self.run(tmp_path, self.ONE) == upper(PROMPTS)
        assert len(self.server.probes) >= 2

    @pytest.mark.parametrize("after", [[{"id": "m", "root": "org/two"}], [{"id": "other"}]])
    def test_another_model_stops_the_run(self, tmp_path, after):
        with pytest.raises(Incomplete, match="since its outage"):
            self.run(tmp_path, after)

    def test_another_model_at_a_url_that_was_down_stops_the_run_before_it_is_asked(self, tmp_path):
        first = ScriptedServer(slowly, on_get=lambda _: listing(self.ONE))
        second = ScriptedServer(slowly, on_get=lambda _: listing([{"id": "m", "root": "org/two"}]))
        with ExitStack() as stack:
            stack.enter_context(first)
            pool = Pool(tmp_path, [first.url])

            def exchange() -> None:
                wait_for(lambda: len(first.seen) >= 10, "some answers")
                stack.close()
                wait_for(lambda: pool.events("endpoint_out"), "the outage is seen")
                stack.enter_context(second.at(first.port))

            exchanger = threading.Thread(target=exchange)
            exchanger.start()
            with pytest.raises(Incomplete, match="serves 'org/two' as 'm', before it was 'org/one'"):
                pool.texts(PROMPTS)
            exchanger.join()
        assert second.seen == []

    def test_a_name_that_was_never_listed_is_not_looked_for(self, tmp_path):
        self.ONE = [{"id": "alias-of-m"}]
        assert self.run(tmp_path, [{"id": "other"}]) == upper(PROMPTS)

    @pytest.mark.parametrize("other", [[{"id": "m", "root": "org/two"}], [{"id": "n"}]])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_urls_of_different_models_are_a_mistake_that_is_said_before_the_first_request(
        self, tmp_path, other, is_first
    ):
        with (
            ScriptedServer(slowly, on_get=lambda _: listing(self.ONE)) as one,
            ScriptedServer(slowly, on_get=lambda _: listing(other)) as two,
        ):
            urls = [one.url, two.url] if is_first else [two.url, one.url]
            with pytest.raises(UsageError, match="serve different models"):
                Pool(tmp_path, urls).texts(PROMPTS)
        assert one.seen == two.seen == []

    def test_a_url_of_another_model_that_comes_up_later_gets_no_request(self, tmp_path):
        port = closed_port()
        with ExitStack() as stack:
            late = ScriptedServer(slowly, on_get=lambda _: listing([{"id": "m", "root": "org/two"}]))

            def open_late(seen: Seen, number: int) -> Act:
                if number == 20:
                    stack.enter_context(late.at(port))
                return slowly(seen, number)

            alive = stack.enter_context(ScriptedServer(open_late, on_get=lambda _: listing(self.ONE)))
            pool = Pool(tmp_path, [alive.url, f"http://127.0.0.1:{port}/v1"])
            with pytest.raises(UsageError, match="serves 'org/two' as 'm'"):
                pool.texts([f"prompt {i}" for i in range(2000)])
        assert late.seen == []

    def test_urls_without_a_list_or_without_roots_are_asked(self, tmp_path):
        with (
            ScriptedServer(slowly, on_get=lambda _: listing(self.ONE)) as one,
            ScriptedServer(slowly, on_get=lambda _: listing([{"id": "m"}])) as two,
            ScriptedServer(slowly) as three,
        ):
            assert Pool(tmp_path, [one.url, two.url, three.url]).texts(PROMPTS) == upper(PROMPTS)
        assert all(server.seen for server in (one, two, three))

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("org/m", "org/m", True),
            ("org/m", "other/m", False),
            ("/data/m", "/mnt/models/m/", True),
            ("/data/m-70b", "/data/m-8b", False),
            ("org/m", "/mnt/m", True),
        ],
    )
    def test_a_folder_may_lie_elsewhere_on_another_host(self, one, other, same):
        assert is_same_root(one, other) is is_same_root(other, one) is same

    @pytest.mark.parametrize("body", [None, {}, {"data": []}, {"data": "x"}, [], "x"])
    def test_what_is_no_list_says_nothing(self, body):
        assert listed_in(body, "m") is None

    def test_a_list_says_whether_it_names_the_model(self):
        assert listed_in({"data": [3, {"id": "m", "root": 1}]}, "m") == Listed(True)
        assert listed_in({"data": [{"id": "n"}]}, "m") == Listed(False)


def test_a_url_that_refuses_everything_is_the_config_s_fault_and_not_the_rows(tmp_path: Path) -> None:
    """A replica that was started with other flags, say."""
    with ScriptedServer(echo) as good, ScriptedServer(lambda seen, n: failure(400, "no such tool parser")) as bad:
        with pytest.raises(UsageError, match="no such tool parser"):
            Pool(tmp_path, [good.url, bad.url]).texts([f"prompt {number}" for number in range(200)])
        answers = Pool(tmp_path, [good.url]).texts([f"prompt {number}" for number in range(200)])
    assert not any(answer == "bad_request" for answer in answers), "no refusal was stored"
