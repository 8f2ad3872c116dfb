"""The network: tensors in, tensors out. Knows no text, no files and no HTTP.

Letters used in every shape: N sentences, K hypotheses of a sentence, S source length,
T target length, H hidden size, E embedding size, A attention size, L layers, V vocabulary;
rows are N*K.
"""

from model.network import Network
from model.options import ModelOptions
from model.serving import FORMAT_VERSION, Ensemble, Memory, ServingModel, SpecialTokens

__all__ = [
    "FORMAT_VERSION",
    "Ensemble",
    "Memory",
    "ModelOptions",
    "Network",
    "ServingModel",
    "SpecialTokens",
]
