# Pythia-2.8B: 2,775,208,960 parameters. Source: models/2.8B/pythia-2.8b.yml of EleutherAI/pythia.
# Trained on 64 A100s (16 sequences a GPU). 5.1e+21 FLOPs: 469 A100-days at 40 % MFU.
# $ torchrun --nnodes=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_2_8b.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 32, 2560, 32
learning_rate = 1.6e-4
micro_batch_size = 16
sharding = "fsdp"  # where the original has ZeRO 1; with ddp it needs more than 40 GB a GPU
