"""Paragraphs to sentences, and their translations back to paragraphs.

Where it is doubtful whether a sentence ends the text stays whole: a model reads two sentences at
once without much harm, half a sentence is lost. So a sentence ends where nothing speaks against
it: neither the rules here, in the spirit of Unicode's sentence boundaries (UAX 29), nor sentencex,
which knows the abbreviations of the text's language. sentencex is asked about one word at a time,
because its own search takes quadratic time.
"""
# ruff: noqa: SIM905 - the abbreviations would be a hundred lines of one word each.

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from handler.extras import PINS, MissingPackage, package
from handler.pieces import Work

LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
BLANKS = "[^\\S\n\r\v\f\x85\u2028\u2029]+"
# White space beside line breaks, but for that within "\r \n", which are two.
BESIDE = re.compile(rf"(?<=\r){BLANKS}(?=\n)|({BLANKS})")

MARKS = ".．…!?‽‼⁇⁈⁉"  # end a sentence before white space and a letter that is not lower case
# End a sentence whatever follows: Chinese and Japanese, Arabic and Urdu, Devanagari, Armenian,
# Ethiopic, Khmer, Burmese.
STOPS = "。！？｡؟۔।॥։።፧៕។။"
UNSPACED = ("。", "！", "？", "｡", "，", "、", "；", "：")
PERIODS = (".", "．", "۔")  # also written after abbreviations and ordinals

QUOTES = "\"'”’»›」』｣"
CLOSING = QUOTES + ")]}）］】〕〉》"
GERMAN = "“‘«‹"  # closing in German, opening elsewhere; after a Chinese stop always opening
OPENING = "\"'“‘„‚«‹»›([{¿¡「『｢（［【〔〈《"
NARROW = " \xa0\u202f"  # the space inside French quotes
QUOTING = "とっ"  # Japanese, after words in somebody's mouth: 行け！と言う

END = re.compile(
    rf"(?P<marks>[{MARKS}{STOPS}]+)"
    rf"(?P<closing>(?:(?<=[{STOPS}])[{re.escape(CLOSING)}]*|[{re.escape(CLOSING + GERMAN)}]*)"
    rf"(?:[{NARROW}]»(?!\S))?)"
    r"(?P<gap>\s*)"
    r"|(?P<space>\s+)"
)
BEGIN = re.compile(rf"(?:[{re.escape(OPENING)}]+[{NARROW}]?)?(\w)")
# Dots that leave something out, "[...] Then" or "I have ... John", rather than end a sentence.
OMISSION = re.compile(r"""(?:\A|[\s(\[{])["'“‘„‚«»]?\Z""")

# Whatever the language is, as it is often not known. Only what an upper-case letter may follow, as
# nothing is split before others. In lower case: in any case. Capitalised: so, or all in capitals,
# for "He sat. Then" ends a sentence. One letter ("z. B.", "U.S.", "M. Dupont") needs no entry, nor
# does a word without a vowel. Several can end a sentence: it is not split then.
ABBREVIATIONS = frozenset(
    # English: titles, names, references, calendar
    "Mr Mrs Ms Mx Messrs Dr Drs Prof Rev Hon Pres Gov Sen Rep Gen Col Maj Capt Lt Sgt Cpl Adm Supt "
    "St Mt Ft Jr Sr Esq Inc Ltd Co Corp Bros Dept Ave Blvd Rd No Nos Vol Fig Figs Ch Sec Eq Ed "
    "Ph vs etc cf al approx incl excl viz ibid pp eds Tab Univ "
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec "
    "Mon Tue Tues Wed Thu Thur Thurs Fri Sat Sun "
    # German
    "Hr Hrn Fr Frl Nr Nrn Str Tel Abb Abs Abt Anm Art Aufl Bd Bsp Hrsg Jh Jhd Kap Std Dipl Ing "
    "bzw ca usw usf evtl ggf inkl exkl einschl insb zzgl vgl sog bspw bes allg ehem geb gest "
    "max min mio mrd tsd med dent phil jur rer nat habil dt engl frz lat ugs "
    "Jän Mär Okt Dez Mo Di Mi Do Sa So "
    # French and Spanish
    "Mme Mmes Mlle Mlles MM Mgr Ste éd env ex chap gén "
    "Sra Sras Sres Srta Dra Ud Uds Vd Vds Lic Arq Avda Av Gral Sto Sta pág págs núm Cía EE UU "
    # Polish, Russian, Hindi
    "im "
    "гг ул им тыс млн млрд руб др стр рис обл проф акад डॉ प्रो पं".split()
)
# Words in lower case that sentencex takes for abbreviations, of states for the most part.
ORDINARY = frozenset("me man no ill art mass miss wash fed ok ore pa mich mag".split())
# Words of other languages among the English abbreviations.
FOREIGN = frozenset(
    "mar con sens ken dak ark del ala la gen ind min sen sept ont pa ma mo id al pl te".split()
)
JOINING = "'’:"  # inside a word or a time of day
INSIDE = JOINING + "."  # and inside what is shortened
LONGEST = 24  # characters looked at before a period: more than any abbreviation has
VOWELS = frozenset("aeiouyæœøıаеёиоуыэюяєіїαεηιουω")
CONSONANTS = frozenset("bcdfghjklmnpqrstvwxzбвгґджзйклмнпрстфхцчшщβγδζθκλμνξπρσςτφχψ")
VOWELLESS = 4  # letters: a longer word without a vowel is a word of a Slavic language, or a joke
LOOKS = 32  # places looked at in a tenth of a millisecond or so
DEFAULT = "en"  # whose abbreviations are minded where the language is not known


# Lines that begin so are no lines of a wrapped paragraph: items of a list, quotations, headings.
ITEM = re.compile(r"\s*(?:[-*+•–—>#]|\(?\d{1,3}[.)]|[a-z]\))\s")
# Chinese and Japanese, whose lines are put together without spaces.
WIDE = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")


@dataclass(frozen=True)
class Segment:
    """A sentence without white space around it, and the white space up to the next one.

    text: empty only in the first segment of a text that begins with white space.
    gap: empty after the last sentence, and between two that nothing separates: "一。二。".
    """

    text: str
    gap: str


class Language(Protocol):
    """A language of sentencex."""

    language: str

    def is_abbreviation(self, head: str, tail: str, seperator: str) -> bool: ...


class Splitter:
    """Splits text of one language into sentences.

    Args:
        language: its code, as `de` or `pt-BR`; None where it is not known. Of one that sentencex
            does not know, a related language is minded, or else English.
    """

    def __init__(self, language: str | None = None) -> None:
        self.missing = ""
        self.language: Language | None = None
        self.english: Language | None = None
        try:
            known = package("sentencex")
        except MissingPackage as error:
            self.missing = str(error)
        else:
            code = (language or DEFAULT).lower()
            found = known.get_language_class(code)
            if found.language == DEFAULT:  # or this regional form of it is not known
                found = known.get_language_class(code.partition("-")[0])
            self.language, self.english = found(), known.get_language_class(DEFAULT)()

    @property
    def name(self) -> str | None:
        """What splits, told beside the card; None where the package is missing."""
        if self.language is None:
            return None
        return f"sentencex {PINS['sentencex']}, {self.language.language}"

    def split(self, text: str) -> list[Segment]:
        """The sentences of `text`; see `segments`."""
        return [one for one in self.segments(text) if one is not None]

    def segments(self, text: str) -> Iterator[Segment | None]:
        """The sentences of `text`; a line break always ends one. Time is linear in its length, and
        bounded between two of what is yielded: None where no sentence has ended for a while.

        Laws, for any text at all:
            "".join(s.text + s.gap for s in split(text)) == text
            no s.text begins or ends with white space, or has a line break in it
            split(s.text) == [Segment(s.text, "")] where s.text is not empty

        Raises:
            MissingPackage: whether a sentence ends cannot be told.
        """
        start = 0
        for count, found in enumerate(END.finditer(text), 1):
            gap_start, end = found.start("gap" if found["marks"] else "space"), found.end()
            outermost = gap_start == 0 or end == len(text)
            if (
                outermost
                or LINE_BREAK.search(text, gap_start, end)
                or self.ends_sentence(found, start)
            ):
                yield Segment(text[start:gap_start], text[gap_start:end])
                start = end
            elif count % LOOKS == 0:
                yield None
        if start < len(text):
            yield Segment(text[start:], "")

    def ends_sentence(self, found: re.Match[str], start: int) -> bool:
        """Whether a match of `END`, followed by more of its line, ends the sentence that begins at
        `start`.

        Raises:
            MissingPackage: nothing here speaks against it, and sentencex is not there to be asked.
        """
        if not may_end_sentence(found):
            return False
        if self.language is None or self.english is None:
            raise MissingPackage(self.missing)
        if found["marks"] != "." or found["closing"]:
            return True
        end = found.start()
        head = unicodedata.normalize("NFC", found.string[max(start, end - LONGEST) : end])
        word = head.rpartition(" ")[2]
        if word in ORDINARY:
            return True
        if word not in FOREIGN and self.english.is_abbreviation(head, "", "."):
            return False  # such as "prof." and "vs.", which other languages have too
        return not self.language.is_abbreviation(head, "", ".")


def source_language(card: str) -> str | None:
    """The language of the text that a model reads, by its card, which may be of an older export."""
    told = json.loads(card or "{}").get("recipe", {}).get("export", {}).get("source_language")
    return told if isinstance(told, str) else None


def unwrapped(text: str) -> Work[str]:
    """`text` with each paragraph in one line, a line at a time. Paragraphs are divided by blank
    lines; what looks like an item of a list, a quotation or a heading begins a line as it did."""
    lines = LINE_BREAK.split(text)
    parts = [lines[0]]
    for line_break, above, below in zip(LINE_BREAK.findall(text), lines, lines[1:]):
        yield
        if not above.strip() or not below.strip() or ITEM.match(below):
            parts += [line_break, below]
            continue
        last, first = parts[-1].rstrip(), below.lstrip()
        divided = last[-2:-1].isalpha() and last.endswith("-") and first[0].isalpha()
        wide = WIDE.match(last[-1:]) and WIDE.match(first)
        parts[-1] = last.removesuffix("\xad")
        parts += ["" if divided or wide or last.endswith("\xad") else " ", first]
    return "".join(parts)


def join(segments: list[Segment], translations: list[str]) -> str:
    """The text of `segments` with a translation for each that has text, in order.

    Line breaks are exactly those of the original; within a translation they become spaces. Other
    white space stays between two sentences of a line, and goes at both ends of a line, as it does
    when a line is translated by itself. Sentences that nothing separated get a space between them,
    except after a translation that ends as Chinese and Japanese sentences do.

    Raises:
        ValueError: not as many translations as segments with text.
    """
    count = sum(bool(s.text) for s in segments)
    if len(translations) != count:
        raise ValueError(f"translations: got {len(translations)}; allowed: {count}, one a sentence")
    remaining, joining = iter(translations), Joining()
    return "".join(joining.add(one, next(remaining) if one.text else "") for one in segments)


class Joining:
    """Joins a text from its beginning on, one segment after the other; see `join`."""

    def __init__(self) -> None:
        self.space = ""  # due before the next translation on this line
        self.returned = False  # whether the text so far ends with "\r"

    def told(self, translation: str) -> str:
        """What a translation adds to the text so far, without what comes after it."""
        translation = LINE_BREAK.sub(" ", translation).strip()
        return f"{self.space}{translation}" if translation else ""

    def add(self, segment: Segment, translation: str) -> str:
        """What the next segment adds to the text so far, with a translation if it has text."""
        told = self.told(translation)
        if told:
            unspaced = told.rstrip(CLOSING).endswith(UNSPACED)
            self.space = segment.gap or ("" if unspaced else " ")
            self.returned = False
        breaks = line_breaks(segment.gap)
        if breaks:
            if self.returned and breaks[0] == "\n":
                told += " "  # or the two would become one
            self.space, self.returned = "", breaks[-1] == "\r"
        return told + breaks


def line_breaks(gap: str) -> str:
    """The line breaks of white space, and nothing else of it."""
    if not LINE_BREAK.search(gap):
        return ""
    return BESIDE.sub(lambda found: "" if found[1] else " ", gap)


def may_end_sentence(found: re.Match[str]) -> bool:
    """Whether nothing here speaks against it that a match of `END`, followed by more of its line,
    ends a sentence."""
    text, marks, closing, gap = found.string, found["marks"], found["closing"], found["gap"]
    if marks is None:
        return False
    before = text[max(found.start() - 2, 0) : found.start()]
    if before.endswith(tuple("([{（［【")) or (not marks.strip(".．…") and OMISSION.search(before)):
        return False
    quoted = any(c in QUOTES + GERMAN for c in closing)
    if marks in PERIODS and not quoted and is_shortened(word_before(text, found.start())):
        return False
    following = text[found.end()]
    if marks[-1] in "！？" and following in QUOTING:
        return False
    if marks[-1] in STOPS:
        if closing and not gap:  # 「はい。」と言った
            return following in OPENING
        return following in OPENING or unicodedata.category(following)[0] in "LNS"
    first = BEGIN.match(text, found.end())
    return bool(gap and first and first[1].isalpha() and not first[1].islower())


def is_shortened(word: str) -> bool:
    """Whether a period after `word` is likelier part of it than the end of a sentence.

    Args:
        word: see `word_before`.
    """
    *parts, last = word.split(".")
    if parts and len(parts[-1]) <= 2 and not parts[-1].isdecimal():
        return True  # "F.eks. Oslo", "t.o.v. Amsterdam"
    if last.isdecimal():
        return len(last) <= 2  # "am 5. Mai"; years end sentences
    if len(last) == 1:
        return last < "\u2e80"  # initials; ideographs and Korean syllables can be words
    if last and set(last) <= set("IVX"):
        return True
    if "\u0e00" <= last[-1:] <= "\u0eff":  # Thai and Lao have periods in abbreviations only
        return True
    last = re.split(rf"[{JOINING}\d]", last)[-1]  # "l'Av. Foch", "3FEB."
    forms = {last, last.lower(), last.capitalize() if last.isupper() else last}
    return not forms.isdisjoint(ABBREVIATIONS) or is_clipped(last)


def is_clipped(word: str) -> bool:
    """Whether `word` is a word without its end, by its letters: "bd.", "Bkz.", "млн.", "Marktstr."

    Words in capitals, which may be spelt, need to be of two letters: "TP."
    """
    if word.endswith("str"):
        return True
    if not 2 <= len(word) <= (2 if word.isupper() else VOWELLESS):
        return False
    letters = unicodedata.normalize("NFD", word.lower())
    return letters[0] in CONSONANTS and VOWELS.isdisjoint(letters)


def word_before(text: str, end: int) -> str:
    """The letters, digits, accents and single periods just before `end`; "doesn't", "2:30" whole.

    Of a longer word, the last `LONGEST` characters.
    """
    start = end
    while start > max(end - LONGEST, 0):
        c, previous = text[start - 1], text[max(start - 2, 0) : start - 1]
        inside = c.isalnum() or unicodedata.category(c)[0] == "M"
        if not inside and not (c in INSIDE and start < end and previous.isalnum()):
            break
        start -= 1
    return unicodedata.normalize("NFC", text[start:end])
