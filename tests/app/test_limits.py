import numpy as np
import pytest
from PIL import Image

from fitprune.app.limits import Limits

LIMITS = Limits(megabytes=1, megapixels=1, question=20, answer=8)


def saved(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_a_rotated_phone_photo_comes_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 20))  # the left edge of what the sensor saw
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it
    picture = LIMITS.read_picture(saved(tmp_path, image, "phone.jpg", exif=exif, quality=95))
    upright = picture.image()
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2))[0] > 200
    assert upright.getpixel((10, 2))[1] < 60


def test_what_is_transparent_lies_on_white(tmp_path):
    picture = LIMITS.read_picture(saved(tmp_path, Image.new("RGBA", (30, 30), (0, 0, 0, 0)))).image()
    assert picture.getpixel((3, 3)) == (255, 255, 255)


def test_too_many_bytes_are_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"noise\.png has 1\.4 MB: must have at most 1 MB; save it smaller"):
        LIMITS.read_picture(saved(tmp_path, noise, "noise.png"))


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    path = saved(tmp_path, Image.new("1", (10_000, 8_000)), "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has 10,000 x 8,000 pixels: must have at most 1 million"):
        LIMITS.read_picture(path)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.png .*; choose a JPEG, PNG or WebP picture") as error:
        LIMITS.read_picture(path)
    assert str(tmp_path) not in str(error.value)


def test_no_picture_says_how_to_get_one():
    with pytest.raises(ValueError, match="no picture: upload one"):
        LIMITS.read_picture(None)


@pytest.mark.parametrize("text", ["", "  \n", None, 7])
def test_no_question_is_refused(text):
    with pytest.raises(ValueError, match=r"question=.*: must be a text that is not empty"):
        LIMITS.check_question(text)


def test_a_long_question_is_refused():
    assert LIMITS.check_question(" What? ") == "What?"
    with pytest.raises(ValueError, match="the question has 21 characters: must have at most 20; shorten it"):
        LIMITS.check_question("a" * 21)


@pytest.mark.parametrize("tokens", [0, 9, -1, 1.5, "8", None, True])
def test_an_answer_out_of_range_is_refused(tokens):
    with pytest.raises(ValueError, match=r"answer tokens=.*: must be an integer from 1 to 8"):
        LIMITS.check_answer(tokens)


def test_json_has_whole_numbers_as_floats_too():
    assert LIMITS.check_answer(8.0) == 8


def test_nothing_is_handed_to_other_programs(tmp_path):
    path = tmp_path / "drawing.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"drawing.png is not an image file that Pillow reads; choose a JPEG"):
        Limits().read_picture(path)


def test_a_decompression_bomb_is_refused_by_our_own_limit(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (3000, 3000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(ValueError, match=r"bomb.png has more pixels than Pillow opens: must have at most 25 million"):
        Limits().read_picture(path)


def test_an_upload_that_was_deleted_is_to_be_sent_again(tmp_path):
    with pytest.raises(ValueError, match=r"^gone\.png is no longer here: upload it again$"):
        Limits().read_picture(tmp_path / "gone.png")


def test_half_a_letter_is_no_question():
    with pytest.raises(ValueError, match="holds half of a letter"):
        Limits().check_question("what \ud800")
