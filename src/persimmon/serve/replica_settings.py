"""What a configuration file says about several engines behind one endpoint. Knows nothing of Ray."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from persimmon.serve.build import EngineSettings


class ReplicaSettings(BaseModel):
    """`args` of the application in configs/ray-serve.yaml; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "mini"
    """Directory or name; each machine must have it, or be able to download it."""
    served_model_name: str | None = None
    replicas: int = Field(2, ge=1)
    """Engines."""
    cpus: float = Field(1, ge=0)
    """Cores that Ray sets aside for an engine."""
    gpus: float = Field(0, ge=0)
    load: dict[str, Any] = {}
    """Arguments of `persimmon.load`: engine, device, dtype, threads, kv_dtype, ..."""
    context: int | None = Field(None, ge=1)
    max_concurrency: int = Field(16, ge=1)
    """Requests that run together on one engine."""
    max_queue: int = Field(64, ge=0)
    """Requests that may wait, over all engines."""
    cache_tokens: int | None = Field(None, ge=1)
    """Tokens of one engine's cache."""
    api_key_file: str | None = None
    """One key per line; without it, PERSIMMON_API_KEY of the process that started Ray."""
    allow_public_without_key: bool = False
    allowed_hosts: list[str] = []
    max_body_bytes: int = Field(4 << 20, ge=1)
    request_seconds: float = Field(3_600, gt=0)
    health_check_seconds: float = Field(5, gt=0)
    """Between Ray's looks at an engine."""

    def engine(self) -> EngineSettings:
        """What one engine loads and runs."""
        options = self.load if self.context is None else {**self.load, "context": self.context}
        return EngineSettings(
            self.model, load_options=options, max_running=self.max_concurrency, cache_tokens=self.cache_tokens
        )
