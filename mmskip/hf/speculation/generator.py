"""`generate` by self-speculation: checks the call, and hands transformers the decoding loop."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from mmskip.hf.calls import generate_arguments, given_cache
from mmskip.hf.speculation.decoding import Decoding
from mmskip.hf.speculation.draft import DraftState, draft_changes
from mmskip.protocols import STATE, Speculator
from mmskip.swap import Change, state_of

TREE_BACKENDS = ("sdpa", "eager")


@dataclass(frozen=True)
class GeneratorState:
    """State of a module with `generate` that decodes by speculation.

    Attributes:
        windows: per block, the sliding window in tokens, or None for full attention.
        decoding: the kind of `Decoding`.
    """

    draft: DraftState
    speculator: Speculator
    windows: tuple[int | None, ...] = (None,)
    decoding: type[Decoding] = Decoding


class SpeculativeGenerator(nn.Module):
    """Mixin of a module with `generate`: decode by speculation, with the same results."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        state: GeneratorState = state_of(self, SpeculativeGenerator)
        generate: Any = super().generate  # type: ignore[misc]
        call = generate_arguments(generate, args, kwargs)
        refused = ("streamer", "assistant_model", "custom_generate", "negative_prompt_ids", state.decoding.embeddings)
        for name in refused:
            if call.get(name) is not None:
                raise ValueError(f"{name} is given, which self-speculation does not serve; leave it out.")

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            _check_call(generation_config, given_cache(model_kwargs))
            _check_backend(model, state.speculator.branches)
            processors, criteria = logits_processor, stopping_criteria
            run = state.decoding(model, state, input_ids, model_kwargs, processors, criteria, generation_config)
            return run.result(run.tokens_of())

        return generate(*args, **kwargs, custom_generate=decode)


def _check_backend(model: Any, branches: int) -> None:
    backend = model.config._attn_implementation
    if branches and backend not in TREE_BACKENDS:
        raise ValueError(
            f"branches is {branches} with attn_implementation={backend!r}; draft trees need a custom mask, which "
            f"{' and '.join(TREE_BACKENDS)} take. Choose one of these, or branches=0."
        )


def _check_call(config: Any, cache: Any) -> None:
    """Raise ValueError for settings of `generate` that this decoding does not serve."""
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is set; self-speculation returns sequences only. Leave it out.")
    if (config.num_beams or 1) != 1 or config.prompt_lookup_num_tokens or config.use_cache is False:
        raise ValueError(
            "self-speculation decodes greedily or by sampling with a cache; num_beams must be 1, use_cache True, and "
            "prompt_lookup_num_tokens unset."
        )
    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache) if type(cache) is EncoderDecoderCache else (cache,)
    )
    if cache is not None and any(type(p) is not DynamicCache or p.offloading or p.get_seq_length() > 0 for p in parts):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} with {int(cache.get_seq_length())} tokens; self-speculation "
            "rolls back an empty DynamicCache that it creates. In generate, leave past_key_values and "
            "cache_implementation out."
        )


def speculation_changes(view: Any, speculator: Speculator) -> list[Change]:
    """Build the changes by which a decoder drafts with parts of its blocks left out, and `generate` decodes by
    speculation.

    Raises:
        ValueError: the decoder cannot roll back, or has no blocks to leave out.
    """
    name = type(view.root).__name__
    if STATE in view.kinds:
        raise ValueError(
            f"{name} has blocks that carry a state from token to token, which drafts could not be rolled back from."
        )
    if len(view.blocks) < 3 or not view.generators:
        raise ValueError(
            f"{name} has {len(view.blocks)} blocks and {len(view.generators)} modules with `generate`; "
            "self-speculation needs at least three blocks (the first and last always run), in a model that generates."
        )
    draft = DraftState()
    speculator.start(draft)
    state = GeneratorState(draft, speculator, tuple(view.windows))
    changes = draft_changes(view, draft, speculator.exits)
    return changes + [Change("generate", module, SpeculativeGenerator, state) for module in view.generators]
