"""Measure ourselves beside what one would pick instead, alternating in one run on one machine.

    python bench.py train --size=14m
    python bench.py start --data=data/demo/train
    python bench.py growth --output=growth.csv && python plots.py growth --csv=growth.csv
    python bench.py tokenize --input=data/demo/train.jsonl
    python bench.py find --data=data/demo/train
    python bench.py checkpoints --size=160m
    python bench.py memorization --size=70m
    python bench.py eval --docs=DIR          # needs lm_eval and accelerate

train: a full optimizer step (forward, backward, clip, fused AdamW) of our model and of
    transformers' GPTNeoXForCausalLM, eager and compiled, float32 on the CPU. Each contender has a
    process of its own, so that peak memory is its own too, and they take turns, so that a noisy
    machine is noisy to all. Ours keep freed memory, as train.py has them do; transformers runs as
    one gets it. glibc gives all the same with
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 python bench.py train
    With it, at 14m and 70m, ours is 1.01 to 1.09 times as fast in 0.26 to 0.55 of the memory: both
    spend 94 % of a 70m's step in the same matmuls and attention.
start: seconds from the command to the end of the first step, and reading a batch beside computing
    it.
growth: time and memory of a step as width, depth, length and batch double, beside what is expected.
    Two cores: from width 256 up a token's time follows its FLOPs within 25 %; memory is 2.5 times
    the plan's at width 64 and 1.26 times at 512 (at 14m and 70m within 15 %: tests).
tokenize: documents to ids on one core, ours and the tokenizers library's, whose ids must be the
    same.
find: a text searched in a token file of --gigabytes, the given one over and over.
memorization: rows scored for (32, 32), beside transformers' generate; rows that miss at once, and
    rows that the model continues rightly to the end, the worst case.
checkpoints: float32 weights to the disk (ours hashes them too), and published float16 ones into a
    model.
"""

import os
import sys

from benchmarks import checkpoints, corpora, evaluation, training
from config import command

if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # configs are named from here
    command(sys.argv[1:], {
        "train": (training.Train, training.train), "worker": (training.Worker, training.worker),
        "start": (training.Start, training.start), "growth": (training.Growth, training.growth),
        "tokenize": (corpora.Tokenize, corpora.tokenize), "find": (corpora.Find, corpora.find),
        "checkpoints": (checkpoints.Checkpoints, checkpoints.checkpoints),
        "eval": (evaluation.Eval, evaluation.evaluation),
        "memorization": (evaluation.Memorization, evaluation.memorization)})
