"""What the models are asked, which terms stand for a question, which rows of text hold them.

Arithmetic: `Q:What is {x1} times {x2}? A:` (or plus), x1 in 0..99, x2 in 1..50, behind k shots
`Q:What is 3 times 4? A:12` with a blank line after each. They come from the 4,950 problems with
another x1, as lm-eval 0.3 drew them: for every x1 a random.Random(42) shuffles the 50 prompts, then
draws k + 1 for each of them, of which the first k are taken. TriviaQA: `Q:{question} A:`, its shots
`Q:... A: answer`.

Right is, as in the paper's code, if the first run of one to five digits in at most 16 greedy
tokens, up to a newline, is the answer; for TriviaQA, if at most 32 tokens without case, punctuation
and articles are an accepted answer. That leaps from nothing to something late; the log-probability
of the right answer (for a number of `12` and of ` 12`, added) moves long before.

Salient terms: Kandpal et al. 2023 (arXiv 2211.08411), whom the paper follows, link entities in
questions, answers and documents with a model, and call a document relevant if the question's
salient entity and the answer's are both in it; salient is the entity that is most often with the
answer. Here a term is plain words, compared without case and signs, the documents are rows of the
training order, as in the paper, and the salient term is chosen in the same way, after counting.
"""

import random
import re
from typing import NamedTuple

from tasks import digest, read_jsonl, text, texts, without_articles

OPERATIONS = {"times": lambda x1, x2: x1 * x2, "plus": lambda x1, x2: x1 + x2}
MOST_QUESTIONS = 10**5

# ---------------------------------------------------------------------------- questions


class Question(NamedTuple):
    id: str
    text: str
    value: str  # the answer as the data set prefers it
    aliases: tuple  # all accepted answers

    @property
    def terms(self):
        """The salient terms of the question, as words.

        They are its names, runs of capitalised words with "of" and "the" within, but for the first
        word, which is always capitalised; without any name, its longest word.
        """
        names = re.findall(r"\b[A-Z]\w*(?:(?: of| the)* [A-Z]\w*)*", self.text.partition(" ")[2])
        names = names or [max(re.findall(r"\w+", self.text), key=len, default="")]
        return [name for name in dict.fromkeys(map(words_of, names)) if len(name) > 2]

    @property
    def answers(self):
        """The accepted answers as words but for those of one or two letters: other words too."""
        answers = dict.fromkeys(map(words_of, (self.value, *self.aliases)))
        return [answer for answer in answers if len(answer) > 2]


def words_of(passage):
    """Return the words of a text, without case or signs, with one space between them."""
    return " ".join(re.findall(r"\w+", passage.casefold()))


def read_questions(path):
    """Return the questions of a TriviaQA file, or raise ValueError naming the line that is none."""
    questions = [Question(text(doc, "question_id"), text(doc, "question"),
                          text(doc, "answer.value"), tuple(texts(doc, "answer.aliases")))
                 for doc in read_jsonl(path)]
    if (len(questions) > MOST_QUESTIONS
            or len({question.id for question in questions}) < len(questions)):
        raise ValueError(f"{path}: expected at most {MOST_QUESTIONS:,} questions, all with "
                         "other ids")
    return questions


def hash_of(questions):
    """Return what tells these questions from others: the shots are drawn from all of them."""
    return digest(questions)


class QuestionIndex:
    """Finds all questions' terms and answers in a text; each is filed under its first two words."""

    def __init__(self, questions):
        self.filed = {}  # one or two words: {phrase: [(question, term number or -1 for an answer)]}
        for q, question in enumerate(questions):
            phrases = [*enumerate(question.terms), *((-1, answer) for answer in question.answers)]
            for number, phrase in phrases:
                start = " ".join(phrase.split(" ")[:2])
                self.filed.setdefault(start, {}).setdefault(phrase, []).append((q, number))

    def found(self, row):
        """Return the (question, term) pairs whose term and answer are both in the text of a row."""
        joined = words_of(row)
        words = joined.split(" ")
        pairs = [f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1)]
        present, padded = {*words, *pairs}, f" {joined} "
        terms, answered = [], set()
        for start in self.filed.keys() & present:
            for phrase, places in self.filed[start].items():
                # Most phrases miss a word here, which is found sooner than by searching the text.
                if phrase != start and not (present.issuperset(phrase.split(" "))
                                            and f" {phrase} " in padded):
                    continue
                terms += [place for place in places if place[1] >= 0]
                answered.update(question for question, term in places if term < 0)
        return [place for place in terms if place[0] in answered]


# ---------------------------------------------------------------------------- prompts


class Prompt(NamedTuple):
    term: str  # what is counted: x1, or the question's id
    item: str  # x2, or the hash of all questions
    text: str
    answers: tuple  # all that count as right
    continuations: tuple  # ways of saying the right answer, whose probabilities are added


def arithmetic(operation, shots, x1):
    """Return the 50 prompts of an x1, behind `shots` others each."""
    answer = OPERATIONS[operation]
    ask = lambda a, b: f"Q:What is {a} {operation} {b}? A:"
    pool = [(a, b) for a in range(100) if a != x1 for b in range(1, 51)]
    second, generator, prompts = list(range(1, 51)), random.Random(42), []
    generator.shuffle(second)
    for x2 in second:
        examples = generator.sample(pool, shots + 1)[:shots] if shots else []
        solved = "".join(f"{ask(a, b)}{answer(a, b)}\n\n" for a, b in examples)
        right = str(answer(x1, x2))
        prompts.append(Prompt(str(x1), str(x2), solved + ask(x1, x2), (right,),
                              (right, " " + right)))
    return prompts


def trivia(questions, shots):
    """Return a prompt for each question, behind `shots` others drawn from a random.Random(42)."""
    generator, prompts, item = random.Random(42), [], hash_of(questions)
    if len(questions) <= shots:
        raise ValueError(f"{len(questions)} questions are too few for {shots} shots")
    for question in questions:
        examples = [other for other in generator.sample(questions, shots + 1)
                    if other != question][:shots]
        solved = "".join(f"Q:{other.text} A: {other.value}\n\n" for other in examples)
        accepted = tuple(map(without_articles, (question.value, *question.aliases)))
        prompts.append(Prompt(question.id, item, f"{solved}Q:{question.text} A:", accepted,
                              (" " + question.value,)))
    return prompts


def given_answer(task, generated):
    """Return what a generated text answers, in the form of Prompt.answers."""
    if task == "triviaqa":
        return without_articles(generated)
    number = re.search(r"\d{1,5}", generated)
    return number[0] if number else ""
