import subprocess

from conftest import PROJECT
import jax
import pytest

from rundir import provenance
from rundir import runs


@pytest.mark.parametrize(
  "content", ["{", "[]", '{"starts": 5}', '{"starts": [5]}']
)
def test_a_damaged_made_by_json_is_ignored(run, content):
  (run / "made_by.json").write_text(content)
  assert runs.open_run(run).step == 20
  provenance.record(run, 20)
  assert [start["step"] for start in provenance.read(run)] == [20]


def test_what_made_a_run_is_recorded_and_a_changed_model_is_reported(
  run, caplog, monkeypatch
):
  (start,) = provenance.read(run)
  assert start["jax"] == jax.__version__
  assert start["device"] == "1 x cpu"
  assert start["step"] == 0
  assert {"git_revision", "python", "flax", "optax"} <= {*start}
  head = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
  revision = subprocess.run(head, capture_output=True, text=True).stdout
  assert (start["git_revision"] or "").split("-")[0] == revision.strip()
  runs.open_run(run)
  assert "model.py" not in caplog.text
  monkeypatch.setattr(provenance, "_model_sha256", lambda: "another")
  runs.open_run(run)
  assert f"model.py has changed since it trained {run}" in caplog.text
  # A start with other code is added, but only once.
  provenance.record(run, 8)
  provenance.record(run, 12)
  assert [each["step"] for each in provenance.read(run)] == [0, 8]
  # An earlier start had another model.py.
  caplog.clear()
  provenance.warn_of_another_model(run)
  assert f"model.py has changed since it trained {run}" in caplog.text
