"""Good files are read whole; a bad row is named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_intuitor.data import Row, read_rows


def read(path):
    return read_rows(path, prompt_column="question", answer_column="answer")


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=20), st.booleans())
def test_any_text_survives(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "problems.jsonl"
    lines = [json.dumps({"question": q, "answer": a, "extra": 1}, ensure_ascii=ascii_only) for q, a in rows]
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    assert read(path) == [Row(i, q, a) for i, (q, a) in enumerate(rows)]


def test_a_file_without_labels_and_with_blank_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a"}\n\n  \n{"question": "b"}\n\n')
    assert read(path) == [Row(0, "a", None), Row(1, "b", None)]


GOOD = '{"question": "q", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "not json\n", r"p\.jsonl, line 2: not valid JSON"),
        (GOOD + "\n[1]\n", r"line 3: expected a JSON object, found list"),
        (GOOD + '{"problem": "q", "answer": "1"}', r"line 2: no column 'question'; columns there: 'problem', 'answer'"),
        (GOOD + '{"question": "q"}', r"line 2: no column 'answer'; columns there: 'question'"),
        ('{"question": 7}', r"line 1: column 'question' must be a string, found int \(7\)"),
        ('{"question": "q", "answer": 7}', r"column 'answer' must be a string, found int"),
        ('{"question": null}', r"must be a string, found NoneType"),
        ("{}", r"columns there: none"),
        ("\n\n", r"holds no problems"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
        read(tmp_path / "nothing.jsonl")
