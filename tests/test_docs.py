"""README, CONTRIBUTING and docs/ are correct: links resolve, commands run, and tables equal the code.

Commands are in fenced blocks: `bash`, one per line, or `console`, where `$ ` marks a command and its output
follows, in which `…` matches any text. They are run in a folder with the recipes and a finished run; for docs/tpu.md
the run is under gs:// and its slice exists. A command that would train is run with --dry-run.

    python -m tests.test_docs        regenerates the tables of fields in docs/configs.md
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from pydantic.fields import FieldInfo

import configs
from configs import checkpoints, google, settings
from configs.clusters import SlurmCluster, TpuCluster
from configs.clusters import named_clusters as clusters_by_name
from configs.schema import json_schema
from launcher import clusters, supervise
from launcher.backends import tpu
from launcher.commands.main import main
from launcher.gang import Exit
from launcher.plan import _FREE, Plan
from launcher.providers import cloud_tpu
from launcher.rundir import RunDirectory, storage
from tests import gcs, tpu_api
from tests.trainer import datasets
from trainer.data.storage import store as data_storage

REPOSITORY = Path(configs.__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CONFIGS_PAGE = DOCS / "configs.md"
MARKED = re.compile(r"(?<=<!-- fields -->\n\n).*(?=<!-- end of fields -->)", re.DOTALL)
TPU_PAGE = DOCS / "tpu.md"
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")
TEXTS = [*(REPOSITORY / name for name in OTHERS), *PAGES]
WITH_COMMANDS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *PAGES]


def page_id(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


# Markdown, as far as these pages use it


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def table(page: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table under `heading`, without the header and without backticks."""
    section = page.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    block = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert block, f"{page.name}: no table under {heading}"
    rows = [line.strip("|").split("|") for line in block[0].splitlines()[2:]]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a page, in order, with the lines of output shown for it."""
    for language, content in fences(text):
        if language == "bash":
            for line in content.splitlines():
                if line.strip() and not line.startswith("#"):
                    yield line.split("  #")[0].strip(), []
        elif language == "console":
            for part in content.split("$ ")[1:] if content.startswith("$ ") else []:
                command, *shown = part.rstrip("\n").split("\n")
                yield command, shown


def same(shown: list[str], actual: str, *, beginning: bool = False) -> bool:
    """Whether `actual` is what is shown; `…` in a line is any text, a line of `…` any lines."""
    lines = [
        r"(?:.*\n)*?"
        if line.strip() == "…"
        else r".*?".join(map(re.escape, line.rstrip().split("…"))) + r" *\n"
        for line in shown
    ]
    pattern = "".join(lines)
    return bool((re.match if beginning else re.fullmatch)(pattern, actual.rstrip("\n") + "\n"))


def all_commands() -> list[click.Command]:
    """The commands of `launch`, and those of its groups."""
    groups = [c for c in main.commands.values() if isinstance(c, click.Group)]
    return [*main.commands.values(), *(c for group in groups for c in group.commands.values())]


# Links and names


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_links_resolve(page: Path):
    broken = []
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_readme_links_to_every_page():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES if f"](docs/{p.name})" not in text] == []


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_files_named_in_the_text_exist(page: Path):
    rooms = r"(?:configs|launcher|trainer|models|tests|benchmarks|deploy|docs|\.ci)/[a-z_./0-9]*"
    named = {s for s in code_spans(page.read_text(encoding="utf-8")) if re.fullmatch(rooms, s)}
    assert [s for s in sorted(named) if not (REPOSITORY / s).exists()] == []


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_settings_named_in_the_text_exist(page: Path):
    fields = {row[0] for row in field_rows()}
    sections = {f.rsplit(".", i)[0] for f in fields for i in (1, 2) if f.count(".") >= i}
    pattern = rf"(?:{'|'.join(json_schema()['properties'])})\.[\w.]+"
    text = MARKED.sub("", page.read_text(encoding="utf-8"))
    named = {m for s in code_spans(text) for m in re.findall(rf"^{pattern}", s)}
    files = {
        p.name
        for room in ("trainer", "models", "launcher", "configs")
        for p in (REPOSITORY / room).glob("*.py")
    }
    assert sorted(named - fields - sections - files) == []


FOREIGN_OPTIONS = {"--gpus-per-node", "--signal", "--logdir", "--root-user-action", "-m", "-o"}


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_options_and_commands_named_in_the_text_exist(page: Path):
    options = {o for c in [main, *all_commands()] for p in c.params for o in p.opts + p.secondary_opts}
    options |= {"--help", "-h"}
    for script in (REPOSITORY / "benchmarks").glob("*.py"):
        options |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    unknown = []
    for span in code_spans(page.read_text(encoding="utf-8")):
        unknown += [
            o for o in re.findall(r"(?<!\S)--?[a-z][a-z-]*", span) if o not in options | FOREIGN_OPTIONS
        ]
        word = re.match(r"launch ([a-z]+)(?!\S)", span)
        if word and word[1] not in main.commands:
            unknown.append(span)
    assert unknown == []


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=page_id)
def test_blocks_are_fenced_and_say_what_they_are(page: Path):
    text = page.read_text(encoding="utf-8")
    assert {language for language, _ in fences(text)} <= {"bash", "console", "text", "yaml", "json", "python"}
    assert [line for line in prose(text).splitlines() if line.startswith("    ")] == []


# Commands


def a_make_target(command: str, shown: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert command.split()[1] in targets


def the_quickstart(command: str, shown: list[str]) -> None:
    a_make_target(command, shown)
    planned = CliRunner().invoke(main, ["plan", "configs/quickstart.yaml"]).output.splitlines()
    plan = [line for line in shown if line.startswith(("mesh ", "batch ", "steps ", "model "))]
    assert len(plan) == 4
    assert set(plan) <= set(planned)


def an_installable_extra(command: str, shown: list[str]) -> None:
    provided = importlib.metadata.metadata("podlaunch").get_all("Provides-Extra") or []
    assert set(re.findall(r"\[(\w+)\]", command)) <= set(provided)
    assert (REPOSITORY / "setup.py").is_file()


def an_installed_module(command: str, shown: list[str]) -> None:
    assert importlib.util.find_spec(command.split()[0])


def a_script(command: str, shown: list[str]) -> None:
    assert os.access(REPOSITORY / command.split()[0], os.X_OK)


def in_the_slurm_tests(command: str, shown: list[str]) -> None:
    """A command that tests/clusters/test_slurm.py runs, with fewer nodes."""
    tests = (REPOSITORY / "tests" / "clusters" / "test_slurm.py").read_text(encoding="utf-8")
    words = [word for word in command.split() if word in ("worker", "--kill-on-bad-exit=1")]
    file = [Path(word).name for word in command.split() if word.startswith("deploy/")]
    assert words + file
    assert [word for word in words + file if f'"{word}"' not in tests] == []


def first_contact(command: str, shown: list[str]) -> None:
    """A call of the script that tests/clusters/test_first_contact.py runs; its cluster exists."""
    script, cluster, *_ = command.split()
    assert os.access(REPOSITORY / script, os.X_OK)
    assert clusters.resolve(cluster).name == cluster


def suggested_by_launch(command: str, shown: list[str]) -> None:
    """A command that a message of `launch` suggests, with another last argument."""
    said = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (google, cloud_tpu))
    assert f"`{command.rpartition(' ')[0]} " in said


def parsed_by_launch(command: str, shown: list[str]) -> None:
    """A command of `launch`, possibly run through gcloud; it is parsed but not executed."""
    words = shlex.split(command)
    launch, name, *arguments = shlex.split(words[-1]) if words[0] == "gcloud" else words
    assert launch == "launch"
    main.commands[name].make_context(name, arguments)


def unchecked(command: str, shown: list[str]) -> None:
    """A command of another program, which is not checked."""


# Commands that are not run here, even as a dry run, and what is checked instead.
NOT_RUN: dict[str, Callable[[str, list[str]], None]] = {
    "make quickstart": the_quickstart,
    "make test": a_make_target,
    "make test-fast": a_make_target,
    "make test-client": a_make_target,
    "pre-commit install": unchecked,
    "make check": a_make_target,
    "make format": a_make_target,
    "make testbed": a_make_target,
    "make test-gpu": a_make_target,
    "sbatch deploy/slurm/train.sbatch configs/r50.yaml": in_the_slurm_tests,
    "srun --kill-on-bad-exit=1 launch worker configs/r50.yaml": in_the_slurm_tests,
    "python -m tests.launcher.backends.test_slurm": unchecked,
    "make lock": a_make_target,
    "deploy/first_contact.sh slurm-2x8": first_contact,
    "deploy/first_contact.sh tpu-v4-16 --root gs://my-bucket/runs": first_contact,
    ".ci/run": a_script,
    "python3 -m venv .venv": unchecked,
    "source .venv/bin/activate": unchecked,
    "pip install -e .": an_installable_extra,
    "pip install -e '.[cuda12]'": an_installable_extra,
    "pip install -e '.[test]'": an_installable_extra,
    "tensorboard --logdir runs": an_installed_module,
    "gcloud auth application-default login": suggested_by_launch,
    "gcloud config set project my-project": suggested_by_launch,
    "gcloud config set compute/zone us-central2-b": suggested_by_launch,
    "gcloud services enable tpu.googleapis.com --project my-project": suggested_by_launch,
    "gcloud storage buckets create gs://my-bucket": suggested_by_launch,
    "launch ssh r152 --host 2": parsed_by_launch,
    "launch ssh r152 --host 2 -- df -h": parsed_by_launch,
    "gcloud compute tpus tpu-vm ssh my-tpu --worker=all --command "
    '"launch worker configs/r152.yaml --root gs://my-bucket/runs data.train.path=gs://my-bucket/imagenet/train '
    'data.eval.path=gs://my-bucket/imagenet/validation"': parsed_by_launch,
    "python -m tests.test_docs": unchecked,
}
# The other programs that pages may call, and that are run.
HARMLESS = {"cp"}


def test_every_exception_occurs():
    written = {c for page in WITH_COMMANDS for c, _ in commands(page.read_text(encoding="utf-8"))}
    assert sorted(NOT_RUN.keys() - written) == []


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, some images and one finished run of the quickstart, without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "my-project")
    monkeypatch.setenv("CLOUDSDK_COMPUTE_ZONE", tpu_api.ZONE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.delenv("LAUNCH_ROOT", raising=False)
    shutil.copytree(REPOSITORY / "configs", "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    _write_images(tmp_path)
    planned = CliRunner().invoke(main, ["plan", "configs/quickstart.yaml", "--json"])
    run = _finished_run(Plan.from_json(planned.stdout))
    for step in (46, 68, 90):
        (run.path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def cloud(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The desk, and a finished run of docs/tpu.md in a bucket, whose slice was kept."""
    bucket, api = gcs.Server("my-bucket"), tpu_api.Server()
    api.seconds = 0.02
    monkeypatch.setattr(cloud_tpu, "POLL_SECONDS", 0.01)
    here = {"GOOGLE_CLOUD_PROJECT": "my-project"}
    for name, value in (gcs.environment(bucket.address) | tpu_api.environment(api.address) | here).items():
        monkeypatch.setenv(name, value)
    plan = _tpu_plan()
    _finished_run(plan)
    cloud_tpu.CloudTpu("my-project", tpu_api.ZONE).create(tpu._request(plan, None, "on-demand", 24.0))
    yield desk
    api.close()
    bucket.close()


def _tpu_plan() -> Plan:
    settings.change(("root=gs://my-bucket/runs", "data=gs://my-bucket"))
    arguments = ["--cluster", "tpu-v4-32", "configs/r152.yaml"]
    planned = CliRunner().invoke(main, ["plan", *arguments, "--json"])
    return tpu.resolve(Plan.from_json(planned.stdout))


def _finished_run(plan: Plan) -> RunDirectory:
    run = RunDirectory(plan.run_directory)
    run.write_plan(plan)
    number = run.attempts.begin({})
    for process in range(plan.processes):
        run.hosts.write_log(number, process, f"[Gloo] Rank {process} is connected to 1 peer ranks.\n")
    run.hosts.write_report(0, FINISHED["report"])
    run.attempts.append(FINISHED["attempt"])
    run.write_result(FINISHED["result"])
    return run


def _write_images(desk: Path) -> None:
    """photos/ with a folder a class, and tfrecords/ with labels from 1."""
    for split, size in (("train", 20), ("val", 5)):
        for label, name in enumerate(("daisy", "rose", "tulip")):
            folder = desk / "photos" / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(datasets.jpegs(size, size=96, seed=label)):
                (folder / f"{i:03}.jpg").write_bytes(image)
    images = datasets.jpegs(20)
    for split, shards in (("train", 2), ("validation", 1)):
        for k in range(shards):
            file = desk / "tfrecords" / f"{split}-{k:05}-of-{shards:05}"
            datasets.write_tfrecord(file, images, [i % 5 + 1 for i in range(20)])


FINISHED: dict[str, Any] = {
    "report": {
        "phase": "completed", "devices": "4 × cpu in 1 slice", "step": 90, "epoch": 90 * 64 / 1437, "train/loss": 0.5437,
        "train/accuracy": 0.9987, "speed/images_per_second": 142.0, "speed/data_wait_share": 0.004,
        "bound": "compute-bound", "data/ready_batches": 4, "eval/accuracy": 358 / 360, "time": 0,
    },
    "attempt": {
        "attempt": 1, "verdict": "completed", "from_step": 0, "reached_step": 90, "kept_step": 90,
        "wall_seconds": 180.6, "seconds": {}, "failure": None,
    },
    "result": {
        "status": "completed", "step": 90, "epoch": 90 * 64 / 1437, "metrics": {}, "attempts": 1, "wall_seconds": 180.6,
        "failure": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page != TPU_PAGE], ids=page_id)
def test_commands_work(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch):
    run_commands(page, monkeypatch)


def test_commands_of_tpu_md_work(cloud: Path, monkeypatch: pytest.MonkeyPatch):
    run_commands(TPU_PAGE, monkeypatch)


def run_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda file, argv: executed.append(argv))
    for command, shown in commands(page.read_text(encoding="utf-8")):
        benchmark = re.match(r"python -m benchmarks\.(\w+)", command)
        if command in NOT_RUN:
            NOT_RUN[command](command, shown)
        elif benchmark:
            assert (REPOSITORY / "benchmarks" / f"{benchmark[1]}.py").is_file(), command
        elif command.split()[0] == "launch":
            run_launch(shlex.split(command)[1:], shown)
        elif command.startswith("export "):
            monkeypatch.setenv(*command.removeprefix("export ").split("=", 1))
        else:
            assert command.split()[0] in HARMLESS, f"{command}: say in NOT_RUN what is checked instead"
            subprocess.run(shlex.split(command), check=True)
    for argv in executed:  # `launch tensorboard`
        assert Path(argv[argv.index("--logdir") + 1]).parent.is_dir()


def run_launch(arguments: list[str], shown: list[str]) -> None:
    """Run `launch` here, without training, and compare what it prints with what is shown."""
    command = shlex.join(["launch", *arguments])
    trains = arguments[0] not in {*main.commands, "--help", "-h", "--version"} - {"run"}
    dry = trains and "--dry-run" not in arguments
    done = CliRunner().invoke(main, [*arguments, "--dry-run"] if dry else arguments)
    refused = any(line.startswith("error: ") for line in shown)
    # Not the progress that slow commands print to stderr.
    output = done.stderr if refused else done.stdout
    assert done.exit_code == (2 if refused else 0), f"{command}: {done.output}"
    if dry and not refused:
        # The plan, to its last line; what training prints after it is not compared.
        ends = [i for i, line in enumerate(shown) if line.startswith("directory ")]
        shown = shown[: ends[0] + 1] if ends else []
    assert not shown or same(shown, output, beginning=dry), f"{command} printed\n{output}"


# Tables


def field_rows() -> list[tuple[str, str, str, str]]:
    """(section.key, default, allowed, meaning) of every field."""
    schema = json_schema()

    def fields(owner: str, name: str) -> Iterator[tuple[str, str, str, str]]:
        for key, field in schema["$defs"][name]["properties"].items():
            if "$ref" in field:
                yield from fields(f"{owner}.{key}", field["$ref"].rpartition("/")[2])
            else:
                meaning = field["description"].replace("\n", " ")
                yield f"{owner}.{key}", literal(field["default"]), allowed(field), meaning

    sections = schema["properties"].items()
    return [row for owner, ref in sections for row in fields(owner, ref["$ref"].rpartition("/")[2])]


def literal(value: Any) -> str:
    """`value` as one writes it in a recipe."""
    if isinstance(value, float):
        return f"`{value:g}`"
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def allowed(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(map(allowed, field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(map(literal, field.get("enum", [field.get("const")])))
    kinds = {
        "boolean": "`true`, `false`", "null": "`null`", "string": "text",
        "array": f"list of {field.get('maxItems')} numbers",
        "integer": "whole number", "number": "number",
    }  # fmt: skip
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {number(field[name])}" for name, sign in signs.items() if name in field]
    return " ".join([kinds[field["type"]], " and ".join(bounds)]).strip()


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e5 else f"{value:g}"


def field_tables() -> str:
    """What stands between the markers in docs/configs.md."""
    schema = json_schema()
    lines = []
    for section, ref in schema["properties"].items():
        about = schema["$defs"][ref["$ref"].rpartition("/")[2]]["description"]
        lines += [
            f"### {section}",
            "",
            about,
            "",
            "| Key | Default | Allowed | Meaning |",
            "|---|---|---|---|",
        ]
        rows = [row for row in field_rows() if row[0].startswith(f"{section}.")]
        lines += [f"| `{key.partition('.')[2]}` | {' | '.join(rest)} |" for key, *rest in rows]
        lines.append("")
    return "\n".join(lines)


def test_fields_in_configs_md_are_those_of_the_schema():
    written = MARKED.search(CONFIGS_PAGE.read_text(encoding="utf-8"))
    assert written, "docs/configs.md has lost its markers"
    assert written[0].rstrip() == field_tables().rstrip(), "rewrite it: python -m tests.test_docs"


@pytest.mark.parametrize(
    ("page", "heading", "cluster"),
    [(DOCS / "slurm.md", "## Which cluster", SlurmCluster), (TPU_PAGE, "## Settings", TpuCluster)],
)
def test_settings_of_clusters_are_those_of_the_code(
    page: Path, heading: str, cluster: type[SlurmCluster | TpuCluster]
):
    fields = cluster.model_fields.items()
    expected = [
        [name, default_of(field), (field.description or "").replace("\n", " ")] for name, field in fields
    ]
    assert table(page, heading) == [[c.replace("`", "") for c in row] for row in expected]


def test_settings_of_the_user_are_those_of_the_code():
    fields = settings.Settings.model_fields.items()
    expected = [[name, (field.description or "").replace("`", "")] for name, field in fields]
    assert table(CONFIGS_PAGE, "## Settings of your own") == expected


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    return literal(list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize(
    ("page", "names"),
    [(DOCS / "slurm.md", {"bigcluster", "pyxis"}), (TPU_PAGE, {"pod", "behind-iap"})],
)
def test_example_of_a_cluster_can_be_read(
    page: Path, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    examples = [c for language, c in fences(page.read_text(encoding="utf-8")) if language == "yaml"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clusters.yaml").write_text("\n".join(examples))
    monkeypatch.chdir(tmp_path)
    found = clusters_by_name()
    assert names <= found.keys()
    for name in names:
        clusters.from_settings(name, found[name])


def test_offer_in_tpu_md_is_the_one_of_launch(desk: Path, monkeypatch: pytest.MonkeyPatch):
    api = tpu_api.Server()
    monkeypatch.setenv(cloud_tpu.ENDPOINT, api.address)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(desk / ".config"))
    page = TPU_PAGE.read_text(encoding="utf-8")
    shown = next(s for c, s in commands(page) if c == "launch --cluster tpu-v4-32 configs/r152.yaml" and s)
    quote = tpu.quote(_tpu_plan(), RunDirectory(desk))
    api.close()
    assert f"to create   {quote}" in "\n".join(shown)


def test_roles_in_tpu_md_are_those_that_errors_name():
    named = " ".join(row[1] for row in table(TPU_PAGE, "## What is needed once"))
    said = [cloud_tpu.ROLE, checkpoints.ROLES, storage.ROLES, data_storage.ROLES]
    roles = {role for words in said for role in re.findall(r"roles/[\w.]+|Storage(?: [A-Z]\w+)+", words)}
    assert sorted(role for role in roles if role not in named) == []


def test_commands_in_the_readme_are_those_of_launch():
    rows = table(REPOSITORY / "README.md", "## Commands")
    assert {row[0].split()[1] for row in rows} == set(main.commands)


@pytest.mark.parametrize(
    ("page", "heading"), [(REPOSITORY / "README.md", "## Clusters"), (DOCS / "train.md", "## Where it runs")]
)
def test_clusters_are_those_of_launch(page: Path, heading: str):
    assert [row[0] for row in table(page, heading)] == list(clusters.KINDS)


@pytest.mark.parametrize(
    ("page", "heading"), [(REPOSITORY / "README.md", "## Exit codes"), (DOCS / "resume.md", "## Exit codes")]
)
def test_exit_codes_are_those_of_launch(page: Path, heading: str):
    written = {int(code): status for code, status, *_ in table(page, heading)}
    codes = {code: status for status, code in supervise.EXIT_CODES.items()}
    assert written == codes | {supervise.EXIT_USER_ERROR: "failed"}
    names = (supervise.EXIT_DONE, supervise.EXIT_USER_ERROR, supervise.EXIT_SAVED, supervise.EXIT_STOPPED)
    assert set(names) <= set(written)


def test_tags_in_watch_md_are_those_in_the_code():
    written = [row[0] for row in table(DOCS / "watch.md", "## TensorBoard")]
    tags = {"config"}  # the one without a group
    for module in (
        "loop",
        "metrics",
        "evaluate",
        "data/batches",
        "data/sources/records",
        "data/storage/reader",
        "data/storage/fetch",
    ):
        tree = ast.parse((REPOSITORY / "trainer" / f"{module}.py").read_text(encoding="utf-8"))
        strings = {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        tags |= {s for s in strings if re.fullmatch(r"[a-z_]+/[a-z0-9_]+", s)}
    assert sorted(written) == sorted(tags)


def test_fields_of_the_plan_are_those_of_the_code():
    assert [row[0] for row in table(DOCS / "train.md", "## Look before you run")] == list(
        Plan.__dataclass_fields__
    )


def test_what_may_change_is_what_the_plan_lets_change():
    written: dict[str, set[str] | None] = {}
    for row in table(DOCS / "resume.md", "## What may change"):
        for name in row[0].split(", "):
            section, _, key = name.partition(".")
            if key == "*":
                written[section] = None
            else:
                keys = written.setdefault(section, set())
                assert keys is not None
                keys.add(key)
    assert written == _FREE


class _Failing:
    """A backend whose processes end with exit code 1."""

    def __init__(self) -> None:
        self._exits = [Exit(process, 1) for process in range(2)]

    def job_info(self) -> dict[str, Any]:
        return {"job": None, "restart_count": None}

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        return False

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> "_Failing":
        for exit_ in self._exits:
            run.hosts.log_file(attempt, exit_.process).write_text("no such luck\n")
        return self

    def poll(self, timeout: float) -> list[Exit]:
        return self._exits

    def request_stop(self) -> None: ...

    def kill(self) -> None: ...

    def stopped_by(self) -> str:
        return "preempted"


def test_fields_of_attempts_and_result_are_those_written(desk: Path):
    run = RunDirectory(desk / "runs" / "quickstart")
    plan = run.plan()
    assert plan is not None
    supervise.supervise(
        replace(plan, max_restarts=0),
        run,
        _Failing(),
        stop_request=supervise.StopRequest(),
        on_progress=lambda *_: None,
        announce=print,
    )
    page = DOCS / "resume.md"
    assert [row[0] for row in table(page, "## attempts.jsonl")] == list(run.attempts.all()[-1])
    result = json.loads((run.path / "result.json").read_text())
    assert [row[0] for row in table(page, "## result.json")] == list(result)
    assert [row[0] for row in table(page, "### goodput")] == list(result["goodput"])
    assert [row[0] for row in table(page, "### failure")] == list(result["failure"])


def test_every_option_is_explained():
    """Each option of each command is named in the docs."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in WITH_COMMANDS)
    options = [p.opts for c in all_commands() for p in c.params if isinstance(p, click.Option)]
    assert [names for names in options if not any(name in text for name in names)] == []


if __name__ == "__main__":
    page = CONFIGS_PAGE.read_text(encoding="utf-8")
    CONFIGS_PAGE.write_text(MARKED.sub(lambda _: field_tables() + "\n", page), encoding="utf-8")


def test_each_line_of_the_threat_model_has_its_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "tests").rglob("test_*.py"))
    rows = table(DOCS / "security.md", "## Who can write what, and what follows")
    assert [row[-1] for row in rows if f"\ndef {row[-1]}(" not in tests] == []
