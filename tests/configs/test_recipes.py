"""Recipes are found by name and by path."""

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
def test_recipe_that_comes_with_podlaunch_is_found_by_name(name: str):
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
def test_exact_path_beats_this_folder_which_beats_configs_which_beats_ours(
    there: list[str], word: str, found: str
):
    write(*there)
    assert find(word) == Path(found)


def test_folder_is_not_taken_for_a_recipe():
    Path("r50").mkdir()
    assert find("r50") == OURS / "r50.yaml"


def test_recipe_may_be_a_pipe():
    os.mkfifo("pipe")  # as the shell creates for `<(…)`
    assert find("pipe") == Path("pipe")


def test_missing_file_is_left_for_load_to_report():
    assert find("nope.yaml") == Path("nope.yaml")


@pytest.mark.parametrize("word", ["r50.yaml", "configs/r50.yaml", "/nowhere/r50.yml"])
def test_missing_file_named_like_one_of_our_recipes_is_refused_with_a_hint(word: str):
    with pytest.raises(
        UserError, match=rf"^{word}: no such file; for the recipe that comes with podlaunch, write r50$"
    ):
        find(word)


def test_unknown_name_is_refused_with_the_nearest_and_all_recipes():
    write("mine.yaml", "configs/other.yaml", "configs/clusters.yaml", "r18.yaml")
    with pytest.raises(UserError) as refused:
        find("mime")
    ours = ", ".join(NAMES)
    assert str(refused.value) == (
        f'mime: no such recipe; did you mean "mine"? (your recipes: mine, other; built-in recipes: {ours})'
    )
    with pytest.raises(UserError, match=r'^r5: .*; did you mean "r50"\?'):
        find("r5")


def test_mistyped_command_is_suggested():
    with pytest.raises(
        UserError, match=r'^plna: neither a command nor a recipe; did you mean "plan"\?.*--help'
    ):
        find("plna", commands=["plan", "run"])


def test_list_of_many_recipes_is_cut_to_one_line():
    write(*(f"sweep-{i}.yaml" for i in range(300)))
    with pytest.raises(UserError, match=r"sweep-11, 288 more; built-in recipes") as refused:
        find("zzz")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("word", ["clusters", "prices", "schema", ".", "", "x" * 300, "a\0b"])
def test_names_that_are_not_recipes_are_refused(word: str):
    write("configs/clusters.yaml", "configs/prices.yaml")
    with pytest.raises(UserError, match="no such recipe"):
        find(word)


def test_hidden_files_are_not_offered_as_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".pre-commit-config.yaml").touch()
    with pytest.raises(UserError) as refused:
        find("pre-commit")
    assert ".pre-commit" not in str(refused.value)
