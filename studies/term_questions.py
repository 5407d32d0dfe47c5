"""TriviaQA's questions, the terms that stand for them, and the rows of training text that hold them.

Kandpal et al. 2023 (arXiv 2211.08411), whom the paper follows, link entities in questions, answers and
documents with a model and call a document relevant if the question's salient entity and the answer's are
both in it; salient is the entity that is most often with the answer. Here a term is plain words, compared
without case and signs, the "documents" are rows of the training order, as in the paper, and the salient
term is chosen in the same way, after counting.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

MOST_QUESTIONS = 10**5


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    value: str  # the answer as the data set prefers it
    aliases: tuple  # all accepted answers

    @property
    def terms(self):
        """The salient terms of the question, as words.

        They are its names, runs of capitalised words with "of" and "the" within, but for the first word,
        which is always capitalised; without any name, its longest word.
        """
        names = re.findall(r"\b[A-Z]\w*(?:(?: of| the)* [A-Z]\w*)*", self.text.partition(" ")[2])
        names = names or [max(re.findall(r"\w+", self.text), key=len, default="")]
        return [name for name in dict.fromkeys(map(words_of, names)) if len(name) > 2]

    @property
    def answers(self):
        """The accepted answers as words, those of one or two letters left out: they are other words too."""
        answers = dict.fromkeys(map(words_of, (self.value, *self.aliases)))
        return [answer for answer in answers if len(answer) > 2]


def words_of(text):
    """Return the words of a text, without case or signs, with one space between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_questions(path):
    """Return the questions of a TriviaQA file, or raise ValueError naming the line that is none."""
    questions = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            answer = record["answer"]
            question = Question(record["question_id"], record["question"], answer["value"],
                                tuple(answer["aliases"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            question = None
        if question is None or not all(isinstance(text, str) for text in (
                question.id, question.text, question.value, *question.aliases)):
            raise ValueError(f"{path}, line {number}: not a TriviaQA question (question_id, question, "
                             "answer with value and aliases)")
        questions.append(question)
    if not questions or len(questions) > MOST_QUESTIONS:
        raise ValueError(f"{path}: holds {len(questions):,} questions, expected 1 to {MOST_QUESTIONS:,}")
    return questions


class QuestionIndex:
    """Finds the terms and answers of all questions in a text; each is filed under its first two words."""

    def __init__(self, questions):
        self.filed = {}  # one or two words: {phrase: [(question, term number or -1 for an answer)]}
        for q, question in enumerate(questions):
            for b, phrase in (*enumerate(question.terms), *((-1, answer) for answer in question.answers)):
                under = self.filed.setdefault(" ".join(phrase.split(" ")[:2]), {})
                under.setdefault(phrase, []).append((q, b))

    def found(self, text):
        """Return the (question, term) pairs whose term and answer are both in the text."""
        text = words_of(text)
        words, padded, terms, answered = text.split(" "), f" {text} ", [], set()
        present = {*words, *map(" ".join, zip(words, words[1:]))}
        for start in self.filed.keys() & present:
            for phrase, places in self.filed[start].items():
                # Few phrases have all their words in the text, and searching it is dear.
                if phrase == start or present.issuperset(phrase.split(" ")) and f" {phrase} " in padded:
                    terms += [place for place in places if place[1] >= 0]
                    answered.update(q for q, b in places if b < 0)
        return [place for place in terms if place[0] in answered]
