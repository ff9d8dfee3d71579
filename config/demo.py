# A small Llama on the State of the Union addresses, 1790 to now, for the CPU of a laptop: `make demo`.
#
# parameters   1,048,576 embedding + 4 x 803,328 blocks + 256 norm + 1,048,576 head = 5,310,720
#              (4,259,840 of them in matmuls)
# tokens       2.8 million in the training shards; the run reads 800 x 2,048 = 1,638,400 of them
# compute      28,704,768 FLOPs per token -> 4.70e13 for the run: some eight minutes on two cores
# checkpoint   5,310,720 x 4 bytes x (weights + 2 moments) = 0.06 GB
#
#     python train.py config/demo.py

out_dir = "out/demo"
data_dir = "data/demo"

vocab_size = 4_096
dim = 256
n_layers = 4
n_heads = 4
hidden_dim = 704
context = 256

batch_size = 8
micro_batch_size = 8
max_steps = 800

learning_rate = 2e-3
warmup_steps = 50
dtype = "float32"  # a CPU has no use for bfloat16

log_every = 20
eval_every = 200
eval_batches = 24  # 192 windows, 49,152 tokens
checkpoint_every = 200
