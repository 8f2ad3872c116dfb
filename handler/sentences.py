"""Paragraphs to sentences, and their translations back to paragraphs.

Where a rule is in doubt the text stays whole: a model reads two sentences at once without much
harm, half a sentence is lost. The rules are in the spirit of Unicode's sentence boundaries (UAX
29), with lists of what is no end: abbreviations, initials, ordinals.
"""
# ruff: noqa: SIM905 - the abbreviations would be a hundred lines of one word each.

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
BLANKS = "[^\\S\n\r\v\f\x85\u2028\u2029]+"
# White space beside line breaks, but for that within "\r \n", which are two.
BESIDE = re.compile(rf"(?<=\r){BLANKS}(?=\n)|({BLANKS})")

MARKS = ".．…!?‽‼⁇⁈⁉"  # end a sentence before white space and a letter that is not lower case
# End a sentence whatever follows: Chinese and Japanese, Arabic and Urdu, Devanagari, Armenian,
# Ethiopic, Khmer, Burmese.
STOPS = "。！？｡؟۔।॥։።፧៕។။"
UNSPACED = ("。", "！", "？", "｡")
PERIODS = (".", "．", "۔")  # also written after abbreviations and ordinals

QUOTES = "\"'”’»›」』｣"
CLOSING = QUOTES + ")]}）］】〕〉》"
GERMAN = "“‘«‹"  # closing in German, opening elsewhere; after a Chinese stop always opening
OPENING = "\"'“‘„‚«‹»›([{¿¡「『｢（［【〔〈《"
NARROW = " \xa0\u202f"  # the space inside French quotes

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

# Only what an upper-case letter may follow, as nothing is split before others. In lower case: in
# any case. Capitalised: so, or all in capitals, for "He sat. Then" ends a sentence. One letter
# ("z. B.", "U.S.", "M. Dupont") needs no entry. Several can end a sentence: it is not split then.
ABBREVIATIONS = frozenset(
    # English: titles, names, references, calendar
    "Mr Mrs Ms Mx Messrs Dr Drs Prof Rev Hon Pres Gov Sen Rep Gen Col Maj Capt Lt Sgt Cpl Adm Supt "
    "St Mt Ft Jr Sr Esq Inc Ltd Co Corp Bros Dept Ave Blvd Rd No Nos Vol Fig Figs Ch Sec Eq Ed "
    "Ph vs etc cf al approx incl excl viz ibid pp eds "
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec "
    "Mon Tue Tues Wed Thu Thur Thurs Fri Sat Sun "
    # German
    "Hr Hrn Fr Frl Nr Nrn Str Tel Abb Abs Abt Anm Art Aufl Bd Bsp Hrsg Jh Jhd Kap Std Dipl Ing "
    "bzw ca usw usf evtl ggf inkl exkl einschl insb zzgl vgl sog bspw bes allg ehem geb gest "
    "max min mio mrd tsd med dent phil jur rer nat habil dt engl frz lat "
    "Jän Mär Okt Dez Mo Di Mi Do Sa So "
    # French and Spanish
    "Mme Mmes Mlle Mlles MM Mgr Ste éd env ex chap "
    "Sra Sras Sres Srta Dra Ud Uds Vd Vds Lic Arq Avda Av Gral Sto Sta pág págs núm Cía EE UU "
    # Russian, Hindi
    "гг ул им тыс млн млрд руб др стр рис обл проф акад डॉ प्रो पं".split()
)
JOINING = "'’:"  # inside a word or a time of day
LONGEST = 12  # characters looked at before a period: more than any abbreviation has


@dataclass(frozen=True)
class Segment:
    """A sentence without white space around it, and the white space up to the next one.

    text: empty only in the first segment of a text that begins with white space.
    gap: empty after the last sentence, and between two that nothing separates: "一。二。".
    """

    text: str
    gap: str


def split(text: str) -> list[Segment]:
    """The sentences of `text`; see `segments_of`."""
    return list(segments_of(text))


def segments_of(text: str) -> Iterator[Segment]:
    """The sentences of `text`; a line break always ends one. The time is linear in its length.

    Laws, for any text at all:
        "".join(s.text + s.gap for s in split(text)) == text
        no s.text begins or ends with white space, or has a line break in it
        split(s.text) == [Segment(s.text, "")] where s.text is not empty
    """
    start = 0
    for found in END.finditer(text):
        gap_start, end = found.start("gap" if found["marks"] else "space"), found.end()
        outermost = gap_start == 0 or end == len(text)
        if outermost or LINE_BREAK.search(text, gap_start, end) or ends_sentence(found):
            yield Segment(text[start:gap_start], text[gap_start:end])
            start = end
    if start < len(text):
        yield Segment(text[start:], "")


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


def ends_sentence(found: re.Match[str]) -> bool:
    """Whether a match of `END`, followed by more of its line, ends a sentence."""
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
    if marks[-1] in STOPS:
        if closing and not gap:  # 「はい。」と言った
            return following in OPENING
        return following in OPENING or unicodedata.category(following)[0] in "LNS"
    first = BEGIN.match(text, found.end())
    return bool(gap and first and first[1].isalpha() and not first[1].islower())


def is_shortened(word: str) -> bool:
    """Whether a period after `word` is likelier part of it than the end of a sentence."""
    if word.isdecimal():
        return len(word) <= 2  # "am 5. Mai"; years end sentences
    if len(word) == 1:
        return word < "\u2e80"  # initials; ideographs and Korean syllables can be words
    if word and set(word) <= set("IVX"):
        return True
    if "\u0e00" <= word[-1:] <= "\u0eff":  # Thai and Lao have periods in abbreviations only
        return True
    last = re.split(rf"[{JOINING}\d]", word)[-1]  # "l'Av. Foch", "3FEB."
    forms = {last, last.lower(), last.capitalize() if last.isupper() else last}
    return not forms.isdisjoint(ABBREVIATIONS)


def word_before(text: str, end: int) -> str:
    """The letters, digits and accents just before `end`, "doesn't" and "2:30" whole.

    Of a longer word, the last `LONGEST` characters.
    """
    start = end
    while start > max(end - LONGEST, 0):
        c, previous = text[start - 1], text[max(start - 2, 0) : start - 1]
        inside = c.isalnum() or unicodedata.category(c)[0] == "M"
        if not inside and not (c in JOINING and start < end and previous.isalnum()):
            break
        start -= 1
    return unicodedata.normalize("NFC", text[start:end])
