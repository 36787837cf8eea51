"""Which file a word means."""

import os
from pathlib import Path

import pytest

import configs
from configs.errors import UserError
from configs.load import load
from configs.recipes import find

OURS = Path(configs.__file__).parent
NAMES = ["quickstart", "r18", "r34", "r50", "r101", "r152"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_that_comes_with_podlaunch_is_found_by_its_name(name: str):
    assert find(name) == OURS / f"{name}.yaml"
    assert load(find(name)).model


@pytest.mark.parametrize(
    ("there", "word", "found"),
    [
        (["mine.yaml"], "mine", "mine.yaml"),
        (["mine.yml"], "mine", "mine.yml"),
        (["configs/mine.yaml"], "mine", "configs/mine.yaml"),
        (["mine.yaml", "configs/mine.yaml"], "mine", "mine.yaml"),
        (["r50.yaml"], "r50", "r50.yaml"),
        (["configs/r50.yaml"], "r50", "configs/r50.yaml"),
        (["mine", "mine.yaml"], "mine", "mine"),
        (["sweep/a.yaml"], "sweep/a", "sweep/a.yaml"),
        (["configs/sweep/a.yaml"], "sweep/a", "configs/sweep/a.yaml"),
        (["mine.v2.yaml"], "mine.v2", "mine.v2.yaml"),
        (["mine/x", "mine.yaml"], "mine", "mine.yaml"),
        (["mine.yaml/x", "configs/mine.yaml"], "mine", "configs/mine.yaml"),
        (["prices.yaml"], "prices.yaml", "prices.yaml"),
    ],
)
def test_a_file_comes_first_then_what_is_here_then_what_is_in_configs(
    there: list[str], word: str, found: str
):
    write(*there)
    assert find(word) == Path(found)


def test_a_folder_of_the_name_is_no_recipe():
    Path("r50").mkdir()
    assert find("r50") == OURS / "r50.yaml"


def test_recipe_may_come_through_a_pipe():
    os.mkfifo("pipe")  # as the shell makes one of `<(…)`
    assert find("pipe") == Path("pipe")


def test_file_that_is_not_there_is_for_load_to_tell():
    assert find("nope.yaml") == Path("nope.yaml")


@pytest.mark.parametrize("word", ["r50.yaml", "configs/r50.yaml", "/nowhere/r50.yml"])
def test_file_that_is_not_there_but_is_one_of_ours_is_hinted(word: str):
    with pytest.raises(UserError, match=rf"^{word}: no such file; r50 comes with podlaunch, say r50 alone$"):
        find(word)


def test_name_that_is_none_is_told_with_the_nearest_and_with_what_there_is():
    write("mine.yaml", "configs/other.yaml", "configs/clusters.yaml", "r18.yaml")
    with pytest.raises(UserError) as refused:
        find("mime")
    ours = ", ".join(NAMES)
    assert str(refused.value) == (
        f'mime: no such recipe; did you mean "mine"? (here: mine, other; with podlaunch: {ours})'
    )
    with pytest.raises(UserError, match=r'^r5: .*; did you mean "r50"\?'):
        find("r5")


def test_name_may_be_a_mistyped_command():
    with pytest.raises(
        UserError, match=r'^plna: neither a command nor a recipe; did you mean "plan"\?.*--help'
    ):
        find("plna", commands=["plan", "run"])


def test_many_recipes_are_told_in_one_line():
    write(*(f"sweep-{i}.yaml" for i in range(300)))
    with pytest.raises(UserError, match=r"sweep-11, 288 more; with podlaunch") as refused:
        find("zzz")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("word", ["clusters", "prices", "schema", ".", "", "x" * 300, "a\0b"])
def test_what_is_no_recipe(word: str):
    write("configs/clusters.yaml", "configs/prices.yaml")
    with pytest.raises(UserError, match="no such recipe"):
        find(word)
