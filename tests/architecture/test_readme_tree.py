"""The README's tree is the real one: every file is listed, by its path or its folder's; all that is listed exists."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from tests.architecture.checkout import README, files

HEADING = "## The tree, a line a file"
ROOTS = ("pipeline", "configs", "prompts", "tests", "docs", "data/models/recipes", "benchmarks", "tools")
LINE = re.compile(r"(?P<path>\S+)(?:\s{2,}|\t)\S")
# A line for one of these would cover everything below it and say nothing.
TOO_WIDE = {"pipeline/", "tests/"}


def parse(text: str) -> list[str]:
    """The paths of the fenced block under the heading, in order."""
    _, found, rest = text.partition(f"\n{HEADING}\n")
    assert found, f"README.md has no heading {HEADING!r}"
    block = re.search(r"^```[^\n]*\n(.*?)^```", rest, re.MULTILINE | re.DOTALL)
    assert block, f"no fenced block under {HEADING!r}"
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    matched = {line: LINE.match(line) for line in lines}
    assert not (bad := [line for line, match in matched.items() if not match]), f"not `path  description`: {bad}"
    return [match["path"] for match in matched.values() if match]


def covers(listed: str, path: str) -> bool:
    if listed.endswith("/"):
        return listed not in TOO_WIDE and path.startswith(listed)
    return path == listed or ("*" in listed and fnmatchcase(path, listed))


def test_parse_and_covers() -> None:
    block = "a/b.py      one\nc/*.yaml  two\nd/\tthree"
    text = f"# x\n\n{HEADING}\n\nwords\n\n```text\n{block}\n```\n\n```\nother  block\n```\n"
    assert parse(text) == ["a/b.py", "c/*.yaml", "d/"]
    assert covers("a/b.py", "a/b.py") and not covers("a/b.py", "a/b.pyi")
    assert covers("c/*.yaml", "c/x.yaml") and not covers("c/*.yaml", "c/x.json")
    assert covers("d/", "d/e/f") and not covers("d/", "de") and not covers("pipeline/", "pipeline/x.py")


def test_every_file_is_listed() -> None:
    listed = parse(README.read_text(encoding="utf-8"))
    present = files(*ROOTS)
    assert len(present) >= 40, f"found {len(present)} files"
    assert [path for path in present if not any(covers(line, path) for line in listed)] == []


def test_every_line_exists_once() -> None:
    listed = parse(README.read_text(encoding="utf-8"))
    assert len(listed) >= 20, f"found {len(listed)} lines"
    present = files()
    ghosts = [line for line in listed if line not in TOO_WIDE and not any(covers(line, path) for path in present)]
    assert ghosts == []
    assert sorted({line for line in listed if listed.count(line) > 1}) == []
