"""deploy/tpu/environment.sh: a Python from a lock file, made once for each. The package is made here, without a network."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from launcher.remote.shipping import LOCK, SETUP

REPOSITORY = Path(__file__).parents[2]
INFO = "parcel-1.0.dist-info"


class Host:
    """The code on a VM, with a lock file of one package."""

    def __init__(self, folder: Path):
        self.wheel = folder / "parcel-1.0-py3-none-any.whl"
        self.environments = folder / "environments"
        self._code = folder / "code"
        (self._code / SETUP).parent.mkdir(parents=True)
        shutil.copy(REPOSITORY / SETUP, self._code / SETUP)

    def lock(self, content: str) -> None:
        """Name a package with this content, and have it where pip looks."""
        self.write_wheel(content)
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        (self._code / LOCK).write_text(
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

    def make(self) -> "subprocess.CompletedProcess[str]":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", self._code / SETUP, self.environments],
            env=os.environ | {"PATH": path}, capture_output=True, text=True,
        )  # fmt: skip

    def python(self) -> str:
        """The one that is named last."""
        made = self.make()
        assert made.returncode == 0, made.stderr
        return made.stdout.splitlines()[-1]


def what_it_has(python: str) -> str:
    command = [python, "-c", "import parcel; print(parcel.content)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_each_lock_file_has_a_python_of_its_own_which_is_made_once_and_anew_where_it_failed(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path)
    host.lock("content = 'apples'")
    apples = host.python()
    assert what_it_has(apples) == "apples"
    host.wheel.unlink()
    assert host.python() == apples  # from nothing

    host.lock("content = 'pears'")
    host.write_wheel("content = 'worms'")
    made = host.make()
    assert made.returncode != 0
    assert "DO NOT MATCH THE HASHES" in made.stderr
    assert made.stdout == ""
    (begun,) = set(host.environments.iterdir()) - {Path(apples).parents[1]}
    assert not (begun / ".ready").exists()

    host.write_wheel("content = 'pears'")
    pears = host.python()
    assert Path(pears).parents[1] == begun
    assert (what_it_has(pears), what_it_has(apples)) == ("pears", "apples")
