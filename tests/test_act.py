"""The ACT backbone: the published layout, numbers by hand, refusals. Tiny random weights."""

import logging
import math

import pytest
import tiny_act
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_act import CHUNK, HEADS, IMAGENET, A, H, M
from tiny_rgb import BASE, SIDE, SPEC, STATE, STATISTICS, WRIST, edit, observations
from torch import Tensor

from embodied_rl.backbones.act import ActBackbone
from embodied_rl.backbones.act_network import ActNetwork, ActSizes
from embodied_rl.backbones.act_resnet import build_resnet, resnet_config
from embodied_rl.backbones.act_weights import published_names, unread_shapes
from embodied_rl.builders import build_env, build_policy
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.policy import Policy
from embodied_rl.registry import ENVS
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer
from embodied_rl.types import ArraySpec, EnvSpec
from embodied_rl.unfreeze import unfreeze

pytestmark = pytest.mark.unit
B = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_act.write(tmp_path_factory.mktemp("act"))


@pytest.fixture(scope="module")
def obs():
    return observations()


def load(folder, spec: EnvSpec | None = SPEC, **options) -> ActBackbone:
    made = ActBackbone.from_folder(folder, PolicyConfig(path=str(folder), **options))
    if spec is not None:
        made.check_env(spec)
    return made.requires_grad_(False)


def without(*keys: str, **more: ArraySpec) -> EnvSpec:
    kept = {k: v for k, v in SPEC.obs.items() if k not in keys}
    return EnvSpec({**kept, **more}, A, 20, "cubes", SPEC.instructions)


# ---------------------------------------------------------------- the published layout


@pytest.mark.parametrize(("joints", "learnable"), [(14, 51_613_582), (6, 51_597_190)])
def test_full_size_names_and_shapes(joints, learnable):
    """The published ACT (LeRobot's defaults), tensor by tensor.

    `learnable` is what LeRobot itself prints at the start of training (num_learnable_params in
    public logs) for Aloha's 14 and the SO-101's 6 joints; statistics and scales of the frozen
    normalisation and fixed positions are not among them.
    """
    expected = tiny_act.transformer_shapes(
        width=512,
        inner=3200,
        chunk=100,
        action=joints,
        state=joints,
        latent=32,
        channels=512,
        layers=(4, 1, 4),
    )
    vision = tiny_act.resnet_shapes(64, [64, 128, 256, 512], [2, 2, 2, 2], False)
    convolutions = {k: s for k, s in vision.items() if len(s) == 4}
    trained = {k: s for k, s in expected.items() if k != "model.vae_encoder_pos_enc"}
    counted = sum(math.prod(s) for s in (trained | convolutions).values())
    assert counted == learnable
    expected |= vision
    sizes = ActSizes(joints, joints, 0, resnet_config("resnet18"))
    with torch.device("meta"):
        network = ActNetwork(sizes)
    own = network.state_dict()
    found = {theirs: tuple(own[ours].shape) for ours, theirs in published_names(network).items()}
    assert set(published_names(network)) == set(own)
    assert not set(found) & set(unread_shapes(sizes))
    assert {**found, **unread_shapes(sizes)} == expected


@pytest.mark.parametrize(
    ("name", "depths", "parameters"),
    [
        ("resnet18", [2, 2, 2, 2], 11_689_512),
        ("resnet34", [3, 4, 6, 3], 21_797_672),
        ("resnet50", [3, 4, 6, 3], 25_557_032),
    ],
)
def test_image_networks_are_torchvisions(name, depths, parameters):
    """torchvision publishes these counts, of convolutions, normalisations and its classifier."""
    bottleneck = name == "resnet50"
    widths = [256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512]
    shapes = tiny_act.resnet_shapes(64, widths, depths, bottleneck)
    counted = sum(math.prod(s) for k, s in shapes.items() if "running" not in k)
    assert counted + 1000 * widths[-1] + 1000 == parameters
    sizes = ActSizes(2, 0, 0, resnet_config(name), dim_model=8, dim_feedforward=8, use_vae=False)
    with torch.device("meta"):
        network = ActNetwork(sizes)
    own = network.state_dict()
    names = published_names(network)
    found = {
        theirs: tuple(own[ours].shape)
        for ours, theirs in names.items()
        if theirs.startswith("model.backbone.")
    }
    assert found == shapes


@pytest.mark.parametrize("old", [False, True], ids=["processors", "buffers"])
def test_folder(old, tmp_path, obs):
    """Every tensor finds its place, in folders of both ages: equal numbers."""
    folder = tiny_act.write(tmp_path / "act", old=old)
    loaded = load(folder)
    weights = load_file(folder / "model.safetensors")
    state = loaded.network.state_dict()
    for ours, theirs in published_names(loaded.network).items():
        assert torch.equal(state[ours], weights[theirs]), theirs
    assert loaded.state.config_dict()["first"] == STATISTICS["observation.state.mean"].tolist()
    assert loaded.action.config_dict()["second"] == STATISTICS["action.std"].tolist()
    assert loaded.settings.cameras == [["base_camera", BASE], ["hand_camera", WRIST]]
    assert loaded.settings.state_keys == ["agent.qpos", "extra.is_grasped"]
    other = load(tiny_act.write(tmp_path / "other", old=not old))
    assert torch.equal(loaded(obs).base_action, other(obs).base_action)
    assert torch.equal(loaded(obs).vector, other(obs).vector)
    assert loaded(obs).base_action.shape == (B, H, A)


def test_without_the_variational_encoder(tmp_path, folder, obs):
    """It is read by training only, so a folder stripped of it acts the same."""
    other = tiny_act.write(tmp_path / "act")
    weights = load_file(other / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("model.vae_encoder")}
    assert len(kept) < len(weights)
    save_file(kept, other / "model.safetensors")
    assert torch.equal(load(other)(obs).base_action, load(folder)(obs).base_action)


# ---------------------------------------------------------------- numbers by hand


def resnet_by_hand(w: dict[str, Tensor], image: Tensor) -> Tensor:
    """torchvision's basic ResNet, from published names."""

    def norm(x, name):
        part = f"model.backbone.{name}"
        return F.batch_norm(
            x,
            w[f"{part}.running_mean"],
            w[f"{part}.running_var"],
            w[f"{part}.weight"],
            w[f"{part}.bias"],
            False,
            0.0,
            1e-5,
        )

    def conv(x, name, stride, padding):
        return F.conv2d(x, w[f"model.backbone.{name}.weight"], None, stride, padding)

    x = F.max_pool2d(norm(conv(image, "conv1", 2, 3), "bn1").relu(), 3, 2, 1)
    for s, depth in enumerate(tiny_act.DEPTHS, 1):
        for i in range(depth):
            name, stride = f"layer{s}.{i}", 2 if s > 1 and i == 0 else 1
            y = norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", 1, 1), f"{name}.bn2")
            if f"model.backbone.{name}.downsample.0.weight" in w:
                x = norm(conv(x, f"{name}.downsample.0", stride, 0), f"{name}.downsample.1")
            x = (x + y).relu()
    return x


def positions_by_hand(rows: int, columns: int) -> Tensor:
    """[rows x columns, M], entry by entry."""
    half = M // 2
    out = torch.zeros(rows * columns, M, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            for start, place, count in ((0, r + 1, rows), (half, c + 1, columns)):
                angle = place / (count + 1e-6) * 2 * math.pi
                for j in range(half):
                    turned = angle / 10_000 ** (2 * (j // 2) / half)
                    value = math.sin(turned) if j % 2 == 0 else math.cos(turned)
                    out[r * columns + c, start + j] = value
    return out


def act_by_hand(
    w: dict[str, Tensor], obs: dict[str, Tensor], activation, pre_norm: bool = False
) -> dict[str, Tensor]:
    """One layer of each kind, sequence first as LeRobot computes, with torch's own attention."""
    w = {k.removeprefix("model."): v for k, v in w.items()} | w

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (M,), w[f"{name}.weight"], w[f"{name}.bias"])

    def attend(q, k, v, name):
        return F.multi_head_attention_forward(
            *(q, k, v, M, HEADS, w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]),
            *(None, None, False, 0.0, w[f"{name}.out_proj.weight"], w[f"{name}.out_proj.bias"]),
            training=False,
        )[0]

    def feed(x, name):
        return linear(activation(linear(x, f"{name}.linear1")), f"{name}.linear2")

    state = torch.cat([obs["agent.qpos"], obs["extra.is_grasped"].float()[:, None]], 1)
    state = (state - STATISTICS["observation.state.mean"]) / STATISTICS["observation.state.std"]
    state = state.double()
    tokens = [
        w["encoder_latent_input_proj.bias"].expand(B, M)[None],
        linear(state, "encoder_robot_state_input_proj")[None],
    ]
    places = [w["encoder_1d_feature_pos_embed.weight"]]
    for key in (BASE, WRIST):
        image = obs[key].permute(0, 3, 1, 2) / 255
        image = (image - IMAGENET["mean"]) / IMAGENET["std"]
        seen = resnet_by_hand(w, image.double())
        kernel = w["encoder_img_feat_input_proj.weight"][:, :, 0, 0]
        seen = torch.einsum("bchw,oc->hwbo", seen, kernel) + w["encoder_img_feat_input_proj.bias"]
        places.append(positions_by_hand(*seen.shape[:2]))
        tokens.append(seen.flatten(0, 1))
    count = [len(t) for t in tokens]
    x, place = torch.cat(tokens), torch.cat(places)[:, None]
    name = "encoder.layers.0"
    if pre_norm:
        y = norm(x, f"{name}.norm1")
        x = x + attend(y + place, y + place, y, f"{name}.self_attn")
        x = x + feed(norm(x, f"{name}.norm2"), name)
        x = norm(x, "encoder.norm")
    else:
        y = norm(x + attend(x + place, x + place, x, f"{name}.self_attn"), f"{name}.norm1")
        x = norm(y + feed(y, name), f"{name}.norm2")
    name, query = "decoder.layers.0", w["decoder_pos_embed.weight"][:, None]
    z = torch.zeros(CHUNK, B, M, dtype=torch.float64)
    cross = f"{name}.multihead_attn"
    if pre_norm:
        y = norm(z, f"{name}.norm1")
        z = z + attend(y + query, y + query, y, f"{name}.self_attn")
        y = norm(z, f"{name}.norm2")
        z = z + attend(y + query, x + place, x, cross)
        z = z + feed(norm(z, f"{name}.norm3"), name)
    else:
        z = norm(z + attend(z + query, z + query, z, f"{name}.self_attn"), f"{name}.norm1")
        z = norm(z + attend(z + query, x + place, x, cross), f"{name}.norm2")
        z = norm(z + feed(z, name), f"{name}.norm3")
    z = norm(z, "decoder.norm")
    chunk = linear(z, "action_head").transpose(0, 1)
    action = chunk * STATISTICS["action.std"] + STATISTICS["action.mean"]
    maps = x.split(count)[2:]
    vector = torch.cat([*(m.mean(0) for m in maps), z.mean(0), state], 1)
    return {"action": action[:, :H].clamp(-1, 1), "vector": vector, "chunk": chunk}


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_the_published_computation(activation, pre_norm, tmp_path, obs):
    """A second writing of it, from tensors by their published names.

    Weights are float64, so that only positions and inputs, float32 as published, are rounded.
    """
    folder = tiny_act.write(tmp_path, activation=activation, pre_norm=pre_norm)
    weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    features = load(folder).double()(obs)
    expected = act_by_hand(weights, obs, getattr(F, activation), pre_norm)
    torch.testing.assert_close(features.vector, expected["vector"].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        features.base_action.float(), expected["action"].float(), rtol=1e-5, atol=1e-5
    )
    assert features.base_action.std() > 0.05 and (features.base_action.abs() < 1).any()


def test_frozen_normalisation_stays_frozen(obs):
    network = build_resnet(tiny_act.RESNET)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    image = torch.randn(2, 3, SIDE, SIDE)
    first = network(image).last_hidden_state
    assert torch.equal(first, network.eval()(image).last_hidden_state)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any("num_batches" in k for k in before)


def test_every_input_matters(folder, obs):
    loaded = load(folder)
    features = loaded(obs)
    for key in (BASE, WRIST, "agent.qpos", "extra.is_grasped"):
        other = loaded({**obs, key: obs[key].roll(1, 0)})
        assert not torch.allclose(other.vector, features.vector), key
        assert not torch.allclose(other.base_action, features.base_action), key
    assert torch.equal(loaded(obs, samples=4).base_action, features.base_action)
    assert features.candidates is None


def test_images_of_another_size_are_resized(folder, obs, caplog):
    large = without(BASE, **{BASE: ArraySpec((64, 64, 3), torch.uint8)})
    with caplog.at_level(logging.WARNING):
        loaded = load(folder, large)
    assert "64 x 64 pixels and is resized to the 32 x 32" in caplog.text
    same = obs[BASE].repeat_interleave(2, 1).repeat_interleave(2, 2)
    shrunk, exact = loaded.pixels({**obs, BASE: same})[0], loaded.pixels(obs)[0]
    # a doubled image halved again by an antialiased filter is a slightly blurred one
    assert (shrunk - exact).abs().mean() < 0.5 * exact.abs().mean()
    wide = without(BASE, **{BASE: ArraySpec((32, 64, 3), torch.uint8)})
    with pytest.raises(UserError, match=r"gives 32 x 32 pixels .* cubes 32 x 64: another aspect"):
        load(folder, wide)


def test_environment_state(tmp_path):
    """A token of its own, from `environment_state` or what lies under `extra.`."""
    folder = tiny_act.write(tmp_path, cameras=(), environment=3, state=3)
    edit_statistics(folder, {"observation.state.mean": 3, "observation.state.std": 3})
    bare = {"agent.qpos": ArraySpec((3,), torch.float32)}
    grouped = EnvSpec(
        {**bare, "extra.goal": ArraySpec((2,), torch.float32), "extra.on": ArraySpec((), bool_)},
        *(A, 20, "points"),
    )
    loaded = load(folder, grouped)
    assert loaded.settings.environment_keys == ["extra.goal", "extra.on"]
    assert loaded.settings.state_keys == ["agent.qpos"] and loaded.feature_dim == M + 6
    obs = observations(grouped)
    features = loaded(obs)
    raw = torch.cat([obs["extra.goal"], obs["extra.on"].float()[:, None]], 1)
    torch.testing.assert_close(features.vector[:, -3:], (raw - 0.25) / 0.5)
    moved = loaded({**obs, "extra.goal": obs["extra.goal"] + 1})
    assert not torch.allclose(moved.base_action, features.base_action)
    named = EnvSpec({**bare, "environment_state": bare["agent.qpos"]}, A, 20, "points")
    assert load(folder, named).settings.environment_keys == ["environment_state"]
    with pytest.raises(UserError, match=r"environment state of 3 entries, but points gives 0: no"):
        load(folder, EnvSpec(bare, A, 20, "points"))


@pytest.mark.parametrize("old", [False, True], ids=["processors", "buffers"])
def test_without_a_state(old, tmp_path, obs, caplog):
    folder = tiny_act.write(tmp_path, state=0, old=old)
    with caplog.at_level(logging.WARNING):
        loaded = load(folder)
    assert "statistics" not in caplog.text
    features = loaded(obs)
    assert features.vector.shape == (B, 3 * M) and loaded.settings.state_keys == []
    assert not torch.allclose(loaded({**obs, BASE: obs[WRIST]}).base_action, features.base_action)


bool_ = torch.bool


def edit_statistics(folder, sizes: dict[str, int]) -> None:
    for path in folder.glob("policy_*.safetensors"):
        told = load_file(path)
        save_file({k: v[: sizes.get(k, len(v))].clone() for k, v in told.items()}, path)


# ---------------------------------------------------------------- our own folders


def test_policy_folder_refers_to_its_source(folder, tmp_path, obs):
    options = PolicyConfig(path=str(folder), cameras={"base_camera": WRIST, "hand_camera": BASE})
    policy = Policy.from_pretrained(folder, options)
    assert isinstance(policy.backbone, ActBackbone)
    policy.backbone.check_env(SPEC)
    policy.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}
    again = Policy.from_pretrained(tmp_path)
    assert again.backbone.fingerprint() == policy.backbone.fingerprint()
    assert torch.equal(again.act(obs), policy.act(obs))
    assert not torch.equal(again.act(obs), load(folder)(obs).base_action), "cameras swapped"


def test_fingerprint_covers_weights_and_preprocessing(folder, tmp_path):
    marks = {load(folder).fingerprint(), load(tiny_act.write(tmp_path / "a", seed=1)).fingerprint()}
    swapped = {"base_camera": WRIST, "hand_camera": BASE}
    marks.add(load(folder, cameras=swapped).fingerprint())
    marks.add(load(folder, state=["extra.is_grasped", "agent.qpos"]).fingerprint())
    other = tiny_act.write(tmp_path / "b")
    for path in other.glob("policy_pre*.safetensors"):
        told = load_file(path)
        told["observation.images.base_camera.mean"] += 0.1
        save_file(told, path)
    marks.add(load(other).fingerprint())
    assert len(marks) == 5


def test_bfloat16(folder, obs):
    half, exact = load(folder, dtype="bfloat16"), load(folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    features = half(obs)
    assert features.vector.dtype == features.base_action.dtype == torch.float32
    expected = exact(obs)
    # bfloat16 has 8 bits: 0.4 % per operation, a few dozen operations deep
    assert (features.vector - expected.vector).norm() / expected.vector.norm() < 0.2


@pytest.mark.parametrize("how", ["full", "last", "lora"])
def test_training_reaches_the_features(how, folder, obs):
    """All that training may change gets a gradient through the features, and only that."""
    loaded = ActBackbone.from_folder(folder, PolicyConfig(path=str(folder)))
    loaded.check_env(SPEC)
    before = loaded(obs).vector.detach()
    trained = unfreeze(loaded, PolicyConfig(trainable=how, lora_rank=2))
    torch.testing.assert_close(loaded(obs).vector, before)
    loaded(obs).vector.square().sum().backward()
    assert trained and all(p.grad is not None for p in trained)
    if how == "full":
        head = {id(p) for p in loaded.network.action_head.parameters()}
        everything = {id(p) for p in loaded.parameters()}
        assert {id(p) for p in trained} == everything - head


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "trained"])
def test_a_run_of_updates(cached, folder, make_config, monkeypatch, tmp_path):
    """policy.path=<folder> trains a residual on what the environment shows."""
    monkeypatch.setitem(ENVS._table, "fake", "tiny_rgb:make_rgb")
    config = make_config(
        f"policy.path={folder}",
        "actor.type=residual",
        "algorithm.q_head_type=crossq",
        "algorithm.batch_size=4",
        f"policy.cache_features={str(cached).lower()}",
        *([] if cached else ["policy.trainable=last"]),
        "rollout.steps=24",
        "train.total_steps=96",
        "algorithm.update_epoch=2",
        "eval.interval=0",
    )
    env = build_env(config.env, config.env.num_envs, CPU)
    with StopRequest() as stop:
        policy = build_policy(config, env.spec, CPU)
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        (tmp_path / "run").mkdir()
        results = Trainer(config, tmp_path / "run", env, policy, CPU, stop).run(resume=False)
    assert results["updates"] >= 2
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("actor.") for k in moved)
    assert any(k.startswith("backbone.network.decoder") for k in moved) == (not cached)
    saved = Policy.from_pretrained(tmp_path / "run")
    assert saved.act(observations()).shape == (B, H, A)


# ---------------------------------------------------------------- refusals


def test_refuses_environments_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"looks through the cameras base_camera, hand_camera, all"):
        load(folder, without(WRIST))
    with pytest.raises(UserError, match=r"cubes gives no image, only agent.qpos.*obs_mode=rgb"):
        load(folder, without(BASE, WRIST))
    with pytest.raises(UserError, match=r"state of 4 entries, but cubes gives 3: agent.qpos \[3\]"):
        load(folder, without("extra.is_grasped"))
    with pytest.raises(UserError, match=r"made for 2 action entries, but cubes has 7\. Set env"):
        load(folder, EnvSpec(SPEC.obs, 7, 20, "cubes"))
    with pytest.raises(UserError, match=r"names 'top', but the policy's cameras are base_camera"):
        load(folder, cameras={"top": BASE})
    with pytest.raises(UserError, match=r"policy.backbone=act cannot be trained from scratch"):
        ActBackbone.for_env(SPEC)


def test_refuses_missing_statistics(tmp_path):
    folder = tiny_act.write(tmp_path / "new")
    pre = next(folder.glob("policy_pre*.safetensors"))
    told = load_file(pre)
    save_file({k: v for k, v in told.items() if "hand_camera" not in k}, pre)
    with pytest.raises(UserError, match=r"MEAN_STD, but .* no statistics of observation.images.ha"):
        load(folder)
    save_file({k: v for k, v in told.items() if not k.startswith("observation.state")}, pre)
    with pytest.raises(UserError, match=r"no statistics of observation.state. Copy policy_pre"):
        load(folder)
    save_file({**told, "observation.state.mean": torch.zeros(2)}, pre)
    with pytest.raises(UserError, match=r"statistics of 2 and 4 entries"):
        load(folder)
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(UserError, match=r"policy_preprocessor.json is missing"):
        load(folder)
    old = tiny_act.write(tmp_path / "old", old=True)
    weights = load_file(old / "model.safetensors")
    name = "normalize_inputs.buffer_observation_state.std"
    save_file({**weights, name: torch.full((STATE,), torch.inf)}, old / "model.safetensors")
    with pytest.raises(
        UserError, match=r"buffer_observation_state.* infinite: .*without a dataset"
    ):
        load(old)
    del weights[name]
    save_file(weights, old / "model.safetensors")
    with pytest.raises(UserError, match=r"MEAN_STD needs mean and std, but .* are mean"):
        load(old)


def test_refuses_foreign_or_damaged_weights(tmp_path):
    folder = tiny_act.write(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    weights = load_file(path)
    weights["model.something_else"] = weights.pop("model.action_head.bias")
    save_file(weights, path)
    with pytest.raises(UserError, match=r"1 missing \(model.action_head.bias\); 1 unexpected \(mo"):
        load(folder)
    path.write_bytes(whole)
    edit(folder / "config.json", lambda c: c.update(dim_feedforward=32))
    with pytest.raises(UserError, match=r"of another shape \(model.decoder.layers.0.linear1"):
        load(folder)
    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"model.safetensors is missing, damaged or truncated"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_backbone": "vit"}, r"vision_backbone='vit'. Allowed: resnet18, resnet34"),
        ({"feedforward_activation": "glu"}, r"feedforward_activation='glu'. Allowed: relu, gelu"),
        ({"n_obs_steps": 2}, r"n_obs_steps=2. Allowed: 1"),
        ({"replace_final_stride_with_dilation": 1}, r"dilation=true. Allowed: false"),
        ({"chunk_size": "x"}, r"chunk_size='x'. Allowed: whole numbers"),
        ({"n_action_steps": 6}, r"n_action_steps=6. Allowed: up to chunk_size=5"),
        ({"n_heads": 3}, r"dim_model=16. Allowed: multiples of 4 and of n_heads=3"),
        ({"use_vae": "yes"}, r"use_vae='yes'. Allowed: True, False"),
        ({"output_features": {}}, r"output_features must have 'action'"),
        ({"backbone_config": {"depths": [1]}}, r"backbone_config must have depths, embedding_size"),
    ],
)
def test_refuses_what_it_does_not_do(change, message, tmp_path):
    folder = tiny_act.write(tmp_path)
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(UserError, match=message):
        load(folder)


def test_refuses_unknown_inputs(tmp_path):
    folder = tiny_act.write(tmp_path)

    def add(name, kind, shape):
        feature = {"type": kind, "shape": shape}
        edit(folder / "config.json", lambda c: c["input_features"].update({name: feature}))

    add("observation.language", "LANGUAGE", [8])
    with pytest.raises(UserError, match=r"'observation.language' of type 'LANGUAGE' is unknown"):
        load(folder)
    edit(folder / "config.json", lambda c: c["input_features"].pop("observation.language"))
    add("observation.images.base_camera", "VISUAL", [1, 32, 32])
    with pytest.raises(UserError, match=r"shape \[1, 32, 32\]. Allowed: \[3, height, width\]"):
        load(folder)


def test_tells_of_temporal_ensembling(tmp_path, caplog):
    folder = tiny_act.write(tmp_path)
    change = {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}
    edit(folder / "config.json", lambda c: c.update(change))
    with caplog.at_level(logging.WARNING):
        loaded = load(folder)
    assert "temporal_ensemble_coeff is not done here" in caplog.text and loaded.chunk_size == 1
    assert "ACT reads no instruction" in caplog.text
