from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from deploy.errors import ConfigError
from deploy.text_data import read_text


def test_a_text_file_is_kept_to_the_byte(tmp_path: Path) -> None:
    text = "  first line\r\n\n\nlast — line  \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_text(str(tmp_path / "a.txt")) == text
    assert read_text(str(tmp_path / "a.txt.gz")) == text


def test_rows_are_joined_without_a_template(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "plain"}, {"prompt": "question", "completion": "answer"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read_text(str(path)) == "plain\n\nquestion\nanswer"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "not a readable UTF-8 text"),
        ("cut.txt.gz", gzip.compress(b"some word" * 99, mtime=0)[:-9], "not a readable UTF-8 text"),
        ("no.txt.gz", b"not gzip", "not a readable UTF-8 text"),
        ("bad.jsonl", b'{"text": "fine"}\n{oops\n', r"bad.jsonl:2: not valid JSON"),
        ("empty.jsonl", b"", "holds no rows"),
        ("table.csv", b"a,b", "unknown file type"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_text(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_text(str(tmp_path / "absent.txt"))
