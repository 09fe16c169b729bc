"""Somebody else's script, as continuous integration runs and type-checks it against the installed package."""

import torch

import cem
from cem_kernels import ClassGroups, Nats
from cem_kernels.variance import class_variance

features = torch.randn(32, 16, requires_grad=True)
labels = torch.arange(32) % 4

centroid = cem.CentroidCEM(feature_dim=16, num_classes=4, noise_std=0.1)
attention = cem.SlotCrossAttentionCEM(16, reg_strength=1.0, num_classes=4, backend="auto")
loss: torch.Tensor = centroid(features, labels)[0] + attention(features, labels)[0]
loss = loss + class_variance(features[:, None], ClassGroups.from_labels(labels, 4), penalty=Nats(0.1)).rob_loss
loss.backward()  # type: ignore[no-untyped-call]
assert features.grad is not None
assert float(features.grad.abs().sum()) > 0
print(f"cem {cem.__version__} from {cem.__path__[0]}")
