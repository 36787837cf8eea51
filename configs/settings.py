"""settings.yaml: the user's own defaults, which `launch configure` writes once. All else that is given ranks above.

Each setting's docstring is its row in docs/configs.md.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator

from configs.clusters import Name, Text
from configs.errors import UserError
from configs.google import normalised
from configs.load import load_section, with_settings
from configs.schema import Section


def _data(value: str) -> str:
    if value.startswith("gs://"):
        return normalised(value)
    if "://" in value or not value.startswith("/"):
        raise ValueError("must be gs://bucket/prefix, or a folder by its whole path")
    return value.rstrip("/") or "/"


class Settings(Section):
    """The user's own defaults."""

    root: Annotated[Text, AfterValidator(normalised)] | None = None
    """Where runs on Cloud TPU are stored, such as `gs://my-bucket/runs`."""
    data: Annotated[Text, AfterValidator(_data)] | None = None
    """Where the datasets are that recipes name by a path such as `imagenet/train`: `gs://my-bucket`, or a folder."""
    project: Name | None = None
    """Google Cloud project."""
    zone: Name | None = None
    """Zone of Cloud TPU, such as `us-central2-b`."""

    def dataset(self, path: str | None) -> str | None:
        """The place of a dataset that a recipe calls `path`. One that begins with . or / is a place already."""
        if path is None or self.data is None or "://" in path or path.startswith((".", "/")):
            return path
        return f"{self.data.rstrip('/')}/{path}"


def file() -> Path:
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "podlaunch" / "settings.yaml"


def load() -> Settings:
    """Raises UserError with one line for each problem in the file."""
    return load_section(file(), Settings) if file().is_file() else Settings()


def change(assignments: tuple[str, ...], unset: tuple[str, ...] = ()) -> Settings:
    """Keep `key=value` for each of `assignments`, and forget the keys of `unset`. Raises UserError; then nothing is kept."""
    for key in unset:
        if key not in Settings.model_fields:
            raise UserError(f"--unset {key}: unknown; there are: {', '.join(Settings.model_fields)}")
    settings = with_settings(load(), assignments, "configure", "settings")
    settings = settings.model_copy(update=dict.fromkeys(unset))
    text = yaml.safe_dump(settings.model_dump(exclude_none=True), sort_keys=False)
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own: two terminals may configure at once.
        with tempfile.NamedTemporaryFile("w", dir=file().parent, prefix=".settings", delete=False) as f:
            f.write(text)
        Path(f.name).replace(file())
    except OSError as e:
        raise UserError(f"{file()} cannot be written: {e.strerror}") from None
    return settings
