"""The RQ-VAE against a plain residual quantiser, and its parts against their definitions."""

import numpy as np
import pytest
import torch
from vector_quantize_pytorch import ResidualVQ

from genrec import rqvae
from genrec.kmeans import assign
from genrec.rqvae import RQVAE, fit_rqvae, train_rqvae


@pytest.fixture(scope="module")
def vectors():
    """A planted mixture of unit variance: float32 [600, 16]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 16))[rng.integers(12, size=600)] + 0.2 * rng.normal(size=(600, 16))
    return ((x - x.mean()) / x.std()).astype(np.float32)


@pytest.fixture(scope="module")
def trained(vectors):
    return train_rqvae(vectors, levels=3, codes=8, seed=0)


@torch.no_grad()
def lost(model, vectors):
    x = torch.from_numpy(vectors)
    return torch.nn.functional.mse_loss(model(x)[0], x).item()


def test_it_rebuilds_as_well_as_vector_quantize_pytorch(vectors, trained):
    torch.manual_seed(0)
    theirs = ResidualVQ(dim=16, num_quantizers=3, codebook_size=8, kmeans_init=True, kmeans_iters=25)
    batch = torch.from_numpy(vectors)[None]
    for _ in range(50):
        theirs(batch)
    plain = torch.nn.functional.mse_loss(theirs.eval()(batch)[0], batch).item()
    assert lost(trained, vectors) <= 1.1 * plain
    shuffled = np.random.default_rng(1).permuted(vectors, axis=0)  # the columns no longer agree: no clusters
    assert lost(trained, shuffled) > 5 * lost(trained, vectors)


def test_every_level_uses_its_codes(vectors, trained):
    codes = trained(torch.from_numpy(vectors))[2]
    for level in range(3):
        assert len(codes[:, level].unique()) >= 7


def test_quantisation_equals_nearest_codewords_and_passes_gradients(vectors, trained):
    latent = trained.encoder(torch.from_numpy(vectors)).detach().requires_grad_()
    words, codes, commitment = trained.quantise(latent)
    ours, rest = assign(latent.detach().numpy(), trained.codebooks.numpy())
    assert (codes.numpy() == ours).mean() > 0.999  # float32 ties apart
    assert np.allclose((latent - words).detach().numpy(), rest, atol=1e-4)
    assert commitment.item() >= (rest**2).mean() * 0.999
    x = torch.from_numpy(vectors[:8])
    trained.zero_grad()
    trained(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.encoder.parameters())
    trained.zero_grad()


def test_the_returned_encoder_is_the_trained_one_for_any_scale_of_input(vectors, monkeypatch):
    monkeypatch.setattr(rqvae, "STEPS", 20)
    encoder, codebooks = fit_rqvae(vectors * 100, levels=3, codes=8, seed=0)
    model = train_rqvae(vectors * 100 / (vectors * 100).std(), levels=3, codes=8, seed=0)
    w0, b0, w1, b1 = encoder
    latent = np.maximum(vectors * 100 @ w0.T + b0, 0) @ w1.T + b1
    expected = model.encoder(torch.from_numpy(vectors / vectors.std())).detach().numpy()
    assert np.allclose(latent, expected, atol=1e-2)
    assert np.allclose(codebooks, model.codebooks.numpy(), atol=1e-2)


def test_codebooks_follow_the_mean_and_dead_codes_come_back():
    generator = torch.Generator().manual_seed(0)
    model = RQVAE(4, 1, 3)
    latent = torch.full((64, rqvae.LATENT), 2.0)
    latent[32:] = -1.0
    codes = torch.zeros(64, 1, dtype=torch.int64)
    codes[32:] = 1
    model.counts.fill_(64 / 3)
    model.codebooks[0, 2] = 50.0  # nobody's code
    for _ in range(200):
        model.update_codebooks(latent, codes, generator)
    assert torch.allclose(model.codebooks[0, :2, 0], torch.tensor([2.0, -1.0]), atol=1e-2)
    assert model.codebooks[0, 2, 0].item() in (2.0, -1.0)  # revived on a vector of the batch


def test_training_leaves_the_global_generator_alone(vectors, monkeypatch):
    monkeypatch.setattr(rqvae, "STEPS", 20)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train_rqvae(vectors[:50], levels=1, codes=4, seed=0)
    assert torch.equal(before, torch.get_rng_state())
