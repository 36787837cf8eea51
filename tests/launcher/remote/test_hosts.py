"""The wait for hosts, with Google's own client against tests/tpu_api.py: in several zones, and where capacity is lost."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from configs.google import UnreachableError
from launcher.backends import tpu as backend
from launcher.gang import PREEMPTED
from launcher.plan import Plan
from launcher.providers import Machine
from launcher.providers.cloud_tpu import CloudTpu
from launcher.remote import hosts as module
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.follow import Follower
from launcher.remote.hosts import Hosts
from launcher.remote.ssh import HostError
from launcher.rundir import RunDirectory
from tests import tpu_api
from tests.tpu_api import PROJECT, Server

A, B = "us-central1-a", "us-east5-a"
NO_CAPACITY = "There is no more capacity in the zone"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, gcs: Any) -> Iterator[Server]:
    for name, seconds in (("MIN_POLL", 0.01), ("MAX_POLL", 0.01), ("MIN_RETRY", 0.05), ("MAX_RETRY", 0.2)):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)
    with tpu_api.in_use(monkeypatch, Server()) as server:
        yield server


class Waiting:
    """A launcher that waits for hosts, in a thread."""

    def __init__(self, plan: Plan, **settings: Any):
        plan = replace(plan, submission=backend._cluster(plan).model_copy(update=settings).model_dump())
        self.run = RunDirectory(plan.run_directory)
        self.attempt = RemoteAttempt(plan, self.run, 1)
        rental = backend._rental(plan, self.run)
        request = lambda provisioning, hours: backend._request(plan, "me:key", provisioning, hours)  # noqa: E731
        self.hosts, self.rental = Hosts(rental, request, "me:key"), rental
        self.machines: list[Machine] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self.machines = self.hosts.wait(self.attempt)
        except Exception as e:  # noqa: BLE001 (for the test to look at)
            self.error = e

    def end(self) -> "Waiting":
        """Once the wait is over."""
        self._thread.join(60)
        assert not self._thread.is_alive(), self.phase()
        return self

    def phase(self, text: str = "") -> str:
        """The phase that the user sees, once it has this text."""
        return until(lambda: text in (phase := self.run.hosts.report(0).get("phase", "")) and phase, text)

    def stop(self) -> None:
        self.attempt.stopping.set()


def until(holds: Callable[[], Any], what: str = "") -> Any:
    deadline = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return found


@pytest.fixture
def wait(api: Server, planned: Any) -> Iterator[Callable[..., Waiting]]:
    started: list[Waiting] = []

    def start(*zones: str, **settings: Any) -> Waiting:
        plan = planned(cluster="tpu-v6e-16", root="gs://bucket/runs")
        place = {"project": PROJECT, "zone": zones or (A,), "ssh_user": "me"}
        started.append(Waiting(plan, **place, **settings))
        return started[-1]

    yield start
    for each in started:
        each.stop()
        each.end()


def zones_of(api: Server) -> list[str]:
    """Zones in which something exists."""
    return sorted({name.split("/")[3] for name in [*api.queued_resources, *api.nodes]})


def num_requests(api: Server) -> int:
    return sum(1 for method, path in api.log if method == "POST" and path.endswith("/queuedResources"))


def test_capacity_that_is_lost_in_the_queue_is_asked_for_again_with_growing_pauses(api, wait):
    api.creation_fails(NO_CAPACITY, times=3)
    started = wait(provisioning="spot")
    started.phase(f"queued resource FAILED: {NO_CAPACITY}; request 2 goes out in ")
    assert [len(started.end().machines), started.error] == [4, None]
    assert num_requests(api) == 4
    assert api.rejected == []


def test_a_slice_that_is_suspended_before_it_was_used_is_replaced(api, wait):
    api.hold = True
    started = wait(provisioning="spot")
    name = until(lambda: next(iter(api.queued_resources), None))
    with api.lock:
        api._set(name, "SUSPENDING", stateInitiator="SERVICE")
    api.release()
    assert [len(started.end().machines), num_requests(api)] == [4, 2]


@pytest.mark.parametrize(
    ("code", "message"), [(3, "The runtime version is invalid"), (8, "Quota limit has been exceeded")]
)
def test_a_request_that_fails_by_the_users_mistake_is_not_repeated(api, wait, code, message):
    api.creation_fails(message, code=code)
    error = wait(provisioning="spot").end().error
    assert isinstance(error, HostError)
    assert error.is_users
    assert message in str(error)
    assert num_requests(api) == 1


def test_the_users_limit_counts_over_all_requests(api, wait):
    api.creation_fails(NO_CAPACITY, times=10_000)
    started = wait(valid_until_hours=1.0)
    started.phase("request 3 goes out")
    resources = started.run.resources
    # As if it had waited for an hour; again, since the launcher writes the same file.
    until(lambda: resources.write_waiting_since(time.time() - 3600) or started.error)
    assert isinstance(started.error, HostError)
    assert started.error.is_users
    assert f"no capacity within valid_until_hours = 1 ({A}: queued resource FAILED" in str(started.error)
    assert NO_CAPACITY in str(started.error)


def test_the_users_limit_counts_over_all_launchers(api, wait):
    api.hold = True
    first = wait(valid_until_hours=1.0)
    until(lambda: api.queued_resources)
    first.stop()
    first.end()
    resources = first.run.resources
    resources.write_waiting_since(resources.waiting_since() - 3600)
    assert "no capacity within valid_until_hours = 1" in str(wait(valid_until_hours=1.0).end().error)
    assert num_requests(api) == 1


def test_each_request_may_wait_as_long_as_the_user_has_left(api, wait):
    api.creation_fails(NO_CAPACITY)
    started = wait(valid_until_hours=2.0)
    started.end()
    (request,) = api.queued_resources.values()
    seconds = float(request["queueingPolicy"]["validUntilDuration"].removesuffix("s"))
    assert 7000 < seconds <= 7200


def test_the_first_zone_that_grants_wins_and_the_other_request_is_withdrawn(api, wait):
    api.held_zones = {A}
    started = wait(A, B).end()
    assert (len(started.machines), started.rental.granted_zone()) == (4, B)
    assert zones_of(api) == [B]
    assert [(r.zone, r.granted is not None) for r in started.run.resources.unreleased()] == [(B, True)]


def test_of_two_zones_that_grant_at_once_one_is_deleted_before_anything_starts(api, wait):
    api.held_zones = {A, B}
    waiting = wait(A, B)
    until(lambda: len(api.queued_resources) == 2)
    waiting.stop()
    waiting.end()
    api.release()
    until(lambda: len(api.nodes) == 2 and {n["state"] for n in api.nodes.values()} == {"READY"})
    started = wait(A, B).end()
    assert (started.rental.granted_zone(), zones_of(api)) == (A, [A])


def test_a_zone_without_capacity_does_not_hold_up_the_other(api, wait):
    api.creation_fails(NO_CAPACITY, times=10_000, zone=A)
    api.held_zones = {B}
    started = wait(A, B)
    started.phase(f"{A}: queued resource FAILED: {NO_CAPACITY}; {B}: queued resource WAITING_FOR_RESOURCES")
    until(lambda: num_requests(api) > 3)
    api.held_zones = set()
    api.release()
    assert (started.end().rental.granted_zone(), zones_of(api)) == (B, [B])


def test_a_request_that_fails_for_good_in_one_zone_does_not_end_the_wait_in_the_other(api, wait):
    api.creation_fails("Quota limit has been exceeded", code=8, times=10_000, zone=A)
    api.held_zones = {B}
    started = wait(A, B)
    until(lambda: num_requests(api) > 3)
    api.held_zones = set()
    api.release()
    assert (started.end().rental.granted_zone(), zones_of(api)) == (B, [B])


def test_a_zone_that_refuses_the_request_does_not_hold_up_the_other(api, wait):
    api.fail_next(429, "Quota limit 'V6E' has been exceeded", method="queuedResources.create")
    api.held_zones = {A, B}
    started = wait(A, B)
    started.phase(f"{A}: refused, trying again: ")
    until(lambda: num_requests(api) == 3)
    api.release()
    assert len(started.end().machines) == 4


def test_a_zone_that_refuses_a_deletion_does_not_hold_up_the_other(api, wait):
    api.creation_fails(NO_CAPACITY, zone=A)
    api.fail_next(400, "an operation is in progress", method="queuedResources.delete", times=10_000)
    api.held_zones = {B}
    started = wait(A, B)
    started.phase(f"{A}: refused, trying again: ")
    del api.queued_resources[next(name for name in api.queued_resources if B in name)]  # by other means
    until(lambda: num_requests(api) == 3)
    api.forgive()
    api.release()
    assert len(started.end().machines) == 4


def test_hosts_that_are_taken_away_are_asked_for_in_all_zones_again(api, wait):
    first = wait(A, B).end()
    zone = first.rental.granted_zone()
    api.preempt(next(iter(api.nodes)))
    api.held_zones = {zone}
    again = wait(A, B).end()
    assert again.rental.granted_zone() == ({A, B} - {zone}).pop()
    assert len(api.nodes) == 1


def test_spot_that_is_not_granted_in_time_becomes_on_demand(api, wait):
    api.hold = True
    started = wait(A, B, provisioning="spot", on_demand_after_hours=0.5)
    until(lambda: len(api.queued_resources) == 2)
    assert all("spot" in q for q in api.queued_resources.values())
    resources = started.run.resources
    resources.write_waiting_since(resources.waiting_since() - 1800)
    until(lambda: api.queued_resources and not any("spot" in q for q in api.queued_resources.values()))
    api.release()
    assert len(started.end().machines) == 4
    (rented,) = resources.unreleased()
    (node,) = api.nodes.values()
    assert (rented.provisioning, node["labels"]["podlaunch-provisioning"]) == ("on-demand", "on-demand")


def test_a_request_is_recorded_before_it_goes_out(api, wait, monkeypatch):
    seen = []
    create = CloudTpu.create

    def create_and_look(provider: CloudTpu, request: Any) -> None:
        seen.append([r.key for r in RunDirectory("gs://bucket/runs/quickstart").resources.unreleased()])
        create(provider, request)

    monkeypatch.setattr(CloudTpu, "create", create_and_look)
    started = wait(A).end()
    assert seen == [[(PROJECT, A, started.rental.name)]]


def test_a_node_that_stays_unknown_is_given_up(api, wait, monkeypatch):
    wait(A).end()
    (node,) = api.nodes.values()
    node["state"] = "UNKNOWN"
    started = wait(A)
    started.phase("UNKNOWN")
    assert num_requests(api) == 1
    monkeypatch.setattr(module, "UNKNOWN_SECONDS", 0.0)
    assert len(started.end().machines) == 4
    assert num_requests(api) == 2


def test_a_wait_of_thousands_of_polls_goes_on():
    assert module._growing(0.5, 1.3, 10_000, 10.0) == 10.0


def test_an_api_out_of_reach_is_asked_again(api, wait, monkeypatch):
    def unreachable(self: CloudTpu, name: str) -> None:
        raise UnreachableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(CloudTpu, "condition", unreachable)
        started = wait(A)
        started.phase("no answer")
    assert len(started.end().machines) == 4


# While a run goes on there


@pytest.mark.parametrize(
    ("state", "silent_seconds", "causes"),
    [
        ("UNKNOWN", 0, []),
        ("UNKNOWN", 61, [PREEMPTED]),
        ("READY", 61, ["lost"]),
        ("PREEMPTED", 0, [PREEMPTED, "", "", ""]),
    ],
)
def test_a_state_that_is_unknown_ends_an_attempt_only_where_hosts_are_silent_too(
    api, wait, state, silent_seconds, causes
):
    started, ended = wait(A).end(), []
    (node,) = api.nodes.values()
    node["state"] = state
    started.run.hosts.write_report(2, {"time": 0.0})
    follower = Follower(started.attempt, started.hosts, lambda at, exit_: ended.append(exit_.cause))
    follower._machines = started.machines
    follower._silent_since = {2: time.monotonic() - silent_seconds} if silent_seconds else {}
    follower._check_hosts()
    assert ended == causes
