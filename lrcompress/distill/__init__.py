"""Knowledge distillation from a teacher: the model before it was compressed, or any other."""

from lrcompress.distill.losses import DistillationLoss, HiddenStates, Logits, Relations
from lrcompress.distill.module import Distilled

__all__ = ["DistillationLoss", "Distilled", "HiddenStates", "Logits", "Relations"]
