"""Distilling ACT and SmolVLA back: LeRobot's layout, byte for byte but for what was learnt."""

import pytest
import tiny_act
import tiny_smolvla
import torch
from conftest import CPU
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_lerobot import WRITE, imitator, read, shown, tensors_of
from tiny_rgb import SPEC, observations

from embodied_rl import pretrain
from embodied_rl.backbones.lerobot_buffers import is_buffer
from embodied_rl.cloning import Examples, fit
from embodied_rl.command_configs import PretrainConfig, TuneConfig
from embodied_rl.config import OptimConfig, PolicyConfig
from embodied_rl.demonstrations import shown_spec
from embodied_rl.errors import UserError
from embodied_rl.interfaces import Imitator
from embodied_rl.registry import BACKBONES
from embodied_rl.unfreeze import unfreeze

pytestmark = pytest.mark.unit
RATES = {"act": 1e-5, "smolvla": 1e-4}
HEADS = {"act": "action_head", "smolvla": "action_out_proj"}


@pytest.fixture(scope="module", params=WRITE)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["processors", "buffers"])
def source(request, kind, tmp_path_factory):
    """A folder of either age; the old SmolVLA's names are those of a compiled network."""
    return WRITE[kind](tmp_path_factory.mktemp("source") / kind, old=request.param)


def check_copied(source, out, but=()):
    """Everything is as in the source, bit for bit, but for the tensors named."""
    names = {p.name for p in source.iterdir()}
    assert {p.name for p in out.iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    before, after = tensors_of(source), tensors_of(out)
    assert list(before) == list(after)
    assert all(a.dtype == before[k].dtype for k, a in after.items())
    assert {k for k, a in after.items() if not torch.equal(a, before[k])} == set(but)


# ---------------------------------------------------------------- the layout it came from


class TestExport:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_untrained_is_its_source(self, source, tmp_path, dtype):
        backbone = imitator(source, dtype=dtype)
        backbone.to_folder(tmp_path / "out")
        check_copied(source, tmp_path / "out")
        with (
            safe_open(source / "model.safetensors", "pt") as a,
            safe_open(tmp_path / "out" / "model.safetensors", "pt") as b,
        ):
            assert a.metadata() == b.metadata()
        again = imitator(tmp_path / "out", dtype=dtype)
        assert again.weights_hash() == backbone.weights_hash()

    def test_what_was_learnt_is_there_under_the_published_name(self, kind, source, tmp_path):
        """Also in the image network, whose names differ most, and in 16 bits."""
        mixed = tmp_path / "mixed"
        imitator(source).to_folder(mixed)
        tensors, head = tensors_of(mixed), f"{HEADS[kind]}.weight"
        (name,) = [k for k in tensors if k.endswith(head)]
        tensors[name] = tensors[name].bfloat16()
        save_file(tensors, mixed / "model.safetensors")
        backbone = imitator(mixed)
        network = backbone.network
        if kind == "act":
            seen = network.backbone.encoder.stages[1].layers[0].shortcut.convolution
            place = "model.backbone.layer2.0.downsample.0.weight"
        else:
            seen = network.vlm.vision_model.encoder.layers[0].mlp.fc1
            place = "vlm_with_expert.vlm.model.vision_model.encoder.layers.0.mlp.fc1.weight"
        seen.weight.data.mul_(2)
        backbone.get_parameter(f"network.{head}").data.mul_(2)
        backbone.to_folder(tmp_path / "out")
        (changed,) = [k for k in tensors if k.endswith(place)]
        check_copied(mixed, tmp_path / "out", {name, changed})
        after = tensors_of(tmp_path / "out")
        assert all(torch.equal(after[k], 2 * tensors[k]) for k in (name, changed))
        assert after[name].dtype == torch.bfloat16
        assert imitator(tmp_path / "out").weights_hash() == backbone.weights_hash()

    def test_refuses_a_source_that_is_no_longer_what_it_was(self, kind, source, tmp_path):
        folder = tmp_path / "source"
        imitator(source).to_folder(folder)
        backbone, path, tensors = imitator(folder), folder / "model.safetensors", tensors_of(folder)
        head = f"{HEADS[kind]}.bias"
        (name,) = [k for k in tensors if k.endswith(head)]
        for change, message in (
            ({"model.vae_decoder.weight": torch.zeros(2)}, "model.vae_decoder.weight has the sha"),
            ({name: torch.zeros(9)}, rf"{head} has the shape \(9,\), the trained policy the shape"),
        ):
            save_file({**tensors, **change}, path)
            with pytest.raises(UserError, match=message):
                backbone.to_folder(tmp_path / "a")
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(UserError, match=f"no place for {head} of the trained policy"):
            backbone.to_folder(tmp_path / "b")

    def test_without_a_source(self, kind, tmp_path):
        made = {"act": tiny_act, "smolvla": tiny_smolvla}[kind].backbone()
        with pytest.raises(UserError, match="cannot be written in the layout of None"):
            made.to_folder(tmp_path / "out")


# ---------------------------------------------------------------- learning further


def untaught(kind: str, backbone: Imitator) -> set[str]:
    """Weights that no action depends on."""
    if kind == "act":  # times a latent of zero; attention among equal values
        first = "network.decoder.layers.0.self_attn.in_proj_weight"
        return {"network.encoder_latent_input_proj.weight", first}
    text, last = "network.vlm.text_model", tiny_smolvla.LAYERS - 1
    kept = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")  # the expert reads these
    inside = {k for k in backbone.state_dict() if k.startswith(f"{text}.layers.{last}.")}
    return {k for k in inside if not any(part in k for part in kept)} | {f"{text}.norm.weight"}


def tune(source, tmp_path, **options) -> PretrainConfig:
    config = PretrainConfig(init=str(source), steps=2, batch_size=4, out=str(tmp_path / "out"))
    config.tune, config.optim = TuneConfig(**options), OptimConfig(lr=1e-2)
    return config


class TestTraining:
    @pytest.mark.parametrize("trainable", ["full", "lora"])
    def test_two_steps(self, kind, source, tmp_path, trainable):
        episodes = [shown(6, 0), shown(4, 1)]
        config = tune(source, tmp_path, trainable=trainable, lora_rank=2, micro_batch=3)
        loaded, backbone = pretrain.load_init(config, {"optim.lr"})
        assert (config.backbone, config.chunk_size) == (kind, 3)
        backbone.check_env(shown_spec(episodes, SPEC.instructions, "cubes"))
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        policy = pretrain.go_on(config, loaded, backbone, episodes[:1], episodes[1:], CPU)
        after = policy.backbone.state_dict()
        assert set(after) == set(before), "no adapter is left"
        changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
        learnable = {k for k, _ in backbone.named_parameters()}
        head = f"network.{HEADS[kind]}"
        if trainable == "full":
            assert learnable - untaught(kind, backbone) <= changed <= learnable
            if kind == "smolvla":
                assert not changed & untaught(kind, backbone)
        else:
            assert f"{head}.weight" in changed and f"{head}.bias" not in changed
            assert len(changed) > 8
        pretrain.save(policy, tmp_path / "out")
        out = tmp_path / "out"
        given, written = tensors_of(source), tensors_of(out)
        learnt = {k for k, v in given.items() if not torch.equal(v, written[k])}
        assert len(learnt) == len(changed)
        check_copied(source, out, learnt)
        unread = ("vae_encoder", "lm_head", "running_")
        kept = [k for k in written if is_buffer(k) or any(part in k for part in unread)]
        assert kept and not learnt & set(kept)
        again = read(out)
        reread = again.backbone.state_dict()
        assert all(torch.equal(v, reread[k]) for k, v in after.items())
        obs, rngs = observations(), [torch.Generator().manual_seed(3) for _ in range(3)]
        policies = (again, policy, read(source))
        acted = [p.act(obs, generator=g) for p, g in zip(policies, rngs, strict=True)]
        assert torch.equal(acted[0], acted[1]) and not torch.equal(acted[0], acted[2])

    def test_a_small_batch_can_be_learnt_by_heart(self, kind, tmp_path):
        source = WRITE[kind](tmp_path / "source")
        backbone, episode = imitator(source).requires_grad_(True), shown(2)
        config = tune(source, tmp_path)
        config.steps, config.batch_size = 150, 16
        config.optim = OptimConfig(lr=1e-2, lr_scheduler="cosine", clip_grad=1.0)
        inputs, chunks = Examples(backbone, [episode], CPU).take(torch.arange(2).repeat(64))

        def loss() -> float:
            with torch.no_grad():
                rng = torch.Generator().manual_seed(5)
                return float(backbone.imitation_loss(inputs, chunks, rng))

        before = loss()
        fit(backbone, config, [episode], [], CPU)
        assert loss() < 0.15 * before  # ACT: 0.001, SmolVLA: 0.09

    def test_a_run_with_lora_in_it_starts_merged(self, kind, source, tmp_path):
        policy = read(source)
        for parameter in unfreeze(policy.backbone, PolicyConfig(trainable="lora", lora_rank=2)):
            parameter.data.add_(0.05)
        policy.trained = {"trainable": "lora", "lora_rank": 2, "last_blocks": 1}
        policy.save_pretrained(tmp_path / "run")
        obs = observations()
        wanted = policy.backbone(obs, 0).vector
        config = PretrainConfig(init=str(tmp_path / "run"))
        _, backbone = pretrain.load_init(config, set())
        torch.testing.assert_close(backbone(obs, 0).vector, wanted, rtol=1e-4, atol=1e-4)
        assert config.optim.lr == RATES[kind]
        backbone.to_folder(tmp_path / "out")
        assert torch.equal(read(tmp_path / "out").backbone(obs, 0).vector, backbone(obs, 0).vector)

    def test_sixteen_bit_weights_are_not_trained_in_place(self, kind, tmp_path):
        source = WRITE[kind](tmp_path / "source")
        config = tune(source, tmp_path, dtype="bfloat16")
        loaded, backbone = pretrain.load_init(config, set())
        backbone.check_env(SPEC)
        with pytest.raises(UserError, match=r"train torch.bfloat16 weights.*tune.trainable=lora"):
            pretrain.go_on(config, loaded, backbone, [shown()], [], CPU)
        config.tune.trainable = "lora"
        loaded, backbone = pretrain.load_init(config, set())
        backbone.check_env(SPEC)
        pretrain.save(pretrain.go_on(config, loaded, backbone, [shown()], [], CPU), tmp_path / "o")
        before, after = tensors_of(source), tensors_of(tmp_path / "o")
        assert all(v.dtype == before[k].dtype for k, v in after.items())
        assert any(not torch.equal(v, before[k]) for k, v in after.items())


def test_refuses_to_begin_from_nothing(kind):
    config = PretrainConfig(backbone=kind)
    with pytest.raises(UserError, match=f"backbone={kind} cannot be trained .* give init=<"):
        pretrain.clone(config, [shown()], [], SPEC.instructions, CPU)
    assert issubclass(BACKBONES.get(kind), Imitator)
