"""The extra `serving`: what the handler can do without."""

import re
from pathlib import Path

import pytest
import sentencex
from sentencex.base import Languages
from sentencex.fallbacks import LANGUAGE_FALLBACKS

from handler.extras import PINS, MissingPackage, package
from handler.sentences import Splitter

ROOT = Path(__file__).resolve().parent.parent


def test_the_pins_are_those_of_the_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^serving = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert dict(re.findall(r'"([\w.-]+)==([^"]+)"', listed)) == PINS


def test_a_package_is_the_one_that_is_installed():
    assert package("sentencex") is sentencex


@pytest.mark.parametrize("name", PINS)
def test_a_package_that_cannot_be_imported_is_missing(name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingPackage, match=f"needs {name} .*, found none: .*serving"):
        package(name)


def test_every_language_that_sentencex_names_has_a_splitter():
    codes = {*LANGUAGE_FALLBACKS, *Languages.REGISTRY} - {"base"}
    assert len(codes) > 200
    minded = {code: Splitter(code).name for code in codes}
    assert len(set(minded.values())) > 20
    assert None not in minded.values()
