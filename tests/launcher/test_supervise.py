"""Verdicts, restarts and accounting of the supervisor, with gangs in memory: no processes and no waiting."""

import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from launcher.gang import EXIT_USER_ERROR, PREEMPTED, STEP_FAILED, Exit
from launcher.plan import Plan
from launcher.rundir import RunDirectory
from launcher.supervise import (
    EXIT_CODES,
    EXIT_DONE,
    EXIT_SAVED,
    Failure,
    StopRequest,
    describe_failure,
    exit_code,
    goodput,
    supervise,
)

COMPLETE = [Exit(0, EXIT_DONE), Exit(1, EXIT_DONE)]
CRASH = [Exit(1, 1)]


@dataclass
class MemoryGang:
    """Two processes that end as `ends` says, exit with `when_asked` on a stop request, and die when killed."""

    ends: list[Exit] = field(default_factory=list)
    when_asked: int | None = EXIT_SAVED
    logs: dict[int, str] = field(default_factory=dict)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    stopper: str = "preempted"
    asked: int = 0
    killed: int = 0
    detached: int = 0

    def begin(self, run: RunDirectory, attempt: int) -> None:
        """What the processes leave in the run directory."""
        self._alive = {0, 1} - {e.process for e in self.ends}
        self._ended = deque(self.ends)
        self._idle = 0
        for process in (0, 1):
            run.hosts.write_log(attempt, process, self.logs.get(process, ""))
        for process, report in self.reports.items():
            run.hosts.write_report(process, report)
        for step in self.checkpoints:
            (run.path / "checkpoints" / str(step)).mkdir(parents=True)

    def poll(self, timeout: float) -> list[Exit]:
        self._idle = 0 if self._ended else self._idle + 1
        assert self._idle < 20, "nothing will end any more"
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def request_stop(self) -> None:
        self.asked += 1
        if self.when_asked is not None:
            self._end(self.when_asked)

    def kill(self) -> None:
        self.killed += 1
        self._end(-signal.SIGKILL)

    def detach(self) -> None:
        self.detached += 1

    def stopped_by(self) -> str:
        return self.stopper

    def _end(self, code: int) -> None:
        self._ended.extend(Exit(process, code) for process in sorted(self._alive))
        self._alive = set()


@dataclass
class MemoryBackend:
    gangs: list[MemoryGang]
    """One for each attempt."""
    job: str | None = None
    hosts_are_good: bool = True
    attempts: int = 0
    REMOTE: bool = False
    adopted: MemoryGang | None = None

    def job_info(self) -> dict[str, Any]:
        return {"job": self.job, "restart_count": 0 if self.job else None}

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        return self.hosts_are_good

    def adopt(self, plan: Plan, run: RunDirectory, attempt: int) -> MemoryGang | None:
        if self.adopted:
            self.adopted.begin(run, attempt)
        return self.adopted

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> MemoryGang:
        gang = self.gangs[self.attempts]
        self.attempts += 1
        gang.begin(run, attempt)
        return gang


@dataclass
class Supervised:
    """Supervises a run, and records what is announced."""

    plan: Plan
    run: RunDirectory
    stop_request: StopRequest = field(default_factory=StopRequest)
    said: list[str] = field(default_factory=list)
    on_watch: Callable[[], None] = lambda: None
    on_announce: Callable[[], None] = lambda: None

    def __call__(
        self, *gangs: MemoryGang, max_restarts: int = 3, begin: bool = True, **backend: Any
    ) -> dict[str, Any]:
        def announce(text: str) -> None:
            self.said.append(text)
            self.on_announce()

        self.backend = MemoryBackend(list(gangs), **backend)
        if begin:
            self.run.begin_launch(self.backend.job)
        result = supervise(
            replace(self.plan, max_restarts=max_restarts),
            self.run,
            self.backend,
            stop_request=self.stop_request,
            on_progress=lambda attempt, report: self.on_watch(),
            announce=announce,
        )
        assert self.run.result() == result
        return result


@pytest.fixture
def supervised(planned, tmp_path):
    plan = planned()
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    run.write_plan(plan)
    return Supervised(plan, run)


def crash(code: int = 1, process: int = 1, **reported: Any) -> MemoryGang:
    """A gang of which one process fails; with fields of a failure, after reporting it."""
    failure = {"error": "ValueError: no", "traceback": ["Traceback:", "ValueError: no"], "retryable": True}
    return MemoryGang(
        [Exit(process, code)], reports={process: {"failure": failure | reported}} if reported else {}
    )


def attempt(from_step: int, reached: int, kept: int, wall: float, **seconds: float) -> dict[str, Any]:
    return {
        "from_step": from_step,
        "reached_step": reached,
        "kept_step": kept,
        "wall_seconds": wall,
        "seconds": seconds,
    }


# Verdicts


def test_backend_says_who_stopped_a_gang_without_a_stop_request(supervised):
    saved = [Exit(0, EXIT_SAVED), Exit(1, EXIT_SAVED)]
    assert supervised(MemoryGang(saved, stopper="stopped"))["status"] == "stopped"


def test_worker_ended_by_sigterm_before_training_is_preempted_not_failed(supervised):
    gang = MemoryGang([Exit(1, -signal.SIGTERM)])
    assert supervised(gang)["status"] == "preempted"
    assert gang.killed


def test_peers_that_jax_aborts_are_not_the_cause(supervised):
    ends = [Exit(0, -signal.SIGABRT), Exit(1, -signal.SIGKILL)]
    failure = supervised(MemoryGang(ends), max_restarts=0)["failure"]
    assert (failure["process"], failure["cause"]) == (1, "SIGKILL")


def test_abort_without_another_cause_is_the_cause(supervised):
    ends = [Exit(0, -signal.SIGABRT), Exit(1, -signal.SIGABRT)]
    failure = supervised(MemoryGang(ends), max_restarts=0)["failure"]
    assert (failure["process"], failure["cause"]) == (0, "SIGABRT")


# What jax 0.10.2 and 0.12 print in the processes that it aborts, when process 1 does not answer.
UNHEALTHY = """\
F1125 18:24:36.334400   21141 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error, or scheduler events (e.g. preemption, eviction) to \
debug further.
*** Check failure stack trace: ***
"""


@pytest.mark.parametrize("name", ["1", "/job:jax_worker/replica:0/task:1"])
def test_process_that_jax_calls_unhealthy_is_the_cause_not_the_one_that_jax_aborted(
    supervised, name, monkeypatch
):
    monkeypatch.setattr("launcher.supervise.ROOT_CAUSE_SECONDS", 0)
    gang = MemoryGang([Exit(0, -signal.SIGABRT, "n1")], logs={0: UNHEALTHY.format(name)})
    failure = supervised(gang, max_restarts=0)["failure"]
    assert (failure["process"], failure["cause"]) == (1, "hung")
    assert "jax lost contact with it" in failure["error"]


def test_process_that_went_silent_is_the_cause_where_the_coordinator_hangs(supervised, monkeypatch):
    monkeypatch.setattr("launcher.supervise.ROOT_CAUSE_SECONDS", 0)
    # Process 0 is the coordinator, which cannot name itself.
    gang = MemoryGang(
        [Exit(1, -signal.SIGABRT, "n2")],
        reports={0: {"time": 100.0, "host": "n1", "step": 7}, 1: {"time": 131.0, "step": 7}},
    )
    failure = supervised(gang, max_restarts=0)["failure"]
    assert (failure["process"], failure["host"], failure["cause"]) == (0, "n1", "hung")
    assert failure["error"].endswith("it last reported 31 s before the others")


def test_error_from_the_backend_beats_the_log(supervised):
    lost = Exit(1, 1, host="n2", cause="lost", error="nothing was heard of n2 for 20 s")
    failure = supervised(MemoryGang([lost], logs={1: "noise"}), max_restarts=0)["failure"]
    assert (failure["host"], failure["cause"], failure["error"]) == ("n2", "lost", lost.error)


# In a job


def test_bad_hosts_make_the_job_preempted_instead_of_failed(supervised):
    result = supervised(MemoryGang(CRASH), job="7", hosts_are_good=False)
    assert (result["status"], result["failure"]["process"]) == ("preempted", 1)
    assert "go on elsewhere" in supervised.said[0]


@pytest.mark.parametrize("next_job", ["7", "8"])  # requeued, or submitted in its place
def test_restarts_are_counted_over_all_jobs_of_a_launch_and_anew_for_the_next(supervised, next_job):
    supervised(MemoryGang(CRASH), job="7", hosts_are_good=False, max_restarts=1)
    assert supervised(MemoryGang(CRASH), job=next_job, begin=False, max_restarts=1)["status"] == "failed"
    gangs = MemoryGang(CRASH), MemoryGang(COMPLETE)
    assert supervised(*gangs, job="9", max_restarts=1)["status"] == "completed"
    assert [a["job"] for a in supervised.run.attempts.all()] == ["7", next_job, "9", "9"]


def test_job_is_given_up_after_three_attempts_without_a_checkpoint(supervised):
    saved = [Exit(0, EXIT_SAVED), Exit(1, EXIT_SAVED)]
    ends = [supervised(MemoryGang(saved), job=str(n), begin=n == 0)["status"] for n in range(3)]
    assert ends == ["preempted", "preempted", "failed"]
    assert "give the run more time" in supervised.said[-1]


def test_progress_between_requeues_makes_a_job_go_on(supervised):
    saved = [Exit(0, EXIT_SAVED), Exit(1, EXIT_SAVED)]
    for step in (5, 10, 15, 20):
        result = supervised(MemoryGang(saved, checkpoints=[step]), job="7", begin=step == 5)
        assert result["status"] == "preempted"


# Failures and restarts


def test_step_that_could_not_start_is_nobody_s_failure_and_the_users_where_it_would_not_start_again(
    supervised,
):
    ends = [Exit(p, 2, f"n{p}", STEP_FAILED, "srun: fatal: no") for p in (0, 1)]
    result = supervised(MemoryGang(ends))
    assert (result["attempts"], exit_code(result)) == (1, EXIT_USER_ERROR)
    assert (
        describe_failure(result["failure"]) == "srun failed, so that no process was started: srun: fatal: no"
    )
    again = [Exit(p, 1, f"n{p}", STEP_FAILED, "srun: error: no") for p in (0, 1)]
    assert exit_code(supervised(MemoryGang(again), max_restarts=0)) == 1


def test_all_processes_done_is_completed(supervised):
    report = {
        "host": "here", "processes": 2, "step": 180, "epoch": 8.0, "eval/accuracy": 0.98, "train/loss": 0.1,
        "seconds": {"compute": 1.0}, "outcome": {"step": 180, "epoch": 8.0, "images_per_second": 900.0},
    }  # fmt: skip
    gang = MemoryGang(COMPLETE, reports={0: report, 1: {"host": "there"}}, checkpoints=[90, 180])
    result = supervised(gang)
    assert result["status"] == "completed"
    assert (result["step"], result["images_per_second"]) == (180, 900.0)
    assert result["epoch"] == pytest.approx(180 * 64 / 1437)
    assert result["metrics"] == {"eval/accuracy": 0.98, "train/loss": 0.1}
    assert (result["attempts"], result["failure"]) == (1, None)
    (attempt,) = supervised.run.attempts.all()
    assert attempt["hosts"] == ["here", "there"]
    assert (attempt["from_step"], attempt["reached_step"], attempt["kept_step"]) == (0, 180, 180)
    assert (attempt["cluster"], attempt["mesh"]) == ("local-2x2", {"batch": 4, "model": 1})
    assert supervised.said == []


def test_first_failure_is_named_and_the_others_are_killed(supervised):
    # Process 0 dies of process 1: it is the consequence, not the cause.
    gang = MemoryGang([Exit(1, 3), Exit(0, -6)], logs={0: "peer lost\n", 1: "one\n\ncause\n"})
    result = supervised(gang, max_restarts=0)
    assert result["status"] == "failed"
    failure = result["failure"]
    assert (failure["process"], failure["cause"], failure["error"]) == (1, "exit code 3", "cause")
    assert failure["lines"] == ["one", "cause"]
    assert failure["host"] == socket.gethostname()
    assert gang.killed


def test_one_that_is_done_early_does_not_end_the_run(supervised):
    gang = MemoryGang([Exit(0, EXIT_DONE), Exit(1, 1)])
    assert supervised(gang, max_restarts=0)["failure"]["process"] == 1


@pytest.mark.parametrize(
    ("code", "cause"), [(1, "exit code 1"), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-40, "40")]
)
def test_cause_is_the_exit_code_or_the_signal(supervised, code, cause):
    assert cause in supervised(MemoryGang([Exit(0, code)]), max_restarts=0)["failure"]["cause"]


def test_failure_that_a_worker_told_beats_its_log(supervised):
    reported = {
        "error": "ValueError: no",
        "traceback": [*map(str, range(30)), "ValueError: no"],
        "retryable": True,
    }
    report = {"host": "there", "step": 7, "failure": reported}
    failure = supervised(MemoryGang(CRASH, logs={1: "noise"}, reports={1: report}), max_restarts=0)["failure"]
    assert (failure["host"], failure["step"], failure["error"]) == ("there", 7, "ValueError: no")
    assert failure["lines"] == [*map(str, range(19, 30)), "ValueError: no"]


def test_failure_with_an_empty_log_says_so(supervised):
    assert supervised(MemoryGang(CRASH), max_restarts=0)["failure"]["error"] == "its log is empty"


@pytest.mark.parametrize(
    ("step", "where"), [(None, "failed (exit code 1)"), (0, "failed at step 0 (exit code 1)")]
)
def test_describe_is_one_line_of_who_where_how_and_why(step, where):
    failure = Failure(1, "node7", "exit code 1", "ValueError: no", step, ["a", "b"], retryable=True)
    assert describe_failure(failure) == f"process 1 on node7 {where}: ValueError: no"


# Restarts


@pytest.mark.parametrize("max_restarts", [0, 1, 3])
def test_failure_is_tried_again_up_to_max_restarts(supervised, max_restarts):
    result = supervised(*[MemoryGang(CRASH) for _ in range(9)], max_restarts=max_restarts)
    assert result["status"] == "failed"
    assert (
        result["attempts"]
        == len(supervised.run.attempts.all())
        == supervised.backend.attempts
        == max_restarts + 1
    )
    assert [text.splitlines()[1] for text in supervised.said] == [
        f"attempt {n + 1} from step 0 (restart {n} of {max_restarts})" for n in range(1, max_restarts + 1)
    ]


def test_success_on_the_last_restart_is_completed(supervised):
    result = supervised(MemoryGang(CRASH), MemoryGang(CRASH), MemoryGang(COMPLETE), max_restarts=2)
    assert (result["status"], result["attempts"], result["failure"]) == ("completed", 3, None)
    assert [a["verdict"] for a in supervised.run.attempts.all()] == ["failed", "failed", "completed"]


def test_restart_goes_on_from_the_last_checkpoint_and_counts_what_was_lost(supervised):
    first = MemoryGang(CRASH, reports={0: {"step": 17}, 1: {"step": 17}}, checkpoints=[5, 10])
    supervised(first, MemoryGang(COMPLETE, reports={0: {"step": 20}}, checkpoints=[20]))
    lost, kept = supervised.run.attempts.all()
    assert (lost["from_step"], lost["reached_step"], lost["kept_step"], lost["steps_lost"]) == (0, 17, 10, 7)
    assert (kept["from_step"], kept["reached_step"], kept["kept_step"], kept["steps_lost"]) == (10, 20, 20, 0)
    assert "attempt 2 from step 10 (restart 1 of 3)" in supervised.said[0]


@pytest.mark.parametrize("gang", [crash(EXIT_USER_ERROR), crash(EXIT_USER_ERROR, retryable=True), crash(1, retryable=False)])  # fmt: skip
def test_what_is_certain_to_fail_again_is_not_tried_again(supervised, gang):
    result = supervised(gang)
    assert (result["status"], supervised.backend.attempts, supervised.said) == ("failed", 1, [])
    assert not result["failure"]["retryable"]


# Stopping


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "preempted")])
def test_signal_has_the_gang_save_and_end(supervised, signum, status):
    supervised.on_watch = lambda: (
        supervised.stop_request.verdict or supervised.stop_request.on_signal(signum, None)
    )
    gang = MemoryGang(reports={0: {"step": 12, "outcome": {"step": 12}}}, checkpoints=[12])
    result = supervised(gang)
    assert (result["status"], result["step"], gang.asked) == (status, 12, 1)
    assert EXIT_CODES[status] == {"stopped": 130, "preempted": 75}[status]


def test_stop_from_another_terminal_is_stopped(supervised):
    supervised.on_watch = supervised.run.request_stop
    gang = MemoryGang()
    assert (supervised(gang)["status"], gang.asked) == ("stopped", 1)


def test_saved_without_being_asked_is_preempted(supervised):
    assert supervised(MemoryGang([Exit(0, EXIT_SAVED), Exit(1, EXIT_SAVED)]))["status"] == "preempted"


def test_run_completed_despite_a_stop_request_is_completed(supervised):
    supervised.stop_request.verdict = "stopped"
    assert supervised(MemoryGang(COMPLETE))["status"] == "completed"


def test_second_ctrl_c_kills(supervised):
    supervised.on_watch = lambda: supervised.stop_request.on_signal(signal.SIGINT, None)
    gang = MemoryGang(when_asked=None)
    assert supervised(gang)["status"] == "stopped"
    assert gang.killed


def test_sigterm_behind_ctrl_c_still_waits_for_the_save():
    stop_request = StopRequest()
    stop_request.on_signal(signal.SIGINT, None)
    stop_request.on_signal(signal.SIGTERM, None)
    assert (stop_request.verdict, stop_request.at_once) == ("stopped", False)


def test_sigterm_behind_two_ctrl_c_does_not_take_them_back():
    stop_request = StopRequest()
    for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        stop_request.on_signal(signum, None)
    assert (stop_request.verdict, stop_request.at_once) == ("stopped", True)


def test_stop_before_training_has_begun_waits_for_nobody(supervised):
    supervised.stop_request.verdict = "stopped"
    gang = MemoryGang(when_asked=-signal.SIGTERM)
    assert (supervised(gang)["status"], supervised.backend.attempts) == ("stopped", 1)


def test_stop_request_of_an_earlier_launch_is_forgotten(supervised):
    supervised.run.request_stop()
    gang = MemoryGang(COMPLETE)
    assert (supervised(gang)["status"], gang.asked) == ("completed", 0)


def test_stop_request_that_comes_before_the_job_begins_is_heard(supervised):
    supervised.run.begin_launch(job="7")
    supervised.run.request_stop()
    assert supervised(MemoryGang(), begin=False, job="7")["status"] == "stopped"


def test_stop_asked_for_between_two_attempts_is_heard(supervised):
    supervised.on_announce = supervised.run.request_stop
    assert supervised(MemoryGang(CRASH), MemoryGang())["status"] == "stopped"


def test_failure_while_stopping_begins_no_new_attempt(supervised):
    supervised.stop_request.verdict = "stopped"
    result = supervised(MemoryGang(when_asked=1), MemoryGang(COMPLETE))
    assert (result["status"], supervised.backend.attempts) == ("failed", 1)


def test_gang_is_ended_when_the_launcher_itself_fails(supervised):
    gang = MemoryGang()

    def fail() -> None:
        raise KeyError("a bug")

    supervised.on_watch = fail
    with pytest.raises(KeyError):
        supervised(gang)
    assert gang.killed


# Hosts that outlive their launcher, and that can be preempted


def test_launcher_that_leaves_ends_nothing_and_writes_nothing(supervised):
    supervised.stop_request = StopRequest(workers_outlive=True)
    supervised.stop_request.on_signal(signal.SIGTERM, None)
    gang = MemoryGang()
    assert supervise_until_left(supervised, gang) is None
    assert (gang.detached, gang.asked, gang.killed) == (1, 0, 0)
    assert (supervised.run.attempts.all(), supervised.run.result()) == ([], None)


def supervise_until_left(supervised: Supervised, gang: MemoryGang) -> Any:
    backend = MemoryBackend([gang], REMOTE=True)
    return supervise(
        supervised.plan, supervised.run, backend, stop_request=supervised.stop_request,
        on_progress=lambda attempt, report: None, announce=supervised.said.append,
    )  # fmt: skip


def test_ctrl_c_saves_and_ends_there_too(supervised):
    supervised.stop_request = StopRequest(workers_outlive=True)
    supervised.stop_request.on_signal(signal.SIGINT, None)
    assert supervised(MemoryGang(), REMOTE=True)["status"] == "stopped"


def test_launcher_that_slept_through_its_replacement_writes_nothing(supervised, monkeypatch):
    monkeypatch.setattr(RunDirectory, "is_lost", lambda self, *, refresh=False: refresh)
    gang = MemoryGang(COMPLETE)
    assert supervise_until_left(supervised, gang) is None
    assert (supervised.run.attempts.all(), supervised.run.result()) == ([], None)


def test_run_that_is_stopped_before_it_could_begin_begins_nothing(supervised):
    supervised.run.request_stop()
    result = supervised(begin=False)
    assert (result["status"], supervised.backend.attempts) == ("stopped", 0)
    assert (result["step"], result["wall_seconds"]) == (0, 0)


TAKEN = [Exit(1, 1, "t1", PREEMPTED, "node x-0 is PREEMPTED")]


def test_preempted_hosts_are_replaced_and_are_no_restart(supervised):
    save = {"checkpoints": [5]}
    result = supervised(MemoryGang(TAKEN, **save), MemoryGang(COMPLETE), REMOTE=True, max_restarts=0)
    assert result["status"] == "completed"
    first, _ = supervised.run.attempts.all()
    assert (first["verdict"], first["failure"]["cause"]) == ("preempted", PREEMPTED)
    assert "attempt 2 from step 5" in supervised.said[0]
    assert "restart" not in supervised.said[0]


def test_hosts_that_had_notice_are_replaced_too(supervised):
    saved = [Exit(0, EXIT_SAVED), Exit(1, EXIT_SAVED)]
    result = supervised(MemoryGang(saved, checkpoints=[5]), MemoryGang(COMPLETE), REMOTE=True)
    assert (result["status"], result["attempts"]) == ("completed", 2)


def test_preempted_before_each_checkpoint_is_given_up(supervised):
    result = supervised(*(MemoryGang(TAKEN) for _ in range(3)), REMOTE=True)
    assert (result["status"], result["attempts"]) == ("failed", 3)


# A launcher that was killed


@pytest.fixture
def lost(supervised):
    """An attempt whose launcher was killed at step 17, a minute in, long ago."""
    run = supervised.run
    run.attempts.append({"attempt": run.attempts.begin({}), "verdict": "failed", **attempt(0, 5, 5, 60)})
    number = run.attempts.begin({})
    begun = 1_700_000_000.0
    run.hosts.write_report(
        0, {"host": "here", "processes": 1, "step": 17, "begun": begun, "time": begun + 60.0}
    )
    for step in (5, 10):
        (run.path / "checkpoints" / str(step)).mkdir(parents=True)
    run.attempts.write_info(number, {"begun": begun})
    return supervised


def test_attempt_that_lives_on_without_its_launcher_is_adopted(lost):
    result = lost(REMOTE=True, adopted=MemoryGang(COMPLETE), begin=False)
    assert (result["status"], lost.backend.attempts) == ("completed", 0)
    assert [(a["attempt"], a["verdict"]) for a in lost.run.attempts.all()] == [
        (1, "failed"),
        (2, "completed"),
    ]


def test_lost_attempt_is_accounted_for_by_the_next_launch(lost):
    result = lost(MemoryGang(COMPLETE))
    _, line, last = lost.run.attempts.all()
    assert (line["attempt"], line["verdict"], line["hosts"]) == (2, "launcher lost", ["here"])
    assert (line["from_step"], line["reached_step"], line["kept_step"], line["steps_lost"]) == (5, 17, 10, 7)
    assert (last["attempt"], last["from_step"], result["attempts"]) == (3, 10, 3)


def test_lost_attempt_ended_with_its_last_report_not_with_the_next_launch(lost):
    lost(MemoryGang(COMPLETE))
    line = lost.run.attempts.all()[1]
    assert line["wall_seconds"] == pytest.approx(60, abs=2)
    assert line["started"] == "2023-11-14T22:13:20+00:00"
    assert line["ended"] == "2023-11-14T22:14:20+00:00"


def test_lost_attempt_without_a_report_is_recorded_too(supervised):
    supervised.run.attempts.begin({})
    supervised(MemoryGang(COMPLETE))
    assert [(a["attempt"], a["verdict"]) for a in supervised.run.attempts.all()] == [
        (1, "launcher lost"),
        (2, "completed"),
    ]


# Goodput


@pytest.mark.parametrize(
    ("attempts", "shares"),
    [
        ([attempt(0, 0, 0, 10)], {"startup_and_rest": 1}),
        ([attempt(0, 10, 10, 100, compute=60, data_wait=10, checkpoint=6, evaluation=4)],
         {"train": 0.6, "data_wait": 0.1, "checkpoint": 0.06, "evaluation": 0.04, "startup_and_rest": 0.2}),
        # The first of two attempts keeps half of its steps.
        ([attempt(0, 10, 5, 100, compute=40), attempt(5, 20, 20, 100, compute=60)],
         {"train": 0.4, "lost": 0.1, "startup_and_rest": 0.5}),
        # Fell back behind its start: the checkpoint it began with was bad.
        ([attempt(10, 20, 5, 10, compute=8)], {"lost": 0.8, "startup_and_rest": 0.2}),
    ],
    ids=["nothing", "all", "half", "back"],
)  # fmt: skip
def test_goodput_is_the_share_of_kept_compute_and_the_rest_is_named(attempts, shares):
    activities = ("train", "data_wait", "checkpoint", "evaluation", "lost", "startup_and_rest")
    assert goodput(attempts) == pytest.approx(dict.fromkeys(activities, 0.0) | shares)
