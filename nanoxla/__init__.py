"""What the five scripts depend on.

    Config and errors
    config.py           a dataclass of keys, a config file, --key=value
    errors.py           user errors end in one sentence, bugs in a traceback
    environment.py      environment variables that break torch_xla
    versions.py         versions that were tried together

    Data
    shards.py           shards on disk, and checking them
    shard_formats.py    which format a shard has
    inspect_shards.py   data.py inspect
    prepare.py          data.py prepare: documents -> shards
    documents.py        documents in text files, JSON and tables
    texts.py            the text of a document, or why it is skipped
    encode.py           documents -> token ids, in several processes
    tokenizer.py        loading and training a SentencePiece model

    Training
    tracing.py          tracing a function once
    flash_attention.py  attention as a TPU kernel, in JAX's Pallas
    log.py              metrics.jsonl, the log line, the progress bar, the clock
    init_from.py        a new run with the weights of another model

    Processes
    launch.py           start, stop, fail and hang together, on all cores
    processes.py        processes that end with their parent
    tpu.py              the chips, and who holds them
    lock.py             one run owns its out_dir

    Checkpoints
    checkpoint.py       a checkpoint on disk: format, checksums
    saver.py            saving in the background
    resume.py           which checkpoint a run continues from
    files.py            files written whole or not at all

    Hugging Face
    hf_directory.py     reading a Hugging Face directory
    hf_tokenizer.py     a SentencePiece model as tokenizer.json
    model_card.py       README.md of a Hugging Face directory

    Terminal
    progress.py         a progress bar, or plain lines in a pipe
    prompts.py          prompts from a pipe or a terminal
"""
