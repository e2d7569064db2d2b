"""Nothing in the repository ties it to one machine or one package mirror."""

from __future__ import annotations

import re

from tests.architecture.checkout import ROOT, files

# Written in pieces, so that this file does not hold what it forbids.
HOSTS = [
    r"py" r"pi\.org",
    r"python" r"hosted\.org",
    r"py" r"pi\.python\.org",
    r"registry\.npm" r"js\.org",
    r"crates" r"\.io",
]
FOLDERS = ["work", "opt", "root"]
FORBIDDEN = re.compile(
    rf"(?:{'|'.join(HOSTS)})|(?<![\w./~${{}}*-])(?:file:/" rf"/)?/(?:{'|'.join(FOLDERS)})/".encode(), re.IGNORECASE
)
# Words of others, kept as they are.
QUOTED = re.compile(r"^(prompts/.*\.jsonl|LICENSE|data/models/.*(tokenizer|vocab).*)$")


def test_pattern() -> None:
    slash = b"/"
    for text in (b"see %swork/x", b"file:/%s%sopt/p", b'"%sroot/.cache"'):
        sample = text.replace(b"%s", slash)
        assert FORBIDDEN.search(sample), sample
    for text in (b"data/work/x", b"./work/x", b"https://host/opt/x", b"$HOME/work/x"):
        assert not FORBIDDEN.search(text), text


def test_no_file_names_a_registry_host_or_an_absolute_path() -> None:
    paths = [path for path in files() if not QUOTED.match(path)]
    assert len(paths) >= 50, f"found {len(paths)} files"
    found = {path: match.group() for path in paths if (match := FORBIDDEN.search((ROOT / path).read_bytes()))}
    assert found == {}
