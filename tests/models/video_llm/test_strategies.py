"""Strategies of Lightning that shard a model are refused before anything is built or trained."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from narration_data import LLAMA, TinyData

from mmskip.models.common.base import check_strategy
from mmskip.models.video_llm.module import VideoLLM


def test_a_run_under_a_sharding_strategy_says_what_to_use_before_the_model_is_built(tmp_path):
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), default_root_dir=tmp_path, logger=False
    )
    model = VideoLLM(LLAMA)
    with pytest.raises(ValueError, match=r"strategy is ModelParallelStrategy.*use 'ddp'"):
        trainer.fit(model, datamodule=TinyData())
    assert model.llm is None


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_every_sharding_strategy_is_refused(strategy):
    kind = type("Own", (strategy,), {})
    for cls, name in ((strategy, strategy.__name__), (kind, "Own")):
        with pytest.raises(ValueError, match=rf"strategy is {name}.*fully_shard"):
            check_strategy(cls.__new__(cls))


@pytest.mark.parametrize("strategy", [DDPStrategy, SingleDeviceStrategy])
def test_strategies_with_the_whole_model_on_every_rank_pass(strategy):
    check_strategy(strategy.__new__(strategy))
