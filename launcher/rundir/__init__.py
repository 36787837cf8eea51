"""The run directory: the one place where a run's plan, attempts, logs and result are kept.

plan.json       the plan of the newest launch
attempts.jsonl  a line for each attempt that has ended
result.json     how the run ended
hosts/H.json    the newest report of each process of the current attempt
job             the SLURM job that the run is, or was last
first-attempt   number of the first attempt of the newest launch
excluded-nodes  nodes that failed twice since then
stop            a stop request
checkpoints/ tensorboard/ logs/attempt-K/host-H.log
logs/attempt-K/attempt.json  where and when an attempt began
logs/rendezvous-STEP         where the tasks of a SLURM step find process 0
rendezvous/                  where the VMs of a slice find each other under `launch worker`
.lock .id       held by the run's launcher; tells the run from one of the same name elsewhere
lease.json      the lock's counterpart under gs://
resources.json  what the run rents, from before it is asked for until it is released
code.tar.gz     the code, for hosts that share no disk with the launcher
"""

from launcher.rundir.directory import RunDirectory, RunHeldError, check_name, list_runs, run_id
from launcher.rundir.resources import Rented

__all__ = ["Rented", "RunDirectory", "RunHeldError", "check_name", "list_runs", "run_id"]
