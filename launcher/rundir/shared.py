"""plan.json under gs://, which everyone who can write to the bucket can change: what is left out, and not believed.

What a machine executes or sends comes from its own settings (docs/security.md).
"""

from dataclasses import replace

from pydantic import ValidationError

from configs.clusters import OWN_SETTINGS, TpuCluster
from configs.errors import UserError
from launcher.plan import Plan


def without_own_settings(plan: Plan) -> Plan:
    """The plan without the settings that each machine has of its own; their names are kept, to be told of."""
    cluster = plan.submission or {}
    used = {name for name in OWN_SETTINGS if cluster.get(name) or name in plan.own_settings}
    shared = {key: value for key, value in cluster.items() if key not in OWN_SETTINGS}
    return replace(plan, submission=shared if plan.submission else None, own_settings=sorted(used))


def as_data(plan: Plan, location: str) -> Plan:
    """The plan that was read at `location`, gs://bucket/prefix/name: where it lies decides which run it is of.

    So nobody's plan leads to the hosts of another run, whose name and id are made of their location. Raises UserError
    where the plan would have this machine start, cancel or write something that no run on hosts of its own needs.
    """
    where = f"{location}/plan.json"
    if plan.backend != "tpu":
        raise UserError(f"{where}: its backend is {plan.backend!r}; a run under gs:// is one on Cloud TPU")
    places = {
        "checkpoint.directory": plan.config["checkpoint"].get("directory"),
        "log.tensorboard": plan.config["log"].get("tensorboard"),
    }
    for key, place in places.items():
        if place is not None and not str(place).startswith("gs://"):
            raise UserError(f"{where}: its {key} = {place!r} is a folder; allowed: gs://bucket/prefix")
    plan = replace(without_own_settings(plan), name=location.rpartition("/")[2], run_directory=location)
    if plan.submission is not None:
        try:
            cluster = TpuCluster.model_validate(plan.submission)
        except ValidationError as e:
            key, message = ".".join(map(str, e.errors()[0]["loc"])), e.errors()[0]["msg"]
            raise UserError(
                f"{where}: its cluster's {key} {message.removeprefix('Value error, ')}; `launch` the run anew"
            ) from None
        plan = replace(plan, submission=cluster.model_dump(mode="json"))
    return plan
