"""What the first process prints, and that lines which go to a file are whole."""

import pytest

from trueward.console import main_console


def test_a_line_that_goes_to_a_file_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs/" + "a folder/" * 40 + "report.html"
    main_console().print(f"Report: {path}", highlight=False)
    assert capsys.readouterr().err == f"Report: {path}\n"


def test_only_the_first_process_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, said in (("0", "said\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        main_console().print("said")
        assert capsys.readouterr().err == said
