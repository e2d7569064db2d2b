"""A repository of the Hugging Face Hub as a target: one commit that holds exactly what was shown.

`huggingface_hub` does the talking: it honours HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.core.errors import Incomplete, PipelineError, PolicyRefused, UsageError, boundary
from pipeline.runner.publish.files import Item, What

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INSTALL: Final = "install this project with its extra `train`: it brings huggingface_hub"
TOKEN: Final = "set HF_TOKEN to a token that may write to this repository, from the Hub's settings"
LATER: Final = "run the same command again: what has arrived is not sent again"


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository.

    Attributes:
        repository: `owner/name`.
        branch: the branch that gets the commit; None: the main one.
    """

    repository: str
    branch: str | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repository.rpartition("/")[2]

    @property
    def where(self) -> str:
        """As `--to` takes it."""
        return f"hf://{self.repository}" + ("" if self.branch is None else f" (branch {self.branch})")

    def look(self, what: What, public: bool) -> frozenset[str]:
        """Names of the files of the branch; none where there is no repository yet.

        Raises:
            PolicyRefused: everybody can read the repository, and nobody said that they may.
        """
        with self._errors():
            api = _api()
            if not self._check_visibility(api, what, public):
                return frozenset()
            return frozenset(self._tree(api, what, self.branch))

    def put(self, what: What, items: Sequence[Item], stale: Sequence[str], message: str, public: bool) -> str:
        """Make the repository if there is none (private unless `public`), and commit all files at once."""
        with self._errors():
            from huggingface_hub import CommitOperationDelete

            api = _api()
            api.create_repo(self.repository, repo_type=what, private=not public, exist_ok=True)
            self._check_visibility(api, what, public)  # it may have been made by somebody else meanwhile
            if self.branch is not None:
                api.create_branch(self.repository, branch=self.branch, repo_type=what, exist_ok=True)
            operations = [*(_addition(item) for item in items), *(CommitOperationDelete(name) for name in stale)]
            done = api.create_commit(
                self.repository, operations, commit_message=message, repo_type=what, revision=self.branch
            )
            self._compare(self._tree(api, what, done.oid), items, stale)
            return str(done.commit_url)

    def _check_visibility(self, api: "HfApi", what: What, public: bool) -> bool:
        """Whether the repository is there.

        Raises:
            PolicyRefused, UsageError: it is not as private, or as public, as was asked.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            private = api.repo_info(self.repository, repo_type=what).private
        except RepositoryNotFoundError:
            return False
        if not private and not public:
            todo = "give --public if everybody may read it, or make the repository private in its settings on the Hub"
            raise PolicyRefused("this repository is public", where=self.where, todo=todo)
        if private and public:
            todo = "leave out --public, or make the repository public in its settings on the Hub"
            raise UsageError("this repository is private, whatever --public says", where=self.where, todo=todo)
        return True

    def _tree(self, api: "HfApi", what: What, revision: str | None) -> dict[str, Any]:
        """Name -> what the Hub knows of a file."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

        try:
            found = api.list_repo_tree(self.repository, recursive=True, revision=revision, repo_type=what)
            return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
        except (EntryNotFoundError, RevisionNotFoundError):  # a branch that is not there yet, or nothing in it
            return {}

    def _compare(self, tree: dict[str, Any], items: Sequence[Item], stale: Sequence[str]) -> None:
        """A `.gitignore` in the repository makes the client leave files out and say nothing.

        Raises:
            UsageError: what is there is not what was sent.
        """
        wrong = [item.name for item in items if not _is_same(tree.get(item.name), item)]
        wrong += [name for name in stale if name in tree]
        if wrong:
            what = f"{len(wrong):,} files did not arrive as they were sent: {', '.join(wrong[:3])}"
            todo = "look for a .gitignore in the repository that names them, then run the same command again"
            raise UsageError(what, where=self.where, todo=todo)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the client raises, as errors for a person."""
        with boundary(Incomplete, "the Hub cannot be reached", where=self.where, todo=LATER):
            try:
                from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
            except ImportError as error:
                raise UsageError("huggingface_hub is not installed", where=self.where, todo=INSTALL) from error
            try:
                yield
            except OfflineModeIsEnabled as error:
                raise UsageError("HF_HUB_OFFLINE is set", where=self.where, todo="unset it") from error
            except HfHubHTTPError as error:
                raise self._of_status(error) from error

    def _of_status(self, error: Any) -> PipelineError:
        status = error.response.status_code
        said = " ".join(str(error.server_message or error.response.reason_phrase or "").split())[:300]
        what = f"the Hub answered {status}: {said}" if said else f"the Hub answered {status}"
        if status in (401, 403, 404):
            return UsageError(what, where=self.where, todo=TOKEN)
        if status in (408, 425, 429) or status >= 500:
            return Incomplete(what, where=self.where, todo=LATER)
        return UsageError(what, where=self.where, todo="see what the Hub says of it")


def _api() -> "HfApi":
    """The client; it draws bars on terminals only."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def hub_token() -> str | None:
    """The token that the client would send, so that no output shows it; None: there is none, or no client."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return None
    token: str | None = get_token()
    return token


def _addition(item: Item) -> Any:
    """The operation that adds a file. Where the file is stored apart (LFS), the Hub compares it with this sha256."""
    from huggingface_hub import CommitOperationAdd

    source = str(item.source) if isinstance(item.source, Path) else item.source
    operation = CommitOperationAdd(item.name, source)
    operation.upload_info.sha256 = bytes.fromhex(item.sha256)
    return operation


def _is_same(found: Any, item: Item) -> bool:
    """Whether the Hub has a file's bytes: by its sha256 where it is stored apart, else by git's name for it."""
    if found is None or found.size != item.size:
        return False
    if found.lfs is not None:
        return bool(found.lfs.sha256 == item.sha256)
    blob = hashlib.sha1(b"blob %d\0" % item.size, usedforsecurity=False)
    for piece in item.chunks():
        blob.update(piece)
    return bool(found.blob_id == blob.hexdigest())
