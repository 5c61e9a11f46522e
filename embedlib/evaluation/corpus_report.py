"""The report of a built corpus: what it holds and what was left out of it, as a page that stands alone."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from embedlib.evaluation.report import render_page

KEPT = "kept"


def write_page(measurements: Mapping[str, Any], product: str) -> str:
    """The page for the measurements in a corpus' manifest."""
    return render_page(
        "corpus_report.html.jinja",
        {},
        corpus=measurements,
        product=product.replace("_", " "),
        languages=language_rows(measurements),
        sources=source_rows(measurements),
        longest=max((each["rows"] for each in measurements["languages"].values()), default=1),
    )


def language_rows(measurements: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a language: what stays and what does not, the length of a text, and the tokens of a word."""
    lost: Counter[str] = Counter()
    for each in measurements["counts"]:
        if each["reason"] != KEPT:
            lost[each["lang"]] += each["rows"]
    return [
        {
            "lang": lang,
            "rows": some["rows"],
            "dropped": lost[lang],
            "characters": some["characters"] / some["rows"],
            "fertility": some["tokens"] / some["words"] if some["tokens"] else None,
            "characters_a_token": some["characters"] / some["tokens"] if some["tokens"] else None,
            "lengths": [
                {"edge": edge, "rows": count, "share": count / max(some["lengths"].values())}
                for edge, count in some["lengths"].items()
            ],
        }
        for lang, some in measurements["languages"].items()
    ]


def source_rows(measurements: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a source: what it gave, and what became of the rest, by reason."""
    found: dict[str, Counter[str]] = {}
    for each in measurements["counts"]:
        found.setdefault(each["source"], Counter())[each["reason"]] += each["rows"]
    for each in measurements["quarantined_by_source"]:
        found.setdefault(each["source"], Counter())[f"unreadable: {each['reason']}"] += each["rows"]
    return [
        {
            "source": source,
            "kept": counts[KEPT],
            "reasons": [(reason, count) for reason, count in counts.most_common() if reason != KEPT],
        }
        for source, counts in sorted(found.items())
    ]
