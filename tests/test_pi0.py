"""The π0 backbone: numbers against transformers' own, folders, refusals. Tiny random weights."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny_pi0
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_imports import imports, own_imports
from tiny_pi0 import (
    BASE,
    HIDDEN,
    SPEC,
    STATE_DIM,
    STATISTICS,
    TOKENS,
    WRIST,
    backbone,
    lerobot_folder,
    observations,
    transformers_folder,
    write_tokenizer,
)
from transformers import PI0Config

from embodied_rl.backbones import lerobot_hub
from embodied_rl.backbones.flow_times import draw_times
from embodied_rl.backbones.images import to_pixels
from embodied_rl.backbones.lerobot_normalise import MODES, Normaliser
from embodied_rl.backbones.pi0 import Pi0Backbone
from embodied_rl.backbones.pi0_network import build_network, from_lerobot
from embodied_rl.backbones.pi0_settings import Pi0Settings
from embodied_rl.backbones.prompts import encode, load_tokenizer, pad_prompts
from embodied_rl.config import Config, PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.types import ArraySpec, EnvSpec

pytestmark = pytest.mark.unit
B, H, A, W = 5, 3, 2, 6


@pytest.fixture(scope="module")
def pi0():
    torch.manual_seed(0)
    return backbone()


@pytest.fixture(scope="module")
def obs():
    return observations()


@pytest.fixture
def noise():
    return torch.randn(B, H, W, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    torch.manual_seed(0)
    return lerobot_folder(tmp_path_factory.mktemp("lerobot"))


def load(folder, **options) -> Pi0Backbone:
    made = Pi0Backbone.from_folder(folder, PolicyConfig(path=str(folder), **options))
    return made.requires_grad_(False)


def without(*keys: str, **changes) -> EnvSpec:
    """SPEC without some observations."""
    kept = {k: v for k, v in SPEC.obs.items() if k not in keys}
    arguments = {"obs": kept, "instructions": SPEC.instructions, **changes}
    return EnvSpec(arguments["obs"], changes.get("action_dim", A), 20, "cubes", SPEC.instructions)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- equal to transformers


def test_chunks_equal_sample_actions(pi0, obs, noise):
    _, context = pi0.prefix(obs)
    expected = pi0.network.sample_actions(**pi0.inputs(obs), noise=noise)
    assert torch.equal(pi0.integrate(context, noise), expected)
    assert torch.equal(pi0.denoise(context, noise), expected[..., :A])  # no statistics
    assert (expected - noise).std() > 0.1, "the network does something"


def test_velocity_equals_forward_with_images(pi0, obs, noise):
    _, context = pi0.prefix(obs)
    time = torch.full((B,), 0.3)
    expected = pi0.network(**pi0.inputs(obs), noise=noise, timestep=time).logits
    assert torch.equal(pi0.velocity(context, noise, 0.3), expected)


def test_gradient_equals_that_of_transformers_forward(pi0, obs, noise):
    _, context = pi0.prefix(obs)
    mine, theirs = (noise.clone().requires_grad_() for _ in range(2))
    pi0.integrate(context, mine).square().sum().backward()
    x, inputs, steps = theirs, pi0.inputs(obs), pi0.network.config.num_inference_steps
    for step in range(steps):
        time = torch.full((B,), 1 - step / steps)
        x = x - pi0.network(**inputs, noise=x, timestep=time).logits / steps
    x.square().sum().backward()
    # -1/4 v is (-1/4) v: the steps are exact here, the order of additions is not
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_gradient_by_finite_differences(monkeypatch):
    # Gemma's norms compute in float32 whatever the weights' precision
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    double = backbone().double()
    rng = torch.Generator().manual_seed(3)
    _, context = double.prefix(observations(count=2))
    x = torch.randn(2, H, W, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, H, A, generator=rng, dtype=torch.float64)
    (double.denoise(context, x) * weight).sum().backward()
    assert x.grad is not None
    for _ in range(3):
        direction = torch.randn(2, H, W, generator=rng, dtype=torch.float64)
        step = 1e-5 * direction
        with torch.no_grad():
            ends = [(double.denoise(context, x + s) * weight).sum() for s in (step, -step)]
        slope = float(ends[0] - ends[1]) / 2e-5
        # central differences: error of order 1e-10 times third derivatives
        assert slope == pytest.approx(float((x.grad * direction).sum()), rel=1e-6, abs=1e-8)


def test_denoising_leaves_the_context_alone(pi0, obs, noise):
    _, context = pi0.prefix(obs)
    before = copy.deepcopy(context)
    first = pi0.denoise(context, noise)
    assert torch.equal(first, pi0.denoise(context, noise))
    for a, b in zip(context.keys + context.values, before.keys + before.values, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(context.mask, before.mask) and torch.equal(context.state, before.state)


def test_repeat_and_samples(pi0, obs):
    _, context = pi0.prefix(obs)
    draws = torch.randn(B * 3, H, W, generator=torch.Generator().manual_seed(4))
    chunks = pi0.denoise(pi0.repeat(context, 3), draws).unflatten(0, (B, 3))
    alone = torch.stack(
        [pi0.denoise(context, draws.unflatten(0, (B, 3))[:, i]) for i in range(3)], 1
    )
    torch.testing.assert_close(chunks, alone, rtol=1e-5, atol=1e-6)
    features = pi0(obs, 3, torch.Generator().manual_seed(4))
    torch.testing.assert_close(features.base_action, alone[:, 0].clamp(-1, 1), rtol=1e-5, atol=1e-6)
    assert features.candidates is not None and features.candidates.shape == (B, 2, H, A)
    assert pi0(obs, 0).base_action.abs().max() == 0


# ---------------------------------------------------------------- training


def test_loss_and_gradient_equal_transformers(pi0, obs):
    chunks = torch.rand(B, H, A, generator=torch.Generator().manual_seed(7)) * 2 - 1
    trained, theirs = copy.deepcopy(pi0), copy.deepcopy(pi0.network)
    trained.action = Normaliser("MEAN_STD", [0.1, 0.2], [0.5, 2.0])
    trained.requires_grad_(True), theirs.requires_grad_(True)
    inputs = trained.inputs(obs)
    loss = trained.imitation_loss(inputs, chunks, torch.Generator().manual_seed(8))
    rng = torch.Generator().manual_seed(8)
    noise = torch.randn(B, H, W, generator=rng)
    time = torch.rand(B, generator=rng) ** (1 / 1.5) * 0.999 + 0.001
    actions = (chunks - torch.tensor([0.1, 0.2])) / (torch.tensor([0.5, 2.0]) + 1e-8)
    actions = torch.nn.functional.pad(actions, (0, W - A))
    expected = theirs(**inputs, actions=actions, noise=noise, timestep=time).loss
    assert torch.equal(loss, expected)
    loss.backward(), expected.backward()
    for mine, other in zip(trained.network.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, other.grad)


def test_times_are_beta_distributed():
    """Beta(1.5, 1): mean 0.6, variance 1.5 / (2.5^2 3.5) = 0.0686; errors of 1e5 draws: 0.1 %."""
    times = draw_times(100_000, torch.Generator().manual_seed(9))
    times = (times - 0.001) / 0.999
    assert float(times.mean()) == pytest.approx(0.6, rel=0.01)
    assert float(times.var()) == pytest.approx(0.0686, rel=0.02)


def test_recomputing_changes_no_gradient(pi0, obs):
    plain, again = copy.deepcopy(pi0), copy.deepcopy(pi0)
    again.enable_checkpointing()
    weight = torch.randn(pi0.feature_dim, generator=torch.Generator().manual_seed(10))
    calls = []
    layer = again.network.model.vlm.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(None))
    for backbone_ in (plain, again):
        backbone_.requires_grad_(False)
        for block in backbone_.blocks():
            block.requires_grad_(True)
        (backbone_(obs, 0).vector @ weight).sum().backward()
    assert len(calls) == 2, "once forward, once again for the backward pass"
    assert not any(m.training for m in again.network.modules())
    trained = 0
    for mine, other in zip(again.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None) == (not mine.requires_grad)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)
            trained += 1
    vlm = again.network.model.vlm
    assert trained == len(list(vlm.parameters())), "blocks() are all of the prefix, once"
    with torch.no_grad():
        assert again.prefix(obs)[1] is not None


# ---------------------------------------------------------------- features


def test_features_are_masked_means(pi0, obs):
    vector, _ = pi0.prefix(obs)
    assert vector.shape == (B, pi0.feature_dim) == (B, 3 * HIDDEN + STATE_DIM)
    assert vector.dtype == torch.float32
    inputs = pi0.inputs(obs)
    embeds = pi0.network.model.embed_prefix(
        inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"]
    )
    mask = inputs["attention_mask"]
    hidden = pi0.network.model.vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(mask),
    ).last_hidden_state
    for row in range(B):
        length = int(mask[row].sum())
        parts = [
            hidden[row, :TOKENS].mean(0),
            hidden[row, TOKENS : 2 * TOKENS].mean(0),
            hidden[row, 2 * TOKENS : length].mean(0),
            torch.cat([obs["agent.qpos"][row], obs["extra.is_grasped"][row].float()[None]]),
        ]
        torch.testing.assert_close(vector[row], torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(pi0, obs, noise):
    """The shorter instruction is padded beside the longer one, and not when it is alone."""
    rows = [i for i in range(B) if i % 2 == 0]
    alone = backbone(without(), prompts=pi0.settings.prompts)
    alone.load_state_dict(pi0.state_dict())
    one = EnvSpec(SPEC.obs, A, 20, "cubes", SPEC.instructions[:1])
    alone.check_env(one)
    both, context = pi0.prefix(obs)
    mine, other = alone.prefix({k: v[rows] for k, v in obs.items()})
    assert alone.prompt_ids.shape[1] < pi0.prompt_ids.shape[1]
    torch.testing.assert_close(mine, both[rows], rtol=1e-5, atol=1e-5)
    chunks = pi0.denoise(context, noise)[rows]
    torch.testing.assert_close(alone.denoise(other, noise[rows]), chunks, rtol=1e-5, atol=1e-5)


def test_every_input_matters(pi0, obs):
    vector, _ = pi0.prefix(obs)
    for key in (BASE, WRIST, "agent.qpos", "extra.is_grasped", "instruction"):
        other = {**obs, key: obs[key].roll(1, 0)}
        assert not torch.allclose(pi0.prefix(other)[0], vector), key
    ignored = {**obs, "sensor_param.base_camera.intrinsic_cv": obs["agent.qpos"][:, None]}
    assert torch.equal(pi0.prefix(ignored)[0], vector)


def test_absent_camera_costs_nothing_and_is_no_black_image(pi0, obs):
    """One camera gives a prefix shorter by its tokens, as transformers' mask for it means."""
    less = without(WRIST)
    single = backbone(less, prompts=pi0.settings.prompts)
    single.load_state_dict(pi0.state_dict())
    vector, context = single.prefix(obs)
    _, full = pi0.prefix(obs)
    assert context.mask.shape[1] == full.mask.shape[1] - TOKENS
    assert context.keys[0].shape[2] == context.mask.shape[1]
    assert vector.shape == (B, 2 * HIDDEN + STATE_DIM) == (B, single.feature_dim)
    black = {**obs, WRIST: torch.zeros_like(obs[WRIST])}
    draws = torch.randn(B, H, W, generator=torch.Generator().manual_seed(5))
    absent = single.denoise(context, draws)
    assert not torch.allclose(absent, pi0.denoise(pi0.prefix(black)[1], draws), atol=1e-3)
    # transformers with a second camera masked out: the same chunks
    inputs = single.inputs(obs)
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = torch.cat([pixels, torch.full_like(pixels, 9.0)], 1)
    inputs["pixel_attention_mask"] = torch.tensor([[True, False]] * B)
    theirs = single.network.sample_actions(**inputs, noise=draws)
    torch.testing.assert_close(absent, theirs[..., :A], rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_float32_features(pi0, obs, noise):
    half = backbone(dtype="bfloat16", prompts=pi0.settings.prompts)
    half.load_state_dict(pi0.state_dict())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    embeds = half.network.embed_action_time.sinusoid_embeds
    assert embeds.sinusoid_freq.dtype == torch.float32, "frequencies up to 1600 need it"
    vector, context = half.prefix(obs)
    chunks = half.denoise(context, noise)
    assert vector.dtype == chunks.dtype == torch.float32
    exact, exact_context = pi0.prefix(obs)
    # bfloat16 has 8 bits: 0.4 % per operation, a few dozen operations deep
    assert (vector - exact).norm() / exact.norm() < 0.05
    moved = pi0.denoise(exact_context, noise) - noise[..., :A]
    assert (chunks - noise[..., :A] - moved).norm() / moved.norm() < 0.1


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(128, 128), (480, 640), (100, 60)])
def test_bicubic_equals_pillow(shape):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    image = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    pixels = to_pixels(torch.from_numpy(image.copy())[None], 224, "transformers")[0]
    scale = min(224 / shape[0], 224 / shape[1])
    height, width = int(shape[0] * scale), int(shape[1] * scale)
    pil = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    levels = (pixels[:, :height, :width].permute(1, 2, 0).numpy() + 1) * 127.5
    error = np.abs(levels - pil)
    # Pillow rounds between its two passes: up to a grey level
    assert error.max() <= 1.01 and error.mean() < 0.3
    outside = pixels.clone()
    outside[:, :height, :width] = 0
    assert outside.abs().max() == 0, "transformers pads with mid-grey, at the bottom right"


def test_openpi_resize_by_hand():
    """[0, 255] over two columns to four, half-pixel centres: 0, 63.75, 191.25, 255."""
    image = torch.zeros(1, 1, 2, 3, dtype=torch.uint8)
    image[:, :, 1] = 255
    pixels = to_pixels(image, 4, "openpi")[0, 0]
    line = torch.tensor([0, 63.75, 191.25, 255]) / 127.5 - 1
    expected = torch.stack([torch.full((4,), -1.0), line, line, torch.full((4,), -1.0)])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("style", ["openpi", "transformers"])
def test_right_size_is_only_scaled(style):
    image = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    expected = image.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(to_pixels(image, 28, style), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- normalisation


def test_normalisation_by_hand():
    x = torch.tensor([[3.0, 5.0]])
    mean_std = Normaliser("MEAN_STD", [1.0, 5.0], [4.0, 0.0])
    torch.testing.assert_close(mean_std.normalise(x), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(mean_std.unnormalise(x), torch.tensor([[13.0, 5.0]]))
    for mode in ("MIN_MAX", "QUANTILES", "QUANTILE10"):
        bounds = Normaliser(mode, [1.0, 0.0], [5.0, 10.0])
        torch.testing.assert_close(bounds.normalise(x), torch.tensor([[0.0, 0.0]]))
        torch.testing.assert_close(bounds.unnormalise(x), torch.tensor([[9.0, 30.0]]))
        still = Normaliser(mode, [3.0, 0.0], [3.0, 10.0])  # a constant feature maps to -1
        torch.testing.assert_close(still.normalise(x), torch.tensor([[-1.0, 0.0]]))
    assert torch.equal(Normaliser().normalise(x), x)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "IDENTITY"])
def test_every_mode_of_a_lerobot_folder(mode, tmp_path, noise, obs):
    first, second = MODES[mode]
    statistics = {
        f"observation.state.{first}": torch.tensor([-1.0, 0.0, 1.0, 0.0]),
        f"observation.state.{second}": torch.tensor([3.0, 2.0, 1.5, 1.0]),
        f"action.{first}": torch.tensor([-0.5, 0.1]),
        f"action.{second}": torch.tensor([0.5, 0.9]),
    }
    loaded = load(lerobot_folder(tmp_path / mode, mode=mode, statistics=statistics))
    loaded.check_env(SPEC)
    vector, context = loaded.prefix(obs)
    raw = torch.cat([obs["agent.qpos"], obs["extra.is_grasped"].float()[:, None]], 1)
    low, high = statistics[f"observation.state.{first}"], statistics[f"observation.state.{second}"]
    expected = (raw - low) / high if mode == "MEAN_STD" else 2 * (raw - low) / (high - low) - 1
    torch.testing.assert_close(vector[:, -STATE_DIM:], expected, rtol=1e-5, atol=1e-6)
    padded = torch.nn.functional.pad(expected, (0, 4))  # to max_state_dim
    torch.testing.assert_close(context.state, padded, rtol=1e-5, atol=1e-6)
    chunk = loaded.integrate(context, noise)[..., :A]
    low, high = statistics[f"action.{first}"], statistics[f"action.{second}"]
    back = chunk * high + low if mode == "MEAN_STD" else (chunk + 1) / 2 * (high - low) + low
    torch.testing.assert_close(loaded.denoise(context, noise), back, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- prompts


def test_prompts(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    first, second = encode(tokenizer, ["push", "pull\n"], 48, 128)
    assert first[0] == second[0] == tokenizer.token_to_id("<bos>") == 2
    assert tokenizer.decode(first[1:]).replace(" ", "") == "push\n"
    assert tokenizer.decode(second[1:]).replace(" ", "") == "pull\n"
    ids, mask = pad_prompts([[2, 5], [2, 6, 7, 8]])
    assert ids.tolist() == [[2, 5, 0, 0], [2, 6, 7, 8]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    with pytest.raises(UserError, match=r"has \d+ tokens; .* at most 3\. Shorten"):
        encode(tokenizer, ["push the cube"], 3, 128)
    with pytest.raises(UserError, match="vocabulary ends at 4: it is another model's"):
        encode(tokenizer, ["push the cube"], 48, 5)


def test_an_environment_without_instructions_is_told_its_name(lerobot, obs):
    plain = without("instruction")
    plain = EnvSpec(plain.obs, A, 20, "PushCube-v1")
    loaded = load(lerobot)
    loaded.check_env(plain)
    assert [text for text, _ in loaded.settings.prompts] == ["PushCube-v1"]
    assert loaded.prefix({k: obs[k] for k in plain.obs})[0].shape == (B, loaded.feature_dim)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_lerobot_folder(prefix, tmp_path, obs, noise):
    """Every published name finds its place: equal weights, none missing, none unexpected."""
    torch.manual_seed(1)
    folder = lerobot_folder(tmp_path / "pi0", prefix=prefix)
    loaded = load(folder)
    torch.manual_seed(1)
    assert same(loaded.network.state_dict(), tiny_pi0.network().state_dict())
    assert loaded.settings.resize == "openpi"
    assert loaded.settings.camera_names == ["base_camera", "hand_camera", "third"]
    assert loaded.state.config_dict()["mode"] == "MEAN_STD"
    loaded.check_env(SPEC)
    # cameras by name, the third absent; state from agent.*, extra.*
    assert loaded.settings.cameras == [["base_camera", BASE], ["hand_camera", WRIST]]
    assert loaded.settings.state_keys == ["agent.qpos", "extra.is_grasped"]
    vector, context = loaded.prefix(obs)
    chunk = loaded.denoise(context, noise)
    expected = loaded.network.sample_actions(**loaded.inputs(obs), noise=noise)[..., :A]
    expected = expected * STATISTICS["action.std"] + STATISTICS["action.mean"]
    torch.testing.assert_close(chunk, expected, rtol=1e-6, atol=1e-7)
    state = torch.cat([obs["agent.qpos"], obs["extra.is_grasped"].float()[:, None]], 1)
    state = (state - STATISTICS["observation.state.mean"]) / STATISTICS["observation.state.std"]
    torch.testing.assert_close(vector[:, -STATE_DIM:], state, rtol=1e-5, atol=1e-6)


def test_lerobot_folder_without_the_experts_unread_table(tmp_path):
    folder = lerobot_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.paligemma_with_expert.gemma_expert.lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    first, second = load(folder), load(folder)
    assert first.network.model.dit.embed_tokens.weight.abs().max() == 0
    assert first.fingerprint() == second.fingerprint()


def test_transformers_folder(tmp_path, obs):
    torch.manual_seed(2)
    loaded = load(transformers_folder(tmp_path / "pi0"))
    torch.manual_seed(2)
    assert same(loaded.network.state_dict(), tiny_pi0.network().state_dict())
    assert loaded.settings.resize == "transformers"
    loaded.check_env(SPEC)
    assert loaded.action.config_dict()["first"] == STATISTICS["action.mean"].tolist()
    assert loaded(obs).base_action.shape == (B, H, A)


def test_transformers_folder_without_statistics_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load(transformers_folder(tmp_path, statistics=False))
    assert "processor_config.json is missing" in caplog.text
    assert loaded.state.config_dict()["mode"] == "IDENTITY"


def test_policy_folder_refers_to_its_source(lerobot, tmp_path, obs):
    """The policy's own folder holds no backbone weights, and acts as before."""
    options = PolicyConfig(path=str(lerobot), cameras={"third": BASE})
    policy = Policy.from_pretrained(lerobot, options)
    policy.backbone.check_env(SPEC)
    policy.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}
    again = Policy.from_pretrained(tmp_path)
    assert again.backbone.fingerprint() == policy.backbone.fingerprint()
    assert isinstance(again.backbone, Pi0Backbone)
    assert again.backbone.settings.cameras == [["third", BASE]]
    acted = [p.act(obs, generator=torch.Generator().manual_seed(6)) for p in (policy, again)]
    torch.testing.assert_close(*acted, rtol=1e-5, atol=1e-6)  # two modules: see test_registry
    again.backbone.check_env(SPEC)  # nothing is searched or encoded anew
    assert again.backbone.fingerprint() == policy.backbone.fingerprint()


def test_fingerprint_covers_the_preprocessing(pi0):
    mark, config = pi0.fingerprint(), pi0.config_dict()
    other = {
        "resize": "openpi",
        "cameras": config["cameras"][::-1],
        "prompts": config["prompts"][::-1],
        "state_keys": config["state_keys"][::-1],
        "state": Normaliser("MEAN_STD", [0.0] * 4, [1.0] * 4).config_dict(),
        "action": Normaliser("MEAN_STD", [0.0] * 2, [1.0] * 2).config_dict(),
    }
    marks = {mark}
    for key, value in other.items():
        changed = Pi0Backbone.from_config(copy.deepcopy({**config, key: value}))
        changed.load_state_dict(pi0.state_dict())
        marks.add(changed.fingerprint())
    assert len(marks) == len(other) + 1
    network = copy.deepcopy(config["network"])
    network["num_inference_steps"] = 5
    changed = Pi0Backbone.from_config({**config, "network": network})
    changed.load_state_dict(pi0.state_dict())
    assert changed.fingerprint() not in marks


# ---------------------------------------------------------------- size


def test_full_size_on_the_meta_device():
    """The published π0, by hand from its configuration.

    Gemma 2B: table 257152 x 2048; 18 layers of q, o 2048 x 2048, k, v 2048 x 256, MLP
    3 x 2048 x 16384, two norms; a norm. SigLIP so400m: patches 3 x 14^2 x 1152 + 1152, 256 places;
    27 layers of four 1152^2 + 1152, MLP 2 x 1152 x 4304 + 4304 + 1152, two norms of 2 x 1152; a
    norm. Projector 1152 x 2048 + 2048. Expert: table 257152 x 1024; 18 layers of q, o
    1024 x 2048, k, v 1024 x 256, MLP 3 x 1024 x 4096, two norms; a norm. Action and state in and
    action out 32 <-> 1024, time MLP 2048 -> 1024 -> 1024.
    """
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 16_384 + 2 * 2048
    text = 257_152 * 2048 + 18 * layer + 2048
    layer = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    vision = 3 * 14**2 * 1152 + 1152 + 256 * 1152 + 27 * layer + 2 * 1152
    layer = 2 * 1024 * 2048 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024
    expert = 257_152 * 1024 + 18 * layer + 1024
    heads = 2 * (32 * 1024 + 1024) + (1024 * 32 + 32) + (2048 + 1024) * 1024 + 2 * 1024
    expected = text + vision + 1152 * 2048 + 2048 + expert + heads
    assert expected == 3_501_372_176
    with torch.device("meta"):
        network = build_network(PI0Config(), torch.bfloat16)
        from_name = build_network(from_lerobot({"type": "pi0"}, "config.json"), torch.bfloat16)
    assert sum(p.numel() for p in network.parameters()) == expected
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in from_name.state_dict().items()}
    made = Pi0Backbone(network, Pi0Settings())
    assert (made.chunk_size, made.noise_dim, made.image_tokens) == (50, 32, 256)


# ---------------------------------------------------------------- refusals


def edit(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_refuses_environments_that_do_not_fit(lerobot):
    loaded = load(lerobot)
    with pytest.raises(UserError, match=r"made for 2 action entries, but cubes has 3\. Set env"):
        loaded.check_env(without(action_dim=3))
    with pytest.raises(UserError, match=r"cubes gives no image, only agent.qpos.*obs_mode=rgb"):
        loaded.check_env(without(BASE, WRIST))
    with pytest.raises(UserError, match=r"state of 4 entries, but cubes gives 3: agent.qpos \[3\]"):
        loaded.check_env(without("extra.is_grasped"))
    with pytest.raises(UserError, match=r"2 instructions, but no observation 'instruction'"):
        loaded.check_env(without("instruction"))


def test_refuses_a_state_that_is_too_large(tmp_path):
    loaded = load(transformers_folder(tmp_path, statistics=False))
    big = EnvSpec({**SPEC.obs, "agent.qvel": ArraySpec((5,), torch.float32)}, A, 20, "cubes")
    message = r"has 1 to 8 entries, but cubes gives 9: agent.qpos \[3\], agent.qvel \[5\], extra"
    with pytest.raises(UserError, match=message):
        loaded.check_env(big)
    chosen = load(tmp_path, state=["agent.qvel", "agent.qpos"])
    chosen.check_env(big)
    assert chosen.settings.state_dim == 8
    with pytest.raises(UserError, match=r"policy.state names 'agent.qpo', .*mean 'agent.qpos'"):
        load(tmp_path, state=["agent.qpo"]).check_env(big)


def test_refuses_cameras_that_are_not_there(lerobot, tmp_path):
    with pytest.raises(UserError, match=r"names 'base', but the policy's cameras are base_camera"):
        load(lerobot, cameras={"base": BASE})
    wrong = load(lerobot, cameras={"base_camera": "sensor_data.base_camer.rgb"})
    with pytest.raises(UserError, match=r"policy.cameras.base_camera=.*images of cubes are .*Did"):
        wrong.check_env(SPEC)
    long = load(lerobot, cameras={"observation.images.third": WRIST})
    long.check_env(SPEC)
    assert long.settings.cameras == [["third", WRIST]]
    unlike = lerobot_folder(tmp_path / "unlike", cameras=("top",))
    with pytest.raises(UserError, match=r"cannot tell which images of cubes .*policy.cameras="):
        load(unlike).check_env(SPEC)
    loaded = load(unlike)
    loaded.check_env(without(WRIST))  # one image, one camera
    assert loaded.settings.cameras == [["top", BASE]]


def test_refuses_code_in_a_folder(tmp_path):
    folder = transformers_folder(tmp_path)
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_x.X"}))
    with pytest.raises(UserError, match="needs code of its own .*trust_remote_code.*never runs"):
        load(folder)
    edit(folder / "config.json", lambda c: c.pop("auto_map"))
    edit(folder / "config.json", lambda c: c["vlm_config"].update(auto_map={"a": "b"}))
    with pytest.raises(UserError, match=r"config.json, vlm_config needs code of its own"):
        load(folder)


def test_refuses_a_missing_or_foreign_tokenizer(tmp_path, lerobot, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    folder = lerobot_folder(tmp_path / "pi0")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"hf download google/paligemma-3b-pt-224 tokenizer.json"):
        load(folder)
    with pytest.raises(UserError, match=r"policy.tokenizer=/nowhere does not exist"):
        load(lerobot, tokenizer="/nowhere")
    load(folder, tokenizer=str(lerobot))  # a folder that has one
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="damaged or no tokenizer file"):
        load(folder)


def test_refuses_an_unknown_dtype(lerobot):
    with pytest.raises(UserError, match=r"policy.dtype='int8'.*float32, bfloat16, float16"):
        load(lerobot, dtype="int8")


def test_refuses_damaged_or_foreign_weights(tmp_path):
    folder = lerobot_folder(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or truncated"):
        load(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        load(folder)
    path.write_bytes(whole)
    weights = load_file(path)
    weights["model.something_else"] = weights.pop("model.action_out_proj.bias")
    save_file(weights, path)
    with pytest.raises(UserError, match=r"1 missing \(action_out_proj.bias\); 1 unexpected"):
        load(folder)
    path.write_bytes(whole)
    edit(folder / "config.json", lambda c: c.update(max_action_dim=7))
    with pytest.raises(UserError, match="weights"):
        load(folder)
    statistics = folder / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    statistics.write_bytes(b"no")
    with pytest.raises(UserError, match=r"normalizer_processor.safetensors is missing, damaged"):
        load(folder)


def test_refuses_what_it_would_get_wrong_in_a_lerobot_folder(tmp_path):
    folder = lerobot_folder(tmp_path)
    pre = folder / "policy_preprocessor.json"
    text = pre.read_text()
    edit(pre, lambda p: p["steps"].append({"registry_name": "relative_actions", "config": {}}))
    with pytest.raises(UserError, match="the step 'relative_actions' is not one that"):
        load(folder)
    off = {"registry_name": "relative_actions", "config": {"enabled": False}}
    edit(pre, lambda p: p["steps"].__setitem__(-1, off))
    load(folder)
    pre.write_text(text)
    post = folder / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    save_file({f"so100.{k}": v for k, v in STATISTICS.items()}, post)
    with pytest.raises(UserError, match=r"no statistics of 'action', only of so100.action"):
        load(folder)
    save_file({"action.mean": torch.zeros(2)}, post)
    with pytest.raises(UserError, match="MEAN_STD needs mean and std, but .* are mean"):
        load(folder)
    save_file({"action.mean": torch.zeros(3), "action.std": torch.ones(3)}, post)
    with pytest.raises(UserError, match="the action has 2 entries in config.json, but 3 in the"):
        load(folder)
    pre.unlink()
    with pytest.raises(UserError, match="migrate_policy_normalization"):
        load(folder)


def test_base_checkpoint_without_statistics_says_so(tmp_path, caplog):
    folder = lerobot_folder(tmp_path)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit(folder / name, lambda p: [s.pop("state_file", None) for s in p["steps"]])
    with caplog.at_level(logging.WARNING):
        load(folder).check_env(SPEC)
    assert "no statistics of observation.state" in caplog.text
    assert "no statistics of action" in caplog.text


def test_encoding_before_an_environment_is_known_is_told(lerobot, obs):
    with pytest.raises(RuntimeError, match="check_env first"):
        load(lerobot).prefix(obs)


def test_from_scratch_is_refused(spec):
    with pytest.raises(UserError, match="cannot be trained from scratch on fake reach"):
        Pi0Backbone.for_env(spec)


def test_hub_names(monkeypatch, tmp_path):
    assert lerobot_hub.is_hub_id("lerobot/pi0_base")
    for other in ("pickcube_state_bc", "/tmp/x/y", "./a/b", "a/b/c", str(tmp_path)):
        assert not lerobot_hub.is_hub_id(other)
    with pytest.raises(UserError, match="no Hub repository. Allowed: owner/name"):
        lerobot_hub.download("pi0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot fetch lerobot/pi0_base .*hf download lerobot/pi0"):
        lerobot_hub.download("lerobot/pi0_base")


def test_example_config_loads():
    path = Path(__file__).parent.parent / "examples" / "finetune_pi0_maniskill.yaml"
    config, _ = load_config(Config, [f"config={path}"])
    assert config.policy.cameras == {"base_0_rgb": BASE}
    assert config.policy.state == ["agent.qpos"]
    assert set(config.env.obs_keys) == {BASE, "agent.qpos"}


def test_state_backbone_does_not_pull_transformers():
    seen, todo = set(), {"backbones.state", "backbones", "registry", "policy", "builders"}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= own_imports(module) - seen
    assert len(seen) > 10
    assert not any(name.startswith("transformers") for module in seen for name in imports(module))
