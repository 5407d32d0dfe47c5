"""What lm-evaluation-harness 0.3.0 itself asks about documents, and what it makes of the answers.

    pip install datasets tokenizers && pip install --no-deps --target=DIR lm_eval==0.3.0
    PYTHONPATH=DIR python tests/lm_eval_v03_golden.py tests/lm_eval_v03_golden.json PYTHIA_DATA

tests/test_parity_v03.py compares with the stored answers; `make parity` makes them anew first.
Documents are "made", lm_eval_golden.py's awkward ones, and "real", those in the folder PYTHIA_DATA
(without it, their answers stay). The harness's own evaluator.evaluate runs on them, with a model
that answers each request by its hash. Kept are a hash of each document's requests, shots included,
with their token ids, and all metrics and errors.

0.3.0 is of December 2022. The paper's files come from some months later: model `hf-causal`, unknown
to 0.3.0, but all tasks still at version 0. crows_pairs_english* came in between, so 0.3.0 can't be
asked about it.
"""

import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock, patch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tasks import V03_TASKS  # noqa: E402
from lm_eval_golden import CASES, documents  # noqa: E402

ROOT = Path(__file__).parent.parent
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
    return {split: lines(folder / (ours.files or [f"{split}.jsonl"])[0])
            for split in {ours.split, ours.pool}}


def winograd_schema(i, sentence, _, candidates, answer):
    """The text file hides the pronoun, so that it is made up; any will do to compare."""
    options = [option.strip() for option in candidates.split(",")]
    return {"text": sentence.replace("[MASK]", pronoun := ("it", "they", "his", "Her")[i % 4]),
            "pronoun": pronoun, "pronoun_loc": sentence.index("[MASK]"), "options": options,
            "label": options.index(answer.strip())}


def made_documents(task):
    """Return {split: documents} that are nobody's."""
    source = task.replace("hendrycksTest-", "mmlu_")
    return {split: documents(source, split, 24)
            for split in {V03_TASKS[task].split, V03_TASKS[task].pool or "test"}}


def write(folder, task, splits):
    """Write documents where eval.py looks for them."""
    for split, docs in splits.items():
        path = (Path(folder) / V03_TASKS[task].folder
                / (V03_TASKS[task].files or [f"{split}.jsonl"])[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf8")


def answer(*texts):
    """Return the (log-likelihood, is_greedy) that stands for a model's; equal ones occur."""
    number = int(hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8], 16)
    return -(number % 24) / 4 - 1, number % 3 == 0


def question_hash(asked):
    """asked: [(texts, (token ids of context and continuation, number of the latter))], in any
    order.
    """
    return hashlib.sha256(json.dumps(sorted(dict(asked).items())).encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------- the harness


def as_its_hub(task, docs, folder):
    """Return rows as 0.3.0's own loading script or the hub's makes them of the distributed
    documents.
    """
    import lm_eval.datasets.arithmetic.arithmetic as arithmetic
    import lm_eval.datasets.logiqa.logiqa as logiqa
    path = f"{folder}/distributed"
    if task.startswith("arithmetic"):
        Path(path).write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf8")
        return [row for _, row in arithmetic.Arithmetic._generate_examples(None, path, "")]
    if task == "logiqa" and docs[0]["options"][0].startswith("A."):
        Path(path).write_text("\n\n".join(
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


def ask(task, shots, splits, folder):
    """Return the harness's question hashes and metrics."""
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
        lm=Model(), task_dict={task: theirs}, num_fewshot=shots, limit=LIMIT,
        bootstrap_iters=BOOTSTRAP)["results"][task]
    hashes = [question_hash([(texts, Model.tokens[texts]) for texts in those]) for those in asked]
    return {"questions": " ".join(hashes),
            "metrics": {name: float(value) for name, value in results.items()}}


def main(output, data=""):
    assert version("lm_eval") == "0.3.0", (
        f"lm_eval is {version('lm_eval')}, expected 0.3.0 (see above)")
    sys.modules |= {name: MagicMock() for name in UNUSED}
    import lm_eval.evaluator
    for name in UNUSED:
        del sys.modules[name]
    stored = {} if data else json.loads(Path(output).read_text())
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, task in [("made", task) for task in MADE] + [("real", task) for task in REAL]:
            for shots in (0, 5) if V03_TASKS[task].pool else (0,):
                case = f"{kind} {task} {shots}"
                if kind == "made":
                    said[case] = ask(task, shots, made_documents(task), folder)
                else:
                    said[case] = (ask(task, shots, real_documents(data, task), folder) if data
                                  else stored[case])
    Path(output).write_text("{" + ",\n".join(
        f'"{case}": {json.dumps(those)}' for case, those in said.items()) + "}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
