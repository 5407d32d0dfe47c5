"""What lm-evaluation-harness 0.4.13 and 0.3.0 themselves say; tests/test_parity.py compares.

    pip install lm_eval==0.4.13
    python tests/lm_eval_golden.py tests/lm_eval_golden.json
    pip install datasets tokenizers && pip install --no-deps --target=DIR lm_eval==0.3.0
    PYTHONPATH=DIR python tests/lm_eval_golden.py tests/lm_eval_v03_golden.json PYTHIA_DATA

`make parity` makes both files anew. 0.4.13 is asked about awkward documents with a small model,
trained (in float64, so that every machine gets the same) until it answers some requests greedily:
random weights never do, and would hide errors.

0.3.0 is asked about these, "made", and about the "real" ones in the folder PYTHIA_DATA (without it,
their answers stay). Its own evaluator.evaluate runs on them, with a model that answers each request
by its hash. Kept are a hash of each document's requests, shots included, with their token ids, and
all metrics and errors. crows_pairs_english came after it.
"""

import hashlib
import json
import os
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
from checkpoints import save  # noqa: E402
from conftest import ROOT, write_jsonl  # noqa: E402
from model import ModelConfig, Pythia  # noqa: E402
from tasks import TASKS, V03_TASKS  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train import make_optimizer, TrainConfig  # noqa: E402

CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_length=320)  # cuts 5 shots on the left
WORDS = ("the cat sat on a mat and saw two old dogs while it rained in Paris but naïve "
         "e\u0301tudes of 世界 don't stop 😀 here 12 34 (so) \"quoted\" well-known x's").split()
CASES = ("lambada_openai piqa winogrande wsc wsc273 arc_easy sciq logiqa hellaswag mmlu_anatomy "
         "crows_pairs_english arithmetic_2da triviaqa wikitext").split()
LIMIT = 40  # documents a task
BOOTSTRAP = 1000  # draws

MADE = [task.replace("mmlu_", "hendrycksTest-") for task in CASES if task != "crows_pairs_english"]
REAL = ("lambada_openai piqa winogrande wsc wsc273 arc_easy arc_challenge sciq logiqa hellaswag "
        "triviaqa hendrycksTest-abstract_algebra hendrycksTest-anatomy "
        "hendrycksTest-high_school_european_history hendrycksTest-moral_scenarios").split() + [
        task for task in V03_TASKS if task.startswith("arithmetic")]

# Where PYTHIA_DATA lacks a split, every second document of another stands for it.
HALVED = {"piqa": "validation", "winogrande": "xl_validation", "arc_easy": "validation",
          "arc_challenge": "validation", "sciq": "validation", "logiqa": "test",
          "hellaswag": "validation_first2500",
          "triviaqa": "rc_wikipedia_nocontext_validation_first2000"}

# What 0.3.0 imports for other tasks and models; some of it exists no more.
UNUSED = ("jsonlines openai pycountry rouge_score sacrebleu sklearn sklearn.metrics sqlitedict "
          "transformers transformers.data transformers.data.metrics "
          "transformers.data.metrics.squad_metrics").split()


def sentence(rng, n=8):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def documents(task, split, n):
    """Return n documents with a task's own fields, and edge spaces, line breaks, empty texts."""
    rng = random.Random(f"{task} {split}")
    edge = lambda text: rng.choice(["{}", " {}", "{} ", "{}  ", "\n{}", "{}\n"]).format(text)
    label = lambda n_choices: rng.randrange(n_choices)
    make = {
        "lambada_openai": lambda: {
            "text": sentence(rng, 6) + rng.choice([" ", "\n", "  "])
                    + rng.choice(["\nhe said signs", "the dogs", "of 世界", "mat"])},
        "piqa": lambda: {"goal": edge(sentence(rng)), "sol1": edge(sentence(rng, 3)),
                         "sol2": edge(sentence(rng, 5)), "label": label(2)},
        "winogrande": lambda: {
            "sentence": f"{sentence(rng, 4)} _{rng.choice([' ', ', ', chr(39) + 's '])}"
                        + edge(sentence(rng, 3)),
            "option1": "cat", "option2": "the dogs", "answer": rng.choice("12")},
        "wsc": lambda: {
            "text": "The cat saw the dog , but it did n't stop ( so it rained ) .",
            "span1_index": 1, "span1_text": rng.choice(["cat", "dog"]), "span2_index": 6,
            "span2_text": "it", "idx": label(9), "label": label(2)},
        "wsc273": lambda: {
            "text": "The cat met the dog.  It was in his  house.", "pronoun": "his",
            "pronoun_loc": 32, "options": rng.sample(["The cat", "The dog", "My The cat"], 2),
            "label": label(2)} if rng.random() < 0.5 else {
            "text": "The cat feared the dog because it barked at dawn.", "pronoun": "it",
            "pronoun_loc": 31, "options": ["The cat", "the dog"], "label": label(2)},
        "arc_easy": lambda: {
            "id": sentence(rng, 2), "question": edge(sentence(rng)),
            "choices": {"text": [sentence(rng, k + 1) for k in range(4)],
                        "label": [*rng.choice(["ABCD", "1234"])]}},
        "sciq": lambda: {
            "support": rng.choice(["", " " + sentence(rng), "\n" + sentence(rng),
                                   sentence(rng, 400)]),
            "question": sentence(rng), **{name: sentence(rng, 2) for name in (
                "distractor1", "distractor2", "distractor3", "correct_answer")}},
        "logiqa": lambda: {
            "label": rng.choice("abcd"), "context": sentence(rng), "question": sentence(rng),
            "options": [sentence(rng, k + 1) for k in range(4)]},
        "hellaswag": lambda: {
            "activity_label": "Roof", "ctx_a": sentence(rng) + " [header] x",
            "ctx_b": rng.choice(["", "he Said", "[substeps] no"]), "label": str(label(4)),
            "endings": [edge(rng.choice(["a [title] b [step] c", "[x] is", "é  é"])
                             + sentence(rng, 2)) for _ in range(4)]},
        "mmlu_anatomy": lambda: {
            "question": edge(sentence(rng)), "subject": "anatomy", "answer": label(4),
            "choices": [sentence(rng, 2) for _ in range(4)]},
        "crows_pairs_english": lambda: {
            "sent_more": edge(sentence(rng)), "sent_less": sentence(rng),
            "bias_type": rng.choice(["gender", "age"])},
        "arithmetic_2da": lambda: {"context": f"\n\nQ: What is {label(20)} plus {label(20)}?\n\nA:",
                                   "completion": f" {label(4)}"},
        "triviaqa": lambda: {"question": sentence(rng, 5), "answer": {"aliases": [
            sentence(rng, 1), "The Cat!", "two"], "value": "two"}},
        "wikitext": lambda: {"page": rng.choice([" = Title = \n ", "", "s ' "]) + edge(sentence(
            rng, rng.choice([3, 30, 700]))) + " ( a ) , b . c @-@ d \" e \" 5 @.@ 1 N ' f ' "},
    }
    made = [make[task]() for _ in range(n)]
    for doc in made:
        if task == "arc_easy":
            doc["answerKey"] = rng.choice(doc["choices"]["label"])
    # Copies of a document in the pool of its shots: they must leave out every one.
    if TASKS[task].split == "validation" and split == TASKS[task].pool == "train":
        return made + [documents(task, "validation", n)[0]]
    return made + [made[0]] if split == "validation" else made


def write_documents(folder, task, splits):
    """Write {split: documents} where eval.py looks for them; return {split: path}."""
    paths = {split: Path(folder) / task.folder / (task.file or f"{split}.jsonl")
             for split in splits}
    for split, path in paths.items():
        write_jsonl(path, splits[split])
    return paths


def made_documents(name, task, n):
    """Return {split: documents} of a task of either style; `name` is v0.4's."""
    return {split: documents(name, split, n) for split in {task.split, task.pool or "test"}}


# ---------------------------------------------------------------------------- 0.4.13


def trained_model(folder, docs, tokenizer):
    """Train a model on some solved questions, save it as a checkpoint, return it in float32."""
    model = Pythia(CONFIG).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)
    rows = []
    for task, end in (("lambada_openai", ""), ("arithmetic_2da", ""), ("triviaqa", "\n")):
        [questions] = evaluation.Job(task, docs).members.values()
        solved = [question.shot if end else "".join(question.requests[0])
                  for question in questions[::2]]
        rows += [tokenizer.encode_lines(text + end)[-24:] for text in solved]
    tokens = torch.tensor([row + [0] * (24 - len(row)) for row in rows])
    # Before the answers' tokens.
    scored = torch.tensor([[len(row) - 5 + i for i in range(4)] for row in rows])
    for _ in range(50):
        hidden = model.hidden(tokens).take_along_dim(scored[..., None], 1).flatten(0, 1)
        loss = F.cross_entropy(hidden @ model.embed_out.weight.T,
                               tokens.gather(1, scored + 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = model.float().eval()
    Path(folder).mkdir()
    untouched = make_optimizer(model, TrainConfig(data="", out_dir="", learning_rate=1e-3))
    save(folder, 0, model, untouched, {"updates": 0, "tokens": 0}, ROOT / "20B_tokenizer.json")
    return model


def requests_hash(requests):
    """Return a hash of each request's texts, which would be most of the file."""
    return [hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:8] for texts in requests]


def answers(lm, manager, paths, task, shots):
    """Return what lm_eval says: requests' hash, log-likelihoods, greedy flags or texts, metrics."""
    import lm_eval
    files = {split: str(path) for split, path in paths.items()}
    absent = {f"{field}_split": None
              for field, split in (("training", "train"), ("validation", "validation"))
              if split not in files}
    theirs = manager._factory.build(  # the registered task, reading our documents
        manager.task_index[task], registry=manager.task_index, overrides={
            "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": files}} | absent)
    out = lm_eval.simple_evaluate(lm, tasks=[theirs], num_fewshot=shots, log_samples=True,
                                  bootstrap_iters=1000)
    samples = sorted(out["samples"][task], key=lambda sample: sample["doc_id"])
    arguments = [argument for sample in samples for argument in sample["arguments"]]
    results = [response for sample in samples for [response] in sample["resps"]]
    texts = [argument[:2] if isinstance(argument[1:] and argument[1], str) else argument[:1]
             for argument in arguments]
    metrics = {name.split(",")[0]: value for name, value in out["results"][task].items()
               if "," in name}
    return {"requests": requests_hash(texts), "results": results, "metrics": metrics}


def ask_v04(folder):
    """Return {case: answers} of 0.4.13."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    paths = {task: write_documents(f"{folder}/docs", TASKS[task],
                                   made_documents(task, TASKS[task], 8)) for task in CASES}
    trained_model(f"{folder}/run", f"{folder}/docs", Tokenizer(ROOT / "20B_tokenizer.json"))
    lm = HFLM(pretrained=f"{folder}/run/step0", dtype="float32", device="cpu", batch_size=3)
    manager = TaskManager()
    return {f"{task} {shots}": answers(lm, manager, paths[task], task, shots)
            for task in CASES for shots in ((0, 5) if TASKS[task].pool else (0,))}


# ---------------------------------------------------------------------------- 0.3.0


def lines(path):
    return [json.loads(line) for line in path.open(encoding="utf8")]


def real_documents(data, task):
    """Return {split: documents} of a task from the folder PYTHIA_DATA."""
    ours, folder = V03_TASKS[task], Path(data) / V03_TASKS[task].folder
    if task in HALVED:
        docs = lines(folder / f"{HALVED[task]}.jsonl")
        return {ours.split: docs[::2], "train": docs[1::2]}
    if task == "lambada_openai":  # few: a document is drawn as its own shot now and then
        return {"test": lines(folder / "test.jsonl")[:LIMIT + 20]}
    if task == "wsc":  # few: spans not in the text, which wsc.fixed repairs, are asked about
        return {"validation": lines(folder / "val.jsonl")[:LIMIT + 20],
                "train": lines(folder / "train.jsonl")}
    if task == "wsc273":
        return {"test": [winograd_schema(i, *block.split("\n")[:4]) for i, block in enumerate(
            (folder / "wsc273.txt").read_text(encoding="utf8").strip().split("\n\n"))]}
    return {split: lines(folder / (ours.file or f"{split}.jsonl"))
            for split in {ours.split, ours.pool}}


def winograd_schema(i, sentence, _, candidates, answer):
    """The text file hides the pronoun, so that it is made up; any will do to compare."""
    options = [option.strip() for option in candidates.split(",")]
    return {"text": sentence.replace("[MASK]", pronoun := ("it", "they", "his", "Her")[i % 4]),
            "pronoun": pronoun, "pronoun_loc": sentence.index("[MASK]"), "options": options,
            "label": options.index(answer.strip())}


def splits_of(case, data):
    """Return {split: documents} that a case such as "made piqa 5" asks about."""
    kind, task, _ = case.split()
    if kind == "real":
        return real_documents(data, task)
    return made_documents(task.replace("hendrycksTest-", "mmlu_"), V03_TASKS[task], 24)


def answer(*texts):
    """Return what stands for a model's (log-likelihood, is_greedy); equal ones occur."""
    number = int(hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8], 16)
    return -(number % 24) / 4 - 1, number % 3 == 0


def question_hash(asked):
    """asked: [(texts, (ids of context and continuation, number of the latter))], in any order."""
    return hashlib.sha256(json.dumps(sorted(dict(asked).items())).encode()).hexdigest()[:8]


def as_its_hub(task, docs, folder):
    """Return rows as 0.3.0's own loading script or the hub's makes them of published documents."""
    import lm_eval.datasets.arithmetic.arithmetic as arithmetic
    import lm_eval.datasets.logiqa.logiqa as logiqa
    path = Path(folder) / "distributed"
    if task.startswith("arithmetic"):
        write_jsonl(path, docs)
        return [row for _, row in arithmetic.Arithmetic._generate_examples(None, path, "")]
    if task == "logiqa" and docs[0]["options"][0].startswith("A."):
        path.write_text("\n\n".join(
            "\n".join([doc["label"], doc["context"], doc["question"], *doc["options"]])
            for doc in docs), encoding="utf8")
        return [row for _, row in logiqa.Logiqa._generate_examples(None, path, "")]
    if task == "wsc":
        return [{**doc, **doc.get("target", {}), "label": int(doc["label"])} for doc in docs]
    if task == "triviaqa":
        return [{"question": doc["question"],
                 "answer": {name: doc["answer"][name] for name in ("aliases", "value")}}
                for doc in docs]
    subject = task.removeprefix("hendrycksTest-")
    return [doc for doc in docs if subject == task or doc["subject"] == subject]


def ask(case, splits, folder):
    """Return the harness's question hashes and metrics."""
    _, task, shots = case.split()
    import datasets
    import lm_eval.base
    import lm_eval.evaluator
    import lm_eval.tasks
    import tokenizers

    class Model(lm_eval.base.BaseLM):
        vocab_size = max_length = max_gen_toks = batch_size = device = \
            tok_decode = _model_call = _model_generate = None
        eot_token_id = 0
        encoder = tokenizers.Tokenizer.from_file(str(ROOT / "20B_tokenizer.json"))
        tokens = {}

        def tok_encode(self, string):
            return self.encoder.encode(string, add_special_tokens=False).ids

        def _loglikelihood_tokens(self, requests):
            for texts, context, continuation in requests:
                self.tokens[texts] = context + continuation, len(continuation)
            return [answer(*texts) for texts, _, _ in requests]

        def loglikelihood_rolling(self, requests):
            self.tokens |= {texts: () for texts in requests}
            return [answer(*texts)[0] for texts in requests]

    rows = {split: datasets.Dataset.from_list(as_its_hub(task, docs, folder))
            for split, docs in splits.items()}
    if task == "lambada_openai":
        rows["validation"] = rows.pop("test")
    with patch.object(lm_eval.base.Task, "download",
                      lambda self, *_: setattr(self, "dataset", rows)):
        theirs = lm_eval.tasks.TASK_REGISTRY[task]()
    asked, construct = [], theirs.construct_requests

    def construct_requests(doc, context):
        requests = construct(doc, context)
        asked.append({r.args for r in (
            requests if isinstance(requests, (list, tuple)) else [requests])})
        return requests

    theirs.construct_requests = construct_requests
    results = lm_eval.evaluator.evaluate(
        lm=Model(), task_dict={task: theirs}, num_fewshot=int(shots), limit=LIMIT,
        bootstrap_iters=BOOTSTRAP)["results"][task]
    hashes = [question_hash([(texts, Model.tokens[texts]) for texts in those]) for those in asked]
    return {"questions": " ".join(hashes),
            "metrics": {name: float(value) for name, value in results.items()}}


def ask_v03(folder, data, stored):
    """Return {case: answers} of 0.3.0; without `data`, the stored answers about real documents."""
    assert version("lm_eval") == "0.3.0", version("lm_eval")
    sys.modules |= {name: MagicMock() for name in UNUSED}
    import lm_eval.evaluator
    for name in UNUSED:
        del sys.modules[name]
    cases = [f"{kind} {task} {shots}" for kind, tasks in (("made", MADE), ("real", REAL))
             for task in tasks for shots in ((0, 5) if V03_TASKS[task].pool else (0,))]
    return {case: stored[case] if case.startswith("real") and not data
            else ask(case, splits_of(case, data), folder) for case in cases}


def main(output, data=""):
    stored = json.loads(Path(output).read_text()) if os.path.exists(output) else {}
    with tempfile.TemporaryDirectory() as folder:
        if version("lm_eval") == "0.4.13":
            said = ask_v04(folder)
        else:
            said = ask_v03(folder, data, stored)
    Path(output).write_text("{" + ",\n".join(
        f'"{case}": {json.dumps(those, ensure_ascii=False)}' for case, those in said.items())
        + "}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
