# Pythia-6.9B: 6,857,302,016 parameters. Source: models/6.9B/pythia-6.9b.yml of EleutherAI/pythia.
# Trained on 128 A100s (8 sequences a GPU, tensor parallel 2). 1.2e+22 FLOPs: 1,154 A100-days at
# 40 % MFU.
# $ torchrun --nnodes=16 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_6_9b.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 32, 4096, 32
vocab_size = 50432  # padded to 128 * 2 tensor-parallel ranks
init = "normal"  # the YAML names none: gpt-neox's default
learning_rate = 1.2e-4
micro_batch_size = 8
# Where the original has tensor parallel and ZeRO 1.
sharding, activation_checkpointing = "fsdp", True
