"""Prompts to tokens, against literal tokens and the packages OpenCLIP leans on; test_parity.py has recorded ones."""

import gzip
import html
import sys
import unicodedata
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablesr.tokenizer import END_TOKEN, START_TOKEN, clean, split_words, tokenize


def words_of(text: str) -> list[int]:
    """The tokens of one prompt between start and end."""
    row = tokenize([text])[0].tolist()
    return row[1 : row.index(END_TOKEN)]


# Taken from OpenCLIP 2.0.2 itself.
PROMPTS = {
    "": [],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "Good photo.": [886, 1125, 269],
    "it's the photographer's 2nd-best shot, they'll agree!": [
        *(585, 568, 518, 5748, 568, 273, 1764, 268, 949, 2000, 267, 889, 1342, 5953, 256),
    ],
    "Café naïve 東京 😀 über": [15304, 1097, 35689, 563, 48338, 21078, 361, 7334, 6522, 1516],
    "numbers 1234567": [6121, 272, 273, 274, 275, 276, 277, 278],
    "&lt;b&gt; &amp;amp; html": [283, 321, 285, 261, 18231],
    "(masterpiece:2), (best quality:2)": [263, 12066, 281, 273, 2361, 263, 949, 3027, 281, 273, 264],
}


@pytest.mark.parametrize(("text", "expected"), PROMPTS.items(), ids=map(ascii, PROMPTS))
def test_tokens_of_a_prompt(text, expected):
    assert words_of(text) == expected


def test_a_row_is_start_words_end_and_zeros():
    tokens = tokenize(["a cat", ""])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[49406, 320, 2368, 49407] + 73 * [0], [49406, 49407] + 75 * [0]]


def test_a_long_prompt_keeps_the_end_token_and_loses_its_tail():
    assert tokenize(["cat " * 75]).tolist() == [[START_TOKEN] + 75 * [2368] + [END_TOKEN]]
    assert tokenize(["cat " * 75 + "photo"]).tolist() == [[START_TOKEN] + 75 * [2368] + [END_TOKEN]]
    assert tokenize(["a photo of a cat"], context_length=4).tolist() == [[START_TOKEN, 320, 1125, END_TOKEN]]


def test_no_prompts_make_no_rows():
    assert tokenize([]).shape == (0, 77)


def test_words_named_like_the_special_tokens_are_these_tokens():
    assert words_of("a <Start_Of_Text> cat") == [320, START_TOKEN, 2368]
    assert tokenize(["a <end_of_text> cat"])[0, :5].tolist() == [START_TOKEN, 320, END_TOKEN, 2368, END_TOKEN]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        pytest.param("a cat", r"is the str 'a cat', not a sequence[^\n]*\nhint: pass \['a cat'\]", id="lone-str"),
        pytest.param(["a", None], "prompt 1 is None of type NoneType", id="none"),
        pytest.param([b"a cat"], "prompt 0 is b'a cat' of type bytes", id="bytes"),
    ],
)
def test_a_prompt_must_be_a_str(texts, message):
    with pytest.raises(ValueError, match=message):
        tokenize(texts)


def test_start_and_end_must_fit():
    with pytest.raises(ValueError, match="context_length=1 has no room"):
        tokenize(["a"], context_length=1)
    assert tokenize(["a"], context_length=2).tolist() == [[START_TOKEN, END_TOKEN]]


def test_each_merge_of_the_file_is_a_token_up_to_jekyll():
    file = resources.files("stablesr") / "data" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    # Before the merges come 256 bytes and 256 bytes that end a word, so line n (line 0 is a header) is token 511 + n.
    assert (lines[1857], words_of("cat")) == ("c at</w>", [511 + 1857])
    assert (lines[48894], words_of("Jekyll")) == ("jeky ll</w>", [511 + 48894])
    assert (lines[48895], len(words_of("habib"))) == ("ha bib</w>", 2), "the file goes on, CLIP's vocabulary does not"


# ---------------------------------------------------------------------------------------------------------- clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("\u201cit\u2019s\u201d", '"it\'s"', id="curly-quotes"),
        pytest.param("e\u0301", "\u00e9", id="composed"),
        pytest.param("\ufb01ne \u01c6", "fine d\u017e", id="ligatures"),
        pytest.param("\uff26\uff35\uff2c\uff2c\u3000\uff11", "FULL 1", id="full-width"),
        pytest.param("a\x00b\x7f\ufeff\x1bc", "abc", id="control-characters"),
        pytest.param("\x1b[1;31mred\x1b[0m", "red", id="terminal-colours"),
        pytest.param("1\r\n2\r3\u20284\u20295", "1\n\n2\n3\n4\n5", id="line-breaks"),
        pytest.param("\x93hi\x94 \x85", '"hi" \u2026', id="windows-1252-controls"),
        pytest.param("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd", id="surrogates"),
        pytest.param("&amp;amp;amp;amp;lt;", "<", id="entities-to-the-end"),
        pytest.param("<b> &amp;amp;amp;lt;", "<b> &amp;lt;", id="only-twice-after-a-tag"),
        pytest.param("&rsquo; < &rsquo;\n&ldquo;", "\u2019 < \u2019\n\u201c", id="entities-near-a-tag-stay-curly"),
        pytest.param("&copy 1 &NTILDE; &#65;", "\u00a9 1 \u00d1 A", id="careless-entities"),
        pytest.param("&GTDOT; &gtdot;", ">DOT; \u22d7", id="upper-case-begins-another-entity"),
        pytest.param("&copy&#59;", "\u00a9;", id="entity-for-a-semicolon-ends-none"),
        pytest.param("cafÃ©", "cafÃ©", id="mojibake-is-not-repaired"),
    ],
)
def test_clean(text, expected):
    # A Windows line end is two breaks here; what follows makes one space of any white space.
    assert clean(text) == expected


def test_white_space_and_case_make_no_difference():
    assert words_of("  A\tPHOTO\r\n\u2028of \u3000 a\u00a0cat ") == [320, 1125, 539, 320, 2368]


def test_every_character_is_cleaned_like_ftfy_does():
    ftfy = pytest.importorskip("ftfy", reason="ftfy is the reference for clean(); a test dependency only")
    different = [
        hex(code)
        for code in range(sys.maxunicode + 1)
        if not is_plain_bulk(chr(code)) and clean(chr(code)) != html.unescape(html.unescape(ftfy.fix_text(chr(code))))
    ]
    assert different == []


def is_plain_bulk(character: str) -> bool:
    """Unassigned, private, or one of the many ideographs and syllables without another form: 19 in 20 of all."""
    category = unicodedata.category(character)
    return category in ("Cn", "Co") or (category == "Lo" and not unicodedata.decomposition(character))


def texts_of(pieces: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=15).map("".join)


ORDINARY = (
    *(
        "a photo of a cat",
        "It\u2019s",
        "\u201csharp\u201d",
        "caf\u00e9",
        "nai\u0308ve",
        "\ufb01ne",
        "\uff21\uff22",
        "3.14",
    ),
    *(
        "&amp;",
        "&lt;",
        "&#39;",
        "&quot;",
        "R&D",
        "&copy",
        "&AMP;amp;",
        "&EACUTE;",
        "AT&T;",
        "\u6771\u4eac",
        "\U0001f600",
    ),
    *("\n", "\r\n", "\t", " ", "\u3000", "\u2028", "(best quality:2),", "\u2026", "\u2013", "\x1b[31m", "\x00", "<b>"),
)


@given(texts_of(ORDINARY))
def test_ordinary_text_is_cleaned_like_ftfy_does(text):
    ftfy = pytest.importorskip("ftfy", reason="ftfy is the reference for clean(); a test dependency only")
    # fix_encoding is the repair of mojibake; short mixes of scripts now and then look like it.
    expected = html.unescape(html.unescape(ftfy.fix_text(text, fix_encoding=False)))
    assert clean(text).split() == expected.split()


# ---------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("two  cats", ["two", "cats"], id="spaces-part"),
        pytest.param(
            "they'll i'd rock'n'roll", ["they", "'ll", "i", "'d", "rock", "'", "n", "'", "roll"], id="contractions"
        ),
        pytest.param("it!'s", ["it", "!'", "s"], id="contraction-only-at-a-border"),
        pytest.param("'Tis", ["'T", "is"], id="contractions-in-any-case"),
        pytest.param("v1.25x", ["v", "1", ".", "2", "5", "x"], id="digits-one-by-one"),
        pytest.param("x\u00b2\u2167\u0663", ["x", "\u00b2", "\u2167", "\u0663"], id="numbers-of-all-kinds"),
        pytest.param("snake_case--ok", ["snake", "_", "case", "--", "ok"], id="underscore-is-a-symbol"),
        pytest.param("q\u0303a", ["q", "\u0303", "a"], id="combining-mark-is-a-symbol"),
        pytest.param("\u6771\u4eac\U0001f600!", ["\u6771\u4eac", "\U0001f600!"], id="ideographs-and-emoji"),
        pytest.param("a\u0345b", ["a", "b"], id="combining-iota-is-skipped"),
        pytest.param("a<start_of_text>b", ["a", "<start_of_text>", "b"], id="special-word"),
    ],
)
def test_split_words(text, expected):
    assert list(split_words(text)) == expected


@pytest.fixture(scope="module")
def reference_split():
    regex = pytest.importorskip("regex", reason="regex is the reference for split_words(); a test dependency only")
    return regex.compile(
        r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    ).findall


def test_every_character_splits_like_the_reference(reference_split):
    different = []
    for code in range(sys.maxunicode + 1):
        text = f"a{chr(code)}{chr(code)}1"
        # The reference may know newer letters than this Python.
        if unicodedata.category(chr(code)) != "Cn" and list(split_words(text)) != reference_split(text):
            different.append(hex(code))
    assert different == []


SPLITTABLE = (
    *(
        "'ll",
        "'RE",
        "'ve",
        "'",
        "s",
        "T",
        "d",
        "m",
        "<start_of_text>",
        "<END_OF_TEXT>",
        "<end",
        "_",
        "-",
        ".",
        "!",
        "5",
    ),
    *(" ", "\t", "\n", "\x1c", "\u3000", "word", "\u00e9", "\u6771", "\U0001f600", "\u0303", "\u00b2", "\u2167"),
    *("\u017f", "\u0345", "\u00aa", "\u1d2c", "\u0131"),
)


@given(text=texts_of(SPLITTABLE))
def test_any_text_splits_like_the_reference(reference_split, text):
    assert list(split_words(text)) == reference_split(text)
