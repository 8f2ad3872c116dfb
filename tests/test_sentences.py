"""Paragraphs to sentences and back: cases a person can check, and laws for any text."""

import re
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handler.extras import MissingPackage
from handler.pieces import at_once
from handler.sentences import LINE_BREAK, Segment, Splitter, join, source_language, unwrapped
from training.dates import DatesOptions, all_days, spellings, surfaces, write_corpus

SPLIT = {
    # English
    "Hello there. How are you? Fine!": ["Hello there.", "How are you?", "Fine!"],
    "Really?! Yes... No‽ Good.": ["Really?!", "Yes...", "No‽", "Good."],
    'He said "No." Then he left.': ['He said "No."', "Then he left."],
    "He said “No.” “Why?” she asked.": ["He said “No.”", "“Why?” she asked."],
    "He said 'Go'. Then he left.": ["He said 'Go'.", "Then he left."],
    "(I was there.) She was not.": ["(I was there.)", "She was not."],
    "It was 1999. Then came 2000. We left.": ["It was 1999.", "Then came 2000.", "We left."],
    "The train leaves at 2:30. We run.": ["The train leaves at 2:30.", "We run."],
    "He sat. The sun. It burns.": ["He sat.", "The sun.", "It burns."],
    "She doesn't. I do.": ["She doesn't.", "I do."],
    "See https://a.example/b.c?d=Ef. Then pay 3.50 now.": [
        "See https://a.example/b.c?d=Ef.", "Then pay 3.50 now.",
    ],
    "I use Yahoo! She does not.": ["I use Yahoo!", "She does not."],
    "One.  Two.\u3000Three.": ["One.", "Two.", "Three."],
    # German
    "Am 5. Mai kam Dr. Weiß. Er blieb.": ["Am 5. Mai kam Dr. Weiß.", "Er blieb."],
    "„Ich gehe.“ Er ging. »Nein«, rief sie.": ["„Ich gehe.“", "Er ging.", "»Nein«, rief sie."],
    "Er sagte „Nein“. Dann ging er.": ["Er sagte „Nein“.", "Dann ging er."],
    "»Wo bist du?« Ärger lag in der Luft.": ["»Wo bist du?«", "Ärger lag in der Luft."],
    # French, with and without its spaces inside quotes
    "Bonjour ! Ça va ? Très bien.": ["Bonjour !", "Ça va ?", "Très bien."],
    "Il dit : « Bonjour. » Elle rit. « Quoi ? » Rien.": [
        "Il dit : « Bonjour. »", "Elle rit.", "« Quoi ? »", "Rien.",
    ],
    # Spanish
    "Hola. ¿Qué tal? ¡Muy bien! Adiós.": ["Hola.", "¿Qué tal?", "¡Muy bien!", "Adiós."],
    "El Sr. López y la Sra. Gil viven en EE. UU. ¿Verdad?": [
        "El Sr. López y la Sra. Gil viven en EE. UU. ¿Verdad?",
    ],
    # Russian
    "Привет! Как дела? Хорошо. Ёлка горит.": ["Привет!", "Как дела?", "Хорошо.", "Ёлка горит."],
    "А. С. Пушкин жил на ул. Арбат. Это было давно.": [
        "А. С. Пушкин жил на ул. Арбат.", "Это было давно.",
    ],
    # Korean
    "안녕하세요. 어디예요? 저기! 네.": ["안녕하세요.", "어디예요?", "저기!", "네."],
    "여기는 내 집. 나는 잔다.": ["여기는 내 집.", "나는 잔다."],
    "2021. 5. 3. 월요일이다. 비가 온다.": ["2021. 5. 3. 월요일이다.", "비가 온다."],
    # Japanese
    "雨だ。3人いる。傘は？ない！！": ["雨だ。", "3人いる。", "傘は？", "ない！！"],
    "「はい。」と言った。「いいえ。」「なぜ？」": [
        "「はい。」と言った。", "「いいえ。」", "「なぜ？」",
    ],
    "ﾊｲ｡ｿｳﾃﾞｽ｡": ["ﾊｲ｡", "ｿｳﾃﾞｽ｡"],
    # Chinese
    "你好。你好吗？我很好！": ["你好。", "你好吗？", "我很好！"],
    "他说。“好。”“走吧！”她说。 再见……": ["他说。", "“好。”", "“走吧！”她说。", "再见……"],
    # Hindi
    "मैं घर जा रहा हूँ। तुम कहाँ हो? यहाँ है. ठीक।अच्छा॥": [
        "मैं घर जा रहा हूँ।", "तुम कहाँ हो?", "यहाँ है.", "ठीक।", "अच्छा॥",
    ],
    # Arabic and Urdu
    "مرحبا. كيف حالك؟ أنا بخير!": ["مرحبا.", "كيف حالك؟", "أنا بخير!"],
    "یہ گھر ہے۔وہ آیا۔ ٹھیک؟": ["یہ گھر ہے۔", "وہ آیا۔", "ٹھیک؟"],
    # Armenian, Amharic
    "Բարեւ։ Ինչպես ես։": ["Բարեւ։", "Ինչպես ես։"],
    "ሰላም።እንዴት ነህ፧ ደህና።": ["ሰላም።", "እንዴት ነህ፧", "ደህና።"],
}

WHOLE = [
    # The dates of the built-in demo, and more of their kind.
    "Nov.  19,  '81.", "'24.  6.  20.", "5. Mai 2021", "3rd of May, 2021", "Sunday1965-01-24",
    "2021. 5. 3.", "이천이십일년 오월 삼일", "Mon. Jan. 5, 2020", "May. 3rd. 2021",
    "MON. JAN. 5 21", "2FEB. NINETEEN EIGHTY.",
    "2021. 5. 3. (월)", "Sat. the 3rd of Sept. Twenty Twenty-One", "Am 24. 12. Weihnachten",
    # Initials and titles.
    "J. S. Bach", "The U.S. Army", "É. Zola", "E\u0301. Zola", "Mr. and Mrs. Smith vs. Dr. No",
    "George W. Bush", "Prof. Dr. med. Müller", "M. Dupont et Mme. Durand", "St. John's Ave. North",
    "D. José y la Dra. Ruiz", "डॉ. शर्मा", "د. محمد", "ดร. สมชาย", "Ludwig XIV. Der König",
    # Other abbreviations, ordinals, numbers.
    "z. B. Autos, z.B. Autos, d. h. Bücher, usw. Bzw. Hunde", "die 2. Sitzung", "etc. And more",
    "e.g. Apples, i.e. Pears, No. A5, Nr. B", "pages pp. 5 ff.", "Avenue de l'Av. Foch",
    "3.50 and 1.000.000", "a.b.C.D", "Version 2.0. 5 files", "In Abb. 3 und Abs. A",
    # What follows begins no sentence.
    "What? no. and so on", "Well... it is", "Wait… what", "I have ... John", "[...] Then he left",
    "He (?) Said", "One. — Two", "one. two. three", "He left. 3 men stayed",
    # No white space, so no end.
    "www.Example.Com/A.B?C=D!E", "node.JS", "你好!我是", "Really?Yes",
    "！！！", "...", "。", "?! !? ?!", ". . . A",
]  # fmt: skip

# Single sentences, most with an abbreviation before a capital letter.
SINGLE = [
    ("nl", "De firma bijv. Philips doet dat."),
    ("nl", "Hij woont t.o.v. Amsterdam ver weg."),
    ("it", "Il dott. Verdi non risponde."),
    ("it", "L'ing. Ferri lo sa."),
    ("pt", "Falei com o Exmo. Senhor Dias."),
    ("pt", "O eng. Costa assinou."),
    ("es", "El Ing. Soto firmó."),
    ("es", "Gracias al Prof. Gil."),
    ("fr", "Le Dr. Petit est là."),
    ("fr", "Il habite bd. Voltaire."),
    ("fr", "Le gén. Martin parle."),
    ("de", "Er wohnt in der Haupstr. Sieben."),
    ("de", "Siehe Tab. Drei im Anhang."),
    ("de", "Er kam ugs. Bescheid zu sagen."),
    ("de", "Der Prof. Dr. med. Weber sprach."),
    ("en", "Beta Corp. North America leads."),
    ("en", "See Tab. Three for it."),
    ("en", "The Univ. Hospital is near."),
    ("en", "The Ltd. Company closed."),
    ("en", "Model No. Seven sold."),
    ("pl", "Mieszkam przy ul. Nowej od roku."),
    ("pl", "Firma im. Kopernika działa."),
    ("pl", "Patrz str. Piąta."),
    ("cs", "Města, např. Praha, jsou stará."),
    ("cs", "Byl to tzv. Velký pátek."),
    ("tr", "Bkz. Tablo dört."),
    ("tr", "Av. Demir aradı."),
    ("sv", "Se s. Tre."),
    ("no", "F.eks. Oslo er stor."),
    ("hu", "Pl. Budapest nagy."),
    ("ro", "Str. Mare este aici."),
    ("id", "Ia tinggal di Jl. Merdeka."),
    ("vi", "Ông ở TP. Hồ Chí Minh."),
    ("uk", "Це м. Київ."),
    ("ru", "См. Таблицу."),
    ("ru", "Т. е. Иван прав."),
    ("el", "Ο κ. Παππάς ήρθε."),
    ("hi", "डॉ. शर्मा आए।"),
    ("he", "ד. לוי בא."),
    ("ja", "彼は「はい。」と言った。"),
    ("zh", "Dr. 王来了。"),
    ("ja", "つのだ☆ひろ！と呼ぶ。"),
]  # fmt: skip

# Two sentences, though the first ends as some abbreviation of the language is written.
TWO = [
    ("en", "He saw me.", "The man."), ("en", "She is ill.", "It is art."),
    ("de", "Er mag mich.", "Ja."), ("it", "Lui va a casa.", "Lei resta."),
    ("nl", "Hij is thuis.", "Zij niet."),
    ("ru", "Он дома.", "Она тоже."), ("cs", "Je doma.", "Ona taky."),
    ("pl", "On spał.", "Ona nie."),
]  # fmt: skip

LINES = ["\n", "\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"]

any_text = st.text(st.characters(exclude_categories=()))  # control characters, lone surrogates
pieces = [
    *LINES, *" \t\u3000\xa0\u202f\x1c\x1e\u200b\ufeff", "A", "b", "Mr", "5", "2021", "है", "집",
    "好", "\u0301", "z.B", "Nr", "me", *".…!?。！？।۔", *"\"'“”«»„「」()[]（）",
    "¿", "—", ",", ":", "\ud800",
]  # fmt: skip
soup = st.lists(st.sampled_from(pieces), max_size=40).map("".join)
texts = any_text | soup
split = Splitter().split


def sentences(text: str) -> list[str]:
    return [s.text for s in split(text) if s.text]


def identity(text: str) -> str:
    return join(split(text), sentences(text))


@pytest.mark.parametrize("text", SPLIT)
def test_split_into_sentences(text: str) -> None:
    assert sentences(text) == SPLIT[text]


@pytest.mark.parametrize("text", WHOLE)
def test_not_split(text: str) -> None:
    assert split(text) == [Segment(text, "")]


@pytest.mark.parametrize(("language", "text"), SINGLE)
def test_a_sentence_of_its_language_stays_whole(language: str, text: str) -> None:
    assert Splitter(language).split(text) == [Segment(text, "")]


@pytest.mark.parametrize(("language", "first", "second"), TWO)
def test_an_ordinary_word_ends_a_sentence(language: str, first: str, second: str) -> None:
    assert Splitter(language).split(f"{first} {second}") == [
        Segment(first, " "), Segment(second, ""),
    ]


@pytest.mark.parametrize(
    ("code", "minded"),
    [
        ("de", "de"), ("DE", "de"), ("de-AT", "de"), ("de-LI", "de"), ("pt-BR", "pt"), ("cs", "sk"),
        ("zz", "en"), ("zh-Hant-TW", "en"), (None, "en"), ("", "en"),
    ],
)
def test_a_language_or_its_nearest_is_minded(code: str | None, minded: str) -> None:
    assert Splitter(code).name == f"sentencex 0.6.1, {minded}"


@pytest.mark.parametrize(
    ("card", "language"),
    [
        ('{"recipe": {"export": {"source_language": "de"}}}', "de"),
        ('{"recipe": {"export": {"source_language": null}}}', None),
        ('{"recipe": {"export": {}}}', None), ('{"name": "old"}', None), ("{}", None), ("", None),
    ],
)
def test_the_card_says_the_language(card: str, language: str | None) -> None:
    assert source_language(card) == language


def test_without_sentencex_what_it_need_not_be_asked_is_split(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    bare = Splitter("de")
    assert (bare.name, bare.missing) == (
        None,
        "needs sentencex 0.6.1, found none: build the archive again, or install seq2serve[serving]",
    )
    assert bare.split("Am 5. Mai\nkam er. ") == [
        Segment("Am 5. Mai", "\n"), Segment("kam er.", " "),
    ]
    with pytest.raises(MissingPackage, match="needs sentencex"):
        bare.split("Er kam. Sie ging.")


@pytest.mark.parametrize("version", ["0.6.0", "1.0.32"])
def test_another_version_is_as_good_as_none(version: str, monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert f"found {version}" in Splitter().missing


@pytest.mark.parametrize(
    ("wrapped", "whole"),
    [
        ("One two\nthree.\nFour.", "One two three. Four."),
        ("One  \n  two\r\n\r\nThree\nfour\n", "One two\r\n\r\nThree four\n"),
        ("a\n \nb\n\n\nc", "a\n \nb\n\n\nc"),
        ("a well-\nknown man", "a well-known man"),
        ("co\xad\noperate", "cooperate"),
        ("5 -\n3", "5 - 3"),
        ("今日は\n雨だ", "今日は雨だ"),
        ("나는\n잔다", "나는 잔다"),
        ("Buy:\n- eggs\n  and milk\n* tea\n1. salt\n(2) oil\nb) rice",
         "Buy:\n- eggs and milk\n* tea\n1. salt\n(2) oil\nb) rice"),
        ("> so he said\n> and went\n# Title\ntext", "> so he said\n> and went\n# Title text"),
        ("", ""), ("\n", "\n"), ("\na", "\na"),
    ],
)
def test_lines_of_a_paragraph_are_joined(wrapped: str, whole: str) -> None:
    assert at_once(unwrapped(wrapped)) == whole
    assert at_once(unwrapped(whole)) == whole


@given(texts)
def test_joining_lines_changes_nothing_but_space_and_hyphens(text: str) -> None:
    def bare(text: str) -> str:
        return "".join(c for c in text if not c.isspace() and c != "\xad")

    assert bare(at_once(unwrapped(text))) == bare(text)


def test_no_date_of_the_corpus_is_split(tmp_path) -> None:
    write_corpus(tmp_path, DatesOptions(seed=3, forms_per_date=1, held_out=2000))
    for path in tmp_path.glob("*.source"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert split(line) == [Segment(line, "")]


def test_no_form_of_a_date_is_split() -> None:
    for day in all_days()[::2402]:  # every month and weekday
        forms = {surface for form in spellings(day) for surface in surfaces(form)}
        assert len(forms) > 1000
        assert [form for form in forms if len(split(form)) != 1] == []


def test_segments_of_a_paragraph() -> None:
    assert split("  One.  Two!\r\n\n three\n\n") == [
        Segment("", "  "),
        Segment("One.", "  "),
        Segment("Two!", "\r\n\n "),
        Segment("three", "\n\n"),
    ]
    assert split("一。二。") == [Segment("一。", ""), Segment("二。", "")]
    assert split("") == []
    assert split(" \n") == [Segment("", " \n")]


@pytest.mark.parametrize("line_break", LINES)
def test_every_line_break_ends_a_sentence_and_is_kept(line_break: str) -> None:
    text = f"one{line_break}{line_break}two, Mr.{line_break}Smith"
    assert sentences(text) == ["one", "two, Mr.", "Smith"]
    assert join(split(text), ["1", "2", "3"]) == f"1{line_break}{line_break}2{line_break}3"


@pytest.mark.parametrize("separator", ["\x1c", "\x1d", "\x1e", "\x1f", "\t", "\u3000"])
def test_other_white_space_breaks_no_line(separator: str) -> None:
    assert sentences(f"one{separator}two") == [f"one{separator}two"]


@pytest.mark.parametrize(
    ("text", "translations", "joined"),
    [
        ("One.  Two.\tThree.", ["Eins.", "Zwei.", "Drei."], "Eins.  Zwei.\tDrei."),
        ("一。二。三", ["One.", "Two.", "three"], "One. Two. three"),
        ("一。二。三。", ["イ。", "「ロ！」", "ハ？"], "イ。「ロ！」ハ？"),
        ("One. Two.", ["一。", "二。"], "一。 二。"),
        ("  One. \r\n\r\n \tTwo.\n \n", ["Eins.", "Zwei."], "Eins.\r\n\r\nZwei.\n\n"),
        (" One. ", ["Eins."], "Eins."),
        ("One. Two. Three.\nFour.", ["", "Zwei.", "", ""], "Zwei.\n"),
        ("One.\nTwo.", [" Ei\nns.\n", "Zw\r\nei."], "Ei ns.\nZw ei."),
        ("One.\r \nTwo.", ["Eins.", "Zwei."], "Eins.\r \nZwei."),
        ("", [], ""),
        (" \n ", [], "\n"),
    ],
)
def test_join(text: str, translations: list[str], joined: str) -> None:
    assert join(split(text), translations) == joined


@pytest.mark.parametrize("translations", [[], ["1"], ["1", "2", "3"]])
def test_join_refuses_another_number_of_translations(translations: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"got {len(translations)}; allowed: 2"):
        join(split(" One.\n\nTwo."), translations)


@given(texts)
def test_segments_are_the_text(text: str) -> None:
    segments = split(text)
    assert "".join(s.text + s.gap for s in segments) == text
    for i, s in enumerate(segments):
        assert s.text == s.text.strip()
        assert not LINE_BREAK.search(s.text)
        assert not s.gap.strip()
        assert s.text or (i == 0 and s.gap)


@given(texts, st.sampled_from(["en", "de", "it", "my", "ja"]))
def test_a_sentence_is_not_split_again(text: str, language: str) -> None:
    split = Splitter(language).split
    segments = split(text)
    assert "".join(s.text + s.gap for s in segments) == text
    for one in segments:
        if one.text:
            assert split(one.text) == [Segment(one.text, "")]


@given(texts)
@example("A.\r \nB.")
def test_without_translating_only_the_documented_space_changes(text: str) -> None:
    def bare(text: str) -> str:
        return "".join(c for c in text if not c.isspace() or LINE_BREAK.match(c))

    joined = identity(text)
    assert bare(joined) == bare(text)
    if all(s.gap for s in split(text)[:-1]) and not re.search(r"\r[^\S\n]+\n", text):
        ends = LINE_BREAK.findall(text)
        lines = [line.strip() for line in LINE_BREAK.split(text)]
        assert joined == "".join(line + end for line, end in zip(lines, [*ends, ""]))
    assert identity(joined) == joined


@given(texts, st.data())
def test_line_breaks_are_those_of_the_original(text: str, data: st.DataObject) -> None:
    count = len(sentences(text))
    translations = data.draw(st.lists(texts, min_size=count, max_size=count))
    joined = join(split(text), translations)
    assert LINE_BREAK.findall(joined) == LINE_BREAK.findall(text)


HOSTILE = [
    ".", "…", "?", "。", '"', "'", "»", "«", "(", "“", " ", "\n", "\r", " \n", "\xa0»", "A",
    "\u0301", ". ", '." ', ".“", '. "', ". (", ".' '", ". »", "A. ", "A.A", "।॥", "。」", "。「",
    ".\u202f»", "A\u0301.", "' . ", "((. ", ".)] A", "':'",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
def test_linear_time(pattern: str) -> None:
    text = "A." + pattern * (200_000 // len(pattern)) + ". A"
    began = time.perf_counter()
    segments = split(text)
    assert "".join(s.text + s.gap for s in segments) == text
    join(segments, [s.text for s in segments if s.text])
    at_once(unwrapped(text))
    assert time.perf_counter() - began < 30  # quadratic time would be hours
