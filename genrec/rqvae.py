"""RQ-VAE: an autoencoder with residual quantisation inside, so that codes follow what the decoder needs.

Residual quantisation, k-means initialisation, EMA codebooks and dead-code revival follow SoundStream
(Zeghidour et al. 2021); its use for item ids, TIGER (Rajput et al. 2023). After training only the encoder and
the codebooks remain.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.kmeans import residual_kmeans

log = logging.getLogger(__name__)
HIDDEN = 256
LATENT = 32
STEPS = 600
BATCH = 1024
LEARNING_RATE = 1e-3
COMMITMENT = 0.25  # weight of the commitment loss
DECAY = 0.95  # of the codebooks' moving averages
DEAD = 0.1  # a code used less than this share of its fair share is replaced


class RQVAE(nn.Module):
    """Encoder, codebooks float32 [L, C, LATENT] and decoder; inputs are float32 [B, D]."""

    codebooks: Tensor
    counts: Tensor

    def __init__(self, width: int, levels: int, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
        self.register_buffer("codebooks", torch.zeros(levels, codes, LATENT))
        self.register_buffer("counts", torch.ones(levels, codes))  # moving average of each code's items per batch

    def quantise(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual quantisation of float32 [B, LATENT].

        Returns:
            the codewords' sum [B, LATENT], codes int64 [B, L], the commitment loss (mean over B and LATENT).
        """
        rest, total, commitment, codes = latent, torch.zeros_like(latent), latent.new_zeros(()), []
        for codebook in self.codebooks:
            code = torch.cdist(rest.detach(), codebook).argmin(1)
            word = codebook[code]
            commitment = commitment + F.mse_loss(rest, word)
            rest, total = rest - word, total + word
            codes.append(code)
        return total, torch.stack(codes, 1), commitment

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rebuilt [B, D], latent [B, LATENT], codes int64 [B, L], commitment; straight-through gradients."""
        latent = self.encoder(x)
        words, codes, commitment = self.quantise(latent)
        return self.decoder(latent + (words - latent).detach()), latent, codes, commitment

    @torch.no_grad()
    def update_codebooks(self, latent: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Move codewords towards the mean of their vectors; a dead one jumps onto a random vector."""
        rest = latent
        fair = len(latent) / self.codebooks.shape[1]
        for codebook, counts, code in zip(self.codebooks, self.counts, codes.unbind(1), strict=True):
            used = rest - codebook[code]
            batch = torch.bincount(code, minlength=len(codebook)).float()
            sums = torch.zeros_like(codebook).index_add_(0, code, rest)
            means = codebook * counts[:, None] * DECAY + sums * (1 - DECAY)
            counts.mul_(DECAY).add_(batch, alpha=1 - DECAY)
            codebook.copy_(means / counts.clamp(min=1e-6)[:, None])
            dead = (counts < DEAD * fair).nonzero().flatten()
            codebook[dead] = rest[torch.randint(len(rest), (len(dead),), generator=generator)]
            counts[dead] = fair
            rest = used


def train_rqvae(vectors: np.ndarray, *, levels: int, codes: int, seed: int) -> RQVAE:
    """Train on float32 [N, D] of unit variance over all; the result follows from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(np.ascontiguousarray(vectors, np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RQVAE(x.shape[1], levels, codes)
    sample = x[torch.randperm(len(x), generator=generator)[: BATCH * 16]]
    with torch.no_grad():
        latent = model.encoder(sample).numpy()
    model.codebooks.copy_(torch.from_numpy(residual_kmeans(latent, levels=levels, codes=codes, seed=seed)))
    model.counts.fill_(min(BATCH, len(x)) / codes)
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)] if len(x) > BATCH else x
        rebuilt, latent_batch, batch_codes, commitment = model(batch)
        reconstruction = F.mse_loss(rebuilt, batch)
        optimiser.zero_grad()
        (reconstruction + COMMITMENT * commitment).backward()
        optimiser.step()
        schedule.step()
        model.update_codebooks(latent_batch.detach(), batch_codes, generator)
        if step % 200 == 0 or step == STEPS - 1:
            log.info("rqvae step %d: reconstruction %.4f", step, reconstruction.item())
    return model.eval()


def fit_rqvae(vectors: np.ndarray, *, levels: int, codes: int, seed: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Train on float32 [N, D] of any scale.

    Returns:
        the encoder as weight, bias, weight, bias (ReLU between) and codebooks [L, C, LATENT]; all float32.
    """
    scale = np.float32(1 / max(vectors.std(), 1e-12))
    model = train_rqvae(vectors * scale, levels=levels, codes=codes, seed=seed)
    layers = {name: value.numpy() for name, value in model.encoder.state_dict().items()}
    encoder = (layers["0.weight"] * scale, layers["0.bias"], layers["2.weight"], layers["2.bias"])
    return encoder, model.codebooks.numpy()
