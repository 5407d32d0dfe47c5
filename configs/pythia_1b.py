# Pythia-1B: 1,011,781,632 parameters. Source: models/1B/pythia-1b.yml of EleutherAI/pythia.
# Trained on 64 A100s (16 sequences a GPU). 1.8e+21 FLOPs: 163 A100-days at 40 % MFU.
# Rate: the YAML and the v0 run say 2.5e-4, the README, model card and paper 3e-4; the YAML is
# what ran.
# Precision: the YAML says fp16, the released standard model is bf16, its deduped twin fp16.
# $ torchrun --nnodes=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#       --nproc_per_node=8 train.py configs/pythia_1b.py --out_dir=RUN
from configs.pythia import *

n_layers, d_model, n_heads = 16, 2048, 8
learning_rate = 2.5e-4
micro_batch_size = 16
dtype = "bfloat16"
