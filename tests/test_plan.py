"""The plan of a run, against counts by hand, against real stores, and against real updates."""

import functools
import json
import math
import os

import pytest
import torch
from conftest import CPU
from tiny_pi0 import transformers_folder
from torch.utils.flop_counter import FlopCounterMode

from embodied_rl import builders, plan
from embodied_rl.collector import Collector
from embodied_rl.command_configs import PlanConfig
from embodied_rl.config import PolicyConfig
from embodied_rl.costs.devices import GIB, KNOWN, name_devices
from embodied_rl.costs.estimate import estimate
from embodied_rl.costs.measure import Cost
from embodied_rl.costs.meter import Meter
from embodied_rl.costs.outlook import outlook, work
from embodied_rl.costs.report import document, text
from embodied_rl.errors import UserError
from embodied_rl.guard import Guard
from embodied_rl.interfaces.sketch import Assumed
from embodied_rl.load_config import load_config
from embodied_rl.policy import SHIPPED, Policy
from embodied_rl.registry import BACKBONES, SKETCHES

pytestmark = pytest.mark.unit

# the default task: D 42, A 4, H 1; two critics and the actor of two layers of 256
D, A, WIDTH, K, B = 42, 4, 256, 2, 128
POLICY = (42 * 256 + 256) + 2 * (256 * 256 + 256) + (256 * 4 + 4)
ACTOR = (42 * 256 + 256) + (256 * 256 + 256) + (256 * 8 + 8)
CRITIC = (46 * 256 + 256) + (256 * 256 + 256) + (256 + 1)
RENORM = 2 * (46 + 256 + 256)  # scale and shift of the input and of each hidden layer
# multiply-adds for one row
ACTOR_MACS, CRITIC_MACS = 42 * 256 + 256 * 256 + 256 * 8, 46 * 256 + 256 * 256 + 256


def read(*overrides: str) -> PlanConfig:
    return load_config(PlanConfig, list(overrides))[0]


def assume(**changes) -> Assumed:
    known = {"state_dim": None, "action_dim": None, "cameras": None, "image_size": 28}
    return Assumed(**{**known, "max_episode_steps": 50, "name": "a task", **changes})


@functools.cache
def planned(*overrides: str, devices: int = 1, **assumed):
    return estimate(read(*overrides), assume(**assumed), devices)


@pytest.fixture(scope="module")
def default():
    return planned()


@pytest.fixture(scope="module")
def pi0_folder(tmp_path_factory):
    """The folder of a tiny π0 as transformers saves it, without its weights."""
    folder = transformers_folder(tmp_path_factory.mktemp("plan") / "pi0")
    (folder / "model.safetensors").unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_inference_steps": 1}))
    return folder


# ---------------------------------------------------------------- parameters and memory


@pytest.mark.parametrize("head", ["crossq", "default"])
def test_parameters_by_hand(head):
    found = planned(f"algorithm.q_head_type={head}")
    critics = K * (CRITIC + (RENORM if head == "crossq" else 0))
    wanted = {
        "backbone": (POLICY, 0),
        "actor": (ACTOR, ACTOR),
        "actor, running average": (ACTOR, 0),
        "critics x 2": (critics, critics),
        "temperature": (1, 1),
    }
    if head == "default":
        wanted["critics, target"] = (critics, 0)
    assert {p.name: (p.count, p.trained) for p in found.parts} == wanted
    trained = ACTOR + critics + 1
    assert found.held["gradients"] == 4 * trained
    assert found.held["Adam moments"] == 8 * trained


def test_weights_in_memory_are_those_of_the_real_modules(default):
    """Buffers included: what the real run holds."""
    config = read()
    obs = default.draft.sketch.spec
    policy = builders.build_policy(config, obs, CPU)
    head = builders.build_q_head(config, policy, CPU)
    sac = builders.build_sac(config, policy, head, CPU)
    modules = (policy, head, sac.average.module, sac.temperature)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    assert default.held["weights"] == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("head", ["crossq", "default"])
@pytest.mark.parametrize("actor", ["gaussian", "residual"])
def test_an_update_is_the_real_one(head, actor, make_batch):
    """Operations, kernels and peak memory of a real update on the CPU, optimiser included."""
    words = (f"algorithm.q_head_type={head}", f"actor.type={actor}", "algorithm.policy_delay=1")
    found = planned(*words)
    config = read(*words, "train.compile=never")
    policy = builders.build_policy(config, found.draft.sketch.spec, CPU)
    sac = builders.build_sac(config, policy, builders.build_q_head(config, policy, CPU), CPU)
    batch = make_batch(B, D, 1, A)
    sac.update(batch, env_steps=10**6)  # makes the moments
    modules = (policy, sac.q_head)
    with Meter([p for m in modules for p in m.parameters()]) as meter:
        # so that the gradients that an update replaces count until then
        for module in (sac.actor, sac.q_head, sac.temperature):
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = torch.zeros_like(parameter)
        before = meter.held
        meter.reset()
        sac.update(batch, env_steps=10**6)
    assert found.costs.heads.flops == meter.flops
    assert found.costs.heads.weight_bytes == meter.weight_bytes
    # the real batch was there before the meter; the optimisers' kernels are not planned
    inputs = 2 * B * 4 * (D + A) + B * 4 * A + B * (4 + 4 + 1)
    assert found.costs.heads_peak - inputs == pytest.approx(meter.peak - before, rel=0.01)
    assert found.costs.heads.kernels == pytest.approx(meter.kernels, rel=0.05)


def test_phases_do_not_add_up(default):
    most = max(default.phases.values())
    assert default.memory == sum(default.held.values()) + most
    assert default.phases["closing comparison"] > 2 * 4 * POLICY


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("n_step", [1, 3])
def test_bytes_of_a_step_are_those_written(make_config, make_env, tmp_path, cached, n_step):
    words = (f"policy.cache_features={cached}", f"algorithm.n_step={n_step}")
    config, env = make_config(*words), make_env("reach", 2)
    policy = builders.build_policy(config, env.spec, CPU)
    replay = builders.build_replay(config, policy, tmp_path / "replay", CPU, config.seed)
    guard = Guard(tmp_path / "failure", enabled=False)
    collector = Collector(
        env, policy, replay, config.rollout, guard, store_features=cached, seed=0, device=CPU
    )
    collector.start()
    for _ in range(40):  # two episodes of 20 steps in each environment
        collector.begin()
        collector.end()
    cache = replay._reader.cache
    replay.state_dict()  # writes what is pending
    files = sorted((tmp_path / "replay").glob("segment-*.safetensors"))
    data = sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files)
    replay.close()

    words = ("policy.path=null", "algorithm.replay_buffer.cache_size=1000", *words)
    more = ("train.total_steps=80", "algorithm.demo.fraction=0")
    found = planned(*words, *more, state_dim=4, action_dim=2, max_episode_steps=20).storage
    assert (found.trajectories, found.trajectory_rows) == (4, 21)
    assert found.run_bytes == data
    assert found.cache_bytes == cache.nbytes
    assert found.row == found.observations + found.features + found.rest
    assert found.features == (4 * (4 + 2) if cached else 0)


def test_replay_rows_by_hand(default):
    found = default.storage
    # state and vector of 42 float32, base action and action of 4, reward, steps, three flags
    assert (found.observations, found.features, found.rest) == (168, 184, 16 + 4 + 8 + 3)
    assert found.cached_with_features == 168 + 16 + 16 + 8
    assert found.cached_with_images == 168 + 16 + 8
    assert found.trajectories == 50_000 // 50
    assert found.window_bytes == found.run_bytes == 1000 * 51 * 383


def test_images_and_pieces(pi0_folder):
    found = planned(
        f"policy.path={pi0_folder}",
        "rollout.max_trajectory_steps=10",
        "rollout.execute_steps=2",
        "train.total_steps=1000",
        "algorithm.replay_buffer.cache_bytes=100000",
    ).storage
    assert found.observations == 2 * 28 * 28 * 3 + 4 * 4
    # 25 decisions an episode, in pieces of 10, 10 and 5; all are taken for full ones
    assert (found.trajectory_rows, found.trajectories) == (11, 20 * 3)
    assert found.cache_rows == 100_000 // found.cached


# ---------------------------------------------------------------- operations


def test_flops_of_an_update_by_hand():
    """Backward: products for the weights, and for the inputs of layers behind trained ones."""
    first_actor, first_critic = D * WIDTH, (D + A) * WIDTH
    sampling = 2 * B * ACTOR_MACS
    acting = 2 * B * (3 * ACTOR_MACS - first_actor) + K * 2 * B * 2 * CRITIC_MACS
    learning = 2 * B * (3 * CRITIC_MACS - first_critic)
    # in CrossQ both halves of the batch; the input's scale learns through the first layer's weights
    joint = sampling + 2 * K * learning
    separate = sampling + K * (learning + 2 * B * CRITIC_MACS)
    for head, critic in (("crossq", joint), ("default", separate)):
        found = planned(f"algorithm.q_head_type={head}")
        assert found.costs.heads.flops == pytest.approx(critic + acting / 2, rel=1e-12), head


@pytest.mark.parametrize(("width", "gflop"), [(256, 0.56), (1024, 7.4), (2048, 29)])
def test_crossq_updates_measured_elsewhere(width, gflop):
    """HalfCheetah-sized, batch 256, one actor update for three of the critic."""
    found = planned(
        "policy.path=null",
        f"critic.hidden=[{width},{width}]",
        "algorithm.batch_size=256",
        "algorithm.policy_delay=3",
        state_dim=17,
        action_dim=6,
    )
    assert found.costs.heads.flops / 1e9 == pytest.approx(gflop, rel=0.02)


def test_inference_by_hand(default):
    rows = read().env.num_envs
    assert default.costs.prefix.flops == 2 * rows * (42 * 256 + 2 * 256 * 256 + 256 * 4)
    assert default.costs.actor.flops == 2 * rows * ACTOR_MACS
    assert default.costs.prefix.weight_bytes == 4 * (42 * 256 + 2 * 256 * 256 + 256 * 4 + 772)


def test_the_meter_counts_as_torch_does(pi0_folder):
    draft = planned(f"policy.path={pi0_folder}").draft
    backbone = draft.policy.backbone
    obs = {
        key: torch.zeros((3, *entry.shape), dtype=entry.dtype, device="meta")
        for key, entry in draft.sketch.spec.obs.items()
    }
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        backbone(obs)
    with torch.no_grad(), Meter() as mine:
        backbone(obs)
    assert mine.flops == theirs.get_total_flops() > 0


def test_the_meter_holds_what_is_alive():
    weight = torch.zeros(100, 100, device="meta", requires_grad=True)
    x = torch.zeros(50, 100, device="meta")
    with Meter([weight]) as meter:
        hidden = (x @ weight).relu()  # relu keeps its own result only
        assert (meter.held, meter.peak) == (20_000, 40_000)
        loss = hidden.sum()
        del hidden
        assert meter.held == 20_004, "the graph holds it"
        (gradient,) = torch.autograd.grad(loss, [weight])
        del loss
        assert meter.held == 40_000 == 4 * gradient.numel()
    assert (meter.flops, meter.weight_bytes) == (2 * 2 * 50 * 100 * 100, 40_000)


# ---------------------------------------------------------------- π0


def test_a_trained_backbone(pi0_folder):
    words = (f"policy.path={pi0_folder}", "policy.cache_features=false", "algorithm.batch_size=16")

    def make(*more: str):
        return planned(*words, "policy.trainable=full", *more)

    whole, pieces = make(), make("policy.micro_batch=2")
    again = make("policy.gradient_checkpointing=true")
    assert whole.costs.backbone.flops == pieces.costs.backbone.flops
    assert whole.costs.encode.flops == pytest.approx(pieces.costs.encode.flops)
    assert pieces.costs.backbone.kernels > 3 * whole.costs.backbone.kernels
    name = "update: backbone"
    assert pieces.phases[name] < whole.phases[name] > again.phases[name]
    assert again.costs.backbone.flops > 1.2 * whole.costs.backbone.flops, "it computes twice"
    # forward and backward of the prefix: up to three times the forward
    forward = whole.costs.prefix.flops / whole.acting_rows * 16
    assert 2.5 * forward < whole.costs.backbone.flops <= 3 * forward
    part = next(p for p in whole.parts if p.name == "backbone")
    assert whole.held["gradients"] > 4 * part.trained > 0
    frozen = planned(*words)
    assert frozen.costs.backbone is None and frozen.costs.encode is not None
    assert frozen.costs.encode.flops == pytest.approx(whole.costs.encode.flops)


def test_noise_is_denoised_once(pi0_folder):
    words = (f"policy.path={pi0_folder}",)
    drawn, steered = planned(*words), planned(*words, "actor.type=noise")
    assert steered.costs.denoise.flops == 0 == drawn.costs.decode.flops
    assert steered.costs.decode.flops == drawn.costs.denoise.flops > 0
    several = planned(*words, "actor.type=residual", "actor.candidates=3")
    assert several.costs.denoise.flops == 3 * drawn.costs.denoise.flops
    assert several.storage.features > drawn.storage.features


def test_what_is_assumed_is_told(pi0_folder):
    found = planned(f"policy.path={pi0_folder}")
    told = " | ".join(found.assumed.notes)
    assert "cameras: 2" in told and "cameras (2, of 28 x 28 pixels) and 4 numbers" in told
    wanted = planned(f"policy.path={pi0_folder}", cameras=1)
    assert not any("assume." in note for note in wanted.assumed.notes)
    assert wanted.costs.prefix.flops < found.costs.prefix.flops


@pytest.mark.parametrize("name", sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
def test_shipped_policies(name):
    """What the plan counts as the backbone's is what its weights file holds."""
    pytest.importorskip("efficientnet_lite_pytorch")
    found = planned(f"policy.path={name}", image_size=128)
    assert found.parts[0].nbytes == found.download
    assert found.costs.prefix.flops > 0


def test_an_image_size_that_the_policy_never_saw():
    pytest.importorskip("efficientnet_lite_pytorch")
    if not (SHIPPED / "pushpull_small_vla").is_dir():
        pytest.skip("not shipped yet")
    with pytest.raises(UserError, match=r"trained with 8 x 8. Set assume\.image_size="):
        planned("policy.path=pushpull_small_vla", image_size=224)


def test_smolvla(tmp_path):
    """Without its weights; our own folder of it gives the same plan."""
    from tiny_rgb import SPEC, STATE
    from tiny_smolvla import A, H, M, W, write

    folder = write(tmp_path / "smolvla", cameras=("base_camera", "hand_camera"))
    policy = Policy(BACKBONES.get("smolvla").from_folder(folder, PolicyConfig()), "smolvla")
    policy.backbone.check_env(SPEC)
    policy.save_pretrained(tmp_path / "own")
    (folder / "model.safetensors").unlink()
    found = planned.__wrapped__(f"policy.path={folder}")
    backbone = found.draft.policy.backbone
    assert (backbone.chunk_size, backbone.action_dim, backbone.noise_dim) == (H, A, W)
    assert backbone.feature_dim == (2 + 2) * M + STATE
    assert found.parts[0].count == sum(p.numel() for p in policy.backbone.parameters())
    assert found.costs.prefix.flops > 0 and found.costs.denoise.flops > 0
    read = backbone.prompt_ids.shape[1]
    (folder / "tokenizer.json").unlink()
    longest = planned.__wrapped__(f"policy.path={folder}")
    assert 0 < read < longest.draft.policy.backbone.prompt_ids.shape[1] == 48
    assert any("instructions: 48 tokens" in note for note in longest.assumed.notes)
    own = planned.__wrapped__(f"policy.path={tmp_path / 'own'}")
    assert own.parts[0].count == found.parts[0].count
    assert own.draft.policy.backbone.prompt_ids.shape[0] == len(SPEC.instructions)


def test_act(tmp_path):
    from tiny_act import SIDE, A, H, M, write

    folder = write(tmp_path / "act")
    weights = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    found = planned.__wrapped__(f"policy.path={folder}")
    backbone, storage = found.draft.policy.backbone, found.storage
    assert (backbone.chunk_size, backbone.action_dim) == (H, A)
    state = backbone.network.sizes.state_dim
    assert backbone.feature_dim == 3 * M + state
    assert storage.observations == 2 * SIDE * SIDE * 3 + 4 * state
    assert storage.features == 4 * (3 * M + state + H * A)
    # the file has the variational encoder besides, which only training by imitation reads
    assert 0 < 4 * found.parts[0].count < weights
    assert found.costs.prefix.flops > 0 == found.costs.denoise.flops


@pytest.mark.e2e
def test_full_size():
    """References: 1.44 and 2.70 TFLOP for the prefix, 0.34 and 0.36 for ten steps."""
    for cameras, prefix, denoise in ((1, 1.44, 0.34), (2, 2.70, 0.36)):
        words = ("policy.path=lerobot/pi0_base", "policy.dtype=bfloat16", "env.num_envs=1")
        found = planned(*words, cameras=cameras, image_size=224)
        assert found.parts[0].count == 3_501_372_176
        assert found.costs.prefix.flops / 1e12 == pytest.approx(prefix, rel=0.02)
        assert found.costs.denoise.flops / 1e12 == pytest.approx(denoise, rel=0.03)
        assert found.parts[0].nbytes == pytest.approx(2 * 3_501_372_176, rel=1e-4)
        assert any("is not on this machine" in note for note in found.assumed.notes)


# ---------------------------------------------------------------- devices


def test_time_is_the_slower_of_two_bounds(default):
    device = name_devices("mine", tflops=1.0, memory_gib=1.0, bandwidth=1.0)[0]
    seen = outlook(default, device, None)
    heads = default.costs.heads
    assert seen.update_s == max(heads.flops / 1e12, heads.weight_bytes / 1e9)
    assert seen.update_eager_s == max(seen.update_s, heads.kernels * 5e-6)
    assert seen.spare == -default.memory, "all of its memory is reserved"
    inferences, updates, evaluations = work(default)
    assert (inferences, updates) == (12_500, math.ceil(50_000 / 64) * 32)
    assert evaluations == (1 + 5 + 2) * 25 * 50
    assert seen.train_s == pytest.approx(inferences * seen.inference_s + updates * seen.update_s)
    slow = outlook(default, device, 100.0)
    assert slow.env_s == (500, 8 * 100 * 50 / 100)
    assert slow.total_s == pytest.approx(sum(slow.env_s))


def test_precision_chooses_the_peak():
    h100 = KNOWN["h100"]
    assert h100.single < h100.half and h100.tf32 < h100.half
    assert Cost("float32", 10.0, 2, 4, 6).rows(2, 4) == Cost("float32", 20.0, 2, 4, 12)


def test_what_does_not_fit_says_what_helps(pi0_folder):
    small = name_devices("small", tflops=1.0, memory_gib=1.0001)
    words = (f"policy.path={pi0_folder}", "policy.cache_features=false", "algorithm.batch_size=16")
    found = planned(*words, "policy.trainable=full")
    seen = outlook(found, small[0], None)
    assert seen.spare < 0
    keys = {key.partition("=")[0] for key, _ in seen.cures}
    assert {"policy.micro_batch", "policy.gradient_checkpointing"} <= keys
    assert "algorithm.replay_buffer.cache_device" in keys
    printed = text(found, [seen], [])
    assert "does not fit" in printed and "policy.micro_batch=4" in printed
    roomy = outlook(found, KNOWN["h100"], None)
    assert roomy.spare == (79 - 1) * GIB - found.memory and not roomy.cures
    elsewhere = planned("algorithm.replay_buffer.cache_device=cpu")
    assert "replay cache" not in elsewhere.held
    assert "in the computer's memory" in text(elsewhere, [roomy], [])


def test_devices_share_the_batch(default):
    shared = planned(devices=4)
    assert (shared.batch_rows, shared.acting_rows) == (B // 4, 1)
    assert shared.costs.heads.flops == pytest.approx(default.costs.heads.flops / 4)
    assert shared.held["weights"] == default.held["weights"]


def test_devices_share_the_cache():
    bound = "algorithm.replay_buffer.cache_bytes=4000"
    caches = [planned(bound, devices=devices).storage for devices in (1, 4)]
    assert [cache.cache_rows for cache in caches] == [n // caches[0].cached for n in (4000, 1000)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": "h10"}, "gpu='h10' is not in the table. Known: a100, "),
        ({"names": "h10"}, "Did you mean 'h100'?"),
        ({"names": "tpu", "tflops": 1.0}, "add gpu_tflops= and gpu_memory_gib="),
        ({"names": "h100", "tflops": 1.0, "memory_gib": 1.0}, "gpu=h100 is in the table already"),
        ({"names": "cpu"}, "gpu=cpu needs gflops="),
        ({"names": []}, "names no device"),
    ],
)
def test_unknown_devices(given, message):
    with pytest.raises(UserError) as error:
        name_devices(given.pop("names"), **given)
    assert message in str(error.value)


def test_named_devices():
    assert [d.name for d in name_devices("h100,RTX4090")] == ["h100", "rtx4090"]
    assert [d.name for d in name_devices(["t4", "cpu"], gflops=100.0)] == ["t4", "cpu"]
    assert [d.name for d in name_devices(None, gflops=100.0)] == ["cpu"]
    assert len(name_devices(None)) == len(KNOWN)


# ---------------------------------------------------------------- the command line


def test_the_words_of_train(capsys, tmp_path):
    path = tmp_path / "plan.json"
    args = ["algorithm.q_head_type=default", "gpu=cpu", "gflops=100", f"json={path}"]
    assert plan.main([*args, "env_steps_per_s=400"]) == 0
    printed = capsys.readouterr().out
    for word in ("critics, target", "episodes of 50 steps", "cpu: fits", "ceilings, not promises"):
        assert word in printed, printed
    assert not [line for line in printed.splitlines() if line != line.rstrip()]
    written = json.loads(path.read_text())
    assert written["outlook"][0]["device"] == "cpu" and written["outlook"][0]["fits"]
    assert written["memory"]["total"] == planned("algorithm.q_head_type=default").memory
    assert plan.main([*args[:-1], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in again.items() if k != "outlook"} == {
        k: v for k, v in written.items() if k != "outlook"
    }


def test_a_recorded_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("algorithm: {q_head_type: default}\n")
    assert plan.main([f"resume={tmp_path}", "gflops=100"]) == 0
    assert "q_head_type=default" in capsys.readouterr().out
    with pytest.raises(UserError, match="not a run folder"):
        plan.main([f"resume={tmp_path}/none"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy.path=pickcube_state"], "no folder pickcube_state"),
        (["policy.path=null"], "assume.state_dim= and assume.action_dim="),
        (["policy.path=null", "policy.backbone=small_vla"], "without its policy folder"),
        (["actor.type=noise"], "draws none"),
        (["policy.trainable=full", "policy.cache_features=false"], "has no such weights"),
        (["gpus=0"], "gpus=0 is out of range"),
        (["gpu=a1000"], "Known: a100"),
        (["gpu=h100", "json=/nowhere/at/all.json"], "cannot write it"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError) as error:
        plan.main(words)
    assert message in str(error.value)


def test_damaged_folders(tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    path = f"policy.path={folder}"
    for content, message in (
        ("{", "cannot read"),
        ("[]", "it is no object"),
        ('{"type": "rt2"}', "its type 'rt2' is of no known layout"),
        ('{"format": "embodied_rl.policy", "backbone": {"type": "state"}}', "not describe a"),
        ('{"format": "embodied_rl.policy", "backbone": {"type": "rt2"}}', "'rt2' is not a known"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            planned.__wrapped__(path)
    good = {"state_dim": 3, "action_dim": 2, "hidden": [4]}
    told = {"format": "embodied_rl.policy", "backbone": {"type": "state", **good}, "actor": None}
    (folder / "config.json").write_text(json.dumps(told))
    assert planned.__wrapped__(path).download is None
    weights = folder / "model.safetensors"
    weights.write_bytes((10).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="is damaged or truncated"):
        planned.__wrapped__(path)
    os.truncate(weights, 3)
    with pytest.raises(UserError, match="is damaged or truncated"):
        planned.__wrapped__(path)


def test_every_sketch_is_of_a_backbone():
    assert set(SKETCHES.names) <= set(BACKBONES.names)


def test_nothing_is_changed_by_reporting(default):
    seen = [outlook(default, KNOWN["t4"], None)]
    dumped = json.dumps(document(default, seen, default.assumed.notes))
    assert json.loads(dumped)["flops"]["update"] == default.costs.heads.flops
