"""Bearer tokens: which are valid, when the folder is looked at, and what no header can do."""

import hmac
import os

import pytest
from echo_service import ask, error, service, texts

from handler import authorization
from handler.authorization import INTERVAL, VARIABLE, Client, Terms, Tokens
from handler.request import Refusal
from handler.service import Incoming

OLD, NEW = "old-token-" + "0" * 16, "new-token-" + "1" * 16


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "old").write_text(OLD + "\n")
    return tokens


def bearer(token):
    return [f"Bearer {token}"]


def mounted(folder, generation, **tokens):
    """Files as Kubernetes mounts a Secret, and as it replaces them: all in the same moment."""
    data = folder / f"..generation_{generation}"
    data.mkdir()
    for name, token in tokens.items():
        (data / name).write_text(token)
    (folder / "..data_tmp").symlink_to(data.name)
    former = (folder / "..data").resolve() if (folder / "..data").exists() else None
    os.rename(folder / "..data_tmp", folder / "..data")
    for name in tokens:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    yield  # links of files that are gone still stand
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.name not in tokens:
            path.unlink()
    if former is not None:
        for path in former.iterdir():
            path.unlink()
        former.rmdir()


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_token_is_the_content_of_a_file_without_its_line_break(folder, end):
    (folder / "old").write_bytes((OLD + end).encode())
    tokens = Tokens(folder)
    assert tokens.admit(bearer(OLD))
    assert not tokens.admit(bearer(NEW))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_may_be_written_in_any_case(folder, scheme):
    assert Tokens(folder).admit([f"{scheme} {OLD}"])


@pytest.mark.parametrize(
    "headers",
    [
        [], [""], ["Bearer"], ["Bearer "], [f"Basic {OLD}"], [OLD], [f"Bearer{OLD}"],
        [f"Bearer {OLD}x"], [f"Bearer {OLD[:-1]}"], [f"Bearer {OLD} {OLD}"],
        [f"Bearer {OLD.upper()}"], [f"Bearer {OLD}", f"Bearer {OLD}"], [f"Bearer {OLD}", ""],
        [f"Bearer {OLD},Bearer {OLD}"], ["Bearer " + "ä" * 20], ["Bearer \ud800" + OLD],
        [f"Bearer\t{OLD}"], [f"Bearer {OLD}\n\n"[:-1] + "x"], ["Bearer " + "x" * 100_000],
    ],
)
def test_whatever_is_not_one_valid_token_is_refused(folder, headers):
    assert not Tokens(folder).admit(headers)


def test_every_token_is_compared_whichever_is_right(folder, monkeypatch):
    for i in range(5):
        (folder / f"more{i}").write_text(f"{i}" * 20)
    tokens = Tokens(folder)
    seen = []
    real = hmac.compare_digest

    def compare(a, b):
        seen.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(authorization.hmac, "compare_digest", compare)
    for headers in (bearer("0" * 20), bearer(OLD), bearer("short"), [f"Basic {OLD}"], []):
        seen.clear()
        tokens.admit(headers)
        assert seen == [(32, 32)] * 6


# The folder


def test_without_the_variable_there_is_nothing_to_show(tmp_path):
    assert Tokens.named({}) is None


@pytest.mark.parametrize("name", ["", "missing", "empty", "hidden", "file"])
def test_a_variable_that_leads_to_no_token_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "looks-like-a-token").write_text(OLD)
    (tmp_path / "file").write_text(OLD)
    for made in ("empty", "hidden"):
        (tmp_path / made).mkdir()
    (tmp_path / "hidden" / ".token").write_text(OLD)
    with pytest.raises(ValueError, match=f"^{VARIABLE}: got '.*{name}'; allowed: a folder"):
        Tokens.named({VARIABLE: str(tmp_path / name) if name else ""})


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"a" * 15, b"a" * 15 + b"\n", b"aaa b" * 9, b"\xff" * 20, "ä".encode() * 9],
)
def test_a_file_that_is_no_token_is_named_but_not_told(folder, content):
    (folder / "old").unlink()
    (folder / "bad").write_bytes(content)
    message = rf"^{VARIABLE}: got .* \({VARIABLE}: bad has \d+ characters; allowed"
    with pytest.raises(ValueError, match=message) as caught:
        Tokens(folder)
    assert "aaa" not in str(caught.value)


def test_a_file_that_is_no_token_costs_the_others_nothing_at_the_start(folder, caplog):
    (folder / "bad").write_text("a typo")
    tokens = Tokens(folder)
    assert tokens.admit(bearer(OLD))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith(f"a token is left out: {VARIABLE}: bad has 6 characters")


def test_a_relative_folder_is_told_as_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{VARIABLE}: got '{tmp_path}/tokens'; allowed"):
        Tokens.named({VARIABLE: "tokens"})


def test_a_token_is_replaced_without_a_restart(folder, clock):
    tokens = Tokens(folder, clock)
    (folder / "new").write_text(NEW)
    assert not tokens.admit(bearer(NEW))  # looked at a moment ago
    clock.now += INTERVAL
    assert tokens.admit(bearer(NEW))
    assert tokens.admit(bearer(OLD))
    (folder / "old").unlink()
    clock.now += INTERVAL
    assert tokens.admit(bearer(NEW))
    assert not tokens.admit(bearer(OLD))


def test_a_file_that_is_written_again_is_another_token(folder, clock):
    tokens = Tokens(folder, clock)
    (folder / "old").write_text("x" * len(OLD) + "\n")
    clock.now += INTERVAL
    assert tokens.admit(bearer("x" * len(OLD)))
    assert not tokens.admit(bearer(OLD))


def test_a_secret_is_replaced_all_at_once(tmp_path, clock):
    list(mounted(tmp_path, 1, old=OLD))
    tokens = Tokens(tmp_path, clock)
    assert tokens.admit(bearer(OLD))
    list(mounted(tmp_path, 2, old=OLD, new=NEW))
    clock.now += INTERVAL
    assert tokens.admit(bearer(OLD))
    assert tokens.admit(bearer(NEW))
    for _ in mounted(tmp_path, 3, new=NEW):
        clock.now += INTERVAL  # while the link to the old one leads nowhere
        assert not tokens.admit(bearer(OLD))
        assert tokens.admit(bearer(NEW))
    clock.now += INTERVAL
    assert not tokens.admit(bearer(OLD))
    assert tokens.admit(bearer(NEW))


def test_where_all_tokens_are_gone_nobody_is_admitted(folder, clock, tmp_path):
    tokens = Tokens(folder, clock)
    folder.rename(tmp_path / "elsewhere")
    clock.now += INTERVAL
    assert not tokens.admit(bearer(OLD))
    assert not tokens.admit([])
    (tmp_path / "elsewhere").rename(folder)
    clock.now += INTERVAL
    assert tokens.admit(bearer(OLD))


def test_a_bad_file_later_hinders_no_other_change(folder, clock, caplog):
    tokens = Tokens(folder, clock)
    (folder / "bad").write_text("short")
    (folder / "new").write_text(NEW)
    (folder / "old").unlink()
    clock.now += INTERVAL
    assert tokens.admit(bearer(NEW))
    assert not tokens.admit(bearer("short"))
    assert not tokens.admit(bearer(OLD))
    assert "bad has 5 characters" in caplog.text
    assert NEW not in caplog.text


def test_the_folder_is_looked_at_once_in_an_interval(folder, clock, monkeypatch):
    tokens = Tokens(folder, clock)
    looks = []
    real = os.listdir
    monkeypatch.setattr(authorization.os, "listdir", lambda path: looks.append(path) or real(path))
    for _ in range(64):
        clock.now += INTERVAL / 32
        assert tokens.admit(bearer(OLD))
    assert len(looks) == 2


def test_no_token_is_told(folder):
    tokens = Tokens(folder)
    assert OLD not in repr(vars(tokens))


# What a file says beside the token


@pytest.mark.parametrize(
    ("lines", "terms"),
    [
        ("", Terms()),
        ("share: 2", Terms(share=2.0)),
        ("share: 0.5\nmost_waiting: 1000\n", Terms(0.5, 1000)),
        ("\r\nmost_waiting :  7 \r\n\r\n  share:1e1\r\n", Terms(10.0, 7)),
        ("most_waiting: null", Terms()),
    ],
)
def test_lines_after_the_token_say_what_its_client_may_have(folder, lines, terms):
    (folder / "new").write_bytes(f"{NEW}\n{lines}".encode())
    tokens = Tokens(folder)
    assert tokens.admit(bearer(NEW)) == Client("new", terms)
    assert tokens.admit(bearer(OLD)) == Client("old", Terms())
    assert tokens.admit(bearer(f"{NEW}\n{lines}")) is None or not lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("share: 0", "new.share: got 0; allowed: a number from 0.01 to 100.0"),
        ("share: 101", "new.share: got 101; allowed: a number from 0.01 to 100.0"),
        ("share: two", "new.share: got 'two'; allowed: a number from 0.01 to 100.0"),
        ("share: NaN", "new.share: got nan; allowed: a number from 0.01 to 100.0"),
        ("share:", "new.share: got ''; allowed: a number from 0.01 to 100.0"),
        ("share: " + "[" * 10**5, "(100000 characters); allowed: a number from 0.01 to 100.0"),
        ("share: true", "new.share: got true; allowed: a number from 0.01 to 100.0"),
        ("most_waiting: 0", "new.most_waiting: got 0; allowed: an integer of at least 1 or null"),
        ("most_waiting: 1.5", "new.most_waiting: got 1.5; allowed: an integer of at least 1"),
        ("shares: 2", "new.shares: unknown option; did you mean 'share'? allowed: share, most_wa"),
        ("share: 2\nshare: 3", "new: line 3 has 8 characters; allowed: lines 'share: NUMBER' and"),
        (OLD, f"new: line 2 has {len(OLD)} characters; allowed: lines 'share: NUMBER' and"),
    ],
)
def test_a_bad_line_is_named_with_its_file_its_value_and_what_is_allowed(
    folder, clock, caplog, lines, message
):
    tokens = Tokens(folder, clock)
    (folder / "new").write_text(f"{NEW}\n{lines}\n")
    clock.now += INTERVAL
    assert tokens.admit(bearer(OLD))  # as before
    assert not tokens.admit(bearer(NEW))
    (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
    told = record.getMessage()
    assert told.startswith(f"a token is left out: {VARIABLE}: ")
    assert message in told
    assert len(told) < 300
    assert NEW not in caplog.text
    assert OLD not in caplog.text


def test_terms_may_change_while_the_service_runs(folder, clock):
    tokens = Tokens(folder, clock)
    for words, terms in (("share: 3", Terms(3.0)), ("", Terms()), ("most_waiting: 5", Terms(1, 5))):
        (folder / "old").write_text(f"{OLD}\n{words}\n")
        clock.now += INTERVAL
        assert tokens.admit(bearer(OLD)) == Client("old", terms)


def test_a_secret_s_keys_may_have_terms(tmp_path, clock):
    list(mounted(tmp_path, 1, old=f"{OLD}\nshare: 2\n"))
    tokens = Tokens(tmp_path, clock)
    assert tokens.admit(bearer(OLD)) == Client("old", Terms(2.0))


def test_a_folder_that_cannot_be_read_for_a_moment_changes_nothing(folder, clock, monkeypatch):
    """Whoever asks then is told of an error; the next look is an interval later."""
    tokens = Tokens(folder, clock)
    (folder / "new").write_text(NEW)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "read", lambda *_, **__: 1 // 0)
        clock.now += INTERVAL
        with pytest.raises(ZeroDivisionError):
            tokens.admit(bearer(OLD))
        assert tokens.admit(bearer(OLD))
    clock.now += INTERVAL
    assert tokens.admit(bearer(NEW))


# In the service


def test_a_refused_client_is_told_so_before_anything_is_read():
    one = service()
    refusal = Refusal(401, "Unauthorized", "no")
    for refused in (
        Incoming("1", "card", refusal=refusal), Incoming("1", body=b"{", refusal=refusal),
        Incoming("1", explain=True, refusal=refusal),
    ):
        (reply,) = one.round([refused])
        assert error(reply) == (401, "Unauthorized")
        assert not one.pending
    assert texts(one.round([ask(2, "a", 1)])[0]) == ["a"]
