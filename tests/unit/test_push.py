"""`push`: what is published, to whom, under which name; and what it refuses before anything is sent."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptArtefact, PolicyRefused, UsageError
from pipeline.core.lineage import Manifest, file_sha256
from pipeline.core.record import Message
from pipeline.core.store import Artefact, verify
from pipeline.runner.publish.files import What, is_allowed, item_of
from pipeline.runner.publish.push import Proposal, Wish, propose, publish, refuse
from pipeline.runner.publish.targets import Folder, Remote, target_of
from pipeline.text.markdown import split_front_matter
from tests.publishing import EXAONE, HOST, LLAMA, Made, files_of, make, opened
from tests.support import a_record, logger_is_restored

DATASET = [
    "LICENSES.md",
    "LICENSES/MIT.txt",
    "NOTICE",
    "README.md",
    "croissant.json",
    "data/train-00000-of-00001.parquet",
    "manifest.json",
]
STUDENT = [
    ".pushed.json",
    "LICENSES.md",
    "LICENSES/MIT.txt",
    "NOTICE",
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All under MIT, harmless rows, and files that must stay where they are."""
    secret = {
        "attempts__part.jsonl": "a",
        "data__notes.txt": "b",
        "data__deep__x.parquet": "c",
        "responses.sqlite": "d",
    }
    return make(tmp_path_factory.mktemp("plain") / "project", **secret)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A teacher whose licence asks for a name."""
    return make(tmp_path_factory.mktemp("llama") / "project", teacher=LLAMA)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with logger_is_restored():
        yield


@pytest.fixture
def here(plain: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.chdir(plain.folder)
    return plain


def proposed(what: What, to: Path | str, **wish: object) -> Proposal:
    return propose(opened(), Wish(what, target_of(str(to), None), **wish))  # type: ignore[arg-type]


def seal_anew(folder: Path) -> None:
    """Make the manifest of a pushed data set say what lies there, as if that had been pushed."""
    manifest = Manifest.read(folder / "manifest.json")
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files_of(folder).items()
        if name != "manifest.json"
    }
    (folder / "manifest.json").write_text(replace(manifest, files=files).to_json())


def push(what: What, to: Path | str, **wish: object) -> str:
    return publish(proposed(what, to, **wish), lambda: None)


@pytest.mark.usefixtures("here")
class TestWhatIsPublished:
    def test_a_data_set_is_the_files_on_the_list_and_no_others(self, tmp_path: Path) -> None:
        push("dataset", tmp_path / "out")
        assert sorted(files_of(tmp_path / "out")) == DATASET

    def test_a_student_is_what_a_loader_reads_and_its_papers(self, tmp_path: Path) -> None:
        push("model", tmp_path / "out")
        found = files_of(tmp_path / "out")
        assert sorted(found) == STUDENT
        assert found["README.md"] != b"old", "the card is made for the occasion"

    def test_the_manifest_names_no_machine_and_fits_the_files(self, here: Made, tmp_path: Path) -> None:
        push("dataset", tmp_path / "out")
        text = (tmp_path / "out" / "manifest.json").read_text()
        assert HOST in (here.dataset.path / "manifest.json").read_text() and HOST not in text
        verify(Artefact(tmp_path / "out", Manifest.read(tmp_path / "out" / "manifest.json")))

    def test_the_list_goes_folder_by_folder(self) -> None:
        assert is_allowed("data/a.parquet", "dataset") and not is_allowed("x/data/a.parquet", "dataset")
        assert not is_allowed("data/x/a.parquet", "dataset") and not is_allowed("LICENSES/x/a.txt", "dataset")
        assert not is_allowed("data/a.parquet", "model") and not is_allowed("training_args.txt", "model")

    @pytest.mark.parametrize("name", ["../x", "/x", "a/../b", ".hidden", "-rf", "a\0b", "a\nb", "x" * 500, "a//b", ""])
    def test_a_name_that_means_something_elsewhere_is_refused(self, name: str) -> None:
        with pytest.raises(CorruptArtefact, match="not fit to be published"):
            item_of(name, "text")

    def test_the_card_of_a_student_names_what_it_was_trained_on(self, tmp_path: Path) -> None:
        push("model", tmp_path / "Pupil-1", hub_ids=("me/data",))
        push("dataset", tmp_path / "data")
        text = (tmp_path / "Pupil-1" / "README.md").read_text()
        assert file_sha256(tmp_path / "data" / "manifest.json") in text
        meta = split_front_matter(text)[0]
        assert (meta["license"], meta["datasets"]) == ("mit", ["me/data"])
        assert "# Pupil\\-1" in text and "python -m pipeline run run.yaml" in text

    def test_the_card_of_a_student_names_no_folder(self) -> None:
        session = opened()
        session = replace(session, loaded=replace(session.loaded, overrides=("a.path=/home/jane/x",)))
        proposal = propose(session, Wish("model", target_of("/nowhere-yet", None)))
        text = next(item for item in proposal.items if item.name == "README.md").text()
        assert "base_model" not in split_front_matter(text)[0] and "student (a folder)" in text.replace("\\", "")
        assert "jane" not in text and "run run.yaml --set a.path=x" in text

    def test_the_same_is_published_twice_alike(self, tmp_path: Path) -> None:
        push("model", tmp_path / "a" / "x")
        push("model", tmp_path / "b" / "x")
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.usefixtures("here")
class TestTargets:
    def test_a_folder_is_replaced_as_a_whole(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        push("dataset", out)
        (out / "data" / "train-00000-of-00009.parquet").write_bytes(b"of an earlier push")
        seal_anew(out)
        proposal = proposed("dataset", out)
        assert proposal.replaced == tuple(DATASET)
        assert proposal.stale == ("data/train-00000-of-00009.parquet",)
        publish(proposal, lambda: None)
        assert sorted(files_of(out)) == DATASET
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_folder_with_something_else_in_it_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(UsageError, match=r"thesis\.tex"):
            push("dataset", tmp_path)
        assert sorted(files_of(tmp_path)) == ["thesis.tex"]

    def test_a_model_that_no_push_made_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "model.safetensors").write_text("weeks of training")
        with pytest.raises(UsageError, match=r"something else, such as model\.safetensors"):
            push("model", tmp_path / "mine")
        assert files_of(tmp_path / "mine") == {"model.safetensors": b"weeks of training"}

    @pytest.mark.parametrize(("what", "file"), [("model", "model.safetensors"), ("dataset", "README.md")])
    def test_what_somebody_changed_in_a_pushed_folder_is_left_alone(
        self, tmp_path: Path, what: What, file: str
    ) -> None:
        push(what, tmp_path / "out")
        proposal = proposed(what, tmp_path / "out")
        (tmp_path / "out" / file).write_text("changed by hand")
        with pytest.raises(UsageError, match="was changed since"):
            proposed(what, tmp_path / "out")
        with pytest.raises(UsageError, match="was changed since"):
            publish(proposal, lambda: None)
        assert files_of(tmp_path / "out")[file] == b"changed by hand"

    def test_a_result_of_another_store_is_no_earlier_push(self, here: Made, tmp_path: Path) -> None:
        shutil.copytree(here.dataset.path, tmp_path / "copy")
        for name in [*files_of(tmp_path / "copy")]:
            if not is_allowed(name, "dataset"):
                (tmp_path / "copy" / name).unlink()
        manifest = Manifest.read(tmp_path / "copy" / "manifest.json")
        assert manifest.versions["host"] == HOST
        seal_anew(tmp_path / "copy")
        with pytest.raises(UsageError, match="holds something else"):
            push("dataset", tmp_path / "copy")

    def test_nothing_in_the_data_folder_is_a_target(self, here: Made, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(Path("data").resolve())
        for to in (here.dataset.path, "data", "data/new", tmp_path / "link" / "new", "file://data/new", "."):
            with pytest.raises(UsageError, match="overlap"):
                proposed("dataset", to)

    def test_a_link_inside_a_target_is_refused(self, tmp_path: Path) -> None:
        push("dataset", tmp_path / "out")
        (tmp_path / "out" / "data" / "train-9.parquet").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="symbolic link"):
            push("dataset", f"LOCAL://{tmp_path}/out")

    @pytest.mark.parametrize("to", ["run.yaml/x", "/proc/x", "run.yaml/x/y", "x" * 300])
    def test_where_nothing_can_be_written_is_said_before_or_instead_of_a_traceback(self, to: str) -> None:
        with pytest.raises(UsageError, match="the target cannot be written") as error:
            push("dataset", to)
        assert "--data" not in str(error.value) and error.value.exit_code == 2

    @pytest.mark.parametrize("name", ["", "data", "me/data/x", "a b/c", "me/data\nlicense: mit"])
    def test_a_data_set_that_the_hub_cannot_have_is_not_named(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="no data set of the Hub"):
            proposed("model", tmp_path / "out", hub_ids=(name,))

    def test_a_link_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "real")
        with pytest.raises(UsageError, match="no folder"):
            push("dataset", tmp_path / "out")

    def test_an_fsspec_address_gets_the_same_files(self, tmp_path: Path) -> None:
        fsspec = pytest.importorskip("fsspec", reason="needs fsspec: the extra `train` installs it")
        memory = fsspec.filesystem("memory")
        memory.pipe_file("/bucket/run/data/train-00000-of-00009.parquet", b"stale")
        memory.pipe_file("/bucket/run/other.txt", b"mine")
        push("dataset", "memory://bucket/run")
        push("dataset", tmp_path / "out")
        found = {path.removeprefix("/bucket/run/"): memory.cat_file(path) for path in memory.find("/bucket/run")}
        assert found.pop("other.txt") == b"mine"
        assert found == files_of(tmp_path / "out")
        memory.rm("/bucket", recursive=True)

    @pytest.mark.parametrize(
        ("address", "what"),
        [
            ("hf://data", "no repository"),
            ("hf://datasets/me/data", "no repository"),
            ("hf://me/../data", "no repository"),
            ("hf://me/-data", "no repository"),
            ("s3://key:secret@bucket/x", "holds credentials"),
            ("s3://bucket/x?token=secret", "holds credentials"),
            ("s3://secret@bucket/x", "holds credentials"),
            ("hf://me:secret@host/x", "holds credentials"),
            ("file://me:secret@host/x", "holds credentials"),
            ("simplecache::s3://key:secret@bucket/x", "holds credentials"),
            ("s3://[secret@x", "holds credentials"),
            ("simplecache::file:///srv/x", "leads to a local folder or the Hub"),
            ("simplecache::hf://datasets/me/x", "leads to a local folder or the Hub"),
            ("memory://", "names no place"),
            ("", "empty or the root"),
            ("/", "empty or the root"),
            ("file:///", "empty or the root"),
        ],
    )
    def test_what_is_no_target_is_refused_without_repeating_it(self, address: str, what: str) -> None:
        with pytest.raises(UsageError, match=what) as error:
            target_of(address, None)
        assert "secret" not in str(error.value)

    def test_a_file_system_that_nobody_knows_is_refused(self) -> None:
        with pytest.raises(UsageError, match="no such target"):
            push("dataset", "nosuchsystem://bucket/x")

    def test_only_the_hub_has_branches(self) -> None:
        with pytest.raises(UsageError, match="branches"):
            target_of("out", "v2")

    def test_names_of_targets(self) -> None:
        assert Folder(Path("a/Llama-x")).name == Remote("s3://b/Llama-x").name == "Llama-x"
        assert target_of("hf://me/Llama-x", None).name == "Llama-x"
        for address in ("file:///srv/x", "FILE:///srv/x", "local:///srv/x"):
            assert target_of(address, None) == Folder(Path("/srv/x"))


class TestDamage:
    """Each in a copy of the project, since it is damaged."""

    @pytest.fixture
    def copy(self, plain: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        shutil.copytree(plain.folder, tmp_path / "project", symlinks=True)
        monkeypatch.chdir(tmp_path / "project")
        return tmp_path / "project" / plain.dataset.path

    def test_a_changed_file_is_not_published(self, copy: Path, tmp_path: Path) -> None:
        (copy / "NOTICE").write_text("N")
        with pytest.raises(CorruptArtefact, match="sha256") as error:
            push("dataset", tmp_path / "out")
        assert error.value.exit_code == 5 and not (tmp_path / "out").exists()

    def test_a_file_that_the_manifest_does_not_know_stops_it(self, copy: Path, tmp_path: Path) -> None:
        (copy / "data" / "train-99999.parquet").write_bytes(b"slipped in")
        with pytest.raises(CorruptArtefact, match="files differ"):
            push("dataset", tmp_path / "out")

    def test_a_link_to_equal_bytes_elsewhere_is_not_followed(self, copy: Path, tmp_path: Path) -> None:
        (copy / "NOTICE").rename(tmp_path / "elsewhere")
        (copy / "NOTICE").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CorruptArtefact, match="symbolic link"):
            push("dataset", tmp_path / "out")

    def test_a_linked_folder_is_not_followed(self, copy: Path, tmp_path: Path) -> None:
        (copy / "LICENSES").rename(tmp_path / "elsewhere")
        (copy / "LICENSES").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CorruptArtefact):
            push("dataset", tmp_path / "out")

    def test_a_file_that_changes_while_it_is_sent_is_not_sent_whole(self, copy: Path, tmp_path: Path) -> None:
        proposal = proposed("dataset", tmp_path / "out")
        (copy / "NOTICE").write_text("N")
        with pytest.raises(CorruptArtefact, match="changed while"):
            publish(proposal, lambda: None)
        assert [path.name for path in tmp_path.iterdir()] == ["project"]

    def test_without_a_result_the_command_that_makes_it_is_named(self, copy: Path, tmp_path: Path) -> None:
        shutil.rmtree(copy)
        with pytest.raises(UsageError, match="push needs the rows of dataset") as error:
            push("dataset", tmp_path / "out")
        assert "pipeline dataset run.yaml" in error.value.todo


@pytest.mark.usefixtures("here")
class TestWhoGetsIt:
    @pytest.mark.parametrize(
        ("scope", "public", "refused"),
        [("none", False, True), ("internal", True, True), ("public", True, False), ("public", False, False)],
    )
    def test_the_policy_says_who(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, public: bool, refused: bool
    ) -> None:
        from pipeline.runner.publish.terms import refuse_release

        session = opened(f"policy.release.dataset={scope}")
        if not refused:
            refuse_release(session, "dataset", public)
            return
        with pytest.raises(PolicyRefused, match="the policy says") as error:
            refuse_release(session, "dataset", public)
        assert error.value.where == f"policy.release.dataset: {scope}"
        assert error.value.exit_code == 4


class TestTerms:
    @pytest.fixture(autouse=True)
    def there(self, llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(llama.folder)

    def test_a_name_that_a_licence_asks_for_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyRefused) as error:
            push("model", tmp_path / "tiny-pupil")
        told = str(error.value)
        assert "name_prefix" in told and "LLAMA 3.3" in told and "teacher:main" in told
        assert "such as Llama-tiny-pupil" in told
        assert not (tmp_path / "tiny-pupil").exists()

    def test_the_proposed_name_is_taken(self, tmp_path: Path) -> None:
        push("model", tmp_path / "Llama-tiny-pupil")
        text = (tmp_path / "Llama-tiny-pupil" / "README.md").read_text()
        assert "must begin with: Llama" in text
        assert split_front_matter(text)[0]["license"] == "other"

    def test_a_data_set_is_no_model(self, tmp_path: Path) -> None:
        push("dataset", tmp_path / "tiny-rows")

    def test_terms_that_forbid_it_stop_it(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make(tmp_path_factory.mktemp("other") / "project", teacher=EXAONE)
        monkeypatch.chdir(made.folder)
        with pytest.raises(PolicyRefused, match="EXAONE") as error:
            push("dataset", tmp_path / "out")
        assert error.value.exit_code == 4 and not (tmp_path / "out").exists()

    def test_a_licence_that_wants_its_text_along_stops_it_without(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make(tmp_path_factory.mktemp("textless") / "project", without=("LICENSES/MIT.txt",))
        monkeypatch.chdir(made.folder)
        with pytest.raises(PolicyRefused, match="a copy of MIT must go with it"):
            push("dataset", tmp_path / "out")

    def test_a_data_set_without_its_notice_is_made_again_first(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make(tmp_path_factory.mktemp("noticeless") / "project", without=("NOTICE",))
        monkeypatch.chdir(made.folder)
        with pytest.raises(UsageError, match="no NOTICE"):
            push("dataset", tmp_path / "out")


class TestScan:
    MAIL = "jane.roe@gmail.com"

    @pytest.fixture(scope="class")
    def dirty(self, tmp_path_factory: pytest.TempPathFactory) -> Made:
        rows = [
            a_record(row_id="a" * 32, completion=(Message("assistant", f"Write to {self.MAIL}"),)),
            a_record(row_id="b" * 32),
        ]
        return make(tmp_path_factory.mktemp("dirty") / "project", rows=rows)

    def test_a_row_with_personal_data_stops_it_until_somebody_lets_it_through(
        self, dirty: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(dirty.folder)
        with pytest.raises(PolicyRefused) as error:
            push("dataset", tmp_path / "out")
        told = str(error.value)
        assert f"{'a' * 32}  email  completion[0].content" in told and "--allow-rows" in told
        assert self.MAIL not in told and not (tmp_path / "out").exists()
        (tmp_path / "allowed").write_text(f"{'a' * 32} the address of a public list\n")
        proposal = proposed("dataset", tmp_path / "out", allow_rows=tmp_path / "allowed")
        refuse(proposal)
        assert proposal.scan.scanned.allowed == {"email": 1}
        publish(proposal, lambda: None)
        assert sorted(files_of(tmp_path / "out")) == DATASET

    def test_an_escape_of_markdown_hides_nothing(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make(tmp_path_factory.mktemp("esc") / "project", **{"README.md": "jane\\_roe@acme\\-mail.com"})
        monkeypatch.chdir(made.folder)
        with pytest.raises(PolicyRefused, match=r"README\.md  email") as error:
            push("dataset", tmp_path / "out")
        assert "filter" not in error.value.todo and "dataset.exclude_prompt_sets" in error.value.todo

    def test_a_card_is_scanned_too(
        self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        token = "ghp_" + "aB3dE5gH7jK9mN1pQ4sT6vW8yZ2cF0uXr5tY"
        card = {"README.md": f"# {token}", "croissant.json": json.dumps({"path": str(Path.cwd())})}
        made = make(tmp_path_factory.mktemp("card") / "project", **card)
        monkeypatch.chdir(made.folder)
        with pytest.raises(PolicyRefused, match=r"README\.md  github_token") as error:
            push("dataset", tmp_path / "out")
        assert token not in str(error.value)
