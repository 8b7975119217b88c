"""Version requirements: the reference's table, the rules on pre-releases, canonical forms, errors, limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.errors import IllegalArgumentError
from vmactor.platform_version import MAX_LENGTH, Version, VersionRequirement

PLATFORM = Version(1, 0, 0)
LARGEST = 2**64 - 1


def requirement(text: str) -> VersionRequirement:
    return VersionRequirement.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1",
            "1.0",
            "1.0.0",
            "^1",
            "~1",
            "~1.0",
            "~1.0.0",
            "=1",
            "=1.0",
            "*",
            "x",
            "X",
            "1.*",
            "1.0.x",
            "1.x.X",
        ),
        *(
            ">=1",
            "<=1",
            "<=1.0",
            "<2",
            "<1.0.1",
            ">0.9",
            ">=1.0, <2.0",
            " ~1.0",
            "1.0.0-alpha",
            "1.0.0+build",
        ),
        *("> 0.9", ">=0.1,<=1", "  *  ", "1.0 ", ">=0, 1", "=1.0.*", "=1.0.0"),
    ],
)
def test_these_requirements_match_platform_1_0_0(text: str) -> None:
    assert requirement(text).matches(PLATFORM)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "0",
            "0.9",
            "1.1",
            "^1.2",
            "~1.1",
            "2",
            "=2",
            "<1.0",
            "<1",
            ">1",
            ">1.0.0",
            "> 1.0",
            ">=1.0.1",
            "^0.0",
        ),
        *("~0.9", "0.*", "1.1.x", ">=1.0, <1.0", "=1.0.0-alpha"),
    ],
)
def test_these_requirements_do_not_match_platform_1_0_0(text: str) -> None:
    assert not requirement(text).matches(PLATFORM)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "unexpected end of input while parsing major version number"),
        ("   ", "unexpected end of input while parsing major version number"),
        ("garbage", "unexpected character 'g' while parsing major version number"),
        ("v1.0", "unexpected character 'v' while parsing major version number"),
        ("1.", "unexpected end of input while parsing minor version number"),
        ("1.a", "unexpected character 'a' while parsing minor version number"),
        ("1.0.", "unexpected end of input while parsing patch version number"),
        ("\t1", r"unexpected character '\t' while parsing major version number"),
        ("\u202e1", r"unexpected character '\u{202e}' while parsing major version number"),
        ("\ud800", r"unexpected character '\u{d800}' while parsing major version number"),
        ("'", r"unexpected character '\'' while parsing major version number"),
        ("01.0", "invalid leading zero in major version number"),
        ("1.00", "invalid leading zero in minor version number"),
        ("1.0.0-01", "invalid leading zero in pre-release identifier"),
        ("1.0.0-", "empty identifier segment in pre-release identifier"),
        ("1.0.0-a..b", "empty identifier segment in pre-release identifier"),
        ("1.0.0+", "empty identifier segment in build metadata"),
        ("1.0.0.0", "expected comma after patch version number, found '.'"),
        (">=1.0 <2.0", "expected comma after minor version number, found '<'"),
        ("1 2", "expected comma after major version number, found '2'"),
        ("1.0 - 2.0", "expected comma after minor version number, found '-'"),
        ("1.0.0-a !", "expected comma after pre-release identifier, found '!'"),
        ("1.0.0+a !", "expected comma after build metadata, found '!'"),
        (">=1.0||<0.5", "expected comma after minor version number, found '|'"),
        (">=1.0.0,", "unexpected end of input while parsing major version number"),
        ("^*", "unexpected character '*' while parsing major version number"),
        ("1, *", "wildcard req (*) must be the only comparator in the version req"),
        ("1, X, 2", "wildcard req (X) must be the only comparator in the version req"),
        ("x, 1", "wildcard req (x) must be the only comparator in the version req"),
        ("1, *.1", "unexpected character '*' while parsing major version number"),
        ("*.1", "unexpected character after wildcard in version req"),
        ("1.*.1", "unexpected character after wildcard in version req"),
        (f"{LARGEST + 1}", "value of major version number exceeds u64::MAX"),
        ("1." + "9" * 4000, "value of minor version number exceeds u64::MAX"),
        (",".join(["1"] * 33), "excessive number of version comparators"),
        ("1" * (MAX_LENGTH + 1), f"longer than {MAX_LENGTH} characters"),
    ],
)
def test_a_text_that_is_no_requirement_is_refused_with_the_reference_text(text: str, error: str) -> None:
    with pytest.raises(IllegalArgumentError) as caught:
        requirement(text)
    assert caught.value.message == error


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1", "^1"),
        ("1.0", "^1.0"),
        ("~1.0", "~1.0"),
        (">= 1.0,<2", ">=1.0, <2"),
        ("x", "*"),
        ("1.*", "1.*"),
        ("1.*.*", "1.*"),
        ("1.0.X", "1.0.*"),
        ("=1.*", "=1"),
        ("1.2.3-rc.1+build.5", "^1.2.3-rc.1"),
        (",".join(["1"] * 32), ", ".join(["^1"] * 32)),
        (f"{LARGEST}.{LARGEST}.{LARGEST}", f"^{LARGEST}.{LARGEST}.{LARGEST}"),
    ],
)
def test_a_requirement_prints_in_canonical_form_and_reads_back_the_same(text: str, canonical: str) -> None:
    parsed = requirement(text)
    assert str(parsed) == canonical
    assert requirement(canonical) == parsed


@pytest.mark.parametrize(
    ("text", "matching", "others"),
    [
        # A caret keeps the first number that is not zero.
        ("^1.2.3", "1.2.3 1.2.4 1.9.0", "1.2.2 1.1.9 2.0.0 0.2.3"),
        ("^0.2.3", "0.2.3 0.2.9", "0.2.2 0.3.0 1.2.3"),
        ("^0.0.3", "0.0.3", "0.0.2 0.0.4 0.1.3"),
        ("^0.0.0", "0.0.0", "0.0.1 0.1.0"),
        ("^1.2", "1.2.0 1.3.0", "1.1.9 2.2.0"),
        ("^0.0", "0.0.0 0.0.9", "0.1.0"),
        ("^0", "0.0.0 0.9.9", "1.0.0"),
        # A tilde keeps major and, if given, minor.
        ("~1.2.3", "1.2.3 1.2.9", "1.2.2 1.3.0"),
        ("~1.2", "1.2.0 1.2.9", "1.1.0 1.3.0"),
        ("~1", "1.0.0 1.9.9", "0.9.0 2.0.0"),
        # A missing number stands for all of its values.
        (">1.2", "1.3.0 2.0.0", "1.2.0 1.2.9"),
        (">=1.2", "1.2.0 1.2.9 2.0.0", "1.1.9"),
        ("<1.2", "1.1.9 0.9.9", "1.2.0 1.2.9"),
        ("<=1.2", "1.2.9 0.1.0", "1.3.0"),
        ("1.2.*", "1.2.0 1.2.9", "1.3.0 2.2.0"),
        # Pre-releases match only beside a comparator with a pre-release of the same three numbers.
        ("*", "1.0.0", "1.0.0-alpha"),
        (">=0.1", "1.0.0", "1.0.0-alpha"),
        (">=1.0.0-alpha", "1.0.0-alpha 1.0.0-beta 1.0.0 1.1.0", "1.0.0-1 1.1.0-alpha"),
        ("=1.0.0-a", "1.0.0-a 1.0.0-a+build", "1.0.0 1.0.0-b 1.0.0-a.1"),
        ("^1, >=1.2.3-a", "1.2.3-a 1.2.3-b 1.3.0", "1.2.2 1.3.0-a"),
        ("~1, >=1.2.3-a", "1.2.3 1.3.0", "1.2.3-a"),
        # Their order: numbers by value and before words, fewer identifiers before more.
        (">1.0.0-9", "1.0.0-10 1.0.0-a 1.0.0-9.0 1.0.0", "1.0.0-9 1.0.0-8"),
        ("<1.0.0-a.b", "1.0.0-a 1.0.0-a.a 1.0.0-a.99999999999999999999999", "1.0.0-a.b 1.0.0-a.b.c 1.0.0-b"),
        # Build metadata means nothing.
        ("=1.0.0+x", "1.0.0 1.0.0+y", "1.0.1+x"),
    ],
)
def test_operators_follow_the_rules_of_cargo(text: str, matching: str, others: str) -> None:
    versions = dict.fromkeys(matching.split(), True) | dict.fromkeys(others.split(), False)
    assert {version: requirement(text).matches(Version.parse(version)) for version in versions} == versions


@pytest.mark.parametrize(
    "text", ["1.0.0", "0.0.0", f"1.2.{LARGEST}", "1.0.0-a.1.-", "1.0.0+001", "1.0.0--+-.0"]
)
def test_a_version_reads_and_prints_the_same(text: str) -> None:
    assert str(Version.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty string, expected a semver version"),
        (" 1.0.0", "unexpected character ' ' while parsing major version number"),
        ("1.0", "unexpected end of input while parsing minor version number"),
        ("1", "unexpected end of input while parsing major version number"),
        ("1,0", "unexpected character ',' after major version number"),
        ("1.0.0 ", "unexpected character ' ' after patch version number"),
        ("1.0.0-a!", "unexpected character '!' after pre-release identifier"),
        ("1.0.0+a+", "unexpected character '+' after build metadata"),
        ("1.*.0", "unexpected character '*' while parsing minor version number"),
        (f"1.0.{LARGEST + 1}", "value of patch version number exceeds u64::MAX"),
    ],
)
def test_a_text_that_is_no_version_is_refused(text: str, error: str) -> None:
    with pytest.raises(IllegalArgumentError) as caught:
        Version.parse(text)
    assert caught.value.message == error


@given(st.text(alphabet=st.sampled_from("01 .,*xX=<>~^-+a\n\u200b\ud800"), max_size=40) | st.text())
def test_any_text_is_a_requirement_with_a_stable_canonical_form_or_a_typed_error(text: str) -> None:
    try:
        parsed = requirement(text)
    except IllegalArgumentError:
        return
    assert requirement(str(parsed)) == parsed
    parsed.matches(PLATFORM)
