"""torch networks: a member (backbone and head), its views, and the deployable pipeline."""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.models.backbones": ["resolve_backbone"],
        "threefold.models.flops": ["measure_cost"],
        "threefold.models.gradcam": ["ensemble_cam", "grad_cam"],
        "threefold.models.heads": ["Head", "build_head"],
        "threefold.models.member": [
            "JointMember",
            "Member",
            "build_joint",
            "build_member",
            "load_weights",
            "save_weights",
        ],
        "threefold.models.pipeline": ["Combiner", "Pipeline", "predict_probs"],
        "threefold.models.recurrent": [
            "OneStepGRU",
            "OneStepLSTM",
            "OneStepRNN",
            "collapse",
            "expand",
        ],
        "threefold.models.views": ["Views"],
    },
)
