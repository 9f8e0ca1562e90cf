"""The SmolVLA backbone: the published layout, numbers by hand, refusals. Tiny random weights."""

import copy
import math

import pytest
import tiny_smolvla
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_rgb import BASE, SIDE, SPEC, STATE, STATISTICS, WRIST, edit, observations
from tiny_smolvla import LAYERS, STEPS, TOKENS, A, H, M, S, W, X
from torch import Tensor

from embodied_rl.backbones.images import to_pixels
from embodied_rl.backbones.prompts import encode, load_tokenizer
from embodied_rl.backbones.smolvla import SmolVLABackbone
from embodied_rl.backbones.smolvla_network import SmolVLANetwork
from embodied_rl.backbones.smolvla_sizes import PUBLISHED, SMOLVLM, read_sizes
from embodied_rl.backbones.smolvla_weights import published_names, unread_shapes
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
B = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_smolvla.write(tmp_path_factory.mktemp("smolvla"))


@pytest.fixture(scope="module")
def obs():
    return observations(count=B)


@pytest.fixture
def noise():
    return torch.randn(B, H, W, generator=torch.Generator().manual_seed(1))


def load(folder, spec: EnvSpec | None = SPEC, **options) -> SmolVLABackbone:
    made = SmolVLABackbone.from_folder(folder, PolicyConfig(path=str(folder), **options))
    if spec is not None:
        made.check_env(spec)
    return made.requires_grad_(False)


def without(*keys: str, **changes) -> EnvSpec:
    kept = {k: v for k, v in SPEC.obs.items() if k not in keys}
    texts = changes.get("instructions", SPEC.instructions)
    return EnvSpec(kept, changes.get("action_dim", A), 20, "cubes", texts)


# ---------------------------------------------------------------- the published layout


def test_full_size_names_and_shapes():
    """lerobot/smolvla_base, tensor by tensor, from LeRobot's default config alone.

    The four numbers are public inventories of that file and LeRobot's own log (500 tensors,
    num_total_params=450046176, num_learnable_params=99880992 with the VLM frozen).
    """
    published = PUBLISHED[SMOLVLM]
    expected = tiny_smolvla.shapes(
        text=published["text_config"],
        vision=published["vision_config"],
        scale=4,
        layers=16,
        expert=720,
        expert_inner=2048,
        state=32,
        action=32,
    )

    def count(*starts: str) -> int:
        return sum(math.prod(s) for k, s in expected.items() if k.startswith(starts))

    expert, vlm = "model.vlm_with_expert.lm_expert.", "model.vlm_with_expert.vlm."
    assert len(expected) == 500 and count("model.") == 450_046_176
    assert count(vlm) == 350_165_184 and count(expert) == 98_245_840
    assert count("model.") - count(vlm) == 99_880_992
    sizes = read_sizes({"type": "smolvla"}, "config.json")
    with torch.device("meta"):
        network = SmolVLANetwork(sizes)
    own = network.state_dict()
    found = {theirs: tuple(own[ours].shape) for ours, theirs in published_names(network).items()}
    assert not set(found) & set(unread_shapes(sizes))
    assert {**found, **unread_shapes(sizes)} == expected
    assert sizes.image_tokens == 64
    assert [sizes.attends_to_actions(i) for i in range(4)] == [True, False, True, False]
    assert not list(network.buffers()), "nothing is left on the meta device"


@pytest.mark.parametrize("old", [False, True], ids=["processors", "buffers"])
def test_folder(old, tmp_path, folder, obs, noise):
    """Every tensor finds its place, in folders of both ages: equal numbers."""
    made = tiny_smolvla.write(tmp_path / "smolvla", old=old)
    loaded, weights = load(made), load_file(folder / "model.safetensors")
    state = loaded.network.state_dict()
    for ours, theirs in published_names(loaded.network).items():
        assert torch.equal(state[ours], weights[theirs]), theirs
    assert loaded.settings.camera_names == ["base_camera", "hand_camera", "third"]
    assert loaded.settings.cameras == [["base_camera", BASE], ["hand_camera", WRIST]]
    assert loaded.settings.state_keys == ["agent.qpos", "extra.is_grasped"]
    other = load(folder)
    mine, theirs = loaded.prefix(obs), other.prefix(obs)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(loaded.denoise(mine[1], noise), other.denoise(theirs[1], noise))


# ---------------------------------------------------------------- numbers by hand


def vision_by_hand(w: dict[str, Tensor], image: Tensor) -> Tensor:
    """One camera [3, 32, 32] to [TOKENS, M]; patches and shuffle entry by entry."""
    tower = "model.vlm_with_expert.vlm.model.vision_model"
    wide, patch, grid = tiny_smolvla.VISION["hidden_size"], 8, SIDE // 8
    kernel = w[f"{tower}.embeddings.patch_embedding.weight"].flatten(1)
    rows = []
    for r in range(grid):
        for c in range(grid):
            piece = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten()
            rows.append(kernel @ piece + w[f"{tower}.embeddings.patch_embedding.bias"])
    x = torch.stack(rows) + w[f"{tower}.embeddings.position_embedding.weight"]

    def norm(x, name):
        return F.layer_norm(x, (wide,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    name = f"{tower}.encoder.layers.0"
    y = norm(x, f"{name}.layer_norm1")
    q, k, v = (linear(y, f"{name}.self_attn.{p}_proj") for p in "qkv")
    heads, size = 2, wide // 2
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(1)
        out.append(weights @ v[:, part])
    x = x + linear(torch.cat(out, 1), f"{name}.self_attn.out_proj")
    y = linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    x = norm(x + linear(y, f"{name}.mlp.fc2"), f"{tower}.post_layernorm")
    blocks = []  # each 2 x 2 patches, row by row, become one token
    for r in range(0, grid, 2):
        for c in range(0, grid, 2):
            corner = [x[(r + i) * grid + c + j] for i in range(2) for j in range(2)]
            blocks.append(torch.cat(corner))
    proj = w["model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight"]
    return torch.stack(blocks) @ proj.T


def rope_by_hand(x: Tensor, places: list[int]) -> Tensor:
    """[N, heads, size]: entry i turns with entry i + size / 2 by place / 10000^(2 i / size)."""
    size = x.shape[-1]
    out = x.clone()
    for n, place in enumerate(places):
        for i in range(size // 2):
            angle = place / 10_000 ** (2 * i / size)
            a, b = x[n, :, i], x[n, :, i + size // 2]
            out[n, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[n, :, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [N, 4, size], k and v [P, 2, size]: query heads 0, 1 read key head 0; 2, 3 read 1."""
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[2])
        scores = torch.where(visible, scores, torch.finfo(torch.float32).min)
        out[:, head] = scores.softmax(1) @ v[:, shared]
    return out.flatten(1)


class ByHand:
    """One observation at a time, unpadded, from tensors by their published names; float64."""

    def __init__(self, weights: dict[str, Tensor], mode: str, every: int) -> None:
        self.w = {k: v.double() for k, v in weights.items()}
        self.self_attention = lambda i: "cross" not in mode or (every > 0 and i % every == 0)

    def linear(self, x, name):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rms(self, x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.w[f"{name}.weight"]

    def heads(self, x, name):
        return self.linear(x, name).unflatten(1, (-1, tiny_smolvla.TEXT["head_dim"]))

    def finish(self, x, out, name):
        x = x + self.linear(out, f"{name}.self_attn.o_proj")
        y = self.rms(x, f"{name}.post_attention_layernorm")
        gate = F.silu(self.linear(y, f"{name}.mlp.gate_proj"))
        return x + self.linear(
            gate * self.linear(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
        )

    def prefix(self, images: list[Tensor], ids: list[int], state: Tensor) -> Tensor:
        text = "model.vlm_with_expert.vlm.model.text_model"
        parts = [vision_by_hand(self.w, image.double()) * math.sqrt(M) for image in images]
        parts.append(self.w[f"{text}.embed_tokens.weight"][ids] * math.sqrt(M))
        padded = torch.cat([state.double(), torch.zeros(S - len(state), dtype=torch.float64)])
        parts.append(self.linear(padded[None], "model.state_proj"))
        x = torch.cat(parts)
        self.length = len(x)
        places = list(range(self.length))
        visible = torch.ones(self.length, self.length, dtype=torch.bool)
        visible[:-1, -1] = False  # only the state sees the state
        self.cache = []
        for i in range(LAYERS):
            name = f"{text}.layers.{i}"
            y = self.rms(x, f"{name}.input_layernorm")
            q, k, v = (self.heads(y, f"{name}.self_attn.{p}_proj") for p in "qkv")
            q, k = rope_by_hand(q, places), rope_by_hand(k, places)
            self.cache.append((k, v))
            x = self.finish(x, attend_by_hand(q, k, v, visible), name)
        return self.rms(x, f"{text}.norm")

    def velocity(self, noisy: Tensor, time: float) -> Tensor:
        actions = self.linear(noisy.double(), "model.action_in_proj")
        sines = torch.zeros(X, dtype=torch.float64)
        for j in range(X // 2):
            period = 0.004 * (4.0 / 0.004) ** (j / (X // 2 - 1))
            angle = 2 * math.pi * float(torch.tensor(time)) / period
            sines[j], sines[X // 2 + j] = math.sin(angle), math.cos(angle)
        x = torch.cat([actions, sines.expand(H, X)], 1)
        x = F.silu(self.linear(x, "model.action_time_mlp_in"))
        x = self.linear(x, "model.action_time_mlp_out")
        own, after = list(range(H)), list(range(self.length, self.length + H))
        seen = torch.ones(H, self.length, dtype=torch.bool)
        causal = torch.ones(H, H, dtype=torch.bool).tril()
        expert = "model.vlm_with_expert.lm_expert"
        for i in range(LAYERS):
            name = f"{expert}.layers.{i}"
            y, (keys, values) = self.rms(x, f"{name}.input_layernorm"), self.cache[i]
            q = self.heads(y, f"{name}.self_attn.q_proj")
            if self.self_attention(i):
                k = rope_by_hand(self.heads(y, f"{name}.self_attn.k_proj"), after)
                k = torch.cat([keys, k])
                v = torch.cat([values, self.heads(y, f"{name}.self_attn.v_proj")])
                visible = torch.cat([seen, causal], 1)
                out = attend_by_hand(rope_by_hand(q, after), k, v, visible)
            else:
                k = self.heads(keys.flatten(1), f"{name}.self_attn.k_proj")
                v = self.heads(values.flatten(1), f"{name}.self_attn.v_proj")
                out = attend_by_hand(rope_by_hand(q, own), k, v, seen)
            x = self.finish(x, out, name)
        return self.linear(self.rms(x, f"{expert}.norm"), "model.action_out_proj")


@pytest.mark.parametrize(
    ("mode", "every"), [("cross_attn", 2), ("cross_attn", 0), ("self_attn", 2)]
)
def test_equals_the_published_computation(mode, every, tmp_path, obs, noise):
    """A second writing of it: head by head, patch by patch, one unpadded observation at a time.

    Weights are float64 there and here, positions and times float32 as published.
    """
    folder = tiny_smolvla.write(tmp_path, mode=mode, every=every)
    loaded = load(folder).double()
    vector, context = loaded.prefix(obs)
    chunk = loaded.denoise(context, noise.double())
    hand = ByHand(load_file(folder / "model.safetensors"), mode, every)
    tokenizer = load_tokenizer(folder / "tokenizer.json", None)
    mean, std = (STATISTICS[f"observation.state.{k}"] for k in ("mean", "std"))
    lengths = set()
    for row in range(B):
        ids = tokenizer.encode(SPEC.instructions[row % 2] + "\n").ids
        lengths.add(len(ids))
        raw = torch.cat([obs["agent.qpos"][row], obs["extra.is_grasped"][row].float()[None]])
        state = (raw - mean) / std
        images = [obs[key][row].permute(2, 0, 1) / 255 * 2 - 1 for key in (BASE, WRIST)]
        hidden = hand.prefix(images, ids, state)
        parts = [hidden[c * TOKENS : (c + 1) * TOKENS].mean(0) for c in range(2)]
        parts += [hidden[2 * TOKENS : -1].mean(0), hidden[-1], state.double()]
        expected = torch.cat(parts).float()
        torch.testing.assert_close(vector[row], expected, rtol=1e-5, atol=1e-5)
        x = noise[row].double()
        for step in range(STEPS):
            x = x - hand.velocity(x, 1 - step / STEPS) / STEPS
        action = x[:, :A] * STATISTICS["action.std"] + STATISTICS["action.mean"]
        torch.testing.assert_close(chunk[row], action, rtol=1e-5, atol=1e-5)
    assert len(lengths) == 2, "one of the two prompts is padded beside the other"
    moved = loaded.integrate(context, noise.double()) - noise
    assert moved[..., :A].std() > 0.1, "the network does something"


def test_images_are_padded_at_the_left_and_top():
    """As LeRobot's resize_with_pad: bilinear, black, then scaled to [-1, 1]."""
    image = torch.full((1, 4, 8, 3), 255, dtype=torch.uint8)
    pixels = to_pixels(image, 8, "smolvla")[0, 0]
    assert torch.equal(pixels[:4], torch.full((4, 8), -1.0))
    assert torch.equal(pixels[4:], torch.full((4, 8), 1.0))


def test_prompts_have_no_first_token(folder):
    tokenizer = load_tokenizer(folder / "tokenizer.json", None)
    (ids,) = encode(tokenizer, ["push the cube"], 48, 128, None)
    assert ids == tokenizer.encode("push the cube\n").ids


# ---------------------------------------------------------------- the flow's contract


def test_absent_camera_has_no_tokens(folder, obs, noise):
    loaded, single = load(folder), load(folder, without(WRIST))
    _, full = loaded.prefix(obs)
    vector, context = single.prefix(obs)
    assert context.mask.shape[1] == full.mask.shape[1] - TOKENS
    assert vector.shape == (B, single.feature_dim) == (B, 3 * M + STATE)
    assert not torch.allclose(single.denoise(context, noise), loaded.denoise(full, noise))


def test_every_input_matters(folder, obs, noise):
    loaded = load(folder)
    vector, context = loaded.prefix(obs)
    chunk = loaded.denoise(context, noise)
    for key in (BASE, WRIST, "agent.qpos", "extra.is_grasped", "instruction"):
        other, changed = loaded.prefix({**obs, key: obs[key].roll(1, 0)})
        assert not torch.allclose(other, vector), key
        assert not torch.allclose(loaded.denoise(changed, noise), chunk), key


def test_context_is_never_changed(folder, obs, noise):
    loaded = load(folder)
    _, context = loaded.prefix(obs)
    before = copy.deepcopy(context)
    first = loaded.denoise(context, noise)
    assert torch.equal(first, loaded.denoise(context, noise))
    for a, b in zip(context.keys + context.values, before.keys + before.values, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(context.mask, before.mask)


def test_repeat_and_samples(folder, obs):
    loaded = load(folder)
    _, context = loaded.prefix(obs)
    draws = torch.randn(B * 3, H, W, generator=torch.Generator().manual_seed(4))
    chunks = loaded.denoise(loaded.repeat(context, 3), draws).unflatten(0, (B, 3))
    split = draws.unflatten(0, (B, 3))
    alone = torch.stack([loaded.denoise(context, split[:, i]) for i in range(3)], 1)
    torch.testing.assert_close(chunks, alone, rtol=1e-5, atol=1e-5)
    features = loaded(obs, 3, torch.Generator().manual_seed(4))
    torch.testing.assert_close(features.base_action, alone[:, 0].clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert features.candidates is not None and features.candidates.shape == (B, 2, H, A)


def test_gradient_by_finite_differences(folder):
    loaded = load(folder).double()
    rng = torch.Generator().manual_seed(3)
    _, context = loaded.prefix(observations(count=2))
    x = torch.randn(2, H, W, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, H, A, generator=rng, dtype=torch.float64)
    # Llama's norms round to float32 whatever the weights' precision: steps are coarse
    (loaded.denoise(context, x) * weight).sum().backward()
    direction = torch.randn(2, H, W, generator=rng, dtype=torch.float64)
    step = 3e-3 * direction
    with torch.no_grad():
        ends = [(loaded.denoise(context, x + s) * weight).sum() for s in (step, -step)]
    slope = float(ends[0] - ends[1]) / 6e-3
    assert x.grad is not None
    assert slope == pytest.approx(float((x.grad * direction).sum()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_training_reaches_the_features(how, folder, obs):
    loaded = SmolVLABackbone.from_folder(folder, PolicyConfig(path=str(folder)))
    loaded.check_env(SPEC)
    before = loaded(obs, 0).vector.detach()
    trained = unfreeze(loaded, PolicyConfig(trainable=how, lora_rank=2))
    torch.testing.assert_close(loaded(obs, 0).vector, before)
    loaded(obs, 0).vector.square().sum().backward()
    assert trained and all(p.grad is not None for p in trained)
    if how == "full":
        network = loaded.network
        prefix = {id(p) for part in (network.vlm, network.state_proj) for p in part.parameters()}
        assert {id(p) for p in trained} == prefix


def test_bfloat16(folder, obs, noise):
    half, exact = load(folder, dtype="bfloat16"), load(folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    vector, context = half.prefix(obs)
    chunk = half.denoise(context, noise)
    assert vector.dtype == chunk.dtype == torch.float32
    expected = exact.prefix(obs)[0]
    # bfloat16 has 8 bits: 0.4 % per operation, a few dozen operations deep
    assert (vector - expected).norm() / expected.norm() < 0.1


# ---------------------------------------------------------------- our own folders, runs


def test_policy_folder_refers_to_its_source(folder, tmp_path, obs):
    options = PolicyConfig(path=str(folder), cameras={"third": BASE})
    policy = Policy.from_pretrained(folder, options)
    policy.backbone.check_env(SPEC)
    policy.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}
    again = Policy.from_pretrained(tmp_path)
    assert again.backbone.fingerprint() == policy.backbone.fingerprint()
    assert isinstance(again.backbone, SmolVLABackbone)
    assert again.backbone.settings.cameras == [["third", BASE]]
    acted = [p.act(obs, generator=torch.Generator().manual_seed(6)) for p in (policy, again)]
    torch.testing.assert_close(*acted, rtol=1e-5, atol=1e-6)
    again.backbone.check_env(SPEC)  # nothing is searched or encoded anew
    assert again.backbone.fingerprint() == policy.backbone.fingerprint()
    other = load(tiny_smolvla.write(tmp_path / "other", seed=1), cameras={"third": BASE})
    assert other.fingerprint() != policy.backbone.fingerprint()


@pytest.mark.parametrize("actor", ["noise", "residual"])
def test_a_run_of_updates(actor, folder, make_config, monkeypatch, tmp_path):
    """policy.path=<folder> trains an adapter on what the environment shows."""
    monkeypatch.setitem(ENVS._table, "fake", "tiny_rgb:make_rgb")
    config = make_config(
        f"policy.path={folder}",
        f"actor.type={actor}",
        "algorithm.q_head_type=crossq",
        "algorithm.batch_size=4",
        "algorithm.update_epoch=2",
        "rollout.steps=24",
        "train.total_steps=96",
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
    assert moved and all(k.startswith("actor.") for k in moved)
    saved = Policy.from_pretrained(tmp_path / "run")
    assert saved.act(observations()).shape == (5, H, A)


# ---------------------------------------------------------------- refusals


def test_refuses_environments_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"cubes gives no image, only agent.qpos.*obs_mode=rgb"):
        load(folder, without(BASE, WRIST))
    with pytest.raises(UserError, match=r"state of 4 entries, but cubes gives 3: agent.qpos \[3\]"):
        load(folder, without("extra.is_grasped"))
    with pytest.raises(UserError, match=r"made for 2 action entries, but cubes has 7\. Set env"):
        load(folder, without(action_dim=7))
    with pytest.raises(UserError, match=r"names 'top', but the policy's cameras are base_camera"):
        load(folder, cameras={"top": BASE})
    with pytest.raises(UserError, match=r"has \d+ tokens; the policy was trained with at most 48"):
        load(folder, without(instructions=("push the cube " * 30,)))
    with pytest.raises(UserError, match=r"policy.backbone=smolvla cannot be trained from scratch"):
        SmolVLABackbone.for_env(SPEC)
    more = {f"sensor_data.c{i}.rgb": ArraySpec((8, 8, 3), torch.uint8) for i in range(4)}
    with pytest.raises(UserError, match=r"cannot tell which images"):
        load(folder, EnvSpec({**SPEC.obs, **more}, A, 20, "cubes", SPEC.instructions))


def test_refuses_a_missing_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    folder = tiny_smolvla.write(tmp_path / "policy")
    file = folder / "tokenizer.json"
    told = file.read_bytes()
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer of HuggingFaceTB/SmolVLM2-500M.*Fetch the fil"):
        load(folder)
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "tokenizer.json").write_bytes(told)
    load(folder, tokenizer=str(tmp_path / "vlm"))
    edit(folder / "config.json", lambda c: c.update(vlm_model_name=str(tmp_path / "vlm")))
    load(folder)  # the model's own folder has one


def test_refuses_missing_statistics(tmp_path):
    folder = tiny_smolvla.write(tmp_path / "new")
    post = next(folder.glob("policy_post*.safetensors"))
    save_file({f"so100.buffer.{k}": v for k, v in STATISTICS.items()}, post)
    with pytest.raises(UserError, match=r"no statistics of 'action', only of so100.buffer.action"):
        load(folder)
    save_file({"action.mean": torch.zeros(3), "action.std": torch.ones(3)}, post)
    with pytest.raises(UserError, match="the action has 2 entries in config.json, but 3 in the"):
        load(folder)
    old = tiny_smolvla.write(tmp_path / "old", old=True)
    weights = load_file(old / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("unnormalize_outputs")}
    save_file(kept, old / "model.safetensors")
    with pytest.raises(UserError, match=r"MEAN_STD needs mean and std, but .* are absent"):
        load(old)


def test_refuses_foreign_weights(tmp_path):
    folder = tiny_smolvla.write(tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = "model.vlm_with_expert.vlm.lm_head.weight"
    save_file({k: v for k, v in weights.items() if k != head}, path)
    load(folder)  # nothing reads it
    save_file({k.replace("connector", "joint"): v for k, v in weights.items()}, path)
    with pytest.raises(UserError, match=r"1 missing \(.*connector.*\); 1 unexpected \(.*joint"):
        load(folder)
    save_file(weights, path)
    edit(folder / "config.json", lambda c: c.update(expert_width_multiplier=0.5))
    with pytest.raises(UserError, match=r"of another shape .*from the same source"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapt_to_pi_aloha": True}, r"adapt_to_pi_aloha=True. Allowed: false"),
        ({"add_image_special_tokens": True}, r"add_image_special_tokens=True. Allowed: false"),
        ({"n_obs_steps": 2}, r"n_obs_steps=2. Allowed: 1"),
        ({"chunk_size": 0}, r"chunk_size=0. Allowed: whole numbers from 1"),
        ({"min_period": "x"}, r"min_period='x'. Allowed: positive numbers"),
        ({"attention_mode": "none"}, r"attention_mode='none'. Allowed: cross_attn, self_attn"),
        ({"num_expert_layers": 1}, r"num_expert_layers=1. Allowed: 0, or num_vlm_layers=2"),
        ({"resize_imgs_with_padding": [32, 64]}, r"padding=\[32, 64\]. Allowed: \[32, 32\]"),
        ({"num_vlm_layers": "all"}, r"num_vlm_layers='all'. Allowed: whole numbers"),
    ],
)
def test_refuses_what_it_does_not_do(change, message, tmp_path):
    folder = tiny_smolvla.write(tmp_path)
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(UserError, match=message):
        load(folder)


def test_sizes_of_the_vision_language_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'someone/Other' is neither a folder .*hf download some"):
        read_sizes({"vlm_model_name": "someone/Other"}, "config.json")
    moved = read_sizes({"vlm_model_name": f"/gone/{SMOLVLM.split('/')[1]}"}, "config.json")
    assert moved.vlm == PUBLISHED[SMOLVLM]
    (tmp_path / "vlm").mkdir()
    told = {"model_type": "smolvlm", **tiny_smolvla.VLM}
    file = tmp_path / "vlm" / "config.json"
    file.write_text("{}")
    edit(file, lambda c: c.update(told))
    change = {"vlm_model_name": str(tmp_path / "vlm"), "resize_imgs_with_padding": [32, 32]}
    assert read_sizes(change, "config.json").vlm["text_config"]["head_dim"] == 6
    edit(file, lambda c: c["text_config"].update(model_type="mistral"))
    with pytest.raises(UserError, match=r"the text model is a 'mistral'. Allowed: llama"):
        read_sizes(change, "config.json")
