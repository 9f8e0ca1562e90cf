"""Two processes under every engine take the steps that one takes, and their states interchange."""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_dist import CPU, A, D, H, all_weights, free_port, make_learner, take_updates
from test_ranks import TIMEOUT, WORDS, finish, kill_worker, learner, start
from tiny_flow import TinyFlow
from torch.distributed import distributed_c10d as c10d
from torch.multiprocessing import spawn

from embodied_rl import checkpoint
from embodied_rl.config import Config, OptimConfig
from embodied_rl.distributed import Ranks, choice, choose_engine, fsdp, join, sharded, zero
from embodied_rl.errors import RunStopped, UserError
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.registry import BACKBONES
from embodied_rl.sac import SAC

HALF = 10  # updates before the learner is saved and loaded into a new one; as many after
ENGINES = {
    "ddp": ("train.engine=ddp",),
    "fsdp": ("train.engine=fsdp",),
    "zero1": ("train.engine=deepspeed", "train.zero_stage=1"),
    "zero2": ("train.engine=deepspeed", "train.zero_stage=2"),
    "fsdp-offload": ("train.engine=fsdp", "train.offload_optimizer=true"),
    "zero2-offload": ("train.engine=deepspeed", "train.offload_optimizer=true"),
}
PIECES = ("policy.cache_features=false", "policy.trainable=full", "policy.optim.lr=1e-3")
WAYS = {
    "crossq-frozen": ("algorithm.q_head_type=crossq",),
    "default-frozen": ("algorithm.q_head_type=default",),
    "crossq-pieces": ("algorithm.q_head_type=crossq", *PIECES, "policy.micro_batch=5"),
    "default-pieces": ("algorithm.q_head_type=default", *PIECES, "policy.micro_batch=5"),
}
SAME = {  # ddp is in tests/test_dist.py too
    "ddp": ("crossq-frozen", "default-pieces"),
    "fsdp": tuple(WAYS),
    "zero1": ("crossq-frozen", "default-frozen", "crossq-pieces"),
    "zero2": tuple(WAYS),
}
PAIRS = [(engine, engine, way) for engine, ways in SAME.items() for way in ways]
PAIRS += [(engine, engine, "crossq-frozen") for engine in ("fsdp-offload", "zero2-offload")]
PAIRS += [
    (one, other, "crossq-pieces")
    for one, other in (("fsdp", "zero2"), ("zero1", "ddp"), ("ddp", "fsdp"), ("zero2", "zero1"))
]
EXACT = [
    ("fsdp", "ddp", way) for way in ("default-frozen", "crossq-pieces")
]  # in float64, which DeepSpeed's moments are not
Job = tuple[list[str], list[str], str, bool]  # words before, words after, dtype, all is shared


def numbers_of(sac: SAC, policy: Policy) -> dict[str, torch.Tensor]:
    """Weights and moments by name."""
    found = all_weights(policy, sac)
    for name, moments in sac.engine.state_dict().items():
        for i, entry in moments.items():
            found |= {f"moments.{name}.{i}.{key}": t.clone() for key, t in entry.items()}
    return found


def learn(job: Job, rank: int, world: int, folder: Path) -> tuple[dict, dict[str, int]]:
    """Half of the updates, a checkpoint of the learner in `folder`, the other half after it.

    Returns:
        Weights and moments; and the bytes of moments held by this process, by trainable.
    """
    before, after, kind, _ = job
    dtype = getattr(torch, kind)
    policy, sac = make_learner(before, dtype)
    schedule(sac, 0.25)
    take_updates(policy, sac, rank, world, range(HALF), dtype)
    write(sac.state_dict(), folder)
    return go_on(after, dtype, rank, world, folder)


def go_on(words: list[str], dtype: torch.dtype, rank: int, world: int, folder: Path):
    policy, sac = make_learner(words, dtype)
    sac.load_state_dict(read(folder))
    schedule(sac, 0.75)
    take_updates(policy, sac, rank, world, range(HALF, 2 * HALF), dtype)
    held = {n: t.held for n, t in sac.engine._trainables.items() if hasattr(t, "held")}
    return numbers_of(sac, policy), held


def schedule(sac: SAC, progress: float) -> None:
    before = sac.learning_rates()
    sac.engine.set_progress(progress)
    assert all(rate < before[name] for name, rate in sac.learning_rates().items())


def write(state: dict, folder: Path) -> None:
    """As a checkpoint's: safetensors and JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = checkpoint.split_tensors(state, "", tensors)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(tree))


def read(folder: Path) -> dict:
    tree = json.loads((folder / "state.json").read_text())
    return checkpoint.join_tensors(tree, load_file(folder / "state.safetensors"))


def process(rank: int, world: int, folder: str, jobs: dict[str, Job]) -> None:
    """One of several; writes the numbers of each job."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does; DeepSpeed insists on it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    BACKBONES.register("tiny_flow", "tiny_flow:TinyFlow")
    sharded.SMALL = 2  # the networks are small, and only the temperature is to stay whole
    fsdp.BUCKET = 500  # several messages each
    shares = Ranks.share_statistics
    for name, job in jobs.items():
        # left out to see that the comparison notices
        Ranks.share_statistics = shares if job[3] else lambda self, module: None
        found, held = learn(job, rank, world, Path(folder) / name / str(rank))
        save_file(found, f"{folder}/{name}/{rank}.safetensors")
        Path(f"{folder}/{name}/{rank}.json").write_text(json.dumps(held))
    dist.destroy_process_group()


def name_of(one: str, other: str, way: str, kind: str = "float32") -> str:
    return f"{one}-{other}-{way}-{kind}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with every job's results, the words of each way, and what one process found."""
    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(4)
    Policy(TinyFlow(D, A, H), "tiny_flow").save_pretrained(folder / "flow")
    common = [
        f"policy.path={folder / 'flow'}",
        "train.compile=never",
        "actor.hidden=[17]",  # odd: no part of two is as large as the other
        "actor.batch_renorm=true",
        "actor.average_decay=0",
        "actor.optim.lr_scheduler=linear",
        "actor.optim.clip_grad=0.1",
        "actor.optim.weight_decay=0.01",
        "critic.hidden=[19,16]",
        "critic.batch_renorm.warmup_steps=10",
        "critic.batch_renorm.momentum=0.9",
        "critic.optim.lr_scheduler=cosine",
        "critic.optim.clip_grad=0.5",
        "policy.optim.lr_scheduler=linear",
        "policy.optim.clip_grad=0.1",
        "algorithm.entropy_tuning.optim.lr_scheduler=linear",
        "algorithm.critic_warmup_steps=0",
        "algorithm.policy_delay=2",
        "algorithm.demo.fraction=0",
    ]
    jobs: dict[str, Job] = {}
    for kind, pairs in (("float32", PAIRS), ("float64", EXACT)):
        for one, other, way in pairs:
            words = [*common, *WAYS[way]]
            job = ([*words, *ENGINES[one]], [*words, *ENGINES[other]], kind, True)
            jobs[name_of(one, other, way, kind)] = job
    for engine in ("fsdp", "zero2"):
        words = [*common, *WAYS["crossq-frozen"], *ENGINES[engine]]
        jobs[f"unshared-{engine}"] = (words, words, "float32", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKBONES, "_table", {**BACKBONES._table, "tiny_flow": "tiny_flow:TinyFlow"})
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        alone = {}
        for kind in ("float32", "float64"):
            for way, more in WAYS.items():
                job = ([*common, *more], [*common, *more], kind, True)
                alone[way, kind] = learn(job, 0, 1, folder / "alone" / way / kind)[0]
        loose = [*common, *WAYS["crossq-frozen"], "critic.optim.clip_grad=null"]
        job = (loose, loose, "float32", True)
        alone["unclipped", "float32"] = learn(job, 0, 1, folder / "alone" / "unclipped")[0]
        spawn(process, (2, str(folder), jobs), nprocs=2, join=True)
        yield folder, common, alone


def furthest(one: dict, other: dict) -> float:
    """The largest difference of weights and moments, relative to the largest of their tensor."""
    assert one.keys() == other.keys()
    assert all(one[k].shape == other[k].shape for k in one)
    wide = max(
        (t.dtype for t in one.values()), key=lambda kind: kind.itemsize * kind.is_floating_point
    )
    kept = [k for k in one if one[k].dtype == wide]  # among float64 the temperature is float32
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max()) for k in kept)


@pytest.mark.dist
@pytest.mark.parametrize(("one", "other", "way"), PAIRS)
def test_engines_equal_one_process(world, one, other, way):
    """20 updates in float32, saved by one engine and loaded by another half-way: 2e-5."""
    folder, _, alone = world
    name = name_of(one, other, way)
    for rank in range(2):
        found = load_file(folder / name / f"{rank}.safetensors")
        assert furthest(alone[way, "float32"], found) < 2e-5


@pytest.mark.dist
@pytest.mark.parametrize(("one", "other", "way"), EXACT)
def test_fsdp_equals_one_process_exactly(world, one, other, way):
    """The same in float64: 1e-10."""
    folder, _, alone = world
    found = load_file(folder / name_of(one, other, way, "float64") / "1.safetensors")
    assert furthest(alone[way, "float64"], found) < 1e-10


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_the_comparison_notices_unshared_statistics(world, engine):
    folder, _, alone = world
    found = load_file(folder / f"unshared-{engine}" / "0.safetensors")
    assert furthest(alone["crossq-frozen", "float32"], found) > 1e-2


@pytest.mark.dist
def test_the_comparison_notices_clipping(world):
    alone = world[2]
    assert furthest(alone["crossq-frozen", "float32"], alone["unclipped", "float32"]) > 1e-2


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2"])
def test_one_process_goes_on_from_a_sharded_state(world, engine):
    folder, common, alone = world
    way = "crossq-pieces"
    halfway = folder / name_of(engine, engine, way) / "0"
    found, _ = go_on([*common, *WAYS[way]], torch.float32, 0, 1, halfway)
    assert furthest(alone[way, "float32"], found) < 2e-5


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "fsdp-offload", "zero2-offload"])
def test_each_process_holds_half_of_the_moments(world, engine):
    folder, _, alone = world
    way = "crossq-frozen"
    whole: dict[str, int] = {}
    for name, tensor in alone[way, "float32"].items():
        part, _, rest = name.removeprefix("moments.").partition(".")
        if name.startswith("moments.") and not rest.endswith(".step"):
            whole[part] = whole.get(part, 0) + tensor.nbytes
    for rank in range(2):
        path = folder / name_of(engine, engine, way) / f"{rank}.json"
        held = json.loads(path.read_text())
        assert set(held) == set(whole) - {"temperature"} == {"actor", "critic"}
        assert all(count == pytest.approx(whole[n] / 2, rel=0.05) for n, count in held.items())


def left_alone(rank: int, world: int, port: int, engine: str, folder: str) -> None:
    """The second process goes after a step; the first writes what it was told."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["MASTER_PORT"] = str(port)
    ranks, _ = join("cpu", TIMEOUT)
    built = choice.EngineChoice(engine, 2, False, "").build(ranks)
    weights = torch.nn.Parameter(torch.zeros(sharded.SMALL))
    trainable = built.attach("critic", [weights], OptimConfig())
    built.step(trainable, weights.sum())
    if rank == 1:
        os._exit(0)
    groups = [group._get_backend(CPU) for group in c10d._world.pg_map]
    waits = [backend.options._timeout.total_seconds() for backend in groups]
    Path(folder, "waits.json").write_text(json.dumps(waits))
    try:
        while True:
            built.step(trainable, weights.sum())
    except RunStopped as error:
        Path(folder, "step").write_text(str(error))
    try:
        built.state_dict()
    except RunStopped as error:
        Path(folder, "state_dict").write_text(str(error))
    os._exit(0)  # without farewell to the other, whom the libraries would wait for


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_who_leaves_a_library_waiting_is_named(monkeypatch, tmp_path, engine):
    """Also in messages of FSDP's and DeepSpeed's own; all their groups have our timeout."""
    port = free_port(monkeypatch)
    spawn(left_alone, (2, port, engine, str(tmp_path)), nprocs=2, join=True)
    for name in ("step", "state_dict"):
        told = (tmp_path / name).read_text()
        assert f"rank 1 on {socket.gethostname()} did not answer" in told
    waits = json.loads((tmp_path / "waits.json").read_text())
    assert set(waits) == {TIMEOUT} and (len(waits) > 1) == (engine == "deepspeed")


# ---------------------------------------------------------------- whole runs

RUN = (*WORDS, "critic.hidden=[40,40]", "actor.hidden=[40,40]", "eval.interval=96", "run_dir=run")


@pytest.mark.dist
def test_a_sharded_run_is_killed_and_resumed_by_two_and_by_one(tmp_path):
    """Resumed by as many, it is the run that nobody interrupted; then one process goes on."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    words = (*RUN, "train.engine=fsdp", "train.total_steps=128", "eval.interval=128")
    printed = finish(tmp_path / "whole", 2, *words)
    assert "2 processes, fsdp" in printed
    run = start(tmp_path / "killed", 2, *words)
    kill_worker(run, 1, 64, tmp_path / "killed" / "run")
    run.communicate(timeout=TIMEOUT)
    assert run.returncode != 0
    finish(tmp_path / "killed", 2, "resume=run")
    first, second = (learner(tmp_path / name / "run") for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    moments = [t for name, t in first.items() if "/sac/engine/critic/" in name]
    assert moments and max(t.numel() for t in moments) == 40 * 40, "whole ones are saved"
    printed = finish(tmp_path / "killed", 1, "resume=run", "train.total_steps=160")
    assert "note: train.engine=fsdp shares work out between processes" in printed
    assert (tmp_path / "killed" / "run" / "checkpoints" / "step_000000160").exists()


@pytest.mark.dist
def test_accelerate_asks_for_deepspeed(tmp_path, monkeypatch):
    """What `accelerate launch --use_deepspeed --zero_stage 1` puts into the environment."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    printed = finish(tmp_path, 2, *RUN, "train.total_steps=64")
    assert "2 processes, deepspeed" in printed
    first, second = learner(tmp_path / "run"), learner(tmp_path / "run" / "ranks" / "1_of_2")
    assert all(torch.equal(t, second[name]) for name, t in first.items())


# ---------------------------------------------------------------- which engine


def chosen(*words: str, world: int = 2):
    ranks = Ranks()
    ranks.world = world
    return choose_engine(load_config(Config, words)[0].train, ranks)


@pytest.fixture
def no_accelerate(monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.unit
def test_what_is_named_is_taken(no_accelerate):
    assert (chosen().name, chosen(world=1).name) == ("ddp", "local")
    for name in ("ddp", "fsdp", "deepspeed"):
        found = chosen(f"train.engine={name}")
        assert (found.name, found.note) == (name, None)
        alone = chosen(f"train.engine={name}", world=1)
        assert alone.name == "local" and f"train.engine={name}" in (alone.note or "")
    assert chosen("train.engine=deepspeed").zero_stage == 2
    found = chosen("train.engine=deepspeed", "train.zero_stage=1", "train.offload_optimizer=true")
    assert (found.zero_stage, found.offload) == (1, True)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.zero_stage=2",), "is for train.engine=deepspeed, but train.engine=auto means ddp"),
        (("train.engine=fsdp", "train.zero_stage=1"), "train.engine=fsdp means fsdp here"),
        (("train.offload_optimizer=true",), "is for train.engine=fsdp and deepspeed"),
        (("train.engine=deepspeed", "train.zero_stage=3"), "Stage 3 shares out the weights"),
        (("train.engine=local",), "Allowed: auto, ddp, fsdp, deepspeed"),
        (("train.engine=deepspeed", "train.zero_stage=4"), "train.zero_stage=4 is out of range"),
    ],
)
def test_what_cannot_be_is_refused(no_accelerate, words, message):
    with pytest.raises(UserError, match=message):
        chosen(*words)


@pytest.mark.unit
def test_missing_deepspeed_names_the_command(no_accelerate, monkeypatch):
    monkeypatch.setattr(choice, "installed", lambda: False)
    with pytest.raises(UserError, match="pip install deepspeed"):
        chosen("train.engine=deepspeed")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("device", "chosen"), [("cpu", "cpu:1"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")]
)
def test_deepspeed_works_where_the_networks_are(monkeypatch, device, chosen):
    """And not on the GPU numbered LOCAL_RANK; DeepSpeed's own choice, with its GPUs made up."""
    engine = pytest.importorskip("deepspeed.runtime.engine")
    kind, taken = torch.device(device).type, []
    gpus = SimpleNamespace(set_device=taken.append, device_name=lambda i: f"{kind}:{i}")
    monkeypatch.setattr(engine, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(engine, "dist", SimpleNamespace(get_world_size=int, get_rank=int))
    own = SimpleNamespace(local_rank=1)
    engine.DeepSpeedEngine._set_distributed_vars(own, zero.arguments(torch.device(device)))
    assert str(own.device) == chosen and taken == [own.device.index]


@pytest.mark.unit
def test_auto_follows_accelerate(no_accelerate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert (chosen().name, chosen().offload) == ("fsdp", True)
    assert chosen(world=1).name == "local"
    assert chosen("train.engine=ddp").name == "ddp", "what is typed comes first"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert (chosen().name, chosen().zero_stage, chosen().offload) == ("deepspeed", 1, True)
    assert chosen("train.zero_stage=2").zero_stage == 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match=r"ZeRO stage 3 \(accelerate launch --use_deepspeed\)"):
        chosen()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    with pytest.raises(UserError, match="config file is not read"):
        chosen()


@pytest.mark.unit
def test_parameters_travel_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr(fsdp, "BUCKET", 10)
    sizes = [(6, torch.float32), (5, torch.float64), (4, torch.float32), (1, torch.float32)]
    sizes += [(25, torch.float64), (3, torch.float32)]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=kind)) for n, kind in sizes]
    assert sorted(fsdp.buckets(parameters)) == [[0, 2], [1], [3, 5], [4]]
