"""One bit of one file is flipped, or a file is cut, emptied, removed, added or replaced: noticed before it is used."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import Manifest
from pipeline.core.load import load_config
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Store
from pipeline.runner.run import committed_before
from pipeline.runner.session import open_session
from tests.faults.scripted_server import ScriptedServer, echo
from tests.faults.shim.preload import Host, hosting
from tests.faults.shim.project import RUN, Made, write_api_project
from tests.support import pretend_trainable

SEED = int(os.environ.get("FLIP_SEED", "20260"))
FLIPS = 300


@dataclass(frozen=True, slots=True)
class Site:
    """A complete run in a folder, what runs commands on it, the server that answered it, and what it made."""

    host: Host
    project: Path
    server: ScriptedServer
    made: Made

    def files(self) -> list[Path]:
        """Every file of every artefact."""
        return sorted(path for path in (self.project / "data" / "store").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("complete")
    with ScriptedServer(echo) as server, hosting(tmp_path_factory.mktemp("host")) as host:
        write_api_project(folder, server)
        done = host.run(folder, *RUN)
        assert done.code == 0, done.stderr
        add_trained_model(Store(folder / "data" / "store"))
        yield Site(host, folder, server, Made.by(folder))


@pytest.fixture
def site(complete: Site, tmp_path: Path) -> Site:
    """A copy of the complete run to damage."""
    project = tmp_path / "project"
    shutil.copytree(complete.project, project, symlinks=True)
    complete.server.seen.clear()
    return Site(complete.host, project, complete.server, complete.made)


def add_trained_model(store: Store) -> None:
    """An artefact of the files that `train` leaves, without the training: a model's folder and a loss curve."""
    with store.staging("train") as staged:
        (staged / "model").mkdir()
        (staged / "model" / "model.safetensors").write_bytes(random.Random(SEED).randbytes(20_000))
        (staged / "model" / "config.json").write_text('{"hidden_size": 64}', "utf-8")
        (staged / "loss.json").write_text("[1.5, 1.25]", "utf-8")
        store.commit(staged, Manifest.of("train", "7" * 64, {}, Result(1, 1, {}, "c" * 64), {}))


def flip(path: Path, chance: random.Random) -> int:
    """Flip one bit in place; returns its number."""
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


def place(path: Path) -> tuple[str, str]:
    """Stage and key of the artefact that holds a file."""
    store = next(parent for parent in path.parents if parent.name == "store")
    return path.relative_to(store).parts[0], path.relative_to(store).parts[1]


def test_300_random_bit_flips_are_noticed_before_use(complete: Site) -> None:
    """Each file is as likely as any other, so that each kind is hit often, whatever its size."""
    chance = random.Random(SEED)
    store = Store(complete.project / "data" / "store")
    hit: Counter[str] = Counter()
    for number in range(FLIPS):
        path = chance.choice(complete.files())
        whole = path.read_bytes()
        bit = flip(path, chance)
        told = f"seed {SEED}, flip {number}: bit {bit} of {path.name}"
        with pytest.raises(CorruptArtefact) as caught:
            store.find(*place(path))
            pytest.fail(f"{told} was not noticed")
        assert str(path.parent) in caught.value.where or path.parent.name in caught.value.where, told
        path.write_bytes(whole)
        assert store.find(*place(path)) is not None, f"{told}: not as before"
        hit[f"{place(path)[0]}/{'rows' if path.suffix == '.parquet' else path.name}"] += 1
    print(f"{FLIPS} bit flips, {hit.total()} noticed (seed {SEED}): {dict(sorted(hit.items()))}")
    assert hit.total() == FLIPS
    kinds = {path.suffix for path in complete.files()}
    assert kinds == {".parquet", ".json", ".md", ".safetensors", ".txt", ""}, "texts and NOTICE are covered too"


# -------------------------------------------------------------------------------------------------- before training


class TestBeforeTraining:
    """What `train` does first, in every process of a launch: it finds the artefacts before it, and their hashes."""

    def test_300_random_bit_flips_over_the_shards_of_a_data_set_are_noticed_before_a_row_is_read(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(site.project)
        session = open_session(load_config(Path("run.yaml")), Path("data"), quiet=True)
        shards = sorted((Path("data/runs/small/dataset").resolve() / "data").glob("*.parquet"))
        assert {path.name.partition("-")[0] for path in shards} == {"train", "validation"}
        chance = random.Random(SEED)
        for number in range(FLIPS):
            path = chance.choice(shards)
            whole = path.read_bytes()
            bit = flip(path, chance)
            with pytest.raises(CorruptArtefact) as caught:
                committed_before(session, "train")
                pytest.fail(f"seed {SEED}, flip {number}: bit {bit} of {path.name} was not noticed")
            assert Path(caught.value.where).resolve() == path
            assert caught.value.exit_code == 5
            path.write_bytes(whole)
        assert "dataset" in committed_before(session, "train"), "as before"

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_the_command_ends_with_5_and_names_the_shard(self, site: Site, split: str) -> None:
        (shard,) = (site.project / "data" / "runs" / "small" / "dataset" / "data").glob(f"{split}-*.parquet")
        flip(shard, random.Random(SEED))
        pretend_trainable(site.project)
        done = site.host.run(site.project, "train", "run.yaml")
        assert done.code == 5, done.stderr
        assert shard.name in done.stderr.splitlines()[-2]
        assert "train: running" not in done.stderr


# ------------------------------------------------------------------------------------------ through the commands


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_rows(path: Path) -> None:
    """Another valid file of the same schema: the rows in reverse, or none."""
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array(range(table.num_rows - 1, -1, -1))), path, compression="zstd")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip(path, random.Random(SEED)),
    "cut in half": cut,
    "emptied": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(),
    "replaced by other valid parquet": other_rows,
    "joined by another file": lambda path: shutil.copy(path, path.with_name("part-00001.parquet")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage", ["prompts", "generate", "dedup"])
def test_run_sets_a_damaged_artefact_aside_and_rebuilds_it_with_equal_content(
    site: Site, stage: str, damage: str
) -> None:
    (shard,) = (site.project / "data" / "runs" / "small" / stage / "rows").iterdir()
    DAMAGE[damage](shard)
    done = site.host.run(site.project, *RUN, "--json")
    assert done.code == 0, done.stderr
    assert "ERROR" in done.stderr and "it will be rebuilt" in done.stderr
    ran = {step["step"] for step in json.loads(done.stdout)["steps"] if step["ran"]}
    assert ran == {stage}, "what follows is cut off by equal content"
    assert Made.by(site.project) == site.made
    assert site.server.seen == [], "answers are not asked for again"
    (aside,) = (site.project / "data" / "store" / ".quarantine").iterdir()
    assert aside.name.startswith(f"{stage}-") and "-corrupt-" in aside.name


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_stage_command_refuses_a_damaged_input_and_names_it(site: Site, damage: str) -> None:
    (shard,) = (site.project / "data" / "runs" / "small" / "filter" / "rows").iterdir()
    DAMAGE[damage](shard)
    before = sorted((site.project / "data" / "store").rglob("*"))
    done = site.host.run(site.project, "dedup", "run.yaml")
    assert done.code == 5
    what, where, todo = done.stderr.splitlines()[-3:]
    assert what.startswith("error: ") and "data/store/filter/" in where and "it will be rebuilt" in todo
    assert sorted((site.project / "data" / "store").rglob("*")) == before, "nothing is moved"


def test_a_damaged_manifest_is_named_too(site: Site) -> None:
    manifest = site.project / "data" / "runs" / "small" / "dedup" / MANIFEST
    flip(manifest, random.Random(SEED))
    done = site.host.run(site.project, "dataset", "run.yaml")
    assert done.code == 5
    assert MANIFEST in done.stderr


# -------------------------------------------------------------------------------------------------- beside the store


@pytest.mark.parametrize("garbage", [b"", b"{", b"\x00\xff" * 50, b'{"1:2:3:4": 5}', b"[]", b"[" * 100_000])
def test_garbage_in_the_cache_of_digests_costs_nothing_but_time(site: Site, garbage: bytes) -> None:
    (site.project / "data" / "cache" / "digests.json").write_bytes(garbage)
    done = site.host.run(site.project, *RUN)
    assert done.code == 0, done.stderr
    assert Made.by(site.project) == site.made


@pytest.mark.parametrize("garbage", [b"", b"{", b"\x00\xff" * 50, b"[]", b'{"prompts": 1}', b'{"prompts": {}}'])
def test_garbage_in_the_lock_file_is_refused_before_anything_is_asked(site: Site, garbage: bytes) -> None:
    lock = site.project / "run.lock.json"
    lock.write_bytes(garbage)
    done = site.host.run(site.project, *RUN)
    assert done.code == 2, done.stderr
    assert str(lock.name) in done.stderr.splitlines()[-2]
    assert lock.read_bytes() == garbage
