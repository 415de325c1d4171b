"""POST /v1/vision/detections: files of every kind, turned, unusual, damaged and hostile."""

import zlib
from importlib.util import find_spec

import pytest
from PIL import Image, ImageDraw
from tiny_detector import DETECTIONS, as_part, ask, encoded, halves

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("onnxruntime") is None or find_spec("onnx") is None,
        reason="not installed (extra vision): onnxruntime",
    ),
]

RED_LEFT = {"box": [0.0, 0.0, 32.0, 48.0], "score": 0.99216, "class_id": 0, "class_name": "red"}


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_rotated_photo_answers_like_its_upright_twin(connect, worker, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = halves("red", "blue", (64, 48))
    photo = encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    turns = [
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_270",
        "TRANSVERSE",
        "ROTATE_90",
    ]
    turn = turns[orientation - 1]
    upright = stored if turn is None else stored.transpose(Image.Transpose[turn])
    async with connect(None, vision=worker) as client:
        given = (await ask(client, photo, score_threshold=0.1)).json()
        twin = (await ask(client, encoded(upright), score_threshold=0.1)).json()
    assert given["image"] == {"width": upright.width, "height": upright.height} == twin["image"]
    boxes = [sorted((entry["box"], entry["class_id"]) for entry in one["detections"]) for one in (given, twin)]
    assert boxes[0] == boxes[1]
    assert len(boxes[0]) >= 2


def animated(file_format: str) -> bytes:
    return encoded(halves(), file_format, save_all=True, append_images=[halves("blue")], duration=50, lossless=True)


def sixteen_bits() -> bytes:
    image = Image.new("I;16", (64, 48), 65535)
    return encoded(image)


def palette() -> bytes:
    return encoded(halves().convert("P", palette=Image.Palette.ADAPTIVE))


def transparent() -> bytes:
    image = halves().convert("RGBA")
    ImageDraw.Draw(image).rectangle((32, 0, 64, 48), fill=(0, 0, 255, 0))
    return encoded(image)


GOOD = {
    "animated PNG": (animated("PNG"), [(0, 0)]),
    "animated WebP": (animated("WEBP"), [(0, 0)]),
    "grey": (encoded(Image.new("L", (64, 48), 255)), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "one bit": (encoded(Image.new("1", (64, 48), 1)), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "grey with alpha": (encoded(Image.new("LA", (64, 48), (255, 255))), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "16 bits": (sixteen_bits(), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "palette": (palette(), [(0, 0)]),
    "CMYK": (encoded(halves().convert("CMYK"), "JPEG", quality=95), [(0, 0)]),
    "transparent blue is white": (transparent(), [(0, 0), (1, 0), (1, 1)]),
    "1x1": (encoded(Image.new("RGB", (1, 1), "red")), [(0, 0), (1, 0)]),
    "1x10000": (encoded(Image.new("RGB", (1, 10_000), "blue")), [(0, 1), (1, 1)]),
    "nothing on it": (encoded(Image.new("RGB", (64, 48))), []),
    "damaged EXIF": (encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken"), [(0, 0)]),
    "JPEG named PNG": (encoded(halves(), "JPEG"), [(0, 0)]),
}


@pytest.mark.parametrize("name", GOOD)
async def test_unusual_images_get_the_right_answer(connect, worker, name):
    data, expected = GOOD[name]
    async with connect(None, vision=worker) as client:
        answer = await client.post(DETECTIONS, files=[as_part(data)], data={"score_threshold": "0.9"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    width = body["image"]["width"]
    found = [(int(entry["box"][0] * 2 >= width), entry["class_id"]) for entry in body["detections"]]
    assert sorted(found) == expected


def bomb() -> bytes:
    """60,000 x 60,000 pixels in a few bytes of PNG header."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "too many pixels": (encoded(Image.new("1", (1000, 201))), "image_too_large", "1000x201"),
    "100 megapixels": (encoded(Image.new("1", (10_000, 10_000))), "image_too_large", "pixels"),
    "bomb": (bomb(), "image_too_large", "pixels"),
    "truncated JPEG": (encoded(halves(), "JPEG")[:400], "invalid_image", "cut short"),
    "truncated PNG": (encoded(halves())[:-30], "invalid_image", "cut short"),
    "truncated WebP": (encoded(halves(), "WEBP")[:40], "invalid_image", "cut short"),
    "header only": (encoded(halves())[:20], "invalid_image", "cut short"),
    "zero bytes": (b"", "invalid_image", "empty"),
    "text": (b"hello, world", "unsupported_image", "JPEG, PNG or WEBP"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image", "JPEG, PNG or WEBP"),
    "GIF": (encoded(halves(), "GIF"), "unsupported_image", "JPEG, PNG or WEBP"),
    "TIFF": (encoded(halves(), "TIFF"), "unsupported_image", "JPEG, PNG or WEBP"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_images_are_400_and_the_next_one_is_answered(connect, worker, name):
    data, code, words = BAD[name]
    async with connect(None, vision=worker) as client:
        for answer in (await client.post(DETECTIONS, files=[as_part(data)]), await ask(client, data)):
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["code"], error["param"]) == (code, "image")
            assert words in error["message"]
        assert (await ask(client, encoded(halves()))).json()["detections"] == [RED_LEFT]
        assert worker.status().restarts == 0
