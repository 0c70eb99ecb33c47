"""What an operator can set, by environment variables CLEARFOLD_*, and its defaults."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 2**20
GIB = 2**30


def default_data() -> Path:
    """The user's data folder, as the XDG base directory specification has it."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "clearfold"


class Settings(BaseSettings):
    """The settings of one server."""

    model_config = SettingsConfigDict(env_prefix="CLEARFOLD_", frozen=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on; there is no login")
    port: int = Field(default=8000, ge=0, le=65535)
    data: Path = Field(default_factory=default_data, description="Folder of the model store")
    device: str = Field(default="auto", description="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    default_model: str = Field(default="builtin", description="The network that POST /v1/explain uses")
    max_upload: int = Field(default=GIB, gt=0, description="Largest model file with its data files, in bytes")
    max_image: int = Field(default=32 * MIB, gt=0, description="Largest image file, in bytes")
    conversion_seconds: float = Field(default=120, gt=0, description="Longest that a conversion may take")
    conversion_memory: int = Field(default=8 * GIB, gt=0, description="Bytes that a conversion may hold")
    spare_converter: bool = Field(
        default=True,
        description="Keep a conversion process waiting, so that uploads are ready seconds sooner",
    )
    conversions: int = Field(default=1, ge=1, description="Conversions at the same time")
    loaded_models: int = Field(default=8, ge=1, description="Networks kept in memory, the last used ones")
    concurrency: int = Field(default=2, ge=1, description="Explanations computed at the same time")
    explanation_seconds: float = Field(
        default=120, gt=0, description="Longest that a method other than LRP may compute for one explanation"
    )
    explanation_memory: int = Field(
        default=2 * GIB, gt=0, description="Bytes that such a method may compute with at once, about"
    )
    queue: int = Field(default=32, ge=0, description="Requests that may wait for their turn; more get 503")
    # Reading these formats can run code that is in the file. That happens in the sandbox of the conversions, but
    # whoever switches it on should know who uploads; ONNX files are only read.
    allow_executable: bool = Field(default=False, description="Take TorchScript and torch.export files too")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
