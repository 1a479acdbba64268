# SPDX-License-Identifier: Apache-2.0
"""Jobs in real processes: their logs, locks and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dyads.errors import ConfigError
from dyads.studies import jobs
from dyads.studies.jobs import ENGINES, Job, is_running, last_line, run_job


def job(tmp_path: Path, code: str, name: str = "a") -> Job:
    return Job(name, (sys.executable, "-c", code), tmp_path / "logs" / f"{name}.txt", tmp_path)


def wait_for(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 seconds")


def test_output_and_exit_code_are_kept(tmp_path: Path) -> None:
    good = job(tmp_path, "print('one'); print('two')")
    assert run_job(good) == 0
    assert good.log.read_text() == "one\ntwo\n"
    assert last_line(good.log) == ("two", False)
    bad = job(tmp_path, "import sys; print('some\\rmore', flush=True); sys.exit('Error: no')")
    assert run_job(bad) == 1
    assert last_line(bad.log) == ("Error: no", True)
    assert run_job(good) == 0
    assert last_line(good.log) == ("two", False), "the log is that of the last process"
    assert last_line(tmp_path / "none.txt") == ("", False)
    silent = job(tmp_path, "raise SystemExit(3)")
    assert run_job(silent) == 3
    assert last_line(silent.log) == ("exit code 3", True)
    killed = job(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert run_job(killed) == -9
    assert last_line(killed.log) == ("killed by signal 9 (out of memory?)", True)


@pytest.mark.parametrize("end", ["raise SystemExit(130)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
def test_an_interrupted_process_did_not_fail(end: str, tmp_path: Path) -> None:
    interrupted = job(tmp_path, f"print('step 3', flush=True)\n{end}")
    assert run_job(interrupted) in (130, -15)
    assert last_line(interrupted.log) == ("step 3", False)


def test_jobs_side_by_side_share_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    shared = Job("a", (sys.executable, "-c", code), tmp_path / "a.txt", tmp_path, threads=3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_job(shared)
    assert shared.log.read_text() == "3\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_job(shared)
    assert shared.log.read_text() == "1\n", "what the environment says stays"


def test_a_stopped_job_ends_its_process(tmp_path: Path) -> None:
    engine = ENGINES["local"](1)
    first, second = job(tmp_path, "import time; print('up', flush=True); time.sleep(100)"), job(tmp_path, "", "b")
    started, queued = engine.submit(first), engine.submit(second)
    wait_for(lambda: last_line(first.log)[0] == "up")
    assert is_running(first.log)
    engine.close()
    assert started.result() != 0
    assert queued.cancelled()
    assert not is_running(first.log)
    assert last_line(first.log) == ("up", False), "an interrupted job did not fail"


def test_a_stopped_job_has_the_time_to_save_its_step(tmp_path: Path) -> None:
    """A training ends its step at SIGTERM and saves a checkpoint: minutes, where steps are slow."""
    assert jobs._PATIENCE >= 120
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), print('saved'), exit(143)))"
    engine = ENGINES["local"](1)
    slow = job(tmp_path, f"{code}; print('up', flush=True); time.sleep(100)")
    started = engine.submit(slow)
    wait_for(lambda: last_line(slow.log)[0] == "up")
    engine.close()
    assert started.result() == -1
    assert last_line(slow.log) == ("saved", False)


def test_a_job_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE", 0.5)
    engine = ENGINES["local"](1)
    deaf = job(
        tmp_path,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)",
    )
    engine.submit(deaf)
    wait_for(lambda: last_line(deaf.log)[0] == "up")
    engine.close()
    assert not is_running(deaf.log)


def test_a_log_is_locked_until_the_last_process_ends_also_after_the_study_was_killed(tmp_path: Path) -> None:
    end = tmp_path / "end"
    child = f"import os, time\nprint('up', flush=True)\nwhile not os.path.exists({str(end)!r}): time.sleep(0.02)"
    first = job(tmp_path, child)
    code = f"from pathlib import Path\nfrom dyads.studies.jobs import *\nrun_job({first!r})"
    code = code.replace("PosixPath(", "Path(")
    study = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: last_line(first.log)[0] == "up")
    study.send_signal(signal.SIGKILL)
    study.wait()
    assert is_running(first.log)

    codes: list[int] = []
    again = threading.Thread(target=lambda: codes.append(run_job(job(tmp_path, "print('again')"))))
    again.start()
    time.sleep(0.3)
    assert last_line(first.log)[0] == "up", "the second study waits for the process of the first"
    end.touch()
    again.join(timeout=30)
    assert codes == [0]
    assert first.log.read_text() == "again\n"
    assert not is_running(first.log)


def test_ray_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--engine ray needs Ray: pip install 'dyads\[study\]'"):
        ENGINES["ray"](2)


@pytest.mark.parametrize("code", [143, 129])
def test_a_run_that_saved_its_step_at_a_signal_did_not_fail(code: int, tmp_path: Path) -> None:
    stopped = job(tmp_path, f"print('Error: stopped', flush=True)\nraise SystemExit({code})")
    assert run_job(stopped) == code
    assert last_line(stopped.log) == ("Error: stopped", False)


def test_the_last_line_of_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "long.txt"
    log.write_bytes(b"\xff" * 2**20 + b"\nlast\nexit code 2\n")
    assert last_line(log) == ("last", True)
