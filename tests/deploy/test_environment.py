"""deploy/tpu/environment.sh builds one environment per lock file; interpreter and packages are local files here."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest
from packaging.markers import Marker

from launcher.remote.shipping import INTERPRETER, LOCK, SETUP
from tests.clusters.runs import wait_until
from tests.gcs import BUCKET, Fault
from tests.gcs import Server as Storage
from tests.metadata import _Handler, _Server

# In the place of the pinned interpreter. Making an environment takes seconds, so each is a copy of one. A test may hold
# pip at a gate, whose other end tells which process it is.
PYTHON = """\
#!/bin/sh
if [ "$1 $2 $3" = "-I -m venv" ]; then
  cp -R "{template}/." "$4"
  mv "$4/bin/python" "$4/bin/real"
  printf '#!/bin/sh\\necho $$ >>"{folder}/pids"\\n[ ! -p "{folder}/gate" ] || read -r _ <"{folder}/gate"\\nexec "%s/bin/real" "$@"\\n' "$4" >"$4/bin/python"
  chmod +x "$4/bin/python"
  exit
fi
exec "{python}" "$@"
"""
REPOSITORY = Path(__file__).parents[2]
INFO = "parcel-1.0.dist-info"
FILE = "cpython.tar.gz"


class Host:
    """The code on a VM, with a lock file of one package, and the bucket from which it gets its interpreter."""

    def __init__(self, folder: Path, storage: Storage, template: Path):
        self.folder, self.storage, self._template = folder, storage, template
        self.wheel = folder / "parcel-1.0-py3-none-any.whl"
        self.environments = folder / "environments"
        self.code = folder / "code"
        (self.code / SETUP).parent.mkdir(parents=True)
        for name in (SETUP, *INTERPRETER):
            shutil.copy(REPOSITORY / name, self.code / name)
        self.pack_interpreter()

    def pack_interpreter(self, *, is_pinned: bool = True) -> None:
        """Put an interpreter into the bucket; `is_pinned`: the one that the code names by its hash."""
        script = PYTHON.format(template=self._template, python=sys.executable, folder=self.folder)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            entry = tarfile.TarInfo("python/bin/python3")
            entry.size, entry.mode = len(script), 0o755
            tar.addfile(entry, io.BytesIO(script.encode()))
            if not is_pinned:
                tar.addfile(tarfile.TarInfo("python/worm"))
        self.storage.put(f"python/{FILE}", packed.getvalue())
        if is_pinned:
            digest = hashlib.sha256(packed.getvalue()).hexdigest()
            pin = {"python": "3.12", "file": FILE, "sha256": digest, "address": f"gs://{BUCKET}/python"}
            (self.code / INTERPRETER[1]).write_text(json.dumps(pin))

    def lock(self, content: str) -> None:
        """Write a lock file that pins a package with this content, and put the package where pip finds it."""
        self.write_wheel(content)
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        (self.code / LOCK).write_text(
            f"--no-index\n--find-links {self.wheel.parent}\nparcel==1.0 --hash=sha256:{digest}\n"
        )

    def write_wheel(self, content: str) -> None:
        files = {
            "parcel.py": content,
            f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: parcel\nVersion: 1.0\n",
            f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{INFO}/RECORD": "",
        }
        with ZipFile(self.wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(ZipInfo(name), text)  # without the time, which would be in its hash

    def begin(self, address: str = "") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["sh", self.code / SETUP, self.environments, address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def make(self, address: str = "") -> "subprocess.CompletedProcess[str]":
        made = self.begin(address)
        stdout, stderr = made.communicate()
        return subprocess.CompletedProcess(made.args, made.returncode, stdout, stderr)

    def python(self) -> str:
        """Run the script; returns the Python that its last line names."""
        made = self.make()
        assert made.returncode == 0, made.stderr
        return made.stdout.splitlines()[-1]

    def builds(self) -> list[Path]:
        """Folders of environments, complete or not."""
        if not self.environments.exists():
            return []
        return [e for e in self.environments.iterdir() if e.is_dir() and not e.is_symlink()]

    def hold(self) -> None:
        """Have pip wait from now on, until `let_go`."""
        os.mkfifo(self.folder / "gate")

    def pips(self) -> list[int]:
        """Process ids of pip, whose builds wait at the gate."""
        file = self.folder / "pids"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def let_go(self) -> None:
        gate = self.folder / "gate"
        open_ = gate.open("w")  # pip waits at the other end, so this does not
        gate.unlink()
        open_.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without packages."""
    folder = tmp_path_factory.mktemp("template")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def host(tmp_path: Path, gcs: Storage, template: Path) -> Host:
    return Host(tmp_path, gcs, template)


def installed_content(python: str) -> str:
    command = [python, "-c", "import parcel; print(parcel.content)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_each_lock_file_has_one_environment_which_is_rebuilt_after_a_failure(host: Host) -> None:
    host.lock("content = 'apples'")
    apples = host.python()
    assert installed_content(apples) == "apples"
    host.wheel.unlink()
    host.storage.faults = [Fault("status", operation="*", status=404)]
    assert host.python() == apples  # from nothing
    host.storage.faults = []

    host.lock("content = 'pears'")
    host.write_wheel("content = 'worms'")
    made = host.make()
    assert made.returncode != 0
    assert "DO NOT MATCH THE HASHES" in made.stderr
    assert made.stdout == ""
    assert [e.name for e in host.environments.iterdir() if e.is_symlink()] == [Path(apples).parents[1].name]

    host.write_wheel("content = 'pears'")
    pears = host.python()
    assert (installed_content(pears), installed_content(apples)) == ("pears", "apples")
    assert len(host.builds()) == 2  # nothing is left of the one that failed


def test_calls_at_once_build_one_environment_and_tell_it_only_when_it_is_complete(host: Host) -> None:
    host.lock("content = 'apples'")
    host.hold()
    first = host.begin()
    wait_until(lambda: len(host.pips()) == 1, "pip has begun")
    others = [host.begin() for _ in range(3)]
    for other in others:
        assert other.stderr is not None
        assert "waiting for another call" in other.stderr.readline()
    assert len(host.builds()) == 1
    assert all(call.poll() is None for call in (first, *others))
    host.let_go()
    answers = [call.communicate()[0].strip() for call in (first, *others)]
    assert len(set(answers)) == 1
    assert len(host.pips()) == 1  # nobody has installed anything a second time
    assert installed_content(answers[0]) == "apples"


@pytest.mark.parametrize("outlives", [True, False], ids=["pip goes on", "with pip"])
def test_call_that_was_killed_is_repeated_by_the_next_once_its_pip_is_gone(
    host: Host, outlives: bool
) -> None:
    host.lock("content = 'apples'")
    host.hold()
    killed = host.begin()
    wait_until(lambda: len(host.pips()) == 1, "pip has begun")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    if not outlives:
        (pip,) = host.pips()
        os.kill(pip, signal.SIGKILL)
    following = host.begin()
    if outlives:
        assert following.stderr is not None
        assert "waiting for another call" in following.stderr.readline()
        assert following.poll() is None
    else:
        wait_until(lambda: len(host.pips()) == 2, "the next builds it")
    host.let_go()
    python = following.communicate()[0].strip()
    assert following.returncode == 0
    assert installed_content(python) == "apples"
    assert len(host.builds()) == 1


def test_interpreter_that_is_not_the_pinned_one_is_not_unpacked(host: Host) -> None:
    host.lock("content = 'apples'")
    host.pack_interpreter(is_pinned=False)
    made = host.make()
    assert made.returncode == 1
    assert re.search(
        r"gs://bucket/python/cpython\.tar\.gz has SHA-256 \w{64}, and deploy/tpu/interpreter", made.stderr
    )
    assert not list(host.environments.rglob("worm"))
    assert made.stdout == ""


def test_interpreter_comes_from_where_the_user_says(host: Host) -> None:
    host.lock("content = 'apples'")
    content = host.storage.contents()[f"python/{FILE}"]
    host.storage.faults = [Fault("status", object="python/*", operation="*", status=404)]
    missing = host.make()
    assert missing.returncode == 1
    assert "cannot be fetched from gs://bucket/python/cpython.tar.gz: HTTP Error 404" in missing.stderr
    assert "set the cluster's interpreter" in missing.stderr
    host.storage.put(f"a b/c/{FILE}", content)
    host.storage.faults.append(Fault("status", object="a b/*", operation="*", status=503, count=1))
    made = host.make(f"gs://{BUCKET}/a b/c/")
    assert made.returncode == 0, made.stderr


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    file = tmp_path / "metadata.json"
    account = {"token": json.dumps({"access_token": "secret", "expires_in": 3600})}
    file.write_text(json.dumps({"instance": {"service-accounts": {"default": account}}}))
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"file": file}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
    yield
    server.shutdown()
    server.server_close()


def test_bucket_is_asked_with_the_account_of_the_vm_and_no_other_server(metadata: None, monkeypatch) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import interpreter; "
        "r = interpreter.request_for(sys.argv[2], 'a+b.gz'); print(r.full_url, r.get_header('Authorization'))"
    )

    def asked(address: str) -> str:
        command = [sys.executable, "-c", code, str((REPOSITORY / SETUP).parent), address]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    assert asked("gs://bucket/a/") == (
        "https://storage.googleapis.com/storage/v1/b/bucket/o/a%2Fa%2Bb.gz?alt=media Bearer secret"
    )
    assert asked("https://example.com/x/") == "https://example.com/x/a%2Bb.gz None"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    assert asked("gs://bucket") == "http://127.0.0.1:1/storage/v1/b/bucket/o/a%2Bb.gz?alt=media None"


def test_pinned_python_and_its_jax_are_a_pair_that_the_fast_tests_run_on():
    pin = json.loads((REPOSITORY / INTERPRETER[1]).read_text())
    assert pin["file"].startswith(f"cpython-{pin['python']}.")
    assert re.fullmatch(r"[0-9a-f]{64}", pin["sha256"])
    assert pin["address"].startswith("https://")
    versions = re.search(r"^for version in (.*); do$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert versions
    assert pin["python"] in versions[1].split()
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        on_vms, in_tests = (
            version_in(REPOSITORY / f, package, pin["python"]) for f in (LOCK, "requirements.txt")
        )
        assert on_vms == in_tests


def version_in(lock: Path, package: str, python: str) -> str:
    """The version of a package that a lock file has for a Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
    lines = re.findall(rf"^{package}==(\S+)(?: ; (.*?))? \\$", lock.read_text(), re.MULTILINE)
    (version,) = [v for v, marker in lines if not marker or Marker(marker).evaluate(environment)]
    return str(version)
