"""Quality of generated images: metrics with confidence intervals, settings, and plots.

    guided-diffusers evaluate out/images --dataset data/fashion-mnist --output out/evaluation

    from guided_diffusers.evaluation import evaluate, load_network, open_generated, open_real

    images = open_generated("out/images")
    judge = load_network("fashion-mnist")
    evaluation = evaluate(
        images, open_real("data/fashion-mnist", images.shape, "test"), judge, judge
    )
    print(evaluation)
    evaluation.metrics["frechet_distance"]["value"], evaluation.metrics["top_1"]["interval"]

Generated images are compared with real ones in the features of a network, and a classifier, the
judge, measures how often they show their label; neither may be the classifier that guided. The
processes of `accelerate launch` share the images.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .dataset_images import DatasetImages, ParquetImages
    from .evaluation import Evaluation, evaluate
    from .images import Images, NpzImages, open_generated, open_real
    from .labels import common_labels
    from .networks import (
        Network,
        default_features,
        load_dinov2,
        load_inception,
        load_network,
        wrap_classifier,
        wrap_module,
    )
    from .results import COVERAGE_K, Bootstrap, by_class, compare
    from .summary import Settings, Summary, summarise

__all__ = [
    "COVERAGE_K",
    "Bootstrap",
    "DatasetImages",
    "Evaluation",
    "Images",
    "Network",
    "NpzImages",
    "ParquetImages",
    "Settings",
    "Summary",
    "by_class",
    "common_labels",
    "compare",
    "default_features",
    "evaluate",
    "load_dinov2",
    "load_inception",
    "load_network",
    "open_generated",
    "open_real",
    "summarise",
    "wrap_classifier",
    "wrap_module",
]

__getattr__, __dir__ = lazy_imports(
    __name__,
    {
        "Rows": "DatasetImages",
        "of_classifier": "wrap_classifier",
        "of_module": "wrap_module",
        "inception": "load_inception",
    },
)
