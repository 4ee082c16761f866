"""A run as one Slurm job: the batch script, and its submission.

The script starts one task a node, each `rlif launch node`; they meet on the run's board. A requeued job runs the same
script and goes on from the newest checkpoint.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.launch.plan import Plan
from services.recipe import Recipe
from services.run_folder import write_private
from services.startup import StartupError

WAIT_SECONDS = 300
"""How long the other tasks may go on after the first has ended: all end together, unless one was killed."""
LOOK_SECONDS = 60
GRACE_SECONDS = 300
"""How long before the time limit the job is asked to write a checkpoint and stop; a quarter of a short limit."""
TIME = re.compile(r"^(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?$")


@dataclass(frozen=True)
class Job:
    """What the user asks of Slurm. `container`: an Apptainer image file (`.sif`), or else an image for Pyxis' srun."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    container: str | None = None
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else, on the first node: `module load ...`."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, as `--qos=high`."""
    resume_from: Path | None = None
    """A model folder to begin with where there is no checkpoint."""


def seconds_of(time: str) -> int:
    """A time limit in one of Slurm's spellings. Raises StartupError."""
    found = TIME.match(time)
    if not found or (found["d"] is None and found["b"] is None and found["c"]):
        raise StartupError(f"--time {time}: write minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    a, b, c = int(found["a"]), int(found["b"] or 0), int(found["c"] or 0)
    if found["d"] is not None:
        return int(found["d"]) * 86400 + a * 3600 + b * 60 + c
    return a * 3600 + b * 60 + c if found["c"] else a * 60 + b


def _directives(recipe: Recipe, plan: Plan, job: Job) -> list[str]:
    asked = {"partition": job.partition, "account": job.account, "time": job.time}
    lines = [
        f"--job-name=rlif-{recipe.run.name}",
        f"--nodes={len(plan.nodes)}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={plan.gpus_per_node}"] if plan.gpus_per_node else []),
        *(f"--{key}={shlex.quote(value)}" for key, value in asked.items() if value),
        "--exclusive",
        "--mem=0",
        "--requeue",
        "--open-mode=append",
        "--output=" + shlex.quote(str(recipe.run.dir).replace("%", "%%") + "/slurm-%j.log"),
    ]
    if job.time:
        lines.append(f"--signal=B:USR1@{min(GRACE_SECONDS, seconds_of(job.time) // 4)}")
    return lines + job.options


def _command(recipe: Recipe, job: Job) -> tuple[list[str], list[str]]:
    """(options of srun, the command before `launch node`)."""
    container = job.container
    if container is None:
        return [], [sys.executable, "-m", "services.cli.main"]
    places = [Path.cwd(), recipe.run.dir, recipe.model.path, recipe.data.path, recipe.weights_dir, job.resume_from]
    places += [recipe.evaluation and recipe.evaluation.data.path, recipe.scorer.reference_model]
    places += [recipe.weights.mirror_dir]
    seen = dict.fromkeys(str(place) for place in places if str(place).startswith("/"))
    if container.endswith(".sif"):
        binds = [part for place in seen for part in ("--bind", place)]
        nv = ["--nv"] if recipe.trainer.device != "cpu" else []
        return [], ["apptainer", "exec", *nv, *binds, "--pwd", str(Path.cwd()), container, "rlif"]
    mounts = ",".join(f"{place}:{place}" for place in seen)
    options = [f"--container-image={container}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]
    return options, ["rlif"]


def script(recipe: Recipe, plan: Plan, job: Job) -> str:
    """The batch script for a recipe that `plan.fill` has filled in. Raises StartupError: a bad setting."""
    for text in (*job.setup, *job.options, job.partition or "", job.account or "", job.container or ""):
        if not text.isprintable():
            raise StartupError(f"{text!r}: a line break would end the line of the script")
    bad = next((option for option in job.options if not option.startswith("-")), None)
    if bad is not None:
        raise StartupError(f"--sbatch {bad}: write an option of sbatch, as in --sbatch=--qos=high")
    ours = {line.partition("=")[0] for line in _directives(recipe, plan, Job())} | {"-N", "--ntasks", "-n"}
    taken = next((option for option in job.options if option.partition("=")[0] in ours), None)
    if taken is not None:
        raise StartupError(f"--sbatch {taken}: rlif sets this one itself, by its plan (--nodes, --gpus-per-node)")
    options, command = _command(recipe, job)
    srun = [
        "srun", "--label", f"--wait={WAIT_SECONDS}", "--kill-on-bad-exit=0", "--cpu-bind=none", *options, *command,
        "launch", "node", str(recipe.run.dir / "recipe.yaml"),
        "--nodes", str(len(plan.nodes)), "--gpus-per-node", str(plan.gpus_per_node),
        *(["--resume-from", str(job.resume_from)] if job.resume_from else []),
    ]  # fmt: skip
    directives = "\n".join(f"#SBATCH {line}" for line in _directives(recipe, plan, job))
    table = "\n".join(f"# {line}" for line in plan.table())
    setup = "".join(f"{line}\n" for line in job.setup)
    return f"""#!/bin/bash
{directives}
#
{table}
set -u
{setup}# Which of the run's starts this is: a requeue has the same job id.
export RLIF_ATTEMPT="slurm-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
# How each node is reached: a node's name need not be a host name.
RLIF_NODE_ADDRESSES="$(scontrol show node --oneliner "$SLURM_JOB_NODELIST" |
  sed -n 's/^NodeName=\\([^ ]*\\) .*NodeAddr=\\([^ ]*\\).*/\\1=\\2/p' | paste -sd, -)"
export RLIF_NODE_ADDRESSES
stop={shlex.quote(str(recipe.run.dir))}/cluster/"$RLIF_ATTEMPT"/stop
# Asked before the time limit: every node stops after its step, with a checkpoint.
trap ': >"$stop"' USR1
{shlex.join(srun)} &
step=$!
wait "$step"
code=$?
if [ -e "$stop" ]; then
  wait "$step" # the trap ended the first one
  code=$?
fi
exit "$code"
"""


def find_sbatch() -> str:
    """Raises StartupError: there is none here."""
    found = shutil.which("sbatch")
    if found is None:
        raise StartupError("no `sbatch` on PATH: submit on a machine of a Slurm cluster, or look with --dry-run")
    return found


def check(sbatch: str, text: str) -> None:
    """Have Slurm look at a script before anything is written. Raises StartupError: sbatch refuses it."""
    looked = subprocess.run([sbatch, "--test-only"], input=text, capture_output=True, text=True, timeout=LOOK_SECONDS)
    if looked.returncode:
        raise _refusal(looked.stderr)


def _refusal(said: str) -> StartupError:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines()]
    return StartupError(f"sbatch refuses the job: {'; '.join(lines) or 'it says nothing'}")


def _submitted(run_dir: Path) -> Path:
    return run_dir / "cluster" / "submitted"


def refuse_second(run_dir: Path) -> None:
    """Raises StartupError: a job of this run is waiting or running; it reads its recipe when it starts."""
    try:
        job = _submitted(run_dir).read_text().strip()
    except OSError:
        return
    squeue = shutil.which("squeue")
    if squeue is None or not job.isdigit():
        return
    asked = [squeue, "--noheader", "--format=%T", f"--jobs={job}"]
    state = subprocess.run(asked, capture_output=True, text=True, timeout=LOOK_SECONDS).stdout.strip()
    if state:  # nothing is said of a job that has ended
        raise StartupError(f"run.dir {run_dir}: job {job} of this run is {state.lower()}; stop it first: scancel {job}")


def submit(sbatch: str, path: Path, wait: bool, tell: Callable[[str], None]) -> int:
    """Hand a script to sbatch; `tell` gets the job's number. Returns 0, or with `wait` the job's exit code at its end.

    Raises StartupError: sbatch refuses.
    """
    argv = [sbatch, "--parsable", *(["--wait"] if wait else []), str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        job = process.stdout.readline().strip().partition(";")[0]
        if job:
            write_private(_submitted(path.parent), job)
            tell(job)
            return process.wait()
        raise _refusal(process.stderr.read())
