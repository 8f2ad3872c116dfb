"""Verb `archive`: model.pt, tokenizers, handler and configuration in one .mar for TorchServe.

The archive needs nothing beside it but a TorchServe 0.12 with torch, sentencepiece and PyYAML: what
else the handler uses is pure Python and travels in it. The same inputs give the same bytes: entries
are sorted, and carry no time of building.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch

from handler.extras import PINS, MissingPackage, package
from handler.integrity import sha256, write_digests
from training.export import exported, library
from training.recipe import Recipe
from training.run import Run, RunError, write_atomically, write_text

PACKAGE = Path(__file__).resolve().parent.parent / "handler"
HANDLER = PACKAGE / "seq2seq_handler.py"
CONFIG = PACKAGE / "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
NAME = "seq2seq"  # of the model in TorchServe, so of its URL: /predictions/seq2seq
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state
CREATED = "01/01/1980 00:00:00"  # the same; TorchServe complains where there is none


def archive(recipe: Recipe, run: Run, store: Path) -> Path:
    """Build `store`/seq2seq.mar, and seq2seq.mar.sha256 beside it.

    Raises:
        RunError: nothing exported yet, what was exported is spoilt, or the archiver's own
            complaint.
    """
    exported(run, torch.device("cpu"))
    built = store / f"{NAME}.mar"
    with tempfile.TemporaryDirectory(prefix="seq2serve-") as folder:
        staging, out = Path(folder, "content"), Path(folder, "out")
        stage(run, staging)
        out.mkdir()
        pack(recipe, staging, out, Path(folder))
        write_atomically(built, lambda temporary: repack(out / built.name, temporary))
    write_text(built.with_name(f"{built.name}.sha256"), f"{sha256(built)}  {built.name}\n")
    return built


def stage(run: Run, staging: Path) -> None:
    """Everything that goes into the archive, in one folder, with its digests."""
    skipped = shutil.ignore_patterns("__pycache__", HANDLER.name, CONFIG.name)
    shutil.copytree(PACKAGE, staging / "handler", ignore=skipped)
    for path in (HANDLER, CONFIG, run.model):
        shutil.copy(path, staging)
    if library(run).exists():
        shutil.copy(library(run), staging)
    for side in ("source", "target"):
        shutil.copy(run.tokenizer / f"{side}.model", staging)
    for name in PINS:
        bring(name, staging)
    write_digests(staging)


def bring(name: str, staging: Path) -> None:
    """A package's modules, and its description and licence, as they are where it is installed.

    Raises:
        RunError: it is not, or in another version.
    """
    try:
        package(name)
    except MissingPackage as error:
        raise RunError(f"archive: {error}") from None
    for one in metadata.files(name) or ():
        described = one.parent.name.endswith(".dist-info") and one.name == "METADATA"
        if ".." not in one.parts and (one.suffix == ".py" or described or "licenses" in one.parts):
            path = staging / one
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(one.locate()), path)


def pack(recipe: Recipe, staging: Path, out: Path, temporary: Path) -> None:
    """Run torch-model-archiver, whose work folder is a fixed name below the temporary one."""
    command = [
        sys.executable, "-m", "model_archiver.model_packaging",
        "--model-name", NAME, "--version", recipe.export.version,
        "--serialized-file", str(staging / "model.pt"),
        "--handler", str(staging / HANDLER.name),
        "--config-file", str(staging / CONFIG.name),
        "--extra-files", str(staging), "--export-path", str(out),
    ]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not (out / f"{NAME}.mar").exists():
        raise RunError(f"torch-model-archiver failed: {done.stderr.strip() or done.stdout.strip()}")


def repack(built: Path, path: Path) -> None:
    """The same archive without the traces of when it was built.

    Weights do not compress, so they are stored as they are, which makes loading quicker.
    """
    with zipfile.ZipFile(built) as source, zipfile.ZipFile(path, "w") as target:
        for name in sorted(source.namelist()):
            content = source.read(name)
            if name == MANIFEST:
                manifest = json.loads(content)
                manifest["createdOn"] = CREATED
                content = json.dumps(manifest, indent=1, sort_keys=True).encode()
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            stored = name.endswith(".pt")
            entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            target.writestr(entry, content)
