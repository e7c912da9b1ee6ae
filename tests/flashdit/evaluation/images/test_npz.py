"""Is every hostile or damaged npz one sentence, before it fills the memory?"""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.images.npz import NpzSource
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.stored import extractor_of

EXTRACTOR = EXTRACTORS.build("digits")
POOL = EXTRACTOR.pool_dimensions
MOMENTS = {"mu": np.ones(POOL), "sigma": np.eye(POOL)}
IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


def npy(array):
    """Returns the bytes of a npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def bomb(path, name, shape, dtype, **others):
    """Writes an npz of few bytes whose one array is honestly this large, all zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in others.items():
            archive.writestr(f"{key}.npy", npy(array))
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            about = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, about)
            left = int(np.prod(shape)) * np.dtype(dtype).itemsize
            while left > 0:
                left -= member.write(bytes(min(left, 2**24)))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": np.eye(POOL) + 1j}, "sigma of a reference must be real numbers, got complex128"),
        ({"mu": np.array(["a"] * POOL)}, "mu of a reference must be real numbers, got <U1"),
        ({"mu": np.ones(POOL, bool)}, "mu of a reference must be real numbers, got bool"),
        ({"mu": np.float64(1)}, r"mu must be \(d,\) and sigma \(d, d\), got shapes \(\(\), \(64, 64\)\)"),
        ({"mu": np.ones((1, POOL))}, r"mu must be \(d,\) and sigma \(d, d\)"),
        ({"mu": np.array([None] * POOL)}, r"must not hold Python objects, mu\.npy does"),
        ({"n": np.float64(5)}, "n of a reference must be as make-reference writes it, got float64"),
        (
            {"image_size": 32},
            r"image_size of a reference must be as make-reference writes it, got int64 \(\)",
        ),
    ],
)
def test_moments_of_another_kind_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "r.npz", **MOMENTS | changes)
    with pytest.raises(ValueError, match=message):
        Reference(str(tmp_path / "r.npz"), EXTRACTOR)


@pytest.mark.parametrize("dtype", [np.int32, ">f8", np.float16])
def test_real_moments_of_any_number_type_are_taken(tmp_path, dtype):
    np.savez(tmp_path / "r.npz", **{key: (2 * value).astype(dtype) for key, value in MOMENTS.items()})
    stored = Reference(str(tmp_path / "r.npz"), EXTRACTOR).stored
    assert stored["mu"].tolist() == [2.0] * POOL


@pytest.mark.parametrize("labels", [np.ones(4), np.array([1, None, 2, 3]), np.int64(1)])
def test_labels_of_another_kind_are_refused(tmp_path, labels):
    np.savez(tmp_path / "s.npz", IMAGES, labels)
    with pytest.raises(ValueError, match=r"one integer label per image|Python objects"):
        NpzSource(tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        (
            "arr_1",
            (20_000_000,),
            "<i8",
            r"arr_1 must be one integer label per image, got int64 \(20000000,\)",
        ),
        ("mu", (20_000_000,), "<f8", r"mu must be \(d,\)|must be an npz with images"),
        ("n", (20_000_000,), "<i8", "n of a reference must be as|must be an npz with images"),
        ("fingerprint", (), "<U40000000", "fingerprint of a reference must be as|must be an npz with images"),
        ("arr_0", (1, 10_000, 9_000, 3), "|u1", "at most 89,478,485 pixels, got 9000 × 10000"),
    ],
)
def test_few_bytes_that_unpack_to_many_are_refused_unread(tmp_path, name, shape, dtype, message):
    others = {"arr_1": {"arr_0": IMAGES}, "mu": {"sigma": np.eye(POOL)}}.get(name, {})
    path = bomb(tmp_path / "bomb.npz", name, shape, dtype, **others)
    tracemalloc.start()
    for opened in (lambda: Reference(str(path), EXTRACTOR), lambda: NpzSource(path)):
        with pytest.raises(ValueError, match=message):
            opened()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size < 2**20
    assert peak < 2**23


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr("mu.npy", npy(MOMENTS["mu"]))
        archive.writestr("sigma.npy", npy(MOMENTS["sigma"]))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("mu.npy", npy(9 * MOMENTS["mu"]))
    with pytest.raises(ValueError, match=r"must have each array once, got mu\.npy twice in .*r\.npz"):
        Reference(str(tmp_path / "r.npz"), EXTRACTOR)


@pytest.mark.parametrize(
    ("local", "central", "value", "message"),
    [(6, 8, 1, "is encrypted"), (8, 10, 93, "compression method is not supported")],
    ids=["encrypted", "method"],
)
def test_what_zipfile_cannot_open_is_one_sentence(tmp_path, local, central, value, message):
    path = tmp_path / "r.npz"
    np.savez(path, **MOMENTS)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        for place in range(len(data)):
            if data[place : place + 4] == mark:
                data[place + offset] = value
    path.write_bytes(data)
    opens = [
        lambda: Reference(str(path), EXTRACTOR),
        lambda: NpzSource(path),
        lambda: extractor_of(str(path)),
    ]
    for opened in opens:
        with pytest.raises(ValueError, match=rf"must be an npz .*, got .*r\.npz: .*{message}"):
            opened()


@pytest.mark.parametrize("text", [b"(" * 59 + b"\n", b"{'shape': (\n", b"\x00" * 60])
def test_a_header_that_does_not_parse_is_one_sentence(tmp_path, text):
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    with pytest.raises(ValueError, match=r"must be an npz of arrays, got .*r\.npz: mu\.npy is no array"):
        Reference(str(tmp_path / "r.npz"), EXTRACTOR)


def test_images_that_end_before_their_archive_says_are_named(tmp_path):
    whole, path = npy(IMAGES), tmp_path / "s.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", whole[: -IMAGES[0].nbytes])
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # bytes once unpacked, twice said
        struct.pack_into("<I", data, data.index(mark) + offset, len(whole))
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.npz ends early: arr_0 lacks images from number 3 on"):
        list(NpzSource(path).batches(3))


def test_images_are_read_in_pieces_that_fit_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("flashdit.evaluation.images.npz.READ_AT_MOST", 2 * 8 * 8 * 3)
    np.savez(tmp_path / "s.npz", IMAGES)
    assert [len(batch) for batch in NpzSource(tmp_path / "s.npz").batches(100)] == [2, 2]
