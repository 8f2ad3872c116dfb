"""The built-in corpus: calendar dates as people write them in English and in Korean.

The task is to turn a written date into ISO 8601::

    the 3rd of May, 2021         ->  2021-05-03
    MON. MAY 3 21                ->  2021-05-03
    2021년 5월 3일(월)            ->  2021-05-03
    이천이십일년 유월 십일일      ->  2021-06-11

It covers every day from 1950-01-01 to 2049-12-31.  Every source line means one date and only
one, whichever of the forms below it was written in:

* The year is always there.  Two digits mean 1950-1999 for 50-99 and 2000-2049 for 00-49.
* A bare two-digit year ("21") comes after both day and month name: "3 May 21", "May 3 21".
  So "21 May 03" is 2003-05-21.  A year that comes first has four digits, or an apostrophe
  ("'21. 5. 3."), or is followed by 년 ("21년 5월 3일"); day and year can never be exchanged.
* Dates in figures only run year-month-day.  Day-month-year and month-day-year in figures
  ("3/5/2021") cannot be told apart, so neither is written.
* Days in English words are ordinals ("third"), years are cardinals ("twenty twenty-one").
* Numbers in Korean words are Sino-Korean, with the irregular months 유월 (June) and 시월
  (October).  The day ends in its own 일: 이십일 is the 20th, 이십일일 the 21st.
* A weekday, where there is one, is the right one for the date.

A form is a row of ``TEMPLATES`` whose ``{slots}`` are filled with what ``slots`` offers for the
date.  Its surface is then varied (``surfaces``): letter case, double or left-out spaces, and a
full stop at the end.  No line begins or ends with white space.
"""
# ruff: noqa: SIM905 - the word tables would be fifty lines of one word each.

from __future__ import annotations

import datetime
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.run import write_text

FIRST_DAY = datetime.date(1950, 1, 1)
LAST_DAY = datetime.date(2049, 12, 31)

# Every row is drawn equally often, so the number of rows sets the share of each kind of form.
NUMERIC = (
    "{yyyy}-{mm}-{dd}",
    "{yyyy}-{m}-{d}",
    "{yyyy}/{mm}/{dd}",
    "{yyyy}/{m}/{d}",
    "{yyyy}.{mm}.{dd}",
    "{yyyy}{mm}{dd}",
    "{weekday} {yyyy}-{mm}-{dd}",
)
ENGLISH = (
    "{day} {month}{comma} {year}",
    "{month} {day}{comma} {year}",
    "{weekday}{comma} {day} {month}{comma} {year}",
    "{weekday}{comma} {month} {day}{comma} {year}",
    "{month} {day}{comma} {year} ({weekday})",
    "{d}-{mon}-{yyyy}",
    "{dd}-{mon}-{yy}",
    "{yyyy} {month} {day}",
    "{the}{dth} of {month}{comma} {year}",
    "{month} the {dth}{comma} {year}",
    "{weekday}{comma} the {dth} of {month}{comma} {year}",
    "{the}{nth} of {month}{comma} {year}",
    "{month} {the}{nth}{comma} {year}",
    "{weekday}{comma} {the}{nth} of {month}{comma} {year}",
    "{day} {month}{comma} {year_words}",
    "{month} {day}{comma} {year_words}",
    "{the}{nth} of {month}{comma} {year_words}",
    "{month} {the}{nth}{comma} {year_words}",
)
KOREAN = (
    "{yyyy}년 {m}월 {d}일{particle}",
    "{yyyy}년 {mm}월 {dd}일{particle}",
    "서기 {yyyy}년 {m}월 {d}일",
    "{yyyy}년 {m}월 {d}일 {요일}요일",
    "{yyyy}년 {m}월 {d}일({요일})",
    "{yy}년 {m}월 {d}일{particle}",
    "'{yy}년 {m}월 {d}일",
    "{yy}년 {m}월 {d}일({요일}요일)",
    "{yyyy}. {m}. {d}.",
    "{yyyy}. {m}. {d}.({요일})",
    "'{yy}. {m}. {d}.",
    "'{yy}.{mm}.{dd}",
    "{년}년{gap}{월}월{gap}{일}일{particle}",
    "{년}년 {월}월 {일}일 {요일}요일",
    "서기 {년}년 {월}월 {일}일",
    "{년}년 {m}월 {d}일",
    "{yyyy}년 {월}월 {일}일",
)
TEMPLATES = NUMERIC + ENGLISH + KOREAN

MONTHS = (
    ("January", "Jan", "Jan."),
    ("February", "Feb", "Feb."),
    ("March", "Mar", "Mar."),
    ("April", "Apr", "Apr."),
    ("May",),
    ("June", "Jun", "Jun."),
    ("July", "Jul", "Jul."),
    ("August", "Aug", "Aug."),
    ("September", "Sep", "Sep.", "Sept", "Sept."),
    ("October", "Oct", "Oct."),
    ("November", "Nov", "Nov."),
    ("December", "Dec", "Dec."),
)
WEEKDAYS = (
    ("Monday", "Mon", "Mon."),
    ("Tuesday", "Tue", "Tues."),
    ("Wednesday", "Wed", "Wed."),
    ("Thursday", "Thu", "Thurs."),
    ("Friday", "Fri", "Fri."),
    ("Saturday", "Sat", "Sat."),
    ("Sunday", "Sun", "Sun."),
)
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first "
    "twenty-second twenty-third twenty-fourth twenty-fifth twenty-sixth twenty-seventh "
    "twenty-eighth twenty-ninth thirtieth thirty-first"
).split()
ONE_TO_NINETEEN = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

KOREAN_WEEKDAYS = "월화수목금토일"
KOREAN_DIGITS = "일이삼사오육칠팔구"
KOREAN_MONTHS = ("일", "이", "삼", "사", "오", "유", "칠", "팔", "구", "시", "십일", "십이")


@dataclass(frozen=True)
class DatesOptions:
    """What to write: the seed, the forms per training date, and the dates held out.

    ``held_out`` dates, each in one form, make the validation set, and as many others the test
    set.  All the rest are training dates, each in ``forms_per_date`` different forms.
    """

    seed: int = 1
    forms_per_date: int = 3
    held_out: int = 1000

    def __post_init__(self) -> None:
        """Refuse numbers for which no corpus exists."""
        if not 1 <= self.forms_per_date <= 100:
            raise ValueError(f"forms_per_date must be 1 to 100, not {self.forms_per_date}")
        if not 1 <= self.held_out <= 10_000:
            raise ValueError(f"held_out must be 1 to 10000, not {self.held_out}")


def write_corpus(folder: Path, options: DatesOptions = DatesOptions()) -> None:
    """Write ``{train,validation,test}.{source,target}`` into ``folder``, made if missing.

    The files are UTF-8 with one example a line; line n of a target file is the ISO date of line n
    of its source file.  The three sets share no date.  Equal options give equal bytes on every
    platform and Python version.  Each file appears whole or not at all.
    """
    rng = random.Random(options.seed)
    days = sorted(all_days(), key=lambda _: rng.random())
    for name, part, forms in (
        ("validation", days[: options.held_out], 1),
        ("test", days[options.held_out : 2 * options.held_out], 1),
        ("train", days[2 * options.held_out :], options.forms_per_date),
    ):
        pairs = [(form, day.isoformat()) for day in part for form in draw(day, rng, forms)]
        write_text(folder / f"{name}.source", "".join(f"{source}\n" for source, _ in pairs))
        write_text(folder / f"{name}.target", "".join(f"{target}\n" for _, target in pairs))


def all_days() -> list[datetime.date]:
    """Return every date of the corpus, in order."""
    return [FIRST_DAY + datetime.timedelta(n) for n in range((LAST_DAY - FIRST_DAY).days + 1)]


def draw(day: datetime.date, rng: random.Random, count: int = 1) -> list[str]:
    """Draw ``count`` different written forms of ``day``, surface variation included."""
    offered = slots(day)
    drawn: list[str] = []
    while len(drawn) < count:
        parts = _parts(_pick(rng, TEMPLATES), offered)
        form = _pick(rng, surfaces("".join(_pick(rng, choices) for choices in parts)))
        if form not in drawn:
            drawn.append(form)
    return drawn


def spellings(day: datetime.date) -> Iterator[str]:
    """Yield every form of ``day`` as written, before ``surfaces``; some may come twice."""
    offered = slots(day)
    for template in TEMPLATES:
        for filled in itertools.product(*_parts(template, offered)):
            yield "".join(filled)


def slots(day: datetime.date) -> dict[str, tuple[str, ...]]:
    """Return what may fill each slot of a template for ``day``; one given twice counts twice."""
    d, m, yyyy = str(day.day), str(day.month), str(day.year)
    dd, mm, yy = d.zfill(2), m.zfill(2), yyyy[2:]
    dth = d + ("th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th"))
    months = MONTHS[day.month - 1]
    return {
        "yyyy": (yyyy,),
        "yy": (yy,),
        "m": (m,),
        "mm": (mm,),
        "d": (d,),
        "dd": (dd,),
        # English: 3 03 3rd / 3rd / third / May / 2021 21 '21 / twenty twenty-one / Monday Mon.
        "day": (d, dd, dth),
        "dth": (dth,),
        "nth": _with_and_without_hyphens([ORDINALS[day.day - 1]]),
        "month": months,
        "mon": (months[0][:3],),
        "year": (yyyy, yyyy, yy, "'" + yy),
        "year_words": _with_and_without_hyphens(_year_words(day.year)),
        "weekday": WEEKDAYS[day.weekday()],
        "the": ("the ", ""),
        "comma": (",", ""),
        # Korean: 이천이십일 / 오 / 삼 / 월.
        "년": (_sino_korean(day.year),),
        "월": (KOREAN_MONTHS[day.month - 1],),
        "일": (_sino_korean(day.day),),
        "요일": (KOREAN_WEEKDAYS[day.weekday()],),
        "gap": (" ", ""),
        "particle": ("", "", "에"),
    }


def surfaces(text: str) -> tuple[str, ...]:
    """Return the ways to put ``text`` on a line; the plain ones count more than once.

    A space is left out only between a digit and something that is no digit, so that numbers and
    words stay apart: "May 3 21" may become "May3 21", never "May321".
    """
    compact = re.sub(r"(?<=[0-9]) (?=[^0-9])|(?<=[^0-9]) (?=[0-9])", "", text)
    cased = [
        form
        for spaced in (text, text, text, compact, text.replace(" ", "  "))
        for form in (spaced, spaced, spaced.lower(), spaced.upper())
    ]
    stopped = [form if form.endswith(".") else form + "." for form in cased]
    return (*cased, *cased, *cased, *stopped)


def _year_words(year: int) -> list[str]:
    rest = year % 100
    if year < 2000:
        return [f"nineteen {_cardinal(rest)}"]
    if rest == 0:
        return ["two thousand"]
    short = f"twenty {_cardinal(rest)}" if rest >= 10 else f"twenty oh {_cardinal(rest)}"
    return [short, f"two thousand {_cardinal(rest)}", f"two thousand and {_cardinal(rest)}"]


def _cardinal(number: int) -> str:
    """Return 1 to 99 in English words."""
    if number < 20:
        return ONE_TO_NINETEEN[number - 1]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONE_TO_NINETEEN[ones - 1]}" if ones else "")


def _sino_korean(number: int) -> str:
    """Return 1 to 9999 in Sino-Korean words; a one is not said before 천, 백 and 십."""
    words = ""
    for unit, name in ((1000, "천"), (100, "백"), (10, "십"), (1, "")):
        digit = number // unit % 10
        if digit:
            words += ("" if digit == 1 and name else KOREAN_DIGITS[digit - 1]) + name
    return words


def _with_and_without_hyphens(texts: Sequence[str]) -> tuple[str, ...]:
    return (*texts, *(text.replace("-", " ") for text in texts))


def _parts(template: str, offered: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Split a template into what each stretch of it may read; plain text has one choice."""
    texts_and_names = re.split(r"\{(\w+)\}", template)
    return [offered[part] if n % 2 else (part,) for n, part in enumerate(texts_and_names)]


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    # random() is the only method whose sequence Python promises to keep from version to version.
    return choices[int(rng.random() * len(choices))]
