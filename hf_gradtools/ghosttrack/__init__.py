"""GhostTrack: features of sparse autoencoders tracked through the layers of a model, and hallucinations told by them.

Names load on first use: transformers' Auto classes know this package without importing a model.
"""

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


_LAZY = {
    "CrossValidation": "evaluation.results",
    "DetectorConfig": "detection.configuration_detector",
    "DetectorOutput": "detection.detector_outputs",
    "GhostTrackConfig": "settings.configuration",
    "HallucinationDetectionPipeline": "detection.pipeline",
    "HallucinationDetector": "detection.detector",
    "Hypotheses": "tracking.hypotheses",
    "Method": "evaluation.cross_validation",
    "Reading": "reading.reading",
    "TrackingConfig": "tracking.tracking",
    "Tracks": "tracking.tracking",
    "cross_validate": "evaluation.cross_validation",
    "detection_features": "tracking.track_features",
    "fit_method": "evaluation.cross_validation",
    "load_classifier": "classifiers.classifier_files",
    "make_classifier": "classifiers.recipes",
    "plot_tracks": "report.track_plot",
    "read_texts": "reading.reading",
    "save_classifier": "classifiers.classifier_files",
    "track": "tracking.tracking",
    "write_dashboard": "report.dashboard",
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
    from hf_gradtools.ghosttrack.classifiers.classifier_files import load_classifier, save_classifier
    from hf_gradtools.ghosttrack.classifiers.recipes import make_classifier
    from hf_gradtools.ghosttrack.detection.configuration_detector import DetectorConfig
    from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector
    from hf_gradtools.ghosttrack.detection.detector_outputs import DetectorOutput
    from hf_gradtools.ghosttrack.detection.pipeline import HallucinationDetectionPipeline
    from hf_gradtools.ghosttrack.evaluation.cross_validation import Method, cross_validate, fit_method
    from hf_gradtools.ghosttrack.evaluation.results import CrossValidation
    from hf_gradtools.ghosttrack.reading.reading import Reading, read_texts
    from hf_gradtools.ghosttrack.report.dashboard import write_dashboard
    from hf_gradtools.ghosttrack.report.track_plot import plot_tracks
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
    from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
    from hf_gradtools.ghosttrack.tracking.track_features import detection_features
    from hf_gradtools.ghosttrack.tracking.tracking import TrackingConfig, Tracks, track

__getattr__ = lazy_names(__name__, _LAZY)
