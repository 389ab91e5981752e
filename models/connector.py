"""From the features of a frozen vision tower to the token embeddings of a language model."""

from torch import Tensor, nn


class Connector(nn.Sequential):
    """The two-layer connector of VideoLLM-online and VideoLLM-MoD: Linear, GELU, Linear.

    Args:
        feature_dim: channels C of the frame features.
        hidden_size: width D of the language model.

    Shapes: [..., C] to [..., D]. An empty input gives an empty output whose backward leaves zero gradients, not None,
    as DDP needs.
    """

    def __init__(self, feature_dim: int, hidden_size: int) -> None:
        super().__init__(nn.Linear(feature_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


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
