# Pythia-14M: 14,067,712 parameters. Source: models/14M/pythia-14m.yml of EleutherAI/pythia.
# Trained on 32 A100s (32 sequences a GPU). 1.7e+19 FLOPs: 1.5 A100-days at 40 % MFU.
# The YAML has the tanh GELU and no activation checkpointing; there is no published deduped 14M.
# $ torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_14m.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 6, 128, 4
learning_rate = 1e-3
micro_batch_size = 32
