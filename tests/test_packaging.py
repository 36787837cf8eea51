"""What the distributions contain, and that an installed podlaunch does not interfere with a user's repository.

The source distribution is built from a copy of the checkout, and the wheel from the source distribution. The wheel is
installed into a virtual environment that shares this environment's other packages, and is used in a repository that
has packages with the same names as our rooms.
"""

import configparser
import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

import podlaunch
from podlaunch import HOME, ROOMS, code, enter_home
from podlaunch.host import PROGRAMS
from tests.clusters.runs import TINY

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""
GENERIC = [*ROOMS, "tests", "benchmarks", "deploy", "docs"]
THEIRS = {
    "configs/__init__.py": "OWNER = 'user'",
    "models/mine.py": "",  # models is a namespace package there
    "trainer.py": "OWNER = 'user'",
    "launcher/__init__.py": "OWNER = 'user'",
    "tests/__init__.py": "OWNER = 'user'",
    "mine.yaml": TINY,
}


def checked(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(kind: str, source: Path, folder: Path) -> Path:
    return folder / checked([sys.executable, "-c", BUILD, kind, folder], cwd=source).splitlines()[-1]


def listed(*options: str) -> list[str]:
    """Files of the checkout, as `git ls-files` lists them."""
    found = checked(["git", "-C", HOME, "ls-files", "-z", *options]).split("\0")
    return [name for name in found if name and (HOME / name).is_file()]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    if not (HOME / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("sdist")
    for name in listed("--cached", "--others", "--exclude-standard"):
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, folder / "checkout" / name)
    with tarfile.open(built("sdist", folder / "checkout", folder)) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = folder.glob("podlaunch-*/")
    return unpacked


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@dataclass(frozen=True)
class Installed:
    """An environment with podlaunch installed, and a user's repository in which its commands run."""

    folder: Path
    repository: Path

    def run(self, program: str, *arguments: str, path: str | None = ".", cwd: Path | None = None) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {} if path is None else {"PYTHONPATH": path}
        command = [self.folder / "bin" / program, *arguments]
        return checked(command, env=environment, cwd=cwd or self.repository)


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    checked([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel])
    # The other packages. Their .pth files, such as that of an editable podlaunch, are not read from there.
    packages = [place for place in sys.path if place.endswith("-packages")]
    next(folder.glob("lib/*/site-packages")).joinpath("others.pth").write_text("\n".join(packages))
    return folder


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Installed:
    repository = tmp_path / "repository"
    for name, text in THEIRS.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    return Installed(environment, repository)


# What is distributed


def test_source_distribution_has_every_file_of_the_checkout(sdist: Path):
    assert [name for name in listed("--cached") if not (sdist / name).is_file()] == []


def test_wheel_installs_only_the_package_podlaunch(wheel: Path):
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    assert {name.split("/")[0] for name in ZipFile(wheel).namelist()} == {"podlaunch", info}


def test_wheel_has_all_code_and_data_files(wheel: Path):
    there = {name for name in ZipFile(wheel).namelist() if name.startswith("podlaunch/")}
    files = [*code().values(), *HOME.glob("configs/*.yaml"), *HOME.glob("configs/*.json")]
    expected = {str(file.relative_to(HOME)).removeprefix("podlaunch/") for file in files} | {"py.typed"}
    assert there == {f"podlaunch/{name}" for name in expected}


def test_metadata_has_urls_licence_and_entry_point(wheel: Path):
    archive = ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert urls.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/podlaunch/podlaunch") for url in urls.values())
    assert any(name.endswith("LICENSE") for name in archive.namelist())
    scripts = configparser.ConfigParser()
    scripts.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"launch": "podlaunch.__main__:main"}


# Next to a user's packages with the same names


@pytest.mark.parametrize("path", [None, ".", "elsewhere:."])
@pytest.mark.parametrize(
    "launch", [["launch"], ["python", "-m", "podlaunch"]], ids=["launch", "python -m podlaunch"]
)
def test_launch_imports_its_rooms_in_a_repository_with_the_same_names(
    installed: Installed, launch: list[str], path: str | None
):
    assert installed.run(*launch, "plan", "r50", path=path).startswith("run         r50  (")
    assert installed.run(*launch, "plan", "mine", path=path).startswith("run         mine  (mine.yaml)")


def test_users_python_imports_the_users_packages(installed: Installed):
    code = "import configs, models.mine, trainer, launcher, tests; print(*[m.OWNER for m in (configs, trainer, launcher, tests)])"
    assert installed.run("python", "-c", code).split() == ["user"] * 4
    code = f"import podlaunch; {code}"
    assert installed.run("python", "-c", code).split() == ["user"] * 4


FOUND = """
import importlib.util, sys
for name in sys.argv[1:]:
    if spec := importlib.util.find_spec(name):
        print(name, *spec.submodule_search_locations or [spec.origin])
"""


def names_in(folder: Path, found: str) -> list[str]:
    """The modules found in `folder`; one found elsewhere, such as another package's tests, does not count."""
    return [line.split()[0] for line in found.splitlines() if f" {folder}/" in line]


def test_plain_names_are_not_importable_from_an_installed_podlaunch(installed: Installed, tmp_path: Path):
    found = installed.run("python", "-c", FOUND, "podlaunch", *GENERIC, path=None, cwd=tmp_path)
    assert names_in(installed.folder, found) == ["podlaunch"]


def test_an_editable_install_adds_no_plain_names(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", FOUND, "podlaunch", *GENERIC]
    lines = checked(command, cwd=tmp_path, env=environment).splitlines(keepends=True)
    found = names_in(HOME, "".join(line for line in lines if "-packages" not in line))  # HOME has .venv, too
    if not found:
        pytest.skip("podlaunch is not installed here")
    assert found == ["podlaunch"]


def test_spawned_processes_of_a_pool_import_our_rooms(installed: Installed):
    for name in ("daisy", "rose"):
        (installed.repository / "photos" / name).mkdir(parents=True)
        for i in range(2):
            (installed.repository / "photos" / name / f"{i}.bmp").write_bytes(b"BM" + bytes(600_000))
    command = ["data", "convert", "imagefolder", "photos", "out", "--shard-mib", "1", "--jobs", "2"]
    assert "4 in 2 shards" in installed.run("launch", *command)


def test_installed_code_equals_the_checkouts(installed: Installed):
    """Workers are compared with the plan by this code, and hosts without a shared disk are sent it."""
    command = (
        "import json, podlaunch; print(json.dumps({n: f.read_text() for n, f in podlaunch.code().items()}))"
    )
    assert json.loads(installed.run("python", "-c", command)) == {
        name: file.read_text() for name, file in code().items()
    }


@pytest.mark.cluster
def test_installed_podlaunch_trains_in_a_repository_with_the_same_names(installed: Installed):
    output = installed.run("launch", "mine", "--cluster", "local-1", "model.name=resnet4", "train.steps=2")
    assert "completed   step 2 " in output
    result = json.loads((installed.repository / "runs" / "mine" / "result.json").read_text())
    assert (result["status"], result["step"], result["attempts"]) == ("completed", 2, 1)


# How our processes find their rooms


def test_importing_podlaunch_leaves_the_module_path_unchanged():
    command = "import sys; before = [*sys.path]; import podlaunch, podlaunch.host, podlaunch.__main__; print(before == sys.path)"
    assert checked([sys.executable, "-c", command], cwd=HOME) == "True\n"


def test_enter_home_puts_home_first_and_only_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", ["/theirs", str(HOME), "/packages"])
    for _ in range(2):
        enter_home()
        assert sys.path == [str(HOME), "/theirs", "/packages"]


def test_home_of_a_checkout_contains_the_rooms():
    assert Path(podlaunch.__file__).parent.parent == HOME
    assert [room for room in ROOMS if not (HOME / room / "__init__.py").is_file()] == []


@pytest.mark.parametrize("arguments", [[], ["tusk"]])
def test_unknown_host_program_is_refused_with_the_allowed_ones(arguments: list[str]):
    command = [sys.executable, "-m", "podlaunch.host", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 1
    assert f"allowed: {', '.join(PROGRAMS)}" in done.stderr
    assert "Traceback" not in done.stderr
