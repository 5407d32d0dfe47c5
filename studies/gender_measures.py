"""What studies/gender_bias.py measures: what is read of DOCS, and a number for each item of it.

    heldout       log p(" she") - log p(" he") wherever DOCS/heldout has either, nats
    winogender    anti-stereotypical minus stereotypical log-likelihood of a sentence whose pronoun
                  is the occupation's; the stereotype is its majority (Bureau of Labor Statistics)
    winobias      the same of WinoBias' anti- and pro-stereotyped sentences
    choice        WinoBias as multiple choice between the sentence's two occupations: right in the
                  pro-stereotyped sentence minus right in the anti-stereotyped one, -1, 0 or 1
    crows_gender  CrowS-Pairs, gender: log-likelihood of the less minus the more stereotypical
                  sentence
    cost          bits per byte of each document of DOCS/heldout: what it cost, if they grew
    lambada       log-likelihood of the last word: the cost again, if it fell

Each is of one model; branch and twin are compared item by item. Which are measured depends on the
folders that DOCS has. Of WinoBias' 792 pairs, 9 differ in more than their brackets: they are left
out.
"""

import math
import re

import numpy as np
import torch

from eval import loglikelihood, loglikelihood_rolling
from tasks import read_jsonl, text


def heldout_texts(docs):
    return [text(doc, "text") for doc in read_jsonl(docs / "heldout" / "test.jsonl")]


@torch.no_grad()
def heldout(model, tokenizer, documents):
    """log p(she) - log p(he) at each of the two; the softmax's sum cancels, so two logits do."""
    [he], [she] = tokenizer.encode(" he"), tokenizer.encode(" she")
    L, device = model.config.seq_length, model.embed_in.weight.device
    direction = model.embed_out.weight[she] - model.embed_out.weight[he]
    values = []
    for document in documents:
        ids = torch.tensor([0] + tokenizer.encode(document), device=device)
        for start in range(0, len(ids) - 1, L):
            piece = ids[start:start + L + 1]
            places = torch.isin(piece[1:], torch.tensor([he, she], device=device)).nonzero()[:, 0]
            if len(places):
                values += (model.hidden(piece[None, :-1])[0, places] @ direction).tolist()
    return values


def cost(model, tokenizer, documents):
    lls = loglikelihood_rolling(model, tokenizer, documents)
    return [-ll / math.log(2) / len(document.encode()) for ll, document in zip(lls, documents)]


def winogender_pairs(docs):
    """Return [(anti-stereotypical, stereotypical)] sentences."""
    lines = [line.split("\t") for name in ("occupations-stats.tsv", "all_sentences.tsv")
             for line in (docs / "winogender" / name).read_text(encoding="utf8").splitlines()[1:]]
    female = {row[0]: float(row[2]) for row in lines if len(row) == 4}
    sentences = {row[0]: row[1] for row in lines if len(row) == 2}
    pairs = []
    for name, sentence in sentences.items():
        if name.endswith(".0.male.txt"):  # 1: the pronoun is the other person's, of no stereotype
            other = sentences[name.replace(".male.", ".female.")]
            majority_female = female[name.split(".")[0]] >= 50
            pairs.append((sentence, other) if majority_female else (other, sentence))
    return pairs


def differences(model, tokenizer, pairs):
    """Return log p(first) - log p(second) of each pair of texts, nats."""
    texts = [side for pair in pairs for side in pair]  # the two of a pair next to each other
    lls = [ll for ll, _ in loglikelihood(model, tokenizer, [("", side) for side in texts])]
    return [first - second for first, second in zip(lls[::2], lls[1::2])]


def winobias_pairs(docs):
    """Return [(pro-stereotyped, anti-stereotyped)] sentences of the test set, with [brackets]."""
    by_file, pairs = {}, []
    for doc in read_jsonl(docs / "winobias" / "winobias.jsonl"):
        by_file.setdefault(text(doc, "file"), []).append(text(doc, "sentence"))
    for kind in (1, 2):
        pairs += zip(*(by_file[f"{stereotype}_stereotyped_type{kind}.txt.test"]
                       for stereotype in ("pro", "anti")))
    outside = lambda sentence: re.sub(r"\[.*?\]", "", sentence)
    return [(pro, anti) for pro, anti in pairs if outside(pro) == outside(anti)]


def plain(sentence):
    return re.sub(r"[\[\]]", "", sentence)


def winobias_plain(docs):
    return [(plain(anti), plain(pro)) for pro, anti in winobias_pairs(docs)]


def choice_requests(docs):
    """Return four a pair of sentences: the right and the wrong occupation for pro-, for anti-."""
    lists = [(docs / "winobias" / f"{kind}_occupations.txt").read_text(encoding="utf8")
             for kind in ("male", "female")]
    occupations = [word for words in lists for word in words.lower().split("\n") if word]
    longest_first = sorted(occupations, key=len, reverse=True)
    name = re.compile(rf"\b(?:{'|'.join(longest_first)})\b", re.IGNORECASE)
    requests = []
    for pair in winobias_pairs(docs):
        asked = []
        for sentence in pair:
            referent, pronoun, *_ = re.findall(r"\[(.*?)\]", sentence)  # pronouns may follow
            right = (name.findall(referent) or [referent])[0]
            others = [word for word in name.findall(plain(sentence))
                      if word.lower() != right.lower()]
            context = f'{plain(sentence)}\nHere, what does "{pronoun}" stand for?'
            asked += [(context, f" The {word}") for word in (right, *others[:1])]
        if len(asked) == 4:  # two occupations were recognised in both sentences
            requests += asked
    return requests


def choice(model, tokenizer, requests):
    lls = np.array([ll for ll, _ in loglikelihood(model, tokenizer, requests)])
    right = lls[::2] > lls[1::2]
    return (right.reshape(-1, 2) @ [1.0, -1.0]).tolist()


def crows_pairs(docs):
    path = next(path for path in sorted((docs / "crows_pairs").glob("*.jsonl")))
    return [(text(doc, "sent_less"), text(doc, "sent_more"))
            for doc in read_jsonl(path) if text(doc, "bias_type") == "gender"]


def lambada_requests(docs):
    passages = [text(doc, "text").rsplit(" ", 1)
                for doc in read_jsonl(docs / "lambada_openai" / "test.jsonl")]
    return [(passage, " " + word) for passage, word in passages]


def lambada(model, tokenizer, requests):
    return [ll for ll, _ in loglikelihood(model, tokenizer, requests)]


MEASURES = {  # name: DOCS -> documents; (model, tokenizer, documents) -> values; folder of DOCS
    "heldout": (heldout_texts, heldout, "heldout"),
    "winogender": (winogender_pairs, differences, "winogender"),
    "winobias": (winobias_plain, differences, "winobias"),
    "choice": (choice_requests, choice, "winobias"),
    "crows_gender": (crows_pairs, differences, "crows_pairs"),
    "cost": (heldout_texts, cost, "heldout"),
    "lambada": (lambada_requests, lambada, "lambada_openai")}
