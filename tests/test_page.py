"""The exported page computes the same in a browser as this project."""

import base64
import html
import io
import json
import os
import re
import shutil

from conftest import pixels
from conftest import run_program
from flax import linen as nn
import jax
import numpy as np
from PIL import Image
from playwright import sync_api
import pytest
from test_export import Cumulative
from test_export import Other
from test_export import new_state

import export
from exporting import page
from machine import errors
import predict
from rundir import runs
from sources import image_files
from sources import photographs
import steps


@pytest.fixture(scope="module")
def run(tiny_run):
  # At this temperature, the probabilities are the softmax of the logits.
  return runs.open_run(tiny_run)._replace(temperature=1.0)


@pytest.fixture(scope="module")
def images(mnist):
  return np.asarray(pixels(mnist.test)[:20])


@pytest.fixture(scope="module")
def file(tiny_run, tmp_path_factory):
  file = tmp_path_factory.mktemp("page") / "digit.html"
  export.export(tiny_run, "html", file)
  return file


# The other fixtures come first: Orbax fails once Playwright runs an event loop.
@pytest.fixture(scope="module")
def browser(run, file, images):
  with sync_api.sync_playwright() as playwright:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    try:
      browser = playwright.chromium.launch(executable_path=path)
    except sync_api.Error:
      reason = "Chromium not found: run `playwright install chromium`"
      if "CI" in os.environ:
        pytest.fail(reason)
      pytest.skip(reason)
    yield browser
    browser.close()


@pytest.fixture
def opened(browser):
  """Opens pages; they must not log anything or request other files."""
  seen, tabs = [], []

  def open_page(file, **kwargs):
    tab = browser.new_page(**kwargs)
    tab.on("console", lambda message: seen.append(message.text))
    tab.on("pageerror", lambda error: seen.append(str(error)))
    tab.on("request", lambda request: seen.append(request.url))
    tab.goto(file.as_uri())
    tabs.append(tab)
    return tab

  yield open_page
  assert seen == [tab.url for tab in tabs]
  for tab in tabs:
    tab.close()


def softmax(state, images):
  return jax.nn.softmax(jax.jit(steps.eval_step)(state, images))


def compute(tab, images):
  return tab.evaluate(
    "(images) => images.map((pixels) => [...probabilities(pixels)])",
    images.reshape(len(images), -1).tolist(),
  )


def bars(tab):
  """Returns the probabilities that the bars show, once they are drawn."""
  tab.evaluate("new Promise(requestAnimationFrame)")
  return tab.evaluate(
    "[...document.querySelectorAll('i')]"
    ".map((bar) => parseFloat(bar.style.width) / 100)"
  )


def write(file, run):
  variables = page.round_weights(run.state.eval_variables)
  state = run.state.starting_from(variables)
  run = run._replace(state=state)
  file.write_text(page.build(run, "</script>", 0.5))
  return state


@pytest.mark.slow
def test_the_page_computes_the_same_probabilities(
  run, images, opened, tmp_path
):
  state = write(tmp_path / "page.html", run)
  tab = opened(tmp_path / "page.html")
  np.testing.assert_allclose(
    compute(tab, images), softmax(state, images), rtol=0, atol=1e-6
  )
  assert tab.inner_text("p") == "</script> · test accuracy 50.00% · 20 steps"


@pytest.mark.slow
def test_the_page_can_compute_another_network(run, images, opened, tmp_path):
  another = run._replace(state=new_state(Other()))
  state = write(tmp_path / "page.html", another)
  np.testing.assert_allclose(
    compute(opened(tmp_path / "page.html"), images),
    softmax(state, images),
    rtol=0,
    atol=1e-5,
  )


def test_the_page_has_every_elementwise_function():
  source = page.PATH.read_text().partition("const ELEMENTWISE = {")[2]
  names = re.findall(r"^  (\w+):", source.partition("};")[0], re.MULTILINE)
  assert {*names} == page.ELEMENTWISE


def test_a_layer_that_the_page_cannot_compute_is_named(run, tmp_path):
  with pytest.raises(errors.UserError) as error:
    write(tmp_path / "page.html", run._replace(state=new_state(Cumulative())))
  assert str(error.value).startswith("model.py: Cumulative computes cumsum in")


def test_weights_are_rounded_to_the_nearest_half(run):
  kernel = np.array(run.state.params["dense"]["kernel"])
  rounded = page.round_weights({"kernel": kernel})["kernel"]
  assert rounded.dtype == np.float32
  np.testing.assert_array_equal(rounded, rounded.astype(np.float16))
  largest = abs(rounded - kernel).max()
  assert 0 < largest <= abs(kernel).max() * 2**-11


def draw_with_the_mouse(tab, *points):
  box = tab.locator("#pad").bounding_box()
  for k, (x, y) in enumerate(points):
    at = box["x"] + x * box["width"], box["y"] + y * box["height"]
    tab.mouse.move(*at, steps=4)
    if k == 0:
      tab.mouse.down()
  tab.mouse.up()


def drawing(tab):
  """Returns the canvas as a PNG file with transparency."""
  url = tab.evaluate("pad.toDataURL()")
  return base64.b64decode(url.partition(",")[2])


@pytest.mark.slow
def test_a_drawing_is_read_as_predict_reads_it(
  file, opened, tiny_run, tmp_path
):
  tab = opened(file)
  assert bars(tab) == [0] * 10
  draw_with_the_mouse(tab, (0.3, 0.2), (0.7, 0.25), (0.45, 0.8))
  seven = bars(tab)
  assert sum(seven) == pytest.approx(1)
  drawn = drawing(tab)
  tab.hover("#pad")
  assert drawing(tab) == drawn  # Without a button pressed, nothing is drawn.
  draw_with_the_mouse(tab, (0.4, 0.5), (0.7, 0.5))  # Another stroke.
  crossed = bars(tab)
  assert sum(crossed) == pytest.approx(1) and crossed != seven
  (tmp_path / "drawn.png").write_bytes(drawing(tab))
  done = run_program(
    *("predict.py", f"--workdir={tiny_run}", "--json", "drawn.png"),
    cwd=tmp_path,
  )
  expected = json.loads(done.stdout)["probabilities"]
  np.testing.assert_allclose(crossed, [*expected.values()], rtol=0, atol=1e-3)
  best = tab.inner_text("li.best")
  assert best.split()[0] == max(expected, key=expected.get)
  accuracy = json.loads((tiny_run / "result.json").read_text())["accuracy"]
  assert f"tiny · test accuracy {accuracy:.2%} · 20 steps" in tab.inner_text(
    "p"
  )

  tab.click("#clear")
  assert bars(tab) == [0] * 10
  assert not tab.evaluate("toMnistForm(inkOf(), pad.width)")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 50])
def test_the_page_is_calibrated_and_unsure_as_predict_is(
  temperature, run, images, opened, tmp_path
):
  run = run._replace(temperature=temperature)
  state = write(tmp_path / "page.html", run)
  tab = opened(tmp_path / "page.html")
  logits = jax.jit(steps.eval_step)(state, images[:1])
  expected = np.asarray(jax.nn.softmax(logits / temperature))
  shown = tab.evaluate(
    "(pixels) => { show(pixels); return [...probabilities(pixels)]; }",
    images[0].ravel().tolist(),
  )
  np.testing.assert_allclose([shown], expected, rtol=0, atol=1e-5)
  digit = photographs.Digit(images[0], (0, 0, 28, 28))
  (doubt,) = predict.doubts_about([digit], expected)
  assert (doubt == "") == (temperature < 1)
  reading = f"Read as {expected.argmax()}"
  if doubt:
    reading += f"; unsure: {doubt}"
  assert tab.inner_text("#reading") == reading


@pytest.mark.slow
def test_the_page_works_by_keyboard_in_a_sandboxed_frame(
  file, opened, mnist, tmp_path
):
  frame = tmp_path / "frame.html"
  source = html.escape(file.read_text())
  frame.write_text(f'<iframe sandbox="allow-scripts" srcdoc="{source}">')
  tab = opened(frame)
  frame = tab.frames[1]
  hint = frame.locator("text=Draw a digit here")
  assert hint.is_visible() and frame.inner_text("#reading") == ""
  tab.keyboard.press("Tab")
  assert (
    frame.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    == "solid"
  )
  tab.keyboard.press("Enter")
  frame.wait_for_selector(".best")
  assert not hint.is_visible() and frame.inner_text("#reading")
  example = frame.evaluate("[...toMnistForm(inkOf(), pad.width)]")
  others = np.float32(mnist.train.images)
  nearest = np.square(others - np.float32(example)).sum(axis=1).argsort()[:9]
  assert [*np.asarray(mnist.train.labels)[nearest]] == [3] * 9
  tab.keyboard.press("Tab")
  tab.keyboard.press("Space")
  assert hint.is_visible() and bars(frame) == [0] * 10


@pytest.mark.slow
@pytest.mark.parametrize("form", ["drawing", "file"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844), (844, 390)])
def test_the_page_fits_the_window(size, form, run, opened, tmp_path):
  config = run.config.copy_and_resolve_references()
  if form == "file":
    config.dataset = "fashion_mnist"
  write(tmp_path / "page.html", run._replace(config=config))
  width, height = size
  tab = opened(
    tmp_path / "page.html", viewport={"width": width, "height": height}
  )
  assert (width, height) == tuple(
    tab.evaluate(f"[document.documentElement.scroll{side}]")[0]
    for side in ("Width", "Height")
  )
  if form == "drawing":
    share = tab.locator("#pad").bounding_box()["height"] / height
    assert share > (0.35 if width < height else 0.6)


@pytest.mark.slow
def test_drawing_works_by_touch(file, opened):
  tab = opened(file, has_touch=True, viewport={"width": 390, "height": 844})
  box = tab.locator("#pad").bounding_box()
  assert 300 < box["width"] < 320  # The bars fit below it.
  touch = tab.context.new_cdp_session(tab)
  for event, y in (("Start", 80), ("Move", 130), ("Move", 180), ("End", None)):
    points = [{"x": box["x"] + 150, "y": box["y"] + y}] if y else []
    touch.send(
      "Input.dispatchTouchEvent",
      {"type": f"touch{event}", "touchPoints": points},
    )
  tab.wait_for_selector(".best")
  rows = np.reshape(tab.evaluate("[...inkOf()]"), (280, 280)).any(axis=1)
  assert rows.sum() == pytest.approx(100 * 280 / box["width"] + 24, abs=3)
  assert tab.evaluate("document.documentElement.scrollWidth") == 390


_DRAW = """(strokes) => {
  pen.clearRect(0, 0, pad.width, pad.height);
  for (const stroke of strokes) {
    stroke.forEach((point, k) => {
      pen.beginPath();
      pen.moveTo(...stroke[Math.max(k - 1, 0)]);
      pen.lineTo(...point);
      pen.stroke();
    });
  }
  return [...toMnistForm(inkOf(), pad.width)];
}"""


def random_strokes(rng):
  for _ in range(rng.integers(1, 4)):
    turns = rng.normal(rng.normal(0, 0.15), 0.1, rng.integers(6, 30))
    angles = rng.uniform(0, 2 * np.pi) + turns.cumsum()
    steps = 9 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    points = rng.uniform(40, 240, 2) + steps.cumsum(axis=0)
    yield points.clip(15, 265).tolist()


@pytest.mark.slow
def test_the_page_and_predict_bring_drawings_to_the_same_form(file, opened):
  tab, rng = opened(file), np.random.default_rng(0)
  for _ in range(50):
    form = tab.evaluate(_DRAW, [*random_strokes(rng)])
    (given,) = image_files.read(drawing(tab))
    expected = photographs.find_digits(given, is_single=True)[0].seen.astype(
      int
    )
    np.testing.assert_allclose(
      np.reshape(form, (28, 28)), expected, rtol=0, atol=2
    )


_PASTE = """(content) => {
  const clipboardData = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (x) => x.charCodeAt(0));
  clipboardData.items.add(new File([bytes], "a.png", {type: "image/png"}));
  document.dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
}"""


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


@pytest.mark.slow
def test_a_pasted_digit_is_read(file, opened, images):
  tab = opened(file)
  forms = []
  for given in (images[0], 255 - images[0]):
    tab.evaluate(_PASTE, base64.b64encode(png(given[..., 0])).decode())
    tab.wait_for_selector(".best")
    forms.append(tab.evaluate("[...toMnistForm(inkOf(), pad.width)]"))
    tab.click("#clear")
  for form in forms:
    assert abs(np.int32(form) - images[0].ravel()).mean() < 10


class Colors(nn.Module):
  """Its logits are the pixels 5 and 14 of the middle row, in each channel."""

  image_shape = (28, 28, 3)

  @nn.compact
  def __call__(self, x):
    self.param("unused", nn.initializers.zeros, (1, 1))
    return x[:, 14, 5:15:9].reshape(-1, 6)


@pytest.fixture
def color_page(run, opened, tmp_path):
  """A page of color images, and a function: its probabilities of an image."""
  config = run.config.copy_and_resolve_references()
  config.dataset = "image_folder"
  names = tuple("abcdef")
  color_run = run._replace(
    config=config, image_shape=(28, 28, 3), class_names=names
  )
  state = write(
    tmp_path / "page.html", color_run._replace(state=new_state(Colors()))
  )
  return opened(tmp_path / "page.html"), lambda x: softmax(state, x[None])[0]


_DROP = """(content) => {
  const dataTransfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (x) => x.charCodeAt(0));
  dataTransfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
  // True if nothing has prevented what the browser does by default.
  return ["dragover", "drop"].map((type) => document.body.dispatchEvent(
    new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true})));
}"""


def assert_shown(tab, probabilities):
  tab.wait_for_function("document.querySelector('.best')")
  np.testing.assert_allclose(bars(tab), probabilities, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_narrow_color_image_is_shown_whole_and_inverted(color_page):
  """It is 14 pixels wide; the rest has the color of its corner."""
  tab, expected = color_page
  rng = np.random.default_rng(0)
  narrow = rng.integers(0, 256, (28, 14, 3), np.uint8)
  image = np.tile(narrow[0, 0], (28, 28, 1))
  image[:, 7:21] = narrow
  content = {"name": "a.png", "mimeType": "image/png", "buffer": png(narrow)}
  tab.set_input_files("input[type=file]", content)
  assert_shown(tab, expected(image))
  seen = tab.evaluate(
    "[...seen.getContext('2d').getImageData(0, 0, 28, 28).data]"
  )
  np.testing.assert_array_equal(np.reshape(seen, (28, 28, 4))[..., :3], image)
  before = tab.evaluate("document.querySelector('i').style.width")
  tab.check("input[type=checkbox]")  # Inverts the image that is there.
  tab.wait_for_function(
    "(before) => document.querySelector('i').style.width !== before", arg=before
  )
  assert_shown(tab, expected(255 - image))
  tab.click("#clear")
  tab.evaluate("invert.onchange()")  # There is no image to invert.
  assert not tab.query_selector(".best")


@pytest.mark.slow
def test_an_image_can_be_dropped(color_page):
  tab, expected = color_page
  image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
  content = base64.b64encode(png(image)).decode()
  assert tab.evaluate(_DROP, content) == [False, False]
  assert_shown(tab, expected(image))


@pytest.mark.slow
def test_a_page_of_another_data_set_takes_image_files(
  run, images, opened, tmp_path
):
  config = run.config.copy_and_resolve_references()
  config.dataset = "fashion_mnist"
  state = write(tmp_path / "page.html", run._replace(config=config))
  tab = opened(tmp_path / "page.html")
  assert not tab.is_visible("#pad") and tab.is_visible("#seen")
  image = {"name": "image.png", "mimeType": "image/png"}
  for given in (images[0], 255 - images[0]):
    content = {**image, "buffer": png(given[..., 0])}
    tab.set_input_files("input[type=file]", content)
    tab.wait_for_selector(".best")
    np.testing.assert_allclose(
      bars(tab), softmax(state, images[:1])[0], rtol=0, atol=1e-6
    )
    tab.click("#clear")
    tab.check("input[type=checkbox]")  # For the second image.
  tab.set_input_files("input[type=file]", {**image, "buffer": b"text"})
  tab.wait_for_selector("text=This browser cannot read that file")
