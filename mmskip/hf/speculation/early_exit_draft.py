"""Self-speculative decoding of an encoder-decoder: drafts exit the decoder early, on the live cache.

Rows of a batch accept equally many drafts, those that all of them agree on: many encoder-decoders count positions from
the start of the cache, in which no row may be moved.

Shape suffixes: B rows, T tokens of the call, S slots of the cache, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerateEncoderDecoderOutput

from mmskip.exits.rules import Decide, Memory
from mmskip.hf.calls import CACHE_NAME, argument_names
from mmskip.hf.exits.block import exit_changes
from mmskip.hf.exits.heads import check_generates
from mmskip.hf.speculation.decoding import Decoding
from mmskip.hf.speculation.draft import DraftState
from mmskip.hf.speculation.generator import GeneratorState, SpeculativeGenerator
from mmskip.swap import Change


@dataclass(frozen=True)
class DraftRule:
    """All tokens exit after one layer while the model drafts; otherwise none does."""

    draft: DraftState
    exit_layers: tuple[int, ...]
    last_layer: int | None = None
    name: str = "decoder"
    cache_policy: str = "recompute"
    decides_once: bool = False

    def begin(self, mask_BT: Tensor | None, past: int, memory: Memory | None) -> Decide:
        """Start one forward; one decision holds for all of its tokens."""
        return lambda after_BTD, before_BTD: self.draft.active

    def compacts(self, num_active: int, rows: int) -> bool:
        """Rows never differ."""
        return False


class ExitDecoding(Decoding):
    """One call of `generate` of an encoder-decoder."""

    embeddings: ClassVar[str] = "decoder_inputs_embeds"
    mask_name: ClassVar[str] = "decoder_attention_mask"
    lockstep: ClassVar[bool] = True

    def _new_cache(self) -> Any:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _forward(self, ids: Tensor, mask_BS: Any, cache: Any = None, positions: Tensor | None = None) -> Tensor:
        """Return the logits of new decoder tokens, given the mask of all slots after them."""
        known = argument_names(self.model)
        names = ("encoder_outputs", "attention_mask", "encoder_attention_mask")
        given = {name: self.given[name] for name in names if name in known and self.given.get(name) is not None}
        if self.given.get(self.mask_name) is not None:
            given[self.mask_name] = mask_BS
        output = self.model(decoder_input_ids=ids, use_cache=True, **{CACHE_NAME: self.cache}, **given)
        logits: Tensor = output.logits
        return logits.float()

    def _cut(self, slots: int) -> None:
        """Crop the cache to `slots`."""
        extra = self.cache.get_seq_length() - slots
        if extra > 0:
            self.cache.crop(-extra)

    def _keep(self, places: list[list[int]], before: int) -> None:
        """Drop the drafts that were not accepted; no row is moved."""
        slots = before + max(map(len, places))
        self.mask_BS = self.mask_BS[:, :slots]
        self._cut(slots)

    def result(self, sequences: Tensor) -> Any:
        """Return the sequences in the form the generation config asks for."""
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateEncoderDecoderOutput(sequences=sequences)  # type: ignore[arg-type]


def speculation_changes(view: Any, speculator: Any, exit_after: int) -> list[Change]:
    """Return the changes by which `generate` drafts with the first `exit_after` layers of the decoder.

    Raises:
        ValueError: the model has no output projection.
    """
    check_generates(view)
    draft = DraftState()
    speculator.start(draft)
    rule = DraftRule(draft, (exit_after,))
    changes = exit_changes(view, "decoder", rule)
    state = GeneratorState(draft, speculator, decoding=ExitDecoding)
    return [*changes, Change("generate", view.root, SpeculativeGenerator, state)]
