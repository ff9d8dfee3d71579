# A "124M" Llama on 9.94 billion tokens of FineWeb-Edu, for a TPU v5e-8 (8 cores).
#
# parameters   24,576,000 embedding + 12 x 7,079,424 blocks + 768 norm + 24,576,000 head
#              = 134,105,856 ("124M" is GPT-2's nickname); 109,510,656 of them are in matmuls
# tokens       9,940,492,288 in the training shards = 9,707,512 windows of 1,024: one epoch
# batch        8 cores x 8 micro-batches x 4 windows = 256 windows = 262,144 tokens a step
# steps        9,707,512 / 256 = 37,919.97 -> 37,920
# compute      770,310,144 FLOPs per token -> 7.66e18 for the run
# checkpoint   134,105,856 x 4 bytes x (weights + 2 moments) = 1.61 GB, two are kept
#
#     python train.py config/fwedu_124m.py --data_dir=/kaggle/input/your-shards \
#         --tokenizer=/kaggle/input/your-shards/tokenizer.model

out_dir = "out/fwedu_124m"
data_dir = "data/fwedu"

vocab_size = 32_000  # Llama's SentencePiece vocabulary
dim = 768
n_layers = 12
n_heads = 12
hidden_dim = 2_048
context = 1_024
rope_theta = 10_000.0
norm_eps = 1e-5
attention = "flash"

batch_size = 256
micro_batch_size = 4
max_steps = 37_920

learning_rate = 6e-4
min_lr = 0.0
warmup_steps = 1_000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
dtype = "bfloat16"

log_every = 10
eval_every = 1_000
eval_batches = 8  # 2,048 windows, 2.1 million tokens
checkpoint_every = 1_000
keep_checkpoints = 2
max_hours = 8.75  # a Kaggle session ends after 9 hours; on your own machine set 0
