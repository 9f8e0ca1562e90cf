"""π0 as one graph each for prefix and chunk, as a GPU run would compile it."""

import pytest
import torch
from tiny_pi0 import backbone, observations

pytestmark = pytest.mark.e2e


@torch.no_grad()
def test_one_graph_each():
    """Traced whole, without a break; not code-generated (Inductor takes minutes on a CPU)."""
    pi0, obs = backbone(), observations()
    noise = torch.randn(5, pi0.chunk_size, pi0.noise_dim)
    vector, context = pi0.prefix(obs)
    prefix = torch.compile(pi0.prefix, fullgraph=True, backend="aot_eager")
    denoise = torch.compile(pi0.denoise, fullgraph=True, backend="aot_eager")
    traced, same_context = prefix(obs)
    torch.testing.assert_close(traced, vector, rtol=1e-5, atol=1e-5)
    expected = pi0.denoise(context, noise)
    torch.testing.assert_close(denoise(same_context, noise), expected, rtol=1e-5, atol=1e-5)
