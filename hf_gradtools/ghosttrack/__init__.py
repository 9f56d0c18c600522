"""GhostTrack: features of sparse autoencoders tracked through the layers of a model, and hallucinations told by them.

Names load on first use: transformers' Auto classes know this package without importing a model.
"""

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


_LAZY = {
    "CrossValidation": "evaluation_results",
    "DetectorConfig": "configuration_detector",
    "DetectorOutput": "detector_outputs",
    "GhostTrackConfig": "configuration",
    "HallucinationDetectionPipeline": "pipeline",
    "HallucinationDetector": "detector",
    "Hypotheses": "hypotheses",
    "Method": "evaluation",
    "Reading": "reading",
    "TrackingConfig": "tracking",
    "Tracks": "tracking",
    "cross_validate": "evaluation",
    "detection_features": "features",
    "fit_method": "evaluation",
    "load_classifier": "classifier_files",
    "make_classifier": "classifiers",
    "plot_tracks": "track_plot",
    "read_texts": "reading",
    "save_classifier": "classifier_files",
    "track": "tracking",
    "write_dashboard": "report",
}

__all__ = [
    "CrossValidation",
    "DetectorConfig",
    "DetectorOutput",
    "GhostTrackConfig",
    "HallucinationDetectionPipeline",
    "HallucinationDetector",
    "Hypotheses",
    "Method",
    "Reading",
    "TrackingConfig",
    "Tracks",
    "cross_validate",
    "detection_features",
    "fit_method",
    "load_classifier",
    "make_classifier",
    "plot_tracks",
    "read_texts",
    "save_classifier",
    "track",
    "write_dashboard",
]

if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.classifier_files import load_classifier, save_classifier
    from hf_gradtools.ghosttrack.classifiers import make_classifier
    from hf_gradtools.ghosttrack.configuration import GhostTrackConfig
    from hf_gradtools.ghosttrack.configuration_detector import DetectorConfig
    from hf_gradtools.ghosttrack.detector import HallucinationDetector
    from hf_gradtools.ghosttrack.detector_outputs import DetectorOutput
    from hf_gradtools.ghosttrack.evaluation import Method, cross_validate, fit_method
    from hf_gradtools.ghosttrack.evaluation_results import CrossValidation
    from hf_gradtools.ghosttrack.features import detection_features
    from hf_gradtools.ghosttrack.hypotheses import Hypotheses
    from hf_gradtools.ghosttrack.pipeline import HallucinationDetectionPipeline
    from hf_gradtools.ghosttrack.reading import Reading, read_texts
    from hf_gradtools.ghosttrack.report import write_dashboard
    from hf_gradtools.ghosttrack.track_plot import plot_tracks
    from hf_gradtools.ghosttrack.tracking import TrackingConfig, Tracks, track

__getattr__ = lazy_names(__name__, _LAZY)
