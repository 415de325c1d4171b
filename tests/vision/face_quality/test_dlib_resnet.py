"""dlib's network read from a file of its form: every weight in its place, aligned faces cropped as dlib crops them."""

import numpy as np
import pytest
import torch

from vision.face_quality.alignment import TEMPLATE
from vision.face_quality.dlib_resnet import (
    CROP_EYES,
    DlibFileError,
    DlibRecogniser,
    DlibResNet,
    crop_as_dlib,
    filled,
    read_dlib_resnet,
    tensor_header,
)


def written(model: DlibResNet) -> bytes:
    """What dlib would write of ``model``, its layers' other settings standing as a few bytes before each tensor."""
    parts = []
    for parameters in model.parameters_in_order():
        if len(parameters) == 1:
            rows = parameters[0].detach().T.contiguous()
        else:
            rows = torch.cat([each.detach().flatten() for each in parameters])[:, None]
        shape = (rows.shape[0], rows.shape[1] if rows.shape[1] > 1 else 1, 1, 1)
        parts.append(b"\x05layer" + tensor_header(shape) + rows.numpy().astype("<f4").tobytes() + b"\x00\x00")
    return b"".join(parts)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DlibResNet().eval()


def test_a_file_is_read_weight_for_weight(model, tmp_path):
    file = tmp_path / "dlib_face_recognition_resnet_model_v1.dat"
    file.write_bytes(written(model))
    again = read_dlib_resnet(file)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    recogniser = DlibRecogniser(file)
    faces = torch.randint(256, (2, 3, 112, 112), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        torch.testing.assert_close(recogniser.embed(faces), model(crop_as_dlib(faces.float())))
    assert len(recogniser.digest) == 64 and recogniser.name == file.stem
    for damaged in (file.read_bytes()[:-100], b"", b"no network"):
        file.write_bytes(damaged)
        with pytest.raises(DlibFileError, match="lacks a tensor"):
            read_dlib_resnet(file)


def test_maps_of_different_sizes_are_added_as_dlib_adds_them():
    small, shape = torch.ones(1, 2, 3, 3), (4, 5, 3)
    full = filled(small, shape)
    assert full.shape == (1, *shape) and full.sum() == small.sum() and (full[:, :2, :3, :3] == 1).all()
    assert filled(small, (2, 3, 3)) is small


def test_eyes_come_to_lie_where_dlib_has_them():
    y, x = np.mgrid[:112, :112]
    for (face_x, face_y), crop_eye in zip(TEMPLATE[:2], CROP_EYES, strict=True):
        spot = np.exp(-((x - face_x) ** 2 + (y - face_y) ** 2) / 8)
        crop = crop_as_dlib(torch.from_numpy(spot).float().expand(1, 3, -1, -1))[0, 0].numpy()
        rows, columns = np.mgrid[:150, :150]
        found = [(crop * columns).sum() / crop.sum(), (crop * rows).sum() / crop.sum()]
        np.testing.assert_allclose(found, crop_eye, atol=0.25)
