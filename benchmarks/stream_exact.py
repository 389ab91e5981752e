"""How often a stream in half precision chooses otherwise than the offline forward, and by how little.

    python benchmarks/stream_exact.py --checkpoint runs/videollm_mod       the test videos of a run of `make train`

The checkpoint watches videos frame by frame (and several at a time), in fp32, in bf16, and in bf16 with the logits
alone in fp32; each stream is compared with one forward over its whole sequence under the recorded selections.
"""

import argparse
import json

import torch
from _measure import RESULTS, environment

from mmskip.files import write_json
from mmskip.models.stream import StreamSettings
from mmskip.models.stream_check import Comparison, compare
from mmskip.train.trained import find_run, load_data, load_model

KINDS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "bfloat16, fp32 logits": ("bfloat16", True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or a checkpoint file")
    parser.add_argument("--samples", type=int, default=30, help="test videos (default 30)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 5], help="frames per call")
    parser.add_argument("--out", default=RESULTS / "stream_exact.json", help="result file")
    args = parser.parse_args()
    run = find_run(args.checkpoint)
    data = load_data(run)
    dataset = data.dataset("test")
    head = data.tokens.head(data.instruction)
    results = {}
    for name, (dtype, exact_head) in KINDS.items():
        model = load_model(run, dtype=dtype)
        for chunk in args.chunks:
            settings = StreamSettings(chunk=chunk, threshold=model.hparams["silent_threshold"], max_new_tokens=20)
            total = Comparison()
            for index in range(min(args.samples, len(dataset))):
                found = compare(model, dataset[index]["features"], head, settings, exact_head)
                total.choices += found.choices
                total.different += found.different
                total.largest = max(total.largest, found.largest)
                total.compared += found.compared
                total.flipped += found.flipped
            results[f"{name}, chunk {chunk}"] = told = {
                "choices": total.choices,
                "different": len(total.different),
                "margins_in_resolutions": [round(d.margin / d.resolution, 2) for d in total.different],
                "largest_difference_of_a_logit": round(total.largest, 5),
                "selected": total.compared,
                "flipped": total.flipped,
            }
            print(f"{name}, chunk {chunk}: {told}", flush=True)
    where = environment()
    result = {"name": "stream_exact", "device": where["device"], "environment": where, "results": results}
    write_json(result, args.out)
    print(json.dumps(result))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
