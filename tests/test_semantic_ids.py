"""Semantic ids: planted clusters are found, shared ids resolved with few moves, new items change nothing."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from vector_quantize_pytorch import ResidualVQ

from genrec import rqvae
from genrec.collisions import resolve
from genrec.encoders import Features
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.item_vectors import cooccurrence_factors
from genrec.kmeans import assign, kmeans, residual_kmeans
from genrec.semantic_ids import SemanticIds, fit_semantic_ids


def mixture(n_items=400, n_clusters=8, width=12, spread=0.15, seed=0):
    """Cluster of each item int64 [N], and vectors float32 [N, width] around well separated centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_clusters, width))
    cluster = rng.integers(n_clusters, size=n_items)
    return cluster, (centres[cluster] + spread * rng.normal(size=(n_items, width))).astype(np.float32)


def planted(n_items=400, n_clusters=8, seed=0):
    """Two modalities that agree on the clusters, in different units; a tenth of the pictures is missing."""
    rng = np.random.default_rng(seed + 1)
    cluster, text = mixture(n_items, n_clusters, seed=seed)
    image = rng.normal(size=(n_clusters, 1, 6))[cluster] + 0.15 * rng.normal(size=(n_items, 4, 6))
    image[..., 0] *= 1000
    here = rng.random(n_items) > 0.1
    features = {
        "text": Features(text[:, None], np.ones(n_items, bool)),
        "image": Features(np.where(here[:, None, None], image, 0).astype(np.float32), here),
    }
    return cluster, features


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    monkeypatch.setattr(rqvae, "STEPS", 120)


def fit(features, **changes):
    settings = {"method": "residual_kmeans", "levels": 3, "codes": 8, "seed": 0, **changes}
    return fit_semantic_ids(features, **settings)


def rows_of(features, which):
    return {name: Features(one.values[which], one.present[which]) for name, one in features.items()}


@pytest.mark.parametrize("method", ["residual_kmeans", "rqvae"])
def test_items_of_one_cluster_share_their_first_code(method):
    cluster, features = planted()
    ids = fit(features, method=method)
    assert ids.codes.dtype == np.int32
    assert ids.codes.shape == (400, 3)
    assert len(np.unique(ids.codes, axis=0)) == 400
    assert 0 <= ids.codes.min() <= ids.codes.max() < ids.n_codes == 8
    assert adjusted_mutual_info_score(cluster, ids.codes[:, 0]) > 0.9
    shuffled = np.random.default_rng(5).permutation(400)
    assert adjusted_mutual_info_score(cluster[shuffled], ids.codes[:, 0]) < 0.05


def test_modalities_weigh_the_same_and_a_missing_one_is_the_mean():
    _, features = planted()
    ids = fit(features)
    vectors = ids.space.vectors(features)
    here = features["image"].present
    assert vectors[:, :12].var(0).sum() == pytest.approx(1, abs=1e-3)
    assert vectors[here, 12:].var(0).sum() == pytest.approx(1, abs=1e-3)
    assert np.allclose(vectors[here].mean(0)[12:], 0, atol=1e-4)
    assert (vectors[~here, 12:] == 0).all()


def test_a_constant_column_and_an_absent_modality_are_harmless():
    _, features = planted(50)
    features["text"].values[..., 0] = 7
    features["image"] = Features(np.zeros((50, 1, 3), np.float32), np.zeros(50, bool))
    ids = fit(features)
    vectors = ids.space.vectors(features)
    assert (vectors[:, 0] == 0).all()
    assert (vectors[:, 12:] == 0).all()
    assert vectors.var(0).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", ["residual_kmeans", "rqvae"])
def test_the_seed_decides_everything(method):
    _, features = planted(120)
    first, again, other = (fit(features, method=method, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.codes, again.codes)
    assert np.array_equal(first.codebooks, again.codebooks)
    assert not np.array_equal(first.codes, other.codes)


@pytest.mark.parametrize("method", ["residual_kmeans", "rqvae"])
def test_items_outside_fit_on_shape_nothing_and_equal_an_extension(method):
    _, features = planted(200)
    warm = np.random.default_rng(2).random(200) < 0.8
    whole = fit(features, method=method, fit_on=warm)
    alone = fit(rows_of(features, warm), method=method)
    assert np.array_equal(whole.codes[warm], alone.codes)
    assert np.array_equal(whole.codebooks, alone.codebooks)
    extended = alone.extend(rows_of(features, ~warm))
    assert np.array_equal(extended.codes[: warm.sum()], alone.codes)
    assert np.array_equal(extended.codes[warm.sum() :], whole.codes[~warm])
    assert extended.report["extensions"][0]["items"] == (~warm).sum()
    assert "extensions" not in alone.report


def test_extension_by_copies_of_old_items_takes_free_neighbouring_ids():
    _, features = planted(60)
    ids = fit(features, codes=16)
    more = ids.extend(rows_of(features, np.arange(60)))
    assert np.array_equal(more.codes[:60], ids.codes)
    assert len(np.unique(more.codes, axis=0)) == 120
    assert (more.codes[60:, 0] == ids.codes[:, 0]).mean() > 0.9


@pytest.mark.parametrize("method", ["residual_kmeans", "rqvae"])
def test_save_and_load_round_trip_exactly(tmp_path, method):
    _, features = planted(80)
    ids = fit(features, method=method)
    ids.save(tmp_path / "ids")
    back = SemanticIds.load(tmp_path / "ids")
    assert back.codes.dtype == np.int32
    assert np.array_equal(back.codes, ids.codes)
    assert back.report == ids.report == json.loads(json.dumps(ids.report))
    fresh = rows_of(planted(20, seed=9)[1], slice(None))
    assert np.array_equal(back.extend(fresh).codes, ids.extend(fresh).codes)
    (tmp_path / "ids" / "quantiser.safetensors").write_bytes(b"short")
    with pytest.raises(ArtefactError, match="no whole semantic ids there"):
        SemanticIds.load(tmp_path / "ids")


def test_the_report_agrees_with_a_recount():
    _, features = planted(300)
    ids = fit(features, levels=2, codes=20)
    report = ids.report
    latents = ids.latents(ids.space.vectors(features))
    nearest, rest = assign(latents, ids.codebooks)
    shared = [(nearest == one).all(1).sum() > 1 for one in nearest]
    assert report["items"] == 300
    assert report["unique_before"] == len({tuple(one) for one in nearest.tolist()})
    assert report["collided_share"] == pytest.approx(np.mean(shared))
    assert report["moved"] == (nearest != ids.codes).any(1).sum() > 0
    assert report["mean_error"] == pytest.approx((rest**2).sum(1).mean(), rel=1e-5)
    assert report["mean_extra_error"] > 0
    _, counts = np.unique(ids.codes[:, 0], return_counts=True)
    level = report["levels"][0]
    assert level["codes_used"] == len(counts)
    assert level["max_items_per_prefix"] == counts.max()
    assert level["perplexity"] == pytest.approx(np.prod((counts / 300) ** (-counts / 300)))


@pytest.mark.parametrize(("n_items", "codes"), [(1, 4), (3, 8), (20, 32), (64, 4)])
@pytest.mark.parametrize("method", ["residual_kmeans", "rqvae"])
def test_few_items_and_full_id_spaces_work(n_items, codes, method):
    _, features = planted(n_items)
    ids = fit(features, method=method, codes=codes)
    assert np.isfinite(ids.codebooks).all()
    assert len(np.unique(ids.codes, axis=0)) == n_items


# --- collisions ---


def error_of(vectors, codebooks, codes):
    total = sum(codebooks[level][codes[:, level]] for level in range(len(codebooks)))
    return ((vectors - total) ** 2).sum(1)


@pytest.mark.parametrize("seed", range(8))
def test_within_a_prefix_the_fewest_items_move_at_the_least_error(seed):
    rng = np.random.default_rng(seed)
    codebooks = rng.normal(size=(1, 6, 3)).astype(np.float32)
    vectors = rng.normal(size=(4, 3)).astype(np.float32)
    nearest, _ = assign(vectors, codebooks)
    taken = np.array([[rng.integers(6)]], np.int32)
    resolved = resolve(vectors, codebooks, nearest, taken)
    fixed = [
        row
        for row in range(4)
        if nearest[row, 0] != taken[0, 0] and (nearest == nearest[row]).sum() == 1  # alone on a free id
    ]
    best = min(
        (
            (np.array(one)[:, None] != nearest).sum(),
            error_of(vectors, codebooks, np.array(one)[:, None]).sum(),
        )
        for one in itertools.permutations([code for code in range(6) if code != taken[0, 0]], 4)
        if all(one[row] == nearest[row, 0] for row in fixed)
    )
    assert ((resolved != nearest).sum(), error_of(vectors, codebooks, resolved).sum()) == pytest.approx(best)


def test_moves_are_as_few_as_the_shared_ids_demand_and_near():
    _, vectors = mixture(1500, 6)
    codebooks = residual_kmeans(vectors, levels=3, codes=16, seed=0)
    nearest, _ = assign(vectors, codebooks)
    resolved = resolve(vectors, codebooks, nearest, np.empty((0, 3), np.int32))
    unique, counts = np.unique(nearest, axis=0, return_counts=True)
    assert len(unique) < 1500
    assert len(np.unique(resolved, axis=0)) == 1500
    _, per_prefix = np.unique(nearest[:, :2], axis=0, return_counts=True)
    overflow = np.maximum(per_prefix - 16, 0).sum()
    moved = (resolved != nearest).any(1).sum()
    assert (counts - 1).sum() <= moved <= (counts - 1).sum() + overflow
    # against the optimal assignment of all moved items to all ids that the others leave free
    movers = (resolved != nearest).any(1)
    every = np.array(list(itertools.product(range(16), repeat=3)))
    key = every @ [256, 16, 1]
    free = every[~np.isin(key, resolved[~movers] @ [256, 16, 1])]
    words = sum(codebooks[level][free[:, level]] for level in range(3))
    cost = ((vectors[movers][:, None] - words) ** 2).sum(-1)
    best = cost[linear_sum_assignment(cost)].mean()
    ours = error_of(vectors, codebooks, resolved)[movers].mean()
    random = cost.mean()
    assert ours < best + 0.25 * (random - best)


def test_an_id_space_filled_by_copies_of_one_item_gives_every_id_once():
    codebooks = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    vectors = np.repeat(codebooks[:, 2].sum(0)[None], 125, 0)
    nearest, _ = assign(vectors, codebooks)
    resolved = resolve(vectors, codebooks, nearest, np.empty((0, 3), np.int32))
    assert len(np.unique(resolved, axis=0)) == 125
    held = np.array(
        [[a, b, c] for a, b, c in itertools.product(range(5), repeat=3) if (a, b, c) != (4, 4, 4)], np.int32
    )
    assert resolve(vectors[:1], codebooks, nearest[:1], held).tolist() == [[4, 4, 4]]


# --- quantiser ---


def test_assignment_equals_vector_quantize_pytorch_on_the_same_codebooks():
    _, vectors = mixture(500)
    codebooks = residual_kmeans(vectors, levels=3, codes=16, seed=0)
    theirs = ResidualVQ(dim=12, num_quantizers=3, codebook_size=16).eval()
    for layer, codebook in zip(theirs.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(torch.from_numpy(codebook)[None])
    quantised, codes, _ = theirs(torch.from_numpy(vectors)[None])
    ours, rest = assign(vectors, codebooks)
    assert (ours == codes[0].numpy()).mean() > 0.999  # float32 ties apart
    assert np.abs(vectors - rest - quantised[0].detach().numpy()).max() < 1e-4


def test_residual_kmeans_loses_no_more_than_vector_quantize_pytorch():
    _, vectors = mixture(1000, 20)
    codebooks = residual_kmeans(vectors, levels=2, codes=16, seed=0)
    ours = (assign(vectors, codebooks)[1] ** 2).sum(1).mean()
    torch.manual_seed(0)
    theirs = ResidualVQ(dim=12, num_quantizers=2, codebook_size=16, kmeans_init=True, kmeans_iters=25)
    batch = torch.from_numpy(vectors)[None]
    for _ in range(50):
        theirs(batch)
    quantised = theirs.eval()(batch)[0]
    assert ours <= 1.1 * ((batch - quantised) ** 2).sum(-1).mean().item()
    assert ours < 0.5 * ((vectors - vectors.mean(0)) ** 2).sum(1).mean()


def test_kmeans_is_as_good_as_sklearn_and_leaves_no_code_empty():
    _, vectors = mixture(600, 30)
    centres = kmeans(vectors, 30, seed=0)
    nearest, rest = assign(vectors, centres[None])
    oracle = KMeans(30, n_init=5, random_state=0).fit(vectors)
    assert (rest**2).sum() <= 1.1 * oracle.inertia_
    assert len(np.unique(nearest)) == 30


def test_kmeans_splits_one_far_group_although_most_vectors_are_equal():
    vectors = np.zeros((500, 3), np.float32)
    vectors[:6] = np.random.default_rng(0).normal(size=(6, 3)) + 9
    nearest, rest = assign(vectors, kmeans(vectors, 7, seed=0)[None])
    assert len(np.unique(nearest)) == 7
    assert np.abs(rest).max() < 1e-4


# --- co-occurrence ---


def sessions(n_items=120, n_groups=4, n_users=600, seed=0):
    rng = np.random.default_rng(seed)
    group = rng.integers(n_groups, size=n_items)
    return group, [
        rng.choice(np.flatnonzero(group == rng.integers(n_groups)), size=6).astype(np.int32) for _ in range(n_users)
    ]


def test_cooccurrence_factors_find_who_is_seen_together():
    group, histories = sessions()
    factors = cooccurrence_factors(histories, 121, 4, seed=0)
    assert factors.dtype == np.float32
    assert (factors[120] == 0).all()  # no events
    assert np.allclose(np.linalg.norm(factors[:120], axis=1), 1, atol=1e-5)
    found = KMeans(4, n_init=5, random_state=0).fit_predict(factors[:120])
    assert adjusted_mutual_info_score(group, found) > 0.9
    rng = np.random.default_rng(1)
    noise = [rng.integers(120, size=6) for _ in histories]
    found = KMeans(4, n_init=5, random_state=0).fit_predict(cooccurrence_factors(noise, 120, 4, seed=0))
    assert adjusted_mutual_info_score(group, found) < 0.1


def test_collaborative_factors_join_ids_and_new_items_have_none():
    group, histories = sessions()
    rng = np.random.default_rng(3)
    features = {"text": Features(rng.normal(size=(120, 1, 8)).astype(np.float32), np.ones(120, bool))}
    joined = fit(features, codes=4, levels=4, histories=histories, collaborative_dim=4, collaborative_weight=5.0)
    plain = fit(features, codes=4, levels=4)
    assert adjusted_mutual_info_score(group, joined.codes[:, 0]) > 0.9
    assert adjusted_mutual_info_score(group, plain.codes[:, 0]) < 0.1
    assert (joined.space.vectors(features)[:, 8:] == 0).all()
    assert len(joined.extend(features).codes) == 240


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "pq"}, ConfigError, r"'pq' is unknown; valid: residual_kmeans, rqvae"),
        (
            {"levels": 1, "codes": 8},
            ConfigError,
            r"50 items need an id each, but 1 levels of 8 codes make only 8",
        ),
        ({"collaborative_dim": 2}, ConfigError, r"collaborative_dim 2: found 0 histories over 50 items"),
        ({"fit_on": np.zeros(50, bool)}, ConfigError, r"expected bool \[50\] with a true entry, found 0"),
        ({"fit_on": np.ones(49, bool)}, ConfigError, r"expected bool \[50\].* \(49,\)"),
    ],
)
def test_impossible_settings_are_refused(changes, error, message):
    _, features = planted(50)
    with pytest.raises(error, match=message):
        fit(features, **changes)


def test_unusable_features_are_refused():
    _, features = planted(50)
    with pytest.raises(ConfigError, match="at least one modality"):
        fit({})
    ids = fit(features)
    with pytest.raises(DataError, match=r"widths \{'text': 12\}, .* fitted on \{'text': 12, 'image': 6\}"):
        ids.extend({"text": features["text"]})
    with pytest.raises(DataError, match=r"different numbers of items: \{'text': 50, 'image': 3\}"):
        fit({**features, **rows_of({"image": features["image"]}, slice(3))})
    features["text"].values[[4, 9], 0, 0] = np.nan
    with pytest.raises(DataError, match=r"features text: 2 items hold NaN or infinity, rows \[4, 9\]"):
        fit(features)
    full = fit(rows_of(planted(8)[1], slice(None)), levels=1)
    with pytest.raises(ConfigError, match=r"9 items need an id each, but 1 levels of 8 codes make only 8"):
        full.extend(rows_of(planted(8)[1], slice(1)))
