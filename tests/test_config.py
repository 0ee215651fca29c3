"""YAML and command line: defaults, precedence, and errors that name file, line and remedy."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from trueward.config import parse
from trueward.data.formats import DataError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    limit: int | None = None


def write(folder: Path, text: str) -> list[str]:
    (folder / "c.yaml").write_text(text)
    return ["--config", str(folder / "c.yaml")]


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path):
    config = write(tmp_path, "name: from yaml\ninner: {rate: 1e-4, on: true}\nlimit: 3\n")
    found = parse(Outer, [*config, "--inner.kind", "b", "--name", "mine"], command="x")
    assert found == Outer(name="mine", inner=Inner(rate=1e-4, kind="b", on=True), limit=3)


def test_lists_and_mappings_come_through(tmp_path: Path):
    config = write(tmp_path, "name: n\nnames: [p, q]\nsources:\n  a/b@c:d: e:f\n")
    found = parse(Outer, config, command="x")
    assert found.names == ["p", "q"]
    assert found.sources == {"a/b@c:d": "e:f"}


def test_a_setting_is_laid_over_the_file(tmp_path: Path):
    config = write(tmp_path, "name: n\ninner: {rate: 1}\nsettings:\n  tiny: {inner: {rate: 2}}\n")
    assert parse(Outer, config, command="x").inner.rate == 1
    assert parse(Outer, [*config, "--setting", "tiny"], command="x").inner.rate == 2
    assert (
        parse(Outer, [*config, "--setting=tiny", "--inner.rate", "3"], command="x").inner.rate == 3
    )
    with pytest.raises(DataError, match="no setting 'small'; it has: tiny"):
        parse(Outer, [*config, "--setting", "small"], command="x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: n\ninner:\n  rat: 1\n", "c.yaml:3: unknown key 'inner.rat'; .* 'inner.rate'"),
        ("name: n\ninner:\n  rate: fast\n", "c.yaml:3: 'inner.rate' must be a number, got 'fast'"),
        ("name: n\ninner: 3\n", "c.yaml:2: 'inner' must hold"),
        ("name: n\ninner: {kind: c}\n", "c.yaml:2: 'inner.kind' must be one of a, b, got 'c'"),
        ("name: n\ninner: {on: 1}\n", "must be true or false, got 1"),
        ("name: n\nlimit: 1.5\n", "c.yaml:2: 'limit' must be a whole number"),
        ("name: n\nnames: p\n", "c.yaml:2: 'names' must be a list"),
        ("name: [n\n", "c.yaml:2 is no valid YAML"),
        ("- name\n", "c.yaml:1: The file must hold"),
        ("name: n\nsettings:\n  t: {nam: 2}\n", "c.yaml:3: unknown key 'nam'"),
    ],
)
def test_a_mistake_in_yaml_is_one_sentence_with_its_line(tmp_path: Path, text: str, sentence: str):
    with pytest.raises(DataError, match=sentence):
        parse(Outer, write(tmp_path, text), command="x")


def test_a_missing_file_is_named():
    with pytest.raises(DataError, match=r"nowhere\.yaml cannot be read"):
        parse(Outer, ["--config", "nowhere.yaml"], command="x")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--name", "n", "--inner.rat", "3"],
            r"--inner\.rat.*--inner\.rate.*\(trueward x --help\)",
        ),
        ([], r"^Missing from trueward x: --name STR"),
        (["--name", "n", "--inner.rate", "much"], r"--inner\.rate: could not convert .* 'much'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments: list[str], sentence: str):
    with pytest.raises(DataError, match=sentence) as error:
        parse(Outer, arguments, command="x")
    assert "\n" not in str(error.value)
    assert "│" not in str(error.value)


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_and_its_settings_are_read_by_the_command_that_it_names(recipe: Path):
    from trueward.lab.alarm import AlarmStudyConfig
    from trueward.lab.compare import CompareConfig, check
    from trueward.lab.families import FamiliesConfig
    from trueward.lab.refinements import RefinementsConfig
    from trueward.pipeline import RLPConfig

    commands = {
        "alarm": AlarmStudyConfig,
        "compare": CompareConfig,
        "families": FamiliesConfig,
        "refinements": RefinementsConfig,
        "rlp": RLPConfig,
    }
    text = recipe.read_text("utf-8")
    told = rf"^#\s+trueward (\w+) --config recipes/{recipe.stem}\.yaml"
    (command,) = set(re.findall(told, text, re.MULTILINE))
    for setting in [None, *(yaml.safe_load(text).get("settings") or {})]:
        laid_over = ["--setting", setting] if setting else []
        found = parse(commands[command], ["--config", str(recipe), *laid_over], command=command)
        if isinstance(found, CompareConfig):
            check(found)


def test_the_pipelines_recipe_has_its_control_and_the_papers_samples():
    from trueward.pipeline import RLPConfig

    found = parse(RLPConfig, ["--config", str(RECIPES / "alpaca.yaml")], command="rlp")
    assert found.methods == ["control", "spg", "uml"]
    assert found.samples.n == 10


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str = ""
    size: int = 1
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Whole:
    count: int = 2
    parts: dict[str, Part] = field(default_factory=dict)


def test_named_parts_come_from_yaml_and_the_command_line_wins(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("parts:\n  plain:\n  big: {size: 5, inner: {rate: 0.5}}\n")
    found = parse(Whole, ["--config", str(file), "--parts.plain.size", "7"], command="x")
    assert found.parts == {"plain": Part(size=7), "big": Part(size=5, inner=Inner(rate=0.5))}
    assert list(found.parts) == ["plain", "big"]
    assert parse(Whole, ["--parts.new.size", "3"], command="x").parts == {"new": Part(size=3)}
    assert parse(Whole, [], command="x") == Whole()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts:\n  a: {sise: 1}\n", "c.yaml:2: unknown key 'parts.a.sise'; the nearest known"),
        ("parts:\n  a: {size: much}\n", "c.yaml:2: 'parts.a.size' must be a whole number"),
        ("parts: 3\n", "c.yaml:1: 'parts' must hold `name: options` lines"),
        ("parts:\n  a.b: {size: 1}\n", "c.yaml:2: 'a.b' under 'parts' must be a name"),
    ],
)
def test_a_mistake_in_a_named_part_names_file_and_line(tmp_path: Path, text: str, message: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        parse(Whole, ["--config", str(file)], command="x")
    assert message in str(error.value)


def test_help_shows_what_a_named_part_has(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(Whole, ["--help"], command="x")
    assert "--parts.NAME.size" in capsys.readouterr().out


def test_a_slip_in_a_parts_name_is_no_new_part(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("parts:\n  plain: {size: 2}\n")
    with pytest.raises(DataError, match=r"the file has no 'plian' under 'parts'.*is 'plain'"):
        parse(Whole, ["--config", str(file), "--parts.plian.size", "7"], command="x")
