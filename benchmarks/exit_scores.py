"""Cost of an exit score at the shape of a published model, beside the decoder layer that it might save.

A step of the decoder over its cache is timed at full depth, with scores after every layer that never let a token
exit, and with every token exiting after layer 1; the first two differ by the scores, the first and the last by the
layers. Weights are random: nothing that is timed depends on them. The shape is that of Florence-2-base (6 + 6 layers,
width 768, 51,289 words).

    python benchmarks/exit_scores.py            # the last line is one JSON object
    python benchmarks/exit_scores.py --rows 32 --clock cpu
"""

import argparse
import math
from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import mmskip
from common.measure import emit, interleaved_ratio
from common.mue import CLOCKS
from mmskip import EarlyExitConfig
from mmskip.costs import torch_flops
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.utils.command import CommandParser

LAYERS, WIDTH, WORDS = 6, 768, 51289
OUT_OF_REACH = {name: math.nextafter(1.0, 0.0) for name in ("saturation", "confidence", "margin", "entropy")} | {
    "state_norm": 1e9,
    "patience": 1e9,
}


def build(layers: int, width: int, words: int) -> Any:
    """The model."""
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": number for part in ("encoder", "decoder") for what, number in
             (("layers", layers), ("attention_heads", width // 64), ("ffn_dim", 4 * width))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=words, d_model=width, **sizes)).eval()


class Steps:
    """Decoder steps of one token per row after a prefix.

    Args:
        model: see `build`.
        rows: of the batch.
        memory: encoder tokens.
        prefix: tokens before.
    """

    def __init__(self, model: Any, rows: int, memory: int, prefix: int) -> None:
        self.model = model
        self.states = BaseModelOutput(torch.randn(rows, memory, model.config.d_model))
        self.prefix = torch.randint(4, 1000, (rows, prefix))
        self.token = self.prefix[:, -1:]
        self.cache = self._read().past_key_values

    def _read(self) -> Any:
        return self.model(encoder_outputs=self.states, decoder_input_ids=self.prefix, use_cache=True)

    def __call__(self) -> None:
        """One step; what it stored is dropped again."""
        self.model(encoder_outputs=self.states, decoder_input_ids=self.token, past_key_values=self.cache)
        self.cache.self_attention_cache.crop(-1)


def _flops(steps: Steps) -> int:
    with torch_flops() as counter:
        steps()
    return counter.get_total_flops()


@torch.no_grad()
def measure(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, of one of its layers, and of one score by criterion."""
    depth, clock = len(model.model.decoder.layers), CLOCKS[options.clock]
    base = Steps(model, options.rows, options.memory, options.prefix)
    other = build(depth, model.config.d_model, model.config.vocab_size)

    def against(config: EarlyExitConfig) -> Any:
        mmskip.apply_(other, config)
        steps = Steps(other, options.rows, options.memory, options.prefix)
        found = interleaved_ratio(base, steps, options.pairs, clock=clock)
        mmskip.remove_(other)
        return found

    counted = _flops(base)
    one = against(EarlyExitConfig(FixedExit(1), cache_policy="copy"))
    mmskip.apply_(other, EarlyExitConfig(FixedExit(1), cache_policy="copy"))
    counted /= _flops(Steps(other, options.rows, options.memory, options.prefix))
    mmskip.remove_(other)
    layer = one.base_s * (1 - 1 / one.median) / (depth - 1)
    scores = {}
    for criterion, threshold in OUT_OF_REACH.items():
        found = against(EarlyExitConfig(ExitAt(threshold, criterion)))
        scores[criterion] = 1000 * found.base_s * (1 / found.median - 1) / (depth - 1)
    return {
        "step_ms": 1000 * one.base_s,
        "layer_ms": 1000 * layer,
        "score_ms": scores,
        "scores_per_layer": {name: value / (1000 * layer) for name, value in scores.items()},
        "one_layer": one.median,
        "one_layer_counted": counted,
    }


def main() -> None:
    """Measure and print."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--memory", type=int, default=600, help="encoder tokens (default 600: 577 of the image)")
    parser.add_argument("--prefix", type=int, default=8, help="tokens before the one that is timed (default 8)")
    parser.add_argument("--pairs", type=int, default=31, help="paired runs (default 31)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of one thread")
    options = parser.parse_args()
    if options.clock == "cpu":
        torch.set_num_threads(1)
    model, found = build(LAYERS, WIDTH, WORDS), dict[str, Any]()
    for rows in options.rows:
        own = argparse.Namespace(**{**vars(options), "rows": rows})
        found[str(rows)] = measure(model, own)
        print(f"batch {rows}: layer {found[str(rows)]['layer_ms']:.2f} ms; a score costs so much of it:")
        for name, value in found[str(rows)]["scores_per_layer"].items():
            print(f"  {name:<11} {value:6.3f}", flush=True)
    first = found[str(options.rows[0])]
    emit(
        {
            "name": "exit_scores",
            "speedup": round(first["one_layer"], 4),
            "ideal": round(first["one_layer_counted"], 4),
            "clock": options.clock,
            "shape": f"{LAYERS}+{LAYERS} layers, width {WIDTH}, {WORDS:,} words, {options.memory} encoder tokens",
            "rows": found,
        }
    )


if __name__ == "__main__":
    main()
