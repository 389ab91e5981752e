"""The base of the run reports: what checkpoints hold, when a report is made, and for which model."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from mmskip.train.reports.base import RunReport, first_batch, rank_suffix
from mmskip.train.reports.captioning import CaptionReport
from mmskip.train.reports.chat import ChatReport
from mmskip.train.reports.generation import SampleReport
from mmskip.train.reports.narration import NarrationReport


class Model(LightningModule):
    results = {"loss": 2.0}  # noqa: RUF012


class Report(RunReport):
    model_class = Model

    def __init__(self):
        super().__init__()
        self.made = []

    def report(self, trainer, model, stage):
        self.made.append((model, stage))


@pytest.mark.parametrize(
    ("report", "state"),
    [
        (NarrationReport, {"untrained": {"lm_ppl": 3.0}, "baseline": {"gaps": {}, "places": []}}),
        (CaptionReport, {"untrained": {"accuracy": 0.5}}),
        (ChatReport, {"before": {"loss": 2.0}}),
        (SampleReport, {"untrained": 0.7}),
    ],
)
def test_checkpoints_hold_the_keys_of_version_0_1(report, state):
    callback = report()
    assert callback.state_dict().keys() == state.keys()
    callback.load_state_dict(state)
    assert callback.state_dict() == state
    assert callback.untrained == next(iter(state.values()))  # what a resumed run does not measure again


@pytest.mark.parametrize("report", [NarrationReport, CaptionReport, ChatReport, SampleReport])
def test_another_model_is_refused_by_name(report):
    name = rf"{report.__name__} is for {report.model_class.__name__}, the model is a Model"
    with pytest.raises(ValueError, match=name):
        report().setup(None, Model(), "fit")


def test_a_report_is_made_at_the_end_of_each_stage_and_not_within_training():
    report, model = Report(), Model()
    fitting, validating = (SimpleNamespace(state=SimpleNamespace(fn=fn)) for fn in (TrainerFn.FITTING, "validate"))
    validating.state.fn = TrainerFn.VALIDATING
    report.on_validation_end(fitting, model)
    assert report.made == []
    report.on_fit_end(fitting, model)
    report.on_validation_end(validating, model)
    report.on_test_end(validating, model)
    assert report.made == [(model, "val"), (model, "val"), (model, "test")]
    only_fit = Report()
    only_fit.stages = ("fit",)
    only_fit.on_validation_end(validating, model)
    only_fit.on_test_end(validating, model)
    assert only_fit.made == []


def test_the_untrained_model_counts_only_if_the_whole_validation_set_was_checked():
    report, model = Report(), Model()
    report.on_sanity_check_end(SimpleNamespace(num_sanity_val_steps=2), model)
    assert report.untrained == {}
    report.on_sanity_check_end(SimpleNamespace(num_sanity_val_steps=float("inf")), model)
    assert report.untrained == {"loss": 2.0}
    model.results = {"loss": 1.0}
    report.on_sanity_check_end(SimpleNamespace(num_sanity_val_steps=float("inf")), model)
    assert report.untrained == {"loss": 2.0}  # a resumed run keeps that of the first


def test_a_base_without_report_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        RunReport()


def test_batches_and_file_names():
    assert first_batch([[1, 2], [3]]) == 1 and first_batch((4, 5)) == 4
    assert rank_suffix(SimpleNamespace(world_size=1, global_rank=0)) == ""
    assert rank_suffix(SimpleNamespace(world_size=2, global_rank=1)) == "-1"
