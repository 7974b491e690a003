"""Reads the raw sources of the demo's tasks and yields plain rows: cleaned text, label, id and split group.

Rows come in the source's own order and may hold duplicates; `tasks.py` splits, de-duplicates and samples them.
Nothing here is random: where a choice is needed (which other sense is the negative of a pair), a hash of the row's
id makes it.
"""

from __future__ import annotations

import bz2
import csv
import email
import email.header
import hashlib
import html
import html.parser
import io
import json
import re
import tarfile
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Iterable, Iterator

# Longest text of a mail, in characters: far more than any backbone here reads (512 tokens).
MAIL_CHARACTERS = 3000

# The lexicographer files of WordNet that hold nouns, by number: the 26 supersenses.
SUPERSENSES = dict(
    enumerate(
        "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
        "object person phenomenon plant possession process quantity relation shape state substance time".split(),
        start=3,
    )
)


@dataclass(frozen=True)
class Row:
    """One example. Rows of one `group` never part over two splits; rows with one `key` count as the same text."""

    id: str
    group: str
    texts: tuple[str, ...]
    label: str
    key: str


def stable_hash(*parts: str) -> int:
    """A 64-bit number that depends on `parts` alone, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


class _Cleaner(dict[int, str]):
    """A translation table for `str.translate` that works itself out, character by character."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        kept = character
        if 0x80 <= code < 0xA0:  # a C1 control in the wild is a Windows-1252 quote or dash
            kept = bytes([code]).decode("cp1252", "ignore") or " "
        elif category == "Cc" or character.isspace():
            kept = " "
        elif category in ("Cf", "Cs", "Co") or character == "\ufffd":
            kept = ""  # format (joiners, byte-order marks, soft hyphens), lone surrogate, private use, undecodable
        self[code] = kept
        return kept


_CLEANER = _Cleaner()


def clean(text: str) -> str:
    """One line of well-formed text: NFC, no control or zero-width characters, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text.translate(_CLEANER)).split())


def text_key(*texts: str) -> str:
    """Texts that differ only in case and spacing have one key."""
    return "\x1f".join(" ".join(text.casefold().split()) for text in texts)


class _Words(html.parser.HTMLParser):
    """Collects the visible words of an HTML page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("script", "style"):
            self._hidden += 1
        self.words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style") and self._hidden:
            self._hidden -= 1
        self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


def html_text(page: str) -> str:
    """The visible text of an HTML page, however broken."""
    parser = _Words()
    try:
        parser.feed(page)
        parser.close()
    except (AssertionError, ValueError):  # a malformed declaration: take the tags off by pattern
        return html.unescape(re.sub(r"<[^>]*>", " ", page))
    return "".join(parser.words)


def _decoded_header(value: object) -> str:
    """A header as text; an undecodable one stays as it is written."""
    raw = str(value)
    try:
        return str(email.header.make_header(email.header.decode_header(raw)))
    except (LookupError, ValueError, email.errors.HeaderParseError):
        return raw


def _decoded_part(part: Message) -> str:
    """The text of one MIME part, transfer encoding and character set undone."""
    if str(part.get("content-transfer-encoding", "")).strip().lower() in ("base64", "quoted-printable"):
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes):
            try:
                return payload.decode(part.get_content_charset() or "latin-1", "replace")
            except LookupError:  # an invented character set
                return payload.decode("latin-1")
    plain = part.get_payload()
    return plain if isinstance(plain, str) else ""


def parse_mail(raw: str) -> tuple[str, str]:
    """Subject and body of a raw mail: its plain-text parts, or its HTML parts as text where it has no other."""
    message = email.message_from_string(raw)
    subject = clean(_decoded_header(message.get("subject", "")))
    plain: list[str] = []
    pages: list[str] = []
    for part in message.walk():
        if part.is_multipart() or part.get_filename():
            continue
        kind = part.get_content_type()
        if kind == "text/html":
            pages.append(html_text(_decoded_part(part)))
        elif kind.startswith("text/"):
            plain.append(_decoded_part(part))
    body = clean(" ".join(plain)) or clean(" ".join(pages))
    if re.match(r"(?i)<(!doctype|html|head|body|table)\b", body):  # HTML that calls itself plain text
        body = clean(html_text(body))
    return subject, body


def mail_thread(subject: str) -> str:
    """A subject without reply marks, list tags and numbers: the mails of a thread or a campaign share it."""
    bare = subject.casefold()
    while True:
        shorter = re.sub(r"^\s*(?:(?:re|fw|fwd|aw)\s*(?:\[\d+\])?\s*:|\[[^\]]{1,30}\])\s*", "", bare)
        if shorter == bare:
            break
        bare = shorter
    return " ".join(re.findall(r"[^\W\d_]+", bare))


def spam(folder: Path) -> Iterator[Row]:
    """SpamAssassin's public corpus: raw mails labelled ham or spam, split by thread."""
    with tarfile.open(folder / "spam-assassin.tgz") as archive:
        members = [m for m in archive if re.search(r"/data/(easy|hard|spam)[^/]*/[^/]+\.json$", m.name)]
        for member in sorted(members, key=lambda m: m.name):
            stream = archive.extractfile(member)
            if stream is None:
                continue
            record = json.load(io.TextIOWrapper(stream, encoding="utf-8"))
            subject, body = parse_mail(record["text"])
            text = f"{subject} {body}".strip()[:MAIL_CHARACTERS].rstrip()
            letters = "".join(re.findall(r"[^\W\d_]+", body.casefold()))[:400]
            id_ = f"{record['group']}/{record['id']}"
            label = "spam" if record["group"].startswith("spam") else "ham"
            # The same letter to many people differs in names and numbers only, so its key is its first letters.
            yield Row(id_, mail_thread(subject) or id_, (text,), label, letters or text_key(text))


def _rated(path: Path) -> Iterator[tuple[str, float, str]]:
    """Id, mean rating (-4 to 4) and text of each line of one of VADER's ground-truth files."""
    with open(path, encoding="utf-8", errors="replace", newline="") as lines:
        for line in lines:
            id_, rating, text = line.rstrip("\r\n").split("\t", 2)
            yield id_, float(rating), clean(html.unescape(text))


def _sentiment(rating: float) -> str:
    if rating >= 0.5:
        return "positive"
    return "negative" if rating <= -0.5 else "neutral"


def _rated_rows(path: Path, as_class: bool) -> Iterator[Row]:
    for id_, rating, text in _rated(path):
        label = _sentiment(rating) if as_class else f"{rating:.4f}"
        # "12_3" is sentence 3 of document 12: a document stays in one split.
        yield Row(id_, id_.split("_")[0], (text,), label, text_key(text))


def tweet_sentiment(folder: Path) -> Iterator[Row]:
    """Tweets, three classes by the mean of twenty human ratings."""
    return _rated_rows(folder / "tweets.txt", as_class=True)


def tweet_rating(folder: Path) -> Iterator[Row]:
    """The same tweets with the mean rating itself, -4 to 4."""
    return _rated_rows(folder / "tweets.txt", as_class=False)


def amazon_sentiment(folder: Path) -> Iterator[Row]:
    """Sentences of product reviews, three classes."""
    return _rated_rows(folder / "amazon.txt", as_class=True)


def nyt_sentiment(folder: Path) -> Iterator[Row]:
    """Sentences of newspaper editorials, three classes."""
    return _rated_rows(folder / "nyt.txt", as_class=True)


def _movies(folder: Path) -> Iterable[dict[str, str]]:
    with bz2.open(folder / "rotten_tomatoes.csv.bz2", "rt", encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def movie_polarity(folder: Path) -> Iterator[Row]:
    """One-line movie reviews, fresh or rotten, split by movie."""
    for number, record in enumerate(_movies(folder)):
        if record["category"] in ("fresh", "rotten"):
            text = clean(record["text"])
            yield Row(str(number), record["movie_name"], (text,), record["category"], text_key(text))


def sentences(text: str) -> list[str]:
    """Splits running text after `.`, `!` or `?` where a capital follows, but not after an initial or a short title."""
    joined = re.sub(r"\b(Dr|Mr|Mrs|Ms|St|Jr|Sr|vs|Lt|Col|Sgt|Capt|[A-Z])\.\s+", "\\1.\u0000", text)
    parts = re.split(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(\[]?[A-Z0-9])", joined)
    return [part.replace("\u0000", " ").strip() for part in parts if part.strip()]


def plot_vs_review(folder: Path) -> Iterator[Row]:
    """Sentences of plot summaries against one-line reviews, split by movie."""
    for number, record in enumerate(_movies(folder)):
        text = clean(record["text"])
        if record["category"] != "plot":
            yield Row(str(number), record["movie_name"], (text,), "review", text_key(text))
            continue
        for index, sentence in enumerate(sentences(text)):
            if len(sentence.split()) >= 4:
                yield Row(f"{number}.{index}", record["movie_name"], (sentence,), "plot", text_key(sentence))


@dataclass(frozen=True)
class Sense:
    """One synset of WordNet: its lemmas, definition and example sentences."""

    id: str
    file_number: int
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


def parse_sense(line: str, part: str) -> Sense:
    """One line of a WordNet data file: `offset file type count (word id)... pointers... | gloss` (wndb(5))."""
    head, _, gloss = line.partition(" | ")
    fields = head.split(" ")
    count = int(fields[3], 16)
    words = fields[4 : 4 + 2 * count : 2]
    # An adjective may end in its syntactic marker: (a), (p) or (ip).
    lemmas = tuple(re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ").casefold() for word in words)
    definition = clean(gloss.split('"', 1)[0]).rstrip(";: ").strip()
    examples = tuple(e for e in (clean(e) for e in re.findall(r'"([^"]+)"', gloss)) if e)
    return Sense(f"{part}.{fields[0]}", int(fields[1]), lemmas, definition, examples)


def _senses(folder: Path, parts: Iterable[str]) -> Iterator[Sense]:
    for part in parts:
        with open(folder / f"data.{part}", encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("  "):  # the licence stands indented at the top
                    yield parse_sense(line.rstrip("\n"), part)


def supersense(folder: Path) -> Iterator[Row]:
    """Definitions of nouns, classed by WordNet's 26 noun files."""
    for sense in _senses(folder, ("noun",)):
        if sense.definition:
            label = SUPERSENSES[sense.file_number]
            yield Row(sense.id, sense.lemmas[0], (sense.definition,), label, text_key(sense.definition))


def _used_in(lemma: str, sentence: str) -> bool:
    """Whether a form of `lemma` stands in `sentence` (in small letters), by its first letters."""
    stem = lemma[:-1] if len(lemma) > 4 and lemma[-1] in "ey" else lemma
    place = sentence.find(stem)
    while place > 0 and sentence[place - 1].isalnum():
        place = sentence.find(stem, place + 1)
    return place >= 0


def gloss_pair(folder: Path) -> Iterator[Row]:
    """Pairs (example, definition): the example's own sense, or another sense of the same word. Split by word.

    A derived task: the rule above makes it from WordNet's examples; nobody judged the pairs.
    """
    senses = list(_senses(folder, ("noun", "verb", "adj", "adv")))
    by_lemma: dict[str, list[Sense]] = defaultdict(list)
    for sense in senses:
        for lemma in set(sense.lemmas):
            by_lemma[lemma].append(sense)
    for sense in senses:
        for index, example in enumerate(sense.examples):
            if len(example.split()) < 3 or not sense.definition:
                continue
            folded = example.casefold()
            for lemma in sense.lemmas:
                others = [s for s in by_lemma[lemma] if s.definition not in ("", sense.definition)]
                if others and _used_in(lemma, folded):
                    break
            else:
                continue  # no word of this synset has another sense, or none stands in the example
            id_ = f"{sense.id}.{index}"
            other = others[stable_hash("other sense", id_) % len(others)]
            for label, definition in (("match", sense.definition), ("other", other.definition)):
                yield Row(f"{id_}.{label}", lemma, (example, definition), label, text_key(example, definition))
