"""Two processes of torchrun score rows together; each prints its share and the number of batches.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/score_ranks.py
"""

import random

import torch.distributed as dist

import eval as evaluation
from model import ModelConfig, Pythia

if __name__ == "__main__":
    model = Pythia(ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=512, seq_length=64))
    rng = random.Random(0)
    rows = [([rng.randrange(512) for _ in range(rng.randrange(2, 90))], 1) for _ in range(50)]
    alone = evaluation.score(model, rows, 200)
    dist.init_process_group("gloo")
    together = evaluation.score(model, rows, 200)
    assert all(abs(a - b) < 1e-4 and g == h
               for (a, g), (b, h) in zip(alone, together, strict=True))
    batches = evaluation.plan([(i, *row) for i, row in enumerate(rows)], 64, 200)
    print(f"equal {len(evaluation._mine(batches))} {len(batches)}\n", end="")  # one write
    dist.destroy_process_group()
