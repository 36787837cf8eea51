"""What a user sets once: `launch configure`, what it ranks below, and the questions of a first run."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import configs
from launcher.commands.main import main
from launcher.providers.cloud_tpu import project_and_zone

RECIPES = Path(configs.__file__).parent
HEADLINE = ["--cluster", "tpu-v4-32", "configs/r152.yaml"]
"""The first sentence of the README, exactly so."""
OWN = {"root": "gs://mine/runs", "data": "gs://mine", "project": "my-project", "zone": "us-central2-b"}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A laptop on which nothing is set up, and a checkout."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    for name in ("LAUNCH_ROOT", "GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE"):
        monkeypatch.delenv(name, raising=False)
    # No metadata server is looked for, and no credentials have a project.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    (tmp_path / "configs").symlink_to(RECIPES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def settings(home: Path) -> dict[str, str]:
    file = home / "config" / "podlaunch" / "settings.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else {}


def assignments(**values: str) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def test_headline_teaches_what_it_lacks_and_works_once_that_is_set(home):
    refused = launch(*HEADLINE)
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    taught = line.partition("`launch configure ")[2].rstrip("`").split()
    assert [word.partition("=")[0] for word in taught] == list(OWN)
    assert settings(home) == {}
    assert launch("configure", *taught).exit_code == 0
    assert launch("configure", *assignments(**OWN)).exit_code == 0
    assert settings(home) == OWN
    planned = launch(*HEADLINE, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "directory   gs://mine/runs/r152" in planned.stdout
    plan = launch("plan", *HEADLINE, "--json").stdout
    assert '"gs://mine/imagenet/train"' in plan


def test_settings_are_shown_changed_and_forgotten(home):
    assert launch("configure", *assignments(**OWN)).exit_code == 0
    assert launch("configure", "zone=europe-west4-a", "--unset", "data").exit_code == 0
    shown = launch("configure").stdout
    assert "root        gs://mine/runs" in shown
    assert "data        not set" in shown
    assert settings(home) == {k: v for k, v in OWN.items() if k != "data"} | {"zone": "europe-west4-a"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["root=runs"], "settings.root = runs: must be gs://bucket/prefix"),
        (["root=gs://-/x"], "- is not a valid bucket name"),
        (["data=photos"], "must be gs://bucket/prefix, or a folder by its whole path"),
        (["data=s3://x"], "must be gs://bucket/prefix, or a folder"),
        (["project=a/b"], "settings.project = a/b"),
        (["zon=x"], 'did you mean "zone"?'),
        (["zone"], "a setting is key=value; keys: root, data, project, zone"),
        (["--unset", "zon"], "--unset zon: unknown; there are: root, data, project, zone"),
        (["zone=us-central2-b", "root=runs"], "settings.root"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_kept(home, arguments, words):
    launch("configure", "project=before")
    result = launch("configure", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert words in line
    assert settings(home) == {"project": "before"}
    assert [f.name for f in (home / "config" / "podlaunch").iterdir()] == ["settings.yaml"]


def test_file_with_a_mistake_is_named_with_its_line(home):
    launch("configure", "zone=us-central2-b")
    file = home / "config" / "podlaunch" / "settings.yaml"
    file.write_text("zone: us-central2-b\nrot: gs://mine\n")
    result = launch("plan", *HEADLINE)
    assert result.exit_code == 2
    assert f'{file}:2: rot: unknown key; did you mean "root"?' in result.stderr


def test_command_line_ranks_above_environment_above_settings_above_gcloud(home, monkeypatch):
    place = home / "gcloud" / "configurations"
    place.mkdir(parents=True)
    (place / "config_default").write_text("[core]\nproject=of-gcloud\n[compute]\nzone=zone-of-gcloud\n")
    assert project_and_zone(None, None) == ("of-gcloud", "zone-of-gcloud")
    launch("configure", *assignments(**OWN))
    assert project_and_zone(None, None) == ("my-project", "us-central2-b")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "of-environment")
    monkeypatch.setenv("CLOUDSDK_COMPUTE_ZONE", "zone-of-environment")
    assert project_and_zone(None, None) == ("of-environment", "zone-of-environment")
    assert project_and_zone("given", "zone-given") == ("given", "zone-given")
    plan = ("plan", *HEADLINE, "--json")  # which opens no dataset
    assert '"gs://mine/runs/r152"' in launch(*plan).stdout
    monkeypatch.setenv("LAUNCH_ROOT", "gs://other/runs")
    assert '"gs://other/runs/r152"' in launch(*plan).stdout
    assert '"gs://given/r152"' in launch(*plan, "--root", "gs://given").stdout


def test_root_for_tpus_leaves_runs_elsewhere_where_they_were(home):
    launch("configure", *assignments(**OWN))
    assert f"directory   {home}/runs/quickstart" in launch("plan", "configs/quickstart.yaml").stdout


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("imagenet/train", "gs://mine/imagenet/train"),
        ("./imagenet/train", "./imagenet/train"),
        ("/data/train", "/data/train"),
        ("gs://theirs/train", "gs://theirs/train"),
    ],
)
def test_datasets_of_recipes_lie_where_the_user_says(path, place):
    launch("configure", "data=gs://mine/")
    plan = launch("plan", "configs/r50.yaml", "--json", f"data.train.path={path}")
    assert f'"path": "{place}"' in plan.stdout


def test_recipe_that_reads_no_images_needs_no_place_for_them():
    launch("configure", "root=gs://mine/runs", "project=my-project", "zone=us-central2-b")
    speed = ["data.source=synthetic", "data.train.num_examples=10000", "data.eval.num_examples=100"]
    planned = launch(*HEADLINE, *speed, "--dry-run")
    assert planned.exit_code == 0, planned.output


def test_runs_are_found_in_both_places(home, gcs, planned):
    from launcher.rundir import RunDirectory

    launch("configure", "root=gs://bucket/runs")
    here = planned(name="here", root=home / "runs")
    there = planned(name="there", root="gs://bucket/runs", cluster="tpu-v4-8")
    for plan in (here, there):
        run = RunDirectory(plan.run_directory)
        run.write_plan(plan)
        run.write_result({"status": "completed"})
    assert [line.split()[0] for line in launch("list").stdout.splitlines()] == ["there", "here"]
    assert "run         there" in launch("status").stdout
    assert "run         here" in launch("status", "here").stdout
    assert "in runs or gs://bucket/runs" in launch("status", "elsewhere").stderr
    gcs.close()
    assert "run         here" in launch("status", "here").stdout  # the bucket is not asked


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_first_run_in_a_terminal_asks_and_remembers(home, terminal):
    ours, theirs = terminal
    command = [sys.executable, "-m", "podlaunch", *HEADLINE, "--dry-run"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = ""
    for key, answers in {"root": ["runs", OWN["root"]], **{k: [OWN[k]] for k in list(OWN)[1:]}}.items():
        for answer in answers:  # the first of root is refused, and asked for again
            seen = ""
            while not seen.endswith(f"\n{key}: "):
                seen += os.read(ours, 1).decode()
            shown += seen
            os.write(ours, f"{answer}\n".encode())
    while True:
        try:
            rest = os.read(ours, 4096).decode()
        except OSError:  # on Linux, where the other end is closed
            rest = ""
        shown += rest
        if not rest:
            break
    assert process.wait() == 0, shown
    assert "error: configure root=runs" in shown
    assert "directory   gs://mine/runs/r152" in shown
    assert settings(home) == OWN
    assert launch(*HEADLINE, "--dry-run").exit_code == 0
