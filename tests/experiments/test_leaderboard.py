"""A leaderboard grows by whole lines, none of them twice, and is never mistaken for another file."""

from __future__ import annotations

import json

import pytest

from convexhead.errors import ConvexHeadError, FileFormatError
from convexhead.experiments.leaderboard import append, known_ids


def ids_in(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_new_rows_are_appended_once(tmp_path):
    path = tmp_path / "deep" / "board.jsonl"
    assert known_ids(path) == set()
    assert append(path, [{"id": "a", "top1": 0.5}, {"id": "b"}]) == 2
    assert append(path, [{"id": "b"}, {"id": "c"}]) == 1
    assert append(path, [{"id": "a"}]) == 0
    assert ids_in(path) == ["a", "b", "c"]


def test_a_last_line_without_its_end_stays_whole(tmp_path):
    path = tmp_path / "board.jsonl"
    path.write_text('{"id": "a"}')
    assert append(path, [{"id": "b"}]) == 1
    assert ids_in(path) == ["a", "b"]


@pytest.mark.parametrize("content", [b"a,b\n", b"[1]\n", b'{"id": "a"}\n{"top1": 1}\n', b"\xff\xfe", b'{"id": '])
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="choose another leaderboard"):
        append(path, [{"id": "b"}])
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ConvexHeadError, match="is a folder"):
        append(tmp_path, [{"id": "b"}])
