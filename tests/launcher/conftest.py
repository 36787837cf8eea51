"""Plans of the quickstart, for tests that need any plan."""

from collections.abc import Callable
from pathlib import Path

import pytest

import configs
from configs.load import load
from launcher import clusters
from launcher.plan import Plan, make_plan

QUICKSTART = Path(configs.__file__).with_name("quickstart.yaml")


@pytest.fixture
def quickstart() -> Path:
    return QUICKSTART


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """Plans the quickstart with overrides, by default for four CPU devices."""

    def planned(
        *overrides: str, cluster: str = "local-2x2", name: str = "quickstart", root: Path = tmp_path / "runs"
    ) -> Plan:
        return make_plan(
            load(QUICKSTART, overrides),
            clusters.resolve(cluster),
            name=name,
            root=str(root),
            config_file=QUICKSTART,
            provenance={"commit": None},
        )

    return planned
