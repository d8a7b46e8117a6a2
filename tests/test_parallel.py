"""Runs of several real processes: shared weights are those of whole ones; what a death leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from models import tiny_folder, tiny_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from test_training import distance, overrides, refused, train, weights, write_pairs

from xsiam import training, training_parts
from xsiam.config import TrainConfig, TrainerConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError
from xsiam.sharding import units

# Processes take their time to start, more where several tests run at once.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[1]
METRIC = 1e-6
SHARE = 0.01  # of the way that weights went in a run


class Ended(NamedTuple):
    """What is left of a process."""

    code: int
    errors: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny models, with and without dropout, and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_folder(folder / "still", dropout=0.0, extra=[Dense(32, 16)])
    for seed, (name, n) in enumerate({"train": 45, "validation": 23, "test": 21}.items()):
        write_pairs(folder / f"{name}.csv", n, seed)
    return folder


def run_two(
    arguments: list[str],
    *,
    die_at: str | None = None,
    timeout: float = 280,
    vectors: Path | None = None,
) -> tuple[Ended, Ended]:
    """Run two processes to their ends, started side by side as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "PYTEST"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    environment |= {} if die_at is None else {"DIE_AT": die_at}
    environment |= {} if vectors is None else {"VECTORS": str(vectors)}
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "one_run.py"), *arguments],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    stopped = None if die_at is None else running[int(die_at.split()[0])]
    try:
        ends = []
        # One that is stopped ends only when it is told to.
        for process in sorted(running, key=lambda process: process is stopped):
            if process is stopped:
                process.kill()
            ends.append((running.index(process), process.communicate(timeout=timeout)[1]))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    first, second = (Ended(running[rank].returncode, errors) for rank, errors in sorted(ends))
    return first, second


def two(inputs: Path, output: Path, *more: str, **options: Any) -> tuple[Ended, Ended]:
    return run_two(
        [*overrides(inputs, output, "trainer.devices=2", "data.batch_size=4"), *more], **options
    )


# ---------------------------------------------------------------- shared weights

CASES = {
    "own-length": [
        "model.reference=pad",
        "objective.name=cosent",
        "objective.chunk_size=3",
        "optimizer.layer_decay=0.5",
        "model.freeze_layers=1",
        "trainer.activation_checkpointing=true",
    ],
    "fitted": ["model.reference=fitted", "trainer.accumulate_grad_batches=2"],
    "distillation": ["objective.name=distillation", "objective.dims=[16,8]"],
}
IN_BATCH = ("own-length", "distillation")  # their losses depend on which pairs share a batch


@pytest.mark.parametrize(
    "case",
    [
        "own-length",
        pytest.param("fitted", marks=pytest.mark.slow),
        pytest.param("distillation", marks=pytest.mark.slow),
    ],
)
def test_shared_weights_are_trained_and_measured_as_whole_ones(
    inputs: Path, tmp_path: Path, case: str
) -> None:
    """Steps as of one process with 8 pairs; metrics as of one process with the same weights."""
    more = [f"model.name={inputs / 'still'}", *CASES[case], "attribution.layers=[2]"]
    more += ["trainer.max_epochs=1", "trainer.limit_train_batches=4"]  # the last ones differ
    more += [f"objective.teacher={inputs / 'still'}"] if case == "distillation" else []
    ends = two(inputs, tmp_path / "run", *more, "trainer.strategy=fsdp")
    assert [end.code for end in ends] == [0, 0], ends
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    ours, theirs = weights(best), weights(train(inputs, tmp_path / "whole", *more).last_checkpoint)
    assert ours.keys() == theirs.keys()
    start = SiameseEncoder.from_pretrained(
        inputs / "still", device="cpu", reference="pad"
    ).state_dict()
    before = {f"encoder.{name}": tensor for name, tensor in start.items()}
    for state in (
        ours,
        theirs,
        before,
    ):  # attention has no use for them: Adam follows rounding there
        for name in [name for name in state if name.endswith("key.bias")]:
            del state[name]
    assert distance(ours, theirs) < SHARE * distance(theirs, before)

    stays = [f"model.name={best}", "optimizer.learning_rate=1e-30"]
    same = train(inputs, tmp_path / "same", *more, *stays).metrics
    found = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert same.keys() == found.keys()
    assert {"test/spearman_cosine", "attribution/layer_2/completeness_error_max"} <= same.keys()
    own_batches = {"val/loss", "test/loss"} if case in IN_BATCH else set()
    for key in same.keys() - own_batches - {"attribution/layer_2/seconds"}:
        assert found[key] == pytest.approx(same[key], abs=METRIC), key


@pytest.mark.slow
def test_shared_weights_are_saved_whole_and_resumed(inputs: Path, tmp_path: Path) -> None:
    more = ["trainer.strategy=fsdp", "checkpoint.every_n_steps=4"]
    ends = two(inputs, tmp_path / "whole", *more)
    assert [end.code for end in ends] == [0, 0], ends
    died = two(inputs, tmp_path / "run", *more, die_at=f"1 8 {signal.SIGKILL:d}")
    assert died[0].code == 2, died
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 8
    match = r"`trainer.strategy` to be 'fsdp' as in the checkpoint"
    with pytest.raises(CheckpointError, match=match):
        train(inputs, tmp_path / "run", "resume=auto")
    ends = two(inputs, tmp_path / "run", *more, "resume=auto")
    assert [end.code for end in ends] == [0, 0], ends
    assert_equal(tmp_path / "run", tmp_path / "whole")
    texts = ["the dog runs", "a small cat sleeps in the yard ."]
    exported = tmp_path / "run" / "export"
    encoder = SiameseEncoder.from_pretrained(tmp_path / "run" / "checkpoints" / "best.ckpt")
    for other in (SiameseEncoder.from_pretrained(exported), SentenceTransformer(str(exported))):
        theirs = torch.as_tensor(other.encode(texts)).to(encoder.device)
        torch.testing.assert_close(encoder.encode(texts), theirs, rtol=0, atol=1e-5)


def assert_equal(ours: Path, theirs: Path) -> None:
    """Assert that both runs ended in the same bits."""
    for name in ("last", "best"):
        a, b = (weights(run / "checkpoints" / f"{name}.ckpt") for run in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (json.loads((run / "results.json").read_text()) for run in (ours, theirs))
    assert (a["metrics"], a["history"]) == (b["metrics"], b["history"])


def test_shared_weights_do_not_go_on_from_whole_ones(inputs: Path, tmp_path: Path) -> None:
    result = train(inputs, tmp_path / "run", "trainer.max_steps=1")
    match = r"`trainer.strategy` to be another than 'fsdp' as in the checkpoint"
    resume = f"resume={result.last_checkpoint}"
    refused(inputs, tmp_path, CheckpointError, match, resume, "trainer.strategy=fsdp")


@pytest.mark.parametrize("architecture", ["bert", "albert", "t5_relu"])
def test_every_weight_is_in_a_unit_and_blocks_are_units(architecture: str) -> None:
    encoder = SiameseEncoder(tiny_model(architecture, extra=[Dense(32, 16)]), reference="pad")
    plan = units(encoder)
    assert plan == [*encoder.split.blocks, encoder]
    assert len(plan) == (2 if architecture == "albert" else 4)  # ALBERT calls one block 3 times
    in_blocks = {p for block in plan[:-1] for p in block.parameters()}
    rest = {name for name, p in encoder.named_parameters() if p not in in_blocks}
    assert any("embed" in name or "shared" in name for name in rest)
    assert any("linear" in name for name in rest)  # the Dense after pooling


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_weights_as_two_processors_do(inputs: Path, tmp_path: Path) -> None:
    more = [f"model.name={inputs / 'still'}", "trainer.strategy=fsdp", "attribution.layers=[1]"]
    found = {}
    for accelerator in ("cpu", "gpu"):
        ends = two(inputs, tmp_path / accelerator, *more, f"trainer.accelerator={accelerator}")
        assert [end.code for end in ends] == [0, 0], ends
        found[accelerator] = json.loads((tmp_path / accelerator / "results.json").read_text())
    for key, value in found["cpu"]["metrics"].items():
        assert found["gpu"]["metrics"][key] == pytest.approx(value, abs=1e-3), key


def test_all_processes_train_with_the_vector_of_the_first(inputs: Path, tmp_path: Path) -> None:
    """Fits end where rounding leads them, which is not the same on every machine."""
    more = ["model.reference=fitted", "trainer.max_steps=1", "attribution.enabled=false"]
    ends = two(inputs, tmp_path / "run", *more, "trainer.strategy=ddp", vectors=tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    best = SiameseEncoder.from_pretrained(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert torch.equal(best.reference.c, first)


# ---------------------------------------------------------------- processes that die


@pytest.mark.parametrize(
    ("dies", "number"),
    [
        pytest.param(1, signal.SIGKILL, id="killed"),
        pytest.param(0, signal.SIGKILL, id="first-killed", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_death_of_a_process_ends_the_other_and_the_run_goes_on(
    inputs: Path, tmp_path: Path, dies: int, number: signal.Signals
) -> None:
    """In the second epoch, two steps after the last checkpoint; dropout is on."""
    more = ["trainer.strategy=ddp", "trainer.timeout=60", "checkpoint.every_n_steps=4"]
    ended = two(inputs, tmp_path / "run", *more, die_at=f"{dies} 10 {number:d}")
    assert ended[dies].code == -signal.SIGKILL  # a stopped one is killed in the end
    other = ended[1 - dies]
    assert other.code == 2
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    (message,) = (line for line in other.errors.splitlines() if line.startswith("error: "))
    assert f"all 2 processes of the run to answer, but process {1 - dies} lost one" in message
    assert f"The last state is in {last}: `resume=auto` goes on from there." in message
    assert torch.load(last, weights_only=True)["global_step"] == 8
    ends = two(inputs, tmp_path / "run", *more, "resume=auto")
    assert [end.code for end in ends] == [0, 0], ends
    ends = two(inputs, tmp_path / "whole", *more)
    assert [end.code for end in ends] == [0, 0], ends
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_process_that_never_comes_is_not_waited_for(inputs: Path, tmp_path: Path) -> None:
    """The other one has another number of processes to wait for, and ends at once."""
    arguments = overrides(inputs, tmp_path / "run", "trainer.devices=2", "trainer.timeout=5")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "one_run.py"), *arguments],
        env=environment | {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 2, done.stderr
    assert "but process 0 lost one of the others" in done.stderr
    assert "set `trainer.timeout` higher" in done.stderr


# ---------------------------------------------------------------- settings


def test_timeout_is_that_of_the_strategy(tmp_path: Path) -> None:
    for strategy in ("auto", "ddp", "fsdp"):
        config = TrainerConfig(accelerator="cpu", devices=2, strategy=strategy, timeout=90)
        trainer = training.build_trainer(
            config, tmp_path, loggers=[], callbacks=[], validates=False
        )
        assert trainer.strategy._timeout.total_seconds() == 90, strategy
        assert isinstance(trainer.strategy, DDPStrategy) == (strategy != "fsdp")


def test_strategies_that_share_weights_otherwise_are_refused() -> None:
    match = r"auto, ddp or fsdp, but got 'fsdp_cpu_offload'.*Set `trainer.strategy=fsdp`"
    with pytest.raises(InputError, match=match):
        training_parts._set_up(FSDPStrategy(), TrainerConfig(strategy="fsdp_cpu_offload"))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("trainer.precision=64-true", r"`trainer.precision=64-true`.*bf16-mixed"),
        ("trainer.precision=16-mixed", r"`trainer.precision=16-mixed`.*bf16-mixed"),
        ("lora.enabled=true", r"auto or ddp where `lora.enabled=true`, but got 'fsdp'"),
        ("model.train_reference=true", r"auto or ddp where `model.train_reference=true`"),
        (
            "bend.weight=0.1",
            r"auto or ddp where `bend.weight=0.1`.*ddp`, or `bend.weight=0.0`",
        ),
        ("trainer.timeout=0", r"`trainer.timeout` to be a positive number"),
    ],
)
def test_what_shared_weights_do_not_allow_is_refused(
    inputs: Path, tmp_path: Path, more: str, match: str
) -> None:
    refused(inputs, tmp_path, InputError, match, "trainer.strategy=fsdp", more)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_fewer_pairs_than_processes_are_refused(inputs: Path, tmp_path: Path, split: str) -> None:
    few = write_pairs(tmp_path / "few.csv", 2, 0)
    match = rf"3 {split} pairs or more, one for each process, but got 2.*`data.{split}` to more"
    more = [f"data.{split}={few}", "trainer.devices=3", "checkpoint.monitor=val/loss"]
    refused(inputs, tmp_path, InputError, match, *more)


def test_shipped_files_say_what_they_promise() -> None:
    trainer = load_config(TrainConfig, [ROOT / "configs" / "fsdp.yaml"]).trainer
    assert (trainer.strategy, trainer.precision) == ("fsdp", "bf16-mixed")
    assert trainer.activation_checkpointing


# ---------------------------------------------------------------- torchrun and SLURM

SRUN = """#!{bash}
# Start as many processes on this machine as the job has, with the variables that SLURM sets.
[ "$1" = --kill-on-bad-exit=0 ] || exit 99
shift
code={code}
[ "$code" = run ] || exit "$code"
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
"""
PYTHON = """#!{bash}
exec {python} "$@"
"""
SCONTROL = """#!{bash}
echo "$@" > {folder}/requeued
"""


def run_slurm(folder: Path, arguments: list[str], code: int | str) -> subprocess.CompletedProcess:
    """Run the batch script with an `srun` of ours, which starts two processes or just ends."""
    bash = shutil.which("bash")
    names = {"bash": bash, "folder": folder, "code": code, "python": sys.executable}
    for name, content in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (folder / name).write_text(content.format(**names))
        (folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "PYTEST"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "2"}
    environment |= {"SLURM_JOB_NAME": "xsiam", "SLURM_NODELIST": "127.0.0.1"}
    command = ["bash", "configs/slurm.sh", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(("code", "left"), [(130, 0), (2, 2), (0, 0)])
def test_interrupted_job_is_queued_again_and_a_failed_one_is_not(
    tmp_path: Path, code: int, left: int
) -> None:
    done = run_slurm(tmp_path, [], code)
    assert done.returncode == left, done.stderr
    assert (tmp_path / "requeued").exists() == (code == 130)
    if code == 130:
        assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.slow
def test_slurm_job_trains_in_all_its_processes(inputs: Path, tmp_path: Path) -> None:
    arguments = overrides(inputs, tmp_path / "run", "data.batch_size=4", "trainer.max_epochs=1")
    done = run_slurm(tmp_path, arguments, "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_torchrun_trains_with_the_shipped_file(inputs: Path, tmp_path: Path) -> None:
    """As the file itself says, but for a tiny model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "train.py", "configs/fsdp.yaml", "data.name=bundled"]
    command += [f"model.name={inputs / 'model'}", "trainer.accelerator=cpu", "trainer.devices=2"]
    command += ["trainer.max_steps=2", "data.limit=12", "attribution.layers=[2]"]
    command += ["data.num_workers=0", f"output_dir={tmp_path / 'run'}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "PYTEST"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2
