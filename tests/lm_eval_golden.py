"""What lm-evaluation-harness 0.4.13 itself says about a small model and awkward documents.

    pip install lm_eval==0.4.13
    python tests/lm_eval_golden.py tests/lm_eval_golden.json

tests/test_parity.py compares with the stored answers; `make parity` makes them anew first. The
model is trained (in float64, so that every machine gets the same) until it answers some requests
greedily: random weights never do, and would hide errors.
"""

import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
from checkpoints import save  # noqa: E402
from model import ModelConfig, Pythia  # noqa: E402
from tasks import TASKS  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train import make_optimizer, TrainConfig  # noqa: E402

ROOT = Path(__file__).parent.parent
# 5 shots are cut on the left.
CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_length=320)
WORDS = ("the cat sat on a mat and saw two old dogs while it rained in Paris but naïve "
         "e\u0301tudes of 世界 don't stop 😀 here 12 34 (so) \"quoted\" well-known x's").split()


def sentence(rng, n=8):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def documents(task, split, n):
    """Return n documents with a task's own fields: edge spaces, line breaks, empty texts,
    multi-byte ones.
    """
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


CASES = ("lambada_openai piqa winogrande wsc wsc273 arc_easy sciq logiqa hellaswag mmlu_anatomy "
         "crows_pairs_english arithmetic_2da triviaqa wikitext").split()


def write_documents(folder):
    """Write every task's splits where eval.py looks for them; return {task: {split: path}}."""
    paths = {}
    for task in CASES:
        paths[task] = {}
        for split in {TASKS[task].split, TASKS[task].pool or "test"}:
            name = TASKS[task].files[0] if TASKS[task].files else f"{split}.jsonl"
            paths[task][split] = path = Path(folder) / TASKS[task].folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(doc) + "\n" for doc in documents(task, split, 8)))
    return paths


def trained_model(folder, docs, tokenizer):
    """Train a model on some of the solved questions; save it as a checkpoint; return it in
    float32.
    """
    model = Pythia(CONFIG).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)
    rows = []
    for task, end in (("lambada_openai", ""), ("arithmetic_2da", ""), ("triviaqa", "\n")):
        [(_, questions)] = evaluation.prepare(task, docs).members
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
    save(folder, 0, model, untouched, {"updates": 0, "tokens": 0}, tokenizer.path)
    return model


def requests_hash(requests):
    """The texts themselves would be most of the file; a list of one a request names the first that
    differs.
    """
    return [hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:8] for texts in requests]


def answers(lm, manager, paths, task, shots):
    """Return what lm_eval says: requests' hash, log-likelihoods, greedy flags or texts, metrics."""
    import lm_eval
    files = {split: str(path) for split, path in paths[task].items()}
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


def main(output):
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        paths = write_documents(f"{folder}/docs")
        trained_model(f"{folder}/run", f"{folder}/docs", Tokenizer(ROOT / "20B_tokenizer.json"))
        lm = HFLM(pretrained=f"{folder}/run/step0", dtype="float32", device="cpu", batch_size=3)
        manager = TaskManager()
        lines = []
        for task in CASES:
            for shots in (0, 5) if TASKS[task].pool else (0,):
                said = answers(lm, manager, paths, task, shots)
                lines.append(f'"{task} {shots}": {json.dumps(said, ensure_ascii=False)}')
                Path(output).write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1])
