"""Whether a job's weights fit into memory, told before any of them is read."""

from __future__ import annotations

import psutil
import torch

from groupwise.config import Job
from groupwise.disk import in_words
from groupwise.errors import ConfigError, GroupwiseError, ModelError
from groupwise.models.load import choose_device, choose_dtype, load_config
from groupwise.models.size import parameter_count, weight_bytes
from groupwise.wiring.settings import (
    objective_of,
)


def check_memory(job: Job, source: str, trust_remote_code: bool) -> None:
    """Refuse, before any weight is read, a job whose weights cannot fit. Raises ConfigError or ModelError."""
    shortage = lacking_memory(job, source, trust_remote_code)
    if shortage is not None:
        raise shortage


def lacking_memory(job: Job, source: str, trust_remote_code: bool) -> GroupwiseError | None:
    """What to say where a job's weights cannot fit; None where they do. Raises ModelError where it cannot be told.

    Counted is what is as large as the model, as in a plan. What depends on the batch can be made smaller, so it is no
    reason to refuse a job.
    """
    objective = objective_of(job)
    device = choose_device(job.model.device)
    count = parameter_count(load_config(source, revision=job.model.revision, trust_remote_code=trust_remote_code))
    held = weight_bytes(count, choose_dtype(job.model.dtype, device), objective.needs_reference)
    reference = held.pop("reference")
    training, free = sum(held.values()), available_memory(device)
    room = f"{in_words(training)} are needed to train its {count / 1e6:,.1f}M parameters, {in_words(free)} are free"
    if training > free:
        return ModelError(f"{source} does not fit on {device}: {room}. Use a smaller model or a larger device.")
    if training + reference > free:
        return ConfigError(
            f"`objective.beta` = {objective.beta:g} needs a reference model beside the policy, and there is no room "
            f"for its {in_words(reference)} on {device}: {room}. Set objective.beta to 0, or use a smaller model."
        )
    return None


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
