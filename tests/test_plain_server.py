"""The peer that serves model.pt without our engine translates what the engine translates."""

import json
import subprocess
import sys
import zipfile

import pytest
from conftest import GUARD_SECONDS, ROOT, Toy
from test_rest import offline

# Its web servers are in an environment of its own.
PROGRAM = """
import json, runpy, sys, types
from pathlib import Path

for name in ("fastapi", "litserve", "uvicorn"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["litserve"].LitAPI = object
script, folder, beam = sys.argv[1:]
found = runpy.run_path(script, run_name="plain_server")
translator = found["Translator"](Path(folder), int(beam), "cpu")
print(json.dumps(translator.translate(json.load(sys.stdin))))
"""


@pytest.mark.parametrize("beam", [1, 4])
def test_it_loads_the_model_of_an_archive_and_translates_like_the_engine(toy: Toy, tmp_path, beam):
    with zipfile.ZipFile(toy.store / "seq2seq.mar") as content:
        for name in ("model.pt", "source.model", "target.model"):
            content.extract(name, tmp_path)
    lines = ["12345", "678", "9"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT / "bench" / "plain_server.py", tmp_path, str(beam)],
        input=json.dumps(lines), cwd=tmp_path, text=True, capture_output=True,
        timeout=GUARD_SECONDS, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == offline(toy, lines)
