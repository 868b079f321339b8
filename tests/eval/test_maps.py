"""Pictures of features: against SVD, on features whose answer is known, and on encoders of every origin."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from granvit.eval.maps import load_features, patch_at, pca_colours, pca_picture, similarity, similarity_picture
from granvit.model.preprocessor import FILE, read_budget

GRIDS = [(1, 1), (1, 9), (7, 1), (5, 3), (2, 2)]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_colours_are_the_first_three_principal_components():
    features = drawn(6, 8, 20) * torch.logspace(1, -1, 20) + 5
    colours = pca_colours(features).reshape(-1, 3).astype(float)
    x = features.reshape(48, 20).double().numpy()
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for component in range(3):
        scores = u[:, component] * s[component]
        low, high = np.percentile(scores, (2, 98))
        wanted = 255 * ((scores - low) / (high - low)).clip(0, 1)
        turned = 255 * ((-scores + high) / (high - low)).clip(0, 1)
        got = colours[:, component]
        assert min(np.abs(got - wanted).max(), np.abs(got - turned).max()) <= 0.5 + 1e-6


def test_the_sign_of_a_component_is_fixed_by_its_largest_weight():
    ramp = torch.linspace(-1, 1, 12).view(3, 4, 1)
    up = pca_colours(ramp * torch.tensor([3.0, -1.0]))[..., 0]
    down = pca_colours(ramp * torch.tensor([-3.0, 1.0]))[..., 0]
    assert (np.diff(up.ravel().astype(int)) >= 0).all() and up[-1, -1] == 255  # along the 3, whose weight is positive
    assert np.array_equal(down, 255 - up)


def test_an_odd_patch_does_not_take_the_contrast():
    features = drawn(10, 10, 4)
    features[0, 0] = 1000.0
    assert pca_colours(features)[..., 0].std() > 50


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, 1e6])
def test_equal_features_are_grey_even_where_they_are_rounded(grid, value):
    features = torch.full((*grid, 16), value) * (1 + 1e-7 * drawn(*grid, 16))
    assert (pca_colours(features) == 128).all()


def test_components_that_are_not_there_are_grey():
    assert (pca_colours(drawn(4, 4, 1))[..., 1:] == 128).all()
    assert (pca_colours(drawn(1, 2, 8))[..., 1:] == 128).all()  # two patches differ along one axis


@pytest.mark.parametrize("grid", GRIDS)
def test_similarity_is_the_cosine_and_1_at_the_patch(grid):
    features = drawn(*grid, 5)
    for row in range(grid[0]):
        for column in range(grid[1]):
            values = similarity(features, ((column + 0.5) / grid[1], (row + 0.5) / grid[0]))
            wanted = torch.cosine_similarity(features, features[row, column].expand_as(features), dim=-1)
            assert values.shape == grid and values[row, column] == pytest.approx(1)
            torch.testing.assert_close(values, wanted)


def test_opposite_and_empty_features():
    features = torch.tensor([[[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
    assert similarity(features, (0.0, 0.0)).tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_points_on_the_edge_are_in_the_last_patch_and_others_are_refused():
    assert patch_at((0.0, 0.0), (5, 3)) == (0, 0) and patch_at((1.0, 1.0), (5, 3)) == (4, 2)
    assert patch_at((0.4, 0.19), (5, 3)) == (0, 1)
    for point in ((-0.01, 0.5), (0.5, 1.01), (float("nan"), 0.5), (0.5, float("inf"))):
        with pytest.raises(ValueError, match="outside the image"):
            similarity(drawn(5, 3, 4), point)
    with pytest.raises(ValueError, match="Divide x by the image's width"):
        patch_at((30.0, 0.5), (5, 3))


@pytest.mark.parametrize(("size", "shown"), [((40, 20), (640, 320)), ((15, 60), (160, 640)), ((900, 700), (900, 700))])
def test_pictures_have_the_images_shape_and_mark_the_patch(size, shown):
    image, features = Image.new("RGB", size, "gray"), drawn(2, 4, 8)
    assert pca_picture(image, features).size == shown
    picture = similarity_picture(image, features, (0.6, 0.9))
    assert picture.size == shown
    white = (np.array(picture) == 255).all(-1)
    rows, columns = white.any(1).nonzero()[0] / shown[1], white.any(0).nonzero()[0] / shown[0]
    assert [rows[0], rows[-1], columns[0], columns[-1]] == pytest.approx([0.5, 1, 0.5, 0.75], abs=0.01)


def test_a_run_and_its_encoder_by_itself_have_the_same_features(saved, tmp_path):
    model = saved[1].eval()
    model.save_encoder(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 70, 3), np.uint8))
    with torch.no_grad():
        wanted = model.encode(image)[0]
    for path in (saved[0], tmp_path):
        features = load_features(path)(image)
        assert features.shape[:2] == model.config.grid(32, 70)
        torch.testing.assert_close(features.flatten(0, 1), wanted)


def test_an_encoder_of_another_family_takes_its_own_pixels_and_number_of_patches(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(tmp_path)
    image = Image.new("RGB", (64, 64), "teal")
    features = load_features(tmp_path)
    assert features.max_patches == 16 and features.image_mean[0] == pytest.approx(0.485)
    assert features(image).shape == (4, 4, 16)
    settings = {"do_center_crop": True, "crop_size": {"height": 42, "width": 42}, "size": {"shortest_edge": 50}}
    (tmp_path / FILE).write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    features = load_features(tmp_path)
    assert features.max_patches == 36 and features.image_mean == [0.1, 0.2, 0.3]


def test_budgets_of_preprocessors(tmp_path):
    cases = [
        ({"max_num_patches": 100, "size": {"height": 9}}, 100), ({"size": {"height": 32, "width": 32}}, 16),
        ({"size": {"shortest_edge": 20}}, 4), ({"size": 3}, 1), ({"size": {"longest_edge": 9}}, None), ({}, None),
    ]  # fmt: skip
    assert read_budget(tmp_path, 8) is None  # no preprocessor
    for settings, budget in cases:
        (tmp_path / FILE).write_text(json.dumps({"do_resize": True} | settings))
        assert read_budget(tmp_path, 8) == budget
    for wrong in (0, -4, "many"):
        (tmp_path / FILE).write_text(json.dumps({"max_num_patches": wrong}))
        with pytest.raises(ValueError, match="accepted are positive integers"):
            read_budget(tmp_path, 8)


def test_what_is_no_encoder_is_an_error(saved, tmp_path):
    with pytest.raises(ValueError, match="no model and no encoder at"):
        load_features(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        load_features(tmp_path)
    with pytest.raises(ValueError, match="device: got 'foo'"):
        load_features(saved[0], "foo")
