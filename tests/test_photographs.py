"""Good image files are converted to MNIST's form, and bad ones are refused."""

import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import zlib

from conftest import PROJECT
from conftest import damaged
from conftest import pixels
import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image
from PIL import features
import pytest
from scipy import ndimage

from benchmarks import digit_pictures
from benchmarks import photograph
from benchmarks import unseen_digits
from sources import image_files
from sources import photographs


def drawing(height=60, width=90, paper=255, ink=0):
  """Returns a thick L, left of the middle: uint8 [height, width]."""
  image = np.full((height, width), paper, np.uint8)
  image[10:50, 20:28] = ink
  image[42:50, 20:50] = ink
  return image


def encode(image, file_format, **options):
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def read_one(content):
  (image,) = image_files.read(content)
  return image


def to_mnist_form(image, invert="auto"):
  """Converts an image of one digit to MNIST's form, uint8 [28, 28]."""
  return photographs.find_digits(image, invert, is_single=True)[0].seen


GRAY = Image.fromarray(drawing())


@pytest.mark.parametrize(
  "content",
  [
    encode(GRAY, "PNG"),
    encode(GRAY.convert("RGB"), "PNG"),
    encode(GRAY.convert("RGBA"), "PNG"),
    encode(GRAY.convert("LA"), "PNG"),
    encode(GRAY.convert("P"), "PNG"),
    encode(GRAY.convert("1"), "PNG"),
    encode(Image.fromarray(drawing().astype(np.uint16) * 257), "PNG"),
    encode(GRAY, "JPEG", quality=95),
    encode(GRAY.convert("CMYK"), "JPEG", quality=95),
    encode(GRAY.convert("RGB"), "WEBP", lossless=True),
    encode(GRAY, "BMP"),
    encode(GRAY, "GIF"),
    encode(GRAY, "TIFF"),
    encode(Image.fromarray(drawing().astype(np.uint16) * 257), "TIFF"),
    encode(Image.fromarray(drawing().astype(np.float32) / 255), "TIFF"),
    encode(GRAY, "PPM"),
  ],
  ids=(
    "png-gray png-rgb png-rgba png-la png-palette png-bits png-16 jpeg"
    " jpeg-cmyk webp bmp gif tiff tiff-16 tiff-float pgm"
  ).split(),
)
def test_reads_every_format(content, tmp_path):
  (tmp_path / "image").write_bytes(content)
  for image in (read_one(content), read_one(tmp_path / "image")):
    assert image.dtype == np.uint8
    gray = image_files.to_gray(image)
    np.testing.assert_allclose(gray, drawing(), atol=12)  # JPEG rings.


def test_exif_orientation_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # Turn it a quarter clockwise to see it upright.
  content = encode(GRAY, "PNG", exif=exif)
  np.testing.assert_array_equal(read_one(content), np.rot90(drawing(), -1))


@pytest.mark.parametrize("hidden", [0, 128, 255])
@pytest.mark.parametrize("ink", [0, 255])
def test_ink_on_a_transparent_background_stays_visible(ink, hidden):
  """Black ink gets white paper, and white ink gets black paper."""
  rgba = np.full((60, 90, 4), (hidden, hidden, hidden, 0), np.uint8)
  rgba[drawing() == 0] = (ink, ink, ink, 255)
  rgba[42:50, 50] = (ink, ink, ink, 51)  # An edge, a fifth as opaque.
  image = read_one(encode(Image.fromarray(rgba), "PNG"))
  expected = drawing(paper=255 - ink, ink=ink)
  expected[42:50, 50] = 204 if ink == 0 else 51
  np.testing.assert_array_equal(image, np.stack([expected] * 3, axis=-1))


HIDDEN = Image.fromarray(drawing(paper=60))  # 60 will be transparent.
OPACITY = Image.fromarray(255 - drawing())


@pytest.mark.parametrize(
  "content",
  [
    encode(HIDDEN, "PNG", transparency=60),
    encode(HIDDEN.convert("RGB"), "PNG", transparency=(60, 60, 60)),
    encode(HIDDEN.convert("P"), "PNG", transparency=60),
    encode(HIDDEN.convert("P"), "GIF", transparency=60),
    encode(Image.merge("LA", (HIDDEN, OPACITY)), "PNG"),
    encode(
      Image.merge("RGBA", (HIDDEN, HIDDEN, HIDDEN, OPACITY)),
      "WEBP",
      lossless=True,
      exact=True,  # Otherwise the encoder may change transparent pixels.
    ),
  ],
  ids="png-gray png-rgb png-palette gif png-la webp".split(),
)
def test_transparency_in_any_format_becomes_white_under_black_ink(content):
  np.testing.assert_array_equal(
    image_files.to_gray(read_one(content)), drawing()
  )


@pytest.mark.parametrize(
  ("paper", "ink"),
  [(255, 0), (200, 40), (128, 0), (0, 255), (60, 220), (128, 255)],
)
def test_paper_fills_the_transparent_edges_around_it(paper, ink):
  """This holds for any hidden color, and for dark and light ink."""
  whole = np.stack([drawing(paper=paper, ink=ink)] * 3, axis=-1)
  rgba = np.full((60, 90, 4), 255 - paper, np.uint8)
  rgba[..., 3] = 0
  rgba[6:54, 16:54, :3] = whole[6:54, 16:54]  # A third of the picture.
  rgba[6:54, 16:54, 3] = 255
  image = read_one(encode(Image.fromarray(rgba), "PNG"))
  np.testing.assert_array_equal(image, whole)

  form = np.zeros((28, 28), bool)
  form[2:22, 10:14] = form[18:22, 10:25] = True
  np.testing.assert_array_equal(to_mnist_form(image) > 127, form)


def npy(array, **options):
  buffer = io.BytesIO()
  np.save(buffer, array, **options)
  return buffer.getvalue()


@pytest.mark.parametrize(
  "array",
  [
    drawing(),
    drawing()[None],
    drawing()[None, ..., None],
    drawing()[..., None],
    np.repeat(drawing()[..., None], 3, axis=-1),
    drawing() // 255,
    drawing() / 255,
    drawing().astype(np.uint16) * 257,
    np.repeat(drawing()[None, ..., None], 3, axis=-1),
  ],
)
def test_reads_arrays(array, tmp_path):
  (tmp_path / "a.npy").write_bytes(npy(array))
  for image in (read_one(npy(array)), read_one(tmp_path / "a.npy")):
    np.testing.assert_allclose(image_files.to_gray(image), drawing(), atol=0.5)
  three = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
  for shape in ((3, 28, 28), (3, 784), (3, 28, 28, 1)):
    actual = list(image_files.read(npy(three.reshape(shape))))
    np.testing.assert_array_equal(actual, three)


class Trap:
  def __reduce__(self):
    return pytest.fail, ("it was unpickled",)


def huge_header(shape):
  header = npy(np.zeros((2, 2), np.uint8))
  return header.replace(b"(2, 2)", str(shape).encode()[:20]).ljust(200, b" ")


BAD = {
  "nothing": (b"", "is empty"),
  "text": (b"a digit", "is not an image in a supported format .PNG, JPEG, "),
  "truncated png": (encode(GRAY, "PNG")[:100], "cannot be decoded"),
  "truncated jpeg": (encode(GRAY, "JPEG")[:-200], "cannot be decoded"),
  "bad png": (
    encode(GRAY, "PNG").replace(b"IHDR", b"JHDR"),
    "is not an image in",
  ),
  "pickle": (pickle.dumps(Trap()), "is not an image in"),
  "npy of objects": (npy(np.array([Trap()])), "cannot be read as an array"),
  "truncated npy": (npy(drawing())[:-1], "cannot be read as an array"),
  "npy of text": (npy(np.array([["a"]])), "is an array of <U1"),
  "garbled npy": (
    npy(drawing()).replace(b"(60, 90)", b"(60, 9(("),
    "cannot be read as an array",
  ),
  "npy with a shape beyond counting": (
    npy(drawing()).replace(b"(60, 90), }  ", b"(9999999999,) * 9, }"),
    "cannot be read as an array",
  ),
  "npy of negative numbers": (npy(-np.eye(28)), "has values from -1 to"),
  "npy just above 16 bits": (
    npy(np.eye(28) * 65536),
    "has values from 0 to 65536",
  ),
  "npy just above 1": (npy(np.eye(28) * 1.01), "has values from 0 to 1.01"),
  "npy of nan": (npy(np.full((28, 28), np.nan)), "has values from nan"),
  "npy of one number": (npy(np.array(1)), "is an array of int64"),
  "npy of nothing": (npy(np.zeros((0, 28, 28))), "is an array of float64"),
  "npy with a huge header": (
    huge_header((99999999, 99999)),
    "cannot be read as an array",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_for_a_bad_file_says_why(name, tmp_path):
  content, message = BAD[name]
  (tmp_path / "file").write_bytes(content)
  for source in (content, tmp_path / "file"):
    with pytest.raises(ValueError, match=f"^{message}"):
      list(image_files.read(source))


WHOLE = [
  *(
    encode(GRAY, name) for name in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM")
  ),
  encode(GRAY.convert("RGBA"), "WEBP"),
  npy(drawing()),
]


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.binary(max_size=200) | damaged(WHOLE))
def test_any_bytes_give_images_or_a_clean_error(content):
  try:
    read = list(image_files.read(content))
  except ValueError as error:
    assert "\n" not in str(error)
  else:
    for image in read:
      assert image.dtype == np.uint8
      assert image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)


@pytest.mark.skipif(
  not os.path.exists("/proc/self/status"), reason="the test reads /proc"
)
def test_memory_is_bounded(tmp_path):
  """Reading the largest image, or refusing a larger one, takes under 1 GiB."""
  side = int(Image.MAX_IMAGE_PIXELS**0.5)
  whole = encode(
    Image.new("RGBA", (side, side), "#000f"), "PNG", compress_level=1
  )
  size = struct.pack(">II", side, side)
  larger = whole.replace(size, struct.pack(">II", 2**31 - 1, 2**31 - 1), 1)
  crc = struct.pack(">I", zlib.crc32(larger[12:29]))
  header = npy(drawing()).replace(b"(60, 90), }    ", b"(2147483648, 9)}")
  for name, content in (
    ("whole.png", whole),
    ("larger.png", larger[:29] + crc + larger[33:]),
    ("larger.pgm", b"P5 2147483647 2147483647 255\n"),
    ("larger.npy", header),
  ):
    (tmp_path / name).write_bytes(content)
  script = """if True:
    import pathlib, sys
    from sources import image_files
    for path in map(pathlib.Path, sys.argv[1:]):
      try:
        print(*(image.shape for image in image_files.read(path)))
      except ValueError as error:
        print(error)
    print(*[line for line in open("/proc/self/status") if "VmHWM" in line])
  """
  output = subprocess.check_output(
    [sys.executable, "-c", script, *sorted(tmp_path.iterdir())],
    cwd=PROJECT,
    text=True,
  )
  *lines, peak = output.strip().splitlines()
  assert [line.partition(":")[0] for line in lines] == [
    "cannot be read as an array",
    *2 * ["is larger than 89,478,485 pixels"],
    "(1200, 1200, 3)",
  ]
  assert int(peak.split()[1]) < 2**20  # KiB.


def test_a_decompression_bomb_is_refused(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 90 - 1)
  with pytest.raises(ValueError, match="is larger than 5,399 pixels"):
    read_one(encode(GRAY, "PNG"))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(ValueError, match="is larger than 1,000 pixels"):
    read_one(encode(GRAY, "PNG"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
  with pytest.raises(ValueError, match="No such file"):
    list(image_files.read(tmp_path / "none.png"))
  with pytest.raises(ValueError, match="folder without images"):
    list(image_files.read(tmp_path))


def bounding_box(image):
  rows, columns = np.nonzero(image)
  return np.ptp(rows) + 1, np.ptp(columns) + 1


@pytest.mark.parametrize(
  ("height", "width", "expected"),
  [(60, 30, (20, 10)), (30, 60, (10, 20)), (300, 300, (20, 20))],
)
def test_the_ink_fills_a_box_of_20_and_keeps_its_aspect(
  height, width, expected
):
  image = np.zeros((3 * height, 2 * width), np.uint8)
  image[height : 2 * height, width // 4 : width // 4 + width] = 200
  result = to_mnist_form(image)
  assert result.shape == (28, 28)
  assert result.dtype == np.uint8
  np.testing.assert_allclose(bounding_box(result), expected, atol=1)
  assert result.max() == 255


@pytest.mark.parametrize("flip", [False, True])
def test_the_center_of_mass_is_at_the_center(flip):
  image = drawing()[::-1] if flip else drawing()
  result = to_mnist_form(image)
  np.testing.assert_allclose(
    ndimage.center_of_mass(result), (14, 14), atol=0.51
  )


def test_dark_and_light_ink_give_the_same_image():
  image = drawing(paper=250, ink=30)
  expected = to_mnist_form(image)
  assert expected[14, 14] < expected.max()  # The L is hollow there.
  np.testing.assert_array_equal(to_mnist_form(255 - image), expected)
  np.testing.assert_array_equal(to_mnist_form(image, invert="yes"), expected)
  inverted = to_mnist_form(255 - image, invert="no")
  np.testing.assert_array_equal(inverted, expected)


def test_uneven_light_noise_and_specks_are_removed():
  clean = drawing(paper=200, ink=40).astype(np.float64)
  clean[5:7, 80:82] = 60  # A speck.
  rows, columns = np.indices(clean.shape)
  light = 0.7 + 0.3 * columns / 90 + 0.2 * rows / 60
  noise = np.random.default_rng(0).normal(0, 4, clean.shape)
  photo = np.clip(clean * light + noise, 0, 255).astype(np.uint8)
  result = to_mnist_form(photo)
  expected = to_mnist_form(drawing())
  assert np.abs(result.astype(int) - expected).mean() < 6
  np.testing.assert_allclose(
    bounding_box(result), bounding_box(expected), atol=1
  )


@pytest.mark.parametrize("shape", [(280, 280), (2000, 2000)])
def test_a_thin_stroke_is_found_on_paper_of_any_size(shape):
  """Only 0.4% of the pixels are ink."""
  image = np.full(shape, 255, np.uint8)
  size = shape[0]
  image[size // 3 : 2 * size // 3, size // 2 : size // 2 + size // 90] = 0
  results = [to_mnist_form(x) for x in (image, 255 - image)]
  np.testing.assert_array_equal(*results)
  assert bounding_box(results[0])[0] == 20


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_blank_image_has_no_ink(value):
  with pytest.raises(ValueError, match="has no ink"):
    to_mnist_form(np.full((50, 50), value, np.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3000, 3)])
def test_no_image_shape_causes_a_crash(shape):
  noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  try:
    assert to_mnist_form(noise).shape == (28, 28)
  except ValueError as error:
    assert "no ink" in str(error)


def differs(form, expected):
  """Returns the mean difference of two images divided by the mean ink."""
  form, expected = np.float32(form), np.float32(expected)
  return abs(form - expected).sum() / expected.sum()


@pytest.fixture(scope="module")
def judge(mnist):
  """The most similar of 3,000 training images, as a network would judge."""
  known = np.float32(mnist.train.images[:3000])
  known /= np.linalg.norm(known, axis=1, keepdims=True)
  labels = np.asarray(mnist.train.labels[:3000])

  def probabilities(images):
    rows = np.float32(images).reshape(len(images), -1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ known.T
    best = [similar[:, labels == digit].max(axis=1) for digit in range(10)]
    odds = np.exp(20 * np.stack(best, axis=1))
    return odds / odds.sum(axis=1, keepdims=True)

  return probabilities


@pytest.mark.parametrize("kind", digit_pictures.KINDS)
def test_the_surroundings_of_a_digit_do_not_change_it(mnist, judge, kind):
  rng = np.random.default_rng(0)
  for image in np.asarray(pixels(mnist.test)[:5, ..., 0]):
    ink = digit_pictures.enlarge(image)
    picture = digit_pictures.KINDS[kind](ink, rng)
    (digit,) = photographs.find_digits(picture, judge=judge)
    expected = to_mnist_form(digit_pictures.plain(ink, rng))
    # The center of mass may be rounded to the next pixel.
    nearest = min(
      differs(np.roll(digit.seen, shift, (0, 1)), expected)
      for shift in itertools.product((-1, 0, 1), repeat=2)
    )
    assert nearest < 0.5


def test_mnists_own_digits_change_little(mnist, judge):
  originals = np.asarray(pixels(mnist.test)[:50, ..., 0])
  found = [photographs.find_digits(x, judge=judge) for x in originals]
  results = np.stack([digit.seen for (digit,) in found])
  difference = np.abs(results.astype(int) - originals).mean(axis=(1, 2))
  assert np.median(difference) < 2
  assert (difference < 20).mean() >= 0.95  # A shift by one pixel gives 20.


def test_the_judge_decides_what_is_ink():
  """A dark nought with something light inside may be either."""
  picture = np.full((280, 280), 128, np.uint8)
  rows, columns = np.indices(picture.shape) - 140
  picture[np.abs(np.hypot(rows / 1.2, columns) - 95) < 12] = 48
  picture[50:230, 124:156] = 248
  for has_center in (True, False):
    calls = []

    def judge(images, calls=calls, has_center=has_center):
      calls.append(images.shape)
      likely = (images[:, 14, 14, 0] > 0) == has_center
      return np.where(likely[:, None], (1, 0, 0), (0.3, 0.3, 0.4))

    (digit,) = photographs.find_digits(picture, judge=judge)
    assert (digit.seen[14, 14] > 0) == has_center
    ((count, *shape),) = calls  # All candidates are judged at once.
    assert 2 <= count <= 20 and shape == [28, 28, 1]
    invert = "no" if has_center else "yes"
    (same,) = photographs.find_digits(picture, invert, judge=judge)
    np.testing.assert_array_equal(same.seen, digit.seen)


def test_the_photograph_in_the_docs_is_read(judge):
  given = np.asarray(Image.open(PROJECT / "docs/photograph.png"))
  made = photograph.photograph("31459", np.random.default_rng(0))
  assert np.abs(np.int32(made) - given).mean() < 1
  digits = photographs.find_digits(given, judge=judge)
  seen = np.stack([digit.seen[..., None] for digit in digits])
  for label, row in zip((3, 1, 4, 5, 9), judge(seen), strict=True):
    assert label in row.argsort()[-2:]  # The judge is no network.


@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("brightness", [0, 100])
def test_a_frame_around_a_photograph_changes_little(judge, width, brightness):
  given = unseen_digits.photograph(
    7, "DejaVuSans-Oblique", np.random.default_rng(0)
  )
  framed = np.full(given.shape, brightness, np.uint8)
  inner = (slice(width, -width),) * 2
  framed[inner] = given[inner]
  (expected,) = photographs.find_digits(given, judge=judge)
  (digit,) = photographs.find_digits(framed, judge=judge)
  assert differs(digit.seen, expected.seen) < 0.25


def row_of_digits(mnist, count, gap=40):
  """Returns a picture of digits side by side, then one of each digit alone."""
  inks = [
    digit_pictures.enlarge(np.asarray(image))
    for image in pixels(mnist.test)[:count, ..., 0]
  ]
  cut = [ink[:, (ink > 0.1).any(axis=0)] for ink in inks]
  padded = [np.pad(ink, ((20, 20), (gap // 2, gap // 2))) for ink in cut]
  pictures = (np.concatenate(padded, axis=1), *inks)
  return [digit_pictures.on_paper(picture) for picture in pictures]


def test_digits_in_a_row_are_found_from_the_left(mnist):
  row, *alone = row_of_digits(mnist, 4)
  digits = photographs.find_digits(row)
  assert len(digits) == 4
  for digit, image in zip(digits, alone, strict=True):
    (expected,) = photographs.find_digits(image)
    assert differs(digit.seen, expected.seen) < 0.3
    assert not digit.doubt
  ends = [x for digit in digits for x in (digit.box[0], digit.box[2])]
  assert ends == sorted(ends)
  for left, top, right, bottom in (digit.box for digit in digits):
    inked = row[:, left:right] < 150
    rows = np.flatnonzero(inked.any(axis=1))
    np.testing.assert_allclose((top, bottom), (rows[0], rows[-1]), atol=6)
  (single,) = photographs.find_digits(row, is_single=True)
  np.testing.assert_array_equal(single.seen, to_mnist_form(row))


def test_a_digit_in_pieces_is_found_as_one():
  """The bar of a five may stand apart, and its strokes may have gaps."""
  five = np.full((280, 280), 235, np.uint8)
  five[60:72, 120:190] = five[84:150, 112:124] = 30
  five[138:150, 112:180] = five[150:210, 168:180] = five[200:212, 110:180] = 30
  assert len(photographs.find_digits(five)) == 1
  broken = five.copy()
  broken[170:176] = 235
  assert len(photographs.find_digits(broken)) == 1


def test_a_digit_that_is_cut_off_is_doubted():
  """A tight crop, which touches all sides, is not."""
  clear = drawing()
  for whole in (clear, clear[10:50, 20:50]):
    assert photographs.find_digits(whole, "yes")[0].doubt == ""
  for cut in (clear[:45], clear[20:], clear[:, 24:]):
    (digit,) = photographs.find_digits(cut, "yes")
    assert digit.doubt == "ink touches the edge"


def test_hundreds_of_parts_are_not_digits():
  dots = np.full((280, 280), 255, np.uint8)
  for row in range(8, 272, 18):
    for column in range(8, 272, 18):
      dots[row : row + 6, column : column + 6] = 0
  (all_dots,) = photographs.find_digits(dots)
  assert all_dots.box == pytest.approx((8, 8, 266, 266), abs=4)


def test_arrays_of_every_layout_are_read():
  rng = np.random.default_rng(0)
  colors = rng.integers(0, 256, (2, 30, 40, 3), np.uint8)
  for array, expected in (
    (colors, colors),
    (colors[0], colors[:1]),
    (colors[0, ..., 0], colors[:1, ..., 0]),
    (colors[..., 0], colors[..., 0]),
  ):
    images = list(image_files.read(npy(array)))
    np.testing.assert_array_equal(images, expected)


def test_the_error_for_channels_first_says_what_an_array_must_be():
  channels_first = np.zeros((2, 3, 30, 40), np.uint8)
  with pytest.raises(
    ValueError, match=r"\[2, 3, 30, 40\]; must be numbers, \["
  ):
    list(image_files.read(npy(channels_first)))


def test_an_array_may_have_an_alpha_channel():
  rgba = np.zeros((*drawing().shape, 4), np.uint8)
  rgba[..., 3] = 255 - drawing()
  np.testing.assert_array_equal(
    image_files.to_gray(read_one(npy(rgba))), drawing()
  )


def test_narrow_ranges_of_values_and_faint_ink_are_stretched():
  twelve = npy(drawing().astype(np.uint16) * 16)
  np.testing.assert_allclose(read_one(twelve), drawing(), atol=1)
  mask = encode(Image.fromarray(drawing() // 255), "PNG")
  np.testing.assert_array_equal(read_one(mask), drawing())
  ink = Image.new("RGBA", (90, 60))
  ink.putalpha(Image.fromarray((255 - drawing()) // 12))
  faint = image_files.to_gray(read_one(encode(ink, "PNG")))
  np.testing.assert_allclose(faint, drawing(), atol=1)


@pytest.mark.skipif(
  not features.check("avif"), reason="this Pillow does not read AVIF"
)
def test_avif_is_read():
  image = image_files.to_gray(read_one(encode(GRAY.convert("RGB"), "AVIF")))
  assert abs(np.int16(image) - drawing()).mean() < 5


@pytest.mark.parametrize(
  ("brand", "message"),
  [
    (b"heic", "is HEIC; pip install pillow-heif to read it"),
    (b"avif", "is AVIF, which needs Pillow 11.3 or newer"),
  ],
)
def test_the_error_for_heic_or_avif_says_what_is_needed_to_read_it(
  brand, message, monkeypatch
):
  monkeypatch.setattr(image_files, "supported_formats", lambda: ["PNG"])
  with pytest.raises(ValueError, match=f"^{message}$"):
    read_one(b"\0\0\0\x18ftyp" + brand + bytes(99))


def test_the_preview_in_a_jpeg_is_not_a_picture():
  pages = [Image.new("RGB", (60, 40), color) for color in ("red", "blue")]
  content = encode(pages[0], "MPO", save_all=True, append_images=pages[1:])
  (read,) = image_files.read(content)
  assert read.shape == (40, 60, 3) and (read.mean(axis=(0, 1)) > 200)[0]


@pytest.mark.parametrize("angle", [-3, 3])
def test_digits_in_two_lines_are_found_line_by_line(angle):
  page = np.zeros((260, 400), np.uint8)
  corners = [(30, 40), (36, 150), (28, 260), (140, 90), (134, 210)]
  for width, (top, left) in zip((20, 30, 40, 50, 60), corners, strict=True):
    page[top : top + 80, left : left + width] = 255
  page = Image.fromarray(255 - page).rotate(angle, fillcolor=255)
  found = photographs.find_digits(np.asarray(page))
  widths = [digit.box[2] - digit.box[0] for digit in found]
  np.testing.assert_allclose(widths, [20, 30, 40, 50, 60], atol=8)
  assert widths == sorted(widths)
