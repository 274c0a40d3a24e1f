"""Steering vectors for language models.

Contrastive texts go in, a direction comes out, and while a `with` block is open the model leans that way on exactly
the tokens you named:

    v = train_steering_vector(model, tokenizer, pairs, layers=[15, 18])
    with v[18].apply(model, multiplier=2):
        model.generate(**inputs)

Every name below is imported the first time it is used, so that `import steering_vectors` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0"

if TYPE_CHECKING:
    from .aggregators import AccumulatingAggregator as AccumulatingAggregator
    from .aggregators import Aggregator as Aggregator
    from .aggregators import logistic_aggregator as logistic_aggregator
    from .aggregators import mean_aggregator as mean_aggregator
    from .aggregators import pca_aggregator as pca_aggregator
    from .effects import Effect as Effect
    from .effects import Projections as Projections
    from .effects import ProjectionSet as ProjectionSet
    from .effects import Similarity as Similarity
    from .effects import Sweep as Sweep
    from .effects import TokenShift as TokenShift
    from .effects import TokenValues as TokenValues
    from .effects import answer_gap as answer_gap
    from .effects import completion_gap as completion_gap
    from .effects import multiplier_limit as multiplier_limit
    from .effects import next_token_shift as next_token_shift
    from .effects import projections as projections
    from .effects import similarity as similarity
    from .effects import steered_tokens as steered_tokens
    from .effects import sweep as sweep
    from .effects import text_loss as text_loss
    from .extraction import extract_activations as extract_activations
    from .files import Provenance as Provenance
    from .layers import FoundLayers as FoundLayers
    from .layers import LayerMatcher as LayerMatcher
    from .layers import LayerType as LayerType
    from .layers import ModelLayerConfig as ModelLayerConfig
    from .layers import find_layers as find_layers
    from .layers import get_num_matching_layers as get_num_matching_layers
    from .layers import guess_and_enhance_layer_config as guess_and_enhance_layer_config
    from .operators import PatchDeltaOperator as PatchDeltaOperator
    from .operators import ablation_operator as ablation_operator
    from .operators import ablation_then_addition_operator as ablation_then_addition_operator
    from .operators import addition_operator as addition_operator
    from .aggregators import aggregate_activations as aggregate_activations
    from .plots import plot_contrast as plot_contrast
    from .plots import plot_effect as plot_effect
    from .plots import plot_layers as plot_layers
    from .plots import plot_norms as plot_norms
    from .plots import plot_projections as plot_projections
    from .plots import plot_shift as plot_shift
    from .plots import plot_similarity as plot_similarity
    from .plots import plot_tokens as plot_tokens
    from .prompts import prompt_ids as prompt_ids
    from .recording import Recording as Recording
    from .recording import record_activations as record_activations
    from .samples import SteeringVectorTrainingSample as SteeringVectorTrainingSample
    from .steering import SteeringPatchHandle as SteeringPatchHandle
    from .tokens import Tokens as Tokens
    from .training import train_steering_vector as train_steering_vector
    from .vector import SteeringVector as SteeringVector
    from .widgets import Control as Control
    from .widgets import Fixed as Fixed
    from .widgets import Html as Html
    from .widgets import Span as Span
    from .widgets import explore as explore
    from .widgets import token_strip as token_strip

_home = {  # public name -> the module that teaches it; the names of 0.12 first
    "Aggregator": "aggregators",
    "mean_aggregator": "aggregators",
    "pca_aggregator": "aggregators",
    "logistic_aggregator": "aggregators",
    "LayerType": "layers",
    "LayerMatcher": "layers",
    "ModelLayerConfig": "layers",
    "get_num_matching_layers": "layers",
    "guess_and_enhance_layer_config": "layers",
    "PatchDeltaOperator": "operators",
    "record_activations": "recording",
    "SteeringVector": "vector",
    "SteeringPatchHandle": "steering",
    "train_steering_vector": "training",
    "SteeringVectorTrainingSample": "samples",
    "aggregate_activations": "aggregators",
    "extract_activations": "extraction",
    "ablation_operator": "operators",
    "addition_operator": "operators",
    "ablation_then_addition_operator": "operators",
    "AccumulatingAggregator": "aggregators",
    "find_layers": "layers",
    "FoundLayers": "layers",
    "Recording": "recording",
    "Provenance": "files",
    "Tokens": "tokens",
    "sweep": "effects",
    "next_token_shift": "effects",
    "completion_gap": "effects",
    "answer_gap": "effects",
    "text_loss": "effects",
    "similarity": "effects",
    "projections": "effects",
    "steered_tokens": "effects",
    "multiplier_limit": "effects",
    "Sweep": "effects",
    "TokenShift": "effects",
    "Effect": "effects",
    "Similarity": "effects",
    "Projections": "effects",
    "ProjectionSet": "effects",
    "TokenValues": "effects",
    "prompt_ids": "prompts",
    "plot_effect": "plots",
    "plot_layers": "plots",
    "plot_shift": "plots",
    "plot_similarity": "plots",
    "plot_tokens": "plots",
    "plot_projections": "plots",
    "plot_norms": "plots",
    "plot_contrast": "plots",
    "Control": "widgets",
    "Fixed": "widgets",
    "Span": "widgets",
    "explore": "widgets",
    "token_strip": "widgets",
    "Html": "widgets",
}

__all__ = list(_home)


def __getattr__(name: str) -> Any:
    "Import `name` from its module on first use (PEP 562)."
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_home[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
