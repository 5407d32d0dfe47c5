# A miniature Pythia for the demo: 6.6M parameters, 512 steps of 4 x 256 = 1024 tokens.
# Cost and result: about 4 minutes on two CPU cores, 1.8 held-out bits per byte.
# $ python train.py configs/mini.py --out_dir=runs/mini
n_layers, d_model, n_heads = 3, 64, 4
seq_length = 256
batch_size = 4
micro_batch_size = 4
steps = 512
learning_rate = 5e-3
log_every = 32
data = "data/demo/train"
