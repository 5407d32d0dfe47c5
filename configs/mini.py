# A miniature Pythia for the demo: minutes on two CPU cores. 512 steps of 8 x 256 tokens.
# $ python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
n_layers, d_model, n_heads = 3, 64, 4
seq_length = 256
batch_size = 8
micro_batch_size = 8
steps = 512
learning_rate = 2e-3
log_every = 32
