"""Foreign text: what a person is shown, and what a VMM's command line gets."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.text import Text

from vmactor.errors import IllegalArgumentError
from vmactor.text import check_vm_name, crosvm_argument, crosvm_value, escape, escape_bytes, qemu_value

HOSTILE = st.text(
    st.sampled_from("\\[]/ab:\x1b\n\x00\u202e\u0301\ud800\udcff…é\u200b") | st.characters(), max_size=60
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, with: punctuation! <&> ~", "plain text, with: punctuation! <&> ~"),
        ("größer 日本語 😀 עברית", "größer 日本語 😀 עברית"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\0\x07\x08\x7f", r"\x00\x07\x08\x7f"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b\[31mred\x1b]0;title\x07"),
        ("\x85\x9b31m", r"\u{85}\u{9b}31m"),
        ("a\u202egnp.exe\u2066\u200f\u061c", r"a\u{202e}gnp.exe\u{2066}\u{200f}\u{61c}"),
        ("a\u200bb\u200d\ufeff\u00ad\u2060", r"a\u{200b}b\u{200d}\u{feff}\u{ad}\u{2060}"),
        ("\u2028\u2029\u00a0\u3000", r"\u{2028}\u{2029}\u{a0}\u{3000}"),
        ("\u115f\u3164\u2800a\ufe0f\U000e0100", r"\u{115f}\u{3164}\u{2800}a\u{fe0f}\u{e0100}"),
        ("\ue000\U0010fffd\u0378\U000e0041", r"\u{e000}\u{10fffd}\u{378}\u{e0041}"),
        ("\ud800 \udfff", r"\u{d800} \u{dfff}"),
        ("caf\udce9", r"caf\xe9"),
        ("\\", r"\\"),
        (r"\n", r"\\n"),
        (r"\x1b", r"\\x1b"),
        ("[bold]x[/]", r"\[bold]x\[/]"),
        (r"\[bold]", r"\\\[bold]"),
        ("e\u0301", "e\u0301"),
        ("\u0301e", r"\u{301}e"),
        ("\n\u0301e", r"\n\u{301}e"),
        ("e" + "\u0301" * 6, "e" + "\u0301" * 4 + r"\u{301}" * 2),
        ("", ""),
    ],
)
def test_foreign_text_is_shown_as_one_unambiguous_line(text: str, shown: str) -> None:
    assert escape(text) == shown


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("abcd", 4, "abcd"),
        ("abcde", 4, "abc…"),
        ("a\nb", 4, r"a\nb"),
        ("a\nbc", 4, r"a\n…"),
        ("ab\n\n", 5, r"ab\n…"),
        ("abc\n\n", 5, "abc…"),
        ("\u202e", 7, "…"),
        ("ab", 1, "…"),
        ("a", 1, "a"),
    ],
)
def test_text_over_the_limit_ends_in_an_ellipsis_and_no_escape_is_cut(
    text: str, limit: int, shown: str
) -> None:
    assert escape(text, limit=limit) == shown
    assert escape_bytes(text.encode(), limit=limit) == shown


def test_the_default_limit_holds_for_endless_text() -> None:
    assert escape("a" * 2**20) == "a" * 1023 + "…"
    assert escape_bytes(b"\xff" * 2**20) == r"\xff" * 255 + "…"
    assert escape_bytes("😀".encode() * 2**18) == "😀" * 1023 + "…"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"[    0.1] Linux\r\n", r"\[    0.1] Linux\r\n"),
        ("größer".encode(), "größer"),
        (b"\xff\xc3", r"\xff\xc3"),
        (b"\xc2\x9b", r"\u{9b}"),  # valid UTF-8 of a C1 control, not to be taken for the byte 9b
        (b"\x9b", r"\x9b"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),  # a surrogate is not UTF-8
        (b"\xf0\x9f\x98", r"\xf0\x9f\x98"),
    ],
)
def test_bytes_are_shown_as_text_where_they_are_and_as_bytes_where_not(data: bytes, shown: str) -> None:
    assert escape_bytes(data) == shown


def unescape(shown: str) -> str:
    """The inverse of ``escape``, to show that there is one."""

    def original(found: re.Match[str]) -> str:
        byte, code, single = found.groups()
        if byte:
            return chr(number if (number := int(byte, 16)) < 0x80 else 0xDC00 + number)
        return chr(int(code, 16)) if code else {"n": "\n", "r": "\r", "t": "\t"}.get(single, single)

    return re.sub(r"\\(?:x(..)|u\{([0-9a-f]+)\}|(.))", original, shown)


@given(HOSTILE)
def test_the_original_can_be_read_back(text: str) -> None:
    assert unescape(escape(text, limit=10**6)) == text


@given(st.binary(max_size=80))
def test_the_original_bytes_can_be_read_back(data: bytes) -> None:
    assert unescape(escape_bytes(data)).encode(errors="surrogateescape") == data


@given(HOSTILE, st.integers(1, 80))
def test_nothing_but_printable_visible_characters_comes_out(text: str, limit: int) -> None:
    shown = escape(text, limit=limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    assert not any(unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} for char in shown)
    shown.encode()


@given(HOSTILE, HOSTILE)
@example("x\\", "y")
@example("[bold", "]")
@example("[", "link=file:///]")
def test_rich_markup_sees_no_tag_in_escaped_text(first: str, second: str) -> None:
    first, second = escape(first), escape(second)
    rendered = Text.from_markup(f"{first}[bold]{second}[/bold]", emoji=False)
    spans = [(span.start, span.end, span.style) for span in rendered.spans]
    # The one tag is ours, and it begins and ends where we put it.
    before = len(Text.from_markup(f"{first}[bold][/bold]", emoji=False))
    assert spans == [(before, len(rendered), "bold")]


def test_rich_text_objects_show_escaped_text_as_it_is() -> None:
    assert Text(escape("[red]\x1b")).plain == r"\[red]\x1b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/images/disk.raw", "/images/disk.raw"),
        ("a,b", "a,,b"),
        (",", ",,"),
        ("x,if=none,file=/etc/shadow", "x,,if=none,,file=/etc/shadow"),
        ("a=b c'd\"e\\f", "a=b c'd\"e\\f"),
        ("-dash", "-dash"),
        ("", ""),
        ("caf\udce9", "caf\udce9"),
        ("größer", "größer"),
    ],
)
def test_a_qemu_value_has_its_commas_doubled(text: str, value: str) -> None:
    assert qemu_value(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/images/disk.raw", "/images/disk.raw"),
        ("a=b", "a=b"),
        ("a b", "a b"),
        ("-x", "-x"),
        ("a,b", '"a,b"'),
        ("a,ro=false", '"a,ro=false"'),
        ("a[0]", '"a[0]"'),
        ("]", '"]"'),
        ("it's", '"it\'s"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", r'"back\\slash"'),
        ('\\"', r'"\\\""'),
        ("", '""'),
        ("größer", "größer"),
    ],
)
def test_a_crosvm_value_is_quoted_where_it_must_be(text: str, value: str) -> None:
    assert crosvm_value(text) == value


@pytest.mark.parametrize("text", ["root=/dev/vda", "panic=-1", "-", "-x", "", "x -y=1", "/proc/self/fd/7"])
def test_a_crosvm_argument_is_passed_as_it_is_where_crosvm_leaves_it_so(text: str) -> None:
    assert crosvm_argument(text) == text


@pytest.mark.parametrize("text", ["-x=1", "--root=/dev/vda", "-=", "- a=b", "-h"])
def test_a_crosvm_argument_that_crosvm_would_rewrite_is_refused(text: str) -> None:
    with pytest.raises(IllegalArgumentError, match="begins with a dash"):
        crosvm_argument(text)


@pytest.mark.parametrize("quote", [qemu_value, crosvm_value, crosvm_argument])
@pytest.mark.parametrize(
    ("text", "what"),
    [("a\0b", "NUL"), ("a\nb", "line break"), ("a\rb", "line break"), ("\ud800", "lone surrogate")],
)
def test_text_that_no_argument_can_hold_is_refused(quote: type[str], text: str, what: str) -> None:
    with pytest.raises(IllegalArgumentError, match=what):
        quote(text)


def split_like_qemu(argument: str) -> list[tuple[str, str]]:
    """QEMU's rule: a doubled comma is a comma, a single one ends the value."""
    fields = [part.replace("\0", ",") for part in argument.replace(",,", "\0").split(",")]
    return [(key, value) for key, _, value in (field.partition("=") for field in fields)]


@given(st.lists(st.text(st.sampled_from(",,=ab-\"'\\[]"), max_size=8), min_size=1, max_size=4))
def test_qemu_reads_back_what_was_quoted(values: list[str]) -> None:
    argument = ",".join(f"k{i}={qemu_value(value)}" for i, value in enumerate(values))
    assert split_like_qemu(argument) == [(f"k{i}", value) for i, value in enumerate(values)]


def split_like_crosvm(argument: str) -> list[tuple[str, str]]:
    """crosvm's rule: unquoted up to a comma or bracket, or quoted; then a comma or the end."""
    pairs, at = [], 0
    pattern = re.compile(r"""([a-z0-9]+)=(?:"((?:[^"\\]|\\["\\])*)"|'([^']*)'|([^],["']+))(?:,|\Z)""")
    while at < len(argument):
        found = pattern.match(argument, at)
        assert found, f"crosvm would refuse {argument!r}"
        key, double, single, plain = found.groups()
        pairs.append((key, re.sub(r"\\(.)", r"\1", double) if double is not None else single or plain))
        at = found.end()
    return pairs


@given(st.lists(st.text(st.sampled_from(",=ab-\"'\\[] "), max_size=8), min_size=1, max_size=4))
def test_crosvm_reads_back_what_was_quoted(values: list[str]) -> None:
    argument = ",".join(f"k{i}={crosvm_value(value)}" for i, value in enumerate(values))
    assert split_like_crosvm(argument) == [(f"k{i}", value) for i, value in enumerate(values)]


@pytest.mark.parametrize("name", ["a", "VmRun", "web-3.example_x", "0", ".", "-", "x" * 64])
def test_these_are_vm_names(name: str) -> None:
    assert check_vm_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "a b", "a/b", "a\n", "ä", "a,b", "a=b", "\u0661", "a\0", None, 7]
)
def test_these_are_not_vm_names(name: str) -> None:
    with pytest.raises(IllegalArgumentError, match="is not a VM name"):
        check_vm_name(name)
