"""python -m granvit.predict, on a tiny untrained model and with answers put in its mouth."""

import numpy as np
import pytest
from PIL import Image

from granvit import predict
from granvit.eval import loading, maps
from granvit.eval.loading import load_model
from granvit.predict import draw, main


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 32), (0, 0, 255)).save(path)
    return path


@pytest.fixture
def ask(saved, picture, capsys):
    """ask("--box", ...) -> (exit code, stdout, last line of stderr)."""

    def run(*arguments, image=picture):
        code = main([str(saved[0]), "--image", str(image), "--device", "cpu", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, (err.strip().splitlines() or [""])[-1]

    return run


def test_a_box_is_captioned(ask, saved, picture):
    code, out, error = ask("--box", 0.1, 0.1, 0.5, 0.9)
    assert not error  # no bar of a library
    model, processor = saved[1].eval(), load_model(saved[0])[1]
    expected = predict.caption_box(model, processor, Image.open(picture), (0.1, 0.1, 0.5, 0.9))
    assert code == 0 and out == expected + "\n"


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((-0.1, 0, 0.5, 0.5), "reaches outside the image"),
        ((0, 0, 0.5, 1.5), "reaches outside the image"),
        ((0.5, 0, 0.5, 1), "has no area"),
        ((0.9, 0.9, 0.1, 0.1), "has no area"),
        (("nan", 0, 0.5, 1), "is not finite"),
    ],
)
def test_a_box_outside_the_image_or_of_no_area_is_refused_before_the_model_is_loaded(ask, monkeypatch, box, message):
    monkeypatch.setattr(loading, "load_model", None)
    code, out, error = ask("--box", *box)
    assert code == 2 and out == "" and error.startswith("granvit predict: error: box [") and message in error


def test_a_found_box_is_printed_and_drawn(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "answer", lambda *_: "<loc_8><loc_8><loc_15><loc_23>")
    code, out, _ = ask("--find", "a red circle", "--output", tmp_path / "found.png")
    box = [8.5 / 32, 8.5 / 32, 15.5 / 32, 23.5 / 32]
    assert code == 0 and out.startswith(f"[{', '.join(f'{v:.3f}' for v in box)}]")
    drawn = np.array(Image.open(tmp_path / "found.png"))
    assert drawn.shape == (320, 640, 3)
    red = (drawn == (220, 38, 38)).all(-1)
    rows, columns = red.any(1).nonzero()[0], red.any(0).nonzero()[0]
    edges = [columns[0] / 640, rows[0] / 320, columns[-1] / 640, rows[-1] / 320]
    assert edges == pytest.approx(box, abs=0.01)
    assert not red[160, 250]  # an outline, not an area


def test_an_answer_without_a_box_is_said_and_draws_nothing(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "answer", lambda *_: "a red circle")
    code, out, error = ask("--find", "a red circle", "--output", tmp_path / "found.png")
    assert code == 1 and "holds no box: 'a red circle'" in error and not (tmp_path / "found.png").exists()


def test_other_bad_input_is_one_line(ask, tmp_path):
    assert ask("--find", "  ")[2].startswith("granvit predict: error: the sentence to find is empty; describe one")
    assert "none.png is not there" in ask("--find", "x", image=tmp_path / "none.png")[2]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    for words in (("--find", "x"), ("--box", 0, 0, 1, 1), ("--features", tmp_path / "pca.png")):
        error = ask(*words, image=tmp_path / "broken.jpg")[2]
        assert error.startswith(f"granvit predict: error: {tmp_path / 'broken.jpg'}: can't be opened")


def test_devices_and_outputs_that_cannot_be_used_are_said_before_the_work(picture, saved, tmp_path, capsys):
    asked = [str(saved[0]), "--image", str(picture), "--find", "x"]
    assert main([*asked, "--device", "foo", "--output", str(tmp_path / "found.png")]) == 2
    assert capsys.readouterr().err.startswith("granvit predict: error: device: got 'foo', accepted is 'cpu'")
    for output, message in ((tmp_path, "it is a folder"), (tmp_path / "none" / "found.png", "no such folder")):
        with pytest.raises(SystemExit):
            main([*asked, "--output", str(output)])
        assert message in capsys.readouterr().err


def test_maps_are_drawn_of_models_and_of_encoders_by_themselves(saved, picture, tmp_path, capsys):
    saved[1].save_encoder(tmp_path / "encoder")
    for model in (saved[0], tmp_path / "encoder"):
        asked = [str(model), "--image", str(picture), "--device", "cpu"]
        assert main([*asked, "--features", str(tmp_path / "pca.png")]) == 0
        assert capsys.readouterr().out.startswith("32 features of ")
        assert main([*asked, "--similar", "0.9", "0.1", "--output", str(tmp_path / "map.png")]) == 0
        assert "(violet) to 1 (yellow)" in capsys.readouterr().out
        for name in ("pca.png", "map.png"):
            assert Image.open(tmp_path / name).size == (640, 320)
            (tmp_path / name).unlink()


def test_a_point_outside_the_image_is_refused_before_the_model_is_loaded(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(maps, "load_features", None)
    code, out, error = ask("--similar", 30, 0.5, "--output", tmp_path / "map.png")
    assert code == 2 and out == "" and error.startswith("granvit predict: error: point [30.0, 0.5] is outside")
    assert error.endswith("For pixels give --pixels too")


def test_boxes_and_points_may_be_in_pixels(ask, monkeypatch, tmp_path):
    assert ask("--box", 6.4, 3.2, 32, 28.8, "--pixels") == ask("--box", 0.1, 0.1, 0.5, 0.9)
    ask("--similar", 60, 2, "--pixels", "--output", tmp_path / "pixels.png")
    ask("--similar", 60 / 64, 2 / 32, "--output", tmp_path / "relative.png")
    assert (tmp_path / "pixels.png").read_bytes() == (tmp_path / "relative.png").read_bytes()
    monkeypatch.setattr(predict, "answer", lambda *_: "<loc_8><loc_8><loc_15><loc_23>")
    code, out, _ = ask("--find", "a red circle", "--pixels", "--output", tmp_path / "found.png")
    assert code == 0 and out.startswith("[17, 8, 31, 24]")
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr(maps, "load_features", None)
    size = "is not in the image, 64 pixels wide and 32 high"
    for words, message in (
        (("--box", 0, 0, 65, 20), "box [0.0, 0.0, 65.0, 20.0]"),
        (("--box", 5, 5, 5, 20), "box [5.0, 5.0, 5.0, 20.0] (x1 < x2"),
        (("--similar", 5, 33), "point [5.0, 33.0]"),
    ):
        code, _, error = ask(*words, "--pixels")
        assert code == 2 and message in error and size in error
    assert ask("--box", 5, 5, 20, 20)[2].endswith("For pixels give --pixels too")


def test_draw_keeps_the_size_of_a_large_picture():
    image = Image.new("RGB", (1000, 700))
    assert draw(image, (0.0, 0.0, 1.0, 1.0)).size == image.size
