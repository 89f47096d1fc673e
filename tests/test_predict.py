"""predict.py, mostly as a command, on real digits saved as files."""

import argparse
import io
import json
import shutil
import sys
from unittest import mock

from conftest import assert_not_blank
from conftest import jit
from conftest import pixels
from conftest import run_program
from conftest import temperature
import jax
from matplotlib import figure
import ml_collections
import numpy as np
from PIL import Image
import pytest

import calibration
import input_pipeline
from machine import errors
from model import CNN
import predict
from report import figures
from rundir import runs
from sources import image_folder
from sources import photographs


@pytest.fixture(scope="module")
def digits(mnist, tmp_path_factory):
  """Ten test images as PNG files and one of each kind of bad file."""
  folder = tmp_path_factory.mktemp("digits")
  (folder / "good").mkdir()
  for index in range(10):
    image = np.asarray(pixels(mnist.test)[index, ..., 0])
    Image.fromarray(image).save(folder / f"good/{index}.png")
  (folder / "bad").mkdir()
  (folder / "bad/empty.png").touch()
  (folder / "bad/text.jpg").write_text("not an image")
  content = (folder / "good/0.png").read_bytes()
  (folder / "bad/truncated.png").write_bytes(content[:100])
  Image.new("L", (28, 28), 128).save(folder / "bad/blank.png")
  (folder / "bad/notes.txt").write_text("skipped: not named like an image")
  return folder


@pytest.fixture(scope="module")
def expected(mnist, tiny_run):
  """The network's probabilities for 250 images; the first ten are `digits`."""
  state = runs.open_run(tiny_run).state
  images = np.float32(pixels(mnist.test)[:250]) / 255
  logits = jit(CNN().apply)({"params": state.params}, images)
  return jax.nn.softmax(logits / temperature(tiny_run, 20))


@pytest.mark.parametrize("count", [1, 100, 250])
def test_predictions_are_those_of_the_network(tiny_run, mnist, expected, count):
  predictor = predict.predictor(runs.open_run(tiny_run))
  actual = predictor(np.asarray(pixels(mnist.test)[:count]))
  np.testing.assert_allclose(actual, expected[:count], rtol=1e-4, atol=1e-6)


def test_folders_are_searched_at_any_depth(tmp_path):
  """Finds image suffixes in either case, but no hidden files."""
  found = [
    tmp_path / "folder" / name
    for name in ("a/2.npy", "a/b/c/1.jpg", "b.PNG", "c.TIFF", "d.jfif")
  ]
  skipped = [
    tmp_path / "folder" / name
    for name in (
      *("a/notes.txt", "b", "png", "a/.b/1.png"),
      # macOS puts these beside images, on USB sticks and in zip files.
      *("a/._2.png", "__MACOSX/a/2.png"),
      *("run/config.json", "run/checkpoints/1", "run/curve.png"),
    )
  ]
  alone = tmp_path / "notes.txt"  # Named explicitly, it is read.
  for path in (*found, *skipped, alone):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  (tmp_path / "folder/a folder.png").mkdir()
  empty = tmp_path / "folder/a folder.png"  # `read` will refuse it.
  for argument, expected in (
    (alone, [alone]),
    (tmp_path / "folder", found),
    (empty, [empty]),
  ):
    actual = list(predict.find(str(argument)))
    assert actual == [(str(path), path) for path in expected]


def test_linked_folders_are_searched_once(tmp_path):
  (tmp_path / "scratch").mkdir()
  (tmp_path / "scratch/1.png").touch()
  photos = tmp_path / "photos"
  photos.mkdir()
  (photos / "linked").symlink_to(tmp_path / "scratch")
  (photos / "again").symlink_to(photos)
  (photos / "2.png").symlink_to(tmp_path / "scratch/1.png")
  assert [path for _, path in predict.find(str(photos))] == [
    photos / "2.png",
    photos / "linked/1.png",
  ]


def test_folders_may_hold_every_kind_of_image(tmp_path):
  kinds = "avif bmp gif heic heif jpeg jpg npy pgm png ppm tif tiff".split()
  kinds.append("webp")
  files = [tmp_path / f"1.{kind}" for kind in kinds]
  for file in files:
    file.touch()
  assert [path for _, path in predict.find(str(tmp_path))] == files


def test_arrays_of_another_shape_or_dtype_are_refused(tiny_run, mnist):
  predictor = predict.predictor(runs.open_run(tiny_run))
  none = predictor(np.zeros((0, 28, 28, 1), np.uint8))
  assert (none.shape, none.dtype) == ((0, 10), np.float32)
  images = np.asarray(pixels(mnist.test)[:3])
  for wrong, found in (
    (images[:, :14], r"uint8 \[3, 14, 28, 1\]; must be uint8 or floats in"),
    (images[0, 0], r"uint8 \[28, 1\]; must be .* \[n, 28, 28, 1\]"),
    (images.tolist(), r"int64 \[3, 28, 28, 1\]; must be uint8"),
    (images / 1.0, r"from 0.0 to 255.0; must be in \[0, 1\]"),
    (images / np.nan, r"from nan to nan; must be in \[0, 1\]"),
  ):
    with pytest.raises(ValueError, match=f"^images are {found}"):
      predictor(wrong)


def test_arrays_have_any_of_the_forms_that_the_network_takes(tiny_run, mnist):
  predictor = predict.predictor(runs.open_run(tiny_run))
  images = np.asarray(pixels(mnist.test)[:3])
  expected = predictor(images)
  for same in (images[..., 0], images / 255, images[..., 0] / np.float16(255)):
    atol = 1e-3 if same.dtype == np.float16 else 1e-6
    np.testing.assert_allclose(predictor(same), expected, rtol=0, atol=atol)
  for one in (images[1], images[1, ..., 0]):
    np.testing.assert_allclose(predictor(one), expected[1:2], atol=1e-6)


def test_raw_images_reach_the_network_unchanged(
  tiny_run, digits, expected, tmp_path
):
  sheet = tmp_path / "sheet.png"
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", "--raw", "--json"),
    *(f"--sheet={sheet}", digits / "good"),
    cwd=tmp_path,
  )
  assert completed.returncode == 0, completed.stderr
  records = [json.loads(line) for line in completed.stdout.splitlines()]
  files = [str(digits / f"good/{index}.png") for index in range(10)]
  assert [record["file"] for record in records] == files
  for record, row in zip(records, expected[:10], strict=True):
    actual = [record["probabilities"][str(digit)] for digit in range(10)]
    np.testing.assert_allclose(actual, row, rtol=1e-5, atol=1e-7)
    assert record["class"] == str(row.argmax())
    assert record["probability"] == max(actual)
  assert_not_blank(sheet)


def test_bad_files_are_named_and_the_others_predicted(
  tiny_run, digits, tmp_path
):
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}"),
    *(digits / "bad", digits / "good", digits / "none.png"),
    cwd=tmp_path,
  )
  assert completed.returncode == 1
  errors = sorted(completed.stderr.splitlines())
  names = ("blank.png: has no", "empty.png: is empty", "text.jpg: is not an")
  names += ("truncated.png: cannot be decoded", "none.png: No such file")
  assert len(errors) == len(names), completed.stderr
  for name in names:
    assert any(name in error for error in errors), name
  assert all(error.startswith("predict.py: ") for error in errors)
  header, *lines = completed.stdout.splitlines()
  assert header.split() == ["file", "class", "probability", "runner-up"]
  assert len(lines) == 10


def test_standard_input_and_arrays_are_read(tiny_run, mnist, digits, tmp_path):
  np.save(tmp_path / "ten.npy", np.asarray(pixels(mnist.test)[:10, ..., 0]))
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", "--json", "--raw", "-", "ten.npy"),
    cwd=tmp_path,
    stdin=(digits / "good/3.png").read_bytes(),
  )
  assert completed.returncode == 0, completed.stderr
  records = [json.loads(line) for line in completed.stdout.splitlines()]
  names = ["-", *(f"ten.npy[{index}]" for index in range(10))]
  assert [record["file"] for record in records] == names
  assert records[0]["probabilities"] == records[4]["probabilities"]


def test_ink_can_be_dark_or_light(tiny_run, digits, tmp_path):
  light = Image.open(digits / "good/0.png")
  light.save(tmp_path / "light.png")
  Image.eval(light, lambda value: 255 - value).save(tmp_path / "dark.png")
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", "--json", "dark.png", "light.png"),
    cwd=tmp_path,
  )
  dark, light = map(json.loads, completed.stdout.splitlines())
  assert dark["probabilities"] == light["probabilities"]


def test_the_sheet_shows_images_as_given_and_as_the_network_sees_them(
  tiny_run, digits, tmp_path
):
  digit = np.asarray(Image.open(digits / "good/0.png"))
  green = np.zeros((28, 28, 3), np.uint8)
  green[..., 1] = digit
  Image.fromarray(green).save(tmp_path / "green.png")
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", "green.png"),
    "--sheet=~/sheet.png",
    cwd=tmp_path,
    HOME=str(tmp_path),
  )
  assert completed.returncode == 0, completed.stderr
  sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), int)
  is_green = (sheet[..., 1] - sheet[..., [0, 2]].max(axis=-1)) > 100
  columns = np.flatnonzero(is_green.any(axis=0)) / sheet.shape[1]
  # Only the first column of pictures is green; the second is white on black.
  assert 0 < columns.min() < columns.max() < 0.25
  assert_not_blank(tmp_path / "sheet.png")


def test_only_raw_images_must_have_the_right_size(tiny_run, digits, tmp_path):
  large = Image.open(digits / "good/0.png").resize((56, 56))
  large.save(tmp_path / "large.png")
  args = ("predict.py", f"--workdir={tiny_run}", "large.png")
  assert run_program(*args, cwd=tmp_path).returncode == 0
  completed = run_program(*args, "--raw", cwd=tmp_path)
  assert completed.returncode == 1
  assert (
    "large.png: is [56, 56]; with --raw, must be [28, 28]" in completed.stderr
  )


def test_a_run_on_another_data_set_needs_raw(tiny_run, digits, tmp_path):
  run = shutil.copytree(tiny_run, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["dataset"] = "fashion_mnist"
  (run / "config.json").write_text(json.dumps(config))
  args = ("predict.py", "--workdir=run", digits / "good/0.png")
  completed = run_program(*args, cwd=tmp_path)
  assert completed.returncode == 1
  assert "--raw takes images of [28, 28, 1]" in completed.stderr
  assert run_program(*args, "--raw", cwd=tmp_path).returncode == 0


def test_photographs_are_fitted_as_in_training(tiny_run, tmp_path):
  """Training scales and crops a photograph; prediction must do the same."""
  run = shutil.copytree(tiny_run, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config |= {"dataset": "image_folder", "image_size": 28}
  (run / "config.json").write_text(json.dumps(config))
  folder = tmp_path / "images/train/cat"
  folder.mkdir(parents=True)
  photograph = np.random.default_rng(0).integers(0, 256, (90, 60, 4), np.uint8)
  Image.fromarray(photograph).convert("LA").save(folder / "a.png")
  found = image_folder.find(tmp_path / "images", "image_folder")
  source = image_folder.read(found, ml_collections.ConfigDict(config))
  images, _ = source.splits["train"]
  expected = predict.predictor(runs.open_run(run))(images)
  completed = run_program(
    *("predict.py", "--workdir=run", "--json", folder / "a.png"), cwd=tmp_path
  )
  assert completed.returncode == 0, completed.stderr
  record = json.loads(completed.stdout)
  np.testing.assert_allclose(
    list(record["probabilities"].values()), expected[0], rtol=1e-5
  )
  assert record["box"] == [0, 0, 28, 28]


def test_a_bad_image_in_an_array_is_named_and_the_others_predicted(
  tiny_run, mnist, tmp_path
):
  array = np.array(pixels(mnist.test)[:5, ..., 0])
  array[2] = 0
  np.save(tmp_path / "five.npy", array)
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", "five.npy", "--sheet=five.npy/x"),
    cwd=tmp_path,
  )
  assert completed.returncode == 1
  blank, sheet = completed.stderr.splitlines()
  assert blank == "predict.py: five.npy[2]: has no ink"
  assert sheet == "predict.py: five.npy/x: cannot be written (File exists)"
  _, *lines = completed.stdout.splitlines()
  names = [line.split()[0] for line in lines]
  assert names == [f"five.npy[{index}]" for index in (0, 1, 3, 4)]


def test_raw_images_are_converted_and_inverted():
  rng = np.random.default_rng(0)
  gray = rng.integers(0, 256, (4, 5), np.uint8)
  color = rng.integers(0, 256, (4, 5, 3), np.uint8)
  luma = color @ [0.299, 0.587, 0.114]
  for image, shape, invert, expected in (
    (gray, (4, 5, 1), "auto", gray[..., None]),
    (gray, (4, 5, 1), "yes", 255 - gray[..., None]),
    (gray, (4, 5, 3), "no", np.stack([gray] * 3, axis=-1)),
    (color, (4, 5, 3), "auto", color),
    (color, (4, 5, 1), "auto", np.round(luma)[..., None]),
  ):
    actual = predict.to_network(image, shape, invert)
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert actual.dtype == np.uint8


def test_the_table_shows_the_class_and_the_runner_up(
  tiny_run, digits, expected, tmp_path
):
  shutil.copy(digits / "good/0.png", tmp_path / "\x1b[2J\n.png")
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", "--raw", digits / "good"),
    "\x1b[2J\n.png",
    cwd=tmp_path,
  )
  header, *lines, last = completed.stdout.splitlines()
  assert header.split() == ["file", "class", "probability", "runner-up"]
  assert last.split() == [r"\x1b[2J\n.png", *lines[0].split()[1:]]
  for index, (line, row) in enumerate(zip(lines, expected[:10], strict=True)):
    best, second = np.argsort(-row)[:2]
    assert line.split()[:5] == [
      str(digits / f"good/{index}.png"),
      str(best),
      f"{row[best]:.4f}",
      str(second),
      f"({row[second]:.4f})",
    ]


def test_the_requested_checkpoint_is_used(tiny_run, digits, mnist, tmp_path):
  completed = run_program(
    *("predict.py", f"--workdir=~/{tiny_run.name}", "--checkpoint=12", "--raw"),
    *("--json", digits / "good/0.png"),
    cwd=tmp_path,
    HOME=str(tiny_run.parent),
  )
  image = np.asarray(pixels(mnist.test)[:1])
  rows = [
    predict.predictor(runs.open_run(tiny_run, step))(image)[0]
    for step in ("12", "20")
  ]
  record = json.loads(completed.stdout)
  actual = [record["probabilities"][str(digit)] for digit in range(10)]
  np.testing.assert_allclose(actual, rows[0], rtol=1e-5, atol=1e-7)
  assert abs(rows[0] - rows[1]).max() > 1e-3


@pytest.mark.parametrize("invert", ["yes", "no"])
def test_drawings_are_inverted_on_request(tiny_run, tmp_path, invert):
  # A half-black, half-white disc on gray paper: either half may be the ink.
  rows, columns = np.indices((40, 40)) - 19.5
  image = np.where(columns < 0, 255, 0)
  image[np.hypot(rows, columns) > 12] = 128
  image = np.uint8(image)
  Image.fromarray(image).save(tmp_path / "drawing.png")
  completed = run_program(
    *("predict.py", f"--workdir={tiny_run}", f"--invert={invert}", "--json"),
    tmp_path / "drawing.png",
    cwd=tmp_path,
  )
  forms = {
    choice: photographs.find_digits(image, choice, is_single=True)[0].seen
    for choice in ("yes", "no")
  }
  predictor = predict.predictor(runs.open_run(tiny_run))
  rows = {
    choice: predictor(form.reshape(1, 28, 28, 1))[0]
    for choice, form in forms.items()
  }
  record = json.loads(completed.stdout)
  actual = [record["probabilities"][str(digit)] for digit in range(10)]
  np.testing.assert_allclose(actual, rows[invert], rtol=1e-5, atol=1e-7)
  assert abs(rows["yes"] - rows["no"]).max() > 1e-4


def predict_in_process(monkeypatch, *args):
  """Runs the command in this process and returns its exit status."""
  monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args)])
  with pytest.raises(SystemExit) as ended:
    predict.main()
  return ended.value.code


def test_a_run_records_the_temperature_of_each_validation(
  tiny_run, tiny_config
):
  validation = input_pipeline.load(tiny_config, ["validation"]).validation
  images, labels = np.asarray(pixels(validation)), validation.labels
  found = []
  for checkpoint in ("12", "last"):
    run = runs.open_run(tiny_run, checkpoint)
    raw = predict.predictor(run._replace(temperature=1.0))(images)
    expected = calibration.fit(raw, np.asarray(labels))
    assert run.temperature == pytest.approx(expected, rel=1e-3)
    found.append(run.temperature)
  assert found[0] != found[1]


def test_several_digits_are_read_one_by_one(
  tiny_run, digits, tmp_path, monkeypatch, capsys
):
  row = np.hstack(
    [np.asarray(Image.open(digits / f"good/{i}.png")) for i in range(2)]
  )
  Image.fromarray(row).resize((560, 280)).save(tmp_path / "row.png")
  args = (f"--workdir={tiny_run}", tmp_path / "row.png")
  assert predict_in_process(monkeypatch, *args, "--json") == 0
  left, right = map(json.loads, capsys.readouterr().out.splitlines())
  assert [(x["part"], x["parts"]) for x in (left, right)] == [(1, 2), (2, 2)]
  assert left["box"][2] < 280 < right["box"][0]
  assert {left["unsure"], right["unsure"]} <= {None, "probability below 0.9"}
  draw = mock.Mock(wraps=figures.predictions)
  monkeypatch.setattr(figures, "predictions", draw)
  sheet = tmp_path / "sheet.png"
  assert predict_in_process(monkeypatch, *args, f"--sheet={sheet}") == 0
  _, *lines = capsys.readouterr().out.splitlines()
  for part, (line, record) in enumerate(
    zip(lines, (left, right), strict=True), 1
  ):
    assert line.startswith(f"{tmp_path}/row.png ({part} of 2)  ")
    assert line.split()[4:6] == [
      record["class"],
      f"{record['probability']:.4f}",
    ]
  *_, boxes, doubts = draw.call_args.args
  assert boxes == [tuple(left["box"]), tuple(right["box"])]
  assert doubts == [left["unsure"] or "", right["unsure"] or ""]
  assert_not_blank(sheet)
  assert predict_in_process(monkeypatch, *args, "--single", "--json") == 0
  (single,) = capsys.readouterr().out.splitlines()
  assert json.loads(single)["parts"] == 1


def test_an_improbable_digit_is_unsure(tiny_run, digits, monkeypatch, capsys):
  args = (f"--workdir={tiny_run}", digits / "good/0.png")
  assert predict_in_process(monkeypatch, *args) == 0
  doubt = "unsure: probability below 0.9"
  assert capsys.readouterr().out.rstrip().endswith(f"  {doubt}")
  args += ("--json",)
  assert predict_in_process(monkeypatch, *args) == 0
  record = json.loads(capsys.readouterr().out)
  assert f"unsure: {record['unsure']}" == doubt


def test_another_likely_reading_is_told_with_the_option_that_picks_it(
  tiny_run, tmp_path, monkeypatch, capsys
):
  """A dark nought has something light inside, which runs may take for a 1."""
  picture = np.full((280, 280), 128, np.uint8)
  rows, columns = np.indices(picture.shape) - 140
  picture[np.abs(np.hypot(rows / 1.2, columns) - 95) < 12] = 58
  picture[70:210, 124:156] = 248
  Image.fromarray(picture).save(tmp_path / "0.png")

  def read(sure, *options):
    def predictor(run):
      share = sure + differences.pop()

      def predict_all(images):
        rows = np.zeros((len(images), 10))
        has_center = images[:, 14, 14, 0] > 0
        rows[:, :3] = 0.4, 0.35, 0.25
        rows[has_center, :3] = 1 - share, share, 0
        return rows

      return predict_all

    differences = [0.1, -0.1]  # Both runs judge together.
    monkeypatch.setattr(predict, "predictor", predictor)
    args = [f"--workdir={tiny_run}"] * 2 + ["--json", tmp_path / "0.png"]
    monkeypatch.setattr(calibration, "SURE", 0.0)
    assert predict_in_process(monkeypatch, *args, *options) == 0
    record = json.loads(capsys.readouterr().out)
    return record["class"], record["unsure"]

  assert read(0.55) == ("0", None)
  assert read(0.8) == ("0", "could be 1 with --invert=no")
  assert read(0.8, "--invert=no") == ("1", None)


def test_less_than_nine_tenths_are_unsure():
  rows = np.array([[0.89, 0.11, 0.0], [0.91, 0.09, 0.0]])
  digits = [photographs.Digit(np.zeros((28, 28)), (0, 0, 1, 1))] * 2
  assert predict.doubts_about(digits, rows) == ["probability below 0.9", ""]


def test_several_runs_are_an_ensemble(
  tiny_run, digits, mnist, monkeypatch, capsys
):
  args = [f"--workdir={tiny_run}"] * 2
  args += ["--checkpoint=12", "--raw", "--json", digits / "good/0.png"]
  run = runs.open_run(tiny_run)
  other = runs.open_run(tiny_run, "12")
  monkeypatch.setattr(runs, "open_run", mock.Mock(side_effect=[run, other]))
  assert predict_in_process(monkeypatch, *args) == 0
  image = np.asarray(pixels(mnist.test)[:1])
  rows = [predict.predictor(each)(image)[0] for each in (run, other)]
  record = json.loads(capsys.readouterr().out)
  actual = [record["probabilities"][str(digit)] for digit in range(10)]
  np.testing.assert_allclose(actual, np.mean(rows, axis=0), rtol=1e-5)


def test_a_sheet_shows_the_first_50_digits(
  tiny_run, mnist, tmp_path, monkeypatch, capsys
):
  images = np.asarray(pixels(mnist.test)[:52, ..., 0])
  np.save(tmp_path / "a.npy", images)
  draw = mock.Mock(wraps=lambda *_: figure.Figure())
  monkeypatch.setattr(figures, "predictions", draw)
  args = (f"--workdir={tiny_run}", "--raw", "--json", tmp_path / "a.npy")
  sheet = tmp_path / "sheet.png"
  assert predict_in_process(monkeypatch, *args, f"--sheet={sheet}") == 0
  printed = capsys.readouterr()
  assert len(printed.out.splitlines()) == 52
  assert printed.err == f"{sheet} shows only the first 50 digits\n"
  for shown in draw.call_args.args[:2]:
    assert len(shown) == 50
    np.testing.assert_array_equal(np.squeeze(shown), images[:50])


def test_a_sheet_does_not_replace_an_image_behind_a_link(tmp_path):
  image, link = tmp_path / "image.png", tmp_path / "link.png"
  link.symlink_to(image)
  for given, sheet in ((image, link), (link, image)):
    args = argparse.Namespace(images=[given], sheet=sheet, fit=None)
    with pytest.raises(errors.UserError, match="is one of the images"):
      predict.load(args, (28, 28, 1), mock.Mock())


def test_names_that_the_terminal_cannot_encode_are_printed(
  tiny_run, digits, tmp_path, monkeypatch
):
  shutil.copy(digits / "good/0.png", tmp_path / "sept-\xe9\u6570.png")
  terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", terminal)
  args = (f"--workdir={tiny_run}", "--raw", tmp_path)
  assert predict_in_process(monkeypatch, *args) == 0
  _, line = terminal.buffer.getvalue().decode().splitlines()
  assert line.startswith(rf"{tmp_path}/sept-\xe9\u6570.png ")


def test_every_page_is_read_and_a_url_does_not_end_the_command(
  tiny_run, digits, tmp_path
):
  pages = [Image.open(digits / f"good/{index}.png") for index in range(3)]
  for kind in ("tiff", "gif"):
    pages[0].save(
      tmp_path / f"pages.{kind}", save_all=True, append_images=pages[1:]
    )
  found = []
  for arguments in (
    ["https://example.org/1.png", "pages.tiff"],
    ["pages.gif"],
    [digits / f"good/{index}.png" for index in range(3)],
  ):
    completed = run_program(
      *("predict.py", f"--workdir={tiny_run}", "--raw", "--json", *arguments),
      cwd=tmp_path,
    )
    records = [json.loads(line) for line in completed.stdout.splitlines()]
    found.append([record["probabilities"] for record in records])
    if len(found) == 1:
      assert completed.returncode == 1
      assert completed.stderr.count("\n") == 1
      assert "https://example.org/1.png: must be a path on" in completed.stderr
      assert [r["file"] for r in records] == [
        f"pages.tiff[{page}]" for page in range(3)
      ]
  assert found[0] == found[1] == found[2]
