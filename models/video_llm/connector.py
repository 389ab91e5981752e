"""From the features of a frozen vision tower to the token embeddings of a language model."""

import torch
from torch import Tensor, nn


class Connector(nn.Sequential):
    """The two-layer connector of VideoLLM-online and VideoLLM-MoD: Linear, GELU, Linear, on standardised features.

    The features of a tower share a large common part (of a random tower most of their size), under which a small
    connector hardly sees the difference; so each channel is standardised by fixed statistics first (`standardise_by`).

    Args:
        feature_dim: channels C of the frame features.
        hidden_size: width D of the language model.

    Shapes: [..., C] to [..., D]. An empty input gives an empty output whose backward gives zero gradients, not None,
    as DDP needs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, feature_dim: int, hidden_size: int) -> None:
        super().__init__(nn.Linear(feature_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def standardise_by(self, mean: Tensor, std: Tensor) -> None:
        """Use these statistics [C]; channels that never change stay as they are."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Token embeddings of frame features."""
        return super().forward((features - self.mean) / self.std)


def place_features(embeds: Tensor, vision: Tensor, features: Tensor) -> Tensor:
    """Write connected frame features over the embeddings at the vision positions.

    Args:
        embeds: [B, T, D] token embeddings.
        vision: BoolTensor [B, T], true at vision tokens.
        features: [F, N, D], rows in the order in which the vision positions are met reading row by row.

    Returns:
        A new tensor [B, T, D].
    """
    return embeds.masked_scatter(vision.unsqueeze(-1), features.flatten(0, 1).to(embeds.dtype))
