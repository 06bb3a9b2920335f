"""Weights & Biases: one W&B run for a run, resumed or not. NaN and infinities go as they are.

W&B takes no step twice: of a step that a resumed run repeats, the first version stays there.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sip.config import Config
from megatron_sip.config_metrics import Wandb
from megatron_sip.sinks.progress import Progress
from megatron_sip.sinks.run_ids import keep_id, read_id

FINISH_S = 15.0  # for the upload at the end; what is left stays in run.dir/wandb
NAME_LENGTH = 48  # of the part of the id that a person reads


class WandbSink:
    """All metrics of a step in one row, under the run's own step numbers."""

    def __init__(
        self,
        config: Config,
        settings: Wandb,
        progress: Progress,
        *,
        last_step: int,
        note: Callable[[str], None],
    ) -> None:
        """Args: last_step: of those in metrics.jsonl.

        Raises: ValueError if W&B cannot be reached or refuses.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own crashes, elsewhere
        import wandb  # pyright: ignore[reportMissingImports]

        run_dir = config.run.dir.resolve()
        place = f"wandb {settings.entity or ''}/{settings.project}"
        run_id = read_id(run_dir, place)
        resumed = run_id is not None
        if run_id is None:
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name)[:NAME_LENGTH]
            run_id = f"{name}-{secrets.token_hex(4)}"
        online = settings.mode == "online"
        try:
            self._run: Any = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                id=run_id,
                name=run_dir.name,
                resume="allow" if online else None,
                dir=run_dir,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(
                    console="off", silent=True, save_code=False, finish_timeout=FINISH_S
                ),
            )
        except (wandb.Error, OSError) as error:
            raise ValueError(
                f"metrics.wandb: W&B did not take the run ({error}); look at WANDB_API_KEY, "
                'project and entity, or set metrics.wandb.mode = "offline"'
            ) from error
        keep_id(run_dir, place, run_id)
        known = self._run.starting_step - 1 if online else last_step  # offline, nobody can say
        self._last_step = known if resumed else 0
        self._progress = progress
        if online:
            note(f"wandb: {self._run.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._last_step:
            self._run.log(dict(metrics), step=step, commit=True)
            self._last_step = step

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._progress.ended == "finished" else 1)
