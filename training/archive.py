"""Verb `archive`: model.pt, tokenizers, handler and configuration in one .mar for TorchServe.

The archive needs nothing beside it but a TorchServe 0.12 with torch, sentencepiece and PyYAML: what
else the handler uses is pure Python and travels in it. The same inputs give the same bytes: entries
are sorted, and carry no time of building.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from handler.extras import PINS, MissingPackage, package
from handler.integrity import DIGESTS, sha256, write_digests
from training.export import demand_own, exported, library
from training.recipe import Recipe
from training.run import Run, RunError, only_writer, write_atomically, write_text

PACKAGE = Path(__file__).resolve().parent.parent / "handler"
HANDLER = PACKAGE / "seq2serve.py"
CONFIG = PACKAGE / "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
NAME = "seq2seq"  # of the model in TorchServe, so of its URL: /predictions/seq2seq
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state
CREATED = "01/01/1980 00:00:00"  # the same; TorchServe complains where there is none


def archive(recipe: Recipe, run: Run, store: Path) -> Path:
    """Build `store`/seq2seq.mar, and seq2seq.mar.sha256 beside it.

    Raises:
        RunError: nothing exported yet, what was exported is spoilt or of another recipe or text, a
            package is missing, or the archiver's own complaint.
    """
    demand_own(exported(run, torch.device("cpu")), recipe, run)
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
    """Copy everything that goes into the archive to one folder, with its digests."""
    for name, path in contents(run).items():
        place = staging / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    write_digests(staging)


def contents(run: Run) -> dict[str, Path]:
    """Everything that goes into the archive, by its name there."""
    skipped = (HANDLER.name, CONFIG.name)
    files = {
        f"handler/{path.relative_to(PACKAGE).as_posix()}": path
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in skipped
    }
    models = [run.tokenizer / f"{side}.model" for side in ("source", "target")]
    natives = [library(run)] if library(run).exists() else []
    for name in PINS:
        files |= packaged(name)
    return files | {path.name: path for path in (HANDLER, CONFIG, run.model, *natives, *models)}


def packaged(name: str) -> dict[str, Path]:
    """A package's modules, and its description and licence, where it is installed.

    Raises:
        RunError: it is not, or in another version.
    """
    try:
        package(name)
    except MissingPackage as error:
        raise RunError(f"archive: {error}") from None
    return {
        one.as_posix(): Path(str(one.locate()))
        for one in metadata.files(name) or ()
        if ".." not in one.parts
        and (one.suffix == ".py" or "licenses" in one.parts or one.match("*.dist-info/METADATA"))
    }


def archived(recipe: Recipe, run: Run, built: Path) -> bool:
    """Whether `built` is the archive of `recipe` and of what is in `run` now, and is whole."""
    told = built.with_name(f"{built.name}.sha256")
    try:
        if told.read_text("utf-8") != f"{sha256(built)}  {built.name}\n":
            return False
        with zipfile.ZipFile(built) as content:
            digests = json.loads(content.read(DIGESTS))
            version = json.loads(content.read(MANIFEST))["model"]["modelVersion"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return False
    now = {name: sha256(path) for name, path in contents(run).items()}
    return bool(digests == now and version == recipe.export.version)


def deliver(built: Path, store: Path) -> bool:
    """Put an archive into the store that is served; whether it was not there already."""
    store.mkdir(parents=True, exist_ok=True)
    with only_writer(store, "archive"):
        given = [built, built.with_name(f"{built.name}.sha256")]
        if all(same(path, store / path.name) for path in given):
            return False
        for path in given:
            write_atomically(store / path.name, partial(shutil.copyfile, path))
    return True


def same(one: Path, other: Path) -> bool:
    return other.exists() and filecmp.cmp(one, other, shallow=False)


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
