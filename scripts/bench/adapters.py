"""Memory: a frozen bfloat16 language model of a billion parameters with LoRA adapters, at three checkpoints.

Weights are random: nothing here depends on their values. The model is a Llama of transformers, made on the meta device
and filled in place; its adapters are saved by PEFT. What counts is the most anonymous memory of the process from the
moment when the model is there until its store is built: the model itself is one model, and a build may take 2 GB more.
The quick form has a model of 100,000 parameters.

    python scripts/bench/adapters.py [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Anonymous, Bench

import gradindex
from gradindex.projection import Projection

EXAMPLES, TOKENS, CHECKPOINTS = 4, 8, 3


def make_model(quick: bool) -> torch.nn.Module:
    """A random model in bfloat16 with LoRA on its queries and values."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 21}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000}
    if quick:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, attn_implementation="eager")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for module in model.modules():  # buffers hold nothing yet
            if hasattr(module, "compute_default_rope_parameters"):
                frequencies, _ = module.compute_default_rope_parameters(config, device="cpu")
                module.inv_freq.copy_(frequencies)
                module.original_inv_freq.copy_(frequencies)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def loss(model: torch.nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    """(n,) mean negative log-likelihoods of the next tokens."""
    logits = model(input_ids=batch[0]).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none")
    return losses.mean(1)


def main() -> None:
    """Measure and print."""
    bench = Bench("Adapters of a billion-parameter model", __doc__, ["transformers", "peft"])
    if len(bench.installed(["transformers", "peft"])) < 2:
        bench.finish()
        return
    torch.manual_seed(0)
    model = make_model(bench.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(1, CHECKPOINTS + 1):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(folder / "run" / f"checkpoint-{step}")
        tokens = torch.randint(model.config.vocab_size, (EXAMPLES, TOKENS))
        data = torch.utils.data.TensorDataset(tokens)
        size = sum(tensor.nbytes for tensor in {id(p): p for p in model.parameters()}.values())
        before = resident()
        started = time.perf_counter()
        with Anonymous() as memory:
            checkpoints = gradindex.find_checkpoints(folder / "run", learning_rate=1e-4, base="model")
            task = gradindex.Task(model, loss, data, checkpoints, data)
            gradindex.build(task, folder / "store", projection=Projection(dim=256))
            built = time.perf_counter() - started
        bench.figure("parameters", sum(p.numel() for p in model.parameters()) / 1e9, "billion")
        bench.figure("the model", size / 1e9, "GB")
        bench.figure("anonymous memory once the model is there", before, "GB")
        bench.figure("peak anonymous memory of the build", memory.peak_gb, "GB")
        bench.bar("memory above one model", memory.peak_gb - size / 1e9, "GB", 2, at_most=True)
        bench.figure(f"a build of {EXAMPLES} examples of {TOKENS} tokens", built, "s")
    bench.finish()


def resident() -> float:
    """Anonymous memory of this process, in GB (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
