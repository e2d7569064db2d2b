"""Errors for people: three lines, a fixed exit code; and the one place that turns foreign exceptions into them."""

import errno
import pickle

import pytest

from pipeline.core import errors
from pipeline.core.errors import (
    CorruptArtefact,
    ExitCode,
    Incomplete,
    Interrupted,
    LockDrift,
    LostRows,
    PipelineError,
    PolicyRefused,
    RunLocked,
    Terminated,
    UsageError,
    boundary,
    disk_errors,
)


def test_exit_codes_are_fixed_since_other_tools_call_this_program() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "COMPLETE": 0,
        "BUG": 1,
        "USAGE": 2,
        "INCOMPLETE": 3,
        "POLICY": 4,
        "INTEGRITY": 5,
        "LOCKED": 6,
        "INTERRUPTED": 130,
        "TERMINATED": 143,
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError, 2),
        (Incomplete, 3),
        (CorruptArtefact, 5),
        (PolicyRefused, 4),
        (LockDrift, 5),
        (RunLocked, 6),
        (Interrupted, 130),
        (Terminated, 143),
    ],
)
def test_each_error_ends_with_its_code(error: type[PipelineError], code: int) -> None:
    assert error("what", where="here", todo="that").exit_code == code


def test_a_refusal_by_policy_says_all_it_has_to_say_and_survives_a_worker() -> None:
    error = PolicyRefused("what", where="here", todo="that", message="a screen\nof its own")
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == "a screen\nof its own"
    assert str(PolicyRefused("what", where="here", todo="that")) == "error: what\n   at: here\n   do: that"


def test_every_error_class_with_a_code_is_listed_above() -> None:
    classes = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, PipelineError)}
    assert len(classes) == 9


def test_an_error_is_three_short_lines() -> None:
    text = str(UsageError("no such file", where="configs/x.yaml", todo="correct the path"))
    assert text.splitlines() == ["error: no such file", "   at: configs/x.yaml", "   do: correct the path"]


def test_lost_rows_is_a_bug_and_not_an_error_for_people() -> None:
    assert not issubclass(LostRows, PipelineError)


class TestBoundary:
    def test_a_foreign_exception_becomes_ours_and_keeps_its_cause(self) -> None:
        with pytest.raises(UsageError) as caught, boundary(UsageError, "cannot read", where="x", todo="y"):
            raise KeyError("column")
        assert caught.value.what == "cannot read: KeyError: 'column'"
        assert isinstance(caught.value.__cause__, KeyError)

    def test_ours_pass_unchanged(self) -> None:
        ours = Incomplete("later", where="there", todo="resume")
        with pytest.raises(Incomplete) as caught, boundary(UsageError, "cannot read", where="x", todo="y"):
            raise ours
        assert caught.value is ours

    def test_an_interrupt_is_not_an_error_of_the_guarded_call(self) -> None:
        with pytest.raises(KeyboardInterrupt), boundary(UsageError, "cannot read", where="x", todo="y"):
            raise KeyboardInterrupt


class TestDiskErrors:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
    def test_a_disk_that_refuses_is_incomplete_and_names_the_file(self, number: int) -> None:
        with pytest.raises(Incomplete) as caught, disk_errors("data", "make room"):
            raise OSError(number, "refused", "data/file")
        assert (caught.value.where, caught.value.todo) == ("data/file", "make room")

    def test_without_a_file_name_the_given_place_is_named(self) -> None:
        with pytest.raises(Incomplete) as caught, disk_errors("data", "make room"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert caught.value.where == "data"

    def test_other_errors_of_the_system_stay_bugs(self) -> None:
        with pytest.raises(FileNotFoundError), disk_errors("data", "make room"):
            raise FileNotFoundError(errno.ENOENT, "gone", "x")
