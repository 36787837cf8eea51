"""deploy/tpu/environment.sh builds one environment per lock file; its packages are local files here."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from launcher.remote.shipping import LOCK, SETUP

# The newest that the script looks for. Making an environment takes seconds, so all but the first are copies.
PYTHON = """\
#!/bin/sh
if [ "$1" = -m ] && [ "$2" = venv ]; then
  [ -d "{template}" ] || "{python}" -m venv "{template}"
  exec cp -R "{template}" "$3"
fi
exec "{python}" "$@"
"""
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
        self._bin = folder / "bin"
        self._bin.mkdir()
        python = self._bin / "python3.13"
        python.write_text(PYTHON.format(template=folder / "template", python=sys.executable))
        python.chmod(0o755)

    def lock(self, content: str) -> None:
        """Write a lock file that pins a package with this content, and put the package where pip finds it."""
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
        path = f"{self._bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", self._code / SETUP, self.environments],
            env=os.environ | {"PATH": path}, capture_output=True, text=True,
        )  # fmt: skip

    def python(self) -> str:
        """Run the script; returns the Python that its last line names."""
        made = self.make()
        assert made.returncode == 0, made.stderr
        return made.stdout.splitlines()[-1]


def installed_content(python: str) -> str:
    command = [python, "-c", "import parcel; print(parcel.content)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_each_lock_file_has_one_environment_which_is_rebuilt_after_a_failure(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path)
    host.lock("content = 'apples'")
    apples = host.python()
    assert installed_content(apples) == "apples"
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
    assert (installed_content(pears), installed_content(apples)) == ("pears", "apples")
