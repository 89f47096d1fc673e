"""Bad input gets one line that names it, and no file is touched."""

import gzip
import io
import json
import os
import pickle
import shutil
import signal

from conftest import PROJECT
from conftest import run_program
import numpy as np
from PIL import Image
import pytest

SHIPPED = PROJECT / "data/mnist"
TINY = "--config.num_steps=1 --config.train_split=train[:200]"


def write(path, content):
  """Returns a function that writes a file into the scratch folder."""

  def damage(scratch):
    (scratch / path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
      (scratch / path).write_bytes(content)
    else:
      (scratch / path).write_text(content)

  return damage


def edit(name, **values):
  """Returns a function that changes keys of a JSON file; None removes one."""

  def damage(scratch):
    content = json.loads((scratch / name).read_text()) | values
    content = {key: x for key, x in content.items() if x is not None}
    (scratch / name).write_text(json.dumps(content))

  return damage


NOT_LOCAL = "must be a path on this machine; mount a bucket (gcsfuse for"
# Arguments of train.py, and what the error line must contain.
FLAGS = {
  "--config.batch_size=0": "config.batch_size=0: must be an integer of at",
  "--config.batch_size=-3": "config.batch_size=-3: must be an integer",
  "--config.batch_size=1.5": "config.batch_size=1.5: must be an integer",
  "--config.batch_size=x": "config.batch_size=x: must be an integer",
  "--config.batch_size=": "config.batch_size=: must be an integer",
  "--config.batch_size=201": "config.batch_size=201: must be at most 200",
  "--config.eval_batch_size=0": "config.eval_batch_size=0: must be an",
  "--config.num_steps=0": "config.num_steps=0: must be an integer from",
  "--config.num_steps=2147483648": "config.num_steps=2147483648: must be an",
  "--config.num_steps=1e3": "config.num_steps=1e3: must be an integer",
  "--config.learning_rate=0": "config.learning_rate=0.0: must be a number",
  "--config.learning_rate=-1": "config.learning_rate=-1.0: must be a num",
  "--config.learning_rate=nan": "config.learning_rate=nan: must be a num",
  "--config.learning_rate=inf": "config.learning_rate=inf: must be a num",
  "--config.learning_rate=1e300": "=1e+300: must be a number from 1e-37 to",
  "--config.learning_rate=0,1": "config.learning_rate=0,1: must be a num",
  "--config.dropout_rate=1": "config.dropout_rate=1.0: must be a number",
  "--config.dropout_rate=-0.1": "config.dropout_rate=-0.1: must be a num",
  "--config.dropout_rate=x": "config.dropout_rate=x: must be a number",
  "--config.schedule=linear": "must be one of constant, one_cycle, cosi",
  "--config.warmup_steps=-1": "config.warmup_steps=-1: must be an integer",
  "--config.warmup_steps=5": "config.warmup_steps=5: must be 0 with",
  "--config.optimizer=lion": (
    "config.optimizer=lion: must be one of sgd, adam, adamw, nadamw"
  ),
  "--config.momentum=1": "config.momentum=1.0: must be a number in [0",
  "--config.weight_decay=-1": "config.weight_decay=-1.0: must be a number",
  "--config.weight_decay=0.1": ("config.weight_decay=0.1: must be 0.0 with"),
  "--config.adam_b2=1": "config.adam_b2=1.0: must be a number in [0",
  "--config.adam_b2=0.9": "config.adam_b2=0.9: must be 0.999 with",
  "--config.label_smoothing=1": "config.label_smoothing=1.0: must be a n",
  "--config.ema_decay=1": "config.ema_decay=1.0: must be a number in [0",
  "--config.image_size=3": "config.image_size=3: must be 0 or at least 4",
  "--config.augment_scale=-1": "config.augment_scale=-1.0: must be a num",
  "--config.augment_shift=inf": "config.augment_shift=inf: must be a num",
  "--config.augment_flip=maybe": "augment_flip=maybe: must be true or false",
  "--config.clean_steps=-1": "config.clean_steps=-1: must be an integer",
  "--config.clean_steps=1": "config.clean_steps=1: must be 0 unless a",
  "--config.dtype=float16": "config.dtype=float16: must be one of float32",
  "--config.dtype=": "config.dtype=: must be one of float32, bfloat1",
  "--config.seed=-1": "config.seed=-1: must be an integer from 0",
  "--config.seed=4294967296": "config.seed=4294967296: must be an integer",
  "--config.seed=0.5": "config.seed=0.5: must be an integer",
  "--config.log_every_steps=0": "config.log_every_steps=0: must be an int",
  "--config.log_probabilities_every_steps=-1": "log_probabilities_every_steps",
  "--config.eval_every_steps=0": "config.eval_every_steps=0: must be an",
  "--config.checkpoint_every_steps=0": "config.checkpoint_every_steps=0: must",
  "--config.dataset=": "config.dataset=: must be the name of a data set",
  "--config.dataset=../mnist": "config.dataset=../mnist: must be the name",
  "--config.dataset=huggingface:mnist": (
    "config.dataset=huggingface:mnist: must be the name of a data set"
  ),
  "--config.dataset=\x1b[2Jmnist": "config.dataset=\\x1b[2Jmnist: must be the",
  "--config.dataset=no_such_set": "dataset=no_such_set: must be one of mnist,",
  "--config.dataset=mnist:9.9.9": "dataset=mnist:9.9.9: must be one of mnist,",
  "--config.manual_dir=/no": "config.manual_dir=/no: must be a folder with tra",
  "--config.manual_dir=None": "config.manual_dir=None: must be a path on",
  "--config.data_dir=None": "config.data_dir=None: must be a path on this",
  "--config.batchsize=7": (
    "unknown option --config.batchsize; did you mean --config.batch_size=7?"
  ),
  "--config.nothing=7": "option --config.nothing; the keys are adam_b2, a",
  "--config=configs/no.py": "--config=configs/no.py: no such file; the presets",
  "--workdir=": "'' is not a path",
  "--workdir=/dev/null": "--workdir=/dev/null: ",
  "--workdir=a[1]": "/a[1]: [ ] cannot be in the path of a run directory: its",
  "--workdir=a\\b": "/a\\b: \\ cannot be in the path of a run directory: its",
  "--workdir=\udcff": "\\udcff: \\udcff cannot be in the path of a run",
  "--workdir=gs://a/b": f"gs://a/b: {NOT_LOCAL}",
  "--config.init_from=s3://a/b": f"config.init_from=s3://a/b: {NOT_LOCAL}",
  "--config=gs://a/b.py": f"gs://a/b.py: {NOT_LOCAL}",
  "--config.data_dir=gs://a": f"config.data_dir=gs://a: {NOT_LOCAL}",
  "--config.manual_dir=gs://a": f"config.manual_dir=gs://a: {NOT_LOCAL}",
  "--config.init_from=none": "none/config.json: no such file; expected a run",
  "--config.init_from=~nosuch/run": "~nosuch/run/config.json: no such file",
  "--wordkir=x": "unknown option --wordkir; did you mean --workdir=x?",
  "--batch_size=7": (
    "unknown option --batch_size; did you mean --config.batch_size=7?"
  ),
  "--nothing": "unknown option --nothing; the options are --config, --workdir,",
  "--profile=1": "argument --profile: ignored explicit argument '1'",
  "--platform=tpu": "unknown option --platform; the options are --config, --w",
  "batch_size=7": (
    "unknown argument batch_size; did you mean --config.batch_size=7?"
  ),
}
SPLITS = {
  "": "",
  "train[": "",
  "trian": "Unknown split",
  "train[70000:]": "incompatible with 60000 examples",
  "train[60000:]": "the split is empty",
  "train[5:5]": "the split is empty",
  "train[a:b]": "",
  "train[:101%]": "",
  "train,test": "",
  "all[:10]": "",
  "train+": "",
  "train[::2]": "",
  "test[0:10]:": "",
}


def idx(*shape, header=None, extra=b""):
  """Returns an IDX file of zeros, with another header if one is given."""
  if header is None:
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
  return header + bytes(int(np.prod(shape))) + extra


TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = (
  "train-images-idx3-ubyte",
  "train-labels-idx1-ubyte",
  "t10k-images-idx3-ubyte",
  "t10k-labels-idx1-ubyte",
)
HEADER = idx(60000, 28, 28)[:16]
LABELS = idx(60000)


def images_header(position, value):
  """Returns a training file with one byte of its header changed."""
  header = bytearray(HEADER)
  header[position] = value
  return idx(60000, 28, 28, header=bytes(header))


# What is wrong with one file of kmnist; the others are right.
IDX_FILES = {
  "first byte": (TRAIN_IMAGES, images_header(0, 1), "starts with 01 00 08 03"),
  "second byte": (TRAIN_IMAGES, images_header(1, 7), "starts with 00 07 08 03"),
  "type": (TRAIN_IMAGES, images_header(2, 13), "starts with 00 00 0d 03"),
  "dimensions": (TRAIN_IMAGES, images_header(3, 1), "starts with 00 00 08 01"),
  "count": (TRAIN_IMAGES, images_header(7, 95), "declares 59999 x 28 x 28"),
  "2^31 images": (TRAIN_IMAGES, images_header(4, 128), "declares 21475436"),
  "height": (TRAIN_IMAGES, images_header(11, 29), "declares 60000 x 29 x 28"),
  "width": (TRAIN_IMAGES, images_header(15, 0), "declares 60000 x 28 x 0"),
  "empty": (TRAIN_IMAGES, b"", "starts with nothing"),
  "one byte": (TRAIN_IMAGES, HEADER[:1], "starts with 00;"),
  "magic number": (TRAIN_IMAGES, HEADER[:4], "starts with 00 00 08 03; an IDX"),
  "magic and count": (TRAIN_IMAGES, HEADER[:8], "starts with 00 00 08 03; an"),
  "header": (TRAIN_IMAGES, HEADER, "has 16 bytes; expected 47040016"),
  "one image": (TRAIN_IMAGES, HEADER + bytes(784), "has 800 bytes; expected"),
  "one less": (TRAIN_LABELS, LABELS[:-1], "has 60007 bytes; expected 60008"),
  "one more": (TRAIN_LABELS, LABELS + b"\0", "has 60009 bytes; expected 60008"),
  "no labels": (TRAIN_LABELS, LABELS[:8], "has 8 bytes; expected 60008"),
  "label 10": (TRAIN_LABELS, LABELS[:-1] + b"\x0a", "has label 10 at index 5"),
  "label 255": (TRAIN_LABELS, LABELS[:8] + b"\xff" * 60000, "has label 255"),
  "other split": (TRAIN_LABELS, idx(10000), "declares 10000 values; expected"),
  "images": (TRAIN_LABELS, idx(10000, 28, 28), "starts with 00 00 08 03"),
  "page": (TRAIN_LABELS, b"<html>404</html>", "starts with 3c 68 74 6d"),
  "gzip cut": (TRAIN_LABELS, gzip.compress(LABELS)[:-9], "cannot be read: "),
  "gzip header": (TRAIN_LABELS, gzip.compress(LABELS)[:10], "cannot be read: "),
  "gzip sum": (
    TRAIN_LABELS,
    gzip.compress(LABELS)[:-8] + bytes(8),
    "cannot be read: CRC check failed",
  ),
  "gzip body": (
    TRAIN_LABELS,
    gzip.compress(LABELS)[:10] + b"\xff" * 50,
    "cannot be read: ",
  ),
  "mnist's": (
    TEST_LABELS,
    gzip.decompress((SHIPPED / f"{TEST_LABELS}.gz").read_bytes()),
    "is a file from MNIST, not from this data set",
  ),
}


def remove(path):
  def damage(scratch):
    if (scratch / path).is_dir():
      shutil.rmtree(scratch / path)
    else:
      (scratch / path).unlink()

  return damage


def truncate(path, size=0):
  return lambda scratch: os.truncate(scratch / path, size)


def pipe(scratch):
  (scratch / "run/config.json").unlink()
  os.mkfifo(scratch / "run/config.json")


# What is done to a run directory, and what evaluate.py says about it.
RUNS = {
  "none": (remove("run"), "config.json: no such file"),
  "no config": (remove("run/config.json"), "run/config.json: no such file"),
  "no dataset.json": (
    remove("run/dataset.json"),
    "dataset.json: no such file",
  ),
  "empty config": (truncate("run/config.json"), "run/config.json: is not JSON"),
  "half a config": (
    truncate("run/config.json", 40),
    "config.json: is not JSON",
  ),
  "a list": (write("run/config.json", "[]"), "config.json: holds [], not a"),
  "latin-1": (write("run/config.json", b'{"\xe9": 1}'), "json: is not JSON"),
  "deep": (write("run/config.json", "[" * 10**5), "config.json: is not JSON"),
  "text for int": (edit("run/config.json", batch_size="7"), "config.json: "),
  "float for int": (edit("run/config.json", batch_size=7.5), "config.json: "),
  "list for int": (edit("run/config.json", batch_size=[7]), "config.json: "),
  "int for text": (edit("run/config.json", dataset=7), "config.json: "),
  "out of range": (
    edit("run/config.json", dropout_rate=1.5),
    "dropout_rate=1.5",
  ),
  "community": (edit("run/config.json", dataset="a:b"), "config.dataset=a:b"),
  "other split": (edit("run/config.json", test_split="x"), "test_split=x: not"),
  "other data": (edit("run/config.json", dataset="x"), "dataset=x: must be"),
  "null byte": (edit("run/config.json", data_dir="\0"), "config.data_dir="),
  "shape": (edit("run/dataset.json", image_shape=7), "dataset.json: holds"),
  "flat": (edit("run/dataset.json", image_shape=[28, 28]), "dataset.json: hol"),
  "tiny": (
    edit("run/dataset.json", image_shape=[1, 1, 1]),
    "run",  # jax 0.10 divides by the size 0, and 0.12 does not.
  ),
  "huge": (
    edit("run/dataset.json", image_shape=[10**6, 10**6, 1]),
    "params/dense/kernel is float32 [3136, 1024] there and float32 [40000000",
  ),
  "beyond counting": (
    edit("run/dataset.json", image_shape=[10**12, 10**12, 1]),
    "params/dense/kernel is float32 [3136, 1024] there and float32 [40000000",
  ),
  "other model": (
    edit("run/dataset.json", image_shape=[32, 32, 1]),
    "params/dense/kernel is float32 [3136, 1024] there and float32 [4096, 10",
  ),
  "fewer classes": (
    edit("run/dataset.json", class_names=["a", "b"]),
    "params/logits/bias is float32 [10] there and float32 [2] here",
  ),
  "no classes": (edit("run/dataset.json", class_names=[]), "dataset.json: hol"),
  "no checkpoints": (remove("run/checkpoints"), "has no complete checkpoint"),
  "empty checkpoint": (
    lambda scratch: (
      remove("run/checkpoints/20")(scratch),
      (scratch / "run/checkpoints/20").mkdir(),
    ),
    "run/checkpoints/20 is damaged: ",
  ),
  "only checkpoint damaged": (
    truncate("run/checkpoints/20/default/manifest.ocdbt"),
    "run/checkpoints/20 is damaged: ",
  ),
  "pipe": (pipe, "run/config.json: no such file"),
}


def encode(file_format, **options):
  image = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, file_format, **options)
  return buffer.getvalue()


def npy(array):
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=True)
  return buffer.getvalue()


class Trap:
  def __reduce__(self):
    return os._exit, (99,)


IMAGES = {
  "empty.png": (b"", "is empty"),
  "\x1b[2J\n.png": (b"", "is empty"),
  "text.png": (b"a digit", "is not an image in a"),
  "page.jpg": (b"<html></html>", "is not an image in a"),
  "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
  "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not an image in a"),
  "cut.png": (encode("PNG")[:100], "cannot be decoded"),
  "cut.jpg": (encode("JPEG")[:-300], "cannot be decoded"),
  "cut.webp": (encode("WEBP")[:-100], "cannot be decoded"),
  "cut.gif": (encode("GIF")[:-100], "cannot be decoded"),
  "cut.bmp": (encode("BMP")[:-100], "cannot be decoded"),
  "cut.tif": (encode("TIFF")[:-100], "cannot be decoded"),
  "cut.pgm": (encode("PPM")[:-100], "cannot be decoded"),
  "large.pgm": (b"P5 2147483647 2147483647 255\n", "is larger than 89,478,485"),
  "blank.pgm": (b"P5 20 20 255\n" + bytes(400), "has no ink"),
  "pickle.png": (pickle.dumps(Trap()), "is not an image in a"),
  "pickle.npy": (pickle.dumps(Trap()), "is not an image in a"),
  "objects.npy": (npy(np.array([Trap()])), "cannot be read as an array"),
  "cut.npy": (npy(np.eye(28))[:-1], "cannot be read as an array"),
  "text.npy": (npy(np.array(["a"])), "is an array of <U1 [1]"),
  "nan.npy": (
    npy(np.full((28, 28), np.nan)),
    "has values from nan to nan; must be 0",
  ),
  "negative.npy": (npy(-np.eye(28)), "has values from -1 to -0; must"),
  "none.npy": (npy(np.zeros((0, 28, 28))), "is an array of float64 [0, 28, 2"),
}
# Bad arguments of the programs; `run` is a good run directory.
COMMANDS = {
  "evaluate.py": "the following arguments are required: --workdir",
  "evaluate.py --workdir=run --checkpoint=7": "--checkpoint=7: must be last, b",
  "evaluate.py --workdir=run --checkpoint=-1": "--checkpoint=-1: must be last",
  "evaluate.py --workdir=run --checkpoint=": "--checkpoint=: must be last, be",
  "evaluate.py --workdir=run --dataset=x": "dataset=x: must be one of mnist,",
  "evaluate.py --workdir=run --manual_dir=none": (
    "/none: must be a folder with train-images-idx3-ubyte,"
  ),
  "evaluate.py --workdir=run --data_dir=None": "/None: must be a path on",
  "evaluate.py --workdir=run --split=x": "evaluate.py: --split=x: not a split",
  "evaluate.py --workdir=run --split=": "evaluate.py: --split=: not a split",
  "evaluate.py --workdir=run --dataset=a:b": "py: --dataset=a:b: must be the",
  "evaluate.py --workdir=run --output=run/config.json": (
    "run/config.json/metrics.json: cannot be written (File exists); name"
    " another --output"
  ),
  "evaluate.py --workdir=run --manual_dir=/gone": "--manual_dir=/gone: must be",
  "evaluate.py --workdir=gs://a": f"gs://a: {NOT_LOCAL}",
  "evaluate.py --workdir=run --output=gs://a": f"gs://a: {NOT_LOCAL}",
  "evaluate.py --workdir=run --data_dir=gs://a": f"gs://a: {NOT_LOCAL}",
  "evaluate.py --workdir=run --manual_dir=gs://a": f"gs://a: {NOT_LOCAL}",
  "evaluate.py --workdir=a\\b": "/a\\b: \\ cannot be in the path of a run dir",
  "predict.py --workdir=gs://a x.png": f"gs://a: {NOT_LOCAL}",
  "predict.py --workdir=run https://a/b.png": f"https://a/b.png: {NOT_LOCAL}",
  "predict.py --workdir=run --sheet=gs://a x": f"gs://a: {NOT_LOCAL}",
  "compare.py gs://a": f"gs://a: {NOT_LOCAL}",
  "compare.py run --plot=gs://a": f"gs://a: {NOT_LOCAL}",
  "evaluate.py --workdir=run --workdir=none": "none/config.json: no such file",
  "evaluate.py --workdir=~nosuch/run": "~nosuch/run/config.json: no such file",
  "evaluate.py --workdir=run --nosuch": "unrecognized arguments: --nosuch",
  "export.py --workdir=run --output=x": "arguments are required: --format",
  "export.py --workdir=run --output=x --format=pkl": "invalid choice: 'pkl'",
  "export.py --workdir=none --output=x --format=html": "none/config.json: no ",
  "export.py --workdir=run --output=x --format=html --checkpoint=7": "must be ",
  "export.py --workdir=run --output=/dev/null/x --format=html": (
    "/dev/null/x: cannot be written (File exists)"
  ),
  "predict.py x.png": "the following arguments are required: --workdir",
  "predict.py --workdir=run --invert=maybe x": "invalid choice: 'maybe'",
  "predict.py --workdir=run": "are required: IMAGE_OR_FOLDER",
  "predict.py --workdir=run x.png --sheet=x.png": "--sheet=x.png: is one of th",
  "predict.py --workdir=run x.png --sheet=run/../x.png": (
    "--sheet=run/../x.png: is one of the images"
  ),
  "predict.py --workdir=run none.png": "none.png: No such file or directory",
  "predict.py --workdir=run ~nosuch/1.png": "~nosuch/1.png: No such file or",
  "predict.py --workdir=run run/checkpoints": "is a folder without images",
  "predict.py --workdir=a\x1b]0;b\x07 x": "/a\\x1b]0;b\\x07: ] cannot be in",
  "predict.py --workdir=none none.png": "none/config.json: no such file",
  "compare.py ~nosuch": "~nosuch: contains no run directory",
  "compare.py none": "none: contains no run directory",
  "compare.py run --plot=run": "run: is a directory; must be a file",
  "compare.py run --plot=run/config.json/x.png": (
    "run/config.json/x.png: cannot be written (File exists)"
  ),
  "compare.py run --plot=x.nosuch": "x.nosuch: Format 'nosuch' is not support",
  "train.py --workdir=.": "--workdir=.: has files but no config.json",
  "train.py --workdir=run": "holds a run with another config: batch_size (16",
}


def content(folder):
  return {
    path.relative_to(folder): path.is_file() and path.read_bytes()
    for path in folder.rglob("*")
    if not path.name.startswith(".lock")
  }


def check(scratch, program, *args, culprit):
  """Runs a program and checks that it refuses its input."""
  before = content(scratch)
  done = run_program(program, *args, cwd=scratch)
  assert done.returncode in (1, 2), done
  *log, line = done.stderr.splitlines()
  assert line.startswith(f"{program}: "), done.stderr
  assert culprit in line, line
  assert line.isprintable()
  # Only log lines, which start with a time, may come before.
  assert not [other for other in log if not other[:2].isdigit()], done.stderr
  if "--plot" not in "".join(args):
    assert done.stdout == ""
  after = content(scratch)
  assert {path: after.get(path) for path in before} == before


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of the tiny run with one checkpoint."""
  shutil.copytree(
    tiny_run,
    tmp_path / "run",
    ignore=shutil.ignore_patterns("4", "8", "12", "16"),
  )


@pytest.fixture(scope="module")
def data_flag(default_config):
  return f"--config.data_dir={default_config.data_dir}"


@pytest.mark.parametrize("flag", FLAGS)
def test_a_bad_flag_is_refused(flag, data_flag, tmp_path):
  flags = [data_flag, *TINY.split(), flag]
  if flag.startswith("--config="):
    flags = flags[::-1]
  check(tmp_path, "train.py", *flags, culprit=FLAGS[flag])
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", SPLITS)
def test_a_bad_split_is_refused(split, data_flag, tmp_path):
  flags = [data_flag, f"--config.validation_split={split}"]
  culprit = f"config.validation_split={split}: "
  check(tmp_path, "train.py", *flags, culprit=culprit)
  culprit = SPLITS[split]
  check(tmp_path, "train.py", *flags, culprit=culprit)


@pytest.fixture(scope="module")
def kmnist(tmp_path_factory):
  """The four files of kmnist, filled with zeros."""
  folder = tmp_path_factory.mktemp("kmnist")
  for name, size in zip(NAMES, (60000, 60000, 10000, 10000), strict=True):
    shape = (size, 28, 28) if "images" in name else (size,)
    (folder / name).write_bytes(idx(*shape))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", IDX_FILES)
def test_a_bad_idx_file_is_refused(case, kmnist, tmp_path):
  damaged, content, culprit = IDX_FILES[case]
  for name in NAMES:
    if name == damaged:
      (tmp_path / name).write_bytes(content)
    else:
      (tmp_path / name).symlink_to(kmnist / name)
  check(
    *(tmp_path, "train.py", "--config.dataset=kmnist"),
    *("--config.manual_dir=.", "--config.data_dir=data"),
    culprit=f"{damaged}: {culprit}",
  )
  assert not list((tmp_path / "data").rglob("*.npz*"))


@pytest.mark.usefixtures("run")
@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_a_damaged_run_directory_is_refused(case, tmp_path):
  damage, culprit = RUNS[case]
  damage(tmp_path)
  check(tmp_path, "evaluate.py", "--workdir=run", culprit=culprit)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_a_bad_image_is_refused(name, tiny_run, tmp_path):
  content, culprit = IMAGES[name]
  (tmp_path / name).write_bytes(content)
  check(
    *(tmp_path, "predict.py", f"--workdir={tiny_run}", name),
    culprit=f"{ascii(name)[1:-1]}: {culprit}",
  )


@pytest.mark.usefixtures("run")
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_bad_arguments_are_refused(command, tmp_path):
  check(tmp_path, *command.split(), culprit=COMMANDS[command])


class Canary:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return open, (str(self._path), "w")


@pytest.mark.usefixtures("run", "data_flag")
@pytest.mark.slow
@pytest.mark.parametrize("readable", [(), ("config.json", "dataset.json")])
def test_a_hostile_run_directory_executes_nothing(
  readable, tiny_config, tmp_path
):
  canary = tmp_path / "canary"
  content = pickle.dumps(Canary(canary))
  for path in (tmp_path / "run").rglob("*"):
    if path.is_file() and path.name not in readable:
      path.write_bytes(content)
  flags = [f"--config.{key}={value}" for key, value in tiny_config.items()]
  for command in (
    ("evaluate.py", "--workdir=run"),
    ("evaluate.py", "--workdir=run", "--checkpoint=20"),
    ("evaluate.py", "--workdir=run", "--checkpoint=best"),
    ("predict.py", "--workdir=run", "x.png"),
    ("train.py", "--workdir=run", *flags),
  ):
    check(tmp_path, *command, culprit="run")
  run_program("compare.py", "run", cwd=tmp_path)
  assert not canary.exists()
  pickle.loads(content)
  assert canary.exists()


@pytest.mark.usefixtures("run", "data_flag")
@pytest.mark.slow
@pytest.mark.parametrize(
  "command",
  [
    "predict.py --workdir=~/run --raw digit.npy",
    "predict.py --workdir=~/run --raw --json" + " digit.npy" * 100,
    "evaluate.py --workdir=~/run",
    "compare.py run",
    "train.py --workdir=~/run",
  ],
)
def test_a_program_ends_quietly_if_nobody_reads_its_output(
  command, tiny_config, tmp_path
):
  """As in `predict.py ... | head`; only some outputs fit in a buffer."""
  np.save(tmp_path / "digit.npy", np.eye(28))
  flags = []
  if command.startswith("train.py"):
    flags = [f"--config.{key}={value}" for key, value in tiny_config.items()]
  done = run_program(
    *(*command.split(), *flags),
    cwd=tmp_path,
    is_read=False,
    HOME=str(tmp_path),
  )
  assert done.returncode == 128 + signal.SIGPIPE, done.stderr
  # Only log lines, which start with a time.
  lines = done.stderr.splitlines()
  assert not [line for line in lines if not line[:2].isdigit()], done.stderr
