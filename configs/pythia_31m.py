# Pythia-31M: 30,494,720 parameters. Source: models/31M/pythia-31m.yml of EleutherAI/pythia.
# Trained on 32 A100s (32 sequences a GPU). 3.7e+19 FLOPs: 3.5 A100-days at 40 % MFU.
# There is no published deduped 31M.
# $ torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_31m.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 6, 256, 8
learning_rate = 1e-3
micro_batch_size = 32
