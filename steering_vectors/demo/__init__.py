"""Models and data to try things with: tiny models of many families, the embedded model, small contrastive sets.

`python -m steering_vectors.demo` trains on the embedded model and prints what steering does.
"""

from .concepts import CONCEPTS as CONCEPTS
from .concepts import Concept as Concept
from .concepts import joy_chats as joy_chats
from .concepts import joy_pairs as joy_pairs
from .contrasts import joy_contrasts as joy_contrasts
from .model import load_demo_model as load_demo_model
from .tiny import tiny_model as tiny_model
from .tiny import tiny_tokenizer as tiny_tokenizer
