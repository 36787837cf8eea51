"""Recipes and overrides become a RunConfig, or errors with file, line, key, value and what is allowed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load
from configs.schema import RunConfig

DIGITS = "data: {source: digits}\n"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., RunConfig]:
    """Loads a recipe of the given text with the given overrides."""

    def read(text: str, *overrides: str) -> RunConfig:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        return load(recipe, overrides)

    return read


@pytest.fixture
def complaints(read: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """The lines of the UserError in which such a recipe ends, its path shortened to `recipe.yaml`."""

    def complaints(text: str, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as refused:
            read(text, *overrides)
        return str(refused.value).replace(f"{tmp_path}/", "").splitlines()

    return complaints


def assert_says(line: str, *fragments: str) -> None:
    assert [f for f in fragments if f not in line] == [], line


# A file that is no recipe


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("quikstart.yaml", 'did you mean "{folder}/quickstart.yaml"?'),
        ("z" * 200, "there are: {folder}/quickstart.yaml"),  # far from all, by the whole path
    ],
    ids=["near", "far"],
)
def test_missing_file_names_the_recipes_beside_it(tmp_path, asked, hint):
    (tmp_path / "quickstart.yaml").write_text(DIGITS)
    with pytest.raises(UserError) as refused:
        load(tmp_path / asked)
    assert str(refused.value) == f"{tmp_path / asked}: no such file; {hint.format(folder=tmp_path)}"


def test_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.yaml: cannot be read: .*utf-8"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("model:\n  name: [a\n", ("recipe.yaml:3:", "not valid YAML", "expected ',' or ']'")),
        ("model:\n\tname: a\n", ("recipe.yaml:2:", "not valid YAML", "'\\t'")),
        ("model: *base\n", ("recipe.yaml:1:", "not valid YAML", "undefined alias 'base'")),
        ("model: {}\n---\ntrain: {}\n", ("recipe.yaml:2:", "not valid YAML", "another document")),
        ("model: !!python/object:os.system {}\n", ("recipe.yaml:1:", "not valid YAML", "python/object")),
        ("train:\n  steps: !!int x\n", ("recipe.yaml", "'x'")),
        ("model: &m\n  name: *m\n", ("recipe.yaml",)),
        ("[" * 600, ("recipe.yaml",)),
        ("a\0b", ("recipe.yaml", "not valid YAML")),
    ],
    ids=["flow", "tab", "alias", "documents", "tag", "int", "recursive", "deep", "nul"],
)
def test_yaml_that_does_not_parse_is_one_line_with_its_place(complaints, text, fragments):
    (line,) = complaints(text)
    assert_says(line, *fragments)


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b\n", "list"), ("resnet50\n", "text"), ("7\n", "number")]
)
def test_recipe_is_a_mapping_of_sections(complaints, text, kind):
    assert complaints(text) == [
        f"recipe.yaml:1: a recipe is a mapping of sections (model:, data:, …), got a {kind}"
    ]


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}\n"])
def test_empty_file_means_the_defaults_and_is_asked_for_its_data(complaints, text):
    assert [line.partition(": ")[2] for line in complaints(text)] == [
        "data is missing; a recipe needs this section"
    ]


def test_records_are_asked_for_all_that_a_plan_needs_of_them(complaints):
    missing = complaints("data: {source: records}")
    assert [line.split()[1] for line in missing] == [
        "data.train.num_examples",
        "data.train.path",
        "data.eval.num_examples",
        "data.eval.path",
    ]
    assert all("data.source = records needs" in line for line in missing)


def test_problems_of_a_section_and_of_its_fields_elsewhere_are_told_together(complaints):
    problems = complaints("data: {source: digits, image_size: 9}\ntrain: {batch_size: 0}")
    assert [line.split()[1] for line in problems] == ["data.image_size", "train.batch_size"]


def test_empty_file_is_completed_from_the_command_line(read):
    assert read("", "data.source=digits") == read(DIGITS)


# Keys and values


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("model:\n  - name: resnet50\n", ("recipe.yaml:2: model = ", "must be a mapping", "num_classes", "a list")),
        ("\ntrain: 3\n", ("recipe.yaml:3: train = 3", "must be a mapping", "batch_size")),
        ("train:\n", ("recipe.yaml:2: train = null", "must be a mapping", "batch_size")),
        ("modle: {}\n", ("recipe.yaml:2: modle: unknown key", 'did you mean "model"?', "a recipe has: model, mesh")),
        (
            "train:\n  epochs: 3\n  batch_sise: 4\n",
            ("recipe.yaml:4: train.batch_sise: unknown key", '"batch_size"', "train has: batch_size, epochs"),
        ),
        ("train: {zzz: 4}\n", ("recipe.yaml:2: train.zzz: unknown key (train has:",)),
        ("train: {constrained: 4}\n", ("recipe.yaml:2: train.constrained: unknown key (train has:",)),
        ("train: {1: 4}\n", ("recipe.yaml:2: ", "1", "key")),
        ("train: {batch_size: big}\n", ("train.batch_size = big", "must be a whole number")),
        ("train: {batch_size: '64'}\n", ("train.batch_size = '64'", "must be a whole number")),
        ("train: {batch_size: 64.5}\n", ("train.batch_size = 64.5", "must be a whole number")),
        ("train: {epochs: true}\n", ("train.epochs = true", "must be a number")),
        ("train: {epochs:}\n", ("train.epochs = null", "must be a number")),
        ("model: {zero_init_last_gamma: 1}\n", ("= 1", "must be true or false")),
        ("log: {tensorboard: 5}\n", ("log.tensorboard = 5", "must be text")),
        ("train: {batch_size: 0}\n", ("recipe.yaml:2: train.batch_size = 0", "must be at least 1")),
        ("train: {epochs: 0}\n", ("train.epochs = 0", "must be above 0")),
        ("optimizer: {eps: .inf}\n", ("optimizer.eps = .inf", "finite")),
        ("optimizer: {eps: .nan}\n", ("optimizer.eps = .nan", "finite")),
        ("train: {label_smoothing: 1}\n", ("train.label_smoothing = 1", "must be below 1")),
        ("train: {seed: -1}\n", ("train.seed = -1", "must be at least 0")),
        ("schedule: {final_fraction: 2}\n", ("schedule.final_fraction = 2", "must be at most 1")),
        ("model: {name: resnet51}\n", ("model.name = resnet51", "allowed: resnet18, resnet34", '"resnet50"')),
        ("model: {batch_norm: 0}\n", ("model.batch_norm = 0", "global", "whole number of at least 1")),
        ("model: {batch_norm: globl}\n", ("model.batch_norm = globl", 'did you mean "global"?')),
        ("mesh: {batch: 0}\n", ("mesh.batch = 0", "-1 or a whole number of at least 1")),
    ],
)  # fmt: skip
def test_one_wrong_key_or_value_is_one_line(complaints, text, fragments):
    (line,) = complaints(DIGITS + text)
    assert_says(line, *fragments)


@pytest.mark.parametrize("mean", ["0.5", "[0.5, 0.5]", "[1, 2, 3, 4]", "[0.5, 0.5, grey]"])
def test_colour_is_three_numbers(complaints, mean):
    (line,) = complaints(f"data:\n  source: digits\n  mean: {mean}\n")
    assert_says(line, "recipe.yaml:3: data.mean", "number")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (
            "data:\n  source: digits\n  image_size: 9\n",
            ("recipe.yaml:3: data.image_size = 9", "multiple of 8"),
        ),
        ("data:\n  source: digits\n  std: [1, 0, 1]\n", ("recipe.yaml:3: data.std", "above 0")),
        ("data:\n  source: digits\n  train: {path: x}\n", ("recipe.yaml:3: data.train", "remove it")),
        (DIGITS + "model: {num_classes: 9}\n", ("recipe.yaml:2: model.num_classes = 9", "has 10 classes")),
        (
            DIGITS + "optimizer: {momentum: 0}\n",
            ("recipe.yaml:2: optimizer.nesterov", "set optimizer.momentum"),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_their_line(complaints, text, fragments):
    (line,) = complaints(text)
    assert_says(line, *fragments)


def test_key_written_twice_names_both_lines(complaints):
    (line,) = complaints(DIGITS + "train:\n  epochs: 3\n  epochs: 4\n")
    assert line == "recipe.yaml:4: train.epochs is written twice (first at recipe.yaml:3)"


def test_all_problems_are_reported_at_once(complaints):
    lines = complaints(
        DIGITS + "modle: {}\nmodel:\n  name: resnet51\ntrain:\n  epochs: 1\n  epochs: -1\n  seed: x\n",
        "train.batch_size=0",
        "train=3",
    )
    keys = [
        "modle",
        "model.name",
        "train.epochs is",
        "train.epochs =",
        "train.seed",
        "train.batch_size",
        "'train=3'",
    ]
    assert len(lines) == len(keys)
    for key in keys:
        assert any(key in line for line in lines), (key, lines)


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.learning_rate=1e-4", "learning_rate", 1e-4),
        ("optimizer.learning_rate=1E+1", "learning_rate", 10.0),
        ("optimizer.learning_rate=.5e-3", "learning_rate", 5e-4),
        ("optimizer.learning_rate=2", "learning_rate", 2.0),
        ("optimizer.name=adamw", "name", "adamw"),
        ("optimizer.nesterov=false", "nesterov", False),
        ("optimizer.nesterov=no", "nesterov", False),
    ],
)
def test_override_is_read_as_yaml(read, override, key, value):
    assert getattr(read(DIGITS, override).optimizer, key) == value


def test_numbers_of_a_file_are_read_like_those_of_the_command_line(read):
    assert read(DIGITS + "optimizer: {learning_rate: 1e-4}\n") == read(DIGITS, "optimizer.learning_rate=1e-4")


def test_override_beats_the_file_and_the_last_one_the_first(read):
    text = DIGITS + "train:\n  epochs: 3\n  steps: 7\n"
    config = read(text, "train.epochs=5", "train.epochs=6", "train.steps=null", "data.mean=[0, 0.5, 1]")
    assert (config.train.epochs, config.train.steps) == (6, None)
    assert config.data.mean == (0, 0.5, 1)


def test_override_reaches_nested_sections_and_sections_the_file_lacks(read):
    config = read("train:\n", "train.seed=3", "data.source=synthetic", "data.train.num_examples=8", "data.eval={num_examples: 4}")  # fmt: skip
    assert (config.train.seed, config.data.train.num_examples, config.data.eval.num_examples) == (3, 8, 4)


@pytest.mark.parametrize(
    "override", ["train=3", "train.epochs", "=3", ".epochs=3", "train.=3", "epochs=3", ""]
)
def test_malformed_override_is_shown_with_an_example(complaints, override):
    assert complaints(DIGITS, override) == [
        f"{override!r}: an override is section.key=value, such as train.batch_size=512"
    ]


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("trian.epochs=3", ("trian: unknown key", '"train"')),
        ("train.epoch=3", ("train.epoch: unknown key", '"epochs"')),
        ("train.epochs.x=3", ("train.epochs.x", "not a section")),
        ("train.epochs=", ("train.epochs = null", "must be a number")),
        ("train.epochs=null", ("train.epochs = null", "must be a number")),
        ("train.epochs=[3", ("train.epochs = ", "[3", "must be a number")),
        ("train.epochs=2026-13-45", ("train.epochs = ", "2026-13-45", "must be a number")),
        ("train.batch_size=0", ("train.batch_size = 0", "must be at least 1")),
        # Of YAML 1.1, these would be 64 and 90.
        ("train.batch_size=0100", ("train.batch_size = ", "must be a whole number")),
        ("train.steps=1:30", ("train.steps = ", "must be a whole number")),
        ("data.image_size=9", ("data.image_size = 9", "multiple of 8")),
    ],
)
def test_wrong_override_is_placed_on_the_command_line(complaints, override, fragments):
    (line,) = complaints(DIGITS + "train:\n  epochs: 2\n", override)
    assert_says(line, "command line: ", *fragments)
