"""The `launch data` commands: their output and exit codes, and that they load no jax."""

import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from launcher.commands.main import main
from tests.trainer.datasets import jpegs, write
from trainer.data.storage.dataset import open_dataset

IMAGES = jpegs(30, size=32)


def launch(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for i, image in enumerate(IMAGES):
        file = root / ("ant", "bee", "cat")[i % 3] / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    return root


@pytest.fixture
def dataset(folder: Path, tmp_path: Path) -> Path:
    assert launch("convert", "imagefolder", folder, tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def test_convert_says_what_is_there(folder: Path, tmp_path: Path):
    done = launch("convert", "imagefolder", folder, tmp_path / "out")
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert done.stdout.splitlines() == [
        f"dataset     {tmp_path / 'out'}",
        f"records     30 in 1 shard, {manifest.shards[0].size / 1000:.4g} KB",
        "classes     3",
        f"digest      {manifest.digest}",
    ]


def test_user_error_is_one_line_and_exit_code_2(folder: Path, tmp_path: Path):
    (folder / "dog").mkdir()
    done = launch("convert", "imagefolder", folder, tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr == f"error: {folder / 'dog'}: a class folder without images; fill it or remove it\n"


def test_index_publishes_a_table_elsewhere(dataset: Path, tmp_path: Path):
    done = launch("index", dataset, "--to", tmp_path / "table")
    assert done.exit_code == 0
    assert open_dataset(str(tmp_path / "table")).manifest.base == str(dataset)
    assert f"dataset     {tmp_path / 'table'}" in done.stdout


def test_verify_names_damage_and_fails(dataset: Path):
    assert launch("verify", dataset, "--no-decode").stdout == "verified    30 records read, none bad\n"
    row, shard = open_dataset(str(dataset)).records[7], dataset / "00000-00.array_record"
    content = bytearray(shard.read_bytes())
    content[int(row["offset"]) + 9] ^= 1
    shard.write_bytes(content)
    done = launch("verify", dataset, "--no-decode")
    assert done.exit_code == 1
    bad, last = done.stdout.splitlines()
    assert bad.startswith(f"bad         {shard.name} byte {row['offset']:,} (record 7): its crc32c is ")
    assert last == "verified    30 records read, 1 bad"


def test_verify_names_a_shard_that_is_missing_or_cut_off(dataset: Path):
    shard = dataset / "00000-00.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = launch("verify", dataset)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"{shard} is cut off" in done.stderr
    shard.unlink()
    assert f"{shard} is missing" in launch("verify", dataset).stderr


def test_inspect_gives_the_lines_of_a_recipe(dataset: Path):
    done = launch("inspect", dataset)
    assert done.exit_code == 0
    assert done.stdout.endswith(
        f"\nmodel:\n  num_classes: 3\ndata:\n  train:\n    path: {dataset}\n    num_examples: 30\n"
    )
    assert "classes     3, 10 images each\n" in done.stdout
    assert done.stdout.count("█ 10\n") == 3
    assert "data.shuffle" not in done.stdout


def test_inspect_warns_of_a_dataset_that_is_sorted_by_class(tmp_path: Path):
    write(tmp_path, IMAGES, sorted(i % 3 for i in range(30)))
    assert "data.shuffle=global" in launch("inspect", tmp_path).stdout


def test_inspect_shows_only_the_largest_and_smallest_of_many_classes(tmp_path: Path):
    write(tmp_path, IMAGES, [i if i < 20 else 3 for i in range(30)])
    lines = launch("inspect", tmp_path).stdout.splitlines()
    bars = [line.split()[0] for line in lines if "█" in line or line.strip() == "…"]
    assert bars == ["3", "0", "1", "2", "4", "…", "15", "16", "17", "18", "19"]


def test_a_bucket_that_cannot_be_read_is_one_line(gcs, tmp_path: Path):
    for arguments in (("inspect", "gs://elsewhere/x"), ("index", "gs://elsewhere/x")):
        done = launch(*arguments)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert "there is no bucket elsewhere" in done.stderr


def test_a_folder_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = launch("convert", "imagefolder", folder, tmp_path / "file" / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert "cannot be written" in done.stderr


FULL = """
import resource, sys
from launcher.commands.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
main(["data", *sys.argv[2:]])
"""


@pytest.mark.parametrize("limit", [50_000, 100])
def test_a_disk_that_is_full_is_one_line(dataset: Path, folder: Path, tmp_path: Path, limit: int):
    command = ["index", dataset] if limit == 100 else ["convert", "imagefolder", folder, tmp_path / "new"]
    arguments = [sys.executable, "-c", FULL, str(limit), *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "new").glob("*.array_record"))


# WorkerSpec


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe on 30 records in 3 shards."""
    for split in ("train", "eval"):
        write(tmp_path / split, IMAGES, np.arange(30) % 7)
    file = tmp_path / "recipe.yaml"
    splits = "\n".join(f"  {s}: {{path: {tmp_path / s}, num_examples: 30}}" for s in ("train", "eval"))
    file.write_text(f"model: {{num_classes: 7}}\ndata:\n{splits}\ntrain: {{batch_size: 8}}\n")
    return file


def ordered(recipe: Path | str, *options: object) -> list[list[str]]:
    done = launch("order", recipe, *options)
    assert done.exit_code == 0, done.output
    return [line.split() for line in done.stdout.splitlines()]


def test_an_epoch_of_the_order_is_each_record_once_with_its_label(recipe: Path):
    lines = ordered(recipe, "--count", 30)
    assert [int(position) for position, *_ in lines] == list(range(30))
    records = [10 * int(shard[5:10]) + int(record) for _, shard, record, _ in lines]
    assert sorted(records) == list(range(30)) != records
    assert [int(label) for *_, label in lines] == [record % 7 for record in records]


def test_the_recipe_may_be_given_by_its_name(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipe.parent)
    assert ordered("recipe", "--count", 3) == ordered(recipe, "--count", 3)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_order(recipe: Path, hosts: int):
    parts = [ordered(recipe, "--hosts", hosts, "--host", k, "--count", 80 // hosts) for k in range(hosts)]
    assert sorted(chain(*parts), key=lambda line: int(line[0])) == ordered(recipe, "--count", 80)
    assert {int(line[0]) % 8 for line in parts[1]} == set(range(8 // hosts, 16 // hosts))


def test_the_order_may_be_asked_for_anywhere(recipe: Path):
    assert ordered(recipe, "--start", 37, "--count", 5) == ordered(recipe, "--count", 42)[37:]
    assert ordered(recipe, "data.shuffle=none", "--count", 1)[0][1:] == [
        "part-00000-of-00003.array_record",
        "0",
        "0",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--hosts", 2, "--host", 2), "must be 0 to 1"),
        (("--hosts", 3), "--hosts 3 does not divide train.batch_size = 8"),
    ],
)
def test_an_order_that_cannot_be_is_refused(recipe: Path, options, reason):
    done = launch("order", recipe, *options)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert reason in done.stderr


# What is loaded


LOADED = """
import shlex, sys
from launcher.commands.main import main
for line in sys.stdin:
    main(["data", *shlex.split(line)], standalone_mode=False)
print(*{name.partition(".")[0] for name in sys.modules} & {"jax", "flax", "grain", "orbax"})
"""


def test_the_tools_load_no_jax(folder: Path, recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    commands = [
        ["convert", "imagefolder", folder, out, "--resize", 16],
        ["index", out],
        ["inspect", out, "--sheet", tmp_path / "sheet.png"],
        ["order", recipe],
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        input="\n".join(shlex.join(map(str, command)) for command in commands),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.png").is_file()
    assert done.stdout.splitlines()[-1] == ""
