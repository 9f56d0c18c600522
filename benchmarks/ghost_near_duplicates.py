"""Whether gradient search finds the near-duplicate of a query, beside gradient-free searches.

```
python benchmarks/ghost_near_duplicates.py --data gsm8k.jsonl [--model ID] [--queries 200] [--others 600] [--cache DIR]
```

Rows are questions of GSM8K. For each query a changed copy is planted among other rows, by rules that know nothing of
models: names and numbers replaced, phrases reworded, words replaced by synonyms or dropped, sentences reordered. The
queries themselves are not in the corpus. All searches see the same texts; the Fisher matrix, ranks and TF-IDF weights
come from corpus rows alone. Projections are kept in the cache folder: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment, markdown_table
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradtools.demo import demo_model_path
from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.gradproj.store import GradientStore
from hf_gradtools.ghost.gradproj.writer import GradientWriter


BATCH = 8

# ---- how rows are changed

NAMES = "Alma Boris Carmen Dmitri Elena Farid Greta Hugo Ingrid Jorge Kemal Leila Marta Nikos Olga Pavel Quentin Rosa"
NAMES += " Stefan Tamara Ulrich Vera Walter Xenia Yusuf Zelda Amir Bianca Cyril Dora Emil Freya"
NO_NAMES = (
    "I Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August"
)
NO_NAMES += " August September October November December"
PHRASES = {
    "how many": "what number of",
    "how much": "what amount of",
    "in total": "altogether",
    "altogether": "in all",
    "how long": "for what time",
    "how old": "of what age",
    "per day": "each day",
    "per week": "each week",
    "every day": "each day",
    "half as many": "only half the",
    "twice as many": "double the",
    "twice as much": "double the",
    "more than": "above",
    "less than": "below",
    "a total of": "overall",
    "there are": "we find",
    "at the end of": "after",
    "the rest": "all that is left",
    "decides to": "chooses to",
    "needs to": "must",
    "has to": "must",
    "wants to": "would like to",
}
SYNONYMS = {
    "buys": "purchases",
    "buy": "purchase",
    "bought": "purchased",
    "sells": "vends",
    "sell": "vend",
    "sold": "vended",
    "makes": "produces",
    "make": "produce",
    "made": "produced",
    "gets": "receives",
    "get": "receive",
    "got": "received",
    "gives": "hands",
    "gave": "handed",
    "give": "hand",
    "takes": "grabs",
    "takes out": "removes",
    "eats": "consumes",
    "eat": "consume",
    "ate": "consumed",
    "uses": "employs",
    "use": "employ",
    "costs": "is priced at",
    "cost": "price",
    "pays": "spends",
    "pay": "spend",
    "paid": "spent",
    "earns": "gains",
    "earn": "gain",
    "earned": "gained",
    "money": "cash",
    "dollars": "bucks",
    "big": "large",
    "large": "big",
    "small": "little",
    "little": "small",
    "fast": "quick",
    "house": "home",
    "home": "house",
    "store": "shop",
    "shop": "store",
    "kids": "children",
    "children": "kids",
    "friends": "pals",
    "friend": "pal",
    "mother": "mom",
    "mom": "mother",
    "father": "dad",
    "dad": "father",
    "walks": "strolls",
    "walk": "stroll",
    "runs": "jogs",
    "run": "jog",
    "drives": "travels",
    "drive": "travel",
    "begins": "starts",
    "starts": "begins",
    "ends": "finishes",
    "total": "sum",
    "amount": "quantity",
    "number": "count",
    "left": "remaining",
    "remaining": "left",
    "entire": "whole",
    "whole": "entire",
    "also": "too",
    "each": "every",
    "every": "each",
    "needs": "requires",
    "need": "require",
    "wants": "desires",
    "puts": "places",
    "put": "place",
    "finds": "discovers",
    "found": "discovered",
    "job": "work",
    "work": "labor",
    "works": "labors",
    "town": "city",
    "city": "town",
    "trip": "journey",
    "car": "automobile",
    "bag": "sack",
    "bags": "sacks",
    "boxes": "cartons",
    "box": "carton",
    "picks": "gathers",
    "picked": "gathered",
    "then": "afterwards",
    "if": "when",
    "after": "following",
    "before": "prior to",
    "gift": "present",
    "gifts": "presents",
    "pieces": "parts",
    "piece": "part",
    "students": "pupils",
    "student": "pupil",
    "people": "persons",
    "hours": "hrs",
    "minutes": "mins",
    "pounds": "lbs",
    "old": "aged",
    "new": "fresh",
    "cheap": "inexpensive",
    "twice": "two times",
    "double": "twice",
    "but": "yet",
    "and": "plus",
    "with": "having",
    "only": "just",
    "about": "around",
}
STRENGTHS = {
    "names and numbers": (0.0, False),
    "+ phrases, 15 % of words": (0.15, False),
    "+ phrases, 30 % of words, order": (0.30, True),
}


class Changer:
    """Makes changed copies of texts.

    Args:
        texts: all rows, to tell names from other words that stand at the start of sentences.
    """

    def __init__(self, texts: Sequence[str]):
        capitalised = Counter(word for text in texts for word in re.findall(r"\b[A-Z][a-z]+", text))
        inside = Counter(word for text in texts for word in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
        lower = Counter(word for text in texts for word in re.findall(r"\b[a-z]+", text))
        names = {word for word in capitalised if inside[word] > lower[word.lower()] or not lower[word.lower()]}
        self.names = names - set(NO_NAMES.split())

    def __call__(self, text: str, strength: str, seed: int) -> str:
        share, reorder = STRENGTHS[strength]
        draw = random.Random(f"{strength}/{seed}")
        if reorder:
            text = reordered(text, draw)
        if share:
            text = changed_words(reworded(text), share, draw)
        return self.renamed(renumbered(text, draw), draw)

    def renamed(self, text: str, draw: random.Random) -> str:
        found = sorted({word for word in re.findall(r"[A-Z][a-z]+", text) if word in self.names})
        others = dict(zip(found, draw.sample(NAMES.split(), len(found)), strict=True))
        return re.sub(r"[A-Z][a-z]+", lambda match: others.get(match[0], match[0]), text)


def renumbered(text: str, draw: random.Random) -> str:
    """Every number becomes another with as many digits, the same wherever it stands."""
    others: dict[str, str] = {}

    def other(match: re.Match[str]) -> str:
        number = match[0]
        while others.get(number, number) == number:
            others[number] = str(draw.randint(10 ** (len(number) - 1), 10 ** len(number) - 1))
        return others[number]

    return re.sub(r"\d+", other, text)


def reworded(text: str) -> str:
    def phrase(match: re.Match[str]) -> str:
        new = PHRASES[match[0].lower()]
        return new.capitalize() if match[0][0].isupper() else new

    return re.sub(r"\b(" + "|".join(PHRASES) + r")\b", phrase, text, flags=re.IGNORECASE)


def changed_words(text: str, share: float, draw: random.Random) -> str:
    """A share of the words, numbers and capitalised ones aside, become synonyms, or are dropped if none is known."""
    parts = re.split(r"(\s+)", text)
    places = [i for i, part in enumerate(parts) if re.fullmatch(r"[a-z]+[.,?]?", part)]
    for i in draw.sample(places, round(share * len(places))):
        word = parts[i].rstrip(".,?")
        parts[i] = SYNONYMS.get(word, "") + parts[i][len(word) :]
    return re.sub(r"\s+([.,?]|\s)", r"\1", "".join(parts))


def reordered(text: str, draw: random.Random) -> str:
    """All sentences but the last, which asks, in another order."""
    *told, question = re.split(r"(?<=[.?!])\s+", text.strip())
    return " ".join([*draw.sample(told, len(told)), question])


# ---- searches

Search = Callable[[list[str], list[str]], Tensor]  # queries, corpus -> scores [Q, N]


def tfidf_scores(queries: list[str], corpus: list[str]) -> Tensor:
    vectorizer = TfidfVectorizer().fit(corpus)
    found = vectorizer.transform(queries) @ vectorizer.transform(corpus).T
    return torch.from_numpy(found.toarray())


def cosines(queries: Tensor, corpus: Tensor) -> Tensor:
    return normalize(queries, dim=1) @ normalize(corpus, dim=1).T


def ranks(scores: Tensor) -> Tensor:
    """The rank of row n for query n, from 1: the corpus begins with the planted rows. Ties count against it."""
    planted = scores.diagonal()[:, None]
    return (scores >= planted).sum(1)


@torch.no_grad()
def hidden_states(model: Any, rows: Dataset) -> dict[str, Tensor]:
    """The last hidden states: mean over tokens, and the last token's. `[rows, d]` each."""
    ids = [torch.tensor(row) for row in rows["input_ids"]]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = {name: torch.empty(len(ids), model.config.hidden_size) for name in ("mean", "last")}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids[i])) for i in part], batch_first=True)
        batch = torch.nn.utils.rnn.pad_sequence([ids[i] for i in part], batch_first=True)
        states = model.base_model(batch, attention_mask=mask, use_cache=False).last_hidden_state
        found["mean"][part] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found["last"][part] = states[torch.arange(len(part)), mask.sum(1).long() - 1]
    return found


class Bench:
    """Texts, the model, and what is cached of them."""

    def __init__(self, options: argparse.Namespace, cache: Path):
        self.cache = cache
        with open(options.data) as file:
            texts = [json.loads(line)["question"] for line in file]
        random.Random(0).shuffle(texts)
        change, count = Changer(texts), options.queries
        self.queries, self.others = texts[:count], texts[count : count + options.others]
        self.planted = {s: [change(text, s, n) for n, text in enumerate(self.queries)] for s in STRENGTHS}
        folder = options.model or demo_model_path()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer, self.max_tokens = AutoTokenizer.from_pretrained(folder), options.max_tokens
        self.projector = GradProjector(self.model)

    def rows(self, texts: list[str]) -> Dataset:
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def project(self) -> dict[str, GradientStore]:
        """A store of the other rows, on which all is fitted, of the queries, and of each strength's planted rows."""
        parts = {"others": self.others, "queries": self.queries, **self.planted}
        return {
            name: self.projector.project(self.rows(texts), output_dir=self.cache / slug(name), batch_size=BATCH)
            for name, texts in parts.items()
        }

    def corpus(self, stores: dict[str, GradientStore], strength: str, folder: str) -> GradientStore:
        """One store of the planted rows and the others after them."""
        parts = [stores[name].rows(range(len(stores[name]))) for name in (strength, "others")]
        identity = {**self.projector.identity(), "dataset": {"content": strength}}
        writer = GradientWriter(folder, identity, dim=self.projector.dim, dtype="float16")
        gradients = torch.cat(parts)
        writer.append({
            "sample_id": list(range(len(gradients))), "gradient": gradients, "num_tokens": [0] * len(gradients),
        })  # fmt: skip
        writer.finish()
        writer.close()
        return GradientStore.open(folder)

    def hidden(self) -> dict[str, dict[str, Tensor]]:
        file = self.cache / "hidden.pt"
        if not file.exists():
            parts = {"others": self.others, "queries": self.queries, **self.planted}
            torch.save({name: hidden_states(self.model, self.rows(texts)) for name, texts in parts.items()}, file)
        return torch.load(file)


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def gradient_ranks(corpus: GradientStore, queries: Tensor) -> dict[str, Tensor]:
    """By search, the rank of each query's planted row."""
    found = {}
    for metric in ("cosine", "dot"):
        for precondition in (None, "fisher"):
            hits = corpus.search(queries, k=len(corpus), metric=metric, precondition=precondition, progress=False)
            own = {hit["query"]: hit["rank"] for hit in hits if hit["row"] == int(hit["query"])}
            title = f"**gradients, {metric}{', fisher' if precondition else ''}**"
            found[title] = torch.tensor([own[query] for query in range(len(queries))])
    return found


def all_ranks(bench: Bench, stores: dict[str, GradientStore], strength: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        queries = stores["queries"].rows(range(len(bench.queries)))
        found = gradient_ranks(bench.corpus(stores, strength, folder), queries)
    hidden = bench.hidden()
    for kind in ("mean", "last"):
        corpus = torch.cat([hidden[strength][kind], hidden["others"][kind]])
        queries = hidden["queries"][kind]
        found[f"hidden states, {kind} token, cosine"] = ranks(cosines(queries, corpus))
        centre = corpus.mean(0)
        found[f"hidden states, {kind} token, centred, cosine"] = ranks(cosines(queries - centre, corpus - centre))
    found["words, TF-IDF cosine"] = ranks(tfidf_scores(bench.queries, bench.planted[strength] + bench.others))
    return found


def table(found: dict[str, dict[str, Tensor]]) -> str:
    headers = ["search", *[f"{strength}: rank 1 (MRR)" for strength in found]]
    rows = []
    for name in next(iter(found.values())):
        cells = [each[name].double() for each in found.values()]
        rows.append([name, *[f"{100 * (r == 1).double().mean():.1f} % ({(1 / r).mean():.3f})" for r in cells]])
    return markdown_table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with a column 'question', as GSM8K has")
    parser.add_argument("--model", help="causal LM, default SmolLM2-135M-Instruct of the demo extra")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--others", type=int, default=600)
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--cache", type=Path, help="folder to keep projections in, default a temporary one")
    parser.add_argument("--show", type=int, default=0, help="only print so many queries and their changed copies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, cache)
        if options.show:
            for n in range(options.show):
                print("\n".join([bench.queries[n], *(texts[n] for texts in bench.planted.values())]), end="\n\n")
            return
        start = time.process_time()
        stores = bench.project()
        seconds = time.process_time() - start
        print(table({strength: all_ranks(bench, stores, strength) for strength in STRENGTHS}))
    rows = sum(len(store) for store in stores.values())
    size, dim = len(bench.queries) + len(bench.others), stores["others"].dim
    print(f"\n{len(bench.queries)} queries, {size} corpus rows, k={dim}")
    print(f"{rows} rows projected in {seconds:.0f} CPU seconds (less where the cache had them)\n\n{environment()}")


if __name__ == "__main__":
    main()
