# A small Llama on the State of the Union addresses since 1790, for two CPU cores: `make demo`.
#
# parameters   786,432 embedding + 3 x 442,752 blocks + 192 norm + 786,432 head = 2,901,312
#              (2,113,536 of them in matmuls)
# tokens       1,300 steps x 2,048 = 2,662,400: not quite one epoch of the 2.8 million for training
# compute      14,450,688 FLOPs per token -> 3.85e13 for the run: some seven minutes on two cores
# checkpoint   2,901,312 x 4 bytes x (weights + 2 moments) = 0.03 GB
#
#     python train.py config/demo.py

out_dir = "out/demo"
data_dir = "data/demo"

vocab_size = 4_096
dim = 192
n_layers = 3
n_heads = 3
hidden_dim = 512
context = 256

batch_size = 8
micro_batch_size = 8
max_steps = 1_300

learning_rate = 3e-3
warmup_steps = 100
dtype = "float32"  # bfloat16 gains nothing on a CPU

log_every = 20
eval_every = 200
eval_batches = 24  # 192 windows, 49,152 tokens
checkpoint_every = 200
