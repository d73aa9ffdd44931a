"""The Python worker that a Flink task manager starts: `--environment_type=PROCESS`.

Does what Beam's container does at its start, without a container: asks the task manager where to
connect and runs the SDK worker. It installs nothing, so this package and the pipeline's code must
be importable by the Python that runs it. It ends when its task manager ends, however that happens.

    --environment_type=PROCESS
    --environment_config='{"command": "/path/to/start-worker"}'

where the command is a file that runs `python -m data_beam.flink.worker "$@"` (`cluster.py` writes
one).
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence

import grpc
from apache_beam.portability.api import (
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    endpoints_pb2,
)
from google.protobuf import json_format, text_format

_CONNECT_SECONDS = 60.0
_WATCH_SECONDS = 0.2


def environment(provision_endpoint: str, worker_id: str) -> dict[str, str]:
    """The environment variables that Beam's SDK worker reads its connections from."""
    channel = grpc.insecure_channel(provision_endpoint)
    grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
    # The runner finds out who is asking from this header.
    info = (
        beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        .GetProvisionInfo(
            beam_provision_api_pb2.GetProvisionInfoRequest(),
            metadata=[("worker_id", worker_id)],
            timeout=_CONNECT_SECONDS,
        )
        .info
    )
    variables = {
        "WORKER_ID": worker_id,
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
    }
    services = {
        "LOGGING_API_SERVICE_DESCRIPTOR": info.logging_endpoint,
        "CONTROL_API_SERVICE_DESCRIPTOR": info.control_endpoint,
        "STATUS_API_SERVICE_DESCRIPTOR": info.status_endpoint,
    }
    for name, service in services.items():
        if service.url:
            descriptor = endpoints_pb2.ApiServiceDescriptor(url=service.url)
            variables[name] = text_format.MessageToString(descriptor)
    return variables


def end_with(parent: int) -> None:
    """Ends this process at once when the process `parent` is no longer its parent: what it was
    writing is made again elsewhere, and must not be written by two."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--provision_endpoint", required=True)
    known, _ = parser.parse_known_args(arguments)
    end_with(os.getppid())
    os.environ.update(environment(known.provision_endpoint, known.id))
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main([])


if __name__ == "__main__":
    main()
