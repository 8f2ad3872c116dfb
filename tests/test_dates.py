"""The built-in dates corpus: what is written, that it is unambiguous, and that it is repeatable."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import os
import random
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import dates

SETS = ("train", "validation", "test")
Corpus = dict[str, list[tuple[str, datetime.date]]]

# Written by hand: a date and forms that it must have.
EXPECTED = {
    "2021-05-03": (
        "2021-05-03 | 2021-5-3 | 2021/5/3 | 2021/05/03 | 2021.05.03 | 20210503 | Mon 2021-05-03 |"
        "3 May 2021 | 3 May 21 | 3 May '21 | 03 May 2021 | 3rd May 2021 | May 3 21 | May 3, 2021 |"
        "May 3rd, 2021 | May 3rd 2021 | Monday, 3 May 2021 | Mon 3 May 21 | Mon., May 3, 2021 |"
        "May 3, 2021 (Mon) | 3-May-2021 | 03-May-21 | 2021 May 3 | the 3rd of May, 2021 |"
        "3rd of May 2021 | May the 3rd, 2021 | Monday, the 3rd of May, 2021 |"
        "the third of May 2021 | May the third, 2021 | May third, 2021 |"
        "Monday the third of May 2021 | 3 May twenty twenty-one | May 3, twenty twenty-one |"
        "the third of May, twenty twenty-one | May third two thousand and twenty-one |"
        "May third, two thousand twenty one |"
        "2021년 5월 3일 | 2021년 05월 03일 | 2021년 5월 3일에 | 서기 2021년 5월 3일 |"
        "2021년 5월 3일 월요일 | 2021년 5월 3일(월) | 21년 5월 3일 | '21년 5월 3일 |"
        "21년 5월 3일(월요일) | 2021. 5. 3. | 2021. 5. 3.(월) | '21. 5. 3. | '21.05.03 |"
        "이천이십일년 오월 삼일 | 이천이십일년오월삼일 | 이천이십일년 오월 삼일 월요일 |"
        "서기 이천이십일년 오월 삼일 | 이천이십일년 5월 3일 | 2021년 오월 삼일"
    ),
    "1999-06-01": (
        "1st of June 1999 | Jun. 1st, 99 | the first of June nineteen ninety-nine |"
        "Tues. 1 Jun 1999 | 99년 6월 1일 | 천구백구십구년 유월 일일 | 1999년 유월 일일"
    ),
    "1950-10-02": (
        "2nd October 50 | October second, nineteen fifty | the 2nd of Oct. '50 |"
        "천구백오십년 시월 이일 | 천구백오십년 시월 이일 월요일 | '50. 10. 2."
    ),
    "2005-09-11": (
        "11th of Sept. 2005 | Sep 11th 05 | Sept 11, '05 | the eleventh of September, 2005 |"
        "September eleventh two thousand five | September the eleventh, twenty oh five |"
        "Sunday, Sep. 11, 2005 | 11-Sep-05 | 05년 9월 11일 | 이천오년 구월 십일일 |"
        "이천오년 구월 십일일 일요일"
    ),
    "2000-01-12": (
        "12th of January 2000 | Jan. 12th, 00 | January twelfth, two thousand | 00년 1월 12일 |"
        "the twelfth of January two thousand | 이천년 일월 십이일"
    ),
    "2010-11-13": (
        "Nov 13th, 2010 | November thirteenth, twenty ten | thirteenth of November 10 |"
        "이천십년 십일월 십삼일"
    ),
    "2049-12-21": (
        "21st December 49 | the twenty-first of December 2049 | December twenty first, 2049 |"
        "December twenty-first twenty forty-nine | 이천사십구년 십이월 이십일일"
    ),
    "1971-04-22": "22nd of April 1971 | April twenty-second, '71 | 천구백칠십일년 사월 이십이일",
    "1988-02-23": "23rd of Feb. 1988 | Feb the twenty-third, 88 | 천구백팔십팔년 이월 이십삼일",
    "2023-08-31": "Aug. 31st, 2023 | thirty-first of August 2023 | 이천이십삼년 팔월 삼십일일",
    "2020-07-30": "July 30th 2020 | July thirtieth, twenty twenty | 이천이십년 칠월 삼십일",
    "2024-02-29": (
        "February 29, 2024 | 29th of February 24 | Thurs. 29 Feb 2024 | 2024년 2월 29일(목) |"
        "February twenty-ninth, twenty twenty-four | 이천이십사년 이월 이십구일 목요일"
    ),
    "2003-05-21": "21 May 03 | May 21 03 | '03. 5. 21. | 03년 5월 21일",
}
ANY_DAY = st.dates(dates.FIRST_DAY, dates.LAST_DAY)
PROPERTY = settings(max_examples=30, database=None)


def read(folder: Path) -> Corpus:
    corpus = {}
    for name in SETS:
        sources, targets = (
            (folder / f"{name}.{side}").read_bytes().decode().removesuffix("\n").split("\n")
            for side in ("source", "target")
        )
        assert len(sources) == len(targets)
        corpus[name] = list(zip(sources, map(datetime.date.fromisoformat, targets), strict=True))
    return corpus


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def key(text: str) -> str:
    """Take away all that a surface may change, and every space besides."""
    return text.lower().replace(" ", "").removesuffix(".")


def keys(day: datetime.date) -> set[str]:
    return {key(text) for text in dates.spellings(day)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "made" / "here"
    dates.write_corpus(path)
    return path


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return read(folder)


@pytest.mark.parametrize("iso", EXPECTED)
def test_expected_forms(iso: str) -> None:
    written = set(dates.spellings(datetime.date.fromisoformat(iso)))
    expected = {form.strip() for form in EXPECTED[iso].split("|")}
    assert expected - written == set()


def test_every_ordinal_has_its_suffix() -> None:
    special = {1: "st", 21: "st", 31: "st", 2: "nd", 22: "nd", 3: "rd", 23: "rd"}
    for number in range(1, 32):
        form = f"the {number}{special.get(number, 'th')} of January, 2021"
        assert form in dates.spellings(datetime.date(2021, 1, number))


def test_forms_that_must_not_occur() -> None:
    written = set(dates.spellings(datetime.date(2021, 5, 3)))
    numeric = ("3/5/2021", "5/3/2021", "03.05.2021", "21.5.3", "21. 5. 3.", "210503", "21/5/3")
    unclear = ("May 21", "May 3", "3 May", "21 May 3", "21 May 03", "May 21 3", "May three, 2021")
    assert written.isdisjoint(numeric + unclear)
    assert "1999년 육월 일일" not in dates.spellings(datetime.date(1999, 6, 1))
    assert "1950년 십월 이일" not in dates.spellings(datetime.date(1950, 10, 2))


@PROPERTY
@given(ANY_DAY, ANY_DAY)
def test_no_form_is_shared_by_two_dates(one: datetime.date, other: datetime.date) -> None:
    assert one == other or keys(one).isdisjoint(keys(other))


@PROPERTY
@given(st.tuples(st.integers(1, 31), st.integers(1, 31), st.integers(1, 12)), st.booleans())
def test_no_form_is_shared_by_dates_of_the_same_numbers(
    numbers: tuple[int, int, int], near: bool
) -> None:
    meanings: dict[str, datetime.date] = {}
    days = set()
    for year, month, day in itertools.permutations(numbers):
        for shift in (0, 1, 10) if near else (0,):
            try:
                days.add(datetime.date(2000 + year, month, day + shift))
            except ValueError:
                continue
    for date in days:
        for form in keys(date):
            assert meanings.setdefault(form, date) == date, form


@PROPERTY
@given(ANY_DAY, st.randoms(use_true_random=False))
def test_surfaces_change_no_word_or_number(day: datetime.date, rng: random.Random) -> None:
    for text in rng.sample(list(dates.spellings(day)), 20):
        numbers = re.findall("[0-9]+", text)
        for surface in set(dates.surfaces(text)):
            assert key(surface) == key(text)
            assert re.findall("[0-9]+", surface) == numbers
            assert surface == surface.strip()


def test_surfaces_of_one_form() -> None:
    assert set(dates.surfaces("May 3, 21")) == {
        month + rest + stop
        for month in ("May", "may", "MAY")
        for rest in (" 3, 21", "3,21", "  3,  21")
        for stop in ("", ".")
    }
    assert "May3 21" in dates.surfaces("May 3 21")
    assert "May321" not in dates.surfaces("May 3 21")
    assert "2021년5월3일" in dates.surfaces("2021년 5월 3일")
    assert "2021.5.3." in dates.surfaces("2021. 5. 3.")


@PROPERTY
@given(ANY_DAY, st.integers(0, 2**32))
def test_draw_is_repeatable_and_gives_different_forms(day: datetime.date, seed: int) -> None:
    drawn = dates.draw(day, random.Random(seed), 20)
    assert drawn == dates.draw(day, random.Random(seed), 20)
    assert len(set(drawn)) == 20
    assert {key(form) for form in drawn} <= keys(day)


def test_sets_have_the_expected_sizes_and_share_no_date(corpus: Corpus) -> None:
    days = {name: {day for _, day in corpus[name]} for name in SETS}
    assert len(corpus["validation"]) == len(days["validation"]) == 1000
    assert len(corpus["test"]) == len(days["test"]) == 1000
    assert len(corpus["train"]) == 3 * len(days["train"]) == 3 * (36_525 - 2000)
    assert sum(map(len, days.values())) == len(set().union(*days.values())) == 36_525
    assert min(map(min, days.values())) >= datetime.date(1950, 1, 1)
    assert max(map(max, days.values())) <= datetime.date(2049, 12, 31)


def test_no_source_has_two_targets(corpus: Corpus) -> None:
    meanings: dict[str, datetime.date] = {}
    for source, day in itertools.chain(*corpus.values()):
        assert meanings.setdefault(key(source), day) == day, source


def test_lines_are_clean(folder: Path, corpus: Corpus) -> None:
    pairs = list(itertools.chain(*corpus.values()))
    for source, _ in pairs:
        assert source == source.strip()
        assert source.isprintable()
        assert 6 <= len(source) <= 80
    for path in folder.iterdir():
        text = path.read_bytes().decode()
        assert unicodedata.is_normalized("NFC", text)
        assert text.endswith("\n")
        assert not {"\r", "\t"} & set(text)
        if path.suffix == ".target":
            assert re.fullmatch(r"([0-9]{4}-[0-9]{2}-[0-9]{2}\n)+", text)
    assert len(set().union(*(source for source, _ in pairs))) < 100


def test_weekdays_years_and_months_agree_with_the_target(corpus: Corpus) -> None:
    english = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    months = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
    seen = 0
    for source, day in itertools.chain(*corpus.values()):
        lower = source.lower()
        for found in re.findall("|".join(english), lower):
            assert found == english[day.weekday()], source
            seen += 1
        for pair in re.findall(r"([월화수목금토일])요일|\(([월화수목금토일])\)", source):
            assert "".join(pair) == "월화수목금토일"[day.weekday()], source
            seen += 1
        for month in re.findall("|".join(months), lower):
            assert month == months[day.month - 1], source
        for year in re.findall("(?<![0-9])[0-9]{4}", source):
            assert year == f"{day.year}", source
        for year in re.findall("'([0-9]{2})|([0-9]{2})년", source):
            assert max(year) == f"{day.year % 100:02}", source
    assert seen > 10_000


def test_both_languages_and_all_kinds_of_form_are_common(corpus: Corpus) -> None:
    sources = [source.lower() for source, _ in corpus["train"]]
    for pattern in ("[a-z]", "[가-힣]", "^[0-9][-/.0-9]+$", "'", "thousand|nineteen", "시월|유월"):
        assert sum(bool(re.search(pattern, source)) for source in sources) > 1000, pattern


def test_equal_options_give_equal_bytes_everywhere(folder: Path, tmp_path: Path) -> None:
    """The digest is fixed so that every Python and platform is held to it.

    A change of the templates or tables changes it: then put the new one here.
    """
    assert digest(folder) == "427a63e6bf0debd32d057b45d73824f03b6a9dfaf5bac510fdf8043e98e20749"
    written = {
        name: dates.DatesOptions(seed=seed, forms_per_date=1)
        for name, seed in (("one", 1), ("again", 1), ("two", 2))
    }
    for name, options in written.items():
        dates.write_corpus(tmp_path / name, options)
    assert digest(tmp_path / "one") == digest(tmp_path / "again") != digest(tmp_path / "two")
    assert len(read(tmp_path / "one")["train"]) == 36_525 - 2000


def test_a_failed_write_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    (tmp_path / "validation.source").write_text("old\n", encoding="utf-8")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        dates.write_corpus(tmp_path, dates.DatesOptions(forms_per_date=1))
    assert [path.name for path in tmp_path.iterdir()] == ["validation.source"]
    assert (tmp_path / "validation.source").read_text(encoding="utf-8") == "old\n"


def test_only_the_six_files_are_written(folder: Path) -> None:
    names = {f"{name}.{side}" for name in SETS for side in ("source", "target")}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize(("forms", "held"), [(0, 1000), (101, 1000), (3, 0), (3, 10_001)])
def test_options_without_a_corpus_are_refused(forms: int, held: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        dates.DatesOptions(forms_per_date=forms, held_out=held)
