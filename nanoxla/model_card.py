"""README.md of a Hugging Face directory: what the files of a run say about it, and nothing else."""


def model_card(state, rows, config, num_parameters, dtype):
    """The text of README.md.

    state: the content of state.json. rows: those of metrics.jsonl. config: a ModelConfig.
    num_parameters: (in total, in matrix products). dtype: the name of the weights' dtype."""
    total, in_matmuls = num_parameters
    facts = [
        ("parameters", f"{total:,}, of which {in_matmuls:,} in matrix products"),
        ("shape", f"{config.n_layers} layers, width {config.dim:,}, {config.n_heads} heads, "
                  f"SwiGLU {config.hidden_dim:,}, vocabulary {config.vocab_size:,}, "
                  f"context {config.context:,}, untied head"),
        ("weights", dtype)]
    if state["step"]:  # not a model from elsewhere, which has step 0
        run = state["config"]
        if run.get("init_from"):
            facts.append(("started from", f"the weights of {run['init_from']}"))
        decay = f"cosine over {run['max_steps']:,} steps"
        if run.get("schedule") == "wsd":
            decay = f"constant, then linear over the last {run['decay_steps']:,} of " + (
                f"{run['max_steps']:,} steps")
        clipping = f"clipped at {run['grad_clip']:g}" if run["grad_clip"] else "not clipped"
        facts += [
            ("trained on", f"{state['tokens']:,} tokens in {state['step']:,} steps "
                           f"of {run['batch_size']} windows"),
            ("optimiser", f"AdamW, peak learning rate {run['learning_rate']:g}, "
                          f"{run['warmup_steps']:,} warm-up steps, "
                          f"{decay} to {run['min_lr']:g}, "
                          f"weight decay {run['weight_decay']:g}, "
                          f"gradients {clipping}"),
            ("precision", f"matrix products in {run['dtype']}, weights and moments in float32")]
    if training := [row for row in rows if row.get("loss") is not None]:
        last = training[-1]
        facts.append(("training loss", f"{last['loss']:.4f} at step {last['step']:,}"))
    if evaluations := [row for row in rows if row.get("val_loss") is not None]:
        last = evaluations[-1]
        bpb = f"; {last['val_bpb']:.4f} bits per byte" if "val_bpb" in last else ""
        facts.append(("validation loss", f"{last['val_loss']:.4f} at step {last['step']:,} "
                                         f"(cross-entropy in nats per token{bpb})"))
    versions = [f"{package} {version}" for package, version in state["versions"].items()]
    facts.append(("software", ", ".join(versions)))
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return CARD.replace("TABLE", table)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# A Llama, written by nanoxla

| | |
|---|---|
TABLE

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0], skip_special_tokens=True))
```

A base model: it continues text and has not been taught to follow instructions.
"""
