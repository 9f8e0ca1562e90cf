"""The losses that ACT and SmolVLA are trained with, beside a second writing of each."""

import pytest
import tiny_act
import tiny_smolvla
import torch
from conftest import CPU
from test_act import act_by_hand
from test_smolvla import ByHand
from tiny_lerobot import A, chunks_of, imitator, shown, tensors_of
from tiny_rgb import BASE, SPEC, STATISTICS, WRIST, observations

from embodied_rl.backbones.prompts import load_tokenizer
from embodied_rl.cloning import Examples

pytestmark = pytest.mark.unit
W, H = tiny_smolvla.W, tiny_smolvla.H


def test_act(tmp_path):
    """L1 over all actions of the chunk, latent zero: a float64 second writing, published names.

    float32 beside float64: 1e-5.
    """
    folder = tiny_act.write(tmp_path)
    obs, chunks = observations(), chunks_of(5, tiny_act.CHUNK)
    weights = {k: v.double() for k, v in tensors_of(folder).items()}
    seen = act_by_hand(weights, obs, torch.nn.functional.relu)["chunk"]
    wanted = (chunks - STATISTICS["action.mean"]) / STATISTICS["action.std"]
    expected = sum(
        abs(float(seen[b, t, a]) - float(wanted[b, t, a]))
        for b in range(5)
        for t in range(tiny_act.CHUNK)
        for a in range(A)
    ) / (5 * tiny_act.CHUNK * A)
    backbone = imitator(folder)
    loss = backbone.imitation_loss(backbone.inputs(obs), chunks)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("mode", ["cross_attn", "self_attn"])
def test_smolvla(mode, tmp_path):
    """(v(t noise + (1 - t) a) - (noise - a))^2, over padded entries too, row by row."""
    folder = tiny_smolvla.write(tmp_path, mode=mode)
    obs, chunks = observations(count=4), chunks_of(4, H)
    backbone = imitator(folder)
    rng = torch.Generator().manual_seed(3)
    loss = backbone.imitation_loss(backbone.inputs(obs), chunks, rng)
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(4, H, W, generator=rng)
    times = torch.rand(4, generator=rng) ** (1 / 1.5) * 0.999 + 0.001
    hand = ByHand(tensors_of(folder), mode, 2)
    tokenizer = load_tokenizer(folder / "tokenizer.json", None)
    total = 0.0
    for row in range(4):
        ids = tokenizer.encode(SPEC.instructions[row % 2] + "\n").ids
        raw = torch.cat([obs["agent.qpos"][row], obs["extra.is_grasped"][row].float()[None]])
        mean, std = (STATISTICS[f"observation.state.{k}"] for k in ("mean", "std"))
        images = [obs[key][row].permute(2, 0, 1) / 255 * 2 - 1 for key in (BASE, WRIST)]
        hand.prefix(images, ids, (raw - mean) / std)
        wanted = torch.zeros(H, W, dtype=torch.float64)
        wanted[:, :A] = (chunks[row] - STATISTICS["action.mean"]) / STATISTICS["action.std"]
        t, start = float(times[row]), noise[row].double()
        moved = hand.velocity(t * start + (1 - t) * wanted, t)
        total += float((moved - (start - wanted)).square().sum())
    assert float(loss) == pytest.approx(total / (4 * H * W), rel=1e-5)


def test_act_is_taught_the_actions_that_it_does_not_execute(tmp_path):
    backbone = imitator(tiny_act.write(tmp_path)).requires_grad_(True)
    assert (backbone.chunk_size, backbone.taught_steps) == (3, 5)
    examples = Examples(backbone, [shown(6)], CPU)
    inputs, chunks = examples.take(torch.tensor([0, 4]))
    label = shown(6).labels
    torch.testing.assert_close(chunks[0], label[:5])
    torch.testing.assert_close(chunks[1], label[[4, 5, 5, 5, 5]])
    backbone.imitation_loss(inputs, chunks).backward()
    queries = backbone.network.decoder_pos_embed.weight.grad
    assert queries is not None and bool((queries.abs().sum(1) > 0).all())
