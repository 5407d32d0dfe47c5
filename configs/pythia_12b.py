# Pythia-12B: 11,846,072,320 parameters. Source: models/12B/pythia-12b.yml of EleutherAI/pythia.
# Trained on 256 A100s (8 sequences a GPU, tensor parallel 4). 2.2e+22 FLOPs: 1,996 A100-days at
# 40 % MFU.
# Layers and heads: pythia-12b-deduped.yml has them swapped (40 layers, 36 heads do not divide
# 5120), and pythia-12b.yml lacks a comma. The released model has 36 layers and 40 heads.
# $ torchrun --nnodes=32 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_12b.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 36, 5120, 40
vocab_size = 50688  # padded to 128 * 4 tensor-parallel ranks
init = "normal"  # the YAML names none: gpt-neox's default
learning_rate = 1.2e-4
micro_batch_size = 8
# Where the original has tensor parallel and ZeRO 1.
sharding, activation_checkpointing = "fsdp", True
