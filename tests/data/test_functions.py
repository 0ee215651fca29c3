from pathlib import Path

import pytest

from trueward.data.formats import DataError
from trueward.data.functions import is_python_function, python_function

SOURCE = """\
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Pair:
    first: str

def first(pair):
    return Pair(pair[0]).first

NUMBER = 3
"""


def test_names_of_functions_are_told_from_others() -> None:
    assert is_python_function("some/file.py:name")
    assert is_python_function("C:\\\\file.py:name")
    for other in ("exact", "nli:some/model", "file.py", "file.py:", "file.txt:name"):
        assert not is_python_function(other)


def test_a_function_is_found_by_file_and_name(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "other.py").write_text("def first(pair):\n    return 'other'\n", encoding="utf-8")
    one = python_function(f"{tmp_path}/one.py:first")
    other = python_function(f"{tmp_path}/other.py:first")
    assert (one(["a", "b"]), other(["a", "b"])) == ("a", "other")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(SOURCE, encoding="utf-8")
    with pytest.raises(DataError, match=r"The equivalence's file .*none\.py does not exist"):
        python_function(f"{tmp_path}/none.py:first", what="equivalence")
    for name in ("second", "NUMBER"):
        with pytest.raises(DataError, match=f"one.py has no function '{name}'"):
            python_function(f"{tmp_path}/one.py:{name}")
