"""The gang on rented hosts up to its first ssh connection: what it waits for, what it refuses, how it ends."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from configs.errors import UserError
from configs.google import UnreachableError
from launcher.gang import Exit
from launcher.providers import Condition, Machine, Request
from launcher.remote import gang as gangs
from launcher.remote import hosts as module
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.gang import RemoteGang
from launcher.remote.hosts import Hosts
from launcher.remote.rental import Rental
from launcher.rundir import RunDirectory, run_id

ENDED = -signal.SIGTERM
ZONE = "us-central2-b"
REQUEST = Request("mine", "v4-16", "V4", "tpu-ubuntu2204-base")


@dataclass
class MemoryProvider:
    """Conditions in turn, the last one for ever; notes what is done."""

    conditions: list[Condition | Exception]
    num_machines: int = 2
    calls: list[str] = field(default_factory=list)

    def condition(self, name: str) -> Condition:
        condition = self.conditions.pop(0) if len(self.conditions) > 1 else self.conditions[0]
        if isinstance(condition, Exception):
            raise condition
        return replace(condition, owner=run_id("gs://bucket/runs/quickstart"))

    def machines(self, name: str) -> list[Machine]:
        return [Machine(0, k, f"192.0.2.{k}", None, (), f"vm-{k}") for k in range(self.num_machines)]

    def authorize(self, name: str, key: str) -> None:
        self.calls.append(f"authorize {key}")

    def create(self, request: Any) -> None:
        self.calls.append(f"create {request.name}")

    def delete(self, name: str) -> None:
        self.calls.append(f"delete {name}")


@dataclass
class Started:
    gang: RemoteGang
    run: RunDirectory
    provider: MemoryProvider

    def exits(self) -> list[Exit]:
        """The exits of both processes."""
        found, deadline = [], time.monotonic() + 60
        while len(found) < 2:
            found += self.gang.poll(0.05)
            assert time.monotonic() < deadline
        return found

    def phase(self, text: str) -> dict[str, Any]:
        """The report in the place of process 0, once its phase has this text."""
        deadline = time.monotonic() + 60
        while text not in (report := RunDirectory(self.run.location).hosts.report(0)).get("phase", ""):
            assert time.monotonic() < deadline, report
            time.sleep(0.01)
        return report


@pytest.fixture
def start(planned, gcs, monkeypatch) -> Callable[..., Started]:
    """Starts the gang of two VMs whose provider gives these conditions."""
    monkeypatch.setattr(module, "MIN_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "MAX_POLL_SECONDS", 0.01)
    started: list[Started] = []

    def start(*conditions: Any, may_replace: bool = True, num_machines: int = 2) -> Started:
        plan = planned(cluster="tpu-v4-16", root="gs://bucket/runs")
        run = RunDirectory(plan.run_directory)
        provider = MemoryProvider(
            [c if not isinstance(c, str) else Condition(c) for c in conditions], num_machines
        )
        rental = Rental(run, "mine", "test", (ZONE,), lambda project, zone: provider, is_ours=may_replace)
        hosts = Hosts(rental, lambda provisioning, hours: REQUEST, "me:key")
        number = run.attempts.begin({})
        started.append(
            Started(RemoteGang(RemoteAttempt(plan, run, number), hosts, adopted=False), run, provider)
        )
        return started[-1]

    yield start
    for each in started:
        each.gang.detach()


def test_request_in_the_queue_is_reported_as_queued_with_the_time(start):
    report = start(Condition("waiting", "queued resource ACCEPTED")).phase("queued resource ACCEPTED, for ")
    assert report["queued"] is True


def test_stop_request_ends_a_gang_whose_hosts_are_not_there_yet(start):
    started = start("waiting")
    started.phase("waiting")
    started.gang.request_stop()
    assert started.exits() == [Exit(0, ENDED), Exit(1, ENDED)]


def test_lost_hosts_are_deleted_and_requested_again(start):
    started = start("lost", "waiting")
    started.phase("waiting")
    assert started.provider.calls == ["delete mine", "create mine"]


def test_absent_hosts_are_requested(start):
    started = start("absent", "waiting")
    started.phase("waiting")
    assert started.provider.calls == ["create mine"]


def test_hosts_that_may_not_be_replaced_are_missed(start):
    first, _ = start("absent", may_replace=False).exits()
    assert (first.code, first.error) == (2, "it is absent")


@pytest.mark.parametrize("error", [UnreachableError("no answer"), UserError("no quota")])
def test_provider_that_fails_for_now_is_asked_again(start, error):
    started = start(error, "waiting")
    started.phase("waiting")
    assert started.provider.calls == []


def test_other_number_of_machines_than_planned_is_refused_with_the_key_already_there(start):
    started = start("ready", num_machines=3)
    first, second = started.exits()
    assert first.code == 2
    assert "mine has 3 VMs; cluster tpu-v4-16 has 2" in first.error
    assert second == Exit(1, ENDED)
    assert started.provider.calls == ["authorize me:key"]


def test_unexpected_error_of_the_launcher_ends_the_attempt_and_can_be_retried(start):
    first, second = start(KeyError("a bug")).exits()
    assert (first.code, first.cause, first.error) == (1, "launcher failed", "KeyError: 'a bug'")
    assert second == Exit(1, ENDED)


def test_killed_gang_that_does_not_end_is_given_up(start, monkeypatch):
    monkeypatch.setattr(gangs, "KILL_SECONDS", 0.0)
    started = start("waiting")
    started.gang.kill()
    assert {e.code for e in started.exits()} <= {-signal.SIGKILL, ENDED}
