# Pythia-160M: 162,322,944 parameters. Source: models/160M/pythia-160m.yml of EleutherAI/pythia.
# Trained on 32 A100s (32 sequences a GPU). 2.6e+20 FLOPs: 24 A100-days at 40 % MFU.
# $ torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_160m.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 12, 768, 12
learning_rate = 6e-4
micro_batch_size = 32
