"""Stored answers on a damaged disk: every intact one is kept, none is wrong, and a person is told of the others."""

import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import CorruptArtefact
from pipeline.teacher import audit
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import PAGE_BYTES, Attempt, Ended, Segment, Stored
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT
from tests.faults.scripted_server import ScriptedServer, echo
from tests.faults.shim.preload import KILLS, KINDS, Fault, Host, hosting
from tests.faults.shim.project import ROWS, RUN, Made, attempts, write_api_project

COUNT = 400
SEED = 20260


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def text(number: int) -> str:
    """Every 40th is longer than a page, compressed too."""
    return random.Random(number).randbytes(9000 if number % 40 == 0 else 60).hex()


def body(number: int) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text(number)}, "finish_reason": "stop"}]}).encode()


def stored(number: int) -> Stored:
    return Stored(key(number), 64, 1000 + number, "t" * 64, "m", "vllm 1", OPENAI_CHAT.name, 200, None, body(number))


def left_by_a_dead_process(folder: Path, *, in_wal: bool) -> Path:
    """A segment whose writer was killed (all answers in the -wal), or ended without folding (all in the file)."""
    writer = Segment(folder)
    for first in range(0, COUNT, 20):
        numbers = range(first, first + 20)
        writer.write([Attempt(number + 1, key(number), 64, 1) for number in numbers], [], [])
        writer.write([], [Ended(number + 1, "answer") for number in numbers], [stored(number) for number in numbers])
    kept = folder / "kept"
    kept.mkdir()
    if not in_wal:
        writer.close()
    for suffix in ("", "-wal"):
        source = folder / f"{writer.path.name}{suffix}"
        if source.exists():
            shutil.copyfile(source, kept / f"dead.sqlite{suffix}")
    if in_wal:
        writer.close()
    return kept / "dead.sqlite"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return left_by_a_dead_process(tmp_path_factory.mktemp("killed"), in_wal=True)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return left_by_a_dead_process(tmp_path_factory.mktemp("ended"), in_wal=False)


def recovered(segment: Path, folder: Path, damage: Callable[[Path], object]) -> set[int]:
    """Numbers of the answers that are found after the damage, before and after folding alike; checks each text."""
    shutil.rmtree(folder, ignore_errors=True)
    segments = folder / "segments"
    segments.mkdir(parents=True)
    for source in segment.parent.iterdir():
        shutil.copyfile(source, segments / source.name)
    damage(segments / segment.name)
    wanted = {key(number): number for number in range(COUNT)}
    with ResponseStore(folder) as store:
        found = store.get_many(dict.fromkeys(wanted, 64))
        for each, outcome in found.items():
            assert outcome.reply is not None and outcome.reply.text == text(wanted[each])
        store.fold()
        assert store.get_many(dict.fromkeys(wanted, 64)) == found
    assert list(segments.iterdir()) == []
    return {wanted[each] for each in found}


def flip(path: Path, chance: random.Random, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


class TestSegments:
    """Files of dead processes; what is lost is told and asked for again, so the run goes on."""

    def test_without_damage_every_answer_is_there(self, killed: Path, ended: Path, tmp_path: Path) -> None:
        assert wal_of(killed).stat().st_size > 50 * PAGE_BYTES and not wal_of(ended).exists()
        for segment in (killed, ended):
            assert recovered(segment, tmp_path / "r", lambda path: None) == set(range(COUNT))
            assert not (tmp_path / "r" / "damaged").exists()

    def test_a_bit_flip_costs_at_most_the_rows_of_one_page(self, ended: Path, tmp_path: Path) -> None:
        chance = random.Random(SEED)
        lost = [COUNT - len(recovered(ended, tmp_path / "r", lambda path: flip(path, chance))) for _ in range(40)]
        print(f"40 bit flips in a segment of {COUNT} answers: {sum(lost)} answers lost, {max(lost)} at most")
        assert max(lost) <= PAGE_BYTES // 150

    def test_a_bit_flip_in_what_was_not_moved_into_the_file_yet(self, killed: Path, tmp_path: Path) -> None:
        """SQLite's own check sums end the -wal at the first damaged frame; the frames behind it are read too."""
        chance = random.Random(SEED)
        lost = [
            COUNT - len(recovered(killed, tmp_path / "r", lambda path: flip(wal_of(path), chance))) for _ in range(40)
        ]
        print(f"40 bit flips in a -wal of {COUNT} answers: {sum(lost)} answers lost, {max(lost)} at most")
        assert max(lost) <= PAGE_BYTES // 150

    @pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.77, 0.99])
    def test_a_file_that_was_cut_keeps_what_is_before_the_cut(self, ended: Path, tmp_path: Path, share: float) -> None:
        size = int(ended.stat().st_size * share)

        def cut(path: Path) -> None:
            with path.open("r+b") as file:
                file.truncate(size)

        assert len(recovered(ended, tmp_path / "r", cut)) >= (share - 0.15) * COUNT

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.77, 0.999])
    def test_a_torn_wal_keeps_what_was_written_before(self, killed: Path, tmp_path: Path, share: float) -> None:
        """What every crash of the machine leaves; a run that it meets says nothing of damage."""
        size = int(wal_of(killed).stat().st_size * share)

        def tear(path: Path) -> None:
            with wal_of(path).open("r+b") as file:
                file.truncate(size)

        assert len(recovered(killed, tmp_path / "r", tear)) >= (share - 0.05) * COUNT
        assert not (tmp_path / "r" / "damaged").exists()

    @pytest.mark.parametrize("garbage", [b"\0" * 100, b"\xff" * PAGE_BYTES, b"not a database " * 20])
    def test_a_file_without_its_header_gives_its_rows(
        self, ended: Path, tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert recovered(ended, tmp_path / "r", lambda path: overwrite(path, 0, garbage)) == set(range(COUNT))
        assert f"{COUNT} answers in it are intact" in caplog.text
        assert (tmp_path / "r" / "damaged" / "dead.sqlite").is_file(), "nothing is deleted"

    @pytest.mark.parametrize("content", [b"", b"\0" * PAGE_BYTES, b"not a database"])
    def test_a_file_of_which_only_the_wal_is_left_gives_its_rows(
        self, killed: Path, tmp_path: Path, content: bytes
    ) -> None:
        assert recovered(killed, tmp_path / "r", lambda path: path.write_bytes(content)) == set(range(COUNT))

    def test_a_file_of_garbage_gives_nothing_and_stops_nobody(self, tmp_path: Path) -> None:
        chance = random.Random(SEED)
        (tmp_path / "garbage").mkdir()
        segment = tmp_path / "garbage" / "dead.sqlite"
        for size in (1, 16, 99, 100, 4095, 4096, 100_000):
            segment.write_bytes(b"SQLite format 3\0"[:size] + chance.randbytes(max(0, size - 16)))
            assert recovered(segment, tmp_path / "r", lambda path: None) == set()
        assert (tmp_path / "r" / "damaged" / "dead.sqlite").is_file()

    def test_answers_with_another_key_or_status_than_was_written_are_not_believed(
        self, ended: Path, tmp_path: Path
    ) -> None:
        """SQLite finds nothing wrong with such a file."""
        content = ended.read_bytes()
        at = content.index(key(7))
        found = recovered(ended, tmp_path / "r", lambda path: overwrite(path, at, key(8)))
        assert set(range(COUNT)) - found <= {7}

    def test_the_attempts_are_kept_too(self, ended: Path, tmp_path: Path) -> None:
        recovered(ended, tmp_path / "r", lambda path: overwrite(path, 0, b"\0" * PAGE_BYTES))
        (file,) = (tmp_path / "r" / "attempts").iterdir()
        table = pq.read_table(file)
        assert sorted(table["id"].to_pylist()) == list(range(1, COUNT + 1))
        assert set(table["outcome"].to_pylist()) == {"answer"}


class TestAudit:
    """`verify` tells of damage in a segment before a run meets it, and changes nothing."""

    def copied(self, segment: Path, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(segment.parent, folder)) / segment.name

    def test_what_is_whole_or_torn_off_at_its_end_is_no_damage(self, killed: Path, ended: Path, tmp_path: Path) -> None:
        assert audit.check(self.copied(ended, tmp_path / "a")).damage is None
        for share in (1.0, 0.999, 0.5, 0.001):
            path = self.copied(killed, tmp_path / "a")
            with wal_of(path).open("r+b") as file:
                file.truncate(int(wal_of(killed).stat().st_size * share))
            assert audit.check(path).damage is None

    def test_no_bit_flip_in_a_wal_hides_answers(self, killed: Path, tmp_path: Path) -> None:
        """SQLite shows the answers before the damaged frame and says nothing of the others."""
        chance = random.Random(SEED)
        for _ in range(25):
            path = self.copied(killed, tmp_path / "a")
            flip(wal_of(path), chance)
            changed = wal_of(path).read_bytes()
            assert audit.check(path).damage is not None
            assert wal_of(path).read_bytes() == changed

    @pytest.mark.parametrize("at", [0, 4, 8, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52])
    def test_nor_one_in_its_header_or_in_that_of_a_frame(self, killed: Path, tmp_path: Path, at: int) -> None:
        path = self.copied(killed, tmp_path / "a")
        content = wal_of(path).read_bytes()
        overwrite(wal_of(path), at, bytes([content[at] ^ 1]))
        told = audit.check(path).damage
        assert told is not None and told.endswith("in its write-ahead log only the first 0 can be read")
        assert audit.check(path).todo == audit.SALVAGE
        numbers = recovered(killed, tmp_path / "r", lambda path: overwrite(wal_of(path), at, bytes([content[at] ^ 1])))
        assert len(numbers) >= COUNT - PAGE_BYTES // 150


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
def test_no_answer_is_lost_where_folding_fails_at_any_operation(
    host: Host, ended: Path, tmp_path: Path, damaged: bool
) -> None:
    """Each operation on a file fails once; six ways in turn."""
    folder = tmp_path / "responses"
    wanted = dict.fromkeys(map(key, range(COUNT)), 64)
    for number in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "segments").mkdir(parents=True)
        shutil.copyfile(ended, folder / "segments" / ended.name)
        if damaged:
            overwrite(folder / "segments" / ended.name, 0, b"\0" * PAGE_BYTES)
        kind = KINDS[number % len(KINDS)]
        struck = host.run(tmp_path, str(folder), act="fold", fault=Fault(kind, number, coarse=True))
        told = f"{number} {kind.name} at {struck.what}: {struck.stderr}"
        assert struck.code in ((-9,) if kind in KILLS and struck.fired else (0, 3)), told
        with ResponseStore(folder) as store:
            assert store.get_many(wanted).keys() == wanted.keys(), told
            store.fold()
            assert store.get_many(wanted).keys() == wanted.keys(), told
        assert (folder / "damaged" / ended.name).exists() is damaged, told
        if struck.fired == 0:
            break
    print(f"{number - 1} file operations, each failed once: no answer lost")
    assert number > 20


class TestFoldedFiles:
    """These are synced and final, so damage is the disk's: a person decides, since asking again costs money."""

    @pytest.fixture
    def folded(self, killed: Path, tmp_path: Path) -> Path:
        assert len(recovered(killed, tmp_path / "r", lambda path: None)) == COUNT
        return tmp_path / "r"

    def test_every_bit_flip_is_noticed(self, folded: Path) -> None:
        chance = random.Random(SEED)
        (file,) = (folded / "answers").iterdir()
        whole = file.read_bytes()
        for _ in range(60):
            flip(file, chance)
            with ResponseStore(folded) as store, pytest.raises(CorruptArtefact) as caught:
                store.get_many({key(1): 64})
            assert caught.value.where == str(file)
            file.write_bytes(whole)

    def test_it_is_left_where_it_is(self, folded: Path) -> None:
        (file,) = (folded / "answers").iterdir()
        flip(file, random.Random(SEED))
        for _ in range(2):
            with ResponseStore(folded) as store, pytest.raises(CorruptArtefact, match="sha256"):
                store.get_many({key(1): 64})


@dataclass(frozen=True, slots=True)
class Complete:
    """A run that lost its store but not its answers; the server has seen nothing since."""

    host: Host
    project: Path
    server: ScriptedServer
    made: Made


class TestRuns:
    """The same through the command line."""

    @pytest.fixture
    def complete(self, host: Host, tmp_path: Path) -> Iterator[Complete]:
        with ScriptedServer(echo) as server:
            write_api_project(tmp_path, server)
            done = host.run(tmp_path, *RUN)
            assert done.code == 0, done.stderr
            made = Made.by(tmp_path)
            shutil.rmtree(tmp_path / "data" / "store")
            server.seen.clear()
            yield Complete(host, tmp_path, server, made)

    def test_a_damaged_folded_file_ends_with_5_and_a_sound_copy_mends_it(self, complete: Complete) -> None:
        host, project, server, made = complete.host, complete.project, complete.server, complete.made
        (file,) = (project / "data" / "responses" / "answers").iterdir()
        whole = file.read_bytes()
        flip(file, random.Random(SEED))
        done = host.run(project, *RUN)
        assert done.code == 5
        assert done.stderr.splitlines()[-2:] == [
            f"   at: {file.relative_to(project)}",
            "   do: put a sound copy in its place, or move it away: what only it held is then asked for again",
        ]
        assert server.seen == [], "nothing is paid for before a person has decided"
        file.write_bytes(whole)
        assert host.run(project, *RUN).code == 0
        assert (server.seen, Made.by(project)) == ([], made)

    def test_moved_away_only_its_answers_are_asked_for_again(self, complete: Complete) -> None:
        host, project, server, made = complete.host, complete.project, complete.server, complete.made
        (file,) = (project / "data" / "responses" / "answers").iterdir()
        file.unlink()
        assert host.run(project, *RUN).code == 0
        assert len(server.seen) == ROWS
        assert Made.by(project) == made
        assert len(attempts(project)) == 2 * ROWS

    def test_a_damaged_segment_is_told_of_and_the_run_goes_on(self, complete: Complete) -> None:
        host, project, server, made = complete.host, complete.project, complete.server, complete.made
        segment = project / "data" / "responses" / "segments" / "1-dead.sqlite"
        segment.write_bytes(b"SQLite format 3\0" + b"\xff" * 10_000)
        done = host.run(project, *RUN)
        assert done.code == 0, done.stderr
        assert "was damaged: 0 answers in it are intact" in done.stderr
        assert "responses/damaged/1-dead.sqlite" in done.stderr
        assert (server.seen, Made.by(project)) == ([], made)
