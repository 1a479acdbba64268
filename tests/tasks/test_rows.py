# SPDX-License-Identifier: Apache-2.0
"""Readers of records: unchanged texts, and errors that name file and line."""

from __future__ import annotations

import pytest

from dyads.errors import TaskError
from dyads.tasks.rows import read_json, read_jsonl, read_tsv


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_quotation_mark_is_a_character_like_any_other(tmp_path):
    rows, left_out = read_tsv(write(tmp_path / "a.tsv", 'a\tb\n" open\tx\nclose "\t""y""\r\n'))
    assert [dict(row.fields) for row in rows] == [{"a": '" open', "b": "x"}, {"a": 'close "', "b": '""y""'}]
    assert left_out == 0


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    rows, _ = read_tsv(write(tmp_path / "a.tsv", b"\xef\xbb\xbfa\tb\n1\t2\n"))
    assert rows[0].text("a") == "1"


def test_only_line_breaks_divide_rows(tmp_path):
    assert len(read_tsv(write(tmp_path / "a.tsv", "a\nx\u2028y\x0bz\n"))[0]) == 1
    assert len(read_jsonl(write(tmp_path / "a.jsonl", '{"a": "x\u2028y"}\n'))) == 1


def test_rows_with_another_number_of_cells_are_left_out_and_counted(tmp_path):
    rows, left_out = read_tsv(write(tmp_path / "a.tsv", "a\tb\n1\t2\n1\n\n1\t2\t3\n4\t5\n"))
    assert left_out == 2
    assert [(row.number, row.place.rpartition(" ")[2]) for row in rows] == [(0, "2"), (3, "6")]


def test_a_file_without_a_header_gets_its_columns_by_name(tmp_path):
    assert read_tsv(write(tmp_path / "a.tsv", "1\t2\n"), ("a", "b"))[0][0].text("b") == "2"


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_tsv, "a\tb\n1\n", r"f: no row has 2 cells \(a, b\); separate cells with tabs"),
        (read_tsv, b"\xff", r"f: not UTF-8 text \(byte 0\)"),
        (read_jsonl, '{"a": 1}\n{"a":\n', r"f, line 2, column 6: not valid JSON"),
        (read_jsonl, "[1]\n", r"f, line 1: expected a JSON object, got \[1\]"),
        (read_json, "{}", "f: expected a JSON list of objects, got dict"),
        (read_json, '[{},\n "x"]', 'f, row 2: expected a JSON object, got "x"'),
        (read_json, "[{},\n oops]", "f, line 2, column 2: not valid JSON"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path, read, text, message):
    with pytest.raises(TaskError, match=message):
        read(write(tmp_path / "f", text))


def test_a_missing_or_unfit_field_is_named(tmp_path):
    (row,) = read_jsonl(write(tmp_path / "f", '{"a": ["x"], "b": true}'))
    assert row.text("b") == "True"
    with pytest.raises(TaskError, match=r"f, line 1: no field 'c'; it has a, b"):
        row.text("c")
    with pytest.raises(TaskError, match=r"f, line 1: 'a' must be text, got \[\"x\"\]"):
        row.text("a")
