"""Find a run by its config, or train it; several side by side, in processes of one thread."""

import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from filelock import Timeout
from joblib import cpu_count
from tqdm.auto import tqdm

from fmnlib.checkpoint import folder_lock
from fmnlib.config import InputError, Paused, RunConfig
from fmnlib.distillation import (
    Member,
    average,
    corrected_config,
    distill,
    members_of,
    student_config,
    train_corrected,
)
from fmnlib.files import data_root, new_part
from fmnlib.fusion import Fusion
from fmnlib.noise import estimated_matrix
from fmnlib.record import RunRecord
from fmnlib.training import pick_device, train

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
"""Records of the quick profile that come with the repository."""
_QUEUED = 1000  # most jobs submitted to Ray at a time
_RETRIES = 5  # of a job whose process or machine dies
_PATIENCE = 2.0  # seconds between checks of the jobs that other processes are making


@dataclasses.dataclass(frozen=True)
class Job:
    """One record to make: trained, or made from the checkpoints of other runs."""

    config: RunConfig  #: Names the record
    members: tuple[Member, ...] = ()  #: Checkpoints to make it from; none of a plain run
    #: Function that makes the record: `distill` (plain training if there are no members), or one
    #: with the same leading arguments
    make: Callable[..., RunRecord] = distill


def root() -> Path:
    """The folder of all runs: what the environment variable FMN_RUNS names, or runs/."""
    return Path(os.environ.get("FMN_RUNS", "runs"))


def folder(config: RunConfig) -> Path:
    """The folder of a run."""
    return root() / config.id


def find(name: str) -> Path:
    """The folder of a run by its path, its id, or the beginning of its id.

    Raises:
        InputError: If there is none, or more than one.
    """
    if (Path(name) / "config.json").exists():
        return Path(name)
    folders = [path.parent for path in sorted(root().glob("*/config.json"))]
    matching = [path for path in folders if path.name.startswith(name)]
    exact = [path for path in matching if path.name == name]
    own = [path for path in matching if not RunConfig.load(path / "config.json").teacher]
    for choice in (exact, own, matching):  # a student's name begins like its run's
        if len(choice) == 1:
            return choice[0]
    count = f"{len(matching)} runs" if matching else "no run"
    raise InputError(f"{count} in {root()} begins with {name!r}; `fmn runs` lists them")


def student(config: RunConfig, name: str, fusion: Fusion, **student: Any) -> Job:
    """The job of distilling a fusion of a run into one network ("Distilled KF").

    `name` is the fusion's, such as kf; `student` are fields of `StudentConfig` but `teacher`.
    """
    members = members_of(config, folder(config), fusion)
    return Job(student_config(config, name, members, **student), tuple(members))


def averaged(config: RunConfig, name: str, fusion: Fusion) -> Job:
    """The job of averaging the weights of a fusion's checkpoints ("Averaged KF")."""
    members = members_of(config, folder(config), fusion)
    return Job(student_config(config, f"averaged_{name}", members), tuple(members), average)


def corrected(config: RunConfig, val: RunRecord) -> Job:
    """The job of training a run anew, its loss corrected for its noise matrix (GLC).

    The matrix is `fmnlib.noise.estimated_matrix` of the run's validation half.
    """
    matrix = estimated_matrix(val)
    make = functools.partial(train_corrected, matrix=matrix)
    return Job(corrected_config(config, matrix), make=make)


def obtain(
    jobs: Iterable[Job | RunConfig],
    *,
    fresh: bool = False,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> list[RunRecord]:
    """The records of many runs, in order: loaded if they exist, else trained.

    Args:
        jobs: Jobs, or configs of runs to train.
        fresh: Ignore the committed records.
        device: As in `fmnlib.training.train`.
        workers: Number of parallel runs; by default the number of cores or GPUs.
        progress: Show a progress bar.
    """
    every = [job if isinstance(job, Job) else Job(job) for job in jobs]
    jobs_by_id = {job.config.id: job for job in every}
    committed = {} if fresh else {name: REFERENCE / f"{name}.npz" for name in jobs_by_id}
    loaded = {name: RunRecord.load(path) for name, path in committed.items() if path.exists()}
    missing = [job for name, job in jobs_by_id.items() if name not in loaded]
    todo = [job for job in missing if not complete(job.config)]
    sources = [member.config for job in todo for member in job.members]
    teachers = {c.id: jobs_by_id.get(c.id, Job(c)) for c in sources}
    first = [job for job in teachers.values() if not complete(job.config)]
    for stage in (first, [job for job in todo if job.config.id not in teachers]):
        make_all(functools.partial(_left, stage), device, workers, progress)
    return [loaded.get(job.config.id) or RunRecord.load(folder(job.config)) for job in every]


def listing() -> list[dict[str, str | int | float]]:
    """The runs in `root()`: id, state, epochs and final accuracy."""
    rows: list[dict[str, str | int | float]] = []
    for path in sorted(root().glob("*/config.json")):
        row: dict[str, str | int | float] = {"run": path.parent.name, "state": "unfinished"}
        try:
            row["epochs"] = RunConfig.load(path).epochs
            if (path.parent / "record.npz").exists():
                accuracy = RunRecord.load(path.parent / "record.npz").accuracy[-1]
                row |= {"state": "complete", "accuracy": round(float(accuracy), 4)}
        except InputError:
            row["state"] = "damaged"  # the others are listed all the same
        rows.append(row)
    return rows


def complete(config: RunConfig) -> bool:
    """Whether a run's record is there."""
    return (folder(config) / "record.npz").exists()


def make_all(
    jobs: Callable[[], Sequence[Job]],
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    deadline: float = math.inf,
) -> None:
    """Run jobs in parallel until none is left, or until the deadline of `fmnlib.training.train`.

    `jobs` returns the remaining jobs, most urgent first; it is called again after each job. On a
    CPU a job has one thread, which is fastest and makes its result independent of the other jobs.
    A job goes to the GPU with the fewest jobs. Jobs that another process is making are skipped.
    Other arguments are as in `obtain`.

    Raises:
        Paused: If jobs are left for the deadline.
    """
    devices = local_devices(device, workers)
    if not jobs():
        return
    alone = len(devices) == 1  # then in this process
    folders = str(data_root().resolve()), str(Path.cwd())
    pool = None if alone else worker_pool(len(devices), *folders)

    def submit(job: Job, target: str) -> Future[bool]:
        arguments = job, folder(job.config).absolute(), target, progress and alone, deadline
        if pool is not None:
            return pool.submit(make, *arguments)
        done: Future[bool] = Future()
        done.set_result(make(*arguments))
        return done

    try:
        follow(jobs, submit, devices, progress)
    except KeyboardInterrupt:
        worker_pool.cache_clear()  # its processes have ended
        raise
    except BrokenProcessPool as error:
        worker_pool.cache_clear()
        problem = "a process that trained has ended, killed or out of memory"
        raise InputError(f"{problem}; the same call resumes it, with fewer workers") from error


def make_on_ray(
    jobs: Callable[[], Sequence[Job]],
    device: str = "auto",
    gpus_per_run: float | None = None,
    address: str | None = None,
    deadline: float = math.inf,
) -> None:
    """Make jobs on a Ray cluster until none is left; otherwise as `make_all`.

    All machines need this Python environment, and the folders FMN_RUNS and FMN_DATA at the same
    paths. A job whose process or machine dies resumes after its last saved epoch, on any machine.
    A job takes `gpus_per_run` of a GPU; by default 1, or 0 on a cluster without GPUs. The cluster
    is the one at `address` or RAY_ADDRESS, else this machine alone.

    Raises:
        InputError: If Ray, the cluster or the shared folder is not there, or jobs keep dying.
        Paused: If jobs are left for the deadline.
    """
    if gpus_per_run is not None and not 0 <= gpus_per_run <= 1:
        raise InputError(f"gpus_per_run is {gpus_per_run}; allowed is 0 to 1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("ray is not installed; pip install 'fmnlib[cluster]'") from error
    root().mkdir(parents=True, exist_ok=True)
    probe, connect = new_part(root().resolve() / "shared"), not ray.is_initialized()
    try:
        if connect:
            try:
                ray.init(address, include_dashboard=False)
            except ConnectionError as error:
                tried = address or os.environ.get("RAY_ADDRESS")
                raise InputError(
                    f"no Ray cluster answers at {tried}; `ray start --head`"
                ) from error
        available = ray.cluster_resources().get("GPU", 0)
        gpus = min(available, 1) if gpus_per_run is None else gpus_per_run
        if gpus > available:
            raise InputError(f"gpus_per_run is {gpus} and the cluster has no GPU; give 0")
        stop = time.time() + deadline - time.monotonic()  # monotonic clocks differ by machine
        env = {"env_vars": {"FMN_DATA": str(data_root().resolve())}}
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": _RETRIES, "runtime_env": env}
        remote = ray.remote(**options)(_make_on_node)

        def submit(job: Job, target: str) -> Future[bool]:
            members = tuple(replace(m, folder=m.folder.resolve()) for m in job.members)
            task = remote.remote(replace(job, members=members), probe, target, stop)
            return cast("Future[bool]", task.future())

        follow(jobs, submit, [device] * _QUEUED, progress=True)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"a run ended {_RETRIES + 1} times ({reason}); fix that") from error
    finally:
        probe.unlink(missing_ok=True)
        if connect:
            ray.shutdown()


def _make_on_node(job: Job, probe: Path, device: str, stop: float) -> bool:
    if not probe.exists():
        raise InputError(f"{probe.parent} is not shared by all machines; set FMN_RUNS")
    torch.set_num_threads(1)
    deadline = time.monotonic() + stop - time.time()
    return make(job, probe.parent / job.config.id, device, False, deadline)


def follow(
    jobs: Callable[[], Sequence[Job]],
    submit: Callable[[Job, str], Future[bool]],
    devices: Sequence[str],
    progress: bool,
) -> None:
    """Submit jobs, one at a time to each of the devices, until `jobs` lists none.

    A job starts once the runs that its checkpoints come from are complete. A job that another
    process is making is skipped, and tried again when another job ends, or soon if a device is
    idle. If a job pauses, wait until the others have paused, too.
    """
    running: dict[Future[bool], tuple[str, str]] = {}  # names and devices
    held, idle = set[str](), list(devices)  # jobs of other processes; free devices
    with tqdm(desc="training", total=len(jobs()), disable=not progress) as bar:
        while (todo := jobs()) or running:
            bar.total = bar.n + len(todo)  # some jobs are known only after others
            left = {job.config.id for job in todo}
            for job in todo:
                taken = held.union(name for name, _ in running.values())
                sources = {member.config.id for member in job.members}
                if idle and job.config.id not in taken and left.isdisjoint(sources):
                    device = idle.pop(0)
                    running[submit(job, device)] = job.config.id, device
            if not running:
                time.sleep(_PATIENCE)
                held.clear()
            patience = _PATIENCE if held and idle else None
            done = wait(running, patience, return_when=FIRST_COMPLETED).done
            if not done:
                held.clear()
            for future in done:
                if isinstance(future.exception(), Paused):
                    wait(running)
                name, device = running.pop(future)
                idle.append(device)
                bar.update(future.result())
                held = set() if future.result() else held | {name}


def make(job: Job, path: Path, device: str, progress: bool, deadline: float) -> bool:
    """Make one job in its folder; False where another process is making it."""
    if time.monotonic() > deadline:
        raise Paused(f"{job.config.id} was not started; the same command resumes it")
    current = torch.cuda.device(device) if device.startswith("cuda:") else nullcontext()
    together = os.environ.get("WORLD_SIZE", "1") != "1"  # torchrun: all processes train this run
    path.mkdir(parents=True, exist_ok=True)
    try:
        with current, nullcontext() if together else folder_lock(path).acquire(timeout=0):
            if job.make is distill and not job.members:
                train(job.config, path, device=device, progress=progress, deadline=deadline)
            else:
                trains = job.make is distill or not job.members
                more = {"progress": progress, "deadline": deadline} if trains else {}
                job.make(job.config, job.members, path, device=device, **more)
        return True
    except Timeout:
        return False


def local_devices(device: str, workers: int | None = None) -> list[str]:
    """The device of each parallel run: the GPUs in turn, or the CPU once per available core.

    Raises:
        InputError: If `workers` is below 1, or the device is not available.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; allowed is at least 1")
    gpu, alone = pick_device(device).type == "cuda", os.environ.get("WORLD_SIZE", "1") == "1"
    count = torch.cuda.device_count() if gpu and alone and ":" not in device else 1
    every = [f"cuda:{number}" for number in range(count)] if count > 1 else [device]
    return [every[n % count] for n in range(workers or (count if gpu else cpu_count()))]


def _left(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not complete(job.config)]


@functools.cache
def worker_pool(workers: int, *_folders: str) -> ProcessPoolExecutor:
    """A pool of worker processes, reused by later calls with the same data and working folder.

    A new process takes seconds to load torch.
    """
    # spawn: a forked process would inherit torch's thread pools in a broken state.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin_worker)


def _begin_worker() -> None:
    """Set up a worker: one torch thread, and exit at once when the parent process ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
