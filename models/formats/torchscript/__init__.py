"""TorchScript files in: an interpreter of their graphs as nn.Modules that keep the layers' names."""

from models.formats.torchscript.reader import TorchScriptSource, read

__all__ = ["TorchScriptSource", "read"]
