"""One, two and four processes take the same steps on the same global batch."""

import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_flow import TinyFlow
from torch.multiprocessing import spawn

from embodied_rl.builders import build_policy, build_q_head, build_sac
from embodied_rl.config import Config
from embodied_rl.distributed import Ranks, join, leave
from embodied_rl.distributed.launch import backend_for
from embodied_rl.errors import RunStopped
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.registry import BACKBONES
from embodied_rl.sac import SAC
from embodied_rl.types import ArraySpec, Batch, EnvSpec

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
B, D, H, A = 16, 4, 3, 2
TIMEOUT = 300
LAG = 5  # seconds that a process waits for one that lags
Job = tuple[list[str], int, bool]  # config, updates, whether statistics are shared
SPEC = EnvSpec({"state": ArraySpec((D,), torch.float32)}, A, 20, "fake reach")


def share(rank: int, world: int) -> slice:
    size = B // world
    return slice(rank * size, (rank + 1) * size)


def global_batch(policy: Policy, number: int, rows: slice, kind: torch.dtype) -> Batch:
    rng = torch.Generator().manual_seed(100 + number)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)[rows].to(kind)

    obs, following = {"state": 2 * draw(B, D) + 1}, {"state": 2 * draw(B, D) + 1}
    noise = torch.Generator().manual_seed(number)  # of the base action: not what is compared
    return Batch(
        policy.backbone(obs, 0, noise).detach(),
        policy.backbone(following, 0, noise).detach(),
        torch.tanh(draw(B, H, A)),
        draw(B),
        torch.full((B,), 0.9, dtype=kind)[rows],
        torch.zeros(B, dtype=torch.bool)[rows],
        obs,
    )


def make_learner(words: list[str], kind: torch.dtype) -> tuple[Policy, SAC]:
    config, _ = load_config(Config, words)
    torch.manual_seed(0)
    policy = build_policy(config, SPEC, CPU).to(kind)
    return policy, build_sac(config, policy, build_q_head(config, policy, CPU).to(kind), CPU)


def take_updates(
    policy: Policy, sac: SAC, rank: int, world: int, numbers: range, kind=torch.float64
) -> None:
    """Takes a process's share of every batch, numbered from 0, and of the noise."""
    rows, drawn = share(rank, world), torch.Generator().manual_seed(7 + numbers.start)

    def randn_like(tensor: torch.Tensor) -> torch.Tensor:
        """Every rank draws the noise of the whole batch and takes its rows."""
        assert len(tensor) == B // world
        return torch.randn(B, *tensor.shape[1:], generator=drawn, dtype=tensor.dtype)[rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", randn_like)
        for number in numbers:
            sac.update(global_batch(policy, number, rows, kind), env_steps=0)


def learn(words: list[str], rank: int, world: int, updates: int) -> dict[str, torch.Tensor]:
    """Returns the weights after some updates."""
    policy, sac = make_learner(words, torch.float64)
    take_updates(policy, sac, rank, world, range(updates))
    return all_weights(policy, sac)


def all_weights(policy: Policy, sac: SAC) -> dict[str, torch.Tensor]:
    parts = {"actor": policy.actor, "q": sac.q_head, "temperature": sac.temperature}
    state = {f"{p}.{k}": v for p, m in parts.items() for k, v in m.state_dict().items()}
    state |= {f"backbone.{k}": v for k, v in policy.backbone.state_dict().items()}
    return {k: v.detach().clone().contiguous() for k, v in state.items()}


def process(rank: int, world: int, folder: str, jobs: dict[str, Job]) -> None:
    """One of several; rank 0 writes the weights of each job."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    BACKBONES.register("tiny_flow", "tiny_flow:TinyFlow")
    shares = Ranks.share_statistics
    for name, (words, updates, shared) in jobs.items():
        # left out to see that the comparison notices
        Ranks.share_statistics = shares if shared else lambda self, module: None
        found = learn(words, rank, world, updates)
        if rank == 0:
            save_file(found, f"{folder}/{name}.safetensors")
    dist.destroy_process_group()


TRAINED = ("policy.cache_features=false", "policy.trainable=full", "policy.optim.lr=1e-3")
WAYS = {"frozen": (), "whole": TRAINED, "pieces": (*TRAINED, "policy.micro_batch=3")}
HEADS = ("crossq", "default")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights by number of processes and job, after 50 updates."""
    folder = tmp_path_factory.mktemp("dist")
    torch.manual_seed(4)
    Policy(TinyFlow(D, A, H), "tiny_flow").save_pretrained(folder / "flow")
    common = [
        f"policy.path={folder / 'flow'}",
        "actor.hidden=[16]",
        "actor.batch_renorm=true",
        "actor.average_decay=0",
        "critic.hidden=[16,16]",
        "critic.batch_renorm.warmup_steps=20",
        "critic.batch_renorm.momentum=0.9",
        "critic.optim.clip_grad=0.5",
        "algorithm.critic_warmup_steps=0",
        "algorithm.demo.fraction=0",
        "train.compile=never",  # the noise is drawn by a patch
    ]
    jobs: dict[str, Job] = {
        f"{head}-{way}": ([*common, f"algorithm.q_head_type={head}", *more], 50, True)
        for head in HEADS
        for way, more in WAYS.items()
    }
    jobs["unshared"] = ([*common, "algorithm.q_head_type=crossq"], 10, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKBONES, "_table", {**BACKBONES._table, "tiny_flow": "tiny_flow:TinyFlow"})
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        found = {1: {name: learn(words, 0, 1, n) for name, (words, n, _) in jobs.items()}}
        for world in (2, 4):
            inside = folder / str(world)
            inside.mkdir()
            spawn(process, (world, str(inside), jobs), nprocs=world, join=True)
            found[world] = {name: load_file(inside / f"{name}.safetensors") for name in jobs}
    return found


def furthest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one if one[k].is_floating_point())


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
def test_processes_equal_one(weights, head, way, world):
    """50 updates in float64: 1e-10, with Batch Renormalisation in actor and critic."""
    job = f"{head}-{way}"
    assert furthest(weights[1][job], weights[world][job]) < 1e-10


def waiting(rank: int, world: int, port: int, folder: str) -> None:
    """The second process comes late; the first writes what it was told."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    Path(folder, str(rank)).touch()
    while not Path(folder, str(1 - rank)).exists():  # the timeout below is not for slow starts
        time.sleep(0.01)
    ranks, _ = join("cpu", LAG)
    assert ranks.all(True) and not ranks.any(False) and ranks.any(rank == 1)
    if rank == 1:
        deadline = time.monotonic() + TIMEOUT
        while not Path(folder, "told").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return
    try:
        ranks.any(False)
    except RunStopped as error:
        Path(folder, "told").write_text(str(error))


def free_port(monkeypatch) -> int:
    """Where two processes on this machine may meet."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_process_that_lags_is_named(monkeypatch, tmp_path):
    spawn(waiting, (2, free_port(monkeypatch), str(tmp_path)), nprocs=2, join=True)
    told = (tmp_path / "told").read_text()
    assert f"rank 1 on {socket.gethostname()} did not answer" in told
    assert "train.rank_timeout" in told


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [
        (["GPU-a", "GPU-b"], "cpu:gloo,cuda:nccl"),
        (["GPU-a", "GPU-a"], "gloo"),  # two processes, device=cuda:0
        (["GPU-a", "GPU-b", "GPU-c", "GPU-c"], "gloo"),  # the second machine has one for two
        (["GPU-a", ""], "gloo"),
        (["", ""], "gloo"),
    ],
)
def test_nccl_where_every_process_has_a_gpu_of_its_own(gpus, backend):
    assert backend_for(gpus) == backend


def met(rank: int, world: int, port: int, device: str, folder: str) -> None:
    """Joins with GPUs made up; notes the device and what carries the messages."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["MASTER_PORT"] = str(port)
    begin, joined = dist.init_process_group, []

    def init_process_group(backend: str, **more) -> None:
        joined.append(backend)
        begin("gloo", **more)  # there is no nccl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(
            torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{i}")
        )
        patch.setattr(torch.cuda, "set_device", joined.append)
        patch.setattr(dist, "init_process_group", init_process_group)
        ranks, place = join(device, TIMEOUT)
        joined.append(place)
        ranks.meet()  # the first process has the store that the other still reads
        leave()
    Path(folder, str(rank)).write_text(" ".join(joined))


@pytest.mark.parametrize(
    ("device", "places", "backend"),
    [
        ("auto", ["cuda:0", "cuda:1"], "cpu:gloo,cuda:nccl"),
        ("cuda:1", ["cuda:1", "cuda:1"], "gloo"),
    ],
)
def test_processes_tell_one_another_their_gpus(monkeypatch, tmp_path, device, places, backend):
    spawn(met, (2, free_port(monkeypatch), device, str(tmp_path)), nprocs=2, join=True)
    for rank, place in enumerate(places):
        assert (tmp_path / str(rank)).read_text() == f"{place} {backend} {place}"


def test_the_comparison_notices_unshared_statistics(weights):
    assert furthest(weights[1]["unshared"], weights[2]["unshared"]) > 1e-3
