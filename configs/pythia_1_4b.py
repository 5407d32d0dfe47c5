# Pythia-1.4B: 1,414,647,808 parameters. Source: models/1.4B/pythia-1.4b.yml of EleutherAI/pythia.
# Trained on 64 A100s (16 sequences a GPU). 2.5e+21 FLOPs: 236 A100-days at 40 % MFU.
# $ torchrun --nnodes=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_1_4b.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 24, 2048, 16
learning_rate = 2e-4
micro_batch_size = 16
