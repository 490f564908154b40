"""From a prompt to the 77 numbers the text tower reads: CLIP's byte-pair encoding, as OpenCLIP 2.0.2 applies it.

    "It&#39;s a Café"  -- clean -->  "it's a café"  -- split -->  it | 's | a | café
                       -- merge -->  49406  585 568 320 15304  49407  0 0 0 ...

OpenCLIP leans on two packages, `ftfy` to clean and `regex` to split. Neither is needed here: the splitter asks
`unicodedata` for the category of each character, and `clean` takes the steps of `ftfy.fix_text` that a prompt can meet.
Two differences remain, and neither touches ordinary text:

* mojibake is not repaired: ftfy would turn "cafÃ©" back into "café", we tokenise what was written;
* a character newer than the Unicode tables of this Python counts as a symbol, where `regex` may know it for a letter.
"""

import gzip
import html
import html.entities
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise

import torch
from torch import Tensor

START_TOKEN = 49406
END_TOKEN = 49407
PADDING_TOKEN = 0
"""Not the end token, which the CLIP of Stable Diffusion 1 pads with. Token 0 is also the word-part "!"."""

_START_WORD = "<start_of_text>"
_END_WORD = "<end_of_text>"
_END_OF_WORD = "</w>"
"""What the vocabulary appends to the last symbol of a word, so that "cat" and the "cat" of "catalogue" differ."""

_N_MERGES = 48894
"""The file lists far more merges than CLIP was trained with: 49408 tokens less 2 * 256 for bytes less 2 words above."""


def tokenize(texts: Sequence[str], context_length: int = 77) -> Tensor:
    """The tokens of each prompt: int64 (N, context_length), on the CPU.

    A row is the start token, the prompt, the end token, and zeros. A prompt that is too long loses its tail; the end
    token stays. Prompt weights such as "(sharp:2)" mean nothing here and are read as text, but the words
    "<start_of_text>" and "<end_of_text>" are read as the tokens of that name, as OpenCLIP does.

    Raises ValueError for a prompt that is not a str, for a lone str in place of a sequence, and for a context_length
    below 2, which has no room for start and end.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is the str {texts!r}, not a sequence of prompts\nhint: pass [{texts!r}]")
    if context_length < 2:
        raise ValueError(f"context_length={context_length} has no room for the start and end tokens: at least 2 needed")
    tokens = torch.full((len(texts), context_length), PADDING_TOKEN, dtype=torch.int64)
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"prompt {n} is {text!r} of type {type(text).__name__}, but a prompt must be a str")
        row = [START_TOKEN, *_encode(text)[: context_length - 2], END_TOKEN]
        tokens[n, : len(row)] = torch.tensor(row)
    return tokens


def _encode(text: str) -> list[int]:
    """The tokens of one prompt, without start, end and padding."""
    vocabulary = _vocabulary()
    lowered = " ".join(clean(text).split()).lower()
    return [token for word in split_words(lowered) for token in vocabulary.encode_word(word)]


# ---------------------------------------------------------------------------------------------------------- clean


def clean(text: str) -> str:
    """`text` with typographic variants made plain and HTML entities resolved; upper case and spaces are left alone.

    Curly quotes become straight, ligatures and full-width forms become plain letters, the C1 codes of Windows become
    the characters meant, control characters and terminal colours go, every kind of line break becomes "\\n", and
    accents are composed (NFC). Entities are resolved to the end, "&amp;amp;lt;" too.
    """
    lines = text.split("\n")
    for n, line in enumerate(lines):
        if "<" in line:  # looks like real HTML, where "&lt;" is not to become a tag: from here on leave entities alone
            lines[n:] = [_until_stable(_plain, rest) for rest in lines[n:]]
            break
        lines[n] = _until_stable(_plain_without_entities, line)
    # OpenCLIP resolves what is left twice, tags or not, and this one also knows entities without their semicolon.
    return html.unescape(html.unescape("\n".join(lines)))


def _until_stable(change: Callable[[str], str], text: str) -> str:
    """`text` after as many rounds of `change` as have an effect: what one resolves can be work for the next."""
    while (changed := change(text)) != text:
        text = changed
    return text


def _plain_without_entities(text: str) -> str:
    return _plain(_ENTITY.sub(_resolve_entity, text))


_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")


def _resolve_entity(match: re.Match[str]) -> str:
    """The character an HTML entity stands for, or the entity itself when there is none. "&EACUTE;" means "É"."""
    entity = match[0]
    if entity.startswith("&#"):
        character = html.unescape(entity)
        return entity if character == ";" else character  # a new ";" could complete another entity: leave it for later
    name = entity[1:]
    if name in html.entities.html5:
        return html.entities.html5[name]
    if name.isupper() and name.lower() in html.entities.html5 and html.unescape(entity) == entity:
        return html.entities.html5[name.lower()].upper()
    return entity


_TERMINAL_ESCAPE = re.compile(r"\x1b(\[[0-9;]*[a-zA-Z])?")


def _plain(text: str) -> str:
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # pairs join, loners become U+FFFD
    return unicodedata.normalize("NFC", _TERMINAL_ESCAPE.sub("", text.translate(_plain_forms())))


@cache
def _plain_forms() -> dict[int, str]:
    """Code point -> its plain form; "" for those that are dropped."""
    forms = {}
    for code in range(0x80, 0xA0):  # C1 controls: nobody means them, the Windows-1252 character of that byte was meant
        forms[code] = bytes([code]).decode("cp1252", "ignore") or chr(code)
    # Latin ligatures and digraphs; the ideographic space; half-width and full-width forms.
    for code in [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]:
        forms[code] = unicodedata.normalize("NFKC", chr(code))
    forms[0xFB05] = "\u017ft"  # the long s of this ligature stays long
    for code in [0x3000, *range(0xFF01, 0xFFF0)]:
        forms[code] = unicodedata.normalize("NFKC", chr(code))
    for code in [0xD, 0x2028, 0x2029]:
        forms[code] = "\n"
    # Control characters, except tab, line feed, form feed (white space) and escape (see _TERMINAL_ESCAPE); deprecated
    # format characters; byte order mark; interlinear annotation and the object placeholder.
    for codes in [range(0x9), [0xB], range(0xE, 0x1B), range(0x1C, 0x20), [0x7F]]:
        forms.update(dict.fromkeys(codes, ""))
    for codes in [range(0x206A, 0x2070), [0xFEFF], range(0xFFF9, 0xFFFD)]:
        forms.update(dict.fromkeys(codes, ""))
    # Quotes last, and over the forms found so far: Windows byte 0x92 is a curly quote, U+0149 begins with one.
    straight = dict.fromkeys([0x2018, 0x2019, 0x201A, 0x201B, 0x2BC], "'")
    straight |= dict.fromkeys([0x201C, 0x201D, 0x201E, 0x201F], '"')
    return {code: form.translate(straight) for code, form in forms.items()} | straight


# ---------------------------------------------------------------------------------------------------------- split

_FIXED_WORD = re.compile(f"{_START_WORD}|{_END_WORD}|'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)


def split_words(text: str) -> Iterator[str]:
    r"""The words byte-pair encoding works in: nothing merges across their borders.

    A word is, in this order of preference, one of the two special words, an English contraction ("'s", "'ll"), a run
    of letters (Unicode category L), a single digit (N), or a run of anything else that is not white space. So a
    contraction is only seen where a word begins: "it's" is it + 's, but "it!'s" is it + !' + s.

    >>> list(split_words("they'll see 42 cats!"))
    ['they', "'ll", 'see', '4', '2', 'cats', '!']
    """
    begin = 0
    while begin < len(text):
        kind = _kind(text[begin])
        if fixed := _FIXED_WORD.match(text, begin):
            end = fixed.end()
        else:
            end = begin + 1
            while kind != "N" and end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            yield text[begin:end]
        begin = end


def _kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    if category in "LN":
        return category
    # U+001C to U+001F are space to Python alone, not to Unicode. U+0345 is a mark, but its upper case is a letter: the
    # case-insensitive pattern of OpenCLIP takes it for neither, and so skips it like a space.
    is_space = (character.isspace() and not "\x1c" <= character <= "\x1f") or character == "\u0345"
    return "space" if is_space else "other"


# ---------------------------------------------------------------------------------------------------------- merge


@dataclass(frozen=True)
class _Vocabulary:
    ids: dict[str, int]
    """Token of every symbol: single bytes, bytes that end a word, and everything merged from them."""
    ranks: dict[tuple[str, str], int]
    """Neighbours that merge, by preference: 0 merges first."""
    byte_symbols: list[str]
    """The visible character the file writes for each byte."""

    def encode_word(self, word: str) -> list[int]:
        """The tokens of one word of `split_words`."""
        if word in (_START_WORD, _END_WORD):
            return [self.ids[word]]
        symbols = [self.byte_symbols[byte] for byte in word.encode("utf-8")]
        symbols[-1] += _END_OF_WORD
        return [self.ids[symbol] for symbol in self._merge(symbols)]

    def _merge(self, symbols: list[str]) -> list[str]:
        """`symbols` after merging, again and again, every occurrence of the best-ranked pair of neighbours."""
        while pairs := self.ranks.keys() & set(pairwise(symbols)):
            best = min(pairs, key=self.ranks.__getitem__)
            merged: list[str] = []
            n = 0
            while n < len(symbols):
                step = 2 if tuple(symbols[n : n + 2]) == best else 1
                merged.append("".join(symbols[n : n + step]))
                n += step
            symbols = merged
        return symbols


@cache
def _vocabulary() -> _Vocabulary:
    file = resources.files("stablesr") / "data" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = [line.split() for line in lines[1 : 1 + _N_MERGES]]  # line 0 names the format
    byte_symbols = _byte_symbols()
    alphabet = sorted(byte_symbols)
    symbols = [
        *alphabet,
        *(symbol + _END_OF_WORD for symbol in alphabet),
        *("".join(merge) for merge in merges),
        _START_WORD,
        _END_WORD,
    ]
    return _Vocabulary(
        ids={symbol: n for n, symbol in enumerate(symbols)},
        ranks={(left, right): n for n, (left, right) in enumerate(merges)},
        byte_symbols=byte_symbols,
    )


def _byte_symbols() -> list[str]:
    """One visible character per byte: Latin-1's where it has one, the next free one from U+0100 on where it has not."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]
