"""Settings of S3 access."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from scldm.config import StrictModel


class S3Client(StrictModel):
    """Requests to S3 or a compatible server (MinIO, Ceph)."""

    endpoint: str | None = None
    """Address of a server that is not AWS, for example https://minio.lab:9000; null for AWS."""
    addressing: Literal["virtual", "path"] = "virtual"
    """How a bucket is named: bucket.host (AWS) or host/bucket (most other servers)."""
    tries: PositiveInt = Field(7, le=12)
    """Attempts of one request; the wait starts at 25 ms and doubles: 7 attempts take 3 seconds, 12 take 100."""
    connect_seconds: PositiveFloat = 3.0
    """Time limit of opening a connection."""
    request_seconds: PositiveFloat = 30.0
    """Time limit of a request without any data."""

    @field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "http://host")
        plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError(f"{value!r} is no address of a server: http:// or https://, host and port, nothing more")
        return value

    def filesystem(self, *, region: str | None, anonymous: bool = False) -> Any:
        """Return a pyarrow filesystem with these settings. Credentials are found as AWS's own tools find them.

        Args:
            region: Of the bucket; None leaves it to AWS's settings.
        """
        from pyarrow import fs

        options: dict[str, Any] = {
            "anonymous": anonymous,
            "connect_timeout": self.connect_seconds,
            "request_timeout": self.request_seconds,
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=self.tries),
            "force_virtual_addressing": self.addressing == "virtual" and self.endpoint is not None,
        }
        if region is not None:
            options["region"] = region
        if self.endpoint is not None:
            parts = urlsplit(self.endpoint)
            options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        return fs.S3FileSystem(**options)


class S3Config(S3Client):
    """Reading cells from S3."""

    max_parallel: PositiveInt = Field(8, le=256)
    """Concurrent requests of one process (its two compute threads may add one each). Too many over all processes make
    the store answer SlowDown."""

    def tiledb(self) -> dict[str, str]:
        """Return the settings as a TileDB configuration."""
        settings: dict[str, str | int] = {
            "sm.io_concurrency_level": self.max_parallel,  # threads that read; each of them one request at a time, as
            "vfs.s3.max_parallel_ops": 1,  # this cuts a large request into so many
            "vfs.s3.connect_max_tries": self.tries,
            "vfs.s3.connect_timeout_ms": round(self.connect_seconds * 1000),
            "vfs.s3.request_timeout_ms": round(self.request_seconds * 1000),
        }
        if self.endpoint is not None:
            parts = urlsplit(self.endpoint)
            settings |= {"vfs.s3.endpoint_override": parts.netloc, "vfs.s3.scheme": parts.scheme}
        if self.addressing == "path":
            settings["vfs.s3.use_virtual_addressing"] = "false"
        return {k: str(v) for k, v in settings.items()}
