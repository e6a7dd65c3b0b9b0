"""Frozen encoders: what they can read, what they must not, and what is encoded twice."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from genrec.catalog import Catalogue, read_catalogue
from genrec.config import Encoder, Synthetic
from genrec.encoders import Features, encode, transformers_image, transformers_text
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.synthetic import Truth, make_synthetic

MOBILENET = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "encoders" / "mobilenet-v2"
TITLES = [
    "red oak chair",
    "blue steel lamp with a very long and winding title",
    "glass vase",
    "",
    "oak chair",
]


def make_catalogue(titles: list[str], images: list[str | None]) -> Catalogue:
    n = len(titles)
    return Catalogue(
        item_ids=[f"i{row}" for row in range(n)],
        titles=titles,
        descriptions=[""] * n,
        categories=[[] for _ in range(n)],
        attributes=[{} for _ in range(n)],
        prices=np.full(n, np.nan, dtype=np.float32),
        images=images,
        available=np.ones(n, dtype=bool),
    )


def draw(folder: Path, n: int, seed: int = 0) -> list[str | None]:
    rng = np.random.default_rng(seed)
    paths: list[str | None] = []
    for row in range(n):
        path = folder / f"{row}.png"
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Catalogue, Truth]:
    folder = tmp_path_factory.mktemp("shop")
    truth = make_synthetic(Synthetic(n_users=10), 0, folder)
    catalogue, _ = read_catalogue(
        folder / "items.jsonl", {}, max_bad_share=0.0, max_text_chars=20_000, max_pixels=40_000_000
    )
    return catalogue, truth


@pytest.fixture(scope="module")
def builtin(shop, tmp_path_factory) -> dict[str, Features]:
    cache = tmp_path_factory.mktemp("cache")
    return {modality: encode(shop[0], modality, Encoder(), cache) for modality in ("text", "image")}


def probe(features: Features, labels: np.ndarray) -> float:
    """Accuracy of a linear reader on held-out items."""
    x, cut = features.values[:, 0], 450
    return float(LogisticRegression(max_iter=300).fit(x[:cut], labels[:cut]).score(x[cut:], labels[cut:]))


@pytest.mark.parametrize(
    ("modality", "name", "floor"),
    [
        ("image", "colour", 0.9),
        ("image", "shape", 0.9),
        ("image", "pattern", 0.7),
        ("text", "brand", 0.9),
        ("text", "material", 0.9),
        ("text", "use", 0.9),
        ("text", "category", 0.9),
    ],
)
def test_builtin_features_read_their_own_attributes_and_not_the_others(shop, builtin, modality, name, floor):
    labels = shop[1].attributes[name]
    other = "text" if modality == "image" else "image"
    chance = 1 / (labels.max() + 1)
    ceiling = chance + 4 * np.sqrt(chance * (1 - chance) / 150)  # four standard errors over 150 items
    assert probe(builtin[modality], labels) > floor
    assert probe(builtin[modality], np.random.default_rng(0).permutation(labels)) < ceiling
    assert probe(builtin[other], labels) < ceiling


def test_builtin_shapes_norms_and_repeatability(shop, builtin, tmp_path):
    text, image = builtin["text"], builtin["image"]
    assert text.values.shape == (600, 1, 64)
    assert 100 <= image.values.shape[2] <= 300
    for modality, features in builtin.items():
        assert features.values.dtype == np.float32
        assert features.present.all()
        np.testing.assert_array_equal(encode(shop[0], modality, Encoder(), tmp_path).values, features.values)
    np.testing.assert_allclose(np.linalg.norm(text.values[:, 0], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(image.values.mean(axis=(0, 1)), 0, atol=1e-4)
    # columns have unit variance up to their block's factor, so all together they have one each
    assert (image.values**2).mean() == pytest.approx(1, abs=0.05)


def test_builtin_text_is_tfidf_up_to_a_rotation(shop):
    """With as many dimensions as the vocabulary has, cosines are those of plain TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles = ["oak chair", "oak lamp", "steel lamp", "steel chair chair", "oak lamp"]
    catalogue = make_catalogue(titles, [None] * 5)
    found = encode(catalogue, "text", Encoder(dim=4), Path()).values[:, 0]
    plain = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit_transform(titles).toarray()
    assert np.linalg.matrix_rank(plain) <= 4
    np.testing.assert_allclose(found @ found.T, plain @ plain.T, atol=1e-5)


def test_builtin_text_is_narrower_for_a_small_catalogue_and_says_so(caplog):
    catalogue = make_catalogue(TITLES, [None] * 5)
    with caplog.at_level(logging.WARNING):
        features = encode(catalogue, "text", Encoder(), Path())
    assert features.values.shape[2] < 64
    assert f"{features.values.shape[2]} wide, not 64" in caplog.text
    assert features.present.tolist() == [True, True, True, False, True]
    assert not features.values[3].any()


@pytest.mark.parametrize("titles", [["lamp"], ["lamp", "lamp"], ["a b c", "d e f"]])
def test_builtin_text_takes_the_smallest_catalogues(titles):
    features = encode(make_catalogue(titles, [None] * len(titles)), "text", Encoder(), Path())
    assert np.isfinite(features.values).all()
    assert features.present.all()


def test_builtin_image_masks_items_without_a_picture_and_takes_grey_ones(tmp_path):
    paths = draw(tmp_path, 3)
    Image.new("L", (5, 300), 128).save(tmp_path / "grey.png")
    features = encode(
        make_catalogue([""] * 5, [*paths, None, str(tmp_path / "grey.png")]), "image", Encoder(), tmp_path
    )
    assert features.present.tolist() == [True, True, True, False, True]
    assert not features.values[3].any()
    assert np.isfinite(features.values).all()


def test_builtin_image_names_a_picture_that_is_gone(tmp_path):
    catalogue = make_catalogue(["", ""], [*draw(tmp_path, 1), str(tmp_path / "gone.png")])
    with pytest.raises(DataError, match=r"gone\.png"):
        encode(catalogue, "image", Encoder(), tmp_path)


def test_features_survive_the_disk_and_refuse_half_an_artefact(tmp_path):
    features = Features(np.ones((2, 3, 4), dtype=np.float32), np.array([True, False]))
    features.save(tmp_path)
    again = Features.load(tmp_path)
    np.testing.assert_array_equal(again.values, features.values)
    np.testing.assert_array_equal(again.present, features.present)
    np.save(tmp_path / "present.npy", np.ones(3, dtype=bool))
    with pytest.raises(ArtefactError, match=r"values \(2, 3, 4\) and present \(3,\)"):
        Features.load(tmp_path)
    (tmp_path / "values.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ArtefactError, match="no readable features"):
        Features.load(tmp_path)


# precomputed


def precomputed(tmp_path: Path, array: Any) -> Encoder:
    np.save(tmp_path / "x.npy", array)
    return Encoder(kind="precomputed", path=tmp_path / "x.npy")


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_precomputed_keeps_the_numbers_and_masks_zero_rows(tmp_path, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    array[1] = 0
    features = encode(make_catalogue([""] * 3, [None] * 3), "image", precomputed(tmp_path, array), tmp_path)
    assert features.values.dtype == np.float32
    assert features.values.shape == (3, *((1,) if len(shape) == 2 else ()), *shape[1:])
    np.testing.assert_array_equal(features.values.reshape(shape), array.astype(np.float32))
    assert features.present.tolist() == [True, False, True]


def test_precomputed_refuses_what_does_not_fit(tmp_path):
    catalogue = make_catalogue([""] * 4, [None] * 4)
    good = np.ones((4, 2))

    def refuse(array: Any, match: str) -> None:
        with pytest.raises(DataError, match=match):
            encode(catalogue, "text", precomputed(tmp_path, array), tmp_path)

    refuse(np.ones((3, 2)), r"x\.npy: found shape \[3, 2\], expected \[4, D\] or \[4, T, D\]")
    refuse(np.ones(4), r"found shape \[4\]")
    refuse(np.array(["a"] * 4), r"found <U1, expected one array of numbers")
    for value in (np.nan, np.inf, 1e300):
        bad = good.copy()
        bad[2, 1] = bad[3, 0] = value
        refuse(
            bad,
            r"x\.npy: 2 rows hold NaN or infinity.*first \[2, 3\] \(items \['i2', 'i3'\]\); compute",
        )
    (tmp_path / "x.npy").write_text("no array")
    with pytest.raises(DataError, match=r"x\.npy: cannot be read as \.npy"):
        encode(catalogue, "text", Encoder(kind="precomputed", path=tmp_path / "x.npy"), tmp_path)


# errors of the choice


def test_unknown_choices_list_the_valid_ones(tmp_path):
    catalogue = make_catalogue(["lamp"], [None])
    with pytest.raises(ConfigError, match=r"unknown modality 'audio'; valid: \['text', 'image'\]"):
        encode(catalogue, "audio", Encoder(), tmp_path)
    with pytest.raises(ConfigError, match=r"encode\.image\.kind 'sentence_transformers' does not exist; valid"):
        encode(catalogue, "image", Encoder(kind="sentence_transformers", model="x"), tmp_path)
    with pytest.raises(DataError, match=r"no item of the catalogue has image to encode; set encode\.image"):
        encode(catalogue, "image", Encoder(), tmp_path)
    with pytest.raises(DataError, match=r"no item of the catalogue has text to encode"):
        encode(make_catalogue([" "], [None]), "text", Encoder(), tmp_path)


@pytest.mark.parametrize(
    ("modality", "kind"),
    [("text", "transformers"), ("image", "transformers"), ("text", "sentence_transformers")],
)
def test_a_folder_without_a_model_is_named(tmp_path, modality, kind):
    (tmp_path / "empty").mkdir()
    catalogue = make_catalogue(["lamp"], draw(tmp_path, 1))
    with pytest.raises(ConfigError, match=rf"encode\.{modality}\.model '.*empty': cannot be loaded"):
        encode(catalogue, modality, Encoder(kind=kind, model=str(tmp_path / "empty")), tmp_path / "cache")


# transformers text


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny random BERT with a WordPiece tokenizer trained on the titles."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(TITLES, vocab_size=80, min_frequency=1, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, model_max_length=16, pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def count_rows(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[int]:
    """Rows that a module's encoder is asked for from now on."""
    asked: list[int] = []
    load = module.load_model

    def counting(*args: Any) -> Any:
        encode_batch = load(*args)

        def batch(rows: list[int]) -> np.ndarray:
            asked.extend(rows)
            return encode_batch(rows)

        return batch

    monkeypatch.setattr(module, "load_model", counting)
    return asked


def test_transformers_text_is_the_masked_mean_of_one_text_alone(bert, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    features = encode(
        make_catalogue(TITLES, [None] * 5),
        "text",
        Encoder(kind="transformers", model=str(bert), batch_size=3),
        tmp_path,
    )
    assert features.values.shape == (5, 1, 16)
    assert features.present.tolist() == [True, True, True, False, True]
    assert not features.values[3].any()
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    for row in (0, 1, 2, 4):
        tokens = tokenizer(TITLES[row], return_tensors="pt", truncation=True, max_length=16)
        with torch.inference_mode():
            expected = model(**tokens).last_hidden_state[0].mean(dim=0)
        # float32 round-off; padding that leaked into the mean moves it by 0.01 and more
        np.testing.assert_allclose(features.values[row, 0], expected.numpy(), atol=2e-6)


def test_only_changed_texts_are_encoded_again(bert, tmp_path, monkeypatch):
    asked = count_rows(monkeypatch, transformers_text)
    settings = Encoder(kind="transformers", model=str(bert), batch_size=2)
    first = encode(make_catalogue(TITLES, [None] * 5), "text", settings, tmp_path)
    assert sorted(asked) == [0, 1, 2, 4]
    asked.clear()
    again = encode(make_catalogue(TITLES, [None] * 5), "text", settings, tmp_path)
    assert asked == []
    np.testing.assert_array_equal(again.values, first.values)
    changed = ["oak chair", "red oak chair", "green glass vase", "green glass vase", "red oak chair"]
    moved = encode(make_catalogue(changed, [None] * 5), "text", settings, tmp_path)
    assert asked == [2]  # moved rows are known by content, equal ones are encoded once
    np.testing.assert_array_equal(moved.values[[0, 1, 4]], first.values[[4, 0, 0]])
    np.testing.assert_array_equal(moved.values[2], moved.values[3])


def test_another_model_at_the_same_path_is_another_cache(bert, tmp_path, monkeypatch):
    import shutil

    from transformers import BertModel

    shutil.copytree(bert, tmp_path / "model")
    catalogue, cache = make_catalogue(["oak chair"], [None]), tmp_path / "cache"
    settings = Encoder(kind="transformers", model=str(tmp_path / "model"))
    asked = count_rows(monkeypatch, transformers_text)
    first = encode(catalogue, "text", settings, cache)
    shutil.copytree(bert, tmp_path / "copy")
    encode(catalogue, "text", Encoder(kind="transformers", model=str(tmp_path / "copy")), cache)
    assert asked == [0]  # the same files elsewhere are the same model
    model = BertModel.from_pretrained(bert)
    model.embeddings.word_embeddings.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "model")
    second = encode(catalogue, "text", settings, cache)
    assert asked == [0, 0]
    assert np.abs(second.values - first.values).max() > 0.01


def test_a_damaged_shard_is_encoded_again_and_a_killed_run_keeps_whole_ones(bert, tmp_path, monkeypatch, caplog):
    from genrec.encoders import cache

    monkeypatch.setattr(cache, "SHARD_ITEMS", 2)
    catalogue = make_catalogue(TITLES, [None] * 5)
    settings = Encoder(kind="transformers", model=str(bert), batch_size=2)
    first = encode(catalogue, "text", settings, tmp_path)
    shards = sorted(tmp_path.glob("*/*.npz"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    asked = count_rows(monkeypatch, transformers_text)
    again = encode(catalogue, "text", settings, tmp_path)
    assert len(asked) == 2
    assert "damaged" in caplog.text
    np.testing.assert_allclose(again.values, first.values, atol=2e-6)
    assert not list(tmp_path.glob("*/.*"))


def test_sentence_transformers_from_a_folder(bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(bert), device="cpu").save(str(tmp_path / "sentence"))  # mean pooling over BERT
    catalogue = make_catalogue(TITLES, [None] * 5)
    settings = Encoder(kind="sentence_transformers", model=str(tmp_path / "sentence"), batch_size=2)
    found = encode(catalogue, "text", settings, tmp_path / "cache")
    other = encode(catalogue, "text", Encoder(kind="transformers", model=str(bert)), tmp_path / "cache")
    assert found.present.tolist() == other.present.tolist()
    np.testing.assert_allclose(found.values, other.values, atol=2e-6)


# transformers pictures


def tiny_vision(kind: str, folder: Path) -> Any:
    """A tiny random SigLIP or CLIP, whole or its vision part alone, saved with its image processor."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipConfig,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision: dict[str, Any] = {**size, "image_size": 32, "patch_size": 16}
    words: dict[str, Any] = {**size, "vocab_size": 50, "max_position_embeddings": 8}
    model: Any
    if kind == "siglip-vision":
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    elif kind == "clip-vision":
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=words, vision_config=vision))
    else:
        model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model.eval() if "-" in kind else model.vision_model.eval()


def pixels(path: str | None) -> torch.Tensor:
    """The processor's work by hand: resize to 32 x 32, scale to -1..1, channels first."""
    assert path is not None
    picture = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture) / 127.5 - 1.0).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(("kind", "n_tokens"), [("siglip-vision", 4), ("siglip", 4), ("clip-vision", 5), ("clip", 5)])
def test_vision_towers_pooled_and_by_patch(tmp_path, kind, n_tokens):
    model = tiny_vision(kind, tmp_path / "model")
    paths = draw(tmp_path, 3)
    catalogue = make_catalogue([""] * 4, [*paths, None])
    name = str(tmp_path / "model")
    pooled = encode(catalogue, "image", Encoder(kind="transformers", model=name, batch_size=2), tmp_path / "cache")
    patched = encode(catalogue, "image", Encoder(kind="transformers", model=name, patches=True), tmp_path / "cache")
    assert pooled.values.shape == (4, 1, 16)
    assert patched.values.shape == (4, n_tokens, 16)
    assert pooled.present.tolist() == patched.present.tolist() == [True, True, True, False]
    assert not patched.values[3].any()
    for row in range(3):
        with torch.inference_mode():
            expected = model(pixel_values=pixels(paths[row]))
        np.testing.assert_allclose(pooled.values[row, 0], expected.pooler_output[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(patched.values[row], expected.last_hidden_state[0].numpy(), atol=1e-4)
    assert np.abs(pooled.values[0] - pooled.values[1]).max() > 1e-2  # what the tolerance must tell apart


def test_only_changed_pictures_are_encoded_again(tmp_path, monkeypatch):
    tiny_vision("siglip-vision", tmp_path / "model")
    paths = draw(tmp_path, 3)
    catalogue = make_catalogue([""] * 3, paths)
    settings = Encoder(kind="transformers", model=str(tmp_path / "model"))
    asked = count_rows(monkeypatch, transformers_image)
    first = encode(catalogue, "image", settings, tmp_path / "cache")
    Image.new("RGB", (40, 50), "red").save(str(paths[1]))
    second = encode(catalogue, "image", settings, tmp_path / "cache")
    assert asked == [0, 1, 2, 1]
    np.testing.assert_array_equal(second.values[[0, 2]], first.values[[0, 2]])
    assert np.abs(second.values[1] - first.values[1]).max() > 1e-2


def test_a_text_model_is_no_picture_encoder(bert, tmp_path):
    import shutil

    shutil.copytree(bert, tmp_path / "bert")
    tiny_vision("siglip-vision", tmp_path / "vision")
    shutil.copy(tmp_path / "vision" / "preprocessor_config.json", tmp_path / "bert")
    with pytest.raises(ConfigError, match="BertModel reads input_ids, not pictures"):
        encode(
            make_catalogue([""], draw(tmp_path, 1)),
            "image",
            Encoder(kind="transformers", model=str(tmp_path / "bert")),
            tmp_path / "cache",
        )


@pytest.mark.skipif(not MOBILENET.is_dir(), reason="no MobileNetV2 folder beside the checkout")
def test_mobilenet_loads_through_the_same_door(shop, tmp_path):
    catalogue, _ = shop
    some = make_catalogue(catalogue.titles[:6], catalogue.images[:6])
    pooled = encode(some, "image", Encoder(kind="transformers", model=str(MOBILENET)), tmp_path)
    patched = encode(some, "image", Encoder(kind="transformers", model=str(MOBILENET), patches=True), tmp_path)
    assert pooled.values.shape == (6, 1, 1280)
    assert patched.values.shape == (6, 49, 1280)
    # its own pooling is the mean of the feature map
    np.testing.assert_allclose(patched.values.mean(axis=1), pooled.values[:, 0], rtol=1e-4, atol=1e-5)
