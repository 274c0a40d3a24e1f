"""Steering vectors for language models.

Contrastive texts go in, a direction comes out, and while a `with` block is open the model leans that way on exactly
the tokens you named:

    v = train_steering_vector(model, tokenizer, pairs, layers=[15, 18])
    with v[18].apply(model, multiplier=2):
        model.generate(**inputs)
"""

from types import ModuleType as _ModuleType

__version__ = "1.0.0"

# The names of the 0.12 library, in their order.
from .train.aggregators import Aggregator as Aggregator
from .train.aggregators import mean_aggregator as mean_aggregator
from .train.aggregators import pca_aggregator as pca_aggregator
from .train.aggregators import logistic_aggregator as logistic_aggregator
from .model.families import LayerType as LayerType
from .model.families import LayerMatcher as LayerMatcher
from .model.families import ModelLayerConfig as ModelLayerConfig
from .model.overview import get_num_matching_layers as get_num_matching_layers
from .model.overview import guess_and_enhance_layer_config as guess_and_enhance_layer_config
from .steer.operators import PatchDeltaOperator as PatchDeltaOperator
from .model.recording import record_activations as record_activations
from .vectors.vector import SteeringVector as SteeringVector
from .steer.steering import SteeringPatchHandle as SteeringPatchHandle
from .train.training import train_steering_vector as train_steering_vector
from .train.samples import SteeringVectorTrainingSample as SteeringVectorTrainingSample
from .train.aggregators import aggregate_activations as aggregate_activations
from .train.extraction import extract_activations as extract_activations
from .steer.operators import ablation_operator as ablation_operator
from .steer.operators import addition_operator as addition_operator
from .steer.operators import ablation_then_addition_operator as ablation_then_addition_operator

# The others, from the tokens to the controls.
from .steer.operators import subspace_ablation_operator as subspace_ablation_operator
from .train.aggregators import AccumulatingAggregator as AccumulatingAggregator
from .model.overview import find_layers as find_layers
from .model.overview import FoundLayers as FoundLayers
from .model.recording import Recording as Recording
from .vectors.provenance import Provenance as Provenance
from .steer.tokens import Tokens as Tokens
from .steer.steering import Steering as Steering
from .steer.gates import Condition as Condition
from .steer.gates import Gate as Gate
from .vectors.steerings import load_gate as load_gate
from .vectors.steerings import load_steering as load_steering
from .vectors.steerings import save_gate as save_gate
from .vectors.steerings import save_steering as save_steering
from .steer.strengths import decay as decay
from .steer.strengths import ramp as ramp
from .steer.verdicts import Decisions as Decisions
from .train.gating import train_gate as train_gate
from .train.optimizing import optimize_steering_vector as optimize_steering_vector
from .train.objectives import ContrastScores as ContrastScores
from .train.objectives import Preferences as Preferences
from .train.curvature import Curvature as Curvature
from .train.pools import OPEN_PROMPTS as OPEN_PROMPTS
from .train.pools import Pool as Pool
from .train.pools import sample_pool as sample_pool
from .train.written import predicted_shift as predicted_shift
from .train.readers import Reader as Reader
from .train.readers import train_reader as train_reader
from .vectors.baking import bake as bake
from .evaluate.sweeps import sweep as sweep
from .evaluate.shifts import next_token_shift as next_token_shift
from .evaluate.effects import completion_gap as completion_gap
from .evaluate.effects import answer_gap as answer_gap
from .evaluate.effects import text_loss as text_loss
from .evaluate.calibration import divergence as divergence
from .evaluate.calibration import calibrate as calibrate
from .evaluate.tuning import tune as tune
from .evaluate.report import report as report
from .evaluate.writing import text_shift as text_shift
from .evaluate.anchors import prompt_effect as prompt_effect
from .evaluate.anchors import few_shot as few_shot
from .evaluate.anchors import random_direction as random_direction
from .evaluate.geometry import similarity as similarity
from .evaluate.projections import projections as projections
from .evaluate.marks import steered_tokens as steered_tokens
from .evaluate.geometry import multiplier_limit as multiplier_limit
from .evaluate.sweeps import Sweep as Sweep
from .evaluate.shifts import TokenShift as TokenShift
from .evaluate.effects import Effect as Effect
from .evaluate.calibration import Damage as Damage
from .evaluate.tuning import Tuning as Tuning
from .evaluate.cards import Report as Report
from .evaluate.writing import TextShift as TextShift
from .evaluate.candidates import TuningRow as TuningRow
from .evaluate.anchors import PromptEffect as PromptEffect
from .evaluate.intervals import Estimate as Estimate
from .train.damage import DamageScorer as DamageScorer
from .train.damage import EVERYDAY_PROMPTS as EVERYDAY_PROMPTS
from .evaluate.writing import WRITING_PROMPTS as WRITING_PROMPTS
from .train.damage import OwnAnswers as OwnAnswers
from .train.damage import own_answers as own_answers
from .evaluate.geometry import Similarity as Similarity
from .evaluate.projections import Projections as Projections
from .evaluate.projections import ProjectionSet as ProjectionSet
from .evaluate.monitors import auroc as auroc
from .evaluate.monitors import monitor as monitor
from .evaluate.monitors import Replies as Replies
from .evaluate.results import TokenValues as TokenValues
from .train.prompts import prompt_ids as prompt_ids
from .display.plots import plot_effect as plot_effect
from .display.plots import plot_layers as plot_layers
from .display.plots import plot_shift as plot_shift
from .display.plots import plot_similarity as plot_similarity
from .display.plots import plot_tokens as plot_tokens
from .display.plots import plot_projections as plot_projections
from .display.plots import plot_replies as plot_replies
from .display.plots import plot_norms as plot_norms
from .display.plots import plot_contrast as plot_contrast
from .display.evidences import plot_tuning as plot_tuning
from .display.evidences import plot_report as plot_report
from .display.controls import Control as Control
from .display.sliders import Setting as Setting
from .display.sliders import Range as Range
from .display.explorer import explore as explore
from .display.strips import token_strip as token_strip
from .markup import Html as Html

__all__ = [name for name, value in globals().items() if not name.startswith("_") and not isinstance(value, _ModuleType)]
