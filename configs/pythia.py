# What all sizes of the suite share (models/*/*.yml of EleutherAI/pythia): 143,000 steps of
# 1024 x 2048 = 2,097,152 tokens, 299,892,736,000 in all, on the Pile or the deduplicated Pile.
seq_length = 2048
batch_size = 1024
steps = 143000
warmup = 0.01
min_lr_ratio = 0.1
weight_decay = 0.1
beta1, beta2, eps = 0.9, 0.95, 1e-8
clip_norm = 1.0
checkpoint_every = 1000
dtype = "float16"
gelu = "tanh"
# The Pile as published in training order: EleutherAI/pile-standard-pythia-preshuffled.
data = "data/pile/document"
