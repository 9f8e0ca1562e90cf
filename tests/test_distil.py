"""Distilling back: a finetuned policy's successes make its backbone a plain policy again."""

import dataclasses
import json

import pytest
import tiny_vla
import torch
from conftest import CPU, TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pi0 import BASE, SPEC, WRIST, lerobot_folder, observations, transformers_folder
from transformers import PI0ForConditionalGeneration

from embodied_rl import demos, pretrain
from embodied_rl.backbones.state import StateBackbone
from embodied_rl.builders import build_env
from embodied_rl.cloning import Examples
from embodied_rl.command_configs import DemosConfig, PretrainConfig, TuneConfig
from embodied_rl.config import ActorConfig, OptimConfig, PolicyConfig
from embodied_rl.demonstrations import read_demos, read_meta, shown_spec
from embodied_rl.errors import UserError
from embodied_rl.evaluator import Evaluator
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.registry import ACTORS, ENVS
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.teachers import PolicyTeacher
from embodied_rl.types import EXPERT, Trajectory
from embodied_rl.unfreeze import add_lora, merge_lora, unfreeze

LAYOUTS = {"lerobot": lerobot_folder, "transformers": transformers_folder}
TUNE = TuneConfig(
    cameras={"base_camera": BASE, "hand_camera": WRIST},
    state=["agent.qpos", "extra.is_grasped"],
)


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request, tmp_path_factory):
    torch.manual_seed(0)
    return LAYOUTS[request.param](tmp_path_factory.mktemp(request.param) / "pi0")


def read_source(folder, **options) -> Policy:
    cameras = TUNE.cameras if (folder / "policy_preprocessor.json").exists() else {}
    settings = {"cameras": cameras, "state": TUNE.state, **options}
    return Policy.from_pretrained(folder, PolicyConfig(path=str(folder), **settings))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shown(length: int = 6, seed: int = 0) -> Trajectory:
    """An episode of tiny_pi0's environment whose labels are not what was executed."""
    rng = torch.Generator().manual_seed(seed)
    fields = {f"obs.{k}": v for k, v in observations(SPEC, length + 1, seed).items()}
    fields["obs.instruction"] = torch.full_like(fields["obs.instruction"], seed % 2)
    fields["action"] = torch.rand(length + 1, 1, 2, generator=rng) * 2 - 1
    fields[EXPERT] = torch.rand(length + 1, 1, 2, generator=rng) * 2 - 1
    fields["success"] = torch.ones(length + 1, dtype=torch.bool)
    return Trajectory(fields)


# ---------------------------------------------------------------- the layout it came from


@pytest.mark.unit
class TestExport:
    def check_same(self, source, out, but=()):
        names = {p.name for p in source.iterdir()}
        assert {p.name for p in out.iterdir()} == names
        for name in names - {"model.safetensors"}:
            assert (out / name).read_bytes() == (source / name).read_bytes(), name
        before, after = tensors_of(source), tensors_of(out)
        assert list(before) == list(after)
        assert all(a.dtype == before[k].dtype for k, a in after.items())
        assert all(torch.equal(a, before[k]) for k, a in after.items() if k not in but)

    def test_untrained_is_its_source(self, source, tmp_path):
        read_source(source).backbone.to_folder(tmp_path / "out")
        self.check_same(source, tmp_path / "out")
        with (
            safe_open(source / "model.safetensors", "pt") as a,
            safe_open(tmp_path / "out" / "model.safetensors", "pt") as b,
        ):
            assert a.metadata() == b.metadata()
        one, other = (read_source(f).backbone for f in (source, tmp_path / "out"))
        assert one.weights_hash() == other.weights_hash()

    def test_read_in_lower_precision_it_is_still_its_source(self, source, tmp_path):
        read_source(source, dtype="bfloat16").backbone.to_folder(tmp_path / "out")
        self.check_same(source, tmp_path / "out")

    def test_what_was_learnt_is_there_under_the_published_name(self, source, tmp_path):
        backbone = read_source(source).backbone
        with torch.no_grad():
            backbone.network.action_out_proj.bias.add_(1)
            backbone.network.model.vlm.language_model.layers[0].mlp.up_proj.weight.mul_(2)
            backbone.network.model.vlm.vision_tower.embeddings.patch_embedding.bias.add_(3)
        backbone.to_folder(tmp_path / "out")
        before, after = tensors_of(source), tensors_of(tmp_path / "out")
        changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
        self.check_same(source, tmp_path / "out", changed)
        ends = ("action_out_proj.bias", "layers.0.mlp.up_proj.weight", "patch_embedding.bias")
        assert len(changed) == 3
        assert all(any(k.endswith(end) for k in changed) for end in ends)
        again = read_source(tmp_path / "out").backbone
        assert again.weights_hash() == backbone.weights_hash()

    def test_sixteen_bit_and_split_files_stay_so(self, tmp_path):
        source = lerobot_folder(tmp_path / "pi0")
        weights = {k: v.bfloat16() for k, v in tensors_of(source).items()}
        (source / "model.safetensors").unlink()
        names = sorted(weights)
        for i, part in enumerate((names[:9], names[9:])):
            held = {k: weights[k] for k in part}
            save_file(held, source / f"model-{i + 1:05}-of-00002.safetensors", {"format": "pt"})
        index = {k: f"model-0000{1 + (k not in names[:9])}-of-00002.safetensors" for k in names}
        (source / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        (source / "pytorch_model.bin").write_bytes(b"of the untrained policy")
        backbone = read_source(source).backbone
        backbone.to_folder(tmp_path / "out")
        for i in (1, 2):
            name = f"model-0000{i}-of-00002.safetensors"
            before, after = load_file(source / name), load_file(tmp_path / "out" / name)
            assert before.keys() == after.keys()
            assert all(
                torch.equal(v, before[k]) and v.dtype == torch.bfloat16 for k, v in after.items()
            )
        assert not (tmp_path / "out" / "pytorch_model.bin").exists()
        assert read_source(tmp_path / "out").backbone.weights_hash() == backbone.weights_hash()

    def test_transformers_reads_its_own(self, tmp_path):
        source = transformers_folder(tmp_path / "pi0")
        backbone = read_source(source).backbone
        with torch.no_grad():
            backbone.network.action_out_proj.bias.add_(1)
        backbone.to_folder(tmp_path / "out")
        theirs, told = PI0ForConditionalGeneration.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        mine = backbone.network.state_dict()
        assert all(torch.equal(v, mine[k]) for k, v in theirs.state_dict().items())

    def test_refuses_a_source_that_is_no_longer_what_it_was(self, tmp_path):
        source = lerobot_folder(tmp_path / "pi0")
        backbone = read_source(source).backbone
        weights = tensors_of(source)
        save_file(
            {k: v for k, v in weights.items() if "out_proj.bias" not in k},
            source / "model.safetensors",
        )
        with pytest.raises(UserError, match="no place for .*action_out_proj.bias"):
            backbone.to_folder(tmp_path / "a")
        weights["model.action_out_proj.bias"] = torch.zeros(3)
        save_file(weights, source / "model.safetensors")
        with pytest.raises(
            UserError, match=r"has the shape \(3,\), the trained policy the shape \(6,\)"
        ):
            backbone.to_folder(tmp_path / "b")

    def test_backbones_without_a_layout(self, make_backbone, tmp_path):
        with pytest.raises(UserError, match="StateBackbone cannot be written in the layout of"):
            make_backbone().to_folder(tmp_path)


# ---------------------------------------------------------------- learning further


@pytest.mark.unit
class TestTraining:
    @pytest.mark.parametrize("trainable", ["full", "lora"])
    def test_two_steps_of_pi0(self, source, tmp_path, trainable):
        episodes = [shown(6, 0), shown(4, 1)]
        config = PretrainConfig(init=str(source), steps=2, batch_size=4, out=str(tmp_path / "out"))
        config.tune = dataclasses.replace(TUNE, trainable=trainable, lora_rank=2, micro_batch=3)
        if "transformers" in str(source):
            config.tune.cameras = {}
        config.optim = OptimConfig(lr=1e-2)
        loaded, backbone = pretrain.load_init(config, {"optim.lr"})
        assert (config.backbone, config.chunk_size) == ("pi0", 3)
        backbone.check_env(shown_spec(episodes, SPEC.instructions, "cubes"))
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        policy = pretrain.go_on(config, loaded, backbone, episodes[:1], episodes[1:], CPU)
        after = policy.state_dict()
        assert {k.removeprefix("backbone.") for k in after} == set(before), "no adapter is left"
        changed = {k for k, v in before.items() if not torch.equal(v, after[f"backbone.{k}"])}
        expert = "network.model.dit.layers.0.self_attn.q_proj.weight"
        seen = "network.model.vlm.vision_tower.encoder.layers.0.mlp.fc1.weight"
        assert {expert, seen, "network.action_out_proj.weight"} <= changed
        assert ("network.action_out_proj.bias" in changed) == (trainable == "full")
        pretrain.save(policy, tmp_path / "out")
        again = read_source(tmp_path / "out")
        assert again.actor is None and again.backbone.weights_hash() == backbone.weights_hash()
        again.backbone.check_env(SPEC)
        obs, rngs = observations(), [torch.Generator().manual_seed(3) for _ in range(2)]
        actions = [p.act(obs, generator=g) for p, g in zip((again, policy), rngs, strict=True)]
        torch.testing.assert_close(*actions, rtol=0, atol=1e-5)

    def test_merged_equals_unmerged(self, source):
        backbone = read_source(source).backbone
        backbone.check_env(SPEC)
        backbone.requires_grad_(False)
        names = set(backbone.state_dict())
        add_lora(backbone, [backbone], 2)
        rng = torch.Generator().manual_seed(1)
        trained = [p for p in backbone.parameters() if p.requires_grad]
        assert len(trained) > 40
        for parameter in trained:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=rng))
        noise = torch.randn(5, 3, 6, generator=rng)
        obs = observations()
        before = backbone.denoise(backbone.prefix(obs)[1], noise).detach()
        merge_lora(backbone)
        after = backbone.denoise(backbone.prefix(obs)[1], noise).detach()
        plain = read_source(source).backbone
        plain.check_env(SPEC)
        assert set(backbone.state_dict()) == names
        assert float((after - before).abs().max()) < 1e-5
        assert float((after - plain.denoise(plain.prefix(obs)[1], noise)).abs().max()) > 1e-2

    def test_a_run_with_lora_in_it_starts_merged(self, source, tmp_path):
        policy = read_source(source)
        policy.backbone.check_env(SPEC)
        options = PolicyConfig(trainable="lora", lora_rank=2, cache_features=False)
        for parameter in unfreeze(policy.backbone, options):
            parameter.data.add_(0.05)
        policy.trained = {"trainable": "lora", "lora_rank": 2, "last_blocks": 1}
        policy.save_pretrained(tmp_path / "run")
        obs = observations()
        wanted = policy.backbone.prefix(obs)[0]
        config = PretrainConfig(init=str(tmp_path / "run"))
        _, backbone = pretrain.load_init(config, set())
        assert float((backbone.prefix(obs)[0] - wanted).abs().max()) < 1e-4
        assert config.optim.lr == 2.5e-5
        backbone.to_folder(tmp_path / "out")
        again = read_source(tmp_path / "out").backbone
        again.check_env(SPEC)
        assert torch.equal(again.prefix(obs)[0], backbone.prefix(obs)[0])

    def test_micro_batches_add_up(self, make_trajectory):
        """State policies draw no noise: pieces of any size give the weights of whole batches."""
        made = []
        for size in (None, 3):
            torch.manual_seed(0)
            backbone = StateBackbone(2, 2, 2, [8]).requires_grad_(True)
            config = PretrainConfig(steps=5, batch_size=8, tune=TuneConfig(micro_batch=size))
            pretrain.fit(backbone, config, [make_trajectory(1, 9)], [], CPU)
            made.append(backbone.net[0].weight)
        torch.testing.assert_close(*made, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("keeps", [True, False])
    def test_examples(self, make_trajectory, keeps):
        """Row 4 is step 1 of the second episode; chunks repeat an episode's last action."""
        backbone = StateBackbone(2, 2, 3, [8])
        backbone.keeps_inputs = keeps
        examples = Examples(backbone, [make_trajectory(1, 3), make_trajectory(2, 2)], CPU)
        assert len(examples) == 5
        inputs, chunks = examples.take(torch.tensor([4, 0]))
        assert inputs["state"].tolist() == [[2, 1], [1, 0]]
        expected = torch.tensor([[[2, 1], [2, 1], [2, 1]], [[1, 0], [1, 1], [1, 2]]]) / 1000
        torch.testing.assert_close(chunks, expected)

    def test_sixteen_bit_weights_are_not_trained_in_place(self, tmp_path):
        source = lerobot_folder(tmp_path / "pi0")
        config = PretrainConfig(init=str(source), steps=1, batch_size=2)
        config.tune = dataclasses.replace(TUNE, dtype="bfloat16")
        loaded, backbone = pretrain.load_init(config, set())
        backbone.check_env(SPEC)
        with pytest.raises(UserError, match=r"train torch.bfloat16 weights.*tune.trainable=lora"):
            pretrain.go_on(config, loaded, backbone, [shown()], [], CPU)
        config.tune.trainable = "lora"
        loaded, backbone = pretrain.load_init(config, set())
        backbone.check_env(SPEC)
        pretrain.go_on(config, loaded, backbone, [shown()], [], CPU)

    def test_executed_steps_that_the_layout_does_not_say(self, tmp_path, capsys):
        policy = read_source(lerobot_folder(tmp_path / "pi0"))
        pretrain.save(policy, tmp_path / "a")
        assert "note" not in capsys.readouterr().out
        policy.execute_steps = 1
        pretrain.save(policy, tmp_path / "b")
        assert "n_action_steps=3, but the policy was finetuned with 1" in capsys.readouterr().out


@pytest.mark.unit
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["init=x", "hidden=[8]"], r"hidden=\[8\], but init=x has its sizes already"),
        (["init=x", "small_vla.keypoints=3"], "small_vla.keypoints=3, but init=x"),
        (["tune.trainable=lora"], "tune.trainable=lora, but no policy is named for it: give init="),
        (["tune.state=[a]"], r"tune.state=\['a'\], but no policy"),
        (["init=x", "tune.trainable=last"], "tune.trainable='last'.*Allowed: full, lora"),
    ],
)
def test_contradictions(args, message):
    with pytest.raises(UserError, match=message):
        load_config(PretrainConfig, args)


@pytest.mark.unit
def test_init_of_another_kind(make_backbone, tmp_path, flow_folder):
    Policy(make_backbone(2), "state").save_pretrained(tmp_path / "p")
    for args, message in (
        (["backbone=small_vla"], "backbone=small_vla, but init=.* has state. Drop backbone."),
        (["chunk_size=4"], "chunk_size=4, but init=.* has 2. Drop chunk_size."),
    ):
        config, given = load_config(PretrainConfig, [f"init={tmp_path / 'p'}", *args])
        with pytest.raises(UserError, match=message):
            pretrain.load_init(config, given)
    with pytest.raises(UserError, match="of the kind tiny_flow, not trained here. Allowed: state"):
        pretrain.load_init(PretrainConfig(init=str(flow_folder)), set())
    config = PretrainConfig(init=str(tmp_path / "p"), data="d", out=str(tmp_path))
    with pytest.raises(UserError, match=f"out={tmp_path} holds init={tmp_path}/p"):
        pretrain.check_out(config)
    config.out = str(tmp_path / "weights")
    pretrain.check_out(config)
    with pytest.raises(UserError, match="weights holds the weights of init=.*Name another folder"):
        pretrain.check_out(config, source=str(tmp_path / "weights" / "act"))
    with pytest.raises(UserError, match="deterministic=false is for policies"):
        load_config(DemosConfig, ["deterministic=false"])


# ---------------------------------------------------------------- the teacher


def collected(tmp_path, make_config, teacher_of, num_envs: int, **options) -> list[Trajectory]:
    env = dataclasses.replace(make_config().env, max_episode_steps=12)
    config = DemosConfig(episodes=3, env=env, policy="p", **options)
    opened = build_env(env, num_envs, CPU)
    folder = tmp_path / f"demos{num_envs}"
    store = TrajectoryStore(folder, 3, {"task": "reach"})
    demos.collect(opened, store, config, teacher_of(config))
    store.close()
    return read_demos(folder)


@pytest.mark.unit
class TestTeacher:
    @pytest.mark.parametrize("deterministic", [True, False])
    @pytest.mark.parametrize("actor", [None, *ACTORS.names])
    def test_independent_of_the_number_of_environments(
        self, tmp_path, make_config, flow_folder, actor, deterministic
    ):
        """Flow policy, every adapter, chunks of which two of three actions are executed."""
        flow = Policy.from_pretrained(flow_folder).backbone
        adapter = None
        if actor is not None:
            adapter = ACTORS.get(actor).for_backbone(flow, ActorConfig(hidden=[8]), None, 2)
        policy = Policy(flow, "tiny_flow", adapter, actor, None, 2)

        def teacher(config):
            return PolicyTeacher(policy, CPU, config.seed, deterministic=deterministic)

        options = {"noise": 0.3, "max_steps_multiple": 100}
        one, three = (collected(tmp_path, make_config, teacher, n, **options) for n in (1, 3))
        assert len(one) == 3 and all(t.fields["success"].any() for t in one)
        for a, b in zip(one, three, strict=True):
            assert a.fields.keys() == b.fields.keys()
            assert all(torch.equal(a.fields[k], b.fields[k]) for k in a.fields)
            assert not torch.equal(a.fields["action"], a.fields[EXPERT]), "noise is executed"
        seeds = [int(t.fields["obs.state"][0, 2]) for t in one]
        assert seeds == sorted(seeds), "in the order of their seeds"

    def test_labels_are_executed_chunks(self, flow_folder):
        """For `noise`, what the flow makes of it, two of three actions at a time; not the noise."""
        flow = Policy.from_pretrained(flow_folder).backbone
        adapter = ACTORS.get("noise").for_backbone(flow, ActorConfig(hidden=[8]), None)
        for parameter in adapter.parameters():
            parameter.data.add_(0.3)
        policy = Policy(flow, "tiny_flow", adapter, "noise", None, 2)
        teacher = PolicyTeacher(policy, CPU, 0)
        states = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(2))
        labels = [
            teacher.labels({"state": s}, (7, 8 if t < 3 else 9)) for t, s in enumerate(states)
        ]
        chunk = [policy.act({"state": s}) for s in states]
        noise = adapter.mode(policy.encode({"state": states[0]}))
        assert not torch.allclose(chunk[0][:, 0], noise[:, 0], atol=1e-2)
        first = [chunk[0][0, 0], chunk[0][0, 1], chunk[2][0, 0], chunk[2][0, 1], chunk[4][0, 0]]
        torch.testing.assert_close(torch.stack([one[0] for one in labels]), torch.stack(first))
        # the second environment begins another episode at step 3, in the middle of a chunk
        second = [chunk[0][1, 0], chunk[0][1, 1], chunk[2][1, 0], chunk[3][1, 0], chunk[3][1, 1]]
        torch.testing.assert_close(torch.stack([one[1] for one in labels]), torch.stack(second))

    def test_gives_up(self, tmp_path, make_config, scripted):
        still = scripted(lambda state: torch.zeros(len(state), 1, 2))
        with pytest.raises(UserError, match="demonstrations of 6 attempts .*max_steps_multiple"):
            collected(
                tmp_path,
                make_config,
                lambda c: PolicyTeacher(still, CPU, c.seed),
                2,
                max_steps_multiple=2,
            )


# ---------------------------------------------------------------- all of it


@pytest.mark.e2e
def test_from_a_run_to_a_plain_policy(tmp_path, make_config):
    """Finetune, collect the successes, distil: the student is near its teacher, without adapter."""
    from embodied_rl import train

    fake = ["env.type=fake", "env.task=reach", "env.max_episode_steps=12", "eval.video=false"]
    scores = ["eval.episodes=40", "eval.num_envs=4"]
    base, run, data, out = (tmp_path / name for name in ("base", "run", "demos", "distilled"))
    backbone = StateBackbone(4, 2, 2, [32])
    backbone.std.copy_(torch.tensor([0.6, 0.6, 5000.0, 10.0]))
    Policy(backbone, "state").save_pretrained(base)
    learn = ["train.total_steps=3000", "algorithm.update_epoch=16", "eval.interval=1000"]
    learn += ["train.checkpoint_interval=1000", "actor.type=residual", "actor.optim.lr=1e-3"]
    learn += ["actor.residual_scale=1.0", "actor.residual_ramp_steps=200"]
    learn += ["algorithm.anchor.weight=0", "train.diagnostics=false"]
    train.main([*TINY, *fake, *scores, f"policy.path={base}", f"run_dir={run}", *learn])
    demos.main([f"policy={run}", f"out={data}", "episodes=60", "env.num_envs=3", "noise=0.2"])
    meta = read_meta(data)
    assert meta["env"]["task"] == "reach" and meta["env"]["max_episode_steps"] == 12
    steps = ["steps=2000", "eval.video=false", *scores]
    pretrain.main([f"init={run}", f"data={data}", f"out={out}", *steps])

    def success(policy: Policy) -> float:
        env = dataclasses.replace(make_config().env, max_episode_steps=12)
        evaluator = Evaluator(build_env(env, 4, CPU), 200, CPU)
        return evaluator.run(policy, 20_000).summary["success_once"]

    before, teacher, student = (Policy.from_pretrained(p) for p in (base, run, out))
    assert teacher.actor is not None and student.actor is None
    assert student.env["task"] == "reach" and student.execute_steps == 2
    assert student.backbone.config_dict() == before.backbone.config_dict()
    rates = [success(p) for p in (before, teacher, student)]
    print("pretrained, finetuned, distilled:", rates)
    assert rates[1] > 0.6, "the teacher learnt something"
    assert rates[2] > rates[1] - 0.1
    pretrain.main([f"config={out}/pretrain.yaml", f"out={tmp_path / 'again'}"])
    again = Policy.from_pretrained(tmp_path / "again")
    assert again.backbone.weights_hash() == student.backbone.weights_hash()


@pytest.mark.e2e
def test_a_run_on_a_lerobot_folder_stays_one(tmp_path, monkeypatch, capsys):
    """The three command lines' way, with a noise actor on tiny π0: the result is LeRobot's layout.

    Random weights and noise on top find the goal now and then; nothing is said of the student.
    """
    monkeypatch.setitem(ENVS._table, "fake", "tiny_rgb:make_rgb")
    source = lerobot_folder(tmp_path / "pi0")
    backbone = read_source(source).backbone
    backbone.check_env(SPEC)
    adapter = ACTORS.get("noise").for_backbone(backbone, ActorConfig(hidden=[8]), None)
    env = {"type": "fake", "task": "reach", "max_episode_steps": 30}
    policy = Policy(backbone, "pi0", adapter, "noise", env, 2)
    policy.save_pretrained(tmp_path / "run" / "policy")
    data, out = tmp_path / "demos", tmp_path / "out"
    many = ["episodes=2", "noise=1.0", "max_steps_multiple=200", "env.num_envs=2"]
    demos.main([f"policy={tmp_path / 'run'}", f"out={data}", *many])
    told = [int(t.fields["obs.instruction"][0]) for t in read_demos(data)]
    assert sorted(told) == [0, 1] and read_meta(data)["instructions"] == list(SPEC.instructions)
    small = ["steps=3", "batch_size=4", "tune.trainable=lora", "tune.lora_rank=2", "optim.lr=1e-3"]
    small += ["eval.episodes=2", "eval.num_envs=2", "eval.video=false"]
    pretrain.main([f"init={tmp_path / 'run'}", f"data={data}", f"out={out}", *small])
    assert "says n_action_steps=3, but the policy was finetuned with 2" in capsys.readouterr().out
    added = {p.name for p in out.iterdir()} - {p.name for p in source.iterdir()}
    assert added == {"pretrain.yaml", "evaluation.json"}
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    assert len([k for k in before if not torch.equal(before[k], after[k])]) > 20
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    student = Policy.from_pretrained(out)  # without a word on cameras: their names fit
    student.backbone.check_env(SPEC)
    assert student.actor is None and student.backbone_type == "pi0"
    assert student.act(observations()).isfinite().all()


@pytest.mark.unit
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_head_of_a_small_vla(tmp_path, trainable):
    """All of the head learns on; normalisation, instructions and towers stay."""
    towers = tiny_vla.vision_folder(tmp_path / "v"), tiny_vla.text_folder(tmp_path / "t")
    config = tiny_vla.config(*towers)
    config.backbone, config.steps, config.batch_size = "small_vla", 1, 8
    episodes = tiny_vla.demos(2)
    policy = pretrain.clone(config, episodes, [], tiny_vla.TOLD, CPU)
    policy.save_pretrained(tmp_path / "p")
    config = PretrainConfig(init=str(tmp_path / "p"), steps=3, batch_size=8)
    config.tune = TuneConfig(trainable=trainable, lora_rank=2)
    loaded, backbone = pretrain.load_init(config, set())
    assert (config.backbone, config.chunk_size, config.optim.lr) == ("small_vla", 3, 3e-4)
    backbone.check_env(shown_spec(episodes, tiny_vla.TOLD, "cubes"))
    student = pretrain.go_on(config, loaded, backbone, episodes, [], CPU)
    before, after = policy.backbone, student.backbone
    assert before.config_dict() == after.config_dict()
    learnt = dict(after.named_parameters())
    assert learnt.keys() == dict(before.named_parameters()).keys()
    changed = {k for k, v in before.named_parameters() if not torch.equal(v, learnt[k])}
    assert changed == learnt.keys() if trainable == "full" else changed
    held = dict(after.named_buffers())
    assert all(torch.equal(v, held[k]) for k, v in before.named_buffers())
