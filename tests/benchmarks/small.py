"""One small batch of every operator, some of its classes empty."""

from benchmarks.operators import Spec

SMALL = {
    "class_variance": Spec("class_variance", B=24, K=4, T=2, D=16, labels="holes"),
    "centroid_variance": Spec("centroid_variance", B=24, K=4, T=2, D=16, labels="holes"),
    "slot_variance": Spec("slot_variance", B=24, K=4, T=2, D=16, S=3, labels="holes"),
    "slot_attention": Spec("slot_attention", B=12, K=4, T=2, D=16, S=3, labels="holes"),
    "gated_read": Spec("gated_read", B=24, K=4, T=3, D=32, S=3, H=2, labels="holes"),
    "cross_attention": Spec("cross_attention", B=24, K=4, T=3, D=32, S=3, H=2),
    "surrogate": Spec("surrogate", B=12, K=4, T=2, D=16, S=3, H=2, labels="holes"),
}
