# Pythia-410M: 405,334,016 parameters. Source: models/410M/pythia-410m.yml of EleutherAI/pythia.
# Trained on 32 A100s (32 sequences a GPU). 7.3e+20 FLOPs: 67 A100-days at 40 % MFU.
# $ torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_410m.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 24, 1024, 16
learning_rate = 3e-4
micro_batch_size = 32
