"""The provider with Google's own client, against tests/tpu_api.py."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from google.auth.credentials import AnonymousCredentials
from google.oauth2.credentials import Credentials

from configs.errors import UserError
from configs.google import UnreachableError
from launcher.providers import OWNER, Condition, Request
from launcher.providers.cloud_tpu import SCOPE, CloudTpu, project_and_zone
from tests import tpu_api
from tests.tpu_api import PROJECT, ZONE, Server, TestMachine

REQUEST = Request(
    name="podlaunch-x",
    accelerator_type="v4-32",
    generation="V4",
    runtime="tpu-ubuntu2204-base",
    labels={OWNER: "x-1"},
    metadata={"ssh-keys": "podlaunch:ssh-ed25519 AAAA me"},
    tags=("podlaunch",),
    description="run x",
)
PARENT = f"projects/{PROJECT}/locations/{ZONE}"
QUEUED = f"{PARENT}/queuedResources/podlaunch-x"


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setattr("launcher.providers.cloud_tpu.POLL_SECONDS", 0.01)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    for name in ("GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE"):
        monkeypatch.delenv(name, raising=False)


def begun(server, monkeypatch):
    server.seconds = 0.02
    for name, value in tpu_api.environment(server.address).items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def server(monkeypatch):
    server = begun(Server(), monkeypatch)
    yield server
    server.close()


@pytest.fixture
def tpu(server):
    return CloudTpu(PROJECT, ZONE)


def until(tpu, word, name="podlaunch-x"):
    """The conditions on the way, and the one reached."""
    seen = []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        seen.append(tpu.condition(name))
        if seen[-1].status == word:
            return seen
        time.sleep(0.003)
    raise AssertionError(seen[-1])


def node_of(server, name="podlaunch-x"):
    return server.nodes[f"{PARENT}/nodes/{name}"]


def post(server, path, body):
    """What Google answers to a client of somebody else's."""
    asked = urllib.request.Request(f"{server.address}/v2/{path}", body.encode(), method="POST")
    with urllib.request.urlopen(asked) as answer:
        return answer.status


# What is made


def test_on_demand_slice(tpu, server):
    tpu.create(REQUEST)
    assert str(until(tpu, "ready")[-1]) == "ready: node podlaunch-x READY"
    machines = tpu.machines("podlaunch-x")
    assert [(m.slice, m.worker, m.internal, m.external) for m in machines] == [
        (0, i, f"10.0.0.{n}", f"34.0.0.{n}") for i, n in enumerate(int(m.internal[7:]) for m in machines)
    ]
    assert len(machines) == 4
    assert all(m.host_keys[0].startswith("ssh-ed25519 AAAA") and len(m.host_keys) == 1 for m in machines)
    assert [m.alias for m in machines] == [f"tpu.{node_of(server)['id']}-{i}" for i in range(4)]
    queued, node = server.queued_resources[QUEUED], node_of(server)
    assert not {"spot", "guaranteed", "reservationName"} & queued.keys()
    assert queued["queueingPolicy"] == {"validUntilDuration": "86400s"}  # no request waits without end
    assert node["acceleratorType"] == "v4-32"
    assert node["labels"] == REQUEST.labels
    assert node["metadata"] == REQUEST.metadata
    assert node["tags"] == ["podlaunch"]
    assert node["networkConfig"] == {"network": "default", "enableExternalIps": True}
    assert node["serviceAccount"] == {"scope": [SCOPE]}
    assert "schedulingConfig" not in node
    assert server.rejected == []


def test_spot_in_a_network_of_ones_own(tpu, server):
    tpu.create(
        replace(
            REQUEST,
            provisioning="spot",
            network="pods",
            subnetwork="pods-1",
            external_ips=False,
            service_account="trainer@test.iam.gserviceaccount.com",
            valid_until_hours=1.5,
        )
    )
    until(tpu, "ready")
    assert [m.external for m in tpu.machines("podlaunch-x")] == [None] * 4
    queued, node = server.queued_resources[QUEUED], node_of(server)
    assert queued["spot"] == {}
    assert queued["queueingPolicy"] == {"validUntilDuration": "5400s"}
    assert node["networkConfig"] == {"network": "pods", "subnetwork": "pods-1"}
    assert node["serviceAccount"] == {"email": "trainer@test.iam.gserviceaccount.com", "scope": [SCOPE]}
    assert server.rejected == []


@pytest.mark.parametrize(
    "reservation", [None, "mine", "projects/o/locations/us-central2-b/reservations/mine"]
)
def test_reserved(tpu, server, reservation):
    """As gcloud's v2 asks for it: a name, and neither a tier nor a scheduling config."""
    tpu.create(replace(REQUEST, provisioning="reserved", reservation=reservation))
    until(tpu, "ready")
    queued = server.queued_resources[QUEUED]
    assert not {"spot", "guaranteed"} & queued.keys()
    assert "schedulingConfig" not in node_of(server)
    paths = {None: f"{PARENT}/reservations/-", "mine": f"{PARENT}/reservations/mine"}
    assert queued["reservationName"] == paths.get(reservation, reservation)
    assert server.rejected == []


def test_topology_instead_of_a_type(tpu, server):
    tpu.create(replace(REQUEST, topology="2x2x2"))
    until(tpu, "ready")
    assert len(tpu.machines("podlaunch-x")) == 2
    assert node_of(server)["acceleratorConfig"] == {"type": "V4", "topology": "2x2x2"}
    assert "acceleratorType" not in node_of(server)
    assert [f.accelerator_type for f in tpu.list_labelled(OWNER)] == ["V4 2x2x2"]


def test_several_slices(tpu, server):
    tpu.create(replace(REQUEST, accelerator_type="v4-16", slices=11))
    until(tpu, "ready")
    machines = tpu.machines("podlaunch-x")
    assert [(m.slice, m.worker) for m in machines] == [(s, w) for s in range(11) for w in range(2)]
    assert machines[20].alias.startswith(f"tpu.{node_of(server, 'podlaunch-x-10')['id']}-")
    server.preempt("podlaunch-x-3")
    assert until(tpu, "lost")[-1].detail in ("queued resource SUSPENDING", "queued resource SUSPENDED")
    tpu.delete("podlaunch-x")
    assert server.nodes == server.queued_resources == {}
    assert server.rejected == []


def test_machines_are_given_out_and_come_back(monkeypatch):
    pool = [TestMachine(f"10.9.0.{i}", host_key=f"ssh-ed25519 AAAA{i} root@t{i}") for i in range(4)]
    events = []
    server = begun(
        Server(
            list(pool),
            started=lambda node, machines: events.append(("started", node["metadata"]["ssh-keys"], machines)),
            ended=lambda node, machines: events.append(("ended", node["name"], machines)),
        ),
        monkeypatch,
    )
    tpu = CloudTpu(PROJECT, ZONE)
    tpu.create(REQUEST)
    until(tpu, "ready")
    assert [(m.internal, m.external, m.host_keys) for m in tpu.machines("podlaunch-x")] == [
        (m.internal, None, (f"ssh-ed25519 AAAA{i}",)) for i, m in enumerate(pool)
    ]
    tpu.create(replace(REQUEST, name="second"))  # has to wait for them
    until(tpu, "waiting", "second")
    server.preempt("podlaunch-x")
    until(tpu, "ready", "second")
    assert [m.internal for m in tpu.machines("second")] == [m.internal for m in pool]
    keys = REQUEST.metadata["ssh-keys"]
    assert events == [
        ("started", keys, pool), ("ended", f"{PARENT}/nodes/podlaunch-x", pool), ("started", keys, pool),
    ]  # fmt: skip
    server.close()


def test_machines_whose_keys_are_not_told(tpu, server):
    server.answers_host_keys = False
    tpu.create(REQUEST)
    until(tpu, "ready")
    assert [m.host_keys for m in tpu.machines("podlaunch-x")] == [()] * 4


# How it stands


def test_nothing_there(tpu):
    assert tpu.condition("podlaunch-x") == Condition("absent")
    assert tpu.machines("podlaunch-x") == []


def test_held_in_the_queue_and_released(tpu, server):
    server.hold = True
    tpu.create(REQUEST)
    time.sleep(0.15)
    assert str(tpu.condition("podlaunch-x")) == "waiting: queued resource WAITING_FOR_RESOURCES"
    server.seconds = 0.3
    server.release()
    assert str(until(tpu, "creating")[-1]) == "creating: queued resource PROVISIONING"
    assert {c.status for c in until(tpu, "ready")} == {"creating", "ready"}


def test_preempted(tpu, server):
    tpu.create(REQUEST)
    until(tpu, "ready")
    server.preempt("podlaunch-x")
    assert until(tpu, "lost")[-1].detail.startswith("queued resource SUSPEND")
    time.sleep(0.1)
    assert str(tpu.condition("podlaunch-x")) == "lost: queued resource SUSPENDED"


def test_failed_says_why(tpu, server):
    server.creation_fails("There is no more capacity\nin the zone")
    tpu.create(REQUEST)
    assert (
        str(until(tpu, "lost")[-1]) == "lost: queued resource FAILED: There is no more capacity in the zone"
    )


@pytest.mark.parametrize(
    ("code", "message", "word"),
    [
        (8, "There is no more capacity in the zone", "lost"),
        (9, "The zone does not have enough resources available", "lost"),
        (4, "The request expired", "lost"),
        (0, "", "lost"),
        (8, "Quota limit 'TPUV4sPerProjectPerZone' has been exceeded", "invalid"),
        (3, "The runtime version is invalid", "invalid"),
        (7, "Permission denied on the network", "invalid"),
    ],
)
def test_a_request_that_fails_in_the_queue_is_the_users_or_nobodys(tpu, server, code, message, word):
    server.creation_fails(message, code=code)
    tpu.create(REQUEST)
    assert until(tpu, word)[-1].detail.startswith("queued resource FAILED")


@pytest.mark.filterwarnings("ignore:Unrecognized State enum value")
@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("PREEMPTED", "lost"), ("TERMINATED", "lost"), ("STOPPED", "lost"), ("REPAIRING", "repairing"),
        ("RESTARTING", "repairing"), ("DELETING", "deleting"), ("UNKNOWN", "unknown"), (99, "repairing"),
    ],
)  # fmt: skip
def test_states_of_a_node(tpu, server, state, word):
    tpu.create(REQUEST)
    until(tpu, "ready")
    node_of(server)["state"] = state
    assert tpu.condition("podlaunch-x") == Condition(word, f"node podlaunch-x {state}")


def test_what_ails_a_node_is_said(tpu, server):
    tpu.create(REQUEST)
    until(tpu, "ready")
    node_of(server)["healthDescription"] = "The TPU had a maintenance event."
    assert tpu.condition("podlaunch-x").detail == "node podlaunch-x READY: The TPU had a maintenance event."


def test_node_that_is_gone_from_under_its_queued_resource(tpu, server):
    tpu.create(REQUEST)
    until(tpu, "ready")
    del server.nodes[f"{PARENT}/nodes/podlaunch-x"]
    assert str(tpu.condition("podlaunch-x")) == "lost: queued resource ACTIVE, with 0 of 1 nodes"


def test_node_made_by_other_means(tpu, server):
    body = '{"acceleratorType": "v4-8", "runtimeVersion": "tpu-ubuntu2204-base"}'
    assert post(server, f"{PARENT}/nodes?nodeId=mine", body) == 200
    until(tpu, "ready", "mine")
    assert [(m.slice, m.worker, m.external) for m in tpu.machines("mine")] == [(0, 0, None)]
    with pytest.raises(
        UserError, match=r"TPU mine: the name is taken in test, us-central2-b \(.*already exists\);"
    ):
        tpu.create(replace(REQUEST, name="mine"))
    tpu.delete("mine")
    assert server.nodes == {}


# Again, and away


def test_created_twice_is_taken_up(tpu, server):
    tpu.create(REQUEST)
    tpu.create(REQUEST)
    assert list(server.queued_resources) == [QUEUED]


@pytest.mark.parametrize("labels", [{OWNER: "y-2"}, {}])
def test_name_taken_by_another(tpu, labels):
    tpu.create(replace(REQUEST, labels={OWNER: "y-1"} if labels else {}))
    with pytest.raises(
        UserError, match="TPU podlaunch-x: the name is taken in test, us-central2-b"
    ) as refused:
        tpu.create(replace(REQUEST, labels=labels))
    assert "\n" not in str(refused.value)


def test_delete_returns_when_all_is_gone(tpu, server):
    tpu.create(REQUEST)
    until(tpu, "ready")
    tpu.delete("podlaunch-x")
    assert server.nodes == server.queued_resources == {}
    tpu.delete("podlaunch-x")  # nothing more to do
    tpu.create(REQUEST)  # and the name is free
    assert server.rejected == []


def test_delete_of_what_is_being_deleted_waits_for_it(tpu, server):
    tpu.create(REQUEST)
    until(tpu, "ready")
    server.seconds = 0.3
    tpu._client.delete_queued_resource({"name": QUEUED, "force": True})
    assert str(tpu.condition("podlaunch-x")) == "deleting: queued resource DELETING"
    tpu.delete("podlaunch-x")
    assert server.queued_resources == {}


def test_delete_while_it_waits(tpu, server):
    server.hold = True
    tpu.create(REQUEST)
    tpu.delete("podlaunch-x")
    assert server.queued_resources == {}


def test_delete_takes_nodes_whose_queued_resource_is_gone(tpu, server):
    tpu.create(replace(REQUEST, slices=2))
    until(tpu, "ready")
    server.queued_resources.clear()
    tpu.delete("podlaunch-x")
    assert server.nodes == {}


def test_delete_that_does_not_end(tpu, server, monkeypatch):
    tpu.create(REQUEST)
    until(tpu, "ready")
    server.seconds = 60
    monkeypatch.setattr("launcher.providers.cloud_tpu.WAIT_SECONDS", 0.1)
    with pytest.raises(UnreachableError, match="TPU podlaunch-x: not done after"):
        tpu.delete("podlaunch-x")


def test_ours_are_found_in_all_zones(tpu, server):
    tpu.create(replace(REQUEST, slices=2))
    CloudTpu(PROJECT, "us-central1-a").create(
        replace(REQUEST, name="y", accelerator_type="v6e-8", labels={OWNER: "y-1", "user": "me"})
    )
    tpu.create(replace(REQUEST, name="theirs", labels={}))
    for name in ("podlaunch-x", "theirs"):
        until(tpu, "ready", name)
    until(CloudTpu(PROJECT, "us-central1-a"), "ready", "y")
    found = sorted(tpu.list_labelled(OWNER), key=lambda f: f.name)
    assert [(f.name, f.zone, f.accelerator_type, f.condition.status, f.description) for f in found] == [
        ("podlaunch-x", ZONE, "v4-32", "ready", "run x"),
        ("y", "us-central1-a", "v6e-8", "ready", "run x"),
    ]
    assert found[1].labels == {OWNER: "y-1", "user": "me"}
    assert abs(found[0].created.timestamp() - time.time()) < 60
    del server.queued_resources[QUEUED]
    left = [f for f in tpu.list_labelled(OWNER) if f.name != "y"]
    assert [f.name for f in left] == ["podlaunch-x-0", "podlaunch-x-1"]
    assert server.rejected == []


def test_zones_with(tpu):
    assert tpu.zones_with("v6e-16") == ["us-central1-a", "us-east5-a"]
    assert tpu.zones_with("v9-8") == []


# What goes wrong


def refusal(tpu, request=REQUEST):
    with pytest.raises(UserError) as refused:
        tpu.create(request)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_api_is_not_enabled(tpu, server):
    server.service_disabled()
    assert refusal(tpu) == (
        "TPU podlaunch-x: the Cloud TPU API is not enabled in project test; "
        "enable it with `gcloud services enable tpu.googleapis.com --project test`"
    )


def test_no_permission(tpu, server):
    server.fail_next(403, f"Permission 'tpu.queuedResources.create' denied on '{PARENT}'")
    assert refusal(tpu) == (
        f"TPU podlaunch-x: Permission 'tpu.queuedResources.create' denied on '{PARENT}'; give these credentials "
        "roles/tpu.admin on project test, or log in with others: `gcloud auth application-default login`"
    )


def test_credentials_that_the_api_refuses(tpu, server):
    class Renewed(AnonymousCredentials):
        def refresh(self, request):
            pass

    tpu._client.transport._session.credentials = Renewed()
    server.fail_next(401, "Request had invalid authentication credentials.", times=9)
    assert refusal(tpu) == (
        "TPU podlaunch-x: these credentials have no permission (HTTP 401); give them the role roles/tpu.admin, "
        "or log in with others: `gcloud auth application-default login`"
    )


def test_credentials_that_cannot_be_renewed(tpu, server):
    tpu._client.transport._session.credentials = Credentials("of yesterday")
    server.fail_next(401, "Request had invalid authentication credentials.")
    assert refusal(tpu).startswith("TPU podlaunch-x: the Google credentials were refused (")


def test_no_credentials(server, monkeypatch, tmp_path):
    monkeypatch.delenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refusal(CloudTpu(PROJECT, ZONE)).startswith(
        "TPU podlaunch-x: there are no Google credentials; log in with `gcloud auth application-default login`"
    )


def test_quota(tpu, server):
    server.fail_next(
        429, "Quota limit 'TPUV4sPerProjectPerZone' has been exceeded. Limit: 0 in zone us-central2-b."
    )
    assert refusal(tpu) == (
        "TPU podlaunch-x: Quota limit 'TPUV4sPerProjectPerZone' has been exceeded. Limit: 0 in zone us-central2-b; "
        "ask for less, or for more quota, or choose another zone or provisioning"
    )
    assert server.queued_resources == {}


def test_quota_at_the_end_of_the_operation(tpu, server):
    server.fail_next(429, "Quota limit exceeded", method="queuedResources.create", in_operation=True)
    assert refusal(tpu).startswith("TPU podlaunch-x: Quota limit exceeded; ask for less")


def test_type_that_the_zone_has_not(tpu):
    assert refusal(tpu, replace(REQUEST, accelerator_type="v6e-16")) == (
        "TPU podlaunch-x: zone us-central2-b has no v6e-16; zones that have it: us-central1-a, us-east5-a"
    )


def test_type_that_no_zone_has(tpu):
    assert refusal(tpu, replace(REQUEST, accelerator_type="v4-12")) == (
        "TPU podlaunch-x: Cloud TPU received a bad request. the accelerator v4-12 was not found in zone us-central2-b; "
        "mend what was asked of project test, zone us-central2-b"
    )


def test_what_passes_is_tried_again(tpu, server):
    server.fail_next(503, method="queuedResources.create")
    server.fail_next(
        429, "Quota exceeded for 'requests per minute'", "RATE_LIMIT_EXCEEDED", method="nodes.list"
    )
    tpu.create(REQUEST)
    until(tpu, "ready")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_does_not_pass(tpu, server, monkeypatch, status):
    monkeypatch.setattr("launcher.providers.cloud_tpu.RETRY_SECONDS", 0.1)
    server.fail_next(status, "try later", times=9)
    with pytest.raises(UnreachableError, match=f"TPU podlaunch-x cannot be reached: {status} .*: try later"):
        tpu.condition("podlaunch-x")


def test_nobody_there(server, monkeypatch):
    monkeypatch.setattr("launcher.providers.cloud_tpu.RETRY_SECONDS", 0.1)
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU", "http://127.0.0.1:9/")
    with pytest.raises(UnreachableError, match="TPU podlaunch-x cannot be reached: "):
        CloudTpu(PROJECT, ZONE).condition("podlaunch-x")


def test_body_with_a_field_that_google_has_not_is_refused(server):
    node = '{"acceleratorType": "v4-8", "runtimeVersion": "x", "zone": "a"}'
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(server, f"{PARENT}/nodes?nodeId=mine", node)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(server, f"{PARENT}/queuedResources?queuedResourceId=mine", '{"tpu": {"nodeSpec": [{}]}}')
    assert len(server.rejected) == 2


# Where


def test_project_and_zone_as_given_or_from_variables(monkeypatch):
    assert project_and_zone("p", "z") == ("p", "z")
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "q")
    monkeypatch.setenv("CLOUDSDK_COMPUTE_ZONE", "y")
    assert project_and_zone(None, None) == ("q", "y")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "r")
    assert project_and_zone(None, "z") == ("r", "z")


def test_project_and_zone_of_gcloud(tmp_path, monkeypatch):
    (tmp_path / "configurations").mkdir()
    config = "[core]\naccount = me%40\nproject = {}\n[compute]\nzone = us-east5-a\n"
    for name in ("default", "work"):
        (tmp_path / "configurations" / f"config_{name}").write_text(config.format(name))
    assert project_and_zone(None, None) == ("default", "us-east5-a")
    (tmp_path / "active_config").write_text("work")
    assert project_and_zone(None, None) == ("work", "us-east5-a")
    monkeypatch.setenv("CLOUDSDK_ACTIVE_CONFIG_NAME", "default")
    assert project_and_zone(None, None) == ("default", "us-east5-a")


def test_no_project_and_no_zone(tmp_path, monkeypatch):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GCLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(
        UserError, match=r"no Google Cloud project is given; .*`gcloud config set project PROJECT`"
    ):
        project_and_zone(None, "z")
    with pytest.raises(UserError, match=r"no zone is given; .*`gcloud config set compute/zone ZONE`"):
        project_and_zone("p", None)


def test_the_provider_loads_nothing_of_google():
    code = "import sys, launcher.providers.cloud_tpu; sys.exit('google.cloud' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_key_is_let_in_beside_those_that_are_there(server, tpu):
    tpu.create(REQUEST)
    until(tpu, "ready")
    mine = REQUEST.metadata["ssh-keys"]
    other = "podlaunch:ssh-ed25519 BBBB other"
    for key in (mine, other, other):
        tpu.authorize("podlaunch-x", key)
    assert node_of(server)["metadata"] == {"ssh-keys": f"{mine}\n{other}"}
    assert sum(1 for method, _ in server.log if method == "PATCH") == 1
    assert server.rejected == []


def test_settings_of_gcloud_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "configurations").mkdir()
    (tmp_path / "configurations" / "config_default").write_text("no section")
    with pytest.raises(UserError, match="config_default: cannot be read"):
        project_and_zone(None, None)
