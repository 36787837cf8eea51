"""The schema is small and documented, schema.json equals it, and the recipes match their descriptions."""

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

import configs
from configs.load import load
from configs.schema import RunConfig, json_schema

FOLDER = Path(configs.__file__).parent
RECIPES = sorted(set(FOLDER.glob("*.yaml")) - {FOLDER / "clusters.yaml", FOLDER / "prices.yaml"})
IMAGENET = ["r18", "r34", "r50", "r101", "r152"]


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    """Every field that a recipe can set, with its description."""
    found: dict[str, str | None] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description
    return found


def test_a_user_has_few_fields_to_learn():
    assert len(fields(RunConfig)) <= 66


def test_every_field_and_section_explains_itself_in_editors():
    assert [name for name, description in fields(RunConfig).items() if not description] == []
    assert [name for name, section in json_schema()["$defs"].items() if not section.get("description")] == []


def test_schema_file_is_up_to_date():
    written = (FOLDER / "schema.json").read_text(encoding="utf-8")
    assert json.loads(written) == json_schema(), "update it: launch schema configs/schema.json"


@pytest.mark.parametrize(
    "recipe",
    [
        {"train": {"batch_sise": 64}},
        {"train": {"batch_size": 0}},
        {"train": {"batch_size": "64"}},
        {"model": {"name": "resnet51"}},
        {"data": {"mean": [0.5]}},
        {"model": [1]},
    ],
)
def test_editors_refuse_what_load_refuses(recipe):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, json_schema())


def test_recipes_are_all_there():
    assert {path.stem for path in RECIPES} >= {"quickstart", *IMAGENET}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_satisfies_the_schema_of_editors(path):
    # What the file sets, with its numbers as YAML 1.2 reads them.
    written = load(path).model_dump(mode="json", exclude_unset=True)
    jsonschema.validate(written, json_schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command_and_what_to_expect(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"configs/{path.name}" in head
    assert "# Expect" in head
    assert "$schema=schema.json" in head


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_is_the_90_epoch_recipe(name):
    config = load(FOLDER / f"{name}.yaml")
    assert config.model.name == name.replace("r", "resnet")
    assert (config.model.num_classes, config.model.width, config.model.stem) == (1000, 64, "imagenet")
    assert config.model.zero_init_last_gamma
    assert config.optimizer.name == "sgd"
    assert config.optimizer.momentum == 0.875
    assert config.optimizer.weight_decay == 1 / 32768
    assert config.optimizer.learning_rate == pytest.approx(0.256 * config.train.batch_size / 256)
    assert config.schedule.name == "cosine"
    assert config.schedule.warmup_epochs > 0
    assert (config.train.epochs, config.train.label_smoothing) == (90, 0.1)
    assert (config.data.train.num_examples, config.data.eval.num_examples) == (1_281_167, 50_000)
    assert (config.data.train.path, config.data.eval.path) == ("imagenet/train", "imagenet/validation")
