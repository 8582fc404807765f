"""Weights & Biases as a metrics sink.  Imported only by runs that ask for it: the package is an optional extra."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import wandb

from megatron_intuitor.config import RunConfig
from megatron_intuitor.observability.text import redact


class WandbSink:
    """One Weights & Biases run; ``run_id`` continues an earlier one.

    It is offline (files under ``output_dir/wandb``, sent later by ``wandb sync``) where no key is found in
    ``WANDB_API_KEY``, ``WANDB_IDENTITY_TOKEN_FILE``, the netrc file or wandb's own settings; ``WANDB_MODE`` overrules.
    The config is uploaded with credentials in URLs blanked; terminal output is not captured.
    """

    name = "Weights & Biases"

    def __init__(self, config: RunConfig, output_dir: Path, run_id: str | None) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.offline = "WANDB_MODE" not in os.environ and not has_credentials()
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=output_dir.name,
            dir=str(output_dir),
            id=run_id,
            resume="allow",
            mode="offline" if self.offline else None,
            config=redact(config.model_dump(mode="json")),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Our own step axis: wandb's counter drops metrics of a step that is logged again after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """The id that a resumed run passes in again."""
        return self._run.id

    def log(self, metrics: Mapping[str, float], step: int, weight_version: int) -> None:
        """Send the metrics with their step and weight version."""
        self._run.log({**metrics, "step": step, "weight_version": weight_version})

    def close(self, *, failed: bool = False) -> None:
        """Finish the run; a failed one is marked so."""
        self._run.finish(exit_code=1 if failed else 0)


def has_credentials() -> bool:
    """Whether wandb would find a key without asking; the key itself is never kept."""
    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not path.exists():
        return False
    entry = netrc.netrc(str(path)).authenticators(urlsplit(settings.base_url).netloc)
    return entry is not None and bool(entry[2])
