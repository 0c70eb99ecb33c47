"""Python client of the Clearfold service: relevance heatmaps of images, as numpy arrays and PIL images.

from clearfold_client import Client

with Client("http://127.0.0.1:8000") as clearfold:
    clearfold.explain("cat.jpg").overlay().save("cat.heatmap.png")
"""

from clearfold_client.client import AsyncClient, Client
from clearfold_client.problems import (
    BadLayer,
    BadTarget,
    InvalidImage,
    InvalidParameter,
    ModelNotFound,
    NotReachable,
    Overloaded,
    Problem,
    TookTooLong,
    TooLarge,
    UnsupportedModel,
)
from clearfold_client.results import (
    Explanation,
    Health,
    Inner,
    Layer,
    Method,
    Model,
    Option,
    Prediction,
    Target,
)

__all__ = [
    "AsyncClient",
    "BadLayer",
    "BadTarget",
    "Client",
    "Explanation",
    "Health",
    "Inner",
    "InvalidImage",
    "InvalidParameter",
    "Layer",
    "Method",
    "Model",
    "ModelNotFound",
    "NotReachable",
    "Option",
    "Overloaded",
    "Prediction",
    "Problem",
    "Target",
    "TooLarge",
    "TookTooLong",
    "UnsupportedModel",
]
