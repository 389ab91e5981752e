"""The connector standardises by statistics that travel with its weights."""

import torch

from mmskip.models.video_llm.connector import Connector


def test_statistics_are_taken_off_and_saved_with_the_weights():
    torch.manual_seed(0)
    connector, other = Connector(6, 8), Connector(6, 8)
    features = torch.randn(3, 4, 6) * 5 + 7
    plain = connector((features - 7) / 5)
    connector.standardise_by(torch.full((6,), 7.0), torch.full((6,), 5.0))
    torch.testing.assert_close(connector(features), plain)
    other.load_state_dict(connector.state_dict())
    assert torch.equal(other(features), connector(features))


def test_a_channel_that_never_changes_does_not_blow_up():
    connector = Connector(2, 4)
    connector.standardise_by(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert connector(torch.ones(1, 2)).isfinite().all()
