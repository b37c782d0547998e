"""Rows of a small Mixtral, every parameter tracked: experts and routers by rows, against a loop over examples.

Weights are random: 4 layers of 8 experts with hidden size 128, 32 examples of 64 tokens, two experts for each token.
The loop is the route that gradindex took for experts and routers before it knew rows, and still takes for products that
it does not know. Both give the same norms, which is checked. ``step`` is a forward and backward pass of the batch by
torch alone. The quick form has 2 layers, hidden size 16 and 8 examples.

    python scripts/bench/experts.py [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench
from numpy.typing import NDArray

import gradindex
from gradindex.gradients import Engine, check_routes
from gradindex.losses import causal_lm
from gradindex.projection import Projection
from gradindex.rows import RowMaker

# How far the squared norms of the two may be apart, relatively, in float32.
ROUNDING = 1e-3


def make_task(folder: Path, implementation: str, quick: bool) -> gradindex.Task:
    """A random model with this implementation of experts, and texts of one length."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    if quick:
        sizes |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, experts_implementation=implementation))
    torch.save(model.state_dict(), folder / "weights.pt")
    ids = torch.randint(sizes["vocab_size"], (8 if quick else 32, 64))
    train = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    checkpoint = gradindex.Checkpoint(folder / "weights.pt", learning_rate=1e-3)
    return gradindex.Task(model, causal_lm(), train, [checkpoint])


def seconds(action: Callable[[], Any]) -> float:
    """Of the processor, which other work on the machine does not change much as the clock's."""
    started = time.process_time()
    action()
    return time.process_time() - started


def measure(bench: Bench, implementation: str, folder: Path) -> None:
    """Examples a second by both routes."""
    task = make_task(folder, implementation, bench.quick)
    examples = task.read(task.train_ids)

    def step() -> None:
        batch = task.collate(examples.items)
        torch.autograd.grad(task.loss(task.model, batch).sum(), list(task.model.parameters()))

    def both(engine: Engine) -> tuple[NDArray[np.float64], float, float]:
        """Self-influence, and the seconds that exact norms and sketched rows with them take."""
        maker = RowMaker(engine, Projection())
        squares = maker.rows(examples).self_influence  # everything is warm from here on
        return squares, seconds(lambda: maker.losses_and_norms(0, examples)), seconds(lambda: maker.rows(examples))

    with Engine(task) as engine:
        check_routes(engine)
        left = [layer.name for layer in engine.layers if not layer.hooked]
        if left:
            raise SystemExit(f"{', '.join(left)} is left to the loop.")
        by_rows, *fast = both(engine)
        layers = [
            replace(layer, route="loop", d_out=1, d_in=layer.size) if layer.route.endswith("by rows") else layer
            for layer in engine.layers
        ]
        engine.replan(layers, True)
        in_a_loop, *slow = both(engine)
        np.testing.assert_allclose(in_a_loop, by_rows, rtol=ROUNDING)
    step()
    plain = seconds(step)
    for what, ours, before in zip(("exact norms", "sketched rows and exact norms"), fast, slow, strict=True):
        bench.row(
            "Examples in a second of the processor",
            {
                "experts": implementation,
                "what": what,
                "by rows": round(len(examples) / ours, 1),
                "loop": round(len(examples) / before, 1),
                "ratio": round(before / ours, 1),
                "step of training": round(len(examples) / plain, 1),
            },
        )


def main() -> None:
    """Measure and print."""
    bench = Bench("Rows of a mixture of experts", __doc__, ["transformers"])
    if bench.installed(["transformers"]):
        for implementation in ("eager", "grouped_mm"):  # batched_mm copies a matrix for each row: 2 GB a layer here
            with tempfile.TemporaryDirectory() as name:
                measure(bench, implementation, Path(name))
    bench.finish()


if __name__ == "__main__":
    main()
