# Pythia-70M: 70,426,624 parameters. Source: models/70M/pythia-70m.yml of EleutherAI/pythia.
# Trained on 32 A100s (32 sequences a GPU). 9.2e+19 FLOPs: 8.5 A100-days at 40 % MFU.
# $ torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_70m.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 6, 512, 8
learning_rate = 1e-3
micro_batch_size = 32
