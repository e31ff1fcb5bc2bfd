"""What a model loses at every ``keep``: predicted, or measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictedLoss:
    """Predicted loss and error of one method at one ``keep``.

    Attributes:
        method: a key of :data:`lrcompress.objective.METHODS`.
        keep: parameters that remain / parameters before, over the targeted layers.
        error: mean of the layers' relative errors in the method's metric; None if the layers'
            least ranks take more than ``keep`` leaves.
        predicted_loss: increase of the loss; None also where the metric does not know it.
    """

    method: str
    keep: float
    error: float | None
    predicted_loss: float | None


@dataclass(frozen=True)
class MeasuredKeep:
    """What a model gives at one ``keep`` without retraining.

    Attributes:
        method: a key of :data:`lrcompress.objective.METHODS`.
        keep: that was asked for; 1.0 is the model as it was.
        kept: parameters that remain / parameters before, over the targeted layers.
        parameters: of the whole model.
        predicted_loss: increase of the loss; None where the metric does not know it.
        figures: of a validation.
        seconds: that the validation took.
    """

    method: str
    keep: float
    kept: float
    parameters: int
    predicted_loss: float | None
    figures: dict[str, float]
    seconds: float
